//! The memory of one table: as many entries as the format says, at an address that an entry can hold.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::{self, NonNull};

use crate::fmt::{AtomicIopte, Format};

/// An owned table, without the tables that its entries lead to. Its entries start out absent.
pub(super) struct TablePage<F: Format> {
    entries: NonNull<AtomicIopte>,
    format: PhantomData<fn() -> F>,
}

// SAFETY: the one field that is not Send, `entries`, is owned, and what it points to are atomics.
unsafe impl<F: Format> Send for TablePage<F> {}
// SAFETY: as above; through a shared reference only `&[AtomicIopte]` can be had, which is Sync.
unsafe impl<F: Format> Sync for TablePage<F> {}

impl<F: Format> TablePage<F> {
    const ENTRIES: usize = 1 << F::INDEX_LG2;

    const LAYOUT: Layout = {
        assert!(F::INDEX_LG2 <= 13 && F::TABLE_LG2 <= 16);
        match Layout::from_size_align(Self::ENTRIES * size_of::<AtomicIopte>(), 1 << F::TABLE_LG2) {
            Ok(layout) => layout,
            Err(_) => panic!("a table of at most 8192 entries has a layout"),
        }
    };

    pub(super) fn new() -> Self {
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
        TablePage {
            entries,
            format: PhantomData,
        }
    }

    /// The address of the table.
    pub(super) fn address(&self) -> u64 {
        self.entries.as_ptr().expose_provenance() as u64
    }

    /// Gives the table away, to whoever holds its address.
    pub(super) fn leak(self) {
        std::mem::forget(self);
    }

    /// Takes the table at `address` back.
    ///
    /// # Safety
    /// It is the [`address`](Self::address) of a table of this format that was leaked, and nobody else takes it back.
    pub(super) unsafe fn take_back(address: u64) -> Self {
        let entries = ptr::with_exposed_provenance_mut::<AtomicIopte>(address as usize);
        TablePage {
            // SAFETY: the address of an allocation is not null; the caller passes one.
            entries: unsafe { NonNull::new_unchecked(entries) },
            format: PhantomData,
        }
    }

    /// The entries of the table at `address`.
    ///
    /// # Safety
    /// It is the [`address`](Self::address) of a table of this format, which stays alive for `'g`.
    pub(super) unsafe fn entries_at<'g>(address: u64) -> &'g [AtomicIopte] {
        let entries = ptr::with_exposed_provenance::<AtomicIopte>(address as usize);
        // SAFETY: `new` made so many initialised entries there, with the provenance that `address` exposed; they are
        // atomics, shared by all, and live as long as the caller says.
        unsafe { std::slice::from_raw_parts(entries, Self::ENTRIES) }
    }
}

impl<F: Format> Deref for TablePage<F> {
    type Target = [AtomicIopte];

    #[inline]
    fn deref(&self) -> &[AtomicIopte] {
        // SAFETY: `new` made so many initialised entries, which live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), Self::ENTRIES) }
    }
}

impl<F: Format> Drop for TablePage<F> {
    fn drop(&mut self) {
        let all = ptr::slice_from_raw_parts_mut(self.entries.as_ptr(), Self::ENTRIES);
        // SAFETY: initialised by `new`, dropped once, and nobody borrows them any more.
        unsafe { ptr::drop_in_place(all) };
        // SAFETY: allocated by `new` with this layout, and freed once.
        unsafe { dealloc(self.entries.as_ptr().cast(), Self::LAYOUT) };
    }
}
