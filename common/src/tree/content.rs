//! Reads a file's content: all of it, or only the blocks that differ from what was sent before.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use super::watch::UNIT;
use super::{BLOCK, MAX_DATA, sys};

/// The hash of a block without data, which no block with data is given.
const HOLE: u64 = 0;

/// What is sent in place of a block that has become a hole.
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// The most block hashes a scanner keeps: 64 MiB of memory, enough for 512 GiB of large files. A file
/// beyond that is sent whole when it changes.
const MAX_HASHES: usize = 8 * 1024 * 1024;

/// Counts the hashes that all files of one scanner hold.
#[derive(Clone, Default)]
pub(super) struct HashBudget(Arc<AtomicUsize>);

/// The destination's content of one file, block by block.
pub(super) struct BlockHashes {
    size: u64,
    hashes: Vec<u64>,
    /// What was counted of each [`UNIT`] before it was read; [`UNKNOWN`] if it may have been dirty then.
    counts: Vec<u64>,
    budget: HashBudget,
}

/// In place of a count.
const UNKNOWN: u64 = u64::MAX;
/// Blocks of a unit.
const UNIT_BLOCKS: usize = (UNIT as usize) / BLOCK;

impl HashBudget {
    /// Takes room for a file of `size` bytes, all hole.
    pub(super) fn take(&self, size: u64) -> Option<BlockHashes> {
        let count = usize::try_from(size.div_ceil(BLOCK as u64)).ok().filter(|count| *count <= MAX_HASHES)?;
        let taken = self.0.fetch_add(count, Ordering::Relaxed);
        if taken + count > MAX_HASHES {
            self.0.fetch_sub(count, Ordering::Relaxed);
            return None;
        }
        Some(BlockHashes { size, hashes: vec![HOLE; count], counts: Vec::new(), budget: self.clone() })
    }
}

impl BlockHashes {
    /// Whether a unit of a file of `size` bytes is as it was, by what is counted of it now.
    fn has_same(&self, unit: usize, size: u64, count: u64) -> bool {
        let end = (unit as u64 + 1) * UNIT;
        count != UNKNOWN
            && self.counts.get(unit) == Some(&count)
            && (end <= self.size.min(size) || self.size == size)
            // What is put in place of a hole may leave no trace in the page cache.
            && self.blocks_of(unit).is_some_and(|blocks| !blocks.contains(&HOLE))
    }

    /// Whether not all of it has to be read to find what has changed.
    pub(super) fn is_watched(&self) -> bool {
        !self.counts.is_empty()
    }

    fn blocks_of(&self, unit: usize) -> Option<&[u64]> {
        let first = unit * UNIT_BLOCKS;
        self.hashes.get(first..(first + UNIT_BLOCKS).min(self.hashes.len()))
    }

    /// Takes a unit over as it was.
    fn keep(&mut self, unit: usize, old: &Self) {
        let first = unit * UNIT_BLOCKS;
        let blocks = old.blocks_of(unit).unwrap_or_default();
        if let Some(own) = self.hashes.get_mut(first..first + blocks.len()) {
            own.copy_from_slice(blocks);
        }
        self.set_count(unit, old.counts.get(unit).copied().unwrap_or(UNKNOWN));
    }

    fn set_count(&mut self, unit: usize, count: u64) {
        if self.counts.len() <= unit {
            self.counts.resize(unit + 1, UNKNOWN);
        }
        self.counts[unit] = count;
    }
}

/// What is counted of the units of a file that is about to be read.
pub(super) struct Counts {
    /// Of each, before anything of it was looked at.
    pub(super) now: Vec<u64>,
    /// Nothing of it was dirty at some time after that.
    pub(super) was_clean: bool,
}

impl Drop for BlockHashes {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.hashes.len(), Ordering::Relaxed);
    }
}

/// Why a file's content could not be sent: it could not be read, or the receiver's error.
pub(super) enum ContentError<E> {
    Read(io::Error),
    Send(E),
}

