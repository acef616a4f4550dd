//! The journey of one migration. The order of phases is known here alone.
//!
//! Every phase takes what the one before it made, so none can be left out or repeated. What has to be undone
//! after a failure lies in one [`Rollback`], which outlives the phases. After `Restored::commit` nothing is undone.

mod commit;
mod prepare;
mod quiesce;
mod rollback;
mod save;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::cgroup::CgroupError;
use longhaul_common::config::SourceConfig;
use longhaul_common::criu::keep_logs;
use longhaul_common::fault;
use longhaul_common::handover::source::{Event, State};
use longhaul_common::handover::{Epoch, SourcePhase};
use longhaul_common::host::{Capabilities, compare};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::layers::LayerDigests;
use longhaul_common::obstacle::Obstacle;
use longhaul_common::tls::{Identity, PeerAddress};
use thiserror::Error;
use tokio::sync::Mutex;
use tracing::Instrument;

use crate::checkpoint::{CheckpointError, work_dir};
use crate::custody::{Custody, Line};
use crate::images::ImageError;
use crate::inspect::{InspectError, Inspection};
use crate::jobs::{Job, JobEvent};
use crate::memory::precopy::MemoryError;
use crate::options::{Options, TimeoutAction};
use crate::peer::{Peer, PeerError, Session};
use crate::push::PushError;
use crate::record::Record;
use crate::report::{Outcome, millis};
pub use commit::go_on;
use prepare::Negotiated;
use rollback::{Live, Rollback};

/// Live passes over the files stop when one has sent no more than this, in bytes: what is left fits into a few ms.
const SETTLED_BYTES: u64 = 256 << 10;
/// Of files that were written a moment ago, more than this, in bytes, is waited for until it is sure that they are not being written: it
/// would all be read once more while the container is frozen, at some 3 GB a second.
const MOST_UNSETTLED: u64 = 32 << 20;
/// The most live passes: a container that writes faster than the link would be followed for ever.
const MAX_LIVE_PASSES: u32 = 6;
/// What a downtime is taken for, besides memory, before the first move: that of a small container.
const FIRST_GUESS: Duration = Duration::from_millis(150);
/// The move itself; an operator's decision about it is the next.
pub const FIRST_EPOCH: Epoch = 1;
/// Image messages between the reading thread and the network, 256 KiB each.
const IMAGE_QUEUE: usize = 32;

/// What an agent's migrations share.
pub struct Env {
    /// Its configuration.
    pub config: SourceConfig,
    /// Its identity.
    pub identity: Identity,
    /// This host.
    pub capabilities: Capabilities,
    /// Digests of layers.
    pub digests: LayerDigests,
    /// The journal.
    pub journal: Journal,
    /// What was taken from containers of their processor time.
    pub throttled: Journal,
    /// Containers that are frozen for a moment in each round.
    pub paused: Journal,
    /// What a downtime takes besides memory, as learnt from the moves so far.
    pub fixed_downtime: Calibration,
}

/// The part of a downtime that is always the same on a host.
#[derive(Debug)]
pub struct Calibration(std::sync::Mutex<Duration>);

impl Default for Calibration {
    fn default() -> Self {
        Self(std::sync::Mutex::new(FIRST_GUESS))
    }
}

