//! Finds and ends what a killed agent left of a restore: the runtime, the hold, CRIU, and tasks that were restored.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Freezer;
use crate::criu::hold::SOCKET_ENV;

/// In the environment of a filler: the hold's socket of its migration. Not the variable of the runtime and CRIU: they are in
/// cgroups that end with them, a filler is in its agent's.
pub const FILLER_ENV: &str = "LONGHAUL_FILLER";
/// How long killed tasks may take to go.
const GONE_DEADLINE: Duration = Duration::from_secs(5);
/// How often it is looked.
const GONE_POLL: Duration = Duration::from_millis(5);

/// Ends every process that was started for the migration whose hold listens at `socket`, with the tasks of the cgroup
/// they were restored into, and removes that cgroup.
///
/// Only for a migration that has not committed: its container must not run here.
pub fn end_restore(socket: &Path, runtime_dir: &Path) {
    let own = cgroup_dirs(std::process::id().cast_signed());
    let mut dirs = BTreeSet::new();
    let mut freezers: Vec<Freezer> = Vec::new();
    let end = Instant::now() + GONE_DEADLINE;
    loop {
        // Looked for again and again: CRIU forks while it is being ended.
        let started = processes_of(SOCKET_ENV, socket);
        for &pid in &started {
            // The runtime itself is in our cgroup; the hold and CRIU are in the container's.
            let theirs: Vec<PathBuf> = cgroup_dirs(pid).into_iter().filter(|dir| !own.contains(dir)).collect();
            if !theirs.is_empty()
                && let Ok(freezer) = Freezer::of(pid)
                && theirs.contains(&freezer.dir().to_owned())
                && freezers.iter().all(|known| known.dir() != freezer.dir())
            {
                freezers.push(freezer);
            }
            dirs.extend(theirs);
        }
        let mut doomed: BTreeSet<i32> = started.into_iter().chain(processes_of(FILLER_ENV, socket)).collect();
        for freezer in &freezers {
            doomed.extend(freezer.tasks().unwrap_or_default());
            let _ = freezer.thaw();
        }
        doomed.retain(|pid| is_alive(*pid));
        if doomed.is_empty() {
            break;
        }
        if Instant::now() > end {
            tracing::warn!("processes of a killed agent's migration do not end");
            break;
        }
        for &pid in &doomed {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(GONE_POLL);
    }
    // Where runc binds the root filesystem for CRIU.
    let _ = umount2(&runtime_dir.join("criu-root"), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    let _ = fs::remove_dir(runtime_dir.join("criu-root"));
    // What is left in there are files of the runtime: with the mount gone, nothing of the container is below.
    if !runtime_dir.join("criu-root").exists() && runtime_dir.exists() {
        let _ = fs::remove_dir_all(runtime_dir);
    }
    for dir in dirs.iter().rev() {
        if let Err(error) = fs::remove_dir(dir) {
            tracing::debug!(dir = %dir.display(), %error, "can't remove a cgroup");
        }
    }
    remove_roots();
}

/// Where CRIU builds the mount namespaces it restores (`mnt_roots` in criu/mount.c): it takes it away itself, unless it is killed.
const ROOTS: &str = "/tmp/.criu.mntns.";

/// Takes away what CRIUs that were killed have left mounted. As long as any CRIU is alive it may be that one's, and stays until
/// the next time.
pub fn remove_roots() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted: Vec<&str> =
        mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(|path| path.starts_with(ROOTS)).collect();
    // Looked for after the mounts: whoever made one of these was alive before.
    if mounted.is_empty() || is_any("criu") {
        return;
    }
    for path in mounted.into_iter().rev() {
        if let Err(error) = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            tracing::debug!(path, %error, "can't unmount what CRIU has left");
        }
        let _ = fs::remove_dir(path);
    }
}

/// Whether there is any process of that name (proc_pid_comm(5)) that has not ended.
fn is_any(name: &str) -> bool {
    let has_name =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    processes().filter(has_name).any(is_alive)
}

/// All processes.
fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|process| process.file_name().to_str()?.parse().ok())
}

/// The cgroups of a restore's hold that are not this process's: the container's.
pub fn cgroups_of_hold(socket: &Path) -> Vec<PathBuf> {
    let own = cgroup_dirs(std::process::id().cast_signed());
    let started = processes_of(SOCKET_ENV, socket);
    let dirs: BTreeSet<PathBuf> = started.into_iter().flat_map(cgroup_dirs).filter(|dir| !own.contains(dir)).collect();
    dirs.into_iter().collect()
}

/// Removes the cgroups of a restore that has failed, once its last process is gone: a runtime gives up on one in which
/// CRIU is still ending.
pub fn remove_cgroups(socket: &Path, dirs: &[PathBuf]) {
    wait_gone(|| is_running(socket), GONE_DEADLINE);
    for dir in dirs.iter().rev() {
        // Gone already, as a rule.
        let _ = fs::remove_dir(dir);
    }
}

/// Whether a process that was started for the migration whose hold listens at `socket` is still there.
pub fn is_running(socket: &Path) -> bool {
    processes_of(SOCKET_ENV, socket).into_iter().any(is_alive)
}

/// Whether memory of a container that was restored with that hold is still being filled in.
pub fn is_filling(socket: &Path) -> bool {
    processes_of(FILLER_ENV, socket).into_iter().any(is_alive)
}

/// Waits until something is no longer so. Those waited for are no children of ours: nobody tells when they are gone.
fn wait_gone(still: impl Fn() -> bool, deadline: Duration) {
    let end = Instant::now() + deadline;
    while still() {
        if Instant::now() > end {
            tracing::warn!("processes of a killed agent's migration do not end");
            return;
        }
        std::thread::sleep(GONE_POLL);
    }
}

fn is_alive(pid: i32) -> bool {
    // A zombie has ended; its parent reaps it when it likes.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

/// Processes that have the hold's socket in the environment they were started with.
fn processes_of(variable: &str, socket: &Path) -> Vec<i32> {
    let mut entry = format!("{variable}=").into_bytes();
    entry.extend(socket.as_os_str().as_bytes());
    let has_entry = |pid: &i32| {
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|variable| variable == entry))
    };
    processes().filter(has_entry).collect()
}

/// The directories of all cgroups a task is in.
fn cgroup_dirs(pid: i32) -> Vec<PathBuf> {
    let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut dirs = Vec::new();
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let mount = mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let fstype = right.next()?;
            let options = right.nth(1)?;
            let matches = match id {
                "0" => fstype == "cgroup2",
                _ => {
                    fstype == "cgroup" && controllers.split(',').all(|one| options.split(',').any(|other| other == one))
                }
            };
            matches.then(|| left.split(' ').nth(4)).flatten()
        });
        if let Some(mount) = mount {
            dirs.push(Path::new(mount).join(path.trim_start_matches('/')));
        }
    }
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_environment_and_ended() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("hold.sock");
        let mut child = std::process::Command::new("sleep").arg("60").env(SOCKET_ENV, &socket).spawn().expect("sleeps");
        let pid = child.id().cast_signed();
        while processes_of(SOCKET_ENV, &socket).is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(processes_of(SOCKET_ENV, &socket), [pid]);
        end_restore(&socket, &dir.path().join("none"));
        assert!(!is_alive(pid));
        child.wait().expect("reaped");
    }
}
