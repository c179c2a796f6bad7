//! Memory for the tables of neighbouring addresses, side by side.
//!
//! ```text
//!  a table       [entry 0][entry 1][entry 2] ... [entry 511]
//!  its slab      [table 0][table 1][table 2] ... [table 511]      2 MiB, used where tables are
//!  beside them   [Beside ][Beside ][Beside ] ... [Beside   ]      the holds on each of them
//! ```
//!
//! A harvest visits the lowest tables in the order of addresses. If they are adjacent in memory, it
//! runs at the speed of memory. If they are scattered, the prefetcher of the processor starts anew
//! at every 4 KiB, and the harvest takes three to four times as long.
//!
//! * **A table has a slab** once one call needs [`FEW`] tables below it, or that many calls needed
//!   one each: maps of single scattered pages do not pay for it. A slab costs 20 KiB, and address
//!   space. The system provides its memory as tables are put there, or 2 MiB at a time where it
//!   uses huge pages.
//! * **The place of a table** follows from the entry that leads to it. If a retired table is still
//!   held there, the new one is an allocation of its own.
//! * **A slab lives** as long as the table above it, or any table in it. Then all of it is freed at
//!   once.
//!
//! # Why no table in use is written over
//! A place is free, or it is held. The thread that ends the last hold still reads the entries, to
//! end the holds on the tables below, and then declares the place free. A new table claims it by
//! one compare-exchange from free, so its writes come after those reads.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::{self, NonNull};

use dirtymap::sync::{
    AtomicBool, AtomicPtr, AtomicU64, Ordering, Step, TINY, Witness, fence, performs,
};

/// From this many tables below a table on they lie in a slab. In the model checker, all do.
pub(super) const FEW: u64 = if TINY { 1 } else { 8 };

/// No table: the place is free.
const FREE: u64 = 0;
/// A table with one hold. One less: no hold is left, but the place is not free yet.
const ONE: u64 = 2;

/// The record of a table: everything but its entries.
pub(super) struct Beside {
    /// The number of holds on the table, plus one; [`FREE`] for a place in a slab without a table.
    holders: AtomicU64,
    /// The slab that the table lies in, which it holds; null if it is an allocation of its own.
    home: AtomicPtr<Slab>,
    /// The slab of the tables below, which the table holds; null if there is none.
    below: AtomicPtr<Slab>,
    /// The number of tables that were made below without a slab.
    made: AtomicU64,
    /// The tables below never get a slab.
    apart: AtomicBool,
    /// Of the table.
    witness: Witness,
}

impl Beside {
    fn free() -> Self {
        Beside {
            holders: AtomicU64::new(FREE),
            home: AtomicPtr::new(ptr::null_mut()),
            below: AtomicPtr::new(ptr::null_mut()),
            made: AtomicU64::new(0),
            apart: AtomicBool::new(false),
            witness: Witness::new(),
        }
    }

    /// For a table that is an allocation of its own, with one hold.
    pub(super) fn single(apart: bool) -> Self {
        Beside {
            holders: AtomicU64::new(ONE),
            apart: AtomicBool::new(apart),
            ..Beside::free()
        }
    }

    pub(super) fn is_apart(&self) -> bool {
        // Relaxed: written before the table was published.
        self.apart.load(Ordering::Relaxed)
    }

