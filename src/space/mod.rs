//! The address space: areas, the sources that translate them, and one flush queue for all of them.
//!
//! * **Allocate, reserve, allow** are in `allocation.rs`: each is one atomic step on areas and
//!   rules together.
//! * **Attach, detach** are in `attachment.rs`, with the protocol by which each area is filled into
//!   each domain once.
//! * **Map** first puts the area into the tree, which decides between racing maps and reservations,
//!   and then fills the sources.
//! * **Unmap** claims the areas, empties the sources, flushes, and only then takes the areas out of
//!   the tree: no address can be mapped again before the flush that covers it has finished.
//! * **Cut** and **batches** follow the same steps: `change.rs` has those of all three.
//! * **Mark** finds the area and sets its software dirty bits.
//! * **Harvest** is in [`harvest`](crate::harvest), which uses this module.

mod allocation;
mod area;
mod attachment;
mod bounds;
mod change;
mod discards;
mod domain;
mod emptying;
mod epochs;
mod faults;
mod flushing;
#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod growth_tests;
#[cfg(all(test, not(any(dirtymap_loom, dirtymap_shuttle))))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod hidden_tests;
#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;
mod member;
mod members;
mod outside;
mod pairs;
mod past;
mod plan;
mod recent;
mod retired;
mod rules;
mod snapshot;
mod stats;
mod switch;
mod tracking;
mod unmap;
mod walks;
mod whole;
mod zeroed;

pub use crate::marks::MarkOrdering;
pub use crate::report::Unmapped;
pub use allocation::SpaceRanges;
pub(crate) use area::Area;
pub(crate) use domain::{Attachment, Covered};
pub(crate) use epochs::Entry;
pub use epochs::{BadEpoch, Bounds, Epoch, Lineage, Parent, Since, Why, Written};
pub use faults::{Fault, FaultSource, Faults};
pub(crate) use member::{Audience, Member, MemberCounts, Party};
pub(crate) use members::Beginning;
pub(crate) use past::Watch;
pub use plan::Change;
pub use snapshot::SpaceSnapshot;
pub(crate) use stats::Counters;
pub use stats::SpaceStats;
pub(crate) use walks::Walk;

use crate::area::AreaTree;
use crate::error::Error;
use crate::events;
use crate::flush::FlushQueue;
use crate::marks::{Flights, InFlight, NearMarks, every_address};
use crate::source::{DirtySource, Mapping};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, fence};
use crate::units::{Access, DomainId, Granule, Iova, IovaRange, ToIovaRange};
use discards::Discards;
use faults::Log;
use outside::Outside;
use past::Past;
use retired::LastRetired;
use rules::Rules;
use switch::Switch;
use walks::Walks;

/// The areas of one moment.
pub(crate) type Areas<'a> = SpaceSnapshot<'a>;

/// A space of device-visible addresses in which dirty memory is tracked: what iommufd calls an IO
/// address space (IOAS).
///
/// Threads share it by reference. Marks, lookups and harvests never block on other threads;
/// [`map`](Self::map), [`unmap_discarding`](Self::unmap_discarding), [`attach`](Self::attach),
/// [`detach`](Self::detach) and [`start_tracking`](Self::start_tracking) may wait for devices to
/// drain.
///
/// Areas and rules that are replaced are dropped after no reader can use them any more: later, on
/// any thread, possibly after the space itself. A call that changes the space drops the sources of
/// detached domains before it takes a lock, some calls after the detach, at the latest together
/// with the space; see [`DirtySource`].
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule};
/// # fn main() -> Result<(), dirtymap::Error> {
/// let space = AddressSpace::tracked(Granule::K4);
/// space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// space.mark(0x1ffe..0x2002)?; // after a write that touches two pages
/// let lease = space.rounds().next()?;
/// assert_eq!(lease.dirty(), 2);
/// lease.commit(); // when they are copied
/// # Ok(())
/// # }
/// ```
#[doc(alias = "iommufd_ioas")]
#[doc(alias = "io_pagetable")]
#[doc(alias = "IOMMU_IOAS_ALLOC")]
#[doc(alias = "MemoryRegion")]
pub struct AddressSpace {
    page: Granule,
    pub(crate) ordering: MarkOrdering,
    pub(crate) areas: AreaTree<Area, 16, Rules>,
    pub(crate) flush: FlushQueue,
    pub(crate) in_flight: InFlight,
    /// What harvests have taken and not left to other consumers yet.
    pub(crate) flights: Flights,
    /// The pieces whose summaries such harvests may have cleared.
    pub(crate) hiding: InFlight,
    /// The ranges in which discards are at work.
    pub(crate) discarding: InFlight,
    discards: Discards,
    pub(crate) walks: Walks,
    /// Areas that leave while a harvest records what was mapped.
    pub(crate) past: Past,
    pub(crate) counters: Arc<Counters>,
    faults: Arc<Log>,
    tracking: Switch,
    /// Held while domains are attached, detached, or switched.
    membership: Mutex<()>,
    domains: AtomicU64,
    /// Whether a named consumer has ever joined.
    is_shared: AtomicBool,
    /// The last field, so that it is dropped after every field that may hold a domain.
    retired: LastRetired,
}

