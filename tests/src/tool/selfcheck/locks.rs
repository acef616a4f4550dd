//! File locks: held by one process, felt by another.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use super::suite::same;
use crate::tool::sys::lock::{self, RangeLock};

/// The files, one for each kind of lock.
const FLOCK: &str = "flock";
const PROCESS: &str = "posix-lock";
const DESCRIPTION: &str = "ofd-lock";
/// A locked range that is neither the whole file nor page-aligned.
const RANGE: (i64, i64) = (100, 57);

/// The files and the locks on them, held by the calling process.
pub(super) fn hold(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let flocked = File::create(dir.join(FLOCK))?;
    lock::flock(flocked.as_fd(), libc::LOCK_EX)?;
    let process = File::create(dir.join(PROCESS))?;
    RangeLock::Process.take(process.as_fd(), RANGE.0, RANGE.1)?;
    let description = File::create(dir.join(DESCRIPTION))?;
    RangeLock::Description.take(description.as_fd(), RANGE.0, RANGE.1)?;
    Ok(move || {
        // Taking again what one holds succeeds, and keeps the descriptors alive.
        same("may the holder lock again, which", &lock::flock(flocked.as_fd(), libc::LOCK_EX)?, &true)?;
        RangeLock::Process.take(process.as_fd(), RANGE.0, RANGE.1)?;
        Ok(RangeLock::Description.take(description.as_fd(), RANGE.0, RANGE.1)?)
    })
}

/// Another process finds the locks that `holder` holds, before the holder takes them again.
pub(super) fn feel(dir: &Path, holder: i32) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let dir = dir.to_path_buf();
    Ok(move || {
        let open = |name| File::options().read(true).write(true).open(dir.join(name));
        let free = lock::flock(open(FLOCK)?.as_fd(), libc::LOCK_SH)?;
        same("is the flock free, which", &free, &false)?;
        let process = RangeLock::Process.holder(open(PROCESS)?.as_fd(), 0, 0)?;
        same("the POSIX lock", &process, &Some((RANGE.0, RANGE.1, holder)))?;
        let description = RangeLock::Description.holder(open(DESCRIPTION)?.as_fd(), 0, 0)?;
        same("the OFD lock", &description, &Some((RANGE.0, RANGE.1, -1)))
    })
}
