//! Chunks side by side, zero at first.
//!
//! The allocation has the allocator's usual alignment, because only then does the allocator pass on
//! zeroed memory that the system provides at the first touch. This module aligns the chunks, and
//! stores the start of the allocation before the first chunk.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use super::chunk::Chunk;
use crate::sync::TINY;

/// The usual alignment of allocators.
const USUAL: usize = 16;
/// Room for the alignment of the chunks, and for the pointer before them.
const HEAD: usize = align_of::<Chunk>() + size_of::<*mut u8>();

/// Never `None`: a slab is small against the address space.
fn layout(chunks: usize) -> Option<Layout> {
    let bytes = chunks.checked_mul(size_of::<Chunk>())?.checked_add(HEAD)?;
    Layout::from_size_align(bytes, USUAL).ok()
}

/// Allocates `chunks` chunks, all bits clear. Returns the first of them.
///
/// # Panics
/// In the model checker, whose atomics are not made of zeros.
pub(super) fn allocate(chunks: usize) -> NonNull<Chunk> {
    let layout = layout(chunks).filter(|_| !TINY);
    let layout = layout.unwrap_or_else(|| unreachable!("a slab of {chunks} chunks"));
    // SAFETY: the size is not 0: there is a head.
    let began = unsafe { alloc_zeroed(layout) };
    if began.is_null() {
        handle_alloc_error(layout);
    }
    let skip = size_of::<*mut u8>();
    let first = began.wrapping_add(skip);
    let first = first.wrapping_add(first.align_offset(align_of::<Chunk>()));
    // SAFETY: between `began` and `first`, so inside the allocation, and as aligned as `first` but
    // for one pointer.
    unsafe { first.wrapping_sub(skip).cast::<*mut u8>().write(began) };
    NonNull::new(first.cast()).unwrap_or_else(|| unreachable!("after the start of an allocation"))
}

/// Frees a slab.
///
/// # Safety
/// `first` is the first of `chunks` chunks that [`allocate`] has allocated, and nothing refers to
/// them any more.
pub(super) unsafe fn free(first: NonNull<Chunk>, chunks: usize) {
    let place = first.as_ptr().cast::<*mut u8>().wrapping_sub(1);
    // SAFETY: by the caller, `allocate` has written it.
    let began = unsafe { place.read() };
    if let Some(layout) = layout(chunks) {
        // SAFETY: allocated there with this layout; by the caller nothing refers to it.
        unsafe { dealloc(began, layout) };
    }
}