    /// Adds a hold. The caller knows of one that lasts.
    pub(super) fn hold(&self) {
        // Relaxed: a new hold is made from one that lasts at least as long as we run.
        self.holders.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends a hold. Returns whether it was the last one: then the caller frees the table.
    pub(super) fn let_go(&self) -> bool {
        // Release: our use of the table comes before its end; pairs with the fence below.
        let last = self.holders.fetch_sub(1, Ordering::Release) == ONE;
        if last {
            // Acquire: pairs with the Release of all holds that ended before.
            fence(Ordering::Acquire);
            self.end();
        }
        last
    }

    /// A walk has reached the table.
    #[inline]
    pub(super) fn look(&self) {
        self.witness.look();
    }

    /// No walk may reach the table from now on.
    pub(super) fn end(&self) {
        self.witness.end();
    }

    /// The slab that the table lies in, or null.
    pub(super) fn home(&self) -> *mut Slab {
        // Relaxed: written before the table was published.
        self.home.load(Ordering::Relaxed)
    }

    /// The slab of the tables below, if there is one.
    pub(super) fn below(&self) -> Option<&Slab> {
        // Acquire: pairs with the Release in `slab`; publishes the slab.
        let slab = self.below.load(Ordering::Acquire);
        // SAFETY: null, or a slab that the table holds, for as long as it lives: `self` is borrowed
        // from it.
        unsafe { slab.as_ref() }
    }

    /// The slab of the tables below, by the pointer that it can be freed by.
    pub(super) fn slab_below(&self) -> *mut Slab {
        // Relaxed: the caller has found the slab by `below`.
        self.below.load(Ordering::Relaxed)
    }

    /// The slab for a table below, of which the caller needs `count`. Made if the tables below are
    /// many enough.
    pub(super) fn slab(&self, count: u64, tables: usize, table_lg2: u32) -> Option<&Slab> {
        if let Some(slab) = self.below() {
            return Some(slab);
        }
        // Relaxed: only says when a slab pays.
        if self.is_apart() || count < FEW && self.made.fetch_add(1, Ordering::Relaxed) + 1 < FEW {
            return None;
        }
        let fresh = Slab::allocate(tables, table_lg2);
        // Release on success: publishes the fresh slab. Relaxed on failure: `below` looks anew.
        let installed = self.below.compare_exchange(
            ptr::null_mut(),
            fresh.as_ptr(),
            Ordering::Release,
            Ordering::Relaxed,
        );
        if installed.is_err() {
            // SAFETY: the fresh slab is ours alone, with its one hold.
            unsafe { Slab::let_go(fresh) };
        }
        self.below()
    }

    /// Ends the hold on the slab of the tables below.
    ///
    /// # Safety
    /// No hold on the table is left, and this is called once for it.
    pub(super) unsafe fn let_go_below(&self) {
        // Relaxed: all holds on the table ended before.
        let slab = self.below.load(Ordering::Relaxed);
        if let Some(slab) = NonNull::new(slab) {
            // SAFETY: installed by `slab` with a hold that the table has, and that ends here, once.
            unsafe { Slab::let_go(slab) };
        }
    }
}

/// A place for a new table, with one hold.
pub(super) enum Place<'s> {
    /// Memory that is not in use.
    Free(NonNull<u8>, &'s Beside),
    /// Without [`Step::ClaimFree`]: a table in use.
    Held(NonNull<u8>, &'s Beside),
}

/// Memory for the tables below one table.
pub(super) struct Slab {
    memory: NonNull<u8>,
    layout: Layout,
    table_lg2: u32,
    beside: Box<[Beside]>,
    /// The table above, and the tables that lie here.
    holders: AtomicU64,
    witness: Witness,
}

impl Slab {
    /// A slab for `tables` tables, at multiples of 2^`table_lg2`; the caller has the one hold.
    fn allocate(tables: usize, table_lg2: u32) -> NonNull<Slab> {
        let layout = Layout::from_size_align(tables << table_lg2, 1 << table_lg2);
        let Ok(layout) = layout else {
            unreachable!("slabs of {tables} tables are small");
        };
        // SAFETY: not empty: a table has an entry at least.
        let memory = unsafe { alloc(layout) };
        let Some(memory) = NonNull::new(memory) else {
            handle_alloc_error(layout)
        };
        let slab = Box::new(Slab {
            memory,
            layout,
            table_lg2,
            beside: (0..tables).map(|_| Beside::free()).collect(),
            holders: AtomicU64::new(1),
            witness: Witness::new(),
        });
        NonNull::from(Box::leak(slab))
    }

    /// The record of the table at `address`, if it lies here.
    #[inline]
    pub(super) fn beside(&self, address: u64) -> Option<&Beside> {
        let away = address.wrapping_sub(self.memory.as_ptr().expose_provenance() as u64);
        self.beside.get((away >> self.table_lg2) as usize)
    }

    /// Claims the place `nth` for a table with one hold; the caller may write to its memory before
    /// it publishes the table. `None` if a table is held there. `home` is this slab, by the pointer
    /// that [`allocate`](Self::allocate) returned: the last table may have to free it.
    pub(super) fn claim(&self, home: *mut Slab, nth: usize, apart: bool) -> Option<Place<'_>> {
        let beside = self.beside.get(nth)?;
        // SAFETY: inside the allocation, which has room for as many tables as there is `beside` of.
        let memory = unsafe { self.memory.add(nth << self.table_lg2) };
        // Acquire: pairs with the Release in `vacate`; our writes come after those of the last
        // holder.
        let claimed =
            beside
                .holders
                .compare_exchange(FREE, ONE, Ordering::Acquire, Ordering::Relaxed);
        if claimed.is_err() {
            if !performs(Step::ClaimFree) {
                // The step that is left out: the place is claimed, and the table there loses its
                // entries.
                beside.hold();
                return Some(Place::Held(memory, beside));
            }
            return None;
        }
        // Relaxed: we have a hold on the slab already, by the table above.
        self.holders.fetch_add(1, Ordering::Relaxed);
        // Relaxed, all: published with the table.
        beside.home.store(home, Ordering::Relaxed);
        beside.below.store(ptr::null_mut(), Ordering::Relaxed);
        beside.made.store(0, Ordering::Relaxed);
        beside.apart.store(apart, Ordering::Relaxed);
        beside.witness.again();
        Some(Place::Free(memory, beside))
    }

    #[cfg(all(test, not(dirtymap_loom)))]
    pub(super) fn is_free(&self, nth: usize) -> bool {
        self.beside[nth].holders.load(Ordering::Acquire) == FREE
    }

    /// Declares the place of `beside` free.
    ///
    /// # Safety
    /// `slab` is the home of `beside`. No hold on the table there is left, and its memory is not in
    /// use; this is called once for it.
    pub(super) unsafe fn vacate(slab: NonNull<Slab>, beside: NonNull<Beside>) {
        // SAFETY: it lies in the slab, which the table still holds.
        let beside = unsafe { beside.as_ref() };
        // Release: pairs with the Acquire in `claim`; the writes of the next table come after ours.
        beside.holders.store(FREE, Ordering::Release);
        // SAFETY: the hold of the table, from `claim`, which ends here.
        unsafe { Slab::let_go(slab) };
    }

    /// Ends a hold, and frees the slab if it was the last one.
    ///
    /// # Safety
    /// The hold is the caller's, and the caller does not use the slab afterwards.
    unsafe fn let_go(slab: NonNull<Slab>) {
        // SAFETY: alive: we hold it.
        let Slab {
            holders, witness, ..
        } = unsafe { slab.as_ref() };
        witness.look();
        // Release: our use of the slab comes before its end; pairs with the fence below.
        if holders.fetch_sub(1, Ordering::Release) == 1 {
            // Acquire: pairs with the Release of all holds that ended before.
            fence(Ordering::Acquire);
            // SAFETY: leaked by `allocate`; no hold is left.
            drop(unsafe { Box::from_raw(slab.as_ptr()) });
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        self.witness.end();
        // SAFETY: allocated with this layout; no table lies there any more.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) };
    }
}
