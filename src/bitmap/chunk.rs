//! A chunk of bits, and its summary: which of its lines have any.
//!
//! A line is 8 words, one line of a cache, 512 bits. The 64 lines of a chunk make one word of summary, and the summaries of
//! neighbouring chunks lie side by side, so that a terabyte of clean 4 KiB pages is known by 64 KiB.
//!
//! # The protocol
//! ```text
//!  marker                                        harvester
//!  M1  set the bit, or find it set               H1  clear the line's bit in the summary
//!  F3  fence(SeqCst)                             F5  fence(SeqCst)
//!  M2  set the summary's bit if it is clear      H2  take the words of the line
//!  M3  fence(SeqCst)
//! ```
//!
//! Either F3 or F5 comes first in the one order of all SeqCst fences:
//! - if F3 does, H2 sees the bit of M1, and takes it;
//! - if F5 does, M2 sees the summary clear, and sets it for the next harvest.
//!
//! So once a mark has returned, its bit is in the hands of a harvester, or the summary leads to it. Who finds the bit set goes
//! on to M2 too: the one who set it may not have come so far.
//!
//! * M3 is for what a marker looks at next: whoever unmaps an area, and takes its bits behind a fence of its own, either finds
//!   summary and bit, or the marker finds that the area has gone. On common processors it costs nothing, as F3.
//! * A harvester clears the summary of lines that it is asked for as a whole; of others it would hide what it does not take.
//! * A line whose summary is clear must not be left alone again: who looks in between takes it for clean, and may be the last one to
//!   look. So a harvester whose recording can fail secures the place of a line before H1, and leaves the summary of a line alone whose
//!   place it cannot secure as a whole: see [`Taker`](super::take::Taker). Only a panic puts lines back into the summary.
//! * It looks for a chunk before it clears its summary: a summary that is set may become visible before the chunk does.
//!
//! # A chunk that is dirty as a whole
//! Whoever marks all of a chunk sets no word, but its *state*, in the place of M1; its lines in the summary are all of them. Words
//! count beside: a bit is set if its word has it or its chunk is whole. A state is clean, whole or split, and has a number:
//!
//! ```text
//!            mark                harvest of a part             words are published
//!  clean n -------> whole n+1 ------------------> split n+1 -----------------------> clean n+1
//!                    |     ^---------------------------/
//!                    |         mark, as number n+2
//!                    \--harvest of all: recorded--> clean n+1
//! ```
//!
//! * A harvester looks at the state behind F5, before the words: dirt only ever goes from the state to the words. One whose recording can
//!   fail hides line by line, so it looks behind each F5, and goes by way of the words always.
//! * One that is asked for a part sets all words, and the summary, before the state becomes clean: the rest is dirty at every
//!   moment. Marks leave it at *whole*, but not at *split*: while words are set, another harvest may take them, one that saw the
//!   chunk before it was whole and so does not end that state. A mark that had relied on it since would be lost with it.
//! * A compare-exchange ends the state that was looked at; if a mark or a split came in between, it stays, and dirt is reported
//!   twice at worst.

use std::ptr;

use super::word_mask;
use crate::sync::{
    AtomicPtr, AtomicU64, Ordering, Step, TINY, fence, fence_after_look, fence_after_rmw, performs,
};

/// Words of a chunk, as a logarithm; tiny in the model checker, so that models reach every border.
pub(super) const WORDS_LG2: u32 = if TINY { 1 } else { 9 };
/// Words of a line, as a logarithm.
const LINE_LG2: u32 = if TINY { 0 } else { 3 };
/// Chunks of a block, as a logarithm.
pub(super) const BLOCK_LG2: u32 = if TINY { 0 } else { 3 };
/// Bits of a line.
pub(super) const LINE_BITS: u64 = 64 << LINE_LG2;
/// Words of a line.
pub(crate) const LINE_WORDS: usize = 1 << LINE_LG2;
/// Bits of a chunk.
pub(super) const CHUNK_BITS: u64 = 64 << WORDS_LG2;
/// All lines of a chunk.
const ALL_LINES: u64 = word_mask(0, (CHUNK_BITS / LINE_BITS - 1) as u32);

/// The lower two bits of a state. 0 is clean.
pub(super) const KIND: u64 = 3;
pub(super) const WHOLE: u64 = 1;
pub(super) const SPLIT: u64 = 2;
/// What is added to a state for the next number.
const NEXT: u64 = KIND + 1;

/// One page of bitmap.
#[repr(align(64))]
pub(super) struct Chunk(pub(super) [AtomicU64; 1 << WORDS_LG2]);

