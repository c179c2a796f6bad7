//! The harvester's side of a [`chunk`](super::chunk): it shows each word with bits to a visitor,
//! and clears the bits after that.

use std::convert::Infallible;

use super::chunk::{CHUNK_BITS, Chunk, LINE_BITS, LINE_WORDS, Slot, State, lines};
use super::place::Place;
use crate::sync::{AtomicU64, Ordering, Step, fence, fence_after_rmw, performs};
use crate::words::{ones, word_mask};

/// Lines of a chunk.
pub(super) const LINES: usize = (CHUNK_BITS / LINE_BITS) as usize;

/// Receives the bits of a bitmap, word by word.
pub(crate) trait Visitor {
    /// The error that ends the walk early.
    type Error;

    /// Receives the bits of `mask`, whose lowest bit stands for the bit `first` of the bitmap. A
    /// harvest clears them afterwards.
    ///
    /// # Errors
    /// The walk ends; the bits stay as they are.
    fn visit(&mut self, first: u64, mask: u64) -> Result<(), Self::Error>;

    /// Where the bits of `words` words, from the bit `first` on, are recorded: as many of these
    /// words as the visitor has at hand, from the first one on. Bits that are recorded there are
    /// not visited.
    #[inline(always)]
    fn place(&self, _first: u64, _words: u64) -> Place<'_> {
        Place::NONE
    }

    /// The walk comes to `lines` of the chunk that begins with the bit `first` soon: asks for
    /// memory that the visitor will use for them.
    #[inline(always)]
    fn ahead(&self, _first: u64, _lines: u64) {}

    /// The walk takes bits of the chunk that begins with the bit `base`.
    #[inline(always)]
    fn begin(&self, _base: u64) {}

    /// Receives the bits of one word, or of all words of a line, that were recorded in a
    /// [`place`](Self::place), before they are cleared. `word` is the place of the first one in the
    /// chunk that was [begun](Self::begin) last.
    #[inline(always)]
    fn share(&self, _word: usize, _masks: &[u64]) {}

    /// Counts `bits` that were recorded in a [`place`](Self::place) and were clear there.
    #[inline(always)]
    fn placed(&mut self, _bits: u64) {}
}

impl<E, F: FnMut(u64, u64) -> Result<(), E>> Visitor for F {
    type Error = E;

    #[inline]
    fn visit(&mut self, first: u64, mask: u64) -> Result<(), E> {
        self(first, mask)
    }
}

/// Takes bits out of a bitmap: bits that it has visited are cleared.
pub(crate) trait Taker: Visitor {
    /// Whether [`visit`](Visitor::visit) may fail.
    fn may_fail(&self) -> bool;

    /// Secures a place for the bits `first..=last`: until the next call, visits of them succeed.
    /// Returns false if that cannot be promised.
    ///
    /// # Errors
    /// Those of `visit`; nothing is hidden from other harvests then.
    fn secure(&mut self, first: u64, last: u64) -> Result<bool, Self::Error>;
}

