//! Pages that the source owes: the container runs before they have come.
//!
//! Each has its slot in the store like every other page, so that forks and moves of memory need nothing special; a slot
//! just has no content yet. Which pages they are is written when the indexes are, in the file `owed`:
//!
//! ```text
//! per run: u32 address space | u32 first slot | u64 first page | u64 pages
//! ```
//!
//! Which of them have come is kept in the file `arrived`, a bit for each in the same order: a worker that is killed leaves to
//! the next one what it has done.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use longhaul_common::pages::Want;

use super::index::SHARED;

const OWED: &str = "owed";
const ARRIVED: &str = "arrived";
/// Bytes of a run in the file.
const RUN: usize = 24;
/// Pages asked for in one message.
const MOST: u64 = 1 << 15;

/// Consecutive pages in consecutive slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwedRun {
    /// The address space on the source.
    pub space: u32,
    /// The first slot.
    pub slot: u32,
    /// The first page.
    pub page: u64,
    /// How many.
    pub count: u64,
}

impl OwedRun {
    /// Makes it longer by a page, if that one follows.
    pub fn grow(&mut self, space: u32, page: u64, slot: u32) -> bool {
        let follows = self.space == space
            && self.page + self.count == page
            && u64::from(self.slot) + self.count == u64::from(slot);
        self.count += u64::from(follows);
        follows
    }

    fn encode(&self) -> [u8; RUN] {
        let mut bytes = [0; RUN];
        bytes[..4].copy_from_slice(&self.space.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.slot.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.page.to_le_bytes());
        bytes[16..].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let four = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let eight = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Self { space: four(0)?, slot: four(4)?, page: eight(8)?, count: eight(16)? })
    }
}

/// Writes which pages are owed.
pub fn write(dir: &Path, runs: &[OwedRun]) -> io::Result<()> {
    if runs.is_empty() {
        return Ok(());
    }
    std::fs::write(dir.join(OWED), runs.iter().flat_map(OwedRun::encode).collect::<Vec<_>>())
}

/// Whether any page of the store in `dir` is owed.
pub fn any(dir: &Path) -> bool {
    dir.join(OWED).exists()
}

/// See the module.
#[derive(Debug, Default)]
pub struct Owed {
    /// With the number of each run's first page.
    runs: Vec<(OwedRun, u64)>,
    by_slot: BTreeMap<u32, usize>,
    by_page: BTreeMap<(u32, u64), usize>,
    arrived: Vec<u8>,
    file: Option<File>,
    missing: u64,
}

