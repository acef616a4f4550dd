//! Reads pages out of the container and makes frames of them: what is zero or was sent before does not travel.

use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use longhaul_common::pages::{Buffers, Kind, MAX_PAGES, MAX_RECORDS, Record, What};
use longhaul_common::sys::memory::PAGE;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use thiserror::Error;
use tokio::sync::mpsc;

use super::link::InFlight;
use super::packing::Packing;
use super::sent::Sent;
use super::tracker::{Frozen, SpacePages};

pub(super) const PAGE_BYTES: usize = PAGE as usize;
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
    packing: Packing,
    buffers: Buffers,
    in_flight: InFlight,
}

impl Pump {
    /// For a link, which gives buffers back and says how much of what it was given is not stored yet.
    pub fn new(buffers: Buffers, in_flight: InFlight, may_pack: bool) -> Self {
        Self { sent: Sent::default(), packing: Packing::new(may_pack), buffers, in_flight }
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

    /// Address spaces have ended.
    pub fn forget(&mut self, spaces: &[u32]) {
        spaces.iter().for_each(|space| self.sent.forget(*space));
    }

    /// Tells the destination the same.
    pub fn tell_ended(&self, spaces: &[u32], frames: &mpsc::Sender<Frame>) -> Result<(), PumpError> {
        spaces.iter().try_for_each(|space| self.give(frames, frame(Kind::Forget, *space, Vec::new())).map(drop))
    }

    /// Tells which pages count in the end, and that this is the end.
    pub fn finish(&self, tasks: &[Frozen], streams: u32, frames: &mpsc::Sender<Frame>) -> Result<(), PumpError> {
        for task in tasks {
            for (ranges, what) in [(&task.later, What::Content), (&task.at_once, What::AtOnce)] {
                let records: Vec<Record> = ranges
                    .iter()
                    .flat_map(|range| {
                        // A count has 32 bits.
                        let (first, end) = (range.start / PAGE, range.end / PAGE);
                        (first..end).step_by(1 << 30).map(move |page| (page, (end - page).min(1 << 30) as u32))
                    })
                    .map(|(page, count)| Record { page, count, what })
                    .collect();
                for records in records.chunks(MAX_RECORDS) {
                    self.give(frames, frame(Kind::Content, task.space, records.to_vec()))?;
                }
            }
        }
        self.give(frames, frame(Kind::End, streams, Vec::new())).map(drop)
    }

    /// Gives a frame to the link; how long that had to wait.
    fn give(&self, frames: &mpsc::Sender<Frame>, frame: Frame) -> Result<Duration, PumpError> {
        let start = Instant::now();
        self.in_flight.add();
        frames.blocking_send(frame).map_err(|_| PumpError::Closed)?;
        Ok(start.elapsed())
    }

    fn send_batch(
        &mut self,
        batch: &mut Batch<'_>,
        tasks: Tasks,
        frames: &mpsc::Sender<Frame>,
        pumped: &mut Pumped,
    ) -> Result<(), PumpError> {
        let mut buffer = self.buffers.take(batch.addresses.len() * PAGE_BYTES);
        let skipped = read(batch.space.pid, &mut batch.addresses, &mut buffer, tasks)?;
        if !skipped.is_empty() {
            let ranges = skipped.into_iter().map(|address| address..address + PAGE).collect();
            pumped.skipped.push(SpacePages { pid: batch.space.pid, space: batch.space.space, ranges });
        }
        let mut records: Vec<Record> = Vec::new();
        let mut kept = 0;
        for (index, address) in batch.addresses.drain(..).enumerate() {
            pumped.pages += 1;
            let bytes = index * PAGE_BYTES..(index + 1) * PAGE_BYTES;
            let place = (batch.space.space, address / PAGE);
            let what = self.sent.look(place, &buffer[bytes.clone()]);
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
        let packed = self.packing.pack(&buffer);
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
        let waited = self.give(frames, frame)?;
        self.packing.note(raw, waited, self.in_flight.count());
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
fn add(records: &mut Vec<Record>, page: u64, what: What) {
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
fn read(pid: i32, addresses: &mut Vec<u64>, buffer: &mut [u8], tasks: Tasks) -> Result<Vec<u64>, PumpError> {
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
        let read = std::fs::File::open(format!("/proc/{pid}/mem")).and_then(|mem| mem.read_exact_at(page, address));
        match (read, tasks) {
            (Ok(()), _) => done += 1,
            (Err(_), Tasks::Running) => skipped.push(addresses.remove(done)),
            (Err(source), Tasks::Frozen) => return Err(PumpError::Read { pid, address, source }),
        }
    }
    Ok(skipped)
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
