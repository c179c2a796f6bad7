//! Writes in flight: ranges that count as dirty for as long as some thread may be writing them, or
//! moving their dirty state.
//!
//! # The protocol
//! A published slot works like a hazard pointer: while it names a range, every harvest treats the
//! range as dirty.
//!
//! ```text
//!  writer                               harvester
//!  G1  publish a slot                   S1  read the tables of the sources
//!  W   write, as often as it likes      S2  read the slots: report their ranges, which stay dirty
//!  G2  mark the pages                   S3  read and clear the marks
//!  G3  free the slot
//! ```
//!
//! *Never invisible:* from G1 to G3 the slot names the pages, and from G2 on the marks do. A
//! harvester that comes after G3, and so finds the slot free or filled by a later owner, has read a
//! value that G3 or that later owner stored. So in S3 it sees the marks of G2, unless another
//! harvest has taken them already. The order S1, S2, S3 is required: a harvester that read the
//! marks before the slots could miss the pages in both.
//!
//! # Slots
//! A slot is a seqlock. Its state counts its owners and says in which stage the present owner is. A
//! range that is read between two equal states belongs to one owner. Blocks of slots form a linked
//! list and live as long as the registry; a slot that is free is used again.
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

/// Slots in a block. One in the model checker, so that models reach the second block.
const SLOTS: usize = if TINY { 1 } else { 8 };

/// The state of a slot: which owner it has, counted from 0, and in which stage that owner is. An
/// owner claims the slot, publishes its range, and frees the slot for the next owner. Owners are
/// counted modulo 2^62.
#[derive(Clone, Copy, PartialEq, Eq)]
struct State(u64);

impl State {
    /// The lower two bits: the stage.
    const STAGE: u64 = 3;
    const FREE: u64 = 0;
    const CLAIMED: u64 = 1;
    const LIVE: u64 = 2;

    /// Before the first owner.
    const FIRST: State = State(Self::FREE);

    fn is_free(self) -> bool {
        self.0 & Self::STAGE == Self::FREE
    }

    fn is_live(self) -> bool {
        self.0 & Self::STAGE == Self::LIVE
    }

    /// This owner claims the slot, which is free.
    fn claimed(self) -> State {
        debug_assert!(self.is_free(), "a slot that another owner has");
        State(self.0 | Self::CLAIMED)
    }

    /// The owner of the slot, which has claimed it, publishes its range.
    fn published(self) -> State {
        debug_assert!(self.0 & Self::STAGE == Self::CLAIMED, "not claimed");
        State(self.0 ^ (Self::CLAIMED | Self::LIVE))
    }

    /// The owner of the slot, which has published its range, leaves it to the next owner.
    fn freed(self) -> State {
        debug_assert!(self.is_live(), "a slot that names no range");
        State((self.0 | Self::STAGE).wrapping_add(1))
    }
}

/// The registry of ranges in flight: see the [module](self).
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(super) first: SlotBlock,
}

#[derive(Debug)]
pub(super) struct SlotBlock {
    pub(super) slots: [FlightSlot; SLOTS],
    next: AtomicPtr<SlotBlock>,
}

/// A place for one range.
#[derive(Debug)]
pub(crate) struct FlightSlot {
    /// A [`State`].
    state: AtomicU64,
    start: AtomicU64,
    last: AtomicU64,
}

impl InFlight {
    /// A registry without ranges.
    pub(crate) fn new() -> Self {
        InFlight {
            first: SlotBlock::new(),
        }
    }

    /// Publishes `range` until the slot is freed. Lock-free. Allocates only if more ranges are in
    /// flight than ever before.
    pub(crate) fn publish(&self, range: IovaRange) -> &FlightSlot {
        let mut block = &self.first;
        loop {
            if let Some(slot) = block.slots.iter().find(|slot| slot.claim()) {
                slot.fill(range);
                return slot;
            }
            block = block.next_or_new();
        }
    }