impl AddressSpace {
    /// An empty space whose areas are made of whole pages of size `page`. Software marks have this
    /// granularity.
    pub fn new(page: Granule) -> Self {
        AddressSpace {
            page,
            ordering: MarkOrdering::Fences,
            areas: AreaTree::new(),
            flush: FlushQueue::new(),
            in_flight: InFlight::new(),
            flights: Flights::new(every_address(), page),
            hiding: InFlight::new(),
            discarding: InFlight::new(),
            discards: Discards::new(),
            walks: Walks::new(),
            past: Past::new(),
            counters: Arc::new(Counters::default()),
            faults: Arc::new(Log::new()),
            tracking: Switch::new(),
            membership: Mutex::new(()),
            domains: AtomicU64::new(0),
            is_shared: AtomicBool::new(false),
            retired: LastRetired::new(),
        }
    }

    /// An empty space over a source of dirty state, such as the domain of an IOMMU; for further
    /// sources there is [`attach`](Self::attach).
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule, SharedLog, ToIovaRange};
    /// use std::sync::Arc;
    /// use std::sync::atomic::AtomicU64;
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let ram = (0..1 << 20).to_iova_range()?;
    /// let words: Arc<[AtomicU64]> = (0..4).map(|_| AtomicU64::new(0)).collect();
    /// let log = SharedLog::new(ram, Granule::K4, words)?; // a device sets a bit for each page
    /// let space = AddressSpace::with_source(Granule::K4, log)?;
    /// space.map(ram, 0, Access::ReadWrite)?;
    /// space.start_tracking()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `attach`.
    pub fn with_source(page: Granule, source: impl DirtySource + 'static) -> Result<Self, Error> {
        let space = Self::new(page);
        space.attach(source)?;
        Ok(space)
    }

    /// Lets marks of areas that are mapped from now on do without a fence. The fence is most of the
    /// cost of a mark of a page that is marked already. If the system has `membarrier(2)` with
    /// expedited private barriers, [`sync`](crate::Lease::sync), [`unmap`](Self::unmap) and
    /// [`start_tracking`](Self::start_tracking) run a full fence in all threads of this process
    /// instead. Each such call takes some 10 microseconds and interrupts every processor that runs
    /// one of these threads, which is worthwhile from some ten thousand marks per harvest on.
    /// [`mark_ordering`](Self::mark_ordering) returns the ordering in use. Needs the feature
    /// `membarrier`.
    ///
    /// If another process copies memory that is shared with it, marks need their fences.
    ///
    /// A filter of system calls that is installed later has to allow `membarrier(2)`. If it returns
    /// an error for the call, those three panic, because to go on would lose writes.
    #[doc(alias = "membarrier")]
    #[cfg(feature = "membarrier")]
    #[must_use]
    pub fn with_asymmetric_marks(mut self) -> Self {
        self.ordering = MarkOrdering::asymmetric();
        self
    }

    /// What orders marks against copies in this space.
    pub fn mark_ordering(&self) -> MarkOrdering {
        self.ordering
    }

    /// The smallest page, as given to [`new`](Self::new). Marks have this granularity.
    pub fn page(&self) -> Granule {
        self.page
    }

    /// Maps `range` to the memory that begins at the backing address `backing`. The area begins
    /// clean: what its memory holds already has to be copied once.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.map(4 << 30..5 << 30, 3 << 30, Access::ReadWrite)?; // above a hole
    /// assert!(space.map(0x1000..0x2000, 0, Access::Read).is_err()); // taken
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order: those of the range, [`Error::Unaligned`] and [`Error::UnalignedBacking`]
    /// (multiples of [`alignment`](Self::alignment)), [`Error::BackingWraps`], [`Error::Reserved`],
    /// [`Error::Overlap`], then the error of a source. After an error nothing is mapped, with one
    /// exception: if a source also fails to flush the range that another source had mapped already,
    /// the range stays taken until [`unmap_discarding`](Self::unmap_discarding) succeeds on it. A
    /// [panic](DirtySource#panics) of a source has the same effects as an error.
    #[doc(alias = "IOMMU_IOAS_MAP")]
    #[doc(alias = "iopt_map_pages")]
    #[doc(alias = "memory_region_add_subregion")]
    pub fn map(&self, range: impl ToIovaRange, backing: u64, access: Access) -> Result<(), Error> {
        let range = range.to_iova_range()?;
        self.retired.drop_all();
        let mapping = Mapping {
            range,
            backing,
            access,
        };
        let (area, domains) = self.areas.update(|edit| {
            let rules = edit.rules();
            check_mapping(&mapping, rules.alignment(self.page))?;
            if let Some(reserved) = rules.reserved_in(range) {
                return Err(Error::Reserved { range, reserved });
            }
            if let Some(existing) = rules.promised_in(range) {
                return Err(Error::Overlap { range, existing });
            }
            let domains = rules.attachments().clone();
            // After the checks: an area is made of whole pages.
            let area = Arc::new(Area::new(mapping, self.page, self.ordering));
            area.born_with(edit.version());
            edit.insert(range, Arc::clone(&area))
                .map(|()| (area, domains))
        })?;
        self.fill(area, &domains)
    }

    /// Fills `area` into `domains`, which are those of the root that `area` was published with, or
    /// takes the area out of the tree again.
    fn fill(&self, area: Arc<Area>, domains: &[Arc<Attachment>]) -> Result<(), Error> {
        // When this is dropped, the area can be unmapped, however this call ends.
        let _filling = Filling(&area);
        // SeqCst: F7 of the protocol in `attachment`, between the publication of the area and the
        // looks at `leaving`; pairs with F6 there. If F7 comes first, the detach sees the area and
        // empties it; if F6 comes first, `fill_pair` sees that the domain is leaving and does not
        // fill it.
        fence(Ordering::SeqCst);
        for domain in domains {
            if let Err(failure) = self.fill_pair(&area, domain) {
                // If this fails, the addresses stay taken, because devices may still reach the
                // memory.
                let failure = match self.take_out(&area) {
                    Ok(()) => failure,
                    Err(another) => failure.then(another),
                };
                return Err(failure.raise());
            }
        }
        let mapping = area.mapping();
        events::map(mapping.range, mapping.backing);
        Ok(())
    }

    /// Marks `range` dirty: a CPU thread wrote it. Call it **after** the write. A page that `range`
    /// covers only in part is marked as a whole.
    ///
    /// In a space that does not track yet, the next start of tracking discards the mark.
    ///
    /// Lock-free; never blocks. The cost grows with the number of pages: a mark of a terabyte sets
    /// a bit for each of them. A thread that marks one area again and again looks it up for the
    /// first two marks alone; [`area`](Self::area) saves that for a thread that marks several areas
    /// in turn. After an unmap, the bits of an area stay in memory until each thread that marked it
    /// so has looked up another mark, or has ended.
    ///
    /// # Errors
    /// [`Error::Outside`] with the first address that no area holds. The parts inside areas are
    /// still marked, and the call is counted in [`SpaceStats::outside_marks`].
    #[doc(alias = "mark_dirty")]
    #[doc(alias = "memory_region_set_dirty")]
    #[doc(alias = "mark_page_dirty")]
    #[doc(alias = "cpu_physical_memory_set_dirty_range")]
    pub fn mark(&self, range: impl ToIovaRange) -> Result<(), Error> {
        let range = range.to_iova_range()?;
        if recent::mark(self, range) {
            return Ok(());
        }
        self.mark_by_lookup(range)
    }

    #[inline(never)]
    fn mark_by_lookup(&self, range: IovaRange) -> Result<(), Error> {
        let outside = match self.areas.snapshot().lookup(range.start()) {
            // Most marks lie in one area.
            Some(entry) if entry.range.covers(range) => {
                recent::looked_up(self, &entry);
                entry.area.mark(range)
            }
            _ => self.in_areas(range, |area, part| area.mark(part)),
        };
        match outside.first {
            None => Ok(()),
            Some(at) => {
                self.report_outside_mark(at, outside.bytes);
                Err(Error::Outside { at })
            }
        }
    }

    /// Counts a mark that touched `len` bytes from `at` on outside every area, and records the
    /// fault, as [`mark`](Self::mark) does: for an adapter that refuses a mark by itself, because
    /// the mark lies outside of the part of the space that the adapter stands for.
    ///
    /// ```
    /// use dirtymap::{AddressSpace, Granule, Iova};
    ///
    /// let space = AddressSpace::new(Granule::K4);
    /// space.report_outside_mark(Iova::new(0x5000), 8);
    /// assert_eq!(space.stats().outside_marks, 1);
    /// assert_eq!(space.faults().recent.len(), 1);
    /// ```
    #[cold]
    pub fn report_outside_mark(&self, at: Iova, len: u64) {
        self.counters.outside_mark();
        let source = FaultSource::Mark;
        self.faults.record(Fault { at, len, source });
    }

    /// Calls `inside` for each part of `range` that an area holds. Returns the parts that no area
    /// holds, together with those that `inside` returns because their area has gone by then.
    #[cold]
    fn in_areas(
        &self,
        range: IovaRange,
        mut inside: impl FnMut(&Area, IovaRange) -> Outside,
    ) -> Outside {
        let snapshot = self.areas.snapshot();
        let mut outside = Outside::default();
        let mut next = Some(range.start());
        for entry in snapshot.iter(range) {
            if let Some(from) = next.filter(|from| *from < entry.range.start()) {
                outside.add(from, entry.range.start().get() - from.get());
            }
            if let Some(part) = entry.range.intersection(range) {
                outside.join(inside(entry.area, part));
            }
            next = entry.range.last().checked_add(1);
        }
        if let Some(from) = next.filter(|from| *from <= range.last()) {
            let bytes = range.last().get() - from.get();
            outside.add(from, bytes.saturating_add(1));
        }
        outside
    }

    /// A handle on the area that holds `iova`, for threads that mark the area often. Lock-free.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let ram = space.area(0x3000.into()).ok_or(dirtymap::Error::Outside { at: 0x3000.into() })?;
    /// ram.mark(0x3000..0x3008)?; // no lookup
    /// assert!(ram.mark(1 << 20..(1 << 20) + 1).is_err()); // outside of the area
    /// # Ok(())
    /// # }
    /// ```
    pub fn area(&self, iova: Iova) -> Option<AreaHandle> {
        let snapshot = self.areas.snapshot();
        snapshot.lookup(iova).map(|entry| self.handle(entry))
    }

    /// A handle on the area of `entry`.
    fn handle(&self, entry: crate::area::Entry<'_, Area>) -> AreaHandle {
        let area = entry.to_arc();
        AreaHandle {
            near: NearMarks::new(area.marks(), area.range()),
            area,
            counters: self.counters.clone(),
            faults: self.faults.clone(),
        }
    }

    /// The mapping at `iova`. Lock-free; never blocks.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// assert_eq!(space.lookup(0x3000.into()).map(|area| area.backing), Some(0));
    /// assert!(space.lookup((1 << 20).into()).is_none());
    /// # Ok(())
    /// # }
    /// ```
    pub fn lookup(&self, iova: Iova) -> Option<Mapping> {
        self.areas
            .snapshot()
            .lookup(iova)
            .map(|entry| entry.mapping())
    }

    /// All areas of one moment, in ascending order. Lock-free.
    pub fn mappings(&self) -> Vec<Mapping> {
        let snapshot = self.areas.snapshot();
        let mut mappings = Vec::with_capacity(snapshot.len());
        let areas = snapshot.iter(IovaRange::ALL);
        areas.for_each(|entry| mappings.push(entry.mapping()));
        mappings
    }

    /// Frees memory of areas that were unmapped. Each map and unmap does a part of that for earlier
    /// ones. This call is for a space in which none will follow soon. After three calls while no
    /// snapshot and no harvest is live in the process, nothing is held back.
    ///
    /// # Panics
    /// If the destructor of a source panics, its panic goes on after the others have been dropped.
    pub fn reclaim(&self) {
        self.areas.reclaim();
        self.retired.drop_all();
    }

    /// Counts of this space since it was made. They are read one by one.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x3001)?;
    /// drop(space.rounds().next()?);
    /// let stats = space.stats();
    /// assert_eq!((stats.harvests, stats.aborts, stats.aborted_bytes), (1, 1, 4096));
    /// # Ok(())
    /// # }
    /// ```
    pub fn stats(&self) -> SpaceStats {
        self.counters.read(self.flush.stats())
    }

    /// The newest faults: writes and marks outside every area. See [`Faults`].
    pub fn faults(&self) -> Faults {
        self.faults.read()
    }

    fn report(&self, outside: &Outside, source: FaultSource) {
        if let Some(at) = outside.first {
            let len = outside.bytes;
            self.faults.record(Fault { at, len, source });
        }
    }

    fn next_domain(&self) -> DomainId {
        // Relaxed: a unique number, which orders nothing.
        DomainId(self.domains.fetch_add(1, Ordering::Relaxed))
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // A handle keeps its area alive. It must not keep alive the sources that the area is filled
        // into.
        for entry in self.areas.snapshot().iter(IovaRange::ALL) {
            entry.area.close();
        }
    }
}

