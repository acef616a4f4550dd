//! Pages that tasks share copy-on-write, since one was forked off the other: restored as one page, not as one for each.
//!
//! What arrives as equal pages at the same place of several address spaces is taken for shared: whether it was on the source
//! makes no difference to a task, only to how much memory the container takes. The store keeps them in an address space
//! of its own ([`COMMON`]), so that their slots stay as they are. The library in CRIU's process (`common/filter`, which has the rest) reads them
//! before the container is frozen, into memory that every restored task has from CRIU by fork(2).
//!
//! What a task has there is the store's word at the end: where its page is another one, or none, it gives up what it has
//! from the others, and the filler brings its own.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_common::pages::OBJECTS;
use longhaul_common::sys::memory::PAGE;
use prost::Message;
use thiserror::Error;

use crate::image_entries::{EntriesError, entries};

/// The address space of pages that several have in common. No task has this number.
pub const COMMON: u32 = OBJECTS - 1;
/// Fewer are not worth it: a megabyte.
pub const FEWEST: u64 = 256;
/// More page table entries are not worth it: each task that CRIU forks has a copy of them, while the container is frozen. 8 million take
/// some 80 ms.
pub const MOST_ENTRIES: u64 = 8 << 20;
/// What is mapped around them: an area with such pages must lie within.
const AROUND: u64 = (256 << 20) / PAGE;
/// The file beside the store that names them, and what the library says to it.
const TABLE: &str = "common";
const DONE: &str = "common-done";
const STOP: &str = "common-stop";
/// Among the images, with the task's number.
const OF_TASK: &str = "common-";
/// How long CRIU may take to read them in: 10 GiB at 1 GiB/s. Only after that the container is frozen.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is looked.
const POLL: Duration = Duration::from_millis(2);

/// Pages that follow each other, in slots that do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommonRun {
    /// The first page.
    pub page: u64,
    /// Its slot.
    pub slot: u32,
    /// How many.
    pub count: u64,
}

/// Pages, by address space, that are not what is in common at their place.
pub type NotCommon = HashMap<u32, Vec<Range<u64>>>;

/// A failure.
#[derive(Debug, Error)]
pub enum CommonError {
    /// A file.
    #[error("can't write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An image.
    #[error(transparent)]
    Image(#[from] EntriesError),
}

/// Names the pages to the library, beside the store in `dir`.
pub fn write_table(dir: &Path, runs: &[CommonRun]) -> io::Result<()> {
    let mut table = String::new();
    for around in places(runs) {
        let _ = writeln!(table, "area {:x} {:x}", around.start * PAGE, around.end * PAGE);
        let first = runs.partition_point(|run| run.page < around.start);
        for run in runs[first..].iter().take_while(|run| run.page < around.end) {
            let _ = writeln!(table, "pages {:x} {:x} {:x}", run.page * PAGE, run.slot, run.count);
        }
    }
    std::fs::write(dir.join(TABLE), table)
}

/// Where runs lie, with as much around them as an area may be larger than what is in common.
fn places(runs: &[CommonRun]) -> Vec<Range<u64>> {
    let mut places: Vec<Range<u64>> = Vec::new();
    for run in runs {
        let around = run.page.saturating_sub(AROUND)..run.page + run.count + AROUND;
        match places.last_mut() {
            Some(last) if last.end >= around.start => last.end = around.end,
            _ => places.push(around),
        }
    }
    places
}

/// Whether this host would let so much be mapped that is never used.
pub fn is_allowed() -> bool {
    /// The kernel's strict accounting (proc_sys_vm(5)): each task would need all of it anew.
    const NEVER_OVERCOMMIT: &str = "2";
    std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() != NEVER_OVERCOMMIT)
}

/// Waits until CRIU has read them in; without them it goes on as well.
pub async fn wait_read_in(dir: &Path) {
    let done = dir.join(DONE);
    let said = async {
        loop {
            match tokio::fs::read_to_string(&done).await {
                Ok(said) if !said.is_empty() => return said,
                _ => tokio::time::sleep(POLL).await,
            }
        }
    };
    match tokio::time::timeout(DEADLINE, said).await {
        Ok(said) if said == "ok" => {}
        Ok(error) => tracing::warn!(error, "pages that tasks share copy-on-write will be one for each"),
        Err(_) => {
            tracing::warn!("CRIU does not say that it has read what tasks share copy-on-write: it is told to stop");
            if let Err(error) = tokio::fs::write(dir.join(STOP), "").await {
                tracing::warn!(%error, "and can't be told");
            }
        }
    }
}

/// The part of `mm_entry` (images/mm.proto) that matters here.
#[derive(Clone, PartialEq, Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

/// The part of `vma_entry` (images/vma.proto) that matters here.
#[derive(Clone, PartialEq, Message)]
struct VmaEntry {
    #[prost(uint64, tag = "1")]
    start: u64,
    #[prost(uint64, tag = "2")]
    end: u64,
    #[prost(uint32, tag = "5")]
    protection: u32,
    #[prost(uint32, tag = "6")]
    flags: u32,
    #[prost(uint32, tag = "7")]
    status: u32,
}

