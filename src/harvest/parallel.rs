//! One harvest by many threads.
//!
//! ```text
//!  bits of the request   [ piece 0 ][ piece 1 ][ piece 2 ]...
//!  a piece is 8 chunks of bitmap: 1 GiB at 4 KiB a bit
//! ```
//!
//! A request has at most 4096 pieces, so the pieces of a long request are larger.
//!
//! The pieces follow from the request alone, and their gathers are merged in order, so the contents
//! of the lease do not depend on the number of threads. Threads share no words of the bitmap and no
//! words of marks, except for leaves that straddle pieces: the thread that finds such a leaf takes
//! the whole part of it that the request covers.

use rayon::prelude::*;

use super::holding::{Holding, Recorded, walked_to};
use super::look::{Look, look};
use super::walk::areas;
use super::{HarvestRequest, Lease, Owed};
use crate::bitmap::{BitmapView, CHUNK_BITS};
use crate::flush::FlushGather;
use crate::source::Stopped;
use crate::space::{AddressSpace, Areas, Covered};
use crate::units::{Granule, Iova, IovaRange};

/// Bits of a piece, at least.
const PIECE_BITS: u64 = 8 * CHUNK_BITS;
/// The most pieces of a request, apart from one that straddles, because the list of pieces must fit
/// in memory for any length of a request.
const MAX_PIECES: u64 = 1 << 12;

/// The result of one piece.
struct Taken<'a> {
    space: &'a AddressSpace,
    gather: FlushGather,
    areas: u64,
    recorded: Recorded,
    /// As [`Holding`] has it.
    walked_to: Option<Iova>,
    stopped: Option<Stopped>,
}

/// Walks `request` into `view`, the bits of `holding`, by many threads.
pub(super) fn harvest<'a>(
    mut holding: Holding<'a>,
    snapshot: Areas<'_>,
    request: &HarvestRequest<'_>,
    view: BitmapView<'_>,
) -> Lease<'a, Owed> {
    let asked = view.range();
    // A hole ends the work of all threads, as it ends a walk, unless the request skips it.
    // Addresses above the last area are in no lease.
    let (mut stopped, mut end) = (None, None);
    for area in areas(&snapshot, asked, request) {
        match area {
            Ok(area) => end = Some(area.range().last().min(asked.last())),
            Err(hole) => stopped = Some(hole),
        }
    }
    drop(snapshot);
    let mut recorded = Recorded::default();
    if let Some(walked) = end.map(|end| IovaRange::ascending(asked.start(), end)) {
        // Before the first bit is touched, so that a panic in any thread puts back everything that
        // was recorded.
        holding.reach(walked.last());
        let (space, covered) = (holding.space(), holding.covered());
        let page = covered.alignment(space.page());
        let pieces: Vec<IovaRange> = pieces(&view, page, walked).collect();
        let taken: Vec<Taken<'_>> = pieces
            .par_iter()
            .map(|piece| Taken::take(space, request, &view, covered, walked, *piece))
            .collect();
        let mut owed = Vec::with_capacity(taken.len());
        for mut piece in taken {
            owed.push((
                std::mem::take(&mut piece.gather),
                piece.areas,
                piece.walked_to,
            ));
            recorded.merge(&piece.recorded);
            let below = |other: &Stopped| stopped.as_ref().is_none_or(|now| other.at < now.at);
            if let Some(first) = piece.stopped.take().filter(below) {
                stopped = Some(first);
            }
        }
        for (piece, (gather, areas, walked_to)) in pieces.iter().zip(owed) {
            // A walk by one thread ends at the stop, so areas of pieces above it do not count.
            let counts = stopped.as_ref().is_none_or(|stop| piece.start() <= stop.at);
            holding.add(&gather, if counts { areas } else { 0 });
            // Pages of pieces above a stop are in no lease. The piece that stopped may have walked
            // areas above the stop, which is the beginning of a granule: the lease ends below it.
            if stopped.as_ref().is_none_or(|stop| piece.start() < stop.at) {
                holding.walk_to(walked_to);
            }
        }
    }
    holding.walked_by_now();
    holding.into_lease(stopped.map_or(Ok(None), Err), recorded)
}

/// The pieces of `walked`: each begins at a chunk of bitmap, rounded up to a page of all sources.
fn pieces(
    view: &BitmapView<'_>,
    page: Granule,
    walked: IovaRange,
) -> impl Iterator<Item = IovaRange> {
    let view = *view;
    let bits = piece_bits(walked.granules(view.granule()));
    let mut next = Some(walked.start());
    std::iter::from_fn(move || {
        let start = next?;
        let last = view
            .piece_last(start, bits)
            .granule_last(page)
            .min(walked.last());
        next = last.checked_add(1).filter(|next| *next <= walked.last());
        Some(IovaRange::ascending(start, last))
    })
}

/// Bits of a piece of a request of `bits` bits: a power of two.
fn piece_bits(bits: u128) -> u64 {
    // Never more than a user bitmap has: 2^63.
    let bits = u64::try_from(bits).unwrap_or(u64::MAX);
    (bits / MAX_PIECES + 1).next_power_of_two().max(PIECE_BITS)
}

impl<'a> Taken<'a> {
    fn take(
        space: &'a AddressSpace,
        request: &HarvestRequest<'_>,
        view: &BitmapView<'_>,
        covered: &Covered,
        walked: IovaRange,
        piece: IovaRange,
    ) -> Self {
        let mut taken = Taken {
            space,
            gather: FlushGather::new(),
            areas: 0,
            recorded: Recorded::default(),
            walked_to: None,
            stopped: None,
        };
        let snapshot: Areas<'_> = space.snapshot();
        let mut sink = view.sink();
        for area in areas(&snapshot, piece, request) {
            // A hole: unmapped since the walk began.
            let outcome = area.and_then(|area| {
                let own = area.range();
                let inside = own.intersection(piece).zip(own.intersection(walked));
                let Some((part, limit)) = inside else {
                    return Ok(());
                };
                // Each area counts in the piece in which it begins.
                taken.areas += u64::from(limit.start() == part.start());
                let how = Look::Take(&mut taken.gather);
                let looked = look(space, covered, area, (part, limit), (&mut sink, None), how);
                taken.walked_to = taken.walked_to.max(walked_to(part, &looked));
                looked
            });
            if let Err(stopped) = outcome {
                taken.stopped = Some(stopped);
                break;
            }
        }
        taken.recorded.add(&sink);
        taken
    }
}

/// The debt of a piece goes to the queue if a panic, here or in another piece, prevents that it
/// reaches the lease.
impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.gather.is_empty() {
            let _ = self.space.flush.owe(&self.gather);
        }
    }
}
