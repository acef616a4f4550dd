//! Pre-copy: rounds over the memory of a running container, and the last one while it is frozen.
//!
//! Where the user allows post-copy, rounds end when they do not help any more: at once, if the container writes faster than the link
//! carries. What was written last is then not sent but owed.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::{CgroupError, Freezer};
use longhaul_common::fault;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::filter::{self, Hidden, Said, Told};
use super::flags;
use super::lanes::{Lanes, Meters, Pacers};
use super::link::LinkError;
use super::maps::{Area, difference, intersection};
use super::predict::{Limits, Next, Outlook, Race, decide, is_lost};
use super::pump::{PumpError, Pumped, Tasks};
use super::serve::Sources;
use super::several::of_each;
use super::throttle::{ThrottleReport, Throttling};
use super::tracker::{Frozen, Looked, Origin, SpacePages, TrackError, Tracker};
use crate::options::PostCopy;
use crate::report::millis;

/// How long memory that is still arriving from the last move is waited for.
const BUSY_DEADLINE: Duration = Duration::from_secs(120);
/// How often it is looked at.
const BUSY_POLL: Duration = Duration::from_millis(20);
/// Takes in a row that may meet a task that can't be stopped, each for as long as a freeze is waited for.
const STUCK_TAKES: u32 = 8;

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
    /// CRIU began before it was told what to leave out.
    #[error(
        "CRIU did not wait for the agent to look at the frozen memory: the library that is preloaded into it (`filter` in source.toml) was not asked \
         for a task's smaps; the container was not moved. With `tracker = \"none\"` there, all memory goes in CRIU's images"
    )]
    Unasked,
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

impl MemoryError {
    /// A task could not be stopped just now, and the container goes on.
    fn is_stuck(&self) -> bool {
        matches!(self, Self::Track(TrackError::Cgroup(CgroupError::Stuck { .. })))
    }
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
    /// Of those, sent as what has changed in them since they were sent last.
    #[serde(default)]
    pub changed_pages: u64,
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
    limits: Arc<Mutex<Limits>>,
    throttling: Throttling,
    /// Known parts of the downtime.
    outlook: Outlook,
    residuals: Vec<u64>,
    /// Bytes a second of the last rounds.
    speeds: VecDeque<f64>,
    last_take: Option<Instant>,
    busy_since: Option<Instant>,
    /// How often in a row a task could not be stopped.
    stuck: u32,
    postcopy: PostCopy,
    /// What was written last is fetched later.
    owes: bool,
    /// How many pages that was.
    pub owed_pages: u64,
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
        /// Of the downtime, what would be so if there were nothing left to copy, in milliseconds.
        rest_ms: f64,
    },
    /// It is time to freeze, and what was written last is to be fetched later.
    PostCopy,
    /// Nothing can be looked at just now, for this reason.
    Waiting(&'static str),
}

/// What the last round found.
pub struct LastRound {
    looked: Looked,
    hidden: Vec<Hidden>,
}

