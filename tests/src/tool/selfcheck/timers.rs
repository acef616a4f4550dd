//! Timers and clocks.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::events::readable;
use super::suite::same;
use crate::tool::sys::signal::PosixTimer;
use crate::tool::sys::{event, process, signal};

/// Often enough for a check that waits for one.
const PERIOD: Duration = Duration::from_millis(50);
/// A one-shot timer of this span is armed anew after it fired.
const ONE_SHOT: Duration = Duration::from_millis(400);
/// A timer that must keep its setting and not fire.
const FAR: Duration = Duration::from_secs(1_000_000);
/// How late a timer may fire on a loaded machine.
const LATE: Duration = Duration::from_millis(500);

/// A periodic timerfd must go on firing with its interval. CRIU 4.2.1 restores it disarmed if it expired before the dump
/// came to it, be it while the process was frozen: the kernel shows no time left until the expirations are read, and
/// CRIU arms it with that.
pub(super) fn periodic() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let timer = event::timerfd(libc::CLOCK_MONOTONIC, PERIOD, PERIOD)?;
    Ok(move || {
        same("the interval", &event::timerfd_left(timer.as_fd())?.1, &PERIOD)?;
        if !readable(timer.as_fd(), PERIOD + LATE)? {
            bail!("the timer does not fire");
        }
        nix::unistd::read(timer.as_fd(), &mut [0; 8]).context("read the expirations")?;
        Ok(())
    })
}

/// A one-shot timerfd that is armed at any time must fire in the end.
pub(super) fn one_shot() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let timer = event::timerfd(libc::CLOCK_MONOTONIC, ONE_SHOT, Duration::ZERO)?;
    let mut armed = Instant::now();
    Ok(move || {
        // A frozen container's timers stand still, so an overdue one gets its whole span again.
        let overdue = armed.elapsed() > ONE_SHOT;
        let wait = if overdue { ONE_SHOT + LATE } else { Duration::ZERO };
        if readable(timer.as_fd(), wait)? {
            nix::unistd::read(timer.as_fd(), &mut [0; 8])?;
            event::timerfd_arm(timer.as_fd(), ONE_SHOT, Duration::ZERO)?;
            armed = Instant::now();
        } else if overdue {
            bail!("the timer did not fire");
        }
        Ok(())
    })
}

/// A far timerfd must keep its remaining time and its interval.
pub(super) fn far() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let timer = event::timerfd(libc::CLOCK_REALTIME, FAR, FAR)?;
    let mut last = FAR;
    Ok(move || {
        let (left, interval) = event::timerfd_left(timer.as_fd())?;
        same("the interval", &interval, &FAR)?;
        if left > last + LATE || left.is_zero() {
            bail!("{left:?} are left, it was {last:?}");
        }
        last = left;
        Ok(())
    })
}

/// A POSIX timer must go on queueing its signal with its value.
pub(super) fn posix(number: i32) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    const VALUE: usize = 0x1234_5678_9abc;
    let timer = PosixTimer::every(PERIOD, number, VALUE)?;
    Ok(move || {
        same("the interval", &timer.interval()?, &PERIOD)?;
        let Some(taken) = signal::take(number, PERIOD + LATE)? else { bail!("the timer does not fire") };
        same("its signal", &(taken.code, taken.value), &(libc::SI_TIMER, VALUE))
    })
}

/// The interval timer behind `alarm` must go on sending SIGALRM, which is blocked; the one of the virtual time must
/// keep its setting.
pub(super) fn interval() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    signal::set_interval_timer(libc::ITIMER_REAL, PERIOD, PERIOD)?;
    signal::set_interval_timer(libc::ITIMER_VIRTUAL, FAR, FAR)?;
    Ok(|| {
        same("the interval", &signal::interval_timer(libc::ITIMER_REAL)?.1, &PERIOD)?;
        let (left, interval) = signal::interval_timer(libc::ITIMER_VIRTUAL)?;
        same("the interval in virtual time", &interval, &FAR)?;
        // The kernel rounds up to its tick.
        if left > FAR + LATE || left < FAR / 2 {
            bail!("{left:?} of virtual time are left of {FAR:?}");
        }
        match signal::take(libc::SIGALRM, PERIOD + LATE)? {
            Some(_) => Ok(()),
            None => bail!("SIGALRM does not come"),
        }
    })
}

/// Clocks must not go back, nor differ between the vDSO and the system call. The largest step between two
/// verifications goes to `jump`.
pub(super) fn clocks(jump: Rc<Cell<u64>>) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    const CLOCKS: [i32; 3] = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME];
    let mut last = [0; CLOCKS.len()];
    Ok(move || {
        for (clock, last) in CLOCKS.into_iter().zip(&mut last) {
            let fast = process::clock(clock)?;
            let slow = process::clock_by_system_call(clock)?;
            if fast < *last {
                bail!("clock {clock} went back by {} ns", *last - fast);
            }
            if slow < fast || slow - fast > LATE.as_nanos() as u64 {
                bail!("clock {clock} is {fast} by the vDSO and {slow} by the system call");
            }
            if *last > 0 && clock == libc::CLOCK_MONOTONIC {
                jump.set(jump.get().max((fast - *last) / 1_000_000));
            }
            *last = slow;
        }
        Ok(())
    })
}
