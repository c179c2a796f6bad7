//! A sparse concurrent bitmap: 4 KiB chunks, allocated at their first bit, under a radix tree of fixed depth.
//!
//! The depth follows from the number of bits, so that a bitmap for 64 GiB of 4 KiB pages is one directory of
//! pointers to chunks and one for 2^63 bytes costs nothing before its first bit. Directories and chunks are
//! installed by compare-exchange and live as long as the bitmap: a reference to a word never goes stale.

use std::marker::PhantomData;
use std::ptr;

use super::word_mask;
use crate::sync::{AtomicPtr, AtomicU64, Ordering};

/// Words of a chunk, as a logarithm; tiny in the model checker, so that models reach every border.
const WORDS_LG2: u32 = if cfg!(dirtymap_loom) { 1 } else { 9 };
/// Pointers of a directory, as a logarithm.
const FANOUT_LG2: u32 = if cfg!(dirtymap_loom) { 1 } else { 9 };
/// Words of a chunk.
pub(super) const CHUNK_WORDS: u64 = 1 << WORDS_LG2;
/// Bits of a chunk, as a logarithm.
const BITS_LG2: u32 = WORDS_LG2 + 6;

/// One page of bitmap.
#[repr(align(64))]
struct Chunk([AtomicU64; 1 << WORDS_LG2]);

impl Chunk {
    /// See [`ChunkMap::visit`]; bits count from the start of the chunk. A line of clean words costs eight loads.
    fn visit<E>(
        &self,
        first: u64,
        last: u64,
        mut visit: impl FnMut(u64, u64) -> Result<bool, E>,
    ) -> Result<(), E> {
        let (from, to) = ((first / 64) as usize, (last / 64) as usize);
        for (line, words) in self.0[from..=to].chunks(8).enumerate() {
            // Relaxed, here and below: only decides whether to look closer; what is found is taken by the fetch_and.
            let any = words
                .iter()
                .fold(0, |any, word| any | word.load(Ordering::Relaxed));
            if any == 0 {
                continue;
            }
            for (nth, word) in words.iter().enumerate() {
                let bit = (from + line * 8 + nth) as u64 * 64;
                let mask = word_mask(
                    first.saturating_sub(bit) as u32,
                    (last - bit).min(63) as u32,
                );
                let seen = word.load(Ordering::Relaxed) & mask;
                if seen != 0 && visit(bit, seen)? {
                    // Acquire: pairs with the Release of `set`; Release: a marker that sees the bit gone sees what the
                    // visit did. Clears what was visited and no more: a bit set in between stays for the next harvest.
                    word.fetch_and(!seen, Ordering::AcqRel);
                }
            }
        }
        Ok(())
    }
}

/// Pointers to directories or, in the lowest level, chunks.
struct Directory([AtomicPtr<()>; 1 << FANOUT_LG2]);

/// See the [module](self).
pub(crate) struct ChunkMap {
    /// A chunk if `levels` is 0, else a directory whose subtree has `levels - 1` more levels of directories.
    root: AtomicPtr<()>,
    levels: u32,
    /// The highest bit.
    last: u64,
    owns: PhantomData<Box<Directory>>,
}

impl ChunkMap {
    /// An empty bitmap of the bits 0 to `last`. Allocates nothing.
    pub(crate) fn new(last: u64) -> Self {
        let mut levels = 0;
        while BITS_LG2 + levels * FANOUT_LG2 < 64 && last >> (BITS_LG2 + levels * FANOUT_LG2) != 0 {
            levels += 1;
        }
        ChunkMap {
            root: AtomicPtr::new(ptr::null_mut()),
            levels,
            last,
            owns: PhantomData,
        }
    }

    /// Sets the bits `first..=last`; a word whose bits are all set already costs a load and no write. `fence` is called once, when
    /// the first word is found and before it is looked at: it orders the caller's data write before the look, see
    /// [`marks`](crate::source). Returns whether it had to write.
    #[inline]
    pub(crate) fn set(&self, first: u64, last: u64, fence: impl FnOnce()) -> bool {
        debug_assert!(first <= last && last <= self.last);
        let index = first / 64;
        if index == last / 64 {
            // Most marks. The word is found before the fence, so that the fence and the walk to the word overlap.
            let word = self.word_or_new(index);
            fence();
            return set_word(word, word_mask((first % 64) as u32, (last % 64) as u32));
        }
        fence();
        self.set_words(first, last)
    }

    fn set_words(&self, first: u64, last: u64) -> bool {
        let mut anew = false;
        let (mut index, last_index) = (first / 64, last / 64);
        while index <= last_index {
            // One walk for each chunk.
            let chunk = self.chunk_or_new(index >> WORDS_LG2);
            let from = index & (CHUNK_WORDS - 1);
            let to = (last_index - index + from).min(CHUNK_WORDS - 1);
            for (nth, word) in (index..).zip(&chunk.0[from as usize..=to as usize]) {
                let low = if nth == first / 64 { first % 64 } else { 0 };
                let high = if nth == last_index { last % 64 } else { 63 };
                anew |= set_word(word, word_mask(low as u32, high as u32));
            }
            let Some(next) = (index - from).checked_add(CHUNK_WORDS) else {
                break;
            };
            index = next;
        }
        anew
    }

