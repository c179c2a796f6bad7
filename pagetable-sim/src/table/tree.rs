//! The tree itself: walks to a leaf, visits of all leaves of a range, and the checks of requests.

use std::ops::ControlFlow;

use crossbeam_epoch::Guard;
use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{Iova, IovaRange};

use super::entries::{any_dirty, slots};
use super::leaf::{Found, Leaf};
use super::page::{TableRef, child};
use crate::error::Error;
use crate::fmt::{AtomicIopte, Format, granule};

/// An IO page table of the format `F`: hardware walks it and sets D while software maps, unmaps and
/// harvests. All calls are lock-free.
///
/// A call that maps, unmaps, protects or merges a range owns the range until it returns: no two
/// such calls overlap. Splits, calls on disjoint ranges, walks and harvests may run at any time. Of
/// two `map`s that overlap all the same, at least one is refused; if other calls overlap, leaves
/// may vanish. Memory stays safe.
///
/// ```
/// use dirtymap::{Access, Granule, Iova, IovaRange};
/// use pagetable_sim::{Table, X86_64};
///
/// let table = Table::<X86_64>::new();
/// let range = IovaRange::from_len(Iova::new(0x4000_0000), 2 << 20)?;
/// table.map(range, 0, Access::ReadWrite, Granule::M2)?;
/// table.set_dirty(Iova::new(0x4000_5000)); // as the walk of a write
/// table.split_at(Iova::new(0x4000_1000), |_, _| ())?; // each part is dirty, as the leaf was
/// assert!(table.translate(Iova::new(0x4000_0000)).unwrap().dirty);
///
/// let mut dirty = 0;
/// table.unmap(range, |leaf, _, was_dirty| {
///     dirty += if was_dirty { leaf.len() } else { 0 };
/// })?;
/// assert_eq!(dirty, 2 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Table<F: Format> {
    pub(super) root: TableRef<F>,
    /// Harvests skip subtrees that no device walked through.
    pub(super) skip_quiet: bool,
    /// Subtrees that they skipped.
    pub(super) skipped: AtomicU64,
}

impl<F: Format> Table<F> {
    /// A table that maps nothing.
    pub fn new() -> Self {
        const { assert!(F::WIDTH <= 64 && F::LEAF_LEVELS <= F::LEVELS) };
        const { assert!(F::LEAF_SIZES.contains(F::PAGE)) };
        Table {
            root: TableRef::new(F::LEVELS - 1, false),
            skip_quiet: false,
            skipped: AtomicU64::new(0),
        }
    }

    /// As [`new`](Self::new), but each table of the tree is an allocation of its own, and tables of
    /// neighbouring addresses do not lie side by side. Benchmarks show how much longer harvests
    /// take.
    pub fn scattered() -> Self {
        Table {
            root: TableRef::new(F::LEVELS - 1, true),
            ..Table::new()
        }
    }

    /// A table whose harvests skip subtrees, if the format has A above its leaves. A flush of
    /// pointers to its tables calls [`flush_begins`](Self::flush_begins) and
    /// [`flush_ends`](Self::flush_ends).
    pub(crate) fn skipping() -> Self {
        Table {
            skip_quiet: true,
            ..Table::new()
        }
    }

    /// The leaf that maps `iova`, if there is one. Changes nothing, as the walk of a read.
    pub fn translate(&self, iova: Iova) -> Option<Leaf> {
        let guard = crossbeam_epoch::pin();
        let found = self.walk(iova, &guard)?;
        Some(Leaf {
            dirty: any_dirty::<F>(found.group::<F>(), found.level),
            ..found.leaf::<F>()
        })
    }

    /// Whether the format can translate `iova`: no bits above its width, or only copies of the sign
    /// where it has one.
    #[inline]
    pub fn reaches(&self, iova: Iova) -> bool {
        if F::SIGN_EXTENDED {
            let above = iova.get().cast_signed() >> (F::WIDTH - 1);
            above == 0 || above == -1
        } else {
            iova.get().checked_shr(F::WIDTH).unwrap_or(0) == 0
        }
    }

