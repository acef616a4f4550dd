//! The runtime's checkpoint, held twice: before CRIU's request, and when all is saved but nothing has been killed.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use longhaul_common::config::EngineConfig;
use longhaul_common::criu::hold::{CRIU_ENV, Held, HoldError, HoldEvent, HoldListener, Prepare, SOCKET_ENV};
use longhaul_common::criu::{failure_of, path_with_hold, rpc};
use longhaul_common::runtime::last_message;
use longhaul_common::warm;
use thiserror::Error;
use tokio::process::Child;

/// How long a runtime may take from its start to CRIU's request.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long a runtime may take to end once CRIU has.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// How long CRIU may go on saving after a cancellation.
const CANCEL_DEADLINE: Duration = Duration::from_secs(120);
/// The largest unlinked but open file that comes along, in bytes. CRIU's own limit is 1 MiB.
const GHOST_LIMIT: u32 = 1 << 30;

/// A checkpoint that failed. The container is as it was.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The runtime could not be started.
    #[error("can't start {program}")]
    Start {
        /// The runtime or the hold.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The runtime gave up before CRIU.
    #[error("the runtime did not get as far as CRIU: {0}")]
    Runtime(String),
    /// CRIU failed.
    #[error("CRIU could not save the container: {0}")]
    Criu(String),
    /// The hold.
    #[error("the checkpoint can't be steered")]
    Hold(#[from] HoldError),
}

/// What CRIU is to leave out, and what it is told.
#[derive(Debug, Clone, Default)]
pub struct Externals {
    /// CRIU's names of resources that stay outside the images.
    pub keys: Vec<String>,
    /// The agent takes the container off the network by itself.
    pub own_network_lock: bool,
    /// No tree of cgroups has to be saved.
    pub single_cgroup: bool,
    /// The network namespace CRIU works in.
    pub netns: Option<String>,
    /// Entries of CRIU's environment.
    pub environment: Vec<String>,
}

/// A runtime that waits before CRIU's DUMP request.
#[derive(Debug)]
pub struct Armed {
    held: Held,
    child: Child,
    log: PathBuf,
    dir: PathBuf,
    gone: bool,
    _listener: HoldListener,
}

/// The paths of one checkpoint, below a directory of memory.
pub fn images_dir(dir: &Path) -> PathBuf {
    dir.join("images")
}

/// Where the runtime and CRIU log.
pub fn work_dir(dir: &Path) -> PathBuf {
    dir.join("work")
}

/// The socket of the hold.
pub fn hold_socket(dir: &Path) -> PathBuf {
    dir.join("hold.sock")
}

impl Armed {
    /// Starts the runtime, with images and logs below `dir`.
    pub async fn start(
        engine: &EngineConfig,
        container: &str,
        dir: &Path,
        externals: &Externals,
    ) -> Result<Self, CheckpointError> {
        let started = |program: &Path| {
            let program = program.to_owned();
            move |source| CheckpointError::Start { program, source }
        };
        for made in [images_dir(dir), work_dir(dir)] {
            std::fs::create_dir_all(&made).map_err(started(&engine.runc))?;
        }
        let listener = HoldListener::bind(&hold_socket(dir))?;
        let path = path_with_hold(dir, &engine.hold).map_err(started(&engine.hold))?;
        let log = work_dir(dir).join("runtime.log");
        let mut command = engine.runtime().command();
        command.arg("--log").arg(&log).args(["checkpoint", "--tcp-established", "--file-locks"]);
        command.arg("--image-path").arg(images_dir(dir)).arg("--work-path").arg(work_dir(dir)).arg(container);
        command.env("PATH", path).env(SOCKET_ENV, listener.path()).env(CRIU_ENV, &engine.criu);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(started(&engine.runc))?;
        let accepted = tokio::select! {
            accepted = tokio::time::timeout(START_DEADLINE, listener.accept()) => accepted,
            _ = child.wait() => return Err(CheckpointError::Runtime(runtime_message(&log))),
        };
        let Ok(held) = accepted else {
            let _ = child.kill().await;
            return Err(CheckpointError::Runtime(format!("no answer within {} s", START_DEADLINE.as_secs())));
        };
        let mut held = held?;
        held.prepare(preparation(externals, engine.criu_environment())).await?;
        warm::runtime(child.id());
        Ok(Self { held, child, log, dir: dir.to_owned(), gone: false, _listener: listener })
    }

    /// What the runtime wrote about the container's standard streams: the destination needs it before the images.
    pub fn descriptors(&self) -> Result<Vec<u8>, CheckpointError> {
        let path = images_dir(&self.dir).join("descriptors.json");
        std::fs::read(&path).map_err(|error| CheckpointError::Runtime(format!("{}: {error}", path.display())))
    }

    /// Saves the frozen container. `cut_off` is called when CRIU is about to look at sockets: no packet may come
    /// after it. On success everything is saved and nothing has been killed.
    pub async fn save(&mut self, cut_off: impl FnOnce() -> Result<(), CheckpointError>) -> Result<(), CheckpointError> {
        self.held.go().await?;
        self.gone = true;
        let mut cut_off = Some(cut_off);
        loop {
            match self.held.next().await? {
                HoldEvent::Waiting { script, .. } if script == POST_DUMP => return Ok(()),
                HoldEvent::Waiting { .. } => {
                    let done = cut_off.take().map_or(Ok(()), |cut_off| cut_off());
                    self.held.verdict(done.is_ok()).await?;
                    done?;
                }
                HoldEvent::Ended { error, .. } => return Err(self.failure(&error)),
            }
        }
    }

    /// CRIU kills the tasks, whose sockets are still in repair mode: no FIN, no RST. The runtime forgets the container.
    pub async fn kill(mut self) {
        if let Err(error) = self.held.verdict(true).await {
            tracing::warn!(%error, "CRIU was gone before it was told to kill");
        }
        self.end(END_DEADLINE).await;
    }

    /// Gives up: CRIU undoes what it did, and the runtime keeps the container.
    pub async fn cancel(mut self) {
        let told = if self.gone { self.held.verdict(false).await } else { self.held.cancel().await };
        if let Err(error) = told {
            tracing::debug!(%error, "CRIU had ended already");
        }
        // CRIU notices at its next notification: gigabytes of memory may come before that.
        self.end(CANCEL_DEADLINE).await;
    }

    async fn end(&mut self, deadline: Duration) {
        if tokio::time::timeout(deadline, self.child.wait()).await.is_err() {
            let waited_s = deadline.as_secs();
            tracing::error!(
                waited_s,
                "the runtime did not end after the checkpoint: what CRIU has stopped stands still as long as CRIU is there"
            );
            let _ = self.child.start_kill();
        }
    }

    fn failure(&self, error: &str) -> CheckpointError {
        let found = failure_of(&work_dir(&self.dir).join("dump.log"));
        let runtime = runtime_message(&self.log);
        CheckpointError::Criu(found.unwrap_or_else(|| if error.is_empty() { runtime } else { error.to_owned() }))
    }
}

const POST_DUMP: &str = "post-dump";
const NETWORK_LOCK: &str = "network-lock";

fn runtime_message(log: &Path) -> String {
    last_message(&std::fs::read_to_string(log).unwrap_or_default())
}

fn preparation(externals: &Externals, mut environment: Vec<String>) -> Prepare {
    environment.extend(externals.environment.iter().cloned());
    Prepare {
        addition: Some(rpc::Options {
            external: externals.keys.clone(),
            network_lock: externals.own_network_lock.then_some(rpc::NetworkLock::Skip as i32),
            manage_cgroups_mode: externals.single_cgroup.then_some(rpc::CgroupMode::Ignore as i32),
            link_remap: Some(true),
            ghost_limit: Some(GHOST_LIMIT),
            log_level: Some(rpc::LOG_LEVEL),
            ..rpc::Options::default()
        }),
        files: Vec::new(),
        held: vec![NETWORK_LOCK.to_owned(), POST_DUMP.to_owned()],
        environment,
        netns: externals.netns.clone().unwrap_or_default(),
    }
}
