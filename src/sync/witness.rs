//! A witness shows the model checker that an object was published before a thread reached it, and
//! was freed only after the last access.
//!
//! The atomics of a fresh object do not show that. A thread that reaches them through a pointer
//! without Acquire reads their initial values in the model, which real hardware does not promise. A
//! witness is a cell next to them: it is written when the object is made and when it ends, and read
//! by every thread that reaches the object. An access that is not ordered against another one is a
//! violation, and `model` counts the execution as failed. In builds without loom it does nothing.

#[cfg(dirtymap_loom)]
mod imp {
    use super::super::model;

    /// Shows the model checker that each access to an object is ordered; see `sync/witness.rs`.
    #[derive(Debug)]
    pub struct Witness(loom::cell::UnsafeCell<()>);

    // SAFETY: the cell holds nothing; the model checker reports whether accesses to it race.
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

        /// A thread has reached the object, and relies on its being complete.
        #[inline]
        pub fn look(&self) {
            watch(|| self.0.with(|_| ()));
        }

        /// The object ends: all threads that used it did so before.
        #[inline]
        pub fn end(&self) {
            watch(|| self.0.with_mut(|_| ()));
        }
    }

    /// The model checker panics at a race. The execution continues and is counted as failed.
    fn watch(access: impl FnOnce()) {
        if !model::is_broken() && model::panics(access) {
            model::broken();
        }
    }
}

#[cfg(not(dirtymap_loom))]
mod imp {
    /// Shows the model checker that each access to an object is ordered; see `sync/witness.rs`.
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

        /// A thread has reached the object, and relies on its being complete.
        #[inline(always)]
        pub fn look(&self) {}

        /// The object ends: all threads that used it did so before.
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
