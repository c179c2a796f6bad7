//! Sets of leaf sizes.

use dirtymap::Granule;

/// A set of leaf sizes, each a power of two in bytes.
///
/// A [`Granule`] stands for all sizes up to it: `table.map(range, phys, access, Granule::M2)`.
///
/// ```
/// use dirtymap::Granule;
/// use pagetable_sim::{Format, LeafSizes, VtdSs};
///
/// let without_large = LeafSizes::ALL.without(LeafSizes::only(Granule::G1));
/// let sizes = VtdSs::<4>::LEAF_SIZES.and(without_large);
/// assert_eq!(sizes.iter().collect::<Vec<_>>(), [Granule::K4, Granule::M2]);
/// ```
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

/// The sizes of the ranges that single entries cover.
pub(super) const fn one_size_a_level(page_lg2: u32, index_lg2: u32, levels: u32) -> LeafSizes {
    let mut sizes = LeafSizes::NONE;
    let mut level = 0;
    while level < levels {
        sizes = sizes.or(LeafSizes::only(granule(page_lg2 + level * index_lg2)));
        level += 1;
    }
    sizes
}

/// The granule of 2^`lg2` bytes, for logarithms that a format's constants keep below 64.
pub(crate) const fn granule(lg2: u32) -> Granule {
    match Granule::from_lg2(if lg2 < 64 { lg2 as u8 } else { 63 }) {
        Some(granule) => granule,
        None => Granule::K4,
    }
}
