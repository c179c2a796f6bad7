//! The memory of one table: as many entries as the format says, at an address that an entry can hold, and behind them how
//! many hold the table.
//!
//! A table is held by the entry that leads to it and by each [`TableRef`]; the last one to let go frees it, and lets go of
//! the tables below. The count lies behind the entries, so that these fill whole pages.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::{self, NonNull};

use dirtymap::sync::{AtomicU64, Ordering, Witness, fence};

use super::is_leaf;
use crate::fmt::{AtomicIopte, Format, Iopte};

/// What lies behind the entries.
struct Holds {
    count: AtomicU64,
    witness: Witness,
}

/// A hold on a table: it stays in memory for as long as this exists, though it may have been retired.
pub(crate) struct TableRef<F: Format> {
    entries: NonNull<AtomicIopte>,
    level: u32,
    format: PhantomData<fn() -> F>,
}

// SAFETY: the one field that is not Send, `entries`, leads to a table that is shared between all threads by design:
// atomics only, with counted holds.
unsafe impl<F: Format> Send for TableRef<F> {}
// SAFETY: as above; through a shared reference only `&[AtomicIopte]` can be had, which is Sync.
unsafe impl<F: Format> Sync for TableRef<F> {}

impl<F: Format> TableRef<F> {
    const ENTRIES: usize = 1 << F::INDEX_LG2;

    const LAYOUT: Layout = {
        assert!(F::INDEX_LG2 <= 13 && F::TABLE_LG2 <= 16);
        let bytes = Self::ENTRIES * size_of::<AtomicIopte>() + size_of::<Holds>();
        match Layout::from_size_align(bytes, 1 << F::TABLE_LG2) {
            Ok(layout) => layout,
            Err(_) => panic!("a table of at most 8192 entries has a layout"),
        }
    };

    /// A new table of `level`, whose entries are absent.
    pub(super) fn new(level: u32) -> Self {
        // The count is aligned where the entries end.
        const { assert!(align_of::<Holds>() == align_of::<AtomicIopte>()) };
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(Self::LAYOUT) }.cast::<AtomicIopte>();
        let Some(entries) = NonNull::new(memory) else {
            handle_alloc_error(Self::LAYOUT)
        };
        for nth in 0..Self::ENTRIES {
            // SAFETY: inside the allocation, which has room for `ENTRIES` entries.
            let place = unsafe { entries.add(nth) };
            // SAFETY: valid for a write, aligned, and ours alone.
            unsafe { place.write(AtomicIopte::absent()) };
        }
        let table = TableRef {
            entries,
            level,
            format: PhantomData,
        };
        // SAFETY: valid for a write, aligned, and ours alone.
        unsafe {
            table.holds().write(Holds {
                count: AtomicU64::new(1),
                witness: Witness::new(),
            })
        };
        table
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

    /// Gives the hold away, to whoever keeps the table's address.
    pub(super) fn leak(self) {
        std::mem::forget(self);
    }

    /// Takes back a hold on the table of `level` at `address`.
    ///
    /// # Safety
    /// It is the [`address`](Self::address) of a table of this format and level, for which a hold was leaked that nobody
    /// else takes back.
    pub(super) unsafe fn take_back(address: u64, level: u32) -> Self {
        let entries = ptr::with_exposed_provenance_mut::<AtomicIopte>(address as usize);
        TableRef {
            // SAFETY: the address of an allocation is not null; the caller passes one.
            entries: unsafe { NonNull::new_unchecked(entries) },
            level,
            format: PhantomData,
        }
    }

    /// A further hold on the table of `level` at `address`.
    ///
    /// # Safety
    /// It is the [`address`](Self::address) of a table of this format and level, which stays alive during the call.
    pub(super) unsafe fn hold(address: u64, level: u32) -> Self {
        // SAFETY: the hold that this stands for is counted below.
        let table = unsafe { Self::take_back(address, level) };
        // SAFETY: written by `new`; the caller has the table alive.
        let holds = unsafe { table.holds().as_ref() };
        // Relaxed: a new hold is made from one that lasts at least as long as we run.
        holds.count.fetch_add(1, Ordering::Relaxed);
        table
    }

