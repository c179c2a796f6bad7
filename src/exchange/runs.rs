//! Runs for other programs: plain numbers, pieces of a bounded size, the runs of several logs as
//! one list.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::units::{Granule, Iova, IovaRange};

/// Methods of every iterator of runs: [`Runs`](crate::bitmap::Runs) of a lease or a view,
/// [`LogRuns`](crate::exchange::LogRuns), [`MergedRuns`], or one of the caller's own.
///
/// ```
/// use dirtymap::exchange::RunsExt;
/// use dirtymap::{Granule, IovaRange, ToIovaRange};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let runs: [IovaRange; 1] = [(0x1000..0x4000).to_iova_range()?];
/// assert!(runs.into_iter().pairs().eq([(0x1000, 0x3000)]));
/// let pieces = runs.into_iter().pieces(Granule::from_bytes(0x2000)?);
/// assert!(pieces.eq([(0x1000, 0x1000), (0x2000, 0x2000)]));
/// assert_eq!(runs.into_iter().total_bytes(), 0x3000);
/// # Ok(())
/// # }
/// ```
pub trait RunsExt: Iterator<Item = IovaRange> + Sized {
    /// The runs as `(start, len)` in bytes. A run of more than 2^63 bytes is split, because its
    /// length may not fit.
    fn pairs(self) -> Pieces<Self> {
        self.pieces(Granule::MAX)
    }

    /// The runs as `(start, len)`, cut at multiples of `size`, so that none has more bytes than
    /// that. With a `size` no smaller than the granule of the request, a piece is made of whole
    /// granules and can be committed by itself.
    fn pieces(self, size: Granule) -> Pieces<Self> {
        Pieces {
            runs: self,
            rest: None,
            size,
        }
    }

    /// The total bytes of the runs.
    fn total_bytes(self) -> u128 {
        self.fold(0, |sum, run| sum + run.len())
    }
}

impl<I: Iterator<Item = IovaRange>> RunsExt for I {}

/// Runs as pairs of numbers: see [`RunsExt::pieces`].
#[derive(Clone, Debug)]
pub struct Pieces<I> {
    runs: I,
    /// The rest of the current run.
    rest: Option<IovaRange>,
    size: Granule,
}

impl<I: Iterator<Item = IovaRange>> Iterator for Pieces<I> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let run = self.rest.take().or_else(|| self.runs.next())?;
        let (piece, rest) = cut(run, run.start().granule_last(self.size));
        self.rest = rest;
        let start = piece.start().get();
        // No more than the granule has, so it fits.
        Some((start, piece.last().get() - start + 1))
    }
}

/// `run` up to `last`, and the rest above it.
pub(super) fn cut(run: IovaRange, last: Iova) -> (IovaRange, Option<IovaRange>) {
    let behind = last.checked_add(1);
    let rest = behind.and_then(|start| IovaRange::new(start, run.last()).ok());
    let piece = IovaRange::ascending(run.start(), run.last().min(last));
    (piece, rest)
}

/// Merges the runs of several logs: ordered, maximal, each byte once, whatever their granules and
/// bases.
///
/// Each source has to be ascending, as all iterators of runs of this library are. Its runs may
/// touch and overlap. Sources of different types are passed as `&mut dyn Iterator<Item =
/// IovaRange>`.
///
/// ```
/// use dirtymap::exchange::{DirtyLog, RunsExt, merge_runs};
/// use dirtymap::{Granule, Iova, IovaRange};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let slot = IovaRange::from_len(Iova::new(0x10_0000), 64 << 12)?;
/// // Bit 0 is the first page of the slot.
/// let kernel = DirtyLog::words(&[0b0110], slot, Granule::K4)?;
/// let low = IovaRange::from_len(Iova::MIN, 264 << 12)?;
/// let mut bytes = [0; 33]; // bit 0 is address 0
/// bytes[32] = 0b1000;
/// let device = DirtyLog::bytes(&bytes, low, Granule::K4)?;
/// let merged = merge_runs([kernel.runs(), device.runs()]);
/// assert_eq!(merged.pairs().collect::<Vec<_>>(), [(0x10_1000, 3 << 12)]);
/// # Ok(())
/// # }
/// ```
///
/// Allocates room for one run of each source. For dense logs with many short runs, ORing them into
/// one bitmap ([`DirtyLog::or_into`](crate::exchange::DirtyLog::or_into),
/// [`BitmapView::or_into`](crate::BitmapView::or_into)) and reading its runs is faster.
pub fn merge_runs<I>(sources: impl IntoIterator<Item = I>) -> MergedRuns<I>
where
    I: Iterator<Item = IovaRange>,
{
    let mut merged = MergedRuns {
        sources: sources.into_iter().collect(),
        heads: BinaryHeap::new(),
    };
    for nth in 0..merged.sources.len() {
        merged.refill(nth);
    }
    merged
}

