//! What a frozen container's tasks have, and have written since the last round.

use std::fs::File;
use std::io;

use longhaul_common::sys::memory::{PrivatePages, Scan, SharedPages, scan_frozen, scan_shared, tells_guards};
use nix::libc;

use super::super::flags::{self, Mark, marks};
use super::super::maps::{Area, Areas, Device, OpenFiles, Private, Shared, difference, status_bytes, union};
use super::super::several::of_each;
use super::super::shared::SharedMemory;
use super::{Access, Frozen, Space, TrackError, backing, look, lose};

/// A frozen task, while it is looked at.
pub(super) struct Look {
    pub(super) pid: i32,
    pagemap: File,
    /// What it maps alone.
    private: Vec<Private>,
    /// What it shares and may have written, with where that has content.
    pub(super) shared: Vec<(Shared, Vec<Area>)>,
    /// What it maps beside these.
    others: Vec<Area>,
}

/// What was found in a task.
pub(super) struct Found {
    pub(super) frozen: Frozen,
    /// What it wrote of each area that it shares; nothing, where that can't be found out.
    pub(super) shared: Vec<Option<Vec<Area>>>,
}

/// What a task has open and maps.
pub(super) struct View {
    pub(super) files: OpenFiles,
    /// Of one that is followed, and may be.
    pub(super) seen: Option<Seen>,
}

/// What a task maps.
pub(super) struct Seen {
    pagemap: File,
    areas: Areas,
    /// Those that are special, if that had to be looked at again.
    marks: Option<Vec<(Area, Mark)>>,
}

impl View {
    /// Sees what a task has now; `device` is that of shared memory.
    pub(super) fn of(pid: i32, space: Option<&Space>, device: &Device) -> io::Result<Self> {
        let files = OpenFiles::of(pid);
        let Some(space) = space.filter(|_| !files.has_direct_io) else { return Ok(Self { files, seen: None }) };
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        // What is locked changes without a trace in the areas themselves.
        let has_special = || space.marks.iter().any(|(_, mark)| *mark == Mark::AtOnce);
        let looks_again = flags::are_cheap() || status_bytes(pid, "VmLck") > 0 || has_special();
        let marks = looks_again.then(|| marks(pid)).transpose()?;
        Ok(Self { files, seen: Some(Seen { pagemap, areas: Areas::of(pid, device)?, marks }) })
    }
}

/// Brings together what a task maps and what is known of it.
pub(super) fn begin_look(space: &mut Space, pid: i32, seen: Seen, memory: &mut SharedMemory) -> Look {
    let Seen { pagemap, areas, marks } = seen;
    if let Some(marks) = marks {
        space.marks = marks;
    }
    let (mut shared, mut others) = (Vec::new(), areas.others);
    for area in areas.shared {
        if let Some(content) = memory.meet(pid, &area, true) {
            match space.shared.remove(&area) {
                Some(Access::Write) => {
                    shared.push((area, content));
                    continue;
                }
                Some(Access::Read) => {}
                // New since the last round, or gone and come again: nothing is known of it.
                None => memory.doubt(area.inode),
            }
        }
        others.push(area.start..area.end);
    }
    lose(memory, space);
    Look { pid, pagemap, private: areas.private, shared, others }
}

/// Looks at several tasks at a time: each of many may map all of the memory that they share, and nothing else has to be done yet.
pub(super) fn look_at_all(looks: &[(Look, &Space)]) -> Result<Vec<Found>, TrackError> {
    of_each(looks, |(look, space)| look.at(space).map_err(|source| TrackError::Look { pid: look.pid, source }))
}

/// Ranges that are close together become one: to ask for each would take longer than to look at what is between.
fn coarse(ranges: Vec<Area>) -> Vec<Area> {
    const CLOSE: u64 = 1 << 20;
    let mut all: Vec<Area> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start - last.end < CLOSE => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

impl Look {
    fn at(&self, space: &Space) -> io::Result<Found> {
        let mappings = self.shared.iter().map(|(area, _)| area.clone()).collect();
        let mut frozen = Frozen { pid: self.pid, space: space.number, shared: mappings, ..Frozen::default() };
        let mut guards = self.others.clone();
        let mut shared = Vec::new();
        for (mapping, content) in &self.shared {
            let whole = mapping.start..mapping.end;
            let mut has_guard = false;
            let written = self.written_in(content, &mut has_guard)?;
            if has_guard || written.is_none() {
                guards.push(whole);
            } else {
                guards.extend(difference(&[whole], content));
            }
            shared.push(written);
        }
        for private in &self.private {
            let at_once = private.is_file || space.mark(&private.area).is_some();
            let content = if at_once { &mut frozen.at_once } else { &mut frozen.later };
            let before = (frozen.written.len(), content.len());
            let Area { start, end } = private.area;
            let mut has_guard = false;
            let found = scan_frozen(&self.pagemap, (start, end), backing(private), |start, end, pages| {
                match pages {
                    PrivatePages::Guard => {
                        has_guard = true;
                        return;
                    }
                    PrivatePages::Written => frozen.written.push(start..end),
                    PrivatePages::Unwritten => {}
                }
                match content.last_mut() {
                    Some(last) if last.end == start && last.start >= private.area.start => last.end = end,
                    _ => content.push(start..end),
                }
            });
            if has_guard || found.is_err() {
                guards.push(private.area.clone());
            }
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
                look(&self.pagemap, private, Scan::Swapped, &mut frozen.written)?;
            }
            frozen.followed.push(private.area.clone());
        }
        frozen.guards = tells_guards().then(|| coarse(union(guards)));
        Ok(Found { frozen, shared })
    }

    /// What was written through a mapping of what has this content; nothing, if that can't be found out.
    fn written_in(&self, content: &[Area], has_guard: &mut bool) -> io::Result<Option<Vec<Area>>> {
        let mut written = Vec::new();
        for part in content {
            let scanned = scan_shared(&self.pagemap, (part.start, part.end), false, |start, end, pages| match pages {
                SharedPages::Written | SharedPages::Unknown => written.push(start..end),
                SharedPages::Guard => *has_guard = true,
            });
            match scanned {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(written))
    }
}
