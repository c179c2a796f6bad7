//! Harvests that are running: a consumer that joins waits for those that do not know it.
//!
//! A harvest enters, and then loads the root, which names the consumers. A join publishes a root,
//! and then waits until no harvest is left that entered before. This is store buffering (Dekker),
//! so both have a full fence between their two steps:
//!
//! ```text
//!  harvest                                join
//!  E1  count it as running                J1  publish the root that names the consumer
//!  F8  fence(SeqCst)                      F9  fence(SeqCst)
//!  E2  load the root                      J2  wait until no harvest is counted
//! ```
//!
//! * If F8 comes first, J2 sees the harvest, and waits for its end.
//! * If F9 comes first, E2 sees the consumer, and the harvest leaves it what it takes.
//!
//! There are two counts, and new harvests take turns, as readers of sleepable RCU (SRCU) do. The
//! join turns twice, and waits each time for the count that no new harvest enters. So a stream of
//! harvests does not keep it waiting. A harvest that has read a turn and is counted late was not
//! waited for by the join that turned it, but then F9 came before its F8; a later join waits for
//! both counts.
//!
//! The sync of a lease of everything waits as well: see [`bounds`](super::bounds). A lock makes one
//! thread at a time turn. Between the two turns of a thread, a turn of another one would show it
//! the same count twice, and it would return while a harvest runs that the other count has.

use crate::sync::{
    AtomicU64, Mutex, Ordering, Step, fence, fence_after_rmw, lock, performs, relax,
};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Walks {
    running: [AtomicU64; 2],
    turn: AtomicU64,
    /// Held by the thread that turns.
    turning: Mutex<()>,
    /// How often something became pending as a whole again: see `Whole::forget`.
    put_back: AtomicU64,
}

/// A harvest that is running, until this is dropped.
#[derive(Debug)]
pub(crate) struct Walk<'w> {
    running: &'w AtomicU64,
    /// `Walks::put_back` before the harvest loaded the root.
    put_back: u64,
}

impl Walks {
    pub(super) fn new() -> Self {
        Walks {
            running: [AtomicU64::new(0), AtomicU64::new(0)],
            turn: AtomicU64::new(0),
            turning: Mutex::new(()),
            put_back: AtomicU64::new(0),
        }
    }

    /// Says that a harvest runs. It loads the root after this.
    pub(crate) fn enter(&self) -> Walk<'_> {
        // Relaxed: either count serves; a join waits for both.
        let turn = self.turn.load(Ordering::Relaxed) & 1;
        let running = &self.running[turn as usize];
        // Relaxed: F8 orders it.
        running.fetch_add(1, Ordering::Relaxed);
        // SeqCst: F8 of the protocol above; pairs with F9 in `wait`. If F8 comes first, the join
        // waits for this harvest; if F9 comes first, this harvest sees the consumer.
        fence_after_rmw();
        // Acquire: pairs with the Release in `say_put_back`.
        // - If a put-back is counted here, the walk finds what it put back.
        // - If not, `is_put_back_count` sees it, or it comes after `forget` and stays.
        let put_back = self.put_back.load(Ordering::Acquire);
        Walk { running, put_back }
    }

    /// Something has become pending as a whole again. The caller holds the lock of that.
    pub(super) fn say_put_back(&self) {
        // Release: pairs with the Acquire in `enter`; publishes what is pending as a whole.
        self.put_back.fetch_add(1, Ordering::Release);
    }

    /// Whether nothing became pending as a whole again since a harvest counted `put_backs`. The
    /// caller holds the lock of what it asks about.
    pub(super) fn is_put_back_count(&self, put_backs: u64) -> bool {
        // Relaxed: the lock orders it.
        self.put_back.load(Ordering::Relaxed) == put_backs
    }

    /// Returns when no harvest runs that entered before the call.
    pub(super) fn wait(&self) {
        // SeqCst: F9 of the protocol above; pairs with F8 in `enter`.
        fence(Ordering::SeqCst);
        if !performs(Step::WaitForWalks) {
            return;
        }
        let _alone = performs(Step::TurnAlone).then(|| lock(&self.turning));
        for _ in 0..2 {
            // Relaxed: as in `enter`; the lock orders the turns.
            let turn = self.turn.fetch_xor(1, Ordering::Relaxed) & 1;
            // Acquire: pairs with the Release of a walk that ends; what it took is visible.
            while self.running[turn as usize].load(Ordering::Acquire) != 0 {
                relax();
            }
        }
    }
}

impl Walk<'_> {
    /// How often something became pending as a whole again before this harvest loaded the root.
    pub(crate) fn put_backs(&self) -> u64 {
        self.put_back
    }
}

impl Drop for Walk<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `wait`.
        self.running.fetch_sub(1, Ordering::Release);
    }
}
