//! Leaves pages out of the answers to `PAGEMAP_SCAN`, and where the kernel lacks that (before 6.7) out of what is read of pagemap.
//!
//! The table is a text: a first line that names its version, then a line for each range of addresses to leave out, and for each piece
//! of shared memory, by its device and inode. What was left out is told in a second file, so that the agent can compare it with
//! what it sent: a CRIU that looks for pages in another way leaves no trace there, and its images hold everything. So are the
//! tasks whose smaps were replaced.
//!
//! CRIU is at work before the table is there: who wants it waits until the file can be locked, which the agent has locked as long as it
//! looks at the memory. Then the table is there from its first line to `end`; or the agent has given up or is gone, and CRIU is told
//! that it can't read a task's smaps nor its pages, and fails. CRIU asks for smaps before it puts code into a task
//! (`collect_mappings` in `dump_one_task`, criu/cr-dump.c): `waited` says that it did, and that the agent saw tasks as they were.
//!
//! A range of `shared-` is a mapping of such a piece. CRIU looks there for what tasks have in their page tables, a millisecond for each gigabyte
//! and task, and makes nothing of it (`add_shmem_area` in criu/shmem.c): that is left out untold.
//!
//! Ranges of `guards-` are where a task may have guard pages (`MADV_GUARD_INSTALL`). CRIU looks for them in the whole of each task
//! (`collect_madv_guards` in criu/mem.c), one to two milliseconds for each gigabyte; the agent has seen most of it anyway. The first is empty, and
//! says that the task is known.
//!
//! ```text
//! longhaul-filter 5                     longhaul-filter 5
//! object 1 5f3                          waited
//! 4711 7f0000000000 7f0040000000        smaps 4711
//! shared-4711 7e0000000000 7e4000000000 4711 7f0000000000 7f0000ff0000
//! guards-4711 0 0                       object 1 5f3
//! guards-4711 7d0000000000 7d0000001000
//! end
//! ```

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::iter;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Once, OnceLock};

/// `_IOWR('f', 16, struct pm_scan_arg)`, linux/fs.h.
pub(crate) const PAGEMAP_SCAN: std::ffi::c_ulong = 0xc060_6610;
/// Where the table is.
pub(crate) const TABLE: &str = "LONGHAUL_FILTER";
/// The first line of both files, and the table's last.
const VERSION: &str = "longhaul-filter 5";
const END: &str = "end";
/// `PAGE_IS_PRESENT`: a scan for it looks for content.
const PRESENT: u64 = 1 << 3;
/// `PAGE_IS_GUARD`, Linux 6.15.
const GUARD: u64 = 1 << 8;
/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Bytes of a `struct page_region`.
const REGION: u64 = 24;

/// What to leave out.
#[derive(Debug, Default, PartialEq)]
struct Table {
    /// Ranges, in order, by task.
    tasks: HashMap<i32, Vec<Range<u64>>>,
    /// Mappings of shared memory that is left out, in order, by task.
    mappings: HashMap<i32, Vec<Range<u64>>>,
    /// Where guards may be, in order, by task: of these it is known that they have none elsewhere.
    guards: HashMap<i32, Vec<Range<u64>>>,
    /// Shared memory, by device and inode.
    objects: HashSet<(u64, u64)>,
}

impl Table {
    /// What CRIU may see of a task's pages in a range, and what of it is left out and has to be told.
    fn visible(&self, pid: i32, range: &Range<u64>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let (hidden, mappings) = (ranges_of(&self.tasks, pid), ranges_of(&self.mappings, pid));
        let (left, gone) = without(range, hidden);
        let visible = left.iter().flat_map(|range| without(range, mappings).0).collect();
        (visible, gone)
    }
}

struct Filter {
    table: Table,
    told: File,
}

fn ranges_of(ranges: &HashMap<i32, Vec<Range<u64>>>, pid: i32) -> &[Range<u64>] {
    ranges.get(&pid).map_or(&[], Vec::as_slice)
}

/// What has come of the table.
enum Answer {
    Filter(Filter),
    /// Nothing was to be left out.
    Everything,
    /// The agent has given up.
    GivenUp,
}

