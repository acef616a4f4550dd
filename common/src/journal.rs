//! What an agent must know after it was killed: one small file a migration, replaced as a whole and synced.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// A journal that could not be written.
#[derive(Debug, Error)]
#[error("can't {operation} the journal {path}: is the disk full or read-only?")]
pub struct JournalError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The extension of a record that is being written.
const PARTIAL: &str = "partial";

/// A directory of records.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// The journal in `dir`, made if it is missing.
    pub fn open(dir: PathBuf) -> Result<Self, JournalError> {
        fs::create_dir_all(&dir).map_err(|source| JournalError { operation: "create", path: dir.clone(), source })?;
        // What a killed agent was about to write never took effect.
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == PARTIAL) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(Self { dir })
    }

    /// Replaces a record, durably: when this returns, a power cut leaves the new one.
    pub fn write<T: Serialize>(&self, id: &str, record: &T) -> Result<(), JournalError> {
        let path = self.path(id);
        self.replace(&path, record).map_err(|source| JournalError { operation: "write", path, source })
    }

    fn replace<T: Serialize>(&self, path: &Path, record: &T) -> io::Result<()> {
        let partial = path.with_extension(PARTIAL);
        let mut file = fs::File::create(&partial)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.sync_all()?;
        let dir = fs::File::open(&self.dir)?;
        fs::rename(&partial, path)?;
        // The name is durable once its directory is.
        dir.sync_all().unwrap_or_else(|error| self.end_at_once(&error));
        Ok(())
    }

    /// Whether a record counts must never be unknown: one that failed must not be read later. This one is there, and can't be taken back
    /// where nothing can be written any more. So this is a crash between the record and what follows from it, which the hand-over allows
    /// for; the next agent goes by what it reads.
    fn end_at_once(&self, error: &io::Error) -> ! {
        tracing::error!(%error, dir = %self.dir.display(), "can't tell whether a record is on disk: the agent ends here, and goes on with it when it is started again");
        eprintln!("can't tell whether a record in {} is on disk ({error}): ending", self.dir.display());
        std::process::abort()
    }

    /// A record; nothing if there is none, or none that can be read.
    pub fn read<T: DeserializeOwned>(&self, id: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.path(id)).ok()?).ok()
    }

    /// All records.
    pub fn all<T: DeserializeOwned>(&self) -> Vec<(String, T)> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| {
                let id = entry.file_name().to_str()?.strip_suffix(".json")?.to_owned();
                let record = self.read(&id)?;
                Some((id, record))
            })
            .collect()
    }

    /// Forgets records that were last written longer ago than `age`, where `done` says that nothing hangs on them.
    pub fn prune<T: DeserializeOwned>(&self, age: Duration, done: impl Fn(&T) -> bool) {
        for (id, record) in self.all::<T>() {
            let written = self.written(&id);
            let old = written.is_some_and(|written| written.elapsed().is_ok_and(|elapsed| elapsed > age));
            if old && done(&record) {
                self.remove(&id);
            }
        }
    }

    /// Forgets a record.
    pub fn remove(&self, id: &str) {
        let _ = fs::remove_file(self.path(id));
    }

    /// Forgets a record, durably. This takes no room: it works where one can't be written.
    pub fn forget(&self, id: &str) -> Result<(), JournalError> {
        let path = self.path(id);
        let forgotten = fs::remove_file(&path).and_then(|()| fs::File::open(&self.dir)?.sync_all());
        forgotten.map_err(|source| JournalError { operation: "forget", path, source })
    }

    /// When a record was last written.
    pub fn written(&self, id: &str) -> Option<SystemTime> {
        fs::metadata(self.path(id)).and_then(|metadata| metadata.modified()).ok()
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// Whether a migration's id can be a file name: agents make them of letters, digits and hyphens.
pub fn is_migration_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_replaced_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::open(dir.path().join("j")).expect("opens");
        journal.write("m-1", &1).expect("writes");
        journal.write("m-1", &2).expect("writes");
        assert_eq!(journal.all::<i32>(), [("m-1".to_owned(), 2)]);
        journal.remove("m-1");
        assert_eq!(journal.read::<i32>("m-1"), None);
    }

    #[test]
    fn ids_that_are_paths_are_no_ids() {
        assert!(is_migration_id("web-0a1b"));
        for bad in ["", "../x", "a/b", "a.b"] {
            assert!(!is_migration_id(bad), "{bad}");
        }
    }
}
