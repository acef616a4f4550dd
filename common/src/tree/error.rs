//! What can go wrong with a tree.

use std::io;

/// Whoever takes the items has gone; why is theirs to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream of tree items was closed")]
pub struct SinkClosed;

/// A tree could not be read, or an item could not be applied.
///
/// Paths are relative to the tree's root, escaped for printing; the root itself is `.`.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A system call failed.
    #[error("cannot {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A path that no tree may hold.
    #[error("path {path} is refused: {reason}")]
    BadPath {
        /// The path.
        path: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// An entry whose metadata no inode can have.
    #[error("entry {path} is refused: {reason}")]
    BadEntry {
        /// The entry's path.
        path: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// An extended attribute that may not be set.
    #[error("attribute {name} of {path} is refused: {reason}")]
    BadXattr {
        /// The entry's path.
        path: String,
        /// The attribute's name.
        name: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// An item came while a file's content was still expected.
    #[error("{item} came before the end of the file {open}")]
    FileStillOpen {
        /// The item that came.
        item: String,
        /// The file that is open.
        open: String,
    },
    /// Content came though no file is open.
    #[error("{item} came without an open file")]
    NoOpenFile {
        /// `data` or `file end`.
        item: &'static str,
    },
    /// Content outside the file, or more than one item may hold.
    #[error("data of {path} is refused: {len} bytes at {offset} of a file of {size} bytes, at most {MAX_DATA} each", MAX_DATA = super::MAX_DATA)]
    BadData {
        /// The file's path.
        path: String,
        /// Where the data would go.
        offset: u64,
        /// How long it is.
        len: usize,
        /// The size its entry declared.
        size: u64,
    },
    /// The content is not what the source sent.
    #[error("content of {path} is damaged: checksum {computed:016x}, sent was {declared:016x}")]
    Checksum {
        /// The file's path.
        path: String,
        /// What the peer says.
        declared: u64,
        /// What was received.
        computed: u64,
    },
    /// A hard link to a name that is not there.
    #[error("cannot link {path}: its target {target} was not sent")]
    LinkTarget {
        /// The link.
        path: String,
        /// What it should link to.
        target: String,
    },
    /// A patch for something that is no regular file here.
    #[error("cannot patch {path}: no regular file of that name was sent")]
    PatchTarget {
        /// The file's path.
        path: String,
    },
    /// The receiver of the items has gone.
    #[error(transparent)]
    SinkClosed(#[from] SinkClosed),
}

impl TreeError {
    /// Adds the operation and the path to an error of the system.
    pub(super) fn io<E: Into<io::Error>>(operation: &'static str, path: &[u8]) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { operation, path: printable(path), source: source.into() }
    }
}

/// A path as it may be printed: control characters, quotes and bytes beyond ASCII are escaped.
pub(super) fn printable(path: &[u8]) -> String {
    if path.is_empty() { ".".to_owned() } else { path.escape_ascii().to_string() }
}
