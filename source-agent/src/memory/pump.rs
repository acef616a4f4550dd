//! Reads pages out of the container and makes frames of them: what is zero or was sent before does not travel.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use longhaul_common::pages::{Buffers, Kind, MAX_PAGES, MAX_RECORDS, Object, Record, What};
use longhaul_common::sys::memory::PAGE;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use prost::Message;
use thiserror::Error;
use tokio::sync::mpsc;

use super::link::LinkPace;
use super::packing::Packing;
use super::sent::Sent;
use super::tracker::{Content, Origin, SpacePages};
use super::versions::Versions;

const PAGE_BYTES: usize = PAGE as usize;
/// Records of one frame that names owed pages: the destination enters 32,768 pages at once, which takes it a millisecond.
const OWED_RECORDS: usize = 128;

/// Pages that can't be read or sent.
#[derive(Debug, Error)]
pub enum PumpError {
    /// A frozen task's page can't be read.
    #[error("can't read page {address:#x} of task {pid}")]
    Read {
        /// The task.
        pid: i32,
        /// The page's address.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nor shared memory.
    #[error("can't read the memory that tasks share, at {offset:#x} of it")]
    ReadShared {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The link takes no more; it knows why itself.
    #[error("the page connection has ended")]
    Closed,
}

/// A frame before it has a number.
#[derive(Debug)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The address space.
    pub space: u32,
    /// Its records.
    pub records: Vec<Record>,
    /// The content of its pages, packed if `packed`.
    pub payload: Vec<u8>,
    /// Bytes of that content unpacked.
    pub raw: usize,
    /// Checksum of records and unpacked content.
    pub checksum: u64,
    /// Whether the payload is packed.
    pub packed: bool,
}

/// What one round sent.
#[derive(Debug, Clone, Default)]
pub struct Pumped {
    /// Pages looked at.
    pub pages: u64,
    /// Of those, zero.
    pub zero: u64,
    /// Of those, equal to others, or as they were sent last time.
    pub equal: u64,
    /// Of those, sent as what has changed since they were sent last.
    pub changed: u64,
    /// Bytes of content before packing.
    pub raw_bytes: u64,
    /// The same as it travelled.
    pub packed_bytes: u64,
    /// Pages of running tasks that could not be read now: they are still to be sent.
    pub skipped: Vec<SpacePages>,
}

impl Pumped {
    /// Both together.
    pub fn and(mut self, other: Self) -> Self {
        self.pages += other.pages;
        self.zero += other.zero;
        self.equal += other.equal;
        self.changed += other.changed;
        self.raw_bytes += other.raw_bytes;
        self.packed_bytes += other.packed_bytes;
        self.skipped.extend(other.skipped);
        self
    }
}

/// Whether tasks may change or end while they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tasks {
    /// They run: what can't be read now is found by the next round.
    Running,
    /// They are frozen: everything must be readable.
    Frozen,
}

/// See the module.
pub struct Pump {
    sent: Sent,
    /// Of objects, as they were told.
    sizes: HashMap<u32, u64>,
    versions: Versions,
    packing: Packing,
    buffers: Buffers,
    pace: LinkPace,
    stop: Stop,
}

/// Has a round end early: what it has not sent by then is still to be sent.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// No more.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Pump {
    /// For a link, which gives buffers back and says how fast it is.
    /// Of `streams` there are.
    pub fn new(buffers: Buffers, pace: LinkPace, may_pack: bool, streams: u32, stop: Stop) -> Self {
        let (sent, versions, packing) = (Sent::default(), Versions::new(streams), Packing::new(may_pack));
        Self { sent, sizes: HashMap::new(), versions, packing, buffers, pace, stop }
    }
}

/// Reads of one batch: where each page comes from.
struct Batch<'a> {
    space: &'a SpacePages,
    addresses: Vec<u64>,
}

