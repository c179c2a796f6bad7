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
//!   place it cannot secure as a whole: see [`Taker`]. Only a panic puts lines back into the summary.
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

use std::convert::Infallible;
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
const CHUNK_BITS: u64 = 64 << WORDS_LG2;
/// All lines of a chunk.
const ALL_LINES: u64 = word_mask(0, (CHUNK_BITS / LINE_BITS - 1) as u32);

/// The lower two bits of a state. 0 is clean.
const KIND: u64 = 3;
const WHOLE: u64 = 1;
const SPLIT: u64 = 2;
/// What is added to a state for the next number.
const NEXT: u64 = KIND + 1;

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
    summary: &'a AtomicU64,
    pub(super) chunk: &'a AtomicPtr<()>,
    state: &'a AtomicU64,
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
    fn set_words(self, chunk: &Chunk, first: u64, last: u64) -> bool {
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

/// The lines that the bits `first..=last` touch.
#[inline]
fn lines(first: u64, last: u64) -> u64 {
    word_mask((first / LINE_BITS) as u32, (last / LINE_BITS) as u32)
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
