//! The harvester's side of a [`chunk`](super::chunk): its bits are shown to who takes them, and cleared after that.

use std::convert::Infallible;

use super::chunk::{CHUNK_BITS, Chunk, KIND, LINE_BITS, LINE_WORDS, SPLIT, Slot, WHOLE, lines};
use super::word_mask;
use crate::sync::{AtomicU64, Ordering, Step, fence, fence_after_rmw, performs};

/// Who gets to see bits of a bitmap.
pub(crate) trait Visitor {
    /// Why it may not want more.
    type Error;

    /// Receives the bits of `mask`, of which the lowest one stands for the bit `first` of the bitmap. A harvest clears them after
    /// that.
    ///
    /// # Errors
    /// They stay as they are.
    fn visit(&mut self, first: u64, mask: u64) -> Result<(), Self::Error>;

    /// The words of a line that begins with the bit `first`; `found` says which of them are not 0. If it does not want them so,
    /// they come one by one.
    #[inline]
    fn visit_line(&mut self, _first: u64, _words: &[u64; LINE_WORDS], _found: u64) -> bool {
        false
    }
}

impl<E, F: FnMut(u64, u64) -> Result<(), E>> Visitor for F {
    type Error = E;

    #[inline]
    fn visit(&mut self, first: u64, mask: u64) -> Result<(), E> {
        self(first, mask)
    }
}

/// Who takes bits out of a bitmap: what it has visited is cleared.
pub(crate) trait Taker: Visitor {
    /// Whether [`visit`](Visitor::visit) may fail.
    fn may_fail(&self) -> bool;

    /// Makes sure, if it can, that no visit of the bits `first..=last` fails until something else is secured; whether it could.
    ///
    /// # Errors
    /// Those of `visit`; nothing is hidden from others then.
    fn secure(&mut self, first: u64, last: u64) -> Result<bool, Self::Error>;
}

/// What cannot fail has nothing to secure.
impl<F: FnMut(u64, u64) -> Result<(), Infallible>> Taker for F {
    #[inline]
    fn may_fail(&self) -> bool {
        false
    }

    #[inline]
    fn secure(&mut self, _: u64, _: u64) -> Result<bool, Infallible> {
        Ok(true)
    }
}

