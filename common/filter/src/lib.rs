//! Preloaded into CRIU's process by the hold. It stands in for fourteen functions of the C library and passes everything else on.
//!
//! **Pages that CRIU need not save** ([`pages`]): CRIU finds a task's pages with `ioctl(PAGEMAP_SCAN)` (`pmc_fill` in
//! criu/pagemap-cache.c, 4.2), or where there is no such thing with pread(2). The agent has sent most of them before; the answer leaves those out, by a table that the
//! agent wrote once the container was frozen.
//!
//! **Flags of areas** ([`smaps`]): CRIU opens `/proc/<pid>/smaps` with `openat` (`open_proc` in criu/util.c, 4.2), whose content takes the kernel 15 ms
//! for each GiB. The agent has what CRIU wants to know of it, and also most of what CRIU looks for in the areas' files, with `fstatat` and
//! `openat`.
//!
//! **Memory that tasks share** ([`shared`]) has been sent before as well, and is handed to CRIU as it is when it restores.
//!
//! **Tasks that are restored** must not run before this host owns them. At the end of a restore CRIU traces all of their threads;
//! if it were killed then, they would be set free. With `LONGHAUL_RESTORE` in its environment every thread that CRIU traces has
//! `PTRACE_O_EXITKILL`: they end with it. It traces them with ptrace(2) (`attach_to_tasks` in criu/cr-restore.c, 4.2). Not for
//! a checkpoint, where the tasks must outlive CRIU. And when the hold ends while CRIU waits for its word, CRIU would take that for
//! a failed script, and set the tasks free all the same (`ACT_PRE_RESUME` in criu/cr-restore.c): it is ended instead. It waits with recv(2)
//! (`recv_criu_msg` in criu/cr-service.c).
//!
//! **Memory that is filled in later** must have no huge pages before. Pages that tasks have in common are there before them ([`common`]).
//!
//! **Memory filesystems** are packed and unpacked by CRIU's child, which need not start tar ([`archive`]).
//!
//! **Resource limits**: CRIU reads every task's with prlimit(2), which the kernel allows for a
//! task of another user only with `CAP_SYS_RESOURCE` (`check_prlimit_permission` in kernel/sys.c). An agent that was not
//! given that capability, as in many sandboxes, could move no container with a task that is not root's.
//! The same limits stand in `/proc/<pid>/limits` (proc_pid_limits(5)), readable with ptrace rights, which CRIU
//! needs anyway: where prlimit(2) is refused, they are read there. CRIU makes that call through the C library's
//! `syscall` function (`dump_task_rlimits` in criu/cr-dump.c, 4.2).

mod archive;
mod common;
mod pages;
mod shared;
mod smaps;

use std::ffi::{CStr, OsStr, OsString, c_char, c_int, c_uint, c_ulong, c_void};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

use libc::{c_long, mode_t, off64_t, pid_t, rlimit64, stat64};

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

/// The C library's own function of a name.
///
/// # Safety
/// `F` is that function's type.
unsafe fn find<F: Copy>(name: &CStr) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: the name is a C string; RTLD_NEXT asks for the definition after this library's.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    // SAFETY: the symbol is a function of this type, as the caller promises.
    (!found.is_null()).then(|| unsafe { std::mem::transmute_copy::<*mut c_void, F>(&found) })
}

/// A function that finds another, once.
macro_rules! real {
    ($name:ident, $type:ty, $symbol:expr) => {
        fn $name() -> Option<$type> {
            static REAL: OnceLock<Option<$type>> = OnceLock::new();
            // SAFETY: the type stands beside it, with the reason why it is the function's.
            *REAL.get_or_init(|| unsafe { find($symbol) })
        }
    };
}

/// What a function returns that the C library turns out not to have.
fn not_there() -> c_int {
    failed(libc::ENOSYS)
}

/// What CRIU is told where the agent has no use for its images any more.
fn given_up() -> c_int {
    failed(libc::ECANCELED)
}

fn failed(errno: c_int) -> c_int {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}

real!(real, Syscall, c"syscall");

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
    let Some(real) = real() else { return not_there().into() };
    // SAFETY: the caller's promise is passed on.
    let result = unsafe { real(number, a, b, c, d, e, f) };
    if number == libc::SYS_memfd_create && result >= 0 && restores() {
        shared::made(result as c_int);
    }
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

/// `ioctl(2)` as CRIU uses it: with one argument, of the size of a pointer, which goes where a variadic function has it.
type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

