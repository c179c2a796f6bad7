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

pub use allocation::SpaceRanges;
pub(crate) use area::Area;
pub(crate) use stats::Counters;
pub use stats::SpaceStats;

use crate::area::{AreaTree, Snapshot};
use crate::error::Error;
use crate::flush::{FlushGather, FlushQueue, Invalidated};
use crate::source::{DirtySource, Mapping};
use crate::sync::{Arc, AtomicU8, Mutex, Ordering, fence, lock};
use crate::units::{Access, Granule, Iova, IovaRange};
use rules::Rules;

const NEVER: u8 = 0;
const ON: u8 = 1;
const OFF: u8 = 2;

/// A space of device-visible addresses in which dirty memory is tracked.
///
/// Shared by reference between any number of threads. Marks, lookups and harvests never wait; [`map`](Self::map),
/// [`unmap_discarding`](Self::unmap_discarding) and [`set_tracking`](Self::set_tracking) may wait for devices to drain.
pub struct AddressSpace {
    page: Granule,
    pub(crate) areas: AreaTree<Area, 16, Rules>,
    pub(crate) sources: Vec<Box<dyn DirtySource>>,
    pub(crate) flush: FlushQueue,
    pub(crate) counters: Counters,
    /// Held while tracking is switched.
    switching: Mutex<()>,
    tracking: AtomicU8,
}

/// What [`AddressSpace::unmap_discarding`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    /// Areas that were removed.
    pub areas: u64,
    /// Their bytes.
    pub bytes: u128,
    /// Bytes of dirty state that went with them: dirty leaves of the sources and marked pages.
    pub discarded_bytes: u128,
}

impl AddressSpace {
    /// An empty space whose areas are made of whole pages of size `page`. Software marks have this granularity.
    pub fn new(page: Granule) -> Self {
        AddressSpace {
            page,
            areas: AreaTree::new(),
            sources: Vec::new(),
            flush: FlushQueue::new(),
            counters: Counters::default(),
            switching: Mutex::new(()),
            tracking: AtomicU8::new(NEVER),
        }
    }

    /// Adds a source of dirty state, such as the domain of an IOMMU. Areas are mapped into every source.
    #[must_use]
    pub fn with_source(mut self, source: impl DirtySource + 'static) -> Self {
        self.sources.push(Box::new(source));
        self
    }

    /// The smallest page.
    pub fn page(&self) -> Granule {
        self.page
    }

