//! The part of a flight for marks: the words that a harvest takes from one chunk of marks, until
//! they are pending for the other consumers.
//!
//! A harvest takes marks chunk by chunk, so it needs memory for one chunk at a time. The words lie
//! by the numbers of their pages, as those of the stores of consumers do. A chunk of marks may
//! begin anywhere in a word, so its words touch two neighbouring chunks of pages.
//!
//! # The protocol
//! A *crossing* is a seqlock with one writer, the owner of the flight. Its state is odd while it
//! names a chunk.
//!
//! ```text
//!  owner                                        another harvest
//!  X1  store lines = 0, the chunk               Y1  load the state; it ends here if it is even
//!  X2  store the state, odd                     Y2  load the chunk, pages, lines, words
//!  T1  store pages; or words, then their line   Y3  load the state again: if it differs,
//!  T2  clear the marks                              forget what Y2 has found
//!  T4  leave the words to the others
//!  T5  store the state, even
//! ```
//!
//! * If the other harvest has found a mark clear because of T2, Y1 sees the state of X2, or a later
//!   one. If it sees that state, Y2 sees T1.
//! * If Y3 finds another state, or Y1 finds a later one, then T5 has come: the words of the chunk
//!   are pending.
//! * If Y2 has found a chunk, lines or words of a later X1 or T1, Y3 sees the T5 before it.
//!
//! A word of a line that is not in `lines` is of an earlier chunk. So the first store to a line
//! replaces all words of it.
//!
//! # The list
//! The first pages of a chunk are in a list, one store for each, in ascending order. A page of the
//! list has the state of its crossing beside it, so T1 of it is one store (Release). Y2 looks at
//! listed pages up to the first one with another state, then at the words. If that state is of a
//! later crossing, Y2 sees the T5 before it.
//!
//! A chunk with more pages than the list has the rest in words (T1). At the end of such a chunk the
//! owner adds the listed pages to the words, and leaves the words. At the end of any other chunk it
//! leaves the list. The chunk after one with far more pages than a list has words alone.

use std::array::from_fn;

use crate::chunkmap::{CHUNK_WORDS, ChunkWords, Few, Handed, LINE_WORDS, MOST};
use crate::sync::{AtomicU64, Ordering, Step, weaken};
use crate::words::ones;

/// Words of a chunk.
const WORDS: usize = CHUNK_WORDS as usize;
/// Pages of a chunk.
const BITS: u64 = CHUNK_WORDS * 64;
/// The bits of a page of two chunks.
const PAGE_BITS: u32 = 16;

/// See the [module](self).
pub(super) struct Crossing {
    state: AtomicU64,
    /// The first of two chunks of pages, counted from address 0.
    chunk: AtomicU64,
    /// The lines of each that have words.
    lines: [AtomicU64; 2],
    /// The first pages, each with the state of its crossing above it.
    list: List,
    words: Words,
}

type List = [AtomicU64; MOST];

#[repr(align(64))]
struct Words([ChunkWords; 2]);

impl std::fmt::Debug for Crossing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Crossing").finish_non_exhaustive()
    }
}

impl Crossing {
    pub(super) fn new() -> Self {
        Crossing {
            state: AtomicU64::new(0),
            chunk: AtomicU64::new(0),
            lines: from_fn(|_| AtomicU64::new(0)),
            list: from_fn(|_| AtomicU64::new(0)),
            words: Words(from_fn(|_| from_fn(|_| AtomicU64::new(0)))),
        }
    }

    /// X1 and X2, of words in `chunk` and the one after it. The crossing before has ended.
    pub(super) fn begin(&self, chunk: u64) {
        self.lines.iter().for_each(|lines| change(lines, 0));
        change(&self.chunk, chunk);
        // Release: pairs with the Acquire in `visit`; publishes the chunk, and that it has no words
        // yet.
        let order = weaken(Step::PublishCrossing, Ordering::Release);
        self.state.store(self.own_state() + 1, order);
    }

    /// T1 of a line: `place` is that of its first word, in both chunks.
    #[inline(always)]
    pub(super) fn put_line(&self, place: usize, masks: &[u64; LINE_WORDS]) {
        debug_assert!(place.is_multiple_of(LINE_WORDS));
        let line = self.line(place).iter().zip(masks);
        line.for_each(|(word, mask)| change(word, *mask));
        self.add_line(place);
    }

    /// The value of the list for the first page of the chunk that has begun.
    pub(super) fn first_listed(&self) -> u64 {
        self.own_state() << PAGE_BITS
    }

