//! Which pages a running container has written: without stopping it.
//!
//! Every address space gets a userfaultfd of its own in the kernel's asynchronous write-protect mode (Linux 6.7). A round
//! is one `PAGEMAP_SCAN` of each area, which reports what was written and protects it again in one step; the first write to
//! a protected page costs the task about 1 µs. Areas are read anew in every round: one that is not registered yet, because
//! it is new, moved, or of a task that forked or executed another program, counts as written from end to end.
//!
//! Followed are private areas: anonymous memory, and what tasks wrote into private mappings of files; and what they wrote into
//! memory that they [share](super::shared).
//!
//! When the tracker is dropped, so are its descriptors, and with them the kernel forgets: nothing stays in the container.

mod look;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use longhaul_common::cgroup::CgroupError;
use longhaul_common::pages::{Object, What};
use longhaul_common::sys::memory::{
    Backing, Scan, SharedPages, begin_write_tracking, protect, register_write_tracking, scan, scan_shared,
};
use longhaul_common::sys::share_memory;
use longhaul_common::tasks::inner_pid;
use nix::libc;
use thiserror::Error;

use self::look::{Found, View, begin_look, look_at_all};
use super::flags::{self, Mark, marks};
use super::inject::{InjectError, userfaultfd_of};
use super::maps::{Area, Areas, OpenFiles, Private, Shared, intersection, union};
use super::several::of_each;
use super::shared::{FrozenObject, SharedMemory};

/// Memory that can't be tracked.
#[derive(Debug, Error)]
pub enum TrackError {
    /// The kernel has no such scan.
    #[error("this kernel can't track written pages: Linux 6.7 or newer can (PAGEMAP_SCAN, userfaultfd WP_ASYNC)")]
    Unsupported,
    /// An earlier move is still filling it.
    #[error(
        "the memory of task {0} is still arriving from its last move, or the task manages it with userfaultfd itself"
    )]
    Busy(i32),
    /// The container can't be stopped for a moment.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A task would not.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Nor what tasks share.
    #[error("can't look at the memory that the container's tasks share")]
    Shared(#[source] io::Error),
    /// Its memory can't be scanned.
    #[error("can't look at the memory of task {pid}")]
    Look {
        /// The task.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where pages are read from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// The memory of a task, as this host numbers it.
    Task(i32),
    /// Shared memory.
    Object(Arc<File>),
}

/// The pages of one address space.
#[derive(Debug, Clone)]
pub struct SpacePages {
    /// Where they are.
    pub origin: Origin,
    /// The task, as the container numbers it; or the object's number.
    pub space: u32,
    /// Ranges of addresses, in order.
    pub ranges: Vec<Area>,
}

impl SpacePages {
    /// Their number of bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }
}

/// What one round found.
#[derive(Debug, Clone, Default)]
pub struct Taken {
    /// Address spaces that were there in the last round and are no more, as the container numbers their tasks. A number may
    /// be that of another one now.
    pub ended: Vec<u32>,
    /// Shared memory that the destination has to be told of, by its address space.
    pub objects: Vec<(u32, Object)>,
    /// What was written.
    pub pages: Vec<SpacePages>,
}

/// The memory of a task of a frozen container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frozen {
    /// The task, as this host numbers it.
    pub pid: i32,
    /// The task, as the container numbers it.
    pub space: u32,
    /// Written since the last round.
    pub written: Vec<Area>,
    /// Areas the tracker has followed; everything else is CRIU's to save.
    pub followed: Vec<Area>,
    /// The pages in those areas that have content and may come after the task runs again, in order.
    pub later: Vec<Area>,
    /// Those that must be in place before, in order. A page that is in both lists is put in place before if a page is there
    /// already, which would keep it from coming later.
    pub at_once: Vec<Area>,
    /// Mappings of shared memory that were looked at.
    pub shared: Vec<Shared>,
    /// Where guards may be (`MADV_GUARD_INSTALL`): nowhere else are any. Nothing where that is not known.
    pub guards: Option<Vec<Area>>,
}

