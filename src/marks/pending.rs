//! The pages that are pending for one consumer of a space.
//!
//! ```text
//!  harvests of others --leave--> left    a chunk is claimed: no locked operation for each word
//!                     \\---------> marks   if another thread has the claim
//!  aborts, joins, discards ----> marks
//! ```
//!
//! A page may be in both; a look visits both. Nothing moves from one to the other, so their order
//! does not matter.

use std::convert::Infallible;

use super::{Marks, Recorder, every_address, pages};
use crate::bitmap::Sink;
use crate::chunkmap::{CHUNK_WORDS, ChunkMap, Handed};
use crate::error::Stopped;
use crate::ranges::add_joined;
use crate::units::{Granule, Iova, IovaRange};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Pending {
    left: ChunkMap,
    marks: Marks,
}

impl Pending {
    /// Nothing. Allocates no bitmap memory.
    pub(crate) fn new(page: Granule) -> Self {
        let range = every_address();
        let (_, last) = pages(range.start(), page, range);
        Pending {
            left: ChunkMap::new(last),
            marks: Marks::few(range, page),
        }
    }

    /// Leaves the pages of `handed` to the consumer. Chunks count from address 0. The caller has
    /// performed a full fence since it took the pages.
    pub(crate) fn leave(&self, chunk: u64, handed: Handed<'_>) {
        if !self.left.leave(chunk, handed) {
            self.marks.mark_handed(chunk, handed);
        }
    }

    /// Prefetches the memory in which pages of `lines` of a chunk are left.
    pub(crate) fn prefetch(&self, chunk: u64, lines: u64) {
        self.left.prefetch(chunk, lines);
    }

    /// As [`Marks::mark`].
    pub(crate) fn mark(&self, range: IovaRange) {
        self.marks.mark(range);
    }

    /// Moves the pages of `range` into `sink`: records each, then clears it. Pages that another
    /// thread leaves at the same time may stay, too.
    pub(crate) fn read_and_clear(
        &self,
        range: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        let Some((first, last)) = self.marks.bits_of(range) else {
            return Ok(());
        };
        let recorder = Recorder::new(&self.marks, range, sink);
        let Err(stopped) = self.left.take_left(first, last, recorder) else {
            return self.marks.read_and_clear(range, sink);
        };
        // Below the stop, everything is taken.
        let below = stopped.at.get().checked_sub(1).map(Iova::new);
        let below = below.and_then(|last| IovaRange::new(range.start(), last).ok());
        below.map_or(Ok(()), |below| self.marks.read_and_clear(below, sink))?;
        Err(stopped)
    }

    /// Records the pages of `range` in `sink` and leaves them.
    pub(crate) fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let Some((first, last)) = self.marks.bits_of(range) else {
            return Ok(());
        };
        let recorder = Recorder::new(&self.marks, range, sink);
        self.left.peek_left(first, last, recorder)?;
        self.marks.peek(range, sink)
    }

    /// The pages of `range`, as maximal runs in ascending order; leaves them.
    pub(crate) fn runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = self.marks.runs(range);
        if let Some((first, last)) = self.marks.bits_of(range) {
            let Ok(()) = self
                .left
                .peek_left(first, last, |bit, mask| -> Result<(), Infallible> {
                    self.marks
                        .add_runs(self.marks.page_at(bit), mask, &mut runs);
                    Ok(())
                });
        }
        joined(runs)
    }

    /// Clears the pages of `range`, and returns them as maximal runs in ascending order.
    pub(crate) fn take_runs(&self, range: IovaRange) -> Vec<IovaRange> {
        let mut runs = Vec::new();
        self.take(range, |start, mask| {
            self.marks.add_runs(start, mask, &mut runs);
        });
        joined(runs)
    }

    /// Clears the pages of `range` and hands them to `taker`, as the address of a page and a mask
    /// of the pages from there on. Pages that another thread leaves at the same time may stay, too.
    pub(crate) fn take(&self, range: IovaRange, mut taker: impl FnMut(Iova, u64)) {
        if let Some((first, last)) = self.marks.bits_of(range) {
            let Ok(()) = self
                .left
                .take_left(first, last, |bit, mask| -> Result<(), Infallible> {
                    taker(self.marks.page_at(bit), mask);
                    Ok(())
                });
        }
        self.marks.take(range, taker);
    }

    /// The most bytes that a mark of `range` allocates: those of a chunk for each that it touches.
    pub(crate) fn bytes_for(&self, range: IovaRange) -> u64 {
        let chunks = self.marks.bits_of(range).map_or(0, |(first, last)| {
            last / (64 * CHUNK_WORDS) - first / (64 * CHUNK_WORDS) + 1
        });
        chunks.saturating_mul(8 * CHUNK_WORDS)
    }

    /// The bytes of the pages of bitmap that were allocated.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.left.held_bytes() + self.marks.held_bytes()
    }
}

