//! Migrations under way and those that ended, with their events.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::custody::Decision;
use crate::options::Tuning;
use crate::report::{Outcome, Report};

/// Ended migrations whose reports are kept for `migrate status`.
const KEPT: usize = 100;
/// Events a slow follower may be behind; it then misses some, never the end.
const EVENTS: usize = 256;

/// Something a follower sees.
#[derive(Debug, Clone)]
pub enum JobEvent {
    /// A phase began.
    Phase(&'static str),
    /// A phase got on.
    Progress {
        /// The phase.
        phase: &'static str,
        /// What it did.
        what: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all; 0 if not known.
        total: u64,
    },
    /// It ended, or is in doubt.
    Finished(Box<Report>),
}

/// One migration.
#[derive(Debug)]
pub struct Job {
    report: Mutex<Report>,
    /// Nothing once it has ended: its report stays for long, room for hundreds of events must not.
    events: Mutex<Option<broadcast::Sender<JobEvent>>>,
    started: Instant,
    /// Asks it to end before the commit.
    pub cancel: CancellationToken,
    held: Mutex<Option<PathBuf>>,
    /// What an operator decided while it was in doubt.
    pub decision: watch::Sender<Option<Decision>>,
    /// What was changed of it since it began.
    pub tuning: watch::Sender<Tuning>,
}

impl Job {
    /// A migration that begins.
    pub fn new(report: Report) -> Arc<Self> {
        let (events, _) = broadcast::channel(EVENTS);
        Arc::new(Self {
            report: Mutex::new(report),
            events: Mutex::new(Some(events)),
            started: Instant::now(),
            cancel: CancellationToken::new(),
            held: Mutex::new(None),
            decision: watch::Sender::new(None),
            tuning: watch::Sender::new(Tuning::default()),
        })
    }

    /// Its events from now on.
    pub fn follow(&self) -> broadcast::Receiver<JobEvent> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.as_ref().map_or_else(|| broadcast::channel(1).1, broadcast::Sender::subscribe)
    }

    /// Tells followers.
    pub fn tell(&self, event: JobEvent) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = matches!(&event, JobEvent::Finished(report) if !matches!(report.outcome, Outcome::Running | Outcome::InDoubt));
        // Nobody may be listening.
        let _ = events.as_ref().map(|events| events.send(event));
        if ends {
            *events = None;
        }
    }

    /// What is known of it now.
    pub fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what is known of it.
    pub fn note(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Its container is held, in this cgroup.
    pub fn hold(&self, cgroup: PathBuf) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(cgroup);
    }

    /// The cgroup in which its container is, or was, held.
    pub fn held(&self) -> Option<PathBuf> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long it has been going.
    pub fn elapsed(&self) -> std::time::Duration {
        self.started.elapsed()
    }
}

/// All migrations of an agent.
#[derive(Debug, Default)]
pub struct Jobs {
    all: Mutex<VecDeque<Arc<Job>>>,
}

/// A migration that can't be started or found.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The container is moving already.
    #[error("container {0} is being moved already: `migrate status`")]
    Busy(String),
    /// None of that name.
    #[error("{}", if .0.is_empty() { "no migration is under way".to_owned() } else { format!("no migration of {:?} is under way", .0) })]
    Unknown(String),
    /// None of that name is in doubt.
    #[error("{} is in doubt: `migrate status`", if .0.is_empty() { "no migration".to_owned() } else { format!("no migration of {:?}", .0) })]
    NoDoubt(String),
    /// More than one.
    #[error("several migrations are meant: name the container")]
    Several,
}

impl Jobs {
    /// Adds a migration, unless its container is moving already.
    pub fn start(&self, report: Report) -> Result<Arc<Job>, JobError> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = all.iter().map(|job| job.report()).any(|other| {
            other.container == report.container && matches!(other.outcome, Outcome::Running | Outcome::InDoubt)
        });
        if busy {
            return Err(JobError::Busy(report.container));
        }
        let job = Job::new(report);
        all.push_back(job.clone());
        while all.len() > KEPT {
            let Some(index) = all.iter().position(|job| job.report().outcome != Outcome::Running) else { break };
            all.remove(index);
        }
        Ok(job)
    }

    /// All reports, oldest first.
    pub fn reports(&self) -> Vec<Report> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|job| job.report()).collect()
    }

    /// The migration under way that is meant: by its id, its container, or as the only one.
    pub fn running(&self, which: &str) -> Result<Arc<Job>, JobError> {
        self.one(which, Outcome::Running, || JobError::Unknown(which.to_owned()))
    }

    /// The migration in doubt that is meant, likewise.
    pub fn in_doubt(&self, which: &str) -> Result<Arc<Job>, JobError> {
        self.one(which, Outcome::InDoubt, || JobError::NoDoubt(which.to_owned()))
    }

    fn one(&self, which: &str, outcome: Outcome, none: impl FnOnce() -> JobError) -> Result<Arc<Job>, JobError> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let mut meant = all.iter().filter(|job| {
            let report = job.report();
            report.outcome == outcome && (which.is_empty() || report.migration == which || report.container == which)
        });
        let first = meant.next().ok_or_else(none)?;
        if meant.next().is_some() {
            return Err(JobError::Several);
        }
        Ok(first.clone())
    }

    /// Every migration under way.
    pub fn all_running(&self) -> Vec<Arc<Job>> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|job| job.report().outcome == Outcome::Running).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_moves_once_at_a_time() {
        let jobs = Jobs::default();
        let job = jobs.start(Report::begin("m1", "web", "b")).expect("starts");
        assert!(matches!(jobs.start(Report::begin("m2", "web", "c")), Err(JobError::Busy(_))));
        assert!(jobs.running("").is_ok() && jobs.running("web").is_ok() && jobs.running("m1").is_ok());
        job.note(|report| report.outcome = Outcome::Moved);
        jobs.start(Report::begin("m3", "web", "c")).expect("starts again");
        assert!(matches!(jobs.running("db"), Err(JobError::Unknown(_))));
    }
}