/// An infallible visitor has nothing to secure.
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
    /// Takes the bits `first..=last` of `chunk`, which begins with bit `base`: see
    /// [`ChunkMap::take`](super::ChunkMap::take).
    #[inline]
    pub(super) fn take<T: Taker>(
        self,
        chunk: &Chunk,
        base: u64,
        first: u64,
        last: u64,
        taker: &mut T,
    ) -> Result<(), T::Error> {
        // Relaxed: as in `Group::next_dirty`.
        let seen = self.summary.load(Ordering::Relaxed) & lines(first, last);
        if seen == 0 {
            return Ok(());
        }
        taker.begin(base);
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
        // Acquire, after F5: pairs with the Release of `set_whole`, and with that of the harvest
        // that ended the state, which had set the words before.
        let state = self.state.load(Ordering::Acquire);
        if !state.is_clean() {
            left = lines(first, last);
            if first == 0 && last == CHUNK_BITS - 1 {
                visit_all(base, 0, last, taker)?;
                self.state.end(state);
                // All bits were visited, so those in the words go without another visit.
                clear_words(chunk);
                left = 0;
                if early {
                    cleared.lines = 0;
                }
            } else {
                self.publish(chunk, state);
            }
        }
        let whole = whole_lines(first, last);
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            let words = ((line..LINES).len() * LINE_WORDS) as u64;
            let place = taker.place(base + line as u64 * LINE_BITS, words);
            let mut taken = left & whole & lines_from(line, place.lines());
            if taken != 0 {
                let share = |word: usize, seen: &[u64]| taker.share(word, seen);
                let bits = take_lines::<true>(chunk, taken, line, place, share);
                taker.placed(bits);
            } else {
                visit_line::<true, true, _>(chunk, base, line, first, last, taker)?;
                taken = 1 << line;
            }
            left &= !taken;
            if early {
                cleared.lines &= !taken;
            }
        }
        if !early {
            cleared.clear();
            cleared.lines = 0;
        }
        Ok(())
    }

    /// The same line by line, for a fallible taker: it secures the place of a line before it clears
    /// the line's summary.
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
            // A line without bits needs no place; a later harvest clears its summary.
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
                // After F5: a mark of the whole chunk that found the summary set is visible here.
                if performs(Step::LookBehindHide) {
                    self.publish_whole(chunk);
                }
            } else if !secured {
                cleared.lines = 0;
            }
            visit_line::<true, true, _>(chunk, base, line, first, last, taker)?;
            cleared.lines = 0;
        }
        Ok(())
    }

    /// Moves the state to the words unless it is clean; returns whether there was anything to move.
    fn publish_whole(self, chunk: &Chunk) -> bool {
        // Acquire: as in `take`.
        let state = self.state.load(Ordering::Acquire);
        if !state.is_clean() {
            self.publish(chunk, state);
        }
        !state.is_clean()
    }

    /// Moves `state`, which is not clean, to the words. Other harvesters may do the same.
    #[cold]
    fn publish(self, chunk: &Chunk, state: State) {
        let mut split = state;
        if state.is_whole() && performs(Step::AnnounceSplit) {
            split = state.split();
            // AcqRel on success: as in `AtomicState::end`; the words come after it. Acquire on
            // failure: another thread changed the state, and the next look starts from the new one.
            let order = (Ordering::AcqRel, Ordering::Acquire);
            match self.state.replace(state, split, order.0, order.1) {
                Ok(()) => {}
                // Another harvest announced the same split.
                Err(newer) if newer == split => {}
                // The state ended: its bits are in the words, or another harvest recorded them.
                // If the chunk is whole anew, the next look finds that.
                Err(newer) if newer.is_clean() => return,
                Err(newer) => return self.publish(chunk, newer),
            }
        }
        if performs(Step::SplitFence) {
            // SeqCst: between the announcement and the look at the words; pairs with F1 of a mark,
            // which comes before its look at the state, and F2 of a sync.
            // - If this fence is before F1, the mark sees the split, and makes the chunk whole
            //   anew.
            // - If F1 is before this fence, the mark may rely on *whole*. A word that is found set
            //   below, and that another harvest takes, is taken before the F2 of that harvest. This
            //   F2 is after this fence, and so after F1: the copies have the data of the mark.
            fence(Ordering::SeqCst);
        }
        if performs(Step::PublishRest) {
            self.set_range(chunk, 0, CHUNK_BITS - 1);
        }
        self.state.end(split);
    }

    /// Looks at the bits `first..=last`, as [`take`](Self::take): see
    /// [`ChunkMap::peek`](super::ChunkMap::peek).
    pub(super) fn peek<V: Visitor>(
        self,
        chunk: &Chunk,
        base: u64,
        first: u64,
        last: u64,
        visitor: &mut V,
    ) -> Result<(), V::Error> {
        // Relaxed: as in `Group::next_dirty`.
        let seen = self.summary.load(Ordering::Relaxed) & lines(first, last);
        self.peek_lines(chunk, base, seen, (first, last), visitor)
    }

    /// As [`peek`](Self::peek), of the lines `left`.
    pub(super) fn peek_lines<V: Visitor>(
        self,
        chunk: &Chunk,
        base: u64,
        mut left: u64,
        (first, last): (u64, u64),
        visitor: &mut V,
    ) -> Result<(), V::Error> {
        // Acquire: as in `take`.
        if left != 0 && !self.state.load(Ordering::Acquire).is_clean() {
            return visit_all(base, first, last, visitor);
        }
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            visit_line::<false, true, _>(chunk, base, line, first, last, visitor)?;
        }
        Ok(())
    }
}

/// Lines whose summary a harvester has cleared, and whose words it has not taken yet. Dropping this
/// puts them back into the summary.
struct Cleared<'a> {
    summary: &'a AtomicU64,
    lines: u64,
}

