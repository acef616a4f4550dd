//! The page store: a container's memory, as far as it has arrived.
//!
//! Contents lie in *slots* of one page each, in a file of the agent's memory filesystem; for every address space a table says
//! which page is in which slot. Equal pages share a slot. Last write wins: a page that comes again replaces what it was.
//! The store has a fixed most of slots, and when it is used up it refuses: memory is never taken from who has it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul_common::pages::{Record, What};
use longhaul_common::sys::memory::PAGE;
use nix::fcntl::{FallocateFlags, fallocate};
use thiserror::Error;

use super::index::{Due, Index, SHARED, ZERO};

const PAGE_BYTES: usize = PAGE as usize;
/// Pages of one table.
const TABLE: u64 = 512;
/// Entry of a page that is not known.
const NONE: u32 = u32::MAX;
/// Address spaces of one container: CRIU gives up long before.
const MAX_SPACES: usize = 100_000;

/// Memory that can't be taken.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The file.
    #[error("can't {operation} the page store {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More came than was agreed.
    #[error(
        "the container's memory does not fit: more than the {} MiB set aside for it here; free memory on the destination or choose another host",
        .0 >> 20
    )]
    Full(u64),
    /// A reference to nothing.
    #[error("the peer says that a page equals page {page:#x} of task {space}, which it never sent")]
    Unknown {
        /// The page.
        page: u64,
        /// Its address space.
        space: u32,
    },
    /// A page that counts is missing.
    #[error("page {page:#x} of task {space} never arrived")]
    Missing {
        /// The page.
        page: u64,
        /// Its address space.
        space: u32,
    },
}

/// Tables of one address space, by page number divided by [`TABLE`].
type Space = BTreeMap<u64, Box<[u32; TABLE as usize]>>;

/// The slots for a batch's content, in its order.
#[derive(Debug)]
#[must_use = "content that is not written is lost"]
pub struct Writes {
    to: Option<(Arc<File>, PathBuf)>,
    /// First slots, and how many follow.
    runs: Vec<(u32, usize)>,
}

impl Writes {
    /// Nothing.
    pub fn none() -> Self {
        Self { to: None, runs: Vec::new() }
    }

    fn add(&mut self, slot: u32) {
        match self.runs.last_mut() {
            Some((first, count)) if slot as usize == *first as usize + *count => *count += 1,
            _ => self.runs.push((slot, 1)),
        }
    }