impl Precopy {
    /// Nothing is touched yet.
    pub fn new(
        tracker: Box<dyn Tracker>,
        lanes: Lanes,
        freezer: Freezer,
        limits: Limits,
        outlook: Outlook,
        postcopy: PostCopy,
        throttling: Throttling,
    ) -> Self {
        Self {
            tracker: Arc::new(Mutex::new(tracker)),
            lanes,
            freezer,
            limits: Arc::new(Mutex::new(limits)),
            throttling,
            outlook,
            residuals: Vec::new(),
            speeds: VecDeque::new(),
            last_take: None,
            busy_since: None,
            stuck: 0,
            postcopy,
            owes: false,
            owed_pages: 0,
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

    /// What the user allows, which may be changed while a step is under way.
    pub fn limits(&self) -> Arc<Mutex<Limits>> {
        self.limits.clone()
    }

    /// The downtime wanted.
    pub fn max_downtime(&self) -> Duration {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner).max_downtime
    }

    /// Changes how fast memory may be sent while the container runs.
    pub fn pacers(&self) -> Pacers {
        self.lanes.pacers()
    }

    /// What was taken from the container of its processor time.
    pub fn throttled(&self) -> Option<ThrottleReport> {
        self.throttling.report()
    }

    /// Gives the container its processor time back: it is about to be frozen.
    pub fn give_back(&self) {
        self.throttling.give_back();
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
                return Ok(Step::Waiting("memory of the last move is still arriving here"));
            }
            // A tracker that stops the container met a task that can't be stopped now.
            Err(error) if error.is_stuck() && self.stuck < STUCK_TAKES => {
                self.stuck += 1;
                tokio::time::sleep(BUSY_POLL).await;
                return Ok(Step::Waiting("a task waits in the kernel and can't be stopped just now"));
            }
            Err(error) => return Err(error),
        };
        self.stuck = 0;
        let since = self.last_take.replace(start).map(|last| last.elapsed());
        let bytes: u64 = taken.iter().map(SpacePages::bytes).sum();
        let dirty_mib_per_s = since.map_or(0.0, |since| mib(bytes) / since.as_secs_f64().max(1e-6));
        let is_first = self.rounds.is_empty();
        let prediction = self.predict(bytes);
        self.predicted_ms = millis(prediction);
        // Owed pages are one for each task; those that tasks have in common by fork(2) are found when they are sent.
        let is_now = self.postcopy == PostCopy::Now;
        let first_has_common = is_now && is_first && taken.len() > 1 && bytes > self.outlook.memory_bytes / 4 * 5;
        if is_now && !first_has_common {
            return self.begin_postcopy(taken, start).await;
        }
        let mut limits = *self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        limits.auto_converge &= self.throttling.is_possible();
        if !is_first {
            self.residuals.push(bytes);
            match decide(prediction, &self.residuals, self.rounds.len(), limits) {
                Next::Round => {}
                Next::Freeze => {
                    lock(&self.tracker).put_back(taken);
                    return Ok(Step::Freeze);
                }
                Next::GiveUp => {
                    lock(&self.tracker).put_back(taken);
                    let rest_ms = millis(self.predict(0));
                    return Ok(Step::GiveUp { predicted_ms: millis(prediction), dirty_mib_per_s, rest_ms });
                }
                Next::PostCopy => return self.begin_postcopy(taken, start).await,
                Next::Throttle => {
                    let sent = self.outlook.bytes_per_second;
                    self.throttling.lower(&self.freezer, dirty_mib_per_s * f64::from(1 << 20), sent);
                    self.residuals = vec![bytes];
                }
            }
        }
        let (mut round, lost) = if (limits.postcopy || limits.auto_converge) && !first_has_common {
            self.race(taken, start).await?
        } else {
            (self.send(taken, Tasks::Running, start).await?, false)
        };
        round.dirty_mib_per_s = tenths(dirty_mib_per_s);
        round.predicted_downtime_ms = millis(prediction);
        self.rounds.push(round.clone());
        if lost {
            // What tasks share can't be owed, and came last in the round that was ended.
            let taken = self.take().await?;
            return self.begin_postcopy(taken, Instant::now()).await;
        }
        Ok(Step::Sent(round))
    }

    /// Rounds end here: what tasks share is sent once more, their own memory is owed.
    async fn begin_postcopy(&mut self, taken: Vec<SpacePages>, start: Instant) -> Result<Step, MemoryError> {
        self.owes = true;
        let (own, shared): (Vec<_>, Vec<_>) =
            taken.into_iter().partition(|pages| matches!(pages.origin, Origin::Task(_)));
        lock(&self.tracker).put_back(own);
        if shared.iter().any(|pages| !pages.ranges.is_empty()) {
            let round = self.send(shared, Tasks::Running, start).await?;
            self.rounds.push(round);
        }
        self.predicted_ms = millis(self.predict(0));
        Ok(Step::PostCopy)
    }

    /// Sends a round, and gives the container less processor time if it writes faster than it is sent, or ends the round early;
    /// whether it did that.
    async fn race(&mut self, taken: Vec<SpacePages>, start: Instant) -> Result<(Round, bool), MemoryError> {
        let (meter, stop) = (self.meter(), self.lanes.stop());
        let (freezer, tracker) = (self.freezer.clone(), self.tracker.clone());
        let (limits, throttling) = (self.limits.clone(), self.throttling.clone());
        let before = meter.stored_pages();
        stop.clear();
        let (ended, mut is_ended) = tokio::sync::oneshot::channel::<()>();
        let watching = tokio::spawn(async move {
            let begun = Instant::now();
            let mut looks = Vec::new();
            let mut pause = FIRST_BYTES_EVERY;
            throttling.begin(&freezer);
            loop {
                tokio::select! {
                    _ = &mut is_ended => return false,
                    () = tokio::time::sleep(pause) => {}
                }
                let sent = (meter.stored_pages() - before) * longhaul_common::sys::memory::PAGE;
                if sent == 0 && looks.is_empty() {
                    continue;
                }
                let look_begun = Instant::now();
                let (freezer_then, tracker) = (freezer.clone(), tracker.clone());
                let written = tokio::task::spawn_blocking(move || {
                    freezer_then.tasks().map(|tasks| lock(&tracker).written_bytes(&tasks)).unwrap_or(0)
                });
                let look = Race { at: begun.elapsed(), sent, written: written.await.unwrap_or(0) };
                looks.push(look);
                pause = LOOK_EVERY.max(look_begun.elapsed() * LOOK_SHARE);
                // Nothing is taken from the container any more once the round is over.
                if !matches!(is_ended.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty)) {
                    return false;
                }
                let limits = *limits.lock().unwrap_or_else(PoisonError::into_inner);
                if !is_lost(&looks, limits.max_downtime) {
                    continue;
                }
                let before = looks[looks.len() - 3];
                let (written, sent) = (look.written - before.written, look.sent - before.sent);
                if limits.auto_converge && throttling.lower(&freezer, written as f64, sent as f64) {
                    looks = vec![look];
                } else if limits.postcopy {
                    stop.set();
                    return true;
                }
            }
        });
        let round = self.send(taken, Tasks::Running, start).await;
        let _ = ended.send(());
        let lost = watching.await.unwrap_or(false);
        self.lanes.stop().clear();
        if lost {
            self.predicted_ms = millis(self.predict(0));
        }
        Ok((round?, lost))
    }

    /// Whether what was written last is fetched later.
    pub fn owes(&self) -> bool {
        self.owes
    }

    /// It is time to freeze, whatever the downtime would be: what is too much for it is owed, if that is allowed.
    pub fn owe_if_long(&mut self) {
        let long = Duration::from_secs_f64(self.predicted_ms / 1000.0) > self.max_downtime();
        if long && self.postcopy != PostCopy::Never {
            self.owes = true;
            self.predicted_ms = millis(self.predict(0));
        }
    }

    /// One more round whatever it brings: what was written while the runtimes were started.
    pub async fn last_live_round(&mut self) -> Result<(), MemoryError> {
        let start = Instant::now();
        let mut taken = match self.take().await {
            Ok(taken) => taken,
            // It stays marked as written, and goes while the container is frozen.
            Err(error) if error.is_stuck() => return Ok(()),
            Err(error) => return Err(error),
        };
        if self.owes {
            let is_own = |pages: &SpacePages| matches!(pages.origin, Origin::Task(_));
            let (own, shared): (Vec<_>, Vec<_>) = taken.into_iter().partition(is_own);
            lock(&self.tracker).put_back(own);
            taken = shared;
        }
        self.send(taken, Tasks::Running, start).await.map(drop)
    }

    /// What was written; nothing of an earlier round is under way.
    async fn take(&self) -> Result<Vec<SpacePages>, MemoryError> {
        let tasks = self.freezer.tasks()?;
        let tracker = self.tracker.clone();
        let taken = tokio::task::spawn_blocking(move || lock(&tracker).take(&tasks)).await;
        let taken = taken.map_err(|_| MemoryError::Panicked)??;
        self.lanes.forget(&taken.ended).await?;
        self.lanes.declare(&taken.objects).await?;
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
            changed_pages: pumped.changed,
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

    /// Looks at the frozen container and tells CRIU's library, by a table in `dir`, what to leave out. CRIU may be at work: it has stopped
    /// tasks, and waits before it does more to one.
    pub async fn look_frozen(&self, dir: &Path, answer: filter::Answer) -> Result<LastRound, MemoryError> {
        let tasks = self.freezer.tasks()?;
        let (tracker, dir, replaces_smaps) = (self.tracker.clone(), dir.to_owned(), !self.outlook.reads_smaps);
        let looked = tokio::task::spawn_blocking(move || {
            let looked = lock(&tracker).look_frozen(&tasks)?;
            if replaces_smaps {
                let write =
                    |pid: &i32| flags::summary(*pid).map_or(Ok(()), |text| filter::write_smaps(&dir, *pid, &text));
                of_each(&tasks, write).map_err(MemoryError::Table)?;
            }
            fault::point("source:look");
            let hidden = filter::write_table(&answer, &looked).map_err(MemoryError::Table)?;
            Ok::<_, MemoryError>(LastRound { looked, hidden })
        });
        looked.await.map_err(|_| MemoryError::Panicked)?
    }

    /// Sends what was written last, and what counts in the end. The tasks must stay frozen.
    pub async fn send_last(&mut self, last: &LastRound) -> Result<Round, MemoryError> {
        self.lanes.hurry();
        let (start, wire_before) = (Instant::now(), self.meter().bytes());
        let Looked { tasks, objects } = &last.looked;
        let written =
            |frozen: &Frozen, ranges| SpacePages { origin: Origin::Task(frozen.pid), space: frozen.space, ranges };
        let owed: Vec<SpacePages> =
            tasks.iter().filter(|_| self.owes).map(|frozen| written(frozen, owed_of(frozen))).collect();
        let now = tasks.iter().map(|frozen| {
            written(
                frozen,
                if self.owes { difference(&frozen.written, &owed_of(frozen)) } else { frozen.written.clone() },
            )
        });
        let shared = objects.iter().map(|object| object.written.clone());
        let pumped = self.pump(now.chain(shared).collect(), Tasks::Frozen).await?;
        // Last: what is sent may be said to equal what these pages were before.
        self.lanes.owe(&owed).await?;
        self.owed_pages = owed.iter().map(SpacePages::bytes).sum::<u64>() / longhaul_common::sys::memory::PAGE;
        self.lanes.finish(last.looked.content()).await?;
        Ok(self.report(&pumped, start.elapsed(), wire_before))
    }
}