    #[inline]
    fn word_or_new(&self, index: u64) -> &AtomicU64 {
        &self.chunk_or_new(index >> WORDS_LG2).0[(index & (CHUNK_WORDS - 1)) as usize]
    }

    /// Calls `visit` for each word that has bits of `first..=last` set, with the word's first bit and those bits,
    /// in order. If `visit` returns true the bits are cleared after the call, otherwise they stay.
    ///
    /// # Errors
    /// Those of `visit`; the bits of that word and of the words behind it stay.
    pub(crate) fn visit<E>(
        &self,
        first: u64,
        last: u64,
        mut visit: impl FnMut(u64, u64) -> Result<bool, E>,
    ) -> Result<(), E> {
        let mut from = first;
        while let Some((chunk_index, chunk)) = self.next_chunk(from >> BITS_LG2, last >> BITS_LG2) {
            let base = chunk_index << BITS_LG2;
            let to = last.min(base + ((1 << BITS_LG2) - 1));
            chunk.visit(from.max(base) - base, to - base, |bit, seen| {
                visit(base + bit, seen)
            })?;
            if to >= last {
                break;
            }
            from = to + 1;
        }
        Ok(())
    }

    /// The words of chunk `index`, allocated if it does not exist yet.
    pub(super) fn words_or_new(&self, index: u64) -> &[AtomicU64] {
        &self.chunk_or_new(index).0
    }

    /// The first chunk from `index` to `last` that exists: its index and its words.
    pub(super) fn next_words(&self, index: u64, last: u64) -> Option<(u64, &[AtomicU64])> {
        let (index, chunk) = self.next_chunk(index, last)?;
        Some((index, &chunk.0))
    }

    /// The first chunk from `index` to `last` that exists, with its index; whole absent subtrees are skipped at once.
    fn next_chunk(&self, mut index: u64, last: u64) -> Option<(u64, &Chunk)> {
        'chunk: while index <= last {
            // Acquire: pairs with the Release in `get_or_install`; publishes the contents of what the pointer names.
            let mut pointer = self.root.load(Ordering::Acquire);
            for level in (0..self.levels).rev() {
                if pointer.is_null() {
                    index = next_subtree(index, level + 1)?;
                    continue 'chunk;
                }
                // SAFETY: non-null pointers of this level name a `Directory` that lives as long as `self`.
                let directory = unsafe { &*pointer.cast::<Directory>() };
                // Acquire: as above.
                pointer = directory.0[slot(index, level)].load(Ordering::Acquire);
            }
            if pointer.is_null() {
                index = next_subtree(index, 0)?;
                continue;
            }
            // SAFETY: non-null pointers below the last directory name a `Chunk` that lives as long as `self`.
            return Some((index, unsafe { &*pointer.cast::<Chunk>() }));
        }
        None
    }

    /// The chunk `index`, allocated if it does not exist yet.
    #[inline]
    fn chunk_or_new(&self, index: u64) -> &Chunk {
        let mut place = &self.root;
        for level in (0..self.levels).rev() {
            let directory = get_or_install(place, || {
                Directory(std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())))
            });
            place = &directory.0[slot(index, level)];
        }
        get_or_install(place, || Chunk(std::array::from_fn(|_| AtomicU64::new(0))))
    }

    /// Frees the subtree under `pointer`, which has `levels` levels of directories.
    fn free(pointer: *mut (), levels: u32) {
        if pointer.is_null() {
            return;
        }
        if levels == 0 {
            // SAFETY: made by `Box::into_raw` of a `Chunk` in `get_or_install`; `drop` has the only reference left.
            drop(unsafe { Box::from_raw(pointer.cast::<Chunk>()) });
        } else {
            // SAFETY: as above, of a `Directory`.
            let directory = unsafe { Box::from_raw(pointer.cast::<Directory>()) };
            for child in &directory.0 {
                // Relaxed: `drop` has exclusive access.
                Self::free(child.load(Ordering::Relaxed), levels - 1);
            }
        }
    }
}

impl Drop for ChunkMap {
    fn drop(&mut self) {
        // Relaxed: exclusive access.
        Self::free(self.root.load(Ordering::Relaxed), self.levels);
    }
}

impl std::fmt::Debug for ChunkMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkMap")
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

/// Sets the bits of `mask` if one of them is clear; whether it was.
#[inline]
fn set_word(word: &AtomicU64, mask: u64) -> bool {
    // Relaxed: the caller's full fence orders this load after its data write; see `source::marks`.
    let anew = word.load(Ordering::Relaxed) & mask != mask;
    if anew {
        // Release: pairs with the Acquire in `visit`; publishes the data that the mark speaks of.
        word.fetch_or(mask, Ordering::Release);
    }
    anew
}

