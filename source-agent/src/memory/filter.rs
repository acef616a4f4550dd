//! What the library in CRIU's process is told to leave out of its images, and what it did (`common/filter`).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use longhaul_common::host::CriuVersion;
use longhaul_common::sys::memory::PAGE;
use nix::fcntl::{Flock, FlockArg};

use super::maps::{Area, early_pages, intersection, union};
use super::several::of_each;
use super::tracker::Looked;

/// The environment variable that names the table.
const VARIABLE: &str = "LONGHAUL_FILTER";
/// The first line of the table and of the answer.
const VERSION: &str = "longhaul-filter 5";
/// The table's last: without it CRIU fails.
const END: &str = "end";
/// What the library says where CRIU wants to know a task's areas, which is before it does anything to the task.
const WAITED: &str = "waited";

/// Whether it is known what a CRIU wants of smaps: `parse_smaps` of 4.2 takes the first line of each area, and its flags. One that
/// wants more must not be given less.
pub fn knows_smaps_of(criu: CriuVersion) -> bool {
    criu.same_format(CriuVersion(40200))
}

/// The first word of lines about shared memory.
const OBJECT: &str = "object";
/// How the first word of lines about its mappings begins.
const MAPPING: &str = "shared-";
/// How that of lines about where a task may have guards begins.
const GUARDS: &str = "guards-";

/// The table's file.
pub fn table_path(dir: &Path) -> PathBuf {
    dir.join("filter")
}

/// The table that CRIU waits for: its library can't lock the file while this process has it locked. When this ends, however it does,
/// the kernel lets go of the lock, and CRIU goes on by the table; or it fails, if there is no whole one.
#[derive(Debug)]
pub struct Awaited {
    answer: Answer,
    /// The entry of CRIU's environment.
    pub environment: String,
}

/// Where the table is put.
#[derive(Debug, Clone)]
pub struct Answer(Arc<Mutex<Option<Flock<File>>>>);

impl Awaited {
    /// Before CRIU is started. The table is put into `dir`.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let path = table_path(dir);
        let file = File::create(&path)?;
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
        let environment = format!("{VARIABLE}={}", path.display());
        Ok(Self { answer: Answer(Arc::new(Mutex::new(Some(locked)))), environment })
    }

    /// For whoever finds out what is in the table.
    pub fn answer(&self) -> Answer {
        self.answer.clone()
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        drop(self.answer.take());
    }
}

impl Answer {
    fn take(&self) -> Option<Flock<File>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn give(&self, table: &str) -> io::Result<()> {
        let mut file = self.take().ok_or_else(|| io::Error::other("the migration has been given up meanwhile"))?;
        file.write_all(table.as_bytes())
    }
}

/// What CRIU has to leave out of one task.
#[derive(Debug)]
pub struct Hidden {
    pid: i32,
    /// Areas with what is needed early taken out.
    areas: Vec<Area>,
    /// Pages with content: those that may come later, and those that may not.
    content: [Vec<Area>; 2],
}

/// Writes what CRIU is to read instead of a frozen task's smaps. Before the table: CRIU goes on as soon as that is there.
pub fn write_smaps(dir: &Path, pid: i32, summary: &str) -> io::Result<()> {
    std::fs::write(format!("{}.smaps.{pid}", table_path(dir).display()), summary)
}

/// Writes the table for a frozen container: all areas the tracker followed but the pages that are needed early, and shared memory.
pub fn write_table(answer: &Answer, looked: &Looked) -> io::Result<Vec<Hidden>> {
    let mut text = format!("{VERSION}\n");
    let mut all = Vec::new();
    for object in &looked.objects {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{OBJECT} {:x} {:x}", object.device, object.inode);
    }
    let certain = looked.certain_objects();
    let early = of_each(&looked.tasks, |task| early_pages(task.pid))?;
    for (task, early) in looked.tasks.iter().zip(early) {
        let areas = without_pages(&task.followed, &early);
        for range in &areas {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{} {:x} {:x}", task.pid, range.start, range.end);
        }
        for mapping in task.shared.iter().filter(|mapping| certain.contains(&mapping.inode)) {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{MAPPING}{} {:x} {:x}", task.pid, mapping.start, mapping.end);
        }
        // The first says that the task is known: there may be no other.
        let guards = task.guards.iter().flat_map(|guards| std::iter::once(&(0..0)).chain(guards));
        for range in guards {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{GUARDS}{} {:x} {:x}", task.pid, range.start, range.end);
        }
        all.push(Hidden { pid: task.pid, areas, content: [task.later.clone(), task.at_once.clone()] });
    }
    text.push_str(END);
    answer.give(&text)?;
    Ok(all)
}

/// What CRIU's library did.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// It left out all it had to.
    Everything,
    /// It was not asked before CRIU began with tasks, which must not be while the agent looks at them.
    Nothing,
    /// It was asked for some areas of a task only.
    Part {
        /// The task.
        pid: i32,
        /// Pages with content it left out.
        told: u64,
        /// Those it should have.
        expected: u64,
    },
}

/// What CRIU's library says it did.
#[derive(Debug, Default)]
pub struct Said {
    /// CRIU waited for the table where it had to.
    waited: bool,
    /// The areas it left out, by task, in order and without overlaps.
    left_out: BTreeMap<i32, Vec<Area>>,
    /// Tasks whose smaps it replaced, because of [`write_smaps`].
    pub smaps: usize,
    /// Shared memory it left out, by inode.
    pub objects: Vec<u64>,
}

