//! The areas of an address space, as `/proc/<pid>/maps` tells (proc_pid_maps(5)).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use longhaul_common::sys::memory::PAGE;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Pages by address, `[start, end)`.
pub type Area = Range<u64>;

/// A private area: what a task writes there is its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Private {
    /// Where.
    pub area: Area,
    /// Of a file: pages that were never written are the file's.
    pub is_file: bool,
    /// The task may write there now.
    pub is_writable: bool,
}

/// A mapping of memory that is shared, and is no file of a filesystem that anybody mounted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shared {
    /// Where its area begins.
    pub start: u64,
    /// Where it ends.
    pub end: u64,
    /// The place in the object that is at its beginning, in bytes.
    pub offset: u64,
    /// The object's inode.
    pub inode: u64,
    /// It is a System V segment, which has an inode of the segment's number: another object may have the same.
    pub is_segment: bool,
}

/// The areas of a task that are followed, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Areas {
    /// Private ones. Some of them CRIU treats in its own way: [`marks`](super::flags::marks) tells which.
    pub private: Vec<Private>,
    /// Shared ones.
    pub shared: Vec<Shared>,
    /// All others, which are CRIU's.
    pub others: Vec<Area>,
}

impl Areas {
    /// Of a task, where shared memory is on this device.
    pub fn of(pid: i32, device: &Device) -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/maps"))?, device))
    }

    /// From the text of maps.
    pub fn parse(maps: &str, device: &Device) -> Self {
        let mut areas = Self::default();
        for line in maps.lines() {
            if let Some(private) = parse(line) {
                areas.private.push(private);
            } else if let Some(shared) = parse_shared(line, device) {
                areas.shared.push(shared);
            } else {
                areas.others.extend(line.split_ascii_whitespace().next().and_then(range_of));
            }
        }
        areas
    }
}

/// The device of the kernel's own memory filesystem, as maps writes it: that of anonymous shared mappings, of System V's segments,
/// and of memfd_create(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device(pub String);

impl Device {
    /// This host's.
    pub fn of_this_host() -> io::Result<Self> {
        let file = File::from(memfd_create(c"longhaul", MFdFlags::MFD_CLOEXEC)?);
        Ok(Self::named(file.metadata()?.dev()))
    }

    /// That of another memory filesystem.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::named(path.metadata()?.dev()))
    }

    fn named(device: u64) -> Self {
        Self(format!("{:02x}:{:02x}", libc::major(device), libc::minor(device)))
    }
}

fn parse_shared(line: &str, device: &Device) -> Option<Shared> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    if !permissions.ends_with('s') {
        return None;
    }
    let (offset, on, inode) = (words.next()?, words.next()?, words.next()?);
    let Area { start, end } = range_of(range).filter(|_| on == device.0)?;
    let is_segment = words.next().is_some_and(|name| name.starts_with(SEGMENT));
    Some(Shared { start, end, offset: u64::from_str_radix(offset, 16).ok()?, inode: inode.parse().ok()?, is_segment })
}

fn parse(line: &str) -> Option<Private> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    let (_offset, _device, inode) = (words.next()?, words.next()?, words.next()?);
    let name = words.next().unwrap_or_default();
    let is_anonymous = matches!(name, "" | "[heap]" | "[stack]") || name.starts_with("[anon:");
    // Neither: the kernel's own, like the vDSO.
    let is_file = inode != "0" && name.starts_with('/');
    if !permissions.ends_with('p') || is_file == (inode == "0" && is_anonymous) {
        return None;
    }
    Some(Private { area: range_of(range)?, is_file, is_writable: permissions.as_bytes().get(1) == Some(&b'w') })
}

