//! The source: finds what is new or changed since the last pass, and sends it.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{RawDir, Statx, StatxAttributes};
use rustix::io::Errno;

use super::content::{BlockHashes, HashBudget};
use super::entry::{EntryKind, TreeItem};
use super::error::SinkClosed;
use super::known::{Inode, Known, Settled, Stamp, is_whiteout};
use super::names::{check_path, join, split};
use super::watch::{Watch, can_be_watched};
use super::{TreeError, TreeKind, sys};

/// Room for one read of a directory; about a thousand names.
const LIST_BUFFER: usize = 64 * 1024;

type Children = HashMap<Box<[u8]>, Known>;

/// Remembers what it sent of one tree, and sends what has changed.
///
/// After an error the destination's state is unknown: start again with a new scanner and an empty destination.
pub struct Scanner {
    pub(super) root: OwnedFd,
    pub(super) root_device: (u32, u32),
    pub(super) kind: TreeKind,
    pub(super) excludes: HashSet<Vec<u8>>,
    pub(super) root_known: Option<Known>,
    /// What the destination has, by directory and name.
    pub(super) dirs: HashMap<Vec<u8>, Children>,
    /// Where files are that are remembered by blocks. Some are not there any more.
    pub(super) large: HashMap<Inode, Vec<u8>>,
    follows_renames: bool,
    pub(super) budget: HashBudget,
    pub(super) suspects: HashSet<Inode>,
    pub(super) pass: u32,
    /// On a filesystem that can be watched.
    pub(super) watch: Option<Arc<dyn Watch>>,
}

/// What one pass did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PassStats {
    /// Inodes' names examined.
    pub entries_scanned: u64,
    /// Entries sent.
    pub entries_sent: u64,
    /// Bytes of content sent.
    pub bytes_sent: u64,
    /// Bytes of files that the next pass reads again only because it is too soon to trust their times.
    pub unsettled_bytes: u64,
    /// Names sent as removed; what was beneath them is not counted.
    pub removed: u64,
    /// Extended attributes of the entries sent that a tree of this kind cannot carry and that may matter.
    pub xattrs_left_out: u64,
    /// Other mounts found in the tree, whose content is not carried.
    pub mounts_skipped: u64,
    /// How long the pass took.
    pub duration: Duration,
}

/// The first name seen in this pass of an inode with several.
pub(super) struct FirstName {
    pub(super) path: Vec<u8>,
    pub(super) known: Known,
    /// Whether this pass sent it, so that its other names must be linked to it anew.
    pub(super) sent: bool,
}

/// Whether anything may write to the tree during a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writers {
    Running,
    Frozen,
}

/// The state of one pass.
pub(super) struct Pass<'a> {
    pub(super) sink: &'a mut dyn FnMut(TreeItem) -> Result<(), SinkClosed>,
    pub(super) writers: Writers,
    pub(super) stats: PassStats,
    pub(super) links: HashMap<Inode, FirstName>,
    pub(super) suspects: HashSet<Inode>,
    /// Directories yet to be listed.
    pub(super) todo: Vec<Vec<u8>>,
}

impl Pass<'_> {
    pub(super) fn count_unsettled(&mut self, known: &Known) {
        if known.settled == Settled::Begun {
            self.stats.unsettled_bytes += known.stamp.size;
        }
    }
}

/// A directory while it is listed.
pub(super) struct OpenDir {
    pub(super) fd: OwnedFd,
    pub(super) path: Vec<u8>,
    pub(super) children: Children,
}

impl Scanner {
    /// Opens the tree beneath `root`. `excludes` are paths relative to it that are neither read nor removed.
    ///
    /// # Errors
    /// [`TreeError::Io`] if `root` is no directory that can be opened, [`TreeError::BadPath`] for an exclude
    /// that is not a plain relative path.
    pub fn new(root: &Path, kind: TreeKind, excludes: Vec<PathBuf>) -> Result<Self, TreeError> {
        let root_path = root.as_os_str().as_encoded_bytes();
        let excludes: HashSet<_> =
            excludes.into_iter().map(|path| path.into_os_string().into_encoded_bytes()).collect();
        excludes.iter().try_for_each(|path| check_path(path))?;
        let root = sys::open_root(root).map_err(TreeError::io("open the root", root_path))?;
        let status = sys::status(root.as_fd()).map_err(TreeError::io("examine the root", root_path))?;
        Ok(Self {
            root,
            root_device: (status.stx_dev_major, status.stx_dev_minor),
            kind,
            excludes,
            root_known: None,
            dirs: HashMap::new(),
            large: HashMap::new(),
            follows_renames: true,
            budget: HashBudget::default(),
            suspects: HashSet::new(),
            pass: 0,
            watch: None,
        })
    }

