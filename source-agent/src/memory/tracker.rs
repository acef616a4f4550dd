//! Which pages a running container has written: without stopping it.
//!
//! Every address space gets a userfaultfd of its own in the kernel's asynchronous write-protect mode (Linux 6.7). A round
//! is one `PAGEMAP_SCAN` of each area, which reports what was written and protects it again in one step; the first write to
//! a protected page costs the task about 1 µs. Areas are read anew in every round: one that is not registered yet, because
//! it is new, moved, or of a task that forked or executed another program, counts as written from end to end.
//!
//! Followed are private areas: anonymous memory, and what tasks wrote into private mappings of files.
//!
//! When the tracker is dropped, so are its descriptors, and with them the kernel forgets: nothing stays in the container.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use longhaul_common::sys::memory::{
    Backing, Scan, begin_write_tracking, register_write_tracking, scan, scan_content_and_written,
};
use longhaul_common::sys::share_memory;
use longhaul_common::tasks::inner_pid;
use nix::libc;
use thiserror::Error;

use super::inject::{InjectError, userfaultfd_of};
use super::maps::{Area, Mark, Private, has_direct_io, intersection, marks, private, status_bytes};

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
    /// A task would not.
    #[error(transparent)]
    Inject(#[from] InjectError),
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

/// The pages of one address space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpacePages {
    /// The task, as this host numbers it.
    pub pid: i32,
    /// The task, as the container numbers it.
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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Address spaces that were there in the last round and are no more, as the container numbers their tasks. A number may
    /// be that of another one now.
    pub ended: Vec<u32>,
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
}

/// Finds out what was written. A round is a transaction: what [`take`](Self::take) reported and was not sent is given
/// back by [`put_back`](Self::put_back), and reported again.
pub trait Tracker: Send {
    /// The name of the mechanism, for the report.
    fn name(&self) -> &'static str;
    /// What was written since the last call; in the first, all there is.
    fn take(&mut self, tasks: &[i32]) -> Result<Taken, TrackError>;
    /// Gives back what was taken.
    fn put_back(&mut self, pages: Vec<SpacePages>);
    /// What was written since the last call, and what there is, once all tasks are frozen.
    fn look_frozen(&mut self, tasks: &[i32]) -> Result<Vec<Frozen>, TrackError>;
    /// The longest that tracking has stopped a thread of the container.
    fn longest_stop(&self) -> Duration;
}

/// The tracker by asynchronous write protection.
pub struct WriteProtect {
    /// The container's first task.
    init: i32,
    spaces: BTreeMap<i32, Space>,
    owed: Vec<SpacePages>,
    ended: Vec<u32>,
    longest_stop: Duration,
}

struct Space {
    uffd: OwnedFd,
    number: u32,
    /// Areas that are special.
    marks: Vec<(Area, Mark)>,
}

impl Space {
    /// The kernel joins neighbours, and cuts areas: a part that is special makes all of it so.
    fn mark(&self, area: &Area) -> Option<Mark> {
        let is_part = |marked: &Area| marked.start < area.end && area.start < marked.end;
        self.marks.iter().find(|(marked, _)| is_part(marked)).map(|(_, mark)| *mark)
    }
}

fn backing(private: &Private) -> Backing {
    if private.is_file { Backing::File } else { Backing::Zeroes }
}

impl WriteProtect {
    /// For the container whose first task is `init`.
    pub fn new(init: i32) -> Self {
        Self { init, spaces: BTreeMap::new(), owed: Vec::new(), ended: Vec::new(), longest_stop: Duration::ZERO }
    }

    fn arm(&mut self, pid: i32) -> Result<Space, TrackError> {
        let (uffd, stopped) = userfaultfd_of(pid)?;
        self.longest_stop = self.longest_stop.max(stopped);
        begin_write_tracking(uffd.as_fd()).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => TrackError::Unsupported,
            _ => TrackError::Look { pid, source: error },
        })?;
        let number = inner_pid(pid, self.init).ok_or(InjectError::Gone(pid))?;
        Ok(Space { uffd, number, marks: Vec::new() })
    }

    /// CRIU maps a locked area as such, which fills it with zeroes, before it forks the task's children (`premap_private_vma` in
    /// criu/mem.c, 4.2). A child that has the same area, not locked, gets these zeroes in it.
    fn find_inherited(&self, all: &mut [Frozen]) {
        for frozen in all {
            let others = self.spaces.values().filter(|space| space.number != frozen.space);
            let mut locked: Vec<Area> =
                others.flat_map(|space| space.marks.iter().map(|(area, _)| area.clone())).collect();
            locked.sort_unstable_by_key(|area| area.start);
            for area in locked {
                frozen.at_once.extend(intersection(&[area], &frozen.later));
            }
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
    fn is_borrower(&self, pid: i32) -> bool {
        let shares = |other: i32| other != pid && share_memory(pid, other).unwrap_or(false);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
        parent.is_some_and(shares) || self.spaces.keys().any(|other| shares(*other))
    }

    fn take_space(&mut self, pid: i32) -> Result<SpacePages, TrackError> {
        let mut space = match self.spaces.remove(&pid) {
            Some(space) => space,
            None => self.arm(pid)?,
        };
        let mut ranges = Vec::new();
        let first = follow(&mut space, pid, &mut ranges);
        if let Err(Followed::OtherSpace) = first {
            // The task executed another program, or its number is another task's now.
            self.ended.push(space.number);
            self.owed.retain(|owed| owed.pid != pid);
            space = self.arm(pid)?;
            ranges.clear();
            follow(&mut space, pid, &mut ranges).map_err(|error| error.of(pid))?;
        } else {
            first.map_err(|error| error.of(pid))?;
        }
        let number = space.number;
        self.spaces.insert(pid, space);
        Ok(SpacePages { pid, space: number, ranges })
    }
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
fn follow(space: &mut Space, pid: i32, ranges: &mut Vec<Area>) -> Result<(), Followed> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(Followed::Failed)?;
    let mut looked = false;
    for private in private(pid).map_err(Followed::Failed)? {
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
        match register_write_tracking(space.uffd.as_fd(), area.start, area.end) {
            Ok(()) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::EBUSY) => return Err(Followed::Busy),
                // Changed since the list was read: the next round will find what it is now.
                Some(libc::EINVAL) => {}
                _ => return Err(Followed::OtherSpace),
            },
        }
        // Protected first and read then: what is written in between counts as written in the next round, too. All content
        // counts, also where the scan above had taken a part of it before it failed.
        let _ = take_written(&pagemap, &private, &mut Vec::new());
        look(&pagemap, &private, Scan::Content, ranges).map_err(Followed::Failed)?;
    }
    Ok(())
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

