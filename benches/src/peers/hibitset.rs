//! A bitmap with summaries above it: `AtomicBitSet` of the crate `hibitset`.
//!
//! Only insertion is atomic, so no thread may mark during a harvest.

use hibitset::{AtomicBitSet, BitSetLike};

use crate::{PAGE_LG2, Tracker};

/// The capacity of one set in pages, as a logarithm.
const SET_LG2: u32 = 24;

/// Sets for 64 GiB each.
pub struct HiBitSet {
    sets: Vec<AtomicBitSet>,
}

impl Tracker for HiBitSet {
    fn new(pages: u64) -> Self {
        HiBitSet {
            sets: (0..pages.div_ceil(1 << SET_LG2))
                .map(|_| AtomicBitSet::new())
                .collect(),
        }
    }

    fn name(&self) -> &'static str {
        "hibitset"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        let (first, last) = (start >> PAGE_LG2, (start + len - 1) >> PAGE_LG2);
        for page in first..=last {
            let set = &self.sets[(page >> SET_LG2) as usize];
            set.add_atomic((page & ((1 << SET_LG2) - 1)) as u32);
        }
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        for (set, out) in self
            .sets
            .iter_mut()
            .zip(bitmap.chunks_mut(1 << (SET_LG2 - 6)))
        {
            for page in (&*set).iter() {
                out[page as usize / 64] |= 1 << (page % 64);
            }
            set.clear();
        }
    }
}