/// `start-end`, as the first word of a line of maps has it.
pub(super) fn range_of(text: &str) -> Option<Area> {
    let (start, end) = text.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// A figure of `/proc/<pid>/status` that is given in kB, in bytes; 0 if there is none.
pub fn status_bytes(pid: i32, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// What the open files of a task mean for its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenFiles {
    /// Devices write into its memory: it has a file open past the page cache (`O_DIRECT`), or a ring for asynchronous I/O. Such
    /// writes are not seen by write protection once they are under way.
    pub has_direct_io: bool,
    /// Files in memory (memfd_create(2)), by their descriptors.
    pub in_memory: Vec<i32>,
}

impl OpenFiles {
    /// Of a task.
    pub fn of(pid: i32) -> Self {
        let is_direct = |fd: i32| {
            let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
            let flags = info.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
            flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
        };
        let mut files = Self::default();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let Some(fd) = entry.file_name().to_str().and_then(|fd| fd.parse().ok()) else { continue };
            let Ok(link) = std::fs::read_link(entry.path()) else { continue };
            if link.as_os_str().as_encoded_bytes().starts_with(MEMFD) {
                files.in_memory.push(fd);
            } else if link.is_absolute() {
                files.has_direct_io |= is_direct(fd);
            }
        }
        files.has_direct_io |=
            std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("/[aio]"));
        files
    }
}

/// What the kernel puts before a segment's key (`newseg` in ipc/shm.c).
pub const SEGMENT: &str = "/SYSV";
/// What the kernel puts before the name of a file in memory (proc_pid_fd(5)).
pub const MEMFD: &[u8] = b"/memfd:";

/// The ranges that are in both lists, each of which is in order.
pub fn intersection(one: &[Area], other: &[Area]) -> Vec<Area> {
    let mut both = Vec::new();
    for range in one {
        let first = other.partition_point(|area| area.end <= range.start);
        for area in other.get(first..).unwrap_or_default().iter().take_while(|area| area.start < range.end) {
            both.push(area.start.max(range.start)..area.end.min(range.end));
        }
    }
    both
}

/// What is in the first list and not in the second, each of which is in order.
pub fn difference(one: &[Area], other: &[Area]) -> Vec<Area> {
    let mut left = Vec::new();
    for range in one {
        let mut start = range.start;
        let first = other.partition_point(|area| area.end <= range.start);
        for area in other.get(first..).unwrap_or_default().iter().take_while(|area| area.start < range.end) {
            if area.start > start {
                left.push(start..area.start);
            }
            start = start.max(area.end);
        }
        if start < range.end {
            left.push(start..range.end);
        }
    }
    left
}

/// All that is in any of these ranges, in order and without overlaps.
pub fn union(mut ranges: Vec<Area>) -> Vec<Area> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Area> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Pages of a stopped task that must be there before it runs again. Those that hold its threads' stack pointers: CRIU's
/// restorer needs them (`is_stack` in criu/mem.c). And those of its arguments and environment: who reads
/// `/proc/<pid>/cmdline` can't wait for a page (`access_remote_vm`), and would see none.
pub fn early_pages(pid: i32) -> io::Result<Vec<u64>> {
    let mut pages = argument_pages(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?);
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // "number arguments… sp pc", or "-1 sp pc" outside of a system call (proc_pid_syscall(5)).
        let line = stopped(&thread.path().join("syscall"))?;
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let pointer = words
            .len()
            .checked_sub(2)
            .and_then(|index| u64::from_str_radix(words.get(index)?.trim_start_matches("0x"), 16).ok())
            .ok_or_else(|| io::Error::other(format!("a thread of task {pid} is not stopped: {line:?}")))?;
        pages.push(pointer & !(PAGE - 1));
    }
    pages.sort_unstable();
    pages.dedup();
    Ok(pages)
}