/// The runs of several sources, merged: see [`merge_runs`].
#[derive(Clone, Debug)]
pub struct MergedRuns<I> {
    sources: Vec<I>,
    /// The next run of each source that has one: its first and last address, and the number of the
    /// source.
    heads: BinaryHeap<Reverse<(Iova, Iova, usize)>>,
}

impl<I: Iterator<Item = IovaRange>> MergedRuns<I> {
    fn refill(&mut self, nth: usize) {
        if let Some(run) = self.sources.get_mut(nth).and_then(Iterator::next) {
            self.heads.push(Reverse((run.start(), run.last(), nth)));
        }
    }

    /// Takes the lowest run if `wanted` says so.
    fn take(&mut self, wanted: impl FnOnce(IovaRange) -> bool) -> Option<IovaRange> {
        let Reverse((start, last, nth)) = *self.heads.peek()?;
        let run = IovaRange::ascending(start, last);
        wanted(run).then(|| {
            self.heads.pop();
            self.refill(nth);
            run
        })
    }
}

impl<I: Iterator<Item = IovaRange>> Iterator for MergedRuns<I> {
    type Item = IovaRange;

    fn next(&mut self) -> Option<IovaRange> {
        let mut run = self.take(|_| true)?;
        // A run that touches this one is joined to it.
        while let Some(next) = self.take(|next| next.touches(run)) {
            run = run.hull(next);
        }
        Some(run)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn run(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    #[test]
    fn all_of_the_address_space_comes_as_two_pairs() {
        let pairs: Vec<_> = [IovaRange::ALL].into_iter().pairs().collect();
        assert_eq!(pairs, [(0, 1 << 63), (1 << 63, 1 << 63)]);
        assert_eq!([IovaRange::ALL; 3].into_iter().total_bytes(), 3 << 64);
    }

    #[test]
    fn pieces_are_cut_at_multiples_and_lose_nothing() {
        let size = Granule::from_bytes(16).unwrap();
        let runs = [
            run(5, 5),
            run(7, 50),
            run(64, 79),
            run(u64::MAX - 17, u64::MAX),
        ];
        let pieces: Vec<_> = runs.into_iter().pieces(size).collect();
        assert_eq!(
            pieces,
            [
                (5, 1),
                (7, 9),
                (16, 16),
                (32, 16),
                (48, 3),
                (64, 16),
                (u64::MAX - 17, 2),
                (u64::MAX - 15, 16)
            ]
        );
    }

    #[test]
    fn merging_joins_what_touches_up_to_the_last_address() {
        let top = u64::MAX;
        let sources = [
            vec![run(0, 9), run(30, 39), run(top - 1, top)],
            vec![run(10, 19), run(35, 36), run(top, top)],
            vec![],
            vec![run(21, 21), run(21, 25), run(22, 23)], // touches and overlaps itself
        ];
        let merged: Vec<_> = merge_runs(sources.map(Vec::into_iter)).collect();
        assert_eq!(
            merged,
            [run(0, 19), run(21, 25), run(30, 39), run(top - 1, top)]
        );
        assert_eq!(
            merge_runs([[IovaRange::ALL]; 0].map(|s| s.into_iter())).next(),
            None
        );
    }
}
