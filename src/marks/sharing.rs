//! The visitor by which a harvest takes marks that it leaves to other consumers, in one pass: each
//! word goes into the bitmap of the harvest and into its flight, then it is cleared. After the last
//! word of a chunk of marks, those words are left to the others, and wiped from the flight.
//!
//! ```text
//!  T1  record in the bitmap, in the flight, and in a list    for each word of a chunk
//!  T2  clear it
//!  T4  leave the list to the others                          after the chunk
//!  T5  wipe the words of the list from the flight
//! ```
//!
//! Words of other places are in the flight already, from the look at the tables before. They stay
//! there: only the bits of the list are wiped.
//!
//! A chunk that is dirty as a whole is visited whole before its state ends (T2). So nothing is left
//! to others in the middle of a chunk.

use std::cell::{Cell, RefCell};

use super::{Flight, Marks, Recorder};
use crate::bitmap::Sink;
use crate::chunkmap::{CHUNK_WORDS, ChunkWords, LINE_WORDS, Place, Taker, Visitor};
use crate::error::Stopped;
use crate::sync::{AtomicU64, Ordering};
use crate::units::IovaRange;

/// Words of a flight that words of one chunk of marks touch, at most: the chunk may begin inside of
/// a word.
const WORDS: usize = CHUNK_WORDS as usize + 1;
/// Bits of a chunk.
const CHUNK_BITS: u64 = CHUNK_WORDS * 64;

impl Marks {
    /// As [`read_and_clear`](Self::read_and_clear), of a harvest with `flight`. Calls `leave` with
    /// words of a chunk, by their places, after they were cleared; chunks and words count from
    /// address 0.
    pub(crate) fn share(
        &self,
        range: IovaRange,
        sink: &mut Sink<'_>,
        flight: &Flight,
        leave: impl Fn(u64, &[(u16, u64)]),
    ) -> Result<(), Stopped> {
        let Some((first, last)) = self.bits_of(range) else {
            return Ok(());
        };
        let mut sharer = Sharer {
            recorder: Recorder::new(self, range, sink),
            flight,
            leave,
            chunk: Cell::new(u64::MAX),
            first: Cell::new(0),
            shift: Cell::new(0),
            chunks: [Cell::new(None), Cell::new(None)],
            before: [Cell::new(0), Cell::new(0)],
            list: RefCell::new(List {
                found: None,
                len: 0,
            }),
        };
        let taken = self.bits.take(first, last, &mut sharer);
        sharer.finish();
        taken
    }
}

/// See the [module](self). Cells, because the look at a place of the bitmap borrows the visitor.
struct Sharer<'r, 'b, F> {
    recorder: Recorder<'r, 'b>,
    flight: &'r Flight,
    leave: F,
    /// The chunk of marks whose words are in the list.
    chunk: Cell<u64>,
    /// The word of the flight that holds the first bit of that chunk, and the place of that bit.
    first: Cell<u64>,
    shift: Cell<u32>,
    /// The chunks of the flight that hold it.
    chunks: [Cell<Option<InFlight<'r>>>; 2],
    /// The summaries of what is there already.
    before: [Cell<u64>; 2],
    list: RefCell<List>,
}

/// Words of the flight, counted from the first chunk of the flight, in ascending order.
struct List {
    found: Option<[(u16, u64); WORDS]>,
    len: usize,
}

/// The words of an empty list. Made when they are needed, because they are as large as a chunk.
fn empty() -> [(u16, u64); WORDS] {
    [(0, 0); WORDS]
}

/// A chunk of the flight.
#[derive(Clone, Copy)]
struct InFlight<'f> {
    words: &'f ChunkWords,
    summary: &'f AtomicU64,
}

