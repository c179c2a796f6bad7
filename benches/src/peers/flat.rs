//! The simplest bitmap that works: a flat array of atomic words.
//!
//! It has no areas, leases, flushes, or errors, and no way to skip a clean gigabyte. The others are
//! compared with it as the minimum. There are three variants of setting a bit that may already be
//! set.

use std::marker::PhantomData;

use dirtymap::sync::{AtomicU64, Ordering, fence};

use super::bits::{Masks, masks};
use crate::{Peer, Tracker};

/// How a flat array sets bits.
pub trait Setting: Send + Sync + 'static {
    /// The name of such an array in reports.
    const NAME: &'static str;

    /// The step between the write of the data and the look at the bits.
    fn before();

    /// Sets the bits of `mask`.
    fn set(word: &AtomicU64, mask: u64);
}

/// A locked operation for each word.
pub struct Always;

/// A look, and a locked operation only if a bit is clear. **Loses writes**, because the look may
/// come before the data is visible to other threads. It shows the cost of a look that is ordered by
/// another step.
pub struct Tested;

/// A full fence, and then as [`Tested`].
pub struct Fenced;

impl Setting for Always {
    const NAME: &'static str = "flat";

    #[inline(always)]
    fn before() {}

    #[inline(always)]
    fn set(word: &AtomicU64, mask: u64) {
        // Release: pairs with the Acquire of the swap in `harvest`; publishes the data of the
        // marked page.
        word.fetch_or(mask, Ordering::Release);
    }
}

impl Setting for Tested {
    const NAME: &'static str = "flat-unordered";

    #[inline(always)]
    fn before() {}

    #[inline(always)]
    fn set(word: &AtomicU64, mask: u64) {
        // Relaxed: the ordering is left out, see the type.
        if word.load(Ordering::Relaxed) & mask != mask {
            Always::set(word, mask);
        }
    }
}

impl Setting for Fenced {
    const NAME: &'static str = "flat-fence";

    #[inline(always)]
    fn before() {
        // SeqCst: orders the look after the data; pairs with the fence of `harvest`.
        fence(Ordering::SeqCst);
    }

    #[inline(always)]
    fn set(word: &AtomicU64, mask: u64) {
        Tested::set(word, mask);
    }
}

/// One bit for each page, 64 to a word.
pub struct Flat<S: Setting = Always> {
    words: Vec<AtomicU64>,
    setting: PhantomData<S>,
}

impl<S: Setting> Tracker for Flat<S> {
    fn new(pages: u64) -> Self {
        Flat {
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            setting: PhantomData,
        }
    }

    fn name(&self) -> &'static str {
        S::NAME
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        S::before();
        match masks(start, len) {
            Masks::One(word, mask) => S::set(&self.words[word], mask),
            Masks::More { first, last } => {
                let (low, high) = (first / 64, last / 64);
                S::set(&self.words[low], u64::MAX << (first % 64));
                for word in &self.words[low + 1..high] {
                    S::set(word, u64::MAX);
                }
                S::set(&self.words[high], u64::MAX >> (63 - last % 64));
            }
        }
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest(bitmap);
    }
}

impl<S: Setting> Peer for Flat<S> {
    fn harvest(&self, bitmap: &mut [u64]) {
        for (word, out) in self.words.iter().zip(bitmap) {
            // Relaxed: only decides whether the swap below is worth its cost.
            if word.load(Ordering::Relaxed) != 0 {
                // Acquire: pairs with the Release of `Setting::set`.
                *out |= word.swap(0, Ordering::Acquire);
            }
        }
        // SeqCst: orders the later copies after the swaps; pairs with the fence of `Fenced`. A mark
        // of `Always` is a read-modify-write and needs none.
        fence(Ordering::SeqCst);
    }
}
