//! Deterministic content, different for each place and each generation.

use crate::tool::idle::xorshift;

/// The words that place `seed` holds in `generation`.
pub(super) fn words(seed: u64, generation: u64, count: usize) -> Vec<u64> {
    let mut state = (seed << 32 ^ generation).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state = xorshift(state);
        state
    })
    .take(count)
    .collect()
}

/// The same as bytes; `length` is a multiple of 8.
pub(super) fn bytes(seed: u64, generation: u64, length: usize) -> Vec<u8> {
    words(seed, generation, length / 8).into_iter().flat_map(u64::to_le_bytes).collect()
}
