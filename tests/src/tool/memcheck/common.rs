//! Memory that all processes map and write by turns: what one wrote, the others must find.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::page;
use super::process::Memory;
use crate::tool::idle::xorshift;
use crate::tool::sys::mem::{PAGE, PAGE_WORDS, Region, Sharing};
use crate::tool::sys::mutex::SharedCounter;

/// Pages of it.
const PAGES: usize = 256;
/// Ids of its pages: apart from those of slices and of churned memory.
const FIRST_ID: u64 = 1 << 41;

/// The memory, and the count of all updates behind the lock of whoever writes. Made before the processes are forked.
pub(super) struct Common {
    region: Region,
    updates: SharedCounter,
}

impl Common {
    /// Maps the pages and writes their first state.
    pub(super) fn create() -> anyhow::Result<Self> {
        let mut region = Region::anonymous(PAGES * PAGE, Sharing::Shared)?;
        for (index, page) in region.words_mut().chunks_exact_mut(PAGE_WORDS).enumerate() {
            page::write(page, FIRST_ID + index as u64, 0);
        }
        Ok(Self { region, updates: SharedCounter::create()? })
    }

    /// A copy of a page. Only under the lock: another process may be writing it.
    fn load(&self, index: usize) -> [u64; PAGE_WORDS] {
        let words = &self.region.atomics()[index * PAGE_WORDS..][..PAGE_WORDS];
        std::array::from_fn(|word| words[word].load(Ordering::Relaxed))
    }

    fn store(&self, index: usize, page: &[u64; PAGE_WORDS]) {
        let words = &self.region.atomics()[index * PAGE_WORDS..][..PAGE_WORDS];
        words.iter().zip(page).for_each(|(word, value)| word.store(*value, Ordering::Relaxed));
    }
}

/// One process's part in it, with private memory of what it saw: no page may ever go back.
pub(super) struct Share {
    common: Arc<Common>,
    seen: Vec<u64>,
    random: u64,
}

impl Share {
    /// A process that has seen nothing yet.
    pub(super) fn new(common: Arc<Common>, seed: u64) -> Self {
        Self { common, seen: vec![0; PAGES], random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    /// The page and its counter, which must not be older than what was seen.
    fn look(&self, index: usize) -> Result<([u64; PAGE_WORDS], u64), String> {
        let page = self.common.load(index);
        let (id, counter) = (FIRST_ID + index as u64, page[1]);
        page::verify(&page, id, counter)?;
        if counter < self.seen[index] {
            return Err(format!("shared page {id:#x} went back from {} to {counter}", self.seen[index]));
        }
        Ok((page, counter))
    }
}

impl Memory for Share {
    fn pages(&self) -> usize {
        PAGES
    }

    fn update(&mut self) -> Result<(), String> {
        self.random = xorshift(self.random);
        let index = (self.random >> 8) as usize % PAGES;
        let common = Arc::clone(&self.common);
        let written = common.updates.with_lock(|updates| {
            let (mut page, counter) = self.look(index)?;
            page::write(&mut page, FIRST_ID + index as u64, counter + 1);
            common.store(index, &page);
            *updates += 1;
            Ok::<u64, String>(counter + 1)
        });
        self.seen[index] = written.map_err(|error| format!("lock the shared pages: {error}"))??;
        Ok(())
    }

    fn verify(&self) -> Vec<String> {
        let looked = self.common.updates.with_lock(|updates| {
            let (mut failures, mut sum) = (Vec::new(), 0);
            for index in 0..PAGES {
                match self.look(index) {
                    Ok((_, counter)) => sum += counter,
                    Err(failure) => failures.push(failure),
                }
            }
            if failures.is_empty() && sum != *updates {
                failures.push(format!("shared pages count {sum} updates of {updates}"));
            }
            failures
        });
        looked.unwrap_or_else(|error| vec![format!("lock the shared pages: {error}")])
    }
}
