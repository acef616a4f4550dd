//! What a destination agent must know after it was killed, and what it does then.

use std::time::{Duration, SystemTime};

use longhaul_common::cgroup::{CgroupError, Freezer};
use longhaul_common::config::DestConfig;
use longhaul_common::criu::hold::{HoldEvent, HoldListener};
use longhaul_common::handover::destination::{Action, Destination, Event};
use longhaul_common::handover::{Answer, DestinationPhase, Epoch, Request};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::leftovers::{end_restore, is_filling, is_running};
use longhaul_common::net::Port;
use longhaul_common::tasks::TaskId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::owing::settle_ended;
use crate::restore::hold_socket;
use crate::staging::{Made, settle_run, undo};

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
    /// The host's ends of its interfaces: name, index, bridge. They are put on their bridges, or removed.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// The names in the certificate of the source.
    #[serde(default)]
    pub peer: Vec<String>,
    /// It runs, or is about to, and some of its memory is still the source's to send.
    #[serde(default)]
    pub owing: bool,
    /// Its first task, once it is restored: another container may have its name later.
    #[serde(default)]
    pub task: Option<TaskId>,
}

impl Record {
    /// A namespace ends with its last socket, and one that waits for its peer to acknowledge its end may take minutes: until
    /// then it would keep its interfaces, and their names.
    fn remove_ports(&self) {
        // The directory is in memory: without it this is another boot, where others may have these names.
        if self.made.run.exists() {
            self.ports.iter().for_each(Port::remove_if_there);
        }
    }
}

/// How long the end of a migration is remembered: a source in doubt asks within minutes, or its host was down for days.
const REMEMBERED: Duration = Duration::from_secs(30 * 24 * 3600);

