//! Whether a space has discards: see [`zeroed`](super::zeroed).

use crate::sync::{AtomicU8, Ordering};

const NEVER: u8 = 0;
/// Harvests that begin now know of discards.
const ANNOUNCED: u8 = 1;
/// All harvests that run know of discards.
const KNOWN: u8 = 2;

/// One of the states above.
#[derive(Debug)]
pub(super) struct Discards(AtomicU8);

impl Discards {
    pub(super) fn new() -> Self {
        Discards(AtomicU8::new(NEVER))
    }

    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        // Relaxed: F8 and F9 of `walks` order it. A harvest that does not see the store has entered
        // its walk before the first discard counted the harvests, so that discard waits for its
        // end.
        self.0.load(Ordering::Relaxed) != NEVER
    }

    /// Whether all harvests that run know of them.
    pub(super) fn are_known(&self) -> bool {
        // Acquire: pairs with the Release in `make_known`; the harvests that do not know of
        // discards have ended, and what they took is visible.
        self.0.load(Ordering::Acquire) == KNOWN
    }

    /// Harvests that begin after F9 of `walks` know of them.
    pub(super) fn announce(&self) {
        // Relaxed: as in `any`.
        self.0.store(ANNOUNCED, Ordering::Relaxed);
    }

    /// All harvests that run know of them.
    pub(super) fn make_known(&self) {
        // Release: pairs with the Acquire in `are_known`.
        self.0.store(KNOWN, Ordering::Release);
    }
}
