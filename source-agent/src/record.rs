//! What a source agent must know after it was killed, and what it does then.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::Freezer;
use longhaul_common::criu::hold::HoldListener;
use longhaul_common::description::Description;
use longhaul_common::handover::{Epoch, SourcePhase};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::leftovers::is_running;
use longhaul_common::net::Port;
use longhaul_common::runtime::Runtime;
use serde::{Deserialize, Serialize};

use crate::checkpoint::hold_socket;
use crate::custody::{Custody, Hands};
use crate::retire::{remove_cgroups, retire};

/// One migration's record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// The container.
    pub container: String,
    /// Its cgroup that is frozen.
    pub cgroup: PathBuf,
    /// Where it goes.
    pub to: String,
    /// The migration's epoch.
    pub epoch: Epoch,
    /// How far it is.
    pub phase: SourcePhase,
    /// The memory directory of images and sockets.
    pub dir: PathBuf,
    /// The host's ends of its interfaces: name, index, bridge.
    pub ports: Vec<Port>,
    /// The container, for what is done after a commit.
    pub description: Description,
    /// Its first task.
    #[serde(default)]
    pub init: i32,
    /// What it wrote last stays in its frozen tasks until the destination has fetched it.
    #[serde(default)]
    pub owes: bool,
}

/// What a restarted agent does with a migration of its earlier life.
pub struct Recovered {
    migration: String,
    record: Record,
    journal: Journal,
    runtime: Runtime,
}

impl Recovered {
    /// Its record.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its id.
    pub fn migration(&self) -> &str {
        &self.migration
    }
}

/// How many tasks there are in a cgroup.
pub fn tasks_in(cgroup: &Path) -> usize {
    Freezer::at(cgroup.to_owned()).and_then(|freezer| freezer.tasks().ok()).map_or(0, |tasks| tasks.len())
}

impl Hands for Recovered {
    fn record(&mut self, phase: SourcePhase, epoch: Epoch) -> Result<(), JournalError> {
        let record = Record { phase, epoch, ..self.record.clone() };
        self.journal.write(&self.migration, &record)?;
        self.record = record;
        Ok(())
    }

    fn erase(&mut self) {
        let _ = std::fs::remove_dir_all(&self.record.dir);
        self.journal.remove(&self.migration);
    }

    async fn let_go(&mut self, why: &str) {
        tracing::warn!(self.migration, container = self.record.container, why, "letting a container go that was held");
        let_go(&self.record).await;
    }

    async fn end(&mut self) {
        let cgroups = self.runtime.cgroups(&self.record.container);
        end(&self.record).await;
        retire(&self.runtime, &self.record.description, &self.migration, &self.record.to).await;
        remove_cgroups(cgroups).await;
    }
}

/// At the agent's start: what an earlier life left frozen and still owned is let go, and what it left in `run` taken away.
/// Returns what is not settled yet.
pub async fn recover(journal: &Journal, runtime: &Runtime, run: &Path) -> Vec<Custody<Recovered>> {
    let mut open = Vec::new();
    let records = journal.all::<Record>();
    for entry in std::fs::read_dir(run).into_iter().flatten().flatten() {
        // Of a migration that was cut off before anything was held.
        if !records.iter().any(|(_, record)| record.dir == entry.path()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    for (migration, record) in records {
        let (phase, epoch) = (record.phase, record.epoch);
        tracing::warn!(migration, container = record.container, ?phase, epoch, "found a migration of an earlier life");
        let hands = Recovered { migration, record, journal: journal.clone(), runtime: runtime.clone() };
        let custody = Custody::recover(hands, phase, epoch).await;
        if !custody.is_settled() {
            open.push(custody);
        }
    }
    open
}

/// How long CRIU may go on saving before it reaches its next notification: gigabytes of memory take seconds.
const CHECKPOINT_DEADLINE: Duration = Duration::from_secs(60);
/// How long one look for the hold takes: it looks for its agent every 50 ms.
const LOOK: Duration = Duration::from_millis(100);

/// Has the checkpoint of an agent that was killed fail. The hold finds this agent and passes the refusal on, so that CRIU
/// takes its code out of the tasks and their sockets out of repair mode: a CRIU that was killed would leave both.
async fn end_checkpoint(record: &Record) {
    let socket = hold_socket(&record.dir);
    let listener = match HoldListener::bind(&socket) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "can't reach a CRIU that may be waiting");
            return;
        }
    };
    let end = Instant::now() + CHECKPOINT_DEADLINE;
    // Kept until it has ended: a hold whose agent goes away again would look for it again.
    let mut holds = Vec::new();
    while is_running(&socket) {
        if Instant::now() > end {
            tracing::error!(container = record.container, "the checkpoint of a killed agent does not end");
            return;
        }
        if let Ok(Ok(mut held)) = tokio::time::timeout(LOOK, listener.accept()).await {
            let _ = held.refuse().await;
            holds.push(held);
        }
    }
}

/// Ends a container that the destination has taken.
async fn end(record: &Record) {
    if let Some(freezer) = Freezer::at(record.cgroup.clone()) {
        kill_frozen(&freezer);
    }
    end_checkpoint(record).await;
    // The directory is in memory: without it this is another boot, where others may have these names.
    if record.dir.exists() {
        // A namespace ends with its last socket: one that waits for its peer to acknowledge its end may take minutes.
        record.ports.iter().for_each(Port::remove_if_there);
    }
}

/// Ends all tasks of a frozen cgroup: killed while frozen, so that none runs another instruction, and gone once thawed.
pub fn kill_frozen(freezer: &Freezer) {
    for pid in freezer.tasks().unwrap_or_default() {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    if let Err(error) = freezer.thaw() {
        tracing::warn!(%error, "can't thaw what was killed");
    }
}

/// Has CRIU take back what it did, puts the container back on its network and lets it run.
async fn let_go(record: &Record) {
    // First: CRIU leaves the cgroup as frozen as it found it.
    end_checkpoint(record).await;
    for port in &record.ports {
        if let Err(error) = port.join() {
            tracing::error!(%error, "can't put the container back on its bridge");
        }
    }
    match Freezer::at(record.cgroup.clone()).map(|freezer| freezer.thaw()) {
        Some(Ok(())) => {}
        None => tracing::warn!(container = record.container, "its cgroup is gone: it has ended"),
        Some(Err(error)) => tracing::error!(%error, container = record.container, "can't thaw the container"),
    }
}
