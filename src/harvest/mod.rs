//! Harvest: read and clear the dirty state of a range, into a lease.
//!
//! # The protocol
//! ```text
//!  harvester                                       device, CPU writer
//!  for each area, in order:
//!    for each dirty leaf, for each word of marks:
//!      record   set its bits in the user bitmap     sets D (or marks) with each write,
//!      owe      add it to the gather                unless "D is set" is cached
//!      clear    one atomic read-modify-write        (or the mark is found set)
//!  sync:
//!      flush    drop cached translations, drain     from here on a write sets D again
//!      fence    full fence                          from here on a write marks again
//!  copy the pages, then commit
//! ```
//!
//! # Why no write is lost
//! Take a write W to page p that completed before the harvest began; D(p) or its mark was set by
//! then.
//! * If the bit is still set when the harvest reaches p, the harvest records p and copies it after
//!   its sync, so after W.
//! * If it is clear, another harvest cleared it, and that one had recorded p before. Either W came
//!   before the end of its flush: then W's data is in memory when the flush has drained, and that
//!   lease copies p after that. Or W came after the flush: then W found no cached translation, and
//!   set D anew, after the clear.
//! * If that other lease is aborted, p is marked again: first its gather is handed to the flush
//!   queue, then the pages become dirty. (A lease over several domains and the marks puts every
//!   page back for each of them, so that a harvest of any of them finds it.) A harvest that takes
//!   the mark from then on finds the debt in the queue, and its own sync pays it. In the other
//!   order, a harvest could take the mark, sync without a flush and copy p while a device still
//!   writes through a stale translation.
//!
//! A bit that a harvest recorded but another one cleared first is reported by both: a superset,
//! never less.
//!
//! In each area the sources come first, then the writes in flight, then the put-back stores, then
//! the marks. Dirty state moves one way, in this direction, and names its pages in the next place
//! before it leaves the previous one. A detach, an unmap and an abort are exceptions: pages that
//! they move may be found only by the next harvest, or by the unmap of their area.
//!
//! # At a stop
//! A source may fail inside the range after sources before it have reported pages above that
//! address. Below the stop the lease has everything. Pages from the stop on are put back before the
//! harvest returns, in the order of an abort: the gather to the queue, then the pages. The lease
//! ends below the stop. The stop is rounded down to a granule of the request, so that no bit of the
//! lease stands for bytes above it, and to pages of all sources, so that no page is cut. A stop at
//! a hole has the exact address, because nothing above it was walked, except by other threads of a
//! parallel harvest.
//!
//! # Modes
//! A [`HarvestRequest`] has the options of a walk: all domains or one, with holes or without, by a
//! mask, up to a bound, by many threads. [`peek`](AddressSpace::peek) looks at the same places in
//! the same order, and takes nothing. [`Rounds`] harvests everything that is mapped, again and
//! again.

mod backing;
mod consumer;
mod content;
mod discard;
mod epochs;
mod held;
mod holding;
mod lease;
mod look;
#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;
#[cfg(all(feature = "rayon", not(dirtymap_loom)))]
mod parallel;
mod request;
mod rounds;
mod shared;
mod shares;
mod walk;
mod write_guard;

pub use crate::report::{Aborted, Discarded, HarvestReport};
pub use crate::space::{BadEpoch, Bounds, Epoch, Lineage, Parent, Since, Why, Written};
pub use backing::Backing;
pub use consumer::{Consumer, ConsumerStats, Start};
pub use content::{Content, Contents};
pub use epochs::Cursor;
pub use lease::{Lease, Owed, Synced};
pub use request::{HarvestRequest, Holes, Scope};
pub use rounds::Rounds;
pub use write_guard::WriteGuard;

use crate::bitmap::{BitmapView, Bound, UserBitmap};
use crate::error::Error;
use crate::space::{AddressSpace, Areas, Audience, Covered, Party, Walk};
use crate::units::IovaRange;
use backing::Recorder;
use held::{Held, SpaceRef};
use holding::{Holding, Recorded};
use walk::{Parts, areas, walk};

