//! Pre-copy: rounds over the memory of a running container, and the last one while it is frozen.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::{CgroupError, Freezer};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::filter::{self, Hidden, Told};
use super::lanes::{Lanes, Meters};
use super::link::LinkError;
use super::predict::{Limits, Next, Outlook, decide};
use super::pump::{PumpError, Pumped, Tasks};
use super::tracker::{Frozen, SpacePages, TrackError, Tracker};
use crate::report::millis;

/// How long memory that is still arriving from the last move is waited for.
const BUSY_DEADLINE: Duration = Duration::from_secs(120);
/// How often it is looked at.
const BUSY_POLL: Duration = Duration::from_millis(20);

/// Memory that can't be moved.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// What was written can't be found out.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Pages can't be read.
    #[error(transparent)]
    Pump(PumpError),
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The table for CRIU.
    #[error("can't write the table of pages for CRIU")]
    Table(#[source] std::io::Error),
    /// CRIU left out something else than what was sent.
    #[error(
        "CRIU left {told} pages of task {pid} out of its images, {expected} were sent beside it: this CRIU looks for pages in an \
         unknown way; the container was not moved"
    )]
    Filter {
        /// The task.
        pid: i32,
        /// What CRIU left out.
        told: u64,
        /// What it should have.
        expected: u64,
    },
    /// A thread.
    #[error("a thread of the agent ended unexpectedly")]
    Panicked,
}

/// One round, as it is reported.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Round {
    /// Counted from 1.
    pub round: u32,
    /// Pages that were looked at because they were new or written.
    pub pages: u64,
    /// Of those, zero: they did not travel.
    pub zero_pages: u64,
    /// Of those, equal to others or to what was there: they did not travel.
    pub equal_pages: u64,
    /// Bytes of pages that travelled, before packing.
    pub page_bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Pages looked at each second, in MiB/s.
    pub mib_per_s: f64,
    /// What the container wrote since the round before, in MiB/s.
    pub dirty_mib_per_s: f64,
    /// Pages before packing, divided by what travelled.
    pub compression: f64,
    /// The downtime that was predicted when this round was decided on, in milliseconds.
    pub predicted_downtime_ms: f64,
}

/// Outlives a step that runs on a thread of its own.
type SharedTracker = Arc<Mutex<Box<dyn Tracker>>>;

/// The memory of one container on its way.
pub struct Precopy {
    tracker: SharedTracker,
    lanes: Lanes,
    freezer: Freezer,
    limits: Limits,
    /// Known parts of the downtime.
    outlook: Outlook,
    residuals: Vec<u64>,
    /// Bytes a second of the last rounds.
    speeds: VecDeque<f64>,
    last_take: Option<Instant>,
    busy_since: Option<Instant>,
    /// What was done.
    pub rounds: Vec<Round>,
    /// The downtime predicted last, in milliseconds.
    pub predicted_ms: f64,
}

/// What a step of the rounds came to.
#[derive(Debug)]
pub enum Step {
    /// A round was sent.
    Sent(Round),
    /// It is time to freeze.
    Freeze,
    /// The container writes too fast.
    GiveUp {
        /// The downtime it would have, in milliseconds.
        predicted_ms: f64,
        /// What it writes, in MiB/s.
        dirty_mib_per_s: f64,
    },
    /// Memory is still arriving from the last move.
    Waiting,
}

/// What the last round found.
pub struct LastRound {
    frozen: Vec<Frozen>,
    hidden: Vec<Hidden>,
}

impl Precopy {
    /// Nothing is touched yet.
    pub fn new(tracker: Box<dyn Tracker>, lanes: Lanes, freezer: Freezer, limits: Limits, outlook: Outlook) -> Self {
        Self {
            tracker: Arc::new(Mutex::new(tracker)),
            lanes,
            freezer,
            limits,
            outlook,
            residuals: Vec::new(),
            speeds: VecDeque::new(),
            last_take: None,
            busy_since: None,
            rounds: Vec::new(),
            predicted_ms: 0.0,
        }
    }

