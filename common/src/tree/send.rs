//! The source's second half: turns what a pass has found into items.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{FileType, Statx};

use super::content::{self, BlockHashes, ContentError, Counts};
use super::entry::{Content, ContentSum, EntryKind, TreeItem};
use super::known::{Known, Settled};
use super::names::join;
use super::scan::{FirstName, OpenDir, Pass, Scanner, Writers, still_there};
use super::watch::{UNIT, is_exception};
use super::{PATCH_FROM, SinkClosed, TreeError, metadata, sys};

impl Scanner {
    /// One name that is new or may have changed.
    pub(super) fn send(&mut self, dir: &mut OpenDir, name: &CStr, pass: &mut Pass<'_>) -> Result<(), TreeError> {
        let path = join(&dir.path, name.to_bytes());
        let Some(node) = still_there(sys::hold_mounted(dir.fd.as_fd(), name), "open", &path)? else {
            return Ok(());
        };
        let now = sys::now();
        let status = sys::status(node.as_fd()).map_err(TreeError::io("examine", &path))?;
        pass.stats.entries_scanned += 1;
        let mut known = Known::new(&status, now, self.kind, self.pass);
        let inode = known.stamp.inode;
        let has_names = known.stamp.links > 1 && !known.is_dir && !known.is_whiteout;
        let before = dir.children.get(name.to_bytes());
        // If its content is, too, all of it is as it was.
        let has_same_stamp = |before: &&Known| before.settled != Settled::No && before.stamp == known.stamp;
        let same = before.filter(has_same_stamp).filter(|_| !self.is_mount(&status));
        if before.is_some_and(|before| before.is_dir) && !known.is_dir {
            self.forget(path.clone());
        }
        if let Some(first) = pass.links.get(&inode).filter(|_| has_names) {
            let is_as_it_was = !first.sent && same.is_some();
            known = Known { seen: self.pass, ..first.known.clone() };
            if !is_as_it_was {
                let kind = EntryKind::Hardlink { target: first.path.clone() };
                self.send_entry(path.clone(), kind, node.as_fd(), &status, pass)?;
            }
        } else {
            match metadata::file_type(&status) {
                FileType::RegularFile => {
                    if pass.writers == Writers::Frozen {
                        known.settled = Settled::No;
                    }
                    if let Some(sum) = same.and_then(|before| before.sum)
                        && sum == self.sum_of(&path, node.as_fd(), &status, pass)?
                    {
                        known.sum = Some(sum);
                        pass.count_unsettled(&known);
                        if has_names {
                            pass.links.insert(inode, FirstName { path, known: known.clone(), sent: false });
                        }
                        dir.children.insert(name.to_bytes().into(), known);
                        return Ok(());
                    }
                    // One that has lost a name goes whole: what that name had may have been patched with it.
                    let is_it =
                        |before: &&Known| before.stamp.inode == inode && before.stamp.links <= known.stamp.links;
                    let is_other = before.is_none_or(|before| before.stamp.inode != inode);
                    let mut old = before.filter(is_it).and_then(|before| before.blocks.clone());
                    if is_other && let Some((from, blocks)) = self.take_renamed(dir, &known, &status) {
                        let kind = EntryKind::Hardlink { target: from.clone() };
                        self.send_entry(path.clone(), kind, node.as_fd(), &status, pass)?;
                        (pass.sink)(TreeItem::Removed { path: from })?;
                        pass.stats.removed += 1;
                        old = Some(blocks);
                    }
                    (known.blocks, known.sum) = self.send_file(&path, node.as_fd(), &status, old.as_deref(), pass)?;
                    if known.blocks.is_some() {
                        self.large.insert(inode, path.clone());
                    }
                    if !known.blocks.as_ref().is_some_and(|blocks| blocks.is_watched()) {
                        pass.count_unsettled(&known);
                    }
                }
                kind => {
                    let Some(kind) = special_kind(kind, node.as_fd(), &status, &path)? else {
                        return Ok(());
                    };
                    self.send_entry(path.clone(), kind, node.as_fd(), &status, pass)?;
                }
            }
            if has_names {
                pass.links.insert(inode, FirstName { path: path.clone(), known: known.clone(), sent: true });
            }
        }
        if self.is_mount(&status) {
            tracing::warn!(path = %path.escape_ascii(), "another mount in the tree is not carried");
            pass.stats.mounts_skipped += 1;
        } else if known.is_dir {
            pass.todo.push(path);
        }
        dir.children.insert(name.to_bytes().into(), known);
        Ok(())
    }

    /// What [`send_file`](Self::send_file) would return the second time of a file sent whole that is as it was.
    fn sum_of(&self, path: &[u8], node: BorrowedFd<'_>, status: &Statx, pass: &Pass<'_>) -> Result<u64, TreeError> {
        let size = status.stx_size;
        let file = sys::open_to_read(node).map_err(TreeError::io("open", path))?;
        if pass.writers == Writers::Running && size > 0 {
            protect_mapped_pages(&file, path);
        }
        let mut sum = ContentSum::new(size);
        let read = content::send(&file, size, None, None, None, |offset, bytes| {
            sum.add(offset, bytes);
            Ok::<_, SinkClosed>(())
        });
        read.map_err(|error| content_error(path, error))?;
        Ok(sum.finish())
    }

