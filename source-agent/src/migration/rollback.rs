//! What is done to a container on its way, and how it is taken back, so that it goes on as if nothing had happened.

use std::sync::Arc;

use longhaul_common::cgroup::Freezer;
use longhaul_common::handover::{Epoch, SourcePhase};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::net::Port;
use longhaul_common::runtime::Runtime;
use tokio::sync::Mutex;

use crate::checkpoint::Armed;
use crate::custody::Hands;
use crate::peer::Session;
use crate::record::{Record, kill_frozen};
use crate::retire::{remove_cgroups, retire};

/// Everything that was changed, filled in as it is changed.
#[derive(Default)]
pub(super) struct Rollback {
    /// The runtime's checkpoint.
    pub(super) checkpoint: Option<Armed>,
    /// The frozen cgroup.
    pub(super) freezer: Option<Freezer>,
    /// Interfaces that were taken off their bridges.
    pub(super) ports: Vec<Port>,
    /// The destination's half.
    pub(super) session: Option<Arc<Session>>,
}

impl Rollback {
    /// Puts everything back. Every step is tried, whatever became of the one before.
    pub(super) async fn undo(&mut self, reason: &str) {
        // CRIU first: it cures the tasks of its code and takes their sockets out of repair mode.
        if let Some(checkpoint) = self.checkpoint.take() {
            checkpoint.cancel().await;
        }
        // Then the network, so that the first packet of a thawed task gets out.
        for port in self.ports.drain(..) {
            if let Err(error) = port.join() {
                tracing::error!(%error, "can't put the container back on its bridge: do it by hand");
            }
        }
        if let Some(freezer) = self.freezer.take()
            && let Err(error) = freezer.thaw()
        {
            tracing::error!(%error, "can't thaw the container: write THAWED (v1) or 0 (v2) to its cgroup's freezer");
        }
        // The destination last: the container need not wait for it.
        if let Some(session) = self.session.take() {
            session.abort(reason).await;
        }
    }
}

/// The hands of a migration under way.
pub(super) struct Live {
    pub(super) migration: String,
    pub(super) journal: Journal,
    pub(super) runtime: Runtime,
    pub(super) rollback: Arc<Mutex<Rollback>>,
    /// Where the container goes.
    pub(super) to: String,
    /// What is written down of it, and its cgroup and ports, once it is about to be held.
    pub(super) held: Option<(Record, Freezer, Vec<Port>)>,
}

impl Hands for Live {
    fn record(&mut self, phase: SourcePhase, epoch: Epoch) -> Result<(), JournalError> {
        let Some((record, ..)) = &mut self.held else { return Ok(()) };
        (record.phase, record.epoch) = (phase, epoch);
        self.journal.write(&self.migration, record)
    }

    fn erase(&mut self) {
        self.journal.remove(&self.migration);
    }

    async fn let_go(&mut self, why: &str) {
        self.rollback.lock().await.undo(why).await;
    }

    /// No step can fail the migration any more: the container is not this host's.
    async fn end(&mut self) {
        let checkpoint = {
            let mut rollback = self.rollback.lock().await;
            // Nothing is put back any more.
            rollback.freezer = None;
            rollback.ports.clear();
            rollback.session = None;
            rollback.checkpoint.take()
        };
        let Some((record, freezer, ports)) = &self.held else { return };
        let cgroups = self.runtime.cgroups(&record.container);
        kill_frozen(freezer);
        if let Some(checkpoint) = checkpoint {
            checkpoint.kill().await;
        }
        // The namespace would take them along, but only some time after its last task.
        ports.iter().for_each(Port::remove_if_there);
        retire(&self.runtime, &record.description, &self.migration, &self.to).await;
        remove_cgroups(cgroups).await;
    }
}
