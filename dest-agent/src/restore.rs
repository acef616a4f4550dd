//! The runtime's restore, held twice: before CRIU's request, and when all tasks exist but none has run.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use longhaul_common::config::{CRIU_LEAVES_LATER, CRIU_READS_COMMON, CRIU_RESTORES, EngineConfig};
use longhaul_common::criu::hold::{
    CRIU_ENV, FIRST_INHERITED_FD, Held, HoldError, HoldEvent, HoldListener, OpenFile, Prepare, SOCKET_ENV,
};
use longhaul_common::criu::{failure_of, path_with_hold, rpc};
use longhaul_common::description::{Description, StdioTarget};
use longhaul_common::leftovers::{cgroups_of_hold, end_restore, remove_cgroups, remove_roots};
use longhaul_common::runtime::last_message;
use longhaul_common::tasks::TaskId;
use longhaul_common::warm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use thiserror::Error;
use tokio::process::Child;

use crate::memory::at_once::{PlaceError, place};
use crate::memory::common::wait_read_in;
use crate::memory::handle::{FillError, Filler};
use crate::staging::Staging;

/// How long a runtime may take from its start to CRIU's request.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long a runtime may take to end once CRIU has.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// How long filling in may take while the container is stopped: less than the source waits for the restore.
const EAGER_DEADLINE: Duration = Duration::from_secs(100);

/// A restore that failed.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The runtime could not be started.
    #[error("can't start {program}")]
    Start {
        /// The runtime.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A log could not be opened.
    #[error("can't open {path} for the container's output")]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Without it memory that is filled in later would be lost.
    #[error(
        "this host makes huge pages unasked ({HUGE_PAGES}/enabled), and the library {0} that keeps CRIU from it is missing: install \
         the whole of Longhaul, or set engine.filter"
    )]
    Library(PathBuf),
    /// The runtime gave up before CRIU.
    #[error("the runtime did not get as far as CRIU: {0}")]
    Runtime(String),
    /// CRIU failed.
    #[error("CRIU could not restore the container: {0}")]
    Criu(String),
    /// The hold.
    #[error("the restore can't be steered")]
    Hold(#[from] HoldError),
    /// It is not filled in time.
    #[error("not all memory was in place within {} s: is the container at its memory limit?", EAGER_DEADLINE.as_secs())]
    Eager,
    /// CRIU was killed.
    #[error("CRIU, which held the restored tasks, is gone, and they are gone with it")]
    Gone,
    /// The filler.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// Pages that can't wait.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

/// Where the container's memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryFrom {
    /// CRIU's images.
    Images,
    /// The page store, after the container runs.
    StoreLater,
    /// The page store, before it runs.
    StoreFirst,
}

/// A runtime that waits before CRIU's RESTORE request.
#[derive(Debug)]
pub struct Armed {
    held: Held,
    child: Child,
    log: PathBuf,
    work: PathBuf,
    pages: PathBuf,
    init: i32,
    gone: bool,
    filler: Option<Filler>,
    from: MemoryFrom,
    /// The container's.
    cgroups: Vec<PathBuf>,
    /// Where the runtime keeps what it knows of the container.
    runtime_dir: PathBuf,
    listener: HoldListener,
}