    /// T1 of words, page by page, into the list, which has `listed` pages; `value` is that of the
    /// first of the words' pages. Returns how many it has then, and whether there was room for all.
    #[inline(always)]
    pub(super) fn list(&self, mut listed: usize, mut value: u64, masks: &[u64]) -> (usize, bool) {
        for mask in masks {
            let mut rest = *mask;
            while rest != 0 {
                let Some(page) = self.list.get(listed) else {
                    return (listed, false);
                };
                change(page, value + u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
                listed += 1;
            }
            value += 64;
        }
        (listed, true)
    }

    /// T1 of a word, in a line that may have others.
    pub(super) fn put(&self, place: usize, mask: u64) {
        let lines = self.own_lines(place / WORDS);
        if lines >> (place % WORDS / LINE_WORDS) & 1 == 0 {
            let line = self.line(place);
            line.iter().for_each(|word| change(word, 0));
            change(&line[place % LINE_WORDS], mask);
            return self.add_line(place);
        }
        let word = &self.line(place)[place % LINE_WORDS];
        // Relaxed: our own store.
        change(word, word.load(Ordering::Relaxed) | mask);
    }

    /// The line of a word.
    #[inline(always)]
    fn line(&self, place: usize) -> &[AtomicU64; LINE_WORDS] {
        let lines = self.words.0.as_flattened().as_chunks().0;
        &lines[place / LINE_WORDS % lines.len()]
    }

    #[inline(always)]
    fn add_line(&self, place: usize) {
        let nth = place / WORDS;
        let lines = self.own_lines(nth) | 1 << (place % WORDS / LINE_WORDS);
        // Release: pairs with the Acquire in `visit`; the words of the line are those of this
        // crossing.
        let order = weaken(Step::PublishLine, Ordering::Release);
        self.lines[nth % 2].store(lines, order);
    }

    /// T4 and T5, as the owner: calls `leave` with the pages of each chunk that has some.
    pub(super) fn end(&self, mut leave: impl FnMut(u64, Handed<'_>)) {
        let state = self.own_state();
        if state.is_multiple_of(2) {
            return;
        }
        // Relaxed: our own stores, here and below.
        let first = self.chunk.load(Ordering::Relaxed);
        let is_ours = |page: &AtomicU64| listed_in(state, page.load(Ordering::Relaxed)).is_some();
        let listed = &self.list[..self.list.partition_point(is_ours)];
        let below = |page: &AtomicU64| listed_in(state, page.load(Ordering::Relaxed)) < Some(BITS);
        let (low, high) = listed.split_at(listed.partition_point(below));
        for (nth, listed) in [low, high].into_iter().enumerate() {
            let chunk = first + nth as u64;
            if self.own_lines(nth) == 0 {
                if !listed.is_empty() {
                    leave(chunk, Handed::few(&Few::of_lowest_bits(listed)));
                }
                continue;
            }
            // The list was too short, or was not used.
            if !listed.is_empty() {
                let few = Few::of_lowest_bits(listed);
                few.masks()
                    .for_each(|(place, mask)| self.put(nth * WORDS + usize::from(place), mask));
            }
            let handed = Handed::new(&self.words.0[nth], self.own_lines(nth));
            // With pages in so few lines, a list was not tried.
            if listed.is_empty() && handed.lines().count_ones() as usize <= MOST / 2 {
                handed.listed(|handed| leave(chunk, handed));
            } else {
                leave(chunk, handed);
            }
        }
        // Release: pairs with the Acquires in `visit`; a reader that finds the crossing ended finds
        // its words pending. Readers of all later values find that too.
        self.state.store(state + 1, Ordering::Release);
    }

    /// Y1 to Y3: calls `visit` with the words of this moment, by the numbers of their first pages.
    ///
    /// # Errors
    /// Those of `visit`.
    pub(super) fn visit<E>(
        &self,
        mut visit: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        // Acquire, here and for the chunk, lines and words: pairs with the Releases above.
        let state = self.state.load(Ordering::Acquire);
        if state.is_multiple_of(2) {
            return Ok(());
        }
        let first = self.chunk.load(Ordering::Acquire);
        for page in &self.list {
            let Some(page) = listed_in(state, page.load(Ordering::Acquire)) else {
                break;
            };
            // Seqlock: as below, for the chunk.
            if self.state.load(Ordering::Relaxed) != state {
                return Ok(());
            }
            let page = first * BITS + page;
            visit(page / 64 * 64, 1 << (page % 64))?;
        }
        for (nth, words) in self.words.0.iter().enumerate() {
            for line in ones(self.lines[nth].load(Ordering::Acquire)) {
                let words = &words.as_chunks::<LINE_WORDS>().0[line];
                let seen: [u64; LINE_WORDS] = from_fn(|nth| words[nth].load(Ordering::Acquire));
                // Seqlock: if one of these values came from a later crossing, this load sees the
                // end of the one that was read, and the states differ. Relaxed: an Acquire fence
                // comes between this look and that at what is pending.
                if self.state.load(Ordering::Relaxed) != state {
                    return Ok(());
                }
                let word = (first + nth as u64) * CHUNK_WORDS + (line * LINE_WORDS) as u64;
                for (mask, word) in seen.into_iter().zip(word..) {
                    if mask != 0 {
                        visit(word * 64, mask)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The state, as the owner of the flight sees it.
    #[inline]
    fn own_state(&self) -> u64 {
        // Relaxed: of the one writer; `Flights::claim` orders those of the owner before.
        self.state.load(Ordering::Relaxed)
    }

    /// The same of its lines.
    #[inline(always)]
    fn own_lines(&self, nth: usize) -> u64 {
        // Relaxed: as above.
        self.lines[nth % 2].load(Ordering::Relaxed)
    }
}

/// The page of a list in which it has this value, if it is of the crossing with `state`.
#[inline(always)]
fn listed_in(state: u64, value: u64) -> Option<u64> {
    (value >> PAGE_BITS == state << PAGE_BITS >> PAGE_BITS)
        .then_some(value & ((1 << PAGE_BITS) - 1))
}

/// Changes a word, a page of the list, the lines or the chunk of a crossing.
#[inline(always)]
fn change(word: &AtomicU64, value: u64) {
    // Release: pairs with the Acquire loads in `Crossing::visit`. A reader that sees this value
    // finds that the state has changed since it began.
    word.store(value, weaken(Step::ChangeBeforeWords, Ordering::Release));
}