/// Waits for the agent's answer: CRIU is told to go as soon as the container is frozen, and has much to do before it asks for the first
/// page, while the agent looks at the memory.
fn answer() -> &'static Answer {
    static ANSWER: OnceLock<Answer> = OnceLock::new();
    let load = |path: &str| {
        let table = parse(&wait_for(path).ok()?)?;
        let mut told = OpenOptions::new().create(true).append(true).open(format!("{path}.told")).ok()?;
        writeln!(told, "{VERSION}").ok()?;
        Some(Filter { table, told })
    };
    ANSWER.get_or_init(|| match std::env::var(TABLE) {
        Err(_) => Answer::Everything,
        Ok(path) => load(&path).map_or(Answer::GivenUp, Answer::Filter),
    })
}

/// What is in a file once the agent has let go of it.
fn wait_for(path: &str) -> io::Result<String> {
    let mut file = File::open(path)?;
    // SAFETY: takes no pointer, and the descriptor is open.
    while unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_SH) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Whether CRIU must end here: it would save what nobody wants any more, while the container waits.
pub(crate) fn is_given_up() -> bool {
    matches!(answer(), Answer::GivenUp)
}

/// CRIU wants to know a task's areas, and has waited for the table if it had not been there.
pub(crate) fn waited() {
    static TOLD: Once = Once::new();
    TOLD.call_once(|| tell("waited\n"));
}

fn the_filter() -> Option<&'static Filter> {
    match answer() {
        Answer::Filter(filter) => Some(filter),
        Answer::Everything | Answer::GivenUp => None,
    }
}

fn parse(text: &str) -> Option<Table> {
    let mut lines = text.strip_suffix(END)?.lines();
    if lines.next() != Some(VERSION) {
        return None;
    }
    let mut table = Table::default();
    for line in lines {
        let mut words = line.split(' ');
        let subject = words.next()?;
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (one, other) = (number()?, number()?);
        if subject == "object" {
            table.objects.insert((one, other));
        } else if let Some(pid) = subject.strip_prefix("shared-") {
            table.mappings.entry(pid.parse().ok()?).or_default().push(one..other);
        } else if let Some(pid) = subject.strip_prefix("guards-") {
            let guards = table.guards.entry(pid.parse().ok()?).or_default();
            guards.extend((one < other).then_some(one..other));
        } else {
            table.tasks.entry(subject.parse().ok()?).or_default().push(one..other);
        }
    }
    Some(table)
}

/// Shared memory to leave out.
pub(crate) fn objects() -> Option<&'static HashSet<(u64, u64)>> {
    Some(&the_filter()?.table.objects)
}

/// The parts of a scan that are not to be left out; nothing if all of it is asked for. What is left out is told.
pub(crate) fn visible_parts(fd: i32, scan: &ScanArg) -> Option<Vec<Range<u64>>> {
    let whole = scan.start..scan.end;
    if scan.max_pages != 0 {
        return None;
    }
    if scan.category_mask == GUARD && scan.category_inverted == 0 && scan.category_anyof_mask == 0 {
        let guards = the_filter()?.table.guards.get(&pagemap_of(fd)?)?;
        return Some(parts_within(guards, &whole).collect());
    }
    if scan.category_anyof_mask & PRESENT == 0 {
        return None;
    }
    let filter = the_filter()?;
    let pid = pagemap_of(fd)?;
    let (visible, gone) = filter.table.visible(pid, &whole);
    if visible == [whole] {
        return None;
    }
    let mut lines = String::new();
    for range in gone {
        // Writing to a string can't fail.
        let _ = writeln!(lines, "{pid} {:x} {:x}", range.start, range.end);
    }
    if !lines.is_empty() {
        tell(&lines);
    }
    Some(visible)
}

/// Bytes that an entry of pagemap has, and of memory that it stands for.
const ENTRY: u64 = 8;
const PAGE: u64 = 4096;

