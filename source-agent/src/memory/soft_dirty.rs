//! Which pages a container has written, on kernels that can't protect them asynchronously (before 6.7): by soft-dirty bits
//! (the kernel's Documentation/admin-guide/mm/soft-dirty.rst; `CONFIG_MEM_SOFT_DIRTY`).
//!
//! Bits are read and cleared in two steps, and what is written between them would be lost: in each round the container is frozen
//! for both. Its pages are read when it runs again. Areas that are new, or have moved, count as written from end to end: the kernel
//! says so itself.
//!
//! Of memory that tasks [share](super::shared), a bit is lost with the page table entry that has it. In the rounds what the bits say
//! is good enough; while the container is frozen, all of it is compared with what was sent.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use longhaul_common::cgroup::Freezer;
use longhaul_common::journal::Journal;
use longhaul_common::sys::memory::{LonePage, PAGE};
use longhaul_common::tasks::{TaskId, inner_pid};

use super::flags::{self, Mark, marks};
use super::inject::InjectError;
use super::maps::{Area, Areas, OpenFiles, intersection, union};
use super::shared::SharedMemory;
use super::tracker::{
    Frozen, Looked, Origin, SpacePages, Taken, TrackError, Tracker, add_inherited, is_borrower, is_gone, mark_in,
};

/// An entry of `/proc/<pid>/pagemap` (the kernel's Documentation/admin-guide/mm/pagemap.rst).
#[derive(Debug, Clone, Copy)]
struct Entry(u64);

impl Entry {
    /// A page of the task's own: in memory and of no file, or in swap.
    fn is_content(self) -> bool {
        let (present, swapped, of_file) = (self.0 >> 63 & 1 == 1, self.0 >> 62 & 1 == 1, self.0 >> 61 & 1 == 1);
        (present && !of_file) || swapped
    }

    /// There at all.
    fn is_mapped(self) -> bool {
        self.0 >> 62 != 0
    }

    fn is_written(self) -> bool {
        self.0 >> 55 & 1 == 1
    }
}

/// Entries that are read at once: of 64 MiB.
const ENTRIES: u64 = 16 << 10;

/// The bit of a page of zeroes that all tasks share, in `/proc/kpageflags` (the kernel's Documentation/admin-guide/mm/pagemap.rst).
const ZERO_PAGE: u64 = 1 << 24;

impl Entry {
    /// Whether it is the kernel's page of zeroes. A task that reads where it gave memory up gets that, and the bit does not
    /// say so: what was there before is gone all the same.
    fn is_shared_zero(self, flags: Option<&File>) -> bool {
        const PRESENT: u64 = 1 << 63;
        /// Mapped by this task alone.
        const EXCLUSIVE: u64 = 1 << 56;
        const FRAME: u64 = (1 << 55) - 1;
        if self.0 & PRESENT == 0 || self.0 & EXCLUSIVE != 0 {
            return false;
        }
        let mut bytes = [0; 8];
        // Without the flags every page that others may have counts.
        flags.is_none_or(|flags| {
            flags.read_exact_at(&mut bytes, (self.0 & FRAME) * 8).is_err() || u64::from_le_bytes(bytes) & ZERO_PAGE != 0
        })
    }
}

/// Calls `found` with every page of an area and its entry.
fn walk(pagemap: &File, area: &Area, mut found: impl FnMut(u64, Entry)) -> io::Result<()> {
    let mut buffer = vec![0; (ENTRIES * 8) as usize];
    let mut start = area.start;
    while start < area.end {
        let pages = ((area.end - start) / PAGE).min(ENTRIES);
        let bytes = &mut buffer[..(pages * 8) as usize];
        pagemap.read_exact_at(bytes, start / PAGE * 8)?;
        for (page, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
            found(start + page as u64 * PAGE, Entry(u64::from_le_bytes(*entry)));
        }
        start += pages * PAGE;
    }
    Ok(())
}

fn push(ranges: &mut Vec<Area>, page: u64, from: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == page && last.start >= from => last.end += PAGE,
        _ => ranges.push(page..page + PAGE),
    }
}

/// Whether this kernel has such bits: it clears those of this process, and looks for one.
pub fn works() -> bool {
    static WORKS: AtomicBool = AtomicBool::new(false);
    let look = || -> io::Result<bool> {
        let mut page = LonePage::new()?;
        let is_written = |page: &LonePage| {
            let (mut is_written, address) = (false, page.address());
            let found = |_, entry: Entry| is_written = entry.is_written();
            walk(&File::open("/proc/self/pagemap")?, &(address..address + PAGE), found)?;
            Ok::<_, io::Error>(is_written)
        };
        page.write(1);
        clear(std::process::id().cast_signed())?;
        let before = is_written(&page)?;
        page.write(2);
        Ok(!before && is_written(&page)?)
    };
    WORKS.load(Ordering::Relaxed) || {
        let works = look().unwrap_or(false);
        WORKS.store(works, Ordering::Relaxed);
        works
    }
}

