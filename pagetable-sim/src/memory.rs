//! Simulated physical memory: bytes that devices write while others copy them.
//!
//! A harvester copies pages while devices write them, so every access is atomic: memory is an array
//! of 64-bit words, little endian, accessed by relaxed loads and stores. A write that covers a word
//! only in part merges its bytes into the word by compare-exchange, so that two devices writing the
//! two halves of a word never undo each other. Mixing access sizes on one location would be
//! undefined; there is only one size.
//!
//! Bytes of different words become visible in any order, as on a real bus. The invalidation orders
//! them: it returns after the device has landed its posted writes and has said so with Release.

use dirtymap::sync::{AtomicU64, Ordering};

use crate::error::Error;

const WORD: usize = size_of::<u64>();

/// Simulated physical memory, zeroed at the start. Physical addresses are byte offsets into it.
///
/// A page costs host memory from its first write on, so a large sparse memory is cheap. All methods
/// take `&self` and may be called by many threads at once, on the same bytes too; bytes written by
/// one call while another one reads them are seen old or new, each word as a whole.
///
/// ```
/// use pagetable_sim::PhysMemory;
///
/// let memory = PhysMemory::new(1 << 40)?; // a terabyte, of which one page is touched
/// memory.write(0x1_0000_0ffe, b"data")?;
/// let mut back = [0; 6];
/// memory.read(0x1_0000_0ffc, &mut back)?;
/// assert_eq!(&back, b"\0\0data");
/// assert!(memory.write((1 << 40) - 1, b"no").is_err());
/// # Ok::<(), pagetable_sim::Error>(())
/// ```
pub struct PhysMemory {
    words: Words,
    len: u64,
}

impl PhysMemory {
    /// A zeroed memory of `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if the host does not give that much address space.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        let words = usize::try_from(bytes.div_ceil(WORD as u64))
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::OutOfMemory))
            .and_then(Words::zeroed)
            .map_err(|cause| Error::NoMemory { bytes, cause })?;
        Ok(PhysMemory { words, len: bytes })
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the memory has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes `bytes` from `phys` on. The stores are Relaxed: a thread that must see the bytes
    /// needs an order of its own.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if any byte lies outside; then nothing was written.
    pub fn write(&self, phys: u64, bytes: &[u8]) -> Result<(), Error> {
        let (mut words, lead) = self.words_from(phys, bytes.len())?;
        let mut rest = bytes;
        if lead != 0
            && let [first, others @ ..] = words
        {
            let (head, tail) = rest.split_at(rest.len().min(WORD - lead));
            merge(first, lead, head);
            (rest, words) = (tail, others);
        }
        let (whole, tail) = rest.as_chunks::<WORD>();
        for (word, bytes) in words.iter().zip(whole) {
            // Relaxed: memory has no order of its own; see the module's documentation.
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        if let Some(last) = words.get(whole.len()) {
            merge(last, 0, tail);
        }
        Ok(())
    }

    /// Reads the bytes from `phys` on into `bytes`. Relaxed, as [`write`](Self::write).
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if any byte lies outside; then nothing was read.
    pub fn read(&self, phys: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let (mut words, lead) = self.words_from(phys, bytes.len())?;
        let mut rest = bytes;
        if lead != 0
            && let [first, others @ ..] = words
        {
            let (head, tail) = rest.split_at_mut(rest.len().min(WORD - lead));
            // Relaxed: as in `write`.
            let word = first.load(Ordering::Relaxed).to_le_bytes();
            head.copy_from_slice(&word[lead..lead + head.len()]);
            (rest, words) = (tail, others);
        }
        let (whole, tail) = rest.as_chunks_mut::<WORD>();
        let wholes = whole.len();
        for (word, bytes) in words.iter().zip(whole) {
            // Relaxed: as in `write`.
            *bytes = word.load(Ordering::Relaxed).to_le_bytes();
        }
        if let Some(last) = words.get(wholes)
            && !tail.is_empty()
        {
            // Relaxed: as in `write`.
            let word = last.load(Ordering::Relaxed).to_le_bytes();
            tail.copy_from_slice(&word[..tail.len()]);
        }
        Ok(())
    }

    /// Replaces the number at `phys` by the result of `change`, in one step; returns the old
    /// number. `change` may be called several times. Relaxed, as [`write`](Self::write).
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if any byte lies outside, or `phys` is not a multiple of the size;
    /// then nothing was changed.
    pub(crate) fn update<T: Word>(&self, phys: u64, change: impl Fn(T) -> T) -> Result<T, Error> {
        let len = size_of::<T>();
        let (words, lead) = self.words_from(phys, len)?;
        let word = words.first().filter(|_| lead % len == 0);
        let word = word.ok_or(Error::OutsideMemory {
            phys,
            len: len as u64,
            limit: self.len,
        })?;
        let shift = 8 * lead as u32;
        // Relaxed: a first guess; the compare-exchange decides.
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            let old = T::from_word(seen >> shift);
            let kept = seen & !(T::MASK << shift);
            let new = kept | change(old).into_word() << shift;
            // Relaxed, both: as in `merge`.
            match word.compare_exchange_weak(seen, new, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(old),
                Err(now) => seen = now,
            }
        }
    }

    /// The words from the one that holds `phys` on, and the place of `phys` in it, if `len` bytes
    /// from there lie inside.
    #[inline]
    fn words_from(&self, phys: u64, len: usize) -> Result<(&[AtomicU64], usize), Error> {
        self.check(phys, len as u64)?;
        let first = (phys / WORD as u64) as usize;
        let lead = (phys % WORD as u64) as usize;
        Ok((self.words.all().get(first..).unwrap_or(&[]), lead))
    }

    /// Whether `len` bytes from `phys` on lie inside.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] otherwise.
    #[inline]
    pub fn check(&self, phys: u64, len: u64) -> Result<(), Error> {
        if phys > self.len || len > self.len - phys {
            return Err(Error::OutsideMemory {
                phys,
                len,
                limit: self.len,
            });
        }
        Ok(())
    }
}