impl Pump {
    /// Sends the pages of all address spaces. On failure nothing says which of them have arrived.
    pub fn send(
        &mut self,
        pages: &[SpacePages],
        tasks: Tasks,
        frames: &mpsc::Sender<Frame>,
    ) -> Result<Pumped, PumpError> {
        let mut pumped = Pumped::default();
        for space in pages {
            let mut batch = Batch { space, addresses: Vec::with_capacity(MAX_PAGES) };
            for range in &space.ranges {
                let mut address = range.start;
                while address < range.end {
                    if self.stop.is_set() && batch.addresses.is_empty() {
                        let rest = SpacePages { ranges: vec![address..range.end], ..space.clone() };
                        pumped.skipped.push(rest);
                        break;
                    }
                    batch.addresses.push(address);
                    address += PAGE;
                    if batch.addresses.len() == MAX_PAGES {
                        self.send_batch(&mut batch, tasks, frames, &mut pumped)?;
                    }
                }
            }
            if !batch.addresses.is_empty() {
                self.send_batch(&mut batch, tasks, frames, &mut pumped)?;
            }
        }
        Ok(pumped)
    }

    /// Names pages that the destination has to fetch later.
    pub fn owe(&mut self, pages: &[SpacePages], frames: &mpsc::Sender<Frame>) -> Result<(), PumpError> {
        for space in pages {
            let whole = space.ranges.iter().map(|range| range.start / PAGE..range.end / PAGE);
            let pieces = whole.flat_map(|pages| {
                let end = pages.end;
                pages.step_by(MAX_PAGES).map(move |page| (page, (end - page).min(MAX_PAGES as u64) as u32))
            });
            let records: Vec<Record> = pieces.map(|(page, count)| Record { page, count, what: What::Owed }).collect();
            for records in records.chunks(OWED_RECORDS) {
                self.give(frames, frame(Kind::Batch, space.space, records.to_vec()))?;
            }
        }
        Ok(())
    }

    /// Address spaces have ended.
    pub fn forget(&mut self, spaces: &[u32]) {
        for space in spaces {
            self.sent.forget(*space);
            self.versions.forget_space(*space);
        }
    }

    /// Tells the destination the same.
    pub fn tell_ended(&self, spaces: &[u32], frames: &mpsc::Sender<Frame>) -> Result<(), PumpError> {
        spaces.iter().try_for_each(|space| self.give(frames, frame(Kind::Forget, *space, Vec::new())))
    }

    /// Tells what shared memory is, or what size it has.
    pub fn declare(&mut self, objects: &[(u32, Object)], frames: &mpsc::Sender<Frame>) -> Result<(), PumpError> {
        for (space, object) in objects {
            // What lay behind an end that has moved is zero there, and may be so here or not.
            let before = self.sizes.insert(*space, object.size).unwrap_or(object.size);
            if before != object.size {
                let first = before.min(object.size) / PAGE;
                self.sent.forget_from(*space, first);
                self.versions.forget_from(*space, first);
            }
            let payload = object.encode_to_vec();
            let frame = Frame {
                checksum: longhaul_common::pages::checksum(&[], &payload),
                raw: payload.len(),
                payload,
                ..frame(Kind::Object, *space, Vec::new())
            };
            self.give(frames, frame)?;
        }
        Ok(())
    }

    /// Tells which pages count in the end, and that this is the end.
    pub fn finish(&self, content: &[Content], streams: u32, frames: &mpsc::Sender<Frame>) -> Result<(), PumpError> {
        for Content { space, what, ranges } in content {
            let records: Vec<Record> = ranges
                .iter()
                .flat_map(|range| {
                    // A count has 32 bits.
                    let (first, end) = (range.start / PAGE, range.end / PAGE);
                    (first..end).step_by(1 << 30).map(move |page| (page, (end - page).min(1 << 30) as u32))
                })
                .map(|(page, count)| Record { page, count, what: *what })
                .collect();
            for records in records.chunks(MAX_RECORDS) {
                self.give(frames, frame(Kind::Content, *space, records.to_vec()))?;
            }
        }
        self.give(frames, frame(Kind::End, streams, Vec::new()))
    }

    /// Gives a frame to the link.
    fn give(&self, frames: &mpsc::Sender<Frame>, frame: Frame) -> Result<(), PumpError> {
        frames.blocking_send(frame).map_err(|_| PumpError::Closed)
    }

