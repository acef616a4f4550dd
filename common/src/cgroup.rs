//! The cgroups of a container: its tasks, and freezing them.
//!
//! The freezer is written directly and not through the runtime: that saves a process start (5 ms) inside the
//! downtime, and CRIU, which would wait for the freezer in steps of 100 ms, finds it frozen at once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How long a cgroup may take to freeze. A task in an uninterruptible sleep stops when that ends: on a busy disk after a
/// second or two, on a dead NFS server never. The other tasks stand still meanwhile.
const FREEZE_DEADLINE: Duration = Duration::from_secs(1);
/// How often its state is looked at. The v1 freezer tells nobody when it is done.
const FREEZE_POLL: Duration = Duration::from_micros(200);

/// A cgroup operation that failed.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// A file could not be read or written.
    #[error("can't {operation} {path}")]
    File {
        /// `read` or `write`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The task belongs to no cgroup that can be frozen.
    #[error("task {0} is in no cgroup with a freezer: run the container with cgroups enabled")]
    NoFreezer(i32),
    /// The task belongs to no cgroup whose processor time can be limited.
    #[error("task {0} is in no cgroup with a CPU quota (cpu.max, or cpu.cfs_quota_us)")]
    NoCpuQuota(i32),
    /// It would not freeze.
    #[error(
        "the cgroup {path} did not freeze within {} s: a task of it waits in the kernel and can't be stopped (ps shows state D; \
         a slow disk, or a file server that does not answer)",
        FREEZE_DEADLINE.as_secs()
    )]
    Stuck {
        /// The cgroup.
        path: PathBuf,
    },
}

/// A container that is stopped for a moment: it goes on when this ends, also by a panic.
#[derive(Debug)]
pub struct Paused(Option<Freezer>);

impl Paused {
    /// Ends it.
    ///
    /// # Errors
    /// What [`Freezer::thaw`] gives: the container may stand still.
    pub fn end(mut self) -> Result<(), CgroupError> {
        self.0.take().map_or(Ok(()), |freezer| freezer.thaw())
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(|freezer| freezer.thaw()) {
            tracing::error!(%error, "a container that was stopped for a moment can't go on");
        }
    }
}

/// A container's cgroup in the hierarchy that has the freezer.
#[derive(Debug, Clone)]
pub struct Freezer {
    dir: PathBuf,
    unified: bool,
}

impl Freezer {
    /// The freezer of the cgroup that a task is in.
    pub fn of(pid: i32) -> Result<Self, CgroupError> {
        let membership = read(Path::new(&format!("/proc/{pid}/cgroup")))?;
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        locate(&membership, &mounts).ok_or(CgroupError::NoFreezer(pid))
    }

    /// The freezer in this directory of a cgroup filesystem; nothing if there is none.
    pub fn at(dir: PathBuf) -> Option<Self> {
        let unified = dir.join("cgroup.freeze").exists();
        (unified || dir.join("freezer.state").exists()).then_some(Self { dir, unified })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tasks (thread groups) in it and below.
    pub fn tasks(&self) -> Result<Vec<i32>, CgroupError> {
        let mut tasks = Vec::new();
        collect_tasks(&self.dir, &mut tasks)?;
        Ok(tasks)
    }

    /// Whether a task is in it or below.
    pub fn contains(&self, pid: i32) -> bool {
        Self::of(pid).is_ok_and(|other| other.dir.starts_with(&self.dir))
    }

    /// Whether tasks are in cgroups below it.
    pub fn is_nested(&self) -> Result<bool, CgroupError> {
        let own = read(&self.dir.join("cgroup.procs"))?.lines().count();
        Ok(self.tasks()?.len() > own)
    }

    /// Stops every task and returns when all have stopped. If that fails they go on.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        let frozen = self.write(true).and_then(|()| self.wait_until_frozen());
        if frozen.is_err() {
            self.thaw()?;
        }
        frozen
    }

    fn wait_until_frozen(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + FREEZE_DEADLINE;
        while !self.is_frozen()? {
            if Instant::now() > deadline {
                return Err(CgroupError::Stuck { path: self.dir.clone() });
            }
            std::thread::sleep(FREEZE_POLL);
        }
        Ok(())
    }

