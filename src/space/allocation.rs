//! Free addresses: allocation, reserved and allowed ranges, and a report of all of them.
//!
//! One root of the tree carries areas and rules. So each of these calls looks at one state, and is
//! published only if that state is still the current one. Two allocations never get the same
//! addresses, and if a map and a reservation of the same address race, one of them is refused.

use super::rules::Rules;
use super::{AddressSpace, Area, check_mapping};
use crate::error::Error;
use crate::ranges::without;
use crate::source::Mapping;
use crate::sync::Arc;
use crate::units::{Access, Granule, Iova, IovaRange, ToIovaRange};

/// The largest alignment of allocated ranges, the size of a large leaf: 2 MiB.
const MAX_ALIGNMENT: Granule = Granule::M2;

/// Which ranges are mapped, free, reserved and allowed at one moment: see [`AddressSpace::ranges`].
/// All lists are in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpaceRanges {
    /// The areas.
    pub mappings: Vec<Mapping>,
    /// The ranges that are neither mapped nor reserved, joined where they touch. A map fits in
    /// here.
    pub holes: Vec<IovaRange>,
    /// The reserved addresses, as ranges that do not touch.
    pub reserved: Vec<IovaRange>,
    /// The ranges in which [`AddressSpace::map_anywhere`] may allocate, joined where they touch.
    /// Empty if there is no restriction.
    pub allowed: Vec<IovaRange>,
}

impl AddressSpace {
    /// Maps the `len` bytes of memory that begin at the backing address `backing` at the lowest
    /// free addresses, and returns their range.
    ///
    /// The alignment suits large leaves: `len` rounded up to a power of two, at most the lowest set
    /// bit of `backing` (unless that is 0), at most 2 MiB, at least the smallest page. The range
    /// lies inside the [allowed ranges](Self::set_allowed) if there are any, outside areas and
    /// reserved ranges, and never in the first or the last page of the address space, so that
    /// address 0 stays free for "none" and the last address has a successor.
    ///
    /// Choosing and mapping are one atomic step. The search takes logarithmic time in the number of
    /// areas, for each allowed range or, if there are none, for each gap between reserved ranges.
    /// It may also have to look at holes that are long enough but not aligned.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let range = space.map_anywhere(0x4000, 0, Access::ReadWrite)?;
    /// assert_eq!(space.lookup(range.start()).map(|area| area.range), Some(range));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order: [`RangeError::ZeroLength`](crate::RangeError::ZeroLength) (at 0, as there is
    /// no address yet), [`Error::UnalignedLength`] and [`Error::UnalignedBacking`] (multiples of
    /// [`alignment`](Self::alignment)), [`Error::BackingWraps`] (with the range as if it began at
    /// 0), [`Error::NoSpace`], then those of a source. After an error nothing is mapped, with the
    /// exception that [`map`](Self::map) names.
    #[doc(alias = "IOMMU_IOAS_MAP")]
    #[doc(alias = "alloc_iova")]
    pub fn map_anywhere(&self, len: u64, backing: u64, access: Access) -> Result<IovaRange, Error> {
        self.retired.drop_all();
        let shape = IovaRange::from_len(Iova::MIN, len)?;
        let (area, domains) = self.areas.update(|edit| {
            let rules = edit.rules();
            let granule = rules.alignment(self.page);
            if !shape.is_aligned(granule) {
                return Err(Error::UnalignedLength { len, granule });
            }
            let mapping = Mapping {
                range: shape,
                backing,
                access,
            };
            check_mapping(&mapping, granule)?;
            let alignment = alignment(len, backing).max(granule);
            let range = allocatable(rules, granule)
                .into_iter()
                .find_map(|window| edit.first_fit(window, len, alignment))
                .ok_or(Error::NoSpace { len, alignment })?;
            let domains = rules.attachments().clone();
            let mapping = Mapping {
                range,
                backing,
                access,
            };
            let area = Arc::new(Area::new(mapping, self.page, self.ordering));
            area.born_with(edit.version());
            edit.insert(range, Arc::clone(&area))
                .map(|()| (area, domains))
        })?;
        let range = area.range();
        self.fill(area, &domains)?;
        Ok(range)
    }

