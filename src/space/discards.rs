//! Whether a space has discards: see [`zeroed`](super::zeroed).

use crate::sync::{AtomicU8, Ordering};

/// One of the states below.
#[derive(Debug)]
pub(super) struct Discards(AtomicU8);

impl Discards {
    /// Nothing was ever discarded.
    pub(super) const NEVER: u8 = 0;
    /// Harvests that begin now know of discards.
    pub(super) const ANNOUNCED: u8 = 1;
    /// All that run do.
    pub(super) const KNOWN: u8 = 2;

    pub(super) fn new() -> Self {
        Discards(AtomicU8::new(Self::NEVER))
    }

    /// The state. Callers say what the order pairs with.
    pub(super) fn load(&self, order: Ordering) -> u8 {
        self.0.load(order)
    }

    /// Goes to `state`.
    pub(super) fn store(&self, state: u8, order: Ordering) {
        self.0.store(state, order);
    }
}
