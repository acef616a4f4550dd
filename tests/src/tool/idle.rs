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
    /// Fill with different pages of words, as text and JSON are: they compress to about a quarter
    #[arg(long, conflicts_with = "random")]
    text: bool,
}

/// Words of the text.
const WORDS: [&[u8; 8]; 16] = [
    b"request ",
    b"status: ",
    b"\"name\": ",
    b"created ",
    b"at host ",
    b"error 50",
    b"user id ",
    b"2026-11-",
    b"payload ",
    b"version ",
    b"latency ",
    b"GET /api",
    b"session ",
    b"null, \n ",
    b"message ",
    b"timeout ",
];

/// Fills, prints `ready`, and sleeps until a signal ends the process.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let mut memory = sys::mem::Region::anonymous(options.mib << 20, sys::mem::Sharing::Private)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for (index, word) in memory.words_mut().iter_mut().enumerate() {
        if options.random || options.text {
            state = xorshift(state);
        }
        // Two words of the language, then one of digits.
        let known = WORDS[(state >> 60) as usize];
        *word = match options.text {
            true if index % 3 != 2 => u64::from_ne_bytes(*known),
            true => u64::from_ne_bytes(*known) ^ (state & 0x0f0f),
            false => state,
        };
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