    /// The tracker's mechanism.
    pub fn tracker_name(&self) -> &'static str {
        lock(&self.tracker).name()
    }

    /// The longest that tracking has stopped a thread of the container.
    pub fn longest_stop(&self) -> Duration {
        lock(&self.tracker).longest_stop()
    }

    /// Reads how much was sent while a step is under way.
    pub fn meter(&self) -> Meters {
        self.lanes.meter()
    }

    /// The prediction for a residual of so many bytes.
    fn predict(&self, residual_bytes: u64) -> Duration {
        Outlook { residual_bytes, ..self.outlook }.downtime()
    }

    /// Takes what was written and sends it, unless it is time to freeze.
    pub async fn step(&mut self) -> Result<Step, MemoryError> {
        let start = Instant::now();
        let taken = match self.take().await {
            Ok(taken) => taken,
            Err(MemoryError::Track(TrackError::Busy(_)))
                if self.busy_since.get_or_insert_with(Instant::now).elapsed() < BUSY_DEADLINE =>
            {
                tokio::time::sleep(BUSY_POLL).await;
                return Ok(Step::Waiting);
            }
            Err(error) => return Err(error),
        };
        let since = self.last_take.replace(start).map(|last| last.elapsed());
        let bytes: u64 = taken.iter().map(SpacePages::bytes).sum();
        let dirty_mib_per_s = since.map_or(0.0, |since| mib(bytes) / since.as_secs_f64().max(1e-6));
        let is_first = self.rounds.is_empty();
        let prediction = self.predict(bytes);
        self.predicted_ms = millis(prediction);
        if !is_first {
            self.residuals.push(bytes);
            match decide(prediction, &self.residuals, self.limits) {
                Next::Round => {}
                Next::Freeze => {
                    lock(&self.tracker).put_back(taken);
                    return Ok(Step::Freeze);
                }
                Next::GiveUp => {
                    lock(&self.tracker).put_back(taken);
                    return Ok(Step::GiveUp { predicted_ms: millis(prediction), dirty_mib_per_s });
                }
            }
        }
        let mut round = self.send(taken, Tasks::Running, start).await?;
        round.dirty_mib_per_s = tenths(dirty_mib_per_s);
        round.predicted_downtime_ms = millis(prediction);
        self.rounds.push(round.clone());
        Ok(Step::Sent(round))
    }

    /// One more round whatever it brings: what was written while the runtimes were started.
    pub async fn last_live_round(&mut self) -> Result<(), MemoryError> {
        let start = Instant::now();
        let taken = self.take().await?;
        self.send(taken, Tasks::Running, start).await.map(drop)
    }

    /// What was written; nothing of an earlier round is under way.
    async fn take(&self) -> Result<Vec<SpacePages>, MemoryError> {
        let tasks = self.freezer.tasks()?;
        let tracker = self.tracker.clone();
        let taken = tokio::task::spawn_blocking(move || lock(&tracker).take(&tasks)).await;
        let taken = taken.map_err(|_| MemoryError::Panicked)??;
        self.lanes.forget(&taken.ended).await?;
        Ok(taken.pages)
    }

    /// Sends pages and waits until they are stored.
    async fn send(&mut self, pages: Vec<SpacePages>, tasks: Tasks, start: Instant) -> Result<Round, MemoryError> {
        let wire_before = self.meter().bytes();
        let pumped = self.pump(pages, tasks).await?;
        let took = start.elapsed();
        let looked_at = pumped.pages * longhaul_common::sys::memory::PAGE;
        // A few pages say nothing about the link's speed.
        if looked_at >= MEASURABLE {
            self.speeds.push_back(looked_at as f64 / took.as_secs_f64().max(1e-6));
            if self.speeds.len() > MEASURED_ROUNDS {
                self.speeds.pop_front();
            }
            // The best: while frozen, the container does not compete for the processors.
            self.outlook.bytes_per_second = self.speeds.iter().copied().fold(0.0, f64::max);
        }
        Ok(self.report(&pumped, took, wire_before))
    }

    fn report(&self, pumped: &Pumped, took: Duration, wire_before: u64) -> Round {
        let looked_at = pumped.pages * longhaul_common::sys::memory::PAGE;
        Round {
            round: self.rounds.len() as u32 + 1,
            pages: pumped.pages,
            zero_pages: pumped.zero,
            equal_pages: pumped.equal,
            page_bytes: pumped.raw_bytes,
            wire_bytes: self.meter().bytes() - wire_before,
            ms: millis(took),
            mib_per_s: tenths(mib(looked_at) / took.as_secs_f64().max(1e-6)),
            compression: tenths(pumped.raw_bytes as f64 / pumped.packed_bytes.max(1) as f64),
            ..Round::default()
        }
    }

    async fn pump(&self, pages: Vec<SpacePages>, tasks: Tasks) -> Result<Pumped, MemoryError> {
        let mut pumped = self.lanes.send(&pages, tasks).await;
        let owed = match &mut pumped {
            Ok(pumped) => std::mem::take(&mut pumped.skipped),
            Err(_) => pages,
        };
        lock(&self.tracker).put_back(owed);
        pumped
    }

    /// Looks at the frozen container and tells CRIU's library, by a table in `dir`, what to leave out.
    pub async fn look_frozen(&self, dir: &Path) -> Result<LastRound, MemoryError> {
        let tasks = self.freezer.tasks()?;
        let (tracker, dir) = (self.tracker.clone(), dir.to_owned());
        let looked = tokio::task::spawn_blocking(move || {
            let frozen = lock(&tracker).look_frozen(&tasks)?;
            let hidden = filter::write_table(&dir, &frozen).map_err(MemoryError::Table)?;
            Ok::<_, MemoryError>(LastRound { frozen, hidden })
        });
        looked.await.map_err(|_| MemoryError::Panicked)?
    }

    /// Sends what was written last, and what counts in the end. The tasks must stay frozen.
    pub async fn send_last(&mut self, last: &LastRound) -> Result<Round, MemoryError> {
        self.lanes.hurry();
        let (start, wire_before) = (Instant::now(), self.meter().bytes());
        let written =
            |frozen: &Frozen| SpacePages { pid: frozen.pid, space: frozen.space, ranges: frozen.written.clone() };
        let pumped = self.pump(last.frozen.iter().map(written).collect(), Tasks::Frozen).await?;
        self.lanes.finish(&last.frozen).await?;
        Ok(self.report(&pumped, start.elapsed(), wire_before))
    }
}

/// Rounds of at least so many bytes say how fast the link is.
const MEASURABLE: u64 = 4 << 20;
/// Rounds whose speed counts.
const MEASURED_ROUNDS: usize = 4;

impl LastRound {
    /// Compares what CRIU left out with what was sent beside it. True if it did; false if its images hold everything,
    /// because its library was not asked.
    pub fn check(&self, dir: &Path) -> Result<bool, MemoryError> {
        match filter::told(dir, &self.hidden) {
            Told::Everything => Ok(true),
            Told::Nothing => Ok(false),
            Told::Part { pid, told, expected } => Err(MemoryError::Filter { pid, told, expected }),
        }
    }
}

fn lock(tracker: &Mutex<Box<dyn Tracker>>) -> std::sync::MutexGuard<'_, Box<dyn Tracker>> {
    tracker.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Bytes as MiB, for reports and progress.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
