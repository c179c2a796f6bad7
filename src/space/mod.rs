//! The address space: areas, the sources that translate them, and one queue of flushes for all.
//!
//! * **Allocate, reserve, allow** are in `allocation.rs`: one atomic step each, on areas and rules together.
//! * **Map** puts the area into the tree first (the tree decides between racing maps and reservations), then fills the sources.
//! * **Unmap** claims the areas, empties the sources, flushes, and only then takes the areas out of the tree: no
//!   address can be mapped again before the flush that covers it has finished.
//! * **Mark** finds the area and sets its software dirty bits.
//! * **Harvest** is one floor up, in [`harvest`](crate::harvest).

mod allocation;
mod area;
mod rules;
mod stats;
mod tracking;
mod unmap;

pub use allocation::SpaceRanges;
pub(crate) use area::Area;
pub(crate) use stats::Counters;
pub use stats::SpaceStats;
pub use unmap::Unmapped;

use crate::area::{AreaTree, Snapshot};
use crate::error::Error;
use crate::flush::{FlushGather, FlushQueue, Invalidated};
use crate::source::{DirtySource, InFlight, Mapping};
use crate::sync::Arc;
use crate::units::{Access, Granule, Iova, IovaRange};
use rules::Rules;
use tracking::Tracking;

/// The areas of one moment.
pub(crate) type Areas<'a> = Snapshot<'a, Area, 16, Rules>;

/// A space of device-visible addresses in which dirty memory is tracked.
///
/// Shared by reference between any number of threads. Marks, lookups and harvests never wait; [`map`](Self::map),
/// [`unmap_discarding`](Self::unmap_discarding) and [`set_tracking`](Self::set_tracking) may wait for devices to drain.
pub struct AddressSpace {
    page: Granule,
    pub(crate) areas: AreaTree<Area, 16, Rules>,
    pub(crate) sources: Vec<Box<dyn DirtySource>>,
    pub(crate) flush: FlushQueue,
    pub(crate) in_flight: InFlight,
    pub(crate) counters: Arc<Counters>,
    tracking: Tracking,
}

impl AddressSpace {
    /// An empty space whose areas are made of whole pages of size `page`. Software marks have this granularity.
    pub fn new(page: Granule) -> Self {
        AddressSpace {
            page,
            areas: AreaTree::new(),
            sources: Vec::new(),
            flush: FlushQueue::new(),
            in_flight: InFlight::new(),
            counters: Arc::new(Counters::default()),
            tracking: Tracking::new(),
        }
    }

    /// Adds a source of dirty state, such as the domain of an IOMMU. Areas that are there are mapped into it, and it
    /// tracks if the space does; areas to come are mapped into every source.
    ///
    /// # Errors
    /// That of the source, if it refuses an area or to track; the space is gone then, so add sources first.
    pub fn with_source(mut self, source: impl DirtySource + 'static) -> Result<Self, Error> {
        for mapping in self.mappings() {
            source.map(&mapping)?;
        }
        if self.tracking.is_on() {
            source.set_tracking(true)?;
        }
        self.sources.push(Box::new(source));
        Ok(self)
    }

    /// The smallest page.
    pub fn page(&self) -> Granule {
        self.page
    }

    /// Maps `range` to the memory that begins at `backing`.
    ///
    /// # Errors
    /// In this order: [`Error::Unaligned`] and [`Error::UnalignedBacking`] (multiples of [`page`](Self::page)),
    /// [`Error::BackingWraps`], [`Error::Reserved`], [`Error::Overlap`], then what a source says. On an error nothing is mapped;
    /// only if a source also fails to flush what another one had mapped already, the range stays taken until
    /// [`unmap_discarding`](Self::unmap_discarding) succeeds on it.
    pub fn map(&self, range: IovaRange, backing: u64, access: Access) -> Result<(), Error> {
        if !range.is_aligned(self.page) {
            return Err(Error::Unaligned {
                range,
                granule: self.page,
            });
        }
        self.check_backing(range, backing)?;
        let mapping = Mapping {
            range,
            backing,
            access,
        };
        let area = Arc::new(Area::new(mapping, self.page));
        self.areas.update(|edit| {
            if let Some(reserved) = edit.rules().reserved_in(range) {
                return Err(Error::Reserved { range, reserved });
            }
            edit.insert(range, &area)
        })?;
        self.fill(area)
    }

