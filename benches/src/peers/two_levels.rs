//! The floor of two levels: a flat array with a summary bit for each line of 8 words, and the
//! fences of the library on both sides. It has no areas, errors, leases or states. What the library
//! takes beyond it is the price of those. A harvest asks ahead for the dirty lines, in batches.

use dirtymap::sync::{AtomicU64, Ordering, fence, fence_after_look, fence_after_rmw};

use super::bits::{Masks, masks};
use crate::{Peer, Tracker};

/// Words of a line.
const LINE: usize = 8;
/// Words that one word of summary describes.
const SUMMARIZED: usize = 64 * LINE;
/// Dirty lines of a batch. With 16 or 256 a harvest takes as long.
const BATCH: usize = 64;

/// One bit for each page, and one for each 512 pages.
pub struct TwoLevels {
    words: Vec<AtomicU64>,
    summaries: Vec<AtomicU64>,
}

impl TwoLevels {
    /// Sets the bits of `mask` in a word. The caller's fence came before.
    #[inline(always)]
    fn set(&self, word: usize, mask: u64) {
        // Acquire: pairs with the Release below, for the fence that follows.
        if self.words[word].load(Ordering::Acquire) & mask != mask {
            // Release: pairs with the Acquire in `harvest`; publishes the data of the page.
            self.words[word].fetch_or(mask, Ordering::Release);
            // SeqCst: pairs with the fence after the clear of a summary in `harvest`: it sees the
            // bit, or the look below sees the summary clear.
            fence_after_rmw();
        } else {
            // SeqCst: as above, for a bit that another thread has set.
            fence_after_look();
        }
        let (summary, line) = (&self.summaries[word / SUMMARIZED], 1 << (word / LINE % 64));
        // Relaxed, both: the fence orders them after the bit.
        if summary.load(Ordering::Relaxed) & line == 0 {
            summary.fetch_or(line, Ordering::Relaxed);
        }
    }
}

impl Tracker for TwoLevels {
    fn new(pages: u64) -> Self {
        let words = pages.div_ceil(64) as usize;
        // Whole lines, so that a harvest need not look where the last one ends.
        let lines = words.next_multiple_of(LINE);
        let clean = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        TwoLevels {
            words: clean(lines),
            summaries: clean(lines.div_ceil(SUMMARIZED)),
        }
    }

    fn name(&self) -> &'static str {
        "two-levels"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        // SeqCst: orders the looks after the data; pairs with the last fence of `harvest`.
        fence(Ordering::SeqCst);
        match masks(start, len) {
            Masks::One(word, mask) => self.set(word, mask),
            Masks::More { first, last } => {
                self.set(first / 64, u64::MAX << (first % 64));
                (first / 64 + 1..last / 64).for_each(|word| self.set(word, u64::MAX));
                self.set(last / 64, u64::MAX >> (63 - last % 64));
            }
        }
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest(bitmap);
    }
}

impl TwoLevels {
    /// Takes the lines that begin at the words `firsts`.
    #[inline(always)]
    fn take(&self, firsts: &[usize], bitmap: &mut [u64]) {
        for first in firsts {
            let words = self.words[*first..*first + LINE].iter();
            for (word, out) in words.zip(&mut bitmap[*first..]) {
                // Relaxed: only decides whether the exchange below is worth its cost.
                if word.load(Ordering::Relaxed) != 0 {
                    // Acquire: pairs with the Release in `set`.
                    *out |= word.swap(0, Ordering::Acquire);
                }
            }
        }
    }
}

impl Peer for TwoLevels {
    fn harvest(&self, bitmap: &mut [u64]) {
        let mut batch = [0; BATCH];
        let mut length = 0;
        for (nth, summary) in self.summaries.iter().enumerate() {
            // Relaxed: only decides whether the clear below is worth its cost.
            let mut lines = summary.load(Ordering::Relaxed);
            if lines == 0 {
                continue;
            }
            // Relaxed: the fence orders it before the looks at the words.
            summary.fetch_and(!lines, Ordering::Relaxed);
            // SeqCst: pairs with the fences in `set`.
            fence_after_rmw();
            while lines != 0 {
                let first = nth * SUMMARIZED + lines.trailing_zeros() as usize * LINE;
                lines &= lines - 1;
                prefetch(&self.words[first]);
                if let [out, .., last] = &bitmap[first..(first + LINE).min(bitmap.len())] {
                    // The bitmap need not begin with a line of the cache.
                    prefetch(out);
                    prefetch(last);
                }
                batch[length] = first;
                length += 1;
                if length == BATCH {
                    self.take(&batch, bitmap);
                    length = 0;
                }
            }
        }
        self.take(&batch[..length], bitmap);
        // SeqCst: orders the later copies after the swaps; pairs with the fence of `mark`.
        fence(Ordering::SeqCst);
    }
}

/// Asks for the cache line of a word.
#[inline(always)]
fn prefetch<T>(word: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has it, and it only changes caches.
        unsafe { _mm_prefetch(std::ptr::from_ref(word).cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = word;
}