impl Slot<'_> {
    /// Takes the bits `first..=last` of `chunk`, which begins with bit `base`: see [`ChunkMap::take`](super::ChunkMap::take).
    #[inline]
    pub(super) fn take<T: Taker>(
        self,
        chunk: &Chunk,
        base: u64,
        first: u64,
        last: u64,
        taker: &mut T,
    ) -> Result<(), T::Error> {
        // Relaxed: as in `has_any`.
        let seen = self.summary.load(Ordering::Relaxed) & lines(first, last);
        if seen == 0 {
            return Ok(());
        }
        if taker.may_fail() {
            return self.take_securely(chunk, base, seen, (first, last), taker);
        }
        let mut cleared = Cleared {
            summary: self.summary,
            lines: seen & whole_lines(first, last),
        };
        let early = performs(Step::SummaryFirst);
        if early {
            cleared.clear();
        }
        let mut left = seen;
        // Acquire: pairs with the Release of `set_whole`, and of who ended the state: then the words are there. Behind F5.
        let state = self.state.load(Ordering::Acquire);
        if state & KIND != 0 {
            left = lines(first, last);
            if first == 0 && last == CHUNK_BITS - 1 {
                visit_all(base, 0, last, taker)?;
                self.end(state);
                // All of the words were visited, so what they have goes without another visit.
                clear_words(chunk);
                left = 0;
                if early {
                    cleared.lines = 0;
                }
            } else {
                self.publish(chunk, state);
            }
        }
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            visit_line::<true, _>(chunk, base, line, first, last, taker)?;
            if early {
                cleared.lines &= !(1 << line);
            }
        }
        if !early {
            cleared.clear();
            cleared.lines = 0;
        }
        Ok(())
    }

    /// The same line by line, for a taker that may fail: the place of a line is secured before its summary is cleared.
    fn take_securely<T: Taker>(
        self,
        chunk: &Chunk,
        base: u64,
        seen: u64,
        (first, last): (u64, u64),
        taker: &mut T,
    ) -> Result<(), T::Error> {
        let whole = whole_lines(first, last);
        let mut left = seen;
        if self.publish_whole(chunk) {
            left = lines(first, last);
        }
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            let start = line as u64 * LINE_BITS;
            let (from, to) = (first.max(start), last.min(start + (LINE_BITS - 1)));
            // A line without bits needs no place; its summary stays for who comes by with one.
            if !has_bits(chunk, line) {
                continue;
            }
            let mut cleared = Cleared {
                summary: self.summary,
                lines: whole & (1 << line),
            };
            if !performs(Step::SecureBeforeHide) {
                cleared.clear();
            }
            let secured = taker.secure(base + from, base + to)?;
            if secured && performs(Step::SecureBeforeHide) {
                cleared.clear();
                // Behind F5: a mark of all of the chunk that has found the summary set is seen here.
                if performs(Step::LookBehindHide) {
                    self.publish_whole(chunk);
                }
            } else if !secured {
                cleared.lines = 0;
            }
            visit_line::<true, _>(chunk, base, line, first, last, taker)?;
            cleared.lines = 0;
        }
        Ok(())
    }

    /// Moves the state to the words, if it is not clean; whether it was not.
    fn publish_whole(self, chunk: &Chunk) -> bool {
        // Acquire: as in `take`.
        let state = self.state.load(Ordering::Acquire);
        let dirty = state & KIND != 0;
        if dirty {
            self.publish(chunk, state);
        }
        dirty
    }

    /// Moves a state that is not clean to the words. Other harvesters may do the same.
    #[cold]
    fn publish(self, chunk: &Chunk, state: u64) {
        let mut split = state;
        if state & KIND == WHOLE && performs(Step::AnnounceSplit) {
            split = state - WHOLE + SPLIT;
            // AcqRel: as in `end`; the words come behind it. On failure another one has gone on: look at what came of it.
            let exchange = (Ordering::AcqRel, Ordering::Acquire);
            match self
                .state
                .compare_exchange(state, split, exchange.0, exchange.1)
            {
                Ok(_) => {}
                // Split by another one.
                Err(newer) if newer == split => {}
                // Ended, or whole anew: in the latter case the next look finds it. What was seen is in the words, or with who
                // recorded it.
                Err(newer) if newer & KIND == 0 => return,
                Err(newer) => return self.publish(chunk, newer),
            }
        }
        // SeqCst: between the end of WHOLE and the look at the words; pairs with F1 and F2. A word that is found set is cleared, if at
        // all, by one whose copies come behind the data of whoever still relied on WHOLE.
        fence(Ordering::SeqCst);
        if performs(Step::PublishRest) {
            self.set_words(chunk, 0, CHUNK_BITS - 1);
        }
        self.end(split);
    }

    /// Makes `state` clean, if it is still there.
    fn end(self, state: u64) {
        let clean = state & !KIND;
        // Release: pairs with the looks at the state; whoever sees it clean sees what the visit did, or the words that are set
        // instead. Acquire: pairs with the Release of `set_whole`. Relaxed on failure: nothing is read.
        let _ = self
            .state
            .compare_exchange(state, clean, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Looks at the bits `first..=last`, as [`take`](Self::take): see [`ChunkMap::peek`](super::ChunkMap::peek).
    pub(super) fn peek<V: Visitor>(
        self,
        chunk: &Chunk,
        base: u64,
        first: u64,
        last: u64,
        visitor: &mut V,
    ) -> Result<(), V::Error> {
        // Relaxed: as in `has_any`.
        let mut left = self.summary.load(Ordering::Relaxed) & lines(first, last);
        // Acquire: as in `take`.
        if left != 0 && self.state.load(Ordering::Acquire) & KIND != 0 {
            return visit_all(base, first, last, visitor);
        }
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            visit_line::<false, _>(chunk, base, line, first, last, visitor)?;
        }
        Ok(())
    }
}

/// Lines whose summary a harvester has cleared, and whose words it has not taken yet. Dropped, it puts them back.
struct Cleared<'a> {
    summary: &'a AtomicU64,
    lines: u64,
}

impl Cleared<'_> {
    /// H1 and F5.
    #[inline]
    fn clear(&self) {
        if self.lines != 0 {
            // Relaxed: the fence orders it before the look at the words. Clears what was seen and no more.
            self.summary.fetch_and(!self.lines, Ordering::Relaxed);
            if performs(Step::SummaryFence) {
                // SeqCst: F5 of the module's protocol; pairs with F3.
                fence_after_rmw();
            }
        }
    }
}

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        if self.lines != 0 {
            // Relaxed: the bits have been there before; who sees the summary set too late finds them at the next harvest.
            self.summary.fetch_or(self.lines, Ordering::Relaxed);
        }
    }
}

