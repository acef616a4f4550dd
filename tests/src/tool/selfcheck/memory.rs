//! Private mappings and what is special about them.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, bail};

use super::pattern;
use super::suite::{same, same_content};
use crate::tool::sys::event;
use crate::tool::sys::mem::{self, BreakMemory, PAGE, PAGE_WORDS, Region, Sharing};

/// The size of the larger regions: a few hundred pages.
const LARGE: usize = 1 << 20;
/// What a small container may lock (RLIMIT_MEMLOCK is 64 KiB in old kernels).
const LOCKED: usize = 2 * PAGE;
/// How deep the stack grows: above the 128 KiB it has at first.
const STACK_FRAMES: u64 = 256;

/// Anonymous memory; one page of it changes each time, and every second page was never touched.
pub(super) fn anonymous() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut region = Region::anonymous(LARGE, Sharing::Private)?;
    let pages = LARGE / PAGE;
    let mut generations = vec![0; pages];
    for page in (0..pages).step_by(2) {
        let content = pattern::words(page as u64, 0, PAGE_WORDS);
        region.words_mut()[page * PAGE_WORDS..][..PAGE_WORDS].copy_from_slice(&content);
    }
    let mut next = 0;
    Ok(move || {
        for (page, generation) in generations.iter().enumerate() {
            let content = &region.words()[page * PAGE_WORDS..][..PAGE_WORDS];
            if page % 2 == 1 {
                same_content("an untouched page", content, &[0; PAGE_WORDS])?;
            } else {
                same_content("a page", content, &pattern::words(page as u64, *generation, PAGE_WORDS))?;
            }
        }
        next = (next + 2) % pages;
        generations[next] += 1;
        let content = pattern::words(next as u64, generations[next], PAGE_WORDS);
        region.words_mut()[next * PAGE_WORDS..][..PAGE_WORDS].copy_from_slice(&content);
        Ok(())
    })
}

/// A private file mapping of which half is modified: the file keeps its own content.
pub(super) fn private_file(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join("mapped-private");
    let original = pattern::bytes(40, 0, 8 * PAGE);
    fs::write(&path, &original)?;
    let mut region = Region::file(File::open(&path)?.as_fd(), 8 * PAGE, Sharing::Private)?;
    let mut generation = 1;
    let half = 4 * PAGE_WORDS;
    region.words_mut()[..half].copy_from_slice(&pattern::words(41, generation, half));
    Ok(move || {
        same_content("the modified half", &region.words()[..half], &pattern::words(41, generation, half))?;
        let rest = pattern::words(40, 0, 2 * half);
        same_content("the unmodified half", &region.words()[half..], &rest[half..])?;
        same_content("the file", &fs::read(&path)?, &original)?;
        generation += 1;
        region.words_mut()[..half].copy_from_slice(&pattern::words(41, generation, half));
        Ok(())
    })
}

/// A shared file mapping: what is stored is in the file.
pub(super) fn shared_file(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join("mapped-shared");
    fs::write(&path, pattern::bytes(42, 0, 4 * PAGE))?;
    let file = File::options().read(true).write(true).open(&path)?;
    let mut region = Region::file(file.as_fd(), 4 * PAGE, Sharing::Shared)?;
    let mut generation = 0;
    Ok(move || {
        same_content("the mapping", region.words(), &pattern::words(42, generation, 4 * PAGE_WORDS))?;
        same_content("the file", &fs::read(&path)?, &pattern::bytes(42, generation, 4 * PAGE))?;
        generation += 1;
        region.words_mut().copy_from_slice(&pattern::words(42, generation, 4 * PAGE_WORDS));
        Ok(())
    })
}

