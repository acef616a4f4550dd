//! The container changes hands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::cgroup::Freezer;
use longhaul_common::handover::Answer;
use longhaul_common::handover::source::{Event, State};
use longhaul_common::sys::memory::PAGE;

use super::prepare::Prepared;
use super::save::Frozen;
use super::{MigrationError, Trip};
use crate::custody::{Custody, Hands, Line};
use crate::jobs::{Job, JobEvent};
use crate::memory::serve::{Served, Serving, sources};
use crate::peer::Timings;
use crate::record::Recovered;
use crate::report::{Outcome, PostCopyReport, millis};

/// Goes on with a migration that an earlier life of the agent left behind.
pub async fn go_on(job: Arc<Job>, mut line: Line, mut custody: Custody<Recovered>) {
    settle(&mut custody, &mut line, &job).await;
    if custody.state() == State::Taken {
        complete(&job, &line, &mut custody).await;
        settle(&mut custody, &mut line, &job).await;
    }
    tracing::info!(line.migration, state = ?custody.state(), "a migration of an earlier life has ended");
    conclude_doubt(&job, custody.state());
}

/// The destination runs the container: it fetches what an earlier life of the agent has kept for it.
async fn complete(job: &Arc<Job>, line: &Line, custody: &mut Custody<Recovered>) {
    let record = Recovered::record(custody.hands()).clone();
    if !record.owes {
        if let Err(error) = custody.on(Event::Complete, "").await {
            tracing::error!(%error, "can't write down that the container is gone");
        }
        return;
    }
    let sources = Freezer::at(record.cgroup).map(|freezer| sources(&freezer, record.init)).unwrap_or_default();
    let serving = Serving::start(&line.identity, &line.address, &line.migration, sources, true);
    job.note(|report| {
        report.outcome = Outcome::Running;
        "post-copy".clone_into(&mut report.phase);
        report.memory.postcopy = Some(PostCopyReport::default());
    });
    serve(job, custody, serving, &line.address.host).await;
}

/// Sends what is owed until all has come, or an operator has decided; followers see how far it is.
async fn serve<H: Hands>(job: &Job, custody: &mut Custody<H>, serving: Serving, to: &str) {
    let mut decisions = job.decision.subscribe();
    let (start, before) = (Instant::now(), job.report().bytes_on_wire);
    let tell = |served: &Served| {
        let report = job.report();
        let owed = report.memory.postcopy.as_ref().map_or(0, |postcopy| postcopy.owed_pages);
        let was = report.outcome;
        let broken = served.broken.as_ref().map(|(why, since)| (why, since.elapsed()));
        let in_doubt = broken.as_ref().is_some_and(|(_, since)| *since > BROKEN_SHOWN_AFTER);
        job.note(|report| {
            report.bytes_on_wire = before + served.wire_bytes;
            report.outcome = if in_doubt { Outcome::InDoubt } else { Outcome::Running };
            report.error = broken.as_ref().map(|(why, since)| {
                format!(
                    "the container runs on {to} and waits for the rest of its memory, which is here; there has been no \
                     connection for {} s, and it is tried on: {why}",
                    since.as_secs()
                )
            });
            if let Some(postcopy) = &mut report.memory.postcopy {
                (postcopy.sent_pages, postcopy.urgent_pages) = (served.pages, served.urgent);
                (postcopy.wire_bytes, postcopy.breaks) = (served.wire_bytes, served.breaks);
                postcopy.ms = millis(start.elapsed());
            }
        });
        let what = match &broken {
            Some(_) => "no connection: both hosts wait".to_owned(),
            None => format!("the container runs on {to} and fetches its memory"),
        };
        job.tell(JobEvent::Progress { phase: "post-copy", what, done: served.pages * PAGE, total: owed * PAGE });
        if in_doubt && was != Outcome::InDoubt {
            job.tell(JobEvent::Finished(Box::new(job.report())));
        }
    };
    if custody.serve(serving, &mut decisions, tell).await.is_some() {
        decided(job);
    }
}

/// How long the connection for owed pages may be away before the migration counts as in doubt, so that an operator may decide.
const BROKEN_SHOWN_AFTER: Duration = Duration::from_secs(10);

/// Settles a migration whose answer is missing; the job's followers see that it is in doubt.
async fn settle<H: Hands>(custody: &mut Custody<H>, line: &mut Line, job: &Job) {
    let mut decisions = job.decision.subscribe();
    let doubt = |why: String| {
        job.note(|report| {
            report.outcome = Outcome::InDoubt;
            report.error = Some(format!("{} ({why})", MigrationError::InDoubt));
        });
        job.tell(JobEvent::Finished(Box::new(job.report())));
    };
    custody.settle(line, &mut decisions, doubt, || decided(job)).await;
}

