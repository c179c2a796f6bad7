//! Bits that many threads leave in a [`ChunkMap`], and few take: what harvests leave to a consumer.
//!
//! A thread that changes a chunk of such a bitmap claims the chunk before. So it changes words by
//! plain loads and stores, where a mark needs a locked operation for each word.
//!
//! ```text
//!  a thread that leaves bits                     a thread that takes bits
//!  C1  claim the chunk (compare-exchange)        C1  claim the chunk
//!  C2  add bits to words, lines to the summary   C2  visit words, clear them, clear the summary
//!  C3  end the claim (Release)                   C3  end the claim (Release)
//! ```
//!
//! Invariant: only the thread with the claim of a chunk changes its words and its summary. So no
//! change is lost, and each thread with a claim sees what all claims before it have done.
//!
//! No thread waits for a claim. A thread that finds the chunk claimed
//! * leaves its bits in another place: [`leave`](ChunkMap::leave) says so;
//! * visits the words without a clear, if it wants to take. What it visits it may find again: a
//!   superset.
//!
//! Threads that look and change nothing need no claim. They find a bit that was left, or the word
//! was taken, and the thread that took it has visited the bit before.
//!
//! # A list instead of words
//! A chunk that has few bits has them in a [list](super::few), and none in its words. The state of
//! the chunk has the length of the list, and changes with the end of a claim (C3).
//!
//! * A list begins in a chunk without bits: its summary is clear. Bits that come later move those
//!   of the list to the words. The words have them before the state says that the list is empty.
//! * A thread without a claim looks at the state, at the list, then at the words. If it finds the
//!   list empty because its bits have moved, it sees them in the words. If it finds the length
//!   before that, the list has these bits, or a later list is there: then they were taken.
//!
//! Such a bitmap has no marks, so the state of a chunk is free to hold the claim.

use super::chunk::{AtomicState, CHUNK_BITS, Chunk, LINE_BITS, LINE_WORDS, Slot, State, lines};
use super::few::List;
use super::handed::{Bits, ChunkWords, Handed, lines_of};
use super::map::{BITS_LG2, CHUNK_WORDS, ChunkMap};
use super::place::Place;
use super::take::{LINES, Visitor, lines_from, take_lines, visit_line, whole_lines};
use crate::sync::{AtomicU64, Ordering, Step, performs};

/// The claim of a chunk, until this is dropped.
struct Claim<'m> {
    atomic: AtomicState<'m>,
    /// The state of the chunk from the end of the claim on.
    state: State,
}

impl<'m> Claim<'m> {
    /// C1; `None` if another thread has the claim.
    #[inline]
    fn new(slot: Slot<'m>) -> Option<Self> {
        let atomic = slot.state;
        let state = match performs(Step::ClaimLeft) {
            true => atomic.claim()?,
            false => atomic.load(Ordering::Relaxed),
        };
        Some(Claim { atomic, state })
    }

    /// Moves the bits of the list, if there are some, to the words of the chunk.
    fn move_list(&mut self, list: Option<&List>, chunk: &Chunk) {
        if let Some(list) = list {
            add_masks(chunk, list.masks(self.state.list_len()));
        }
        self.state = State::with_list(0);
    }

    /// Records all bits of the chunk, which has a list, in `place`, and clears them. Returns how
    /// many were clear there; `None`, and does nothing, if the place is smaller than the chunk.
    fn take_list(&mut self, slot: Slot<'_>, list: &List, place: Place<'_>) -> Option<u64> {
        if place.lines() < LINES {
            return None;
        }
        let mut clear = 0;
        for (word, mask) in list.masks(self.state.list_len()) {
            clear += u64::from(place.record_at(usize::from(word), mask) != 0);
        }
        self.state = State::with_list(0);
        // Release: as the clear of a word, in `take::clear`.
        slot.summary.store(0, Ordering::Release);
        Some(clear)
    }
}

impl Drop for Claim<'_> {
    /// C3, after a panic of a visitor too. The words that were visited are cleared. All other
    /// words, or the whole list, are there.
    #[inline]
    fn drop(&mut self) {
        self.atomic.end_claim(self.state);
    }
}

/// Adds bits to a word of a claimed chunk.
#[inline(always)]
fn add(word: &AtomicU64, mask: u64) {
    let others = word.load(Ordering::Relaxed); // the claim orders it
    // Release: pairs with the Acquire fence in `copy_of`, as in `List::store`. An earlier owner of
    // the claim may have taken other bits of this word.
    word.store(others | mask, Ordering::Release);
}

impl ChunkMap {
    /// Leaves the bits of `handed` in chunk `index`. Returns false, and leaves nothing, if another
    /// thread changes the chunk at the moment.
    pub(crate) fn leave(&self, index: u64, handed: Handed<'_>) -> bool {
        let (slot, chunk) = self.slot_or_new(index);
        let Some(mut claim) = Claim::new(slot) else {
            return false;
        };
        // Relaxed: the claim orders it.
        let summary = slot.summary.load(Ordering::Relaxed);
        match handed.bits {
            Bits::Few(few) if summary == 0 => {
                self.list_or_new(index).store(few);
                claim.state = State::with_list(few.len());
            }
            bits => {
                if claim.state.list_len() > 0 {
                    claim.move_list(self.list(index), chunk);
                }
                match bits {
                    Bits::Few(few) => add_masks(chunk, few.masks()),
                    Bits::Words(words) => add_words(chunk, words, handed.lines),
                }
            }
        }
        // Release: as in `add`, for lines that were taken.
        slot.summary
            .store(summary | handed.lines, Ordering::Release);
        true
    }

