//! Preloaded into CRIU's process by the hold. It stands in for two functions of the C library and passes everything else on.
//!
//! **Pages that CRIU need not save** ([`pages`]): CRIU finds a task's pages with `ioctl(PAGEMAP_SCAN)` (`pmc_fill` in
//! criu/pagemap-cache.c, 4.2). The agent has sent most of them before; the answer leaves those out, by a table that the
//! agent wrote once the container was frozen.
//!
//! **Resource limits**: CRIU reads every task's with prlimit(2), which the kernel allows for a
//! task of another user only with `CAP_SYS_RESOURCE` (`check_prlimit_permission` in kernel/sys.c). An agent that was not
//! given that capability, as in many sandboxes, could move no container with a task that is not root's.
//! The same limits stand in `/proc/<pid>/limits` (proc_pid_limits(5)), readable with ptrace rights, which CRIU
//! needs anyway: where prlimit(2) is refused, they are read there. CRIU makes that call through the C library's
//! `syscall` function (`dump_task_rlimits` in criu/cr-dump.c, 4.2).

mod pages;

use std::ffi::{CStr, c_int, c_ulong, c_void};
use std::fs;
use std::sync::OnceLock;

use libc::{c_long, pid_t, rlimit64};

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

/// `syscall(3)` with as many arguments as a system call can have. The C function is variadic: arguments that were not
/// given hold whatever their registers held, which the kernel does not look at.
type Syscall = unsafe extern "C" fn(c_long, c_long, c_long, c_long, c_long, c_long, c_long) -> c_long;

/// The C library's own.
fn real() -> Option<Syscall> {
    static REAL: OnceLock<Option<Syscall>> = OnceLock::new();
    const NAME: &CStr = c"syscall";
    *REAL.get_or_init(|| {
        // SAFETY: the name is a C string; RTLD_NEXT asks for the definition after this library's.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, NAME.as_ptr()) };
        if found.is_null() {
            return None;
        }
        // SAFETY: the symbol is the C library's syscall(3), which takes these arguments in these registers.
        Some(unsafe { std::mem::transmute::<*mut c_void, Syscall>(found) })
    })
}

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for the system call that is asked for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    let Some(real) = real() else {
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOSYS };
        return -1;
    };
    // SAFETY: the caller's promise is passed on.
    let result = unsafe { real(number, a, b, c, d, e, f) };
    if number != libc::SYS_prlimit64 || result >= 0 {
        return result;
    }
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    let (pid, resource, new_limit, old_limit) = (a, b, c, d as *mut rlimit64);
    if errno == libc::EPERM && new_limit == 0 && !old_limit.is_null() {
        if let Some(limit) = read_limit(pid as pid_t, resource) {
            // SAFETY: not null, and a place for a limit by the caller's promise.
            unsafe { old_limit.write(limit) };
            return 0;
        }
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = errno };
    }
    result
}

fn read_limit(pid: pid_t, resource: c_long) -> Option<rlimit64> {
    let name = NAMES.get(usize::try_from(resource).ok()?)?;
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let values = text.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = values.split_whitespace().map(|word| match word {
        "unlimited" => Some(libc::RLIM64_INFINITY),
        number => number.parse().ok(),
    });
    Some(rlimit64 { rlim_cur: values.next()??, rlim_max: values.next()?? })
}

/// `ioctl(2)` as CRIU uses it: with one argument, of the size of a pointer.
type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

fn real_ioctl() -> Option<Ioctl> {
    static REAL: OnceLock<Option<Ioctl>> = OnceLock::new();
    const NAME: &CStr = c"ioctl";
    *REAL.get_or_init(|| {
        // SAFETY: the name is a C string; RTLD_NEXT asks for the definition after this library's.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, NAME.as_ptr()) };
        if found.is_null() {
            return None;
        }
        // SAFETY: the symbol is the C library's ioctl(2), a variadic function whose third argument goes where this type puts it.
        Some(unsafe { std::mem::transmute::<*mut c_void, Ioctl>(found) })
    })
}

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for the request that is made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let Some(real) = real_ioctl() else {
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOSYS };
        return -1;
    };
    // SAFETY: the caller's promise is passed on.
    let pass_on = |argument| unsafe { real(fd, request, argument) };
    if request != pages::PAGEMAP_SCAN || argument.is_null() {
        return pass_on(argument);
    }
    // SAFETY: the argument of a PAGEMAP_SCAN is of this type, aligned and writable.
    let scan = unsafe { &mut *argument.cast::<pages::ScanArg>() };
    match pages::visible_parts(fd, scan) {
        None => pass_on(argument),
        Some(parts) => pages::scan_parts(scan, &parts, |part| pass_on(std::ptr::from_mut(part).cast())),
    }
}
