//! The items of the stream, and the rules they keep.

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::error::printable;
use super::names::{check_path, is_carried};
use super::{MAX_NAME, MAX_PATH, MAX_XATTR_VALUE, MAX_XATTRS, TreeError, TreeKind};

/// One item of the stream, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TreeItem {
    /// A path and its inode. For a regular file, `Data` items follow, closed by `FileEnd`.
    Entry(Entry),
    /// Content of the file whose entry came last: 1 to [`MAX_DATA`](super::MAX_DATA) bytes. Holes are not sent.
    Data {
        /// Where it goes in the file, in bytes.
        offset: u64,
        /// The content.
        bytes: Bytes,
    },
    /// The file is complete.
    FileEnd {
        /// [`ContentSum`] of what was sent.
        checksum: u64,
    },
    /// Sent in an earlier pass, and gone now, with all beneath it.
    Removed {
        /// The path that is gone.
        path: Vec<u8>,
    },
}

/// A path with its inode's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, raw bytes. Empty for the root itself.
    pub path: Vec<u8>,
    /// The type and what belongs to it.
    pub kind: EntryKind,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits, set-ID bits and sticky bit: within `0o7777`.
    pub mode: u32,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last read.
    pub atime: Timestamp,
    /// Extended attributes by name, sorted: names and values. Those not listed are removed.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The type of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// Its size in bytes; what no data covers is a hole, or what was there.
        size: u64,
        /// What becomes of what the destination has.
        content: Content,
    },
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink {
        /// What it says, never interpreted.
        target: Vec<u8>,
    },
    /// A character device; 0:0 in an upper layer is a whiteout.
    CharDevice {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// The name of a Unix socket.
    Socket,
    /// Another name of an inode; owner, mode, times and attributes are those of the target.
    Hardlink {
        /// The path of an entry sent earlier.
        target: Vec<u8>,
    },
}

/// How the data that follows an entry makes the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A new inode, all holes before the data comes. Other names of the old inode keep the old one.
    Whole,
    /// The file as an earlier pass left it, resized, then overwritten where data comes. All its names see it.
    Patch,
}

/// A point in time, relative to the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Whole seconds, negative before 1970.
    pub secs: i64,
    /// Nanoseconds, below 1 000 000 000.
    pub nanos: u32,
}

/// The checksum over a file's content as sent: xxh3 of its size, then offset, length and bytes of each data item.
/// It finds damage and lost items; the channel's TLS is what keeps an attacker out.
pub struct ContentSum(Box<Xxh3>);

impl ContentSum {
    /// Starts the checksum of a file of `size` bytes.
    pub fn new(size: u64) -> Self {
        let mut sum = Box::new(Xxh3::new());
        sum.update(&size.to_le_bytes());
        Self(sum)
    }

    /// Adds a data item.
    pub fn add(&mut self, offset: u64, bytes: &[u8]) {
        self.0.update(&offset.to_le_bytes());
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// The checksum for [`TreeItem::FileEnd`].
    pub fn finish(&self) -> u64 {
        self.0.digest()
    }
}

/// Device numbers as Linux encodes them: `MKDEV` in `include/linux/kdev_t.h`.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;

impl Entry {
    /// Checks all that can be checked without a filesystem. Both sides do: the scanner, so that an obstacle shows in
    /// the first live pass, and the writer, because it trusts nobody.
    ///
    /// # Errors
    /// [`TreeError::BadPath`], [`TreeError::BadEntry`] or [`TreeError::BadXattr`].
    pub fn check(&self, tree: TreeKind) -> Result<(), TreeError> {
        if !(self.path.is_empty() && self.kind == EntryKind::Dir) {
            check_path(&self.path)?;
        }
        let refuse = |reason| Err(TreeError::BadEntry { path: printable(&self.path), reason });
        match &self.kind {
            EntryKind::File { size, .. } if i64::try_from(*size).is_err() => {
                return refuse("its size is beyond 8 EiB");
            }
            EntryKind::Symlink { target } if target.is_empty() => {
                return refuse("its link target is empty");
            }
            EntryKind::Symlink { target } if target.len() >= MAX_PATH => {
                return refuse("its link target is too long");
            }
            EntryKind::Symlink { target } if target.contains(&0) => {
                return refuse("its link target holds a NUL byte");
            }
            EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor }
                if *major > MAX_MAJOR || *minor > MAX_MINOR =>
            {
                return refuse("its device number is out of range");
            }
            EntryKind::Hardlink { target } => check_path(target)?,
            _ => {}
        }
        if self.mode & !0o7777 != 0 {
            return refuse("its mode has more than permission bits");
        }
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return refuse("its owner is the invalid ID");
        }
        if self.mtime.nanos >= 1_000_000_000 || self.atime.nanos >= 1_000_000_000 {
            return refuse("a time has a whole second of nanoseconds");
        }
        if self.xattrs.len() > MAX_XATTRS {
            return refuse("it has more than 256 extended attributes");
        }
        self.xattrs.iter().try_for_each(|(name, value)| self.check_xattr(tree, name, value))
    }

    fn check_xattr(&self, tree: TreeKind, name: &[u8], value: &[u8]) -> Result<(), TreeError> {
        let refuse = |reason| {
            Err(TreeError::BadXattr { path: printable(&self.path), name: name.escape_ascii().to_string(), reason })
        };
        if name.len() > MAX_NAME || name.contains(&0) {
            return refuse("its name is too long or holds a NUL byte");
        }
        if !is_carried(tree, name) {
            return refuse("a tree of this kind does not carry it");
        }
        if value.len() > MAX_XATTR_VALUE {
            return refuse("its value is longer than 64 KiB");
        }
        Ok(())
    }
}
