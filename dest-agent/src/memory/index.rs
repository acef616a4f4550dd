//! Where each page of an address space lies in the store: written once when all has arrived, read by the filler.
//!
//! ```text
//! u64 number of ranges | per range: u64 first page, u64 end | u32 slot for each page of the ranges, in order
//! ```

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// In place of a slot: the page is zero.
pub const ZERO: u32 = u32::MAX - 1;
/// Set in a slot that several pages share: it must stay until the last of them has it.
pub const SHARED: u32 = 1 << 31;

/// When pages must be in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Due {
    /// Some time after the container runs: the filler brings them.
    Later,
    /// Before it runs.
    AtOnce,
}

/// The index of one address space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    /// Ranges of page numbers, in order, each with where its slots begin in `slots`.
    pub ranges: Vec<(Range<u64>, usize)>,
    /// A slot for each page.
    pub slots: Vec<u32>,
}

impl Index {
    /// The file for an address space.
    pub fn path(dir: &Path, due: Due, space: u32) -> PathBuf {
        dir.join(format!("{}{space}", Self::prefix(due)))
    }

    /// All there are of one kind: address spaces and files.
    pub fn all(dir: &Path, due: Due) -> io::Result<Vec<(u32, PathBuf)>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(space) = name.to_str().and_then(|name| name.strip_prefix(Self::prefix(due))?.parse().ok()) {
                found.push((space, entry.path()));
            }
        }
        Ok(found)
    }

    fn prefix(due: Due) -> &'static str {
        match due {
            Due::Later => "space-",
            Due::AtOnce => "at-once-",
        }
    }

    /// Reads one.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(path)?;
        Self::parse(&bytes).ok_or_else(|| io::Error::other(format!("{} is damaged", path.display())))
    }

    /// Reads one's ranges alone: of a large address space the slots are megabytes.
    pub fn read_ranges(path: &Path) -> io::Result<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let mut eight = [0; 8];
        let mut next = || {
            file.read_exact(&mut eight)?;
            Ok::<u64, io::Error>(u64::from_le_bytes(eight))
        };
        let mut ranges = Vec::new();
        for _ in 0..next()? {
            ranges.push((next()?..next()?, 0));
        }
        Ok(Self { ranges, slots: Vec::new() })
    }

    /// Whether a page is in it.
    pub fn has(&self, page: u64) -> bool {
        let after = self.ranges.partition_point(|(range, _)| range.start <= page);
        after.checked_sub(1).and_then(|index| self.ranges.get(index)).is_some_and(|(range, _)| range.contains(&page))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (count, mut rest) = split_u64(bytes)?;
        let mut ranges = Vec::new();
        let mut pages = 0usize;
        for _ in 0..count {
            let (start, after) = split_u64(rest)?;
            let (end, after) = split_u64(after)?;
            rest = after;
            ranges.push((start..end, pages));
            pages = pages.checked_add(usize::try_from(end.checked_sub(start)?).ok()?)?;
        }
        if rest.len() != pages.checked_mul(4)? {
            return None;
        }
        let slots = rest.chunks_exact(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
        Some(Self { ranges, slots })
    }
}

/// Makes an index.
pub struct IndexWriter {
    bytes: Vec<u8>,
    head: usize,
}

impl IndexWriter {
    /// For these ranges, in order. A slot for each of their pages comes next.
    pub fn begin(ranges: &[Range<u64>]) -> Self {
        let head = 8 + 16 * ranges.len();
        let pages: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let mut bytes = Vec::with_capacity(head + usize::try_from(pages).unwrap_or(0).min(MOST_AT_ONCE) * 4);
        bytes.extend((ranges.len() as u64).to_le_bytes());
        bytes.extend(ranges.iter().flat_map(|range| [range.start, range.end]).flat_map(u64::to_le_bytes));
        Self { bytes, head }
    }

    /// The slot of the next page.
    pub fn push(&mut self, slot: u32) {
        self.bytes.extend_from_slice(&slot.to_le_bytes());
    }

    /// Writes it; how many pages it has.
    pub fn write(self, path: &Path) -> io::Result<u64> {
        std::fs::write(path, &self.bytes)?;
        Ok((self.bytes.len() - self.head) as u64 / 4)
    }
}

/// Pages that room is made for before they come: the ranges are a peer's word. 64 GiB.
const MOST_AT_ONCE: usize = 16 << 20;

fn split_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (eight, rest) = bytes.split_at_checked(8)?;
    Some((u64::from_le_bytes(eight.try_into().ok()?), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = IndexWriter::begin(&[5..7, 9..10]);
        [1, ZERO, 3 | SHARED].into_iter().for_each(|slot| writer.push(slot));
        let bytes = writer.bytes;
        let index = Index::parse(&bytes).expect("reads");
        assert_eq!(index.ranges, [(5..7, 0), (9..10, 2)]);
        assert_eq!(index.slots, [1, ZERO, 3 | SHARED]);
        assert!(index.has(6) && index.has(9) && !index.has(7) && !index.has(4));
        assert_eq!(Index::parse(&bytes[..bytes.len() - 1]), None);
        assert_eq!(Index::parse(b"short"), None);
    }
}