/// Whether a word of `line` has bits.
fn has_bits(chunk: &Chunk, line: usize) -> bool {
    let words = &chunk.0[line * LINE_WORDS..][..LINE_WORDS];
    // Relaxed: of a mark that has returned, coherence shows it, unless a harvester took it.
    let or = |any, word: &AtomicU64| any | word.load(Ordering::Relaxed);
    words.iter().fold(0, or) != 0
}

/// Gives `visitor` all bits of `first..=last` of a chunk that begins with `base`.
fn visit_all<V: Visitor>(
    base: u64,
    first: u64,
    last: u64,
    visitor: &mut V,
) -> Result<(), V::Error> {
    const FULL: [u64; LINE_WORDS] = [u64::MAX; LINE_WORDS];
    let found = word_mask(0, LINE_WORDS as u32 - 1);
    let mut bit = first;
    while bit <= last {
        let word_last = last.min(bit | 63);
        if bit.is_multiple_of(LINE_BITS)
            && bit + (LINE_BITS - 1) <= last
            && visitor.visit_line(base + bit, &FULL, found)
        {
            bit += LINE_BITS;
            continue;
        }
        let mask = word_mask((bit % 64) as u32, (word_last % 64) as u32);
        visitor.visit(base + (bit & !63), mask)?;
        bit = word_last + 1;
    }
    Ok(())
}

/// Gives `visitor` the words of `line` that have bits of `first..=last`, and clears these after the call if `TAKE`.
#[inline]
fn visit_line<const TAKE: bool, V: Visitor>(
    chunk: &Chunk,
    base: u64,
    line: usize,
    first: u64,
    last: u64,
    visitor: &mut V,
) -> Result<(), V::Error> {
    let words = &chunk.0[line * LINE_WORDS..][..LINE_WORDS];
    let start = line as u64 * LINE_BITS;
    // Relaxed: F5 orders the looks after the clear of the summary; what is found is taken by the fetch_and.
    let seen: [u64; LINE_WORDS] = std::array::from_fn(|nth| words[nth].load(Ordering::Relaxed));
    // Which words have bits, without a branch for each.
    let mut found = 0u64;
    for (nth, seen) in seen.iter().enumerate() {
        found |= u64::from(*seen != 0) << nth;
    }
    let inside = first <= start && start + (LINE_BITS - 1) <= last;
    // A locked operation waits for the stores before it: so all words of a line are recorded first, and cleared then.
    if TAKE
        && inside
        && found & found.wrapping_sub(1) != 0
        && visitor.visit_line(base + start, &seen, found)
    {
        for nth in ones(found) {
            clear(&words[nth], seen[nth]);
        }
        return Ok(());
    }
    for nth in ones(found) {
        let bit = start + nth as u64 * 64;
        let mut seen = seen[nth];
        if !inside {
            if bit + 63 < first || last < bit {
                continue;
            }
            let low = first.saturating_sub(bit) as u32;
            seen &= word_mask(low, (last - bit).min(63) as u32);
        }
        if seen == 0 {
            continue;
        }
        visitor.visit(base + bit, seen)?;
        if TAKE {
            clear(&words[nth], seen);
        }
    }
    Ok(())
}

/// Clears the bits of `seen`, which were visited, and no more: a bit that was set in between stays for the next harvest.
#[inline(always)]
fn clear(word: &AtomicU64, seen: u64) {
    // Acquire: pairs with the Release of `set`; Release: a marker that sees the bit gone sees what the visit did.
    word.fetch_and(!seen, Ordering::AcqRel);
}

/// Clears the words of a chunk that was visited as a whole.
fn clear_words(chunk: &Chunk) {
    for line in chunk.0.chunks(LINE_WORDS) {
        // Relaxed: as in `visit_line`.
        let or = |any, word: &AtomicU64| any | word.load(Ordering::Relaxed);
        if line.iter().fold(0, or) != 0 {
            for word in line {
                let seen = word.load(Ordering::Relaxed);
                if seen != 0 {
                    clear(word, seen);
                }
            }
        }
    }
}

/// The numbers of the bits of `mask`.
#[inline(always)]
pub(super) fn ones(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let nth = mask.trailing_zeros() as usize;
        (mask != 0).then(|| {
            mask &= mask - 1;
            nth
        })
    })
}

/// The lines that lie in the bits `first..=last` as a whole.
#[inline]
fn whole_lines(first: u64, last: u64) -> u64 {
    let (from, end) = (first.div_ceil(LINE_BITS), (last + 1) / LINE_BITS);
    if from < end {
        word_mask(from as u32, (end - 1) as u32)
    } else {
        0
    }
}
