//! What a harvest that shares its findings with other consumers asks of a [`ChunkMap`]: one writer
//! records bits, other threads look at them, and the writer wipes them at the end.
//!
//! Such a bitmap has no marks: its one writer sets the summary of a chunk, all lines of it, when it
//! first records there, and clears the summary after the words. So a thread that finds the summary
//! clear finds the words clear as well.

use super::chunk::{CHUNK_BITS, lines};
use super::map::{BITS_LG2, CHUNK_WORDS, ChunkMap};
use super::take::Visitor;
use crate::sync::{AtomicU64, Ordering};

impl ChunkMap {
    /// The highest bit.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// Sets the bits of `mask`, whose bit 0 is the bit `first` of the bitmap, a multiple of 64. The
    /// caller has performed the full fence that [`set`](Self::set) asks for.
    pub(crate) fn set_mask(&self, first: u64, mask: u64) {
        debug_assert!(first.is_multiple_of(64));
        let slot = self.slot_or_new(first >> BITS_LG2);
        let word = &self.chunk_of(slot).0[(first >> 6 & (CHUNK_WORDS - 1)) as usize];
        slot.set_word(word, first, mask, || {});
    }

    /// As [`peek`](Self::peek), without trust in summaries: looks at all words of the chunks that
    /// exist.
    ///
    /// # Errors
    /// Those of `visitor`.
    pub(crate) fn peek_all<V: Visitor>(
        &self,
        first: u64,
        last: u64,
        mut visitor: V,
    ) -> Result<(), V::Error> {
        self.each_chunk(first, last, |slot, chunk, base| {
            let (from, to) = (
                first.saturating_sub(base),
                (last - base).min(CHUNK_BITS - 1),
            );
            slot.peek_lines(chunk, base, lines(from, to), (from, to), &mut visitor)
        })
    }

    /// The words of chunk `index`, for the one writer to record in; its summary is set.
    pub(crate) fn words_to_record(&self, index: u64) -> &[AtomicU64] {
        let slot = self.slot_or_new(index);
        let words = &self.chunk_of(slot).0;
        // Relaxed: the writer's Release fence before it clears what it has recorded orders both.
        slot.summary.store(u64::MAX, Ordering::Relaxed);
        words
    }

    /// Clears the chunks that hold bits of `first..=last`, as their one writer. What other threads
    /// are to find instead was stored before.
    pub(crate) fn wipe(&self, first: u64, last: u64) {
        let wiped: Result<(), std::convert::Infallible> =
            self.each_chunk(first, last, |slot, chunk, _| {
                // Relaxed: the writer's own store.
                if slot.summary.load(Ordering::Relaxed) != 0 {
                    for word in &chunk.0 {
                        // Relaxed: the writer's own store.
                        if word.load(Ordering::Relaxed) != 0 {
                            // Release: pairs with the Acquire fence of the thread that finds the
                            // word clear; it sees what was stored instead.
                            word.store(0, Ordering::Release);
                        }
                    }
                    // Release: as above, for the thread that finds the summary clear.
                    slot.summary.store(0, Ordering::Release);
                }
                Ok(())
            });
        debug_assert!(wiped.is_ok());
    }
}
