//! The destination: applies items beneath a root, and trusts none of them.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::entry::{Content, ContentSum, Entry, EntryKind, Timestamp, TreeItem};
use super::error::printable;
use super::names::{check_path, split};
use super::remove::remove_tree;
use super::write_back::WriteBack;
use super::{MAX_DATA, TreeError, TreeKind, metadata, sys};

/// Applies a stream of items beneath a directory.
///
/// The directory should be empty at first, on one filesystem, and in nobody's use: a file is patched in place. After
/// an error the tree is incomplete; the writer is of no more use, and the tree is to be removed.
pub struct Writer {
    root: OwnedFd,
    kind: TreeKind,
    /// The directory the last item was in: most items come from the same.
    parent: Option<(Vec<u8>, Arc<OwnedFd>)>,
    /// The times each directory touched since the last `finish` must have in the end.
    dir_times: HashMap<Vec<u8>, Times>,
    open: Option<OpenFile>,
    write_back: WriteBack,
}

#[derive(Clone, Copy)]
struct Times {
    atime: Timestamp,
    mtime: Timestamp,
}

/// A file that got so many bytes is on its way to the disk soon.
const MUCH: u64 = 1 << 20;

/// A file whose content is coming.
struct OpenFile {
    entry: Entry,
    file: File,
    size: u64,
    content: Content,
    sum: ContentSum,
    /// Bytes that were written.
    written: u64,
}

impl Writer {
    /// Opens the directory `root`, which the caller trusts.
    ///
    /// # Errors
    /// [`TreeError::Io`] if it is no directory that can be opened.
    pub fn open(root: &Path, kind: TreeKind) -> Result<Self, TreeError> {
        let path = root.as_os_str().as_encoded_bytes();
        let root = sys::open_root(root).map_err(TreeError::io("open the root", path))?;
        Ok(Self { root, kind, parent: None, dir_times: HashMap::new(), open: None, write_back: WriteBack::default() })
    }

    /// Applies one item.
    ///
    /// # Errors
    /// A variant that says which rule the item breaks, or [`TreeError::Io`].
    pub fn apply(&mut self, item: TreeItem) -> Result<(), TreeError> {
        match (item, self.open.take()) {
            (TreeItem::Entry(entry), None) => self.entry(entry),
            (TreeItem::Removed { path }, None) => self.removed(&path),
            (TreeItem::Data { offset, bytes }, Some(mut open)) => {
                open.write(offset, &bytes)?;
                self.open = Some(open);
                Ok(())
            }
            (TreeItem::FileEnd { checksum }, Some(open)) => open.close(checksum, self.kind, &self.write_back),
            (TreeItem::Entry(Entry { path, .. }) | TreeItem::Removed { path }, Some(open)) => {
                Err(open.interrupted_by(format!("an item for {}", printable(&path))))
            }
            (TreeItem::Data { .. }, None) => Err(TreeError::NoOpenFile { item: "data" }),
            (TreeItem::FileEnd { .. }, None) => Err(TreeError::NoOpenFile { item: "file end" }),
        }
    }

    /// Ends a pass: gives the directories their times. The writer is ready for the next pass.
    ///
    /// # Errors
    /// [`TreeError::FileStillOpen`] if a file's end is missing, or [`TreeError::Io`]; also if the disk has refused something by now.
    pub fn finish(&mut self) -> Result<(), TreeError> {
        if let Some(open) = self.open.take() {
            return Err(open.interrupted_by("the end of the pass".to_owned()));
        }
        self.parent = None;
        for (path, times) in std::mem::take(&mut self.dir_times) {
            match sys::hold_dir(self.root.as_fd(), &path) {
                // Removed later in the pass, or replaced by something else.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                dir => dir
                    .and_then(|dir| sys::set_times(dir.as_fd(), times.atime, times.mtime))
                    .map_err(TreeError::io("set the times of", &path))?,
            }
        }
        self.write_back.check()
    }

