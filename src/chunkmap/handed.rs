//! What a harvest that shares its findings with other consumers asks of a [`ChunkMap`]: one writer
//! records bits, other threads look at them, and the writer wipes them at the end.
//!
//! Such a bitmap has no marks: its one writer sets the summary of a line with the first word that
//! it records there, and clears the summary of a chunk after the words. So a thread that finds the
//! summary clear finds the words clear as well.

use std::convert::Infallible;

use super::chunk::{CHUNK_BITS, LINE_WORDS, lines};
use super::few::Few;
use super::map::{BITS_LG2, CHUNK_WORDS, ChunkMap};
use super::take::{LINES, Visitor};
use crate::sync::{AtomicU64, Ordering};
use crate::words::ones;

/// The words of a chunk.
pub(crate) type ChunkWords = [AtomicU64; CHUNK_WORDS as usize];

/// Bits of a chunk that its one writer hands over.
#[derive(Clone, Copy)]
pub(crate) struct Handed<'w> {
    /// The lines that have some.
    pub(super) lines: u64,
    pub(super) bits: Bits<'w>,
}

/// Where these bits are.
#[derive(Clone, Copy)]
pub(super) enum Bits<'w> {
    /// In the lines of the chunk; all other words are left out.
    Words(&'w ChunkWords),
    Few(&'w Few),
}

type Line = [AtomicU64; LINE_WORDS];

impl<'w> Handed<'w> {
    pub(crate) fn new(words: &'w ChunkWords, lines: u64) -> Self {
        let bits = Bits::Words(words);
        Handed { lines, bits }
    }

    pub(crate) fn few(few: &'w Few) -> Self {
        Handed {
            lines: few.lines(),
            bits: Bits::Few(few),
        }
    }

    /// The lines that have bits.
    pub(crate) fn lines(self) -> u64 {
        self.lines
    }

    /// Calls `each` with the same bits, as a list if they are few.
    #[inline]
    pub(crate) fn listed<R>(self, each: impl FnOnce(Handed<'_>) -> R) -> R {
        let few = match self.bits {
            Bits::Words(words) => {
                let bit =
                    |(place, mask)| ones(mask).map(move |bit| u64::from(place) * 64 + bit as u64);
                Few::of(masks(words, self.lines).flat_map(bit))
            }
            Bits::Few(_) => None,
        };
        each(few.as_ref().map_or(self, Handed::few))
    }

    /// Calls `each` with words that have the bits of `masks`, by their places.
    #[cfg(test)]
    pub(crate) fn of<R>(masks: &[(u16, u64)], each: impl FnOnce(Handed<'_>) -> R) -> R {
        let words: ChunkWords = std::array::from_fn(|_| AtomicU64::new(0));
        let mut lines = 0;
        for (nth, mask) in masks {
            // Relaxed: one thread.
            words[usize::from(*nth)].store(*mask, Ordering::Relaxed);
            lines |= 1 << (usize::from(*nth) / LINE_WORDS);
        }
        Handed::new(&words, lines).listed(each)
    }

    /// The words that have bits, by their places in the chunk, in ascending order. Bits of one word
    /// may come one after another.
    pub(crate) fn masks(self) -> impl Iterator<Item = (u16, u64)> + 'w {
        let (words, few) = match self.bits {
            Bits::Words(words) => (Some(words), None),
            Bits::Few(few) => (None, Some(few)),
        };
        let words = words.map(|words| masks(words, self.lines));
        let few = few.map(Few::masks);
        words.into_iter().flatten().chain(few.into_iter().flatten())
    }

    /// Calls `each` with the bits that `keep` returns for each word, if there are any.
    pub(crate) fn with(self, keep: impl Fn(u16, u64) -> u64, each: impl FnOnce(Handed<'_>)) {
        let words: ChunkWords = std::array::from_fn(|_| AtomicU64::new(0));
        let mut lines = 0;
        for (nth, mask) in self.masks() {
            let (kept, word) = (keep(nth, mask), &words[usize::from(nth)]);
            // Relaxed: as above.
            word.store(word.load(Ordering::Relaxed) | kept, Ordering::Relaxed);
            lines |= u64::from(kept != 0) << (usize::from(nth) / LINE_WORDS);
        }
        if lines != 0 {
            Handed::new(&words, lines).listed(each);
        }
    }
}

/// Some lines of a chunk, by their places.
#[inline]
pub(super) fn lines_of(words: &ChunkWords, lines: u64) -> impl Iterator<Item = (usize, &Line)> {
    let all = words.as_chunks().0;
    // Always below, and so without a test for each line.
    ones(lines).map(move |line| (line % LINES, &all[line % LINES]))
}

/// The words of `lines` that have bits, by their places in the chunk, in ascending order.
#[inline]
pub(super) fn masks(words: &ChunkWords, lines: u64) -> impl Iterator<Item = (u16, u64)> {
    lines_of(words, lines).flat_map(|(line, words)| {
        let first = line * LINE_WORDS;
        // Relaxed: the caller is the one writer.
        let masks = words.iter().map(|word| word.load(Ordering::Relaxed));
        let placed = masks.enumerate().filter(|(_, mask)| *mask != 0);
        placed.map(move |(nth, mask)| ((first + nth) as u16, mask))
    })
}

impl ChunkMap {
    /// The highest bit.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// Sets the bits of `handed` in chunk `index`. The caller has performed the full fence that
    /// [`set`](Self::set) asks for.
    pub(crate) fn set_handed(&self, index: u64, handed: Handed<'_>) {
        let (slot, chunk) = self.slot_or_new(index);
        slot.set_words(handed.lines, |set| {
            for (nth, mask) in handed.masks() {
                set.add(&chunk.0[usize::from(nth)], mask);
            }
        });
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
    /// as their one writer, with the number of the chunk. Clears them after that: what other
    /// threads are to find instead was stored by `each`.
    pub(crate) fn wipe(&self, first: u64, last: u64, mut each: impl FnMut(u64, Handed<'_>)) {
        let done: Result<(), Infallible> = self.each_chunk(first, last, |slot, chunk, base| {
            // Relaxed: the writer's own store, here and below.
            let lines = slot.summary.load(Ordering::Relaxed);
            if lines == 0 {
                return Ok(());
            }
            each(base >> BITS_LG2, Handed::new(&chunk.0, lines));
            for (_, line) in lines_of(&chunk.0, lines) {
                for word in line {
                    if word.load(Ordering::Relaxed) != 0 {
                        // Release: pairs with the Acquire fence of the thread that finds the word
                        // clear; it sees what was stored instead.
                        word.store(0, Ordering::Release);
                    }
                }
            }
            // Release: as above, for the thread that finds the summary clear.
            slot.summary.store(0, Ordering::Release);
            Ok(())
        });
        debug_assert!(done.is_ok());
    }
}
