//! Processes: fork, identity, limits, `prctl`.

use std::io;

use super::check;

/// Forks; returns the child's id in the parent, and never returns in the child, which runs `child` and exits with
/// its result.
///
/// The caller must be single-threaded, unless `child` restricts itself to memory it owns: no allocation, no locks.
pub(crate) fn fork(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: the child ends by `_exit` and so runs no code of the parent; see the precondition above.
    match check(unsafe { libc::fork() })? {
        0 => {
            let code = child();
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid),
    }
}

/// Waits for a child; returns its exit code, or 128 + its signal.
pub(crate) fn wait(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int.
        match check(unsafe { libc::waitpid(pid, &raw mut status, 0) }) {
            Ok(_) if libc::WIFEXITED(status) => return Ok(libc::WEXITSTATUS(status)),
            Ok(_) => return Ok(128 + libc::WTERMSIG(status)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// `prctl` with one integer argument.
pub(crate) fn prctl(option: i32, argument: u64) -> io::Result<i32> {
    // SAFETY: the options used with this function take integers.
    check(unsafe { libc::prctl(option, argument, 0, 0, 0) })
}

/// The signal this process gets when its parent dies.
pub(crate) fn parent_death_signal() -> io::Result<i32> {
    prctl_read(libc::PR_GET_PDEATHSIG)
}

/// Whether orphans below this process become its children.
pub(crate) fn is_subreaper() -> io::Result<i32> {
    prctl_read(libc::PR_GET_CHILD_SUBREAPER)
}

fn prctl_read(option: i32) -> io::Result<i32> {
    let mut value = 0;
    let place: *mut i32 = &raw mut value;
    // SAFETY: these options write one int.
    check(unsafe { libc::prctl(option, place) })?;
    Ok(value)
}

/// The name of the calling thread.
pub(crate) fn name() -> io::Result<[u8; 16]> {
    let mut name = [0; 16];
    let place: *mut u8 = name.as_mut_ptr();
    // SAFETY: it writes 16 bytes.
    check(unsafe { libc::prctl(libc::PR_GET_NAME, place) })?;
    Ok(name)
}

/// Names the calling thread.
pub(crate) fn set_name(name: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: `name` is a C string for the time of the call.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) }).map(drop)
}

/// Adds bits to the execution domain; 0xffffffff only reads. Returns what it was.
pub(crate) fn personality(bits: u64) -> io::Result<i32> {
    // SAFETY: no pointers.
    check(unsafe { libc::personality(bits as _) })
}

/// Gives up all capabilities of the calling thread: effective, permitted and inheritable.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h; it takes two sets of three words.
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let sets = [[0_u32; 3]; 2];
    // SAFETY: header and sets have the layout of version 3, and are only read.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) }).map(drop)
}

/// The nice value of the calling process.
pub(crate) fn nice() -> i32 {
    // SAFETY: no pointers. -1 is also a value, and the call cannot fail for ourselves.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

/// Sets the nice value of the calling process.
pub(crate) fn set_nice(nice: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }).map(drop)
}

/// Sets a scheduling policy without real-time priority: `SCHED_OTHER`, `SCHED_BATCH` or `SCHED_IDLE`.
pub(crate) fn set_scheduler(policy: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: `parameters` is initialised.
    check(unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) }).map(drop)
}

/// The scheduling policy of the calling thread.
pub(crate) fn scheduler() -> io::Result<i32> {
    // SAFETY: no pointers.
    check(unsafe { libc::sched_getscheduler(0) })
}

/// A clock in nanoseconds, through the C library, which is to say the vDSO.
pub(crate) fn clock(clock: i32) -> io::Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills one timespec.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// A clock in nanoseconds, by a true system call.
pub(crate) fn clock_by_system_call(clock: i32) -> io::Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills one timespec.
    check(unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut time) })?;
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}
