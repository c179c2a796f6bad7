//! What whoever reaches an object must see: shows the model checker that the object was published, and not freed too early.
//!
//! Atomics of a fresh object tell the model checker nothing: a thread that got to them by a pointer without Acquire reads what
//! they were made with, which real hardware does not promise. A witness is a cell beside them, written when the object is made
//! and when it ends, and read by who reaches it. An access that is not ordered against another one is a violation, which
//! [`model`](super::model) counts against the execution. To everything but loom it is nothing.

#[cfg(dirtymap_loom)]
mod imp {
    use super::super::model;

    /// See the [module](super).
    #[derive(Debug)]
    pub struct Witness(loom::cell::UnsafeCell<()>);

    // SAFETY: the cell holds nothing; the model checker says whether accesses to it race.
    unsafe impl Sync for Witness {}

    impl Witness {
        /// The object is being made.
        pub fn new() -> Self {
            let cell = loom::cell::UnsafeCell::new(());
            cell.with_mut(|_| ());
            Witness(cell)
        }

        /// Another object is being made in its place.
        pub fn again(&self) {
            watch(|| self.0.with_mut(|_| ()));
        }

        /// Somebody has reached the object, and relies on how it was made.
        #[inline]
        pub fn look(&self) {
            watch(|| self.0.with(|_| ()));
        }

        /// Nobody may look from now on: all who did come before.
        #[inline]
        pub fn end(&self) {
            watch(|| self.0.with_mut(|_| ()));
        }
    }

    /// The model checker panics at a race; the execution goes on and is counted as one that failed.
    fn watch(access: impl FnOnce()) {
        if !model::is_broken() && model::panics(access) {
            model::broken();
        }
    }
}

#[cfg(not(dirtymap_loom))]
mod imp {
    /// See the [module](super).
    #[derive(Debug)]
    pub struct Witness(());

    impl Witness {
        /// The object is being made.
        #[inline(always)]
        pub fn new() -> Self {
            Witness(())
        }

        /// Another object is being made in its place.
        #[inline(always)]
        pub fn again(&self) {}

        /// Somebody has reached the object, and relies on how it was made.
        #[inline(always)]
        pub fn look(&self) {}

        /// Nobody may look from now on: all who did come before.
        #[inline(always)]
        pub fn end(&self) {}
    }
}

pub use imp::Witness;

impl Default for Witness {
    fn default() -> Self {
        Witness::new()
    }
}