impl std::fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressSpace")
            .field("page", &self.page)
            .field("mappings", &self.mappings())
            .finish_non_exhaustive()
    }
}

/// Checks that `mapping` starts and ends at multiples of `alignment`, and that its backing
/// addresses do not wrap.
fn check_mapping(mapping: &Mapping, alignment: Granule) -> Result<(), Error> {
    let Mapping { range, backing, .. } = *mapping;
    if !range.is_aligned(alignment) {
        return Err(Error::Unaligned {
            range,
            granule: alignment,
        });
    }
    if backing & alignment.mask() != 0 {
        return Err(Error::UnalignedBacking {
            backing,
            granule: alignment,
        });
    }
    if backing
        .checked_add(range.last().get() - range.start().get())
        .is_none()
    {
        return Err(Error::BackingWraps { backing, range });
    }
    Ok(())
}

/// One area, for marks without a lookup. It keeps the memory of the area's marks alive, but not its
/// addresses, and no source. After an unmap each mark by it is an error. After a cut it marks the
/// pieces that remain, at the cost of a lookup, however often the area was cut.
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule};
/// # fn main() -> Result<(), dirtymap::Error> {
/// # let space = AddressSpace::tracked(Granule::K4);
/// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// let ram = space.area(0x3000.into()).ok_or(dirtymap::Error::Outside { at: 0x3000.into() })?;
/// ram.mark(0x3000..0x3008)?; // no lookup
/// space.unmap_discarding(0..1 << 20)?;
/// assert!(ram.mark(0x3000..0x3008).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct AreaHandle {
    /// The short path to the marks of `area`.
    near: Option<NearMarks>,
    area: Arc<Area>,
    counters: Arc<Counters>,
    faults: Arc<Log>,
}