impl Armed {
    /// Starts the runtime. `descriptors.json` must be among the images; nothing else of them is needed yet. What tasks have in `common` is in that
    /// store already, and is read now.
    pub async fn start(
        engine: &EngineConfig,
        container: &Description,
        staging: &Staging,
        from: MemoryFrom,
        common: Option<&Path>,
    ) -> Result<Self, RestoreError> {
        if from != MemoryFrom::Images && !engine.filter.is_file() && makes_huge_pages_unasked() {
            return Err(RestoreError::Library(engine.filter.clone()));
        }
        let hold = hold_socket(&staging.made.run);
        let filler = match from {
            MemoryFrom::Images => None,
            _ => Some(Filler::start(&engine.fill, &staging.pages(), &staging.work(), &hold).await?),
        };
        let listener = HoldListener::bind(&hold)?;
        let log = staging.work().join("runtime.log");
        let path = path_with_hold(&staging.made.run, &engine.hold)
            .map_err(|source| RestoreError::Start { program: engine.hold.clone(), source })?;
        let mut command = engine.runtime().command();
        command.arg("--log").arg(&log).args(["restore", "--detach", "--tcp-established", "--file-locks"]);
        command.arg("--bundle").arg(&container.bundle);
        command.arg("--image-path").arg(staging.images()).arg("--work-path").arg(staging.work());
        command.arg(&container.id);
        command.env("PATH", path).env(SOCKET_ENV, listener.path()).env(CRIU_ENV, &engine.criu);
        let (stdout, stderr) = (output(container, 1)?, output(container, 2)?);
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let mut child =
            command.spawn().map_err(|source| RestoreError::Start { program: engine.runc.clone(), source })?;
        let accepted = tokio::select! {
            accepted = tokio::time::timeout(START_DEADLINE, listener.accept()) => accepted,
            _ = child.wait() => return Err(RestoreError::Runtime(runtime_message(&log))),
        };
        let Ok(held) = accepted else {
            let _ = child.kill().await;
            return Err(RestoreError::Runtime(format!("no answer within {} s", START_DEADLINE.as_secs())));
        };
        let mut held = held?;
        let mut environment = engine.criu_environment();
        environment.push(if from == MemoryFrom::Images { CRIU_RESTORES } else { CRIU_LEAVES_LATER }.to_owned());
        environment.extend(common.map(|store| format!("{CRIU_READS_COMMON}={}", store.display())));
        held.prepare(Prepare { environment, ..preparation(container, staging, from) }).await?;
        warm::runtime(child.id());
        let (trees, files) = (staging.trees(container), container.mapped_files.clone());
        let warmed = tokio::task::spawn_blocking(move || warm::files(&trees, files.iter().map(String::as_str)));
        if let Some(store) = common.filter(|_| engine.filter.is_file()) {
            tokio::select! {
                () = wait_read_in(store) => {}
                _ = child.wait() => return Err(RestoreError::Runtime(runtime_message(&log))),
            }
        }
        warmed.await.map_err(|_| RestoreError::Runtime("a thread of the agent ended".to_owned()))?;
        let cgroups = tokio::task::spawn_blocking(move || cgroups_of_hold(&hold)).await.unwrap_or_default();
        let (work, pages) = (staging.work(), staging.pages());
        let runtime_dir = engine.runtime().state_dir(&container.id);
        Ok(Self { held, child, log, work, pages, init: 0, gone: false, filler, from, cgroups, runtime_dir, listener })
    }

    /// Restores. On success every task exists, stopped before its first instruction.
    pub async fn restore(&mut self) -> Result<(), RestoreError> {
        self.held.go().await?;
        self.gone = true;
        loop {
            match self.held.next().await? {
                HoldEvent::Waiting { script, .. } if script == PRE_RESUME => break,
                HoldEvent::Waiting { pid, .. } => {
                    self.init = pid;
                    self.held.verdict(true).await?;
                }
                HoldEvent::Ended { error, .. } => return Err(self.failure(&error)),
            }
        }
        if self.from != MemoryFrom::Images {
            let (pages, init) = (self.pages.clone(), self.init);
            let placed = tokio::task::spawn_blocking(move || place(&pages, init)).await;
            let placed = placed.map_err(|_| RestoreError::Runtime("a thread of the agent ended".to_owned()))??;
            tracing::debug!(placed, "pages that could not wait are in place");
        }
        if self.from == MemoryFrom::StoreFirst
            && let Some(filler) = &mut self.filler
        {
            filler.go().await?;
            // Short of memory it would never end; the source waits no longer either.
            let filled = tokio::time::timeout(EAGER_DEADLINE, filler.filled()).await;
            filled.map_err(|_| RestoreError::Eager)??;
            self.filler = None;
        }
        Ok(())
    }

