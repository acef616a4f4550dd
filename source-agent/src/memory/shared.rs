//! Memory that tasks share and that is no file of a filesystem anybody mounted: anonymous shared mappings, System V segments,
//! and files in memory. CRIU saves it whole, while the container is frozen; here it travels in the rounds, like private memory.
//!
//! Each piece is an [`object`](pages::Object), an address space of its own, however many tasks map it. What was written since the last round is the
//! union of what the tracker finds in all of its mappings. That is all of it, unless
//!
//! - a mapping has come or gone since, or is of a task that can't be followed: what was written through it may stand in no page
//!   table;
//! - pages were made holes; or
//! - its times have changed, and a task has it open, and may have used write(2). Stores through mappings change them as well.
//!
//! Then the object is *in doubt*: all of its pages are read, and compared with what was sent (`sent.rs`). The same goes, while the
//! container is frozen, for all objects of a host that can't be [watched](super::watch).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use longhaul_common::pages::{self, MemoryFile, OBJECTS, ObjectKind, Segment};
use longhaul_common::sys::ipc::mode_of_segment;
use longhaul_common::sys::memory::PAGE;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Whence, lseek64};

use super::maps::{Area, Device, MEMFD, SEGMENT, Shared, difference, intersection, union};
use super::tracker::{Origin, SpacePages};
use super::watch::Watch;

/// A change that is younger may be followed by another that leaves the same time: the kernel's clock for files ticks every 1 to
/// 10 ms.
const TICK: Duration = Duration::from_millis(50);

/// What the kernel calls an anonymous shared mapping. CRIU makes a file in memory of this name of it (`dump_one_memfd` in criu/memfd.c, 4.2).
const ANONYMOUS: &[u8] = b"/dev/zero";

/// An object of a frozen container.
#[derive(Debug, Clone)]
pub struct FrozenObject {
    /// The filesystem it is on (`st_dev`).
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Its pages that were, or may have been, written since the last round.
    pub written: SpacePages,
    /// Those that have content, in order.
    pub content: Vec<Area>,
}

/// See the module.
pub struct SharedMemory {
    device: Device,
    watch: Option<Watch>,
    objects: BTreeMap<u64, Object>,
    /// Inodes that two objects have: CRIU can't tell them apart either (`shmem_find` in criu/shmem.c, 4.2).
    ambiguous: BTreeSet<u64>,
    /// Address spaces given out.
    spaces: u32,
    ended: Vec<u32>,
    /// A round was begun and did not get to its end: nobody knows what it took.
    is_open: bool,
}

struct Object {
    about: pages::Object,
    space: u32,
    file: Arc<File>,
    seen: Stamp,
    /// Where it has content, as far as [`seen`](Self::seen) says.
    content: Vec<Area>,
    /// What was counted of it.
    count: u64,
    /// It was made as a file, or a task had it open at some time: then one may have it again, out of a message.
    is_file: bool,
    /// The destination knows its size.
    is_told: bool,
    // Of this round.
    in_use: bool,
    in_doubt: bool,
    times_changed: bool,
    written: Vec<Area>,
}

/// What changes when the object does, but for stores through mappings.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    blocks: u64,
    changed: (i64, i64),
    /// It may change once more without a trace.
    is_fresh: bool,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let about = file.metadata()?;
        let changed = (about.ctime(), about.ctime_nsec());
        let since_epoch = Duration::new(changed.0.unsigned_abs(), changed.1.unsigned_abs() as u32);
        let age = SystemTime::now().duration_since(UNIX_EPOCH + since_epoch);
        Ok(Self { size: about.len(), blocks: about.blocks(), changed, is_fresh: age.is_ok_and(|age| age < TICK) })
    }
}