    /// Checks the memory behind `range`.
    fn check_backing(&self, range: IovaRange, backing: u64) -> Result<(), Error> {
        if backing & self.page.mask() != 0 {
            return Err(Error::UnalignedBacking {
                backing,
                granule: self.page,
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

    /// Fills the sources for an area that is in the tree already, or takes it out again.
    fn fill(&self, area: Arc<Area>) -> Result<(), Error> {
        let range = area.mapping.range;
        // From here on the area can be unmapped, whatever becomes of this call.
        let _filling = Filling(&area);
        for (filled, source) in self.sources.iter().enumerate() {
            if let Err(error) = source.map(&area.mapping) {
                let mut gather = FlushGather::new();
                for source in &self.sources[..filled] {
                    source.unmap(range, &mut gather, &mut |_| ());
                }
                if !gather.is_empty()
                    && let Err(flush_failed) = self.flush_now(&gather)
                {
                    // The addresses stay taken rather than reach memory that is not theirs.
                    return Err(flush_failed);
                }
                self.remove(std::slice::from_ref(&area));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Says that a CPU thread wrote `range`. Call it **after** the write. Pages that `range` only touches are
    /// marked whole.
    ///
    /// Lock-free, and never waits. The cost grows with the pages: a mark of a terabyte sets a bit for each of them.
    /// Where one area is marked again and again, [`area`](Self::area) saves the lookup.
    ///
    /// # Errors
    /// [`Error::Outside`] with the first address that no area holds; the parts inside areas are marked all the
    /// same, and the call is counted in [`SpaceStats::outside_marks`].
    pub fn mark(&self, range: IovaRange) -> Result<(), Error> {
        let outside = self.mark_inside(range);
        match outside.first {
            None => Ok(()),
            Some(at) => {
                self.counters.outside_mark();
                Err(Error::Outside { at })
            }
        }
    }

    /// Marks what lies inside areas, and says what does not.
    pub(crate) fn mark_inside(&self, range: IovaRange) -> Outside {
        let mut outside = Outside::default();
        let snapshot = self.areas.snapshot();
        // Most marks lie in one area.
        if let Some(entry) = snapshot.lookup(range.start())
            && entry.area.mark(range).is_ok()
        {
            return outside;
        }
        let mut next = Some(range.start());
        for entry in snapshot.iter(range) {
            if let Some(from) = next.filter(|from| *from < entry.range.start()) {
                outside.add(from, entry.range.start().get() - from.get());
            }
            if let Some(part) = entry.range.intersection(range)
                && entry.area.mark(part).is_err()
            {
                // Unmapped since the snapshot.
                let bytes = part.last().get() - part.start().get();
                outside.add(part.start(), bytes.saturating_add(1));
            }
            next = entry.range.last().checked_add(1);
        }
        if let Some(from) = next.filter(|from| *from <= range.last()) {
            let bytes = range.last().get() - from.get();
            outside.add(from, bytes.saturating_add(1));
        }
        outside
    }

    /// A handle on the area that holds `iova`, for threads that mark it often.
    pub fn area(&self, iova: Iova) -> Option<AreaHandle> {
        let snapshot = self.areas.snapshot();
        let entry = snapshot.lookup(iova)?;
        Some(AreaHandle {
            area: entry.to_arc(),
            counters: self.counters.clone(),
        })
    }

    /// What is mapped at `iova`. Lock-free, and never waits.
    pub fn lookup(&self, iova: Iova) -> Option<Mapping> {
        self.areas
            .snapshot()
            .lookup(iova)
            .map(|entry| entry.area.mapping)
    }

    /// All areas of one moment, in order.
    pub fn mappings(&self) -> Vec<Mapping> {
        let snapshot = self.areas.snapshot();
        snapshot
            .iter(IovaRange::ALL)
            .map(|entry| entry.area.mapping)
            .collect()
    }

    /// Counts of this space since it was made.
    pub fn stats(&self) -> SpaceStats {
        self.counters.read(self.flush.stats())
    }

    /// Invalidates `gather` in every source.
    pub(crate) fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let mut all = Invalidated::default();
        for source in &self.sources {
            all.add(source.invalidate(gather)?);
        }
        Ok(all)
    }

    fn flush_now(&self, gather: &FlushGather) -> Result<(), Error> {
        let ticket = self.flush.owe(gather);
        self.flush.wait(ticket, |gather| self.invalidate(gather))
    }

    pub(crate) fn snapshot(&self) -> Areas<'_> {
        self.areas.snapshot()
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

/// The parts of a range that lie in no area.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    pub(crate) first: Option<Iova>,
    pub(crate) bytes: u64,
}

impl Outside {
    fn add(&mut self, at: Iova, bytes: u64) {
        self.first.get_or_insert(at);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// One area, for marking without a lookup. Keeps the area's memory, not its addresses: after an unmap it only gives
/// errors.
#[derive(Clone, Debug)]
pub struct AreaHandle {
    area: Arc<Area>,
    counters: Arc<Counters>,
}

impl AreaHandle {
    /// What the area maps.
    pub fn mapping(&self) -> Mapping {
        self.area.mapping
    }

    /// Says that a CPU thread wrote `range`, all of which lies in this area. Call it **after** the write.
    ///
    /// On a page that is marked already this costs a fence and a load, and no write to shared memory.
    ///
    /// # Errors
    /// [`Error::Outside`] if a part of `range` lies outside the area, or the area was unmapped; nothing is marked, and the
    /// call is counted in [`SpaceStats::outside_marks`].
    #[inline]
    pub fn mark(&self, range: IovaRange) -> Result<(), Error> {
        self.area
            .mark(range)
            .inspect_err(|_| self.counters.outside_mark())
    }
}

/// An area whose sources are being filled; when that is over, with success or not, it can be unmapped.
struct Filling<'a>(&'a Area);

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.0.go_live();
    }
}
