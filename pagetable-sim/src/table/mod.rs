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
//!   The one exception: `map` may put a large leaf where a table without leaves was; that table is retired. Its memory
//!   is freed when the epoch has passed, so that a walker that is inside may finish, **and** no device caches a pointer
//!   to it any more: pointers are counted, so a missing invalidation makes devices go by a retired table, as on real
//!   hardware, but never by freed memory.
//! * **Leaves** are installed by compare-exchange into an absent entry, removed by compare-exchange, and cleaned by
//!   `fetch_and` or `fetch_or`, as the format says. Hardware sets D by a compare-exchange that fails once the leaf is gone, so a removed leaf tells the
//!   last word about D.
//! * **Ownership.** Whoever maps or unmaps a range owns it for the time of the call: no two such calls overlap (the
//!   address space sees to that). Calls on disjoint ranges, walks and scans may run at any time. Overlapping calls
//!   would end in one of their possible results, or in leaves that vanish; memory stays safe.

mod dirty;
mod map;
mod walk;

pub(crate) use walk::{TableRef, Walk};

use std::marker::PhantomData;
use std::ptr;

use crossbeam_epoch::Guard;
use dirtymap::sync::{AtomicU64, Ordering, fence};
use dirtymap::{Access, Iova, IovaRange};

use crate::error::Error;
use crate::fmt::{AtomicIopte, Format, Iopte, TABLE_LG2, granule};

/// The memory of one table, and how many hold it: the entry that leads to it, and each [`TableRef`]. Entries keep its
/// address without the low 12 bits.
#[repr(C, align(4096))]
struct TablePage([AtomicIopte; 1 << TABLE_LG2], AtomicU64);

impl TablePage {
    fn new() -> Box<Self> {
        Box::new(TablePage(
            std::array::from_fn(|_| AtomicIopte::absent()),
            AtomicU64::new(1),
        ))
    }
}

/// An IO page table of the format `F`: hardware walks it and sets D while software maps, unmaps and harvests, and
/// nobody waits for anybody.
///
/// Whoever maps or unmaps a range owns it for the time of the call: no two such calls overlap. Calls on disjoint
/// ranges, walks and harvests may run at any time. If calls do overlap, leaves may vanish; memory stays safe.
pub struct Table<F: Format> {
    root: Box<TablePage>,
    format: PhantomData<F>,
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
    /// Whether D is set.
    pub dirty: bool,
}

/// One entry of a table, and what a request wants of it.
struct Slot<'g> {
    entry: &'g AtomicIopte,
    /// All addresses that the entry covers.
    span: IovaRange,
    /// Those of them that the request covers.
    part: IovaRange,
}

impl<F: Format> Table<F> {
    /// A table that maps nothing.
    pub fn new() -> Self {
        const { assert!(F::INDEX_LG2 <= TABLE_LG2 && F::WIDTH < 64 && F::LEAF_LEVELS <= F::LEVELS) };
        Table {
            root: TablePage::new(),
            format: PhantomData,
        }
    }

    /// The leaf that maps `iova`, if there is one. What a device's read walks through; changes nothing.
    pub fn translate(&self, iova: Iova) -> Option<Leaf> {
        let guard = crossbeam_epoch::pin();
        let (_, entry, level) = self.walk(iova, &guard)?;
        Some(leaf_of::<F>(iova, entry, level))
    }

    /// Whether the format can translate `iova`: no bits above its width, or only copies of the sign where it has one.
    #[inline]
    pub fn reaches(&self, iova: Iova) -> bool {
        if F::SIGN_EXTENDED {
            let above = iova.get().cast_signed() >> (F::WIDTH - 1);
            above == 0 || above == -1
        } else {
            iova.get() >> F::WIDTH == 0
        }
    }