impl SharedMemory {
    /// Nothing is known yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            device: Device::of_this_host()?,
            watch: Watch::begin(),
            objects: BTreeMap::new(),
            ambiguous: BTreeSet::new(),
            spaces: 0,
            ended: Vec::new(),
            is_open: false,
        })
    }

    /// Where shared memory is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether all of it is compared while the container is frozen.
    pub fn is_compared(&self) -> bool {
        self.watch.is_none()
    }

    /// A round begins: what is looked at from now on, what changes after this will be seen by the next one.
    pub fn begin(&mut self, is_frozen: bool) -> io::Result<()> {
        let unsure = std::mem::replace(&mut self.is_open, true) || is_frozen && self.watch.is_none();
        // A page that is made a hole while it is in swap is not counted.
        let is_blind = self.watch.is_none() || is_swap_used();
        for object in self.objects.values_mut() {
            let count = self.watch.as_ref().map_or(0, |watch| watch.count(object.about.inode));
            let stamp = Stamp::of(&object.file)?;
            object.in_use = false;
            object.times_changed = object.seen.is_fresh || stamp.changed != object.seen.changed;
            object.in_doubt |=
                unsure || is_blind && object.times_changed || std::mem::replace(&mut object.count, count) != count;
            if object.in_doubt
                || object.is_file && object.times_changed
                || (stamp.size, stamp.blocks) != (object.seen.size, object.seen.blocks)
            {
                let content = content_of(&object.file)?;
                // What has come was written; what has gone is zeroes now, and the destination must hear of it.
                object.written.extend(difference(&content, &object.content));
                object.written.extend(difference(&object.content, &content));
                object.content = content;
            }
            if stamp.size != object.about.size {
                object.about.size = stamp.size;
                object.is_told = false;
            }
            object.seen = stamp;
        }
        Ok(())
    }

    /// A task maps this. Where in the area the object has content, by the task's addresses; nothing, if it is not followed.
    pub fn meet(&mut self, pid: i32, area: &Shared, is_frozen: bool) -> Option<Vec<Area>> {
        if !self.objects.contains_key(&area.inode) && !is_frozen {
            let path = format!("/proc/{pid}/map_files/{:x}-{:x}", area.start, area.end);
            self.meet_new(pid, &path, area.inode);
        }
        let object = self.objects.get_mut(&area.inode)?;
        if object.is_segment() != area.is_segment {
            self.ended.push(object.space);
            self.objects.remove(&area.inode);
            self.ambiguous.insert(area.inode);
            return None;
        }
        object.in_use = true;
        let here = area.offset..area.offset + (area.end - area.start);
        let content = intersection(std::slice::from_ref(&here), &object.content);
        Some(
            content
                .iter()
                .map(|part| part.start - area.offset + area.start..part.end - area.offset + area.start)
                .collect(),
        )
    }

    /// A task has this open.
    pub fn meet_open(&mut self, pid: i32, fd: i32, is_frozen: bool) {
        let path = format!("/proc/{pid}/fd/{fd}");
        // Followed and not opened: stat(2) is enough for what is known.
        let Ok(inode) = std::fs::metadata(&path).map(|about| about.ino()) else { return };
        if !self.objects.contains_key(&inode) && !is_frozen {
            self.meet_new(pid, &path, inode);
        }
        if let Some(object) = self.objects.get_mut(&inode) {
            object.in_use = true;
            object.is_file = true;
        }
    }

    fn meet_new(&mut self, pid: i32, path: &str, inode: u64) {
        if self.ambiguous.contains(&inode) {
            return;
        }
        match self.describe(pid, path) {
            Ok(Some(object)) if object.about.inode == inode => drop(self.objects.insert(inode, object)),
            // Another by now, or of a kind that stays CRIU's.
            Ok(_) => {}
            Err(error) => tracing::debug!(pid, path, %error, "shared memory is not followed"),
        }
    }

    /// What was written through a mapping, by the task's addresses.
    pub fn note(&mut self, area: &Shared, written: Area) {
        if let Some(object) = self.objects.get_mut(&area.inode) {
            object.written.push(written.start - area.start + area.offset..written.end - area.start + area.offset);
        }
    }

    /// Whether a mapping is of an object that was met before.
    pub fn knows(&self, area: &Shared) -> bool {
        self.objects.contains_key(&area.inode)
    }

    /// Something may have been written that nobody sees.
    pub fn doubt(&mut self, inode: u64) {
        if let Some(object) = self.objects.get_mut(&inode) {
            object.in_doubt = true;
        }
    }

    /// The round is through: what the destination must be told of objects, what was written to them, and those that have ended.
    pub fn finish(&mut self) -> (Vec<(u32, pages::Object)>, Vec<SpacePages>, Vec<u32>) {
        self.is_open = false;
        self.objects.retain(|_, object| {
            self.ended.extend((!object.in_use).then_some(object.space));
            object.in_use
        });
        let untold = self.objects.values_mut().filter(|object| !object.is_told);
        let told = untold.map(|object| {
            object.is_told = true;
            (object.space, object.about.clone())
        });
        let told = told.collect();
        let pages = self.objects.values_mut().map(Object::take).filter(|pages| !pages.ranges.is_empty()).collect();
        (told, pages, std::mem::take(&mut self.ended))
    }

    /// The last round is through.
    pub fn finish_frozen(&mut self) -> Vec<FrozenObject> {
        self.is_open = false;
        let in_use = self.objects.values_mut().filter(|object| object.in_use);
        let frozen = in_use.filter_map(|object| {
            let device = object.file.metadata().ok()?.dev();
            Some(FrozenObject {
                device,
                inode: object.about.inode,
                written: object.take(),
                content: object.content.clone(),
            })
        });
        frozen.collect()
    }

    /// Whether an address space is that of an object that is still there.
    pub fn has(&self, space: u32) -> bool {
        self.objects.values().any(|object| object.space == space)
    }

    /// The object at a path. Nothing, if it can't be followed.
    fn describe(&mut self, pid: i32, path: &str) -> io::Result<Option<Object>> {
        // Before the file is looked at: what comes later is noticed.
        let file = File::open(path)?;
        let (link, inode) = (std::fs::read_link(path)?, file.metadata()?.ino());
        let Some(kind) = kind_of(pid, link.as_os_str().as_bytes(), &file, inode)? else { return Ok(None) };
        let count = self.watch.as_ref().map_or(0, |watch| watch.count(inode));
        let seen = Stamp::of(&file)?;
        self.spaces += 1;
        Ok(Some(Object {
            space: OBJECTS | self.spaces,
            content: content_of(&file)?,
            file: Arc::new(file),
            seen,
            count,
            is_file: matches!(&kind, ObjectKind::File(file) if file.name != ANONYMOUS),
            about: pages::Object { inode, size: seen.size, kind: Some(kind) },
            is_told: false,
            in_use: true,
            in_doubt: true,
            times_changed: false,
            written: Vec::new(),
        }))
    }
}

