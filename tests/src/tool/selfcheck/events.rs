//! Descriptors that report events: epoll, eventfd, signalfd, inotify.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::suite::same;
use crate::tool::sys::{event, signal};

/// The kernel reports within microseconds; a loaded machine may need longer to schedule us.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// What an eventfd holds at first.
const COUNT: u32 = 7;

/// Waits until `fd` can be read; `false` if it cannot within `timeout`.
pub(super) fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> anyhow::Result<bool> {
    let until = Instant::now() + timeout;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::try_from(left)?) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
}

/// An epoll with a level-triggered, an edge-triggered, a one-shot and a silent member, and one that is a duplicate.
pub(super) fn epoll() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    const ADD: i32 = libc::EPOLL_CTL_ADD;
    const IN: i32 = libc::EPOLLIN;
    let epoll = event::epoll()?;
    let level = event::eventfd(1, false)?;
    let mut edge = File::from(event::eventfd(0, false)?);
    let once = event::eventfd(1, false)?;
    let (silent, _keeps_silent) = nix::unistd::pipe()?;
    let duplicate = level.try_clone()?;
    event::epoll_set(epoll.as_fd(), ADD, level.as_fd(), IN, 0x1_0000_0001)?;
    event::epoll_set(epoll.as_fd(), ADD, edge.as_fd(), IN | libc::EPOLLET, 2)?;
    event::epoll_set(epoll.as_fd(), ADD, once.as_fd(), IN | libc::EPOLLONESHOT, 3)?;
    event::epoll_set(epoll.as_fd(), ADD, silent.as_fd(), IN | libc::EPOLLRDHUP, 4)?;
    event::epoll_set(epoll.as_fd(), ADD, duplicate.as_fd(), IN, 5)?;
    Ok(move || {
        let _open = (&level, &duplicate, &silent, &_keeps_silent);
        let level_only = vec![(IN, 5), (IN, 0x1_0000_0001)];
        let mut ready = event::epoll_ready(epoll.as_fd(), Duration::ZERO)?;
        // Edges and shots that were used up may come again after a move: epoll is armed anew there.
        ready.retain(|(_, data)| *data != 3 && *data != 2);
        same("what is ready", &ready, &level_only)?;
        edge.write_all(&1_u64.to_ne_bytes()).context("ring the edge-triggered member")?;
        event::epoll_set(epoll.as_fd(), libc::EPOLL_CTL_MOD, once.as_fd(), IN | libc::EPOLLONESHOT, 3)?;
        let ready = event::epoll_ready(epoll.as_fd(), REPORT_TIMEOUT)?;
        same("what is ready after ringing", &ready, &vec![(IN, 2), (IN, 3), (IN, 5), (IN, 0x1_0000_0001)])?;
        let ready = event::epoll_ready(epoll.as_fd(), Duration::ZERO)?;
        same("what is ready again", &ready, &level_only)?;
        edge.read_exact(&mut [0; 8]).context("reset the edge-triggered member")
    })
}

/// An eventfd with a count.
pub(super) fn eventfd() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut counter = File::from(event::eventfd(COUNT, false)?);
    let mut wanted = u64::from(COUNT);
    Ok(move || {
        let mut word = [0; 8];
        counter.read_exact(&mut word).context("read the count")?;
        same("the count", &u64::from_ne_bytes(word), &wanted)?;
        wanted = wanted % 1000 + 1;
        counter.write_all(&wanted.to_ne_bytes()).context("write the count")
    })
}

/// An eventfd in semaphore mode with a count. CRIU 4.2.1 restores it without the mode.
pub(super) fn semaphore() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut semaphore = File::from(event::eventfd(COUNT, true)?);
    Ok(move || {
        let mut taken = 0;
        let mut word = [0; 8];
        while semaphore.read_exact(&mut word).is_ok() {
            same("one unit", &u64::from_ne_bytes(word), &1)?;
            taken += 1;
        }
        semaphore.write_all(&u64::from(COUNT).to_ne_bytes())?;
        same("the count", &taken, &COUNT)
    })
}

/// A signalfd with one pending signal; the signal is blocked in all threads.
pub(super) fn signalfd(number: i32) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let fd = event::signalfd(number)?;
    signal::queue(number, 0)?;
    Ok(move || {
        same("the pending signal", &event::signalfd_take(fd.as_fd())?, &Some(number as u32))?;
        same("what follows", &event::signalfd_take(fd.as_fd())?, &None)?;
        Ok(signal::queue(number, 0)?)
    })
}

/// An inotify watch on a file. Events that are unread at the move may be lost (CRIU says so); later ones must come.
pub(super) fn inotify(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join(format!("watched-{}", std::process::id()));
    fs::write(&path, "0")?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let watch = inotify.add_watch(&path, AddWatchFlags::IN_MODIFY)?;
    let mut round = 0_u64;
    Ok(move || {
        round += 1;
        let mut file = File::options().write(true).open(&path)?;
        file.write_all(round.to_string().as_bytes())?;
        if !readable(inotify.as_fd(), REPORT_TIMEOUT)? {
            bail!("no event came for a write");
        }
        let events = inotify.read_events().context("read the event")?;
        let seen: Vec<_> = events.iter().map(|event| (event.wd, event.mask)).collect();
        same("the events", &seen, &vec![(watch, AddWatchFlags::IN_MODIFY)])
    })
}

/// A descriptor with its number, its close-on-exec flag and a duplicate that shares its offset.
pub(super) fn descriptors(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join("numbered");
    fs::write(&path, vec![b'x'; 1000])?;
    let file = File::open(&path)?;
    let duplicate = file.try_clone()?;
    let high = event::fcntl(file.as_fd(), libc::F_DUPFD, 500)?;
    let flags = |fd: BorrowedFd<'_>| event::fcntl(fd, libc::F_GETFD, 0);
    let mut offset = 0;
    Ok(move || {
        let target = fs::read_link(format!("/proc/self/fd/{high}")).context("the descriptor with a high number")?;
        same("what the high number means", &target, &path)?;
        same("close-on-exec", &flags(file.as_fd())?, &libc::FD_CLOEXEC)?;
        let position = nix::unistd::lseek(duplicate.as_fd(), 0, nix::unistd::Whence::SeekCur)?;
        same("the shared offset", &position, &offset)?;
        offset = (offset + 1) % 1000;
        nix::unistd::lseek(file.as_fd(), offset, nix::unistd::Whence::SeekSet)?;
        same("the number", &(duplicate.as_raw_fd() == high), &false)
    })
}
