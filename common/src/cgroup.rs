//! The cgroups of a container: its tasks, and freezing them.
//!
//! The freezer is written directly and not through the runtime: that saves a process start (5 ms) inside the
//! downtime, and CRIU, which would wait for the freezer in steps of 100 ms, finds it frozen at once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

/// How long a cgroup may take to freeze. A task in an uninterruptible sleep (a dead NFS server) never does.
const FREEZE_DEADLINE: Duration = Duration::from_secs(2);
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
    /// It would not freeze.
    #[error(
        "the cgroup {path} did not freeze within {} s: a task of it is stuck in the kernel (ps shows state D)",
        FREEZE_DEADLINE.as_secs()
    )]
    Stuck {
        /// The cgroup.
        path: PathBuf,
    },
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

    /// Stops every task and returns when all have stopped.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.write(true)?;
        let deadline = Instant::now() + FREEZE_DEADLINE;
        while !self.is_frozen()? {
            if Instant::now() > deadline {
                self.write(false)?;
                return Err(CgroupError::Stuck { path: self.dir.clone() });
            }
            std::thread::sleep(FREEZE_POLL);
        }
        Ok(())
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
    let find = |unified: bool| {
        let path = membership.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let matches =
                if unified { id == "0" } else { controllers.split(',').any(|controller| controller == "freezer") };
            matches.then_some(path)
        })?;
        let mount = mountinfo.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let fstype = right.next()?;
            let options = right.nth(1)?;
            let matches = if unified {
                fstype == "cgroup2"
            } else {
                fstype == "cgroup" && options.split(',').any(|option| option == "freezer")
            };
            matches.then(|| left.split(' ').nth(4)).flatten()
        })?;
        let dir = Path::new(mount).join(path.trim_start_matches('/'));
        let file = if unified { "cgroup.freeze" } else { "freezer.state" };
        dir.join(file).exists().then_some(Freezer { dir, unified })
    };
    find(false).or_else(|| find(true))
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::File { operation: "read", path: path.to_owned(), source })
}