real!(real_ioctl, Ioctl, c"ioctl");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for the request that is made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let Some(real) = real_ioctl() else { return not_there() };
    // SAFETY: the caller's promise is passed on.
    let pass_on = |argument| unsafe { real(fd, request, argument) };
    if request != pages::PAGEMAP_SCAN || argument.is_null() {
        return pass_on(argument);
    }
    if !restores() && pages::is_given_up() {
        return given_up();
    }
    // SAFETY: the argument of a PAGEMAP_SCAN is of this type, aligned and writable.
    let scan = unsafe { &mut *argument.cast::<pages::ScanArg>() };
    match pages::visible_parts(fd, scan) {
        None => pass_on(argument),
        Some(parts) => pages::scan_parts(scan, &parts, |part| pass_on(std::ptr::from_mut(part).cast())),
    }
}

/// `pread(2)`. On 64 bits `pread64` is `pread` as well.
type Pread = unsafe extern "C" fn(c_int, *mut c_void, usize, off64_t) -> isize;

real!(real_pread, Pread, c"pread64");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for pread(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread64(fd: c_int, buffer: *mut c_void, length: usize, offset: off64_t) -> isize {
    let Some(real) = real_pread() else { return not_there() as isize };
    // SAFETY: the caller's promise is passed on.
    let read = unsafe { real(fd, buffer, length, offset) };
    if read > 0 && offset >= 0 && !restores() {
        if pages::is_given_up() {
            return given_up() as isize;
        }
        // SAFETY: the C library has just filled so many bytes of it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), read.unsigned_abs()) };
        pages::hide_entries(fd, bytes, offset.unsigned_abs());
    }
    read
}

/// As [`pread64`].
///
/// # Safety
/// As for pread(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread(fd: c_int, buffer: *mut c_void, length: usize, offset: off64_t) -> isize {
    // SAFETY: the caller's promise is passed on.
    unsafe { pread64(fd, buffer, length, offset) }
}

/// `openat(2)`, always with a mode: where none was given, nobody looks at it. On 64 bits `openat64` is `openat` as well.
type Openat = unsafe extern "C" fn(c_int, *const c_char, c_int, mode_t) -> c_int;

real!(real_openat, Openat, c"openat64");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for openat(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let Some(real) = real_openat() else { return not_there() };
    // SAFETY: a C string, by the caller's promise.
    if flags == libc::O_RDONLY && smaps::known(unsafe { CStr::from_ptr(path) }) == Some(smaps::Known::PrivateFile) {
        // SAFETY: the caller's promise is passed on.
        let handle = unsafe { real(dir, path, libc::O_PATH, 0) };
        if smaps::is_file_on_overlay(handle) {
            return handle;
        }
        // SAFETY: nobody else knows it.
        unsafe { libc::close(handle) };
    }
    // SAFETY: the caller's promise is passed on.
    let fd = unsafe { real(dir, path, flags, mode) };
    if fd < 0 {
        return fd;
    }
    // SAFETY: the kernel has just read this path.
    let path = unsafe { CStr::from_ptr(path) };
    if restores() {
        shared::opened(dir, path);
        common::opened(dir, path);
        if path.to_bytes().starts_with(PAGES_OF) && fills_later() {
            keep_pages_small();
        }
        return fd;
    }
    pages::opened(fd, path);
    if !smaps::is_one(path) {
        return fd;
    }
    if pages::is_given_up() {
        // SAFETY: nobody else knows it.
        unsafe { libc::close(fd) };
        return given_up();
    }
    pages::waited();
    smaps::forget();
    let Some(other) = smaps::instead_of(fd) else { return fd };
    // SAFETY: both are open, and nobody else knows them yet.
    unsafe {
        libc::dup3(other, fd, libc::O_CLOEXEC);
        libc::close(other);
    }
    fd
}

/// As [`openat64`].
///
/// # Safety
/// As for openat(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promise is passed on.
    unsafe { openat64(dir, path, flags, mode) }
}

/// What a compiler that was given `_FORTIFY_SOURCE` makes of an `openat` without a mode.
///
/// # Safety
/// As for openat(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's promise is passed on.
    unsafe { openat64(dir, path, flags, 0) }
}

/// As [`__openat64_2`].
///
/// # Safety
/// As for openat(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's promise is passed on.
    unsafe { openat64(dir, path, flags, 0) }
}

/// `fstatat(3)`. On 64 bits `fstatat64` is `fstatat` as well.
type Fstatat = unsafe extern "C" fn(c_int, *const c_char, *mut stat64, c_int) -> c_int;

