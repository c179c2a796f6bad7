//! A sparse concurrent bitmap: 4 KiB chunks, allocated at their first bit.
//!
//! ```text
//!  root --> directory --> directory --> group of blocks --> chunk
//!           only where the chunks are more than one group may have
//! ```
//!
//! A block holds the summaries of some [`chunk`](super::chunk)s and the pointers to them, a group
//! holds blocks. A bitmap of up to 8192 chunks (1 TiB of 4 KiB pages) is one group. A larger one
//! has groups of 512 chunks under a radix tree of fixed depth. So a bitmap for 2^63 bytes costs
//! nothing before its first bit. All of these are installed by compare-exchange and live as long as
//! the bitmap: a reference to a word never goes stale.
//!
//! In a bitmap *in slabs* the chunks of a group lie side by side in one [`slab`](super::slab),
//! whose memory the system provides when it is touched. So the address of a word follows from that
//! of the group, without a pointer in between.

use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use super::chunk::{BLOCK_LG2, Block, CHUNK_BITS, Chunk, LINE_BITS, Slot, WORDS_LG2};
use super::slab;
use super::take::{Taker, Visitor};
use crate::sync::{AtomicPtr, AtomicU64, Ordering, Step, TINY, weaken};
use crate::words::word_mask;

/// Pointers of a directory, as a logarithm.
const FANOUT_LG2: u32 = if TINY { 1 } else { 9 };
/// The most chunks of a bitmap of one group, as a logarithm.
const ONE_GROUP_LG2: u32 = if TINY { 1 } else { 13 };
/// Words of a chunk.
pub(crate) const CHUNK_WORDS: u64 = 1 << WORDS_LG2;
/// Bits of a chunk, as a logarithm.
pub(super) const BITS_LG2: u32 = WORDS_LG2 + 6;

/// Pointers to directories or, in the lowest level, groups.
struct Directory([AtomicPtr<()>; 1 << FANOUT_LG2]);

/// See the [module](self).
pub(crate) struct ChunkMap {
    /// A group if `levels` is 0, else a directory whose subtree has `levels - 1` more levels of
    /// directories.
    root: AtomicPtr<()>,
    levels: u32,
    /// Chunks of a group, as a logarithm.
    group_lg2: u32,
    /// Blocks of a group.
    blocks: usize,
    /// Chunks of the slab of a group; 0 if chunks are allocated one by one.
    slab: usize,
    /// The highest bit.
    pub(super) last: u64,
    /// Bytes of the chunks that were allocated one by one. A count of std: it orders nothing, and
    /// need not cost a model checker anything.
    held: std::sync::atomic::AtomicU64,
    owns: PhantomData<Box<Directory>>,
}

/// The one group of a bitmap; valid while the bitmap lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OneGroup {
    blocks: NonNull<Block>,
    /// The first word of the slab.
    slab: NonNull<AtomicU64>,
}

impl ChunkMap {
    /// An empty bitmap of the bits 0 to `last`. Allocates nothing.
    pub(crate) fn new(last: u64) -> Self {
        Self::with_slabs(last, false)
    }

    /// As [`new`](Self::new), in slabs: 4 KiB of address space for each chunk of a group from its
    /// first bit on.
    pub(crate) fn in_slabs(last: u64) -> Self {
        // The atomics of the model checker are not made of zeros.
        Self::with_slabs(last, !TINY)
    }

    fn with_slabs(last: u64, slabs: bool) -> Self {
        let last_chunk = last >> BITS_LG2;
        let (group_lg2, blocks) = if last_chunk >> ONE_GROUP_LG2 == 0 {
            (ONE_GROUP_LG2, (last_chunk >> BLOCK_LG2) + 1)
        } else {
            (FANOUT_LG2, 1 << (FANOUT_LG2 - BLOCK_LG2))
        };
        let last_group = last_chunk >> group_lg2;
        let mut levels = 0;
        while levels * FANOUT_LG2 < 64 && last_group >> (levels * FANOUT_LG2) != 0 {
            levels += 1;
        }
        ChunkMap {
            root: AtomicPtr::new(ptr::null_mut()),
            levels,
            group_lg2,
            blocks: blocks as usize,
            slab: match slabs {
                true => (last_chunk + 1).min(blocks << BLOCK_LG2) as usize,
                false => 0,
            },
            last,
            held: std::sync::atomic::AtomicU64::new(0),
            owns: PhantomData,
        }
    }