/// Clears the bits of a task.
fn clear(pid: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "4")
}

/// See the module.
pub struct SoftDirty {
    /// The container's first task.
    init: i32,
    freezer: Freezer,
    spaces: BTreeMap<i32, Space>,
    shared: SharedMemory,
    owed: Vec<SpacePages>,
    ended: Vec<u32>,
    longest_stop: Duration,
    page_flags: Option<File>,
    /// Of containers that are frozen for a moment: an agent that is killed then thaws them at its next start.
    journal: Journal,
    migration: String,
}

impl Drop for SoftDirty {
    fn drop(&mut self) {
        self.journal.remove(&self.migration);
    }
}

/// Thaws what an agent that was killed had frozen for a round. What a migration holds, `held` says, is not its to thaw.
pub fn recover(journal: &Journal, held: impl Fn(&str) -> bool) {
    for (migration, cgroup) in journal.all::<PathBuf>() {
        if !held(&migration)
            && let Some(Err(error)) = Freezer::at(cgroup).map(|freezer| freezer.thaw())
        {
            tracing::error!(%error, migration, "can't thaw a container that an agent had frozen which was killed");
        }
        journal.remove(&migration);
    }
}

struct Space {
    task: TaskId,
    number: u32,
    marks: Vec<(Area, Mark)>,
}

impl SoftDirty {
    /// For the container whose first task is `init`.
    pub fn new(init: i32, freezer: Freezer, journal: Journal, migration: &str) -> io::Result<Self> {
        journal.write(migration, &freezer.dir()).map_err(io::Error::other)?;
        Ok(Self {
            page_flags: File::open("/proc/kpageflags").ok(),
            journal,
            migration: migration.to_owned(),
            init,
            freezer,
            spaces: BTreeMap::new(),
            shared: SharedMemory::new()?,
            owed: Vec::new(),
            ended: Vec::new(),
            longest_stop: Duration::ZERO,
        })
    }

    fn forget(&mut self, pid: i32) {
        if let Some(space) = self.spaces.remove(&pid) {
            self.owed.retain(|owed| owed.space != space.number);
            self.ended.push(space.number);
        }
    }

    /// Takes what was written, of all tasks there are, while they are frozen.
    fn take_frozen(&mut self) -> Result<Taken, TrackError> {
        let tasks = self.freezer.tasks()?;
        self.shared.begin(false).map_err(TrackError::Shared)?;
        let gone: Vec<i32> = self
            .spaces
            .iter()
            .filter(|(pid, space)| !tasks.contains(pid) || TaskId::of(**pid) != Some(space.task))
            .map(|(pid, _)| *pid)
            .collect();
        gone.into_iter().for_each(|pid| self.forget(pid));
        let mut taken = Vec::new();
        for &pid in &tasks {
            if !self.spaces.contains_key(&pid) && is_borrower(pid, self.spaces.keys()) {
                continue;
            }
            let files = OpenFiles::of(pid);
            files.in_memory.iter().for_each(|fd| self.shared.meet_open(pid, *fd, false));
            if files.has_direct_io {
                // A device writes past the page tables.
                self.forget(pid);
                continue;
            }
            match self.take_space(pid) {
                Ok(pages) => taken.push(pages),
                Err(TrackError::Look { source, .. }) if is_gone(&source) => self.forget(pid),
                Err(error) => {
                    self.owed.extend(taken);
                    return Err(error);
                }
            }
        }
        let (objects, written, ended) = self.shared.finish();
        self.owed.retain(|owed| !ended.contains(&owed.space));
        self.ended.extend(ended);
        taken.extend(written);
        taken.append(&mut self.owed);
        Ok(Taken { ended: std::mem::take(&mut self.ended), objects, pages: taken })
    }

    fn take_space(&mut self, pid: i32) -> Result<SpacePages, TrackError> {
        let failed = |source| TrackError::Look { pid, source };
        let is_new = !self.spaces.contains_key(&pid);
        if is_new {
            let number = inner_pid(pid, self.init).ok_or(InjectError::Gone(pid))?;
            let task = TaskId::of(pid).ok_or(InjectError::Gone(pid))?;
            flags::learn(pid).map_err(failed)?;
            self.spaces.insert(pid, Space { task, number, marks: marks(pid).map_err(failed)? });
        }
        let Some(space) = self.spaces.get(&pid) else { return Err(InjectError::Gone(pid).into()) };
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(failed)?;
        let areas = Areas::of(pid, self.shared.device()).map_err(failed)?;
        let mut ranges = Vec::new();
        let flags = self.page_flags.as_ref();
        for private in areas.private.iter().filter(|private| mark_in(&space.marks, &private.area) != Some(Mark::Criu)) {
            let add = |page, entry: Entry| {
                if entry.is_content() && (is_new || entry.is_written() || entry.is_shared_zero(flags)) {
                    push(&mut ranges, page, private.area.start);
                }
            };
            walk(&pagemap, &private.area, add).map_err(failed)?;
        }
        for area in &areas.shared {
            let is_known = self.shared.knows(area);
            if self.shared.meet(pid, area, false).is_none() {
                continue;
            }
            if is_new || !is_known {
                self.shared.doubt(area.inode);
                continue;
            }
            let mut written = Vec::new();
            let add = |page, entry: Entry| {
                if entry.is_mapped() && entry.is_written() {
                    push(&mut written, page, area.start);
                }
            };
            walk(&pagemap, &(area.start..area.end), add).map_err(failed)?;
            written.into_iter().for_each(|written| self.shared.note(area, written));
        }
        clear(pid).map_err(failed)?;
        Ok(SpacePages { origin: Origin::Task(pid), space: space.number, ranges })
    }