real!(real_fstatat, Fstatat, c"fstatat64");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for fstatat(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstatat64(dir: c_int, path: *const c_char, found: *mut stat64, flags: c_int) -> c_int {
    let Some(real) = real_fstatat() else { return not_there() };
    if flags == libc::AT_SYMLINK_NOFOLLOW && !found.is_null() && !path.is_null() {
        // SAFETY: a C string, by the caller's promise.
        match smaps::known(unsafe { CStr::from_ptr(path) }) {
            Some(smaps::Known::Anonymous) => return failed(libc::ENOENT),
            Some(smaps::Known::PrivateFile) => {
                // SAFETY: a place for it, by the caller's promise.
                unsafe { found.write(smaps::entry_for_reading()) };
                return 0;
            }
            None => {}
        }
    }
    // SAFETY: the caller's promise is passed on.
    unsafe { real(dir, path, found, flags) }
}

/// As [`fstatat64`].
///
/// # Safety
/// As for fstatat(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstatat(dir: c_int, path: *const c_char, found: *mut stat64, flags: c_int) -> c_int {
    // SAFETY: the caller's promise is passed on.
    unsafe { fstatat64(dir, path, found, flags) }
}

/// `lseek(2)`.
type Lseek = unsafe extern "C" fn(c_int, off64_t, c_int) -> off64_t;

real!(real_lseek, Lseek, c"lseek64");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for lseek(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek64(fd: c_int, offset: off64_t, whence: c_int) -> off64_t {
    let Some(real) = real_lseek() else { return not_there().into() };
    if whence == libc::SEEK_DATA && !restores() && shared::hides(fd) {
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENXIO };
        return -1;
    }
    // SAFETY: the caller's promise is passed on.
    unsafe { real(fd, offset, whence) }
}

/// As [`lseek64`].
///
/// # Safety
/// As for lseek(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek(fd: c_int, offset: off64_t, whence: c_int) -> off64_t {
    // SAFETY: the caller's promise is passed on.
    unsafe { lseek64(fd, offset, whence) }
}

/// `memfd_create(2)`. A CRIU that was built with an old C library calls `syscall` for it.
type MemfdCreate = unsafe extern "C" fn(*const c_char, c_uint) -> c_int;

real!(real_memfd_create, MemfdCreate, c"memfd_create");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for memfd_create(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memfd_create(name: *const c_char, flags: c_uint) -> c_int {
    let Some(real) = real_memfd_create() else { return not_there() };
    // SAFETY: the caller's promise is passed on.
    let fd = unsafe { real(name, flags) };
    if fd >= 0 && restores() {
        shared::made(fd);
    }
    fd
}

/// `shmget(2)`.
type Shmget = unsafe extern "C" fn(libc::key_t, usize, c_int) -> c_int;

real!(real_shmget, Shmget, c"shmget");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for shmget(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmget(key: libc::key_t, size: usize, flags: c_int) -> c_int {
    let Some(real) = real_shmget() else { return not_there() };
    // SAFETY: the caller's promise is passed on.
    shared::adopted().unwrap_or_else(|| unsafe { real(key, size, flags) })
}

/// `mmap(2)`. On 64 bits `mmap64` is `mmap` as well.
type Mmap = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, off64_t) -> *mut c_void;

real!(real_mmap, Mmap, c"mmap64");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    place: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off64_t,
) -> *mut c_void {
    const AREA: c_int = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let Some(real) = real_mmap() else {
        not_there();
        return libc::MAP_FAILED;
    };
    // SAFETY: the caller's promise is passed on.
    let map = || unsafe { real(place, length, protection, flags, fd, offset) };
    let mapped = map();
    if mapped == place && flags & AREA == AREA && restores() && !common::mapped(place as usize, length, protection) {
        return map();
    }
    mapped
}

/// As [`mmap64`].
///
/// # Safety
/// As for mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    place: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off64_t,
) -> *mut c_void {
    // SAFETY: the caller's promise is passed on.
    unsafe { mmap64(place, length, protection, flags, fd, offset) }
}

/// `mremap(2)`, always with a new place: where none was given, nobody looks at it.
type Mremap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, *mut c_void) -> *mut c_void;

real!(real_mremap, Mremap, c"mremap");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for mremap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    from: *mut c_void,
    length: usize,
    new_length: usize,
    flags: c_int,
    place: *mut c_void,
) -> *mut c_void {
    let Some(real) = real_mremap() else {
        not_there();
        return libc::MAP_FAILED;
    };
    // SAFETY: the caller's promise is passed on.
    let moved = unsafe { real(from, length, new_length, flags, place) };
    if moved == place && flags & libc::MREMAP_FIXED != 0 && restores() {
        common::inherited(place as usize, new_length);
    }
    moved
}

