//! Memory that nobody touches again.

use clap::Args;

use super::sys;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// How much to fill
    #[arg(long)]
    mib: usize,
    /// Fill with pseudo-random words, which do not compress, instead of one constant
    #[arg(long)]
    random: bool,
}

/// Fills, prints `ready`, and sleeps until a signal ends the process.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let mut memory = sys::mem::Region::anonymous(options.mib << 20, sys::mem::Sharing::Private)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in memory.words_mut() {
        if options.random {
            state = xorshift(state);
        }
        *word = state;
    }
    sys::signal::stop_on_terminate()?;
    println!("ready");
    while !sys::signal::stop_requested() {
        nix::unistd::pause();
    }
    drop(memory);
    Ok(true)
}

/// One step of Marsaglia's xorshift64; `state` must not be 0.
pub(crate) fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ (state << 17)
}
