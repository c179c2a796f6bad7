//! The bits of the bytes of a mark.

use crate::PAGE_LG2;

/// The bits of a mark.
pub(super) enum Masks {
    /// The bits of the mask in this word.
    One(usize, u64),
    /// Bits in more than one word, from the first to the last bit.
    More { first: usize, last: usize },
}

/// The bits of the pages of the `len` bytes from `start` on.
#[inline(always)]
pub(super) fn masks(start: u64, len: u64) -> Masks {
    let first = (start >> PAGE_LG2) as usize;
    let last = ((start + len - 1) >> PAGE_LG2) as usize;
    if first / 64 == last / 64 {
        let mask = (u64::MAX << (first % 64)) & (u64::MAX >> (63 - last % 64));
        Masks::One(first / 64, mask)
    } else {
        Masks::More { first, last }
    }
}
