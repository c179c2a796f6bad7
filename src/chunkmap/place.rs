//! The place of what a harvest takes: words of the user's bitmap.

use std::ptr;

use super::chunk::LINE_WORDS;
use crate::sync::{AtomicU64, Ordering};

/// Words of a bitmap, in little endian, to which no other thread writes meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a>(&'a [AtomicU64]);

impl<'a> Place<'a> {
    /// No words.
    pub(crate) const NONE: Place<'static> = Place(&[]);

    pub(crate) fn new(words: &'a [AtomicU64]) -> Self {
        Place(words)
    }

    /// How many whole lines it has.
    #[inline(always)]
    pub(super) fn lines(self) -> usize {
        self.0.len() / LINE_WORDS
    }

    /// The address of its first word, for a prefetch; null if it has no words.
    #[inline(always)]
    pub(super) fn first(self) -> *const u8 {
        self.0
            .first()
            .map_or(ptr::null(), |word| ptr::from_ref(word).cast())
    }

    /// Line `nth`, if it has all words of it.
    #[inline(always)]
    pub(super) fn line(self, nth: usize) -> Option<&'a [AtomicU64; LINE_WORDS]> {
        self.0.get(nth * LINE_WORDS..)?.first_chunk()
    }

    /// Sets the bits of `seen` in `word`, and returns those that were clear.
    #[inline(always)]
    pub(super) fn record(word: &AtomicU64, seen: u64) -> u64 {
        // Relaxed, both: no other thread writes between the two, and the lease hands the result
        // over.
        let old = u64::from_le(word.load(Ordering::Relaxed));
        word.store((old | seen).to_le(), Ordering::Relaxed);
        seen & !old
    }

    /// As [`record`](Self::record) in its first word, if it has any.
    #[inline(always)]
    pub(crate) fn record_first(self, seen: u64) -> Option<u64> {
        self.0.first().map(|word| Self::record(word, seen))
    }

    /// As [`record`](Self::record), in the word `nth`; 0 if it does not have that word.
    #[inline(always)]
    pub(super) fn record_at(self, nth: usize, seen: u64) -> u64 {
        self.0.get(nth).map_or(0, |word| Self::record(word, seen))
    }

    /// Sets all bits of its whole lines, and returns how many were clear.
    pub(super) fn fill(self) -> u64 {
        let mut clear = 0;
        for line in self.0.as_chunks::<LINE_WORDS>().0 {
            // Relaxed, all: as in `record`.
            let or = |any, word: &AtomicU64| any | word.load(Ordering::Relaxed);
            clear += match line.iter().fold(0, or) {
                // A bitmap that was clean needs no count, which costs more than all the rest.
                0 => LINE_WORDS as u64 * 64,
                _ => line.iter().map(zeros).sum(),
            };
            for word in line {
                word.store(u64::MAX, Ordering::Relaxed);
            }
        }
        clear
    }
}

/// The number of clear bits of `word`.
fn zeros(word: &AtomicU64) -> u64 {
    // Relaxed: as in `Place::record`.
    u64::from(word.load(Ordering::Relaxed).count_zeros())
}