    /// Sets the bits `first..=last`. A word whose bits are all set already costs a fence and a few
    /// loads, and no write. `fence` is called once: it orders the caller's data write before the
    /// look at bits that are set already, see [`marks`](crate::marks). Returns whether a bit was
    /// clear; then a SeqCst fence came after the write.
    #[inline]
    pub(crate) fn set(&self, first: u64, last: u64, fence: impl FnOnce()) -> bool {
        debug_assert!(first <= last && last <= self.last);
        if first / 64 == last / 64 {
            let slot = self.slot_or_new(first >> BITS_LG2);
            return set_word(slot, self.chunk_of(slot), first, last, fence);
        }
        fence();
        self.set_words(first, last)
    }

    /// As [`set`](Self::set), of several words; the fence came before.
    #[inline(never)]
    fn set_words(&self, first: u64, last: u64) -> bool {
        let (from, to) = (first >> BITS_LG2, last >> BITS_LG2);
        if from == to {
            return self.set_in(self.slot_or_new(from), first, last);
        }
        // The group of a chunk is looked up once for all of its chunks.
        let in_group = (1 << self.group_lg2) - 1;
        let mut anew = false;
        for group in from >> self.group_lg2..=to >> self.group_lg2 {
            let blocks = self.group_or_new(group);
            let base = group << self.group_lg2;
            for index in from.max(base)..=to.min(base | in_group) {
                let (low, high) = (index << BITS_LG2, index << BITS_LG2 | (CHUNK_BITS - 1));
                let slot = slot_in(blocks, index - base);
                anew |= self.set_in(slot, first.max(low), last.min(high));
            }
        }
        anew
    }

    /// Sets the bits `first..=last` of the chunk at `slot`; the fence came before.
    #[inline]
    fn set_in(&self, slot: Slot<'_>, first: u64, last: u64) -> bool {
        if last - first == CHUNK_BITS - 1 {
            // The chunks of a slab exist.
            if self.slab == 0 {
                self.chunk_of(slot);
            }
            return slot.set_whole();
        }
        slot.set_range(self.chunk_of(slot), first % CHUNK_BITS, last % CHUNK_BITS)
    }

    /// The group of a bitmap of one group, in slabs. `None` for any other bitmap.
    pub(crate) fn one_group(&self) -> Option<OneGroup> {
        let group = (self.levels == 0 && self.slab != 0).then(|| self.group_or_new(0))?;
        // Relaxed: the pointers of a slab were written before the group was installed.
        let slab = slot_in(group, 0).chunk.load(Ordering::Relaxed).cast();
        Some(OneGroup {
            blocks: NonNull::from(group).cast(),
            slab: NonNull::new(slab)?,
        })
    }

    /// As [`set`](Self::set), of one bit of `group`, which has a slab.
    ///
    /// # Safety
    /// `group` is that of this bitmap, and `bit` is no higher than its highest bit.
    #[inline(always)]
    pub(crate) unsafe fn set_near(&self, group: OneGroup, bit: u64, fence: impl FnOnce()) {
        debug_assert!(bit <= self.last);
        // SAFETY: by the caller it came from `one_group` of this bitmap, which lives for as long as
        // `self` is borrowed, and has a block for each bit of it.
        let block = unsafe { group.blocks.add((bit >> (BITS_LG2 + BLOCK_LG2)) as usize) };
        // SAFETY: as above.
        let block = unsafe { block.as_ref() };
        // SAFETY: the slab has a word for each bit of the bitmap, and lives as long as its group.
        let word = unsafe { group.slab.add((bit >> 6) as usize) };
        // SAFETY: as above.
        let word = unsafe { word.as_ref() };
        // A mask of one bit is tested by one instruction.
        let (slot, mask) = (block.slot(bit >> BITS_LG2), 1 << (bit % 64));
        slot.set_word(word, bit, mask, fence);
    }

