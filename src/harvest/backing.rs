//! The backing of a lease: what its addresses were mapped to when they were written.

use crate::bitmap::{BitmapView, UserBitmap};
use crate::error::Error;
use crate::report::Unmapped;
use crate::source::Mapping;
use crate::source::placed::{Placed, PlacedList};
use crate::space::{AddressSpace, Area, Watch};
use crate::sync::{Arc, Ordering, fence};
use crate::units::{Granule, IovaRange, ToIovaRange};

/// The backing addresses of the pages of a lease, or of an unmap, at the time when they were
/// written. For a space of device addresses (IOVA) whose areas are mapped and unmapped while
/// devices write, and whose backing is the memory of a guest that is to be copied.
///
/// A lookup at the time of the copy would be wrong: by then the address may be mapped to other
/// memory, or to none. The backing of a lease is that of the areas that its harvest walked. If an
/// area left the space during the walk, a page at its addresses may have been written through a
/// younger area. Then the backing of both areas is reported: more memory than was written, never
/// less.
///
/// ```
/// use dirtymap::{Access, AddressSpace, Granule, IovaRange};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let guest = AddressSpace::tracked(Granule::K4); // by guest physical address
/// guest.map(0..1 << 30, 0, Access::ReadWrite)?;
/// let device = AddressSpace::tracked(Granule::K4); // by IOVA, backed by guest addresses
/// device.map(0xf000_0000..0xf000_4000, 0x5000, Access::ReadWrite)?;
/// device.mark(0xf000_1000..0xf000_1008)?; // or a device writes
///
/// let lease = device.rounds().with_backing().next()?;
/// device.unmap_discarding(0xf000_0000..0xf000_4000)?; // the guest reuses the addresses
/// device.map(0xf000_0000..0xf000_4000, 0x9000, Access::ReadWrite)?;
/// let backing = lease.backing().ok_or("not asked for")?;
/// for part in lease.runs().flat_map(|run| backing.of(run)) {
///     assert_eq!(part.backing, 0x6000);
///     guest.mark(part.backing_range()?)?; // dirty for the guest's own migration
/// }
/// lease.commit();
/// # Ok(())
/// # }
/// ```
///
/// # Leases and unmaps together have every write
/// Each write to a tracked page is in a lease, or in the result of the unmap of its area. So take
/// the backing of both: [`unmap_with_backing`](AddressSpace::unmap_with_backing).
///
/// A lease that is aborted after its areas have gone
/// [counts](crate::harvest::Aborted::outside_bytes) these pages. If another area came to their
/// addresses while the harvest ran, they are dirty in that area instead, and are not counted. So
/// where areas come and go, mark the backing of a lease before you abort it.
#[derive(Debug, Default)]
pub struct Backing {
    /// The areas of a snapshot, ascending.
    areas: Vec<Mapping>,
    /// Areas that may have been at the same addresses. They may overlap.
    others: PlacedList<Other>,
}

#[derive(Debug)]
struct Other(Mapping);

impl Placed for Other {
    fn range(&self) -> IovaRange {
        self.0.range
    }
}

impl Backing {
    /// The parts of `run` that were mapped, each with its own backing address, in ascending order.
    /// If an area left during the walk, the parts of other areas at the same addresses come after
    /// all of these, and may overlap them. A run may extend into a hole, because a bit stands for a
    /// whole granule. Holes have no part.
    ///
    /// Costs O(log n) for n areas, and a step for each part. Never blocks.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0x0..0x2000, 0x10_0000, Access::ReadWrite)?;
    /// space.map(0x2000..0x4000, 0x50_0000, Access::ReadWrite)?;
    /// space.mark(0x1000..0x3000)?; // one run in two areas
    /// let lease = space.rounds().with_backing().next()?;
    /// let backing = lease.backing().ok_or("not recorded")?;
    /// let parts = lease.runs().flat_map(|run| backing.of(run));
    /// assert_eq!(parts.map(|part| part.backing).collect::<Vec<_>>(), [0x10_1000, 0x50_0000]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn of(&self, run: IovaRange) -> impl Iterator<Item = Mapping> + '_ {
        let first = self
            .areas
            .partition_point(|area| area.range.last() < run.start());
        let areas = self.areas.get(first..).unwrap_or_default();
        let areas = areas.iter().map_while(move |area| narrowed(area, run));
        let others = self.others.touched(run);
        areas.chain(others.filter_map(move |(other, _)| narrowed(&other.0, run)))
    }

    /// The areas that the harvest walked or the unmap removed, as a whole, in the order of
    /// [`of`](Self::of).
    pub fn mappings(&self) -> impl Iterator<Item = Mapping> + '_ {
        let others = self.others.iter().map(|other| other.0);
        self.areas.iter().copied().chain(others)
    }
}

