//! One of each kind of memory, filled once and left alone: what is compared byte by byte before and after a move.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::idle::xorshift;
use super::sys;
use super::sys::mem::{self, HUGE_PAGE, PAGE, PAGE_WORDS, Region, Sharing};

/// Each kind has this much: more than a huge page.
const LENGTH: usize = 3 << 20;
/// Memory that is locked or in huge pages: the default limit of the first is 8 MiB, and the second is scarce.
const HUGE_PAGES: usize = 2;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Decides all content
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The file of which private pages are written
    #[arg(long, default_value = "/tmp/varied-memory")]
    file: PathBuf,
}

/// Makes the memory, forks a child that changes some of its copy, prints a line with `ready`, and sleeps in one system
/// call until a signal ends the process.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    sys::signal::stop_on_terminate()?;
    let mut content = Content(options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut kept = writable(options, &mut content)?;
    let unwritable = unwritable(&mut content)?;
    let mut heap = mem::BreakMemory::take(LENGTH).context("take heap")?;
    content.fill(heap.words_mut());
    let skipped = match Region::huge_pages(HUGE_PAGES) {
        Ok(region) => {
            kept.push(content.filled(region));
            None
        }
        Err(error) => Some(format!("{HUGE_PAGES} huge pages of {HUGE_PAGE} bytes: {error}")),
    };
    let mut copied = content.filled(Region::anonymous(LENGTH, Sharing::Private)?);
    let child = sys::process::fork(|| {
        let alone = sys::process::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).is_err();
        for page in copied.words_mut().chunks_exact_mut(PAGE_WORDS).step_by(3) {
            content.fill(page);
        }
        if !alone {
            sleep();
        }
        0
    })?;
    println!(
        "{}",
        json!({"ready": true, "child": child, "mappings": kept.len() + unwritable.len(), "skipped": skipped})
    );
    sleep();
    Ok(true)
}

fn sleep() {
    while !sys::signal::stop_requested() {
        nix::unistd::pause();
    }
}

/// Pseudo-random words that go on from one mapping to the next.
struct Content(u64);

impl Content {
    fn fill(&mut self, words: &mut [u64]) {
        for word in words {
            self.0 = xorshift(self.0);
            *word = self.0;
        }
    }

    fn filled(&mut self, mut region: Region) -> Region {
        self.fill(region.words_mut());
        region
    }
}

/// Memory that stays readable and writable.
fn writable(options: &Options, content: &mut Content) -> anyhow::Result<Vec<Region>> {
    let private = || Region::anonymous(LENGTH, Sharing::Private);
    let advised = |advice| private().and_then(|region| region.advise(advice).map(|()| region));
    let memfd = File::from(mem::memfd(c"varied")?);
    memfd.set_len(LENGTH as u64)?;
    let locked = private()?;
    locked.lock().context("lock memory")?;
    let empty = [
        private()?,
        // A kernel without huge pages refuses.
        advised(libc::MADV_HUGEPAGE).or_else(|_| private())?,
        locked,
        Region::anonymous(LENGTH, Sharing::Shared)?,
        Region::file(memfd.as_fd(), LENGTH, Sharing::Shared)?,
        advised(libc::MADV_WIPEONFORK).context("advise to wipe on fork")?,
        advised(libc::MADV_DONTFORK).context("advise not to fork")?,
        Region::growing_down(LENGTH)?,
    ];
    let mut filled: Vec<Region> = empty.into_iter().map(|region| content.filled(region)).collect();
    filled.push(over_file(options, content)?);
    filled.push(with_holes(content)?);
    Ok(filled)
}

/// A file's pages, of which every second has become the process's own.
fn over_file(options: &Options, content: &mut Content) -> anyhow::Result<Region> {
    let path = &options.file;
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    file.set_len(LENGTH as u64)?;
    drop(content.filled(Region::file(file.as_fd(), LENGTH, Sharing::Shared)?));
    let mut region = Region::file(file.as_fd(), LENGTH, Sharing::Private)?;
    region.words_mut().chunks_exact_mut(PAGE_WORDS).step_by(2).for_each(|page| content.fill(page));
    Ok(region)
}

/// Pages with content, zeroes that were written, given up after they were written, and never touched, in turn.
fn with_holes(content: &mut Content) -> io::Result<Region> {
    let mut region = Region::anonymous(LENGTH, Sharing::Private)?;
    for (index, page) in region.words_mut().chunks_exact_mut(PAGE_WORDS).enumerate() {
        match index % 4 {
            0 | 2 => content.fill(page),
            1 => page.fill(0),
            _ => {}
        }
    }
    (2..LENGTH / PAGE).step_by(4).try_for_each(|index| region.discard_page(index))?;
    Ok(region)
}

/// Addresses of memory that was written and can't be any more.
fn unwritable(content: &mut Content) -> io::Result<[usize; 2]> {
    let mut filled = || Region::anonymous(LENGTH, Sharing::Private).map(|region| content.filled(region));
    Ok([filled()?.into_guard()?, filled()?.into_read_only()?])
}
