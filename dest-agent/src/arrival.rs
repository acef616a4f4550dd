//! One migration as the destination sees it: a state with its data, and one step for each message.
//!
//! ```text
//!  Offered ──Prepare──▶ Staged ──Arm──▶ Armed ──Restore──▶ Stopped ──Commit──▶ Running
//!     └──────────┴─────────┴──Abort, silence, a broken stream──▶ undone      (no way back)
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use longhaul_common::cgroup::Freezer;
use longhaul_common::config::DestConfig;
use longhaul_common::criu::hold::{HoldEvent, HoldListener};
use longhaul_common::criu::keep_logs;
use longhaul_common::description::Description;
use longhaul_common::fault;
use longhaul_common::handover::destination::{Action, Destination, Event, State as Custody};
use longhaul_common::handover::{Answer, DestinationPhase, Epoch, Request};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::layers::LayerDigests;
use longhaul_common::leftovers::{end_restore, is_filling};
use longhaul_common::net::{Neighbour, Port};
use longhaul_common::tree::{TreeError, TreeItem, Writer};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::Mutex;
use tracing::Instrument;

use crate::image_entries::EntriesError;
use crate::images::{ImageError, ImageWriter};
use crate::memory::receive::{Memory, ReceiveError};
use crate::memory::store::PageStore;
use crate::one_file::{OneFile, OneFileError};
use crate::pagemap::restore_from_images;
use crate::preflight::Findings;
use crate::restore::{Armed, MemoryFrom, RestoreError, hold_socket};
use crate::staging::{Made, Staging, StagingError, Target, clear_run, layer_store, settle_run, undo};
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

/// What the journal holds of a migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// The container.
    pub container: String,
    /// The migration's epoch.
    pub epoch: Epoch,
    /// How far it is.
    pub phase: DestinationPhase,
    /// What was made for it.
    pub made: Made,
    /// The host's ends of its interfaces: name, index, bridge. Of a committed one, to be put on their bridges.
    #[serde(default)]
    pub ports: Vec<(String, u32, String)>,
}

/// How long the end of a migration is remembered: a source in doubt asks within minutes, or its host was down for days.
const REMEMBERED: std::time::Duration = std::time::Duration::from_secs(30 * 24 * 3600);

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
    writers: std::sync::Mutex<Writers>,
}

#[derive(Default)]
struct Writers {
    open: bool,
    trees: HashMap<u32, TreeWriter>,
    targets: Vec<Option<Target>>,
    images_dir: PathBuf,
    images_arrived: Option<u64>,
    memory: Option<Arc<Memory>>,
}

/// Writes what is pushed: a tree, or a file in place.
enum TreeWriter {
    Tree(Box<Writer>),
    File(OneFile),
}

impl TreeWriter {
    fn open(target: &Target) -> Result<Self, TreeError> {
        Ok(match &target.only {
            Some(name) => Self::File(OneFile::new(&target.root, name)),
            None => Self::Tree(Box::new(Writer::open(&target.root, target.kind)?)),
        })
    }

    fn apply(&mut self, item: TreeItem) -> Result<(), ArrivalError> {
        match self {
            Self::Tree(writer) => Ok(writer.apply(item)?),
            Self::File(file) => Ok(file.apply(item)?),
        }
    }