/// The part of an area in `within`.
fn narrowed(area: &Mapping, within: IovaRange) -> Option<Mapping> {
    let range = area.range.intersection(within)?;
    let skipped = range.start().get() - area.range.start().get();
    Some(Mapping {
        range,
        backing: area.backing + skipped,
        access: area.access,
    })
}

/// Whether two areas have the same memory at an address that both have.
fn is_same(one: &Mapping, other: &Mapping) -> bool {
    let base = |area: &Mapping| area.backing.wrapping_sub(area.range.start().get());
    base(one) == base(other)
}

/// The backing of a harvest that runs.
#[derive(Debug)]
pub(super) struct Recorder {
    watch: Watch,
    areas: Vec<Mapping>,
    /// The parts, ascending, whose area was on its way out when they had been looked at.
    unsure: Vec<IovaRange>,
}

impl Recorder {
    /// Begins before the snapshot of the harvest is taken.
    pub(super) fn begin(space: &AddressSpace, request: bool) -> Option<Self> {
        request.then(|| Recorder {
            watch: space.past.watch(),
            areas: Vec::new(),
            unsure: Vec::new(),
        })
    }

    /// The harvest has looked at `part` of `area`.
    pub(super) fn looked(&mut self, area: &Area, part: IovaRange) {
        let is_new = self.areas.last().is_none_or(|last| *last != area.mapping());
        if is_new {
            self.areas.push(area.mapping());
        }
        // Acquire: pairs with F7 of `AddressSpace::fill`, and with the Release fence of `fill_new`.
        // - If the harvest took a page that was written through a younger area, it sees the fill of
        //   that area, and so the claim of this one, which came before.
        // - If it does not see the claim, each page that it took is of this area.
        fence(Ordering::Acquire);
        if area.is_going() {
            self.unsure.push(part);
        }
    }

    /// The walk has ended.
    pub(super) fn finish(self, space: &AddressSpace) -> Backing {
        let mut backing = Backing {
            areas: self.areas,
            others: PlacedList::default(),
        };
        if self.unsure.is_empty() {
            return backing;
        }
        // Steps W4 and W5 of `past`, in this order.
        let snapshot = space.snapshot();
        let left = self.watch.left();
        let mut others = Vec::new();
        for part in &self.unsure {
            let now = snapshot.areas_in(*part).map(|entry| entry.mapping());
            others.extend(now.filter_map(|area| narrowed(&area, *part)));
        }
        for area in &left {
            let first = self
                .unsure
                .partition_point(|part| part.last() < area.range.start());
            let parts = self.unsure.get(first..).unwrap_or_default();
            others.extend(parts.iter().map_while(|part| narrowed(area, *part)));
        }
        others.retain(|other| !backing.of(other.range).any(|area| is_same(&area, other)));
        others.sort_by_key(|other| (other.range.start(), other.range.last(), other.backing));
        others.dedup();
        let others = others.into_iter().map(|other| Arc::new(Other(other)));
        backing.others = PlacedList::new(others.collect());
        backing
    }
}

impl AddressSpace {
    /// As [`unmap`](Self::unmap), and returns the backing of the areas that it unmapped as well.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, UserBitmap};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0xf000_0000..0xf010_0000, 0x5000, Access::ReadWrite)?;
    /// space.mark(0xf000_3000..0xf000_3001)?;
    /// let mut words = [0; 4];
    /// let bitmap = UserBitmap::new(&mut words);
    /// let all = 0xf000_0000..0xf010_0000;
    /// let (_, dirty, backing) = space.unmap_with_backing(all, Granule::K4, bitmap)?;
    /// let parts: Vec<u64> = dirty
    ///     .runs()
    ///     .flat_map(|run| backing.of(run))
    ///     .map(|part| part.backing)
    ///     .collect();
    /// assert_eq!(parts, [0x8000]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `unmap`.
    pub fn unmap_with_backing<'a>(
        &self,
        range: impl ToIovaRange,
        granule: Granule,
        bitmap: UserBitmap<'a>,
    ) -> Result<(Unmapped, BitmapView<'a>, Backing), Error> {
        let range = range.to_iova_range()?;
        let (unmapped, view, areas) = self.unmap_areas(range, granule, bitmap)?;
        let others = PlacedList::default();
        Ok((unmapped, view, Backing { areas, others }))
    }
}
