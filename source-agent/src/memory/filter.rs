//! What the library in CRIU's process is told to leave out of its images, and what it did (`common/filter`).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use longhaul_common::sys::memory::PAGE;

use super::maps::{Area, early_pages, intersection};
use super::tracker::Frozen;

/// The environment variable that names the table.
const VARIABLE: &str = "LONGHAUL_FILTER";
/// The first line of the table and of the answer.
const VERSION: &str = "longhaul-filter 1";

/// The table's file.
pub fn table_path(dir: &Path) -> PathBuf {
    dir.join("filter")
}

/// The entry of CRIU's environment.
pub fn environment(dir: &Path) -> String {
    format!("{VARIABLE}={}", table_path(dir).display())
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

/// Writes the table for a frozen container: all areas the tracker followed but the pages that are needed early.
pub fn write_table(dir: &Path, frozen: &[Frozen]) -> io::Result<Vec<Hidden>> {
    let mut text = format!("{VERSION}\n");
    let mut all = Vec::new();
    for task in frozen {
        let areas = without_pages(&task.followed, &early_pages(task.pid)?);
        for range in &areas {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{} {:x} {:x}", task.pid, range.start, range.end);
        }
        all.push(Hidden { pid: task.pid, areas, content: [task.later.clone(), task.at_once.clone()] });
    }
    // Whole or not at all: CRIU is waiting already.
    let path = table_path(dir);
    let partial = path.with_extension("partial");
    std::fs::write(&partial, text)?;
    std::fs::rename(partial, path)?;
    Ok(all)
}

/// What CRIU's library did.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// It left out all it had to.
    Everything,
    /// It was never asked: CRIU's images hold all memory.
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

/// Compares what CRIU's library says it left out with what it had to.
pub fn told(dir: &Path, hidden: &[Hidden]) -> Told {
    let expected = |hidden: &Hidden| pages_in(&hidden.areas, &hidden.content);
    let Some(told) = read_told(dir) else {
        let nothing = hidden.iter().all(|hidden| expected(hidden) == 0);
        return if nothing { Told::Everything } else { Told::Nothing };
    };
    for hidden in hidden {
        let expected = expected(hidden);
        let ranges = told.get(&hidden.pid).map(Vec::as_slice).unwrap_or_default();
        let told = pages_in(ranges, &hidden.content);
        if told != expected {
            return Told::Part { pid: hidden.pid, told, expected };
        }
    }
    Told::Everything
}

/// The areas CRIU's library left out, by task, in order and without overlaps.
fn read_told(dir: &Path) -> Option<BTreeMap<i32, Vec<Area>>> {
    let text = std::fs::read_to_string(format!("{}.told", table_path(dir).display())).ok()?;
    let mut lines = text.lines();
    if lines.next() != Some(VERSION) {
        return None;
    }
    let mut told: BTreeMap<i32, Vec<Area>> = BTreeMap::new();
    for line in lines {
        let (pid, range) = line.split_once(' ')?;
        let (start, end) = range.split_once(' ')?;
        let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
        told.entry(pid.parse().ok()?).or_default().push(range);
    }
    // CRIU may ask for an area more than once.
    for ranges in told.values_mut() {
        ranges.sort_unstable_by_key(|range| range.start);
        let mut reached = 0;
        for range in ranges.iter_mut() {
            range.start = range.start.max(reached);
            range.end = range.end.max(range.start);
            reached = range.end;
        }
    }
    Some(told)
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
        assert_eq!(told(dir.path(), &hidden), Told::Nothing);
        let told_file = dir.path().join("filter.told");
        std::fs::write(&told_file, "longhaul-filter 1\n5 1000 3000\n6 0 1000\n5 2000 8000\n").expect("writes");
        assert_eq!(told(dir.path(), &hidden), Told::Everything);
        std::fs::write(&told_file, "longhaul-filter 1\n5 1000 3000\n").expect("writes");
        assert_eq!(told(dir.path(), &hidden), Told::Part { pid: 5, told: 2, expected: 4 });
    }
}
