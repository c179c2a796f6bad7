//! What a lease holds on to: its space and its bitmap, lent for as long as it lives, or its own.

use std::ops::Deref;

use crate::bitmap::{BitmapView, SparseBitmap, UserBitmap};
use crate::space::AddressSpace;
use crate::sync::Arc;
use crate::units::{Granule, IovaRange};

/// A space that is lent, or shared: a lease of a shared one is `'static`.
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

/// A bitmap that one lease alone records in.
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

    /// Gives up what lies outside of `part`, which consists of whole granules of the view.
    pub(super) fn narrow(&mut self, part: IovaRange) {
        match self {
            Held::Lent(view) => *view = view.narrowed(part),
            Held::Own(own) => own.part = part,
        }
    }
}
