//! Marks in the part of a log that belongs to one region of guest memory.
//!
//! # One size of access
//! The format is one of bytes, and regions may meet inside of a byte. Atomic accesses of different
//! sizes to one byte are a data race to the language, so all of this process use the words of 64
//! bits that the front end has too, for single pages as well. A mark sets its own bits of a word
//! and leaves the others as they are, those past the end of the log included. Other processes may
//! use other sizes: they are outside of what the language speaks of, and processors order accesses
//! to one line whatever their size.

use std::ptr;

use super::memory::LOG_PAGE;
use dirtymap::adapter::words;
use dirtymap::sync::{AtomicU64, Ordering};

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Marks {
    /// Where the log lies in this process.
    base: usize,
    /// The first and the last guest physical address of the region.
    start: u64,
    last: u64,
}

impl Marks {
    /// Marks for the region from `start` to `last` in the log at `base`, whose provenance is
    /// exposed.
    ///
    /// # Safety
    /// `base` is a multiple of 8. For as long as the result lives, each word of the log that has a
    /// bit of the region is memory that can be read and written, and this process accesses it by
    /// atomic operations on words of 64 bits alone.
    pub(super) unsafe fn new(base: usize, start: u64, last: u64) -> Self {
        Marks { base, start, last }
    }

    /// The first and the last guest physical address of the region.
    pub(super) fn region(&self) -> (u64, u64) {
        (self.start, self.last)
    }

    /// The pages of `len` bytes from `offset` on, as far as they lie in the region; `None` if none
    /// does.
    fn pages(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let first = self
            .start
            .checked_add(offset)
            .filter(|at| *at <= self.last)?;
        let last = first.saturating_add(len.checked_sub(1)?).min(self.last);
        Some((first >> LOG_PAGE.lg2(), last >> LOG_PAGE.lg2()))
    }

    /// Marks `len` bytes from `offset` on.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        let Some((first, last)) = self.pages(offset, len) else {
            return;
        };
        for (word, mask) in words::masks(first, last) {
            // Release: pairs with the Acquire of the front end that reads and clears it. A front
            // end that sees the bit sees the data; one that does not finds it at its next look.
            self.word(word).fetch_or(mask.to_le(), Ordering::Release);
        }
    }

    /// Whether the page of the byte at `offset` is marked.
    pub(super) fn is_dirty(&self, offset: u64) -> bool {
        let Some((page, _)) = self.pages(offset, 1) else {
            return false;
        };
        // Relaxed: a hint to the caller.
        let word = self.word(page / 64).load(Ordering::Relaxed);
        u64::from_le(word) >> (page % 64) & 1 == 1
    }

    /// A word that has a bit of the region.
    fn word(&self, word: u64) -> &AtomicU64 {
        // No overflow: the caller of `new` vouches for the memory at this address.
        let at = ptr::with_exposed_provenance::<AtomicU64>(self.base + word as usize * 8);
        // SAFETY:
        // - valid for reads and writes, and alive: by the contract of `new`, since the word has a
        //   bit of the region.
        // - aligned: `base` is, and words are 8 bytes apart.
        // - shared: this process accesses it by atomic operations of this size alone.
        unsafe { &*at }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::log_list::{LogWords, clear, seen};
    use dirtymap::sync::{Arc, thread};

    /// A log in memory of this process, so that an interpreter can follow each access to it.
    struct Log(Vec<AtomicU64>);

    impl LogWords for Log {
        fn words(&self) -> &[AtomicU64] {
            &self.0
        }
    }

    /// Pages of 4 KiB of a log of four words: regions meet inside of a byte and inside of words,
    /// and the last one ends inside of a word.
    const REGIONS: [(u64, u64); 4] = [(0, 3), (3, 69), (69, 131), (131, 203)];

    fn regions(log: &Log) -> Vec<Marks> {
        let base = log.0.as_ptr().expose_provenance();
        let marks = |(first, end): (u64, u64)| {
            // SAFETY: the log has four words, and all accesses to it are of words.
            unsafe { Marks::new(base, first << 12, (end << 12) - 1) }
        };
        REGIONS.map(marks).into()
    }

    /// The back end set single bytes where a region ended inside of a word, and words elsewhere;
    /// the front end of the same process, and other regions, used words for the same bytes. Atomic
    /// accesses of two sizes to one byte are a race to the language, and Miri says so.
    #[test]
    fn one_size_of_access_for_each_byte() {
        let log = Arc::new(Log((0..4).map(|_| AtomicU64::new(0)).collect()));
        let logs = [Arc::clone(&log)];
        let regions = regions(&log);
        let mut found = [0u64; 4];
        thread::scope(|scope| {
            for (marks, (first, end)) in regions.iter().zip(REGIONS) {
                scope.spawn(move || {
                    for page in 0..end - first {
                        marks.mark(page << 12, 1);
                        // Whatever it says by now: it is an access, too.
                        std::hint::black_box(marks.is_dirty(page << 12));
                    }
                });
            }
            for _ in 0..20 {
                for (word, found) in found.iter_mut().enumerate() {
                    let bits = seen(&logs, word, u64::MAX);
                    *found |= clear(&logs, word, bits);
                }
            }
        });
        for (word, found) in found.iter_mut().enumerate() {
            *found |= clear(&logs, word, u64::MAX);
        }
        assert_eq!(found, [u64::MAX, u64::MAX, u64::MAX, (1 << 11) - 1]);
    }

    /// Whole ranges, as bytes of the format: bit `n % 8` of byte `n / 8`, on every host.
    #[test]
    fn marks_are_at_their_place_in_the_format() {
        let log = Log((0..4).map(|_| AtomicU64::new(0)).collect());
        let regions = regions(&log);
        regions[1].mark(2 << 12, 3 << 12); // pages 5 to 7
        regions[2].mark(0, 62 << 12); // all of it: pages 69 to 130
        regions[3].mark(71 << 12, u64::MAX); // page 202, and past the end
        regions[3].mark(72 << 12, 1); // past the end
        let bytes: Vec<u8> = (log.0.iter())
            .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
            .collect();
        let set = |page: usize| bytes[page / 8] >> (page % 8) & 1 == 1;
        let pages: Vec<usize> = (0..256).filter(|page| set(*page)).collect();
        let expected: Vec<usize> = (5..=7).chain(69..=130).chain([202]).collect();
        assert_eq!(pages, expected);
        assert!(regions[3].is_dirty(71 << 12) && !regions[3].is_dirty(72 << 12));
    }
}
