//! The journey of one migration. The order of phases is known here alone.
//!
//! Every phase takes what the one before it made, so none can be left out or repeated. What has to be undone
//! after a failure lies in one [`Rollback`], which outlives the phases. After [`Restored::commit`] nothing is undone.

mod quiesce;
mod rollback;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::CgroupError;
use longhaul_common::config::SourceConfig;
use longhaul_common::criu::keep_logs;
use longhaul_common::description::Network;
use longhaul_common::host::{Capabilities, compare};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::layers::LayerDigests;
use longhaul_common::net::{Netns, neighbours};
use longhaul_common::obstacle::Obstacle;
use longhaul_common::tls::{Identity, PeerAddress};
use longhaul_proto::peer::{Offer, Outcome as PeerOutcome};
use thiserror::Error;
use tokio::sync::{Mutex, mpsc};
use tracing::Instrument;

use crate::checkpoint::{Armed, CheckpointError, Externals, images_dir, work_dir};
use crate::images::{ImageError, ImageSender, Sent};
use crate::inspect::{InspectError, Inspection, inspect};
use crate::jobs::{Job, JobEvent};
use crate::options::Options;
use crate::peer::{Peer, PeerError, Session, Timings};
use crate::push::{Pass, PushError, Round, Trees};
use crate::record::{self, Record, RecordPhase};
use crate::report::{Outcome, millis};
use crate::retire::retire;
use quiesce::quiesce;
use rollback::Rollback;

/// Live passes over the files stop when one has sent no more than this, in bytes: what is left fits into a few ms.
const SETTLED_BYTES: u64 = 256 << 10;
/// The most live passes: a container that writes faster than the link would be followed for ever.
const MAX_LIVE_PASSES: u32 = 6;
/// How often a destination that owes an answer is asked.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How long the command waits for an outcome that is in doubt. The agent goes on asking.
const DOUBT_SHOWN_AFTER: Duration = Duration::from_secs(10);
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
    let trip = Trip {
        dir: env.config.paths.run.join("source").join(&report.migration),
        migration: report.migration,
        container: report.container,
        rollback: Arc::new(Mutex::new(Rollback::default())),
        env,
        job,
        address,
        options,
        epoch: 1,
    };
    async move {
        let result = trip.journey().await;
        trip.conclude(result).await;
    }
    .instrument(span)
    .await;
}

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

