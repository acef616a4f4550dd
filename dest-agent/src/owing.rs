//! A container that runs here before all of its memory has come: the source's connection is passed on to its filler.
//!
//! The filler asks and the source answers (`longhaul_common::pages`); the agent only checks who is there, and may be killed
//! meanwhile: the source connects again. That something is owed is on record, so that a host which has lost the container,
//! because it was started anew, does not tell its source to throw the rest away.

use longhaul_common::handover::DestinationPhase;
use longhaul_common::journal::Journal;
use longhaul_common::pages::Reply;
use longhaul_common::tls::TlsConnection;
use tokio::io::{AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::UnixStream;

use crate::memory::keeper::FETCH_SOCKET;
use crate::memory::{filler, receive};
use crate::record::Record;
use crate::staging::{Made, pages_path};

/// Bytes that are on their way from the source to the filler at once: a frame.
const TOWARDS_FILLER: usize = 256 << 10;
/// The same of its questions.
const TOWARDS_SOURCE: usize = 16 << 10;

/// Passes a connection on, until one of its ends closes it.
pub async fn pass_on(mut connection: TlsConnection, journal: &Journal, migration: &str) {
    let reason = match find(journal, migration, &connection.identity().names).await {
        Ok(Found::Filler(mut filler)) => {
            let passed =
                copy_bidirectional_with_sizes(&mut connection, &mut filler, TOWARDS_FILLER, TOWARDS_SOURCE).await;
            tracing::debug!(migration, ?passed, "a connection for owed pages ended");
            return;
        }
        Ok(Found::Nothing) => {
            let replies = [Reply::Ack(0).encode(), Reply::Complete.encode()].concat();
            // A source that is gone asks again.
            let _ = connection.write_all(&replies).await;
            let _ = connection.flush().await;
            let _ = connection.shutdown().await;
            return;
        }
        Err(reason) => reason,
    };
    tracing::warn!(migration, reason, "refused a connection for owed pages");
    receive::refuse(&mut connection, &reason).await;
}

enum Found {
    /// It asks for what it lacks.
    Filler(UnixStream),
    /// All memory is here.
    Nothing,
}

async fn find(journal: &Journal, migration: &str, names: &[String]) -> Result<Found, String> {
    let record = journal.read::<Record>(migration).filter(|record| record.peer == names);
    let record = record.ok_or_else(|| "there is no such migration from this host".to_owned())?;
    if record.phase == DestinationPhase::Committed && !record.owing {
        return Ok(Found::Nothing);
    }
    if !matches!(record.phase, DestinationPhase::Arriving | DestinationPhase::Committed) {
        return Err("the container is not this host's".to_owned());
    }
    let socket = pages_path(&record.made).join(FETCH_SOCKET);
    UnixStream::connect(&socket).await.map(Found::Filler).map_err(|_| {
        format!(
            "{} is not here any more: this host was started anew, or the program that fills in its memory was killed, before all of it had come",
            record.container
        )
    })
}

/// Writes down that nothing is owed any more, if the filler of an earlier life got so far.
pub fn settle_ended(journal: &Journal, migration: &str, made: &Made) {
    if filler::was_completed(&pages_path(made)) {
        settle(journal, migration);
    }
}

/// Writes down that nothing is owed any more.
pub fn settle(journal: &Journal, migration: &str) {
    let Some(record) = journal.read::<Record>(migration).filter(|record| record.owing) else { return };
    if let Err(error) = journal.write(migration, &Record { owing: false, ..record }) {
        // The source asks as long as it is told that the filler is gone: an operator has to decide then.
        tracing::error!(migration, %error, "can't record that all memory is here");
    }
}
