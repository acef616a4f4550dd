//! Reads and sets what an inode carries besides its content.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Statx};

use super::entry::{Entry, EntryKind, Timestamp};
use super::names::{is_carried, is_host_bound, may_be_declined};
use super::{TreeError, TreeKind, sys};

/// The extended attributes of an inode, by the tree's rules.
pub(super) struct Xattrs {
    /// Those that are carried, sorted by name.
    pub(super) carried: Vec<(Vec<u8>, Vec<u8>)>,
    /// How many were left out though they may matter to the container.
    pub(super) left_out: u64,
}

/// The type of an inode.
pub(super) fn file_type(status: &Statx) -> FileType {
    FileType::from_raw_mode(status.stx_mode.into())
}

pub(super) fn mtime(status: &Statx) -> Timestamp {
    Timestamp { secs: status.stx_mtime.tv_sec, nanos: status.stx_mtime.tv_nsec }
}

pub(super) fn atime(status: &Statx) -> Timestamp {
    Timestamp { secs: status.stx_atime.tv_sec, nanos: status.stx_atime.tv_nsec }
}

/// The entry of an inode.
pub(super) fn entry(path: Vec<u8>, kind: EntryKind, status: &Statx, xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Entry {
    Entry {
        path,
        kind,
        uid: status.stx_uid,
        gid: status.stx_gid,
        mode: u32::from(status.stx_mode) & 0o7777,
        mtime: mtime(status),
        atime: atime(status),
        xattrs,
    }
}

/// Reads the extended attributes of a held inode.
pub(super) fn read_xattrs(node: BorrowedFd<'_>, kind: TreeKind) -> io::Result<Xattrs> {
    let mut xattrs = Xattrs { carried: Vec::new(), left_out: 0 };
    for name in sys::xattr_names(node)? {
        if !is_carried(kind, &name) {
            xattrs.left_out += u64::from(!is_host_bound(&name));
        } else if let Some(value) = sys::xattr_value(node, &name)? {
            xattrs.carried.push((name, value));
        }
    }
    xattrs.carried.sort();
    Ok(xattrs)
}

/// Gives a held inode the entry's metadata; a directory's times come later, its content still moves them.
///
/// The order matters: a change of owner clears set-ID bits and file capabilities, and an access ACL sets the
/// group's bits, which `mode` repeats.
pub(super) fn apply(node: BorrowedFd<'_>, entry: &Entry, kind: TreeKind) -> Result<(), TreeError> {
    let path = &entry.path;
    sys::set_owner(node, entry.uid, entry.gid).map_err(TreeError::io("set the owner of", path))?;
    apply_xattrs(node, entry, kind)?;
    if !matches!(entry.kind, EntryKind::Symlink { .. }) {
        sys::set_mode(node, entry.mode).map_err(TreeError::io("set the mode of", path))?;
    }
    if entry.kind != EntryKind::Dir {
        sys::set_times(node, entry.atime, entry.mtime).map_err(TreeError::io("set the times of", path))?;
    }
    Ok(())
}

/// Removes the attributes that the entry does not have, such as an ACL inherited from the directory, and sets its own.
fn apply_xattrs(node: BorrowedFd<'_>, entry: &Entry, kind: TreeKind) -> Result<(), TreeError> {
    let path = &entry.path;
    let present = sys::xattr_names(node).map_err(TreeError::io("list the attributes of", path))?;
    let wanted = |name: &Vec<u8>| entry.xattrs.iter().any(|(wanted, _)| wanted == name);
    for name in present.iter().filter(|name| is_carried(kind, name) && !wanted(name)) {
        match sys::remove_xattr(node, name) {
            Err(_) if may_be_declined(name) => {}
            removed => removed.map_err(TreeError::io("remove an attribute of", path))?,
        }
    }
    for (name, value) in &entry.xattrs {
        match sys::set_xattr(node, name, value) {
            Err(error) if may_be_declined(name) => {
                tracing::debug!(path = %path.escape_ascii(), name = %name.escape_ascii(), %error, "security attribute declined");
            }
            set => set.map_err(TreeError::io("set an attribute of", path))?,
        }
    }
    Ok(())
}
