//! One safe function for each system call a tree needs.
#![allow(unsafe_code, reason = "sync_file_range(2) has no safe wrapper in rustix 1.1 or nix 0.31")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Statx, StatxFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::entry::Timestamp;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
const SAME_MOUNT: ResolveFlags = BENEATH.union(ResolveFlags::NO_XDEV);
/// A name is opened to hold its inode, whatever its type, without any effect on it.
const HOLD: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a tree's root, which the agent names and may be a symlink.
pub(super) fn open_root(root: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens the directory `path` beneath `root` to be listed, without leaving the mount.
pub(super) fn open_dir(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let path = if path.is_empty() { b"." } else { path };
    match rustix::fs::openat2(root, path, flags | OFlags::NOATIME, Mode::empty(), SAME_MOUNT) {
        Err(Errno::PERM) => rustix::fs::openat2(root, path, flags, Mode::empty(), SAME_MOUNT),
        opened => opened,
    }
}

/// Holds the directory `path` beneath `root`, for calls that name something in it.
pub(super) fn hold_dir(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    rustix::fs::openat2(root, path, HOLD | OFlags::DIRECTORY, Mode::empty(), SAME_MOUNT)
}

/// Holds the inode `name` in `dir`, without following a symlink or leaving the mount.
pub(super) fn hold(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(dir, name, HOLD, Mode::empty(), SAME_MOUNT)
}

/// Like [`hold`], but `name` may be a mount point: it gives the root of what is mounted.
pub(super) fn hold_mounted(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(dir, name, HOLD, Mode::empty(), BENEATH)
}

/// The status of `name` in `dir`, not of what it links to.
pub(super) fn status_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)
}

/// The status of a held inode.
pub(super) fn status(node: BorrowedFd<'_>) -> Result<Statx, Errno> {
    rustix::fs::statx(node, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
}

/// The path through which calls without an `AT_EMPTY_PATH` reach a held inode, a symlink included.
fn magic_link(node: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", node.as_raw_fd())
}

/// Opens a held inode, which the caller knows to be a regular file, to be read.
pub(super) fn open_to_read(node: BorrowedFd<'_>) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let link = magic_link(node);
    match rustix::fs::open(&link, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => Ok(rustix::fs::open(&link, flags, Mode::empty())?.into()),
        opened => Ok(opened?.into()),
    }
}

/// Opens a held inode, which the caller knows to be a regular file, to be written.
pub(super) fn open_to_write(node: BorrowedFd<'_>) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(magic_link(node), flags, Mode::empty())?.into())
}

/// What a held symlink says.
pub(super) fn link_target(node: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(node, c"", Vec::new())?.into_bytes())
}

/// The names of a held inode's extended attributes; none where the filesystem has none.
pub(super) fn xattr_names(node: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let link = magic_link(node);
    let list = match sized_read(|buffer| rustix::fs::listxattr(&link, buffer)) {
        Err(Errno::NOTSUP) => Vec::new(),
        list => list?,
    };
    let names = list.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(<[u8]>::to_vec).collect())
}

/// The value of an extended attribute, or nothing if it has gone.
pub(super) fn xattr_value(node: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let link = magic_link(node);
    match sized_read(|buffer| rustix::fs::getxattr(&link, name, buffer)) {
        Err(Errno::NODATA) => Ok(None),
        value => Ok(Some(value?)),
    }
}

/// Reads a value of unknown length: a small buffer mostly does, the kernel's limit always.
fn sized_read(read: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    const SMALL: usize = 1024;
    const KERNEL_LIMIT: usize = 64 * 1024;
    let mut buffer = vec![0; SMALL];
    let len = match read(&mut buffer) {
        Err(Errno::RANGE) => {
            buffer.resize(KERNEL_LIMIT, 0);
            read(&mut buffer)?
        }
        len => len?,
    };
    buffer.truncate(len);
    Ok(buffer)
}

/// Sets an extended attribute of a held inode.
pub(super) fn set_xattr(node: BorrowedFd<'_>, name: &[u8], value: &[u8]) -> Result<(), Errno> {
    rustix::fs::setxattr(magic_link(node), name, value, rustix::fs::XattrFlags::empty())
}

/// Removes an extended attribute of a held inode.
pub(super) fn remove_xattr(node: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    rustix::fs::removexattr(magic_link(node), name)
}

/// Sets the owner of a held inode.
pub(super) fn set_owner(node: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<(), Errno> {
    rustix::fs::chownat(node, c"", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::EMPTY_PATH)
}

/// Sets the mode of a held inode that is no symlink.
pub(super) fn set_mode(node: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    rustix::fs::chmod(magic_link(node), Mode::from_raw_mode(mode))
}

/// Sets the times of a held inode.
pub(super) fn set_times(node: BorrowedFd<'_>, atime: Timestamp, mtime: Timestamp) -> Result<(), Errno> {
    let spec = |time: Timestamp| Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() };
    let times = Timestamps { last_access: spec(atime), last_modification: spec(mtime) };
    rustix::fs::utimensat(node, c"", &times, AtFlags::EMPTY_PATH)
}

