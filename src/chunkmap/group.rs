//! A group of neighbouring chunks.
//!
//! ```text
//!  group --> lines --> summary, summary, ...   state, state, ...
//!        --> bits  --> a slab of chunks; or pointer, pointer, ... to chunks
//!        --> lists --> pointer, pointer, ... to the lists of a block of chunks
//! ```
//!
//! The summaries of all chunks lie side by side, and so do the states. A mark of a clean page looks
//! at the summary of its chunk and not at the state, and so does a harvest of clean memory. The
//! summaries of a terabyte are 64 KiB, which stay in the cache of a processor. With states and
//! pointers between them they would be 192 KiB.

use std::ptr::{self, NonNull};

use super::chunk::{AtomicState, Chunk, LINE_LG2, LINE_WORDS, Slot};
use super::few::List;
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
    /// Pointers to the [`Lists`] of each block, or null. None in a group with a slab.
    lists: Box<[AtomicPtr<()>]>,
}

/// The chunks of a group.
enum Chunks {
    /// Side by side: the first one.
    Slab(NonNull<Chunk>),
    /// Each a [`Chunk`], or null.
    Pointers(Box<[AtomicPtr<()>]>),
}

/// The lists of the chunks of a block.
pub(super) struct Lists([List; BLOCK]);

impl Lists {
    /// That of the chunk `nth` of the group.
    #[inline]
    pub(super) fn of(&self, nth: u64) -> &List {
        &self.0[nth as usize % BLOCK]
    }
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
        let nulls = |len| (0..len).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        let blocks = len.div_ceil(BLOCK);
        let (chunks, lists) = if in_slab {
            (Chunks::Slab(slab::allocate(len)), nulls(0))
        } else {
            (Chunks::Pointers(nulls(len)), nulls(blocks))
        };
        Group {
            len,
            lines: (0..2 * blocks).map(|_| clean()).collect(),
            states_at: blocks * BLOCK,
            chunks,
            lists,
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
    /// number of the chunk in the block and the lines. Each is a cache miss of its own. A walk that
    /// asks for them together waits for one of them, not for each. Processors find lines that
    /// lie side by side themselves, after the first ones.
    #[inline]
    pub(super) fn prefetch_dirty<'p>(&self, block: usize, place: impl Fn(u64, u64) -> Place<'p>) {
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
            let chunk = self.bits((block * BLOCK) as u64 + nth).hint();
            let place = place(nth, lines).first();
            prefetch_lines(chunk, lines);
            if !place.is_null() {
                prefetch_lines(place, lines);
            }
        }
    }

    /// The list of the chunk `nth` of the group, if it was allocated.
    #[inline]
    pub(super) fn list(&self, nth: u64) -> Option<&List> {
        // Acquire: pairs with the Release in `install`; publishes the contents.
        let lists = self.lists_of(nth).load(Ordering::Acquire).cast::<Lists>();
        // SAFETY: null, or lists that live as long as the group.
        let lists = unsafe { lists.as_ref() }?;
        Some(lists.of(nth))
    }

    /// The place of the lists of the block of the chunk `nth`: [`Lists`], or null.
    #[inline]
    pub(super) fn lists_of(&self, nth: u64) -> &AtomicPtr<()> {
        &self.lists[nth as usize / BLOCK]
    }

    /// Prefetches the memory in which bits of `lines` of the chunk `nth` of the group are left, if
    /// it exists.
    pub(super) fn prefetch(&self, nth: u64, lines: u64) {
        let chunk = self.bits(nth).hint();
        if TINY || chunk.is_null() {
            return;
        }
        let slot = self.slot(nth);
        // Relaxed: a hint.
        match self.list(nth) {
            Some(list) if slot.summary.load(Ordering::Relaxed) == 0 && lines != !0 => {
                prefetch(ptr::from_ref(slot.state.0).cast());
                let list = ptr::from_ref(list).cast::<u8>();
                (0..size_of::<List>())
                    .step_by(64)
                    .for_each(|at| prefetch(list.wrapping_add(at)));
            }
            _ => {
                prefetch(ptr::from_ref(slot.summary).cast());
                prefetch_lines(chunk, lines);
            }
        }
    }
}

/// Prefetches `lines` from `first` on. A bitmap of a caller may begin inside of a cache line, as
/// a large allocation of most allocators does: then the words of each line lie in two of them.
#[inline(always)]
fn prefetch_lines(first: *const u8, lines: u64) {
    const BYTES: usize = size_of::<u64>() * LINE_WORDS;
    let skip = first.addr() % BYTES;
    let both = if skip == 0 { lines } else { lines | lines << 1 };
    for line in ones(both) {
        prefetch(first.wrapping_sub(skip).wrapping_add(line * BYTES));
    }
}

impl<'a> Bits<'a> {
    /// The address of the chunk, for a prefetch; null if it was not allocated.
    #[inline]
    fn hint(self) -> *const u8 {
        match self {
            Bits::Here(chunk) => ptr::from_ref(chunk).cast(),
            // Relaxed: a hint.
            Bits::Pointer(chunk) => chunk.load(Ordering::Relaxed).cast::<u8>().cast_const(),
        }
    }

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
        for lists in &self.lists {
            // Relaxed: exclusive access.
            let lists = lists.load(Ordering::Relaxed).cast::<Lists>();
            if !lists.is_null() {
                free_lists(lists);
            }
        }
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

/// Allocates the lists of a block.
pub(super) fn new_lists() -> *mut Lists {
    Box::into_raw(Box::new(Lists(std::array::from_fn(|_| List::new()))))
}

/// Frees lists that [`new_lists`] has made, to which nothing refers any more.
pub(super) fn free_lists(lists: *mut Lists) {
    // SAFETY: made by `Box::into_raw` in `new_lists`; the caller has the only reference left.
    drop(unsafe { Box::from_raw(lists) });
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
