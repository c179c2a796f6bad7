//! A sparse concurrent bitmap: 4 KiB chunks, allocated at their first bit.
//!
//! ```text
//!  root --> directory --> directory --> group --> chunk
//!           only where the chunks are more than one group may have
//! ```
//!
//! A [`group`](super::group) holds [`chunk`](super::chunk)s. A bitmap of up to 8192 chunks (1 TiB
//! of 4 KiB pages) is one group. A larger one has groups of 512 chunks under a radix tree of fixed
//! depth. So a bitmap for 2^63 bytes costs nothing before its first bit. All of these are installed
//! by compare-exchange and live as long as the bitmap: a reference to a word never goes stale.
//!
//! In a bitmap *in slabs* the chunks of a group lie side by side in one [`slab`](super::slab),
//! whose memory the system provides when it is touched. So the address of a word follows from that
//! of the group, without a pointer in between.

use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use super::chunk::{CHUNK_BITS, Chunk, LINE_BITS, Slot, WORDS_LG2};
use super::few::List;
use super::group::{BLOCK_LG2, Bits, Group, free_chunk, free_lists, new_chunk, new_lists};
use super::take::{Taker, Visitor};
use crate::sync::{AtomicPtr, AtomicU64, Ordering, Step, TINY, weaken};
use crate::words::word_mask;

/// Pointers of a directory, as a logarithm.
const FANOUT_LG2: u32 = if TINY { 1 } else { 9 };
/// The most chunks of a bitmap of one group, as a logarithm.
const ONE_GROUP_LG2: u32 = if TINY { 1 } else { 13 };
/// Bytes of a unit of memory that is counted.
const UNIT: usize = if TINY { 1 << 4 } else { 1 << 10 };
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
    levels: u8,
    /// Whether the chunks of a group are in a slab.
    in_slabs: bool,
    /// The highest bit.
    pub(super) last: u64,
    /// The [units](UNIT) of the chunks that were allocated one by one, and of lists; it stops at
    /// 2^32, which are 4 TiB. It is a count of std: it orders nothing, and need not cost a model
    /// checker anything.
    held: std::sync::atomic::AtomicU32,
    owns: PhantomData<Box<Directory>>,
}

/// The one group of a bitmap; valid while the bitmap lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OneGroup {
    /// The first summary.
    summaries: NonNull<AtomicU64>,
    /// The first word of the slab.
    slab: NonNull<AtomicU64>,
}

impl OneGroup {
    /// As [`ChunkMap::set`], of one bit.
    ///
    /// # Safety
    /// The bitmap lives, and `bit` is no higher than its highest bit.
    #[inline(always)]
    pub(crate) unsafe fn set(self, bit: u64, fence: impl FnOnce()) {
        // SAFETY: the bitmap lives, by the caller, and has a summary for each bit.
        let summary = unsafe { self.summaries.add((bit >> BITS_LG2) as usize) };
        // SAFETY: as above.
        let summary = unsafe { summary.as_ref() };
        // SAFETY: the slab has a word for each bit of the bitmap, and lives as long as its group.
        let word = unsafe { self.slab.add((bit >> 6) as usize) };
        // SAFETY: as above.
        let word = unsafe { word.as_ref() };
        // A mask of one bit is tested by one instruction.
        Slot::set_word(summary, word, bit, 1 << (bit % 64), fence);
    }
}

impl ChunkMap {
    /// An empty bitmap of the bits 0 to `last`. Allocates nothing.
    pub(crate) fn new(last: u64) -> Self {
        Self::with(last, false)
    }

    /// As [`new`](Self::new), in slabs: 4 KiB of address space for each chunk of a group from its
    /// first bit on.
    pub(crate) fn in_slabs(last: u64) -> Self {
        // The atomics of the model checker are not made of zeros.
        Self::with(last, !TINY)
    }

