//! Which parts of large files may have changed, without reading them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Statx, StatxAttributes};

use crate::sys::memory::PAGE;

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
/// and XFS. One that keeps no pages (DAX) has nothing to tell, and one with blocks smaller than a page does not tell of a hole that is part of
/// one: the page stays.
pub fn can_be_watched(file: impl AsFd) -> bool {
    const EXT4: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    let Ok(filesystem) = rustix::fs::fstatfs(&file) else { return false };
    if u64::try_from(filesystem.f_bsize).is_ok_and(|block| block < PAGE) {
        return false;
    }
    match filesystem.f_type {
        XFS => true,
        EXT4 => !journals_data(file),
        _ => false,
    }
}

/// Whether the content of files goes through ext4's journal, by the mount or by the superblock's default, which only this file shows: a
/// filesystem without a journal has no line of `data=` there (`_ext4_show_options` in fs/ext4/super.c).
fn journals_data(file: impl AsFd) -> bool {
    let options = || {
        let device = rustix::fs::fstat(&file).ok()?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let device = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        std::fs::read_to_string(Path::new("/proc/fs/ext4").join(device.file_name()?).join("options")).ok()
    };
    options().is_none_or(|options| options.lines().any(|line| line == "data=journal"))
}

/// Whether one file of such a filesystem is an exception.
pub(super) fn is_exception(file: impl AsFd, status: &Statx) -> bool {
    /// STATX_ATTR_DAX.
    const DAX: StatxAttributes = StatxAttributes::DAX;
    let journals =
        rustix::fs::ioctl_getflags(&file).map_or(true, |flags| flags.contains(rustix::fs::IFlags::JOURNALING));
    status.stx_attributes.contains(DAX) || journals
}
