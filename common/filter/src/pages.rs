//! Leaves pages out of the answers to `PAGEMAP_SCAN`.
//!
//! The table is a text: a first line that names its version, then a line for each range of addresses to leave out. What was
//! left out is told in a second file, so that the agent can compare it with what it sent: a CRIU that looks for pages in
//! another way leaves no trace there, and its images hold everything.
//!
//! ```text
//! longhaul-filter 1                     longhaul-filter 1
//! 4711 7f0000000000 7f0040000000        4711 7f0000000000 7f0000ff0000
//! ```

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::sync::OnceLock;

/// `_IOWR('f', 16, struct pm_scan_arg)`, linux/fs.h.
pub(crate) const PAGEMAP_SCAN: std::ffi::c_ulong = 0xc060_6610;
/// Where the table is.
const TABLE: &str = "LONGHAUL_FILTER";
/// The first line of both files.
const VERSION: &str = "longhaul-filter 1";
/// `PAGE_IS_PRESENT`: a scan for it looks for content.
const PRESENT: u64 = 1 << 3;
/// `struct pm_scan_arg`.
#[repr(C)]
pub(crate) struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Ranges to leave out, in order, by task.
type Table = HashMap<i32, Vec<Range<u64>>>;

struct Filter {
    table: Table,
    told: File,
}

/// The table, once it is wanted: it is written after CRIU was started.
fn the_filter() -> Option<&'static Filter> {
    static FILTER: OnceLock<Option<Filter>> = OnceLock::new();
    let load = || {
        let path = std::env::var(TABLE).ok()?;
        let table = parse(&std::fs::read_to_string(&path).ok()?)?;
        let mut told = OpenOptions::new().create(true).append(true).open(format!("{path}.told")).ok()?;
        writeln!(told, "{VERSION}").ok()?;
        Some(Filter { table, told })
    };
    FILTER.get_or_init(load).as_ref()
}

fn parse(text: &str) -> Option<Table> {
    let mut lines = text.lines();
    if lines.next() != Some(VERSION) {
        return None;
    }
    let mut table = Table::new();
    for line in lines {
        let mut words = line.split(' ');
        let pid = words.next()?.parse().ok()?;
        let mut address = || u64::from_str_radix(words.next()?, 16).ok();
        let range = address()?..address()?;
        table.entry(pid).or_default().push(range);
    }
    Some(table)
}

/// Takes the first `found` regions down to those that are not to be left out; how many are left. Where there is no room
/// for the pieces, the scan ends earlier.
pub(crate) fn filter(fd: i32, wanted: u64, regions: &mut [Region], found: usize, walk_end: &mut u64) -> usize {
    if wanted & PRESENT == 0 {
        return found;
    }
    let Some(filter) = the_filter() else { return found };
    let Some(pid) = task_of(fd) else { return found };
    let Some(hidden) = filter.table.get(&pid) else { return found };
    let Some(answer) = regions.get(..found) else { return found };
    let (left, gone) = without(answer, hidden);
    let room = left.len().min(regions.len());
    if let Some(cut) = left.get(room) {
        *walk_end = cut.start;
    }
    for (to, from) in regions.iter_mut().zip(&left) {
        *to = *from;
    }
    let mut lines = String::new();
    for range in gone {
        // Writing to a string can't fail.
        let _ = writeln!(lines, "{pid} {:x} {:x}", range.start, range.end);
    }
    // What can't be told is missed by the agent, which then does not move the container.
    let _ = (&filter.told).write_all(lines.as_bytes());
    room
}

/// The task whose `/proc/<pid>/pagemap` this is.
fn task_of(fd: i32) -> Option<i32> {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let mut parts = link.to_str()?.rsplit('/');
    if parts.next() != Some("pagemap") {
        return None;
    }
    parts.next()?.parse().ok()
}

/// The regions without what is hidden, and what that was.
fn without(regions: &[Region], hidden: &[Range<u64>]) -> (Vec<Region>, Vec<Range<u64>>) {
    let mut left = Vec::with_capacity(regions.len());
    let mut gone = Vec::new();
    for region in regions {
        let mut at = region.start;
        let first = hidden.partition_point(|range| range.end <= region.start);
        for range in hidden.get(first..).unwrap_or_default().iter().take_while(|range| range.start < region.end) {
            if range.start > at {
                left.push(Region { start: at, end: range.start, ..*region });
            }
            let end = range.end.min(region.end);
            gone.push(range.start.max(at)..end);
            at = end;
        }
        if at < region.end {
            left.push(Region { start: at, ..*region });
        }
    }
    (left, gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn region(start: u64, end: u64) -> Region {
        Region { start: start * PAGE, end: end * PAGE, categories: 8 }
    }

    fn range(start: u64, end: u64) -> Range<u64> {
        start * PAGE..end * PAGE
    }

    #[test]
    fn what_is_hidden_is_cut_out() {
        let regions = [region(0, 10), region(20, 30), region(40, 50)];
        let hidden = [range(2, 4), range(6, 22), range(28, 29), range(40, 50)];
        let (left, gone) = without(&regions, &hidden);
        assert_eq!(left, [region(0, 2), region(4, 6), region(22, 28), region(29, 30)]);
        assert_eq!(gone, [range(2, 4), range(6, 10), range(20, 22), range(28, 29), range(40, 50)]);
        assert_eq!(without(&regions, &[]), (regions.to_vec(), Vec::new()));
    }

    #[test]
    fn a_table_of_another_version_is_not_read() {
        assert_eq!(parse("longhaul-filter 2\n1 0 1000\n"), None);
        let table = parse("longhaul-filter 1\n17 1000 2000\n17 3000 4000\n18 0 1000\n").expect("reads");
        assert_eq!(table[&17], [0x1000..0x2000, 0x3000..0x4000]);
        assert_eq!(parse("longhaul-filter 1\nx\n"), None);
    }
}
