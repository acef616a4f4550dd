//! Pages that must be in place before the container runs: what tasks wrote into private mappings of files, locked memory,
//! huge pages. CRIU restores such areas at once, from its images; these pages are not there, so they are written into the
//! restored tasks while those are stopped before their first instruction. Pages that may come later as well are put in place if
//! something is there already: a task inherits what its parent had when CRIU forked it. What a task has like that is left alone if it is
//! what should be there, so that it goes on to share it ([`super::common`]).

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::num::NonZero;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use longhaul_common::sys::memory::{Mapping, PAGE};
use longhaul_common::tasks::{inner_pid, with_descendants};
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;
use thiserror::Error;

use super::index::{Due, Index, SHARED, ZERO};
use super::plan::{Plan, Run, SpaceId};
use super::store::{SLOTS, free_slots};

/// Pages of a run.
const CHUNK: u64 = 256;
/// Pages read at once, to be compared.
const BATCH: usize = 256;
/// Parts written at once: `IOV_MAX`.
const MOST_PARTS: usize = 1024;
/// Pages whose entries of pagemap are read at once.
const SPAN: u64 = 4096;
/// The most threads.
const MOST_WORKERS: usize = 4;
/// What a zero page holds.
const ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];

/// Pages that can't be put in place.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// The page store.
    #[error("can't read the page store {path}")]
    Store {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A task is missing.
    #[error("the container has memory of task {0}, but was restored without that task")]
    Task(u32),
    /// A page.
    #[error("can't put page {address:#x} of task {space} in place")]
    Write {
        /// Its address.
        address: u64,
        /// The task, as the container numbers it.
        space: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Puts all such pages of the store in `dir` that are not there yet into the container whose first task is `init`, and frees what nobody else
/// needs. How many they were. All tasks must be restored and stopped: the container stands still meanwhile, so that all processors
/// take part.
pub fn place(dir: &Path, init: i32) -> Result<u64, PlaceError> {
    let failed = |source| PlaceError::Store { path: dir.to_owned(), source };
    let indexes = Index::all(dir, Due::AtOnce).map_err(failed)?;
    if indexes.is_empty() {
        return Ok(0);
    }
    let slots_file = OpenOptions::new().read(true).write(true).open(dir.join(SLOTS)).map_err(failed)?;
    let slots = Mapping::of(&slots_file, slots_file.metadata().map_err(failed)?.len()).map_err(failed)?;
    let store = Store { dir, slots_file: &slots_file, slots: &slots };
    let tasks: HashMap<u32, i32> =
        with_descendants(init).into_iter().filter_map(|pid| Some((inner_pid(pid, init)?, pid))).collect();
    let workers = thread::available_parallelism().map_or(1, NonZero::get).min(MOST_WORKERS).min(indexes.len());
    let queue = Mutex::new(indexes.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let mut placed = 0;
        while let Some((space, path)) = next() {
            let pid = *tasks.get(&space).ok_or(PlaceError::Task(space))?;
            placed += store.place_in(space, pid, &path)?;
        }
        Ok::<u64, PlaceError>(placed)
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut placed = work()?;
        for other in others {
            placed += other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(placed)
    })
}

/// The page store, as far as it is needed here.
struct Store<'a> {
    dir: &'a Path,
    slots_file: &'a File,
    slots: &'a Mapping,
}

impl Store<'_> {
    /// Puts one task's pages in place, which the index at `path` names; how many.
    fn place_in(&self, space: u32, pid: i32, path: &Path) -> Result<u64, PlaceError> {
        let failed = |source| PlaceError::Store { path: self.dir.to_owned(), source };
        let task = Task::open(pid).map_err(failed)?;
        let later = Index::path(self.dir, Due::Later, space);
        let later = if later.exists() { Index::read_ranges(&later).map_err(failed)? } else { Index::default() };
        let mut plan = Plan::default();
        plan.add(space.into(), Arc::new(Index::read(path).map_err(failed)?));
        let (mut runs, mut in_common) = (Vec::new(), Vec::new());
        while let Some(run) = plan.next(SpaceId::from(space), CHUNK) {
            let content = content(self.slots, run).ok_or_else(|| failed(io::Error::other("an index is damaged")))?;
            if run.entry & SHARED != 0 && run.entry != ZERO {
                let pages = (run.page..run.page + run.count).zip(content.chunks(PAGE as usize));
                in_common.extend(pages.map(|(page, content)| Page { page, content }));
            }
            runs.push((run, content));
        }
        let mut has = task.has_its_own(&in_common).into_iter();
        let (mut batch, mut one_by_one) = (Vec::new(), Vec::new());
        let mut free = Vec::new();
        for (run, content) in runs {
            let may_come_later = (run.page..run.page + run.count).any(|page| later.has(page));
            let parts = if run.entry & SHARED == 0 || run.entry == ZERO {
                vec![Part { pages: run.page..run.page + run.count, content }]
            } else {
                missing(run, content, &mut has)
            };
            if may_come_later || run.entry == ZERO { &mut one_by_one } else { &mut batch }.extend(parts);
            if run.entry & SHARED == 0 && !may_come_later {
                free.push(run);
            }
        }
        let mut placed = 0;
        for parts in batch.chunks(MOST_PARTS) {
            if task.write_all(parts) {
                placed += parts.iter().map(|part| part.pages.end - part.pages.start).sum::<u64>();
            } else {
                one_by_one.extend_from_slice(parts);
            }
        }
        for part in one_by_one {
            let failed = |(address, source)| PlaceError::Write { address, space, source };
            placed += task.write_each(&part, &later).map_err(failed)?;
        }
        for run in free {
            free_slots(self.slots_file, run.entry, run.count * PAGE);
        }
        Ok(placed)
    }
}