    /// Calls `visit` with the part inside `range` of each range in flight.
    ///
    /// # Errors
    /// The error of `visit`, at which the walk ends.
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
            // SAFETY: made by `Box::into_raw` in `next_or_new` and linked once; `drop` has the only
            // reference left.
            let block = unsafe { Box::from_raw(next) };
            // Relaxed: as above.
            next = block.next.load(Ordering::Relaxed);
        }
    }
}

impl SlotBlock {
    fn new() -> Self {
        SlotBlock {
            slots: std::array::from_fn(|_| FlightSlot {
                state: AtomicU64::new(State::FIRST.0),
                start: AtomicU64::new(0),
                last: AtomicU64::new(0),
            }),
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    fn next(&self) -> Option<&SlotBlock> {
        // Acquire: pairs with the Release in `next_or_new`; publishes the contents of the block.
        let next = self.next.load(Ordering::Acquire);
        // SAFETY: a linked block lives as long as the registry, which `self` borrows from.
        unsafe { next.as_ref() }
    }

    fn next_or_new(&self) -> &SlotBlock {
        if let Some(next) = self.next() {
            return next;
        }
        let fresh = Box::into_raw(Box::new(SlotBlock::new()));
        // Release on success: publishes the fresh block. Acquire on failure: another thread has
        // linked a block first, and we use that one.
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

impl FlightSlot {
    /// Takes the slot if it is free. Returns whether this call took it.
    fn claim(&self) -> bool {
        // Relaxed: the compare-exchange decides.
        let state = State(self.state.load(Ordering::Relaxed));
        // Acquire on success: pairs with the Release of `free`, so a thread that reads our range
        // also sees the marks of the owner before us. Relaxed on failure: nothing is read.
        state.is_free()
            && self
                .state
                .compare_exchange(
                    state.0,
                    state.claimed().0,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                )
                .is_ok()
    }

    fn fill(&self, range: IovaRange) {
        // Release, twice: pair with the Acquires in `read`. A reader that sees one of these two
        // values finds that the state has changed since it began.
        let order = weaken(Step::ChangeBeforeRange, Ordering::Release);
        self.start.store(range.start().get(), order);
        self.last.store(range.last().get(), order);
        // Relaxed: only the owner of the slot changes it.
        let taken = State(self.state.load(Ordering::Relaxed));
        // Release: pairs with the Acquire in `read`; publishes the range.
        let order = weaken(Step::PublishSlot, Ordering::Release);
        self.state.store(taken.published().0, order);
    }

    /// Ends the publication. The caller has marked the pages before, so that later harvests find
    /// them.
    pub(crate) fn free(&self) {
        // Relaxed: only the owner of the slot changes it.
        let live = State(self.state.load(Ordering::Relaxed));
        // Release: pairs with the Acquires in `read` and `claim`; publishes the marks.
        self.state.store(live.freed().0, Ordering::Release);
    }

    /// The range in flight. `None` if there is none, or if the publication has just ended: then the
    /// marks of that owner are visible to the caller.
    fn read(&self) -> Option<IovaRange> {
        // Acquire, here and below: pairs with the Releases of `fill` and `free`.
        let state = State(self.state.load(Ordering::Acquire));
        if !state.is_live() {
            return None;
        }
        let start = Iova::new(self.start.load(Ordering::Acquire));
        let last = Iova::new(self.last.load(Ordering::Acquire));
        // Seqlock: if `start` or `last` came from a later owner, this load sees that owner's claim,
        // and the states differ.
        let same = State(self.state.load(Ordering::Acquire)) == state;
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

    /// Each owner has states of its own, also where the count of owners wraps.
    #[test]
    fn the_states_of_two_owners_differ() {
        let free = State(!State::STAGE);
        let states = [free, free.claimed(), free.claimed().published()];
        let next = states[2].freed();
        assert_eq!(next.0, State::FIRST.0);
        assert!(next.is_free() && states.iter().all(|state| *state != next));
        assert!(states[2].is_live() && !states[1].is_live() && !states[1].is_free());
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