    fn look_at(&mut self, pid: i32) -> io::Result<Option<Frozen>> {
        let areas = Areas::of(pid, self.shared.device())?;
        for area in &areas.shared {
            self.shared.meet(pid, area, true);
            self.shared.doubt(area.inode);
        }
        let Some(space) = self.spaces.get_mut(&pid).filter(|space| TaskId::of(pid) == Some(space.task)) else {
            return Ok(None);
        };
        space.marks = marks(pid)?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut frozen = Frozen { pid, space: space.number, ..Frozen::default() };
        let flags = self.page_flags.as_ref();
        for private in areas.private {
            let mark = mark_in(&space.marks, &private.area);
            if mark == Some(Mark::Criu) {
                continue;
            }
            let content = if private.is_file || mark.is_some() { &mut frozen.at_once } else { &mut frozen.later };
            let from = private.area.start;
            walk(&pagemap, &private.area, |page, entry| {
                if entry.is_content() {
                    push(content, page, from);
                    if entry.is_written() || entry.is_shared_zero(flags) {
                        push(&mut frozen.written, page, from);
                    }
                }
            })?;
            frozen.followed.push(private.area);
        }
        Ok(Some(frozen))
    }
}

impl Tracker for SoftDirty {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn take(&mut self, _tasks: &[i32]) -> Result<Taken, TrackError> {
        let start = Instant::now();
        let paused = self.freezer.pause()?;
        let taken = self.take_frozen();
        let thawed = paused.end();
        self.longest_stop = self.longest_stop.max(start.elapsed());
        thawed?;
        taken
    }

    fn written_bytes(&mut self, tasks: &[i32]) -> u64 {
        let count = |pid: &i32| -> io::Result<u64> {
            let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
            let mut bytes = 0;
            for private in Areas::of(*pid, self.shared.device())?.private.iter().filter(|private| private.is_writable) {
                walk(&pagemap, &private.area, |_, entry| {
                    bytes += if entry.is_content() && entry.is_written() { PAGE } else { 0 };
                })?;
            }
            Ok(bytes)
        };
        tasks.iter().filter(|pid| self.spaces.contains_key(pid)).filter_map(|pid| count(pid).ok()).sum()
    }

    fn put_back(&mut self, pages: Vec<SpacePages>) {
        self.owed.extend(pages);
    }

    fn look_frozen(&mut self, tasks: &[i32]) -> Result<Looked, TrackError> {
        self.shared.begin(true).map_err(TrackError::Shared)?;
        let owed = std::mem::take(&mut self.owed);
        let mut all = Vec::new();
        for &pid in tasks {
            let files = OpenFiles::of(pid);
            files.in_memory.iter().for_each(|fd| self.shared.meet_open(pid, *fd, true));
            if files.has_direct_io {
                self.forget(pid);
            }
            let looked = self.look_at(pid).map_err(|source| TrackError::Look { pid, source })?;
            let Some(mut frozen) = looked else { continue };
            for owed in owed.iter().filter(|owed| owed.space == frozen.space) {
                frozen.written.extend(intersection(&owed.ranges, &frozen.later));
                frozen.written.extend(intersection(&owed.ranges, &frozen.at_once));
            }
            frozen.written = union(frozen.written);
            all.push(frozen);
        }
        let marks: Vec<_> = self.spaces.values().map(|space| (space.number, space.marks.as_slice())).collect();
        add_inherited(&mut all, &marks);
        let mut objects = self.shared.finish_frozen();
        for object in &mut objects {
            let of_this = owed.iter().filter(|owed| owed.space == object.written.space);
            let ranges = std::mem::take(&mut object.written.ranges);
            object.written.ranges =
                union(ranges.into_iter().chain(of_this.flat_map(|owed| owed.ranges.clone())).collect());
        }
        Ok(Looked { tasks: all, objects })
    }

    fn longest_stop(&self) -> Duration {
        self.longest_stop
    }
}
