//! Pages that must be in place before the container runs: what tasks wrote into private mappings of files, locked memory,
//! huge pages. CRIU restores such areas at once, from its images; these pages are not there, so they are written into the
//! restored tasks while those are stopped before their first instruction.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
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

/// Puts all such pages of the store in `dir` into the container whose first task is `init`, and frees what nobody else
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
        let mut task = Task { pid, mem: None };
        let mut plan = Plan::default();
        plan.add(space.into(), Arc::new(Index::read(&path).map_err(failed)?));
        while let Some(run) = plan.next(SpaceId::from(space), CHUNK) {
            let content = content(&slots, run).ok_or_else(|| failed(io::Error::other("an index is damaged")))?;
            let write = |source| PlaceError::Write { address: run.page * PAGE, space, source };
            task.write(run.page * PAGE, content, run.count).map_err(write)?;
            if run.entry & SHARED == 0 {
                free_slots(&slots_file, run.entry, run.count * PAGE);
            }
            placed += run.count;
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
    pid: i32,
    mem: Option<File>,
}

impl Task {
    /// Writes `content` again and again until `pages` are full.
    fn write(&mut self, address: u64, content: &[u8], pages: u64) -> io::Result<()> {
        for at in (address..address + pages * PAGE).step_by(content.len()) {
            let remote = [RemoteIoVec { base: at as usize, len: content.len() }];
            let written = process_vm_writev(Pid::from_raw(self.pid), &[IoSlice::new(content)], &remote).unwrap_or(0);
            if written < content.len() {
                // An area the task may not write now, like the relocated parts of a program: through here it goes
                // (`FOLL_FORCE`, mem_rw in fs/proc/base.c).
                let mem = match &mut self.mem {
                    Some(mem) => mem,
                    none => none.insert(OpenOptions::new().write(true).open(format!("/proc/{}/mem", self.pid))?),
                };
                mem.write_all_at(&content[written..], at + written as u64)?;
            }
        }
        Ok(())
    }
}
