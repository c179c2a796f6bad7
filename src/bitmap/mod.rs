//! User bitmaps: where a harvest writes down what it found.
//!
//! Bit `n` stands for the bytes `[base + n * granule, base + (n + 1) * granule)`, least significant
//! bit first, words little endian on every host. A harvest only ever ORs bits in, inside the
//! request; bits that were set stay set, bits outside stay as they were.
//!
//! ```text
//!  IOVA range --record--> bits --window by window--> words of the user
//!                          |
//!                          +-- a chunk is one 4 KiB page of bitmap, 32768 bits;
//!                              a window is at most 512 chunks
//! ```
//!
//! A harvest records a page **before** it clears the page's dirty bit, so a record that fails
//! leaves the bit where it was (contract: never clear what cannot be recorded).

mod chunk;
mod chunks;
#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod chunks_tests;
#[cfg(all(feature = "mmap", not(dirtymap_loom)))]
mod file;
mod handed;
#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;
mod runs;
mod sink;
mod slab;
mod span;
mod sparse;
mod take;
mod user;
mod window;

pub(crate) use chunk::LINE_WORDS;
pub(crate) use chunks::{ChunkMap, OneGroup};
#[cfg(all(feature = "mmap", not(dirtymap_loom)))]
pub use file::FileBitmap;
pub(crate) use runs::RunBits;
pub use runs::{Bits, Runs, Words};
pub use sink::Sink;
pub use sparse::SparseBitmap;
pub(crate) use take::{Taker, Visitor};
pub(crate) use user::Bound;
pub use user::{BitmapView, UserBitmap};

/// Bits of one chunk: a 4 KiB page of bitmap.
pub const CHUNK_BITS: u64 = 1 << 15;
/// Bits of one window: 512 chunks, 2 MiB of bitmap, 64 GiB of address space at 4 KiB a bit.
pub const WINDOW_BITS: u64 = 512 * CHUNK_BITS;

/// The bits `first..=last` of a word, both below 64.
#[inline]
pub(crate) const fn word_mask(first: u32, last: u32) -> u64 {
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// Splits the bits `first..=last` into words: yields each word's index and the mask of its bits.
#[inline]
pub(crate) fn word_masks(first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
    (first / 64..=last / 64).map(move |word| {
        let from = if word == first / 64 { first % 64 } else { 0 };
        let to = if word == last / 64 { last % 64 } else { 63 };
        (word, word_mask(from as u32, to as u32))
    })
}

/// Yields the maximal runs of ones in a word as `(first, last)`.
#[inline]
pub(crate) fn word_runs(mut word: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let first = word.trailing_zeros();
        let len = (!(word >> first)).trailing_zeros();
        let last = first + len - 1;
        word &= !word_mask(first, last);
        Some((first, last))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_runs_agree_with_bits() {
        for first in 0..130u64 {
            for last in first..130 {
                let mut bits = Vec::new();
                for (word, mask) in word_masks(first, last) {
                    bits.extend(
                        (0..64)
                            .filter(|b| mask >> b & 1 == 1)
                            .map(|b| word * 64 + b),
                    );
                }
                assert_eq!(bits, (first..=last).collect::<Vec<_>>());
            }
        }
        for word in [
            0,
            1,
            u64::MAX,
            0b1011_0110,
            1 << 63,
            0x8000_0000_0000_0001,
            !1,
        ] {
            let mut back = 0;
            for (a, b) in word_runs(word) {
                back |= word_mask(a, b);
            }
            assert_eq!(back, word);
        }
        assert_eq!(word_runs(0b1110_0110).collect::<Vec<_>>(), [(1, 2), (5, 7)]);
    }
}