impl AddressSpace {
    /// Reads and clears the dirty state of the request's range, and records it in `bitmap`.
    ///
    /// The lease that it returns owes a flush: [`Lease::sync`] before pages are copied,
    /// [`Lease::commit`] when the copies are safe. A lease that is dropped puts everything back.
    /// Lock-free, and never blocks if the attached sources do not. Pages that become dirty
    /// meanwhile are reported by this harvest or the next.
    ///
    /// A harvest that stops half-way, because a source or the bitmap failed, returns a lease for
    /// the pages below the stop: [`Lease::stopped`] has the address and the error. Its
    /// [`sync`](Lease::sync) returns that error and puts everything back, for a consumer that needs
    /// all or nothing. [`Lease::partial`] accepts the partial scan.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, ToIovaRange, UserBitmap};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let ram = (0..1 << 20).to_iova_range()?;
    /// space.mark(0x3000..0x3001)?;
    /// let mut words = [0; 4]; // a bit for each page
    /// let request = HarvestRequest::new(ram, Granule::K4);
    /// let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
    /// let lease = lease.sync()?; // only now there is something to copy
    /// assert_eq!(lease.runs().next(), Some((0x3000..0x4000).to_iova_range()?));
    /// lease.commit();
    /// assert_eq!(words, [1 << 3, 0, 0, 0]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Nothing was touched then. In this order: [`Error::Unaligned`] (to the smallest page, then to
    /// the granule), [`BitmapError::TooShort`], [`Error::NotAttached`], [`Error::NeverTracked`],
    /// [`Error::BadCursor`] if it is to [resume](HarvestRequest::resume_at) outside of its range,
    /// or not at a multiple of the granule and of [`alignment`](Self::alignment) (a domain that was
    /// attached since can raise it; then go on at the next lower multiple), and [`Error::Hole`] if
    /// it [refuses holes](Holes::Refuse).
    ///
    /// [`BitmapError::TooShort`]: crate::bitmap::BitmapError::TooShort
    #[doc(alias = "KVM_GET_DIRTY_LOG")]
    #[doc(alias = "get_and_reset")]
    #[doc(alias = "iopt_read_and_clear_dirty_data")]
    #[doc(alias = "memory_region_snapshot_and_clear_dirty")]
    pub fn harvest<'a>(
        &'a self,
        request: &HarvestRequest<'_>,
        bitmap: UserBitmap<'a>,
    ) -> Result<Lease<'a, Owed>, Error> {
        harvest_for(SpaceRef::Lent(self), None, request, bitmap)
    }

    /// Records the dirty pages of the request's range in `bitmap`, and changes nothing. Owes no
    /// flush, so a page must not be copied because of a peek alone. Ignores the bounds of the
    /// request.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, ToIovaRange, UserBitmap};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let ram = (0..1 << 20).to_iova_range()?;
    /// space.mark(0x3000..0x3001)?;
    /// let mut words = [0; 4];
    /// let request = HarvestRequest::new(ram, Granule::K4);
    /// assert_eq!(space.peek(&request, UserBitmap::new(&mut words))?.count(), 1);
    /// assert_eq!(space.rounds().next()?.dirty(), 1); // it was left dirty
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest), and that of a source, or of a window of the bitmap, that
    /// failed. What was recorded before a hole or a failure stays in `bitmap`.
    #[doc(alias = "IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR")]
    #[doc(alias = "dirty_at")]
    pub fn peek<'a>(
        &self,
        request: &HarvestRequest<'_>,
        bitmap: UserBitmap<'a>,
    ) -> Result<BitmapView<'a>, Error> {
        self.peek_for((None, false), request, bitmap)
    }

    /// As [`peek`](Self::peek), for all [consumers](crate::Consumer) at once: records each page
    /// that is dirty for at least one of them. For state that is saved over a restart, from which
    /// each consumer is told a superset afterwards. Pages of a lease that lives are not recorded.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, ToIovaRange, UserBitmap};
    /// use dirtymap::Start;
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// space.mark(0x3000..0x3001)?;
    /// space.rounds().next()?.commit(); // leaves the page to `backup`
    /// let mut words = [0; 4];
    /// let request = HarvestRequest::new((0..1 << 20).to_iova_range()?, Granule::K4);
    /// assert_eq!(space.peek(&request, UserBitmap::new(&mut words))?.count(), 0);
    /// assert_eq!(space.peek_any(&request, UserBitmap::new(&mut words))?.count(), 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As `peek`.
    pub fn peek_any<'a>(
        &self,
        request: &HarvestRequest<'_>,
        bitmap: UserBitmap<'a>,
    ) -> Result<BitmapView<'a>, Error> {
        self.peek_for((None, true), request, bitmap)
    }

    /// The same for a consumer, where `None` is the unnamed one, or for all.
    fn peek_for<'a>(
        &self,
        (member, all): (Option<&Party>, bool),
        request: &HarvestRequest<'_>,
        bitmap: UserBitmap<'a>,
    ) -> Result<BitmapView<'a>, Error> {
        let snapshot = self.snapshot();
        let (bound, covered) = self.check(member, request, bitmap, &snapshot)?;
        let view = bound.view();
        let asked = view.range();
        let mut sink = bound.into_sink();
        let mut parts = Parts::new(request, asked, snapshot.alignment());
        while let Some(piece) = parts.next().map_err(|stopped| stopped.error)? {
            for area in areas(&snapshot, piece, request) {
                let area = area.map_err(|stopped| stopped.error)?;
                if let Some(part) = area.range().intersection(piece) {
                    shared::peek(self, &covered, area, part, all, &mut sink)
                        .map_err(|stopped| stopped.error)?;
                }
            }
        }
        Ok(view)
    }

    /// The checks of a request, before anything is touched. Binds the bitmap to the part of the
    /// request that is walked.
    fn check<'a>(
        &self,
        member: Option<&Party>,
        request: &HarvestRequest<'_>,
        bitmap: UserBitmap<'a>,
        snapshot: &Areas<'_>,
    ) -> Result<(Bound<'a>, Covered), Error> {
        let (range, from) = (request.range(), request.from());
        let page = snapshot.alignment();
        if !range.is_aligned(page) {
            let granule = page;
            return Err(Error::Unaligned { range, granule });
        }
        // A part of a granule, or of a page of a source, cannot be harvested alone.
        let most = |member: &Party| member.range.round_out(request.granule().max(page));
        if let Some(member) = member.filter(|member| !most(member).covers(range)) {
            return Err(Error::OutsideConsumer {
                range,
                consumer: member.range,
            });
        }
        let bound = bitmap.bind(range, request.granule())?;
        let covered = match request.scope() {
            Scope::All => Covered::everything(snapshot.rules().attachments()),
            Scope::Domain(domain) => Covered::domain(snapshot.rules().attachments(), domain)?,
        };
        let members = snapshot.rules().members();
        let covered = covered.heard_by(match member {
            None => Audience::unnamed(members),
            Some(member) => Audience::of(members, member)?,
        });
        if !self.ever_tracked(&covered) {
            return Err(Error::NeverTracked { range });
        }
        let granule = request.granule().max(page);
        if !range.contains(from) || !from.is_aligned(granule) {
            let at = from;
            return Err(Error::BadCursor { at, range, granule });
        }
        let asked = IovaRange::ascending(from, range.last());
        if request.on_hole() == Holes::Refuse
            && let Some(at) = snapshot.contiguous(asked).find_map(Result::err)
        {
            return Err(Error::Hole { at, range });
        }
        Ok((bound.narrowed(asked), covered))
    }
}