/// A sealed memfd, and one that is mapped and written.
pub(super) fn memfd() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let mut sealed = File::from(mem::memfd(c"sealed")?);
    let content = pattern::bytes(43, 0, 3 * PAGE);
    sealed.write_all(&content)?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    event::fcntl(sealed.as_fd(), libc::F_ADD_SEALS, seals)?;
    let mapped = File::from(mem::memfd(c"mapped")?);
    mapped.set_len(LARGE as u64)?;
    let mut region = Region::file(mapped.as_fd(), LARGE, Sharing::Shared)?;
    let mut generation = 0;
    region.words_mut().copy_from_slice(&pattern::words(44, generation, LARGE / 8));
    Ok(move || {
        same("the seals", &event::fcntl(sealed.as_fd(), libc::F_GET_SEALS, 0)?, &seals)?;
        same("may a sealed file be written, which", &sealed.write(b"x").is_ok(), &false)?;
        let mut now = Vec::new();
        sealed.seek(SeekFrom::Start(0))?;
        sealed.read_to_end(&mut now)?;
        same_content("the sealed content", &now, &content)?;
        same_content("the mapped content", region.words(), &pattern::words(44, generation, LARGE / 8))?;
        same("the length", &mapped.metadata()?.len(), &(LARGE as u64))?;
        generation += 1;
        region.words_mut().copy_from_slice(&pattern::words(44, generation, LARGE / 8));
        Ok(())
    })
}

/// Regions whose flags are the point: a guard without access, locked pages, no inheritance, no core dump.
pub(super) fn flags() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let guard = Region::anonymous(4 * PAGE, Sharing::Private)?.into_guard()?;
    let mut regions = Vec::new();
    for (index, advice) in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP, libc::MADV_WIPEONFORK].into_iter().enumerate() {
        let region = Region::anonymous(4 * PAGE, Sharing::Private)?;
        region.advise(advice)?;
        regions.push((region, ["dc", "dd", "wf"][index], index as u64 + 50));
    }
    let locked = Region::anonymous(LOCKED, Sharing::Private)?;
    locked.lock()?;
    regions.push((locked, "lo", 54));
    for (region, _, seed) in &mut regions {
        let content = pattern::words(*seed, 0, region.len() / 8);
        region.words_mut().copy_from_slice(&content);
    }
    Ok(move || {
        let map = fs::read_to_string("/proc/self/smaps")?;
        let guard_line = map_line(&map, guard).context("the guard is gone")?;
        same("is the guard without access, which", &guard_line.contains(" ---p "), &true)?;
        for (region, flag, seed) in &regions {
            let wanted = pattern::words(*seed, 0, region.len() / 8);
            same_content("the content", region.words(), &wanted)?;
            let Some(flags) = flags_at(&map, region.address()) else { bail!("the region with flag {flag} is gone") };
            same(&format!("has {flags:?} the flag {flag}, which"), &flags.split(' ').any(|f| f == *flag), &true)?;
        }
        Ok(())
    })
}