/// One page, and what it should hold.
struct Page<'a> {
    page: u64,
    content: &'a [u8],
}

/// Pages without gaps, and what they should hold: if that is one page, all hold the same.
#[derive(Clone)]
struct Part<'a> {
    pages: Range<u64>,
    content: &'a [u8],
}

/// What a task does not have yet of a run, when `has` says it of each page that tasks have in common.
fn missing<'a>(run: Run, content: &'a [u8], has: &mut impl Iterator<Item = bool>) -> Vec<Part<'a>> {
    let mut missing: Vec<(Range<u64>, Range<usize>)> = Vec::new();
    let places = (0..content.len()).step_by(PAGE as usize).map(|start| start..start + PAGE as usize);
    for (page, place) in (run.page..run.page + run.count).zip(places) {
        if has.next() == Some(true) {
            continue;
        }
        match missing.last_mut() {
            Some((pages, parts)) if pages.end == page => (pages.end, parts.end) = (page + 1, place.end),
            _ => missing.push((page..page + 1, place)),
        }
    }
    missing.into_iter().map(|(pages, place)| Part { pages, content: &content[place] }).collect()
}

/// The content of a run; of one of zeroes, that of each of its pages.
fn content(slots: &Mapping, run: Run) -> Option<&[u8]> {
    if run.entry == ZERO {
        return Some(&ZEROES);
    }
    let from = usize::try_from(u64::from(run.entry & !SHARED) * PAGE).ok()?;
    slots.bytes().get(from..)?.get(..usize::try_from(run.count * PAGE).ok()?)
}

struct Task {
    pid: Pid,
    mem: File,
    pagemap: File,
}

impl Task {
    fn open(pid: i32) -> io::Result<Self> {
        let mem = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { pid: Pid::from_raw(pid), mem, pagemap })
    }

    /// Of each page, in order, whether the task has it with this content: none that is its file's own, which may change.
    ///
    /// Read with the file, and not with process_vm_readv(2): that pins pages, and a page that a task shares copy-on-write becomes its own by
    /// being pinned (`FAULT_FLAG_UNSHARE`, `gup_must_unshare` in mm/gup.c).
    fn has_its_own(&self, pages: &[Page<'_>]) -> Vec<bool> {
        let mut has = vec![false; pages.len()];
        // Nothing waits for what is present.
        let present = self.present(pages);
        let mut found = vec![0; BATCH * PAGE as usize];
        let follows = |a: &usize, b: &usize| pages[*a].page + 1 == pages[*b].page;
        for part in present.chunk_by(follows).flat_map(|run| run.chunks(BATCH)) {
            let found = &mut found[..part.len() * PAGE as usize];
            if self.mem.read_exact_at(found, pages[part[0]].page * PAGE).is_ok() {
                for (index, found) in part.iter().zip(found.chunks(PAGE as usize)) {
                    has[*index] = found == pages[*index].content;
                }
            }
        }
        has
    }

    /// Which of some pages, that are in order, are there: by their places in the list.
    fn present(&self, pages: &[Page<'_>]) -> Vec<usize> {
        /// Bits of an entry (Documentation/admin-guide/mm/pagemap.rst): present in memory; of a file, or shared.
        const PRESENT: u64 = 1 << 63;
        const OF_FILE: u64 = 1 << 61;
        const ENTRY: u64 = 8;
        let mut present = Vec::new();
        let mut start = 0;
        let mut entries = vec![0; (SPAN * ENTRY) as usize];
        while let Some(first) = pages.get(start) {
            let count = pages[start..].partition_point(|page| page.page < first.page + SPAN);
            let end = start + count;
            let span = pages[end - 1].page + 1 - first.page;
            let entries = &mut entries[..(span * ENTRY) as usize];
            if self.pagemap.read_exact_at(entries, first.page * ENTRY).is_ok() {
                present.extend((start..end).filter(|index| {
                    let place = ((pages[*index].page - first.page) * ENTRY) as usize;
                    let entry = entries[place..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                    entry & (PRESENT | OF_FILE) == PRESENT
                }));
            }
            start = end;
        }
        present
    }

    /// Writes as much as is asked for, or says that it can't.
    fn write_all(&self, parts: &[Part<'_>]) -> bool {
        let local: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part.content)).collect();
        let remote =
            |part: &Part<'_>| RemoteIoVec { base: (part.pages.start * PAGE) as usize, len: part.content.len() };
        let remote: Vec<RemoteIoVec> = parts.iter().map(remote).collect();
        process_vm_writev(self.pid, &local, &remote) == Ok(parts.iter().map(|part| part.content.len()).sum())
    }

    /// Writes pages that must not come later; how many.
    fn write_each(&self, part: &Part<'_>, later: &Index) -> Result<u64, (u64, io::Error)> {
        let mut placed = 0;
        for (page, content) in part.pages.clone().zip(part.content.chunks(PAGE as usize).cycle()) {
            match self.write(page * PAGE, content) {
                Ok(()) => placed += 1,
                // No page is there: the filler will bring it.
                Err(_) if later.has(page) => {}
                Err(source) => return Err((page * PAGE, source)),
            }
        }
        Ok(placed)
    }

    /// Writes one page, also into an area that the task may not write now, like the relocated parts of a program (`FOLL_FORCE`,
    /// mem_rw in fs/proc/base.c).
    ///
    /// Unlike process_vm_writev(2) this does not wait where a page is to come later: `access_remote_vm` fails.
    fn write(&self, address: u64, content: &[u8]) -> io::Result<()> {
        self.mem.write_all_at(content, address)
    }
}