/// The place of chunk `index` in its directory of `level` (0 = the one that points to chunks).
#[inline]
fn slot(index: u64, level: u32) -> usize {
    (index >> (level * FANOUT_LG2)) as usize & ((1 << FANOUT_LG2) - 1)
}

/// The first chunk behind the subtree of `level` levels that holds `index`; `None` past the end of all indices.
#[inline]
fn next_subtree(index: u64, level: u32) -> Option<u64> {
    let lg2 = level * FANOUT_LG2;
    if lg2 >= 64 {
        return None;
    }
    ((index >> lg2) + 1).checked_mul(1 << lg2)
}

/// What `place` points to; allocated by `new` and installed if it is null.
#[inline]
fn get_or_install<T>(place: &AtomicPtr<()>, new: impl FnOnce() -> T) -> &T {
    // Acquire: pairs with the Release in `install`; publishes the contents.
    let mut pointer = place.load(Ordering::Acquire);
    if pointer.is_null() {
        pointer = install(place, new);
    }
    // SAFETY: every pointer installed in `place` names a `T` (a level holds one type) that is freed only when the
    // map is dropped, and `place` borrows from the map.
    unsafe { &*pointer.cast::<T>() }
}

#[cold]
fn install<T>(place: &AtomicPtr<()>, new: impl FnOnce() -> T) -> *mut () {
    let fresh = Box::into_raw(Box::new(new())).cast::<()>();
    // Release on success: publishes the fresh contents. Acquire on failure: we use the winner's contents.
    match place.compare_exchange(ptr::null_mut(), fresh, Ordering::Release, Ordering::Acquire) {
        Ok(_) => fresh,
        Err(winner) => {
            // SAFETY: `fresh` came from `Box::into_raw` above and was not published.
            drop(unsafe { Box::from_raw(fresh.cast::<T>()) });
            winner
        }
    }
}

// SAFETY: the raw pointers name directories and chunks of atomics that the map owns, installed and read as above.
unsafe impl Send for ChunkMap {}
// SAFETY: as for `Send`: all shared access goes through atomics.
unsafe impl Sync for ChunkMap {}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::convert::Infallible;

    fn bits(map: &ChunkMap, first: u64, last: u64, clear: bool) -> Vec<u64> {
        let mut out = vec![];
        let done: Result<(), Infallible> = map.visit(first, last, |base, seen| {
            out.extend((0..64).filter(|b| seen >> b & 1 == 1).map(|b| base + b));
            Ok(clear)
        });
        done.unwrap();
        out
    }

    #[test]
    fn agrees_with_a_set_of_bits_at_every_depth() {
        for lg2 in [3u32, 14, 15, 16, 24, 25, 40, 52, 63] {
            let size = 1u64 << lg2;
            let map = ChunkMap::new(size - 1);
            let mut model = BTreeSet::new();
            let mut x = 88172645463325252u64;
            for _ in 0..200 {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                let first = (x >> 1) % size;
                let last = (first + x % 97).min(size - 1);
                map.set(first, last, || ());
                model.extend(first..=last);
                let (a, b) = (first.saturating_sub(40), (last + 17).min(size - 1));
                assert_eq!(
                    bits(&map, a, b, false),
                    model.range(a..=b).copied().collect::<Vec<_>>()
                );
                if x.is_multiple_of(3) {
                    bits(&map, a, b, true);
                    model.retain(|m| !(a..=b).contains(m));
                }
            }
            assert_eq!(
                bits(&map, 0, size - 1, false),
                model.iter().copied().collect::<Vec<_>>()
            );
            assert_eq!(
                bits(&map, 0, size - 1, false).len() as u64,
                model.len() as u64
            );
        }
    }

    #[test]
    fn the_last_bit_of_the_largest_map() {
        let map = ChunkMap::new(u64::MAX);
        map.set(u64::MAX - 64, u64::MAX, || ());
        assert_eq!(bits(&map, 0, u64::MAX, false).len() as u64, 65);
        assert_eq!(bits(&map, 5, u64::MAX, true).last(), Some(&u64::MAX));
        assert_eq!(bits(&map, 0, u64::MAX, false).len() as u64, 0);
    }

    #[test]
    fn an_error_leaves_the_bits() {
        let map = ChunkMap::new((1 << 20) - 1);
        map.set(10, 10, || ());
        map.set(700_000, 700_001, || ());
        let stopped = map.visit(0, (1 << 20) - 1, |base, _| {
            if base > 64 { Err(base) } else { Ok(true) }
        });
        assert_eq!(stopped, Err(699_968));
        assert_eq!(bits(&map, 0, (1 << 20) - 1, false), [700_000, 700_001]);
    }
}