/// Sends the content of `file`, `size` bytes long when its entry was sent.
///
/// With `old`, what the destination has, only the blocks that differ go; what has become a hole goes as zeros, which
/// needs `new`. What is not read, since it can't have changed by its `counts`, does not differ. The file may shrink meanwhile: what is gone stays a hole at the destination. `new` comes back as what
/// the destination has then, whatever has happened to the file.
pub(super) fn send<E>(
    file: &File,
    size: u64,
    old: Option<&BlockHashes>,
    mut new: Option<BlockHashes>,
    counts: Option<&Counts>,
    mut data: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<Option<BlockHashes>, ContentError<E>> {
    let mut buffer = vec![0; usize::try_from(size).unwrap_or(MAX_DATA).min(MAX_DATA)];
    let mut from = 0;
    let mut ended_early = None;
    let mut extents = Extents { file, size, known: (0, 0) };
    while let Some(first) = extents.next(from).map_err(ContentError::Read)? {
        let unit = usize::try_from(first.0 / UNIT).unwrap_or(usize::MAX);
        if let (Some(counts), Some(new)) = (counts, &mut new) {
            let count = counts.now.get(unit).copied().unwrap_or(UNKNOWN);
            if let Some(old) = old.filter(|old| old.has_same(unit, size, count)) {
                new.keep(unit, old);
                from = size.min((first.0 / UNIT + 1) * UNIT);
                continue;
            }
            new.set_count(unit, if counts.was_clean && ended_early != Some(unit) { count } else { UNKNOWN });
        }
        let window = Window::read(&mut extents, first, &mut buffer).map_err(ContentError::Read)?;
        let hashes = window.block_hashes();
        if let Some(new) = &mut new {
            if window.ended_early {
                // What was not in the page cache leaves no trace there when it changes.
                ended_early = Some(unit);
                new.set_count(unit, UNKNOWN);
            }
            new.hashes[window.first_block()..][..hashes.len()].copy_from_slice(&hashes);
        }
        let ranges = match old {
            Some(old) => window.changed(&hashes, old),
            None => window.data,
        };
        for range in ranges {
            data(window.start + range.start as u64, &window.bytes[range]).map_err(ContentError::Send)?;
        }
        from = window.end;
    }
    if let (Some(old), Some(new)) = (old, &new) {
        let became_holes = old.hashes.iter().zip(&new.hashes).enumerate();
        for (block, _) in became_holes.filter(|(_, (old, new))| **old != HOLE && **new == HOLE) {
            let start = (block * BLOCK) as u64;
            let len = usize::try_from(size - start).unwrap_or(BLOCK).min(BLOCK);
            data(start, &ZEROS[..len]).map_err(ContentError::Send)?;
        }
    }
    Ok(new)
}

/// Where a file has data. Each stretch is asked for once: a tmpfs finds the end of one by walking over all its pages.
struct Extents<'a> {
    file: &'a File,
    size: u64,
    known: (u64, u64),
}

impl Extents<'_> {
    /// The next stretch at or after `from`, where it begins and ends.
    fn next(&mut self, from: u64) -> io::Result<Option<(u64, u64)>> {
        if !(self.known.0..self.known.1).contains(&from) {
            let Some(found) = sys::next_data(self.file, from, self.size)? else { return Ok(None) };
            self.known = found;
        }
        Ok(Some((from.max(self.known.0), self.known.1)))
    }
}

/// An aligned part of a file that holds data, read into memory.
struct Window<'a> {
    start: u64,
    end: u64,
    bytes: &'a [u8],
    /// Where the data is in `bytes`.
    data: Vec<Range<usize>>,
    /// The file is shorter than it was.
    ended_early: bool,
}

impl<'a> Window<'a> {
    /// Reads the window in which the stretch of data `first` begins.
    fn read(extents: &mut Extents<'_>, first: (u64, u64), buffer: &'a mut [u8]) -> io::Result<Self> {
        let start = first.0 - first.0 % MAX_DATA as u64;
        let end = extents.size.min(start + MAX_DATA as u64);
        // Within the window, so both fit a usize.
        let offset = |position: u64| (position - start) as usize;
        let mut data = Vec::new();
        let mut next = Some(first);
        while let Some((from, to)) = next.filter(|(from, _)| *from < end) {
            data.push(offset(from)..offset(to.min(end)));
            next = if to < end { extents.next(to)? } else { None };
        }
        let bytes = &mut buffer[..offset(end)];
        let filled = read_up_to(extents.file, start, bytes)?;
        bytes[filled..].fill(0);
        data.retain_mut(|range| {
            range.end = range.end.min(filled);
            range.start < range.end
        });
        Ok(Self { start, end, bytes, data, ended_early: filled < offset(end) })
    }

    fn first_block(&self) -> usize {
        (self.start / BLOCK as u64) as usize
    }

    /// The hash of each block; [`HOLE`] for those without data.
    fn block_hashes(&self) -> Vec<u64> {
        let has_data = |block: usize| {
            let range = block * BLOCK..(block + 1) * BLOCK;
            self.data.iter().any(|data| data.start < range.end && range.start < data.end)
        };
        let hash = |(block, bytes)| {
            if has_data(block) { xxh3_64(bytes).max(1) } else { HOLE }
        };
        self.bytes.chunks(BLOCK).enumerate().map(hash).collect()
    }

    /// Where the blocks are that have data and differ from `old`, neighbours joined.
    fn changed(&self, hashes: &[u64], old: &BlockHashes) -> Vec<Range<usize>> {
        let mut changed: Vec<Range<usize>> = Vec::new();
        for (block, hash) in hashes.iter().enumerate() {
            if *hash == HOLE || old.hashes.get(self.first_block() + block) == Some(hash) {
                continue;
            }
            let range = block * BLOCK..self.bytes.len().min((block + 1) * BLOCK);
            match changed.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => changed.push(range),
            }
        }
        changed
    }
}

/// Fills `bytes` from `offset` on, as far as the file reaches.
fn read_up_to(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