/// `VMA_*` of criu/include/image.h, 4.2.
mod status {
    pub(super) const REGULAR: u32 = 1 << 0;
    pub(super) const FILE_PRIVATE: u32 = 1 << 6;
    pub(super) const ANON_PRIVATE: u32 = 1 << 9;
    pub(super) const AIO_RING: u32 = 1 << 13;
    pub(super) const SHADOW_STACK: u32 = 1 << 15;
    pub(super) const GUARD: u32 = 1 << 16;
    pub(super) const PLUGIN: u32 = 1 << 27;
}

impl VmaEntry {
    /// Whether CRIU maps it before it forks the task's children (`premap_priv_vmas` in criu/mem.c).
    fn is_mapped_before(&self) -> bool {
        let has = |bits| self.status & bits != 0;
        let is_private = has(status::REGULAR) && has(status::ANON_PRIVATE | status::FILE_PRIVATE)
            || has(status::SHADOW_STACK | status::AIO_RING);
        is_private && !has(status::GUARD | status::PLUGIN) && self.flags & nix::libc::MAP_HUGETLB as u32 == 0
    }

    /// What the library is told of it: whether an area like any other may stand in for it (`c`), or it can be written over (`f`).
    fn mark(&self) -> &'static str {
        let private = nix::libc::MAP_PRIVATE as u32;
        if self.status & status::ANON_PRIVATE != 0 && self.flags == private | nix::libc::MAP_ANONYMOUS as u32 {
            " c"
        } else if self.status & status::FILE_PRIVATE != 0 && self.flags == private {
            " f"
        } else {
            ""
        }
    }
}

/// Tells the library, for every task of the images, which areas it maps and what it does not have in common.
pub fn write_tasks(images: &Path, not_common: &NotCommon) -> Result<(), CommonError> {
    let failed = |path: &Path, source| CommonError::File { path: path.to_owned(), source };
    for entry in std::fs::read_dir(images).map_err(|source| failed(images, source))? {
        let path = entry.map_err(|source| failed(images, source))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("mm-").and_then(|name| name.strip_suffix(".img")?.parse::<u32>().ok());
        let Some(number) = number else { continue };
        let image = entries(&path)?;
        let mm = image.first().and_then(|entry| MmEntry::decode(entry.as_slice()).ok());
        let mm = mm.ok_or_else(|| EntriesError::Damaged(path.clone()))?;
        let nothing = [0..u64::MAX / PAGE];
        let gone = not_common.get(&number).map_or(nothing.as_slice(), Vec::as_slice);
        let path = images.join(format!("{OF_TASK}{number}"));
        std::fs::write(&path, task(&mm, gone)).map_err(|source| failed(&path, source))?;
    }
    Ok(())
}

fn task(mm: &MmEntry, gone: &[Range<u64>]) -> String {
    let mut text = String::new();
    for vma in mm.vmas.iter().filter(|vma| vma.is_mapped_before()) {
        let _ = writeln!(text, "area {:x} {:x} {:x}{}", vma.start, vma.end, vma.protection, vma.mark());
    }
    for gone in gone {
        let _ = writeln!(text, "gone {:x} {:x}", gone.start * PAGE, gone.end * PAGE);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_told_where_and_what() {
        let dir = tempfile::tempdir().expect("a directory");
        let run = |page, slot, count| CommonRun { page, slot, count };
        let far = 0x7_f000_0000;
        write_table(dir.path(), &[run(0x100_0000, 7, 2), run(0x100_0002, 5, 1), run(far, 9, 1)]).expect("writes");
        let table = std::fs::read_to_string(dir.path().join(TABLE)).expect("reads");
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], format!("area {:x} {:x}", 0xff_0000_u64 * PAGE, 0x101_0003_u64 * PAGE));
        assert_eq!(lines[1..3], ["pages 1000000000 7 2", "pages 1000002000 5 1"]);
        assert!(lines[3].starts_with("area ") && lines[4] == "pages 7f0000000000 9 1", "{table}");
    }

    #[test]
    fn areas_are_those_that_criu_maps_first() {
        let vma = |start: u64, flags: i32, status| VmaEntry {
            start,
            end: start + 0x1000,
            protection: 3,
            flags: flags as u32,
            status,
        };
        let anonymous = nix::libc::MAP_PRIVATE | nix::libc::MAP_ANONYMOUS;
        let vmas = vec![
            vma(0x1000, anonymous, status::REGULAR | status::ANON_PRIVATE),
            vma(0x2000, nix::libc::MAP_PRIVATE, status::REGULAR | status::FILE_PRIVATE),
            vma(0x3000, anonymous | nix::libc::MAP_HUGETLB, status::REGULAR | status::ANON_PRIVATE),
            vma(0x4000, anonymous | nix::libc::MAP_GROWSDOWN, status::REGULAR | status::ANON_PRIVATE),
            vma(0x5000, nix::libc::MAP_SHARED, status::REGULAR),
        ];
        let text = task(&MmEntry { vmas }, &[2..3]);
        assert_eq!(text, "area 1000 2000 3 c\narea 2000 3000 3 f\narea 4000 5000 3\ngone 2000 3000\n");
    }
}
