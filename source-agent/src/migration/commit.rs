//! The container changes hands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::handover::Answer;
use longhaul_common::handover::source::{Event, State};

use super::prepare::Prepared;
use super::save::Frozen;
use super::{MigrationError, Trip};
use crate::custody::{Custody, Hands, Line};
use crate::jobs::{Job, JobEvent};
use crate::peer::Timings;
use crate::record::Recovered;
use crate::report::{Outcome, millis};

/// Goes on with a migration that an earlier life of the agent left behind.
pub async fn go_on(job: Arc<Job>, mut line: Line, mut custody: Custody<Recovered>) {
    settle(&mut custody, &mut line, &job).await;
    tracing::info!(line.migration, state = ?custody.state(), "a migration of an earlier life has ended");
    conclude_doubt(&job, custody.state());
}

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
        (_, State::Gone) => {
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
        let Frozen { mut prepared, at, .. } = self.frozen;
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
            Ok(timings) => note_timings(trip, timings),
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
                    (State::Gone, _) => {}
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
        Ok(Committed { _prepared: prepared })
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
    _prepared: Prepared,
}

impl Committed {
    /// Ends the container here, if that is not done yet.
    pub(super) async fn retire(self, trip: &Trip) -> Result<(), MigrationError> {
        Ok(trip.hand_over(Event::Heard(Answer::Committed(trip.epoch)), "").await?)
    }
}