    fn send_batch(
        &mut self,
        batch: &mut Batch<'_>,
        tasks: Tasks,
        frames: &mpsc::Sender<Frame>,
        pumped: &mut Pumped,
    ) -> Result<(), PumpError> {
        let mut buffer = self.buffers.take(batch.addresses.len() * PAGE_BYTES);
        let skipped = match &batch.space.origin {
            Origin::Task(pid) => read(*pid, &mut batch.addresses, &mut buffer, tasks)?,
            Origin::Object(file) => read_object(file, &batch.addresses, &mut buffer).map(|()| Vec::new())?,
        };
        if !skipped.is_empty() {
            let ranges = skipped.into_iter().map(|address| address..address + PAGE).collect();
            pumped.skipped.push(SpacePages { ranges, ..batch.space.clone() });
        }
        let mut records: Vec<Record> = Vec::new();
        let (mut kept, mut differences) = (0, 0);
        let remembers = self.packing.is_link_bound();
        if !remembers && !self.versions.is_empty() {
            self.versions.clear();
        }
        for (index, address) in batch.addresses.drain(..).enumerate() {
            pumped.pages += 1;
            let bytes = index * PAGE_BYTES..(index + 1) * PAGE_BYTES;
            let place = (batch.space.space, address / PAGE);
            let mut what = self.sent.look(place, &buffer[bytes.clone()]);
            match what {
                Some(What::Data) if remembers && self.versions.difference(place, &mut buffer[bytes.clone()]) => {
                    what = Some(What::Changed);
                    differences += 1;
                }
                Some(What::Data) | None => {}
                Some(_) => self.versions.forget(place),
            }
            match what {
                None => {
                    pumped.equal += 1;
                    continue;
                }
                Some(What::Zero) => pumped.zero += 1,
                Some(What::Same { .. }) => pumped.equal += 1,
                Some(_) => {
                    if kept != index {
                        buffer.copy_within(bytes, kept * PAGE_BYTES);
                    }
                    kept += 1;
                }
            }
            if let Some(what) = what {
                add(&mut records, place.1, what);
            }
        }
        if records.is_empty() {
            self.buffers.give(buffer);
            return Ok(());
        }
        buffer.truncate(kept * PAGE_BYTES);
        let checksum = longhaul_common::pages::checksum(&longhaul_common::pages::encode_records(&records), &buffer);
        let raw = buffer.len();
        let packed = if differences > 0 { self.packing.pack_differences(&buffer) } else { self.packing.pack(&buffer) };
        pumped.changed += differences;
        let is_packed = packed.is_some();
        let payload = match packed {
            Some(packed) => {
                self.buffers.give(buffer);
                packed
            }
            None => buffer,
        };
        let frame =
            Frame { kind: Kind::Batch, space: batch.space.space, records, raw, checksum, packed: is_packed, payload };
        pumped.raw_bytes += raw as u64;
        pumped.packed_bytes += frame.payload.len() as u64;
        self.give(frames, frame)?;
        self.packing.note(self.pace.get());
        Ok(())
    }
}

/// A frame without content.
fn frame(kind: Kind, space: u32, records: Vec<Record>) -> Frame {
    Frame {
        kind,
        space,
        checksum: longhaul_common::pages::checksum(&longhaul_common::pages::encode_records(&records), &[]),
        records,
        payload: Vec::new(),
        raw: 0,
        packed: false,
    }
}

/// Appends a page to the records, to the last one if it goes on from there.
pub(super) fn add(records: &mut Vec<Record>, page: u64, what: What) {
    if let Some(last) = records.last_mut()
        && last.page + u64::from(last.count) == page
    {
        let goes_on = match (last.what, what) {
            (What::Same { space, page }, What::Same { space: other, page: next }) => {
                space == other && page + u64::from(last.count) == next
            }
            (one, other) => one == other,
        };
        if goes_on {
            last.count += 1;
            return;
        }
    }
    records.push(Record { page, count: 1, what });
}

