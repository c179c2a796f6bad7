//! The device, its extents and their pages.

use dirtymap::exchange::RunTable;
use dirtymap::{Granule, Iova, IovaRange};

use crate::delta::{Delta, Run};
use crate::error::Error;
use crate::words::{MAX_EXTENTS, MAX_PAGES};

/// The device that a store is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its identity, for instance a UUID. A store that belongs to another device is refused.
    pub id: u128,
    /// Its length in bytes.
    pub len: u64,
}

/// How the device is divided. The unit of the write-intent log is the extent, that of the answer
/// the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) len: u64,
    pub(crate) extent: Granule,
    pub(crate) page: Granule,
}

impl Geometry {
    pub(crate) fn new(len: u64, extent: Granule, page: Granule) -> Result<Self, Error> {
        let geometry = Geometry { len, extent, page };
        if extent < page || (extent.lg2() - page.lg2()) as u32 > MAX_PAGES.ilog2() {
            return Err(Error::Granules {
                extent: extent.bytes(),
                page: page.bytes(),
                limit: MAX_PAGES,
            });
        }
        let extents = geometry.extents();
        if len == 0 || extents > MAX_EXTENTS {
            return Err(Error::DeviceLength {
                len,
                extents,
                limit: MAX_EXTENTS,
            });
        }
        Ok(geometry)
    }

    pub(crate) fn extents(&self) -> u64 {
        self.len.div_ceil(self.extent.bytes())
    }

    /// What becomes dirty when the device grows to `len` bytes: the new part, in whole extents.
    /// `None` if it does not grow, or grows too much.
    pub(crate) fn grown(&self, len: u64) -> Option<Run> {
        if len <= self.len {
            return None;
        }
        let grown = Geometry::new(len, self.extent, self.page).ok()?;
        let first = self.len / self.extent.bytes();
        Some(Run {
            first,
            count: grown.extents() - first,
            mask: u32::MAX,
        })
    }

    /// The pages of `extent` that `range`, which touches it, touches.
    pub(crate) fn mask(&self, extent: u64, range: IovaRange) -> u32 {
        let shift = self.extent.lg2();
        let first = range.start().get().max(extent << shift);
        let last = range.last().get().min(extent << shift | self.extent.mask());
        self.pages(first, last)
    }

    /// The pages that `range` touches in its first extent.
    #[inline]
    pub(crate) fn first_pages(&self, range: IovaRange) -> u32 {
        let (first, last) = (range.start().get(), range.last().get());
        match (first ^ last) >> self.extent.lg2() {
            0 => self.pages(first, last),
            // It goes on to the end of the first extent.
            _ => self.pages(first, u64::MAX),
        }
    }

    /// The pages from that of byte `first` of an extent to that of byte `last`.
    #[inline]
    fn pages(&self, first: u64, last: u64) -> u32 {
        let page = |byte: u64| (byte & self.extent.mask()) >> self.page.lg2();
        let up_to_last = u32::MAX >> (31 - page(last));
        up_to_last & u32::MAX << page(first)
    }

    /// All of the device.
    pub(crate) fn whole(&self) -> RunTable {
        IovaRange::new(Iova::MIN, Iova::new(self.len - 1))
            .into_iter()
            .collect()
    }