    /// Stops every task until the value that is returned ends.
    pub fn pause(&self) -> Result<Paused, CgroupError> {
        self.freeze()?;
        Ok(Paused(Some(self.clone())))
    }

    /// Lets every task go on.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.write(false)
    }

    /// Asks for the freeze without waiting: for tasks that are stopped already.
    pub fn freeze_without_waiting(&self) -> Result<(), CgroupError> {
        self.write(true)
    }

    /// Whether every task has stopped.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        if self.unified {
            let events = read(&self.dir.join("cgroup.events"))?;
            return Ok(events.lines().any(|line| line == "frozen 1"));
        }
        Ok(read(&self.dir.join("freezer.state"))?.trim() == "FROZEN")
    }

    fn write(&self, frozen: bool) -> Result<(), CgroupError> {
        let (file, value) = match (self.unified, frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        let path = self.dir.join(file);
        fs::write(&path, value).map_err(|source| CgroupError::File { operation: "write", path, source })
    }
}

fn collect_tasks(dir: &Path, tasks: &mut Vec<i32>) -> Result<(), CgroupError> {
    tasks.extend(read(&dir.join("cgroup.procs"))?.lines().filter_map(|line| line.parse::<i32>().ok()));
    let entries =
        fs::read_dir(dir).map_err(|source| CgroupError::File { operation: "read", path: dir.to_owned(), source })?;
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        collect_tasks(&entry.path(), tasks)?;
    }
    Ok(())
}

/// Finds the freezer from the texts of `/proc/<pid>/cgroup` and `/proc/self/mountinfo`.
///
/// The v1 freezer comes first where both exist: a hybrid host's v2 tree has no runtime in it.
fn locate(membership: &str, mountinfo: &str) -> Option<Freezer> {
    let v1 = locate_in(membership, mountinfo, Some("freezer")).map(|dir| Freezer { dir, unified: false });
    let v2 = || locate_in(membership, mountinfo, None).map(|dir| Freezer { dir, unified: true });
    v1.filter(|freezer| freezer.dir.join("freezer.state").exists())
        .or_else(|| v2().filter(|freezer| freezer.dir.join("cgroup.freeze").exists()))
}

/// The directory of a task's cgroup in the v1 hierarchy of a controller, or in the unified one.
fn locate_in(membership: &str, mountinfo: &str, controller: Option<&str>) -> Option<PathBuf> {
    let path = membership.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let matches = match controller {
            Some(wanted) => controllers.split(',').any(|controller| controller == wanted),
            None => id == "0",
        };
        matches.then_some(path)
    })?;
    let mount = mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let fstype = right.next()?;
        let options = right.nth(1)?;
        let matches = match controller {
            Some(wanted) => fstype == "cgroup" && options.split(',').any(|option| option == wanted),
            None => fstype == "cgroup2",
        };
        matches.then(|| left.split(' ').nth(4)).flatten()
    })?;
    Some(Path::new(mount).join(path.trim_start_matches('/')))
}

/// How much of the processors a cgroup may use: `cpu.max` of cgroup v2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` of v1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuQuota {
    dir: PathBuf,
    unified: bool,
}

/// What a [`CpuQuota`] is set to, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuShare {
    /// In each period; nothing if there is no limit.
    pub quota: Option<u64>,
    /// The period.
    pub period: u64,
}

/// The shortest quota that the kernel takes, in microseconds (`min_cfs_quota_period` in kernel/sched).
const LEAST_QUOTA: u64 = 1000;
/// The shortest period that is set. The shorter, the shorter are the stops that clients see.
const LEAST_PERIOD: u64 = 10_000;
/// The longest that the kernel takes.
const LONGEST_PERIOD: u64 = 1_000_000;

impl CpuShare {
    /// So many processors.
    pub fn of(processors: f64) -> Self {
        let period = ((LEAST_QUOTA as f64 / processors.max(1e-3)) as u64).clamp(LEAST_PERIOD, LONGEST_PERIOD);
        Self { quota: Some(((period as f64 * processors) as u64).max(LEAST_QUOTA)), period }
    }

    /// In processors; nothing if there is no limit.
    pub fn processors(&self) -> Option<f64> {
        Some(self.quota? as f64 / self.period.max(1) as f64)
    }
}