/// Moves pages to a place without looking at it as CRIU's doing.
///
/// # Safety
/// As for mremap(2).
unsafe fn move_pages(from: *mut c_void, length: usize, place: *mut c_void) -> *mut c_void {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the caller's promise is passed on.
    real_mremap().map_or(libc::MAP_FAILED, |real| unsafe { real(from, length, length, flags, place) })
}

/// In the environment of a CRIU that restores.
const RESTORE: &str = "LONGHAUL_RESTORE";
/// Its value where memory is filled in later.
const LATER: &str = "later";

/// What this CRIU restores, if it does.
fn restore() -> Option<&'static OsStr> {
    static VALUE: OnceLock<Option<OsString>> = OnceLock::new();
    VALUE.get_or_init(|| std::env::var_os(RESTORE)).as_deref()
}

fn restores() -> bool {
    restore().is_some()
}

fn fills_later() -> bool {
    restore().is_some_and(|value| value == LATER)
}

/// Ends CRIU's process, which would go on and do harm.
fn end_at_once() {
    // SAFETY: takes no pointer. The first task of a PID namespace gets no SIGKILL from within: it ends by itself.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGKILL);
        libc::_exit(1);
    }
}

/// What the images are called that say which pages a task has. The task itself opens its own, before it maps any of its memory.
const PAGES_OF: &[u8] = b"pagemap-";

/// The pages that come with the images are written before an area is registered for those that come later. Where the host makes huge pages
/// of everything (Debian's default), the first of them would bring two megabytes of zeroes, and what belongs there would find its
/// place taken. CRIU gives a task back what it had of this before it runs (`thp_disabled` in criu/pie/restorer.c, 4.2).
fn keep_pages_small() {
    // SAFETY: takes no pointer.
    if unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } < 0 {
        end_at_once();
    }
}

/// `recv(2)`.
type Recv = unsafe extern "C" fn(c_int, *mut c_void, usize, c_int) -> isize;

real!(real_recv, Recv, c"recv");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for recv(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recv(fd: c_int, buffer: *mut c_void, length: usize, flags: c_int) -> isize {
    /// How CRIU asks for the length of the next message of who started it, and of nobody else.
    const NEXT: c_int = libc::MSG_TRUNC | libc::MSG_PEEK;
    let Some(real) = real_recv() else { return not_there() as isize };
    if restores() {
        common::take_in();
    }
    // SAFETY: the caller's promise is passed on.
    let received = unsafe { real(fd, buffer, length, flags) };
    if received <= 0 && flags == NEXT && restores() {
        end_at_once();
    }
    received
}

/// `ptrace(2)`: variadic, with three arguments after the request.
type Ptrace = unsafe extern "C" fn(c_long, c_long, *mut c_void, *mut c_void) -> c_long;

real!(real_ptrace, Ptrace, c"ptrace");

/// Stands in for the C library's function in CRIU's process.
///
/// # Safety
/// As for ptrace(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptrace(request: c_long, pid: c_long, address: *mut c_void, data: *mut c_void) -> c_long {
    let Some(real) = real_ptrace() else { return not_there().into() };
    // An `enum` in C: the upper half of its register is anything.
    let request = request & 0xffff_ffff;
    let sets_options = request == i64::from(libc::PTRACE_SEIZE) || request == i64::from(libc::PTRACE_SETOPTIONS);
    let data = if sets_options && restores() {
        (data as usize | libc::PTRACE_O_EXITKILL as usize) as *mut c_void
    } else {
        data
    };
    // SAFETY: the caller's promise is passed on; the options are a number.
    unsafe { real(request, pid, address, data) }
}

/// `execvp(3)`.
type Execvp = unsafe extern "C" fn(*const c_char, *const *const c_char) -> c_int;

real!(real_execvp, Execvp, c"execvp");

/// Stands in for the C library's function in a child of CRIU's.
///
/// # Safety
/// As for execvp(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvp(file: *const c_char, words: *const *const c_char) -> c_int {
    // SAFETY: C strings, by the caller's promise.
    let string = |word: *const c_char| unsafe { CStr::from_ptr(word) };
    if string(file) == c"tar" {
        // SAFETY: the last is null, by the caller's promise.
        let words = (0..).map(|index| unsafe { *words.add(index) }).take_while(|word| !word.is_null());
        let words: Vec<_> = words.map(|word| OsStr::from_bytes(string(word).to_bytes()).to_owned()).collect();
        if let Some(code) = archive::stand_in(&words) {
            // SAFETY: ends the child, as the program would have.
            unsafe { libc::_exit(code) };
        }
    }
    let Some(real) = real_execvp() else { return not_there() };
    // SAFETY: the caller's promise is passed on.
    unsafe { real(file, words) }
}
