//! Rounds of harvests over everything that is mapped, with a bitmap of their own.

use super::backing::Recorder;
use super::held::{Held, OwnBits, SpaceRef};
use super::holding::Holding;
use super::{HarvestRequest, Lease, Owed, Scope, Synced, harvest};
use crate::bitmap::{SparseBitmap, UserBitmap};
use crate::error::Error;
use crate::space::{AddressSpace, Party};
use crate::sync::Arc;
use crate::units::{DomainId, Granule, IovaRange, ToIovaRange};

/// Harvests of all areas of a space, holes skipped, one after the other.
///
/// Each round has one lease over everything. The bitmap is made as large as the areas reach, takes
/// memory only where something is dirty, and is empty at the beginning of each round: the caller
/// has nothing to size, to clear, or to keep alive.
///
/// ```
/// use dirtymap::{Access, AddressSpace, Granule};
///
/// # fn send(_: dirtymap::IovaRange) -> Result<(), std::io::Error> { Ok(()) }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// const GIB: u64 = 1 << 30;
/// let space = AddressSpace::tracked(Granule::K4);
/// space.map(0..3 * GIB, 0, Access::ReadWrite)?;
/// space.map(4 * GIB..5 * GIB, 3 * GIB, Access::ReadWrite)?; // above the hole
/// space.mark(4 * GIB..4 * GIB + 1)?;
///
/// let mut rounds = space.rounds();
/// let lease = rounds.next()?;
/// for run in lease.runs() {
///     send(run)?; // an error drops the lease, and what was not committed is dirty again
///     lease.commit_range(run);
/// }
/// lease.commit();
/// # Ok(())
/// # }
/// ```
///
/// Leases of [`AddressSpace::rounds`] borrow the space. Those of [`shared`](Self::shared) own what
/// they need: they go through channels, into structs and trait objects, and to C.
#[doc(alias = "migration_bitmap_sync")]
#[doc(alias = "memory_global_dirty_log_sync")]
#[must_use = "rounds that are dropped harvest nothing"]
pub struct Rounds<'a> {
    space: SpaceRef<'a>,
    granule: Granule,
    scope: Scope,
    within: IovaRange,
    backing: bool,
    bitmap: Arc<SparseBitmap>,
    /// The consumer; `None` is the unnamed one.
    member: Option<Arc<Party>>,
}

impl AddressSpace {
    /// Harvests of all that is mapped, round after round. The leases borrow the space; those of
    /// [`Rounds::shared`] go to other threads.
    pub fn rounds(&self) -> Rounds<'_> {
        Rounds::over(SpaceRef::Lent(self))
    }
}

impl Rounds<'static> {
    /// As [`AddressSpace::rounds`], over a space that the leases keep alive: they are `'static`.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule, Lease, Rounds, Synced};
    /// use std::sync::Arc;
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = Arc::new(AddressSpace::tracked(Granule::K4));
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x1000..0x1001)?;
    /// let lease: Lease<'static, Synced> = Rounds::shared(Arc::clone(&space)).next()?;
    /// let copied = std::thread::spawn(move || lease.commit().bits_set);
    /// assert_eq!(copied.join().ok(), Some(1));
    /// # Ok(())
    /// # }
    /// ```
    pub fn shared(space: Arc<AddressSpace>) -> Self {
        Rounds::over(SpaceRef::Shared(space))
    }
}

impl<'a> Rounds<'a> {
    fn over(space: SpaceRef<'a>) -> Self {
        Rounds {
            granule: space.page(),
            space,
            scope: Scope::All,
            within: IovaRange::ALL,
            backing: false,
            bitmap: Arc::new(SparseBitmap::new(0)),
            member: None,
        }
    }

    /// The rounds of a consumer.
    pub(super) fn of(space: SpaceRef<'a>, member: Arc<Party>) -> Self {
        Rounds {
            within: member.range,
            member: Some(member),
            ..Self::over(space)
        }
    }

    /// Reports `granule` bytes a bit, instead of the page of the space. A bit stands for a whole
    /// granule, so a run may reach into a hole beside an area; the copier intersects it with
    /// [`mappings`](AddressSpace::mappings).
    pub fn granule(mut self, granule: Granule) -> Self {
        self.granule = granule;
        self
    }