/// The memory of a frozen container.
#[derive(Debug, Clone, Default)]
pub struct Looked {
    /// Of its tasks.
    pub tasks: Vec<Frozen>,
    /// That they share.
    pub objects: Vec<FrozenObject>,
}

/// Pages that must be right in the end.
#[derive(Debug, Clone)]
pub struct Content {
    /// Of this address space.
    pub space: u32,
    /// [`What::Content`] or [`What::AtOnce`].
    pub what: What,
    /// In order.
    pub ranges: Vec<Area>,
}

impl Looked {
    /// The objects, by inode, whose mappings are theirs for certain: a System V segment may have another object's number.
    pub fn certain_objects(&self) -> BTreeSet<u64> {
        let mappings = self.tasks.iter().flat_map(|task| &task.shared);
        let unclear: BTreeSet<_> = mappings.filter(|mapping| mapping.is_segment).map(|mapping| mapping.inode).collect();
        self.objects.iter().map(|object| object.inode).filter(|inode| !unclear.contains(inode)).collect()
    }

    /// All pages that must be right in the end.
    pub fn content(&self) -> Vec<Content> {
        let content = |space, what, ranges: &Vec<Area>| Content { space, what, ranges: ranges.clone() };
        let of_task = |task: &Frozen| {
            [content(task.space, What::Content, &task.later), content(task.space, What::AtOnce, &task.at_once)]
        };
        let objects = self.objects.iter();
        let of_objects = objects.map(|object| content(object.written.space, What::AtOnce, &object.content));
        self.tasks.iter().flat_map(of_task).chain(of_objects).collect()
    }
}

/// Finds out what was written. A round is a transaction: what [`take`](Self::take) reported and was not sent is given
/// back by [`put_back`](Self::put_back), and reported again.
pub trait Tracker: Send {
    /// The name of the mechanism, for the report.
    fn name(&self) -> &'static str;
    /// What was written since the last call; in the first, all there is.
    fn take(&mut self, tasks: &[i32]) -> Result<Taken, TrackError>;
    /// Bytes of the tasks' own memory that were written since the last call of [`take`](Self::take), each page once; they stay
    /// to be taken.
    fn written_bytes(&mut self, tasks: &[i32]) -> u64;
    /// Gives back what was taken.
    fn put_back(&mut self, pages: Vec<SpacePages>);
    /// What was written since the last call, and what there is, once all tasks are frozen.
    fn look_frozen(&mut self, tasks: &[i32]) -> Result<Looked, TrackError>;
    /// The longest that tracking has stopped a thread of the container.
    fn longest_stop(&self) -> Duration;
}

/// The tracker by asynchronous write protection.
pub struct WriteProtect {
    /// The container's first task.
    init: i32,
    spaces: BTreeMap<i32, Space>,
    shared: SharedMemory,
    owed: Vec<SpacePages>,
    ended: Vec<u32>,
    longest_stop: Duration,
}

struct Space {
    uffd: OwnedFd,
    number: u32,
    /// Mappings of shared memory that are followed.
    shared: BTreeMap<Shared, Access>,
    /// Areas that are special.
    marks: Vec<(Area, Mark)>,
}

/// What a task can do through a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// It may write.
    Write,
    /// Its file was opened for reading: it can never write.
    Read,
}

impl Space {
    fn mark(&self, area: &Area) -> Option<Mark> {
        mark_in(&self.marks, area)
    }
}

fn backing(private: &Private) -> Backing {
    if private.is_file { Backing::File } else { Backing::Zeroes }
}

impl WriteProtect {
    /// For the container whose first task is `init`.
    pub fn new(init: i32) -> io::Result<Self> {
        let (shared, spaces) = (SharedMemory::new()?, BTreeMap::new());
        Ok(Self { init, spaces, shared, owed: Vec::new(), ended: Vec::new(), longest_stop: Duration::ZERO })
    }

