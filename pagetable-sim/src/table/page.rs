//! The memory of one table: as many entries as the format says, at an address that an entry can
//! hold, and beside them the table's record, [`Beside`].
//!
//! A table has a reference count: the entry that leads to it and each [`TableRef`] have a hold. The
//! end of the last hold frees the table and ends the holds on the tables below. A table lies in the
//! slab of the table above it (see `slab.rs`), or is an allocation of its own: then its record
//! follows the entries, so that these fill whole pages.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::{self, NonNull};

use crossbeam_epoch::Guard;
use dirtymap::sync::{Ordering, Step, TINY, performs};

use super::slab::{Beside, Place, Slab};
use crate::fmt::{AtomicIopte, Format, Iopte};

/// A hold on a table: it stays in memory for as long as this exists, though it may have been
/// retired.
pub(crate) struct TableRef<F: Format> {
    entries: NonNull<AtomicIopte>,
    beside: NonNull<Beside>,
    level: u32,
    format: PhantomData<fn() -> F>,
}

// SAFETY: the fields that are not Send lead to a table and its record, which are shared between all
// threads by design: atomics only, with counted holds.
unsafe impl<F: Format> Send for TableRef<F> {}
// SAFETY: as above; through a shared reference only `&[AtomicIopte]` and `&Beside` can be had,
// which are Sync.
unsafe impl<F: Format> Sync for TableRef<F> {}

/// A table that is alive for `'g`, and its record.
#[derive(Clone, Copy)]
pub(super) struct Node<'g> {
    pub(super) entries: &'g [AtomicIopte],
    beside: &'g Beside,
}

impl<'g> Node<'g> {
    /// The table that `entry` leads to, of a table of this one's level; as [`child`].
    #[inline]
    pub(super) fn below<F: Format>(self, entry: Iopte, guard: &'g Guard) -> Node<'g> {
        let entries = child::<F>(entry, guard);
        let beside = beside_of::<F>(self.beside, F::table_address(entry));
        Node {
            entries,
            // SAFETY: the table is alive as long as the guard, says `child`, and its record as long
            // as the table.
            beside: unsafe { beside.as_ref() },
        }
    }

    /// Whether the tables below have a slab.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(super) fn has_slab(self) -> bool {
        self.beside.below().is_some()
    }

    /// Whether the place for the table of entry `nth` is free.
    #[cfg(all(test, not(dirtymap_loom)))]
    pub(super) fn is_free(self, nth: usize) -> bool {
        self.beside.below().is_some_and(|slab| slab.is_free(nth))
    }

    /// A hold on the table, which is of `level`.
    pub(super) fn hold<F: Format>(self, level: u32) -> TableRef<F> {
        self.beside.hold();
        TableRef {
            entries: NonNull::from(self.entries).cast(),
            beside: NonNull::from(self.beside),
            level,
            format: PhantomData,
        }
    }
}

impl Deref for Node<'_> {
    type Target = [AtomicIopte];

    #[inline]
    fn deref(&self) -> &[AtomicIopte] {
        self.entries
    }
}

/// The record of the table at `address`; an entry of the table with the record `above` leads to it.
#[inline]
fn beside_of<F: Format>(above: &Beside, address: u64) -> NonNull<Beside> {
    if let Some(beside) = above.below().and_then(|slab| slab.beside(address)) {
        return beside.into();
    }
    let entries = ptr::with_exposed_provenance_mut::<AtomicIopte>(address as usize);
    let record = entries.wrapping_add(TableRef::<F>::ENTRIES).cast();
    // SAFETY: follows the entries of an allocation, which has room for it, so not null.
    unsafe { NonNull::new_unchecked(record) }
}

impl<F: Format> TableRef<F> {
    const ENTRIES: usize = 1 << F::INDEX_LG2;

    /// Whether tables lie in slabs, so that the processor finds them side by side. A slab of larger
    /// tables would take 32 MiB and more. The model checker has slabs for one format.
    const IN_SLABS: bool = match TINY {
        true => F::INDEX_LG2 == 2,
        false => F::TABLE_LG2 == 12,
    };

    const LAYOUT: Layout = {
        assert!(F::INDEX_LG2 <= 13 && F::TABLE_LG2 <= 16);
        assert!(Self::ENTRIES * size_of::<AtomicIopte>() <= 1 << F::TABLE_LG2);
        // The record is aligned where the entries end.
        assert!(align_of::<Beside>() == align_of::<AtomicIopte>());
        let bytes = Self::ENTRIES * size_of::<AtomicIopte>() + size_of::<Beside>();
        match Layout::from_size_align(bytes, 1 << F::TABLE_LG2) {
            Ok(layout) => layout,
            Err(_) => panic!("a table of at most 8192 entries has a layout"),
        }
    };

