//! What a destination agent must know after it was killed, and what it does then.

use std::time::Duration;

use longhaul_common::cgroup::Freezer;
use longhaul_common::config::DestConfig;
use longhaul_common::criu::hold::{HoldEvent, HoldListener};
use longhaul_common::handover::destination::{Action, Destination, Event};
use longhaul_common::handover::{Answer, DestinationPhase, Epoch, Request};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::leftovers::{end_restore, is_filling};
use longhaul_common::net::Port;
use serde::{Deserialize, Serialize};

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
    /// The host's ends of its interfaces: name, index, bridge. Of a committed one, to be put on their bridges.
    #[serde(default)]
    pub ports: Vec<(String, u32, String)>,
}

/// How long the end of a migration is remembered: a source in doubt asks within minutes, or its host was down for days.
const REMEMBERED: Duration = Duration::from_secs(30 * 24 * 3600);

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
const FILLED_POLL: Duration = Duration::from_millis(500);

/// How long a hold may take to find a new agent: it looks every 50 ms.
const HOLD_RECONNECTS: Duration = Duration::from_secs(1);

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
pub async fn fence(config: &DestConfig, migration: &str, journal: &Journal) {
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
