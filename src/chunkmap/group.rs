//! A group of neighbouring chunks.
//!
//! ```text
//!  group --> lines --> summary, summary, ...   state, state, ...
//!        --> bits  --> a slab of chunks; or pointer, pointer, ... to chunks
//! ```
//!
//! The summaries of all chunks lie side by side, and so do the states. A mark of a clean page looks
//! at the summary of its chunk and not at the state, and so does a harvest of clean memory. The
//! summaries of a terabyte are 64 KiB, which stay in the cache of a processor. With states and
//! pointers between them they would be 192 KiB.

use std::ptr::{self, NonNull};

use super::chunk::{AtomicState, Chunk, LINE_LG2, LINE_WORDS, Slot};
use super::place::Place;
use super::slab;
use crate::sync::{AtomicPtr, AtomicU64, Ordering, TINY, prefetch};
use crate::words::ones;

/// Chunks whose summaries are one line, as a logarithm.
pub(super) const BLOCK_LG2: u32 = LINE_LG2;
/// Chunks whose summaries are one line.
const BLOCK: usize = LINE_WORDS;

/// A line of summaries or states.
#[repr(align(64))]
struct Line([AtomicU64; BLOCK]);

/// Lines are words without gaps, but for those of the model checkers.
const _: () = assert!(TINY || size_of::<Line>() == BLOCK * size_of::<AtomicU64>());

/// See the [module](self).
pub(super) struct Group {
    /// The number of chunks.
    len: usize,
    /// A line of summaries for each block of chunks, then a line of states for each.
    lines: Box<[Line]>,
    /// The words of summaries: the number of the first word of state.
    states_at: usize,
    chunks: Chunks,
}

/// The chunks of a group.
enum Chunks {
    /// Side by side: the first one.
    Slab(NonNull<Chunk>),
    /// Each a [`Chunk`], or null.
    Pointers(Box<[AtomicPtr<()>]>),
}

