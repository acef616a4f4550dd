//! Tasks of containers, as `/proc` shows them.

use std::collections::VecDeque;

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

#[cfg(test)]
mod tests {
    use super::*;

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
