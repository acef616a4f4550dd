//! Signals: handlers, queues, timers.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::check;

static STOP: AtomicBool = AtomicBool::new(false);
static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn request_stop(_signal: i32) {
    STOP.store(true, Ordering::Relaxed);
}

extern "C" fn count(_signal: i32) {
    CAUGHT.fetch_add(1, Ordering::Relaxed);
}

/// Takes SIGTERM and SIGINT as a request to stop.
pub(crate) fn stop_on_terminate() -> io::Result<()> {
    stop_on(libc::SIGTERM)?;
    stop_on(libc::SIGINT)
}

/// Takes `signal` as a request to stop. System calls it interrupts fail with EINTR.
pub(crate) fn stop_on(signal: i32) -> io::Result<()> {
    handle(signal, request_stop as *const () as usize, 0)
}

/// Whether a stop was requested.
pub(crate) fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Counts `signal` in [`caught`]; its handler runs on the alternate stack.
pub(crate) fn count_on_alternate_stack(signal: i32) -> io::Result<()> {
    handle(signal, count as *const () as usize, libc::SA_ONSTACK | libc::SA_RESTART)
}

/// How often the counting handler ran in this process.
pub(crate) fn caught() -> u64 {
    CAUGHT.load(Ordering::Relaxed)
}

/// Ignores `signal`.
pub(crate) fn ignore(signal: i32) -> io::Result<()> {
    handle(signal, libc::SIG_IGN, 0)
}

fn handle(signal: i32, handler: usize, flags: i32) -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: both handlers only touch atomics, which is async-signal-safe.
    check(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set, `sigaddset` changes an initialised one.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Blocks signals in the calling thread, and in threads and children it makes later.
pub(crate) fn block(signals: &[i32]) -> io::Result<()> {
    let set = set_of(signals);
    // SAFETY: `set` is initialised.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// The signals that the calling thread has blocked, a bit each, as the kernel keeps them.
pub(crate) fn blocked() -> io::Result<u64> {
    let mut mask = 0_u64;
    let place: *mut u64 = &raw mut mask;
    // SAFETY: it writes as many bytes as it is told the set has.
    check(unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, std::ptr::null::<u64>(), place, size_of::<u64>())
    })?;
    Ok(mask)
}

/// The first real-time signal that the C library leaves to programs.
pub(crate) fn realtime(offset: i32) -> i32 {
    libc::SIGRTMIN() + offset
}

/// Queues `signal` with a value for this process.
pub(crate) fn queue(signal: i32, value: usize) -> io::Result<()> {
    let value = libc::sigval { sival_ptr: value as *mut _ };
    // SAFETY: the value is passed through as a number, never dereferenced.
    check(unsafe { libc::sigqueue(libc::getpid(), signal, value) }).map(drop)
}

/// Sends `signal` to the calling thread.
pub(crate) fn raise(signal: i32) -> io::Result<()> {
    // SAFETY: tgkill with our own ids.
    check(unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) }).map(drop)
}

/// What a pending signal carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// `si_code`: SI_QUEUE, SI_TKILL, SI_TIMER, ...
    pub(crate) code: i32,
    /// The queued value; 0 where the signal has none.
    pub(crate) value: usize,
    /// The sender's process id.
    pub(crate) sender: i32,
}