    /// Sends a regular file, its changed blocks only if `old` is what the destination has of the same inode. Its blocks are remembered, or
    /// the checksum of the whole.
    fn send_file(
        &self,
        path: &[u8],
        node: BorrowedFd<'_>,
        status: &Statx,
        old: Option<&BlockHashes>,
        pass: &mut Pass<'_>,
    ) -> Result<(Option<Arc<BlockHashes>>, Option<u64>), TreeError> {
        // What is mounted on a file is not the tree's.
        let size = if self.is_mount(status) { 0 } else { status.stx_size };
        let new = if size > PATCH_FROM { self.budget.take(size) } else { None };
        let old = old.filter(|_| new.is_some());
        let content = if old.is_some() { Content::Patch } else { Content::Whole };
        let file = sys::open_to_read(node).map_err(TreeError::io("open", path))?;
        // Counted first: what becomes dirty from now on counts.
        let watch = self.watch.as_ref().filter(|_| new.is_some() && !is_exception(&file, status));
        let mut counts = watch.map(|watch| {
            let now = (0..size.div_ceil(UNIT)).map(|unit| watch.count(status.stx_ino, unit)).collect();
            Counts { now, was_clean: false }
        });
        if pass.writers == Writers::Running && size > 0 {
            let was_clean = protect_mapped_pages(&file, path);
            counts.iter_mut().for_each(|counts| counts.was_clean = was_clean);
        }
        self.send_entry(path.to_vec(), EntryKind::File { size, content }, node, status, pass)?;
        let mut sum = ContentSum::new(size);
        let sent = content::send(&file, size, old, new, counts.as_ref(), |offset, bytes| {
            sum.add(offset, bytes);
            pass.stats.bytes_sent += bytes.len() as u64;
            (pass.sink)(TreeItem::Data { offset, bytes: Bytes::copy_from_slice(bytes) })
        });
        let blocks = sent.map_err(|error| content_error(path, error))?;
        let sum = sum.finish();
        (pass.sink)(TreeItem::FileEnd { checksum: sum })?;
        let sum = blocks.is_none().then_some(sum);
        Ok((blocks.map(Arc::new), sum))
    }

    pub(super) fn send_entry(
        &self,
        path: Vec<u8>,
        kind: EntryKind,
        node: BorrowedFd<'_>,
        status: &Statx,
        pass: &mut Pass<'_>,
    ) -> Result<(), TreeError> {
        let xattrs = metadata::read_xattrs(node, self.kind).map_err(TreeError::io("read the attributes of", &path))?;
        if xattrs.left_out > 0 {
            tracing::warn!(path = %path.escape_ascii(), count = xattrs.left_out, "attributes are not carried");
            pass.stats.xattrs_left_out += xattrs.left_out;
        }
        let entry = metadata::entry(path, kind, status, xattrs.carried);
        entry.check(self.kind)?;
        (pass.sink)(TreeItem::Entry(entry))?;
        pass.stats.entries_sent += 1;
        Ok(())
    }

    /// Sends what the destination has of a directory and this pass has not seen.
    pub(super) fn send_removed(&mut self, dir: &mut OpenDir, pass: &mut Pass<'_>) -> Result<(), TreeError> {
        let gone: Vec<_> = dir.children.extract_if(|_, known| known.seen != self.pass).collect();
        for (name, known) in gone {
            let path = join(&dir.path, &name);
            if known.is_dir {
                self.forget(path.clone());
            }
            if self.large.get(&known.stamp.inode) == Some(&path) {
                self.large.remove(&known.stamp.inode);
            }
            (pass.sink)(TreeItem::Removed { path })?;
            pass.stats.removed += 1;
        }
        Ok(())
    }
}

/// The kind of an inode that is no regular file; nothing for a type that Linux does not have.
fn special_kind(
    kind: FileType,
    node: BorrowedFd<'_>,
    status: &Statx,
    path: &[u8],
) -> Result<Option<EntryKind>, TreeError> {
    let (major, minor) = (status.stx_rdev_major, status.stx_rdev_minor);
    Ok(Some(match kind {
        FileType::Directory => EntryKind::Dir,
        FileType::Symlink => {
            let target = sys::link_target(node).map_err(TreeError::io("read the link", path))?;
            EntryKind::Symlink { target }
        }
        FileType::CharacterDevice => EntryKind::CharDevice { major, minor },
        FileType::BlockDevice => EntryKind::BlockDevice { major, minor },
        FileType::Fifo => EntryKind::Fifo,
        FileType::Socket => EntryKind::Socket,
        _ => return Ok(None),
    }))
}

/// Has the next store to a mapped page of the file move its times; whether it could be done.
fn protect_mapped_pages(file: &File, path: &[u8]) -> bool {
    let done = sys::protect_mapped_pages(file);
    if let Err(error) = &done {
        tracing::debug!(path = %path.escape_ascii(), %error, "cannot write back");
    }
    done.is_ok()
}

fn content_error(path: &[u8], error: ContentError<SinkClosed>) -> TreeError {
    match error {
        ContentError::Read(source) => TreeError::io("read", path)(source),
        ContentError::Send(closed) => closed.into(),
    }
}