impl<'r, F: Fn(u64, &[(u16, u64)])> Sharer<'r, '_, F> {
    /// Begins a chunk of marks.
    #[inline(never)]
    fn begin(&self, chunk: u64) {
        self.finish();
        let marks = self.recorder.marks;
        let page = (marks.range.start().get() >> marks.page.lg2()) + chunk * CHUNK_BITS;
        self.chunk.set(chunk);
        self.first.set(page / 64);
        self.shift.set((page % 64) as u32);
        self.chunks.iter().for_each(|chunk| chunk.set(None));
    }

    /// T1 of a word, which the list may have already if `MERGES`.
    #[inline(always)]
    fn put<const MERGES: bool>(&self, place: usize, mask: u64) {
        const CHUNK: usize = CHUNK_WORDS as usize;
        let nth = place / CHUNK;
        let at = match self.chunks[nth % 2].get() {
            Some(at) => at,
            None => self.open(nth),
        };
        let (word, line) = (&at.words[place % CHUNK], place % CHUNK / LINE_WORDS);
        // Relaxed, all: of the one writer. The Release of the clear that follows orders them before
        // it (T1 before T2), as in `take::clear`.
        word.store(word.load(Ordering::Relaxed) | mask, Ordering::Relaxed);
        let lines = at.summary.load(Ordering::Relaxed) | 1 << line;
        at.summary.store(lines, Ordering::Relaxed);
        let list = &mut *self.list.borrow_mut();
        let found = list.found.get_or_insert_with(empty);
        if MERGES
            && let Some((last, bits)) = found[..list.len].last_mut()
            && usize::from(*last) == place
        {
            *bits |= mask;
            return;
        }
        // Each word of a chunk is visited once, in ascending order, so there are no more than that.
        found[list.len] = (place as u16, mask);
        list.len += 1;
    }

    /// T1 of a word that lies in two of the flight. The word before may have begun the first one.
    #[cold]
    fn put_two(&self, place: usize, mask: u64, shift: u32) {
        let (low, high) = (mask << shift, mask >> (64 - shift));
        if low != 0 {
            self.put::<true>(place, low);
        }
        if high != 0 {
            self.put::<true>(place + 1, high);
        }
    }

    #[cold]
    fn open(&self, nth: usize) -> InFlight<'r> {
        let (words, summary) = self
            .flight
            .words(self.first.get() / CHUNK_WORDS + nth as u64);
        // Relaxed: of the one writer.
        self.before[nth % 2].set(summary.load(Ordering::Relaxed));
        let chunk = InFlight { words, summary };
        self.chunks[nth % 2].set(Some(chunk));
        chunk
    }

    /// T4 and T5 of the list.
    fn finish(&self) {
        let list = &mut *self.list.borrow_mut();
        let Some(found) = &mut list.found else {
            return;
        };
        let masks = &mut found[..std::mem::take(&mut list.len)];
        let next = masks.partition_point(|(place, _)| u64::from(*place) < CHUNK_WORDS);
        let (these, those) = masks.split_at_mut(next);
        for (place, _) in &mut *those {
            *place -= CHUNK_WORDS as u16;
        }
        let chunk = self.first.get() / CHUNK_WORDS;
        for (nth, masks) in [&*these, &*those].into_iter().enumerate() {
            let Some(at) = self.chunks[nth].get().filter(|_| !masks.is_empty()) else {
                continue;
            };
            (self.leave)(chunk + nth as u64, masks);
            let before = self.before[nth].get();
            for (place, mask) in masks {
                let word = &at.words[usize::from(*place) % at.words.len()];
                // Relaxed: of the one writer.
                let others = match before {
                    0 => 0,
                    _ => word.load(Ordering::Relaxed) & !mask,
                };
                // Release, here and below: as in `ChunkMap::wipe`.
                word.store(others, Ordering::Release);
            }
            at.summary.store(before, Ordering::Release);
        }
    }
}

impl<F: Fn(u64, &[(u16, u64)])> Visitor for &mut Sharer<'_, '_, F> {
    type Error = Stopped;

    #[inline]
    fn visit(&mut self, first: u64, mask: u64) -> Result<(), Stopped> {
        self.recorder.visit(first, mask)?;
        self.share(first, mask);
        Ok(())
    }

