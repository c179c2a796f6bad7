//! Whether a space has discards: see [`zeroed`](super::zeroed).

use crate::sync::{AtomicBool, AtomicU8, Ordering, Step, performs};

const NEVER: u8 = 0;
/// Harvests that begin now know of discards.
const ANNOUNCED: u8 = 1;
/// All harvests that run know of discards.
const KNOWN: u8 = 2;

/// The state of discards in a space.
#[derive(Debug)]
pub(super) struct Discards {
    /// One of the states above.
    state: AtomicU8,
    /// A thread that holds the lock of the domains switches tracking on, and has not forgotten yet
    /// which pages read as zero.
    restarting: AtomicBool,
}

/// See [`Discards::restart`].
pub(super) struct Restart<'d>(&'d AtomicBool);

impl Drop for Restart<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `is_restarting`. A thread that sees the switches on
        // and this store sees the zero bits cleared.
        self.0.store(false, Ordering::Release);
    }
}

impl Discards {
    pub(super) fn new() -> Self {
        Discards {
            state: AtomicU8::new(NEVER),
            restarting: AtomicBool::new(false),
        }
    }

    /// No page counts as zero from here to the drop of the result, although all switches may be on
    /// before. The caller holds the lock of the domains.
    pub(super) fn restart(&self) -> Restart<'_> {
        if performs(Step::DoubtRestart) {
            // Relaxed: the Release by which a switch goes on publishes it.
            self.restarting.store(true, Ordering::Relaxed);
        }
        Restart(&self.restarting)
    }

    /// Whether the zero bits may be older than a switch that the caller has found on.
    pub(super) fn is_restarting(&self) -> bool {
        // Acquire: pairs with the Release in the drop of `Restart`. The Acquire look at the switch
        // comes first.
        // - If this finds false from before `restart`, the switch was found on from before it was
        //   off, because its Release publishes true.
        // - If it finds false from the drop, the zero bits are cleared.
        self.restarting.load(Ordering::Acquire)
    }

    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        // Relaxed: F8 and F9 of `walks` order it. A harvest that does not see the store has entered
        // its walk before the first discard counted the harvests, so that discard waits for its
        // end.
        self.state.load(Ordering::Relaxed) != NEVER
    }

    /// Whether all harvests that run know of them.
    pub(super) fn are_known(&self) -> bool {
        // Acquire: pairs with the Release in `make_known`; the harvests that do not know of
        // discards have ended, and what they took is visible.
        self.state.load(Ordering::Acquire) == KNOWN
    }

    /// Harvests that begin after F9 of `walks` know of them.
    pub(super) fn announce(&self) {
        // Relaxed: as in `any`.
        self.state.store(ANNOUNCED, Ordering::Relaxed);
    }

    /// All harvests that run know of them.
    pub(super) fn make_known(&self) {
        // Release: pairs with the Acquire in `are_known`.
        self.state.store(KNOWN, Ordering::Release);
    }
}
