//! Memory that holds bits: whole words in the middle, single bytes at the borders.
//!
//! ```text
//!  aligned words   |   word 0      |   word 1      |   word 2      |
//!  the span              [ head    |     words     | tail ]
//! ```
//!
//! A span may begin and end at any byte. Words that it covers whole are accessed as words; a word
//! of which it covers only a part is accessed byte by byte, so that no byte outside is touched.
//! Which of the two a byte gets depends on where the span begins and ends, so two accesses of one
//! span never differ in size.

use crate::sync::{AtomicU8, AtomicU64, Ordering};

/// See the [module](self). Words count from the aligned one that holds the first byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span<'a> {
    /// Bytes of word 0 that lie before the span.
    skip: usize,
    /// The part of word 0 that the span covers, unless it covers all of it.
    head: &'a [AtomicU8],
    words: &'a [AtomicU64],
    /// The part of the word after `words` that the span covers.
    tail: &'a [AtomicU8],
}

impl<'a> Span<'a> {
    /// Whole words.
    pub(super) fn of_words(words: &'a [AtomicU64]) -> Self {
        Span {
            skip: 0,
            head: &[],
            words,
            tail: &[],
        }
    }

    /// The `len` bytes from `first` on.
    ///
    /// # Safety
    /// For `'a`, the bytes are valid for reads and writes, and this process accesses them only
    /// through spans that cut them into the same words and bytes.
    #[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
    pub(super) unsafe fn from_raw(first: *mut u8, len: usize) -> Self {
        let skip = first.addr() % 8;
        let head = if skip == 0 { 0 } else { len.min(8 - skip) };
        let (words, tail) = ((len - head) / 8, (len - head) % 8);
        let (at_words, at_tail) = (
            first.wrapping_add(head),
            first.wrapping_add(head + words * 8),
        );
        // SAFETY:
        // - valid for `head <= len` atomics: an `AtomicU8` has the layout of a byte, and the caller
        //   vouches for those.
        // - shared access through atomics of this size only: by the caller.
        let head = unsafe { std::slice::from_raw_parts(first.cast::<AtomicU8>(), head) };
        let words = if words == 0 {
            // A short span may end inside its first word: then nothing of it is aligned.
            &[][..]
        } else {
            // SAFETY:
            // - valid for `words` atomics: `head + 8 * words <= len`, and an `AtomicU64` has the
            //   layout of 8 bytes.
            // - aligned: there are words, so `head` bytes led from `first` to a multiple of 8.
            // - shared access through atomics of this size only: by the caller.
            unsafe { std::slice::from_raw_parts(at_words.cast::<AtomicU64>(), words) }
        };
        // SAFETY: as for the head; the three parts make up `len` bytes.
        let tail = unsafe { std::slice::from_raw_parts(at_tail.cast::<AtomicU8>(), tail) };
        Span {
            skip,
            head,
            words,
            tail,
        }
    }

    /// Bits of word 0 that lie before the span.
    pub(super) fn skipped_bits(&self) -> u64 {
        self.skip as u64 * 8
    }

    /// How many bits the span holds.
    pub(super) fn bits(&self) -> u64 {
        let borders = (self.head.len() + self.tail.len()) as u64 * 8;
        (self.words.len() as u64).saturating_mul(64) + borders
    }

    /// Sets the bits of `mask` in word `index`, and returns those that were clear.
    #[inline]
    pub(super) fn or(&self, index: usize, mask: u64) -> u64 {
        // Relaxed, here and in `and_not`: the access only has to be atomic with those of other
        // harvests; the lease hands the result over.
        let old = match self.word(index) {
            Some(word) => u64::from_le(word.fetch_or(mask.to_le(), Ordering::Relaxed)),
            None => self.each_byte(index, mask, |byte, part| {
                byte.fetch_or(part, Ordering::Relaxed)
            }),
        };
        mask & !old
    }

    /// As [`or`](Self::or), where no other thread writes to the word meanwhile: without a locked
    /// operation.
    #[inline]
    pub(super) fn or_alone(&self, index: usize, mask: u64) -> u64 {
        let Some(word) = self.word(index) else {
            return self.or(index, mask);
        };
        // Relaxed, both: as in `or`; no other thread writes between the two.
        let old = u64::from_le(word.load(Ordering::Relaxed));
        word.store((old | mask).to_le(), Ordering::Relaxed);
        mask & !old
    }

    /// The words from `index` on that the span covers whole, up to `words` of them.
    #[inline]
    pub(super) fn words(&self, index: usize, words: usize) -> &'a [AtomicU64] {
        let from = index.wrapping_sub(self.lead());
        let found = self.words.get(from..).unwrap_or(&[]);
        &found[..words.min(found.len())]
    }

    /// Clears the bits of `mask` in word `index`, and returns those that were set.
    #[inline]
    pub(super) fn and_not(&self, index: usize, mask: u64) -> u64 {
        let old = match self.word(index) {
            // Relaxed: see `or`.
            Some(word) => u64::from_le(word.fetch_and(!mask.to_le(), Ordering::Relaxed)),
            None => self.each_byte(index, mask, |byte, part| {
                byte.fetch_and(!part, Ordering::Relaxed)
            }),
        };
        mask & old
    }

    /// The bits of word `index`; zeros where the word lies outside the span.
    #[inline]
    pub(super) fn load(&self, index: usize) -> u64 {
        match self.word(index) {
            // Relaxed: the reader owns the lease or the bitmap, which orders the read after the
            // harvest.
            Some(word) => u64::from_le(word.load(Ordering::Relaxed)),
            None => self.each_byte(index, u64::MAX, |byte, _| byte.load(Ordering::Relaxed)),
        }
    }

    /// Whether word 0 is the head.
    #[inline]
    fn lead(&self) -> usize {
        usize::from(!self.head.is_empty())
    }

    #[inline]
    fn word(&self, index: usize) -> Option<&'a AtomicU64> {
        self.words.get(index.wrapping_sub(self.lead()))
    }

    /// Calls `access` for each byte of a border word that `mask` has bits in; the results, as a
    /// word.
    #[cold]
    fn each_byte(
        &self,
        index: usize,
        mask: u64,
        mut access: impl FnMut(&AtomicU8, u8) -> u8,
    ) -> u64 {
        let (bytes, skip) = if index < self.lead() {
            (self.head, self.skip)
        } else if index == self.lead() + self.words.len() {
            (self.tail, 0)
        } else {
            (&[][..], 0)
        };
        let mut results = 0;
        for (byte, nth) in bytes.iter().zip(skip..) {
            let part = (mask >> (8 * nth)) as u8;
            if part != 0 {
                results |= u64::from(access(byte, part)) << (8 * nth);
            }
        }
        results
    }
}