/// The maximal runs that `runs` make, in ascending order.
fn joined(mut runs: Vec<IovaRange>) -> Vec<IovaRange> {
    runs.sort_unstable_by_key(|run| run.start());
    let mut all = Vec::with_capacity(runs.len());
    runs.into_iter().for_each(|run| add_joined(&mut all, run));
    all
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::bitmap::UserBitmap;
    use crate::sync::{AtomicU64, Ordering};

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
    }

    /// What is left and what is put back is one set of pages, each of which is told once.
    #[test]
    fn what_is_left_and_what_is_put_back_is_one_set() {
        let pending = Pending::new(Granule::K4);
        Handed::of(&[(0, 0b110), (511, 1 << 63)], |left| pending.leave(1, left));
        pending.mark(pages(32768 + 2, 2));
        let expected = [pages(32768 + 1, 3), pages(65535, 1)];
        assert_eq!(pending.runs(IovaRange::ALL), expected);
        assert_eq!(pending.runs(pages(32768 + 2, 1)), [pages(32768 + 2, 1)]);
        // The words of a chunk, of each of both places, and the lists of eight chunks.
        assert_eq!(pending.held_bytes(), 2 * 4096 + 8 * 128);
        assert_eq!(
            pending.take_runs(pages(0, 32768 + 2)),
            [pages(32768 + 1, 1)]
        );
        let mut words = [0; 1024];
        let mut sink = UserBitmap::new(&mut words)
            .into_sink(pages(0, 65536), Granule::K4)
            .unwrap();
        pending.peek(pages(0, 65536), &mut sink).unwrap();
        assert_eq!(sink.bits_set(), 3);
        pending.read_and_clear(pages(0, 65536), &mut sink).unwrap();
        assert_eq!(sink.bits_set(), 3);
        assert!(pending.runs(IovaRange::ALL).is_empty());
        assert_eq!((words[512], words[1023]), (0b1100, 1 << 63));
    }

    /// A bitmap that fails in the middle has everything below the stop, from both places.
    #[test]
    fn below_a_stop_everything_is_taken() {
        let pending = Pending::new(Granule::K4);
        Handed::of(&[(0, 1), (10, 1), (11, 1)], |left| pending.leave(0, left));
        for page in [64, 700] {
            pending.mark(pages(page, 1));
        }
        let words: [AtomicU64; 16] = std::array::from_fn(|_| AtomicU64::new(0));
        let mut sink = UserBitmap::failing(&words, 10)
            .into_sink(pages(0, 1024), Granule::K4)
            .unwrap();
        let stopped = pending.read_and_clear(pages(0, 1024), &mut sink);
        assert_eq!(stopped.unwrap_err().at, Iova::new(640 << 12));
        let word = |nth: usize| words[nth].load(Ordering::Relaxed);
        assert_eq!((word(0), word(1)), (1, 1));
        let kept = [pages(640, 1), pages(700, 1), pages(704, 1)];
        assert_eq!(pending.runs(IovaRange::ALL), kept);
    }
}