    /// Has large files that changed be read only where they may have, if this filesystem can be watched. Before the first pass.
    pub fn watched_by(&mut self, watch: Arc<dyn Watch>) {
        self.watch = can_be_watched(&self.root).then_some(watch);
    }

    /// Sends a file that was renamed as a new one: for a sink that does not pass everything on. Before the first pass.
    pub fn ignores_renames(&mut self) {
        self.follows_renames = false;
    }

    /// Sends everything that is new or changed since the last pass; the first pass sends all. The tree may be in use.
    ///
    /// # Errors
    /// [`TreeError::SinkClosed`] if the sink refuses an item, [`TreeError::Io`] if the tree cannot be read, and the
    /// errors of [`Entry::check`](super::Entry::check) for what the destination would refuse. Files that vanish or change
    /// meanwhile are no error.
    pub fn pass(&mut self, sink: &mut dyn FnMut(TreeItem) -> Result<(), SinkClosed>) -> Result<PassStats, TreeError> {
        self.run(Writers::Running, sink)
    }

    /// Like [`pass`](Self::pass), for a tree that nothing writes to: it spares the write-back, which costs downtime. If
    /// the container runs on after all, later passes are right still.
    ///
    /// # Errors
    /// As for [`pass`](Self::pass).
    pub fn last_pass(
        &mut self,
        sink: &mut dyn FnMut(TreeItem) -> Result<(), SinkClosed>,
    ) -> Result<PassStats, TreeError> {
        self.run(Writers::Frozen, sink)
    }

    /// Has the next pass read the inode at `path` even if its times say that it has not changed: for a file that a
    /// task maps shared and writable on a filesystem without write-back, such as tmpfs. A path that is not there is ignored.
    pub fn recheck(&mut self, path: &Path) {
        let (dir, name) = split(path.as_os_str().as_encoded_bytes());
        let status = sys::hold_dir(self.root.as_fd(), dir)
            .and_then(|dir| sys::hold(dir.as_fd(), name))
            .and_then(|node| sys::status(node.as_fd()));
        if let Ok(status) = status {
            self.suspects.insert(Stamp::of(&status).inode);
        }
    }

    /// The same for a file by its inode, on the tree's own filesystem.
    pub fn recheck_inode(&mut self, number: u64) {
        let device = self.root_known.as_ref().map(|known| known.stamp.inode.device);
        self.suspects.extend(device.map(|device| Inode { device, number }));
    }

    fn run(
        &mut self,
        writers: Writers,
        sink: &mut dyn FnMut(TreeItem) -> Result<(), SinkClosed>,
    ) -> Result<PassStats, TreeError> {
        let started = Instant::now();
        self.pass += 1;
        let suspects = std::mem::take(&mut self.suspects);
        let todo = vec![Vec::new()];
        let mut pass = Pass { sink, writers, stats: PassStats::default(), links: HashMap::new(), suspects, todo };
        self.visit_root(&mut pass)?;
        let mut buffer = vec![MaybeUninit::uninit(); LIST_BUFFER];
        while let Some(path) = pass.todo.pop() {
            self.visit_dir(path, &mut buffer, &mut pass)?;
        }
        pass.stats.duration = started.elapsed();
        Ok(pass.stats)
    }

    fn visit_root(&mut self, pass: &mut Pass<'_>) -> Result<(), TreeError> {
        let now = sys::now();
        let status = sys::status(self.root.as_fd()).map_err(TreeError::io("examine", b""))?;
        pass.stats.entries_scanned += 1;
        let stamp = Stamp::of(&status);
        if !self.root_known.as_ref().is_some_and(|known| known.settled == Settled::Yes && known.stamp == stamp) {
            self.send_entry(Vec::new(), EntryKind::Dir, self.root.as_fd(), &status, pass)?;
            self.root_known = Some(Known::new(&status, now, self.kind, self.pass));
        }
        Ok(())
    }

    fn visit_dir(
        &mut self,
        path: Vec<u8>,
        buffer: &mut [MaybeUninit<u8>],
        pass: &mut Pass<'_>,
    ) -> Result<(), TreeError> {
        let Some(fd) = still_there(sys::open_dir(self.root.as_fd(), &path), "open the directory", &path)? else {
            return Ok(());
        };
        let children = self.dirs.remove(&path).unwrap_or_default();
        let mut dir = OpenDir { fd, path, children };
        let listed = self.visit_children(&mut dir, buffer, pass);
        if listed? {
            self.send_removed(&mut dir, pass)?;
        }
        self.dirs.insert(dir.path, dir.children);
        Ok(())
    }

