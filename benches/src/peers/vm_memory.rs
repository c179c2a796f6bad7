//! `AtomicBitmap` of the crate `vm-memory`: the bitmap of rust-vmm's guest memory.

use std::num::NonZeroUsize;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use crate::{PAGE, Peer, Tracker};

const PAGE_SIZE: NonZeroUsize = match NonZeroUsize::new(PAGE as usize) {
    Some(size) => size,
    None => unreachable!(),
};

/// One `AtomicBitmap` for the whole memory.
pub struct VmMemory {
    bits: AtomicBitmap,
}

impl VmMemory {
    /// The peer's own harvest, into a vector that it allocates. [`Peer::harvest`] moves the vector
    /// into the caller's words.
    pub fn get_and_reset(&self) -> Vec<u64> {
        self.bits.get_and_reset()
    }
}

impl Tracker for VmMemory {
    fn new(pages: u64) -> Self {
        VmMemory {
            bits: AtomicBitmap::new((pages * PAGE) as usize, PAGE_SIZE),
        }
    }

    fn name(&self) -> &'static str {
        "vm-memory"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        self.bits.mark_dirty(start as usize, len as usize);
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest(bitmap);
    }
}

impl Peer for VmMemory {
    fn harvest(&self, bitmap: &mut [u64]) {
        for (out, word) in bitmap.iter_mut().zip(self.get_and_reset()) {
            *out |= word;
        }
    }
}
