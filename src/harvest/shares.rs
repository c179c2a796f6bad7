//! How a harvest leaves what it takes to other consumers: T1 to T5 of [`shared`](super::shared),
//! and T3a of [`discard`](super::discard).

use crate::bitmap::Sink;
use crate::chunkmap::{CHUNK_WORDS, Handed};
use crate::error::Stopped;
use crate::flush::FlushGather;
use crate::marks::{Flight, Marks, Zeros};
use crate::space::{AddressSpace, Area, Covered};
use crate::sync::{Ordering, Step, fence, performs};
use crate::units::{Iova, IovaRange};

/// Consumers for which memory is prefetched a block of chunks before it is used. That of all others
/// is prefetched so many consumers before: earlier, it would displace what is used sooner.
const AHEAD: usize = 4;

/// A harvest that leaves what it takes to others.
#[derive(Clone, Copy)]
pub(super) struct Shares<'s> {
    pub(super) space: &'s AddressSpace,
    pub(super) covered: &'s Covered,
    area: &'s Area,
    /// What may be taken.
    pub(super) limit: IovaRange,
    pub(super) flight: &'s Flight,
}

impl<'s> Shares<'s> {
    /// The caller frees the flight.
    pub(super) fn new(
        space: &'s AddressSpace,
        covered: &'s Covered,
        area: &'s Area,
        limit: IovaRange,
    ) -> Self {
        Shares {
            space,
            covered,
            area,
            limit,
            flight: space.flights.claim(),
        }
    }

    /// T3. Returns how many leaves are owed.
    pub(super) fn owe(&self, gather: &mut FlushGather) -> u64 {
        if gather.is_empty() {
            return 0;
        }
        let gather = std::mem::take(gather);
        // A thread that takes the pages waits for a later ticket.
        let _ = self.space.flush.owe(&gather);
        gather.entries()
    }

    /// T4 for the others, of words of a chunk that were cleared.
    pub(super) fn leave(&self, chunk: u64, handed: Handed<'_>) {
        // SeqCst: F1 of the marks' protocol, for the looks at pending pages that follow; pairs with
        // F2 in `Lease::sync`. If a page is found pending already, the harvest that takes it copies
        // after its F2: if F1 comes first, the copy has what was written before T2; if F2 comes
        // first, the page is found taken, and is left again.
        // It is F10 of `harvest::discard`, too.
        fence(Ordering::SeqCst);
        if performs(Step::TakenIsData) {
            self.clear_zeros(chunk, handed);
        }
        let forgotten = usize::from(!performs(Step::LeaveToOthers));
        let others = self.covered.audience.others().rev();
        let mut next = others.clone().skip(AHEAD);
        for other in others.skip(forgotten) {
            if let Some(next) = next.next() {
                next.pending.prefetch(chunk, handed.lines());
            }
            other.leave(chunk, handed);
        }
    }

    /// Prefetches the memory in which pages of `lines` of a chunk are left, soon.
    fn ahead(&self, chunk: u64, lines: u64) {
        let others = self.covered.audience.others().rev().take(AHEAD);
        others.for_each(|other| other.pending.prefetch(chunk, lines));
    }

    /// T3a of `harvest::discard`.
    fn clear_zeros(&self, chunk: u64, handed: Handed<'_>) {
        let clear = |zeros: &Zeros| {
            for (place, mask) in handed.masks() {
                zeros.clear_mask_at(address(self.space, chunk, place), mask);
            }
        };
        self.area.marks().zeros().into_iter().for_each(clear);
        self.space.visit_younger_zeros(self.area, self.limit, clear);
    }
}

/// The address of the first page of a word of a chunk.
pub(super) fn address(space: &AddressSpace, chunk: u64, place: u16) -> Iova {
    Iova::new(((chunk * CHUNK_WORDS + u64::from(place)) * 64) << space.page().lg2())
}

/// A look that leaves marks to others as it takes them.
pub(super) struct Sharing<'t, 'b> {
    shares: Shares<'t>,
    /// The sink of the harvest.
    pub(super) own: &'t mut Sink<'b>,
    /// Leaves that the queue got.
    entries: u64,
}

impl<'t, 'b> Sharing<'t, 'b> {
    pub(super) fn new(shares: Shares<'t>, own: &'t mut Sink<'b>) -> Self {
        let entries = 0;
        Sharing {
            shares,
            own,
            entries,
        }
    }

    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// T3 of what sources have cleared.
    pub(super) fn owe(&mut self, gather: &mut FlushGather) {
        if performs(Step::CarryDebt) {
            self.entries += self.shares.owe(gather);
        }
    }

    /// Takes `part` of `marks`, which owe nothing: T1 to T5.
    pub(super) fn take(&mut self, marks: &Marks, part: IovaRange) -> Result<(), Stopped> {
        let shares = self.shares;
        self.own.limit_to(part);
        let ahead = |chunk, lines| shares.ahead(chunk, lines);
        let leave = |chunk, handed: Handed<'_>| shares.leave(chunk, handed);
        marks.share(part, self.own, shares.flight, (ahead, leave))
    }
}
