//! File locks, on raw descriptors: nix's owned lock types would hide what is tested here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// The two kinds of byte-range locks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RangeLock {
    /// Owned by the process (POSIX).
    Process,
    /// Owned by the open file description (OFD).
    Description,
}

impl RangeLock {
    fn commands(self) -> (i32, i32) {
        match self {
            Self::Process => (libc::F_SETLK, libc::F_GETLK),
            Self::Description => (libc::F_OFD_SETLK, libc::F_OFD_GETLK),
        }
    }

    /// Takes a write lock on a range.
    pub(crate) fn take(self, file: BorrowedFd<'_>, start: i64, length: i64) -> io::Result<()> {
        let lock = write_lock(start, length);
        // SAFETY: the command reads one flock, which is initialised.
        check(unsafe { libc::fcntl(file.as_raw_fd(), self.commands().0, &raw const lock) }).map(drop)
    }

    /// Who prevents a write lock on a range: (start, length, process id or -1), or `None`.
    pub(crate) fn holder(self, file: BorrowedFd<'_>, start: i64, length: i64) -> io::Result<Option<(i64, i64, i32)>> {
        let mut lock = write_lock(start, length);
        // SAFETY: the command reads and writes one flock, which is initialised.
        check(unsafe { libc::fcntl(file.as_raw_fd(), self.commands().1, &raw mut lock) })?;
        let free = i32::from(lock.l_type) == libc::F_UNLCK;
        Ok((!free).then_some((lock.l_start, lock.l_len, lock.l_pid)))
    }
}

fn write_lock(start: i64, length: i64) -> libc::flock {
    // SAFETY: zeroes are a valid flock; OFD commands require l_pid 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = start;
    lock.l_len = length;
    lock
}

/// `flock` with `operation`; `Ok(false)` if somebody else holds a conflicting lock.
pub(crate) fn flock(file: BorrowedFd<'_>, operation: i32) -> io::Result<bool> {
    // SAFETY: no pointers.
    match check(unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}