/// Goes on with a commit that was cut off: the container is this host's, and CRIU may still hold it before its first
/// instruction.
async fn resume_committed(journal: &Journal, migration: &str, record: &Record) {
    if !record.made.run.exists() {
        return;
    }
    match HoldListener::bind(&hold_socket(&record.made.run)) {
        Err(error) => tracing::error!(migration, %error, "can't look for a container that waits to be resumed"),
        Ok(listener) => {
            let found = async {
                let mut tries = 0;
                loop {
                    let found = tokio::time::timeout(HOLD_RECONNECTS, listener.accept()).await;
                    tries += 1;
                    // A host that has just started is busy: a hold that is there is waited for.
                    if found.is_ok() || tries == HOLD_TRIES || !is_running(&hold_socket(&record.made.run)) {
                        return found;
                    }
                }
            };
            if let Ok(Ok(mut held)) = found.await {
                for port in &record.ports {
                    if let Err(error) = port.join() {
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
    let (made, journal, migration) = (record.made.clone(), journal.clone(), migration.to_owned());
    tokio::spawn(async move {
        while is_filling(&hold_socket(&made.run)) {
            tokio::time::sleep(FILLED_POLL).await;
        }
        settle_ended(&journal, &migration, &made);
        let _ = tokio::task::spawn_blocking(move || settle_run(&made)).await;
    });
}

/// How often it is looked whether the filler of an earlier life has ended: it is no child of this process.
const FILLED_POLL: Duration = Duration::from_millis(500);

/// How long a hold may take to find a new agent: it looks every 50 ms.
const HOLD_RECONNECTS: Duration = Duration::from_secs(1);
/// How often one that runs is given that time.
const HOLD_TRIES: u32 = 20;

/// At the agent's start: what an earlier life left half-done is taken away; what is committed stays.
pub async fn recover(config: &DestConfig, journal: &Journal) {
    let runtime = config.engine.runtime();
    // All of them, and their times, as they were left: what is done below writes some anew.
    let records: Vec<Known> = journal.all::<Record>().into_iter().map(|known| Known::new(journal, known)).collect();
    for Known { migration, record, .. } in &records {
        let mut record = record.clone();
        let (_, actions) = Destination::recover(record.phase, record.epoch);
        for action in actions {
            match action {
                Action::Undo => {
                    let container = &record.container;
                    if has_successor(&records, migration, container) {
                        tracing::warn!(migration, container, "undone already, as a later one shows");
                    } else if !record.made.run.exists() && runtime.state(container).await.is_ok() {
                        tracing::warn!(migration, container, "undone already: the one of this name came by other ways");
                    } else {
                        tracing::warn!(migration, container, "undoing an arrival that was cut off");
                        end_restore(&hold_socket(&record.made.run), &runtime.state_dir(container));
                        if let Err(error) = runtime.delete(container).await {
                            tracing::debug!(%error, "the runtime had nothing to delete");
                        }
                        record.remove_ports();
                        undo(&record.made);
                    }
                    (record.made, record.ports) = (Made::default(), Vec::new());
                }
                Action::Record(phase, epoch) => {
                    (record.phase, record.epoch) = (phase, epoch);
                    if let Err(error) = write_or_forget(journal, migration, &record) {
                        tracing::error!(%error, migration, "can't record that the migration was undone");
                    }
                }
                Action::Resume => resume_committed(journal, migration, &record).await,
                Action::Fence => fence(config, migration, journal).await,
                // Nobody listens yet.
                Action::Tell(_) => {}
            }
        }
    }
    journal.prune(REMEMBERED, |record: &Record| record.phase != DestinationPhase::Arriving);
}

/// Writes down that a migration is given up. If that can't be, nothing is known of it any more: one that nobody knows is refused as
/// well, and to forget takes no room. As long as it is on record as arriving, an agent that starts would undo it again, by names that
/// may be others' then.
pub fn write_or_forget(journal: &Journal, migration: &str, record: &Record) -> Result<(), JournalError> {
    journal.write(migration, record).or_else(|error| journal.forget(migration).map_err(|_| error))
}

/// A record as an agent finds it.
struct Known {
    migration: String,
    record: Record,
    written: Option<SystemTime>,
}

impl Known {
    fn new(journal: &Journal, (migration, record): (String, Record)) -> Self {
        Self { written: journal.written(&migration), migration, record }
    }
}

/// Whether a container arrived again after this migration, for which an agent first takes away what an earlier one left. By
/// their names, the container and its files are the later one's now.
fn has_successor(records: &[Known], migration: &str, container: &str) -> bool {
    let written = records.iter().find(|known| known.migration == migration).and_then(|known| known.written);
    let mut others = records.iter().filter(|other| other.migration != migration && other.record.container == container);
    others.any(|other| other.written > written)
}

/// What became of a migration that is not under way any more, if it ever was.
pub async fn decide_ended(
    config: &DestConfig,
    journal: &Journal,
    migration: &str,
    request: Request,
) -> Result<Option<Answer>, JournalError> {
    let known = journal.read::<Record>(migration);
    let epoch = request.epoch();
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
        peer: Vec::new(),
        owing: false,
        task: None,
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
/// ended: what it did since is lost with it, and somebody may want to look first. One whose tasks wait for memory that the source
/// has can't be stopped, and will never have that memory: it is ended, off its network, so that nobody hears of it.
pub async fn fence(config: &DestConfig, migration: &str, journal: &Journal) {
    let Some(record) = journal.read::<Record>(migration) else { return };
    let container = &record.container;
    let Ok(state) = config.engine.runtime().state(container).await else {
        return tracing::warn!(migration, container, "superseded, and not here any more");
    };
    if record.task.is_some_and(|task| TaskId::of(state.pid) != Some(task)) {
        return tracing::info!(
            migration,
            container,
            "superseded, and not here any more: this is another one of its name"
        );
    }
    for port in &record.ports {
        if let Err(error) = port.part() {
            tracing::error!(%error, container, "can't take a container that was superseded off its bridge");
        }
    }
    match Freezer::of(state.pid).map(|freezer| freezer.freeze().map_err(|error| (freezer, error))) {
        Ok(Ok(())) => {}
        Ok(Err((freezer, error @ CgroupError::Stuck { .. }))) if record.owing => {
            tracing::warn!(%error, container, "ended: it waits for memory that will not come");
            for pid in freezer.tasks().unwrap_or_default() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        Ok(Err((freezer, error))) => {
            // Asked for again: it stops as soon as it can.
            let asked = freezer.freeze_without_waiting();
            tracing::error!(%error, ?asked, container, "a container that was superseded is not stopped yet");
        }
        Err(error) => tracing::error!(%error, container, "can't stop a container that was superseded"),
    }
    tracing::error!(
        migration,
        container,
        "an operator kept this container on its source, where it runs; the copy here is stopped and off its network: `runc delete --force {container}` removes it"
    );
}