    /// Visits each name; false if the directory itself was removed meanwhile.
    fn visit_children(
        &mut self,
        dir: &mut OpenDir,
        buffer: &mut [MaybeUninit<u8>],
        pass: &mut Pass<'_>,
    ) -> Result<bool, TreeError> {
        // The listing borrows its own descriptor, the rest of the directory changes meanwhile.
        let fd = dir.fd.try_clone().map_err(TreeError::io("open the directory", &dir.path))?;
        let mut listing = RawDir::new(&fd, buffer);
        while let Some(found) = listing.next() {
            let Some(found) = still_there(found, "list the directory", &dir.path)? else {
                return Ok(false);
            };
            let name = found.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if !self.excludes.is_empty() && self.excludes.contains(&join(&dir.path, name.to_bytes())) {
                continue;
            }
            self.visit(dir, name, pass)?;
        }
        Ok(true)
    }

    /// One name: the fast way for what has not changed.
    fn visit(&mut self, dir: &mut OpenDir, name: &CStr, pass: &mut Pass<'_>) -> Result<(), TreeError> {
        let status = match sys::status_at(dir.fd.as_fd(), name) {
            Ok(status) => status,
            error => {
                return still_there(error, "examine", &join(&dir.path, name.to_bytes())).map(drop);
            }
        };
        let Some(known) = dir.children.get_mut(name.to_bytes()) else {
            return self.send(dir, name, pass);
        };
        if known.seen == self.pass {
            return Ok(());
        }
        let stamp = Stamp::of(&status);
        let is_whiteout = self.kind == TreeKind::Upper && is_whiteout(&status);
        let is_current = (known.settled == Settled::Yes && known.stamp == stamp) || (known.is_whiteout && is_whiteout);
        if !is_current || pass.suspects.contains(&stamp.inode) {
            return self.send(dir, name, pass);
        }
        if stamp.links > 1 && !known.is_dir && !is_whiteout {
            match pass.links.get(&stamp.inode) {
                Some(first) if first.sent => return self.send(dir, name, pass),
                Some(_) => {}
                None => {
                    let path = join(&dir.path, name.to_bytes());
                    pass.links.insert(stamp.inode, FirstName { path, known: known.clone(), sent: false });
                }
            }
        }
        known.seen = self.pass;
        pass.stats.entries_scanned += 1;
        if self.is_mount(&status) {
            pass.stats.mounts_skipped += 1;
        } else if known.is_dir {
            pass.todo.push(join(&dir.path, name.to_bytes()));
        }
        Ok(())
    }

    /// Where the destination has a large file that is found at another path now, and its blocks: forgotten there, since it has but
    /// one name.
    pub(super) fn take_renamed(
        &mut self,
        dir: &mut OpenDir,
        now: &Known,
        status: &Statx,
    ) -> Option<(Vec<u8>, Arc<BlockHashes>)> {
        let inode = now.stamp.inode;
        if now.stamp.links != 1 || self.is_mount(status) {
            return None;
        }
        let path = self.large.get(&inode).filter(|_| self.follows_renames)?;
        let (parent, name) = split(path);
        let children = if parent == dir.path { &mut dir.children } else { self.dirs.get_mut(parent)? };
        // Of one that had another name, that one would be patched with it, unnoticed.
        let is_it = |known: &&Known| known.stamp.inode == inode && known.stamp.links == 1;
        let blocks = children.get(name).filter(is_it)?.blocks.clone()?;
        children.remove(name);
        Some((path.clone(), blocks))
    }

    /// Forgets a directory and all beneath it.
    pub(super) fn forget(&mut self, path: Vec<u8>) {
        let mut pending = vec![path];
        while let Some(path) = pending.pop() {
            let children = self.dirs.remove(&path).unwrap_or_default();
            pending.extend(children.iter().filter(|(_, known)| known.is_dir).map(|(name, _)| join(&path, name)));
        }
    }

    pub(super) fn is_mount(&self, status: &Statx) -> bool {
        status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
            || (status.stx_dev_major, status.stx_dev_minor) != self.root_device
    }
}

/// Nothing if what was looked for has vanished, or has become something else, since it was listed.
pub(super) fn still_there<T>(
    result: Result<T, Errno>,
    operation: &'static str,
    path: &[u8],
) -> Result<Option<T>, TreeError> {
    match result {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::XDEV) => Ok(None),
        result => result.map(Some).map_err(TreeError::io(operation, path)),
    }
}
