//! Signals: blocked, pending, ignored, handled on an alternate stack.

use std::time::Duration;

use anyhow::Context;

use super::suite::same;
use crate::tool::sys::signal::{self, Taken};

/// The signals that checks keep to themselves. All are blocked before any thread or child exists.
pub(super) mod numbers {
    use crate::tool::sys::signal::realtime;

    /// Queued three times, with values.
    pub(crate) fn queued() -> i32 {
        realtime(2)
    }
    /// Pending for one thread.
    pub(crate) fn thread() -> i32 {
        realtime(3)
    }
    /// Sent by the POSIX timer.
    pub(crate) fn timer() -> i32 {
        realtime(4)
    }
    /// Read through the signalfd.
    pub(crate) fn signalfd() -> i32 {
        realtime(5)
    }
    /// Blocked in one thread only.
    pub(crate) fn extra() -> i32 {
        realtime(6)
    }
}

/// Values in the order in which they are queued.
const VALUES: [usize; 3] = [0xdead_0001, 3, 0x7fff_ffff_0002];
/// The alternate stack: several times what a handler with AVX-512 state needs.
const ALTERNATE_STACK: usize = 64 << 10;

/// Blocks what the checks need blocked, and ignores SIGHUP and SIGTTOU; for the whole tree.
pub(super) fn prepare() -> anyhow::Result<()> {
    signal::block(&[
        libc::SIGUSR2,
        libc::SIGALRM,
        numbers::queued(),
        numbers::thread(),
        numbers::timer(),
        numbers::signalfd(),
    ])?;
    signal::ignore(libc::SIGHUP)?;
    signal::ignore(libc::SIGTTOU)?;
    Ok(())
}

/// Real-time signals that wait in the queue keep their order, values and sender; so does a plain pending one.
pub(super) fn queue() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let fill = || -> anyhow::Result<()> {
        for value in VALUES {
            signal::queue(numbers::queued(), value)?;
        }
        Ok(signal::queue(libc::SIGUSR2, 5)?)
    };
    fill()?;
    let sender = std::process::id() as i32;
    Ok(move || {
        for value in VALUES {
            let taken = signal::take(numbers::queued(), Duration::ZERO)?;
            same("a queued signal", &taken, &Some(Taken { code: libc::SI_QUEUE, value, sender }))?;
        }
        same("what follows in the queue", &signal::take(numbers::queued(), Duration::ZERO)?, &None)?;
        let plain = signal::take(libc::SIGUSR2, Duration::ZERO)?;
        same("the pending SIGUSR2", &plain, &Some(Taken { code: libc::SI_QUEUE, value: 5, sender }))?;
        fill()
    })
}

/// A signal that waits for the calling thread.
pub(super) fn for_thread() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    signal::raise(numbers::thread())?;
    Ok(|| {
        let taken = signal::take(numbers::thread(), Duration::ZERO)?;
        // The C library hands SI_TKILL out as SI_USER.
        same("the signal for this thread", &taken.map(|taken| taken.code), &Some(libc::SI_USER))?;
        Ok(signal::raise(numbers::thread())?)
    })
}

/// The calling thread's alternate stack, and a handler that runs on it. Only one thread at a time may verify this.
pub(super) fn alternate_stack() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let base = signal::set_alternate_stack(ALTERNATE_STACK)?;
    signal::count_on_alternate_stack(libc::SIGUSR1)?;
    let mut caught = signal::caught();
    Ok(move || {
        same("the stack", &signal::alternate_stack()?, &(base, ALTERNATE_STACK))?;
        signal::raise(libc::SIGUSR1).context("raise SIGUSR1")?;
        same("is the handler's count", &signal::caught(), &(caught + 1))?;
        caught += 1;
        Ok(())
    })
}
