//! The library itself: one area, marked through its handle or through the space.

use std::fmt::Display;

use dirtymap::area::AreaMap;
use dirtymap::{
    Access, AddressSpace, AreaHandle, Granule, HarvestRequest, Iova, IovaRange, Mapping, UserBitmap,
};

use crate::{Areas, PAGE, Peer, Tracker, add_to_sum, sum};

/// Marks through [`AddressSpace::mark`], which finds the area for each mark.
pub struct ThroughSpace {
    space: AddressSpace,
    all: IovaRange,
}

/// Marks through an [`AreaHandle`], as a device that knows its area does.
pub struct ThroughHandle {
    space: ThroughSpace,
    area: AreaHandle,
}

/// As [`ThroughHandle`], in a space whose harvests run the fences of marks: `membarrier(2)`.
pub struct Asymmetric(ThroughHandle);

impl ThroughSpace {
    fn over(space: AddressSpace, pages: u64) -> Self {
        let all = range(0, pages * PAGE);
        sure(space.map(all, 0, Access::ReadWrite));
        sure(space.start_tracking());
        ThroughSpace { space, all }
    }
}

impl ThroughHandle {
    fn over(space: ThroughSpace) -> Self {
        let Some(area) = space.space.area(Iova::MIN) else {
            unreachable!("the space has one area, which starts at the lowest address");
        };
        ThroughHandle { space, area }
    }
}

impl Tracker for ThroughSpace {
    fn new(pages: u64) -> Self {
        ThroughSpace::over(AddressSpace::new(Granule::K4), pages)
    }

    fn name(&self) -> &'static str {
        "dirtymap-space"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        sure(self.space.mark(range(start, len)));
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest(bitmap);
    }
}

impl Peer for ThroughSpace {
    fn harvest(&self, bitmap: &mut [u64]) {
        let request = HarvestRequest::new(self.all, Granule::K4);
        let lease = sure(self.space.harvest(&request, UserBitmap::new(bitmap)));
        sure(lease.sync()).commit();
    }
}

impl Tracker for ThroughHandle {
    fn new(pages: u64) -> Self {
        ThroughHandle::over(ThroughSpace::new(pages))
    }

    fn name(&self) -> &'static str {
        "dirtymap-handle"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        sure(self.area.mark(range(start, len)));
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest(bitmap);
    }
}

impl Peer for ThroughHandle {
    fn harvest(&self, bitmap: &mut [u64]) {
        self.space.harvest(bitmap);
    }
}

impl Tracker for Asymmetric {
    /// On a system without `membarrier(2)` the marks keep their fences.
    fn new(pages: u64) -> Self {
        let space = AddressSpace::new(Granule::K4).with_asymmetric_marks();
        Asymmetric(ThroughHandle::over(ThroughSpace::over(space, pages)))
    }

    fn name(&self) -> &'static str {
        "dirtymap-membarrier"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        self.0.mark(start, len);
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest(bitmap);
    }
}

impl Peer for Asymmetric {
    fn harvest(&self, bitmap: &mut [u64]) {
        self.0.harvest(bitmap);
    }
}

impl Areas for AddressSpace {
    fn new() -> Self {
        AddressSpace::new(Granule::K4)
    }

    fn name(&self) -> &'static str {
        "dirtymap-space"
    }

    fn map(&self, mapping: Mapping) {
        sure(self.map(mapping.range, mapping.backing, mapping.access));
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        self.lookup(Iova::new(iova))
    }

    fn unmap(&self, range: IovaRange) {
        sure(self.unmap_discarding(range));
    }

    fn first_fit(&self, _len: u64) -> Option<IovaRange> {
        None
    }

    fn map_anywhere(&self, len: u64) -> Option<IovaRange> {
        Some(sure(self.map_anywhere(len, 0, Access::ReadWrite)))
    }

    fn scan(&self) -> u64 {
        sum(self.mappings())
    }
}

/// The tree of the space alone, which does the same work as the other maps.
impl Areas for AreaMap<Mapping> {
    fn new() -> Self {
        AreaMap::new()
    }

    fn name(&self) -> &'static str {
        "dirtymap-tree"
    }

    fn map(&self, mapping: Mapping) {
        sure(self.insert(mapping.range, mapping));
    }

    fn unmap(&self, range: IovaRange) {
        self.remove(range.start());
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        self.lookup(Iova::new(iova))
    }

    fn first_fit(&self, len: u64) -> Option<IovaRange> {
        let within = sure(IovaRange::new(Iova::new(PAGE), Iova::MAX));
        let alignment = Granule::from_lg2(len.trailing_zeros() as u8)?;
        self.first_fit(within, len, alignment)
    }

    fn scan(&self) -> u64 {
        let mut total = 0u64;
        self.scan(|_, mapping| total = add_to_sum(total, mapping));
        total
    }

    fn remap_batch(&self, mappings: &[Mapping]) -> bool {
        let ranges = mappings.iter().map(|mapping| (mapping.range, *mapping));
        sure(self.replace(ranges));
        true
    }
}

#[inline]
pub(super) fn range(start: u64, len: u64) -> IovaRange {
    sure(IovaRange::from_len(Iova::new(start), len))
}

/// A workload's calls must succeed, because the numbers are invalid otherwise.
#[inline]
pub(super) fn sure<T, E: Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("a workload was refused: {error}"))
}