    /// Whether CRIU still holds every task. Without it they are gone, or soon will be.
    pub fn must_be_held(&self) -> Result<(), RestoreError> {
        match tracer_of(self.init) {
            Some(_) => Ok(()),
            None => Err(RestoreError::Gone),
        }
    }

    /// Its first task.
    pub fn task(&self) -> Option<TaskId> {
        TaskId::of(self.init)
    }

    /// Whether its first task is free, and lives.
    pub fn runs(&self) -> bool {
        std::fs::read_to_string(format!("/proc/{}/status", self.init))
            .is_ok_and(|status| status.contains("\nTracerPid:\t0\n") && !status.contains("\nState:\tZ"))
    }

    /// Lets the container run. Returns once its tasks do; [`finish`](Self::finish) waits for the rest.
    pub async fn resume(&mut self) -> Result<(), RestoreError> {
        self.held.verdict(true).await?;
        // Its tasks are about to run, and to want their pages.
        if let Some(filler) = &mut self.filler
            && let Err(error) = filler.go().await
        {
            tracing::error!(%error, "the container's memory is filled in by its faults alone");
        }
        match self.held.next().await {
            Ok(HoldEvent::Ended { success: true, .. }) => Ok(()),
            Ok(HoldEvent::Ended { error, .. }) => Err(self.failure(&error)),
            Ok(HoldEvent::Waiting { script, .. }) => Err(RestoreError::Criu(format!("it waits at {script} again"))),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the runtime has written its state and ended, and hands out the filler, which may need longer.
    pub async fn finish(mut self) -> Option<Filler> {
        if tokio::time::timeout(END_DEADLINE, self.child.wait()).await.is_err() {
            tracing::warn!("the runtime did not end after the restore");
        }
        self.filler.take()
    }

    /// Ends it, whatever it has reached; nothing of the container is left running.
    pub async fn kill(mut self) {
        let socket = self.listener.path().to_owned();
        if !self.gone {
            let _ = self.held.cancel().await;
        } else if self.init == 0 {
            // Half-way, and nobody asks for a verdict: a task may wait for a page that will not come.
            end(socket.clone(), self.runtime_dir.clone()).await;
        } else {
            // The end of its init ends a PID namespace. Its sockets say so into a network that is on no bridge.
            let tracer = tracer_of(self.init);
            let _ = kill(Pid::from_raw(self.init), Signal::SIGKILL);
            // CRIU would wait for that init, and the init (`zap_pid_ns_processes`) for its own dead threads, which
            // only their tracer, CRIU, can reap: told to fail, it would never end.
            if let Some(tracer) = tracer {
                let _ = kill(tracer, Signal::SIGKILL);
            }
            let _ = self.held.verdict(false).await;
        }
        if tokio::time::timeout(END_DEADLINE, self.child.wait()).await.is_err() {
            tracing::warn!("the restore does not end by itself");
            end(socket.clone(), self.runtime_dir).await;
            let _ = self.child.wait().await;
        }
        if let Some(filler) = self.filler.take() {
            filler.stop().await;
        }
        let cgroups = self.cgroups;
        let cleared = tokio::task::spawn_blocking(move || {
            remove_cgroups(&socket, &cgroups);
            remove_roots();
        });
        let _ = cleared.await;
    }

    fn failure(&self, error: &str) -> RestoreError {
        let found = failure_of(&self.work.join("restore.log"));
        let runtime = runtime_message(&self.log);
        RestoreError::Criu(found.unwrap_or_else(|| if error.is_empty() { runtime } else { error.to_owned() }))
    }
}

/// How the kernel makes huge pages (Documentation/admin-guide/mm/transhuge.rst).
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage";

/// Whether tasks get huge pages that they did not ask for, of any size.
fn makes_huge_pages_unasked() -> bool {
    let sizes = std::fs::read_dir(HUGE_PAGES).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut settings = sizes.chain([PathBuf::from(HUGE_PAGES)]).map(|dir| dir.join("enabled"));
    settings.any(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("[always]")))
}

/// Ends everything that was started for a restore.
async fn end(socket: PathBuf, runtime_dir: PathBuf) {
    let _ = tokio::task::spawn_blocking(move || end_restore(&socket, &runtime_dir)).await;
}

/// Where the hold of one arrival finds its agent.
pub fn hold_socket(run: &Path) -> PathBuf {
    run.join("hold.sock")
}

/// CRIU's last notification before tasks run: everything that can fail has been done.
const PRE_RESUME: &str = "pre-resume";
/// The one that names the root task.
const POST_RESTORE: &str = "post-restore";

/// Who traces a task (proc_pid_status(5)).
fn tracer_of(pid: i32) -> Option<Pid> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer: i32 = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()?;
    (tracer > 0).then(|| Pid::from_raw(tracer))
}

