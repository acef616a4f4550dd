//! A page that can tell whether it is the right one, and the newest.

use crate::tool::idle::xorshift;
use crate::tool::sys::mem::PAGE_WORDS;

/// Words before the content: id, counter, checksum.
const HEADER: usize = 3;

/// Fills a page with what `id` holds after `counter` updates.
pub(super) fn write(page: &mut [u64], id: u64, counter: u64) {
    let mut state = seed(id, counter);
    let mut sum = state;
    for word in &mut page[HEADER..] {
        state = xorshift(state);
        *word = state;
        sum = sum.rotate_left(5) ^ state;
    }
    (page[0], page[1], page[2]) = (id, counter, sum);
}

/// What is wrong with a page that should hold `id` after `counter` updates.
pub(super) fn verify(page: &[u64], id: u64, counter: u64) -> Result<(), String> {
    if page.len() != PAGE_WORDS {
        return Err(format!("page {id:#x} has {} words", page.len()));
    }
    if (page[0], page[1]) != (id, counter) {
        return Err(format!("page {id:#x} should be at {counter}; there is page {:#x} at {}", page[0], page[1]));
    }
    if !is_right(page, id, counter) {
        return Err(format!("page {id:#x} at {counter} has a wrong checksum"));
    }
    Ok(())
}

/// The same without words: it allocates nothing, for forked children.
pub(super) fn is_right(page: &[u64], id: u64, counter: u64) -> bool {
    let sum = page[HEADER..].iter().fold(seed(id, counter), |sum, word| sum.rotate_left(5) ^ word);
    page[..HEADER] == [id, counter, sum]
}

fn seed(id: u64, counter: u64) -> u64 {
    (id << 24 ^ counter).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

#[cfg(test)]
mod tests {
    use super::{verify, write};
    use crate::tool::sys::mem::PAGE_WORDS;

    #[test]
    fn a_page_is_right_only_with_its_id_counter_and_content() {
        let mut page = [0; PAGE_WORDS];
        write(&mut page, 7, 3);
        assert_eq!(verify(&page, 7, 3), Ok(()));
        assert!(verify(&page, 8, 3).is_err(), "another page");
        assert!(verify(&page, 7, 4).is_err(), "a stale page");
        page[PAGE_WORDS - 1] ^= 1 << 40;
        assert!(verify(&page, 7, 3).is_err(), "a flipped bit");
    }
}
