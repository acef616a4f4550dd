//! Memory that tasks share.
//!
//! **Dump.** CRIU asks each piece where it has content (`next_data_segment` in criu/shmem.c, 4.2). For those in the agent's table the
//! answer is: nowhere. They were sent, and are told.
//!
//! **Restore.** CRIU makes a file in memory for each, and then opens the image of its content, whose name has the number it had on the
//! source (`open_shmem` in criu/shmem.c, `memfd_open_inode_nocache` in criu/memfd.c). What arrived beside the images
//! is such a file already: when that image is opened, it takes the place of the one that CRIU has just made. System V's segments
//! are in an IPC namespace of the agent's making: it takes the place of the one that CRIU has just made, when CRIU opens the image of
//! the namespace, and a segment that CRIU wants to make is there already.
//!
//! The agent is asked over a socket that lies among the images: they are what CRIU can still reach in the container's own
//! namespaces.

use std::ffi::{CStr, c_int, c_void};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// The socket's name.
const SOCKET: &str = "longhaul.sock";
/// Bytes of a question.
const QUESTION: usize = 32;
/// Images of shared memory's content, and of an IPC namespace.
const CONTENT: &[u8] = b"pagemap-shmem-";
const NAMESPACE: &[u8] = b"ipcns-var-";
const IMAGE: &[u8] = b".img";

/// Whether a file's content is to be left out of the images.
pub(crate) fn hides(fd: c_int) -> bool {
    super::pages::objects().is_some_and(|objects| {
        // SAFETY: all zeroes is a value of it, and the call writes a whole one.
        let (about, result) = unsafe {
            let mut about: libc::stat = std::mem::zeroed();
            let result = libc::fstat(fd, &raw mut about);
            (about, result)
        };
        let hidden = result == 0 && objects.contains(&(about.st_dev, about.st_ino));
        if hidden {
            super::pages::tell(&format!("object {:x} {:x}\n", about.st_dev, about.st_ino));
        }
        hidden
    })
}

/// The file in memory that CRIU made last.
static LAST_MADE: AtomicI32 = AtomicI32::new(-1);
/// This process is in the agent's IPC namespace.
static ADOPTS: AtomicBool = AtomicBool::new(false);

/// CRIU has made a file in memory.
pub(crate) fn made(fd: c_int) {
    LAST_MADE.store(fd, Ordering::Relaxed);
}

/// CRIU has opened an image in a directory.
pub(crate) fn opened(dir: c_int, path: &CStr) {
    let number = |prefix| path.to_bytes().strip_prefix(prefix)?.strip_suffix(IMAGE);
    let done = if let Some(number) = number(CONTENT) {
        let made = LAST_MADE.load(Ordering::Relaxed);
        // SAFETY: takes no pointer.
        ask(dir, number).map(|file| unsafe { libc::dup2(file.as_raw_fd(), made) })
    } else if number(NAMESPACE).is_some() {
        let entered = ask(dir, b"ipc");
        ADOPTS.store(entered.is_some(), Ordering::Relaxed);
        // SAFETY: takes no pointer.
        entered.map(|namespace| unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWIPC) })
    } else {
        None
    };
    if done.is_some_and(|result| result < 0) {
        // It would go on without the memory.
        super::end_at_once();
    }
}

/// The segment that CRIU wants to make, if it is there. CRIU has said before which number it wants.
pub(crate) fn adopted() -> Option<c_int> {
    const NEXT: &str = "/proc/sys/kernel/shm_next_id";
    if !ADOPTS.load(Ordering::Relaxed) {
        return None;
    }
    let id: c_int = std::fs::read_to_string(NEXT).ok()?.trim().parse().ok()?;
    // SAFETY: all zeroes is a value of it, and the call writes a whole one.
    let found = unsafe {
        let mut about: libc::shmid_ds = std::mem::zeroed();
        libc::shmctl(id, libc::IPC_STAT, &raw mut about)
    };
    if id < 0 || found < 0 {
        return None;
    }
    // The number is not for the next one that is made.
    let _ = std::fs::write(NEXT, "-1");
    Some(id)
}

/// Asks the agent for a descriptor.
fn ask(dir: c_int, question: &[u8]) -> Option<OwnedFd> {
    let mut stream = connect(dir)?;
    let mut bytes = [0; QUESTION];
    bytes.get_mut(..question.len())?.copy_from_slice(question);
    stream.write_all(&bytes).ok()?;
    receive(&mut stream)
}

/// A socket's path may be too long, and its directory out of sight: the way there is the working directory's.
fn connect(dir: c_int) -> Option<UnixStream> {
    // SAFETY: a C string; nothing else is a pointer.
    let before = unsafe { libc::open(c".".as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    if before < 0 {
        return None;
    }
    // SAFETY: just opened, and nobody else's.
    let before = unsafe { OwnedFd::from_raw_fd(before) };
    // SAFETY: takes no pointer.
    if unsafe { libc::fchdir(dir) } < 0 {
        return None;
    }
    let stream = UnixStream::connect(SOCKET).ok();
    // SAFETY: takes no pointer.
    if unsafe { libc::fchdir(before.as_raw_fd()) } < 0 {
        return None;
    }
    stream
}

/// The answer's descriptor.
fn receive(stream: &mut UnixStream) -> Option<OwnedFd> {
    /// Room for the header of a control message and one descriptor, aligned as the kernel wants it.
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    let mut answer = [0u8; 2];
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: answer.as_mut_ptr().cast::<c_void>(), iov_len: answer.len() };
    // SAFETY: all zeroes is a value of it.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: all that the message points to outlives the calls, with the lengths that it says.
    unsafe {
        if libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) <= 0 {
            return None;
        }
        let first = libc::CMSG_FIRSTHDR(&raw const message);
        if first.is_null() || (*first).cmsg_type != libc::SCM_RIGHTS {
            return None;
        }
        let fd = libc::CMSG_DATA(first).cast::<c_int>().read_unaligned();
        Some(OwnedFd::from_raw_fd(fd))
    }
}
