//! The IO page table: a tree that hardware walks and writes while software maps, unmaps and harvests. Nobody waits for
//! anybody.
//!
//! ```text
//!  root (level 3) --> table (level 2) --> table (level 1) --> table (level 0) --> page
//!                           |                   |                   |
//!                        1 GiB leaf          2 MiB leaf          4 KiB leaf        each leaf carries D
//! ```
//!
//! * **Tables** are installed by compare-exchange into an absent entry, and stay until the whole `Table` is dropped.
//!   Two calls take one away: `map` puts a large leaf where a table without leaves was, `merge` one where a table of
//!   parts was. That table is retired. Its memory is freed when the epoch has passed, so that a walker that is inside may
//!   finish, **and** no device caches a pointer to it any more: pointers are counted, so a missing invalidation makes
//!   devices go by a retired table, as on real hardware, but never by freed memory.
//! * **Leaves** are installed by compare-exchange into an absent entry, removed by compare-exchange, and cleaned by
//!   compare-exchange. Hardware sets D by a compare-exchange that fails once the leaf is gone, so a removed leaf tells the
//!   last word about D.
//! * **A group** of entries that make up one leaf comes and goes entry by entry. Each entry describes the whole leaf, so a
//!   walk that hits one of them sees the leaf or nothing, never another leaf. What is said of D is the OR over all of
//!   them, and of a removed leaf the OR of what each said when it went.
//! * **Ownership.** Whoever maps, unmaps, protects or merges a range owns it for the time of the call: no two such calls
//!   overlap (the address space sees to that). Calls on disjoint ranges, walks and scans may run at any time. If
//!   two `map`s overlap all the same, one of them at least is refused and takes back what it installed; other calls that
//!   overlap end in one of their possible results, or in leaves that vanish. Memory stays safe.

mod dirty;
mod map;
mod merge;
mod page;
mod protect;
mod scan;
mod skip;
mod slab;
mod split;
mod unmap;
mod walk;

pub(crate) use page::TableRef;
pub(crate) use walk::Walk;

use std::ops::ControlFlow;

use crossbeam_epoch::Guard;
use dirtymap::sync::{AtomicU64, Ordering, Step, performs};
use dirtymap::{Access, Granule, Iova, IovaRange};

use crate::error::Error;
use crate::fmt::{AtomicIopte, Format, Iopte, granule};
use page::{Node, held_by};

/// An IO page table of the format `F`: hardware walks it and sets D while software maps, unmaps and harvests, and
/// nobody waits for anybody.
///
/// Whoever maps, unmaps, protects or merges a range owns it for the time of the call: no two such calls overlap. Splits,
/// calls on disjoint ranges, walks and harvests may run at any time. Of two `map`s that overlap all the same, one at least
/// is refused; if other calls overlap, leaves may vanish. Memory stays safe.
pub struct Table<F: Format> {
    root: TableRef<F>,
    /// Harvests skip what no device walked through.
    skip_quiet: bool,
    /// Subtrees that they skipped.
    skipped: AtomicU64,
}

/// What one leaf says about the addresses it maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The addresses that the leaf translates: all of it, not only those asked for.
    pub range: IovaRange,
    /// The physical address of the first of them.
    pub phys: u64,
    /// What devices may do.
    pub access: Access,
    /// Whether D is set: in any of its entries for [`Table::translate`], in the one that the walk went through for
    /// [`Table::set_dirty`].
    pub dirty: bool,
}

/// A leaf that a walk came to.
#[derive(Clone, Copy)]
struct Found<'g> {
    /// The entries of the table that the leaf is in.
    page: &'g [AtomicIopte],
    level: u32,
    /// Which entry the walk went through.
    index: usize,
    /// What it said.
    entry: Iopte,
    /// The addresses that this entry covers.
    span: IovaRange,
}

