//! The visitor by which a harvest takes marks that it leaves to other consumers, in one pass: each
//! line goes into the bitmap of the harvest and into its flight, then it is cleared. After the last
//! line of a chunk of marks, the words of the flight are left to the others, and the flight ends.
//!
//! ```text
//!  T1  record in the bitmap, and in the flight       for each line of a chunk
//!  T2  clear it
//!  T4  leave what is in the flight to the others     after the chunk
//!  T5  end the flight of the chunk
//! ```
//!
//! A chunk that is dirty as a whole is visited whole before its state ends (T2). So nothing is left
//! to others in the middle of a chunk.

use std::cell::Cell;

use super::{Flight, Marks, Recorder};
use crate::bitmap::Sink;
use crate::chunkmap::{CHUNK_WORDS, Handed, LINE_WORDS, MOST, Place, Taker, Visitor};
use crate::error::Stopped;
use crate::units::IovaRange;

/// Bits of a chunk.
const CHUNK_BITS: u64 = CHUNK_WORDS * 64;
/// Bits of a line.
const LINE_BITS: u64 = LINE_WORDS as u64 * 64;
/// Lines of a chunk.
const LINES: u64 = CHUNK_BITS / LINE_BITS;

impl Marks {
    /// As [`read_and_clear`](Self::read_and_clear), of a harvest with `flight`. Calls `leave` with
    /// words of a chunk after they were cleared, and `ahead` with lines of a chunk some time before
    /// that; chunks count from address 0.
    pub(crate) fn share(
        &self,
        range: IovaRange,
        sink: &mut Sink<'_>,
        flight: &Flight,
        (ahead, leave): (impl Fn(u64, u64), impl Fn(u64, Handed<'_>)),
    ) -> Result<(), Stopped> {
        let Some((first, last)) = self.bits_of(range) else {
            return Ok(());
        };
        let page = self.start.get() >> self.page.lg2();
        let mut sharer = Sharer {
            recorder: Recorder::new(self, range, sink),
            flight,
            ahead,
            leave,
            page,
            by_lines: page.is_multiple_of(LINE_BITS),
            first: Cell::new(0),
            value: Cell::new(0),
            listed: Cell::new(0),
            words: Cell::new(0),
        };
        let taken = self.bits.take(first, last, &mut sharer);
        sharer.finish();
        taken
    }
}

/// See the [module](self). `ahead` prefetches what `leave` will use for lines of a chunk. Cells,
/// because the look at a place of the bitmap borrows the visitor.
struct Sharer<'r, 'b, A, F> {
    recorder: Recorder<'r, 'b>,
    flight: &'r Flight,
    ahead: A,
    leave: F,
    /// The number of the first page of the marks.
    page: u64,
    /// Whether lines of the marks are lines of the flight.
    by_lines: bool,
    /// The place in the flight of the first page of the chunk that was begun last.
    first: Cell<u64>,
    /// The value of that page in the list of the flight.
    value: Cell<u64>,
    /// The number of pages of that chunk that are in the list, or that of its places if no list is
    /// tried.
    listed: Cell<usize>,
    /// The number of words of that chunk that are not in the list, clean ones of their lines too.
    words: Cell<usize>,
}

impl<A, F: Fn(u64, Handed<'_>)> Sharer<'_, '_, A, F> {
    /// T4 and T5 of the words in flight.
    fn finish(&self) {
        self.flight.marks.end(&self.leave);
    }

    /// T1 of the words from `word` on, by their pages, if the list of the flight has room for all.
    #[inline(always)]
    fn list(&self, word: usize, masks: &[u64]) -> bool {
        let value = self.value.get() + word as u64 * 64;
        let (listed, all) = self.flight.marks.list(self.listed.get(), value, masks);
        // Those of them that are in the list stay there.
        self.listed.set(listed);
        all
    }

    /// T1 of words that lie in two of the flight each, or in a part of a line.
    #[inline(never)]
    fn put_each(&self, word: usize, masks: &[u64]) {
        for (word, mask) in (word as u64..).zip(masks) {
            let bit = self.first.get() + word * 64;
            let (place, shift) = ((bit / 64) as usize, bit % 64);
            let (low, high) = (mask << shift, u128::from(*mask) << shift >> 64);
            if low != 0 {
                self.flight.marks.put(place, low);
            }
            if high != 0 {
                self.flight.marks.put(place + 1, high as u64);
            }
        }
    }
}

impl<A: Fn(u64, u64), F: Fn(u64, Handed<'_>)> Visitor for &mut Sharer<'_, '_, A, F> {
    type Error = Stopped;

    #[inline]
    fn visit(&mut self, first: u64, mask: u64) -> Result<(), Stopped> {
        self.recorder.visit(first, mask)?;
        self.put_each((first % CHUNK_BITS / 64) as usize, &[mask]);
        Ok(())
    }

    #[inline]
    fn place(&self, first: u64, words: u64) -> Place<'_> {
        self.recorder.place(first, words)
    }

    #[inline]
    fn ahead(&self, first: u64, lines: u64) {
        if !self.by_lines {
            return;
        }
        let page = self.page + first;
        let (chunk, line) = (page / CHUNK_BITS, page % CHUNK_BITS / LINE_BITS);
        (self.ahead)(chunk, lines << line);
        if line > 0 {
            (self.ahead)(chunk + 1, lines >> (LINES - line));
        }
    }

    fn begin(&self, base: u64) {
        self.finish();
        let page = self.page + base;
        self.first.set(page % CHUNK_BITS);
        // A chunk after one that had far too many pages for a list is likely to have as many.
        let many = self.words.take() > 2 * MOST;
        self.listed.set(if many { MOST } else { 0 });
        self.flight.marks.begin(page / CHUNK_BITS);
        let value = self.flight.marks.first_listed() + self.first.get();
        self.value.set(value);
    }

    /// T1 of pages that the bitmap has.
    #[inline(always)]
    fn share(&self, word: usize, masks: &[u64]) {
        if !self.by_lines {
            return self.put_each(word, masks);
        }
        if self.listed.get() < MOST && self.list(word, masks) {
            return;
        }
        self.words.set(self.words.get() + masks.len());
        let place = (self.first.get() / 64) as usize + word;
        match masks.try_into() {
            Ok(line) => self.flight.marks.put_line(place, line),
            Err(_) => self.put_each(word, masks),
        }
    }

    #[inline]
    fn placed(&mut self, bits: u64) {
        self.recorder.placed(bits);
    }
}

impl<A: Fn(u64, u64), F: Fn(u64, Handed<'_>)> Taker for &mut Sharer<'_, '_, A, F> {
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
    use std::convert::Infallible;

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
        let starts = [0, 64, 37, CHUNK_BITS - 1, CHUNK_BITS + 300, 5 * LINE_BITS];
        for start in [3 * CHUNK_BITS].into_iter().chain(starts) {
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
                if round == 3 {
                    // So many that no list is tried in the next chunk, which has few.
                    let scattered = (CHUNK_BITS..2 * CHUNK_BITS).step_by(30);
                    scattered.for_each(|page| mark(page, 1));
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
                    let leave = |chunk: u64, handed: Handed<'_>| {
                        other.leave(chunk, handed);
                        // What is left is in flight at this moment.
                        let mut seen = Vec::new();
                        let all = pages(chunk * CHUNK_BITS, CHUNK_BITS);
                        let Ok(()) = flight.visit(all, |at, mask| -> Result<(), Infallible> {
                            seen.push((at.get() >> 12, mask));
                            Ok(())
                        });
                        let page = |nth: u16| chunk * CHUNK_BITS + u64::from(nth) * 64;
                        let has = |word: (u64, u64), bits: (u64, u64)| {
                            word.0 == bits.0 && bits.1 & !word.1 == 0
                        };
                        for (nth, mask) in handed.masks() {
                            let bits = (page(nth), mask);
                            assert!(seen.iter().any(|word| has(*word, bits)), "{bits:?}");
                        }
                    };
                    let left = marks.share(part, &mut sink, flight, (|_, _| (), leave));
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
