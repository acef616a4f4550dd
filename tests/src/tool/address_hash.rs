//! What is in a process's memory, area by area, seen from outside through `/proc/<pid>/mem`.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use clap::Args;
use longhaul_common::tasks::inner_pid;
use serde_json::json;
use xxhash_rust::xxh3::Xxh3;

use super::sys;
use super::sys::mem::PAGE;

/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// Properties that a process gives to its areas, as `VmFlags` of `/proc/<pid>/smaps` names them (proc(5)): grows down,
/// locked, not for forks, not for core dumps, huge pages wanted or not, of huge pages, wiped by forks, mergeable.
const FLAGS: [&str; 9] = ["gd", "lo", "dc", "dd", "hg", "nh", "ht", "wf", "mg"];
/// Areas that are the kernel's: they tell the time of the host, or can't be read.
const KERNEL: [&str; 4] = ["[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]"];

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The process, as this host numbers it; its threads should sleep
    #[arg(long)]
    pid: i32,
}

/// Prints the process's number in its own namespace, and a hash for each area.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let pid = options.pid;
    let smaps = read(pid, "smaps")?;
    let changing = changing(pid)?;
    let memory = File::open(format!("/proc/{pid}/mem")).with_context(|| format!("open the memory of {pid}"))?;
    let mut hashed = Vec::new();
    for area in areas(&smaps).with_context(|| format!("understand the areas of {pid}"))? {
        let (hash, unreadable) = hash(&memory, &area.range, &changing);
        hashed.push(json!({
            "range": format!("{:x}-{:x}", area.range.start, area.range.end),
            "perms": area.permissions,
            "flags": area.flags,
            "name": area.name,
            "hash": format!("{hash:016x}"),
            "unreadable_pages": unreadable,
        }));
    }
    // In its own namespace.
    let inner = inner_pid(pid, pid).with_context(|| format!("ask what {pid} is called in its namespace"))?;
    println!("{}", json!({"pid": inner, "areas": hashed}));
    Ok(true)
}

fn read(pid: i32, file: &str) -> anyhow::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/{file}")).with_context(|| format!("read /proc/{pid}/{file}"))
}

/// Bytes that the kernel changes while no thread runs an instruction of its own: CPU numbers. A task that was moved,
/// and even one that was only stopped and went on in its system call, may find itself on another CPU.
fn changing(pid: i32) -> anyhow::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("list the threads of {pid}"))? {
        let name = thread?.file_name();
        let thread = name.to_str().and_then(|name| name.parse().ok()).context("a thread without a number")?;
        let found = sys::rseq::written_by_kernel(thread);
        ranges.extend(found.with_context(|| format!("ask where thread {thread} has its CPU number"))?);
    }
    Ok(ranges)
}

/// Neighbours with the same properties: whether the kernel keeps them as one or as several depends on how they came
/// about.
#[derive(Debug, PartialEq)]
struct Area {
    range: Range<u64>,
    permissions: String,
    /// Those of [`FLAGS`] that it has.
    flags: String,
    name: String,
    /// Where in its file it begins.
    offset: u64,
}

impl Area {
    /// Reads a line as in `/proc/<pid>/maps`, which says nothing of flags.
    fn parse(line: &str) -> anyhow::Result<Self> {
        // The name is the rest of the line: it may have spaces.
        let mut fields = line.splitn(6, ' ');
        let mut next = || fields.next().with_context(|| format!("too few fields: {line}"));
        let (range, permissions, offset, _device, _inode) = (next()?, next()?, next()?, next()?, next()?);
        let (start, end) = range.split_once('-').with_context(|| format!("no range: {line}"))?;
        let number = |text| u64::from_str_radix(text, 16).with_context(|| format!("no number {text:?}: {line}"));
        Ok(Self {
            range: number(start)?..number(end)?,
            permissions: permissions.to_owned(),
            flags: String::new(),
            name: name(fields.next().unwrap_or_default().trim()),
            offset: number(offset)?,
        })
    }

    fn goes_on_in(&self, next: &Self) -> bool {
        let length = self.range.end - self.range.start;
        self.range.end == next.range.start
            && self.permissions == next.permissions
            && self.flags == next.flags
            && self.name == next.name
            && (!self.name.starts_with('/') || self.offset + length == next.offset)
    }
}