impl Calibration {
    /// What it is taken for now.
    pub fn get(&self) -> Duration {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Learns from a move: half of what is new counts, since one may have been unlucky.
    fn learn(&self, predicted: Duration, actual: Duration) {
        let mut fixed = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let variable = predicted.saturating_sub(*fixed);
        *fixed = (*fixed + actual.saturating_sub(variable)) / 2;
    }
}

/// Why a migration did not move its container.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// Something is in the way.
    #[error("{} in the way; nothing was touched", count(.0.len()))]
    Refused(Vec<Obstacle>),
    /// The user ended it.
    #[error("cancelled; the container runs here, untouched")]
    Cancelled,
    /// It took too long.
    #[error("not done within {} s; the container runs here, untouched", .0.as_secs_f64())]
    TimedOut(Duration),
    /// The destination's answer is missing.
    #[error(
        "in doubt: the destination did not say whether it took the container, which stays frozen here until it does; \
         `migrate status` shows it"
    )]
    InDoubt,
    /// It was in doubt, and an operator decided.
    #[error("it was in doubt, and an operator decided: {}", if *.0 == Outcome::Kept { "the container was kept here" } else { "the container was ended here" })]
    Decided(Outcome),
    /// Looking at the container.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// The destination.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// Its files.
    #[error(transparent)]
    Push(#[from] PushError),
    /// Its checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Its images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It writes faster than it can be copied.
    #[error(
        "the container writes {dirty_mib_per_s:.0} MiB/s, more than can be copied meanwhile: its downtime would be \
         {predicted_ms:.0} ms after {rounds} rounds; raise --max-downtime or --bandwidth, or move it with \
         --timeout-action freeze; it runs here, untouched"
    )]
    TooFast {
        /// What it writes.
        dirty_mib_per_s: f64,
        /// The downtime it would have.
        predicted_ms: f64,
        /// Rounds that were tried.
        rounds: usize,
    },
    /// It would be away for long with nothing left to copy.
    #[error(
        "the container would be down for {rest_ms:.0} ms with nothing left to copy: freezing, saving and restoring it took so long \
         in the moves before; raise --max-downtime, or move it with --timeout-action freeze; it runs here, untouched"
    )]
    TooLong {
        /// That.
        rest_ms: f64,
    },
    /// Memory can't be copied beforehand, and a downtime was asked for.
    #[error("memory can't be copied while the container runs, so --max-downtime can't be kept: {0}")]
    NoPrecopy(String),
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A thread.
    #[error("a thread of the agent ended unexpectedly")]
    Panicked,
}

fn count(obstacles: usize) -> String {
    if obstacles == 1 { "1 obstacle is".to_owned() } else { format!("{obstacles} obstacles are") }
}

/// Runs one migration to its end. The job's report says what came of it.
pub async fn run(env: Arc<Env>, job: Arc<Job>, address: PeerAddress, options: Options) {
    let report = job.report();
    let span = tracing::info_span!("migration", id = report.migration, container = report.container);
    let rollback = Arc::new(Mutex::new(Rollback::default()));
    let hands = Live {
        migration: report.migration.clone(),
        journal: env.journal.clone(),
        runtime: env.config.engine.runtime(),
        rollback: rollback.clone(),
        to: address.host.clone(),
        held: None,
    };
    let trip = Trip {
        dir: env.config.paths.run.join("source").join(&report.migration),
        migration: report.migration,
        container: report.container,
        rollback,
        custody: Mutex::new(Custody::new(hands, FIRST_EPOCH)),
        env,
        job,
        address,
        options,
        epoch: FIRST_EPOCH,
    };
    async move {
        let result = trip.journey().await;
        trip.conclude(result).await;
        longhaul_common::sys::memory::trim_soon();
    }
    .instrument(span)
    .await;
}

/// What all phases of one migration share.
struct Trip {
    env: Arc<Env>,
    job: Arc<Job>,
    migration: String,
    container: String,
    address: PeerAddress,
    options: Options,
    epoch: Epoch,
    dir: PathBuf,
    rollback: Arc<Mutex<Rollback>>,
    /// Who owns the container, and what follows from it.
    custody: Mutex<Custody<Live>>,
}

