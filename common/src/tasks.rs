//! Tasks of containers, as `/proc` shows them.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The id a task has inside its container: CRIU's images and its lazy pages go by that. `init` is the container's first
/// task, whose level of PID namespaces counts.
pub fn inner_pid(pid: i32, init: i32) -> Option<u32> {
    let ids = |pid: i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?.to_owned();
        Some(line.split_ascii_whitespace().filter_map(|id| id.parse::<u32>().ok()).collect::<Vec<_>>())
    };
    let level = ids(init)?.len().checked_sub(1)?;
    ids(pid)?.get(level).copied()
}

/// A task and all its descendants that are there now, by `/proc/<pid>/task/<tid>/children` (proc_pid_task_tid(5)).
pub fn with_descendants(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut next = VecDeque::from([pid]);
    while let Some(pid) = next.pop_front() {
        found.push(pid);
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            next.extend(children.split_ascii_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
    }
    found
}

/// A task, told from a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskId {
    /// Its number.
    pub pid: i32,
    /// When it started, in the kernel's clock ticks since boot.
    pub started: u64,
}

impl TaskId {
    /// The one that has this number now.
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid, 22).map(|started| Self { pid, started })
    }
}

/// A field of `/proc/<pid>/stat` that is a number, as proc_pid_stat(5) counts them.
fn stat(pid: i32, field: usize) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: field 3 is the first.
    text.rsplit_once(')')?.1.split_ascii_whitespace().nth(field - 3)?.parse().ok()
}

/// Processor time that a task has used with all its threads, as finely as the kernel's clock ticks (100 a second;
/// proc_pid_stat(5)). Nothing if it has ended.
pub fn processor_time(pid: i32) -> Duration {
    const TICK: Duration = Duration::from_millis(10);
    let ticks = |field| stat(pid, field).and_then(|ticks| u32::try_from(ticks).ok()).unwrap_or(0);
    TICK * (ticks(14) + ticks(15))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_time() {
        let pid = std::process::id().cast_signed();
        let start = std::time::Instant::now();
        while processor_time(pid) < Duration::from_millis(20) {
            assert!(start.elapsed() < Duration::from_secs(20), "a busy process uses no time");
        }
    }

    #[test]
    fn a_task_is_told_from_another() {
        let pid = std::process::id().cast_signed();
        assert_eq!(TaskId::of(pid), TaskId::of(pid));
        assert_ne!(TaskId::of(pid), TaskId::of(1));
        assert_eq!(TaskId::of(-1), None);
    }

    #[test]
    fn our_own_tasks_are_found() {
        let pid = std::process::id().cast_signed();
        let mut child = std::process::Command::new("sleep").arg("10").spawn().expect("starts");
        let child_pid = child.id().cast_signed();
        let found = with_descendants(pid);
        child.kill().expect("ends");
        child.wait().expect("is reaped");
        assert!(found.starts_with(&[pid]) && found.contains(&child_pid), "{found:?}");
        assert_eq!(inner_pid(pid, pid).map(|id| id > 0), Some(true));
    }
}
