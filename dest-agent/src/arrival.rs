//! One migration as the destination sees it: a state with its data, and one step for each message.
//!
//! ```text
//!  Offered ──Prepare──▶ Staged ──Arm──▶ Armed ──Restore──▶ Stopped ──Commit──▶ Running
//!     └──────────┴─────────┴──Abort, silence, a broken stream──▶ undone      (no way back)
//! ```

use std::collections::VecDeque;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use longhaul_common::config::DestConfig;
use longhaul_common::criu::keep_logs;
use longhaul_common::description::Description;
use longhaul_common::fault;
use longhaul_common::handover::destination::{Action, Destination, Event};
use longhaul_common::handover::{Answer, DestinationPhase, Epoch, Request};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::net::{Neighbour, Port};
use longhaul_common::tasks::TaskId;
use longhaul_common::tree::TreeError;
use longhaul_proto::peer::Restore;
use thiserror::Error;
use tokio::sync::Mutex;
use tracing::Instrument;

use crate::image_entries::EntriesError;
use crate::images::ImageError;
use crate::intake::Intake;
use crate::memory::common::{self, CommonError};
use crate::memory::owed;
use crate::memory::receive::{Memory, ReceiveError};
use crate::memory::store::PageStore;
use crate::one_file::OneFileError;
use crate::owing::settle;
use crate::pagemap::restore_from_images;
use crate::preflight::Findings;
use crate::record::{Record, fence, write_or_forget};
use crate::restore::{Armed, MemoryFrom, RestoreError};
use crate::staging::{Made, Staging, StagingError, clear_run, pages_path};
use crate::timerfd::rearm_expired;

