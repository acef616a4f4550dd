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

/// How long one change may go on after it has moved `ctime`. write(2) moves it before it begins to copy, and then waits for pages to be
/// written back, for room in the filesystem's journal, or (direct I/O) for the disk: what is read meanwhile is not what is there in the end,
/// and nothing tells of that. No writer is known to hold on for longer; a disk that does is about to be given up by the kernel
/// (`/sys/block/*/device/timeout`: 30 s for a command, but a file's writer waits for a few of them only while it is throttled).
pub const UNDER_WAY: Duration = Duration::from_secs(2);

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
    /// How far the stamp can be trusted.
    pub(super) settled: Settled,
    /// The pass that saw it last.
    pub(super) seen: u32,
    pub(super) blocks: Option<Arc<BlockHashes>>,
    /// The checksum of what was sent of a regular file, if it was sent whole.
    pub(super) sum: Option<u64>,
}

/// What an unchanged stamp says of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// Nothing: a later change could have left it as it is.
    No,
    /// Nothing else was changed; but a change of the content may have been under way when it was read.
    Begun,
    /// All is as it was.
    Yes,
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

    /// What the stamp will say of an inode that is read after `now`.
    pub(super) fn settled(&self, now: Timestamp) -> Settled {
        let nanos = |time: Timestamp| i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos);
        let age = nanos(now) - nanos(self.ctime);
        match age {
            age if age > UNDER_WAY.as_nanos() as i128 => Settled::Yes,
            age if age > SETTLE.as_nanos() as i128 => Settled::Begun,
            _ => Settled::No,
        }
    }
}

impl Known {
    /// An inode as it was at `now`, seen in pass number `pass`.
    pub(super) fn new(status: &Statx, now: Timestamp, tree: TreeKind, pass: u32) -> Self {
        let stamp = Stamp::of(status);
        let kind = metadata::file_type(status);
        let settled = match stamp.settled(now) {
            // Only content is written for a while; the rest changes in the same moment.
            Settled::Begun if kind != FileType::RegularFile => Settled::Yes,
            settled => settled,
        };
        Self {
            is_dir: kind == FileType::Directory,
            is_whiteout: tree == TreeKind::Upper && is_whiteout(status),
            settled,
            stamp,
            seen: pass,
            blocks: None,
            sum: None,
        }
    }
}

/// A character device 0:0: kernel `Documentation/filesystems/overlayfs.rst`, "whiteouts and opaque directories".
pub(super) fn is_whiteout(status: &Statx) -> bool {
    metadata::file_type(status) == FileType::CharacterDevice && (status.stx_rdev_major, status.stx_rdev_minor) == (0, 0)
}