impl Chunk {
    pub(super) fn new() -> Self {
        Chunk(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// A line of summaries, and the pointers to their chunks in another one.
#[repr(align(64))]
pub(super) struct Block {
    summaries: [AtomicU64; 1 << BLOCK_LG2],
    /// Each a [`Chunk`], or null.
    chunks: [AtomicPtr<()>; 1 << BLOCK_LG2],
    /// Whether all bits of a chunk are set, whatever its words say: see the [module](self).
    states: [AtomicU64; 1 << BLOCK_LG2],
}

impl Block {
    pub(super) fn new() -> Self {
        Block {
            summaries: std::array::from_fn(|_| AtomicU64::new(0)),
            chunks: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            states: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Whether a summary has a bit.
    #[inline]
    pub(super) fn has_any(&self) -> bool {
        // Relaxed: of a mark that came before the harvest, or of what set the summary later, coherence shows it set.
        let or = |any, summary: &AtomicU64| any | summary.load(Ordering::Relaxed);
        self.summaries.iter().fold(0, or) != 0
    }

    #[inline]
    pub(super) fn slot(&self, chunk: u64) -> Slot<'_> {
        let nth = (chunk & ((1 << BLOCK_LG2) - 1)) as usize;
        Slot {
            summary: &self.summaries[nth],
            chunk: &self.chunks[nth],
            state: &self.states[nth],
        }
    }

    /// The chunks' pointers.
    pub(super) fn chunks(&self) -> &[AtomicPtr<()>] {
        &self.chunks
    }
}

/// The place of one chunk. Bits count from its start.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    pub(super) summary: &'a AtomicU64,
    pub(super) chunk: &'a AtomicPtr<()>,
    pub(super) state: &'a AtomicU64,
}

impl Slot<'_> {
    /// Sets the bits of `mask` in `word`, which holds bit `first` of the bitmap: see [`ChunkMap::set`](super::ChunkMap::set).
    #[inline(always)]
    pub(super) fn set_word(
        self,
        word: &AtomicU64,
        first: u64,
        mask: u64,
        fence: impl FnOnce(),
    ) -> bool {
        fence();
        // Acquire: pairs with the Release below; whoever set the bit is on the way to the summary. The caller's fence orders the
        // look after its data write: see `source::marks`.
        let anew = word.load(Ordering::Acquire) & mask != mask;
        if anew {
            // Release: pairs with the Acquire in `visit_line`; publishes the data that the mark speaks of.
            word.fetch_or(mask, Ordering::Release);
            if performs(Step::GoneFence) {
                // SeqCst: F3, of the module's protocol and of those in `space::unmap` and `space::attachment`.
                fence_after_rmw();
            }
        } else {
            // SeqCst: F3 of one who found the bit set.
            fence_after_look();
        }
        if anew || performs(Step::SummaryOnSkip) {
            self.summarize(1 << ((first / LINE_BITS) % (CHUNK_BITS / LINE_BITS)));
        }
        anew
    }

    /// As [`set_word`](Self::set_word), for the bits `first..=last`; the caller's fence came before.
    pub(super) fn set(self, chunk: &Chunk, first: u64, last: u64) -> bool {
        if first == 0 && last == CHUNK_BITS - 1 {
            return self.set_whole();
        }
        self.set_words(chunk, first, last)
    }

    /// As [`set`](Self::set), of all bits of the chunk.
    fn set_whole(self) -> bool {
        // Acquire: pairs with the Release below; whoever made the chunk whole is on the way to the summary. The caller's fence
        // orders the look after its data write.
        let mut state = self.state.load(Ordering::Acquire);
        let mut anew = false;
        while state & KIND != WHOLE {
            let whole = (state | KIND) - KIND + NEXT + WHOLE;
            // Release: pairs with the Acquire of who ends this state; publishes the data that the mark speaks of.
            match self
                .state
                .compare_exchange(state, whole, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => {
                    anew = true;
                    break;
                }
                Err(newer) => state = newer,
            }
        }
        if performs(Step::GoneFence) {
            // SeqCst: F3, as in `set_word`.
            fence(Ordering::SeqCst);
        }
        self.summarize(ALL_LINES);
        anew
    }

    /// As [`set`](Self::set), word by word.
    pub(super) fn set_words(self, chunk: &Chunk, first: u64, last: u64) -> bool {
        let mut anew = false;
        let (from, to) = ((first / 64) as usize, (last / 64) as usize);
        for (index, word) in (from..).zip(&chunk.0[from..=to]) {
            let low = if index == from { first % 64 } else { 0 };
            let high = if index == to { last % 64 } else { 63 };
            let mask = word_mask(low as u32, high as u32);
            // Relaxed: the caller's full fence orders this load after its data write.
            if word.load(Ordering::Relaxed) & mask != mask {
                // Release: as in `set_word`.
                word.fetch_or(mask, Ordering::Release);
                anew = true;
            }
        }
        if performs(Step::GoneFence) {
            // SeqCst: F3, as in `set_word`; here one fence for those that were set and those that were found set.
            fence(Ordering::SeqCst);
        }
        self.summarize(lines(first, last));
        anew
    }

    /// M2, and M3.
    #[inline(always)]
    fn summarize(self, lines: u64) {
        // Acquire: as the look that `fence_after_look` follows. The fence F3 orders it after the bits.
        if self.summary.load(Ordering::Acquire) & lines == lines {
            if performs(Step::GoneFence) {
                // SeqCst: M3, of one who found the summary set.
                fence_after_look();
            }
            return;
        }
        // Relaxed: as above, F3 orders it.
        self.summary.fetch_or(lines, Ordering::Relaxed);
        if performs(Step::GoneFence) {
            // SeqCst: M3.
            fence_after_rmw();
        }
    }
}

/// The lines that the bits `first..=last` touch.
#[inline]
pub(super) fn lines(first: u64, last: u64) -> u64 {
    word_mask((first / LINE_BITS) as u32, (last / LINE_BITS) as u32)
}