impl Object {
    fn is_segment(&self) -> bool {
        matches!(self.about.kind, Some(ObjectKind::Segment(_)))
    }

    /// What has to be sent of it.
    fn take(&mut self) -> SpacePages {
        let mut ranges = std::mem::take(&mut self.written);
        if std::mem::take(&mut self.in_doubt) || self.is_file && self.times_changed {
            ranges.extend(self.content.iter().cloned());
        }
        SpacePages { origin: Origin::Object(self.file.clone()), space: self.space, ranges: union(ranges) }
    }
}

/// Whether any page of this host is in swap.
fn is_swap_used() -> bool {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok())
    };
    kib("SwapTotal:") != kib("SwapFree:")
}

/// What a file of the kernel's own memory filesystem is, by the name it has there. Others than these are graphics drivers'.
fn kind_of(pid: i32, name: &[u8], file: &File, inode: u64) -> io::Result<Option<ObjectKind>> {
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    if let Some(name) = name.strip_prefix(MEMFD) {
        // CRIU makes it so (`memfd_open_inode_nocache` in criu/memfd.c, 4.2).
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain)?;
        let may_be_sealed = seals != SealFlag::F_SEAL_SEAL;
        return Ok(Some(ObjectKind::File(MemoryFile { name: name.to_vec(), may_be_sealed })));
    }
    if name == ANONYMOUS {
        return Ok(Some(ObjectKind::File(MemoryFile { name: name.to_vec(), may_be_sealed: false })));
    }
    let key = name.strip_prefix(SEGMENT.as_bytes()).and_then(|key| std::str::from_utf8(key).ok());
    let Some(key) = key.and_then(|key| u32::from_str_radix(key, 16).ok()) else { return Ok(None) };
    let Ok(id) = i32::try_from(inode) else { return Ok(None) };
    let namespace = format!("/proc/{pid}/ns/ipc");
    // One that is shared with the host, or with others, is not the container's to move.
    if std::fs::read_link(&namespace)? == std::fs::read_link("/proc/self/ns/ipc")? {
        return Ok(None);
    }
    let namespace = File::open(namespace)?;
    let asked = std::thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWIPC)?;
        mode_of_segment(id)
    });
    let mode = asked.join().map_err(|_| io::Error::other("a thread ended unexpectedly"))??;
    Ok(Some(ObjectKind::Segment(Segment { id, key: key.cast_signed(), mode })))
}

