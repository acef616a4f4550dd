//! The lock of a directory, held for a while.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::check;
use super::mem::{PAGE, Region, Sharing};

/// userfaultfd(2): the version, and the modes used here.
const API: u64 = 0xaa;
const REGISTER_MISSING: u64 = 1;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;

fn request(uffd: &OwnedFd, number: u64, mut argument: [u64; 4]) -> io::Result<()> {
    // SAFETY: the requests above take at most 32 bytes, which outlive the call.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), number as _, argument.as_mut_ptr()) }).map(drop)
}

/// Reads the directory into a page that comes only after `held`: the kernel keeps the directory locked until then, and
/// a task that makes a file in it waits in state D, as it does on a disk that is busy.
pub(crate) fn hold(directory: &File, held: Duration) -> io::Result<()> {
    let page = Region::anonymous(PAGE, Sharing::Private)?;
    // SAFETY: plain system call; the descriptor is new and ours.
    let uffd = unsafe {
        let fd = check(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let (address, length) = (page.address() as u64, PAGE as u64);
    request(&uffd, UFFDIO_API, [API, 0, 0, 0])?;
    request(&uffd, UFFDIO_REGISTER, [address, length, REGISTER_MISSING, 0])?;
    let bring = std::thread::spawn(move || {
        std::thread::sleep(held);
        request(&uffd, UFFDIO_ZEROPAGE, [address, length, 0, 0])
    });
    // SAFETY: the kernel writes at most a page to it, which is mapped until the end of this function.
    check(unsafe { libc::syscall(libc::SYS_getdents64, directory.as_raw_fd(), address, PAGE) })?;
    bring.join().map_err(|_| io::Error::other("the thread that brings the page panicked"))?
}