    /// The dirty bytes of `delta`, inside the device.
    pub(crate) fn runs(&self, delta: &Delta) -> RunTable {
        let pages = 1u64 << (self.extent.lg2() - self.page.lg2());
        let all = u32::MAX >> (32 - pages);
        let range = |first: u64, last: u64| {
            let last = last.min(self.len - 1);
            IovaRange::new(Iova::new(first), Iova::new(last)).ok()
        };
        let mut runs: Vec<IovaRange> = Vec::new();
        let mut push = |run: IovaRange| match runs.last_mut() {
            Some(last) if last.last().checked_add(1) == Some(run.start()) => {
                if let Ok(both) = IovaRange::new(last.start(), run.last()) {
                    *last = both;
                }
            }
            _ => runs.push(run),
        };
        for run in delta.runs() {
            let mask = run.mask & all;
            let shift = self.extent.lg2();
            if mask == all {
                let last = ((run.first + run.count - 1) << shift) | self.extent.mask();
                range(run.first << shift, last)
                    .into_iter()
                    .for_each(&mut push);
                continue;
            }
            for extent in run.first..run.first + run.count {
                let mut left = mask;
                while left != 0 {
                    let first = left.trailing_zeros();
                    let count = (left >> first).trailing_ones();
                    let page =
                        |number: u32| (extent << shift) + (u64::from(number) << self.page.lg2());
                    let run = range(page(first), page(first + count) - 1);
                    run.into_iter().for_each(&mut push);
                    left &= !(((1u64 << count) - 1) << first) as u32;
                }
            }
        }
        runs.into_iter().collect()
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers of tests

    use std::collections::BTreeSet;

    use dirtymap::{Granule, Iova, IovaRange};

    use super::Geometry;
    use crate::delta::{Delta, Run};

    const GRANULES: [(u8, u8); 4] = [(12, 12), (16, 12), (17, 12), (13, 9)];

    /// A page is in the mask if the range touches it, and the runs are the pages of the mask.
    #[test]
    fn masks_and_runs_agree_with_a_look_at_each_page() {
        for (extent, page) in GRANULES {
            let [extent, page] = [extent, page].map(|lg2| Granule::from_lg2(lg2).unwrap());
            let len = 5 * extent.bytes() + page.bytes() / 2;
            let geometry = Geometry::new(len, extent, page).unwrap();
            assert_eq!(geometry.extents(), 6);
            let bytes = [0, 1, page.bytes() - 1, page.bytes(), extent.bytes() - 1];
            let borders = (0..6).flat_map(|at| bytes.map(|byte| at * extent.bytes() + byte));
            let borders: BTreeSet<u64> = borders.filter(|byte| *byte < len).collect();
            let borders = Vec::from_iter(borders);
            for (at, first) in borders.iter().enumerate() {
                for last in &borders[at..] {
                    check(&geometry, *first, *last);
                }
            }
        }
    }

    fn check(geometry: &Geometry, first: u64, last: u64) {
        let (extent, page) = (geometry.extent, geometry.page);
        let range = IovaRange::new(Iova::new(first), Iova::new(last)).unwrap();
        let mut delta = Delta::default();
        for number in first >> extent.lg2()..=last >> extent.lg2() {
            let mask = geometry.mask(number, range);
            for bit in 0..extent.bytes() / page.bytes() {
                let start = (number << extent.lg2()) + bit * page.bytes();
                let touched = start <= last && start + page.bytes() > first;
                assert_eq!(mask >> bit & 1 == 1, touched, "{range} {number} {bit}");
            }
            delta.add(Run {
                first: number,
                count: 1,
                mask,
            });
        }
        let first_mask = geometry.mask(first >> extent.lg2(), range);
        assert_eq!(geometry.first_pages(range), first_mask, "{range}");
        let runs = geometry.runs(&delta);
        let end = (last | page.mask()).min(geometry.len - 1);
        let expected = IovaRange::new(Iova::new(first & !page.mask()), Iova::new(end)).unwrap();
        assert_eq!(runs.runs(), [expected]);
    }

    #[test]
    fn what_is_new_is_dirty_in_whole_extents() {
        let geometry = Geometry::new(0x2_8000, Granule::from_lg2(16).unwrap(), Granule::K4);
        let geometry = geometry.unwrap();
        assert_eq!(geometry.grown(0x2_8000), None);
        let new = geometry.grown(0x4_0001).unwrap();
        assert_eq!((new.first, new.count), (2, 3));
    }

    #[test]
    fn devices_and_granules_out_of_bounds_are_refused() {
        let granule = |lg2| Granule::from_lg2(lg2).unwrap();
        for (len, extent, page) in [
            (0, 16, 12),
            (u64::MAX, 16, 12),
            (1, 11, 12),
            (1, 18, 12),
            (u64::MAX, 0, 0),
        ] {
            let refused = Geometry::new(len, granule(extent), granule(page));
            assert!(refused.is_err(), "{len} {extent} {page}");
        }
        assert!(Geometry::new(u64::MAX, granule(32), granule(27)).is_ok());
    }
}