    /// Takes the bits of `first..=last`: `taker` visits each word that has some, in order, with the
    /// word's first bit and those bits. They are cleared after the visit.
    ///
    /// # Errors
    /// Those of `taker`; the bits of that word and of the words after it stay.
    #[inline]
    pub(crate) fn take<T: Taker>(
        &self,
        first: u64,
        last: u64,
        mut taker: T,
    ) -> Result<(), T::Error> {
        // A request for the end of the bitmap covers its last line as a whole: there are no bits
        // beyond.
        let last = if last == self.last {
            last | (LINE_BITS - 1)
        } else {
            last
        };
        self.walk(
            first,
            last,
            &mut taker,
            |taker, slot, chunk, base, from, to| slot.take(chunk, base, from, to, taker),
        )
    }

    /// As [`take`](Self::take), without a clear.
    ///
    /// # Errors
    /// Those of `visitor`.
    pub(crate) fn peek<V: Visitor>(
        &self,
        first: u64,
        last: u64,
        mut visitor: V,
    ) -> Result<(), V::Error> {
        let visitor = &mut visitor;
        self.walk(
            first,
            last,
            visitor,
            |visitor, slot, chunk, base, from, to| slot.peek(chunk, base, from, to, visitor),
        )
    }

    /// Calls `each` for the chunks of blocks that have bits, with the chunk's first bit, and the
    /// requested bits of it.
    #[inline]
    pub(super) fn walk<V: Visitor>(
        &self,
        first: u64,
        last: u64,
        visitor: &mut V,
        mut each: impl FnMut(&mut V, Slot<'_>, &Chunk, u64, u64, u64) -> Result<(), V::Error>,
    ) -> Result<(), V::Error> {
        let last_chunk = last >> BITS_LG2;
        let mut next = Some(first >> BITS_LG2);
        while let Some((group, blocks)) = next.and_then(|next| self.next_group(next, last_chunk)) {
            let from = (first >> BITS_LG2).max(group);
            let to = last_chunk.min(group + ((blocks.len() as u64) << BLOCK_LG2) - 1);
            let (low, high) = ((from - group) >> BLOCK_LG2, (to - group) >> BLOCK_LG2);
            // The next block that has bits, from the one of this number on. Its lines are asked for
            // before those of the last one are taken.
            let next_dirty = |nth: u64, visitor: &V| {
                let mut rest = blocks[..=high as usize].iter().skip(nth as usize);
                let nth = nth + rest.position(Block::has_any)? as u64;
                let start = (group + (nth << BLOCK_LG2)) << BITS_LG2;
                let place = |chunk: u64| visitor.place(start + (chunk << BITS_LG2), CHUNK_WORDS);
                blocks[nth as usize].prefetch_dirty(place);
                Some(nth)
            };
            let mut dirty = next_dirty(low, visitor);
            while let Some(nth) = dirty {
                dirty = next_dirty(nth + 1, visitor);
                let block = &blocks[nth as usize];
                let start = group + (nth << BLOCK_LG2);
                for index in from.max(start)..=to.min(start + ((1 << BLOCK_LG2) - 1)) {
                    let slot = block.slot(index);
                    // Acquire: pairs with the Release in `install`; publishes the contents.
                    let chunk = slot.chunk.load(Ordering::Acquire).cast::<Chunk>();
                    // SAFETY: a pointer of a block is null or names a `Chunk` that lives as long as
                    // `self`.
                    let Some(chunk) = (unsafe { chunk.as_ref() }) else {
                        continue;
                    };
                    let base = index << BITS_LG2;
                    let high = (last - base).min((1 << BITS_LG2) - 1);
                    each(visitor, slot, chunk, base, first.saturating_sub(base), high)?;
                }
            }
            next = to.checked_add(1).filter(|next| *next <= last_chunk);
        }
        Ok(())
    }

    /// The words of chunk `index`, allocated if it does not exist yet.
    pub(crate) fn words_or_new(&self, index: u64) -> &[AtomicU64] {
        &self.chunk_of(self.slot_or_new(index)).0
    }

    /// The first chunk from `index` to `last` that exists: its index and its words.
    pub(crate) fn next_words(&self, index: u64, last: u64) -> Option<(u64, &[AtomicU64])> {
        let mut next = Some(index);
        while let Some((group, blocks)) = next.and_then(|next| self.next_group(next, last)) {
            let to = last.min(group + ((blocks.len() as u64) << BLOCK_LG2) - 1);
            for index in index.max(group)..=to {
                // Acquire: as in `walk`.
                let chunk = slot_in(blocks, index - group).chunk.load(Ordering::Acquire);
                // SAFETY: as in `walk`.
                if let Some(chunk) = unsafe { chunk.cast::<Chunk>().as_ref() } {
                    return Some((index, &chunk.0));
                }
            }
            next = to.checked_add(1).filter(|next| *next <= last);
        }
        None
    }

    /// The first group that exists among those of the chunks `index..=last`: its first chunk, and
    /// its blocks. Whole absent subtrees are skipped at once.
    fn next_group(&self, mut index: u64, last: u64) -> Option<(u64, &[Block])> {
        'group: while index <= last {
            // Acquire: pairs with the Release in `install`; publishes the contents of what the
            // pointer names.
            let mut pointer = self.root.load(Ordering::Acquire);
            let group = index >> self.group_lg2;
            for level in (0..self.levels).rev() {
                if pointer.is_null() {
                    index = next_subtree(group, level + 1)?.checked_mul(1 << self.group_lg2)?;
                    continue 'group;
                }
                // SAFETY: non-null pointers of this level name a `Directory` that lives as long as
                // `self`.
                let directory = unsafe { &*pointer.cast::<Directory>() };
                // Acquire: as above.
                pointer = directory.0[place_in(group, level)].load(Ordering::Acquire);
            }
            if pointer.is_null() {
                index = (group + 1).checked_mul(1 << self.group_lg2)?;
                continue;
            }
            // SAFETY: non-null pointers below the last directory name the first of `blocks` blocks
            // that live as long as `self`.
            let blocks =
                unsafe { std::slice::from_raw_parts(pointer.cast::<Block>(), self.blocks) };
            return Some((group << self.group_lg2, blocks));
        }
        None
    }

