//! A chunk of bits, and its summary: which of its lines have any.
//!
//! A line is 8 words: one cache line, 512 bits. The 64 lines of a chunk make one word of summary.
//! The summaries of neighbouring chunks lie side by side, so 64 KiB of summaries describe a
//! terabyte of clean 4 KiB pages.
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
//! This is store buffering (Dekker). Either F3 or F5 comes first in the one order of all SeqCst
//! fences:
//! - if F3 does, H2 sees the bit of M1 and takes it;
//! - if F5 does, M2 sees the summary clear and sets it for the next harvest.
//!
//! So once a mark has returned, a harvester has its bit, or the summary leads to it. A marker that
//! finds the bit set performs M2 as well: the thread that set the bit may not have reached its own
//! M2.
//!
//! * M3 orders the look at the area that follows a mark. An unmap declares the area gone, performs
//!   a fence F6, and takes the bits. Either M3 or F6 comes first:
//!   - if M3 does, the unmap finds the summary and the bit;
//!   - if F6 does, the marker finds that the area has gone.
//!
//!   On common processors M3 costs nothing, and neither does F3.
//! * A harvester clears the summary of a line only if the request covers the whole line. To clear
//!   it for a part would hide the bits that stay.
//! * A harvester that has cleared the summary of a line must take the line: a harvest that looks in
//!   between finds it clean, and may be the last one. So a fallible harvester secures the place of
//!   a line before H1, and keeps the summary of a line whose place it cannot secure: see
//!   [`Taker`](super::take::Taker). Only a panic puts lines back into the summary.
//! * A harvester looks for the chunk before it clears the summary: a summary that is set may become
//!   visible before the chunk does.
//!
//! # A chunk that is dirty as a whole
//! A mark of all of a chunk sets no word. It sets the chunk's *state*, in the place of M1, and all
//! lines of the summary. The words stay valid beside it: a bit is set if its word has it, or if its
//! chunk is whole. A state is clean, whole or split, and has a number:
//!
//! ```text
//!            mark                harvest of a part             words are published
//!  clean n -------> whole n+1 ------------------> split n+1 -----------------------> clean n+1
//!                    |     ^---------------------------/
//!                    |         mark, as number n+2
//!                    \--harvest of all: recorded--> clean n+1
//! ```
//!
//! * A harvester looks at the state after F5 and before the words: bits move from the state to the
//!   words, never back. A fallible harvester clears the summary one line at a time, looks at the
//!   state again after each F5, and always expands it into words.
//! * A harvest of a part sets all words, and the summary, before the state becomes clean: the rest
//!   is dirty at every moment. A mark that finds *whole* leaves it. A mark that finds *split* makes
//!   the chunk whole again: while the words are being set, another harvest may take them. That
//!   harvest saw the chunk before it was whole, so it does not end the state. A mark that relied on
//!   *split* would be lost with them.
//! * A compare-exchange ends the state that was looked at. The number makes each *whole* another
//!   state: of two splits, the late one cannot end the state of the other one before the other's
//!   words are set. If a mark or a split came in between, the state stays, and pages are reported
//!   twice at worst.

use crate::sync::{
    AtomicU64, Ordering, Step, TINY, fence_after_look, fence_after_looks, fence_after_rmw,
    performs, weaken,
};
use crate::words::word_mask;

/// Words of a chunk, as a logarithm; tiny in the model checker, so that models reach every border.
pub(super) const WORDS_LG2: u32 = if TINY { 1 } else { 9 };
/// Words of a line, as a logarithm.
pub(super) const LINE_LG2: u32 = if TINY { 0 } else { 3 };
/// Bits of a line.
pub(super) const LINE_BITS: u64 = 64 << LINE_LG2;
/// Words of a line.
pub(crate) const LINE_WORDS: usize = 1 << LINE_LG2;
/// Bits of a chunk.
pub(super) const CHUNK_BITS: u64 = 64 << WORDS_LG2;
/// All lines of a chunk.
const ALL_LINES: u64 = word_mask(0, (CHUNK_BITS / LINE_BITS - 1) as u32);

/// The state of a chunk: clean, whole or split, and a number. See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(u64);

impl State {
    /// The lower two bits: the kind. 0 is clean.
    const KIND: u64 = 3;
    const WHOLE: u64 = 1;
    const SPLIT: u64 = 2;
    /// Claimed by a thread that leaves or takes bits; the number is the length of the list: see
    /// [`left`](super::left).
    const CLAIMED: u64 = 3;
    /// What is added to a state for the next number.
    const NEXT: u64 = Self::KIND + 1;

    #[inline]
    pub(super) fn is_clean(self) -> bool {
        self.0 & Self::KIND == 0
    }

    #[inline]
    pub(super) fn is_whole(self) -> bool {
        self.0 & Self::KIND == Self::WHOLE
    }

