//! Two words that are exchanged by one locked operation.
//!
//! A locked operation waits for the stores before it, and stops the loads after it. Where a thread
//! changes many words that lie side by side, one operation for two of them costs less than two.

use super::AtomicU64;

/// Says that the processor can exchange 16 bytes by one locked operation.
#[derive(Clone, Copy, Debug)]
pub struct PairExchange(());

impl PairExchange {
    /// `None` if the processor has no such operation, and in the model checkers.
    #[inline(always)]
    pub fn get() -> Option<Self> {
        imp::has_it().then_some(PairExchange(()))
    }

    /// Replaces `old` by `new` in both words by one step, a full fence. If a word has another value
    /// than that of `old`, or if the first one does not lie at a multiple of 16 bytes, it changes
    /// nothing and returns false.
    ///
    /// The result is that of two compare-exchanges right after each other, between which no other
    /// thread runs: a protocol that is right for those is right for this. So a caller does the same
    /// with two single words where this fails, and the model checkers see that alone.
    #[inline(always)]
    pub fn replace(self, words: &[AtomicU64; 2], old: [u64; 2], new: [u64; 2]) -> bool {
        imp::replace(self, words, old, new)
    }
}

#[cfg(all(
    target_arch = "x86_64",
    not(any(dirtymap_loom, dirtymap_shuttle, miri))
))]
mod imp {
    use std::arch::asm;

    use super::{AtomicU64, PairExchange};

    #[inline(always)]
    pub(super) fn has_it() -> bool {
        std::is_x86_feature_detected!("cmpxchg16b")
    }

    #[inline(always)]
    pub(super) fn replace(
        PairExchange(()): PairExchange,
        words: &[AtomicU64; 2],
        old: [u64; 2],
        new: [u64; 2],
    ) -> bool {
        let at = words.as_ptr();
        // The instruction faults at other addresses.
        if !at.addr().is_multiple_of(16) {
            return false;
        }
        let done: u8;
        // SAFETY:
        // - the processor has the instruction, says `PairExchange`, and `at` is aligned for it.
        // - `words` are valid for atomic reads and writes of 8 bytes each. In the terms of the
        //   language, this is a compare-exchange of the first word and one of the second word,
        //   right after each other, or a load of each: so there is no access of 16 bytes beside
        //   those of 8.
        // - `rbx` belongs to the compiler, so it has its value again after the exchange. `at` and
        //   `done` name their registers, so neither is `rbx`.
        // - the stack is not used; the flags and the memory count as changed.
        unsafe {
            asm!(
                "xchg {low}, rbx",
                "lock cmpxchg16b [rdi]",
                "sete r8b",
                "mov rbx, {low}",
                low = inout(reg) new[0] => _,
                in("rcx") new[1],
                inout("rax") old[0] => _,
                inout("rdx") old[1] => _,
                in("rdi") at,
                out("r8b") done,
                options(nostack),
            );
        }
        done != 0
    }
}

#[cfg(not(all(
    target_arch = "x86_64",
    not(any(dirtymap_loom, dirtymap_shuttle, miri))
)))]
mod imp {
    use super::{AtomicU64, PairExchange};

    #[inline(always)]
    pub(super) fn has_it() -> bool {
        false
    }

    #[inline(always)]
    pub(super) fn replace(_: PairExchange, _: &[AtomicU64; 2], _: [u64; 2], _: [u64; 2]) -> bool {
        false
    }
}

#[cfg(test)]
#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
mod tests {
    use super::*;
    use crate::sync::{Ordering, thread};

    /// Words at a multiple of 16 bytes.
    #[repr(align(16))]
    struct Aligned([AtomicU64; 4]);

    impl Aligned {
        fn new(values: [u64; 4]) -> Self {
            Aligned(values.map(AtomicU64::new))
        }

        fn pair(&self, first: usize) -> &[AtomicU64; 2] {
            self.0[first..].first_chunk().unwrap()
        }

        fn values(&self) -> [u64; 4] {
            std::array::from_fn(|nth| self.0[nth].load(Ordering::Relaxed))
        }
    }

    #[test]
    fn both_words_change_or_none() {
        let Some(exchange) = PairExchange::get() else {
            return;
        };
        let words = Aligned::new([1, 2, 3, 4]);
        for old in [[3, 5], [5, 4], [4, 3]] {
            assert!(!exchange.replace(words.pair(2), old, [0, 0]));
            assert_eq!(words.values(), [1, 2, 3, 4]);
        }
        assert!(exchange.replace(words.pair(2), [3, 4], [5, 6]));
        assert_eq!(words.values(), [1, 2, 5, 6]);
    }

    /// An exchange of 16 bytes at another multiple of 8 is a fault of the processor.
    #[test]
    fn a_pair_that_is_not_aligned_stays() {
        let Some(exchange) = PairExchange::get() else {
            return;
        };
        let words = Aligned::new([1, 2, 3, 4]);
        assert!(!exchange.replace(words.pair(1), [2, 3], [0, 0]));
        assert_eq!(words.values(), [1, 2, 3, 4]);
    }

    /// One thread sets bits of single words while another one takes them by pairs: each bit is
    /// taken once.
    #[test]
    fn no_change_of_one_word_is_lost_in_an_exchange_of_two() {
        let Some(exchange) = PairExchange::get() else {
            return;
        };
        let words = Aligned::new([0; 4]);
        let take = |taken: &mut [u64; 2]| {
            let seen = [0, 1].map(|nth: usize| words.0[nth].load(Ordering::Relaxed));
            if exchange.replace(words.pair(0), seen, [0, 0]) {
                taken[0] += u64::from(seen[0].count_ones());
                taken[1] += u64::from(seen[1].count_ones());
            }
        };
        let mut taken = [0; 2];
        thread::scope(|scope| {
            let setter = scope.spawn(|| {
                let mut set = [0u64; 2];
                for round in 0..200_000 {
                    let (nth, bit) = (round % 2, 1u64 << (round / 2 % 64));
                    let old = words.0[nth].fetch_or(bit, Ordering::Relaxed);
                    set[nth] += u64::from(old & bit == 0);
                }
                set
            });
            while !setter.is_finished() {
                take(&mut taken);
            }
            take(&mut taken);
            assert_eq!(taken, setter.join().unwrap());
        });
    }
}