    /// Calls `each` for the chunks that exist among those of the bits `first..=last`, with the
    /// chunk's first bit.
    pub(super) fn each_chunk<E>(
        &self,
        first: u64,
        last: u64,
        mut each: impl FnMut(Slot<'_>, &Chunk, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let last = last >> BITS_LG2;
        let mut next = Some(first >> BITS_LG2);
        while let Some(index) = next
            && let Some((group, blocks)) = self.next_group(index, last)
        {
            let to = last.min(group + ((blocks.len() as u64) << BLOCK_LG2) - 1);
            for index in index.max(group)..=to {
                let slot = slot_in(blocks, index - group);
                // Acquire: as in `walk`.
                let chunk = slot.chunk.load(Ordering::Acquire).cast::<Chunk>();
                // SAFETY: as in `walk`.
                if let Some(chunk) = unsafe { chunk.as_ref() } {
                    #[cfg(test)]
                    crate::compared::one();
                    each(slot, chunk, index << BITS_LG2)?;
                }
            }
            next = to.checked_add(1).filter(|next| *next <= last);
        }
        Ok(())
    }

    /// The place of chunk `index`; its group is allocated if it does not exist yet.
    #[inline]
    pub(super) fn slot_or_new(&self, index: u64) -> Slot<'_> {
        let (group, nth) = match self.levels {
            0 => (0, index),
            _ => (index >> self.group_lg2, index & ((1 << self.group_lg2) - 1)),
        };
        slot_in(self.group_or_new(group), nth)
    }

