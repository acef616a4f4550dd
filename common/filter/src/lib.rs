//! Preloaded into CRIU's process by the hold, where it is needed.
//!
//! Today it does one thing. CRIU reads every task's resource limits with prlimit(2), which the kernel allows for a
//! task of another user only with `CAP_SYS_RESOURCE` (`check_prlimit_permission` in kernel/sys.c). An agent that was not
//! given that capability, as in many sandboxes, could move no container with a task that is not root's.
//! The same limits stand in `/proc/<pid>/limits` (proc_pid_limits(5)), readable with ptrace rights, which CRIU
//! needs anyway: where prlimit(2) is refused, they are read there.

use std::fs;

use libc::{c_int, pid_t, rlimit64};

/// Names in `/proc/<pid>/limits`, by the resource's number (fs/proc/base.c, asm-generic/resource.h).
const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As prlimit(2): each pointer is null or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prlimit64(
    pid: pid_t,
    resource: c_int,
    new_limit: *const rlimit64,
    old_limit: *mut rlimit64,
) -> c_int {
    // SAFETY: the caller's promise is the system call's.
    let result = unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, new_limit, old_limit) };
    // SAFETY: errno is this thread's own.
    let refused = result < 0 && unsafe { *libc::__errno_location() } == libc::EPERM;
    if refused
        && new_limit.is_null()
        && !old_limit.is_null()
        && let Some(limit) = read_limit(pid, resource)
    {
        // SAFETY: not null, and valid by the caller's promise.
        unsafe { old_limit.write(limit) };
        return 0;
    }
    if result < 0 { -1 } else { 0 }
}

fn read_limit(pid: pid_t, resource: c_int) -> Option<rlimit64> {
    let name = NAMES.get(usize::try_from(resource).ok()?)?;
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let values = text.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = values.split_whitespace().map(|word| match word {
        "unlimited" => Some(libc::RLIM64_INFINITY),
        number => number.parse().ok(),
    });
    Some(rlimit64 { rlim_cur: values.next()??, rlim_max: values.next()?? })
}