/// What all phases of one migration share.
struct Trip {
    env: Arc<Env>,
    job: Arc<Job>,
    migration: String,
    container: String,
    address: PeerAddress,
    options: Options,
    epoch: u64,
    dir: PathBuf,
    rollback: Arc<Mutex<Rollback>>,
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
        // Rounds of memory come here, between the files and the freeze.
        let armed = self.phase("arm", synced.arm(self)).await?;
        // A freeze is not interrupted half-way: a cancellation waits the few milliseconds for it.
        let frozen = self.last_phase("freeze", armed.freeze(self)).await?;
        let saved = self.phase("final-state", frozen.save(self)).await?;
        let restored = self.phase("restore", saved.restore(self)).await?;
        // ---- the point of no return: from here the container is not this host's to thaw ----
        let committed = self.last_phase("commit", restored.commit(self)).await?;
        self.last_phase("after", committed.retire(self)).await?;
        Ok(Outcome::Moved)
    }

    /// A phase that can be cancelled.
    async fn phase<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, MigrationError>>,
    ) -> Result<T, MigrationError> {
        let limit = self.options.timeout;
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
        let start = Instant::now();
        let done = work.instrument(tracing::info_span!("phase", name)).await;
        let took = start.elapsed();
        tracing::info!(phase = name, ms = millis(took), ok = done.is_ok(), "phase ended");
        self.job.note(|report| {
            report.phases.insert(name.to_owned(), millis(took));
        });
        done
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
            Err(MigrationError::InDoubt) => Outcome::InDoubt,
            Err(MigrationError::Refused(_)) => Outcome::Refused,
            Err(MigrationError::Cancelled) => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        if !matches!(outcome, Outcome::Moved | Outcome::InDoubt) {
            let reason = result.as_ref().err().map_or_else(|| "it was only a dry run".to_owned(), ToString::to_string);
            self.rollback.lock().await.undo(&reason).await;
            self.env.journal.remove(&self.migration);
        }
        let mut error = result.as_ref().err().map(|error| longhaul_common::chain(error));
        if let (Outcome::Failed, Some(error)) = (outcome, &mut error)
            && work_dir(&self.dir).is_dir()
            && let Ok(kept) = keep_logs(&work_dir(&self.dir), &self.env.config.paths.state, &self.migration)
        {
            error.push_str(&format!(" (logs: {})", kept.display()));
        }
        if outcome != Outcome::InDoubt {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
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

    fn record(&self, inspection: &Inspection, phase: RecordPhase) -> Result<(), JournalError> {
        let ports = &inspection.live.ports;
        let record = Record {
            container: self.container.clone(),
            cgroup: inspection.live.freezer.dir().to_owned(),
            to: self.address.host.clone(),
            epoch: self.epoch,
            phase,
            dir: self.dir.clone(),
            ports: ports.iter().map(|port| (port.name.clone(), port.index, port.bridge.clone())).collect(),
            description: inspection.description.clone(),
        };
        self.env.journal.write(&self.migration, &record)
    }
}

/// Both sides fit together.
struct Negotiated {
    peer: Peer,
}

impl Negotiated {
    async fn preflight(self, trip: &Trip) -> Result<Accepted, MigrationError> {
        let hint = "looking at the container; a layer that was never seen is read whole";
        trip.progress("preflight", hint.to_owned(), 0, 0);
        let inspection = inspect(&trip.env.config, &trip.env.digests, &trip.container, &trip.options).await?;
        trip.job.note(|report| report.memory_bytes = inspection.description.memory_bytes);
        let session = Arc::new(self.peer.session().await?);
        trip.rollback.lock().await.session = Some(session.clone());
        let own = !inspection.obstacles.is_empty();
        let offer = Offer {
            migration_id: trip.migration.clone(),
            epoch: trip.epoch,
            description: inspection.description.to_json().into(),
            // With obstacles of our own the answer is only for the list.
            dry_run: trip.options.dry_run || own,
        };
        let verdict = session.offer(offer).await?;
        let obstacles: Vec<Obstacle> = inspection.obstacles.iter().cloned().chain(verdict.obstacles).collect();
        if !obstacles.is_empty() {
            return Err(MigrationError::Refused(obstacles));
        }
        Ok(Accepted { peer: self.peer, session, inspection, missing_layers: verdict.missing_layers })
    }
}

/// Both sides have looked at the container, and nothing is in the way.
struct Accepted {
    peer: Peer,
    session: Arc<Session>,
    inspection: Inspection,
    missing_layers: Vec<String>,
}

impl Accepted {
    async fn prepare(self, trip: &Trip) -> Result<Prepared, MigrationError> {
        self.session.prepare().await?;
        std::fs::create_dir_all(images_dir(&trip.dir))
            .map_err(|source| InspectError::File { path: trip.dir.clone(), source })?;
        let trees = Trees::new(&self.inspection.description, &self.missing_layers).map_err(PushError::from)?;
        Ok(Prepared { peer: self.peer, session: self.session, inspection: self.inspection, trees })
    }
}

/// The destination has made the container's place.
struct Prepared {
    peer: Peer,
    session: Arc<Session>,
    inspection: Inspection,
    trees: Trees,
}

impl Prepared {
    async fn presync(mut self, trip: &Trip) -> Result<Synced, MigrationError> {
        for _ in 0..MAX_LIVE_PASSES {
            let round = self.trees.push(&self.peer, &trip.migration, Pass::Live).await?;
            let what = format!("pass {}: {} items", self.trees.passes(), round.items);
            trip.progress("rootfs-presync", what, round.bytes, 0);
            trip.job.note(|report| report.bytes_on_wire += round.bytes);
            if round.bytes <= SETTLED_BYTES {
                break;
            }
        }
        Ok(Synced(self))
    }
}

/// The destination has the files as they were a moment ago.
struct Synced(Prepared);

impl Synced {
    /// Starts both runtimes, which wait: their start-up costs no downtime.
    async fn arm(self, trip: &Trip) -> Result<Ready, MigrationError> {
        let Self(prepared) = self;
        let live = &prepared.inspection.live;
        let mut keys: Vec<String> = live.netns_key.iter().cloned().collect();
        keys.extend(prepared.inspection.description.stdio.iter().filter_map(|stdio| match &stdio.target {
            longhaul_common::description::StdioTarget::File { key, .. } => Some(key.clone()),
            longhaul_common::description::StdioTarget::Pipe { .. } => None,
        }));
        let externals = Externals {
            keys,
            // With every interface's other end in our hands, or no interface at all.
            own_network_lock: matches!(prepared.inspection.description.network, Network::Own { .. }),
            single_cgroup: prepared.inspection.description.single_cgroup,
        };
        // First on record: what is started now outlives an agent that is killed.
        trip.record(&prepared.inspection, RecordPhase::Held)?;
        let armed = Armed::start(&trip.env.config.engine, &trip.container, &trip.dir, &externals).await?;
        let descriptors = armed.descriptors();
        trip.rollback.lock().await.checkpoint = Some(armed);
        let neighbours = Netns::of_task(live.init).and_then(|netns| neighbours(&netns)).map_err(InspectError::from)?;
        prepared.session.arm(descriptors?, neighbours).await?;
        Ok(Ready(prepared))
    }
}

/// Both runtimes wait for their word.
struct Ready(Prepared);

impl Ready {
    async fn freeze(self, trip: &Trip) -> Result<Frozen, MigrationError> {
        let Self(prepared) = self;
        let at = Instant::now();
        let mut rollback = trip.rollback.lock().await;
        let live = &prepared.inspection.live;
        let (freezer, ports, init) = (live.freezer.clone(), live.ports.clone(), live.init);
        rollback.freezer = Some(freezer.clone());
        rollback.ports.clone_from(&ports);
        drop(rollback);
        tokio::task::spawn_blocking(move || quiesce(&freezer, &ports, init))
            .await
            .map_err(|_| MigrationError::Panicked)??;
        trip.step("freeze", at.elapsed());
        Ok(Frozen { prepared, at })
    }
}

/// Nothing in the container runs.
struct Frozen {
    prepared: Prepared,
    at: Instant,
}

impl Frozen {
    /// CRIU's dump, its images, and the last change of the files: all at once.
    async fn save(mut self, trip: &Trip) -> Result<Saved, MigrationError> {
        let Prepared { peer, inspection, trees, .. } = &mut self.prepared;
        let finish = Arc::new(AtomicBool::new(false));
        let (messages, receiver) = mpsc::channel(IMAGE_QUEUE);
        let (dir, migration, flag) = (images_dir(&trip.dir), trip.migration.clone(), finish.clone());
        // Also when this is cut short: the sending thread must not wait for images for ever.
        let _finish_at_the_end = FinishOnDrop(finish.clone());
        let sender = tokio::task::spawn_blocking(move || ImageSender::new(&dir, &migration, messages, flag)?.run());
        let start = Instant::now();
        let dump = async {
            let dumped = dump(trip, &inspection.live.ports).await;
            trip.step("criu-dump", start.elapsed());
            finish.store(true, Ordering::Release);
            dumped
        };
        let images = async {
            let pushed = peer.push_images(receiver).await;
            let sent = sender.await.map_err(|_| MigrationError::Panicked)?;
            // The destination's reason comes first: the sender only saw its channel close.
            pushed?;
            trip.step("images", start.elapsed());
            Ok::<Sent, MigrationError>(sent?)
        };
        let files = async {
            let round = trees.push(peer, &trip.migration, Pass::Last).await;
            trip.step("rootfs-delta", start.elapsed());
            Ok::<Round, MigrationError>(round?)
        };
        // The first failure ends all three: with a destination that is gone, the container must not stay frozen for the rest.
        let ((), sent, mut round) = tokio::try_join!(dump, images, files)?;
        if made_links(&trip.dir) {
            // CRIU linked unlinked files back into the tree for the restore: they have to be there, too.
            let links = trees.push(peer, &trip.migration, Pass::Last).await?;
            round.bytes += links.bytes;
        }
        trip.job.note(|report| {
            report.bytes_on_wire += sent.bytes + round.bytes;
            report.rootfs_passes = trees.passes();
        });
        Ok(Saved { frozen: self, sent })
    }
}

/// Tells the thread that sends images that no more will come.
struct FinishOnDrop(Arc<AtomicBool>);

impl Drop for FinishOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// CRIU's dump; at its word the container is cut off the network.
async fn dump(trip: &Trip, ports: &[longhaul_common::net::Port]) -> Result<(), MigrationError> {
    let mut rollback = trip.rollback.lock().await;
    rollback.ports = ports.to_vec();
    let Some(checkpoint) = rollback.checkpoint.as_mut() else {
        return Err(CheckpointError::Runtime("its process is gone".to_owned()).into());
    };
    let cut_off = || {
        ports
            .iter()
            .try_for_each(longhaul_common::net::Port::part)
            .map_err(|error| CheckpointError::Criu(longhaul_common::chain(&error)))
    };
    Ok(checkpoint.save(cut_off).await?)
}

/// Whether CRIU made `link_remap.*` files: it then says so in an image that is more than its 8 bytes of magic numbers.
fn made_links(dir: &std::path::Path) -> bool {
    let image = images_dir(dir).join("remap-fpath.img");
    image.metadata().is_ok_and(|metadata| metadata.len() > 8)
}

/// Everything of the container is at the destination.
struct Saved {
    frozen: Frozen,
    sent: Sent,
}

impl Saved {
    async fn restore(self, trip: &Trip) -> Result<Restored, MigrationError> {
        let start = Instant::now();
        let timings = self.frozen.prepared.session.restore(self.sent.files, self.sent.bytes).await?;
        trip.step("restore", start.elapsed());
        note_timings(trip, timings);
        Ok(Restored { frozen: self.frozen })
    }
}

/// The container exists twice: frozen here, and stopped there.
struct Restored {
    frozen: Frozen,
}

impl Restored {
    /// Gives the container away. Cancelled or not, it goes on until the destination has answered.
    async fn commit(self, trip: &Trip) -> Result<Committed, MigrationError> {
        if trip.job.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let Frozen { prepared, at } = self.frozen;
        let start = Instant::now();
        // CRIU thawed the cgroup to reach the tasks, and holds them. Frozen again, they stay even if CRIU is killed.
        prepared.inspection.live.freezer.freeze_without_waiting()?;
        trip.record(&prepared.inspection, RecordPhase::Committing)?;
        trip.step("journal", start.elapsed());

        let start = Instant::now();
        let answer = prepared.session.commit(trip.epoch).await;
        let timings = match answer {
            Ok(timings) => timings,
            Err(PeerError::Failed { host, message }) if !in_doubt(trip, &prepared).await? => {
                return Err(PeerError::Failed { host, message }.into());
            }
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
        Ok(Committed { prepared })
    }
}

/// Whether a destination that said it failed has committed all the same: its journal has the last word.
async fn in_doubt(trip: &Trip, prepared: &Prepared) -> Result<bool, MigrationError> {
    Ok(settle(trip, prepared).await == PeerOutcome::Committed)
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

fn note_timings(trip: &Trip, timings: Timings) {
    for (name, micros) in timings {
        trip.step(&format!("destination.{name}"), Duration::from_micros(micros));
    }
}

/// The container runs at the destination.
struct Committed {
    prepared: Prepared,
}

impl Committed {
    async fn retire(self, trip: &Trip) -> Result<(), MigrationError> {
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