/// The next stretch of data at or after `from` and before `size`, where it begins and ends.
pub(super) fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if from >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => return Ok(Some((from, size))),
        start => start?,
    };
    let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        Err(Errno::NXIO) => return Ok(None),
        end => end?.min(size),
    };
    Ok((start < size).then_some((start, end)))
}

/// Bytes of a file that are on their way to the disk at a time: some 50 ms.
pub(super) const AT_A_TIME: u64 = 8 << 20;

/// Writes a file's dirty pages back and waits, so that the next store through a shared mapping faults and moves
/// `ctime` (`page_mkwrite`, kernel `Documentation/filesystems/locking.rst`). Unlike fsync it commits no journal.
pub(super) fn protect_mapped_pages(file: &File) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let end = file.metadata()?.len() / AT_A_TIME * AT_A_TIME;
    // The container syncs on the same disk: it must not wait for a gigabyte.
    (0..end).step_by(AT_A_TIME as usize).try_for_each(|at| sync_range(file, at, AT_A_TIME, flags))?;
    // A length of 0: with all that was added meanwhile.
    sync_range(file, end, 0, flags)
}

/// Begins to write dirty pages of a file back (a length of 0: to its end), and does not wait. A filesystem that can't is one that
/// needs no write-back.
pub(super) fn begin_write_back(file: &File, from: u64, length: u64) {
    let _ = sync_range(file, from, length, libc::SYNC_FILE_RANGE_WRITE);
}

/// Whether a file has no disk.
pub(super) fn is_in_memory(file: &File) -> bool {
    const RAMFS: i64 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|filesystem| [libc::TMPFS_MAGIC, RAMFS].contains(&filesystem.f_type))
}

/// Waits for what was begun.
pub(super) fn end_write_back(file: &File, from: u64, length: u64) -> io::Result<()> {
    sync_range(file, from, length, libc::SYNC_FILE_RANGE_WAIT_AFTER)
}

fn sync_range(file: &File, from: u64, length: u64, flags: libc::c_uint) -> io::Result<()> {
    let (from, length) = (from.cast_signed(), length.cast_signed());
    // SAFETY: the call takes no pointer, and the descriptor is open while `file` is borrowed.
    let done = unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), from, length, flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Pages of a file that the disk does not have, where the kernel has cachestat(2): Linux 6.5.
#[cfg(test)]
pub(super) fn unwritten_pages(file: &File) -> Option<u64> {
    const CACHESTAT: libc::c_long = 451;
    let (all, mut found) = ([0_u64; 2], [0_u64; 5]);
    // SAFETY: both are of the size that the call has for them, and outlive it.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_fd().as_raw_fd(), all.as_ptr(), found.as_mut_ptr(), 0) };
    (result == 0).then_some(found[1] + found[2])
}

/// Has what this thread writes to disks come after others' (the last of `IOPRIO_CLASS_BE`, ioprio_set(2)), where their scheduler knows
/// priorities. Not `IOPRIO_CLASS_IDLE`: what a journal's commit waits for must come to the disk some time.
pub(super) fn be_last_at_the_disk() {
    const THIS_THREAD: (libc::c_int, libc::c_int) = (1, 0);
    const LAST: libc::c_int = 2 << 13 | 7;
    // SAFETY: takes no pointer.
    unsafe { libc::syscall(libc::SYS_ioprio_set, THIS_THREAD.0, THIS_THREAD.1, LAST) };
}

/// The clock that inode times are taken from.
pub(super) fn now() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { secs: i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX), nanos: since_epoch.subsec_nanos() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file mapped shared and writable, as a database does it.
    pub(in super::super) struct SharedMapping {
        start: *mut u8,
        len: usize,
    }

    impl SharedMapping {
        pub(in super::super) fn new(file: &File, len: usize) -> Self {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice, unmapped in `drop`.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
            assert_ne!(start, libc::MAP_FAILED);
            Self { start: start.cast(), len }
        }

        pub(in super::super) fn store(&mut self, offset: usize, byte: u8) {
            assert!(offset < self.len);
            // SAFETY: within the mapping, which lives as long as `self`, and the file is as long.
            unsafe { self.start.add(offset).write_volatile(byte) };
        }
    }

    impl Drop for SharedMapping {
        fn drop(&mut self) {
            // SAFETY: the mapping `new` made; nothing refers to it any more.
            unsafe { libc::munmap(self.start.cast(), self.len) };
        }
    }
}
