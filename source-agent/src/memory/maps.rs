//! The areas of an address space, as `/proc/<pid>/maps` and `smaps` tell (proc_pid_maps(5), proc_pid_smaps(5)).

use std::io;
use std::ops::Range;

use longhaul_common::sys::memory::PAGE;

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

/// The private areas of a task, in order. Some of them CRIU treats in its own way: [`marks`] tells which.
pub fn private(pid: i32) -> io::Result<Vec<Private>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(text.lines().filter_map(parse).collect())
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

fn range_of(text: &str) -> Option<Area> {
    let (start, end) = text.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// What is special about an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// CRIU does not restore it lazily: locked, or of huge pages (`vma_entry_can_be_lazy` in criu/include/vma.h, 4.2). Its
    /// pages must be in place before the task runs.
    AtOnce,
    /// CRIU saves it itself: droppable memory, a shadow stack, a device's memory. And what a fork wipes: a child must not
    /// be given what its parent had there.
    Criu,
}

/// The areas of a task that have a mark, in order.
///
/// Reads the whole page tables: some 15 ms for each GiB.
pub fn marks(pid: i32) -> io::Result<Vec<(Area, Mark)>> {
    Ok(parse_marks(&std::fs::read_to_string(format!("/proc/{pid}/smaps"))?))
}

fn parse_marks(text: &str) -> Vec<(Area, Mark)> {
    const CRIU: [&str; 6] = ["dp", "ss", "wf", "io", "pf", "mm"];
    const AT_ONCE: [&str; 2] = ["lo", "ht"];
    let mut current = None;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |wanted: &[&str]| flags.split_ascii_whitespace().any(|flag| wanted.contains(&flag));
            let mark = if has(&CRIU) { Some(Mark::Criu) } else { has(&AT_ONCE).then_some(Mark::AtOnce) };
            found.extend(current.take().zip(mark));
        } else if let Some(area) = line.split(' ').next().and_then(range_of) {
            current = Some(area);
        }
    }
    found
}

/// A figure of `/proc/<pid>/status` that is given in kB, in bytes; 0 if there is none.
pub fn status_bytes(pid: i32, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Whether devices write into a task's memory: it has a file open past the page cache (`O_DIRECT`), or a ring for asynchronous
/// I/O. Such writes are not seen by write protection once they are under way.
pub fn has_direct_io(pid: i32) -> bool {
    let is_direct = |fd: &str| {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        flags.is_some_and(|flags| flags & nix::libc::O_DIRECT != 0)
    };
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let direct = fds
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link.is_absolute()))
        .any(|entry| entry.file_name().to_str().is_some_and(is_direct));
    direct || std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("/[aio]"))
}

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

/// Pages of a stopped task that must be there before it runs again. Those that hold its threads' stack pointers: CRIU's
/// restorer needs them (`is_stack` in criu/mem.c). And those of its arguments and environment: who reads
/// `/proc/<pid>/cmdline` can't wait for a page (`access_remote_vm`), and would see none.
pub fn early_pages(pid: i32) -> io::Result<Vec<u64>> {
    let mut pages = argument_pages(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?);
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // "number arguments… sp pc", or "-1 sp pc" outside of a system call (proc_pid_syscall(5)).
        let line = std::fs::read_to_string(thread.path().join("syscall"))?;
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
    fn areas_are_marked_by_their_flags() {
        let text = "1000-2000 rw-p 00000000 00:00 0 \nRss: 4 kB\nVmFlags: rd wr mr mw me ac sd \n\
                    2000-3000 rw-p 00000000 00:00 0 \nVmFlags: rd wr lo ac \n\
                    3000-4000 rw-p 00000000 00:00 0 \nVmFlags: rd wr lo wf \n";
        assert_eq!(parse_marks(text), [(0x2000..0x3000, Mark::AtOnce), (0x3000..0x4000, Mark::Criu)]);
    }

    #[test]
    fn what_is_in_both_lists_is_found() {
        assert_eq!(intersection(&[0..10, 20..30], &[5..22, 25..26, 40..50]), [5..10, 20..22, 25..26]);
        assert!(intersection(&[0..10], &[]).is_empty());
    }

    #[test]
    fn our_own_stack_is_found() {
        let pid = std::process::id().cast_signed();
        let here = 0u8;
        let address = &raw const here as u64;
        let areas: Vec<Area> = private(pid).expect("readable").into_iter().map(|private| private.area).collect();
        assert!(areas.iter().any(|area| area.contains(&address)));
        let stat = std::fs::read_to_string("/proc/self/stat").expect("readable");
        let arguments = argument_pages(&stat);
        assert!(!arguments.is_empty());
        assert!(arguments.iter().all(|page| areas.iter().any(|area| area.contains(page))));
        assert!(status_bytes(pid, "VmRSS") > 0);
    }
}
