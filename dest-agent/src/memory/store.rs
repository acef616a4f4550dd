//! The page store: a container's memory, as far as it has arrived.
//!
//! Contents lie in *slots* of one page each, in a file of the agent's memory filesystem; for every address space a table says
//! which page is in which slot. Equal pages share a slot. Last write wins: a page that comes again replaces what it was.
//! Pages of [objects](super::objects) lie in none: they are written into the object itself.
//!
//! The store has a fixed most of pages, and when it is used up it refuses: memory is never taken from who has it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul_common::pages::{OBJECTS, Record, What};
use longhaul_common::sys::memory::PAGE;
use nix::fcntl::{FallocateFlags, fallocate};
use thiserror::Error;

use super::common::{COMMON, CommonRun, FEWEST, MOST_ENTRIES};
use super::index::{Due, Index, IndexWriter, SHARED, ZERO};
use super::objects::Objects;
use super::owed::{self, OwedRun};

const PAGE_BYTES: usize = PAGE as usize;
/// Pages of one table.
const TABLE: u64 = 512;
/// Entry of a page that is not known.
const NONE: u32 = u32::MAX;
/// Entry of a page that is in its object.
const IN_PLACE: u32 = ZERO - 1;
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
    #[error("the peer refers to page {page:#x} of task {space}, which it never sent")]
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

/// What a batch does to files, in its order.
#[derive(Debug, Default)]
#[must_use = "content that is not written is lost"]
pub struct Writes {
    steps: Vec<Step>,
    path: PathBuf,
}

/// A place in a file.
#[derive(Debug, Clone)]
struct Place {
    file: Arc<File>,
    offset: u64,
}

impl Place {
    fn follows(&self, other: &Self, bytes: u64) -> bool {
        Arc::ptr_eq(&self.file, &other.file) && self.offset == other.offset + bytes
    }
}

#[derive(Debug)]
enum Step {
    /// The batch's next pages.
    Write { to: Place, pages: usize },
    /// The batch's next page, combined by exclusive or with what is there, or with zeroes.
    Change { from: Option<Place>, to: Place },
    /// A page that is somewhere else already.
    Copy { from: Place, to: Place },
    /// It is zero now.
    Clear { at: Place },
}