    /// Keeps `range`, which may be unaligned, from being mapped or allocated: a window for
    /// interrupts, or a hole of the platform. Marks, lookups, harvests and unmaps treat it as a
    /// hole.
    ///
    /// Reserved ranges may overlap each other. Takes time in proportion to their number.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.reserve(0xfee0_0000..0xfef0_0000)?; // interrupts
    /// assert!(space.map(0xfee0_0000..0xfee0_1000, 0, Access::ReadWrite).is_err());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::CannotReserve`] if `range` intersects an area, also one that is being mapped or
    /// unmapped; then if it intersects an allowed range.
    #[doc(alias = "iopt_reserve_iova")]
    pub fn reserve(&self, range: impl ToIovaRange) -> Result<(), Error> {
        let range = range.to_iova_range()?;
        self.retired.drop_all();
        self.areas.update(|edit| {
            if let Some(area) = edit.first_intersecting(range) {
                return Err(Error::CannotReserve {
                    range,
                    existing: area.range,
                });
            }
            if let Some(existing) = edit.rules().promised_in(range) {
                return Err(Error::CannotReserve { range, existing });
            }
            let rules = edit.rules().reserve(range)?;
            edit.set_rules(rules);
            Ok(())
        })
    }

    /// Undoes one [`reserve`](Self::reserve) of exactly `range`. Addresses that are also in other
    /// reserved ranges stay reserved.
    #[doc(alias = "iopt_remove_reserved_iova")]
    ///
    /// # Errors
    /// [`Error::NotReserved`] if there is no such reservation.
    pub fn release_reserved(&self, range: impl ToIovaRange) -> Result<(), Error> {
        let range = range.to_iova_range()?;
        self.retired.drop_all();
        self.areas.update(|edit| {
            let rules = edit.rules().release(range)?;
            edit.set_rules(rules);
            Ok(())
        })
    }

    /// Replaces the ranges in which [`map_anywhere`](Self::map_anywhere) may allocate, all at once.
    /// Ranges that touch are joined. An empty list means no restriction. This restricts only
    /// allocation: areas in other places stay, and [`map`](Self::map) ignores it.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.set_allowed(&[(1 << 30..2 << 30).to_iova_range()?])?;
    /// let range = space.map_anywhere(0x1000, 1 << 20, Access::ReadWrite)?;
    /// assert_eq!(range, (1 << 30..(1 << 30) + 0x1000).to_iova_range()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::AllowedTwice`] if two of `ranges` overlap, then [`Error::CannotAllow`] if one
    /// intersects a reserved range. Then the old ranges stay.
    #[doc(alias = "IOMMU_IOAS_ALLOW_IOVAS")]
    pub fn set_allowed(&self, ranges: &[IovaRange]) -> Result<(), Error> {
        self.retired.drop_all();
        self.areas.update(|edit| {
            let rules = edit.rules().allow(ranges)?;
            edit.set_rules(rules);
            Ok(())
        })
    }

    /// Which ranges are mapped, free, reserved and allowed, all at one moment. Lock-free.
    #[doc(alias = "IOMMU_IOAS_IOVA_RANGES")]
    pub fn ranges(&self) -> SpaceRanges {
        let snapshot = self.areas.snapshot();
        let rules = snapshot.rules();
        let mappings: Vec<Mapping> = snapshot
            .iter(IovaRange::ALL)
            .map(|entry| entry.mapping())
            .collect();
        let unreserved = without(IovaRange::ALL, rules.blocked().iter().copied());
        let mut free = Vec::new();
        for window in unreserved {
            let taken = snapshot.iter(window).map(|entry| entry.range);
            free.extend(without(window, taken));
        }
        SpaceRanges {
            mappings,
            holes: free,
            reserved: rules.blocked().to_vec(),
            allowed: rules.allowed().to_vec(),
        }
    }
}

/// The ranges in which allocation may look, without the first and the last page.
fn allocatable(rules: &Rules, page: Granule) -> Vec<IovaRange> {
    let first = Iova::new(page.bytes());
    let last = Iova::new(u64::MAX - page.bytes());
    match IovaRange::new(first, last) {
        Ok(bounds) => rules.windows(bounds),
        // Two pages are the whole address space, so nothing is left.
        Err(_) => Vec::new(),
    }
}

/// The alignment that suits a range of `len` bytes whose memory begins at `backing`, up to the
/// largest alignment.
fn alignment(len: u64, backing: u64) -> Granule {
    // The smallest power of two that is not below `len`, as its logarithm: 0 to 64.
    let len_lg2 = u64::BITS - (len - 1).leading_zeros();
    let mut lg2 = len_lg2.min(u32::from(MAX_ALIGNMENT.lg2()));
    if backing != 0 {
        lg2 = lg2.min(backing.trailing_zeros());
    }
    Granule::from_lg2(lg2 as u8).unwrap_or(MAX_ALIGNMENT)
}