impl Trip {
    async fn journey(&self) -> Result<Outcome, MigrationError> {
        let negotiated = self.phase("negotiate", self.negotiate()).await?;
        let accepted = self.phase("preflight", negotiated.preflight(self)).await?;
        if self.options.dry_run {
            return Ok(Outcome::WouldMove);
        }
        let prepared = self.phase("prepare", accepted.prepare(self)).await?;
        let synced = self.phase("rootfs-presync", prepared.presync(self)).await?;
        let copied = self.phase("pre-copy", synced.precopy(self)).await?;
        let armed = self.phase("arm", copied.arm(self)).await?;
        // A freeze is not interrupted half-way: a cancellation waits for it, or for the next of several attempts.
        let frozen = self.last_phase("freeze", armed.freeze(self)).await?;
        let session = frozen.session();
        let saved = self.phase("final-state", self.while_heard(&session, frozen.save(self))).await?;
        let restored = self.phase("restore", self.while_heard(&session, saved.restore(self))).await?;
        // ---- the point of no return: from here the container is not this host's to thaw ----
        let committed = self.last_phase("commit", restored.commit(self)).await?;
        let committed = match committed.owes() {
            true => self.last_phase("post-copy", committed.serve(self)).await?,
            false => committed,
        };
        self.last_phase("after", committed.retire(self)).await?;
        Ok(Outcome::Moved)
    }

    /// Work for which the container is frozen: it must not stay so for a destination that is gone.
    async fn while_heard<T>(
        &self,
        session: &Session,
        work: impl Future<Output = Result<T, MigrationError>>,
    ) -> Result<T, MigrationError> {
        let limit = Duration::from_millis(self.env.config.frozen_silence_ms);
        tokio::select! {
            biased;
            done = work => done,
            silent = session.silence(limit) => Err(silent.into()),
        }
    }

