//! Writes in flight: ranges that are dirty for as long as somebody may be writing them.
//!
//! # The protocol
//! ```text
//!  writer                               harvester
//!  G1  publish a slot                   S1  read the tables of the sources
//!  W   write, as often as it likes      S2  read the slots: what they name is reported, and stays dirty
//!  G2  mark the pages                   S3  read and clear the marks
//!  G3  free the slot
//! ```
//!
//! *Never invisible:* from G1 to G3 the slot names the pages, from G2 on the marks do. A harvester that finds the slot
//! free, or taken by somebody else, has read what G3 or a later owner wrote, so it sees the marks of G2 in S3, or what a
//! harvest that took them wrote. It must look in this order: one that read the marks first could find neither.
//!
//! # Slots
//! A slot counts its owners, and its state says how far the present one is. Who reads a range between two equal states has
//! read the range of one owner. Blocks of slots are linked and live as long as the registry; slots are used again.
//!
//! # Cost
//! To publish and to look cost a step for each slot, so this is meant for some tens of writes at a
//! time. The number of slots is the greatest number of writes that were ever in flight at once,
//! rounded up to 8, and a harvest looks at each once for each area that it meets: 1,000 writes at
//! once leave 1,000 loads, 24 bytes apart, for each area from then on. Blocks stay, also when all
//! of their slots are free: to skip them, a look would have to be ordered against a writer that
//! enters one meanwhile.

use std::ptr;

use crate::sync::{AtomicPtr, AtomicU64, Ordering, Step, TINY, weaken};
use crate::units::{Iova, IovaRange};

/// Slots of a block; one in the model checker, so that models reach the second block.
const SLOTS: usize = if TINY { 1 } else { 8 };

/// What is added to a state to get the next one: free, taken, live, and free again, for the next owner.
const STEP: u64 = 1;
const STAGES: u64 = 4;
const FREE: u64 = 0;
const LIVE: u64 = 2;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(super) first: Block,
}

#[derive(Debug)]
pub(super) struct Block {
    pub(super) slots: [Slot; SLOTS],
    next: AtomicPtr<Block>,
}

/// A place for one range.
#[derive(Debug)]
pub(crate) struct Slot {
    /// The number of owners so far times [`STAGES`], and the stage of the present one.
    state: AtomicU64,
    start: AtomicU64,
    last: AtomicU64,
}

impl InFlight {
    /// Nothing is in flight.
    pub(crate) fn new() -> Self {
        InFlight {
            first: Block::new(),
        }
    }

    /// Publishes `range` until the slot is freed. Allocates only when more ranges are in flight than ever before.
    pub(crate) fn publish(&self, range: IovaRange) -> &Slot {
        let mut block = &self.first;
        loop {
            if let Some(slot) = block.slots.iter().find(|slot| slot.claim()) {
                slot.fill(range);
                return slot;
            }
            block = block.next_or_new();
        }
    }

    /// Calls `visit` for what is in flight inside `range`.
    ///
    /// # Errors
    /// Those of `visit`.
    pub(crate) fn visit<E>(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(IovaRange) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut block = Some(&self.first);
        while let Some(here) = block {
            for slot in &here.slots {
                if let Some(part) = slot.read().and_then(|own| own.intersection(range)) {
                    visit(part)?;
                }
            }
            block = here.next();
        }
        Ok(())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // Relaxed: exclusive access.
        let mut next = self.first.next.load(Ordering::Relaxed);
        while !next.is_null() {
            // SAFETY: made by `Box::into_raw` in `next_or_new` and linked once; `drop` has the only reference left.
            let block = unsafe { Box::from_raw(next) };
            // Relaxed: as above.
            next = block.next.load(Ordering::Relaxed);
        }
    }
}

