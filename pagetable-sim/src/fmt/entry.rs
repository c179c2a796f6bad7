//! An entry of a table: its value, and the word in memory that hardware and software change.

use dirtymap::sync::{AtomicU64, Ordering, PairExchange};

use crate::word::Atomic;

/// The value of one entry of an IO page table. Zero is "not present" in every format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Iopte(pub u64);

// SAFETY: a transparent wrapper of a `u64`, which has no padding and no uninitialised bytes.
unsafe impl bytemuck::NoUninit for Iopte {}

impl Iopte {
    /// The entry that translates nothing.
    pub const ABSENT: Iopte = Iopte(0);
    /// An entry that translates nothing and never will again, because its table is about to be
    /// freed. It is not present in any format, and hardware ignores the other bits of such entries.
    pub(crate) const FROZEN: Iopte = Iopte(1 << 58);
}

/// The change that makes a written leaf clean. A clean leaf stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MakeClean {
    /// Clears these bits.
    Clear(u64),
    /// Sets these bits.
    Set(u64),
}

impl MakeClean {
    /// The entry, clean.
    #[inline]
    pub(crate) fn of(self, entry: Iopte) -> Iopte {
        match self {
            MakeClean::Clear(bits) => Iopte(entry.0 & !bits),
            MakeClean::Set(bits) => Iopte(entry.0 | bits),
        }
    }

    /// Whether that would change `entry`.
    #[inline]
    pub(super) fn changes(self, entry: Iopte) -> bool {
        match self {
            MakeClean::Clear(bits) => entry.0 & bits != 0,
            MakeClean::Set(bits) => !entry.0 & bits != 0,
        }
    }
}

/// An entry in memory, which hardware and software change at the same time.
///
/// Changes of leaves are compare-exchanges: the new value follows from the whole old one. Hardware
/// changes only entries without D, so a thread that clears D does not compete with it.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct AtomicIopte(Atomic<Iopte>);

impl AtomicIopte {
    pub(crate) fn absent() -> Self {
        AtomicIopte(Atomic::new(Iopte::ABSENT))
    }

    #[inline]
    #[cfg_attr(dirtymap_loom, track_caller)]
    pub(crate) fn load(&self, order: Ordering) -> Iopte {
        self.0.load(order)
    }

    /// Has the processor fetch the cache line of the entry, where a program can ask for that.
    #[inline]
    pub(crate) fn prefetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: every x86-64 processor has it, and it changes no memory and no register.
            unsafe { _mm_prefetch(std::ptr::from_ref(self).cast::<i8>(), _MM_HINT_T0) };
        }
    }

    /// Makes the entry absent. For models of tables that are used again too early.
    pub(crate) fn reset(&self) {
        // Relaxed: publishes nothing.
        self.0.store(Iopte::ABSENT, Ordering::Relaxed);
    }

    /// Clears `bits` in one step; the other bits stay.
    #[inline]
    #[cfg_attr(dirtymap_loom, track_caller)]
    pub(crate) fn clear_bits(&self, bits: u64, success: Ordering) {
        let clear = |entry: Iopte| Some(Iopte(entry.0 & !bits));
        // Relaxed on failure: the next guess. It succeeds in the end: `clear` always has a value.
        let _ = self.0.fetch_update(success, Ordering::Relaxed, clear);
    }

    /// Replaces `old` by `new`; if something else is there, returns that.
    #[inline]
    #[cfg_attr(dirtymap_loom, track_caller)]
    pub(crate) fn replace(
        &self,
        old: Iopte,
        new: Iopte,
        success: Ordering,
        failure: Ordering,
    ) -> Result<(), Iopte> {
        self.0
            .compare_exchange(old, new, success, failure)
            .map(drop)
    }

    /// Replaces two neighbours by one step if both have the values of `old`: see
    /// [`PairExchange::replace`].
    #[inline(always)]
    pub(crate) fn replace_pair(
        pair: &[AtomicIopte; 2],
        old: [Iopte; 2],
        new: [Iopte; 2],
        exchange: PairExchange,
    ) -> bool {
        const {
            assert!(size_of::<AtomicIopte>() >= size_of::<AtomicU64>());
            assert!(align_of::<AtomicIopte>() >= align_of::<AtomicU64>());
        }
        // SAFETY:
        // - as large and as aligned as two atomic words, whose cells an entry wraps transparently.
        // - shared access goes through atomics of that size only.
        let words = unsafe { &*std::ptr::from_ref(pair).cast::<[AtomicU64; 2]>() };
        exchange.replace(words, old.map(|entry| entry.0), new.map(|entry| entry.0))
    }
}