    /// Harvests one domain alone, instead of all of them and the marks.
    pub fn domain(mut self, domain: DomainId) -> Self {
        self.scope = Scope::Domain(domain);
        self
    }

    /// Harvests what lies inside `range`, rounded out to whole granules, instead of everything:
    /// areas and parts of areas.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x5000)?;
    /// let lease = space.rounds().within(0..0x4000)?.next()?;
    /// assert_eq!(lease.dirty(), 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of the range. For rounds of a [`Consumer`](super::Consumer) whose range does not hold
    /// all of `range`, each round is [`Error::OutsideConsumer`].
    pub fn within(mut self, range: impl ToIovaRange) -> Result<Self, Error> {
        self.within = range.to_iova_range()?;
        Ok(self)
    }

    /// Records the backing addresses of the pages at the time when they were written, for
    /// [`Lease::backing`]. See [`HarvestRequest::with_backing`].
    pub fn with_backing(mut self) -> Self {
        self.backing = true;
        self
    }

    /// The next round, synced: its pages can be copied. Waits for devices to drain.
    ///
    /// Leases of earlier rounds may still live; each has a bitmap of its own. This is no
    /// `Iterator`: a round can fail, and be repeated.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let mut rounds = space.rounds();
    /// for round in 0..3 {
    ///     space.mark(round << 12..(round << 12) + 1)?;
    ///     let lease = rounds.next()?;
    ///     assert_eq!(lease.dirty(), 1); // send them, then
    ///     lease.commit();
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NothingMapped`] if there is no area; else those of
    /// [`harvest`](AddressSpace::harvest), of a source that stopped it, and of
    /// [`sync`](Lease::sync). Nothing is lost: the pages that were taken are dirty again.
    #[expect(clippy::should_implement_trait)] // it can fail, and is never over
    pub fn next(&mut self) -> Result<Lease<'a, Synced>, Error> {
        self.harvest()?.sync()
    }

    /// The next round before its flush, for a consumer that syncs later. Never blocks if the
    /// attached sources do not.
    ///
    /// # Errors
    /// [`Error::NothingMapped`] if there is no area; else those of
    /// [`harvest`](AddressSpace::harvest).
    pub fn harvest(&mut self) -> Result<Lease<'a, Owed>, Error> {
        // Before the snapshot: as in `harvest_for`.
        let space = self.space.clone();
        let entered = space.walks.enter();
        let backing = Recorder::begin(&space, self.backing);
        let snapshot = space.snapshot();
        let areas = snapshot.areas_in(self.within).map(|entry| entry.range);
        let hull = areas.reduce(IovaRange::hull);
        let Some(hull) = hull.and_then(|hull| hull.intersection(self.within)) else {
            return Err(Error::NothingMapped { range: self.within });
        };
        let page = self.granule.max(snapshot.alignment());
        let range = hull.round_out(page);
        let bits = u64::try_from(range.granules(self.granule)).unwrap_or(u64::MAX);
        // A lease that still lives keeps its bitmap; else the memory goes back here.
        match Arc::get_mut(&mut self.bitmap).filter(|bitmap| bitmap.bits() == bits) {
            Some(bitmap) => bitmap.clear(),
            None => self.bitmap = Arc::new(SparseBitmap::new(bits)),
        }
        let request = HarvestRequest::new(range, self.granule).in_scope(self.scope);
        let bitmap = Arc::clone(&self.bitmap);
        let (bound, covered) = self.space.check(
            self.member.as_deref(),
            &request,
            UserBitmap::sparse_alone(&bitmap),
            &snapshot,
        )?;
        let held = Held::Own(OwnBits {
            bitmap: Arc::clone(&bitmap),
            bound: range,
            granule: self.granule,
            part: range,
        });
        let holding = Holding::begin(
            self.space.clone(),
            held,
            covered,
            backing,
            snapshot.version(),
        );
        let lease = harvest(holding, snapshot, &request, bound, (self.within, &entered));
        space.keep_in_bounds(lease.audience());
        Ok(lease)
    }
}

impl std::fmt::Debug for Rounds<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rounds")
            .field("granule", &self.granule)
            .field("scope", &self.scope)
            .field("within", &self.within)
            .finish_non_exhaustive()
    }
}