    fn entry(&mut self, entry: Entry) -> Result<(), TreeError> {
        entry.check(self.kind)?;
        if entry.path.is_empty() {
            let root = sys::hold_dir(self.root.as_fd(), b"").map_err(TreeError::io("open", b""))?;
            return self.complete_dir(&root, &entry);
        }
        let dir = self.enter(&entry.path)?;
        let (_, name) = split(&entry.path);
        match &entry.kind {
            EntryKind::File { size, content } => {
                let (size, content) = (*size, *content);
                let file = match content {
                    Content::Whole => self.create_file(&dir, &entry.path)?,
                    Content::Patch => open_existing(&dir, &entry.path)?,
                };
                file.set_len(size).map_err(TreeError::io("resize", &entry.path))?;
                self.open = Some(OpenFile { sum: ContentSum::new(size), entry, file, size, content, written: 0 });
                Ok(())
            }
            EntryKind::Dir => {
                if self.type_of(&dir, &entry.path)? != Some(FileType::Directory) {
                    self.clear(&dir, &entry.path)?;
                    rustix::fs::mkdirat(&*dir, name, Mode::RWXU).map_err(TreeError::io("create", &entry.path))?;
                }
                let node = sys::hold(dir.as_fd(), name).map_err(TreeError::io("open", &entry.path))?;
                self.complete_dir(&node, &entry)
            }
            EntryKind::Hardlink { target } => self.link(&dir, &entry.path, target),
            EntryKind::Symlink { target } => {
                self.clear(&dir, &entry.path)?;
                rustix::fs::symlinkat(&target[..], &*dir, name).map_err(TreeError::io("create", &entry.path))?;
                self.complete(&dir, &entry)
            }
            EntryKind::CharDevice { major, minor } => {
                self.node(&dir, &entry, FileType::CharacterDevice, (*major, *minor))
            }
            EntryKind::BlockDevice { major, minor } => self.node(&dir, &entry, FileType::BlockDevice, (*major, *minor)),
            EntryKind::Fifo => self.node(&dir, &entry, FileType::Fifo, (0, 0)),
            EntryKind::Socket => self.node(&dir, &entry, FileType::Socket, (0, 0)),
        }
    }

    fn node(&mut self, dir: &OwnedFd, entry: &Entry, kind: FileType, device: (u32, u32)) -> Result<(), TreeError> {
        self.clear(dir, &entry.path)?;
        let (_, name) = split(&entry.path);
        let device = rustix::fs::makedev(device.0, device.1);
        rustix::fs::mknodat(dir, name, kind, Mode::RUSR, device).map_err(TreeError::io("create", &entry.path))?;
        self.complete(dir, entry)
    }

    fn create_file(&mut self, dir: &OwnedFd, path: &[u8]) -> Result<File, TreeError> {
        self.clear(dir, path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, split(path).1, flags, Mode::RUSR | Mode::WUSR);
        Ok(file.map_err(TreeError::io("create", path))?.into())
    }

    /// Makes `path` a name of the inode that `target` names; it may be one already.
    fn link(&mut self, dir: &OwnedFd, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let missing = || TreeError::LinkTarget { path: printable(path), target: printable(target) };
        let (target_dir, target_name) = split(target);
        let target_dir = sys::hold_dir(self.root.as_fd(), target_dir).map_err(|_| missing())?;
        let node = sys::hold(target_dir.as_fd(), target_name).map_err(|_| missing())?;
        let wanted = sys::status(node.as_fd()).map_err(TreeError::io("examine", target))?;
        if metadata::file_type(&wanted) == FileType::Directory {
            return Err(missing());
        }
        let name = split(path).1;
        if let Ok(present) = sys::hold(dir.as_fd(), name) {
            let present = sys::status(present.as_fd()).map_err(TreeError::io("examine", path))?;
            if present.stx_ino == wanted.stx_ino {
                return Ok(());
            }
        }
        self.clear(dir, path)?;
        rustix::fs::linkat(&target_dir, target_name, dir, name, AtFlags::empty()).map_err(TreeError::io("link", path))
    }