/// Pages that nobody may touch, within memory with and without content, private and shared; one of them moves at each verification.
pub(super) fn guards() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    const PAGES: usize = 8;
    /// The last two have no content, and the very last is a guard for good.
    const FILLED: usize = PAGES - 2;
    struct Guarded {
        region: Region,
        is_private: bool,
        /// What was written to each page, if it has content.
        content: Vec<Option<Vec<u64>>>,
        guard: usize,
    }
    impl Guarded {
        fn install(&mut self) -> std::io::Result<()> {
            if self.is_private {
                self.content[self.guard] = None;
            }
            self.region.guard_page(self.guard)
        }
    }
    let mut all = Vec::new();
    for (sharing, seed) in [(Sharing::Private, 70), (Sharing::Shared, 80)] {
        let mut region = Region::anonymous(PAGES * PAGE, sharing)?;
        let content: Vec<_> =
            (0..PAGES).map(|page| (page < FILLED).then(|| pattern::words(seed + page as u64, 0, PAGE_WORDS))).collect();
        for (page, words) in content.iter().enumerate() {
            let Some(words) = words else { continue };
            region.words_mut()[page * PAGE_WORDS..][..PAGE_WORDS].copy_from_slice(words);
        }
        match region.guard_page(PAGES - 1) {
            // This kernel has none, or none in shared memory.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
            done => done?,
        }
        let mut guarded = Guarded { region, is_private: seed == 70, content, guard: 2 };
        guarded.install()?;
        all.push(guarded);
    }
    let mut generation = 0;
    Ok(move || {
        generation += 1;
        for guarded in &mut all {
            let kind = if guarded.is_private { "private" } else { "shared" };
            for page in 0..PAGES {
                let now = guarded.region.read_page(page);
                if page == guarded.guard || page == PAGES - 1 {
                    same(&format!("can {kind} guard {page} be read, which"), &now.is_ok(), &false)?;
                    continue;
                }
                let wanted = guarded.content[page].clone().unwrap_or_else(|| vec![0; PAGE_WORDS]);
                same_content(&format!("{kind} page {page}"), &now.context("a page beside a guard")?, &wanted)?;
            }
            let page = guarded.guard;
            guarded.region.unguard_page(page)?;
            let wanted = guarded.content[page].clone().unwrap_or_else(|| vec![0; PAGE_WORDS]);
            same_content(&format!("{kind} page {page} behind the guard"), &guarded.region.read_page(page)?, &wanted)?;
            let words = pattern::words(page as u64, generation, PAGE_WORDS);
            guarded.region.words_mut()[page * PAGE_WORDS..][..PAGE_WORDS].copy_from_slice(&words);
            guarded.content[page] = Some(words);
            guarded.guard = (page + 1) % FILLED;
            guarded.install()?;
        }
        Ok(())
    })
}

/// The line of the mapping that contains `address`.
fn map_line(map: &str, address: usize) -> Option<&str> {
    map.lines().find(|line| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        range.is_some_and(|(start, end)| {
            let number = |hex| usize::from_str_radix(hex, 16).unwrap_or(0);
            (number(start)..number(end)).contains(&address)
        })
    })
}

/// The flags of the mapping that contains `address`.
fn flags_at(map: &str, address: usize) -> Option<&str> {
    let line = map_line(map, address)?;
    let (_, after) = map.split_once(line)?;
    after.lines().find_map(|line| line.strip_prefix("VmFlags: "))
}

/// Memory from the program break, from the allocator, and a mapping that moves at each verification.
pub(super) fn heap() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    const WORDS: usize = 16 * PAGE_WORDS;
    let mut from_break = BreakMemory::take(WORDS * 8)?;
    from_break.words_mut().copy_from_slice(&pattern::words(60, 0, WORDS));
    let allocated = pattern::words(61, 0, WORDS);
    let mut moving = Region::anonymous(WORDS * 8, Sharing::Private)?;
    moving.words_mut().copy_from_slice(&pattern::words(62, 0, WORDS));
    let mut large = false;
    Ok(move || {
        same("does the break lie above its memory, which", &from_break.is_below_break(), &true)?;
        same_content("memory from the break", from_break.words_mut(), &pattern::words(60, 0, WORDS))?;
        same_content("allocated memory", &allocated, &pattern::words(61, 0, WORDS))?;
        same_content("the moving mapping", &moving.words()[..WORDS], &pattern::words(62, 0, WORDS))?;
        large = !large;
        let length = if large { 64 * PAGE } else { 16 * PAGE };
        Ok(moving.resize(NonZeroUsize::new(length).context("a length")?)?)
    })
}

/// The stack must still grow, and keep what lies on it.
pub(super) fn stack() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    #[inline(never)]
    fn descend(depth: u64) -> u64 {
        let frame = std::hint::black_box([depth; 256]);
        let below = if depth == 0 { 0 } else { descend(depth - 1) };
        below + frame.iter().sum::<u64>() / 256
    }
    Ok(|| same("the sum over all frames", &descend(STACK_FRAMES), &(STACK_FRAMES * (STACK_FRAMES + 1) / 2)))
}
