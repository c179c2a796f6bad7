//! Harvest: read and clear the dirty state of a range, into a lease.
//!
//! # The protocol
//! ```text
//!  harvester                                              device, CPU writer
//!  for each area, in order:
//!    for each dirty leaf, for each word of marks:
//!      record   set its bits in the user bitmap            sets D (or marks) with each write, unless a cached
//!      owe      add it to the gather                       translation says "D is set" (or the mark is seen set)
//!      clear    one atomic read-modify-write
//!  sync:
//!      flush    drop cached translations, drain            from here on a write sets D again
//!      fence    full fence                                 from here on a write marks again
//!  copy the pages, then commit
//! ```
//!
//! # Why no write is lost
//! Take a write W to page p that completed before the harvest began; D(p) or its mark was set by then.
//! * If the bit is still set when the harvest comes to p, the harvest records p, and copies after its sync, so
//!   after W.
//! * If it is clear, another harvest cleared it, and that one had recorded p before. Either W came before the end
//!   of its flush: then W's data is in memory when the flush has drained, and that lease copies p after that. Or W
//!   came after the flush: then W found no cached translation, and set D anew, after the clear.
//! * If that other lease is aborted, p is marked again: first its gather is handed to the flush queue, then the
//!   pages become dirty. (A lease over several domains and the marks puts every page back for each of them, so that a
//!   harvest of any of them finds it.) Whoever takes the mark from then on finds the debt in the queue, and its own sync pays it.
//!   In the other order, a harvest could take the mark, sync without a flush and copy p while a device still writes
//!   through a stale translation.
//!
//! A bit that a harvest recorded but another one cleared first is reported by both: a superset, never less.
//!
//! In each area the sources come first, then what is in flight, then the marks: dirty state only ever moves in this direction (the rest
//! of a leaf to the marks, a write in flight to the marks), and names its pages in the next place before it leaves the last. Only a
//! detach, an unmap and an abort are not that careful: what they move may be found by the next harvest only, or, of an area that
//! goes, by the unmap.
//!
//! # Modes
//! | call | takes |
//! |---|---|
//! | [`harvest`](AddressSpace::harvest) | all that is dirty in the request |
//! | [`peek`](AddressSpace::peek) | nothing |
//! | [`harvest_masked`](AddressSpace::harvest_masked) | what is set in a bitmap |
//! | [`harvest_bounded`](AddressSpace::harvest_bounded) | some of it, and says where to go on |
//! | `harvest_parallel` | all of it, by many threads |

mod bounded;
mod committed;
mod lease;
mod masked;
#[cfg(all(feature = "rayon", not(dirtymap_loom)))]
mod parallel;
mod request;
mod write_guard;

pub use bounded::{BoundedHarvest, HarvestBounds};
pub use lease::{
    Aborted, HarvestError, HarvestReport, Lease, Owed, StoppedHarvest, SyncError, Synced,
};
pub use request::{HarvestRequest, Scope};
pub use write_guard::WriteGuard;

use crate::bitmap::{BitmapView, Bound, Sink, UserBitmap};
use crate::error::Error;
use crate::source::Stopped;
use crate::space::{AddressSpace, Areas, Covered};
use crate::sync::{Ordering, fence};
use crate::units::IovaRange;
use lease::Holding;