fn runtime_message(log: &Path) -> String {
    last_message(&std::fs::read_to_string(log).unwrap_or_default())
}

/// The runtime's own output becomes the container's where the container's was a pipe.
fn output(container: &Description, fd: i32) -> Result<Stdio, RestoreError> {
    let log = container.stdio.iter().find(|stdio| stdio.fd == fd).and_then(|stdio| match &stdio.target {
        StdioTarget::Pipe { log, .. } => log.as_ref(),
        StdioTarget::File { .. } => None,
    });
    let Some(log) = log else { return Ok(Stdio::null()) };
    let open = std::fs::OpenOptions::new().append(true).create(true).open(log);
    open.map(Stdio::from).map_err(|source| RestoreError::Log { path: log.into(), source })
}

fn preparation(container: &Description, staging: &Staging, from: MemoryFrom) -> Prepare {
    let mut inherited = Vec::new();
    let mut files = Vec::new();
    let mut numbers = FIRST_INHERITED_FD..;
    let mut give = |key: String, path: String, flags: i32| {
        let Some(fd) = numbers.next() else { return };
        inherited.push(rpc::InheritFd { key, fd });
        files.push(OpenFile { fd, path, flags, offset: 0 });
    };
    let mut netns = String::new();
    if let Some(network) = &staging.network {
        let path = format!("/proc/{}/fd/{}", std::process::id(), network.netns.as_fd().as_raw_fd());
        if container.single_netns {
            netns = path;
        } else {
            give(rpc::EXTERNAL_NETNS.to_owned(), path, nix::libc::O_RDONLY);
        }
    }
    // Streams that shared one open file share one again.
    let mut seen = VecDeque::new();
    for stdio in &container.stdio {
        if let StdioTarget::File { path, key, flags } = &stdio.target
            && !seen.contains(key)
        {
            seen.push_back(key.clone());
            let access = flags & nix::libc::O_ACCMODE;
            // Appending keeps every line even if both hosts' logs are joined later.
            let append = if access == nix::libc::O_RDONLY { 0 } else { nix::libc::O_APPEND };
            give(key.clone(), path.clone(), access | append);
        }
    }
    Prepare {
        addition: Some(rpc::Options {
            root: Some(staging.root(container).display().to_string()),
            inherit_fd: inherited,
            external: (0..container.tmpfs.len())
                .map(|index| format!("mnt[{}]:{}", rpc::external_tmpfs(index), staging.tmpfs(index).display()))
                .collect(),
            network_lock: staging.network.is_some().then_some(rpc::NetworkLock::Skip as i32),
            manage_cgroups_mode: container.single_cgroup.then_some(rpc::CgroupMode::Ignore as i32),
            log_level: Some(rpc::LOG_LEVEL),
            lazy_pages: (from != MemoryFrom::Images).then_some(true),
            ..rpc::Options::default()
        }),
        files,
        held: vec![POST_RESTORE.to_owned(), PRE_RESUME.to_owned()],
        environment: Vec::new(),
        netns,
    }
}