/// How often it is looked whether a round can be won. What is sent before that is known is sent for nothing as far as it is written again.
const LOOK_EVERY: Duration = Duration::from_millis(75);
/// A look takes no more than one in so many parts of the time: it holds up the container's own mapping of memory.
const LOOK_SHARE: u32 = 10;
/// How often it is looked whether the first content has arrived: a race begins when both run.
const FIRST_BYTES_EVERY: Duration = Duration::from_millis(10);

/// What a task wrote last and may be fetched later: not what must be in place before it runs.
fn owed_of(frozen: &Frozen) -> Vec<Area> {
    difference(&intersection(&frozen.written, &frozen.later), &frozen.at_once)
}

/// Rounds of at least so many bytes say how fast the link is.
const MEASURABLE: u64 = 4 << 20;
/// Rounds whose speed counts.
const MEASURED_ROUNDS: usize = 4;

impl LastRound {
    /// The tasks, by their address spaces.
    pub fn sources(&self) -> Sources {
        self.looked.tasks.iter().map(|task| (task.space, task.pid)).collect()
    }

    /// Compares what CRIU left out with what was sent beside it.
    pub fn check(&self, dir: &Path) -> Result<LeftOut, MemoryError> {
        let said = Said::read(dir);
        match said.compare(&self.hidden) {
            Told::Everything => Ok(LeftOut { smaps: said.smaps > 0, objects: said.objects }),
            Told::Nothing => Err(MemoryError::Unasked),
            Told::Part { pid, told, expected } => Err(MemoryError::Filter { pid, told, expected }),
        }
    }
}

/// What is not in CRIU's images.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// CRIU read no smaps.
    pub smaps: bool,
    /// Shared memory, by its inodes.
    pub objects: Vec<u64>,
}

fn lock(tracker: &Mutex<Box<dyn Tracker>>) -> std::sync::MutexGuard<'_, Box<dyn Tracker>> {
    tracker.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes as MiB, for reports and progress.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