    fn arm(&mut self, pid: i32) -> Result<Space, TrackError> {
        let (uffd, stopped) = userfaultfd_of(pid)?;
        self.longest_stop = self.longest_stop.max(stopped);
        begin_write_tracking(uffd.as_fd()).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => TrackError::Unsupported,
            _ => TrackError::Look { pid, source: error },
        })?;
        let number = inner_pid(pid, self.init).ok_or(InjectError::Gone(pid))?;
        Ok(Space { uffd, number, shared: BTreeMap::new(), marks: Vec::new() })
    }

    fn take_space(&mut self, pid: i32) -> Result<SpacePages, TrackError> {
        let mut space = match self.spaces.remove(&pid) {
            Some(space) => space,
            None => self.arm(pid)?,
        };
        let mut ranges = Vec::new();
        match follow(&mut space, pid, &mut self.shared, &mut ranges) {
            Ok(()) => {}
            Err(Followed::OtherSpace) => {
                // The task executed another program, or its number is another task's now.
                self.ended.push(space.number);
                self.owed.retain(|owed| owed.space != space.number);
                lose(&mut self.shared, &space);
                space = self.arm(pid)?;
                ranges.clear();
                if let Err(error) = follow(&mut space, pid, &mut self.shared, &mut ranges) {
                    lose(&mut self.shared, &space);
                    return Err(error.of(pid));
                }
            }
            Err(error) => {
                lose(&mut self.shared, &space);
                return Err(error.of(pid));
            }
        }
        let space_number = space.number;
        self.spaces.insert(pid, space);
        Ok(SpacePages { origin: Origin::Task(pid), space: space_number, ranges })
    }

    /// What a task writes that can't be followed.
    fn doubt_all_of(&mut self, pid: i32, is_frozen: bool) {
        let Ok(areas) = Areas::of(pid, self.shared.device()) else { return };
        for area in &areas.shared {
            self.shared.meet(pid, area, is_frozen);
            self.shared.doubt(area.inode);
        }
    }
}

/// CRIU maps a locked area as such, which fills it with zeroes, before it forks the task's children (`premap_private_vma` in
/// criu/mem.c, 4.2). A child that has the same area, not locked, gets these zeroes in it. `marks` are those of all address spaces.
pub(super) fn add_inherited(all: &mut [Frozen], marks: &[(u32, &[(Area, Mark)])]) {
    for frozen in all {
        let others = marks.iter().filter(|(number, _)| *number != frozen.space);
        let locked: Vec<Area> = others.flat_map(|(_, marks)| marks.iter().map(|(area, _)| area.clone())).collect();
        frozen.at_once.extend(intersection(&locked, &frozen.later));
        frozen.at_once.sort_unstable_by_key(|area| (area.start, area.end));
        // Several tasks may have locked the same.
        let mut reached = 0;
        frozen.at_once.retain_mut(|area| {
            area.start = area.start.max(reached);
            reached = reached.max(area.end);
            area.start < area.end
        });
    }
}

/// Whether a task uses the address space of another: between vfork and exec, that of its parent. What it writes there is
/// its parent's, and is found there.
pub(super) fn is_borrower<'a>(pid: i32, known: impl IntoIterator<Item = &'a i32>) -> bool {
    let shares = |other: i32| other != pid && share_memory(pid, other).unwrap_or(false);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
    parent.is_some_and(shares) || known.into_iter().any(|other| shares(*other))
}

/// The mark of an area. The kernel joins neighbours, and cuts areas: a part that is special makes all of it so.
pub(super) fn mark_in(marks: &[(Area, Mark)], area: &Area) -> Option<Mark> {
    let is_part = |marked: &Area| marked.start < area.end && area.start < marked.end;
    marks.iter().find(|(marked, _)| is_part(marked)).map(|(_, mark)| *mark)
}

/// What an address space that is not followed any more has written last, nobody knows.
fn lose(shared: &mut SharedMemory, space: &Space) {
    space.shared.keys().for_each(|area| shared.doubt(area.inode));
}

