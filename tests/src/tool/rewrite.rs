//! Memory that is written from its beginning to its end, over and over, at a steady pace.

use std::io::Write;
use std::time::{Duration, Instant};

use clap::Args;

use super::idle::xorshift;
use super::{report, sys};

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// How much
    #[arg(long)]
    mib: usize,
    /// Pages a second
    #[arg(long)]
    rate: f64,
}

/// How often it is told how many pages were written.
const TOLD_EVERY: Duration = Duration::from_millis(100);
/// Work that was missed for longer than this, because the process was away, is not made up for.
const CATCH_UP: Duration = Duration::from_millis(5);

/// Prints `ready` once all is written, and then each 100 ms the time, in milliseconds since 1970, and the pages written since. Their content
/// does not compress.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    sys::signal::stop_on_terminate()?;
    let mut memory = sys::mem::Region::anonymous(options.mib << 20, sys::mem::Sharing::Private)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut fill = |page: &mut [u64]| {
        for word in page {
            state = xorshift(state);
            *word = state;
        }
    };
    memory.words_mut().chunks_mut(sys::mem::PAGE_WORDS).for_each(&mut fill);
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    let page_time = Duration::from_secs_f64(1.0 / options.rate);
    let (mut due, mut told, mut pages) = (Instant::now(), Instant::now(), 0u64);
    while !sys::signal::stop_requested() {
        for page in memory.words_mut().chunks_mut(sys::mem::PAGE_WORDS) {
            fill(page);
            pages += 1;
            due += page_time;
            let now = Instant::now();
            if due + CATCH_UP < now {
                due = now;
            }
            if due > now + Duration::from_millis(1) {
                std::thread::sleep(due - now);
            }
            if told.elapsed() >= TOLD_EVERY {
                writeln!(out, "{} {pages}", report::unix_ms())?;
                (told, pages) = (Instant::now(), 0);
            }
        }
    }
    Ok(true)
}
