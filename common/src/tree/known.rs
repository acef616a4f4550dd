//! What a scanner remembers of an inode, and when that may be trusted.

use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, Statx};

use super::content::BlockHashes;
use super::entry::Timestamp;
use super::{TreeKind, metadata};

/// How long after a change an inode's `ctime` may be trusted to tell the next change apart. A kernel timestamp is
/// as coarse as a jiffy, at most 10 ms; twice that leaves room for the time from `now` to the `stat`.
const SETTLE: Duration = Duration::from_millis(20);

/// An inode within the tree's filesystem, or of another mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Inode {
    pub(super) device: (u32, u32),
    pub(super) number: u64,
}

/// What tells one state of an inode from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) inode: Inode,
    pub(super) links: u32,
    pub(super) size: u64,
    pub(super) mtime: Timestamp,
    pub(super) ctime: Timestamp,
}

/// What the destination has at one path.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) stamp: Stamp,
    pub(super) is_dir: bool,
    pub(super) is_whiteout: bool,
    /// False if a later change could have left the stamp as it is.
    pub(super) settled: bool,
    /// The pass that saw it last.
    pub(super) seen: u32,
    pub(super) blocks: Option<Arc<BlockHashes>>,
}

impl Stamp {
    pub(super) fn of(status: &Statx) -> Self {
        Self {
            inode: Inode { device: (status.stx_dev_major, status.stx_dev_minor), number: status.stx_ino },
            links: status.stx_nlink,
            size: status.stx_size,
            mtime: metadata::mtime(status),
            ctime: Timestamp { secs: status.stx_ctime.tv_sec, nanos: status.stx_ctime.tv_nsec },
        }
    }

    /// Says whether any change after `now` must move `ctime`.
    pub(super) fn is_settled(&self, now: Timestamp) -> bool {
        let nanos = |time: Timestamp| i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos);
        nanos(self.ctime) + (SETTLE.as_nanos() as i128) < nanos(now)
    }
}

impl Known {
    /// An inode as it was at `now`, seen in pass number `pass`.
    pub(super) fn new(status: &Statx, now: Timestamp, tree: TreeKind, pass: u32) -> Self {
        let stamp = Stamp::of(status);
        Self {
            is_dir: metadata::file_type(status) == FileType::Directory,
            is_whiteout: tree == TreeKind::Upper && is_whiteout(status),
            settled: stamp.is_settled(now),
            stamp,
            seen: pass,
            blocks: None,
        }
    }
}

/// A character device 0:0: kernel `Documentation/filesystems/overlayfs.rst`, "whiteouts and opaque directories".
pub(super) fn is_whiteout(status: &Statx) -> bool {
    metadata::file_type(status) == FileType::CharacterDevice && (status.stx_rdev_major, status.stx_rdev_minor) == (0, 0)
}
