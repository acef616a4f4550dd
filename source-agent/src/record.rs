//! What a source agent must know after it was killed, and what it does then.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use longhaul_common::cgroup::Freezer;
use longhaul_common::criu::hold::HoldListener;
use longhaul_common::description::Description;
use longhaul_common::journal::Journal;
use longhaul_common::leftovers::is_running;
use longhaul_common::net::Port;
use serde::{Deserialize, Serialize};

use crate::checkpoint::hold_socket;

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
    pub epoch: u64,
    /// How far it is.
    pub phase: RecordPhase,
    /// The memory directory of images and sockets.
    pub dir: PathBuf,
    /// The host's ends of its interfaces: name, index, bridge.
    pub ports: Vec<(String, u32, String)>,
    /// The container, for what is done after a commit.
    pub description: Description,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordPhase {
    /// A checkpoint is held or the container is frozen, and it is this host's: let go if the agent finds it at its start.
    Held,
    /// Given away, and not known whether taken: stays frozen until the destination answers.
    Committing,
}

/// At the agent's start: thaws what an earlier life left frozen and still owned. Returns what is in doubt.
pub async fn recover(journal: &Journal) -> Vec<(String, Record)> {
    let mut in_doubt = Vec::new();
    for (migration, record) in journal.all::<Record>() {
        match record.phase {
            RecordPhase::Committing => {
                tracing::warn!(
                    migration,
                    container = record.container,
                    "in doubt: the container stays frozen until its destination answers"
                );
                in_doubt.push((migration, record));
            }
            RecordPhase::Held => {
                tracing::warn!(
                    migration,
                    container = record.container,
                    "letting a container go that a killed agent left held"
                );
                let_go(&record).await;
                let _ = std::fs::remove_dir_all(&record.dir);
                journal.remove(&migration);
            }
        }
    }
    in_doubt
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

/// Ends a container that the destination has taken: killed while frozen, so that none of its tasks runs again.
pub async fn end(record: &Record) {
    if let Some(freezer) = Freezer::at(record.cgroup.clone()) {
        for pid in freezer.tasks().unwrap_or_default() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        if let Err(error) = freezer.thaw() {
            tracing::warn!(%error, container = record.container, "can't thaw what was killed");
        }
    }
    end_checkpoint(record).await;
}

/// Has CRIU take back what it did, puts the container back on its network and lets it run.
pub async fn let_go(record: &Record) {
    // First: CRIU leaves the cgroup as frozen as it found it.
    end_checkpoint(record).await;
    for (name, index, bridge) in &record.ports {
        let port = Port { name: name.clone(), index: *index, bridge: bridge.clone() };
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
