//! What the library in CRIU's process is told to leave out of its images, and what it did (`common/filter`).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use longhaul_common::sys::memory::PAGE;

use super::maps::{Area, early_pages};
use super::tracker::{Frozen, SpacePages};

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

/// Writes the table for a frozen container: all areas the tracker followed but the pages that are needed early. Returns
/// the pages with content that CRIU must leave out, by task.
pub fn write_table(dir: &Path, frozen: &Frozen) -> io::Result<BTreeMap<i32, u64>> {
    let mut text = format!("{VERSION}\n");
    let mut expected = BTreeMap::new();
    for (followed, content) in frozen.followed.iter().zip(&frozen.content) {
        let early = early_pages(followed.pid)?;
        let hidden = without_pages(&followed.ranges, &early);
        for range in &hidden {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{} {:x} {:x}", followed.pid, range.start, range.end);
        }
        expected.insert(followed.pid, pages_in(&hidden, content));
    }
    // Whole or not at all: CRIU is waiting already.
    let path = table_path(dir);
    let partial = path.with_extension("partial");
    std::fs::write(&partial, text)?;
    std::fs::rename(partial, path)?;
    Ok(expected)
}

/// How many pages CRIU's library says it left out, by task; nothing if it was never asked. CRIU may ask for an area more
/// than once.
pub fn told(dir: &Path) -> Option<BTreeMap<i32, u64>> {
    let text = std::fs::read_to_string(format!("{}.told", table_path(dir).display())).ok()?;
    let mut lines = text.lines();
    if lines.next() != Some(VERSION) {
        return None;
    }
    let mut ranges: BTreeMap<i32, Vec<Area>> = BTreeMap::new();
    for line in lines {
        let (pid, range) = line.split_once(' ')?;
        let (start, end) = range.split_once(' ')?;
        let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
        ranges.entry(pid.parse().ok()?).or_default().push(range);
    }
    Some(ranges.into_iter().map(|(pid, ranges)| (pid, distinct_pages(ranges))).collect())
}

/// Pages in the union of ranges.
fn distinct_pages(mut ranges: Vec<Area>) -> u64 {
    ranges.sort_unstable_by_key(|range| range.start);
    let (mut pages, mut reached) = (0, 0);
    for range in ranges {
        pages += range.end.saturating_sub(range.start.max(reached)) / PAGE;
        reached = reached.max(range.end);
    }
    pages
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

/// Pages of `content` within `areas`; both are in order.
fn pages_in(areas: &[Area], content: &SpacePages) -> u64 {
    let mut pages = 0;
    for range in &content.ranges {
        let first = areas.partition_point(|area| area.end <= range.start);
        for area in areas[first..].iter().take_while(|area| area.start < range.end) {
            pages += (area.end.min(range.end) - area.start.max(range.start)) / PAGE;
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn early_pages_stay_visible() {
        let areas = [0x1000..0x5000, 0x8000..0x9000];
        assert_eq!(without_pages(&areas, &[0x2000, 0x8000]), [0x1000..0x2000, 0x3000..0x5000]);
        let content = SpacePages { pid: 1, space: 1, ranges: vec![0x1000..0x4000, 0x8000..0x9000] };
        assert_eq!(pages_in(&[0x1000..0x2000, 0x3000..0x5000], &content), 2);
    }

    #[test]
    fn an_answer_is_summed_up_by_task() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(told(dir.path()), None);
        std::fs::write(dir.path().join("filter.told"), "longhaul-filter 1\n5 1000 4000\n6 0 1000\n5 3000 5000\n")
            .expect("writes");
        assert_eq!(told(dir.path()), Some(BTreeMap::from([(5, 4), (6, 1)])));
    }
}
