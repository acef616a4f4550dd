//! Freezes a container at a moment that CRIU can save.

use std::time::{Duration, Instant};

use longhaul_common::cgroup::Freezer;
use longhaul_common::net::{ListenQueues, Netns, Port};

use super::MigrationError;
use crate::inspect::InspectError;

/// Attempts at a freeze that catches nothing half-done.
const TRIES: u32 = 40;
/// How long a program may take to accept what waits, before the freeze is tried all the same.
const ACCEPT_WAIT: Duration = Duration::from_millis(10);
/// Time for acknowledgements of what was sent just before the freeze: what has none waits for a retransmission, which a
/// restored socket makes after a second.
const LAST_ACKS: Duration = Duration::from_millis(2);
/// How long the container goes on between two attempts.
const BETWEEN_TRIES: Duration = Duration::from_micros(500);

/// Freezes the container and cuts it off when no connection waits to be accepted (a frozen program accepts none) and no
/// task is between vfork and exec (its parent waits in a way that ptrace can't interrupt). CRIU can save neither.
pub(super) fn quiesce(freezer: &Freezer, ports: &[Port], init: i32) -> Result<(), MigrationError> {
    let queues = Netns::of_task(init).and_then(|netns| ListenQueues::open(&netns)).map_err(InspectError::from)?;
    // What can't be asked is left to CRIU, which refuses by name.
    let waiting = || queues.any_waiting().unwrap_or(false);
    for attempt in 1.. {
        let start = Instant::now();
        while waiting() && start.elapsed() < ACCEPT_WAIT {
            std::thread::sleep(Duration::from_micros(200));
        }
        freezer.freeze()?;
        let forking = any_in_vfork(freezer)?;
        if !forking {
            std::thread::sleep(LAST_ACKS);
            for port in ports {
                port.part().map_err(InspectError::from)?;
            }
        }
        if attempt == TRIES || !(forking || waiting()) {
            break;
        }
        tracing::debug!(attempt, forking, "something is half-done: the container goes on for a moment");
        for port in ports {
            port.join().map_err(InspectError::from)?;
        }
        freezer.thaw()?;
        std::thread::sleep(BETWEEN_TRIES);
    }
    Ok(())
}

/// Whether a thread of the frozen container waits for a child to exec.
fn any_in_vfork(freezer: &Freezer) -> Result<bool, MigrationError> {
    Ok(freezer.tasks()?.iter().any(|pid| {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
        threads.flatten().any(|thread| {
            std::fs::read_to_string(thread.path().join("syscall")).is_ok_and(|syscall| is_vfork(&syscall))
        })
    }))
}

/// Whether a line of `/proc/<pid>/syscall` (proc_pid_syscall(5)) is a vfork, or a clone that waits like one.
fn is_vfork(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let Some(number) = words.next().and_then(|word| word.parse::<i64>().ok()) else { return false };
    let first_argument =
        words.next().and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()).unwrap_or(0);
    #[cfg(target_arch = "x86_64")]
    if number == nix::libc::SYS_vfork {
        return true;
    }
    // clone3 has its flags in memory; no task stays in it for long but one that waits for its child.
    number == nix::libc::SYS_clone3
        || (number == nix::libc::SYS_clone && first_argument & u64::from(nix::libc::CLONE_VFORK.unsigned_abs()) != 0)
}

#[cfg(test)]
mod tests {
    use super::is_vfork;

    #[test]
    fn a_waiting_clone_is_told_from_others() {
        let line = |number: i64, flags: i32| format!("{number} {flags:#x} 0x0 0x0 0x0 0x0 0x0 0x7ffc 0x7f00");
        assert!(is_vfork(&line(nix::libc::SYS_clone, nix::libc::CLONE_VFORK | nix::libc::CLONE_VM)));
        assert!(!is_vfork(&line(nix::libc::SYS_clone, nix::libc::CLONE_VM)));
        assert!(!is_vfork(&line(nix::libc::SYS_read, nix::libc::CLONE_VFORK)));
        assert!(!is_vfork("running") && !is_vfork("-1 0x0 0x0"));
    }
}
