//! A writer's memory: pages, and how often each of them was written.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::page;
use super::process::Memory;
use crate::tool::idle::xorshift;
use crate::tool::sys::mem::{self, PAGE, PAGE_WORDS, Region, Sharing};

/// What kind of memory a slice is made of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Private and anonymous.
    Private,
    /// The same, with transparent huge pages asked for.
    Huge,
    /// Anonymous and shared.
    Shared,
    /// A mapped memfd.
    Memfd,
    /// Own pages over those of a file.
    File,
    /// Private, anonymous and locked in memory.
    Locked,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Private, Self::Huge, Self::Shared, Self::Memfd, Self::File, Self::Locked];

    /// The kinds in turn.
    pub(super) fn nth(index: usize) -> Self {
        Self::ALL[index % Self::ALL.len()]
    }

    /// Whether writes of a forked child are its own.
    pub(super) fn is_private(self) -> bool {
        !matches!(self, Self::Shared | Self::Memfd)
    }

    /// Whether a discarded page reads as zeroes: shared memory keeps its content, locked memory can't be discarded.
    pub(super) fn can_discard(self) -> bool {
        self.is_private() && !matches!(self, Self::Locked)
    }

    /// Maps memory of this kind, zeroes or what the file at `path` holds.
    pub(super) fn map(self, length: usize, path: &Path) -> anyhow::Result<Region> {
        Ok(match self {
            Self::Private => Region::anonymous(length, Sharing::Private)?,
            Self::Shared => Region::anonymous(length, Sharing::Shared)?,
            Self::Huge => {
                let region = Region::anonymous(length, Sharing::Private)?;
                // A kernel without huge pages refuses; the memory is as good without them.
                let _ = region.advise(libc::MADV_HUGEPAGE);
                region
            }
            Self::Memfd => {
                let file = File::from(mem::memfd(c"memcheck")?);
                file.set_len(length.next_multiple_of(PAGE) as u64)?;
                Region::file(file.as_fd(), length, Sharing::Shared)?
            }
            Self::File => Region::file(backing(path, length)?.as_fd(), length, Sharing::Private)?,
            Self::Locked => {
                let region = Region::anonymous(length, Sharing::Private)?;
                region.lock().context("lock memory (RLIMIT_MEMLOCK must allow it)")?;
                region
            }
        })
    }
}

/// A file for private mappings, which is never removed: mapped files that are gone are another subject.
pub(super) fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("memcheck-{name}"))
}

fn backing(path: &Path, length: usize) -> anyhow::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    file.set_len(length.next_multiple_of(PAGE) as u64)?;
    Ok(file)
}

/// Maps pages of this kind in their first state. Those of a file are the file's own until they are written.
fn first_state(kind: Kind, pages: usize, first_id: u64) -> anyhow::Result<Region> {
    let (length, path) = (pages * PAGE, path(&format!("{first_id:x}")));
    if matches!(kind, Kind::File) {
        fill(&mut Region::file(backing(&path, length)?.as_fd(), length, Sharing::Shared)?, first_id);
        return kind.map(length, &path);
    }
    let mut region = kind.map(length, &path)?;
    fill(&mut region, first_id);
    Ok(region)
}

fn fill(region: &mut Region, first_id: u64) {
    for (index, page) in region.words_mut().chunks_exact_mut(PAGE_WORDS).enumerate() {
        page::write(page, first_id + index as u64, 0);
    }
}

/// Pages with their counters.
pub(super) struct Slice {
    region: Region,
    first_id: u64,
    counters: Vec<u64>,
    updates: u64,
    random: u64,
}

impl Slice {
    /// Maps and writes `pages` pages; their ids begin at `first_id`.
    pub(super) fn create(kind: Kind, pages: usize, first_id: u64, seed: u64) -> anyhow::Result<Self> {
        let region = first_state(kind, pages, first_id)?;
        let random = (seed ^ first_id).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Ok(Self { region, first_id, counters: vec![0; pages], updates: 0, random })
    }
}

impl Memory for Slice {
    fn pages(&self) -> usize {
        self.counters.len()
    }

    /// Verifies a page that chance chooses, and writes its next state. Half of the writes go to an eighth of the pages.
    fn update(&mut self) -> Result<(), String> {
        self.random = xorshift(self.random);
        let among = if self.random & 1 == 0 { self.pages() } else { self.pages().div_ceil(8) };
        let index = (self.random >> 8) as usize % among;
        let id = self.first_id + index as u64;
        let page = &mut self.region.words_mut()[index * PAGE_WORDS..][..PAGE_WORDS];
        page::verify(page, id, self.counters[index])?;
        self.counters[index] += 1;
        self.updates += 1;
        page::write(page, id, self.counters[index]);
        Ok(())
    }

    /// Verifies all pages, and that the counters add up.
    fn verify(&self) -> Vec<String> {
        let pages = self.region.words().chunks_exact(PAGE_WORDS).zip(&self.counters).enumerate();
        let wrong = pages
            .filter_map(|(index, (page, counter))| page::verify(page, self.first_id + index as u64, *counter).err());
        let mut failures: Vec<String> = wrong.collect();
        let sum: u64 = self.counters.iter().sum();
        if sum != self.updates {
            failures.push(format!("slice {:#x} counts {sum} updates of {}", self.first_id, self.updates));
        }
        failures
    }
}