impl std::fmt::Debug for PhysMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PhysMemory")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A number that lies inside one word of memory, if it is aligned.
pub trait Word: Copy + Default + PartialEq {
    /// The bits that it fills, as the lowest ones.
    #[doc(hidden)]
    const MASK: u64;
    #[doc(hidden)]
    fn from_word(word: u64) -> Self;
    #[doc(hidden)]
    fn into_word(self) -> u64;
    #[doc(hidden)]
    fn plus(self, other: Self) -> Self;
}

impl Word for u32 {
    const MASK: u64 = u32::MAX as u64;
    fn from_word(word: u64) -> Self {
        word as u32
    }
    fn into_word(self) -> u64 {
        self.into()
    }
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
}

impl Word for u64 {
    const MASK: u64 = u64::MAX;
    fn from_word(word: u64) -> Self {
        word
    }
    fn into_word(self) -> u64 {
        self
    }
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
}

/// Replaces the bytes of `word` from `lead` on by `bytes`, and no others.
fn merge(word: &AtomicU64, lead: usize, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    // Relaxed: a first guess; the compare-exchange decides.
    let mut seen = word.load(Ordering::Relaxed);
    loop {
        let mut new = seen.to_le_bytes();
        new[lead..lead + bytes.len()].copy_from_slice(bytes);
        // Relaxed, both: as the store of a whole word; a failure only hands back the value to merge
        // with.
        match word.compare_exchange_weak(
            seen,
            u64::from_le_bytes(new),
            Ordering::Relaxed,
            Ordering::Relaxed,
        ) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

/// The words, in pages of the system that exist only once they are touched.
#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
struct Words {
    map: memmap2::MmapRaw,
    count: usize,
}

#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
impl Words {
    fn zeroed(count: usize) -> std::io::Result<Self> {
        let bytes = count
            .checked_mul(WORD)
            .ok_or(std::io::ErrorKind::OutOfMemory)?;
        let map = memmap2::MmapOptions::new()
            .len(bytes.max(1))
            .no_reserve_swap()
            .map_anon()?;
        Ok(Words {
            map: map.into(),
            count,
        })
    }

    #[inline]
    fn all(&self) -> &[AtomicU64] {
        let first = self.map.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY:
        // - valid for `count` words as long as `self.map` lives: it was mapped with at least `count
        //   * WORD` bytes, readable and writable, and is neither remapped nor unmapped before it is
        //   dropped.
        // - aligned: a mapping starts at a page.
        // - initialised: anonymous memory is zero, and every bit pattern is an `AtomicU64`.
        // - all access is through these atomics: the pointer is private to this type.
        unsafe { std::slice::from_raw_parts(first, self.count) }
    }
}

/// The words, known to the model checker.
#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
struct Words(Vec<AtomicU64>);

#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
impl Words {
    fn zeroed(count: usize) -> std::io::Result<Self> {
        Ok(Words((0..count).map(|_| AtomicU64::new(0)).collect()))
    }

    fn all(&self) -> &[AtomicU64] {
        &self.0
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;

    #[test]
    fn every_offset_and_length_agrees_with_a_slice() {
        for size in [0usize, 1, 7, 8, 9, 40, 43] {
            let memory = PhysMemory::new(size as u64).unwrap();
            let mut model = vec![0u8; size];
            let mut next = 1u8;
            for at in 0..=size {
                for len in 0..=size - at {
                    let bytes: Vec<u8> = (0..len).map(|i| next.wrapping_add(i as u8)).collect();
                    next = next.wrapping_mul(31).wrapping_add(7);
                    memory.write(at as u64, &bytes).unwrap();
                    model[at..at + len].copy_from_slice(&bytes);
                    let mut all = vec![0xee; size];
                    memory.read(0, &mut all).unwrap();
                    assert_eq!(all, model);
                    let mut part = vec![0xee; len];
                    memory.read(at as u64, &mut part).unwrap();
                    assert_eq!(part, bytes);
                }
            }
        }
    }

    #[test]
    fn outside_is_refused_before_anything_is_written() {
        let memory = PhysMemory::new(43).unwrap();
        for (phys, len) in [
            (43, 1),
            (42, 2),
            (0, 44),
            (u64::MAX, 1),
            (u64::MAX - 3, 8),
            (44, 0),
        ] {
            let refused = memory.write(phys, &vec![1; len]).unwrap_err();
            assert!(
                matches!(refused, Error::OutsideMemory { limit: 43, .. }),
                "{refused}"
            );
            assert!(memory.read(phys, &mut vec![0; len]).is_err());
        }
        let mut all = [1u8; 43];
        memory.read(0, &mut all).unwrap();
        assert_eq!(all, [0; 43]);
        memory.write(43, &[]).unwrap();
    }

    #[test]
    fn a_large_memory_costs_what_is_touched() {
        let memory = PhysMemory::new(1 << 40).unwrap();
        memory.write((1 << 40) - 3, b"end").unwrap();
        let mut end = [0; 4];
        memory.read((1 << 40) - 4, &mut end).unwrap();
        assert_eq!(&end, b"\0end");
        assert!(matches!(
            PhysMemory::new(u64::MAX),
            Err(Error::NoMemory {
                bytes: u64::MAX,
                ..
            })
        ));
    }

    #[test]
    fn writers_of_the_two_halves_of_a_word_do_not_undo_each_other() {
        let memory = PhysMemory::new(8).unwrap();
        std::thread::scope(|s| {
            for half in 0..2u64 {
                let memory = &memory;
                s.spawn(move || {
                    for i in 0..20_000u32 {
                        memory.write(half * 4, &i.to_le_bytes()).unwrap();
                        let mut back = [0; 4];
                        memory.read(half * 4, &mut back).unwrap();
                        assert_eq!(u32::from_le_bytes(back), i);
                    }
                });
            }
        });
    }
}
