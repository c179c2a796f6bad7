//! Pages that read as zero: their storage was dropped, and no harvest has found them dirty since.
//!
//! One bit for each page of an area, in chunks that are allocated at their first bit. The bitmap
//! has no summary, so a reader never takes a stale summary for set bits. The protocol is in
//! `harvest::discard`: a harvest that takes a dirty page clears its zero bit before it leaves the
//! page to other consumers.

use crate::chunkmap::{CHUNK_WORDS, ChunkMap};
use crate::ranges::add_joined;
use crate::sync::{AtomicU64, Ordering};
use crate::units::{Granule, Iova, IovaRange};
use crate::words::{word_masks, word_runs};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Zeros {
    /// The area; parts of ranges outside of it are ignored.
    range: IovaRange,
    page: Granule,
    /// By the number of the page, counted from address 0, as in the flights.
    bits: ChunkMap,
}

impl Zeros {
    /// No page of `range` reads as zero. Allocates nothing.
    pub(super) fn new(range: IovaRange, page: Granule) -> Self {
        Zeros {
            range,
            page,
            bits: ChunkMap::new(range.last().get() >> page.lg2()),
        }
    }

    /// The pages of `range`, which is made of whole pages, read as zero.
    pub(crate) fn set(&self, range: IovaRange) {
        let Some((first, last)) = self.numbers(range) else {
            return;
        };
        for (word, mask) in word_masks(first, last) {
            let words = self.bits.words_or_new(word / CHUNK_WORDS);
            // Release: pairs with the Acquire in `runs`. A reader that finds the page zero sees
            // that its storage is being dropped, or that the drop has ended.
            words[(word % CHUNK_WORDS) as usize].fetch_or(mask, Ordering::Release);
        }
    }

    /// The pages that `range` touches no longer count as zero.
    pub(crate) fn clear(&self, range: IovaRange) {
        let Some((first, last)) = self.numbers(range) else {
            return;
        };
        self.each_word(first, last, |word, _, mask| {
            // Relaxed: the next step of the caller publishes it. See `harvest::discard`.
            word.fetch_and(!mask, Ordering::Relaxed);
        });
    }

    /// The same for the pages of `mask`, of 64 pages from `start` on.
    pub(crate) fn clear_mask_at(&self, start: Iova, mask: u64) {
        let first = start.get() >> self.page.lg2();
        let (word, shift) = (first / 64, first % 64);
        self.clear_word(word, mask << shift);
        if shift != 0 && mask >> (64 - shift) != 0 {
            self.clear_word(word + 1, mask >> (64 - shift));
        }
    }

    fn clear_word(&self, word: u64, mask: u64) {
        let chunk = word / CHUNK_WORDS;
        if word * 64 <= self.bits.last()
            && let Some((_, words)) = self.bits.next_words(chunk, chunk)
        {
            // Relaxed: as in `clear`.
            words[(word % CHUNK_WORDS) as usize].fetch_and(!mask, Ordering::Relaxed);
        }
    }

    /// The pages of `range` that read as zero, as runs in ascending order.
    pub(crate) fn runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = Vec::new();
        let Some((first, last)) = self.numbers(range) else {
            return runs;
        };
        let page = |n: u64| Iova::new(n << self.page.lg2());
        self.each_word(first, last, |word, nth, mask| {
            // Acquire: pairs with the Release in `set`.
            let zero = word.load(Ordering::Acquire) & mask;
            for (low, high) in word_runs(zero) {
                let (low, high) = (nth * 64 + u64::from(low), nth * 64 + u64::from(high));
                let run = IovaRange::ascending(page(low), page(high).granule_last(self.page));
                add_joined(&mut runs, run);
            }
        });
        runs.iter()
            .filter_map(|run| run.intersection(range))
            .collect()
    }

    /// Calls `each` with the words of `first..=last` that exist, their numbers, and the mask of
    /// the bits that are asked for.
    fn each_word(&self, first: u64, last: u64, mut each: impl FnMut(&AtomicU64, u64, u64)) {
        let last_chunk = last / 64 / CHUNK_WORDS;
        let mut next = Some(first / 64 / CHUNK_WORDS);
        while let Some((chunk, words)) = next.and_then(|at| self.bits.next_words(at, last_chunk)) {
            let base = chunk * CHUNK_WORDS * 64;
            let (low, high) = (first.max(base), last.min(base + (CHUNK_WORDS * 64 - 1)));
            for (word, mask) in word_masks(low, high) {
                each(&words[(word % CHUNK_WORDS) as usize], word, mask);
            }
            next = chunk.checked_add(1).filter(|next| *next <= last_chunk);
        }
    }

    /// The numbers of the pages that `range` touches.
    fn numbers(&self, range: IovaRange) -> Option<(u64, u64)> {
        let inside = range.intersection(self.range)?;
        let number = |iova: Iova| iova.get() >> self.page.lg2();
        Some((number(inside.start()), number(inside.last())))
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
    }

    #[test]
    fn runs_are_what_was_set_and_not_cleared() {
        let area = pages(100, 1 << 20);
        let zeros = Zeros::new(area, Granule::K4);
        assert_eq!(zeros.runs(area), []);
        zeros.set(pages(0, 200)); // as far as the area has them
        zeros.set(pages(32_760, 100)); // across two chunks
        assert_eq!(zeros.runs(area), [pages(100, 100), pages(32_760, 100)]);
        zeros.clear(pages(32_768, 1));
        zeros.clear_mask_at(Iova::new(128 << 12), 0b11);
        zeros.clear_mask_at(Iova::new(190 << 12), 0b1111); // across two words
        zeros.clear_mask_at(Iova::new((1 << 19) << 12), u64::MAX); // no chunk is there
        let whole = [
            pages(100, 28),
            pages(130, 60),
            pages(194, 6),
            pages(32_760, 8),
            pages(32_769, 91),
        ];
        assert_eq!(zeros.runs(area), whole);
        let part = IovaRange::new(Iova::new(0x6_4001), Iova::new(0x6_5000)).unwrap();
        assert_eq!(
            zeros.runs(part),
            [part],
            "cut at the bytes that are asked for"
        );
    }

    #[test]
    fn the_last_page_of_all_has_a_place() {
        for page in [Granule::BYTE, Granule::K4] {
            let last = IovaRange::granule_at(Iova::MAX, page);
            let zeros = Zeros::new(last, page);
            zeros.set(last);
            assert_eq!(zeros.runs(IovaRange::ALL), [last]);
            zeros.clear(IovaRange::ALL);
            assert_eq!(zeros.runs(IovaRange::ALL), []);
        }
    }
}
