//! The mark that a host leaves on what it has given away.
//!
//! After a move the source's bundle and trees stay where they were, stopped and unmounted, with this mark in the bundle.
//! A container that returns may take the place of its own stale copy; nothing else is ever overwritten. So a container
//! that moves to and fro leaves one stale copy a host at most.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Its file in the bundle.
const FILE: &str = ".longhaul-moved.json";

/// What was given away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// The container's id.
    pub container: String,
    /// The migration.
    pub migration: String,
    /// Where it went.
    pub to: String,
    /// Paths that hold nothing but the stale copy.
    pub paths: Vec<PathBuf>,
}

impl Moved {
    /// The mark in a bundle.
    pub fn read(bundle: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(bundle.join(FILE)).ok()?).ok()
    }

    /// Leaves the mark.
    pub fn write(&self, bundle: &Path) -> std::io::Result<()> {
        std::fs::write(bundle.join(FILE), serde_json::to_vec_pretty(self)?)
    }

    /// Takes the mark away: the container is back.
    pub fn clear(bundle: &Path) {
        let _ = std::fs::remove_file(bundle.join(FILE));
    }

    /// Whether `path` is part of the stale copy of `container`.
    pub fn covers(&self, container: &str, path: &Path) -> bool {
        self.container == container && self.paths.iter().any(|stale| stale == path)
    }
}
