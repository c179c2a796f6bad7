//! The space and the bitmap of a lease, which are borrowed for its lifetime, or owned.

use std::ops::Deref;

use crate::bitmap::{BitmapView, SparseBitmap, UserBitmap};
use crate::space::AddressSpace;
use crate::sync::Arc;
use crate::units::{Granule, IovaRange};

/// A space that is borrowed or shared. A lease of a shared space is `'static`.
#[derive(Clone)]
pub(super) enum SpaceRef<'a> {
    Lent(&'a AddressSpace),
    Shared(Arc<AddressSpace>),
}

impl Deref for SpaceRef<'_> {
    type Target = AddressSpace;

    fn deref(&self) -> &AddressSpace {
        match self {
            SpaceRef::Lent(space) => space,
            SpaceRef::Shared(space) => space,
        }
    }
}

/// The bits of a lease.
pub(super) enum Held<'a> {
    Lent(BitmapView<'a>),
    Own(OwnBits),
}

/// A bitmap into which only one lease records.
pub(super) struct OwnBits {
    pub(super) bitmap: Arc<SparseBitmap>,
    /// The whole request: bit 0 is its first granule.
    pub(super) bound: IovaRange,
    pub(super) granule: Granule,
    /// The part of the request that the lease covers.
    pub(super) part: IovaRange,
}

impl Held<'_> {
    /// The bits, and the addresses that they stand for.
    pub(super) fn view(&self) -> BitmapView<'_> {
        match self {
            Held::Lent(view) => *view,
            Held::Own(own) => {
                UserBitmap::sparse(&own.bitmap).part_of(own.bound, own.granule, own.part)
            }
        }
    }

    /// Restricts the lease to `part`, which is made of whole granules.
    pub(super) fn narrow(&mut self, part: IovaRange) {
        match self {
            Held::Lent(view) => *view = view.narrowed(part),
            Held::Own(own) => own.part = part,
        }
    }
}
