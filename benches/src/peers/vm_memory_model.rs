//! `AtomicBitmap` of `vm-memory` with the improvements that are proposed for it: ranges are set by
//! masks of whole words, and a harvest skips clean cache lines. A model of the logic, without code
//! of that crate.

use dirtymap::sync::{AtomicU64, Ordering};

use super::bits::{Masks, masks};
use crate::{Peer, Tracker};

/// Words of a cache line.
const LINE: usize = 8;

/// One bit for each page. Each access is sequentially consistent, as in `vm-memory`.
pub struct VmMemoryModel {
    words: Vec<AtomicU64>,
}

impl VmMemoryModel {
    #[inline(always)]
    fn set(&self, word: usize, mask: u64) {
        // SeqCst: as in `vm-memory`; orders the data before the look of a harvest.
        self.words[word].fetch_or(mask, Ordering::SeqCst);
    }

    /// Its own harvest, into a vector that it allocates.
    pub fn get_and_reset(&self) -> Vec<u64> {
        let mut taken = Vec::with_capacity(self.words.len());
        for line in self.words.chunks(LINE) {
            // Relaxed: only decides whether to take the line.
            let seen = |any, word: &AtomicU64| any | word.load(Ordering::Relaxed);
            if line.iter().fold(0, seen) == 0 {
                taken.extend(line.iter().map(|_| 0));
            } else {
                // SeqCst: pairs with `set`.
                taken.extend(line.iter().map(|word| word.swap(0, Ordering::SeqCst)));
            }
        }
        taken
    }
}

impl Tracker for VmMemoryModel {
    fn new(pages: u64) -> Self {
        VmMemoryModel {
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn name(&self) -> &'static str {
        "vm-memory-improved"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
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

impl Peer for VmMemoryModel {
    fn harvest(&self, bitmap: &mut [u64]) {
        for (out, word) in bitmap.iter_mut().zip(self.get_and_reset()) {
            *out |= word;
        }
    }
}