    /// The state after a mark of the whole chunk: whole, with the next number. Numbers wrap.
    fn marked(self) -> State {
        let next = if performs(Step::NextNumber) {
            Self::NEXT
        } else {
            0
        };
        State(self.cleaned().0.wrapping_add(next) | Self::WHOLE)
    }

    /// The state while a harvest of a part sets the words; the number stays.
    pub(super) fn split(self) -> State {
        State(self.cleaned().0 | Self::SPLIT)
    }

    /// The clean state of the same number.
    fn cleaned(self) -> State {
        State(self.0 & !Self::KIND)
    }
}

/// The state in memory.
#[derive(Clone, Copy)]
pub(super) struct AtomicState<'a>(pub(super) &'a AtomicU64);

impl AtomicState<'_> {
    #[inline]
    #[cfg_attr(dirtymap_loom, track_caller)]
    pub(super) fn load(self, order: Ordering) -> State {
        State(self.0.load(order))
    }

    /// Replaces `old` by `new`; if something else is there, returns that.
    #[cfg_attr(dirtymap_loom, track_caller)]
    pub(super) fn replace(
        self,
        old: State,
        new: State,
        success: Ordering,
        failure: Ordering,
    ) -> Result<(), State> {
        let done = self.0.compare_exchange(old.0, new.0, success, failure);
        done.map(drop).map_err(State)
    }

    /// Makes the chunk clean if it is still in `state`.
    pub(super) fn end(self, state: State) {
        // Release: pairs with the looks at the state; a thread that sees the chunk clean sees what
        // the visit did, or the words that are set instead. Acquire: pairs with the Release of
        // `Slot::set_whole`. Relaxed on failure: nothing is read.
        let _ = self.replace(state, state.cleaned(), Ordering::AcqRel, Ordering::Relaxed);
    }
}

impl State {
    /// The state of a chunk of [`left`](super::left) bits with a list of this length.
    pub(super) fn with_list(len: usize) -> Self {
        State(len as u64 * Self::NEXT)
    }

    /// The length of the list of such a chunk.
    #[inline]
    pub(super) fn list_len(self) -> usize {
        (self.0 / Self::NEXT) as usize
    }
}

impl AtomicState<'_> {
    /// Claims the chunk, of a bitmap without marks; returns its state, if this call did.
    pub(super) fn claim(self) -> Option<State> {
        // Relaxed: the exchange fails if the state is another one.
        let free = self.load(Ordering::Relaxed);
        let claimed = State(free.0 | State::CLAIMED);
        if free == claimed {
            return None;
        }
        // Acquire on success: pairs with the Release in `end_claim`; the words and the list are
        // those that the claim before has left. Relaxed on failure: the caller changes nothing.
        let done = self.replace(free, claimed, Ordering::Acquire, Ordering::Relaxed);
        done.is_ok().then_some(free)
    }

    /// Ends the claim of the caller; the chunk has `state` from now on.
    pub(super) fn end_claim(self, state: State) {
        // Release: pairs with the Acquire in `claim` and in `ChunkMap::peek_chunk`; publishes the
        // words and the list.
        let order = weaken(Step::PublishLeft, Ordering::Release);
        self.0.store(state.0, order);
    }
}

/// One page of bitmap.
#[repr(align(64))]
pub(super) struct Chunk(pub(super) [AtomicU64; 1 << WORDS_LG2]);

