//! Gives CRIU the flags of areas without the kernel's walk over the page tables.
//!
//! CRIU reads `/proc/<pid>/smaps` for each area's first line and its `VmFlags` (`parse_smaps` in criu/proc_parse.c, 4.2). Where the agent has
//! written both into a file beside the table, CRIU reads that file. The agent writes none for a CRIU it does not know.
//!
//! Then CRIU looks at every area's file below `/proc/<pid>/map_files` (`vma_get_mapfile`, there), which takes the kernel longer than the walk:
//! a server with ten tasks has fifteen hundred of them. What CRIU would find is known from the first line:
//! - An area without a file has no entry there.
//! - The entry's mode says how the file was opened, and so CRIU opens it for the restored task. To a private mapping that makes no difference:
//!   no store goes through it to the file, nor may one be asked for later.
//! - CRIU opens what lies on an overlay for reading, as it does wherever a device has no number of its own. It only wants to find out
//!   the file's kind, identity and path, for which on other filesystems it opens a mere handle (`O_PATH`).

use std::ffi::{CStr, c_int};
use std::fs::File;
use std::io::{Read, Seek};
use std::mem::zeroed;
use std::os::fd::IntoRawFd;
use std::sync::{Mutex, PoisonError};

use libc::stat64;

/// What is known of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// It has no file.
    Anonymous,
    /// A private mapping of a file.
    PrivateFile,
}

/// The areas of the task whose flags CRIU has asked for last, by their entries' names. CRIU looks at one task after the other.
static AREAS: Mutex<Vec<(u64, u64, Known)>> = Mutex::new(Vec::new());

/// Whether CRIU reads such a file there. Cheap: it opens thousands of others.
pub(crate) fn is_one(path: &CStr) -> bool {
    path.to_bytes().ends_with(b"smaps")
}

/// The file to read instead of the one that was opened, if there is one: it is there before the table is.
pub(crate) fn instead_of(fd: c_int) -> Option<c_int> {
    let pid = super::pages::task_of(fd, "smaps")?;
    let table = std::env::var(super::pages::TABLE).ok()?;
    let mut file = File::open(format!("{table}.smaps.{pid}")).ok()?;
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    file.rewind().ok()?;
    *AREAS.lock().unwrap_or_else(PoisonError::into_inner) = text.lines().filter_map(area).collect();
    super::pages::tell(&format!("smaps {pid}\n"));
    Some(file.into_raw_fd())
}

/// CRIU asks for another task's flags, which come from the kernel.
pub(crate) fn forget() {
    AREAS.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// An area's first line (proc_pid_maps(5)), unless the area has a file that others see changing.
fn area(line: &str) -> Option<(u64, u64, Known)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = range(words.next()?)?;
    let protection = words.next()?;
    let (_, device, inode) = (words.next()?, words.next()?, words.next()?);
    let known = if device == "00:00" && inode == "0" {
        Known::Anonymous
    } else {
        (protection.len() == 4 && protection.ends_with('p')).then_some(Known::PrivateFile)?
    };
    Some((start, end, known))
}

fn range(name: &str) -> Option<(u64, u64)> {
    let (start, end) = name.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// What is known of the area with this entry in `map_files`.
pub(crate) fn known(entry: &CStr) -> Option<Known> {
    let (start, end) = range(entry.to_str().ok()?)?;
    let areas = AREAS.lock().unwrap_or_else(PoisonError::into_inner);
    let place = areas.binary_search_by_key(&start, |(start, ..)| *start).ok()?;
    areas.get(place).filter(|area| area.1 == end).map(|(.., known)| *known)
}

/// An entry of a file that was opened for reading: a symbolic link with that mode (`proc_map_files_instantiate` in fs/proc/base.c).
pub(crate) fn entry_for_reading() -> stat64 {
    // SAFETY: a structure of numbers.
    let mut entry: stat64 = unsafe { zeroed() };
    entry.st_mode = libc::S_IFLNK | libc::S_IRUSR;
    entry.st_nlink = 1;
    entry
}

/// Whether a handle is of a regular file on an overlay.
pub(crate) fn is_file_on_overlay(fd: c_int) -> bool {
    // SAFETY: structures of numbers, which the C library fills.
    unsafe {
        let (mut file, mut filesystem) = (zeroed::<stat64>(), zeroed::<libc::statfs64>());
        libc::fstatfs64(fd, &raw mut filesystem) == 0
            && filesystem.f_type == libc::OVERLAYFS_SUPER_MAGIC
            && libc::fstat64(fd, &raw mut file) == 0
            && file.st_mode & libc::S_IFMT == libc::S_IFREG
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_line_tells_what_an_entry_would() {
        let of = |line| area(line).map(|(.., known)| known);
        assert_eq!(
            area("7f00-7fff rw-p 00000000 00:00 0 [heap]"),
            Some((0x7f00, 0x7fff, Known::Anonymous)),
            "an area of no file"
        );
        assert_eq!(of("1000-2000 r-xp 00000000 00:54 815 /usr/bin/x y"), Some(Known::PrivateFile));
        assert_eq!(of("1000-2000 rw-s 00000000 00:54 815 /data"), None, "others see what is written");
        assert_eq!(of("VmFlags: rd wr mr"), None);
        assert_eq!(of("Size: 4 kB"), None);
    }

    #[test]
    fn only_the_last_task_s_areas_are_known() {
        *AREAS.lock().expect("locks") =
            ["1000-2000 r--p 0 00:54 8 /a", "3000-4000 rw-p 0 00:00 0"].into_iter().filter_map(area).collect();
        assert_eq!(known(c"1000-2000"), Some(Known::PrivateFile));
        assert_eq!(known(c"3000-4000"), Some(Known::Anonymous));
        assert_eq!(known(c"1000-4000"), None);
        assert_eq!(known(c"5000-6000"), None);
        assert_eq!(known(c"passwd"), None);
        forget();
        assert_eq!(known(c"3000-4000"), None);
    }
}