/// What the kernel calls an area. Shared anonymous memory is made anew as a memfd with the name that the kernel gave it
/// by CRIU: the same kind of memory.
fn name(text: &str) -> String {
    if text == "/memfd:/dev/zero (deleted)" { "/dev/zero (deleted)" } else { text }.to_owned()
}

/// All areas but the kernel's, each as long as it has the same properties.
fn areas(smaps: &str) -> anyhow::Result<Vec<Area>> {
    let mut merged: Vec<Area> = Vec::new();
    for area in parse(smaps)? {
        match merged.last_mut() {
            _ if KERNEL.contains(&area.name.as_str()) => {}
            Some(last) if last.goes_on_in(&area) => last.range.end = area.range.end,
            _ => merged.push(area),
        }
    }
    Ok(merged)
}

fn parse(smaps: &str) -> anyhow::Result<Vec<Area>> {
    let mut all: Vec<Area> = Vec::new();
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            all.push(Area::parse(line)?);
        } else if let (Some(flags), Some(last)) = (line.strip_prefix("VmFlags:"), all.last_mut()) {
            let kept: Vec<&str> = flags.split_whitespace().filter(|flag| FLAGS.contains(flag)).collect();
            last.flags = kept.join(" ");
        }
    }
    Ok(all)
}

/// The hash of an area, and how many of its pages can't be read (a mapping beyond its file's end).
fn hash(memory: &File, range: &Range<u64>, changing: &[Range<u64>]) -> (u64, u64) {
    let (mut hasher, mut unreadable) = (Xxh3::new(), 0);
    let mut buffer = vec![0; CHUNK];
    let mut at = range.start;
    while at < range.end {
        let length = buffer.len().min(usize::try_from(range.end - at).unwrap_or(CHUNK));
        if memory.read_exact_at(&mut buffer[..length], at).is_ok() {
            blank(&mut buffer[..length], at, changing);
            hasher.update(&buffer[..length]);
            at += length as u64;
            continue;
        }
        // Something in it can't be read: page by page, and where a page is missing counts as well.
        let page = &mut buffer[..PAGE.min(length)];
        if memory.read_exact_at(page, at).is_ok() {
            blank(page, at, changing);
            hasher.update(page);
        } else {
            unreadable += 1;
            hasher.update(&at.to_le_bytes());
        }
        at += PAGE as u64;
    }
    (hasher.digest(), unreadable)
}

/// Sets what may change to zero.
fn blank(bytes: &mut [u8], start: u64, changing: &[Range<u64>]) {
    let index = |address: u64| usize::try_from(address.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
    let within: Vec<Range<usize>> = changing.iter().map(|range| index(range.start)..index(range.end)).collect();
    within.into_iter().for_each(|range| bytes[range].fill(0));
}

#[cfg(test)]
mod tests {
    use super::{areas, blank};

    const SMAPS: &str = "\
1000-2000 rw-p 00000000 00:00 0
Size:                  4 kB
VmFlags: rd wr mr mw me ac sd
2000-3000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me ac
3000-4000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me lo ac dc
4000-5000 r--p 00000000 00:00 0
6000-7000 r--p 00001000 08:01 12                         /a b
7000-8000 r--p 00002000 08:01 12                         /a b
8000-9000 r--p 00009000 08:01 12                         /a b
9000-a000 r-xp 00000000 00:00 0                          [vdso]
";

    #[test]
    fn neighbours_alike_are_one_area() {
        let found = areas(SMAPS).expect("understood");
        let pages: Vec<_> = found.iter().map(|area| (area.range.start >> 12, area.range.end >> 12)).collect();
        assert_eq!(pages, [(1, 3), (3, 4), (4, 5), (6, 8), (8, 9)]);
        assert_eq!((found[1].flags.as_str(), found[3].name.as_str()), ("lo dc", "/a b"));
    }

    #[test]
    fn only_what_may_change_is_left_out() {
        let mut bytes = [1; 8];
        blank(&mut bytes, 100, &[90..102, 105..106, 107..200, 300..301]);
        assert_eq!(bytes, [0, 0, 1, 1, 1, 0, 1, 0]);
    }
}
