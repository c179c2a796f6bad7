//! A bitmap that takes memory only where bits are set.

use super::MAX_BITS;
use super::span::Span;
use crate::chunkmap::{CHUNK_WORDS, ChunkMap};

/// An owned bitmap that allocates a chunk (4 KiB, 32768 bits) when the first bit of it is recorded.
///
/// For requests over address spaces that are mostly clean, or far too large for a bitmap in one
/// piece: one for 2^63 bytes costs nothing before its first bit. Memory grows with the chunks that
/// have bits, at worst to the size of a bitmap in one piece. A record of one leaf that spans many
/// chunks allocates all of them. All calls take `&self`: several harvests may record at the same
/// time.
///
/// ```
/// use dirtymap::{Granule, Iova, IovaRange, SparseBitmap, UserBitmap};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let half = IovaRange::from_len(Iova::MIN, 1 << 63)?;
/// let sparse = SparseBitmap::new(1 << 51); // one bit for each 4 KiB page
/// let view = UserBitmap::sparse(&sparse).view(half, Granule::K4)?;
/// view.sink().record(IovaRange::from_len(Iova::new(1 << 62), 1)?)?;
/// assert_eq!((view.count(), sparse.chunks()), (1, 1));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SparseBitmap {
    map: ChunkMap,
    bits: u64,
}

impl SparseBitmap {
    /// An empty bitmap of `bits` bits, at most 2^63 of which are used. Allocates nothing.
    pub fn new(bits: u64) -> Self {
        let bits = bits.min(MAX_BITS);
        SparseBitmap {
            map: ChunkMap::new(bits.saturating_sub(1)),
            bits,
        }
    }

    /// The number of bits of the bitmap.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// The number of allocated chunks. Looks at each of them.
    pub fn chunks(&self) -> u64 {
        let last = self.bits.saturating_sub(1) / 64;
        let mut chunks = 0;
        let mut word = 0;
        while let Some((first, ..)) = self.next_chunk(word, last) {
            chunks += 1;
            word = first + CHUNK_WORDS;
        }
        chunks
    }

    /// Clears all bits and frees all chunks.
    pub fn clear(&mut self) {
        self.map = ChunkMap::new(self.bits.saturating_sub(1));
    }

    /// The chunk that holds `word`, allocated if it is absent: its first word, its memory, its
    /// length.
    pub(super) fn chunk(&self, word: u64) -> (u64, Span<'_>, u64) {
        let chunk = word / CHUNK_WORDS;
        let words = self.map.words_or_new(chunk);
        (chunk * CHUNK_WORDS, Span::of_words(words), CHUNK_WORDS)
    }

    /// The first chunk that exists among those that hold the words `word..=last`.
    pub(super) fn next_chunk(&self, word: u64, last: u64) -> Option<(u64, Span<'_>, u64)> {
        let (chunk, words) = self
            .map
            .next_words(word / CHUNK_WORDS, last / CHUNK_WORDS)?;
        Some((chunk * CHUNK_WORDS, Span::of_words(words), CHUNK_WORDS))
    }
}