impl Tracker for WriteProtect {
    fn name(&self) -> &'static str {
        "userfaultfd-wp"
    }

    fn take(&mut self, tasks: &[i32]) -> Result<Taken, TrackError> {
        self.spaces.retain(|pid, space| {
            let lives = tasks.contains(pid);
            self.ended.extend((!lives).then_some(space.number));
            lives
        });
        self.owed.retain(|owed| tasks.contains(&owed.pid));
        let mut taken = Vec::new();
        for &pid in tasks {
            if !self.spaces.contains_key(&pid) && (self.is_borrower(pid) || has_direct_io(pid)) {
                continue;
            }
            match self.take_space(pid) {
                Ok(pages) => taken.push(pages),
                // Short-lived, or in the kernel for long: untracked now, and CRIU's to save if it is there at the freeze.
                Err(TrackError::Inject(error)) => tracing::debug!(pid, %error, "a task is not tracked in this round"),
                Err(TrackError::Look { source, .. }) if is_gone(&source) => {}
                Err(error) => {
                    self.owed.extend(taken);
                    return Err(error);
                }
            }
        }
        taken.append(&mut self.owed);
        Ok(Taken { ended: std::mem::take(&mut self.ended), pages: taken })
    }

    fn put_back(&mut self, pages: Vec<SpacePages>) {
        self.owed.extend(pages);
    }

    fn look_frozen(&mut self, tasks: &[i32]) -> Result<Vec<Frozen>, TrackError> {
        let owed = std::mem::take(&mut self.owed);
        let mut all = Vec::new();
        for &pid in tasks {
            let Some(space) = self.spaces.get_mut(&pid).filter(|_| !has_direct_io(pid)) else { continue };
            let mut frozen = look_at(space, pid).map_err(|source| TrackError::Look { pid, source })?;
            // What is owed and has no content any more is owed no more.
            for owed in owed.iter().filter(|owed| owed.space == space.number) {
                frozen.written.extend(intersection(&owed.ranges, &frozen.later));
                frozen.written.extend(intersection(&owed.ranges, &frozen.at_once));
            }
            all.push(frozen);
        }
        self.find_inherited(&mut all);
        Ok(all)
    }

    fn longest_stop(&self) -> Duration {
        self.longest_stop
    }
}

fn look_at(space: &mut Space, pid: i32) -> io::Result<Frozen> {
    let mut frozen = Frozen { pid, space: space.number, ..Frozen::default() };
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    // What is locked changes without a trace in the areas themselves.
    if status_bytes(pid, "VmLck") > 0 || space.marks.iter().any(|(_, mark)| *mark == Mark::AtOnce) {
        space.marks = marks(pid)?;
    }
    for private in private(pid)? {
        let at_once = private.is_file || space.mark(&private.area).is_some();
        let content = if at_once { &mut frozen.at_once } else { &mut frozen.later };
        let before = (frozen.written.len(), content.len());
        let Area { start, end } = private.area;
        let found = scan_content_and_written(&pagemap, (start, end), backing(&private), |start, end, is_written| {
            if is_written {
                frozen.written.push(start..end);
            }
            match content.last_mut() {
                Some(last) if last.end == start && last.start >= private.area.start => last.end = end,
                _ => content.push(start..end),
            }
        });
        match found {
            Ok(()) => {}
            // New since the last round: CRIU's.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                frozen.written.truncate(before.0);
                content.truncate(before.1);
                continue;
            }
            Err(error) => return Err(error),
        }
        if private.is_file {
            look(&pagemap, &private, Scan::Swapped, &mut frozen.written)?;
        }
        frozen.followed.push(private.area);
    }
    Ok(frozen)
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