    /// The chunk at `slot`, one of this bitmap; allocated if it does not exist yet.
    #[inline]
    pub(super) fn chunk_of<'m>(&'m self, slot: Slot<'m>) -> &'m Chunk {
        const BYTES: u64 = size_of::<Chunk>() as u64;
        let held = &self.held;
        let chunk = get_or_install(
            slot.chunk,
            || {
                // Relaxed, both: a statistic.
                held.fetch_add(BYTES, std::sync::atomic::Ordering::Relaxed);
                Box::into_raw(Box::new(Chunk::new()))
            },
            |chunk| {
                held.fetch_sub(BYTES, std::sync::atomic::Ordering::Relaxed);
                free_chunk(chunk);
            },
        );
        // SAFETY: a pointer of a block names a `Chunk` that lives as long as the bitmap.
        unsafe { &*chunk }
    }

    /// The bytes of the chunks that were allocated one by one.
    pub(crate) fn held_bytes(&self) -> u64 {
        // Relaxed: a statistic.
        self.held.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[inline]
    fn group_or_new(&self, group: u64) -> &[Block] {
        let place = match self.levels {
            0 => &self.root,
            _ => self.place_or_new(group),
        };
        let first = get_or_install(
            place,
            || new_group(self.blocks, self.slab),
            |first| free_group(first, self.blocks, self.slab),
        );
        // SAFETY: below the last directory a pointer names the first of `blocks` blocks that live
        // as long as `self`.
        unsafe { std::slice::from_raw_parts(first, self.blocks) }
    }

    /// The place of the pointer to `group`, below directories that are allocated if they do not
    /// exist yet.
    #[inline(never)]
    fn place_or_new(&self, group: u64) -> &AtomicPtr<()> {
        let mut place = &self.root;
        for level in (0..self.levels).rev() {
            let pointer = get_or_install(
                place,
                || {
                    Box::into_raw(Box::new(Directory(std::array::from_fn(|_| {
                        AtomicPtr::new(ptr::null_mut())
                    }))))
                },
                free_directory,
            );
            // SAFETY: a pointer of this level names a `Directory` that lives as long as `self`.
            let directory = unsafe { &*pointer };
            place = &directory.0[place_in(group, level)];
        }
        place
    }

    /// Frees the subtree under `pointer`, which has `levels` levels of directories.
    fn free(&self, pointer: *mut (), levels: u32) {
        if pointer.is_null() {
            return;
        }
        if levels == 0 {
            free_group(pointer.cast(), self.blocks, self.slab);
        } else {
            // SAFETY: as in `group_or_new`.
            let directory = unsafe { &*pointer.cast::<Directory>() };
            for child in &directory.0 {
                // Relaxed: `drop` has exclusive access.
                self.free(child.load(Ordering::Relaxed), levels - 1);
            }
            free_directory(pointer.cast());
        }
    }
}

impl Drop for ChunkMap {
    fn drop(&mut self) {
        // Relaxed: exclusive access.
        self.free(self.root.load(Ordering::Relaxed), self.levels);
    }
}

impl std::fmt::Debug for ChunkMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkMap")
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

/// Sets the bits `first..=last` of one word, in `chunk`, which is that of `slot`.
#[inline(always)]
fn set_word(slot: Slot<'_>, chunk: &Chunk, first: u64, last: u64, fence: impl FnOnce()) -> bool {
    let index = (first >> 6 & (CHUNK_WORDS - 1)) as usize;
    let mask = word_mask((first % 64) as u32, (last % 64) as u32);
    slot.set_word(&chunk.0[index], first, mask, fence)
}

/// The place of chunk `index` of a group.
#[inline]
fn slot_in(blocks: &[Block], index: u64) -> Slot<'_> {
    blocks[(index >> BLOCK_LG2) as usize].slot(index)
}

fn free_chunk(chunk: *mut Chunk) {
    // SAFETY: made by `Box::into_raw` in `ChunkMap::chunk_of`; the caller has the only reference
    // left.
    drop(unsafe { Box::from_raw(chunk) });
}

