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
    /// Fill with lines of JSON that differ in their numbers, as caches and logs do
    #[arg(long, conflicts_with = "random")]
    text: bool,
}

/// Fills, prints `ready`, and sleeps until a signal ends the process.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let mut memory = sys::mem::Region::anonymous(options.mib << 20, sys::mem::Sharing::Private)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut text = Vec::new();
    for word in memory.words_mut() {
        if options.random || options.text {
            state = xorshift(state);
        }
        *word = if options.text { next_word(&mut text, state) } else { state };
    }
    sys::signal::stop_on_terminate()?;
    println!("ready");
    while !sys::signal::stop_requested() {
        nix::unistd::pause();
    }
    drop(memory);
    Ok(true)
}

/// The next 8 bytes of the text; a new line is made of `state` when there are not so many left.
fn next_word(text: &mut Vec<u8>, state: u64) -> u64 {
    if text.len() < 8 {
        let (id, other, third) = (state % 1_000_000, (state >> 20) % 1000, state >> 44);
        let line = format!(
            "{{\"id\":{id},\"user\":\"user-{other}\",\"created\":\"2026-11-{:02}T{:02}:{:02}:00Z\",\"status\":\"active\",\
             \"path\":\"/api/v2/items/{third}\",\"latency_ms\":{}}}\n",
            state % 30 + 1,
            state % 24,
            state % 60,
            other % 300
        );
        text.extend(line.bytes());
    }
    let word: Vec<u8> = text.drain(..8).collect();
    word.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// One step of Marsaglia's xorshift64; `state` must not be 0.
pub(crate) fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ (state << 17)
}
