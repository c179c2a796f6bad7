//! The areas of one moment, for readers.

use super::rules::Rules;
use super::{AddressSpace, Area};
use crate::area::{Contiguous, Iter, Snapshot};
use crate::source::Mapping;
use crate::units::{DomainId, Granule, Iova, IovaRange};

/// The areas and the domains of one moment: see [`AddressSpace::snapshot`]. Later changes are not
/// visible in it.
///
/// A live snapshot holds back memory that is released meanwhile, so keep it short. A snapshot that
/// is leaked, for example by [`std::mem::forget`], holds it back for ever: from then on nothing
/// that any space of the process releases is freed, neither nodes of its tree nor areas that were
/// unmapped, with their marks and sources. No call waits for it, but memory grows with each change.
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule};
/// # fn main() -> Result<(), dirtymap::Error> {
/// # let space = AddressSpace::tracked(Granule::K4);
/// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// let areas = space.snapshot();
/// assert!(areas.lookup(0x3000.into()).is_some());
/// space.map(1 << 20..2 << 20, 1 << 20, Access::ReadWrite)?;
/// assert_eq!((areas.len(), areas.age()), (1, 1)); // one change since
/// # Ok(())
/// # }
/// ```
#[doc(alias = "FlatView")]
pub struct SpaceSnapshot<'s> {
    areas: Snapshot<'s, Area, 16, Rules>,
    page: Granule,
}

impl AddressSpace {
    /// The areas and domains of this moment. Lock-free, never blocks, and copies nothing, however
    /// many areas there are.
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
        self.areas.iter(range).map(|entry| entry.mapping())
    }

    /// The mapping at `iova`.
    pub fn lookup(&self, iova: Iova) -> Option<Mapping> {
        self.areas.lookup(iova).map(|entry| entry.mapping())
    }

    /// The number of areas.
    pub fn len(&self) -> usize {
        self.areas.len()
    }

    /// Whether there are no areas.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The attached domains, in the order in which they were attached.
    pub fn domains(&self) -> impl Iterator<Item = DomainId> + '_ {
        self.rules().attachments().iter().map(|domain| domain.id)
    }

    /// The granule of areas: see [`AddressSpace::alignment`].
    pub fn alignment(&self) -> Granule {
        self.rules().alignment(self.page)
    }

    /// The age of the snapshot: the number of changes of areas, domains and rules that were
    /// published since. At 0 the snapshot is still current.
    pub fn age(&self) -> u64 {
        self.areas.age()
    }

    /// The number of changes that were published before the snapshot, over the life of the space.
    pub(crate) fn version(&self) -> u64 {
        self.areas.version()
    }

    /// The number of changes that were published by now, over the life of the space.
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
