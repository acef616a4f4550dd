//! Which parts of large files may have changed, without reading them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{Statx, StatxAttributes};

/// Bytes that are watched as one: the largest folio of the page cache on x86-64 and on arm64 with pages of 4 KiB
/// (`MAX_PAGECACHE_ORDER` in linux/pagemap.h). What happens to a folio is told by its first page alone.
pub const UNIT: u64 = 2 << 20;

/// Counts what happens to the page cache of files.
///
/// A change of content that lies in the page cache either makes a clean page dirty, or has a page leave the cache (truncation,
/// holes, clones, direct I/O, memory that runs short). So a unit of which all was clean and read at a time has not changed since, if neither
/// has happened to any of its pages.
pub trait Watch: Send + Sync {
    /// A number that changes whenever a page of a unit of the file becomes dirty or leaves the page cache.
    fn count(&self, inode: u64, unit: u64) -> u64;
}

/// Writes a file's dirty pages back and waits: each was clean at some time meanwhile.
///
/// # Errors
/// As of sync_file_range(2).
pub fn write_back(file: &File) -> io::Result<()> {
    super::sys::protect_mapped_pages(file)
}

/// Whether the filesystem that a file is on tells of every page that becomes dirty, as far as is known: ext4 but for `data=journal`,
/// and XFS. One that keeps no pages (DAX) has nothing to tell.
pub fn can_be_watched(file: impl AsFd) -> bool {
    const EXT4: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    let Ok(filesystem) = rustix::fs::fstatfs(&file) else { return false };
    match filesystem.f_type {
        XFS => true,
        EXT4 => !journals_data(file),
        _ => false,
    }
}

/// Whether the content of this file goes through ext4's journal, or that of any file of its filesystem.
fn journals_data(file: impl AsFd) -> bool {
    let Ok(status) = rustix::fs::fstat(&file) else { return true };
    let device = format!("{}:{}", rustix::fs::major(status.st_dev), rustix::fs::minor(status.st_dev));
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else { return true };
    let mut ours = mounts.lines().filter(|line| line.split(' ').nth(2) == Some(device.as_str())).peekable();
    // `data=journal` is shown where it is not the default of the filesystem itself; flags of files are asked for one by one.
    ours.peek().is_none() || ours.any(|line| line.contains("data=journal"))
}

/// Whether one file of such a filesystem is an exception.
pub(super) fn is_exception(file: impl AsFd, status: &Statx) -> bool {
    /// STATX_ATTR_DAX.
    const DAX: StatxAttributes = StatxAttributes::DAX;
    let journals =
        rustix::fs::ioctl_getflags(&file).map_or(true, |flags| flags.contains(rustix::fs::IFlags::JOURNALING));
    status.stx_attributes.contains(DAX) || journals
}