/// What the file says of a thread that is not running: one that CRIU stops leaves its cgroup's freezer for a moment.
fn stopped(path: &Path) -> io::Result<String> {
    const DEADLINE: Duration = Duration::from_secs(5);
    const LOOK_EVERY: Duration = Duration::from_micros(100);
    let start = Instant::now();
    loop {
        let line = std::fs::read_to_string(path)?;
        if line != "running\n" || start.elapsed() > DEADLINE {
            return Ok(line);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// From `arg_start`, `arg_end`, `env_start` and `env_end`, fields 48 to 51 of `/proc/<pid>/stat` (proc_pid_stat(5)).
fn argument_pages(stat: &str) -> Vec<u64> {
    // The second field, a name in parentheses, may hold anything.
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<u64> =
        after_name.split_ascii_whitespace().skip(45).take(4).map(|field| field.parse().unwrap_or(0)).collect();
    let mut pages = Vec::new();
    for ends in fields.chunks_exact(2) {
        let mut page = ends[0] & !(PAGE - 1);
        while page < ends[1] {
            pages.push(page);
            page += PAGE;
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_areas_are_taken() {
        let anonymous = [
            "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ",
            "7f0000000000-7f0000001000 ---p 00000000 00:00 0",
            "7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [heap]",
            "7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [stack]",
            "7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [anon: glibc: malloc]",
        ];
        let area = 0x7f00_0000_0000..0x7f00_0000_1000u64;
        for line in anonymous {
            let is_writable = line.contains("rw");
            assert_eq!(parse(line), Some(Private { area: area.clone(), is_file: false, is_writable }), "{line}");
        }
        let file = "7f0000000000-7f0000001000 r-xp 00000000 fe:00 55 /usr/bin/x";
        assert_eq!(parse(file), Some(Private { area, is_file: true, is_writable: false }));
        let others = [
            "7f0000000000-7f0000001000 rw-s 00000000 00:01 1024 /dev/zero (deleted)",
            "7f0000000000-7f0000001000 rw-s 00000000 fe:00 55 /usr/bin/x",
            "7f0000000000-7f0000001000 r-xp 00000000 00:00 0 [vdso]",
            "7f0000000000-7f0000001000 r--p 00000000 00:00 0 [vvar]",
            "nonsense",
        ];
        for line in others {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn shared_memory_is_told_from_shared_files() {
        let maps = "1000-3000 rw-s 00002000 00:01 1024 /dev/zero (deleted)\n\
                    3000-4000 r--s 00000000 00:01 7 /SYSV00001234 (deleted)\n\
                    4000-5000 rw-s 00000000 00:1a 7 /dev/shm/x\n\
                    5000-6000 rw-p 00000000 00:01 7 /memfd:x (deleted)\n";
        let areas = Areas::parse(maps, &Device("00:01".into()));
        let expected = [
            Shared { start: 0x1000, end: 0x3000, offset: 0x2000, inode: 1024, is_segment: false },
            Shared { start: 0x3000, end: 0x4000, offset: 0, inode: 7, is_segment: true },
        ];
        assert_eq!(areas.shared, expected);
        assert_eq!(areas.private.len(), 1);
    }

    #[test]
    fn what_is_in_both_lists_is_found() {
        assert_eq!(intersection(&[0..10, 20..30], &[5..22, 25..26, 40..50]), [5..10, 20..22, 25..26]);
        assert!(intersection(&[0..10], &[]).is_empty());
        assert_eq!(difference(&[0..10, 20..30, 50..60], &[2..4, 8..22, 29..30]), [0..2, 4..8, 22..29, 50..60]);
        assert!(difference(&[3..5], &[0..9]).is_empty());
        assert_eq!(union(vec![20..30, 0..5, 5..7, 22..25, 40..41]), [0..7, 20..30, 40..41]);
    }

    #[test]
    fn our_own_stack_is_found() {
        let pid = std::process::id().cast_signed();
        let here = 0u8;
        let address = &raw const here as u64;
        let device = Device::of_this_host().expect("has one");
        let areas: Vec<Area> =
            Areas::of(pid, &device).expect("readable").private.into_iter().map(|private| private.area).collect();
        assert!(areas.iter().any(|area| area.contains(&address)));
        let stat = std::fs::read_to_string("/proc/self/stat").expect("readable");
        let arguments = argument_pages(&stat);
        assert!(!arguments.is_empty());
        assert!(arguments.iter().all(|page| areas.iter().any(|area| area.contains(page))));
        assert!(status_bytes(pid, "VmRSS") > 0);
    }
}