/// Where the bits of a chunk are.
#[derive(Clone, Copy)]
pub(super) enum Bits<'a> {
    /// In a slab.
    Here(&'a Chunk),
    /// Behind a pointer to a [`Chunk`], which is null before the first bit.
    Pointer(&'a AtomicPtr<()>),
}

impl Group {
    /// A clean group of `len` chunks, in a slab or one by one.
    pub(super) fn new(len: usize, in_slab: bool) -> Self {
        let clean = || Line(std::array::from_fn(|_| AtomicU64::new(0)));
        let chunks = if in_slab {
            Chunks::Slab(slab::allocate(len))
        } else {
            let null = || AtomicPtr::new(ptr::null_mut());
            Chunks::Pointers((0..len).map(|_| null()).collect())
        };
        let blocks = len.div_ceil(BLOCK);
        Group {
            len,
            lines: (0..2 * blocks).map(|_| clean()).collect(),
            states_at: blocks * BLOCK,
            chunks,
        }
    }

    /// The number of chunks.
    #[inline]
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The summary and the state of the chunk `nth` of the group.
    #[inline]
    pub(super) fn slot(&self, nth: u64) -> Slot<'_> {
        let nth = nth as usize;
        assert!(nth < self.len, "chunk {nth} of a group of {}", self.len);
        Slot {
            // SAFETY: the first half of the lines has a summary for each of `len` chunks.
            summary: unsafe { self.word(nth) },
            // SAFETY: the second half, which begins there, has as many states.
            state: AtomicState(unsafe { self.word(self.states_at + nth) }),
        }
    }

    /// The word `nth` of the lines.
    ///
    /// # Safety
    /// The lines have so many.
    #[inline(always)]
    unsafe fn word(&self, nth: usize) -> &AtomicU64 {
        debug_assert!(nth < self.lines.len() * BLOCK);
        if TINY {
            return &self.lines[nth / BLOCK].0[nth % BLOCK];
        }
        // SAFETY: by the caller inside of the lines, which are words without gaps.
        let word = unsafe { self.lines.as_ptr().cast::<AtomicU64>().add(nth) };
        // SAFETY: as above; shared access goes through atomics.
        unsafe { &*word }
    }

    /// Where the bits of the chunk `nth` of the group are.
    #[inline]
    pub(super) fn bits(&self, nth: u64) -> Bits<'_> {
        let nth = nth as usize;
        assert!(nth < self.len, "chunk {nth} of a group of {}", self.len);
        match &self.chunks {
            Chunks::Pointers(pointers) => Bits::Pointer(&pointers[nth]),
            Chunks::Slab(first) => {
                // SAFETY: one of the `len` chunks of the slab.
                let chunk = unsafe { first.add(nth) };
                // SAFETY: as above; the slab lives as long as the group.
                Bits::Here(unsafe { chunk.as_ref() })
            }
        }
    }

    /// The first line of summaries, and the first word of the slab, if there is one.
    pub(super) fn near(&self) -> Option<(NonNull<AtomicU64>, NonNull<AtomicU64>)> {
        match &self.chunks {
            Chunks::Slab(first) => Some((NonNull::from(&*self.lines).cast(), first.cast())),
            Chunks::Pointers(_) => None,
        }
    }

    /// The first block from `from` to `to` whose summaries have a bit.
    #[inline]
    pub(super) fn next_dirty(&self, from: usize, to: usize) -> Option<usize> {
        let has_any = |line: &Line| {
            // Relaxed: coherence shows the summary set by a mark that came before the harvest, or
            // by a later one.
            let or = |any, summary: &AtomicU64| any | summary.load(Ordering::Relaxed);
            line.0.iter().fold(0, or) != 0
        };
        let mut rest = self.lines[..=to].iter().skip(from);
        Some(from + rest.position(has_any)?)
    }

    /// Prefetches the dirty lines of chunks of `block` that have few, and their `place`, by the
    /// number of the chunk in the block: each is a cache miss of its own, and a walk that asks for
    /// them together waits for one of them, not for each. Processors find lines that lie side by
    /// side themselves, after the first ones.
    #[inline]
    pub(super) fn prefetch_dirty<'p>(&self, block: usize, place: impl Fn(u64) -> Place<'p>) {
        /// Dirty lines of a chunk up to which it has few.
        const FEW: u32 = 40;
        /// The lines that are prefetched of a chunk that has more.
        const FIRST: u64 = 0xf;
        if TINY {
            return; // to a model checker each load is another branch
        }
        for (summary, nth) in self.lines[block].0.iter().zip(0..) {
            // Relaxed: a hint.
            let mut lines = summary.load(Ordering::Relaxed);
            if lines == 0 {
                continue;
            }
            if lines.count_ones() > FEW {
                lines &= FIRST;
            }
            let chunk = match self.bits((block * BLOCK) as u64 + nth) {
                Bits::Here(chunk) => ptr::from_ref(chunk).cast::<u8>(),
                // Relaxed: a hint.
                Bits::Pointer(chunk) => chunk.load(Ordering::Relaxed).cast::<u8>().cast_const(),
            };
            let place = place(nth).first();
            for line in ones(lines) {
                let offset = line * size_of::<u64>() * LINE_WORDS;
                prefetch(chunk.wrapping_add(offset));
                if !place.is_null() {
                    prefetch(place.wrapping_add(offset));
                }
            }
        }
    }
}

impl<'a> Bits<'a> {
    /// The bits, if they were allocated.
    #[inline]
    pub(super) fn get(self) -> Option<&'a Chunk> {
        match self {
            Bits::Here(chunk) => Some(chunk),
            Bits::Pointer(chunk) => {
                // Acquire: pairs with the Release in `install`; publishes the contents.
                let chunk = chunk.load(Ordering::Acquire).cast::<Chunk>();
                // SAFETY: null, or a `Chunk` that lives as long as the group.
                unsafe { chunk.as_ref() }
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        match &self.chunks {
            // SAFETY: allocated in `new`, of that many chunks; nothing refers to it any more.
            Chunks::Slab(first) => unsafe { slab::free(*first, self.len) },
            Chunks::Pointers(pointers) => {
                // Relaxed: exclusive access.
                let chunks = pointers.iter().map(|chunk| chunk.load(Ordering::Relaxed));
                chunks
                    .filter(|chunk| !chunk.is_null())
                    .for_each(|chunk| free_chunk(chunk.cast()));
            }
        }
    }
}

/// Allocates a chunk of its own.
pub(super) fn new_chunk() -> *mut Chunk {
    Box::into_raw(Box::new(Chunk::new()))
}

/// Frees a chunk that [`new_chunk`] has made, to which nothing refers any more.
pub(super) fn free_chunk(chunk: *mut Chunk) {
    // SAFETY: made by `Box::into_raw` in `new_chunk`; the caller has the only reference left.
    drop(unsafe { Box::from_raw(chunk) });
}