    #[inline]
    fn place(&self, first: u64, words: u64) -> Place<'_> {
        self.recorder.place(first, words)
    }

    /// T1 of pages that the bitmap has.
    #[inline(always)]
    fn share(&self, first: u64, mask: u64) {
        if first / CHUNK_BITS != self.chunk.get() {
            self.begin(first / CHUNK_BITS);
        }
        let place = (self.first.get() % CHUNK_WORDS + first % CHUNK_BITS / 64) as usize;
        match self.shift.get() {
            0 => self.put::<false>(place, mask),
            shift => self.put_two(place, mask, shift),
        }
    }

    #[inline]
    fn placed(&mut self, bits: u64) {
        self.recorder.placed(bits);
    }
}

impl<F: Fn(u64, &[(u16, u64)])> Taker for &mut Sharer<'_, '_, F> {
    #[inline]
    fn may_fail(&self) -> bool {
        self.recorder.may_fail()
    }

    fn secure(&mut self, first: u64, last: u64) -> Result<bool, Stopped> {
        self.recorder.secure(first, last)
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bitmap::UserBitmap;
    use crate::marks::{Flights, MarkOrdering, Pending};
    use crate::units::{Granule, Iova};

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
    }

    /// The marks of areas that begin anywhere in a word, a line or a chunk of the flight: scattered
    /// pages, long runs and whole chunks. The harvest has each of them, the other consumer as well,
    /// and the flight has what it had before.
    #[test]
    fn marks_that_are_taken_are_left_to_others_wherever_the_area_begins() {
        let all = 5 * CHUNK_BITS;
        for start in [0, 64, 37, CHUNK_BITS - 1, CHUNK_BITS + 300, 3 * CHUNK_BITS] {
            let range = pages(start, all - start % 3000);
            let marks = Marks::new(range, Granule::K4, MarkOrdering::Fences);
            let flights = Flights::new(IovaRange::ALL, Granule::K4);
            let (flight, other) = (flights.claim(), Pending::new(Granule::K4));
            // Of a table, and not marked.
            let before = pages(start + CHUNK_BITS + 150, 3);
            flight.sink(range).record(before).unwrap();
            for round in 1..4u64 {
                let mut expected = BTreeSet::new();
                let mut mark = |first: u64, n: u64| {
                    if pages(start + first, n).intersects(before) {
                        return;
                    }
                    marks.mark(pages(start + first, n));
                    expected.extend(start + first..start + first + n);
                };
                (0..200).for_each(|nth| mark(nth * nth * 3 * round % (4 * CHUNK_BITS), 1));
                mark(CHUNK_BITS - 100, 200);
                if round == 2 {
                    mark(2 * CHUNK_BITS, CHUNK_BITS);
                }
                let mut words = vec![0; (all / 64) as usize];
                // In two parts, the border of which lies inside a line.
                let border = start + CHUNK_BITS + 77;
                for part in [
                    pages(start, border - start),
                    IovaRange::new(Iova::new(border << 12), range.last()).unwrap(),
                ] {
                    let bitmap = UserBitmap::new(&mut words);
                    let mut sink = bitmap.into_sink(range, Granule::K4).unwrap();
                    let left = marks.share(part, &mut sink, flight, |chunk, masks| {
                        other.leave(chunk, masks);
                    });
                    left.unwrap();
                }
                let set = |bit: &u64| words[*bit as usize / 64] >> (bit % 64) & 1 != 0;
                let taken: BTreeSet<u64> = (0..all).filter(set).map(|bit| bit + start).collect();
                assert!(
                    taken == expected,
                    "taken in round {round} from page {start}"
                );
                let mut left = BTreeSet::new();
                for run in other.take_runs(IovaRange::ALL) {
                    left.extend(run.start().get() >> 12..=run.last().get() >> 12);
                }
                assert!(left == expected, "left in round {round} from page {start}");
                assert!(marks.runs(range).is_empty());
                let mut kept = 0;
                flights.visit(IovaRange::ALL, &mut |_, mask| kept += mask.count_ones());
                assert_eq!(kept, 3, "of what was there before");
            }
            flight.hand_over(IovaRange::ALL, |_, _| {});
            let mut kept = 0;
            flights.visit(IovaRange::ALL, &mut |_, mask| kept += mask.count_ones());
            assert_eq!(kept, 0);
        }
    }
}