impl Said {
    /// Reads it.
    pub fn read(dir: &Path) -> Self {
        let text = std::fs::read_to_string(format!("{}.told", table_path(dir).display()));
        text.ok().and_then(|text| Self::parse(&text)).unwrap_or_default()
    }

    fn parse(text: &str) -> Option<Self> {
        if text.lines().next() != Some(VERSION) {
            return None;
        }
        // CRIU saves namespaces in processes of their own, and each says it anew.
        let lines = text.lines().filter(|line| *line != VERSION);
        let mut said = Self::default();
        let mut left_out: BTreeMap<i32, Vec<Area>> = BTreeMap::new();
        for line in lines {
            if line == WAITED {
                said.waited = true;
                continue;
            }
            let (subject, rest) = line.split_once(' ')?;
            let numbers = rest.split_once(' ').map(|(one, other)| (number(one), number(other)));
            match (subject, numbers) {
                ("smaps", _) => said.smaps += 1,
                (OBJECT, Some((_, inode))) => said.objects.push(inode?),
                (pid, Some((start, end))) => left_out.entry(pid.parse().ok()?).or_default().push(start?..end?),
                _ => return None,
            }
        }
        // CRIU may ask more than once.
        said.objects.sort_unstable();
        said.objects.dedup();
        said.left_out = left_out.into_iter().map(|(pid, ranges)| (pid, union(ranges))).collect();
        Some(said)
    }

    /// Compares what was left out with what had to be.
    pub fn compare(&self, hidden: &[Hidden]) -> Told {
        if !self.waited {
            return Told::Nothing;
        }
        for hidden in hidden {
            let expected = pages_in(&hidden.areas, &hidden.content);
            let ranges = self.left_out.get(&hidden.pid).map(Vec::as_slice).unwrap_or_default();
            let told = pages_in(ranges, &hidden.content);
            if told != expected {
                return Told::Part { pid: hidden.pid, told, expected };
            }
        }
        Told::Everything
    }
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

fn without_pages(areas: &[Area], pages: &[u64]) -> Vec<Area> {
    let mut left = Vec::new();
    for area in areas {
        let mut start = area.start;
        for &page in pages.iter().filter(|page| area.contains(page)) {
            if page > start {
                left.push(start..page);
            }
            start = page + PAGE;
        }
        if start < area.end {
            left.push(start..area.end);
        }
    }
    left
}

/// Pages of `content` within `areas`; all are in order.
fn pages_in(areas: &[Area], content: &[Vec<Area>]) -> u64 {
    let both = content.iter().flat_map(|content| intersection(content, areas));
    both.map(|range| (range.end - range.start) / PAGE).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn early_pages_stay_visible() {
        let areas = [0x1000..0x5000, 0x8000..0x9000];
        assert_eq!(without_pages(&areas, &[0x2000, 0x8000]), [0x1000..0x2000, 0x3000..0x5000]);
        let content = [vec![0x1000..0x4000], vec![0x8000..0x9000]];
        assert_eq!(pages_in(&[0x1000..0x2000, 0x3000..0x5000], &content), 2);
    }

    #[test]
    fn an_answer_is_compared_with_what_was_asked_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let content = [vec![0x1000..0x3000], vec![0x3000..0x5000]];
        let hidden = [Hidden { pid: 5, areas: vec![0x1000..0x8000], content }];
        let told = |hidden: &[Hidden]| Said::read(dir.path()).compare(hidden);
        assert_eq!(told(&hidden), Told::Nothing);
        let told_file = dir.path().join("filter.told");
        std::fs::write(
            &told_file,
            "longhaul-filter 5\nwaited\n5 1000 3000\nsmaps 5\n6 0 1000\nlonghaul-filter 5\nobject 1 ff\n5 2000 8000\nobject 1 ff\n",
        )
        .expect("writes");
        let said = Said::read(dir.path());
        assert_eq!((told(&hidden), said.smaps, said.objects), (Told::Everything, 1, vec![0xff]));
        std::fs::write(&told_file, "longhaul-filter 5\nwaited\n5 1000 3000\n").expect("writes");
        assert_eq!(told(&hidden), Told::Part { pid: 5, told: 2, expected: 4 });
        std::fs::write(&told_file, "longhaul-filter 5\n5 1000 8000\n").expect("writes");
        assert_eq!(told(&hidden), Told::Nothing);
    }

    #[test]
    fn an_answer_that_comes_too_late_is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let is_locked = || {
            let file = File::open(table_path(dir.path())).expect("opens");
            Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
        };
        let content = || std::fs::read_to_string(table_path(dir.path())).expect("reads");
        let awaited = Awaited::new(dir.path()).expect("locks");
        assert!(is_locked());
        assert!(write_table(&awaited.answer(), &Looked::default()).is_ok());
        assert!(!is_locked() && content().ends_with(END));
        let awaited = Awaited::new(dir.path()).expect("locks");
        let answer = awaited.answer();
        assert!(is_locked());
        drop(awaited);
        assert!(!is_locked());
        assert!(write_table(&answer, &Looked::default()).is_err());
        assert_eq!(content(), "");
    }
}