    fn with(last: u64, in_slabs: bool) -> Self {
        let last_chunk = last >> BITS_LG2;
        let group_lg2 = match last_chunk >> ONE_GROUP_LG2 {
            0 => ONE_GROUP_LG2,
            _ => FANOUT_LG2,
        };
        let last_group = last_chunk >> group_lg2;
        let mut levels = 0;
        while levels * FANOUT_LG2 < 64 && last_group >> (levels * FANOUT_LG2) != 0 {
            levels += 1;
        }
        ChunkMap {
            root: AtomicPtr::new(ptr::null_mut()),
            levels: levels as u8,
            in_slabs,
            last,
            held: std::sync::atomic::AtomicU32::new(0),
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
            let (slot, chunk) = self.slot_or_new(first >> BITS_LG2);
            return set_word(slot, chunk, first, last, fence);
        }
        fence();
        self.set_words(first, last)
    }

    /// As [`set`](Self::set), of several words; the fence came before.
    #[inline(never)]
    fn set_words(&self, first: u64, last: u64) -> bool {
        let (from, to) = (first >> BITS_LG2, last >> BITS_LG2);
        if from == to {
            let (group, nth) = self.place_of(from);
            return self.set_in(self.group_or_new(group), nth, first, last);
        }
        // The group of a chunk is looked up once for all of its chunks.
        let in_group = (1 << self.group_lg2()) - 1;
        let mut anew = false;
        for group in from >> self.group_lg2()..=to >> self.group_lg2() {
            let chunks = self.group_or_new(group);
            let base = group << self.group_lg2();
            for index in from.max(base)..=to.min(base | in_group) {
                let (low, high) = (index << BITS_LG2, index << BITS_LG2 | (CHUNK_BITS - 1));
                anew |= self.set_in(chunks, index - base, first.max(low), last.min(high));
            }
        }
        anew
    }

    /// Sets the bits `first..=last` of the chunk `nth` of `group`; the fence came before.
    #[inline]
    fn set_in(&self, group: &Group, nth: u64, first: u64, last: u64) -> bool {
        let slot = group.slot(nth);
        if last - first == CHUNK_BITS - 1 {
            // The chunks of a slab exist.
            if !self.in_slabs {
                self.chunk_of(group, nth);
            }
            return slot.set_whole();
        }
        let chunk = self.chunk_of(group, nth);
        slot.set_range(chunk, first % CHUNK_BITS, last % CHUNK_BITS)
    }

    /// The group of a bitmap of one group, in slabs. `None` for any other bitmap.
    pub(crate) fn one_group(&self) -> Option<OneGroup> {
        if self.levels != 0 || !self.in_slabs {
            return None;
        }
        let (summaries, slab) = self.group_or_new(0).near()?;
        Some(OneGroup { summaries, slab })
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
        while let Some((base, group)) = next.and_then(|next| self.next_group(next, last_chunk)) {
            let from = (first >> BITS_LG2).max(base);
            let to = last_chunk.min(base + group.len() - 1);
            let (low, high) = ((from - base) >> BLOCK_LG2, (to - base) >> BLOCK_LG2);
            // The next block that has bits, from the one of this number on. Its lines are asked for
            // before those of the last one are taken.
            let next_dirty = |nth: u64, visitor: &V| {
                let nth = group.next_dirty(nth as usize, high as usize)?;
                let start = (base + ((nth as u64) << BLOCK_LG2)) << BITS_LG2;
                group.prefetch_dirty(nth, |chunk, lines| {
                    let first = start + (chunk << BITS_LG2);
                    visitor.ahead(first, lines);
                    visitor.place(first, CHUNK_WORDS)
                });
                Some(nth as u64)
            };
            let mut dirty = next_dirty(low, visitor);
            while let Some(nth) = dirty {
                dirty = next_dirty(nth + 1, visitor);
                let start = base + (nth << BLOCK_LG2);
                for index in from.max(start)..=to.min(start + ((1 << BLOCK_LG2) - 1)) {
                    let Some(chunk) = group.bits(index - base).get() else {
                        continue;
                    };
                    let slot = group.slot(index - base);
                    let base = index << BITS_LG2;
                    let high = (last - base).min((1 << BITS_LG2) - 1);
                    each(visitor, slot, chunk, base, first.saturating_sub(base), high)?;
                }
            }
            next = to.checked_add(1).filter(|next| *next <= last_chunk);
        }
        Ok(())
    }

