//! What stands in a migration's way, said so that it can be removed.

use serde::{Deserialize, Serialize};

/// Something found before anything was touched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obstacle {
    /// Which thing: `mount /data`, `task 17 (node)`, `host host2`.
    pub subject: String,
    /// Why it is in the way.
    pub why: String,
    /// What to do about it.
    pub fix: String,
}

impl Obstacle {
    /// An obstacle.
    pub fn new(subject: impl Into<String>, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { subject: subject.into(), why: why.into(), fix: fix.into() }
    }
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}\n    fix: {}", self.subject, self.why, self.fix)
    }
}
