//! Descriptors that report events: epoll, timerfd, eventfd, signalfd; and ioctls on pipes and sockets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::check;

fn own(fd: i32) -> io::Result<OwnedFd> {
    let fd = check(fd)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new epoll instance.
pub(crate) fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

/// Adds (`EPOLL_CTL_ADD`) or rearms (`EPOLL_CTL_MOD`) `fd` with `events`, reported as `data`.
pub(crate) fn epoll_set(epoll: BorrowedFd<'_>, op: i32, fd: BorrowedFd<'_>, events: i32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events: events as u32, u64: data };
    // SAFETY: `event` is initialised for the time of the call.
    check(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), op, fd.as_raw_fd(), &raw mut event) }).map(drop)
}

/// The events that are ready now or within `wait`, as (events, data), sorted by data.
pub(crate) fn epoll_ready(epoll: BorrowedFd<'_>, wait: Duration) -> io::Result<Vec<(i32, u64)>> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    let timeout = wait.as_millis() as i32;
    let count = loop {
        // SAFETY: the kernel fills at most as many events as the array has.
        let count = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, timeout) };
        match check(count) {
            // A freeze interrupts this call (signal(7)): then it begins anew.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    let mut ready: Vec<_> = events[..count as usize].iter().map(|event| (event.events as i32, event.u64)).collect();
    ready.sort_by_key(|(_, data)| *data);
    Ok(ready)
}

/// A non-blocking eventfd; in semaphore mode each read takes 1.
pub(crate) fn eventfd(count: u32, semaphore: bool) -> io::Result<OwnedFd> {
    let mode = if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: no pointers.
    own(unsafe { libc::eventfd(count, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | mode) })
}

/// A non-blocking timerfd on `clock`, first after `first`, then every `interval` (zero: once).
pub(crate) fn timerfd(clock: i32, first: Duration, interval: Duration) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let timer = own(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) })?;
    timerfd_arm(std::os::fd::AsFd::as_fd(&timer), first, interval)?;
    Ok(timer)
}

/// Arms a timerfd anew.
pub(crate) fn timerfd_arm(timer: BorrowedFd<'_>, first: Duration, interval: Duration) -> io::Result<()> {
    let span =
        |span: Duration| libc::timespec { tv_sec: span.as_secs() as i64, tv_nsec: i64::from(span.subsec_nanos()) };
    let setting = libc::itimerspec { it_interval: span(interval), it_value: span(first) };
    // SAFETY: `setting` is initialised, and the old one is not asked for.
    check(unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &raw const setting, std::ptr::null_mut()) }).map(drop)
}

/// Time left and interval of a timerfd.
pub(crate) fn timerfd_left(timer: BorrowedFd<'_>) -> io::Result<(Duration, Duration)> {
    // SAFETY: zeroes are a valid itimerspec.
    let mut setting: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: `setting` is ours to fill.
    check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut setting) })?;
    let span = |time: libc::timespec| Duration::new(time.tv_sec as u64, time.tv_nsec as u32);
    Ok((span(setting.it_value), span(setting.it_interval)))
}

/// A non-blocking signalfd for one signal, which should be blocked.
pub(crate) fn signalfd(signal: i32) -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set before its other uses.
    own(unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    })
}

/// The signal number at the head of a signalfd; `None` if no signal is pending.
pub(crate) fn signalfd_take(fd: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let mut record = [0; size_of::<libc::signalfd_siginfo>()];
    match nix::unistd::read(fd, &mut record) {
        Ok(_) => Ok(Some(u32::from_ne_bytes([record[0], record[1], record[2], record[3]]))),
        Err(nix::errno::Errno::EAGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Bytes that wait to be read from a pipe or socket.
pub(crate) fn unread(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: i32 = 0;
    // SAFETY: FIONREAD writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(count as usize)
}

/// `fcntl` with an integer argument.
pub(crate) fn fcntl(fd: BorrowedFd<'_>, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: the commands used with this function take an int and no pointer.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) })
}