    /// Prefetches `lines` of chunk `index`, if it exists.
    pub(crate) fn prefetch(&self, index: u64, lines: u64) {
        if let Some((base, group)) = self.next_group(index, index) {
            group.prefetch(index - base, lines);
        }
    }

    /// The words of chunk `index`, allocated if it does not exist yet.
    pub(crate) fn words_or_new(&self, index: u64) -> &[AtomicU64] {
        &self.slot_or_new(index).1.0
    }

    /// The first chunk from `index` to `last` that exists: its index and its words.
    pub(crate) fn next_words(&self, index: u64, last: u64) -> Option<(u64, &[AtomicU64])> {
        let mut next = Some(index);
        while let Some((base, group)) = next.and_then(|next| self.next_group(next, last)) {
            let to = last.min(base + group.len() - 1);
            for index in index.max(base)..=to {
                if let Some(chunk) = group.bits(index - base).get() {
                    return Some((index, &chunk.0));
                }
            }
            next = to.checked_add(1).filter(|next| *next <= last);
        }
        None
    }

    /// The first group that exists among those of the chunks `index..=last`: its first chunk, and
    /// the group. Whole absent subtrees are skipped at once.
    fn next_group(&self, mut index: u64, last: u64) -> Option<(u64, &Group)> {
        'group: while index <= last {
            // Acquire: pairs with the Release in `install`; publishes the contents of what the
            // pointer names.
            let mut pointer = self.root.load(Ordering::Acquire);
            let group = index >> self.group_lg2();
            for level in (0..u32::from(self.levels)).rev() {
                if pointer.is_null() {
                    index = next_subtree(group, level + 1)?.checked_mul(1 << self.group_lg2())?;
                    continue 'group;
                }
                // SAFETY: non-null pointers of this level name a `Directory` that lives as long as
                // `self`.
                let directory = unsafe { &*pointer.cast::<Directory>() };
                // Acquire: as above.
                pointer = directory.0[place_in(group, level)].load(Ordering::Acquire);
            }
            if pointer.is_null() {
                index = (group + 1).checked_mul(1 << self.group_lg2())?;
                continue;
            }
            // SAFETY: non-null pointers below the last directory name a `Group` that lives as long
            // as `self`.
            let found = unsafe { &*pointer.cast::<Group>() };
            return Some((group << self.group_lg2(), found));
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
            && let Some((base, group)) = self.next_group(index, last)
        {
            let to = last.min(base + group.len() - 1);
            for index in index.max(base)..=to {
                if let Some(chunk) = group.bits(index - base).get() {
                    #[cfg(test)]
                    crate::compared::one();
                    each(group.slot(index - base), chunk, index << BITS_LG2)?;
                }
            }
            next = to.checked_add(1).filter(|next| *next <= last);
        }
        Ok(())
    }

    /// The list of chunk `index`, if it was allocated.
    pub(super) fn list(&self, index: u64) -> Option<&List> {
        let (base, group) = self.next_group(index, index)?;
        group.list(index - base)
    }

    /// The list of chunk `index`, allocated with those of its block if it does not exist yet.
    pub(super) fn list_or_new(&self, index: u64) -> &List {
        let (group, nth) = self.place_of(index);
        let place = self.group_or_new(group).lists_of(nth);
        let lists = self.counted(place, new_lists, free_lists);
        // SAFETY: a pointer of a group names `Lists` that live as long as the bitmap.
        unsafe { &*lists }.of(nth)
    }

    /// The place and the bits of chunk `index`, allocated if it does not exist yet.
    #[inline]
    pub(super) fn slot_or_new(&self, index: u64) -> (Slot<'_>, &Chunk) {
        let (group, nth) = self.place_of(index);
        let group = self.group_or_new(group);
        (group.slot(nth), self.chunk_of(group, nth))
    }

    /// The group of chunk `index`, and its place in the group.
    #[inline]
    fn place_of(&self, index: u64) -> (u64, u64) {
        match self.levels {
            0 => (0, index),
            _ => (
                index >> self.group_lg2(),
                index & ((1 << self.group_lg2()) - 1),
            ),
        }
    }