impl Cleared<'_> {
    /// H1 and F5.
    #[inline]
    fn clear(&self) {
        if self.lines != 0 {
            // Relaxed: the fence orders it before the look at the words. Clears what was seen and
            // no more.
            self.summary.fetch_and(!self.lines, Ordering::Relaxed);
            if performs(Step::SummaryFence) {
                // SeqCst: F5 of the protocol in `chunk`; pairs with F3 of a mark.
                // - If F3 is first, the look at the words finds the bit.
                // - If F5 is first, the mark finds the summary clear and sets it.
                fence_after_rmw();
            }
        }
    }
}

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        if self.lines != 0 {
            // Relaxed: the bits were there before. A harvest that sees the summary too late leaves
            // them for the next one.
            self.summary.fetch_or(self.lines, Ordering::Relaxed);
        }
    }
}

/// Whether a word of `line` has bits.
fn has_bits(chunk: &Chunk, line: usize) -> bool {
    let words = &chunk.0[line * LINE_WORDS..][..LINE_WORDS];
    // Relaxed: coherence shows the bits of a mark that has returned, unless a harvester took them.
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
    let mut bit = first;
    while bit <= last {
        // The words that are shared together are those of a line of the chunk.
        let place = match bit.is_multiple_of(LINE_BITS) {
            true => visitor.place(base + bit, (last + 1 - bit) / 64),
            false => Place::NONE,
        };
        if place.lines() > 0 {
            let next = bit + place.lines() as u64 * LINE_BITS;
            let bits = place.fill();
            (bit..next)
                .step_by(LINE_BITS as usize)
                .for_each(|bit| visitor.share((bit / 64) as usize, &[u64::MAX; LINE_WORDS]));
            bit = next;
            visitor.placed(bits);
            continue;
        }
        let word_last = last.min(bit | 63);
        let mask = word_mask((bit % 64) as u32, (word_last % 64) as u32);
        visitor.visit(base + (bit & !63), mask)?;
        bit = word_last + 1;
    }
    Ok(())
}

/// Records the words of `lines` in `place`, which begins with line `from` and has all of them, and
/// clears them after that. Returns how many bits were clear in the place. `share` gets words,
/// by the place of the first one in the chunk, before they are cleared. `SHARED` is that of
/// [`visit_line`].
#[inline]
pub(super) fn take_lines<const SHARED: bool>(
    chunk: &Chunk,
    lines: u64,
    from: usize,
    place: Place<'_>,
    share: impl Fn(usize, &[u64]),
) -> u64 {
    #[cfg(all(target_arch = "x86_64", not(target_feature = "popcnt"), not(miri)))]
    if std::is_x86_feature_detected!("popcnt") {
        // SAFETY: this processor has the instruction.
        return unsafe { take_lines_popcnt::<SHARED>(chunk, lines, from, place, share) };
    }
    take_each_line::<SHARED>(chunk, lines, from, place, share)
}

/// As [`take_lines`], for processors that count bits by one instruction, which the baseline does
/// not have.
#[cfg(all(target_arch = "x86_64", not(target_feature = "popcnt"), not(miri)))]
#[target_feature(enable = "popcnt")]
fn take_lines_popcnt<const SHARED: bool>(
    chunk: &Chunk,
    lines: u64,
    from: usize,
    place: Place<'_>,
    share: impl Fn(usize, &[u64]),
) -> u64 {
    take_each_line::<SHARED>(chunk, lines, from, place, share)
}

#[inline(always)]
fn take_each_line<const SHARED: bool>(
    chunk: &Chunk,
    lines: u64,
    from: usize,
    place: Place<'_>,
    share: impl Fn(usize, &[u64]),
) -> u64 {
    let mut bits = 0;
    for line in ones(lines) {
        let words = chunk.0[line * LINE_WORDS..].first_chunk();
        if let Some((words, place)) = words.zip(place.line(line - from)) {
            let first = line * LINE_WORDS;
            bits += take_line::<SHARED>(words, place, |nth, seen| share(first + nth, seen));
        }
    }
    bits
}

