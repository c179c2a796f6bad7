//! Sets of leaf sizes.

use dirtymap::Granule;

/// A set of leaf sizes, each a power of two in bytes.
///
/// A [`Granule`] stands for all sizes up to it: `table.map(range, phys, access, Granule::M2)`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LeafSizes(u64);

impl LeafSizes {
    /// Every size.
    pub const ALL: LeafSizes = LeafSizes(u64::MAX);
    /// No size.
    pub const NONE: LeafSizes = LeafSizes(0);

    /// This one size.
    #[inline]
    pub const fn only(size: Granule) -> Self {
        LeafSizes(size.bytes())
    }

    /// Every size up to `largest`.
    #[inline]
    pub const fn up_to(largest: Granule) -> Self {
        LeafSizes(largest.mask() | largest.bytes())
    }

    /// The sizes that are in this set or in `other`.
    #[inline]
    pub const fn or(self, other: LeafSizes) -> Self {
        LeafSizes(self.0 | other.0)
    }

    /// The sizes that are in this set and in `other`.
    #[inline]
    pub const fn and(self, other: LeafSizes) -> Self {
        LeafSizes(self.0 & other.0)
    }

    /// The sizes of this set that are not in `other`.
    #[inline]
    pub const fn without(self, other: LeafSizes) -> Self {
        LeafSizes(self.0 & !other.0)
    }

    /// Whether `size` is in the set.
    #[inline]
    pub const fn contains(self, size: Granule) -> bool {
        self.0 & size.bytes() != 0
    }

    /// The largest size of the set.
    #[inline]
    pub const fn largest(self) -> Option<Granule> {
        match self.0.checked_ilog2() {
            Some(lg2) => Granule::from_lg2(lg2 as u8),
            None => None,
        }
    }

    /// The sizes of the set, ascending.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = Granule> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let lowest = Granule::from_lg2(rest.trailing_zeros() as u8)?;
            rest &= rest - 1;
            Some(lowest)
        })
    }
}

impl From<Granule> for LeafSizes {
    fn from(largest: Granule) -> Self {
        LeafSizes::up_to(largest)
    }
}

impl std::fmt::Debug for LeafSizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