    /// Chunks of a group, as a logarithm.
    #[inline]
    fn group_lg2(&self) -> u32 {
        match self.levels {
            0 => ONE_GROUP_LG2,
            _ => FANOUT_LG2,
        }
    }

    /// How many chunks each group has.
    fn chunks_of_a_group(&self) -> usize {
        match self.levels {
            0 => (self.last >> BITS_LG2) as usize + 1,
            _ => 1 << self.group_lg2(),
        }
    }

    /// The chunk `nth` of `group`, one of this bitmap; allocated if it does not exist yet.
    #[inline]
    fn chunk_of<'m>(&'m self, group: &'m Group, nth: u64) -> &'m Chunk {
        let pointer = match group.bits(nth) {
            Bits::Here(chunk) => return chunk,
            Bits::Pointer(pointer) => pointer,
        };
        let chunk = self.counted(pointer, new_chunk, free_chunk);
        // SAFETY: a pointer of a group names a `Chunk` that lives as long as the bitmap.
        unsafe { &*chunk }
    }

    /// As [`get_or_install`], with a count of the bytes.
    #[inline]
    fn counted<T>(
        &self,
        place: &AtomicPtr<()>,
        new: impl FnOnce() -> *mut T,
        free: impl FnOnce(*mut T),
    ) -> *mut T {
        const { assert!(size_of::<T>().is_multiple_of(UNIT)) };
        let units = (size_of::<T>() / UNIT) as u32;
        let count = |next: &dyn Fn(u32) -> Option<u32>| {
            // Relaxed, both: a statistic. It fails at the bound, and stays there.
            let order = std::sync::atomic::Ordering::Relaxed;
            let _ = self.held.fetch_update(order, order, next);
        };
        get_or_install(
            place,
            || {
                count(&|held| held.checked_add(units));
                new()
            },
            |fresh| {
                count(&|held| held.checked_sub(units));
                free(fresh);
            },
        )
    }

    /// The bytes of the chunks that were allocated one by one, and of lists.
    pub(crate) fn held_bytes(&self) -> u64 {
        // Relaxed: a statistic.
        let held = self.held.load(std::sync::atomic::Ordering::Relaxed);
        u64::from(held) * UNIT as u64
    }

    #[inline]
    fn group_or_new(&self, group: u64) -> &Group {
        let place = match self.levels {
            0 => &self.root,
            _ => self.place_or_new(group),
        };
        let group = get_or_install(
            place,
            || {
                Box::into_raw(Box::new(Group::new(
                    self.chunks_of_a_group(),
                    self.in_slabs,
                )))
            },
            free_group,
        );
        // SAFETY: below the last directory a pointer names a `Group` that lives as long as `self`.
        unsafe { &*group }
    }

    /// The place of the pointer to `group`, below directories that are allocated if they do not
    /// exist yet.
    #[inline(never)]
    fn place_or_new(&self, group: u64) -> &AtomicPtr<()> {
        let mut place = &self.root;
        for level in (0..u32::from(self.levels)).rev() {
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
            free_group(pointer.cast());
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
        self.free(self.root.load(Ordering::Relaxed), self.levels.into());
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
    Slot::set_word(slot.summary, &chunk.0[index], first, mask, fence)
}

fn free_directory(directory: *mut Directory) {
    // SAFETY: made by `Box::into_raw` in `group_or_new`; the caller has the only reference left.
    drop(unsafe { Box::from_raw(directory) });
}

fn free_group(group: *mut Group) {
    // SAFETY: made by `Box::into_raw` in `group_or_new`; the caller has the only reference left.
    drop(unsafe { Box::from_raw(group) });
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

// SAFETY: the raw pointers name directories, groups and chunks of atomics that the map owns,
// installed and read as above.
unsafe impl Send for ChunkMap {}
// SAFETY: as for `Send`: all shared access goes through atomics.
unsafe impl Sync for ChunkMap {}
// SAFETY: it names atomics of a group, and is read only by `set`, whose caller keeps the map
// alive.
unsafe impl Send for OneGroup {}
// SAFETY: as for `Send`.
unsafe impl Sync for OneGroup {}