/// Why an address space can't be followed with this descriptor.
enum Followed {
    OtherSpace,
    Busy,
    Failed(io::Error),
}

impl Followed {
    fn of(self, pid: i32) -> TrackError {
        match self {
            Self::OtherSpace => InjectError::Gone(pid).into(),
            Self::Busy => TrackError::Busy(pid),
            Self::Failed(error) if error.raw_os_error() == Some(libc::ENOTTY) => TrackError::Unsupported,
            Self::Failed(source) => TrackError::Look { pid, source },
        }
    }
}

/// Takes what was written in every area of a task, and registers those that are new.
fn follow(space: &mut Space, pid: i32, memory: &mut SharedMemory, ranges: &mut Vec<Area>) -> Result<(), Followed> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(Followed::Failed)?;
    let areas = Areas::of(pid, memory.device()).map_err(Followed::Failed)?;
    let mut registered = follow_shared(space, pid, &pagemap, areas.shared, memory)?;
    let mut looked = false;
    for private in areas.private {
        let before = ranges.len();
        match take_written(&pagemap, &private, ranges) {
            Ok(()) => continue,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => ranges.truncate(before),
            Err(error) => return Err(Followed::Failed(error)),
        }
        // Most of a program's mappings are code that nobody writes. Until that changes, CRIU has nothing to save of them.
        if private.is_file && !private.is_writable && !has_content(&pagemap, &private).map_err(Followed::Failed)? {
            continue;
        }
        let area = &private.area;
        if !looked && space.mark(area).is_none() {
            looked = true;
            space.marks = marks(pid).map_err(Followed::Failed)?;
        }
        if space.mark(area) == Some(Mark::Criu) {
            continue;
        }
        match register(space, area)? {
            Registered::Yes => registered = true,
            // The next round will find what it is now.
            Registered::Changed | Registered::ReadOnly => {}
        }
        // Protected first and read then: what is written in between counts as written in the next round, too. All content
        // counts, also where the scan above had taken a part of it before it failed.
        let _ = take_written(&pagemap, &private, &mut Vec::new());
        look(&pagemap, &private, Scan::Content, ranges).map_err(Followed::Failed)?;
    }
    if registered {
        // Registering has changed the flags, and they must be known at the freeze.
        flags::learn(pid).map_err(Followed::Failed)?;
    }
    Ok(())
}

/// The same for mappings of shared memory; whether any was registered. What they show is protected page by page, whether
/// the task has it in its page tables or not: so that a page which is not there later was there in between.
fn follow_shared(
    space: &mut Space,
    pid: i32,
    pagemap: &File,
    areas: Vec<Shared>,
    memory: &mut SharedMemory,
) -> Result<bool, Followed> {
    let mut registered = false;
    let mut found = BTreeMap::new();
    for area in areas {
        let Some(content) = memory.meet(pid, &area, false) else { continue };
        let known = space.shared.remove(&area).is_some();
        let mut access = Access::Write;
        if !known || !take_shared(space, pagemap, &area, &content, memory).map_err(Followed::Failed)? {
            match register(space, &(area.start..area.end))? {
                Registered::Yes => {
                    registered = true;
                    for part in &content {
                        // It may be gone: then it is missed in the next round.
                        let _ = protect(space.uffd.as_fd(), part.start, part.end);
                    }
                    memory.doubt(area.inode);
                }
                Registered::ReadOnly => access = Access::Read,
                Registered::Changed => {
                    memory.doubt(area.inode);
                    continue;
                }
            }
        }
        found.insert(area, access);
    }
    // Those that are no more.
    lose(memory, space);
    space.shared = found;
    Ok(registered)
}

