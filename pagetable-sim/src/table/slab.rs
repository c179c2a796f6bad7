//! Memory for the tables of neighbouring addresses, side by side.
//!
//! ```text
//!  a table       [entry 0][entry 1][entry 2] ... [entry 511]
//!  its slab      [table 0][table 1][table 2] ... [table 511]      2 MiB, touched where there are tables
//!  beside them   [Beside ][Beside ][Beside ] ... [Beside   ]      who holds each of them
//! ```
//!
//! A harvest goes through the lowest tables in the order of addresses. Where they follow each other in memory it runs at
//! the speed of memory; where each lies somewhere else, the processor begins anew at every 4 KiB, and it takes three to four
//! times as long.
//!
//! * **A table has a slab** as soon as one call touches [`FEW`] entries below it, or the second call of that many did one each:
//!   maps with a page here and there do not pay for it. A slab costs 20 KiB, and address space; its memory is the system's
//!   until tables come to lie in it, but where the system gives out memory by 2 MiB at a time.
//! * **The place of a table** follows from the entry that leads to it. If another table is still held there, one that was
//!   retired, the new one is an allocation of its own.
//! * **A slab lives** as long as the table above it, or any table in it. Then all of it is freed, and no part earlier.
//!
//! # Why no table is written over that somebody uses
//! A place is free, or it is held. Who lets go last still reads the entries, to let go of the tables below, and then says
//! that it is free; who takes it does so by one compare-exchange from free, so that what it writes comes after that.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::{self, NonNull};

use dirtymap::sync::{
    AtomicBool, AtomicPtr, AtomicU64, Ordering, Step, TINY, Witness, fence, performs,
};

/// From so many tables below a table on they lie in a slab. In the model checker, all do.
pub(super) const FEW: u64 = if TINY { 1 } else { 8 };

/// No table: the place is free.
const FREE: u64 = 0;
/// A table that one holds. Nobody holds it any more, but the place is not free yet: one less.
const ONE: u64 = 2;

/// What is kept of a table, but for its entries.
pub(super) struct Beside {
    /// How many hold the table, and one; [`FREE`] for a place in a slab without a table.
    holders: AtomicU64,
    /// The slab that the table lies in, which it holds; null if it is an allocation of its own.
    home: AtomicPtr<Slab>,
    /// The slab of the tables below, which the table holds; null if there is none.
    below: AtomicPtr<Slab>,
    /// Tables that were made below while there was no slab.
    made: AtomicU64,
    /// There never is a slab below.
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

    /// For a table that is an allocation of its own, and that one holds.
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

    /// One more holds the table. The caller knows one who does.
    pub(super) fn hold(&self) {
        // Relaxed: a new hold is made from one that lasts at least as long as we run.
        self.holders.fetch_add(1, Ordering::Relaxed);
    }

    /// One less holds the table; whether it was the last one, who then frees it.
    pub(super) fn let_go(&self) -> bool {
        // Release: what we did with the table comes before its end; pairs with the fence below.
        let last = self.holders.fetch_sub(1, Ordering::Release) == ONE;
        if last {
            // Acquire: pairs with the Release of all who let go before.
            fence(Ordering::Acquire);
            self.end();
        }
        last
    }

    /// Somebody has reached the table.
    #[inline]
    pub(super) fn look(&self) {
        self.witness.look();
    }

    /// Nobody may reach the table from now on.
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
        // SAFETY: null, or a slab that the table holds, for as long as it lives: `self` is borrowed from it.
        unsafe { slab.as_ref() }
    }

    /// The slab of the tables below, by the pointer that it can be freed by.
    pub(super) fn slab_below(&self) -> *mut Slab {
        // Relaxed: who asks has found the slab.
        self.below.load(Ordering::Relaxed)
    }

    /// The slab for a table below, of which the caller needs `count`; made if it is time for it.
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
            // SAFETY: nobody else knows the fresh slab, whose one hold is ours.
            unsafe { Slab::let_go(fresh) };
        }
        self.below()
    }

    /// Lets go of the slab of the tables below.
    ///
    /// # Safety
    /// Nobody holds the table any more, and this is called once for it.
    pub(super) unsafe fn let_go_below(&self) {
        // Relaxed: all who used the table let go before.
        let slab = self.below.load(Ordering::Relaxed);
        if let Some(slab) = NonNull::new(slab) {
            // SAFETY: installed by `slab` with a hold that the table has, and that ends here, once.
            unsafe { Slab::let_go(slab) };
        }
    }
}

/// A place for a new table, which one holds.
pub(super) enum Place<'s> {
    /// Memory that nobody uses.
    Free(NonNull<u8>, &'s Beside),
    /// Without [`Step::ClaimFree`]: somebody's table.
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
        });
        NonNull::from(Box::leak(slab))
    }

    /// What is kept of the table at `address`, if it lies here.
    #[inline]
    pub(super) fn beside(&self, address: u64) -> Option<&Beside> {
        let away = address.wrapping_sub(self.memory.as_ptr().expose_provenance() as u64);
        self.beside.get((away >> self.table_lg2) as usize)
    }

    /// Takes the place `nth` for a table that one holds; the caller may write to its memory before it publishes the table.
    /// `None` if a table is held there.
    /// `home` is this slab, by the pointer that [`allocate`](Self::allocate) returned: the last table may have to free it.
    pub(super) fn claim(&self, home: *mut Slab, nth: usize, apart: bool) -> Option<Place<'_>> {
        let beside = self.beside.get(nth)?;
        // SAFETY: inside the allocation, which has room for as many tables as there is `beside` of.
        let memory = unsafe { self.memory.add(nth << self.table_lg2) };
        // Acquire: pairs with the Release in `vacate`; what we write comes after what the last holder did.
        let claimed =
            beside
                .holders
                .compare_exchange(FREE, ONE, Ordering::Acquire, Ordering::Relaxed);
        if claimed.is_err() {
            if !performs(Step::ClaimFree) {
                // What is left out: the place is taken, and whoever uses the table there finds nothing in it.
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

    /// The place of `beside` is free.
    ///
    /// # Safety
    /// `slab` is the home of `beside`. Nobody holds the table there any more, and nobody uses its memory; this is called once
    /// for it.
    pub(super) unsafe fn vacate(slab: NonNull<Slab>, beside: NonNull<Beside>) {
        // SAFETY: it lies in the slab, which the table still holds.
        let beside = unsafe { beside.as_ref() };
        // Release: pairs with the Acquire in `claim`; whoever writes there comes after us.
        beside.holders.store(FREE, Ordering::Release);
        // SAFETY: the hold of the table, from `claim`, which ends here.
        unsafe { Slab::let_go(slab) };
    }

    /// Gives up a hold, and frees the slab if it was the last one.
    ///
    /// # Safety
    /// The hold is the caller's, who does not use the slab any more.
    unsafe fn let_go(slab: NonNull<Slab>) {
        // SAFETY: alive: we hold it.
        let holders = unsafe { &slab.as_ref().holders };
        // Release: what we did with the slab comes before its end; pairs with the fence below.
        if holders.fetch_sub(1, Ordering::Release) == 1 {
            // Acquire: pairs with the Release of all who let go before.
            fence(Ordering::Acquire);
            // SAFETY: leaked by `allocate`; nobody holds it any more.
            drop(unsafe { Box::from_raw(slab.as_ptr()) });
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; no table lies there any more.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) };
    }
}