    /// Takes the bits of `first..=last` that were left: `visitor` visits each word that has some,
    /// in order, with the word's first bit and those bits. They are cleared after the visit, but
    /// for chunks that another thread changes at the moment.
    ///
    /// # Errors
    /// Those of `visitor`; the bits of that word and of the words after it stay.
    pub(crate) fn take_left<V: Visitor>(
        &self,
        first: u64,
        last: u64,
        mut visitor: V,
    ) -> Result<(), V::Error> {
        let visitor = &mut visitor;
        self.walk(
            first,
            last,
            visitor,
            |visitor, slot, chunk, base, from, to| {
                // Relaxed: as in `Slot::take`.
                if slot.summary.load(Ordering::Relaxed) & lines(from, to) == 0 {
                    return Ok(());
                }
                let Some(mut claim) = Claim::new(slot) else {
                    return self.peek_chunk(slot, chunk, (base, from, to), visitor);
                };
                if claim.state.list_len() > 0 {
                    let list = self.list(base >> BITS_LG2);
                    if to - from == CHUNK_BITS - 1
                        && let Some(list) = list
                        && let Some(bits) =
                            claim.take_list(slot, list, visitor.place(base, CHUNK_WORDS))
                    {
                        visitor.placed(bits);
                        return Ok(());
                    }
                    claim.move_list(list, chunk);
                }
                take_chunk(slot, chunk, (base, from, to), visitor)
            },
        )
    }

    /// As [`take_left`](Self::take_left), without a clear.
    ///
    /// # Errors
    /// Those of `visitor`.
    pub(crate) fn peek_left<V: Visitor>(
        &self,
        first: u64,
        last: u64,
        mut visitor: V,
    ) -> Result<(), V::Error> {
        let visitor = &mut visitor;
        self.walk(
            first,
            last,
            visitor,
            |visitor, slot, chunk, base, from, to| {
                self.peek_chunk(slot, chunk, (base, from, to), visitor)
            },
        )
    }

    /// Visits the bits `first..=last` of a chunk, which begins with the bit `base`.
    fn peek_chunk<V: Visitor>(
        &self,
        slot: Slot<'_>,
        chunk: &Chunk,
        (base, first, last): (u64, u64, u64),
        visitor: &mut V,
    ) -> Result<(), V::Error> {
        // Relaxed: as in `Slot::take`.
        let summary = slot.summary.load(Ordering::Relaxed) & lines(first, last);
        // Acquire: pairs with the Release in `end_claim`.
        // - If this look finds a list, the list and its length are there.
        // - If it finds that the bits of one have moved, the words have them.
        let len = slot.state.load(Ordering::Acquire).list_len();
        if summary == 0 || len == 0 {
            return peek_words(chunk, summary, (base, first, last), visitor);
        }
        // The bits of the list and of the words together, in ascending order.
        let all = Chunk::new();
        if let Some(list) = self.list(base >> BITS_LG2) {
            add_masks(&all, list.masks(len));
        }
        for (all, word) in all.0.iter().zip(&chunk.0) {
            add(all, word.load(Ordering::Relaxed));
        }
        peek_words(&all, lines(first, last), (base, first, last), visitor)
    }
}

/// Visits the bits `first..=last` of the lines `left` of a chunk.
fn peek_words<V: Visitor>(
    chunk: &Chunk,
    mut left: u64,
    (base, first, last): (u64, u64, u64),
    visitor: &mut V,
) -> Result<(), V::Error> {
    while left != 0 {
        let line = left.trailing_zeros() as usize;
        left &= left - 1;
        visit_line::<false, false, _>(chunk, base, line, first, last, visitor)?;
    }
    Ok(())
}

/// C2 of a thread that leaves the bits of `lines` of `left` in the words of a chunk.
fn add_words(chunk: &Chunk, left: &ChunkWords, lines: u64) {
    let words = chunk.0.as_chunks::<LINE_WORDS>().0;
    for (line, masks) in lines_of(left, lines) {
        // Words without bits too: a branch for each of them takes longer.
        for (word, mask) in words[line].iter().zip(masks) {
            // Relaxed: the caller is the one writer.
            add(word, mask.load(Ordering::Relaxed));
        }
    }
}

/// The same of the bits of a list.
fn add_masks(chunk: &Chunk, masks: impl Iterator<Item = (u16, u64)>) {
    for (nth, mask) in masks {
        // Always below, and so without a test for each word.
        add(&chunk.0[usize::from(nth) % chunk.0.len()], mask);
    }
}

/// C2 of a thread that takes the bits `first..=last` of a chunk.
fn take_chunk<V: Visitor>(
    slot: Slot<'_>,
    chunk: &Chunk,
    (base, first, last): (u64, u64, u64),
    visitor: &mut V,
) -> Result<(), V::Error> {
    // Relaxed: the claim orders it.
    let mut summary = slot.summary.load(Ordering::Relaxed);
    let mut left = summary & lines(first, last);
    let whole = whole_lines(first, last);
    let mut outcome = Ok(());
    while left != 0 && outcome.is_ok() {
        let line = left.trailing_zeros() as usize;
        let words = ((line..LINES).len() * LINE_WORDS) as u64;
        let place = visitor.place(base + line as u64 * LINE_BITS, words);
        let mut taken = left & whole & lines_from(line, place.lines());
        if taken != 0 {
            let bits = take_lines::<false>(chunk, taken, line, place, |_, _| ());
            visitor.placed(bits);
        } else {
            taken = 1 << line;
            outcome = visit_line::<true, false, _>(chunk, base, line, first, last, visitor);
        }
        left &= !taken;
        if outcome.is_ok() {
            // The rest of a line that is taken in part keeps its summary.
            summary &= !(whole & taken);
        }
    }
    // Release: as the clear of a word, in `take::clear`.
    slot.summary.store(summary, Ordering::Release);
    outcome
}