impl AreaHandle {
    /// What the area mapped when it was looked up; it may have been cut or unmapped since.
    pub fn mapping(&self) -> Mapping {
        self.area.mapping()
    }

    /// Marks `range` dirty: a CPU thread wrote it. All of `range` is in this area. Call it
    /// **after** the write.
    ///
    /// Lock-free. On a page that is marked already, the call costs a fence and a load, and no write
    /// to shared memory.
    ///
    /// # Errors
    /// [`Error::Outside`] with the first address that lies outside the area, or was unmapped. Then
    /// nothing is marked, with one exception: in an area that was cut, the pieces that remain are
    /// marked. The call is counted in [`SpaceStats::outside_marks`].
    #[inline]
    pub fn mark(&self, range: impl ToIovaRange) -> Result<(), Error> {
        let range = range.to_iova_range()?;
        if self.mark_near(range) {
            return Ok(());
        }
        self.mark_far(range)
    }

    /// Marks `range` if it lies in the area and the short path reaches it. Returns whether the
    /// whole area is mapped after that; if not, the mark may be one of an area that has gone.
    #[inline]
    fn mark_near(&self, range: IovaRange) -> bool {
        self.set_near(range) && self.area.is_mapped()
    }

    /// Marks `range` if it lies in the area and the short path reaches it. Returns whether that was
    /// so; if not, nothing is marked.
    #[inline(always)]
    fn set_near(&self, range: IovaRange) -> bool {
        let Some(near) = &self.near else {
            return false;
        };
        // SAFETY: `near` was made of the marks of `area`, in `AddressSpace::handle`. An area has
        // the same marks for its life, and the handle keeps it alive, in its place.
        unsafe { near.mark(range) }
    }

    /// The general case. It may mark pages a second time, which changes nothing.
    #[cold]
    fn mark_far(&self, range: IovaRange) -> Result<(), Error> {
        let outside = self.area.mark(range);
        let Some(at) = outside.first else {
            return Ok(());
        };
        self.counters.outside_mark();
        // A call that extends past the area marks nothing.
        let inside = self.area.range().covers(range);
        self.faults.record(Fault {
            at: if inside { at } else { range.start() },
            len: outside.bytes,
            source: FaultSource::Handle,
        });
        Err(Error::Outside { at })
    }
}

/// An area whose sources are being filled. When this is dropped, with success or without, the area
/// can be unmapped.
struct Filling<'a>(&'a Area);

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.0.go_live();
    }
}