    /// Writes the content, with one write for each run of consecutive slots.
    pub fn write(self, mut data: &[u8]) -> Result<(), StoreError> {
        let Some((file, path)) = self.to else { return Ok(()) };
        for (slot, count) in self.runs {
            let (own, rest) = data.split_at_checked(count * PAGE_BYTES).unwrap_or((data, &[]));
            data = rest;
            file.write_all_at(own, u64::from(slot) * PAGE).map_err(|source| StoreError::File {
                operation: "write to",
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

/// See the module.
#[derive(Debug)]
pub struct PageStore {
    dir: PathBuf,
    file: Arc<File>,
    /// How many pages use each slot.
    uses: Vec<u32>,
    free: Vec<u32>,
    most: usize,
    spaces: HashMap<u32, Space>,
    tables: usize,
}

/// The name of the file of slots.
pub const SLOTS: &str = "slots";

/// Frees slots that nobody needs any more: the container's memory must not be here twice.
pub fn free_slots(file: &File, first: u32, bytes: u64) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (offset, length) = ((u64::from(first) * PAGE).cast_signed(), bytes.cast_signed());
    if let Err(errno) = fallocate(file, flags, offset, length) {
        tracing::debug!(%errno, "can't free a part of the page store");
    }
}

impl PageStore {
    /// An empty store in `dir`, which is made, for at most `bytes`.
    pub fn create(dir: &Path, bytes: u64) -> Result<Self, StoreError> {
        let path = dir.join(SLOTS);
        let wrap = |source| StoreError::File { operation: "create", path: path.clone(), source };
        std::fs::create_dir_all(dir).map_err(wrap)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(wrap)?;
        let most = usize::try_from(bytes / PAGE).unwrap_or(usize::MAX).min(SHARED as usize - 1);
        Ok(Self {
            dir: dir.to_owned(),
            file: Arc::new(file),
            uses: Vec::new(),
            free: Vec::new(),
            most,
            spaces: HashMap::new(),
            tables: 0,
        })
    }

    /// Bytes that are used now.
    pub fn bytes(&self) -> u64 {
        (self.uses.len() - self.free.len()) as u64 * PAGE
    }

    /// Takes a batch's records; where its content is to be written. Until that is done the store must not be read.
    pub fn apply(&mut self, space: u32, records: &[Record]) -> Result<Writes, StoreError> {
        let mut writes = Writes { to: Some((self.file.clone(), self.dir.join(SLOTS))), runs: Vec::new() };
        for record in records {
            match record.what {
                What::Data => {
                    for page in record.page..record.page + u64::from(record.count) {
                        writes.add(self.slot_for(space, page)?);
                    }
                }
                What::Zero => {
                    for page in record.page..record.page + u64::from(record.count) {
                        self.set(space, page, ZERO)?;
                    }
                }
                What::Same { space: other, page: from } => {
                    for offset in 0..u64::from(record.count) {
                        self.share(space, record.page + offset, other, from + offset)?;
                    }
                }
                What::Content | What::AtOnce => {}
            }
        }
        Ok(writes)
    }

    /// An address space has ended: what it had makes room.
    pub fn forget(&mut self, space: u32) {
        for table in self.spaces.remove(&space).into_iter().flat_map(BTreeMap::into_values) {
            self.tables -= 1;
            table.iter().for_each(|slot| self.give_up(*slot));
        }
    }

    fn give_up(&mut self, slot: u32) {
        if let Some(uses) = self.uses.get_mut(slot as usize) {
            *uses -= 1;
            if *uses == 0 {
                self.free.push(slot);
            }
        }
    }

    /// A slot that is this page's alone: its own, if nobody shares it.
    fn slot_for(&mut self, space: u32, page: u64) -> Result<u32, StoreError> {
        let old = self.get(space, page);
        if let Some(slot) = old.filter(|slot| self.uses.get(*slot as usize) == Some(&1)) {
            return Ok(slot);
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.uses.len() < self.most => {
                self.uses.push(0);
                (self.uses.len() - 1) as u32
            }
            None => return Err(StoreError::Full(self.most as u64 * PAGE)),
        };
        self.set(space, page, slot)?;
        Ok(slot)
    }

    fn share(&mut self, space: u32, page: u64, other: u32, from: u64) -> Result<(), StoreError> {
        let slot = self.get(other, from).ok_or(StoreError::Unknown { page: from, space: other })?;
        self.set(space, page, slot)
    }

    fn get(&self, space: u32, page: u64) -> Option<u32> {
        let slot = *self.spaces.get(&space)?.get(&(page / TABLE))?.get((page % TABLE) as usize)?;
        (slot != NONE).then_some(slot)
    }

    /// Enters a slot for a page and gives up the one it had.
    fn set(&mut self, space: u32, page: u64, slot: u32) -> Result<(), StoreError> {
        if self.spaces.len() >= MAX_SPACES && !self.spaces.contains_key(&space) {
            return Err(StoreError::Full(self.most as u64 * PAGE));
        }
        let table = match self.spaces.entry(space).or_default().entry(page / TABLE) {
            Entry::Occupied(table) => table.into_mut(),
            // One page in each table is the sparsest there is.
            Entry::Vacant(_) if self.tables > self.most + 1024 => {
                return Err(StoreError::Full(self.most as u64 * PAGE));
            }
            Entry::Vacant(place) => {
                self.tables += 1;
                place.insert(Box::new([NONE; TABLE as usize]))
            }
        };
        let Some(entry) = table.get_mut((page % TABLE) as usize) else { return Ok(()) };
        let old = std::mem::replace(entry, slot);
        // The new use first: a page may be entered again with the slot it has.
        if let Some(uses) = self.uses.get_mut(slot as usize) {
            *uses += 1;
        }
        self.give_up(old);
        Ok(())
    }

    /// Writes an index of an address space for the pages that count; all of them must be here. Returns how many they are.
    pub fn write_index(&self, due: Due, space: u32, content: &[Range<u64>]) -> Result<u64, StoreError> {
        let path = Index::path(&self.dir, due, space);
        let wrap = |source| StoreError::File { operation: "write", path: path.clone(), source };
        let tables = self.spaces.get(&space);
        let mut slots = Vec::new();
        for range in content {
            let mut page = range.start;
            // Table by table: a gigabyte has 512 of them, and a quarter of a million pages.
            while page < range.end {
                let end = range.end.min((page / TABLE + 1) * TABLE);
                let table = tables.and_then(|tables| tables.get(&(page / TABLE)));
                let table = table.ok_or(StoreError::Missing { page, space })?;
                for page in page..end {
                    let slot = table.get((page % TABLE) as usize).copied().unwrap_or(NONE);
                    if slot == NONE {
                        return Err(StoreError::Missing { page, space });
                    }
                    let shared = self.uses.get(slot as usize).is_some_and(|uses| *uses > 1);
                    slots.push(if shared { slot | SHARED } else { slot });
                }
                page = end;
            }
        }
        let file = File::create(&path).map_err(wrap)?;
        let mut writer = io::BufWriter::with_capacity(1 << 20, file);
        Index::write(&mut writer, content, &slots).and_then(|()| writer.flush()).map_err(wrap)?;
        Ok(slots.len() as u64)
    }

    /// The content of a page.
    #[cfg(test)]
    fn read(&self, space: u32, page: u64) -> Option<Vec<u8>> {
        let slot = self.get(space, page)?;
        let mut bytes = vec![0; PAGE_BYTES];
        if slot != ZERO {
            self.file.read_exact_at(&mut bytes, u64::from(slot) * PAGE).ok()?;
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_BYTES]
    }

    fn apply(store: &mut PageStore, space: u32, records: &[Record], data: &[u8]) -> Result<(), StoreError> {
        store.apply(space, records)?.write(data)
    }

    fn record(page: u64, count: u32, what: What) -> Record {
        Record { page, count, what }
    }

    #[test]
    fn a_full_store_refuses_and_names_the_limit() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = PageStore::create(&dir.path().join("s"), 2 * PAGE).expect("creates");
        let two = [page(1), page(2)].concat();
        apply(&mut store, 1, &[record(10, 2, What::Data)], &two).expect("fits");
        apply(&mut store, 1, &[record(10, 2, What::Data)], &two).expect("replaces");
        let error = apply(&mut store, 1, &[record(12, 1, What::Data)], &page(3)).expect_err("is too much");
        assert!(matches!(error, StoreError::Full(bytes) if bytes == 2 * PAGE), "{error}");
        apply(&mut store, 1, &[record(10, 1, What::Zero)], &[]).expect("frees");
        apply(&mut store, 1, &[record(12, 1, What::Data)], &page(3)).expect("fits now");
        store.forget(1);
        assert_eq!(store.bytes(), 0);
        apply(&mut store, 1, &[record(12, 2, What::Data)], &two).expect("fits again");
    }

    #[test]
    fn a_missing_page_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = PageStore::create(&dir.path().join("s"), 1 << 20).expect("creates");
        apply(&mut store, 7, &[record(1, 1, What::Data)], &page(1)).expect("takes");
        assert!(matches!(store.write_index(Due::Later, 7, &[1..3]), Err(StoreError::Missing { page: 2, space: 7 })));
        let same = record(5, 1, What::Same { space: 7, page: 99 });
        assert!(matches!(apply(&mut store, 7, &[same], &[]), Err(StoreError::Unknown { page: 99, space: 7 })));
    }

    proptest! {
        /// Against a plain map: whatever is written, shared, zeroed and written again, every page reads as it was last said to be.
        #[test]
        fn last_write_wins(steps in proptest::collection::vec((0u32..2, 0u64..40, 0u8..4, 0u8..3, 0u64..40), 1..200)) {
            let dir = tempfile::tempdir().expect("a directory");
            let mut store = PageStore::create(&dir.path().join("s"), 80 * PAGE).expect("creates");
            let mut model: HashMap<(u32, u64), u8> = HashMap::new();
            for (space, at, byte, kind, from) in steps {
                match kind {
                    0 => {
                        let two = [page(byte), page(byte + 1)].concat();
                        apply(&mut store, space, &[record(at, 2, What::Data)], &two).expect("takes");
                        model.insert((space, at), byte);
                        model.insert((space, at + 1), byte + 1);
                    }
                    1 => {
                        apply(&mut store, space, &[record(at, 1, What::Zero)], &[]).expect("takes");
                        model.insert((space, at), 0);
                    }
                    _ => {
                        let other = 1 - space;
                        let same = record(at, 1, What::Same { space: other, page: from });
                        let done = apply(&mut store, space, &[same], &[]);
                        match model.get(&(other, from)).copied() {
                            Some(byte) => {
                                done.expect("takes");
                                model.insert((space, at), byte);
                            }
                            None => prop_assert!(done.is_err()),
                        }
                    }
                }
                for ((space, at), byte) in &model {
                    prop_assert_eq!(store.read(*space, *at), Some(page(*byte)));
                }
            }
        }
    }
}
