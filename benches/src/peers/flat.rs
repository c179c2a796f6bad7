//! The least that works: a flat array of atomic words.
//!
//! It has no areas, leases, flushes, or errors, and no way to skip a clean gigabyte; it is the floor that the others are
//! held against.

use dirtymap::sync::{AtomicU64, Ordering, fence};

use crate::{PAGE_LG2, Peer};

/// One bit for each page, 64 to a word.
pub struct Flat {
    words: Vec<AtomicU64>,
}

impl Peer for Flat {
    fn new(pages: u64) -> Self {
        Flat {
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn name(&self) -> &'static str {
        "flat"
    }

    #[inline]
    fn mark(&self, start: u64, len: u64) {
        let (first, last) = (start >> PAGE_LG2, (start + len - 1) >> PAGE_LG2);
        for word in first / 64..=last / 64 {
            let from = first.max(word * 64) % 64;
            let to = last.min(word * 64 + 63) % 64;
            let mask = (u64::MAX << from) & (u64::MAX >> (63 - to));
            // Release: pairs with the Acquire of the swap in `harvest`; publishes the data that the mark speaks of.
            self.words[word as usize].fetch_or(mask, Ordering::Release);
        }
    }

    fn harvest(&self, bitmap: &mut [u64]) {
        for (word, out) in self.words.iter().zip(bitmap) {
            // Relaxed: only decides whether the swap below is worth its price.
            if word.load(Ordering::Relaxed) != 0 {
                // Acquire: pairs with the Release in `mark`.
                *out |= word.swap(0, Ordering::Acquire);
            }
        }
        // SeqCst: keeps the copies that follow behind the swaps. Every mark is a read-modify-write, so no mark needs a
        // fence to pair with this one.
        fence(Ordering::SeqCst);
    }
}
