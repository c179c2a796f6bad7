//! What is mapped, as far as the recorder knows: the areas, and the leaves of each.

use std::collections::BTreeMap;

use crate::memory::Memory;

/// First byte and length.
pub(crate) type Run = (u64, u64);

/// One mapping of the kernel.
pub(crate) struct Area {
    pub(crate) length: u64,
    /// First addresses and sizes, ascending.
    pub(crate) leaves: Vec<Run>,
    /// What it maps. Kept for as long as it is mapped.
    pub(crate) _memory: Memory,
}

/// The mappings by their first addresses.
#[derive(Default)]
pub(crate) struct Areas(pub(crate) BTreeMap<u64, Area>);

impl Areas {
    /// The area that holds `iova`, and its first address.
    pub(crate) fn at(&self, iova: u64) -> Option<(u64, &Area)> {
        let (start, area) = self.0.range(..=iova).next_back()?;
        (iova - start < area.length).then_some((*start, area))
    }

    /// The leaf that maps `iova`.
    pub(crate) fn leaf(&self, iova: u64) -> Option<Run> {
        let (_, area) = self.at(iova)?;
        let after = area.leaves.partition_point(|(start, _)| *start <= iova);
        area.leaves.get(after.checked_sub(1)?).copied()
    }

    /// The first address from `iova` up to `end` that is not mapped, and how many areas lie below.
    pub(crate) fn walk(&self, iova: u64, end: u64) -> (u64, u64) {
        let (mut at, mut areas) = (iova, 0);
        while let Some((start, area)) = self.at(at).filter(|_| at < end) {
            at = start + area.length;
            areas += 1;
        }
        (at.min(end), areas)
    }

    /// What an unmap of the kernel takes: whole areas in ascending order, until one extends past
    /// the range.
    pub(crate) fn unmap(&mut self, iova: u64, last: u64) {
        let inside: Vec<(u64, u64)> = {
            let below = self.0.range(..iova).next_back();
            let below = below.filter(|(start, area)| *start + (area.length - 1) >= iova);
            let touched = below.into_iter().chain(self.0.range(iova..=last));
            touched
                .map(|(start, area)| (*start, *start + (area.length - 1)))
                .collect()
        };
        for (start, end) in inside {
            if start < iova || end > last {
                break;
            }
            self.0.remove(&start);
        }
    }
}
