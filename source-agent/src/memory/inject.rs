//! Has a task of the container make a userfaultfd for us: only a task itself can make one for its address space.
//!
//! One thread is stopped for about 0.1 ms, runs two system calls at the `syscall` instruction of its vDSO, and goes on
//! as if nothing had happened: registers, signal mask and an interrupted system call are as they were. The
//! descriptor is taken over (`pidfd_getfd`) and closed in the task before it runs again.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use longhaul_common::sys;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use thiserror::Error;

/// How long a thread may take to stop. One in an uninterruptible sleep takes longer; another thread may do.
const STOP_DEADLINE: Duration = Duration::from_millis(20);
/// How often it is looked at.
const STOP_POLL: Duration = Duration::from_micros(10);
/// `PTRACE_EVENT_STOP`.
const EVENT_STOP: i32 = 128;
/// `UFFD_USER_MODE_ONLY`: all that a task without capabilities may have, and enough: these faults are the kernel's to resolve.
const USER_MODE_ONLY: u64 = 1;
/// The code segment of 64-bit user code (`__USER_CS`).
const CODE_SEGMENT_64: u64 = 0x33;
/// Attempts at a thread that is found in a restartable sequence.
const TRIES: u32 = 5;

/// A task that could not be made to.
#[derive(Debug, Error)]
pub enum InjectError {
    /// ptrace refused.
    #[error("can't {operation} thread {thread}")]
    Ptrace {
        /// What was tried.
        operation: &'static str,
        /// Whom.
        thread: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not stop.
    #[error("thread {0} does not stop: it waits in the kernel")]
    Busy(i32),
    /// It is gone.
    #[error("thread {0} has ended")]
    Gone(i32),
    /// Its code is of another kind.
    #[error("thread {thread} {why}")]
    Foreign {
        /// Which.
        thread: i32,
        /// What is different.
        why: &'static str,
    },
    /// The system call failed in it.
    #[error("thread {thread} could not make a userfaultfd")]
    Refused {
        /// Which.
        thread: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A userfaultfd for the address space of a task, and how long its thread was stopped.
pub fn userfaultfd_of(pid: i32) -> Result<(OwnedFd, Duration), InjectError> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| InjectError::Gone(pid))?;
    let mut threads: Vec<i32> =
        threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // The first thread first: it is the likeliest to sleep.
    threads.sort_by_key(|thread| (*thread != pid, *thread));
    let mut last = InjectError::Gone(pid);
    for thread in threads {
        for _ in 0..TRIES {
            // A tracer is a thread. When this one ends, so does its hold on the task, whatever happened.
            let attempt = std::thread::spawn(move || attempt(pid, thread)).join();
            match attempt.unwrap_or(Err(InjectError::Gone(thread))) {
                Ok(made) => return Ok(made),
                Err(InjectError::Foreign { why: IN_SEQUENCE, .. }) => std::thread::sleep(Duration::from_micros(200)),
                Err(error @ (InjectError::Foreign { .. } | InjectError::Refused { .. })) => return Err(error),
                Err(error) => {
                    last = error;
                    break;
                }
            }
        }
    }
    Err(last)
}

const IN_SEQUENCE: &str = "is within a restartable sequence";

fn attempt(pid: i32, thread: i32) -> Result<(OwnedFd, Duration), InjectError> {
    let instruction = syscall_instruction(thread)?;
    let stopped = Stopped::stop(thread)?;
    let start = Instant::now();
    stopped.must_be_outside_a_sequence()?;
    let original = stopped.registers()?;
    if original.cs != CODE_SEGMENT_64 {
        return Err(InjectError::Foreign { thread, why: "runs 32-bit code, whose memory can't be tracked" });
    }
    let mask = sys::signal_mask(thread).map_err(stopped.failed("read the signal mask of"))?;
    // A signal in between would be handled with our registers. SIGKILL still comes through, and is welcome.
    sys::set_signal_mask(thread, u64::MAX).map_err(stopped.failed("set the signal mask of"))?;
    let flags = libc::O_CLOEXEC.unsigned_abs() | libc::O_NONBLOCK.unsigned_abs();
    let made = stopped.call(&original, instruction, libc::SYS_userfaultfd, u64::from(flags) | USER_MODE_ONLY);
    let taken = made.and_then(|fd| {
        let taken = take_over(pid, fd);
        stopped.call(&original, instruction, libc::SYS_close, fd).map(|_| taken)
    });
    stopped.restore(original, mask)?;
    let took = start.elapsed();
    let fd = taken?.map_err(|source| InjectError::Refused { thread, source })?;
    Ok((fd, took))
}

fn take_over(pid: i32, fd: u64) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or_else(|| io::Error::other("no process id"))?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let number = i32::try_from(fd).map_err(io::Error::other)?;
    Ok(rustix::process::pidfd_getfd(pidfd, number, rustix::process::PidfdGetfdFlags::empty())?)
}

