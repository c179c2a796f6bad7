//! What a harvest that shares its findings with other consumers asks of a [`ChunkMap`]: one writer
//! records bits, other threads look at them, and the writer wipes them at the end.
//!
//! Such a bitmap has no marks: its one writer sets the summary of a line with the first word that
//! it records there, and clears the summary of a chunk after the words. So a thread that finds the
//! summary clear finds the words clear as well.

use std::convert::Infallible;

use super::chunk::{CHUNK_BITS, LINE_WORDS, lines};
use super::map::{BITS_LG2, CHUNK_WORDS, ChunkMap};
use super::take::Visitor;
use crate::sync::{AtomicU64, Ordering};
use crate::words::ones;

/// The words of a chunk.
pub(crate) type ChunkWords = [AtomicU64; CHUNK_WORDS as usize];

impl ChunkMap {
    /// The highest bit.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// Sets bits of chunk `index`: of each word, by its place in the chunk, those of the mask. The
    /// caller has performed the full fence that [`set`](Self::set) asks for.
    pub(crate) fn set_masks(&self, index: u64, masks: &[(u16, u64)]) {
        let (slot, chunk) = self.slot_or_new(index);
        slot.set_masks(chunk, masks);
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

    /// The words of chunk `index`, for the one writer to record in, and their summary: the writer
    /// sets the bit of a line when it records there.
    pub(crate) fn words_to_record(&self, index: u64) -> (&ChunkWords, &AtomicU64) {
        let (slot, chunk) = self.slot_or_new(index);
        (&chunk.0, slot.summary)
    }

    /// Calls `each` with the words that have bits, of the chunks that hold bits of `first..=last`,
    /// as their one writer: the number of a chunk, and some of its words by their places, in
    /// ascending order. Clears them after that: what other threads are to find instead was stored
    /// by `each`.
    pub(crate) fn wipe(&self, first: u64, last: u64, mut each: impl FnMut(u64, &[(u16, u64)])) {
        let mut found = None;
        let done: Result<(), Infallible> = self.each_chunk(first, last, |slot, chunk, base| {
            // Relaxed: the writer's own store, here and below.
            let lines = slot.summary.load(Ordering::Relaxed);
            if lines == 0 {
                return Ok(());
            }
            let found = found.get_or_insert_with(empty);
            let mut len = 0;
            for line in ones(lines) {
                let first = line * LINE_WORDS;
                let words = &chunk.0[first..][..LINE_WORDS];
                let seen: [u64; LINE_WORDS] =
                    std::array::from_fn(|nth| words[nth].load(Ordering::Relaxed));
                // A mask of the words that have bits, without a branch for each.
                let mut any = 0u64;
                for (nth, seen) in seen.iter().enumerate() {
                    any |= u64::from(*seen != 0) << nth;
                }
                for nth in ones(any) {
                    // A chunk has at most 512 words.
                    found[len] = ((first + nth) as u16, seen[nth]);
                    len += 1;
                }
            }
            let found = &found[..len];
            each(base >> BITS_LG2, found);
            for (nth, _) in found {
                // Release: pairs with the Acquire fence of the thread that finds the word clear; it
                // sees what was stored instead.
                chunk.0[usize::from(*nth)].store(0, Ordering::Release);
            }
            // Release: as above, for the thread that finds the summary clear.
            slot.summary.store(0, Ordering::Release);
            Ok(())
        });
        debug_assert!(done.is_ok());
    }
}

/// An empty list. Made when it is needed, because it is as large as a chunk.
fn empty() -> [(u16, u64); CHUNK_WORDS as usize] {
    [(0, 0); CHUNK_WORDS as usize]
}