    /// The addresses that the table can translate, ascending: one range from 0 on, or where addresses are sign-extended
    /// the lowest and the highest.
    fn reach() -> impl Iterator<Item = IovaRange> {
        let size = granule(F::WIDTH - u32::from(F::SIGN_EXTENDED));
        let highest = F::SIGN_EXTENDED.then(|| IovaRange::granule_at(Iova::MAX, size));
        std::iter::once(IovaRange::granule_at(Iova::MIN, size)).chain(highest)
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

    /// Walks to the leaf that maps `iova`: its entry, the value seen there, and the level of the table it is in.
    #[inline]
    fn walk<'g>(&'g self, iova: Iova, guard: &'g Guard) -> Option<(&'g AtomicIopte, Iopte, u32)> {
        if !self.reaches(iova) {
            return None;
        }
        let mut page = &*self.root;
        for level in (0..F::LEVELS).rev() {
            let slot = &page.0[F::index(iova.get(), level)];
            // Acquire: pairs with the Release that installed the entry, in `map`; publishes the table it leads to, or
            // what the mapper wrote into the memory behind a leaf.
            let entry = slot.load(Ordering::Acquire);
            if !F::is_present(entry) {
                return None;
            }
            if is_leaf::<F>(entry, level) {
                return Some((slot, entry, level));
            }
            page = child::<F>(entry, guard);
        }
        None
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

impl<F: Format> Drop for Table<F> {
    fn drop(&mut self) {
        free_children::<F>(&self.root, F::LEVELS - 1);
    }
}

/// Whether a present entry of a table of `level` is a leaf. Below the lowest tables there are only pages.
#[inline]
fn is_leaf<F: Format>(entry: Iopte, level: u32) -> bool {
    level == 0 || F::is_leaf(entry, level)
}

/// The leaf that maps `iova` by `entry` in a table of `level`.
#[inline]
fn leaf_of<F: Format>(iova: Iova, entry: Iopte, level: u32) -> Leaf {
    Leaf {
        range: IovaRange::granule_at(iova, F::size(level)),
        phys: F::output(entry),
        access: F::access(entry),
        dirty: F::is_dirty(entry),
    }
}

/// The entries of `page`, a table of `level`, that `range` touches; the range lies inside what the table covers.
fn slots<F: Format>(
    page: &TablePage,
    level: u32,
    range: IovaRange,
) -> impl Iterator<Item = Slot<'_>> {
    let first = F::index(range.start().get(), level);
    let last = F::index(range.last().get(), level);
    let base = range.start().granule_start(F::size(level)).get();
    page.0[first..=last]
        .iter()
        .enumerate()
        .filter_map(move |(nth, entry)| {
            let start = base + ((nth as u64) << F::size(level).lg2());
            let span = IovaRange::granule_at(Iova::new(start), F::size(level));
            let part = span.intersection(range)?;
            Some(Slot { entry, span, part })
        })
}

/// The table that `entry` leads to; the entry is present, no leaf, and was loaded with Acquire under `guard`.
#[inline]
fn child<F: Format>(entry: Iopte, _guard: &Guard) -> &TablePage {
    let page = ptr::with_exposed_provenance::<TablePage>(F::table_address(entry) as usize);
    // SAFETY:
    // - valid and aligned: entries that are present and no leaf are made by `map` only, from a `Box<TablePage>` whose
    //   provenance was exposed; formats are sealed and keep leaves and tables apart, and `map` checked that the address
    //   came through whole.
    // - initialised and visible: the Acquire load of the entry pairs with the Release that installed it.
    // - alive as long as the guard: the entry is one holder of the table. It lets go in `Drop` of what it lies in, which
    //   excludes walkers, or after it was made to lead elsewhere and deferred through the epoch, which the guard pins.
    // - shared: all its fields are atomics.
    unsafe { &*page }
}

/// Gives up the hold of `entry`, of a table of `level + 1`, on the table that it leads to.
///
/// # Safety
/// The entry was present and no leaf, no walk that begins now finds it, and its hold is given up once.
unsafe fn free_table<F: Format>(entry: Iopte, level: u32) {
    let page = ptr::with_exposed_provenance_mut::<TablePage>(F::table_address(entry) as usize);
    // SAFETY: made by `Box::into_raw` in `map`, where the address was checked to come through the entry whole; the
    // caller passes one hold, which nobody has given up before.
    unsafe { let_go::<F>(page, level) };
}

/// Gives up one hold on `page`, a table of `level`; the last one frees it, with the tables below that nobody else holds.
///
/// # Safety
/// `page` came from `Box::into_raw`, and the caller gives up a hold that it has.
unsafe fn let_go<F: Format>(page: *mut TablePage, level: u32) {
    // SAFETY: alive, for the caller holds it.
    let holders = unsafe { &(*page).1 };
    // Release: what we did with the table comes before its end; pairs with the fence below.
    if holders.fetch_sub(1, Ordering::Release) == 1 {
        // Acquire: pairs with the Release of all who let go before.
        fence(Ordering::Acquire);
        // SAFETY: made by `Box::into_raw`; the last hold was ours, and nobody gets a new one without having one or
        // being inside an epoch that an entry's hold outlasts.
        let page = unsafe { Box::from_raw(page) };
        free_children::<F>(&page, level);
    }
}

/// Gives up all tables below `page`, a table of `level` that nobody else can reach any more.
fn free_children<F: Format>(page: &TablePage, level: u32) {
    if level == 0 {
        return;
    }
    for slot in &page.0 {
        // Relaxed: nobody else reaches the table; whoever made it unreachable came before us.
        let entry = slot.load(Ordering::Relaxed);
        if F::is_present(entry) && !is_leaf::<F>(entry, level) {
            // SAFETY: present and no leaf; the entry lies in `page`, which the caller alone holds and frees after us.
            unsafe { free_table::<F>(entry, level - 1) };
        }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests;
