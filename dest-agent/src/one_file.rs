//! A single file of the host, such as a container's log, written in place.
//!
//! A tree's writer replaces files; this one keeps the inode, because CRIU has had the file open since before the freeze.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use longhaul_common::tree::{Content, ContentSum, Entry, EntryKind, MAX_DATA, TreeItem};
use thiserror::Error;

/// An item that can't be applied.
#[derive(Debug, Error)]
pub enum OneFileError {
    /// Not what one file consists of.
    #[error("the peer sent {0} for the single file {1}")]
    OutOfTurn(&'static str, PathBuf),
    /// Damaged.
    #[error("{0} arrived damaged: its checksum differs from what the peer says")]
    Damaged(PathBuf),
    /// It can't be written.
    #[error("can't write {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes one file.
pub struct OneFile {
    path: PathBuf,
    name: Vec<u8>,
    open: Option<Open>,
}

struct Open {
    file: File,
    entry: Entry,
    size: u64,
    sum: ContentSum,
}

impl OneFile {
    /// The file `name` in `dir`.
    pub fn new(dir: &Path, name: &[u8]) -> Self {
        use std::os::unix::ffi::OsStrExt;
        Self { path: dir.join(std::ffi::OsStr::from_bytes(name)), name: name.to_vec(), open: None }
    }

    /// Applies one item.
    pub fn apply(&mut self, item: TreeItem) -> Result<(), OneFileError> {
        let out_of_turn = |what| OneFileError::OutOfTurn(what, self.path.clone());
        let wrap = |source| OneFileError::Write { path: self.path.clone(), source };
        match item {
            TreeItem::Entry(entry) => {
                let EntryKind::File { size, content } = entry.kind else { return Err(out_of_turn("no file")) };
                let plain = entry.path == self.name && self.open.is_none() && i64::try_from(size).is_ok();
                if !plain || entry.mode > 0o7777 {
                    return Err(out_of_turn("another file"));
                }
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .mode(0o600)
                    .custom_flags(nix::libc::O_NOFOLLOW)
                    .open(&self.path)
                    .map_err(wrap)?;
                if content == Content::Whole {
                    file.set_len(0).map_err(wrap)?;
                }
                file.set_len(size).map_err(wrap)?;
                self.open = Some(Open { file, entry, size, sum: ContentSum::new(size) });
            }
            TreeItem::Data { offset, bytes } => {
                let Some(open) = &mut self.open else { return Err(out_of_turn("data without a file")) };
                let fits = offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= open.size);
                if !fits || bytes.len() > MAX_DATA {
                    return Err(out_of_turn("data beyond its size"));
                }
                open.sum.add(offset, &bytes);
                open.file.write_all_at(&bytes, offset).map_err(wrap)?;
            }
            TreeItem::FileEnd { checksum } => {
                let Some(open) = self.open.take() else { return Err(out_of_turn("an end without a file")) };
                if open.sum.finish() != checksum {
                    return Err(OneFileError::Damaged(self.path.clone()));
                }
                fchown(&open.file, Some(open.entry.uid), Some(open.entry.gid)).map_err(wrap)?;
                open.file.set_permissions(std::fs::Permissions::from_mode(open.entry.mode)).map_err(wrap)?;
            }
            TreeItem::Removed { .. } => return Err(out_of_turn("a removal")),
        }
        Ok(())
    }

    /// Ends a pass.
    pub fn finish(&self) -> Result<(), OneFileError> {
        match self.open {
            Some(_) => Err(OneFileError::OutOfTurn("half a file", self.path.clone())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn pass(file: &mut OneFile, name: &[u8], content: &'static [u8], how: Content) -> Result<(), OneFileError> {
        let mut sum = ContentSum::new(content.len() as u64);
        sum.add(0, content);
        file.apply(TreeItem::Entry(Entry {
            path: name.to_vec(),
            kind: EntryKind::File { size: content.len() as u64, content: how },
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            mode: 0o640,
            mtime: Default::default(),
            atime: Default::default(),
            xattrs: Vec::new(),
        }))?;
        file.apply(TreeItem::Data { offset: 0, bytes: content.into() })?;
        file.apply(TreeItem::FileEnd { checksum: sum.finish() })?;
        file.finish()
    }

    #[test]
    fn the_inode_stays_while_the_content_changes() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut file = OneFile::new(dir.path(), b"log");
        pass(&mut file, b"log", b"long first", Content::Whole).expect("applies");
        let first = std::fs::metadata(dir.path().join("log")).expect("there").ino();
        pass(&mut file, b"log", b"second", Content::Whole).expect("applies");
        let second = std::fs::metadata(dir.path().join("log")).expect("there");
        assert_eq!(second.ino(), first);
        assert_eq!(std::fs::read(dir.path().join("log")).expect("reads"), b"second");
        pass(&mut file, b"../log", b"x", Content::Whole).expect_err("another name");
    }
}