fn free_directory(directory: *mut Directory) {
    // SAFETY: made by `Box::into_raw` in `group_or_new`; the caller has the only reference left.
    drop(unsafe { Box::from_raw(directory) });
}

/// A group of `blocks` blocks. Its chunks are in a slab, unless `slab` is 0.
fn new_group(blocks: usize, slab: usize) -> *mut Block {
    let group: Box<[Block]> = (0..blocks).map(|_| Block::new()).collect();
    if slab != 0 {
        let places = group.iter().flat_map(Block::chunks);
        for (place, chunk) in places.zip(slab::allocate(slab)) {
            // Relaxed: published with the group.
            place.store(chunk.cast(), Ordering::Relaxed);
        }
    }
    Box::into_raw(group).cast()
}

/// Frees a group and its chunks.
fn free_group(first: *mut Block, blocks: usize, slab: usize) {
    let group = ptr::slice_from_raw_parts_mut(first, blocks);
    // SAFETY: made by `Box::into_raw` of so many blocks in `new_group`; the caller has the only
    // reference left.
    let group = unsafe { Box::from_raw(group) };
    // Relaxed: as above, exclusive access.
    let mut chunks = group
        .iter()
        .flat_map(Block::chunks)
        .map(|chunk| chunk.load(Ordering::Relaxed).cast::<Chunk>());
    if slab == 0 {
        chunks.filter(|chunk| !chunk.is_null()).for_each(free_chunk);
    } else if let Some(first) = chunks.next() {
        // SAFETY: the first chunk of the slab that `new_group` has allocated, of that many chunks;
        // nothing refers to it any more.
        unsafe { slab::free(first, slab) };
    }
}

/// The place of `group` in its directory of `level` (0 = the one that points to groups).
#[inline]
fn place_in(group: u64, level: u32) -> usize {
    (group >> (level * FANOUT_LG2)) as usize & ((1 << FANOUT_LG2) - 1)
}

/// The first group after the subtree of `level` levels that holds `group`; `None` past the end of
/// all indices.
#[inline]
fn next_subtree(group: u64, level: u32) -> Option<u64> {
    let lg2 = level * FANOUT_LG2;
    if lg2 >= 64 {
        return None;
    }
    ((group >> lg2) + 1).checked_mul(1 << lg2)
}

/// The object that `place` points to; made by `new` and installed if the pointer is null. If
/// another thread installs first, `free` drops our copy.
#[inline]
fn get_or_install<T>(
    place: &AtomicPtr<()>,
    new: impl FnOnce() -> *mut T,
    free: impl FnOnce(*mut T),
) -> *mut T {
    // Acquire: pairs with the Release in `install`; publishes the contents.
    let mut pointer = place.load(Ordering::Acquire);
    if pointer.is_null() {
        pointer = install(place, new, free);
    }
    pointer.cast()
}

/// What is made takes no room on the stack of the caller, which rarely comes here.
#[cold]
#[inline(never)]
fn install<T>(
    place: &AtomicPtr<()>,
    new: impl FnOnce() -> *mut T,
    free: impl FnOnce(*mut T),
) -> *mut () {
    let fresh = new();
    // Release on success: publishes the fresh contents. Acquire on failure: we use the winner's
    // contents.
    match place.compare_exchange(
        ptr::null_mut(),
        fresh.cast(),
        weaken(Step::PublishChunk, Ordering::Release),
        Ordering::Acquire,
    ) {
        Ok(_) => fresh.cast(),
        Err(winner) => {
            free(fresh);
            winner
        }
    }
}

// SAFETY: the raw pointers name directories, blocks and chunks of atomics that the map owns,
// installed and read as above.
unsafe impl Send for ChunkMap {}
// SAFETY: as for `Send`: all shared access goes through atomics.
unsafe impl Sync for ChunkMap {}
// SAFETY: it names blocks of atomics, and is read only by `set_near`, whose caller keeps the map
// alive.
unsafe impl Send for OneGroup {}
// SAFETY: as for `Send`.
unsafe impl Sync for OneGroup {}