/// An operator's decision was carried out.
fn decided(job: &Job) {
    let (outcome, what) = match *job.decision.borrow() {
        Some(crate::custody::Decision::Keep) => (Outcome::Kept, "an operator kept the container here"),
        Some(crate::custody::Decision::Disown) => (Outcome::Disowned, "an operator ended the container here"),
        None => return,
    };
    job.note(|report| {
        report.outcome = outcome;
        report.error = Some(what.to_owned());
    });
    job.tell(JobEvent::Finished(Box::new(job.report())));
}

/// What the destination's answer makes of a migration in doubt.
fn conclude_doubt(job: &Job, state: State) {
    job.note(|report| match (report.outcome, state) {
        (Outcome::Kept | Outcome::Disowned, _) => {}
        (_, State::Gone | State::Taken) => {
            report.outcome = Outcome::Moved;
            report.error = None;
        }
        _ => {
            report.outcome = Outcome::Failed;
            report.error = Some("the destination undid it; the container runs here".to_owned());
        }
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
        let Frozen { mut prepared, at, serving, .. } = self.frozen;
        let start = Instant::now();
        // CRIU thawed the cgroup to reach the tasks, and holds them. Frozen again, they stay even if CRIU is killed.
        prepared.inspection.live.freezer.freeze_without_waiting()?;
        trip.hand_over(Event::Restored, "").await?;
        trip.step("journal", start.elapsed());

        let start = Instant::now();
        let silence = Duration::from_millis(trip.env.config.frozen_silence_ms);
        let answer = tokio::select! {
            biased;
            answer = prepared.session.commit(trip.epoch) => answer,
            silent = prepared.session.silence(silence) => Err(silent),
        };
        let downtime = at.elapsed();
        trip.step("commit", start.elapsed());
        match answer {
            Ok(timings) => {
                note_timings(trip, timings);
                trip.hand_over(Event::Heard(Answer::Committed(trip.epoch)), "").await?;
            }
            // Also a destination that says it failed: its journal has the last word.
            Err(error) => {
                tracing::warn!(error = longhaul_common::chain(&error), "the answer to COMMIT is missing");
                // It may take long, and a container that is kept may be moved meanwhile: its memory is followed no more.
                prepared.memory = None;
                let mut line = trip.line(Some(prepared.peer.clone()));
                let mut custody = trip.custody.lock().await;
                settle(&mut custody, &mut line, &trip.job).await;
                let outcome = trip.job.report().outcome;
                match (custody.state(), outcome) {
                    (_, Outcome::Kept | Outcome::Disowned) => return Err(MigrationError::Decided(outcome)),
                    (State::Gone | State::Taken, _) => {}
                    _ => return Err(error.into()),
                }
            }
        }
        trip.job.note(|report| {
            report.error = None;
            report.downtime_ms = Some(millis(downtime));
        });
        if let Some(memory) = &prepared.memory {
            trip.env.fixed_downtime.learn(Duration::from_secs_f64(memory.predicted_ms / 1000.0), downtime);
        }
        Ok(Committed { prepared, serving })
    }
}

pub(super) fn note_timings(trip: &Trip, timings: Timings) {
    for (name, micros) in timings {
        trip.step(&format!("destination.{name}"), Duration::from_micros(micros));
    }
}

/// The container runs at the destination.
pub(super) struct Committed {
    /// Its tracker and its connections, until the container has ended here.
    prepared: Prepared,
    serving: Option<Serving>,
}

impl Committed {
    /// Whether some of its memory is still here.
    pub(super) fn owes(&self) -> bool {
        self.serving.is_some()
    }

    /// Keeps the frozen tasks until the destination has all of their memory.
    pub(super) async fn serve(mut self, trip: &Trip) -> Result<Self, MigrationError> {
        let Some(serving) = self.serving.take() else { return Ok(self) };
        // Nothing is written here any more.
        self.prepared.memory = None;
        let mut custody = trip.custody.lock().await;
        serve(&trip.job, &mut custody, serving, &trip.address.host).await;
        if custody.state() == State::Kept {
            let mut line = trip.line(None);
            settle(&mut custody, &mut line, &trip.job).await;
        }
        drop(custody);
        match trip.job.report().outcome {
            outcome @ (Outcome::Kept | Outcome::Disowned) => Err(MigrationError::Decided(outcome)),
            _ => {
                trip.job.note(|report| (report.outcome, report.error) = (Outcome::Running, None));
                Ok(self)
            }
        }
    }

    /// Ends the container here, if that is not done yet.
    pub(super) async fn retire(self, trip: &Trip) -> Result<(), MigrationError> {
        Ok(trip.hand_over(Event::Complete, "").await?)
    }
}