impl Writes {
    /// Whether it reads what another stream's frame may change as soon as the store is free again: a slot that this one gave up.
    pub fn must_be_done_at_once(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Change { from: Some(from), to } if !from.follows(to, 0)))
    }

    fn add(&mut self, to: Place) {
        match self.steps.last_mut() {
            Some(Step::Write { to: first, pages }) if to.follows(first, *pages as u64 * PAGE) => *pages += 1,
            _ => self.steps.push(Step::Write { to, pages: 1 }),
        }
    }

    /// Does it, with one write for each run of consecutive pages.
    pub fn write(self, mut data: &[u8]) -> Result<(), StoreError> {
        let mut page = [0; PAGE_BYTES];
        for step in self.steps {
            let done = match step {
                Step::Write { to, pages } => {
                    let (own, rest) = data.split_at_checked(pages * PAGE_BYTES).unwrap_or((data, &[]));
                    data = rest;
                    to.file.write_all_at(own, to.offset)
                }
                Step::Change { from, to } => {
                    let (own, rest) = data.split_at_checked(PAGE_BYTES).unwrap_or((data, &[]));
                    data = rest;
                    page.fill(0);
                    let read = from.map_or(Ok(()), |from| from.file.read_exact_at(&mut page, from.offset));
                    page.iter_mut().zip(own).for_each(|(old, change)| *old ^= change);
                    read.and_then(|()| to.file.write_all_at(&page, to.offset))
                }
                Step::Copy { from, to } => from
                    .file
                    .read_exact_at(&mut page, from.offset)
                    .and_then(|()| to.file.write_all_at(&page, to.offset)),
                Step::Clear { at } => punch(&at.file, at.offset, PAGE),
            };
            done.map_err(|source| StoreError::File { operation: "write to", path: self.path.clone(), source })?;
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
    objects: Objects,
    /// Pages that lie in objects.
    in_place: usize,
    /// Pages whose content comes when the container runs.
    owed: Vec<OwedRun>,
    /// Their slots: a page is owed once, however often it is said.
    owed_slots: HashSet<u32>,
}

/// The name of the file of slots.
pub const SLOTS: &str = "slots";

/// Frees slots that nobody needs any more: the container's memory must not be here twice.
pub fn free_slots(file: &File, first: u32, bytes: u64) {
    if let Err(error) = punch(file, u64::from(first) * PAGE, bytes) {
        tracing::debug!(%error, "can't free a part of the page store");
    }
}

fn punch(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, flags, offset.cast_signed(), bytes.cast_signed())?)
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
            objects: Objects::default(),
            in_place: 0,
            owed: Vec::new(),
            owed_slots: HashSet::new(),
        })
    }

    /// Bytes that are used now.
    pub fn bytes(&self) -> u64 {
        self.used() as u64 * PAGE
    }

    fn used(&self) -> usize {
        self.uses.len() - self.free.len() + self.in_place
    }

    /// The shared memory that pages go to.
    pub fn objects(&mut self) -> &mut Objects {
        &mut self.objects
    }

    /// That alone.
    pub fn into_objects(self) -> Objects {
        self.objects
    }

    /// Takes a batch's records; what is to be written. Until that is done the store must not be read.
    pub fn apply(&mut self, space: u32, records: &[Record]) -> Result<Writes, StoreError> {
        let mut writes = Writes { steps: Vec::new(), path: self.dir.join(SLOTS) };
        for record in records {
            let pages = record.page..record.page + u64::from(record.count);
            match record.what {
                What::Data => {
                    for page in pages {
                        writes.add(self.place_for(space, page)?);
                    }
                }
                What::Changed => {
                    for page in pages {
                        if self.get(space, page).is_none() {
                            return Err(StoreError::Unknown { page, space });
                        }
                        // Before it has another place: what it shared stays where it is, since others have it.
                        let from = self.place_of(space, page);
                        let to = self.place_for(space, page)?;
                        writes.steps.push(Step::Change { from, to });
                    }
                }
                What::Zero => {
                    for page in pages {
                        let cleared = self.place_of(space, page).filter(|_| space >= OBJECTS);
                        writes.steps.extend(cleared.map(|at| Step::Clear { at }));
                        self.set(space, page, ZERO)?;
                    }
                }
                What::Same { space: other, page: from } => {
                    for (page, from) in pages.zip(from..) {
                        self.same(space, page, other, from, &mut writes)?;
                    }
                }
                What::Owed => {
                    for page in pages {
                        self.owe(space, page)?;
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
        self.objects.forget(space);
    }

    /// Sets a slot aside for a page that comes later. What it had until now is not looked at any more.
    fn owe(&mut self, space: u32, page: u64) -> Result<(), StoreError> {
        if space >= OBJECTS {
            // Tasks see it as soon as they run.
            return Err(StoreError::Unknown { page, space });
        }
        let slot = self.slot_for(space, page)?;
        if !self.owed_slots.insert(slot) {
            return Ok(());
        }
        if !self.owed.last_mut().is_some_and(|last| last.grow(space, page, slot)) {
            self.owed.push(OwedRun { space, slot, page, count: 1 });
        }
        Ok(())
    }

    /// Writes down which pages are owed.
    pub fn write_owed(&self) -> Result<(), StoreError> {
        let failed = |source| StoreError::File { operation: "write beside", path: self.dir.join(SLOTS), source };
        owed::write(&self.dir, &self.owed).map_err(failed)?;
        // The file is read through a mapping, which must not end before the slots that are filled last.
        let length = self.uses.len() as u64 * PAGE;
        if self.owed.is_empty() || self.file.metadata().map_err(failed)?.len() >= length {
            return Ok(());
        }
        self.file.set_len(length).map_err(failed)
    }

    /// Where a page's content is to be written.
    fn place_for(&mut self, space: u32, page: u64) -> Result<Place, StoreError> {
        if space >= OBJECTS {
            if self.get(space, page) != Some(IN_PLACE) && self.used() >= self.most {
                return Err(self.full());
            }
            self.set(space, page, IN_PLACE)?;
            return self.place_of(space, page).ok_or(StoreError::Unknown { page, space });
        }
        let slot = self.slot_for(space, page)?;
        Ok(Place { file: self.file.clone(), offset: u64::from(slot) * PAGE })
    }

    /// Where a page's content is, if it has any.
    fn place_of(&self, space: u32, page: u64) -> Option<Place> {
        match self.get(space, page)? {
            IN_PLACE => Some(Place { file: self.objects.file(space)?.clone(), offset: page * PAGE }),
            ZERO => None,
            slot => Some(Place { file: self.file.clone(), offset: u64::from(slot) * PAGE }),
        }
    }

    fn full(&self) -> StoreError {
        StoreError::Full(self.most as u64 * PAGE)
    }

    fn give_up(&mut self, slot: u32) {
        self.in_place -= usize::from(slot == IN_PLACE);
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
            None if self.used() < self.most => {
                self.uses.push(0);
                (self.uses.len() - 1) as u32
            }
            None => return Err(self.full()),
        };
        self.set(space, page, slot)?;
        Ok(slot)
    }

    /// A page is as another one is: they share a slot, but for those of objects, which have their own.
    fn same(&mut self, space: u32, page: u64, other: u32, from: u64, writes: &mut Writes) -> Result<(), StoreError> {
        let slot = self.get(other, from).ok_or(StoreError::Unknown { page: from, space: other })?;
        if space < OBJECTS && other < OBJECTS {
            return self.set(space, page, slot);
        }
        let Some(from) = self.place_of(other, from) else {
            let cleared = self.place_of(space, page).filter(|_| space >= OBJECTS);
            writes.steps.extend(cleared.map(|at| Step::Clear { at }));
            return self.set(space, page, ZERO);
        };
        let to = self.place_for(space, page)?;
        writes.steps.push(Step::Copy { from, to });
        Ok(())
    }

    fn get(&self, space: u32, page: u64) -> Option<u32> {
        let slot = *self.spaces.get(&space)?.get(&(page / TABLE))?.get((page % TABLE) as usize)?;
        (slot != NONE).then_some(slot)
    }

    /// Enters a slot for a page and gives up the one it had.
    fn set(&mut self, space: u32, page: u64, slot: u32) -> Result<(), StoreError> {
        if self.spaces.len() >= MAX_SPACES && !self.spaces.contains_key(&space) {
            return Err(self.full());
        }
        let full = self.full();
        let table = match self.spaces.entry(space).or_default().entry(page / TABLE) {
            Entry::Occupied(table) => table.into_mut(),
            // One page in each table is the sparsest there is.
            Entry::Vacant(_) if self.tables > self.most + 1024 => return Err(full),
            Entry::Vacant(place) => {
                self.tables += 1;
                place.insert(Box::new([NONE; TABLE as usize]))
            }
        };
        let Some(entry) = table.get_mut((page % TABLE) as usize) else { return Ok(()) };
        let old = std::mem::replace(entry, slot);
        // The new use first: a page may be entered again with the slot it has.
        self.in_place += usize::from(slot == IN_PLACE);
        if let Some(uses) = self.uses.get_mut(slot as usize) {
            *uses += 1;
        }
        self.give_up(old);
        Ok(())
    }

    /// Enters what several address spaces have in the same slot at the same place as an address space of its own, so that those slots
    /// stay as they are. All of it, in order; nothing if that is too little.
    pub fn find_common(&mut self) -> Result<Vec<CommonRun>, StoreError> {
        let mut by_table: BTreeMap<u64, Vec<&[u32; TABLE as usize]>> = BTreeMap::new();
        for (_, tables) in self.spaces.iter().filter(|(space, _)| **space < COMMON) {
            tables.iter().for_each(|(number, table)| by_table.entry(*number).or_default().push(table));
        }
        let mut runs: Vec<CommonRun> = Vec::new();
        let mut slots = Vec::new();
        for (number, tables) in by_table.into_iter().filter(|(_, tables)| tables.len() > 1) {
            for (offset, page) in (0..TABLE as usize).zip(number * TABLE..) {
                slots.clear();
                let entries = tables.iter().filter_map(|table| table.get(offset)).copied();
                slots.extend(entries.filter(|slot| self.uses.get(*slot as usize).is_some_and(|uses| *uses > 1)));
                slots.sort_unstable();
                let twice = slots.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
                let Some(slot) = twice.filter(|slot| !self.owed_slots.contains(slot)) else { continue };
                match runs.last_mut() {
                    Some(run) if run.page + run.count == page && u64::from(run.slot) + run.count == u64::from(slot) => {
                        run.count += 1;
                    }
                    _ => runs.push(CommonRun { page, slot, count: 1 }),
                }
            }
        }
        let pages = runs.iter().map(|run| run.count).sum::<u64>();
        if pages < FEWEST || pages.saturating_mul(self.spaces.len() as u64) > MOST_ENTRIES {
            return Ok(Vec::new());
        }
        for run in &runs {
            for (page, slot) in (run.page..run.page + run.count).zip(run.slot..) {
                self.set(COMMON, page, slot)?;
            }
        }
        Ok(runs)
    }

    /// Whether there is anything in common.
    pub fn has_common(&self) -> bool {
        self.spaces.contains_key(&COMMON)
    }

    /// Where an address space does not have what is in common: it has something else, or nothing there that counts. A page that a task has given
    /// up since it was sent still has its slot; that it is none of `content` says so.
    pub fn not_common(&self, space: u32, content: &[Range<u64>]) -> Vec<Range<u64>> {
        let own = self.spaces.get(&space);
        let mut content = content.iter().peekable();
        let mut found: Vec<Range<u64>> = Vec::new();
        for (number, table) in self.spaces.get(&COMMON).into_iter().flatten() {
            let own = own.and_then(|tables| tables.get(number));
            for (offset, page) in (0..TABLE as usize).zip(number * TABLE..) {
                if table[offset] == NONE {
                    continue;
                }
                while content.next_if(|range| range.end <= page).is_some() {}
                let counts = content.peek().is_some_and(|range| range.contains(&page));
                if counts && own.is_some_and(|own| own[offset] == table[offset]) {
                    continue;
                }
                match found.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => found.push(page..page + 1),
                }
            }
        }
        found
    }

    /// Writes an index of an address space for the pages that count; all of them must be here. Returns how many they are.
    pub fn write_index(&self, due: Due, space: u32, content: &[Range<u64>]) -> Result<u64, StoreError> {
        let path = Index::path(&self.dir, due, space);
        let wrap = |source| StoreError::File { operation: "write", path: path.clone(), source };
        let tables = self.spaces.get(&space);
        // Memory that tasks share is in place: nobody looks for it.
        let mut index = (space < OBJECTS).then(|| IndexWriter::begin(content));
        // A gigabyte has a quarter of a million pages, and the container is frozen: one pass, one allocation.
        for range in content {
            let mut page = range.start;
            while page < range.end {
                let end = range.end.min((page / TABLE + 1) * TABLE);
                let table = tables.and_then(|tables| tables.get(&(page / TABLE)));
                let table = table.ok_or(StoreError::Missing { page, space })?;
                let first = (page % TABLE) as usize;
                for (page, &slot) in (page..end).zip(&table[first..]) {
                    if slot == NONE {
                        return Err(StoreError::Missing { page, space });
                    }
                    if let Some(index) = &mut index {
                        let shared = self.uses.get(slot as usize).is_some_and(|uses| *uses > 1);
                        index.push(if shared { slot | SHARED } else { slot });
                    }
                }
                page = end;
            }
        }
        match index {
            Some(index) => index.write(&path).map_err(wrap),
            None => Ok(content.iter().map(|range| range.end - range.start).sum()),
        }
    }

    /// The content of a page.
    #[cfg(test)]
    fn read(&self, space: u32, page: u64) -> Option<Vec<u8>> {
        let slot = self.get(space, page)?;
        let mut bytes = vec![0; PAGE_BYTES];
        if slot != ZERO {
            let place = self.place_of(space, page)?;
            place.file.read_exact_at(&mut bytes, place.offset).ok()?;
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

    #[test]
    fn what_is_in_common_stays_as_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = PageStore::create(&dir.path().join("s"), 16 << 20).expect("creates");
        let most = FEWEST as u32;
        for number in 0..u64::from(most) {
            let content = page(number as u8);
            apply(&mut store, 1, &[record(100 + number, 1, What::Data)], &content).expect("takes");
        }
        apply(&mut store, 2, &[record(100, most - 1, What::Same { space: 1, page: 100 })], &[]).expect("takes");
        assert_eq!(store.find_common().expect("finds"), [], "one page too few");
        assert!(!store.has_common());
        let last = 100 + FEWEST - 1;
        apply(&mut store, 2, &[record(last, 1, What::Same { space: 1, page: last })], &[]).expect("takes");
        let found = store.find_common().expect("finds");
        assert_eq!(found.iter().map(|run| run.count).sum::<u64>(), FEWEST);
        let content = [100..100 + FEWEST];
        assert_eq!(store.not_common(1, &content), []);
        // What was sent and does not count any more has been given up.
        assert_eq!(store.not_common(1, &[101..110, 112..100 + FEWEST]), [100..101, 110..112]);
        assert_eq!(store.not_common(1, &[]), [100..100 + FEWEST]);
        // Both write it: neither writes over what was in common.
        apply(&mut store, 1, &[record(103, 1, What::Data)], &page(77)).expect("takes");
        apply(&mut store, 2, &[record(103, 2, What::Zero)], &[]).expect("takes");
        assert_eq!(store.read(COMMON, 103), Some(page(3)));
        assert_eq!(store.not_common(1, &content), [103..104]);
        assert_eq!(store.not_common(2, &content), [103..105]);
        assert_eq!(store.not_common(3, &content), [100..100 + FEWEST]);
    }

    proptest! {
        /// Against a plain map: whatever is written, shared, zeroed and written again, every page reads as it was last said to be.
        #[test]
        fn last_write_wins(steps in proptest::collection::vec((0u32..2, 0u64..40, 0u8..4, 0u8..4, 0u64..40), 1..200)) {
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
                    2 => {
                        let change = record(at, 1, What::Changed);
                        let done = apply(&mut store, space, &[change], &page(byte));
                        match model.get(&(space, at)).copied() {
                            Some(old) => {
                                done.expect("takes");
                                model.insert((space, at), old ^ byte);
                            }
                            None => prop_assert!(done.is_err()),
                        }
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
