//! Has content of files in memory before a container stands still.
//!
//! What CRIU, the runtime and the container's own programs have mapped they read from the disk when they touch it, if it was not used for
//! a while: the host has given its place to something else, or this host has never had it in memory. While the container stands still each such
//! page costs what the disk takes for it, behind whatever the container has just written: 300 to 500 ms in all were seen, of a downtime of 250.
//!
//! Nothing here fails: what can't be read now is read when it is needed.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::sys::memory::{PAGE, populate};
use crate::tasks::with_descendants;

/// The longest it may take: a disk that is slower will be, whatever is done here.
const DEADLINE: Duration = Duration::from_secs(3);
/// The most of one file, and of all: programs and their libraries, no databases. Bytes.
const MOST_OF_ONE: u64 = 64 << 20;
const MOST_OF_ALL: u64 = 256 << 20;
/// Read at once, in bytes.
const PART: u64 = 4 << 20;

/// The runtime, the hold and CRIU.
const ALL_THREE: usize = 3;
/// How often it is looked for them, and after what time.
const STARTS: u32 = 10;
const START_EVERY: Duration = Duration::from_millis(20);

/// What may still be spent.
struct Budget {
    end: Instant,
    bytes: u64,
}

impl Budget {
    fn new() -> Self {
        Self { end: Instant::now() + DEADLINE, bytes: MOST_OF_ALL }
    }

    fn is_spent(&self) -> bool {
        self.bytes == 0 || Instant::now() >= self.end
    }

    /// Has the beginning of a file in memory.
    fn spend(&mut self, file: &File) -> io::Result<()> {
        let length = file.metadata()?.len().min(MOST_OF_ONE).next_multiple_of(PAGE);
        let mut start = 0;
        while start < length && !self.is_spent() {
            let end = length.min(start + PART.min(self.bytes.next_multiple_of(PAGE)));
            populate(file, start..end)?;
            self.bytes = self.bytes.saturating_sub(end - start);
            start = end;
        }
        Ok(())
    }
}

/// Has in memory what a runtime, the hold and CRIU have mapped, as soon as they wait: meanwhile other things can be done.
pub fn runtime(pid: Option<u32>) {
    let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) else { return };
    tokio::spawn(async move {
        for _ in 0..STARTS {
            if with_descendants(pid).len() >= ALL_THREE {
                break;
            }
            tokio::time::sleep(START_EVERY).await;
        }
        // The last of them still loads its libraries.
        tokio::time::sleep(START_EVERY).await;
        tokio::task::spawn_blocking(move || programs(&with_descendants(pid))).await
    });
}

/// Has in memory what processes have mapped of programs and libraries.
fn programs(pids: &[i32]) {
    let mut budget = Budget::new();
    let mut seen = std::collections::BTreeSet::new();
    for pid in pids {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        for path in maps.lines().filter_map(mapped_privately) {
            if seen.insert(path.to_owned()) {
                let root = PathBuf::from(format!("/proc/{pid}/root"));
                warm(&root, path, &mut budget);
            }
        }
    }
}

/// Has files in memory that are in one of several trees: in the first that has them.
pub fn files<'a>(trees: &[PathBuf], paths: impl IntoIterator<Item = &'a str>) {
    let mut budget = Budget::new();
    for path in paths {
        if !trees.iter().any(|tree| warm(tree, path, &mut budget)) && budget.is_spent() {
            return;
        }
    }
}

/// Whether a tree has the file.
fn warm(tree: &Path, path: &str, budget: &mut Budget) -> bool {
    let Ok(file) = open(tree, path) else { return false };
    if !budget.is_spent()
        && let Err(error) = budget.spend(&file)
    {
        tracing::debug!(path, %error, "can't have a file in memory before it is needed");
    }
    true
}

/// Opens a regular file of a tree, and nothing outside of it.
fn open(tree: &Path, path: &str) -> io::Result<File> {
    let root = File::open(tree)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file: OwnedFd = openat2(&root, path, flags, Mode::empty(), inside)?;
    let file = File::from(file);
    let kind = file.metadata()?.file_type();
    if kind.is_file() && !kind.is_char_device() { Ok(file) } else { Err(io::Error::other("no regular file")) }
}

/// The file of an area, by its line in `/proc/<pid>/maps` (proc_pid_maps(5)): one that is mapped privately, as programs are, and has its name
/// still.
pub fn mapped_privately(line: &str) -> Option<&str> {
    let mut words = line.splitn(6, ' ');
    let (_, protection) = (words.next()?, words.next()?);
    let path = words.nth(3)?.trim_start();
    let is_plain = path.starts_with('/') && !path.ends_with(" (deleted)") && !path.contains('\\');
    (protection.ends_with('p') && is_plain).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_mappings_of_files_that_are_there_count() {
        let line = "7f00-7fff r-xp 00000000 00:54 815                 /usr/lib/lib x.so";
        assert_eq!(mapped_privately(line), Some("/usr/lib/lib x.so"));
        for other in [
            "7f00-7fff rw-s 00000000 00:54 815 /data",
            "7f00-7fff r-xp 00000000 00:54 815 /usr/lib/old.so (deleted)",
            "7f00-7fff rw-p 00000000 00:00 0 [heap]",
            "7f00-7fff rw-p 00000000 00:00 0",
            "",
        ] {
            assert_eq!(mapped_privately(other), None, "{other}");
        }
    }

    #[test]
    fn the_first_tree_that_has_a_file_counts_and_none_is_left() {
        let (upper, lower) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        std::fs::write(lower.path().join("a"), vec![1; 10_000]).expect("writes");
        std::os::unix::fs::symlink("/etc/hostname", upper.path().join("link")).expect("links");
        let mut budget = Budget::new();
        assert!(!warm(upper.path(), "/a", &mut budget));
        assert!(warm(lower.path(), "/a", &mut budget));
        assert_eq!(MOST_OF_ALL - budget.bytes, 12_288);
        assert!(!warm(upper.path(), "/link", &mut budget), "leads out of the tree");
        assert!(!warm(upper.path(), "/", &mut budget), "a directory");
        files(&[upper.path().to_owned(), lower.path().to_owned()], ["/a", "/b", "/../a"]);
    }

    #[test]
    fn this_process_is_warmed() {
        programs(&[std::process::id().cast_signed(), i32::MAX]);
    }
}