impl Chunk {
    pub(super) fn new() -> Self {
        Chunk(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// The summary and the state of one chunk. Bits count from its start.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    pub(super) summary: &'a AtomicU64,
    pub(super) state: AtomicState<'a>,
}

impl Slot<'_> {
    /// Sets the bits of `mask` in `word`, which holds bit `first` of the bitmap, in a chunk with
    /// `summary`: see [`ChunkMap::set`](super::ChunkMap::set).
    #[inline(always)]
    pub(super) fn set_word(
        summary: &AtomicU64,
        word: &AtomicU64,
        first: u64,
        mask: u64,
        fence: impl FnOnce(),
    ) -> bool {
        fence();
        // Acquire: pairs with the Release below; the thread that set the bit is on its way to the
        // summary. The caller's fence orders the look after its data write: see `marks`.
        let anew = word.load(Ordering::Acquire) & mask != mask;
        if anew {
            // Release: pairs with the Acquire in `visit_line`; publishes the data of the mark.
            word.fetch_or(mask, weaken(Step::PublishMark, Ordering::Release));
            if performs(Step::WordFence) {
                // SeqCst: F3 of a mark that set its bit; pairs with F5 in `Cleared::clear`.
                // - If F3 is first, the harvester sees the bit.
                // - If F5 is first, `summarize` sees the summary clear and sets it.
                fence_after_rmw();
            }
        } else if performs(Step::SkipFence) {
            // SeqCst: F3 of a mark that found its bit set; pairs with F5, as above. The harvester
            // sees the bit that we saw, or we see the summary clear.
            fence_after_look();
        }
        if anew || performs(Step::SummaryOnSkip) {
            Self::summarize(
                summary,
                1 << ((first / LINE_BITS) % (CHUNK_BITS / LINE_BITS)),
            );
        }
        anew
    }

    /// As [`set_word`](Self::set_word), for all bits of the chunk, which exists; the caller's fence
    /// came before.
    pub(super) fn set_whole(self) -> bool {
        // Acquire: pairs with the Release below; the thread that made the chunk whole is on its way
        // to the summary. The caller's fence orders the look after its data write.
        let mut state = self.state.load(Ordering::Acquire);
        let mut anew = false;
        while !state.is_whole() {
            // Release on success: pairs with the Acquire looks in `take`, and of the thread that
            // ends this state; publishes the data of the mark. Acquire: as the load above, on
            // failure too.
            let success = weaken(Step::PublishWhole, Ordering::AcqRel);
            let marked = state.marked();
            match self
                .state
                .replace(state, marked, success, Ordering::Acquire)
            {
                Ok(()) => {
                    anew = true;
                    break;
                }
                Err(newer) => state = newer,
            }
        }
        if performs(Step::WholeFence) {
            // SeqCst: F3 of a mark of a whole chunk; pairs with F5 in `Cleared::clear`.
            // - If F3 is first, the harvester sees the chunk whole.
            // - If F5 is first, `summarize` sees the summary clear and sets it.
            fence_after_looks(anew);
        }
        Self::summarize(self.summary, ALL_LINES);
        anew
    }

    /// As [`set_word`](Self::set_word), for the bits `first..=last`; the caller's fence came
    /// before.
    pub(super) fn set_range(self, chunk: &Chunk, first: u64, last: u64) -> bool {
        let words = &chunk.0[(first / 64) as usize..=(last / 64) as usize];
        let low = word_mask((first % 64) as u32, 63);
        let high = word_mask(0, (last % 64) as u32);
        self.set_words(lines(first, last), |set| match words {
            [lowest, between @ .., highest] => {
                set.add(lowest, low);
                between.iter().for_each(|word| set.add(word, u64::MAX));
                set.add(highest, high);
            }
            [word] => set.add(word, low & high),
            [] => {}
        })
    }

    /// Sets bits of words, which lie in `lines`. Returns whether one was clear.
    #[inline(always)]
    pub(super) fn set_words(self, lines: u64, words: impl FnOnce(&mut SetWords)) -> bool {
        let mut set = SetWords { anew: false };
        words(&mut set);
        let anew = set.anew;
        if performs(Step::WordsFence) {
            // SeqCst: F3 of a mark of several words, one for those that it set and those that it
            // found set; pairs with F5 in `Cleared::clear`.
            // - If F3 is first, the harvester sees the bits.
            // - If F5 is first, `summarize` sees the summary clear and sets it.
            fence_after_looks(anew);
        }
        Self::summarize(self.summary, lines);
        anew
    }

    /// M2 and M3.
    #[inline(always)]
    fn summarize(summary: &AtomicU64, lines: u64) {
        // Acquire: the look that `fence_after_look` follows. The fence F3 orders it after the bits.
        if summary.load(Ordering::Acquire) & lines == lines {
            if performs(Step::FoundFence) {
                // SeqCst: M3 of a mark that found the summary set; pairs with F6 of an unmap.
                // - If M3 is first, the unmap sees the summary that we saw, and takes the bit.
                // - If F6 is first, the mark that looks at its area next finds that it has gone.
                fence_after_look();
            }
            return;
        }
        // Relaxed: F3 orders it after the bits, and M3 before the look at the area.
        summary.fetch_or(lines, Ordering::Relaxed);
        if performs(Step::SummarizedFence) {
            // SeqCst: M3 of a mark that set the summary; pairs with F6, as above.
            fence_after_rmw();
        }
    }
}

/// A mark of several words.
pub(super) struct SetWords {
    /// Whether a bit was clear.
    anew: bool,
}

impl SetWords {
    #[inline(always)]
    pub(super) fn add(&mut self, word: &AtomicU64, mask: u64) {
        // Acquire: as in `set_word`. The caller's full fence orders this load after its data write.
        if word.load(Ordering::Acquire) & mask != mask {
            // Release: as in `set_word`.
            word.fetch_or(mask, weaken(Step::PublishMarks, Ordering::Release));
            self.anew = true;
        }
    }
}

/// The lines that the bits `first..=last` touch.
#[inline]
pub(super) fn lines(first: u64, last: u64) -> u64 {
    word_mask((first / LINE_BITS) as u32, (last / LINE_BITS) as u32)
}