    fn finish(&mut self) -> Result<(), ArrivalError> {
        match self {
            Self::Tree(writer) => Ok(writer.finish()?),
            Self::File(file) => Ok(file.finish()?),
        }
    }
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
        let writers = std::sync::Mutex::default();
        Self { migration, epoch, container, peer, config, journal, memory_limit, state, writers }
    }

    fn record(&self, phase: DestinationPhase, made: Made, ports: &[Port]) -> Result<(), JournalError> {
        let ports = ports.iter().map(|port| (port.name.clone(), port.index, port.bridge.clone())).collect();
        let record = Record { container: self.container.id.clone(), epoch: self.epoch, phase, made, ports };
        self.journal.write(&self.migration, &record)
    }

    /// Tells the machine of the hand-over, and does what it wants, in its order; what it has to say. A record that can't be
    /// written means that the event has not happened.
    async fn on(&self, stage: &mut Stage, event: Event) -> Result<(Option<Answer>, Timings), ArrivalError> {
        let mut said = None;
        let mut timings = Timings::new();
        for action in stage.machine.on(event) {
            tracing::debug!(?action, "hand-over");
            fault::point(&format!("destination:{}", action.name()));
            match action {
                Action::Record(phase, _) => {
                    let start = Instant::now();
                    if let Err(error) = self.record_stage(phase, &stage.state) {
                        for action in stage.machine.on(Event::RecordFailed) {
                            // That it is given up may not be written down either: a restart finds it arriving, and undoes it.
                            if let Action::Undo = action {
                                self.undo(&mut stage.state).await;
                            }
                        }
                        return Err(error.into());
                    }
                    timings.push(("journal", start.elapsed()));
                }
                Action::Undo => self.undo(&mut stage.state).await,
                Action::Resume => timings.extend(self.resume(&mut stage.state).await?),
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
                self.record(phase, staging.intent(&self.container), &[])
            }
            (DestinationPhase::Committed, State::Stopped(staging, _)) => {
                let ports = staging.network.as_ref().map(|network| network.ports.as_slice()).unwrap_or_default();
                self.record(phase, staging.made.clone(), ports)
            }
            (DestinationPhase::Superseded, _) => {
                let Some(record) = self.journal.read::<Record>(&self.migration) else { return Ok(()) };
                self.journal.write(&self.migration, &Record { phase, ..record })
            }
            _ => self.record(phase, Made::default(), &[]),
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
        if let Err(error) = staging.prepare(&self.container, &self.config.bridges) {
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
        if let Ok(mut writers) = self.writers.lock() {
            writers.open = true;
            writers.memory = Some(memory);
            writers.targets.clone_from(&staging.targets);
            writers.images_dir = staging.images();
        }
        stage.state = State::Staged(staging);
        Ok(())
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
            Ok(Armed::start(&self.config.engine, &self.container, &staging, from).await?)
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

    /// Restores the container, stopped and silent. All trees, images and, if `pages`, all memory must have arrived. Returns
    /// also how many pages lie in the store.
    pub async fn restore(&self, announced: u64, pages: bool) -> Result<(Timings, u64), ArrivalError> {
        let mut stage = self.state.lock().await;
        let State::Armed(mut staging, mut armed) = take(&mut stage.state, |state| matches!(state, State::Armed(..)))
        else {
            return Err(out_of_turn("Restore", "it once, after Arm", &stage.state));
        };
        let (arrived, memory) = self.close_writers();
        let mut timings = Timings::new();
        let mut stored = 0;
        let restored = async {
            if arrived != Some(announced) {
                return Err(ArrivalError::Images { announced, arrived: arrived.unwrap_or(0) });
            }
            if pages {
                restore_from_images(&staging.images())?;
                let memory = memory.ok_or(ReceiveError::NotDue)?;
                stored = memory.finish()?;
            }
            let start = Instant::now();
            staging.mount_root(&self.container)?;
            timings.push(("mount", start.elapsed()));
            let rearmed = rearm_expired(&staging.images())?;
            tracing::debug!(rearmed, "periodic timers had expired during the move");
            let start = Instant::now();
            armed.restore().await?;
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
        resumed?;
        let container = self.container.clone();
        let span = tracing::Span::current();
        let rest = async move {
            let filler = armed.finish().await;
            let made = staging.made.clone();
            let _ = tokio::task::spawn_blocking(move || staging.settle(&container)).await;
            if let Some(mut filler) = filler {
                match filler.filled().await {
                    Ok(()) => tracing::info!(ms = start.elapsed().as_millis(), "all memory is in place"),
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
        self.close_writers();
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
        self.close_writers();
        Ok(self.on(&mut stage, Event::Heard(request)).await?.0)
    }

    async fn undo(&self, state: &mut State) {
        match std::mem::replace(state, State::Undone) {
            State::Running | State::Undone | State::Offered(_) => {}
            State::Staged(staging) => self.clean(staging).await,
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

    /// Whether the container runs here.
    pub async fn is_committed(&self) -> bool {
        self.state.lock().await.machine.state() == Custody::Committed
    }

    /// Where a tree goes; an error if it is not to be pushed now.
    fn writer(&self, tree: u32) -> Result<(TreeWriter, Target), ArrivalError> {
        let mut writers = self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !writers.open {
            return Err(ArrivalError::OutOfTurn { got: "a tree", state: "not taking files", expected: "Prepare" });
        }
        let target = writers.targets.get(tree as usize).cloned().flatten().ok_or(ArrivalError::Tree(tree))?;
        let writer = match writers.trees.remove(&tree) {
            Some(writer) => writer,
            None => TreeWriter::open(&target)?,
        };
        Ok((writer, target))
    }

    /// One pass over one tree, for a blocking thread. The items and bytes that were applied.
    pub fn apply_pass(
        &self,
        tree: u32,
        items: impl Iterator<Item = Result<TreeItem, ArrivalError>>,
    ) -> Result<(u64, u64), ArrivalError> {
        let (mut writer, target) = self.writer(tree)?;
        let (mut count, mut bytes) = (0, 0);
        for item in items {
            let item = item?;
            if let TreeItem::Data { bytes: data, .. } = &item {
                bytes += data.len() as u64;
            }
            count += 1;
            writer.apply(item)?;
        }
        writer.finish()?;
        if let Some(expected) = &target.digest {
            self.store_layer(&target, expected)?;
            return Ok((count, bytes));
        }
        let mut writers = self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        writers.trees.insert(tree, writer);
        Ok((count, bytes))
    }

    fn store_layer(&self, target: &Target, expected: &str) -> Result<(), ArrivalError> {
        let got = LayerDigests::open(&self.config.paths.state).digest(&target.root)?;
        if got != expected {
            return Err(ArrivalError::Layer { got, expected: expected.to_owned() });
        }
        let place = layer_store(&self.config.paths).join(expected);
        match std::fs::rename(&target.root, &place) {
            Ok(()) => Ok(()),
            // Another arrival brought the same layer meanwhile.
            Err(_) if place.is_dir() => Ok(()),
            Err(source) => Err(ArrivalError::File { path: place, source }),
        }
    }

    /// The writer of CRIU's images.
    pub fn image_writer(&self) -> Result<ImageWriter, ArrivalError> {
        let writers = self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !writers.open || writers.images_arrived.is_some() {
            return Err(ArrivalError::OutOfTurn { got: "images", state: "not taking them", expected: "Prepare" });
        }
        Ok(ImageWriter::new(&writers.images_dir))
    }

    /// All images are here.
    pub fn images_arrived(&self, count: u64) {
        let mut writers = self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        writers.images_arrived = Some(count);
    }

    /// Where pages go.
    pub fn memory(&self) -> Result<Arc<Memory>, ArrivalError> {
        let writers = self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        writers.memory.clone().filter(|_| writers.open).ok_or(ReceiveError::NotDue.into())
    }

    /// Bytes set aside for memory that have not arrived yet.
    pub fn outstanding_bytes(&self) -> u64 {
        let writers = self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let stored = writers.memory.as_ref().map_or(0, |memory| memory.stored_bytes());
        self.container.memory_bytes.saturating_sub(stored)
    }

    /// Nothing more may be pushed; how many images have arrived, and the memory.
    fn close_writers(&self) -> (Option<u64>, Option<Arc<Memory>>) {
        let mut writers = self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        writers.open = false;
        writers.trees.clear();
        if let Some(memory) = &writers.memory {
            memory.close();
        }
        (writers.images_arrived, writers.memory.take())
    }
}

/// Takes the state out if it is the one a message is due in; otherwise it stays.
fn take(state: &mut State, due: fn(&State) -> bool) -> State {
    if due(state) { std::mem::replace(state, State::Undone) } else { State::Undone }
}

fn out_of_turn(got: &'static str, expected: &'static str, state: &State) -> ArrivalError {
    ArrivalError::OutOfTurn { got, state: state.name(), expected }
}

/// Goes on with a commit that was cut off: the container is this host's, and CRIU may still hold it before its first
/// instruction.
async fn resume_committed(migration: &str, record: &Record) {
    if !record.made.run.exists() {
        return;
    }
    match HoldListener::bind(&hold_socket(&record.made.run)) {
        Err(error) => tracing::error!(migration, %error, "can't look for a container that waits to be resumed"),
        Ok(listener) => {
            if let Ok(Ok(mut held)) = tokio::time::timeout(HOLD_RECONNECTS, listener.accept()).await {
                for (name, index, bridge) in record.ports.clone() {
                    if let Err(error) = (Port { name, index, bridge }).join() {
                        tracing::error!(migration, %error, "the container's port is not on its bridge: add it by hand");
                    }
                }
                while let Ok(HoldEvent::Waiting { .. }) = held.next().await {
                    if held.verdict(true).await.is_err() {
                        break;
                    }
                }
                tracing::warn!(migration, container = record.container, "resumed a container whose commit was cut off");
            }
        }
    }
    // Its memory may still be on its way to it: the filler needs its store.
    let made = record.made.clone();
    tokio::spawn(async move {
        while is_filling(&hold_socket(&made.run)) {
            tokio::time::sleep(FILLED_POLL).await;
        }
        let _ = tokio::task::spawn_blocking(move || settle_run(&made)).await;
    });
}

/// How often it is looked whether the filler of an earlier life has ended: it is no child of this process.
const FILLED_POLL: std::time::Duration = std::time::Duration::from_millis(500);

/// How long a hold may take to find a new agent: it looks every 50 ms.
const HOLD_RECONNECTS: std::time::Duration = std::time::Duration::from_secs(1);

/// At the agent's start: what an earlier life left half-done is taken away; what is committed stays.
pub async fn recover(config: &DestConfig, journal: &Journal) {
    journal.prune(REMEMBERED, |record: &Record| record.phase != DestinationPhase::Arriving);
    let runtime = config.engine.runtime();
    for (migration, mut record) in journal.all::<Record>() {
        let (_, actions) = Destination::recover(record.phase, record.epoch);
        for action in actions {
            match action {
                Action::Undo => {
                    tracing::warn!(migration, container = record.container, "undoing an arrival that was cut off");
                    end_restore(&hold_socket(&record.made.run), &runtime.state_dir(&record.container));
                    if let Err(error) = runtime.delete(&record.container).await {
                        tracing::debug!(%error, "the runtime had nothing to delete");
                    }
                    undo(&record.made);
                    record.made = Made::default();
                }
                Action::Record(phase, epoch) => {
                    (record.phase, record.epoch) = (phase, epoch);
                    if let Err(error) = journal.write(&migration, &record) {
                        tracing::error!(%error, migration, "can't record that the migration was undone");
                    }
                }
                Action::Resume => resume_committed(&migration, &record).await,
                Action::Fence => fence(config, &migration, journal).await,
                // Nobody listens yet.
                Action::Tell(_) => {}
            }
        }
    }
}

/// What became of a migration that is not under way any more, if it ever was.
pub async fn decide_ended(
    config: &DestConfig,
    journal: &Journal,
    migration: &str,
    request: Request,
) -> Result<Option<Answer>, JournalError> {
    let known = journal.read::<Record>(migration);
    let epoch = match request {
        Request::Commit(epoch) | Request::Ask(epoch) | Request::Supersede(epoch) => epoch,
    };
    // What has to be done first was done at the agent's start, or while it was under way.
    let mut machine = match &known {
        Some(record) => Destination::recover(record.phase, record.epoch).0,
        None => Destination::new(epoch),
    };
    let record = known.unwrap_or_else(|| Record {
        container: String::new(),
        epoch,
        phase: DestinationPhase::Aborted,
        made: Made::default(),
        ports: Vec::new(),
    });
    let mut said = None;
    for action in machine.on(Event::Heard(request)) {
        match action {
            Action::Record(phase, epoch) => journal.write(migration, &Record { phase, epoch, ..record.clone() })?,
            Action::Fence => fence(config, migration, journal).await,
            Action::Tell(answer) => said = Some(answer),
            // There is nothing of it here.
            Action::Undo | Action::Resume => {}
        }
    }
    Ok(said)
}

/// Stops a container that an operator of its source decided is not this host's, and takes it off its network. It is not
/// ended: what it did since is lost with it, and somebody may want to look first.
async fn fence(config: &DestConfig, migration: &str, journal: &Journal) {
    let Some(record) = journal.read::<Record>(migration) else { return };
    let container = &record.container;
    let Ok(state) = config.engine.runtime().state(container).await else {
        return tracing::warn!(migration, container, "superseded, and not here any more");
    };
    match Freezer::of(state.pid).map(|freezer| freezer.freeze()) {
        Ok(Ok(())) => {}
        Ok(Err(error)) | Err(error) => tracing::error!(%error, container, "can't stop a container that was superseded"),
    }
    for (name, index, bridge) in record.ports.clone() {
        if let Err(error) = (Port { name, index, bridge }).part() {
            tracing::error!(%error, container, "can't take a container that was superseded off its bridge");
        }
    }
    tracing::error!(
        migration,
        container,
        "an operator kept this container on its source, where it runs; the copy here is frozen and off its network: `runc delete --force {container}` ends it"
    );
}