/// Where a file has content.
fn content_of(file: &File) -> io::Result<Vec<Area>> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        let start = match lseek64(file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(found),
            Err(errno) => return Err(errno.into()),
        };
        at = lseek64(file, start, Whence::SeekHole)?;
        found.push(start.unsigned_abs() / PAGE * PAGE..at.unsigned_abs().next_multiple_of(PAGE));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn settle() {
        std::thread::sleep(TICK + Duration::from_millis(10));
    }

    /// A round, in which this process's own file is met by its descriptor.
    fn round(memory: &mut SharedMemory, file: &File) -> Vec<Area> {
        memory.begin(false).expect("looks");
        memory.meet_open(std::process::id().cast_signed(), file.as_raw_fd(), false);
        memory.finish().1.into_iter().flat_map(|pages| pages.ranges).collect()
    }

    #[test]
    fn a_file_is_read_again_once_it_was_written() {
        let file = File::from(memfd_create(c"a name", MFdFlags::empty()).expect("is made"));
        file.set_len(64 * PAGE).expect("grows");
        file.write_all_at(&[1; 3 * PAGE as usize], 8 * PAGE).expect("is written");
        settle();
        let mut memory = SharedMemory::new().expect("looks");
        assert_eq!(round(&mut memory, &file), [8 * PAGE..11 * PAGE]);
        // Other tests map files, and may share a counter with this one.
        let mut quiet = false;
        for _ in 0..20 {
            quiet |= round(&mut memory, &file).is_empty();
        }
        assert!(quiet);
        file.write_all_at(&[2; 10], 20 * PAGE).expect("is written");
        assert_eq!(round(&mut memory, &file), [8 * PAGE..11 * PAGE, 20 * PAGE..21 * PAGE]);
        settle();
        round(&mut memory, &file);
        file.set_len(9 * PAGE).expect("is cut");
        assert_eq!(round(&mut memory, &file), [8 * PAGE..11 * PAGE, 20 * PAGE..21 * PAGE], "what is gone is told");
        memory.begin(false).expect("looks");
        let (told, pages, ended) = memory.finish();
        assert!(told.is_empty() && pages.is_empty() && ended == [OBJECTS | 1], "nobody has it any more");
    }

    #[test]
    fn an_object_is_told_once_for_each_size() {
        let file = File::from(memfd_create(c"x", MFdFlags::MFD_ALLOW_SEALING).expect("is made"));
        file.set_len(PAGE).expect("grows");
        let mut memory = SharedMemory::new().expect("looks");
        let told = |memory: &mut SharedMemory| {
            memory.begin(false).expect("looks");
            memory.meet_open(std::process::id().cast_signed(), file.as_raw_fd(), false);
            memory.finish().0
        };
        let first = told(&mut memory);
        let kind = ObjectKind::File(MemoryFile { name: b"x".to_vec(), may_be_sealed: true });
        assert_eq!((first.len(), first[0].1.size, first[0].1.kind.as_ref()), (1, PAGE, Some(&kind)));
        assert!(told(&mut memory).is_empty());
        file.set_len(5 * PAGE).expect("grows");
        assert_eq!(told(&mut memory)[0].1.size, 5 * PAGE);
    }
}