/// Has entries of pagemap, as they were read from `offset` of the file on, say that pages are not there which are to be left
/// out. What is left out is told.
pub(crate) fn hide_entries(fd: i32, entries: &mut [u8], offset: u64) {
    let Some(filter) = the_filter() else { return };
    let Some(pid) = task_of(fd, "pagemap") else { return };
    let Some(hidden) = filter.table.tasks.get(&pid) else { return };
    let first = offset / ENTRY * PAGE;
    let end = first + entries.len() as u64 / ENTRY * PAGE;
    let (_, gone) = without(&(first..end), hidden);
    let mut lines = String::new();
    for range in gone {
        let place = |address: u64| ((address - first) / PAGE * ENTRY) as usize;
        if let Some(bytes) = entries.get_mut(place(range.start)..place(range.end)) {
            bytes.fill(0);
        }
        // Writing to a string can't fail.
        let _ = writeln!(lines, "{pid} {:x} {:x}", range.start, range.end);
    }
    if !lines.is_empty() {
        tell(&lines);
    }
}

/// Scans parts of a range one after the other into the one vector; the number of regions, as the ioctl gives it. Ends early
/// where the vector is full, as the ioctl does.
pub(crate) fn scan_parts(whole: &mut ScanArg, parts: &[Range<u64>], mut scan: impl FnMut(&mut ScanArg) -> i32) -> i32 {
    let mut found = 0;
    for part in parts {
        let mut arg = ScanArg {
            start: part.start,
            end: part.end,
            walk_end: 0,
            vec: whole.vec + found * REGION,
            vec_len: whole.vec_len - found,
            ..*whole
        };
        if arg.vec_len == 0 {
            whole.walk_end = part.start;
            return found as i32;
        }
        let result = scan(&mut arg);
        if result < 0 {
            return result;
        }
        found += u64::from(result.unsigned_abs());
        if arg.walk_end < part.end {
            whole.walk_end = arg.walk_end;
            return found as i32;
        }
    }
    whole.walk_end = whole.end;
    found as i32
}

/// Tasks by their open pagemaps, as far as descriptors are small: CRIU scans one hundreds of times.
static PAGEMAPS: [AtomicI32; 256] = [const { AtomicI32::new(0) }; 256];

/// CRIU has opened a file, maybe a pagemap.
pub(crate) fn opened(fd: i32, path: &CStr) {
    if path.to_bytes().ends_with(b"pagemap")
        && let Some(place) = usize::try_from(fd).ok().and_then(|fd| PAGEMAPS.get(fd))
    {
        place.store(task_of(fd, "pagemap").unwrap_or(0), Ordering::Relaxed);
    }
}

/// The task whose pagemap is scanned with a descriptor: no other file can be.
fn pagemap_of(fd: i32) -> Option<i32> {
    let known = usize::try_from(fd).ok().and_then(|fd| PAGEMAPS.get(fd)).map_or(0, |pid| pid.load(Ordering::Relaxed));
    if known == 0 { task_of(fd, "pagemap") } else { Some(known) }
}

/// The task whose `/proc/<pid>/<file>` this is.
pub(crate) fn task_of(fd: i32, file: &str) -> Option<i32> {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let mut parts = link.to_str()?.rsplit('/');
    if parts.next() != Some(file) {
        return None;
    }
    parts.next()?.parse().ok()
}

/// Tells the agent what was done.
pub(crate) fn tell(lines: &str) {
    if let Some(filter) = the_filter() {
        // What can't be told is missed by the agent, which then does not move the container.
        let _ = (&filter.told).write_all(lines.as_bytes());
    }
}

/// What of ranges, which are in order and do not overlap, lies within another.
pub(crate) fn parts_within<T: Ord + Copy>(ranges: &[Range<T>], within: &Range<T>) -> impl Iterator<Item = Range<T>> {
    let first = ranges.partition_point(|range| range.end <= within.start);
    let (start, end) = (within.start, within.end);
    let inside = ranges[first..].iter().take_while(move |range| range.start < end);
    inside.map(move |range| range.start.max(start)..range.end.min(end))
}