    /// A new table of `level` that is an allocation of its own, whose entries are absent. If it is
    /// `apart`, so are all tables below.
    pub(super) fn new(level: u32, apart: bool) -> Self {
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(Self::LAYOUT) };
        let Some(memory) = NonNull::new(memory) else {
            handle_alloc_error(Self::LAYOUT)
        };
        // SAFETY: allocated with room for the entries, and ours alone.
        let entries = unsafe { Self::make_absent(memory) };
        // SAFETY: inside the allocation, which has room for it after the entries.
        let beside = unsafe { entries.add(Self::ENTRIES) }.cast::<Beside>();
        // SAFETY: valid for a write, aligned, and ours alone.
        unsafe { beside.write(Beside::single(apart)) };
        TableRef {
            entries,
            beside,
            level,
            format: PhantomData,
        }
    }

    /// A new table of `level`, whose entries are absent, for the entry `index` of the table
    /// `above`; the caller needs `count` such tables.
    pub(super) fn below(above: Node<'_>, index: usize, level: u32, count: u64) -> Self {
        let apart = above.beside.is_apart();
        let place = Self::IN_SLABS
            .then(|| above.beside.slab(count, Self::ENTRIES, F::TABLE_LG2))
            .flatten()
            .and_then(|slab| slab.claim(above.beside.slab_below(), index, apart));
        let (entries, beside) = match place {
            None => return TableRef::new(level, apart),
            // SAFETY: the place has room for a table, and is ours alone, for it was free.
            Some(Place::Free(memory, beside)) => (unsafe { Self::make_absent(memory) }, beside),
            Some(Place::Held(memory, beside)) => {
                let entries = memory.cast::<AtomicIopte>();
                for nth in 0..Self::ENTRIES {
                    // SAFETY: inside the place, which has room for `ENTRIES` entries.
                    let slot = unsafe { entries.add(nth) };
                    // SAFETY: initialised when a table was put there, which we hold.
                    let slot = unsafe { slot.as_ref() };
                    slot.reset();
                }
                (entries, beside)
            }
        };
        TableRef {
            entries,
            beside: beside.into(),
            level,
            format: PhantomData,
        }
    }

    /// Makes all entries of a table absent.
    ///
    /// # Safety
    /// `memory` has room for a table, at a multiple of its alignment, and is the caller's alone.
    unsafe fn make_absent(memory: NonNull<u8>) -> NonNull<AtomicIopte> {
        let entries = memory.cast::<AtomicIopte>();
        for nth in 0..Self::ENTRIES {
            // SAFETY: inside the memory, which has room for `ENTRIES` entries.
            let place = unsafe { entries.add(nth) };
            // SAFETY: valid for a write, aligned, and ours alone.
            unsafe { place.write(AtomicIopte::absent()) };
        }
        entries
    }

    /// The address of the table.
    pub(super) fn address(&self) -> u64 {
        self.entries.as_ptr().expose_provenance() as u64
    }

    pub(super) fn level(&self) -> u32 {
        self.level
    }

    /// How many addresses the table translates, as a logarithm.
    pub(crate) fn span_lg2(&self) -> u32 {
        F::size(self.level + 1).lg2().into()
    }

    /// The table, and its record.
    #[inline]
    pub(super) fn node(&self) -> Node<'_> {
        Node {
            entries: self,
            // SAFETY: made with the table, and alive for as long as it is, which we hold.
            beside: unsafe { self.beside.as_ref() },
        }
    }

    /// Gives the hold to the entry that has the table's address.
    pub(super) fn leak(self) {
        std::mem::forget(self);
    }

    /// The entries of the table at `address`.
    ///
    /// # Safety
    /// It is the [`address`](Self::address) of a table of this format, which stays alive for `'g`.
    #[inline]
    pub(super) unsafe fn entries_at<'g>(address: u64) -> &'g [AtomicIopte] {
        let entries = ptr::with_exposed_provenance::<AtomicIopte>(address as usize);
        if cfg!(dirtymap_loom) && !Self::IN_SLABS {
            // SAFETY: a table outside of slabs: `new` wrote it after the entries, and the caller
            // keeps the table alive.
            unsafe { &*entries.wrapping_add(Self::ENTRIES).cast::<Beside>() }.look();
        }
        // SAFETY: `make_absent` made so many initialised entries there, with the provenance that
        // `address` exposed; they are atomics, shared by all, and live as long as the caller says.
        unsafe { std::slice::from_raw_parts(entries, Self::ENTRIES) }
    }

    /// Frees the memory, and ends the holds on the tables below.
    ///
    /// # Safety
    /// No hold on the table is left, and it is freed once.
    unsafe fn free(&mut self) {
        for slot in self.iter().filter(|_| self.level > 0) {
            // Relaxed: no other thread reaches the table; the call that made it unreachable came
            // before.
            let entry = slot.load(Ordering::Relaxed);
            if F::is_present(entry) && !F::is_leaf(entry, self.level) {
                // SAFETY: present and no leaf; the entry goes with its table, and its hold with it.
                drop(unsafe { held_by::<F>(self.node(), entry, self.level) });
            }
        }
        // SAFETY: no hold on the table is left, and it is freed once.
        unsafe { self.node().beside.let_go_below() };
        let home = NonNull::new(self.node().beside.home());
        let all = ptr::slice_from_raw_parts_mut(self.entries.as_ptr(), Self::ENTRIES);
        // SAFETY: initialised by `make_absent`, dropped once, and no borrow of them is left.
        unsafe { ptr::drop_in_place(all) };
        if let Some(slab) = home {
            // SAFETY: the table lies there; no hold on it is left, and its memory was used for the
            // last time above.
            return unsafe { Slab::vacate(slab, self.beside) };
        }
        // SAFETY: as the entries; it is that of an allocation of its own.
        unsafe { ptr::drop_in_place(self.beside.as_ptr()) };
        // SAFETY: allocated by `new` with this layout, and freed once.
        unsafe { dealloc(self.entries.as_ptr().cast(), Self::LAYOUT) };
    }
}

