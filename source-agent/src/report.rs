//! What a migration was: the document that `migrate --format json` prints.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use longhaul_common::obstacle::Obstacle;
use serde::{Deserialize, Serialize};

use crate::memory::precopy::Round;
use crate::memory::throttle::ThrottleReport;

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Under way.
    Running,
    /// The container runs on the destination.
    Moved,
    /// Nothing was in the way of a dry run.
    WouldMove,
    /// Something was in the way; nothing was touched.
    Refused,
    /// It failed; the container runs here.
    Failed,
    /// The user ended it; the container runs here.
    Cancelled,
    /// The destination's answer was lost: the container is frozen here until it is known.
    InDoubt,
    /// It was in doubt, and an operator kept the container here.
    Kept,
    /// It was in doubt, and an operator ended the container here.
    Disowned,
}

/// One migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Its id.
    pub migration: String,
    /// The container.
    pub container: String,
    /// Where it was to go.
    pub to: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The phase it is in, or ended in.
    pub phase: String,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// What was in the way.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub obstacles: Vec<Obstacle>,
    /// When it began, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// From its beginning to its end, in milliseconds.
    pub total_ms: f64,
    /// From the freeze to the destination's word that the container runs, by this agent's clock, in milliseconds.
    pub downtime_ms: Option<f64>,
    /// Memory the container had in use, in bytes.
    pub memory_bytes: u64,
    /// Bytes sent: memory, files and images.
    pub bytes_on_wire: u64,
    /// How memory was moved.
    #[serde(default)]
    pub memory: MemoryReport,
    /// Passes over the root filesystem and the volumes, the last included.
    pub rootfs_passes: u32,
    /// Freezes that were tried; those before the last were given up, because a task could not be stopped.
    #[serde(default)]
    pub freezes: u32,
    /// Each phase's duration, in milliseconds.
    pub phases: BTreeMap<String, f64>,
    /// The steps within the downtime, in milliseconds; those of the destination begin with `destination.`.
    pub downtime_steps: BTreeMap<String, f64>,
    /// Versions that took part: `criu`, `source-kernel`, `destination-kernel`, …
    pub versions: BTreeMap<String, String>,
}

/// A migration in doubt: what `migrate recover` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Doubt {
    /// The migration's id.
    pub migration: String,
    /// The container.
    pub container: String,
    /// Where it was to go.
    pub to: String,
    /// `in-doubt`, or what an operator's decision made of it: `kept`, `disowned`.
    pub outcome: Outcome,
    /// The phase it is in: `post-copy` if the destination has taken the container and lacks a part of its memory.
    #[serde(default)]
    pub phase: String,
    /// When the migration began, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// Tasks of the container that are frozen here.
    pub tasks_here: usize,
    /// What came of asking the destination last.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

impl Doubt {
    /// From a migration's report.
    pub fn of(report: Report, tasks_here: usize) -> Self {
        let Report { migration, container, to, outcome, phase, started_unix_ms, error, .. } = report;
        Self { migration, container, to, outcome, phase, started_unix_ms, tasks_here, error }
    }
}

/// How memory was moved.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MemoryReport {
    /// What told which pages were written: `userfaultfd-wp`; nothing if all memory went while frozen.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tracker: Option<String>,
    /// How it came into place: `lazy`, after the container ran again; `eager`, before; `images`, in CRIU's images.
    pub path: String,
    /// Why a better way was not taken.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fallback: Option<String>,
    /// Rounds while the container ran.
    pub rounds: Vec<Round>,
    /// The one while it was frozen.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_round: Option<Round>,
    /// The downtime that was predicted at the freeze, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub predicted_downtime_ms: Option<f64>,
    /// The longest that a thread was stopped so that its memory could be tracked, in milliseconds.
    pub longest_stop_ms: f64,
    /// What told CRIU the flags of areas: `iterator`, in the kernel; `smaps`, which takes 15 ms for each GiB of the container.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub flags_from: Option<String>,
    /// Pages in the destination's store when the container was restored.
    pub stored_pages: u64,
    /// What was taken from the container of its processor time while memory was copied.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub throttled: Option<ThrottleReport>,
    /// What came after the container ran there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub postcopy: Option<PostCopyReport>,
}

/// What came of the container's memory after it ran on the destination.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Pages that had not come when it was restored.
    pub owed_pages: u64,
    /// Pages that were sent since.
    pub sent_pages: u64,
    /// Of those, asked for because a task waited for them, or for one before them.
    pub urgent_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// From the commit until all had come, in milliseconds.
    pub ms: f64,
    /// Connections that broke on the way.
    pub breaks: u32,
}

impl MemoryReport {
    /// All memory goes in CRIU's images, for this reason.
    pub fn images(reason: String) -> Self {
        Self { path: "images".to_owned(), fallback: Some(reason), ..Self::default() }
    }
}

impl Report {
    /// A migration that begins now.
    pub fn begin(migration: &str, container: &str, to: &str) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            migration: migration.to_owned(),
            container: container.to_owned(),
            to: to.to_owned(),
            outcome: Outcome::Running,
            phase: String::new(),
            error: None,
            obstacles: Vec::new(),
            started_unix_ms: u64::try_from(started.as_millis()).unwrap_or(u64::MAX),
            total_ms: 0.0,
            downtime_ms: None,
            memory_bytes: 0,
            bytes_on_wire: 0,
            memory: MemoryReport::default(),
            rootfs_passes: 0,
            freezes: 0,
            phases: BTreeMap::new(),
            downtime_steps: BTreeMap::new(),
            versions: BTreeMap::new(),
        }
    }

    /// The exit code of `migrate`.
    pub fn exit_code(&self) -> u8 {
        match self.outcome {
            Outcome::Moved | Outcome::WouldMove => 0,
            Outcome::Refused => 3,
            Outcome::InDoubt => 5,
            Outcome::Failed | Outcome::Cancelled | Outcome::Running | Outcome::Kept | Outcome::Disowned => 1,
        }
    }
}

/// Milliseconds to a hundredth.
pub fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100_000.0).round() / 100.0
}

/// What `migrate check` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Findings {
    /// The container that was looked at, if one was.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub container: Option<String>,
    /// The destination that was asked, if one was.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub to: Option<String>,
    /// What is in the way.
    pub obstacles: Vec<Obstacle>,
    /// What was found in order.
    pub passed: Vec<String>,
}