    fn removed(&mut self, path: &[u8]) -> Result<(), TreeError> {
        check_path(path)?;
        match self.enter(path) {
            Ok(dir) => self.clear(&dir, path),
            Err(TreeError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Finishes what has just been created at the entry's path.
    fn complete(&self, dir: &OwnedFd, entry: &Entry) -> Result<(), TreeError> {
        let node = sys::hold(dir.as_fd(), split(&entry.path).1).map_err(TreeError::io("open", &entry.path))?;
        metadata::apply(node.as_fd(), entry, self.kind)
    }

    fn complete_dir(&mut self, node: &OwnedFd, entry: &Entry) -> Result<(), TreeError> {
        metadata::apply(node.as_fd(), entry, self.kind)?;
        self.dir_times.insert(entry.path.clone(), Times { atime: entry.atime, mtime: entry.mtime });
        Ok(())
    }

    /// Goes to the directory of `path`, and notes the times it had before it is touched.
    fn enter(&mut self, path: &[u8]) -> Result<Arc<OwnedFd>, TreeError> {
        let parent = split(path).0;
        if let Some((_, dir)) = self.parent.as_ref().filter(|(current, _)| current == parent) {
            return Ok(Arc::clone(dir));
        }
        let dir = sys::hold_dir(self.root.as_fd(), parent).map_err(TreeError::io("open the directory of", path))?;
        if !self.dir_times.contains_key(parent) {
            let status = sys::status(dir.as_fd()).map_err(TreeError::io("examine", parent))?;
            let times = Times { atime: metadata::atime(&status), mtime: metadata::mtime(&status) };
            self.dir_times.insert(parent.to_vec(), times);
        }
        let dir = Arc::new(dir);
        self.parent = Some((parent.to_vec(), Arc::clone(&dir)));
        Ok(dir)
    }

    fn type_of(&self, dir: &OwnedFd, path: &[u8]) -> Result<Option<FileType>, TreeError> {
        match rustix::fs::statat(dir, split(path).1, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) => Ok(Some(FileType::from_raw_mode(status.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(TreeError::io("examine", path)(error)),
        }
    }

    /// Removes whatever is at `path`.
    fn clear(&mut self, dir: &OwnedFd, path: &[u8]) -> Result<(), TreeError> {
        match self.type_of(dir, path)? {
            None => Ok(()),
            Some(FileType::Directory) => remove_tree(self.root.as_fd(), path),
            Some(_) => {
                rustix::fs::unlinkat(dir, split(path).1, AtFlags::empty()).map_err(TreeError::io("remove", path))
            }
        }
    }
}

/// Opens the file to be patched. Its type is checked first: opening a device would already act on it.
fn open_existing(dir: &OwnedFd, path: &[u8]) -> Result<File, TreeError> {
    let missing = || TreeError::PatchTarget { path: printable(path) };
    let node = sys::hold(dir.as_fd(), split(path).1).map_err(|_| missing())?;
    let status = sys::status(node.as_fd()).map_err(TreeError::io("examine", path))?;
    if metadata::file_type(&status) != FileType::RegularFile {
        return Err(missing());
    }
    sys::open_to_write(node.as_fd()).map_err(TreeError::io("open", path))
}

impl OpenFile {
    fn write(&mut self, offset: u64, bytes: &Bytes) -> Result<(), TreeError> {
        let end = offset.checked_add(bytes.len() as u64);
        if bytes.is_empty() || bytes.len() > MAX_DATA || end.is_none_or(|end| end > self.size) {
            return Err(TreeError::BadData {
                path: printable(&self.entry.path),
                offset,
                len: bytes.len(),
                size: self.size,
            });
        }
        self.sum.add(offset, bytes);
        if self.content == Content::Patch && bytes.iter().all(|&byte| byte == 0) && self.punch(offset, bytes.len()) {
            return Ok(());
        }
        self.written += bytes.len() as u64;
        self.file.write_all_at(bytes, offset).map_err(TreeError::io("write", &self.entry.path))
    }

    /// Makes a hole, if the filesystem can.
    fn punch(&self, offset: u64, len: usize) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, offset, len as u64).is_ok()
    }

    /// Metadata comes last: writing would move the times and clear file capabilities.
    fn close(self, declared: u64, kind: TreeKind, write_back: &WriteBack) -> Result<(), TreeError> {
        let computed = self.sum.finish();
        if computed != declared {
            return Err(TreeError::Checksum { path: printable(&self.entry.path), declared, computed });
        }
        if self.written >= MUCH {
            write_back.soon(&self.file, &self.entry.path);
        }
        metadata::apply(self.file.as_fd(), &self.entry, kind)
    }

    fn interrupted_by(self, item: String) -> TreeError {
        TreeError::FileStillOpen { item, open: printable(&self.entry.path) }
    }
}
