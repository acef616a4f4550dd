//! Auto-converge: takes processor time from a container that writes faster than can be sent, and gives it back.
//!
//! How much it may use is written down before it is changed: an agent that is killed gives it back at its next start.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::{CgroupError, CpuQuota, CpuShare, Freezer};
use longhaul_common::journal::{Journal, JournalError};
use longhaul_common::tasks::processor_time;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A container gets no less, in processors: it must be able to answer at all.
const LEAST: f64 = 0.01;
/// The most and the least that one step leaves of what it used.
const MILDEST: f64 = 0.8;
const HARDEST: f64 = 0.1;
/// What it shall write at most while so much is sent: each round is then less than half of the one before.
const WANTED: f64 = 0.4;

/// A container that can't be throttled.
#[derive(Debug, Error)]
pub enum ThrottleError {
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Others are in it.
    #[error("its cgroup holds other tasks as well, such as {0}, which must not be throttled for it")]
    Shared(i32),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What is to be given back.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    quota: CpuQuota,
    before: CpuShare,
}

/// See the module. Dropped, it gives back what it took.
#[derive(Debug)]
pub struct Throttle {
    record: Record,
    journal: Journal,
    migration: String,
    now: Option<f64>,
    /// Steps so far.
    pub steps: u32,
    /// The least it was given, in processors.
    pub least: Option<f64>,
}

impl Throttle {
    /// For the container whose tasks `own` tells; nothing is changed yet.
    pub fn new(
        init: i32,
        own: impl FnOnce() -> Result<Vec<i32>, CgroupError>,
        journal: &Journal,
        migration: &str,
    ) -> Result<Self, ThrottleError> {
        let quota = CpuQuota::of(init)?;
        // In this order: one that starts meanwhile is among the container's, and one that ends is not there any more.
        let (all, own) = (quota.tasks()?, own()?);
        let still = quota.tasks()?;
        if let Some(other) = all.into_iter().find(|pid| !own.contains(pid) && still.contains(pid)) {
            return Err(ThrottleError::Shared(other));
        }
        let record = Record { before: quota.get()?, quota };
        journal.write(migration, &record)?;
        let (journal, migration) = (journal.clone(), migration.to_owned());
        Ok(Self { record, journal, migration, now: None, steps: 0, least: None })
    }

    /// Gives the container less: it used `used` processors while it wrote `written` bytes and `sent` were sent. False if it has the
    /// least already.
    pub fn lower(&mut self, used: f64, written: f64, sent: f64) -> Result<bool, ThrottleError> {
        let Some(share) = lower(used, self.now, written, sent) else { return Ok(false) };
        // Whatever comes of it has to be given back.
        self.now = Some(share);
        self.record.quota.set(CpuShare::of(share))?;
        self.steps += 1;
        self.least = Some(share);
        tracing::info!(used, share, "the container gets less processor time, so that its memory can be copied");
        Ok(true)
    }