    /// The entries of the table at `address`.
    ///
    /// # Safety
    /// It is the [`address`](Self::address) of a table of this format, which stays alive for `'g`.
    #[inline]
    pub(super) unsafe fn entries_at<'g>(address: u64) -> &'g [AtomicIopte] {
        let entries = ptr::with_exposed_provenance::<AtomicIopte>(address as usize);
        if cfg!(dirtymap_loom) {
            // SAFETY: `new` wrote it behind the entries, and the caller has the table alive.
            unsafe { &*entries.wrapping_add(Self::ENTRIES).cast::<Holds>() }
                .witness
                .look();
        }
        // SAFETY: `new` made so many initialised entries there, with the provenance that `address` exposed; they are
        // atomics, shared by all, and live as long as the caller says.
        unsafe { std::slice::from_raw_parts(entries, Self::ENTRIES) }
    }

    /// How many hold the table: behind its entries.
    fn holds(&self) -> NonNull<Holds> {
        // SAFETY: inside the allocation, which has room for one word more than the entries.
        unsafe { self.entries.add(Self::ENTRIES) }.cast()
    }

    /// Frees the memory, and lets go of the tables below.
    ///
    /// # Safety
    /// Nobody holds the table any more, and it is freed once.
    unsafe fn free(&mut self) {
        for slot in self.iter().filter(|_| self.level > 0) {
            // Relaxed: nobody else reaches the table; whoever made it unreachable came before us.
            let entry = slot.load(Ordering::Relaxed);
            if F::is_present(entry) && !is_leaf::<F>(entry, self.level) {
                // SAFETY: present and no leaf; the entry goes with its table, and its hold with it.
                drop(unsafe { held_by::<F>(entry, self.level) });
            }
        }
        let all = ptr::slice_from_raw_parts_mut(self.entries.as_ptr(), Self::ENTRIES);
        // SAFETY: initialised by `new`, dropped once, and nobody borrows them any more.
        unsafe { ptr::drop_in_place(all) };
        // SAFETY: as the entries.
        unsafe { ptr::drop_in_place(self.holds().as_ptr()) };
        // SAFETY: allocated by `new` with this layout, and freed once.
        unsafe { dealloc(self.entries.as_ptr().cast(), Self::LAYOUT) };
    }
}

/// The hold that `entry`, of a table of `level`, has on the table that it leads to.
///
/// # Safety
/// The entry was present and no leaf, no walk that begins now finds it, and its hold is taken once.
pub(super) unsafe fn held_by<F: Format>(entry: Iopte, level: u32) -> TableRef<F> {
    // SAFETY: leaked when the entry was published, with an address that was checked to come through the entry whole; the
    // caller passes the hold.
    unsafe { TableRef::<F>::take_back(F::table_address(entry), level - 1) }
}

impl<F: Format> TableRef<F> {
    /// What freeing the table at once would do to those who are inside, without freeing it: for models.
    pub(super) fn end_too_early(self) {
        // SAFETY: written by `new`; we hold the table.
        unsafe { self.holds().as_ref() }.witness.end();
        self.leak();
    }
}

impl<F: Format> Deref for TableRef<F> {
    type Target = [AtomicIopte];

    #[inline]
    fn deref(&self) -> &[AtomicIopte] {
        // SAFETY: `new` made so many initialised entries, which live as long as `self` holds the table.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), Self::ENTRIES) }
    }
}

impl<F: Format> Drop for TableRef<F> {
    fn drop(&mut self) {
        // SAFETY: written by `new`; we hold the table.
        let holds = unsafe { self.holds().as_ref() };
        // Release: what we did with the table comes before its end; pairs with the fence below.
        if holds.count.fetch_sub(1, Ordering::Release) == 1 {
            // Acquire: pairs with the Release of all who let go before.
            fence(Ordering::Acquire);
            holds.witness.end();
            // SAFETY: the last hold was ours, and nobody gets a new one without having one or being inside an epoch that
            // an entry's hold outlasts.
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