    /// The addresses that the table can translate, ascending: one range from 0 on, or where
    /// addresses are sign-extended the lowest and the highest.
    pub(super) fn reach() -> impl Iterator<Item = IovaRange> {
        let size = granule(F::WIDTH - u32::from(F::SIGN_EXTENDED));
        let highest = F::SIGN_EXTENDED.then(|| IovaRange::granule_at(Iova::MAX, size));
        let lowest = match F::WIDTH {
            64 => IovaRange::ALL,
            _ => IovaRange::granule_at(Iova::MIN, size),
        };
        std::iter::once(lowest).chain(highest)
    }

    /// Refuses ranges that no table of the format can map: width first, then alignment.
    pub(super) fn check_range(range: IovaRange) -> Result<(), Error> {
        if !Self::reach().any(|reach| reach.covers(range)) {
            return Err(Error::TooWide {
                range,
                width: F::WIDTH,
                format: F::NAME,
            });
        }
        if !range.is_aligned(F::PAGE) {
            return Err(Error::Unaligned {
                range,
                page: F::PAGE,
            });
        }
        Ok(())
    }

    /// Walks to the leaf that maps `iova`.
    #[inline]
    pub(super) fn walk<'g>(&'g self, iova: Iova, guard: &'g Guard) -> Option<Found<'g>> {
        if !self.reaches(iova) {
            return None;
        }
        let mut page: &[AtomicIopte] = &self.root;
        for level in (0..F::LEVELS).rev() {
            let index = F::index(iova.get(), level);
            // Acquire: pairs with the Release that installed the entry, in `map`; publishes the
            // table that it leads to, or the bytes that the mapper wrote into the memory of a leaf.
            let entry = page[index].load(Ordering::Acquire);
            if !F::is_present(entry) {
                return None;
            }
            if F::is_leaf(entry, level) {
                let span = IovaRange::granule_at(iova, F::size(level));
                return Some(Found {
                    page,
                    level,
                    index,
                    entry,
                    span,
                });
            }
            page = child::<F>(entry, guard);
        }
        None
    }

    /// Visits every entry that holds a leaf, or a share of one, and that `range`, which the table
    /// can map, touches, in order.
    pub(super) fn visit<'g, B>(
        &'g self,
        range: IovaRange,
        guard: &'g Guard,
        visit: &mut impl FnMut(Found<'g>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        visit_leaves::<F, B>(&self.root, F::LEVELS - 1, range, guard, visit)
    }

    /// Refuses a range with a leaf that sticks out of it.
    pub(super) fn check_whole_leaves(&self, range: IovaRange) -> Result<(), Error> {
        // Leaves are disjoint, so only those at the borders can stick out.
        for border in [range.start(), range.last()] {
            if let Some(Leaf { range: leaf, .. }) = self.translate(border)
                && !range.covers(leaf)
            {
                return Err(Error::PartOfLeaf { range, leaf });
            }
        }
        Ok(())
    }
}

impl<F: Format> Default for Table<F> {
    fn default() -> Self {
        Table::new()
    }
}

impl<F: Format> std::fmt::Debug for Table<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("format", &F::NAME)
            .finish_non_exhaustive()
    }
}

/// See [`Table::visit`]; in the subtree of `page`, a table of `level`.
fn visit_leaves<'g, F: Format, B>(
    page: &'g [AtomicIopte],
    level: u32,
    range: IovaRange,
    guard: &'g Guard,
    visit: &mut impl FnMut(Found<'g>) -> ControlFlow<B>,
) -> ControlFlow<B> {
    for (index, slot) in slots::<F>(page, level, range) {
        // Acquire: pairs with the Release in `child_or_new`; publishes the table.
        let entry = slot.entry.load(Ordering::Acquire);
        if !F::is_present(entry) {
            continue;
        }
        if F::is_leaf(entry, level) {
            visit(Found {
                page,
                level,
                index,
                entry,
                span: slot.span,
            })?;
        } else {
            visit_leaves::<F, B>(child::<F>(entry, guard), level - 1, slot.part, guard, visit)?;
        }
    }
    ControlFlow::Continue(())
}
