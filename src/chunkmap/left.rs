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
//! Such a bitmap has no marks, so the state of a chunk is free to hold the claim.

use super::chunk::{AtomicState, Chunk, LINE_BITS, LINE_WORDS, Slot, lines};
use super::map::ChunkMap;
use super::take::{LINES, Visitor, lines_from, take_lines, visit_line, whole_lines};
use crate::sync::{Ordering, Step, performs};

/// The claim of a chunk, until this is dropped.
struct Claim<'m>(Option<AtomicState<'m>>);

impl<'m> Claim<'m> {
    /// C1; `None` if another thread has the claim.
    fn new(slot: Slot<'m>) -> Option<Self> {
        match performs(Step::ClaimLeft) {
            true => slot.state.claim().then_some(Claim(Some(slot.state))),
            false => Some(Claim(None)),
        }
    }
}

impl Drop for Claim<'_> {
    /// C3, after a panic of a visitor too: what was visited is cleared, and all else is there.
    fn drop(&mut self) {
        if let Some(state) = self.0 {
            state.end_claim();
        }
    }
}

impl ChunkMap {
    /// Leaves bits in chunk `index`: of each word, by its place in the chunk, those of the mask.
    /// Returns false, and leaves nothing, if another thread changes the chunk at the moment.
    pub(crate) fn leave(&self, index: u64, masks: &[(u16, u64)]) -> bool {
        let (slot, chunk) = self.slot_or_new(index);
        let Some(_claim) = Claim::new(slot) else {
            return false;
        };
        let mut lines = 0;
        for (nth, mask) in masks {
            // Always below, and so without a test for each word.
            let nth = usize::from(*nth) % chunk.0.len();
            lines |= 1 << (nth / LINE_WORDS);
            // Relaxed, both: the claim orders them, here and below.
            let word = chunk.0[nth].load(Ordering::Relaxed);
            chunk.0[nth].store(word | mask, Ordering::Relaxed);
        }
        let summary = slot.summary.load(Ordering::Relaxed);
        slot.summary.store(summary | lines, Ordering::Relaxed);
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
                match Claim::new(slot) {
                    Some(_claim) => take_chunk(slot, chunk, (base, from, to), visitor),
                    None => slot.peek_left(chunk, (base, from, to), visitor),
                }
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
            |visitor, slot, chunk, base, from, to| slot.peek_left(chunk, (base, from, to), visitor),
        )
    }
}

impl Slot<'_> {
    fn peek_left<V: Visitor>(
        self,
        chunk: &Chunk,
        (base, first, last): (u64, u64, u64),
        visitor: &mut V,
    ) -> Result<(), V::Error> {
        // Relaxed: as in `Slot::take`.
        let mut left = self.summary.load(Ordering::Relaxed) & lines(first, last);
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            visit_line::<false, false, _>(chunk, base, line, first, last, visitor)?;
        }
        Ok(())
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
