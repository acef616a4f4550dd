//! The seam to CRIU: its RPC, and the hold that keeps it waiting at the two moments that matter.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

pub mod hold;
pub mod rpc;

/// Lines of CRIU's log that say "Error" and mean nothing.
const HARMLESS: [&str; 2] = ["rlimit: Can't setup RLIMIT_NOFILE", "Can't set oom_score_adj"];

/// The first two errors of a CRIU log, joined; nothing if there is none.
pub fn failure_of(log: &Path) -> Option<String> {
    let bytes = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let errors: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once("Error (").map(|(_, rest)| rest))
        .filter(|line| !HARMLESS.iter().any(|harmless| line.contains(harmless)))
        .map(|line| line.split_once("): ").map_or(line, |(_, message)| message).trim())
        .take(2)
        .collect();
    (!errors.is_empty()).then(|| errors.join("; "))
}

/// Failed migrations whose logs are kept.
const KEPT_LOGS: usize = 20;

/// Keeps the logs of a failure where a person finds them, `<state>/failed/<migration>`, and returns that directory.
pub fn keep_logs(work: &Path, state: &Path, migration: &str) -> io::Result<PathBuf> {
    let all = state.join("failed");
    let kept = all.join(migration);
    std::fs::create_dir_all(&kept)?;
    for entry in std::fs::read_dir(work)?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "log") {
            std::fs::copy(entry.path(), kept.join(entry.file_name()))?;
        }
    }
    let mut others: Vec<_> = std::fs::read_dir(&all)?.flatten().collect();
    others.sort_by_key(|entry| entry.metadata().and_then(|metadata| metadata.modified()).ok());
    for old in others.iter().take(others.len().saturating_sub(KEPT_LOGS)) {
        std::fs::remove_dir_all(old.path())?;
    }
    Ok(kept)
}

/// A `PATH` on which `criu` is the hold, by a link in `dir`.
pub fn path_with_hold(dir: &Path, hold: &Path) -> io::Result<OsString> {
    if !hold.is_file() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} is not installed", hold.display())));
    }
    let bin = dir.join("bin");
    std::fs::create_dir_all(&bin)?;
    let link = bin.join("criu");
    let _ = std::fs::remove_file(&link);
    symlink(hold, &link)?;
    // CRIU packs every tmpfs with `tar --gzip`, at some 25 MB/s, while the container is frozen: what the library does not pack by itself
    // (`common/filter/src/archive.rs`). The hold under the name of gzip passes bytes through; both hosts have it on their path, so what
    // one packs the other unpacks.
    let link = bin.join("gzip");
    let _ = std::fs::remove_file(&link);
    symlink(hold, &link)?;
    let mut path = bin.into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmless_errors_are_no_failure() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("dump.log");
        std::fs::write(&log, "(00.1) Error (criu/rlimit.c:40): rlimit: Can't setup RLIMIT_NOFILE for self\n")
            .expect("writes");
        assert_eq!(failure_of(&log), None);
        std::fs::write(&log, "(00.1) Error (criu/a.c:4): it broke\n(00.2) Error (criu/b.c:4): so all broke\n")
            .expect("writes");
        assert_eq!(failure_of(&log).as_deref(), Some("it broke; so all broke"));
    }
}