/// The address of a `syscall` instruction in a task's vDSO.
fn syscall_instruction(pid: i32) -> Result<u64, InjectError> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let foreign = InjectError::Foreign { thread: pid, why: "has no vDSO to make a system call in" };
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|_| InjectError::Gone(pid))?;
    let Some(line) = maps.lines().find(|line| line.ends_with("[vdso]")) else { return Err(foreign) };
    let bounds = line.split(' ').next().and_then(|range| {
        let (start, end) = range.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let Some((start, end)) = bounds else { return Err(foreign) };
    let mut code = vec![0; usize::try_from(end - start).unwrap_or(0)];
    let read = std::fs::File::open(format!("/proc/{pid}/mem")).and_then(|mem| mem.read_exact_at(&mut code, start));
    read.map_err(|source| InjectError::Ptrace { operation: "read the vDSO of", thread: pid, source })?;
    match code.windows(2).position(|window| window == SYSCALL) {
        Some(offset) => Ok(start + offset as u64),
        None => Err(foreign),
    }
}

/// A thread that this one has stopped. Dropped, it goes on.
struct Stopped {
    thread: Pid,
    /// A stop signal that came meanwhile, and is delivered in the end.
    owed: Cell<Option<Signal>>,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = ptrace::detach(self.thread, self.owed.get());
    }
}

