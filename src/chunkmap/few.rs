//! A list of the bits of a chunk that has few: what harvests leave to a consumer is most often
//! scattered, and a list of 64 bits is two cache lines, where each of these bits in the words of
//! the chunk is a line of its own.
//!
//! A chunk of [`left`](super::left) bits has a list or words with bits, and the state of the chunk
//! has the length of the list. [`left`](super::left) says which thread changes it.

use super::chunk::{CHUNK_BITS, LINE_BITS};
use crate::sync::{AtomicU64, Ordering, TINY};

/// Bits of a list to a word.
const TO_A_WORD: usize = 4;
/// Bits of each of them.
const WIDTH: usize = 64 / TO_A_WORD;
/// Words of a list.
const WORDS: usize = if TINY { 1 } else { 16 };

/// The most bits of a list.
pub(crate) const MOST: usize = WORDS * TO_A_WORD;

/// The memory of a list.
#[repr(align(64))]
pub(super) struct List([AtomicU64; WORDS]);

/// Bits of a chunk, in ascending order.
pub(crate) struct Few {
    words: [u64; WORDS],
    len: usize,
    /// The lines that they lie in.
    lines: u64,
}

impl List {
    pub(super) fn new() -> Self {
        List(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// Makes it that of `few`. The caller has claimed the chunk.
    #[inline]
    pub(super) fn store(&self, few: &Few) {
        let words = few.len.div_ceil(TO_A_WORD);
        for (word, bits) in self.0.iter().zip(few.padded()).take(words) {
            // Release: pairs with the Acquire fence in `copy_of`. A look with the length of an
            // earlier list, which finds this one, sees what the thread that took the earlier one
            // did: its claim came before ours. The end of the claim publishes the rest.
            word.store(bits, Ordering::Release);
        }
    }

    /// The first `len` bits: their words and masks, in ascending order. A word may come again.
    #[inline]
    pub(super) fn masks(&self, len: usize) -> impl Iterator<Item = (u16, u64)> {
        (0..len.min(MOST)).map(|nth| {
            // Relaxed: the look at the state that has the length came before, by an Acquire.
            mask_of(self.0[nth / TO_A_WORD].load(Ordering::Relaxed), nth)
        })
    }
}

impl Few {
    /// `bits` of a chunk, in ascending order, if they are few.
    #[inline]
    pub(super) fn of(bits: impl Iterator<Item = u64>) -> Option<Self> {
        let mut few = Few {
            words: [0; WORDS],
            len: 0,
            lines: 0,
        };
        for bit in bits {
            let word = few.words.get_mut(few.len / TO_A_WORD)?;
            *word |= bit << (few.len % TO_A_WORD * WIDTH);
            few.lines |= 1 << (bit / LINE_BITS);
            few.len += 1;
        }
        Some(few)
    }

    /// The bits of one chunk, in ascending order. The low bits of each of `numbers` are the number
    /// of a bit, counted from the start of this chunk or of an earlier one. There are at most
    /// [`MOST`], which no other thread changes.
    #[inline]
    pub(crate) fn of_lowest_bits(numbers: &[AtomicU64]) -> Self {
        let mut few = Few {
            words: [0; WORDS],
            len: numbers.len(),
            lines: 0,
        };
        let mut lines = 0;
        let mut pack = |numbers: &[AtomicU64]| {
            numbers.iter().rev().fold(0, |word, number| {
                // Relaxed: the caller's own stores.
                let bit = number.load(Ordering::Relaxed) % CHUNK_BITS;
                lines |= 1 << (bit / LINE_BITS);
                word << WIDTH | bit
            })
        };
        let (whole, rest) = numbers.as_chunks::<TO_A_WORD>();
        for (word, numbers) in few.words.iter_mut().zip(whole) {
            *word = pack(numbers);
        }
        if let Some(word) = few.words.get_mut(whole.len()) {
            *word = pack(rest);
        }
        few.lines = lines;
        few
    }

    /// Their words and masks, as those of a [list](List::masks).
    pub(crate) fn masks(&self) -> impl Iterator<Item = (u16, u64)> {
        (0..self.len).map(|nth| mask_of(self.words[nth / TO_A_WORD % WORDS], nth))
    }

    /// Its words, where the last bit comes again in the places of the last word that are left. A
    /// look with the length of an older, longer list finds that bit there, and else bit 0 of the
    /// chunk, which no thread had left.
    #[inline]
    fn padded(&self) -> [u64; WORDS] {
        let (mut words, used) = (self.words, self.len % TO_A_WORD);
        if let (1.., Some(word)) = (used, words.get_mut(self.len / TO_A_WORD)) {
            let last = *word >> ((used - 1) * WIDTH);
            *word = (used..TO_A_WORD).fold(*word, |word, nth| word | last << (nth * WIDTH));
        }
        words
    }

    /// The number of bits.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The lines that they lie in.
    #[inline]
    pub(crate) fn lines(&self) -> u64 {
        self.lines
    }
}

/// The place and the mask of the bit `nth` of a list, which is in `word` of it.
#[inline]
fn mask_of(word: u64, nth: usize) -> (u16, u64) {
    let bit = (word >> (nth % TO_A_WORD * WIDTH)) as u16;
    (bit / 64, 1 << (bit % 64))
}

#[cfg(all(test, not(dirtymap_loom)))]
mod tests {
    use super::*;

    /// A thread that looks without a claim has read the length of a list, and then reads a shorter
    /// one that came after it: the places above its end were bit 0 of the chunk, which no thread
    /// had left.
    #[test]
    fn a_look_with_the_length_of_an_older_list_finds_no_bit_that_was_never_left() {
        let list = List::new();
        for len in 1..=MOST as u64 {
            let older: Vec<u64> = (0..MOST as u64).map(|nth| 70 + nth).collect();
            let younger: Vec<u64> = (0..len).map(|nth| 200 + nth).collect();
            for bits in [&older, &younger] {
                if let Some(few) = Few::of(bits.iter().copied()) {
                    list.store(&few);
                }
            }
            let bit = |(word, mask): (u16, u64)| u64::from(word) * 64 + mask.ilog2() as u64;
            let found: Vec<u64> = list.masks(MOST).map(bit).collect();
            assert_eq!(found[..len as usize], younger);
            assert!(
                found
                    .iter()
                    .all(|bit| older.contains(bit) || younger.contains(bit))
            );
        }
    }
}