    /// Gives everything back.
    pub fn give_back(&mut self) {
        if self.now.take().is_some()
            && let Err(error) = self.record.quota.set(self.record.before)
        {
            tracing::error!(%error, before = ?self.record.before, "can't give the container its processor time back: set its CPU quota by hand");
            return;
        }
        self.journal.remove(&self.migration);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Takes processor time from the container, where that is allowed and possible.
#[derive(Debug, Clone)]
pub struct Throttling {
    init: i32,
    journal: Journal,
    migration: String,
    state: Arc<Mutex<ThrottleState>>,
}

#[derive(Debug, Default)]
struct ThrottleState {
    throttle: Option<Throttle>,
    /// It can't be done, or no more of it.
    is_over: bool,
    /// Processor time that was used by then.
    used: Option<(Duration, Instant)>,
    report: Option<ThrottleReport>,
}

/// What was taken of a container's processor time.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ThrottleReport {
    /// Steps.
    pub steps: u32,
    /// The least it was given, in processors.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub least_processors: Option<f64>,
    /// Why it could not be done.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub impossible: Option<String>,
}

impl Throttling {
    /// Of the container whose first task is `init`. Nothing is done yet.
    pub fn new(init: i32, journal: Journal, migration: &str) -> Self {
        Self { init, journal, migration: migration.to_owned(), state: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, ThrottleState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_possible(&self) -> bool {
        !self.lock().is_over
    }

    pub(super) fn report(&self) -> Option<ThrottleReport> {
        self.lock().report.clone()
    }

    pub(super) fn give_back(&self) {
        self.lock().throttle = None;
    }

    /// From now on its processor time is counted.
    pub(super) fn begin(&self, freezer: &Freezer) {
        self.lock().used = Some((used_by(freezer), Instant::now()));
    }

    /// One step, in proportion to what it wrote while so much was sent; false if there is nothing to take.
    pub(super) fn lower(&self, freezer: &Freezer, written: f64, sent: f64) -> bool {
        let used = used_by(freezer);
        let mut state = self.lock();
        let since = state.used.replace((used, Instant::now()));
        let processors = since.map_or(1.0, |(before, at)| {
            used.saturating_sub(before).as_secs_f64() / at.elapsed().as_secs_f64().max(1e-3)
        });
        match self.try_lower(&mut state, freezer, processors, written, sent) {
            Ok(lowered) => {
                state.is_over |= !lowered;
                lowered
            }
            Err(error) => {
                tracing::warn!(%error, "the container can't be throttled");
                state.is_over = true;
                state.report.get_or_insert_default().impossible = Some(error.to_string());
                false
            }
        }
    }

    fn try_lower(
        &self,
        state: &mut ThrottleState,
        freezer: &Freezer,
        processors: f64,
        written: f64,
        sent: f64,
    ) -> Result<bool, ThrottleError> {
        if state.throttle.is_none() {
            state.throttle = Some(Throttle::new(self.init, || freezer.tasks(), &self.journal, &self.migration)?);
        }
        let Some(throttle) = state.throttle.as_mut() else { return Ok(false) };
        let lowered = throttle.lower(processors, written, sent)?;
        state.report =
            Some(ThrottleReport { steps: throttle.steps, least_processors: throttle.least, impossible: None });
        Ok(lowered)
    }
}

fn used_by(freezer: &Freezer) -> Duration {
    freezer.tasks().unwrap_or_default().into_iter().map(processor_time).sum()
}

/// The next share: what it used, less in proportion to how much faster it writes than is sent.
fn lower(used: f64, now: Option<f64>, written: f64, sent: f64) -> Option<f64> {
    let has = now.map_or(used, |now| now.min(used.max(LEAST)));
    let factor = (WANTED * sent / written.max(1.0)).clamp(HARDEST, MILDEST);
    let share = (has * factor).max(LEAST);
    now.is_none_or(|now| share < now).then_some(share)
}

/// Gives back what an agent that was killed had taken.
pub fn recover(journal: &Journal) {
    for (migration, record) in journal.all::<Record>() {
        match record.quota.set(record.before) {
            Ok(()) => tracing::warn!(
                migration,
                "gave a container its processor time back that an agent had taken which was killed"
            ),
            // Its cgroup is gone, and the container with it.
            Err(error) => tracing::debug!(%error, migration, "nothing to give processor time back to"),
        }
        journal.remove(&migration);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_go_down_to_the_least_and_end_there() {
        let close = |share: Option<f64>, wanted: f64| share.is_some_and(|share| (share - wanted).abs() < 1e-9);
        // Twice as fast as the link: a fifth of what it had.
        assert!(close(lower(1.0, None, 200.0, 100.0), 0.2));
        assert!(close(lower(1.0, None, 1e9, 1.0), 0.1));
        assert!(close(lower(1.0, None, 1.0, 1e9), 0.8));
        assert!(close(lower(0.05, Some(0.1), 100.0, 100.0), 0.02));
        assert!(close(lower(0.01, Some(0.02), 1e9, 1.0), 0.01));
        assert_eq!(lower(0.01, Some(0.01), 1e9, 1.0), None);
    }

    #[test]
    fn what_was_taken_is_written_down_until_it_is_given_back() {
        let pid = std::process::id().cast_signed();
        // A test may run in a cgroup that others use, or that has no quota: then nothing is taken.
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::open(dir.path().to_owned()).expect("opens");
        match Throttle::new(pid, || Ok(vec![pid]), &journal, "m-1") {
            Ok(throttle) => {
                assert_eq!(journal.all::<Record>().len(), 1);
                drop(throttle);
            }
            Err(error) => assert!(matches!(error, ThrottleError::Shared(_) | ThrottleError::Cgroup(_)), "{error}"),
        }
        assert!(journal.all::<Record>().is_empty());
    }
}
