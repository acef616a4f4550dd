//! Changes to the address space itself: map, unmap, move, discard, fork with copy on write.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use super::page;
use super::slice::{self, Kind};
use crate::tool::idle::xorshift;
use crate::tool::sys::mem::{PAGE, PAGE_WORDS, Region};
use crate::tool::sys::process;

/// Pages of a churned mapping: above 2 MiB, so that it can hold a huge page.
const PAGES: usize = 640;
/// How long a forked child shares memory with its parent, so that a freeze may find it.
const CHILD_LIFE: Duration = Duration::from_millis(50);
/// Ids of churned pages: apart from all ids of slices.
const FIRST_ID: u64 = 1 << 40;
/// Exit code of a child that found wrong memory.
const WRONG: i32 = 3;

/// One mapping that lives through several steps, and is then replaced.
pub(super) struct Churn {
    kind: usize,
    generation: u64,
    random: u64,
    region: Option<Region>,
    /// A file of zeroes.
    path: PathBuf,
}

impl Churn {
    /// Nothing is mapped yet; `seed` decides the order of what is done.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            kind: seed as usize,
            generation: 0,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            region: None,
            path: slice::path(&format!("churn-{seed:x}")),
        }
    }

    /// Does one step and verifies what it left.
    pub(super) fn step(&mut self) -> anyhow::Result<Vec<String>> {
        self.random = xorshift(self.random);
        let Some(mut region) = self.region.take() else {
            self.generation += 1;
            self.kind += 1;
            let mut region = Kind::nth(self.kind).map(PAGES * PAGE, &self.path)?;
            fill(&mut region, self.generation);
            self.region = Some(region);
            return Ok(Vec::new());
        };
        let mut failures = wrong_pages(&region, self.generation, PAGES);
        match self.random >> 20 & 3 {
            0 => return Ok(failures),
            1 => failures.extend(stretch(&mut region, self.generation)?),
            2 => failures.extend(copy_on_write(&mut region, self.generation, self.kind)?),
            _ => failures.extend(discard(&mut region, self.kind)?),
        }
        let kind = Kind::nth(self.kind);
        failures.iter_mut().for_each(|failure| failure.push_str(&format!(" (churned, {kind:?})")));
        fill(&mut region, self.generation);
        self.region = Some(region);
        Ok(failures)
    }
}

fn fill(region: &mut Region, generation: u64) {
    for (index, page) in region.words_mut().chunks_exact_mut(PAGE_WORDS).take(PAGES).enumerate() {
        page::write(page, FIRST_ID + index as u64, generation);
    }
}

fn wrong_pages(region: &Region, generation: u64, pages: usize) -> Vec<String> {
    let pages = region.words().chunks_exact(PAGE_WORDS).take(pages).enumerate();
    pages.filter_map(|(index, page)| page::verify(page, FIRST_ID + index as u64, generation).err()).collect()
}

/// Shrinks the mapping to a part and grows it again, most likely at another place.
fn stretch(region: &mut Region, generation: u64) -> anyhow::Result<Vec<String>> {
    let part = PAGES / 3;
    let resize = |region: &mut Region, pages: usize| region.resize(NonZeroUsize::MIN.saturating_add(pages * PAGE - 1));
    resize(region, part)?;
    let mut failures = wrong_pages(region, generation, part);
    resize(region, PAGES)?;
    failures.extend(wrong_pages(region, generation, part));
    Ok(failures)
}

/// A child verifies what it inherited, writes to every second page and lives on for a while. The child only computes on
/// memory that it owns: its parent has other threads.
fn copy_on_write(region: &mut Region, generation: u64, kind: usize) -> anyhow::Result<Vec<String>> {
    if !Kind::nth(kind).is_private() {
        return Ok(Vec::new());
    }
    let right = |page: &[u64], index: usize, counter| page::is_right(page, FIRST_ID + index as u64, counter);
    let pid = process::fork(|| {
        let mut all_right = true;
        for (index, page) in region.words_mut().chunks_exact_mut(PAGE_WORDS).take(PAGES).enumerate() {
            all_right &= right(page, index, generation);
            if index % 2 == 0 {
                page::write(page, FIRST_ID + index as u64, !generation);
            }
        }
        std::thread::sleep(CHILD_LIFE);
        for (index, page) in region.words().chunks_exact(PAGE_WORDS).take(PAGES).enumerate() {
            all_right &= right(page, index, if index % 2 == 0 { !generation } else { generation });
        }
        if all_right { 0 } else { WRONG }
    })?;
    let mut failures = Vec::new();
    let code = process::wait(pid)?;
    if code != 0 {
        failures.push(format!("a forked child found wrong memory (exit code {code})"));
    }
    failures.extend(wrong_pages(region, generation, PAGES));
    Ok(failures)
}

/// Discards every third page of a private mapping, which splits huge pages: they read as zeroes.
fn discard(region: &mut Region, kind: usize) -> anyhow::Result<Vec<String>> {
    if !Kind::nth(kind).can_discard() {
        return Ok(Vec::new());
    }
    for index in (0..PAGES).step_by(3) {
        region.discard_page(index)?;
    }
    let pages = region.words().chunks_exact(PAGE_WORDS).take(PAGES).step_by(3);
    let dirty = pages.filter(|page| page.iter().any(|word| *word != 0)).count();
    Ok(if dirty == 0 { Vec::new() } else { vec![format!("{dirty} discarded pages are not zero")] })
}
