//! Carries a directory tree from one host to another, in passes, while it is in use.
//!
//! A tree is a container's overlay *upper layer*, raw as it lies in `upperdir`, or a plain directory such
//! as a volume. The [`Scanner`] sends what is new or changed since its last pass as a stream of
//! [`TreeItem`]s; the [`Writer`] applies the stream beneath its own root. [`digest`] names a layer by its
//! content, so that a layer both hosts hold need not be sent.
//!
//! ```text
//! source                                       destination
//! Scanner::pass       (running)  -- items -->  Writer::apply ...  Writer::finish
//! Scanner::pass       (running)  -- items -->  Writer::apply ...  Writer::finish
//! Scanner::last_pass  (frozen)   -- items -->  Writer::apply ...  Writer::finish    trees are equal
//! ```
//!
//! # The stream
//!
//! `Entry` describes a path; a directory comes before what is in it, a hard link after the name it links to.
//! An entry for a regular file is followed by its `Data` and closed by `FileEnd`; nothing comes between.
//! `Removed` takes a path away with all beneath it. Paths are relative bytes; the empty path names the
//! root itself, in a directory entry only.
//!
//! # When a pass is right
//!
//! Writers run during a live pass, so a pass is only a snapshot of each inode, not of the tree. Each
//! inode's `ctime` is taken before its content is read; a later change moves `ctime`, and the next pass sends it
//! again. Three things would break that, and are covered:
//!
//! - Kernel timestamps tick in jiffies (up to 10 ms): a change in the tick of the `stat` leaves `ctime` as it was.
//!   What changed within `SETTLE` (see `known.rs`) of its `stat` counts as changed in the next pass too.
//! - write(2) moves `ctime` before it writes, and may be at it for a while. What changed within `UNDER_WAY` of its `stat` is read again in the
//!   next pass, and sent if it differs.
//! - A store through a shared mapping moves `ctime` only when it faults. Before a file is read in a live pass
//!   its dirty pages are written back, which makes the next store fault. tmpfs has no write-back: name such files
//!   to [`Scanner::recheck`].
//!
//! After [`Scanner::last_pass`] over a frozen tree both trees are equal in all that an [`Entry`] carries.
//!
//! # What is not carried
//!
//! - overlayfs' own notes on the source's filesystem, see `names.rs`.
//! - Other mounts: the directory or file mounted on is recorded, empty; a btrfs subvolume counts as a mount.
//! - Inode flags (`chattr`), birth times, inode numbers, preallocated blocks past what `SEEK_DATA` reports.
//! - Of an upper layer's whiteouts more than that they are there: their owner, mode and times are not seen through the
//!   overlay, and overlayfs makes them hard links of each other only to save inodes.
//! - An `atime` that changed alone, because reading a file moves no `ctime`.
//!
//! # Cost
//!
//! An unchanged entry costs one `statx` through its directory's descriptor, one hash look-up, and its share of
//! `getdents`; extended attributes are read only when `ctime` moved, which every change to them does. One
//! descriptor is open at a time however deep the tree. A file over [`PATCH_FROM`] is remembered as one hash
//! per [`BLOCK`] and sends only the blocks that differ. Where they are is found by reading all of it, or, with a [`Watch`], only
//! what may have changed. That holds under another name, too: a database that recycles its log renames files of half a gigabyte at once. One
//! that has left a directory that was looked at before goes as a new one.
//!
//! # Trust
//!
//! The source's tree belongs to the container, and the stream to a peer that may be hostile. Neither side
//! follows a symlink or leaves its root: directories are opened with `openat2(2)`, `RESOLVE_BENEATH` and
//! `RESOLVE_NO_SYMLINKS`; inodes are held by `O_PATH` and checked before they are opened.

mod apply;
mod content;
mod digest;
mod entry;
mod error;
mod known;
mod metadata;
mod names;
mod remove;
mod scan;
mod send;
mod sys;
mod watch;
mod write_back;

#[cfg(test)]
mod tests;

pub use apply::Writer;
pub use digest::{LayerDigest, digest};
pub use entry::{Content, ContentSum, Entry, EntryKind, Timestamp, TreeItem};
pub use error::{SinkClosed, TreeError};
pub use known::UNDER_WAY;
pub use scan::{PassStats, Scanner};
pub use watch::{UNIT, Watch, can_be_watched, write_back};

/// What kind of tree this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeKind {
    /// A raw overlay upper layer: whiteouts (a character device 0:0, or an attribute) and opaque directories are data.
    Upper,
    /// A directory that means only what it holds.
    Plain,
}

/// The most bytes in one [`TreeItem::Data`]: a small part of a 1 MiB frame, four blocks.
pub const MAX_DATA: usize = 256 * 1024;
/// The longest path, in bytes: Linux' `PATH_MAX`.
pub const MAX_PATH: usize = 4096;
/// The longest path component, in bytes: Linux' `NAME_MAX`.
pub const MAX_NAME: usize = 255;
/// The most extended attributes of one entry; common filesystems hold fewer. With the limit on a value, an
/// entry's attributes stay below 17 MiB.
pub const MAX_XATTRS: usize = 256;
/// The longest value of an extended attribute, in bytes: Linux' `XATTR_SIZE_MAX`.
pub const MAX_XATTR_VALUE: usize = 64 * 1024;
/// Files larger than this many bytes are remembered by blocks, and patched when they change.
pub const PATCH_FROM: u64 = 1024 * 1024;
/// The bytes of one remembered block.
pub const BLOCK: usize = 64 * 1024;

const _: () = assert!(MAX_DATA.is_multiple_of(BLOCK));