/// What was written through a mapping. False, if it is not the one that was registered.
fn take_shared(
    space: &Space,
    pagemap: &File,
    area: &Shared,
    content: &[Area],
    memory: &mut SharedMemory,
) -> io::Result<bool> {
    let mut unknown = Vec::new();
    for part in content {
        let scanned = scan_shared(pagemap, (part.start, part.end), true, |start, end, pages| match pages {
            SharedPages::Written => memory.note(area, start..end),
            SharedPages::Unknown => {
                memory.note(area, start..end);
                unknown.push(start..end);
            }
            SharedPages::Guard => {}
        });
        match scanned {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    for part in unknown {
        if protect(space.uffd.as_fd(), part.start, part.end).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What became of an attempt to register an area.
enum Registered {
    Yes,
    /// It has changed since the list was read.
    Changed,
    /// Of a file that was opened for reading: it can never be written through.
    ReadOnly,
}

fn register(space: &Space, area: &Area) -> Result<Registered, Followed> {
    match register_write_tracking(space.uffd.as_fd(), area.start, area.end) {
        Ok(()) => Ok(Registered::Yes),
        Err(error) => match error.raw_os_error() {
            Some(libc::EBUSY) => Err(Followed::Busy),
            Some(libc::EINVAL) => Ok(Registered::Changed),
            // `VM_MAYWRITE` (`userfaultfd_register` in fs/userfaultfd.c).
            Some(libc::EPERM) => Ok(Registered::ReadOnly),
            _ => Err(Followed::OtherSpace),
        },
    }
}

fn look(pagemap: &File, private: &Private, what: Scan, ranges: &mut Vec<Area>) -> io::Result<()> {
    let Area { start, end } = private.area;
    scan(pagemap, (start, end), backing(private), what, |start, end| ranges.push(start..end))
}

fn has_content(pagemap: &File, private: &Private) -> io::Result<bool> {
    let mut found = Vec::new();
    look(pagemap, private, Scan::Content, &mut found)?;
    Ok(!found.is_empty())
}

/// What was written in an area. Where the task gave up pages of a file's mapping (`MADV_DONTNEED`), the
/// kernel leaves markers in their place (`pte_install_uffd_wp_if_needed` in mm/memory.c), which look like swapped pages that
/// nobody has written: what is there now is the file's content, and must be looked at again.
fn take_written(pagemap: &File, private: &Private, ranges: &mut Vec<Area>) -> io::Result<()> {
    look(pagemap, private, Scan::TakeWritten, ranges)?;
    if private.is_file { look(pagemap, private, Scan::Swapped, ranges) } else { Ok(()) }
}

/// Counts what was written in areas that are followed; what can't be looked at, the next round will.
fn count_written(pid: i32, areas: &Areas) -> io::Result<u64> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut bytes = 0;
    for private in areas.private.iter().filter(|private| private.is_writable) {
        let area = (private.area.start, private.area.end);
        let scanned = scan(&pagemap, area, backing(private), Scan::Written, |start, end| bytes += end - start);
        match scanned {
            Err(error) if error.raw_os_error() != Some(libc::EPERM) => return Err(error),
            _ => {}
        }
    }
    Ok(bytes)
}

impl Tracker for WriteProtect {
    fn name(&self) -> &'static str {
        "userfaultfd-wp"
    }

    fn written_bytes(&mut self, tasks: &[i32]) -> u64 {
        let followed = tasks.iter().filter(|pid| self.spaces.contains_key(pid));
        let count = |pid: &i32| Areas::of(*pid, self.shared.device()).and_then(|areas| count_written(*pid, &areas));
        followed.filter_map(|pid| count(pid).ok()).sum()
    }

    fn take(&mut self, tasks: &[i32]) -> Result<Taken, TrackError> {
        self.shared.begin(false).map_err(TrackError::Shared)?;
        let (shared, owed, ended) = (&mut self.shared, &mut self.owed, &mut self.ended);
        self.spaces.retain(|pid, space| {
            let lives = tasks.contains(pid);
            if !lives {
                lose(shared, space);
                owed.retain(|owed| owed.space != space.number);
                ended.push(space.number);
            }
            lives
        });
        let mut taken = Vec::new();
        for &pid in tasks {
            let is_known = self.spaces.contains_key(&pid);
            if !is_known && is_borrower(pid, self.spaces.keys()) {
                continue;
            }
            let files = OpenFiles::of(pid);
            files.in_memory.iter().for_each(|fd| self.shared.meet_open(pid, *fd, false));
            if !is_known && files.has_direct_io {
                self.doubt_all_of(pid, false);
                continue;
            }
            match self.take_space(pid) {
                Ok(pages) => taken.push(pages),
                // Short-lived, or in the kernel for long: untracked now, and CRIU's to save if it is there at the freeze.
                Err(TrackError::Inject(error)) => {
                    tracing::debug!(pid, %error, "a task is not tracked in this round");
                    self.doubt_all_of(pid, false);
                }
                Err(TrackError::Look { source, .. }) if is_gone(&source) => {}
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

    fn put_back(&mut self, pages: Vec<SpacePages>) {
        self.owed.extend(pages);
    }

    fn look_frozen(&mut self, tasks: &[i32]) -> Result<Looked, TrackError> {
        let device = self.shared.device().clone();
        let (shared, spaces) = (&mut self.shared, &self.spaces);
        // Where shared memory has content, which takes 7 ms a gigabyte, and what tasks map: nothing of both needs the other.
        let (begun, views) = std::thread::scope(|scope| {
            let begun = scope.spawn(|| shared.begin(true));
            let views = of_each(tasks, |pid| View::of(*pid, spaces.get(pid), &device).map_err(|source| (*pid, source)));
            (begun.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), views)
        });
        begun.map_err(TrackError::Shared)?;
        let views = views.map_err(|(pid, source)| TrackError::Look { pid, source })?;
        let owed = std::mem::take(&mut self.owed);
        let owed_of = |space: u32| owed.iter().filter(move |owed| owed.space == space);
        let mut looks = Vec::new();
        for (&pid, View { files, seen }) in tasks.iter().zip(views) {
            files.in_memory.iter().for_each(|fd| self.shared.meet_open(pid, *fd, true));
            let (Some(space), Some(seen)) = (self.spaces.get_mut(&pid), seen) else {
                // Also of one that borrows its parent's address space: what the parent has is found there.
                self.doubt_all_of(pid, true);
                continue;
            };
            looks.push(begin_look(space, pid, seen, &mut self.shared));
        }
        let looks: Vec<_> =
            looks.into_iter().filter_map(|look| self.spaces.get(&look.pid).map(|space| (look, space))).collect();
        let mut all = Vec::new();
        for ((look, _), Found { mut frozen, shared }) in looks.iter().zip(look_at_all(&looks)?) {
            for ((area, _), written) in look.shared.iter().zip(shared) {
                match written {
                    Some(written) => written.into_iter().for_each(|range| self.shared.note(area, range)),
                    None => self.shared.doubt(area.inode),
                }
            }
            // What is owed and has no content any more is owed no more.
            for owed in owed_of(frozen.space) {
                frozen.written.extend(intersection(&owed.ranges, &frozen.later));
                frozen.written.extend(intersection(&owed.ranges, &frozen.at_once));
                frozen.written = union(std::mem::take(&mut frozen.written));
            }
            all.push(frozen);
        }
        let marks: Vec<_> = self.spaces.values().map(|space| (space.number, space.marks.as_slice())).collect();
        add_inherited(&mut all, &marks);
        // Known and not here: it has ended.
        for space in self.spaces.iter().filter(|(pid, _)| !tasks.contains(pid)).map(|(_, space)| space) {
            lose(&mut self.shared, space);
        }
        let mut objects = self.shared.finish_frozen();
        for object in &mut objects {
            let ranges = owed_of(object.written.space).flat_map(|owed| owed.ranges.iter().cloned());
            let ranges = std::mem::take(&mut object.written.ranges).into_iter().chain(ranges).collect();
            object.written.ranges = union(ranges);
        }
        Ok(Looked { tasks: all, objects })
    }

    fn longest_stop(&self) -> Duration {
        self.longest_stop
    }
}

pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