    /// A phase that can be cancelled.
    async fn phase<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, MigrationError>>,
    ) -> Result<T, MigrationError> {
        let limit = self.abort_limit();
        let late = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit.saturating_sub(self.job.elapsed())).await,
                None => std::future::pending().await,
            }
        };
        let interruptible = async {
            tokio::select! {
                biased;
                () = self.job.cancel.cancelled() => Err(MigrationError::Cancelled),
                () = late => Err(MigrationError::TimedOut(limit.unwrap_or_default())),
                done = work => done,
            }
        };
        self.last_phase(name, interruptible).await
    }

    /// A phase that goes on whatever the user wants: gives it its span, its time and its name in the report.
    async fn last_phase<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, MigrationError>>,
    ) -> Result<T, MigrationError> {
        self.job.note(|report| name.clone_into(&mut report.phase));
        self.job.tell(JobEvent::Phase(name));
        fault::point(&format!("source:phase:{name}"));
        let start = Instant::now();
        let done = work.instrument(tracing::info_span!("phase", name)).await;
        let took = start.elapsed();
        tracing::info!(phase = name, ms = millis(took), ok = done.is_ok(), "phase ended");
        self.job.note(|report| {
            report.phases.insert(name.to_owned(), millis(took));
        });
        done
    }

    /// Whether the user wants the move to go on: in a phase that is not cut short, and can take long.
    fn still_wanted(&self) -> Result<(), MigrationError> {
        if self.job.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        match self.abort_limit() {
            Some(limit) if self.job.elapsed() > limit => Err(MigrationError::TimedOut(limit)),
            _ => Ok(()),
        }
    }

    /// After what time the move ends with the container untouched. Where the user wants a freeze then, pre-copy ends by itself,
    /// and nothing after it is cut short.
    fn abort_limit(&self) -> Option<Duration> {
        self.options.timeout.filter(|_| self.options.timeout_action == TimeoutAction::Abort)
    }

    fn progress(&self, phase: &'static str, what: String, done: u64, total: u64) {
        self.job.tell(JobEvent::Progress { phase, what, done, total });
    }

    fn step(&self, name: &str, took: Duration) {
        self.job.note(|report| {
            report.downtime_steps.insert(name.to_owned(), millis(took));
        });
    }

    /// Undoes what has to be undone, and tells the end.
    async fn conclude(&self, result: Result<Outcome, MigrationError>) {
        let outcome = match &result {
            Ok(outcome) => *outcome,
            Err(MigrationError::Decided(outcome)) => *outcome,
            Err(MigrationError::Refused(_)) => Outcome::Refused,
            Err(MigrationError::Cancelled) => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        if !matches!(outcome, Outcome::Moved | Outcome::Kept | Outcome::Disowned) {
            let reason = result.as_ref().err().map_or_else(|| "it was only a dry run".to_owned(), ToString::to_string);
            if let Err(error) = self.hand_over(Event::GiveUp, &reason).await {
                tracing::error!(%error, "can't write down that the container was let go");
            }
            // What was made for it before it was held.
            if self.custody.lock().await.state() == State::Running {
                self.rollback.lock().await.undo(&reason).await;
            }
        }
        let mut error = result.as_ref().err().map(|error| longhaul_common::chain(error));
        if let (Outcome::Failed, Some(error)) = (outcome, &mut error)
            && work_dir(&self.dir).is_dir()
            && let Ok(kept) = keep_logs(&work_dir(&self.dir), &self.env.config.paths.state, &self.migration)
        {
            error.push_str(&format!(" (logs: {})", kept.display()));
        }
        let _ = std::fs::remove_dir_all(&self.dir);
        self.job.note(|report| {
            report.outcome = outcome;
            report.total_ms = millis(self.job.elapsed());
            report.error = error;
            if let Err(MigrationError::Refused(obstacles)) = &result {
                report.obstacles.clone_from(obstacles);
            }
        });
        let report = self.job.report();
        match &report.error {
            Some(error) => tracing::warn!(outcome = ?outcome, error, "migration ended"),
            None => {
                tracing::info!(
                    outcome = ?outcome,
                    total_ms = report.total_ms,
                    downtime_ms = report.downtime_ms,
                    "migration ended"
                );
            }
        }
        self.job.tell(JobEvent::Finished(Box::new(report)));
    }

    async fn negotiate(&self) -> Result<Negotiated, MigrationError> {
        // A container that isn't there is the likelier mistake, and costs nobody a connection.
        self.env.config.engine.runtime().state(&self.container).await.map_err(InspectError::from)?;
        let (peer, theirs) = Peer::connect(&self.env.identity, &self.address, self.env.capabilities.clone()).await?;
        let ours = &self.env.capabilities;
        self.job.note(|report| {
            for (side, host) in [("source", ours), ("destination", &theirs)] {
                report.versions.insert(format!("{side}-kernel"), host.kernel.clone());
                report.versions.insert(format!("{side}-agent"), host.agent.clone());
                let criu = host.criu.map_or_else(|| "none".to_owned(), |version| version.to_string());
                report.versions.insert(format!("{side}-criu"), criu);
            }
        });
        let obstacles = compare(ours, &theirs);
        if !obstacles.is_empty() {
            return Err(MigrationError::Refused(obstacles));
        }
        Ok(Negotiated { peer })
    }

    /// Something happened that decides whose the container is.
    async fn hand_over(&self, event: Event, why: &str) -> Result<(), JournalError> {
        // What there is to say goes over the session.
        self.custody.lock().await.on(event, why).await.map(drop)
    }

    /// The container is about to be held: what a killed agent has to know is written down first.
    async fn hold(&self, inspection: &Inspection, owes: bool) -> Result<(), JournalError> {
        let live = &inspection.live;
        let record = Record {
            container: self.container.clone(),
            cgroup: live.freezer.dir().to_owned(),
            to: self.address.host.clone(),
            epoch: self.epoch,
            phase: SourcePhase::Held,
            dir: self.dir.clone(),
            ports: live.ports.clone(),
            description: inspection.description.clone(),
            init: live.init,
            owes,
        };
        let mut custody = self.custody.lock().await;
        self.job.hold(record.cgroup.clone());
        custody.hands().held = Some((record, live.freezer.clone(), live.ports.clone()));
        custody.on(Event::Hold, "").await.map(drop)
    }

    /// To the destination, whatever becomes of the session.
    fn line(&self, peer: Option<Peer>) -> Line {
        Line {
            identity: self.env.identity.clone(),
            capabilities: self.env.capabilities.clone(),
            address: self.address.clone(),
            migration: self.migration.clone(),
            peer,
        }
    }
}
