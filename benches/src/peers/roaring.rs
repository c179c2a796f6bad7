//! A compressed bitmap under a lock: the crate `roaring`.

use dirtymap::sync::{Mutex, lock};
use roaring::RoaringBitmap;

use crate::{PAGE_LG2, Peer, Tracker};

/// The numbers of the dirty pages. A harvest swaps the set for an empty one and reads it without
/// the lock.
pub struct LockedRoaring {
    pages: Mutex<RoaringBitmap>,
}

impl Tracker for LockedRoaring {
    /// # Panics
    /// If there are more pages than 32 bits count.
    fn new(pages: u64) -> Self {
        assert!(pages <= 1 << 32, "the bitmap counts with 32 bits");
        LockedRoaring {
            pages: Mutex::new(RoaringBitmap::new()),
        }
    }

    fn name(&self) -> &'static str {
        "mutex-roaring"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        let (first, last) = (start >> PAGE_LG2, (start + len - 1) >> PAGE_LG2);
        let mut pages = lock(&self.pages);
        if first == last {
            pages.insert(first as u32);
        } else {
            pages.insert_range(first as u32..=last as u32);
        }
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest(bitmap);
    }
}

impl Peer for LockedRoaring {
    fn harvest(&self, bitmap: &mut [u64]) {
        let pages = std::mem::take(&mut *lock(&self.pages));
        for page in pages {
            bitmap[page as usize / 64] |= 1 << (page % 64);
        }
    }
}