/// A range without what is hidden, and what that was.
fn without(range: &Range<u64>, hidden: &[Range<u64>]) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let gone: Vec<_> = parts_within(hidden, range).collect();
    let starts = iter::once(range.start).chain(gone.iter().map(|gone| gone.end));
    let ends = gone.iter().map(|gone| gone.start).chain(iter::once(range.end));
    let left = starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| start..end).collect();
    (left, gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_cut_out() {
        let hidden = [2..4, 6..22, 28..29, 40..50];
        assert_eq!(without(&(0..10), &hidden), (vec![0..2, 4..6], vec![2..4, 6..10]));
        assert_eq!(without(&(20..30), &hidden), (vec![22..28, 29..30], vec![20..22, 28..29]));
        assert_eq!(without(&(40..50), &hidden), (vec![], vec![40..50]));
        assert_eq!(without(&(30..35), &hidden), (vec![30..35], vec![]));
    }

    fn arg(start: u64, end: u64, vec_len: u64) -> ScanArg {
        ScanArg {
            size: 96,
            flags: 0,
            start,
            end,
            walk_end: 0,
            vec: 0,
            vec_len,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: PRESENT,
            return_mask: 0,
        }
    }

    #[test]
    fn parts_share_one_vector() {
        let mut whole = arg(0, 100, 3);
        let mut asked = Vec::new();
        let found = scan_parts(&mut whole, &[0..10, 20..30], |part| {
            asked.push((part.start, part.end, part.vec, part.vec_len));
            part.walk_end = part.end;
            1
        });
        assert_eq!((found, whole.walk_end), (2, 100));
        assert_eq!(asked, [(0, 10, 0, 3), (20, 30, REGION, 2)]);
        assert_eq!(scan_parts(&mut whole, &[], |_| -1), 0);
    }

    #[test]
    fn a_full_vector_ends_the_scan_early() {
        let mut whole = arg(0, 100, 2);
        let full = |part: &mut ScanArg| {
            part.walk_end = part.start + 5;
            2
        };
        assert_eq!((scan_parts(&mut whole, &[10..20, 30..40], full), whole.walk_end), (2, 15));
        let to_its_end = |part: &mut ScanArg| {
            part.walk_end = part.end;
            2
        };
        assert_eq!((scan_parts(&mut whole, &[10..20, 30..40], to_its_end), whole.walk_end), (2, 30));
        assert_eq!(scan_parts(&mut whole, &[10..20], |_| -1), -1);
    }

    #[test]
    fn a_table_of_another_version_or_without_its_end_is_not_read() {
        assert_eq!(parse("longhaul-filter 1\n1 0 1000\nend"), None);
        let table =
            parse("longhaul-filter 5\nobject 1 5f3\n17 1000 2000\n17 3000 4000\n18 0 1000\nend").expect("reads");
        assert_eq!(table.tasks[&17], [0x1000..0x2000, 0x3000..0x4000]);
        for text in ["longhaul-filter 5\nx\nend", "longhaul-filter 5\n17 1000 2000\n", ""] {
            assert_eq!(parse(text), None);
        }
    }

    #[test]
    fn the_table_is_waited_for_as_long_as_the_agent_has_it() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let name = file.path().to_str().expect("UTF-8");
        let lock = |how| {
            // SAFETY: takes no pointer.
            assert_eq!(unsafe { libc::flock(file.as_file().as_raw_fd(), how) }, 0);
        };
        lock(libc::LOCK_EX);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| wait_for(name));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waits.is_finished());
            file.as_file().write_all(b"there").expect("writes");
            lock(libc::LOCK_UN);
            assert_eq!(waits.join().expect("no panic").expect("reads"), "there");
        });
        assert!(wait_for("/proc/self/none").is_err());
    }

    #[test]
    fn mappings_of_shared_memory_are_left_out_untold() {
        let table = parse("longhaul-filter 5\n17 10 20\nshared-17 30 40\nshared-18 0 90\nend").expect("reads");
        let (hidden, whole) = (0x10..0x20, 0..0x50);
        assert_eq!(table.visible(17, &whole), (vec![0..0x10, 0x20..0x30, 0x40..0x50], vec![hidden]));
        assert_eq!(table.visible(18, &whole), (vec![], vec![]));
        assert_eq!(table.visible(19, &whole), (vec![whole], vec![]));
    }

    #[test]
    fn a_task_without_guards_is_known() {
        let table = parse("longhaul-filter 5\nguards-17 0 0\nguards-18 0 0\nguards-18 10 20\nend").expect("reads");
        assert_eq!((table.guards.get(&17), table.guards.get(&19)), (Some(&vec![]), None));
        assert_eq!(table.guards[&18], [0x10..0x20]);
    }
}