impl CpuQuota {
    /// That of the cgroup that a task is in.
    pub fn of(pid: i32) -> Result<Self, CgroupError> {
        let membership = read(Path::new(&format!("/proc/{pid}/cgroup")))?;
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        let v1 = locate_in(&membership, &mounts, Some("cpu")).map(|dir| Self { dir, unified: false });
        let v2 = || locate_in(&membership, &mounts, None).map(|dir| Self { dir, unified: true });
        let found = v1.filter(|found| found.dir.join("cpu.cfs_quota_us").exists());
        let found = found.or_else(|| v2().filter(|found| found.dir.join("cpu.max").exists()));
        found.ok_or(CgroupError::NoCpuQuota(pid))
    }

    /// All tasks (thread groups) that it holds for.
    pub fn tasks(&self) -> Result<Vec<i32>, CgroupError> {
        let mut tasks = Vec::new();
        collect_tasks(&self.dir, &mut tasks)?;
        Ok(tasks)
    }

    /// What it is set to.
    pub fn get(&self) -> Result<CpuShare, CgroupError> {
        let text = if self.unified {
            read(&self.dir.join("cpu.max"))?
        } else {
            format!(
                "{} {}",
                read(&self.dir.join("cpu.cfs_quota_us"))?.trim(),
                read(&self.dir.join("cpu.cfs_period_us"))?
            )
        };
        let mut words = text.split_whitespace();
        // `max` or -1 is no limit.
        let quota = words.next().and_then(|word| word.parse().ok());
        Ok(CpuShare { quota, period: words.next().and_then(|word| word.parse().ok()).unwrap_or(100_000) })
    }

    /// Sets it.
    pub fn set(&self, share: CpuShare) -> Result<(), CgroupError> {
        let write = |file: &str, value: String| {
            let path = self.dir.join(file);
            fs::write(&path, value).map_err(|source| CgroupError::File { operation: "write", path, source })
        };
        let CpuShare { quota, period } = share;
        if self.unified {
            return write("cpu.max", format!("{} {period}", quota.map_or("max".to_owned(), |quota| quota.to_string())));
        }
        // Both must be allowed together at every moment, whichever comes first (a parent's limit is a ratio).
        write("cpu.cfs_quota_us", "-1".to_owned())?;
        write("cpu.cfs_period_us", period.to_string())?;
        quota.map_or(Ok(()), |quota| write("cpu.cfs_quota_us", quota.to_string()))
    }
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::File { operation: "read", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_a_processor_is_a_quota_the_kernel_takes() {
        assert_eq!(CpuShare::of(0.5), CpuShare { quota: Some(5000), period: 10_000 });
        assert_eq!(CpuShare::of(2.0), CpuShare { quota: Some(20_000), period: 10_000 });
        assert_eq!(CpuShare::of(0.02), CpuShare { quota: Some(1000), period: 50_000 });
        assert_eq!(CpuShare::of(0.0), CpuShare { quota: Some(1000), period: 1_000_000 });
        assert_eq!(CpuShare { quota: None, period: 5 }.processors(), None);
    }

    #[test]
    fn both_kinds_are_set_and_read() {
        let dir = tempfile::tempdir().expect("a directory");
        for (unified, files) in [(true, &["cpu.max"][..]), (false, &["cpu.cfs_quota_us", "cpu.cfs_period_us"])] {
            let quota = CpuQuota { dir: dir.path().to_owned(), unified };
            for share in [CpuShare { quota: None, period: 100_000 }, CpuShare::of(0.3)] {
                quota.set(share).expect("writes");
                assert_eq!(quota.get().expect("reads"), share);
            }
            assert!(files.iter().all(|file| dir.path().join(file).exists()));
        }
    }

    #[test]
    fn a_hybrid_hosts_v1_hierarchies_come_first() {
        let membership = "4:cpu,cpuacct:/box/web\n0::/web\n";
        let mounts = "30 1 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n31 1 0:3 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = |controller| locate_in(membership, mounts, controller);
        assert_eq!(found(Some("cpu")), Some("/sys/fs/cgroup/cpu/box/web".into()));
        assert_eq!(found(None), Some("/sys/fs/cgroup/unified/web".into()));
        assert_eq!(found(Some("freezer")), None);
    }
}
