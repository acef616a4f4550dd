//! What the destination has, as far as it is remembered: so that equal pages travel once, and pages that were written with what
//! was there before not at all.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};

use longhaul_common::pages::What;
use xxhash_rust::xxh3::xxh3_128_with_secret;

/// Pages whose content is remembered: 8 GiB of them, at some 70 bytes each. What comes after is sent without.
const REMEMBERED: usize = 2 << 20;
/// Bytes of xxh3's own secret.
const SECRET: usize = 192;
/// Pages of one table: those of a huge page.
const TABLE: u64 = 512;
/// In a table: not remembered. No hash of a page is this one, but by a chance of 1 in 2¹²⁸.
const UNKNOWN: u128 = u128::MAX;
/// The hash of a page of zeroes: it needs no search.
const ZERO: u128 = 0;

/// Where content was sent to: address space and page number.
pub(super) type Place = (u32, u64);

/// See the module.
pub(super) struct Sent {
    /// Drawn for each migration. Otherwise one task of the container could make a page that is taken for another task's:
    /// xxh3 keeps no secret without it. (From a seed, one like it would be made for every page.)
    secret: [u8; SECRET],
    /// Where the destination has this content.
    places: HashMap<u128, Place, BuildHasherDefault<Uniform>>,
    /// The content of places, by address space and page number divided by [`TABLE`].
    contents: HashMap<(u32, u64), Box<[u128; TABLE as usize]>>,
    remembered: usize,
}

impl Default for Sent {
    fn default() -> Self {
        // The standard library's hasher is keyed by the system's randomness.
        let random = RandomState::new();
        let mut secret = [0; SECRET];
        for (index, eight) in secret.chunks_exact_mut(8).enumerate() {
            eight.copy_from_slice(&random.hash_one(index).to_ne_bytes());
        }
        Self { secret, places: HashMap::default(), contents: HashMap::new(), remembered: 0 }
    }
}

impl Sent {
    /// What has to be said of a page; nothing if the destination has it as it is.
    pub(super) fn look(&mut self, place: Place, page: &[u8]) -> Option<What> {
        let hash = if is_zero(page) { ZERO } else { xxh3_128_with_secret(page, &self.secret) };
        let known = self.content(place);
        if known == hash && hash != UNKNOWN {
            return None;
        }
        let what = if hash == ZERO {
            What::Zero
        } else {
            match self.places.get(&hash) {
                // It may have been overwritten since.
                Some(other) if self.content(*other) == hash => What::Same { space: other.0, page: other.1 },
                _ => What::Data,
            }
        };
        if known != UNKNOWN || self.remembered < REMEMBERED {
            self.remembered += usize::from(known == UNKNOWN);
            let table = self.contents.entry((place.0, place.1 / TABLE));
            table.or_insert_with(|| Box::new([UNKNOWN; TABLE as usize]))[(place.1 % TABLE) as usize] = hash;
            if what == What::Data {
                self.places.insert(hash, place);
            }
        }
        Some(what)
    }

    /// An address space has ended, and the destination has nothing of it any more.
    pub(super) fn forget(&mut self, space: u32) {
        for (_, table) in self.contents.extract_if(|(of, _), _| *of == space) {
            self.remembered -= table.iter().filter(|hash| **hash != UNKNOWN).count();
        }
        // What refers to it is found wrong when it is looked up, and is replaced then.
    }

    /// Nothing is known any more of an address space's pages from this one on.
    pub(super) fn forget_from(&mut self, space: u32, first: u64) {
        for ((_, table), contents) in
            self.contents.iter_mut().filter(|((of, table), _)| *of == space && (table + 1) * TABLE > first)
        {
            let from = first.saturating_sub(table * TABLE) as usize;
            for hash in &mut contents[from..] {
                self.remembered -= usize::from(*hash != UNKNOWN);
                *hash = UNKNOWN;
            }
        }
    }

    fn content(&self, (space, page): Place) -> u128 {
        self.contents.get(&(space, page / TABLE)).map_or(UNKNOWN, |table| table[(page % TABLE) as usize])
    }
}

/// For keys that are hashes already.
#[derive(Default)]
struct Uniform(u64);

impl Hasher for Uniform {
    fn write(&mut self, bytes: &[u8]) {
        for eight in bytes.chunks_exact(8) {
            self.0 ^= u64::from_ne_bytes(eight.try_into().unwrap_or_default());
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

pub(super) fn is_zero(page: &[u8]) -> bool {
    // In pieces of 64 bytes, which the compiler compares with vector instructions.
    let (pieces, rest) = page.as_chunks::<64>();
    rest.is_empty() && pieces.iter().all(|piece| *piece == [0; 64])
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_BYTES: usize = longhaul_common::sys::memory::PAGE as usize;

    #[test]
    fn what_lies_behind_a_new_end_is_sent_again() {
        let mut sent = Sent::default();
        let page = vec![1; PAGE_BYTES];
        for number in [3, 4, 600] {
            sent.look((9, number), &page);
        }
        sent.forget_from(9, 4);
        assert_eq!(sent.look((9, 3), &page), None);
        assert_eq!(sent.look((9, 4), &page), Some(What::Same { space: 9, page: 3 }));
        assert!(sent.look((9, 600), &page).is_some());
    }

    #[test]
    fn equal_pages_are_sent_once_and_overwritten_ones_are_not_referred_to() {
        let mut sent = Sent::default();
        let (one, two) = (vec![1; PAGE_BYTES], vec![2; PAGE_BYTES]);
        assert_eq!(sent.look((1, 10), &one), Some(What::Data));
        assert_eq!(sent.look((1, 11), &one), Some(What::Same { space: 1, page: 10 }));
        assert_eq!(sent.look((1, 10), &one), None);
        assert_eq!(sent.look((1, 10), &two), Some(What::Data));
        // Page 10 is not as it was, so there is nothing to refer to.
        assert_eq!(sent.look((2, 5), &one), Some(What::Data));
        assert_eq!(sent.look((2, 6), &vec![0; PAGE_BYTES]), Some(What::Zero));
        assert_eq!(sent.look((2, 6), &vec![0; PAGE_BYTES]), None);
        sent.forget(2);
        assert_eq!(sent.look((2, 6), &vec![0; PAGE_BYTES]), Some(What::Zero));
        assert_eq!(sent.look((3, 7), &one), Some(What::Data));
    }
}
