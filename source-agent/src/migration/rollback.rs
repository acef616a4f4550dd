//! What a failed migration puts back, so that the container goes on as if nothing had happened.

use std::sync::Arc;

use longhaul_common::cgroup::Freezer;
use longhaul_common::net::Port;

use crate::checkpoint::Armed;
use crate::peer::Session;

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
    /// The container is the destination's: nothing is put back any more.
    pub(super) fn give_away(&mut self) {
        self.freezer = None;
        self.ports.clear();
        self.session = None;
    }

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