impl<'g> Found<'g> {
    fn slot(&self) -> &'g AtomicIopte {
        &self.page[self.index]
    }

    fn size<F: Format>(&self) -> Granule {
        F::leaf_size(self.entry, self.level)
    }

    /// All addresses of the leaf.
    fn range<F: Format>(&self) -> IovaRange {
        IovaRange::granule_at(self.span.start(), self.size::<F>())
    }

    /// All entries of the leaf.
    fn group<F: Format>(&self) -> &'g [AtomicIopte] {
        let entries = 1 << F::group_lg2(self.entry, self.level);
        let first = self.index & !(entries - 1);
        &self.page[first..first + entries]
    }

    fn leaf<F: Format>(&self) -> Leaf {
        Leaf {
            range: self.range::<F>(),
            phys: F::output(self.entry),
            access: F::access(self.entry),
            dirty: F::is_dirty(self.entry),
        }
    }
}

/// One entry of a table, and what a request wants of it.
struct Slot<'g> {
    entry: &'g AtomicIopte,
    /// All addresses that the entry covers: for a group, its share of the leaf.
    span: IovaRange,
    /// Those of them that the request covers.
    part: IovaRange,
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

    /// As [`new`](Self::new), but each table of the tree is an allocation of its own, wherever the allocator puts it, and tables of
    /// neighbouring addresses do not lie side by side. Harvests take longer for it: this shows how much.
    pub fn scattered() -> Self {
        Table {
            root: TableRef::new(F::LEVELS - 1, true),
            ..Table::new()
        }
    }

    /// A table whose harvests skip subtrees, if the format has A above its leaves; whoever harvests it flushes by
    /// [`flush_begins`](Self::flush_begins) and [`flush_ends`](Self::flush_ends).
    pub(crate) fn skipping() -> Self {
        Table {
            skip_quiet: true,
            ..Table::new()
        }
    }

    /// The leaf that maps `iova`, if there is one. What a device's read walks through; changes nothing.
    pub fn translate(&self, iova: Iova) -> Option<Leaf> {
        let guard = crossbeam_epoch::pin();
        let found = self.walk(iova, &guard)?;
        Some(Leaf {
            dirty: any_dirty::<F>(found.group::<F>(), found.level),
            ..found.leaf::<F>()
        })
    }

    /// Whether the format can translate `iova`: no bits above its width, or only copies of the sign where it has one.
    #[inline]
    pub fn reaches(&self, iova: Iova) -> bool {
        if F::SIGN_EXTENDED {
            let above = iova.get().cast_signed() >> (F::WIDTH - 1);
            above == 0 || above == -1
        } else {
            iova.get().checked_shr(F::WIDTH).unwrap_or(0) == 0
        }
    }

    /// The addresses that the table can translate, ascending: one range from 0 on, or where addresses are sign-extended
    /// the lowest and the highest.
    fn reach() -> impl Iterator<Item = IovaRange> {
        let size = granule(F::WIDTH - u32::from(F::SIGN_EXTENDED));
        let highest = F::SIGN_EXTENDED.then(|| IovaRange::granule_at(Iova::MAX, size));
        let lowest = match F::WIDTH {
            64 => IovaRange::ALL,
            _ => IovaRange::granule_at(Iova::MIN, size),
        };
        std::iter::once(lowest).chain(highest)
    }

    /// Refuses ranges that the table cannot map, whatever is in it: width first, then alignment.
    fn check_range(range: IovaRange) -> Result<(), Error> {
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
    fn walk<'g>(&'g self, iova: Iova, guard: &'g Guard) -> Option<Found<'g>> {
        if !self.reaches(iova) {
            return None;
        }
        let mut page: &[AtomicIopte] = &self.root;
        for level in (0..F::LEVELS).rev() {
            let index = F::index(iova.get(), level);
            // Acquire: pairs with the Release that installed the entry, in `map`; publishes the table it leads to, or
            // what the mapper wrote into the memory behind a leaf.
            let entry = page[index].load(Ordering::Acquire);
            if !F::is_present(entry) {
                return None;
            }
            if is_leaf::<F>(entry, level) {
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

    /// Visits every entry that holds a leaf, or a share of one, and that `range`, which the table can map, touches, in
    /// order.
    fn visit<'g, B>(
        &'g self,
        range: IovaRange,
        guard: &'g Guard,
        visit: &mut impl FnMut(Found<'g>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        visit_leaves::<F, B>(&self.root, F::LEVELS - 1, range, guard, visit)
    }

    /// Refuses a range with a leaf that sticks out of it.
    fn check_whole_leaves(&self, range: IovaRange) -> Result<(), Error> {
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

/// Whether a present entry of a table of `level` is a leaf. Below the lowest tables there are only pages.
#[inline]
fn is_leaf<F: Format>(entry: Iopte, level: u32) -> bool {
    level == 0 || F::is_leaf(entry, level)
}

/// Whether any of the entries of a leaf says that it was written. Entries that changed into something else meanwhile
/// count if they say so of leaves of theirs.
fn any_dirty<F: Format>(group: &[AtomicIopte], level: u32) -> bool {
    group.iter().any(|slot| {
        // Acquire: as the load of a walk.
        let entry = slot.load(Ordering::Acquire);
        F::is_present(entry) && is_leaf::<F>(entry, level) && F::is_dirty(entry)
    })
}

/// The entries of `page`, a table of `level`, that `range` touches; the range lies inside what the table covers.
fn slots<F: Format>(
    page: &[AtomicIopte],
    level: u32,
    range: IovaRange,
) -> impl Iterator<Item = (usize, Slot<'_>)> {
    let first = F::index(range.start().get(), level);
    let last = F::index(range.last().get(), level);
    let base = range.start().granule_start(F::size(level)).get();
    page[first..=last]
        .iter()
        .enumerate()
        .filter_map(move |(nth, entry)| {
            let start = base + ((nth as u64) << F::size(level).lg2());
            let span = IovaRange::granule_at(Iova::new(start), F::size(level));
            let part = span.intersection(range)?;
            Some((first + nth, Slot { entry, span, part }))
        })
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
        if is_leaf::<F>(entry, level) {
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

/// The table that `entry` leads to; the entry is present, no leaf, and was loaded with Acquire under `guard`.
#[inline]
fn child<F: Format>(entry: Iopte, _guard: &Guard) -> &[AtomicIopte] {
    // SAFETY:
    // - an address of a table: entries that are present and no leaf are made by `entry_for` only; formats are sealed and
    //   keep leaves and tables apart, and it checked that the address came through whole.
    // - initialised and visible: the Acquire load of the entry pairs with the Release that installed it.
    // - alive as long as the guard: the entry is one holder of the table. It lets go when what it lies in is freed, which
    //   excludes walkers, or after it was made to lead elsewhere and deferred through the epoch, which the guard pins.
    unsafe { TableRef::<F>::entries_at(F::table_address(entry)) }
}

/// The entry, of a table of `level`, that leads to `table`.
fn entry_for<F: Format>(table: &TableRef<F>, level: u32) -> Iopte {
    let entry = F::table(table.address(), level);
    // Memory safety rests on it: `child` follows the address that the entry holds.
    assert_eq!(
        F::table_address(entry),
        table.address(),
        "a host address that fits an entry"
    );
    entry
}

/// Lets go of the table that `entry`, of the table `above` of `level`, led to, once nobody is inside: who came from above has
/// left. A device may hold it still.
///
/// # Safety
/// The entry was present and no leaf, it was the one way to the table and is gone, and nobody else retires it.
unsafe fn retire<F: Format>(above: Node<'_>, entry: Iopte, level: u32, guard: &Guard) {
    // SAFETY: no later walk finds the entry; its hold is taken once.
    let hold = unsafe { held_by::<F>(above, entry, level) };
    if !performs(Step::WaitForWalkers) {
        return hold.end_too_early();
    }
    // Given up when all who are pinned now have left.
    guard.defer(move || drop(hold));
}

/// Whether `now`, of a table of `level`, still leads to the table that `entry` led to: A may have been set meanwhile.
fn leads_to_same<F: Format>(now: Iopte, entry: Iopte, level: u32) -> bool {
    F::is_present(now)
        && !is_leaf::<F>(now, level)
        && F::table_address(now) == F::table_address(entry)
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests;