impl AddressSpace {
    /// Reads and clears what is dirty in the request's range, and records it in `bitmap`.
    ///
    /// The lease that it returns owes a flush: [`Lease::sync`] before pages are copied, [`Lease::commit`] when the
    /// copies are safe. A lease that is dropped puts everything back. Lock-free, and never waits; what is dirtied
    /// meanwhile is reported by this harvest or the next.
    ///
    /// # Errors
    /// [`HarvestError::Refused`], and nothing was touched, in this order: [`Error::Unaligned`] (to the smallest
    /// page, then to the granule), [`Error::BitmapTooShort`], [`Error::NotAttached`], [`Error::NeverTracked`], and for
    /// [all-or-nothing](HarvestRequest::all_or_nothing) requests [`Error::Hole`].
    ///
    /// [`HarvestError::Stopped`] at a hole, or where a source failed (an all-or-nothing request too): it has the error, the first address that was
    /// not processed, and the lease for what was.
    pub fn harvest<'a>(
        &'a self,
        request: &HarvestRequest,
        bitmap: UserBitmap<'a>,
    ) -> Result<Lease<'a, Owed>, HarvestError<'a>> {
        let snapshot = self.snapshot();
        let (bound, covered) = self
            .check(request, bitmap, &snapshot)
            .map_err(HarvestError::Refused)?;
        let range = request.range();
        let mut holding = Holding::begin(self, bound.view(), covered);
        // After the holding, so that it goes before it: a walk that panics closes its window, then puts back.
        let mut sink = bound.into_sink();
        let walked = self.walk(&mut holding, &snapshot, range, &mut sink);
        holding.walked(&snapshot);
        match walked {
            Ok(()) => Ok(holding.into_lease(&sink)),
            Err(stopped) => Err(holding.stopped(stopped, &sink)),
        }
    }

    /// Takes what is dirty in `range`, area by area.
    fn walk(
        &self,
        holding: &mut Holding<'_>,
        snapshot: &Areas<'_>,
        range: IovaRange,
        sink: &mut Sink<'_>,
    ) -> Result<(), Stopped> {
        for entry in snapshot.contiguous(range) {
            let entry = entry.map_err(|at| Stopped {
                at,
                error: Error::Hole {
                    at,
                    range: holding.range(),
                },
            })?;
            holding.take(entry.area, range, sink)?;
        }
        Ok(())
    }

    /// Records what is dirty in the request's range in `bitmap`, and changes nothing. Owes no flush; what it shows
    /// may not be copied on the strength of it alone.
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest); what was recorded before a hole or a failure stays in `bitmap`.
    pub fn peek<'a>(
        &self,
        request: &HarvestRequest,
        bitmap: UserBitmap<'a>,
    ) -> Result<BitmapView<'a>, Error> {
        let snapshot = self.snapshot();
        let (bound, covered) = self.check(request, bitmap, &snapshot)?;
        let range = request.range();
        let view = bound.view();
        let mut sink = bound.into_sink();
        for entry in snapshot.contiguous(range) {
            let entry = entry.map_err(|at| Error::Hole { at, range })?;
            // Never empty: a contiguous walk yields areas that intersect the range.
            let part = entry.range.intersection(range).unwrap_or(range);
            sink.limit_to(part);
            // As in `Holding::take`: first the tables, then what is in flight, then what is kept and marked.
            let peeked = covered
                .domains()
                .iter()
                .try_for_each(|domain| domain.source.peek(part, &mut sink));
            peeked.map_err(|stopped| stopped.error)?;
            fence(Ordering::Acquire);
            self.in_flight.visit(part, |write| sink.record(write))?;
            let peeked = covered
                .domains()
                .iter()
                .map(|domain| &domain.kept)
                .chain(covered.marks.then_some(&*entry.area.marks))
                .try_for_each(|marks| {
                    // Acquire: as in `Holding::take`.
                    fence(Ordering::Acquire);
                    marks.peek(part, &mut sink)
                });
            peeked.map_err(|stopped| stopped.error)?;
        }
        Ok(view)
    }

    /// The checks of a request, before anything is touched.
    fn check<'a>(
        &self,
        request: &HarvestRequest,
        bitmap: UserBitmap<'a>,
        snapshot: &Areas<'_>,
    ) -> Result<(Bound<'a>, Covered), Error> {
        let range = request.range();
        let granule = snapshot.rules().alignment(self.page());
        if !range.is_aligned(granule) {
            return Err(Error::Unaligned { range, granule });
        }
        let bound = bitmap.bind(range, request.granule())?;
        let covered = match request.scope() {
            Scope::All => Covered::everything(snapshot.rules()),
            Scope::Domain(domain) => Covered::domain(snapshot.rules(), domain)?,
        };
        if !self.ever_tracked(&covered) {
            return Err(Error::NeverTracked { range });
        }
        if request.is_all_or_nothing()
            && let Some(at) = snapshot.contiguous(range).find_map(Result::err)
        {
            return Err(Error::Hole { at, range });
        }
        Ok((bound, covered))
    }
}
