//! Pages that must be in place before the container runs: what tasks wrote into private mappings of files, locked memory,
//! huge pages. CRIU restores such areas at once, from its images; these pages are not there, so they are written into the
//! restored tasks while those are stopped before their first instruction. Pages that may come later as well are put in place if
//! something is there already: a task inherits what its parent had when CRIU forked it. What a task has like that is left alone if it is
//! what should be there, so that it goes on to share it ([`super::common`]).

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul_common::sys::memory::{Mapping, PAGE};
use longhaul_common::tasks::{inner_pid, with_descendants};
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;
use thiserror::Error;

use super::index::{Due, Index, SHARED, ZERO};
use super::plan::{Plan, Run, SpaceId};
use super::store::{SLOTS, free_slots};

/// Pages written at once.
const CHUNK: u64 = 256;
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
/// needs. How many they were. All tasks must be restored and stopped.
pub fn place(dir: &Path, init: i32) -> Result<u64, PlaceError> {
    let failed = |source| PlaceError::Store { path: dir.to_owned(), source };
    let indexes = Index::all(dir, Due::AtOnce).map_err(failed)?;
    if indexes.is_empty() {
        return Ok(0);
    }
    let slots_file = OpenOptions::new().read(true).write(true).open(dir.join(SLOTS)).map_err(failed)?;
    let slots = Mapping::of(&slots_file, slots_file.metadata().map_err(failed)?.len()).map_err(failed)?;
    let tasks = with_descendants(init);
    let mut placed = 0;
    for (space, path) in indexes {
        let is_it = |pid: &&i32| inner_pid(**pid, init) == Some(space);
        let pid = *tasks.iter().find(is_it).ok_or(PlaceError::Task(space))?;
        let task = Task::open(pid).map_err(failed)?;
        let later = Index::path(dir, Due::Later, space);
        let later = if later.exists() { Index::read_ranges(&later).map_err(failed)? } else { Index::default() };
        let mut plan = Plan::default();
        plan.add(space.into(), Arc::new(Index::read(&path).map_err(failed)?));
        while let Some(run) = plan.next(SpaceId::from(space), CHUNK) {
            let content = content(&slots, run).ok_or_else(|| failed(io::Error::other("an index is damaged")))?;
            let may_come_later = (run.page..run.page + run.count).any(|page| later.has(page));
            for (pages, content) in task.missing(run, content) {
                let in_one = !may_come_later && run.entry != ZERO && task.write_all(pages.start * PAGE, content);
                placed += if in_one {
                    pages.end - pages.start
                } else {
                    let failed = |(address, source)| PlaceError::Write { address, space, source };
                    one_by_one(&task, pages, content, &later).map_err(failed)?
                };
            }
            if run.entry & SHARED == 0 && !may_come_later {
                free_slots(&slots_file, run.entry, run.count * PAGE);
            }
        }
    }
    Ok(placed)
}

/// Puts pages in place that must not come later; how many.
fn one_by_one(task: &Task, pages: Range<u64>, content: &[u8], later: &Index) -> Result<u64, (u64, io::Error)> {
    let mut placed = 0;
    for (page, content) in pages.zip(content.chunks(PAGE as usize).cycle()) {
        match task.write(page * PAGE, content) {
            Ok(()) => placed += 1,
            // No page is there: the filler will bring it.
            Err(_) if later.has(page) => {}
            Err(source) => return Err((page * PAGE, source)),
        }
    }
    Ok(placed)
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

    /// What the task does not have yet of a run with this content, in parts without gaps. Only what tasks have in common may be there.
    fn missing<'a>(&self, run: Run, content: &'a [u8]) -> Vec<(Range<u64>, &'a [u8])> {
        let all = run.page..run.page + run.count;
        if run.entry & SHARED == 0 || run.entry == ZERO {
            return vec![(all, content)];
        }
        let mut missing: Vec<(Range<u64>, Range<usize>)> = Vec::new();
        let places = (0..content.len()).step_by(PAGE as usize).map(|start| start..start + PAGE as usize);
        let has = self.has_its_own(&all, content);
        for ((page, place), _) in all.zip(places).zip(has).filter(|(_, has)| !has) {
            match missing.last_mut() {
                Some((pages, parts)) if pages.end == page => (pages.end, parts.end) = (page + 1, place.end),
                _ => missing.push((page..page + 1, place)),
            }
        }
        missing.into_iter().map(|(pages, parts)| (pages, &content[parts])).collect()
    }

    /// Of each page, whether the task has it with this content: none that is its file's own, which may change.
    fn has_its_own(&self, pages: &Range<u64>, content: &[u8]) -> Vec<bool> {
        /// Bits of an entry (Documentation/admin-guide/mm/pagemap.rst): present in memory; of a file, or shared.
        const PRESENT: u64 = 1 << 63;
        const OF_FILE: u64 = 1 << 61;
        let mut entries = vec![0; content.len() / (PAGE / 8) as usize];
        if self.pagemap.read_exact_at(&mut entries, pages.start * 8).is_err() {
            return vec![false; entries.len() / 8];
        }
        let entries = entries.chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()));
        let mut found = [0; PAGE as usize];
        let has = |((page, entry), content): ((u64, u64), &[u8])| {
            // Nothing waits for what is present.
            entry & (PRESENT | OF_FILE) == PRESENT
                && self.mem.read_exact_at(&mut found, page * PAGE).is_ok()
                && found == content
        };
        pages.clone().zip(entries).zip(content.chunks(PAGE as usize)).map(has).collect()
    }

    /// Writes as much as is asked for, or says that it can't.
    fn write_all(&self, address: u64, content: &[u8]) -> bool {
        let remote = [RemoteIoVec { base: address as usize, len: content.len() }];
        process_vm_writev(self.pid, &[IoSlice::new(content)], &remote) == Ok(content.len())
    }

    /// Writes one page, also into an area that the task may not write now, like the relocated parts of a program (`FOLL_FORCE`,
    /// mem_rw in fs/proc/base.c).
    ///
    /// Unlike process_vm_writev(2) this does not wait where a page is to come later: `access_remote_vm` fails.
    fn write(&self, address: u64, content: &[u8]) -> io::Result<()> {
        self.mem.write_all_at(content, address)
    }
}