impl Stopped {
    fn stop(thread: i32) -> Result<Self, InjectError> {
        let pid = Pid::from_raw(thread);
        let failed = |operation| {
            move |errno: nix::errno::Errno| match errno {
                nix::errno::Errno::ESRCH => InjectError::Gone(thread),
                errno => InjectError::Ptrace { operation, thread, source: errno.into() },
            }
        };
        let options = ptrace::Options::PTRACE_O_TRACESYSGOOD;
        ptrace::seize(pid, options).map_err(failed("attach to"))?;
        ptrace::interrupt(pid).map_err(failed("stop"))?;
        let end = Instant::now() + STOP_DEADLINE;
        loop {
            match waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)).map_err(failed("wait for"))? {
                WaitStatus::PtraceEvent(_, _, EVENT_STOP) => break,
                // On its way to a handler: it gets its signal first.
                WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal).map_err(failed("pass a signal to"))?,
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Err(InjectError::Gone(thread)),
                _ if Instant::now() > end => return Err(InjectError::Busy(thread)),
                _ => std::thread::sleep(STOP_POLL),
            }
        }
        let stopped = Self { thread: pid, owed: Cell::new(None) };
        if has_seccomp(thread) {
            // `PTRACE_O_SUSPEND_SECCOMP`: a filter would kill the task for a system call it never makes.
            let suspend = options | ptrace::Options::from_bits_retain(1 << 21);
            ptrace::setoptions(pid, suspend).map_err(failed("suspend the seccomp filter of"))?;
        }
        Ok(stopped)
    }

    fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> InjectError + use<> {
        let thread = self.thread.as_raw();
        move |source| InjectError::Ptrace { operation, thread, source }
    }

    fn registers(&self) -> Result<libc::user_regs_struct, InjectError> {
        ptrace::getregs(self.thread).map_err(io::Error::from).map_err(self.failed("read the registers of"))
    }

    /// The kernel aborts a restartable sequence when its thread is stopped, by looking at where it will go on. We send it
    /// elsewhere first, so a thread inside one is left alone.
    fn must_be_outside_a_sequence(&self) -> Result<(), InjectError> {
        /// Offsets in `struct rseq` and `struct rseq_cs` (linux/rseq.h).
        const SEQUENCE: u64 = 8;
        const START: usize = 8;
        const LENGTH: usize = 16;
        let thread = self.thread.as_raw();
        let rseq = match sys::rseq_of(thread) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(rseq) => rseq,
        };
        let mem = std::fs::File::open(format!("/proc/{thread}/mem")).map_err(self.failed("read the memory of"))?;
        let mut pointer = [0; 8];
        mem.read_exact_at(&mut pointer, rseq + SEQUENCE).map_err(self.failed("read the memory of"))?;
        let pointer = u64::from_ne_bytes(pointer);
        if pointer == 0 {
            return Ok(());
        }
        let mut sequence = [0u8; 32];
        if mem.read_exact_at(&mut sequence, pointer).is_err() {
            return Ok(());
        }
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&sequence[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        let start = word(START);
        if (start..start.saturating_add(word(LENGTH))).contains(&self.registers()?.rip) {
            return Err(InjectError::Foreign { thread, why: IN_SEQUENCE });
        }
        Ok(())
    }

    /// Runs one system call in the thread; its result.
    fn call(
        &self,
        original: &libc::user_regs_struct,
        instruction: u64,
        number: libc::c_long,
        argument: u64,
    ) -> Result<u64, InjectError> {
        let mut registers = *original;
        registers.rip = instruction;
        registers.rax = number.unsigned_abs();
        registers.rdi = argument;
        // Not in a system call any more: the kernel must not restart the interrupted one with these registers.
        registers.orig_rax = u64::MAX;
        ptrace::setregs(self.thread, registers)
            .map_err(io::Error::from)
            .map_err(self.failed("set the registers of"))?;
        // Its entry and its exit.
        self.resume_to(|status| matches!(status, WaitStatus::PtraceSyscall(_)), true)?;
        self.resume_to(|status| matches!(status, WaitStatus::PtraceSyscall(_)), true)?;
        let result = self.registers()?.rax.cast_signed();
        if result < 0 {
            let source = io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO));
            return Err(InjectError::Refused { thread: self.thread.as_raw(), source });
        }
        Ok(result.unsigned_abs())
    }

    fn resume_to(&self, there: impl Fn(WaitStatus) -> bool, syscalls: bool) -> Result<(), InjectError> {
        let thread = self.thread.as_raw();
        loop {
            let resumed = if syscalls { ptrace::syscall(self.thread, None) } else { ptrace::cont(self.thread, None) };
            resumed.map_err(io::Error::from).map_err(self.failed("let run"))?;
            let status = waitpid(self.thread, Some(WaitPidFlag::__WALL)).map_err(io::Error::from);
            match status.map_err(self.failed("wait for"))? {
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Err(InjectError::Gone(thread)),
                status if there(status) => return Ok(()),
                // SIGSTOP, the one that can't be held back.
                WaitStatus::Stopped(_, signal) => self.owed.set(Some(signal)),
                _ => {}
            }
        }
    }

    /// Everything as it was. The last stop has to be one in the signal path: only from there does the kernel restart the
    /// system call that the first one interrupted.
    fn restore(&self, original: libc::user_regs_struct, mask: u64) -> Result<(), InjectError> {
        ptrace::interrupt(self.thread).map_err(io::Error::from).map_err(self.failed("stop"))?;
        self.resume_to(|status| matches!(status, WaitStatus::PtraceEvent(_, _, EVENT_STOP)), false)?;
        ptrace::setregs(self.thread, original)
            .map_err(io::Error::from)
            .map_err(self.failed("restore the registers of"))?;
        sys::set_signal_mask(self.thread.as_raw(), mask).map_err(self.failed("restore the signal mask of"))
    }
}

fn has_seccomp(thread: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{thread}/status"))
        .is_ok_and(|text| text.lines().any(|line| line.starts_with("Seccomp:") && !line.trim_end().ends_with('0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeping_process_goes_on_as_if_nothing_had_happened() {
        // First: the child may sleep before this goes on.
        let before = Instant::now();
        let mut child = std::process::Command::new("sleep").arg("3").spawn().expect("starts");
        let pid = child.id().cast_signed();
        // Asleep, and not on its way through exec, where it has no vDSO.
        let is_asleep = || {
            std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains("(sleep) S"))
                && std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("[vdso]"))
        };
        while !is_asleep() {
            std::thread::yield_now();
        }
        // One that is about to run, and gets no processor, counts as busy.
        let (fd, _) = (0..100).find_map(|_| userfaultfd_of(pid).ok()).expect("made");
        sys::memory::begin_write_tracking(std::os::fd::AsFd::as_fd(&fd)).expect("tracks");
        let links: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("readable")
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter(|link| link.to_string_lossy().contains("userfaultfd"))
            .collect();
        assert!(links.is_empty(), "the task still has {links:?}");
        assert!(child.wait().expect("ends").success());
        assert!(before.elapsed() >= Duration::from_secs(3), "its sleep was cut short");
    }
}
