//! Typed words in memory that several threads share: an `Atomic<T>` for a `T` of one word.
//!
//! It is the one of the crate `atomic`. In builds for a model checker it is a wrapper with the same
//! calls over the atomics of [`dirtymap::sync`], because the model checker sees those alone.

pub(crate) use imp::Atomic;

#[cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
mod imp {
    pub(crate) use atomic::Atomic;
}

#[cfg(any(dirtymap_loom, dirtymap_shuttle))]
mod imp {
    use std::marker::PhantomData;

    use bytemuck::NoUninit;
    use dirtymap::sync::{AtomicU64, Ordering};

    /// A `T` of at most 8 bytes, as the low bytes of a word that the model checker sees.
    #[derive(Debug)]
    pub(crate) struct Atomic<T> {
        bits: AtomicU64,
        value: PhantomData<T>,
    }

    impl<T: NoUninit> Atomic<T> {
        pub(crate) fn new(value: T) -> Self {
            Atomic {
                bits: AtomicU64::new(to_bits(value)),
                value: PhantomData,
            }
        }

        #[cfg_attr(dirtymap_loom, track_caller)]
        pub(crate) fn load(&self, order: Ordering) -> T {
            from_bits(self.bits.load(order))
        }

        #[cfg_attr(dirtymap_loom, track_caller)]
        pub(crate) fn store(&self, value: T, order: Ordering) {
            self.bits.store(to_bits(value), order);
        }

        #[cfg_attr(dirtymap_loom, track_caller)]
        pub(crate) fn compare_exchange(
            &self,
            old: T,
            new: T,
            success: Ordering,
            failure: Ordering,
        ) -> Result<T, T> {
            self.bits
                .compare_exchange(to_bits(old), to_bits(new), success, failure)
                .map(from_bits)
                .map_err(from_bits)
        }

        #[cfg_attr(dirtymap_loom, track_caller)]
        pub(crate) fn fetch_update(
            &self,
            success: Ordering,
            failure: Ordering,
            mut change: impl FnMut(T) -> Option<T>,
        ) -> Result<T, T> {
            let mut now = self.load(failure);
            while let Some(new) = change(now) {
                match self.compare_exchange(now, new, success, failure) {
                    Ok(old) => return Ok(old),
                    Err(other) => now = other,
                }
            }
            Err(now)
        }
    }

    fn to_bits<T: NoUninit>(value: T) -> u64 {
        let bytes = bytemuck::bytes_of(&value);
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    }

    fn from_bits<T: NoUninit>(bits: u64) -> T {
        const { assert!(size_of::<T>() <= 8) };
        let word = bits.to_le_bytes();
        // SAFETY:
        // - the word has the bytes that are read: `T` has 8 at most;
        // - they are a valid `T`: all words are made by `to_bits` from a `T`, whose bytes these
        //   are.
        unsafe { word.as_ptr().cast::<T>().read_unaligned() }
    }
}