/// Takes one pending, blocked signal; `None` if none came within `wait`.
pub(crate) fn take(signal: i32, wait: Duration) -> io::Result<Option<Taken>> {
    let set = set_of(&[signal]);
    let timeout = libc::timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let taken = loop {
        // SAFETY: all three point to initialised values of the right type.
        let taken = check(unsafe { libc::sigtimedwait(&raw const set, info.as_mut_ptr(), &raw const timeout) });
        // A freeze interrupts this call (signal(7)): then it begins anew.
        if !taken.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
            break taken;
        }
    };
    match taken {
        Ok(_) => {
            // SAFETY: zeroed before, filled by the kernel; zeroes are a valid siginfo_t.
            let info = unsafe { info.assume_init() };
            // SAFETY: signals of these codes carry a pid and a value, others leave the zeroes of the union.
            let (value, sender) = unsafe { (info.si_value().sival_ptr as usize, info.si_pid()) };
            Ok(Some(Taken { code: info.si_code, value, sender }))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives the calling thread an alternate signal stack of `length` bytes that is never freed; returns its address.
pub(crate) fn set_alternate_stack(length: usize) -> io::Result<usize> {
    let memory: &'static mut [u8] = vec![0; length].leak();
    let base = memory.as_mut_ptr();
    let stack = libc::stack_t { ss_sp: base.cast(), ss_flags: 0, ss_size: length };
    // SAFETY: the memory is leaked, so it outlives the thread.
    check(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) })?;
    Ok(base as usize)
}

/// The address and length of the calling thread's alternate stack.
pub(crate) fn alternate_stack() -> io::Result<(usize, usize)> {
    // SAFETY: zeroes are a valid stack_t.
    let mut stack: libc::stack_t = unsafe { zeroed() };
    // SAFETY: a null new stack only reads.
    check(unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) })?;
    Ok((stack.ss_sp as usize, stack.ss_size))
}

fn timeval(span: Duration) -> libc::timeval {
    libc::timeval { tv_sec: span.as_secs() as i64, tv_usec: i64::from(span.subsec_micros()) }
}

/// Arms `ITIMER_REAL` (the one of `alarm`), `ITIMER_VIRTUAL` or `ITIMER_PROF`.
pub(crate) fn set_interval_timer(which: i32, first: Duration, interval: Duration) -> io::Result<()> {
    let value = libc::itimerval { it_interval: timeval(interval), it_value: timeval(first) };
    // SAFETY: `value` is initialised, and the old value is not asked for.
    check(unsafe { libc::setitimer(which as _, &raw const value, std::ptr::null_mut()) }).map(drop)
}

/// Time left and interval of an interval timer.
pub(crate) fn interval_timer(which: i32) -> io::Result<(Duration, Duration)> {
    // SAFETY: zeroes are a valid itimerval.
    let mut value: libc::itimerval = unsafe { zeroed() };
    // SAFETY: `value` is ours to fill.
    check(unsafe { libc::getitimer(which as _, &raw mut value) })?;
    let span = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    Ok((span(value.it_value), span(value.it_interval)))
}

/// A POSIX timer of this process, never deleted.
pub(crate) struct PosixTimer(usize);

impl PosixTimer {
    /// A timer on CLOCK_MONOTONIC that queues `signal` with `value` every `interval`.
    pub(crate) fn every(interval: Duration, signal: i32, value: usize) -> io::Result<Self> {
        // SAFETY: zeroes are a valid sigevent.
        let mut event: libc::sigevent = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = signal;
        event.sigev_value = libc::sigval { sival_ptr: value as *mut _ };
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both point to values of the right type.
        check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) })?;
        let span = libc::timespec { tv_sec: interval.as_secs() as i64, tv_nsec: i64::from(interval.subsec_nanos()) };
        let setting = libc::itimerspec { it_interval: span, it_value: span };
        // SAFETY: `timer` was created above.
        check(unsafe { libc::timer_settime(timer, 0, &raw const setting, std::ptr::null_mut()) })?;
        Ok(Self(timer as usize))
    }

    /// The timer's interval.
    pub(crate) fn interval(&self) -> io::Result<Duration> {
        // SAFETY: zeroes are a valid itimerspec.
        let mut setting: libc::itimerspec = unsafe { zeroed() };
        // SAFETY: the timer lives as long as the process.
        check(unsafe { libc::timer_gettime(self.0 as libc::timer_t, &raw mut setting) })?;
        Ok(Duration::new(setting.it_interval.tv_sec as u64, setting.it_interval.tv_nsec as u32))
    }
}
