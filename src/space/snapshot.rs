//! The areas of one moment, for readers.

use super::rules::Rules;
use super::{AddressSpace, Area};
use crate::area::{Contiguous, Iter, Snapshot};
use crate::source::Mapping;
use crate::units::{DomainId, Granule, Iova, IovaRange};

/// The areas, and the domains, of one moment: see [`AddressSpace::snapshot`]. What changes later does not show.
///
/// Memory that is let go meanwhile is kept while the snapshot lives: keep it short. A snapshot that
/// goes to [`std::mem::forget`], or is leaked in another way, lives for ever: from then on nothing
/// that any space of the process lets go comes back, neither the nodes of its tree nor areas that
/// were unmapped, whose marks and sources stay too. Nothing waits for it, and memory grows with
/// each change.
pub struct SpaceSnapshot<'s> {
    areas: Snapshot<'s, Area, 16, Rules>,
    page: Granule,
}

impl AddressSpace {
    /// The areas and domains of this moment. Lock-free, never waits, and costs no copy, however many areas there are.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let areas = space.snapshot();
    /// space.unmap_discarding(0..1 << 20)?;
    /// assert_eq!(areas.len(), 1); // of the moment before
    /// # Ok(())
    /// # }
    /// ```
    pub fn snapshot(&self) -> SpaceSnapshot<'_> {
        SpaceSnapshot {
            areas: self.areas.snapshot(),
            page: self.page(),
        }
    }
}

impl SpaceSnapshot<'_> {
    /// The areas that touch `range`, in ascending order.
    pub fn mappings(&self, range: IovaRange) -> impl Iterator<Item = Mapping> + '_ {
        self.areas.iter(range).map(|entry| entry.area.mapping)
    }

    /// What is mapped at `iova`.
    pub fn lookup(&self, iova: Iova) -> Option<Mapping> {
        self.areas.lookup(iova).map(|entry| entry.area.mapping)
    }

    /// The number of areas.
    pub fn len(&self) -> usize {
        self.areas.len()
    }

    /// Whether there are no areas.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The domains that are attached, in the order of their coming.
    pub fn domains(&self) -> impl Iterator<Item = DomainId> + '_ {
        self.rules().attachments().iter().map(|domain| domain.id)
    }

    /// What areas are made of: see [`AddressSpace::alignment`].
    pub fn alignment(&self) -> Granule {
        self.rules().alignment(self.page)
    }

    /// How old the snapshot is: the number of changes of areas, domains and rules that were published since. 0 says that
    /// it is still current.
    pub fn age(&self) -> u64 {
        self.areas.age()
    }

    /// How many changes were published by now, over the life of the space.
    pub(crate) fn newest(&self) -> u64 {
        self.areas.newest()
    }

    /// The areas that cover `range`, up to the first hole.
    pub(crate) fn contiguous(&self, range: IovaRange) -> Contiguous<'_, Area> {
        self.areas.contiguous(range)
    }

    /// The areas that touch `range`, in ascending order.
    pub(crate) fn areas_in(&self, range: IovaRange) -> Iter<'_, Area> {
        self.areas.iter(range)
    }

    pub(crate) fn rules(&self) -> &Rules {
        self.areas.rules()
    }
}

impl std::fmt::Debug for SpaceSnapshot<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpaceSnapshot")
            .field("areas", &self.len())
            .field("domains", &self.rules().attachments())
            .finish_non_exhaustive()
    }
}