/// Reads the pages at `addresses` into `buffer`, page by page in that order. Of a running task, pages that can't be read
/// are taken off the list and returned.
pub(super) fn read(pid: i32, addresses: &mut Vec<u64>, buffer: &mut [u8], tasks: Tasks) -> Result<Vec<u64>, PumpError> {
    let mut skipped = Vec::new();
    let mut done = 0;
    while done < addresses.len() {
        let remote = runs(&addresses[done..]);
        let mut local = [IoSliceMut::new(&mut buffer[done * PAGE_BYTES..addresses.len() * PAGE_BYTES])];
        // A read ends early at the first page it can't reach.
        match process_vm_readv(Pid::from_raw(pid), &mut local, &remote) {
            Ok(bytes) => done += bytes / PAGE_BYTES,
            // It has ended: nothing of it is needed any more.
            Err(nix::errno::Errno::ESRCH) if tasks == Tasks::Running => {
                addresses.truncate(done);
                break;
            }
            Err(_) => {}
        }
        let Some(&address) = addresses.get(done) else { break };
        let page = &mut buffer[done * PAGE_BYTES..(done + 1) * PAGE_BYTES];
        // Without read permission of its own (PROT_NONE) it is still readable here (mem_rw in fs/proc/base.c).
        let read = File::open(format!("/proc/{pid}/mem")).and_then(|mem| mem.read_exact_at(page, address));
        match (read, tasks) {
            (Ok(()), _) => done += 1,
            (Err(_), Tasks::Running) => skipped.push(addresses.remove(done)),
            (Err(source), Tasks::Frozen) => return Err(PumpError::Read { pid, address, source }),
        }
    }
    Ok(skipped)
}

/// The same of shared memory, where what lies behind its end is zero.
fn read_object(file: &File, offsets: &[u64], buffer: &mut [u8]) -> Result<(), PumpError> {
    let mut rest = buffer;
    for run in offsets.chunk_by(|one, next| one + PAGE == *next) {
        let (own, others) = rest.split_at_mut(run.len() * PAGE_BYTES);
        let start = run.first().copied().unwrap_or_default();
        let mut done = 0;
        while done < own.len() {
            match file.read_at(&mut own[done..], start + done as u64) {
                Ok(0) => {
                    own[done..].fill(0);
                    break;
                }
                Ok(bytes) => done += bytes,
                Err(source) => return Err(PumpError::ReadShared { offset: start + done as u64, source }),
            }
        }
        rest = others;
    }
    Ok(())
}

/// Consecutive pages as one.
fn runs(addresses: &[u64]) -> Vec<RemoteIoVec> {
    let mut runs: Vec<RemoteIoVec> = Vec::new();
    for &address in addresses {
        let address = address as usize;
        match runs.last_mut() {
            Some(last) if last.base + last.len == address => last.len += PAGE_BYTES,
            _ => runs.push(RemoteIoVec { base: address, len: PAGE_BYTES }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_grow_where_pages_follow() {
        let mut records = Vec::new();
        for page in [5, 6, 8] {
            add(&mut records, page, What::Data);
        }
        add(&mut records, 9, What::Same { space: 1, page: 20 });
        add(&mut records, 10, What::Same { space: 1, page: 21 });
        add(&mut records, 11, What::Same { space: 1, page: 40 });
        let counts: Vec<u32> = records.iter().map(|record| record.count).collect();
        assert_eq!(counts, [2, 1, 2, 1]);
    }

    #[test]
    fn our_own_memory_is_read() {
        let source: Vec<u8> = (0..3 * PAGE_BYTES).map(|index| (index / 7) as u8).collect();
        let start = (source.as_ptr() as u64).next_multiple_of(PAGE);
        let offset = (start - source.as_ptr() as u64) as usize;
        let mut addresses = vec![start, 4096, start + PAGE];
        let mut buffer = vec![0; 3 * PAGE_BYTES];
        let pid = std::process::id().cast_signed();
        let skipped = read(pid, &mut addresses, &mut buffer, Tasks::Running).expect("reads");
        assert_eq!((addresses, skipped), (vec![start, start + PAGE], vec![4096]));
        assert_eq!(buffer[..2 * PAGE_BYTES], source[offset..offset + 2 * PAGE_BYTES]);
        let ended = std::process::Command::new("true").spawn().and_then(|mut child| {
            child.wait()?;
            Ok(child.id().cast_signed())
        });
        let skipped = read(ended.expect("ran"), &mut vec![start], &mut buffer, Tasks::Running).expect("is no failure");
        assert!(skipped.is_empty(), "a task that has ended owes nothing");
    }
}