impl Block {
    fn new() -> Self {
        Block {
            slots: std::array::from_fn(|_| Slot {
                state: AtomicU64::new(FREE),
                start: AtomicU64::new(0),
                last: AtomicU64::new(0),
            }),
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    fn next(&self) -> Option<&Block> {
        // Acquire: pairs with the Release in `next_or_new`; publishes the contents of the block.
        let next = self.next.load(Ordering::Acquire);
        // SAFETY: a block that is linked lives as long as the registry, which `self` borrows from.
        unsafe { next.as_ref() }
    }

    fn next_or_new(&self) -> &Block {
        if let Some(next) = self.next() {
            return next;
        }
        let fresh = Box::into_raw(Box::new(Block::new()));
        // Release on success: publishes the fresh block. Acquire on failure: we use the winner's.
        let next = match self.next.compare_exchange(
            ptr::null_mut(),
            fresh,
            weaken(Step::PublishBlock, Ordering::Release),
            Ordering::Acquire,
        ) {
            Ok(_) => fresh,
            Err(winner) => {
                // SAFETY: `fresh` came from `Box::into_raw` above and was not linked.
                drop(unsafe { Box::from_raw(fresh) });
                winner
            }
        };
        // SAFETY: as in `next`.
        unsafe { &*next }
    }
}

impl Slot {
    /// Makes the slot ours if it is free.
    fn claim(&self) -> bool {
        // Relaxed: the compare-exchange decides.
        let state = self.state.load(Ordering::Relaxed);
        // Acquire on success: pairs with the Release of `free`; whoever reads our range sees the marks of the owner before.
        // Relaxed on failure: nothing is read.
        state % STAGES == FREE
            && self
                .state
                .compare_exchange(state, state + STEP, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    fn fill(&self, range: IovaRange) {
        // Release: pair with the Acquires in `read`; a reader of ours finds the state changed.
        let order = weaken(Step::ChangeBeforeRange, Ordering::Release);
        self.start.store(range.start().get(), order);
        self.last.store(range.last().get(), order);
        // Relaxed: our own slot.
        let taken = self.state.load(Ordering::Relaxed);
        // Release: pairs with the Acquire in `read`; publishes the range.
        let order = weaken(Step::PublishSlot, Ordering::Release);
        self.state.store(taken + STEP, order);
    }

    /// Ends the publication. What is to be found later has been marked before.
    pub(crate) fn free(&self) {
        // Relaxed: our own slot.
        let live = self.state.load(Ordering::Relaxed);
        // Release: pairs with the Acquires in `read` and `claim`; publishes the marks.
        self.state.store(live - LIVE + STAGES, Ordering::Release);
    }

    /// The range in flight. `None` if there is none, or if it ended just now: then its marks are visible.
    fn read(&self) -> Option<IovaRange> {
        // Acquire, here and below: pairs with the Releases of `fill` and `free`.
        let state = self.state.load(Ordering::Acquire);
        if state % STAGES != LIVE {
            return None;
        }
        let start = Iova::new(self.start.load(Ordering::Acquire));
        let last = Iova::new(self.last.load(Ordering::Acquire));
        // If one of the two came from a later owner, this load sees that owner's claim.
        let same = self.state.load(Ordering::Acquire) == state;
        same.then(|| IovaRange::new(start, last).ok()).flatten()
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn seen(registry: &InFlight, range: IovaRange) -> Vec<u64> {
        let mut starts = Vec::new();
        let done: Result<(), Infallible> = registry.visit(range, |part| {
            starts.push(part.start().get());
            Ok(())
        });
        done.unwrap();
        starts.sort_unstable();
        starts
    }

    #[test]
    fn more_than_a_block_and_every_slot_is_used_again() {
        let registry = InFlight::new();
        let byte = |n| IovaRange::from_len(Iova::new(n), 1).unwrap();
        for round in 0..3u64 {
            let slots: Vec<_> = (0..20)
                .map(|n| registry.publish(byte(round * 100 + n)))
                .collect();
            let all: Vec<u64> = (0..20).map(|n| round * 100 + n).collect();
            assert_eq!(seen(&registry, IovaRange::ALL), all);
            assert_eq!(seen(&registry, byte(round * 100 + 7)), [round * 100 + 7]);
            slots.iter().for_each(|slot| slot.free());
            assert!(seen(&registry, IovaRange::ALL).is_empty());
        }
        let blocks = std::iter::successors(Some(&registry.first), |block| block.next()).count();
        assert_eq!(blocks, 3, "20 slots, 8 in a block");
    }
}