impl Owed {
    /// Of the store in `dir`.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let bytes = match std::fs::read(dir.join(OWED)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        let runs = bytes.chunks(RUN).map(OwedRun::decode).collect::<Option<Vec<_>>>();
        let runs = runs.ok_or_else(|| io::Error::other(format!("{} is damaged", dir.join(OWED).display())))?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(ARRIVED))?;
        let mut owed = Self::of(runs);
        file.set_len(owed.arrived.len() as u64)?;
        file.read_exact_at(&mut owed.arrived, 0)?;
        owed.missing -= owed.arrived.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        owed.file = Some(file);
        Ok(owed)
    }

    fn of(all: Vec<OwedRun>) -> Self {
        let mut owed = Self::default();
        for run in all {
            owed.by_slot.insert(run.slot, owed.runs.len());
            owed.by_page.insert((run.space, run.page), owed.runs.len());
            owed.runs.push((run, owed.missing));
            owed.missing += run.count;
        }
        owed.arrived = vec![0; owed.missing.div_ceil(8) as usize];
        owed
    }

    /// How many have not come.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    fn has_arrived(&self, number: u64) -> bool {
        self.arrived.get((number / 8) as usize).is_some_and(|byte| byte & 1 << (number % 8) != 0)
    }

    /// The run that a slot belongs to, and the slot's place in it.
    fn run_of(&self, slot: u32) -> Option<(&OwedRun, u64, u64)> {
        let (first, index) = self.by_slot.range(..=slot).next_back()?;
        let (run, number) = self.runs.get(*index)?;
        let offset = u64::from(slot - first);
        (offset < run.count).then_some((run, *number, offset))
    }

    /// Whether the content of a slot has not come yet, and for how many slots from there on that is so, up to `most`.
    pub fn leading(&self, entry: u32, most: u64) -> (bool, u64) {
        if self.missing == 0 {
            return (false, most);
        }
        let first = entry & !SHARED;
        let is_missing = |slot: u32| self.run_of(slot).is_some_and(|(_, number, at)| !self.has_arrived(number + at));
        let missing = is_missing(first);
        let same = (1..most).take_while(|offset| is_missing(first + *offset as u32) == missing).count();
        (missing, 1 + same as u64)
    }

    /// What the source has to be asked for, for up to `most` slots from one on that are missing.
    pub fn want(&self, entry: u32, most: u64) -> Option<Want> {
        let slot = entry & !SHARED;
        let (run, number, offset) = self.run_of(slot)?;
        let left = (offset..run.count).take(most as usize);
        let count = left.take_while(|offset| !self.has_arrived(number + offset)).count();
        (count > 0).then_some(Want { space: run.space, page: run.page + offset, count: count as u16, urgent: true })
    }

    /// All that has not come.
    pub fn wants(&self) -> Vec<Want> {
        let mut wants: Vec<Want> = Vec::new();
        for (run, number) in &self.runs {
            for offset in (0..run.count).filter(|offset| !self.has_arrived(number + offset)) {
                let page = run.page + offset;
                match wants.last_mut() {
                    Some(last)
                        if last.space == run.space
                            && last.page + u64::from(last.count) == page
                            && u64::from(last.count) < MOST =>
                    {
                        last.count += 1;
                    }
                    _ => wants.push(Want { space: run.space, page, count: 1, urgent: false }),
                }
            }
        }
        wants
    }

    /// The slot of a page that is owed and has not come, and how many after it are so, in slots that follow, up to `most`.
    pub fn slot_of(&self, space: u32, page: u64, most: u64) -> Option<(u32, u64)> {
        let (_, index) = self.by_page.range((space, 0)..=(space, page)).next_back()?;
        let (run, number) = self.runs.get(*index)?;
        let offset = page - run.page;
        let left = (offset..run.count).take(most as usize);
        let count = left.take_while(|offset| !self.has_arrived(number + offset)).count();
        (count > 0).then_some((run.slot + offset as u32, count as u64))
    }

    /// Whether a page is, or was, owed.
    pub fn knows(&self, space: u32, page: u64) -> bool {
        let run = self.by_page.range((space, 0)..=(space, page)).next_back();
        run.and_then(|(_, index)| self.runs.get(*index)).is_some_and(|(run, _)| page - run.page < run.count)
    }

    /// The content of these slots, all of one run, is here.
    pub fn arrive(&mut self, slot: u32, count: u64) -> io::Result<()> {
        let Some((_, number, offset)) = self.run_of(slot) else { return Ok(()) };
        let (first, end) = (number + offset, number + offset + count);
        for number in first..end {
            if !self.has_arrived(number) {
                self.arrived[(number / 8) as usize] |= 1 << (number % 8);
                self.missing -= 1;
            }
        }
        let bytes = (first / 8) as usize..(end.div_ceil(8)) as usize;
        let Some(file) = &self.file else { return Ok(()) };
        file.write_all_at(&self.arrived[bytes.clone()], bytes.start as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs() -> Vec<OwedRun> {
        vec![
            OwedRun { space: 1, slot: 10, page: 100, count: 20 },
            OwedRun { space: 1, slot: 50, page: 300, count: 2 },
            OwedRun { space: 7, slot: 30, page: 100, count: 5 },
        ]
    }

    #[test]
    fn what_has_come_is_known_to_the_next_worker() {
        let dir = tempfile::tempdir().expect("a directory");
        write(dir.path(), &runs()).expect("writes");
        let mut owed = Owed::open(dir.path()).expect("opens");
        assert_eq!(owed.missing(), 27);
        assert_eq!(owed.slot_of(1, 105, 100), Some((15, 15)));
        owed.arrive(15, 3).expect("is written");
        owed.arrive(15, 3).expect("may come again");
        let again = Owed::open(dir.path()).expect("opens again");
        for owed in [owed, again] {
            assert_eq!(owed.missing(), 24);
            assert_eq!(owed.leading(13, 100), (true, 2));
            assert_eq!(owed.leading(15, 2), (false, 2));
            assert_eq!(owed.leading(15 | SHARED, 100).1, 3);
            assert_eq!(owed.slot_of(1, 105, 9), None);
            assert_eq!(owed.slot_of(7, 104, 9), Some((34, 1)));
            assert!(owed.knows(1, 105) && !owed.knows(1, 99) && !owed.knows(7, 105));
            assert_eq!(owed.want(31, 2), Some(Want { space: 7, page: 101, count: 2, urgent: true }));
            let wants: Vec<_> = owed.wants().iter().map(|want| (want.space, want.page, want.count)).collect();
            assert_eq!(wants, [(1, 100, 5), (1, 108, 12), (1, 300, 2), (7, 100, 5)]);
        }
    }

    #[test]
    fn nothing_is_owed_where_nothing_says_so() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(!any(dir.path()));
        let owed = Owed::open(dir.path()).expect("opens");
        assert_eq!((owed.missing(), owed.leading(3, 9)), (0, (false, 9)));
    }
}