/// A harvest for a consumer of `space`; `None` is the unnamed one.
fn harvest_for<'a>(
    space: SpaceRef<'a>,
    member: Option<&Party>,
    request: &HarvestRequest<'_>,
    bitmap: UserBitmap<'a>,
) -> Result<Lease<'a, Owed>, Error> {
    let holder = space.clone();
    // Before the snapshot: a consumer that joins waits for this harvest, or is in the snapshot.
    let entered = holder.walks.enter();
    let backing = Recorder::begin(&holder, request.backing);
    let snapshot = holder.snapshot();
    let (bound, covered) = holder.check(member, request, bitmap, &snapshot)?;
    let held = Held::Lent(bound.view());
    let holding = Holding::begin(space, held, covered, backing, snapshot.version());
    let all = bound.view().range();
    let lease = harvest(holding, snapshot, request, bound, (all, &entered));
    holder.keep_in_bounds(lease.audience());
    Ok(lease)
}

/// Walks `request` into `bound`, the bits of `holding`. In `all` there is no area that is not
/// walked.
fn harvest<'a>(
    mut holding: Holding<'a>,
    snapshot: Areas<'_>,
    request: &HarvestRequest<'_>,
    bound: Bound<'_>,
    (all, entered): (IovaRange, &Walk<'_>),
) -> Lease<'a, Owed> {
    #[cfg(all(feature = "rayon", not(dirtymap_loom)))]
    if request.is_parallel() && !holding.is_shared() {
        return parallel::harvest(holding, snapshot, request, bound.view());
    }
    let asked = bound.view().range();
    // Declared after the holding, so that it is dropped before: a walk that panics closes its
    // window, then puts back.
    let mut sink = bound.into_sink();
    let walked = walk(&mut holding, &snapshot, request, asked, &mut sink);
    holding.walked(&snapshot);
    if matches!(walked, Ok(None)) && request.mask().is_none() {
        holding.walked_all(all, entered);
    }
    let mut recorded = Recorded::default();
    recorded.add(&sink);
    holding.into_lease(walked, recorded)
}
