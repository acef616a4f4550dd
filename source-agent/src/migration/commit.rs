//! The container changes hands, and what is asked when the answer is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::tls::PeerAddress;
use longhaul_proto::peer::Outcome as PeerOutcome;

use super::prepare::Prepared;
use super::save::Frozen;
use super::{ASK_AGAIN, DOUBT_SHOWN_AFTER, Env, MigrationError, Trip};
use crate::jobs::{Job, JobEvent};
use crate::peer::{Peer, Timings};
use crate::record::{self, Record, RecordPhase};
use crate::report::{Outcome, millis};
use crate::retire::retire;

/// Goes on with a migration that a killed agent left in doubt: asks until the destination answers, then ends the
/// container here or lets it run.
pub async fn resume_in_doubt(env: Arc<Env>, job: Arc<Job>, address: PeerAddress, record: Record) {
    let migration = job.report().migration;
    let outcome = loop {
        let asked = async {
            let (peer, _) = Peer::connect(&env.identity, &address, env.capabilities.clone()).await?;
            peer.outcome(&migration, record.epoch).await
        };
        match asked.await {
            Ok(PeerOutcome::Committed) => break Outcome::Moved,
            Ok(PeerOutcome::Aborted) => break Outcome::Failed,
            Ok(_) => {}
            Err(error) => tracing::warn!(migration, error = longhaul_common::chain(&error), "still in doubt"),
        }
        tokio::time::sleep(ASK_AGAIN).await;
    };
    if outcome == Outcome::Moved {
        record::end(&record).await;
        retire(&env.config.engine.runtime(), &record.description, &migration, &record.to).await;
    } else {
        record::let_go(&record).await;
    }
    let _ = std::fs::remove_dir_all(&record.dir);
    env.journal.remove(&migration);
    tracing::info!(migration, container = record.container, ?outcome, "the destination answered");
    job.note(|report| {
        report.outcome = outcome;
        report.error =
            (outcome == Outcome::Failed).then(|| "the destination undid it; the container runs here".to_owned());
    });
    job.tell(JobEvent::Finished(Box::new(job.report())));
}

/// The container exists twice: frozen here, and stopped there.
pub(super) struct Restored {
    pub(super) frozen: Frozen,
}

impl Restored {
    /// Gives the container away. Cancelled or not, it goes on until the destination has answered.
    pub(super) async fn commit(self, trip: &Trip) -> Result<Committed, MigrationError> {
        if trip.job.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let Frozen { prepared, at, .. } = self.frozen;
        let start = Instant::now();
        // CRIU thawed the cgroup to reach the tasks, and holds them. Frozen again, they stay even if CRIU is killed.
        prepared.inspection.live.freezer.freeze_without_waiting()?;
        trip.record(&prepared.inspection, RecordPhase::Committing)?;
        trip.step("journal", start.elapsed());

        let start = Instant::now();
        let answer = prepared.session.commit(trip.epoch).await;
        let timings = match answer {
            Ok(timings) => timings,
            // Also a destination that says it failed: its journal has the last word.
            Err(error) => {
                tracing::warn!(error = longhaul_common::chain(&error), "the answer to COMMIT is missing");
                match settle(trip, &prepared).await {
                    PeerOutcome::Committed => Timings::new(),
                    _ => return Err(error.into()),
                }
            }
        };
        let downtime = at.elapsed();
        trip.step("commit", start.elapsed());
        note_timings(trip, timings);
        trip.job.note(|report| report.downtime_ms = Some(millis(downtime)));
        if let Some(memory) = &prepared.memory {
            trip.env.fixed_downtime.learn(Duration::from_secs_f64(memory.predicted_ms / 1000.0), downtime);
        }
        Ok(Committed { prepared })
    }
}

/// Asks until the destination knows. The container stays frozen meanwhile; the command is told after a while.
async fn settle(trip: &Trip, prepared: &Prepared) -> PeerOutcome {
    let start = Instant::now();
    let mut shown = false;
    let mut peer = prepared.peer.clone();
    loop {
        match peer.outcome(&trip.migration, trip.epoch).await {
            Ok(outcome @ (PeerOutcome::Committed | PeerOutcome::Aborted)) => return outcome,
            Ok(_) => {}
            Err(error) => tracing::warn!(error = longhaul_common::chain(&error), "the destination does not answer"),
        }
        if !shown && start.elapsed() > DOUBT_SHOWN_AFTER {
            shown = true;
            trip.job.note(|report| {
                report.outcome = Outcome::InDoubt;
                report.error = Some(MigrationError::InDoubt.to_string());
            });
            trip.job.tell(JobEvent::Finished(Box::new(trip.job.report())));
        }
        tokio::time::sleep(ASK_AGAIN).await;
        let connected = Peer::connect(&trip.env.identity, &trip.address, trip.env.capabilities.clone()).await;
        if let Ok((fresh, _)) = connected {
            peer = fresh;
        }
    }
}

pub(super) fn note_timings(trip: &Trip, timings: Timings) {
    for (name, micros) in timings {
        trip.step(&format!("destination.{name}"), Duration::from_micros(micros));
    }
}

/// The container runs at the destination.
pub(super) struct Committed {
    prepared: Prepared,
}

impl Committed {
    pub(super) async fn retire(self, trip: &Trip) -> Result<(), MigrationError> {
        let checkpoint = {
            let mut rollback = trip.rollback.lock().await;
            rollback.give_away();
            rollback.checkpoint.take()
        };
        let live = &self.prepared.inspection.live;
        // Killed while frozen, so that none runs another instruction; gone once thawed.
        // No step below can fail the migration any more: the container runs at the destination.
        for pid in live.freezer.tasks().unwrap_or_default() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        if let Err(error) = live.freezer.thaw() {
            tracing::warn!(%error, "can't thaw what was killed");
        }
        if let Some(checkpoint) = checkpoint {
            checkpoint.kill().await;
        }
        // The namespace would take them along, but only some time after its last task.
        for port in &live.ports {
            if let Err(error) = port.remove() {
                tracing::debug!(%error, "the interface was gone already");
            }
        }
        let runtime = trip.env.config.engine.runtime();
        retire(&runtime, &self.prepared.inspection.description, &trip.migration, &trip.address.host).await;
        trip.env.journal.remove(&trip.migration);
        Ok(())
    }
}
