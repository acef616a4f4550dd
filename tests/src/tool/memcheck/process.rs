//! One process's writers, and how they pause.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::churn::Churn;
use super::common::{Common, Share};
use super::slice::{Kind, Slice};
use crate::tool::check::Failures;
use crate::tool::sys::mem::PAGE;

/// Writers work in batches of this length in time: often enough for an even rate, seldom enough to cost little.
const BATCH: Duration = Duration::from_millis(5);
/// A writer does not catch up on more than this after it was frozen: the rate is a limit, not a debt.
const MOST_DEBT: Duration = Duration::from_millis(20);
/// Pause between two changes of the address space.
const CHURN_INTERVAL: Duration = Duration::from_millis(20);

/// Updates a second that each process makes to the memory of all.
const COMMON_RATE: f64 = 1000.0;

/// Memory that knows what it should hold.
pub(super) trait Memory: Send {
    /// How many pages there are.
    fn pages(&self) -> usize;

    /// Verifies one page and writes its next state.
    fn update(&mut self) -> Result<(), String>;

    /// Verifies all pages.
    fn verify(&self) -> Vec<String>;
}

/// Memory of which one thread writes at a time.
type Shelf = Arc<Mutex<dyn Memory>>;

/// What one process is to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Which process this is.
    pub(super) index: usize,
    /// Bytes of self-checking memory.
    pub(super) bytes: usize,
    /// Pages a second, all threads together.
    pub(super) rate: u64,
    /// Writing threads.
    pub(super) threads: usize,
    /// Whether one more thread changes the address space.
    pub(super) churn: bool,
    /// Decides all choices.
    pub(super) seed: u64,
}

/// The running writers of this process.
pub(super) struct Writers {
    shelves: Vec<Shelf>,
    churn: Arc<Mutex<Churn>>,
    failures: Arc<Mutex<Failures>>,
    updates: Arc<AtomicU64>,
}

impl Writers {
    /// Maps the memory and starts the threads; `common` is what all processes share.
    pub(super) fn start(plan: Plan, common: Option<&Arc<Common>>) -> anyhow::Result<Self> {
        let failures = Arc::new(Mutex::new(Failures::default()));
        let updates = Arc::new(AtomicU64::new(0));
        let pages = (plan.bytes / PAGE / plan.threads).max(1);
        let rate = plan.rate as f64 / plan.threads as f64;
        let mut writers: Vec<(Shelf, f64)> = Vec::new();
        for thread in 0..plan.threads {
            let first_id = ((plan.index * plan.threads + thread) as u64) << 24;
            let slice = Slice::create(Kind::nth(plan.index + thread), pages, first_id, plan.seed)?;
            writers.push((Arc::new(Mutex::new(slice)), rate));
        }
        if let Some(common) = common {
            let share = Share::new(Arc::clone(common), plan.seed + plan.index as u64);
            writers.push((Arc::new(Mutex::new(share)), COMMON_RATE));
        }
        let shelves = writers.iter().map(|(shelf, _)| Arc::clone(shelf)).collect();
        for (thread, (shelf, rate)) in writers.into_iter().enumerate() {
            let writer = Writer { shelf, failures: Arc::clone(&failures), updates: Arc::clone(&updates), rate };
            thread::Builder::new().name(format!("mc-writer-{thread}")).spawn(move || writer.write_for_ever())?;
        }
        let churn = Arc::new(Mutex::new(Churn::new(plan.seed + plan.index as u64)));
        if plan.churn {
            let (churn, failures) = (Arc::clone(&churn), Arc::clone(&failures));
            thread::Builder::new().name("mc-churn".into()).spawn(move || churn_for_ever(&churn, &failures))?;
        }
        Ok(Self { shelves, churn, failures, updates })
    }

    /// Pauses all threads, verifies all pages, and lets the threads go on.
    pub(super) fn verify(&self) -> Summary {
        let _still = lock(&self.churn);
        let paused: Vec<MutexGuard<'_, dyn Memory>> = self.shelves.iter().map(|shelf| lock(shelf)).collect();
        let mut failures = lock(&self.failures);
        for memory in &paused {
            memory.verify().into_iter().for_each(|failure| failures.add(failure));
        }
        Summary {
            pages: paused.iter().map(|memory| memory.pages()).sum(),
            updates: self.updates.load(Ordering::Relaxed),
            failures: failures.all().to_vec(),
        }
    }
}

/// What a process says about its memory.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Summary {
    /// Pages that were verified.
    pub(super) pages: usize,
    /// Updates since the start.
    pub(super) updates: u64,
    /// All failures since the start.
    pub(super) failures: Vec<String>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Writer {
    shelf: Shelf,
    failures: Arc<Mutex<Failures>>,
    updates: Arc<AtomicU64>,
    rate: f64,
}

impl Writer {
    fn write_for_ever(&self) {
        let mut last = Instant::now();
        let mut credit = 0.0;
        loop {
            thread::sleep(BATCH);
            let now = Instant::now();
            credit += self.rate * (now - last).min(MOST_DEBT).as_secs_f64();
            last = now;
            let batch = credit as u64;
            credit -= batch as f64;
            self.write_batch(batch);
        }
    }

    fn write_batch(&self, batch: u64) {
        let mut memory = lock(&self.shelf);
        for _ in 0..batch {
            if let Err(failure) = memory.update() {
                lock(&self.failures).add(failure);
            }
        }
        self.updates.fetch_add(batch, Ordering::Relaxed);
    }
}

fn churn_for_ever(churn: &Mutex<Churn>, failures: &Mutex<Failures>) {
    loop {
        thread::sleep(CHURN_INTERVAL);
        let found = lock(churn).step().unwrap_or_else(|error| vec![format!("churn: {error:#}")]);
        found.into_iter().for_each(|failure| lock(failures).add(failure));
    }
}
