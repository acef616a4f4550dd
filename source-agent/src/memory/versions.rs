//! Delta encoding: what was sent of pages before, so that only what has changed in them needs to travel.
//!
//! It costs a copy of every page that is remembered, and is done only where the link sets the pace. The memory for it is bounded;
//! pages that found no room are sent whole.

use std::collections::HashMap;

use longhaul_common::sys::memory::PAGE;

use super::sent::Place;

const PAGE_BYTES: usize = PAGE as usize;
/// The part of the host's free memory that may be taken for it, over all streams of a migration.
const PART: u64 = 8;
/// The most, in bytes: beyond that a container's working set is not what is sent again and again.
const MOST: u64 = 1 << 30;
/// A page of which more than this part of its words has changed is sent whole: it would not pack better.
const WORTH: usize = PAGE_BYTES / 8 / 2;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Versions {
    pages: HashMap<Place, Box<[u8; PAGE_BYTES]>>,
    most: usize,
}

impl Versions {
    /// For one of so many streams.
    pub(super) fn new(streams: u32) -> Self {
        let bytes = (free_memory() / PART).min(MOST) / u64::from(streams.max(1));
        Self { pages: HashMap::new(), most: (bytes / PAGE) as usize }
    }

    /// Turns a page into its difference from what was sent last, if that is known and worth it, and remembers the page. Whether it
    /// did.
    pub(super) fn difference(&mut self, place: Place, page: &mut [u8]) -> bool {
        let has_room = self.pages.len() < self.most;
        let Some(known) = self.pages.get_mut(&place) else {
            if has_room && let Ok(page) = <&[u8; PAGE_BYTES]>::try_from(&*page) {
                self.pages.insert(place, Box::new(*page));
            }
            return false;
        };
        let words =
            |bytes: &[u8]| bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect::<Vec<_>>();
        let (old, new) = (words(&known[..]), words(page));
        let changed = old.iter().zip(&new).filter(|(old, new)| old != new).count();
        known.copy_from_slice(page);
        if changed > WORTH {
            return false;
        }
        for (bytes, (old, new)) in page.as_chunks_mut::<8>().0.iter_mut().zip(old.iter().zip(&new)) {
            *bytes = (old ^ new).to_ne_bytes();
        }
        true
    }

    /// What is there now was sent in another way.
    pub(super) fn forget(&mut self, place: Place) {
        if !self.pages.is_empty() {
            self.pages.remove(&place);
        }
    }

    /// An address space has ended.
    pub(super) fn forget_space(&mut self, space: u32) {
        self.pages.retain(|(of, _), _| *of != space);
    }

    /// Its pages from this one on are not what was sent any more.
    pub(super) fn forget_from(&mut self, space: u32, first: u64) {
        self.pages.retain(|(of, page), _| *of != space || *page < first);
    }

    /// The link does not set the pace any more.
    pub(super) fn clear(&mut self) {
        self.pages = HashMap::new();
    }

    /// Whether nothing is remembered.
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// Memory that could be had without swapping, in bytes (proc_meminfo(5)).
fn free_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_has_hardly_changed_becomes_its_difference() {
        let mut versions = Versions::new(1);
        let first: Vec<u8> = (0..PAGE_BYTES).map(|index| index as u8).collect();
        let mut sent = first.clone();
        assert!(!versions.difference((1, 7), &mut sent) && sent == first);
        let mut second = first.clone();
        second[100] = 0xff;
        let mut sent = second.clone();
        assert!(versions.difference((1, 7), &mut sent));
        assert_eq!(sent.iter().filter(|byte| **byte != 0).count(), 1);
        let restored: Vec<u8> = first.iter().zip(&sent).map(|(old, xor)| old ^ xor).collect();
        assert_eq!(restored, second);
        // All of it has changed: it is sent whole, and known from then on.
        let third: Vec<u8> = second.iter().map(|byte| !byte).collect();
        let mut sent = third.clone();
        assert!(!versions.difference((1, 7), &mut sent) && sent == third);
        assert!(versions.difference((1, 7), &mut sent) && sent.iter().all(|byte| *byte == 0));
        versions.forget((1, 7));
        assert!(!versions.difference((1, 7), &mut third.clone()));
        versions.forget_space(1);
        assert!(versions.is_empty());
    }

    #[test]
    fn what_finds_no_room_is_sent_whole() {
        let mut versions = Versions { most: 1, ..Versions::default() };
        let page = vec![1; PAGE_BYTES];
        for place in [(1, 1), (1, 2), (1, 2)] {
            assert!(!versions.difference(place, &mut page.clone()));
        }
        assert!(versions.difference((1, 1), &mut page.clone()));
    }
}