/// Records the words of a line in `place`, and clears them. Returns how many bits were clear there.
///
/// A locked operation waits for the stores before it, so all words are recorded first.
#[inline(always)]
fn take_line<const SHARED: bool>(
    words: &[AtomicU64; LINE_WORDS],
    place: &[AtomicU64; LINE_WORDS],
    share: impl Fn(usize, &[u64]),
) -> u64 {
    // Relaxed, here and below: F5 orders the looks after the clear of the summary; `clear` takes
    // what is found.
    let look = |nth: usize| words[nth].load(Ordering::Relaxed);
    let record = |nth: usize, seen: u64| u64::from(Place::record(&place[nth], seen).count_ones());
    // A mask of the words that have bits, without a branch for each.
    let found = match LINE_WORDS {
        1 => 1,
        _ => (0..LINE_WORDS)
            .rev()
            .fold(0u64, |found, nth| found * 2 + u64::from(look(nth) != 0)),
    };
    let mut bits = 0;
    if found & found.wrapping_sub(1) == 0 {
        let nth = found.trailing_zeros() as usize % LINE_WORDS;
        let seen = look(nth);
        if seen != 0 {
            bits = record(nth, seen);
            share(nth, &[seen]);
            clear::<SHARED>(&words[nth], seen);
        }
        return bits;
    }
    if found == word_mask(0, LINE_WORDS as u32 - 1) {
        let seen: [u64; LINE_WORDS] = std::array::from_fn(look);
        for (nth, seen) in seen.iter().enumerate() {
            bits += record(nth, *seen);
        }
        share(0, &seen);
        for (word, seen) in words.iter().zip(seen) {
            clear::<SHARED>(word, seen);
        }
        return bits;
    }
    let mut seen = [0; LINE_WORDS];
    for nth in ones(found) {
        seen[nth] = look(nth);
        bits += record(nth, seen[nth]);
    }
    share(0, &seen);
    for nth in ones(found) {
        clear::<SHARED>(&words[nth], seen[nth]);
    }
    bits
}

/// Gives `visitor` the words of `line` that have bits of `first..=last`, and clears these bits
/// after the call if `TAKE`: by locked operations if the line is `SHARED` with threads that set
/// bits.
#[inline]
pub(super) fn visit_line<const TAKE: bool, const SHARED: bool, V: Visitor>(
    chunk: &Chunk,
    base: u64,
    line: usize,
    first: u64,
    last: u64,
    visitor: &mut V,
) -> Result<(), V::Error> {
    let words = &chunk.0[line * LINE_WORDS..][..LINE_WORDS];
    let start = line as u64 * LINE_BITS;
    // Relaxed: F5 orders the looks after the clear of the summary; `clear` takes what is found.
    let seen: [u64; LINE_WORDS] = std::array::from_fn(|nth| words[nth].load(Ordering::Relaxed));
    // A mask of the words that have bits, without a branch for each.
    let mut found = 0u64;
    for (nth, seen) in seen.iter().enumerate() {
        found |= u64::from(*seen != 0) << nth;
    }
    let inside = first <= start && start + (LINE_BITS - 1) <= last;
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
            clear::<SHARED>(&words[nth], seen);
        }
    }
    Ok(())
}

/// Clears the bits of `seen`, which were visited. A bit that was set in between stays for the next
/// harvest. Without `SHARED`, no other thread changes the word meanwhile: see
/// [`left`](super::left).
#[inline(always)]
fn clear<const SHARED: bool>(word: &AtomicU64, seen: u64) {
    if !SHARED {
        // Relaxed: the claim of the chunk orders it.
        let others = word.load(Ordering::Relaxed) & !seen;
        // Release: pairs with the Acquire fence in `copy_of`. A copy of the consumer that finds the
        // word taken sees the count of the harvest that took it.
        return word.store(others, Ordering::Release);
    }
    // Acquire: pairs with the Release of `set_word` and `set_words`; the copy of the page comes
    // after the data of the mark. Release: a marker that sees the bit gone sees what the visit did.
    word.fetch_and(!seen, Ordering::AcqRel);
}

/// Clears the words of a chunk that was visited as a whole.
fn clear_words(chunk: &Chunk) {
    for line in chunk.0.as_chunks::<LINE_WORDS>().0 {
        // Relaxed: as in `visit_line`.
        let or = |any, word: &AtomicU64| any | word.load(Ordering::Relaxed);
        if line.iter().fold(0, or) != 0 {
            for word in line {
                let seen = word.load(Ordering::Relaxed);
                if seen != 0 {
                    clear::<true>(word, seen);
                }
            }
        }
    }
}

/// `count` lines from `line` on, as far as a chunk has them.
#[inline(always)]
pub(super) fn lines_from(line: usize, count: usize) -> u64 {
    match count.min(LINES - line) {
        0 => 0,
        count => word_mask(line as u32, (line + count - 1) as u32),
    }
}

/// The lines that lie in the bits `first..=last` as a whole.
#[inline]
pub(super) fn whole_lines(first: u64, last: u64) -> u64 {
    let (from, end) = (first.div_ceil(LINE_BITS), (last + 1) / LINE_BITS);
    if from < end {
        word_mask(from as u32, (end - 1) as u32)
    } else {
        0
    }
}