/// A step that failed, or was not due.
#[derive(Debug, Error)]
pub enum ArrivalError {
    /// A message at the wrong time.
    #[error("{got} was sent while the migration was {state}; {expected} was due")]
    OutOfTurn {
        /// What came.
        got: &'static str,
        /// Where it stands.
        state: &'static str,
        /// What would have been right.
        expected: &'static str,
    },
    /// A tree that is not expected.
    #[error("the peer pushed tree {0}, which this migration does not have or does not need")]
    Tree(u32),
    /// A single file.
    #[error(transparent)]
    OneFile(#[from] OneFileError),
    /// A layer is not what it was said to be.
    #[error("a layer arrived with digest {got}, not {expected}")]
    Layer {
        /// What arrived.
        got: String,
        /// What was announced.
        expected: String,
    },
    /// The source is gone.
    #[error("{0}")]
    Lost(String),
    /// It was given up before.
    #[error("the migration is given up here, and its container can't be taken any more")]
    GivenUp,
    /// Images announced and arrived differ.
    #[error("{announced} images were announced for the restore, {arrived} arrived")]
    Images {
        /// Announced.
        announced: u64,
        /// Arrived.
        arrived: u64,
    },
    /// Staging.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A tree.
    #[error(transparent)]
    Apply(#[from] TreeError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The restore.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// An image that has to be changed.
    #[error(transparent)]
    Entries(#[from] EntriesError),
    /// What tasks share copy-on-write.
    #[error(transparent)]
    Common(#[from] CommonError),
    /// Its memory.
    #[error("the container's memory can't be taken")]
    Memory(#[from] ReceiveError),
    /// The network switch.
    #[error(transparent)]
    Net(#[from] longhaul_common::net::NetError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file.
    #[error("can't write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A step's duration, by name.
pub type Timings = Vec<(&'static str, std::time::Duration)>;

/// One migration.
pub struct Arrival {
    /// Its id.
    pub migration: String,
    /// Its epoch.
    pub epoch: Epoch,
    /// The container.
    pub container: Description,
    /// The names in the certificate of the source: no other host may push into it.
    pub peer: Vec<String>,
    config: Arc<DestConfig>,
    journal: Journal,
    memory_limit: u64,
    state: Mutex<Stage>,
    intake: Intake,
}

/// Where an arrival stands: what it has, and whose the container is.
struct Stage {
    state: State,
    machine: Destination,
}

enum State {
    Offered(Box<Staging>),
    Staged(Box<Staging>),
    Armed(Box<Staging>, Armed),
    Stopped(Box<Staging>, Armed),
    Running,
    Undone,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Offered(_) => "offered",
            Self::Staged(_) => "staged",
            Self::Armed(..) => "armed",
            Self::Stopped(..) => "restored and stopped",
            Self::Running => "committed",
            Self::Undone => "undone",
        }
    }

    /// What is restored and stopped must be as it was left.
    fn must_be_held(&self) -> Result<(), RestoreError> {
        if let Self::Stopped(_, armed) = self { armed.must_be_held() } else { Ok(()) }
    }
}

impl Arrival {
    /// An accepted offer.
    pub fn new(
        config: Arc<DestConfig>,
        journal: Journal,
        migration: String,
        epoch: Epoch,
        container: Description,
        findings: &Findings,
        peer: Vec<String>,
    ) -> Self {
        let staging = Staging::plan(&config.paths, &migration, &container, findings);
        let state = State::Offered(Box::new(staging));
        let state = Mutex::new(Stage { state, machine: Destination::new(epoch) });
        let memory_limit = findings.memory_limit;
        let intake = Intake::new(&config.paths);
        Self { migration, epoch, container, peer, config, journal, memory_limit, state, intake }
    }

    fn record_of(&self, phase: DestinationPhase, made: Made, ports: &[Port], task: Option<TaskId>) -> Record {
        let owing = phase == DestinationPhase::Committed && owed::any(&pages_path(&made));
        let (container, ports, peer) = (self.container.id.clone(), ports.to_vec(), self.peer.clone());
        Record { container, epoch: self.epoch, phase, made, ports, peer, owing, task }
    }

    fn record(
        &self,
        phase: DestinationPhase,
        made: Made,
        ports: &[Port],
        task: Option<TaskId>,
    ) -> Result<(), JournalError> {
        self.journal.write(&self.migration, &self.record_of(phase, made, ports, task))
    }

    /// Tells the machine of the hand-over, and does what it wants, in its order; what it has to say. A record that can't be
    /// written means that the event has not happened.
    async fn on(&self, stage: &mut Stage, event: Event) -> Result<(Option<Answer>, Timings), ArrivalError> {
        let mut said = None;
        let mut timings = Timings::new();
        let mut actions = VecDeque::from(stage.machine.on(event));
        while let Some(action) = actions.pop_front() {
            tracing::debug!(?action, "hand-over");
            fault::point(&format!("destination:{}", action.name()));
            match action {
                Action::Record(phase, _) => {
                    let start = Instant::now();
                    if let Err(error) = self.record_stage(phase, &stage.state) {
                        for action in stage.machine.on(Event::RecordFailed) {
                            match action {
                                Action::Undo => self.undo(&mut stage.state).await,
                                Action::Record(phase, _) => {
                                    if let Err(error) = self.record_stage(phase, &stage.state) {
                                        tracing::error!(%error, "can't record that the migration was undone");
                                    }
                                }
                                _ => {}
                            }
                        }
                        return Err(error.into());
                    }
                    timings.push(("journal", start.elapsed()));
                }
                Action::Undo => self.undo(&mut stage.state).await,
                Action::Resume => match stage.state.must_be_held() {
                    Ok(()) => timings.extend(self.resume(&mut stage.state).await?),
                    Err(error) => {
                        tracing::error!(%error, "the container can't be resumed; its source keeps it");
                        actions = stage.machine.on(Event::NotResumed).into();
                    }
                },
                Action::Fence => fence(&self.config, &self.migration, &self.journal).await,
                Action::Tell(answer) => said = Some(answer),
            }
        }
        Ok((said, timings))
    }

    fn record_stage(&self, phase: DestinationPhase, state: &State) -> Result<(), JournalError> {
        match (phase, state) {
            // First on record, then made: a killed agent finds what it has to take away.
            (DestinationPhase::Arriving, State::Offered(staging)) => {
                self.record(phase, staging.intent(&self.container), &[], None)
            }
            (DestinationPhase::Committed, State::Stopped(staging, armed)) => {
                self.record(phase, staging.made.clone(), staging.ports(), armed.task())
            }
            (DestinationPhase::Superseded, _) => {
                let Some(record) = self.journal.read::<Record>(&self.migration) else { return Ok(()) };
                self.journal.write(&self.migration, &Record { phase, ..record })
            }
            (DestinationPhase::Aborted, _) => {
                write_or_forget(&self.journal, &self.migration, &self.record_of(phase, Made::default(), &[], None))
            }
            _ => self.record(phase, Made::default(), &[], None),
        }
    }

    /// Makes everything that has to be there before the first byte.
    pub async fn prepare(&self) -> Result<(), ArrivalError> {
        let mut stage = self.state.lock().await;
        if !matches!(stage.state, State::Offered(..)) {
            return Err(out_of_turn("Prepare", "it once, after the offer", &stage.state));
        }
        self.on(&mut stage, Event::Prepare).await?;
        let State::Offered(mut staging) = std::mem::replace(&mut stage.state, State::Undone) else {
            return Err(ArrivalError::GivenUp);
        };
        // Of a busy disk: heartbeats must go on meanwhile.
        if let Err(error) = tokio::task::block_in_place(|| staging.prepare(&self.container, &self.config.bridges)) {
            staging.undo();
            return Err(error.into());
        }
        if let Err(error) =
            self.record(DestinationPhase::Arriving, staging.intent(&self.container), staging.ports(), None)
        {
            staging.undo();
            return Err(error.into());
        }
        let store = PageStore::create(&staging.pages(), self.memory_limit).map_err(ReceiveError::from);
        let memory = match store {
            Ok(store) => Memory::new(store),
            Err(error) => {
                staging.undo();
                return Err(error.into());
            }
        };
        self.intake.open(memory, staging.targets.clone(), staging.images());
        stage.state = State::Staged(staging);
        Ok(())
    }

    /// Finds what tasks share copy-on-write, and names it for CRIU; where that is, if there is any.
    async fn common(&self, staging: &Staging) -> Result<Option<PathBuf>, ArrivalError> {
        if !common::is_allowed() {
            return Ok(None);
        }
        let (memory, dir) = (self.intake.memory()?, staging.pages());
        let found = tokio::task::spawn_blocking(move || {
            let runs = memory.find_common()?;
            tracing::debug!(pages = runs.iter().map(|run| run.count).sum::<u64>(), "shared copy-on-write");
            if runs.is_empty() {
                return Ok(None);
            }
            let written = common::write_table(&dir, &runs);
            written.map(|()| Some(dir.clone())).map_err(|source| ArrivalError::File { path: dir, source })
        });
        found.await.map_err(|_| ArrivalError::GivenUp)?
    }

    /// Starts the runtime's restore, which waits.
    pub async fn arm(
        &self,
        descriptors: &[u8],
        neighbours: &[Neighbour],
        from: MemoryFrom,
    ) -> Result<(), ArrivalError> {
        let mut stage = self.state.lock().await;
        let State::Staged(mut staging) = take(&mut stage.state, |state| matches!(state, State::Staged(..))) else {
            return Err(out_of_turn("Arm", "it once, after Prepare", &stage.state));
        };
        let path = staging.images().join("descriptors.json");
        let armed = async {
            std::fs::write(&path, descriptors).map_err(|source| ArrivalError::File { path: path.clone(), source })?;
            staging.mount_placeholder(&self.container)?;
            if let Some(network) = &staging.network {
                network.learn(neighbours)?;
            }
            let common = if from == MemoryFrom::Images { None } else { self.common(&staging).await? };
            Ok(Armed::start(&self.config.engine, &self.container, &staging, from, common.as_deref()).await?)
        };
        match armed.await {
            Ok(armed) => {
                stage.state = State::Armed(staging, armed);
                Ok(())
            }
            Err(error) => {
                staging.undo();
                Err(error)
            }
        }
    }

    /// Restores the container, stopped and silent. All trees, images and, if so announced, all memory must have arrived. Returns
    /// also how many pages lie in the store. It is given up when `lost` ends: a task may wait for a page that the source owes, and that
    /// will not come.
    pub async fn restore(
        &self,
        announced: &Restore,
        lost: impl Future<Output = String>,
    ) -> Result<(Timings, u64), ArrivalError> {
        let mut stage = self.state.lock().await;
        let State::Armed(mut staging, mut armed) = take(&mut stage.state, |state| matches!(state, State::Armed(..)))
        else {
            return Err(out_of_turn("Restore", "it once, after Arm", &stage.state));
        };
        let (arrived, memory) = self.intake.close();
        let mut timings = Timings::new();
        let mut stored = 0;
        let restored = async {
            if arrived != Some(announced.image_files) {
                let (announced, arrived) = (announced.image_files, arrived.unwrap_or(0));
                return Err(ArrivalError::Images { announced, arrived });
            }
            let mut shared = None;
            if announced.pages {
                restore_from_images(&staging.images())?;
                let memory = memory.ok_or(ReceiveError::NotDue)?;
                let arrived = memory.finish()?;
                stored = arrived.pages;
                if let Some(not_common) = &arrived.not_common {
                    tokio::task::block_in_place(|| common::write_tasks(&staging.images(), not_common))?;
                }
                shared = Some(memory.hand_out(&staging.images())?);
            }
            let start = Instant::now();
            staging.mount_root(&self.container)?;
            timings.push(("mount", start.elapsed()));
            let rearmed = rearm_expired(&staging.images())?;
            tracing::debug!(rearmed, "periodic timers had expired during the move");
            let start = Instant::now();
            tokio::select! {
                biased;
                restored = armed.restore() => restored?,
                reason = lost => return Err(ArrivalError::Lost(reason)),
            }
            if let Some(shared) = &shared {
                shared.must_have_given(&announced.shared).map_err(ReceiveError::from)?;
            }
            timings.push(("criu-restore", start.elapsed()));
            Ok(())
        };
        match restored.await {
            Ok(()) => {
                stage.state = State::Stopped(staging, armed);
                fault::point("destination:restored");
                self.on(&mut stage, Event::Restored).await?;
                Ok((timings, stored))
            }
            Err(error) => {
                // Taken away below; the migration's end writes down that it is.
                armed.kill().await;
                match keep_logs(&staging.work(), &self.config.paths.state, &self.migration) {
                    Ok(kept) => tracing::warn!(logs = %kept.display(), "the restore failed; its logs are kept"),
                    Err(error) => tracing::warn!(%error, "can't keep the logs of the failed restore"),
                }
                self.clean(staging).await;
                Err(error)
            }
        }
    }

    /// Takes the container over: from here it runs here, and nowhere else.
    pub async fn commit(&self, epoch: Epoch) -> Result<Timings, ArrivalError> {
        let mut stage = self.state.lock().await;
        if !matches!(stage.state, State::Stopped(..) | State::Running) {
            return Err(out_of_turn("Commit", "it once, after Restore", &stage.state));
        }
        // Found now, nothing has to be taken back.
        stage.state.must_be_held()?;
        match self.on(&mut stage, Event::Heard(Request::Commit(epoch))).await? {
            (Some(Answer::Committed(_)), timings) => Ok(timings),
            _ => Err(ArrivalError::GivenUp),
        }
    }

    /// Lets the container run. This host owns it: nothing here unwinds.
    async fn resume(&self, state: &mut State) -> Result<Timings, ArrivalError> {
        let State::Stopped(staging, mut armed) = take(state, |state| matches!(state, State::Stopped(..))) else {
            return Ok(Timings::new());
        };
        *state = State::Running;
        let mut timings = Timings::new();
        let start = Instant::now();
        if let Some(network) = &staging.network {
            for port in &network.ports {
                if let Err(error) = port.join() {
                    tracing::error!(%error, port = port.name, "the container is here, but its port is not on its bridge: add it by hand");
                }
            }
        }
        timings.push(("network", start.elapsed()));
        let start = Instant::now();
        let resumed = armed.resume().await;
        timings.push(("resume", start.elapsed()));
        if let Some(network) = &staging.network {
            network.announcer.announce();
        }
        match resumed {
            // Whatever CRIU or its hold came to after that: it runs.
            Err(error) if armed.runs() => {
                tracing::error!(%error, "the container runs, but its restore did not end well");
            }
            resumed => resumed?,
        }
        let container = self.container.clone();
        let (journal, migration) = (self.journal.clone(), self.migration.clone());
        let span = tracing::Span::current();
        let rest = async move {
            let filler = armed.finish().await;
            let made = staging.made.clone();
            let _ = tokio::task::spawn_blocking(move || staging.settle(&container)).await;
            if let Some(mut filler) = filler {
                match filler.filled().await {
                    Ok(()) => {
                        tracing::info!(ms = start.elapsed().as_millis(), "all memory is in place");
                        settle(&journal, &migration);
                    }
                    // Its store is all there is of the container's memory: nothing of it is removed.
                    Err(error) => return tracing::error!(%error, "the container's memory is not complete"),
                }
            }
            let _ = tokio::task::spawn_blocking(move || clear_run(&made)).await;
        };
        tokio::spawn(rest.instrument(span));
        Ok(timings)
    }

    /// Takes everything away, unless the container is this host's.
    pub async fn abort(&self, reason: &str) {
        let mut stage = self.state.lock().await;
        self.intake.close();
        // Nothing was made yet, and nothing has to be known of it.
        if matches!(stage.state, State::Offered(_)) {
            stage.state = State::Undone;
            return;
        }
        tracing::info!(reason, state = stage.state.name(), "the migration ends here");
        if let Err(error) = self.on(&mut stage, Event::Lost).await {
            tracing::error!(%error, "can't record that the migration was undone");
        }
    }

    /// What became of it, for a source that asks, or that an operator decided for.
    pub async fn decide(&self, request: Request) -> Result<Option<Answer>, ArrivalError> {
        let mut stage = self.state.lock().await;
        self.intake.close();
        Ok(self.on(&mut stage, Event::Heard(request)).await?.0)
    }

    async fn undo(&self, state: &mut State) {
        match std::mem::replace(state, State::Undone) {
            State::Running | State::Undone | State::Offered(_) => {}
            // The runtime has not heard of it.
            State::Staged(staging) => drop(tokio::task::spawn_blocking(move || staging.undo()).await),
            State::Armed(staging, armed) | State::Stopped(staging, armed) => {
                armed.kill().await;
                self.clean(staging).await;
            }
        }
    }

    async fn clean(&self, staging: Box<Staging>) {
        let runtime = self.config.engine.runtime();
        if let Err(error) = runtime.delete(&self.container.id).await {
            tracing::debug!(%error, "the runtime had nothing to delete");
        }
        let _ = tokio::task::spawn_blocking(move || staging.undo()).await;
    }

    /// What is pushed for it.
    pub fn intake(&self) -> &Intake {
        &self.intake
    }

    /// Bytes set aside for memory that have not arrived yet.
    pub fn outstanding_bytes(&self) -> u64 {
        self.container.memory_bytes.saturating_sub(self.intake.stored_bytes())
    }
}

/// Takes the state out if it is the one a message is due in; otherwise it stays.
fn take(state: &mut State, due: fn(&State) -> bool) -> State {
    if due(state) { std::mem::replace(state, State::Undone) } else { State::Undone }
}

fn out_of_turn(got: &'static str, expected: &'static str, state: &State) -> ArrivalError {
    ArrivalError::OutOfTurn { got, state: state.name(), expected }
}