    /// Maps `range` to the memory that begins at `backing`.
    ///
    /// # Errors
    /// In this order: [`Error::Unaligned`] and [`Error::UnalignedBacking`] (multiples of [`page`](Self::page)),
    /// [`Error::BackingWraps`], [`Error::Reserved`], [`Error::Overlap`], then what a source says. On an error nothing is
    /// mapped.
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
        for (filled, source) in self.sources.iter().enumerate() {
            if let Err(error) = source.map(&area.mapping) {
                let mut gather = FlushGather::new();
                for source in &self.sources[..filled] {
                    source.unmap(range, &mut gather);
                }
                // If even this flush fails, the addresses stay taken rather than reach memory that is not theirs.
                self.flush_now(&gather)?;
                self.remove(&[area]);
                return Err(error);
            }
        }
        area.go_live();
        Ok(())
    }

    /// Unmaps every area inside `range` and **discards** what was dirty in them. All or nothing; holes in `range`
    /// are fine.
    ///
    /// Waits for the flush, so that on return no device reaches the memory and its addresses can be mapped again.
    ///
    /// # Errors
    /// [`Error::NothingMapped`]; [`Error::PartOfArea`] if an area sticks out of `range`; [`Error::Busy`] if another
    /// call maps or unmaps one of them. Nothing is unmapped then. If a source cannot flush: its error; the areas
    /// keep their addresses, although devices can no longer reach their memory by new translations, and the call
    /// can be repeated.
    pub fn unmap_discarding(&self, range: IovaRange) -> Result<Unmapped, Error> {
        let mut areas = Vec::new();
        for entry in self.areas.snapshot().iter(range) {
            if !range.covers(entry.range) {
                return Err(Error::PartOfArea {
                    range,
                    area: entry.range,
                });
            }
            areas.push(entry.to_arc());
        }
        if areas.is_empty() {
            return Err(Error::NothingMapped { range });
        }
        for (claimed, area) in areas.iter().enumerate() {
            if let Err(busy) = area.claim() {
                areas[..claimed].iter().for_each(|area| area.give_back());
                return Err(busy);
            }
        }
        let mut gather = FlushGather::new();
        let mut unmapped = Unmapped::default();
        for area in &areas {
            unmapped.areas += 1;
            unmapped.bytes += area.mapping.range.len();
            for source in &self.sources {
                unmapped.discarded_bytes +=
                    u128::from(source.unmap(area.mapping.range, &mut gather));
            }
        }
        if let Err(error) = self.flush_now(&gather) {
            areas.iter().for_each(|area| area.give_back());
            return Err(error);
        }
        self.remove(&areas);
        for area in &areas {
            unmapped.discarded_bytes += u128::from(area.marks.count()) << self.page.lg2();
        }
        self.counters.discarded(unmapped.discarded_bytes);
        Ok(unmapped)
    }

    /// Switches tracking of writes.
    ///
    /// The first switch on makes the baseline clean (what was marked or dirty before is discarded) and flushes:
    /// every write that begins after the return is reported. On when it is on changes nothing and keeps what is
    /// dirty. Off keeps what is dirty for a last harvest. Software marks are kept whatever the switch says.
    ///
    /// # Errors
    /// That of a source; tracking is then off.
    pub fn set_tracking(&self, on: bool) -> Result<(), Error> {
        let _switching = lock(&self.switching);
        // Relaxed: only changed under the lock that we hold.
        let now = self.tracking.load(Ordering::Relaxed);
        if on == (now == ON) {
            return Ok(());
        }
        if on {
            for entry in self.areas.snapshot().iter(IovaRange::ALL) {
                entry.area.marks.clear();
            }
            // SeqCst: F2 of the marks' protocol (`source::marks`), for the first full copy that follows.
            fence(Ordering::SeqCst);
        }
        for (switched, source) in self.sources.iter().enumerate() {
            if let Err(error) = source.set_tracking(on) {
                for source in &self.sources[..switched] {
                    // The error that is returned says enough; a source that can't go back either stays on, which is
                    // harmless.
                    let _ = source.set_tracking(false);
                }
                return Err(error);
            }
        }
        if on || now == ON {
            // Release: pairs with the Acquire in `ever_tracked`; a harvest that sees it finds a clean baseline.
            self.tracking
                .store(if on { ON } else { OFF }, Ordering::Release);
        }
        Ok(())
    }

    /// Whether tracking was ever switched on.
    pub(crate) fn ever_tracked(&self) -> bool {
        // Acquire: pairs with the Release in `set_tracking`.
        self.tracking.load(Ordering::Acquire) != NEVER
    }

    /// Says that a CPU thread wrote `range`. Call it **after** the write. Pages that `range` only touches are
    /// marked whole.
    ///
    /// Lock-free, and never waits. Where one area is marked again and again, [`area`](Self::area) saves the lookup.
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
        let mut next = Some(range.start());
        for entry in self.areas.snapshot().iter(range) {
            if let Some(from) = next.filter(|from| *from < entry.range.start()) {
                outside.add(from, entry.range.start().get() - from.get());
            }
            entry.area.marks.mark(range);
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

    /// Takes areas that this thread owns out of the tree, in one step.
    fn remove(&self, areas: &[Arc<Area>]) {
        let removed: Result<(), std::convert::Infallible> = self.areas.update(|edit| {
            for area in areas {
                edit.remove(area.mapping.range.start());
            }
            Ok(())
        });
        match removed {
            Ok(()) => areas.iter().for_each(|area| area.retire()),
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot<'_, Area, 16, Rules> {
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
    /// [`Error::Outside`] if a part of `range` lies outside the area, or the area was unmapped.
    #[inline]
    pub fn mark(&self, range: IovaRange) -> Result<(), Error> {
        self.area.mark(range)
    }
}