impl<F: Format> TableRef<F> {
    /// Shows a model the race that freeing the table at once would have with walkers that are
    /// inside, and does not free it.
    pub(super) fn end_too_early(self) {
        self.node().beside.end();
        self.leak();
    }
}

impl<F: Format> Deref for TableRef<F> {
    type Target = [AtomicIopte];

    #[inline]
    fn deref(&self) -> &[AtomicIopte] {
        // SAFETY: `make_absent` made so many initialised entries, which live as long as `self`
        // holds the table.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), Self::ENTRIES) }
    }
}

impl<F: Format> Drop for TableRef<F> {
    fn drop(&mut self) {
        if self.node().beside.let_go() {
            // SAFETY: the last hold was ours. A new one is made only from a hold, or inside an
            // epoch that the hold of an entry outlasts.
            unsafe { self.free() };
        }
    }
}

impl<F: Format> std::fmt::Debug for TableRef<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TableRef")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

/// The table that `entry` leads to; the entry is present, no leaf, and was loaded with Acquire
/// under `guard`.
#[inline]
pub(super) fn child<F: Format>(entry: Iopte, _guard: &Guard) -> &[AtomicIopte] {
    // SAFETY:
    // - an address of a table: entries that are present and no leaf are made by `entry_for` only;
    //   formats are sealed and keep leaves and tables apart, and it checked that the address
    //   survives unchanged.
    // - initialised and visible: the Acquire load of the entry pairs with the Release that
    //   installed it.
    // - alive as long as the guard: the entry is one holder of the table. Its hold ends when its
    //   own table is freed, which excludes walkers, or after it was made to lead elsewhere and
    //   deferred through the epoch, which the guard pins.
    unsafe { TableRef::<F>::entries_at(F::table_address(entry)) }
}

/// The entry, of a table of `level`, that leads to `table`.
pub(super) fn entry_for<F: Format>(table: &TableRef<F>, level: u32) -> Iopte {
    let entry = F::table(table.address(), level);
    // Memory safety rests on it: `child` follows the address that the entry holds.
    assert_eq!(
        F::table_address(entry),
        table.address(),
        "a host address that fits an entry"
    );
    entry
}

/// Ends the hold of `entry`, of the table `above` of `level`, on the table that it led to, once all
/// walkers that came from above have left. A device may hold the table longer.
///
/// # Safety
/// The entry was present and no leaf, it was the one way to the table and is gone, and no other
/// call retires the table.
pub(super) unsafe fn retire<F: Format>(above: Node<'_>, entry: Iopte, level: u32, guard: &Guard) {
    // SAFETY: no later walk finds the entry; its hold is taken once.
    let hold = unsafe { held_by::<F>(above, entry, level) };
    if !performs(Step::WaitForWalkers) {
        return hold.end_too_early();
    }
    // Ends when all threads that are pinned now have left.
    guard.defer(move || drop(hold));
}

/// The hold that `entry`, of the table `above` of `level`, has on the table that it leads to.
///
/// # Safety
/// The entry was present and no leaf, no walk that begins now finds it, and its hold is taken once.
unsafe fn held_by<F: Format>(above: Node<'_>, entry: Iopte, level: u32) -> TableRef<F> {
    let address = F::table_address(entry);
    let entries = ptr::with_exposed_provenance_mut::<AtomicIopte>(address as usize);
    TableRef {
        // SAFETY: the address of an allocation, which was checked to survive the entry unchanged:
        // not null.
        entries: unsafe { NonNull::new_unchecked(entries) },
        beside: beside_of::<F>(above.beside, address),
        level: level - 1,
        format: PhantomData,
    }
}
