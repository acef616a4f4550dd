//! Gives CRIU the flags of areas without the kernel's walk over the page tables.
//!
//! CRIU reads `/proc/<pid>/smaps` for each area's first line and its `VmFlags` (`parse_smaps` in criu/proc_parse.c, 4.2). Where the agent has
//! written both into a file beside the table, CRIU reads that file. The agent writes none for a CRIU it does not know.

use std::ffi::{CStr, c_int};
use std::fs::File;
use std::os::fd::IntoRawFd;

/// Whether CRIU reads such a file there. Cheap: it opens thousands of others.
pub(crate) fn is_one(path: &CStr) -> bool {
    path.to_bytes().ends_with(b"smaps")
}

/// The file to read instead of the one that was opened, if there is one: it is there before the table is.
pub(crate) fn instead_of(fd: c_int) -> Option<c_int> {
    let pid = super::pages::task_of(fd, "smaps")?;
    let table = std::env::var(super::pages::TABLE).ok()?;
    let file = File::open(format!("{table}.smaps.{pid}")).ok()?;
    super::pages::tell(&format!("smaps {pid}\n"));
    Some(file.into_raw_fd())
}
