//! The debt that one flush pays, and the frees that may run after it.

use std::fmt;
use std::time::Instant;

use super::FlushGather;
use crate::failure::{Panic, call, keep_first};

/// A call that runs after the flush that it waits for has finished.
pub(super) struct Free(Box<dyn FnOnce() + Send>);

impl Free {
    pub(super) fn new(free: impl FnOnce() + Send + 'static) -> Self {
        Free(Box::new(free))
    }
}

impl fmt::Debug for Free {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Free")
    }
}

/// The gathers that one flush pays together.
#[derive(Debug, Default)]
pub(super) struct SharedDebt {
    pub(super) gather: FlushGather,
    /// Gathers merged into `gather`.
    pub(super) gathers: u64,
    /// The sum of their entries. `gather` counts them too, but stops at a bound.
    pub(super) entries: u128,
    /// In the order in which they were handed over, oldest first.
    pub(super) frees: Vec<Free>,
    /// When the first gather was handed over. Recorded only if age is a bound.
    pub(super) oldest: Option<Instant>,
}

impl SharedDebt {
    pub(super) fn add(&mut self, gather: &FlushGather) {
        self.gather.merge(gather);
        self.gathers += 1;
        self.entries += u128::from(gather.entries());
    }

    /// Adds a debt that was handed over later.
    pub(super) fn append(&mut self, mut newer: SharedDebt) {
        self.gather.merge(&newer.gather);
        self.gathers += newer.gathers;
        self.entries += newer.entries;
        self.frees.append(&mut newer.frees);
        self.oldest = self.oldest.or(newer.oldest);
    }
}

/// Runs all of `frees` in order, even if some panic. Stores the first panic in `first` and drops
/// the others.
pub(super) fn run_all(frees: Vec<Free>, first: &mut Option<Panic>) {
    for free in frees {
        if let Err(panic) = call(free.0) {
            keep_first(first, panic);
        }
    }
}
