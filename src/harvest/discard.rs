//! Discards: a range reads as zero from now on, as after TRIM, a balloon or a free page hint.
//!
//! # The third state
//! A page is clean, dirty, or *zero*: its storage was dropped, and no harvest has found it dirty
//! since. A discard leaves the page pending for each consumer, so the change is reported as that of
//! a write is. *Zero* is a property of the page, and not of a consumer: one bit, beside the marks
//! of its area. A lease calls one of its pages zero if the bit is set when the consumer looks. Then
//! each write that the lease has to report came before the drop. So an abort, a join, a copy of a
//! consumer and a lease that is forgotten need no step for zeros.
//!
//! A mark does not look at the zero bit. The harvest that takes a dirty bit clears the zero bit of
//! the page.
//!
//! # The protocol
//! A discard is a harvest and a sync of the range, with the drop of the storage in the place of the
//! copy.
//!
//! ```text
//!  discard                                  harvest, of any consumer
//!  Z1  announce that it is at work there    T1  record the page in the flight
//!  Z2  set the zero bits                    T2  clear it where it was found
//!  Z3  take what is dirty, with T0 to T2    F10 fence(SeqCst)
//!  Z4  flush the range in all domains       T3a clear the zero bits of the flight
//!  F2  fence(SeqCst)                        T3 to T5: debt, pending, wipe; see `harvest::shared`
//!  Z5  drop the storage                     L2  see a page in other hands
//!  Z6  leave the range pending for all;     F10 fence(SeqCst)
//!      wipe the flight                      L2a clear the zero bit of what was seen
//!  Z7  end the announcement
//!
//!  consumer with a synced lease, before it copies
//!  R1  look at the zero bits    R2  look for discards at work    R3  look at the zero bits again
//! ```
//!
//! # Why no write is lost
//! Take a write W to page p whose data lands after the drop (Z5), so that p does not read as zero.
//! * W leaves a dirty bit. After Z4 no device caches "D is set" from before, and no CPU relies on a
//!   mark from before (F1 and F2 of the marks' protocol). Z4 flushes the whole range, and not only
//!   what Z3 has taken: of a page that another harvest has taken, only the lease of that harvest
//!   knows the debt.
//! * The harvest that clears this bit (T2) clears the zero bit afterwards (T3a), and finds it set
//!   by Z2. F2 and F10 order the two. If F2 comes first, T3a comes after Z2. If F10 comes first, T2
//!   came before F2. A CPU that had marked W by then had written it before the drop. A device that
//!   had set D by then had done so after Z4, because Z4 drains what was translated before; the
//!   flush orders Z2 before that, and so before T3a.
//! * A harvest that has seen an older dirty bit of p may clear the one of W, because a clear takes
//!   what it finds. So T3a follows T2: a zero bit that was cleared at T1 could have been set by Z2
//!   since.
//! * A harvest Y that finds p in other hands, in the flight of a harvest X or in words that X has
//!   hidden, clears the zero bit itself (L2a). X may not have reached T3a yet when the consumer of
//!   Y looks at R1. If Y does not find p there any more at L2a, X has wiped it, after its own T3a.
//! * Y finds p pending (L3) because X has left it, after T3a; or because of a discard or an abort,
//!   which leave the zero bit as it is.
//!
//! A write that comes before Z5 is part of what is dropped. Its mark may come later: then p is
//! dirty, which is a superset. A clear at T3a may clear the bit of a later discard: then the page
//! counts as dirty, which is a superset, too.
//!
//! From Z3 to Z6, the pages that were dirty are in the flight of the discard, so that a harvest in
//! between finds them. A consumer that finds the zero bit set does not know yet whether the storage
//! is dropped. So it takes the page for dirty if a discard is at work there (R2). A discard that
//! fails clears the zero bits, goes on with Z6, and ends its announcement last, so R3 finds the
//! bits clear. It leaves the pages pending, and does not mark them: a harvest that has looked at
//! the marks already, and looks at the flights afterwards, would find marked pages in neither.
//!
//! An area may leave the tree, and another one come to its addresses, while a harvest walks. The
//! harvest asks sources by address, so it may take a write to the younger area. It clears the zero
//! bits of that area as well (T3a), and so does a discard that has taken such a page (before Z6). A
//! lease says *zero* only of areas that are as old as its harvest.
//!
//! The first discard of a space waits for the harvests that do not know of discards, and so do not
//! come to T3a: see `space::zeroed`. Z6 enters a walk, so that a consumer that joins is told, or
//! copies another one that was.

use super::look::{Look, look};
use super::shared::Claim;
use crate::error::Error;
use crate::flush::FlushGather;
use crate::marks::{Flight, FlightSlot, Zeros};
use crate::ranges::without;
use crate::report::Discarded;
use crate::space::{AddressSpace, Area, Audience, Covered};
use crate::sync::{Arc, Step, performs};
use crate::units::{IovaRange, ToIovaRange};

impl AddressSpace {
    /// Discards `range`: `drop_storage` drops its storage, and from then on the range reads as zero
    /// until it is written. For TRIM, a balloon, or hints of free pages.
    ///
    /// The next lease of each consumer reports the pages, as it does after a write, and
    /// [`Lease::contents`] says that they are zero. So a consumer need not read or send them. A
    /// later write wins: its page is data. An abort puts a page back as it is at that time: zero,
    /// or data if it was written since.
    ///
    /// Only whole pages, of the size of [`alignment`](Self::alignment), become zero. Parts of pages
    /// at the ends of the range are marked dirty. All of the range is marked dirty if the space or
    /// one of its domains does not track writes. A write to the range that is in flight during the
    /// call is either part of what is dropped, or dirty afterwards.
    ///
    /// Waits until devices have drained. After that, it calls `drop_storage` once, outside of any
    /// lock. The closure may call this space. Other threads mark and harvest meanwhile. The first
    /// discard of a space waits for the harvests that are running. From then on, a
    /// [parallel](crate::HarvestRequest) harvest is walked by the calling thread. A space that
    /// never discards pays a load for each area of a harvest. A discard takes a bit for each of its
    /// pages, in chunks of 4 KiB for 32768 pages, and the same for each consumer. If that exceeds
    /// the [`Bounds`](super::Bounds) of a consumer, the range is pending for it as a whole.
    ///
    /// ```
    /// use dirtymap::harvest::Content;
    /// use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x2000..0x5000)?;
    /// space.discard(0x3000..0x6000, || Ok(()))?; // the closure punches a hole
    /// space.mark(0x5000..0x5001)?; // a later write wins
    ///
    /// let lease = space.rounds().next()?;
    /// let page = |first: u64, end: u64| (first << 12..end << 12).to_iova_range();
    /// let told: Vec<_> = lease.contents().collect();
    /// let data = |run| (run, Content::Data);
    /// assert_eq!(told, [data(page(2, 3)?), (page(3, 5)?, Content::Zero), data(page(5, 6)?)]);
    /// lease.commit();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order:
    /// * those of the range. Nothing is touched.
    /// * [`Error::Outside`] with the first address that no area holds. Nothing is touched, and
    ///   [`SpaceStats::outside_marks`](crate::space::SpaceStats::outside_marks) counts the call.
    /// * the error of a source that could not be read or flushed. `drop_storage` is not called, and
    ///   all of `range` is dirty.
    /// * [`Error::NotDropped`] with the error of `drop_storage`. All of `range` is dirty.
    ///
    /// # Panics
    /// A panic of `drop_storage`, or of a source, goes on after all of `range` was marked dirty.
    ///
    /// [`Lease::contents`]: crate::Lease::contents
    #[doc(alias = "TRIM")]
    #[doc(alias = "UNMAP")]
    #[doc(alias = "fstrim")]
    #[doc(alias = "balloon")]
    #[doc(alias = "free_page_reporting")]
    #[doc(alias = "ram_discard_range")]
    pub fn discard(
        &self,
        range: impl ToIovaRange,
        drop_storage: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<Discarded, Error> {
        let range = range.to_iova_range()?;
        if let Some(at) = self.snapshot().contiguous(range).find_map(Result::err) {
            let bytes = range.last().get() - at.get();
            self.report_outside_mark(at, bytes.saturating_add(1));
            return Err(Error::Outside { at });
        }
        self.begin_discards();
        let mut discarding = Discarding::begin(self, range);
        discarding.take()?;
        drop_storage().map_err(|error| Error::NotDropped { range, error })?;
        Ok(discarding.finish())
    }
}

/// A discard at work. If it is dropped before it has finished, all of its range is dirty.
struct Discarding<'s> {
    space: &'s AddressSpace,
    range: IovaRange,
    /// The whole pages, by area.
    whole: Vec<(Arc<Area>, IovaRange)>,
    at_work: &'s FlightSlot,
    flight: &'s Flight,
    gather: FlushGather,
    finished: bool,
}

impl<'s> Discarding<'s> {
    /// Z1.
    fn begin(space: &'s AddressSpace, range: IovaRange) -> Self {
        let at_work = space.discarding.publish(range.round_out(space.page()));
        let mut whole = Vec::new();
        // After Z1 and before Z2: writes that are not tracked from here on come before a switch to
        // on, which forgets the zero bits.
        if space.tracks_all() {
            let snapshot = space.snapshot();
            let page = snapshot.alignment();
            for entry in snapshot.areas_in(range) {
                let part = entry.range.intersection(range);
                if let Some(part) = part.and_then(|part| part.round_in(page)) {
                    whole.push((entry.to_arc(), part));
                }
            }
        }
        Discarding {
            space,
            range,
            whole,
            at_work,
            flight: space.flights.claim(),
            gather: FlushGather::new(),
            finished: false,
        }
    }

    /// Z2 to Z4.
    fn take(&mut self) -> Result<(), Error> {
        for (area, part) in &self.whole {
            area.marks().zeros_or_new().set(*part);
        }
        // After Z2: a domain that is attached later is written to after Z2.
        let space = self.space;
        let snapshot = space.snapshot();
        let rules = snapshot.rules();
        let audience = Audience::unnamed(rules.members());
        let covered = Covered::everything(rules.attachments()).heard_by(audience);
        drop(snapshot);
        for (area, part) in &self.whole {
            let _claim = Claim::begin(space, *part);
            let mut sink = self.flight.sink(*part);
            let (sinks, how) = ((&mut sink, None), Look::Take(&mut self.gather));
            look(space, &covered, area, (*part, *part), sinks, how)
                .map_err(|stopped| stopped.error)?;
        }
        if performs(Step::FlushAtDiscard) {
            for (_, part) in &self.whole {
                for domain in covered.domains() {
                    space.owe_all_of(&mut self.gather, *part, domain);
                }
            }
            if let Some(ticket) = self.owe() {
                space.flush_until(ticket)?;
            }
        }
        // F2 of the marks' protocol; also orders the zero bits and the flush before the drop. Pairs
        // with F10 in `Shares::leave` and in `AddressSpace::zeros_to_clear`. If F2 comes
        // first, that harvest clears the zero bits that were set above; if F10 comes first, all
        // that it has cleared was written before the drop.
        space.ordering.before_copies(Step::DiscardFence);
        Ok(())
    }

    /// Hands over the debt.
    fn owe(&mut self) -> Option<crate::flush::Ticket> {
        let gather = std::mem::take(&mut self.gather);
        (!gather.is_empty()).then(|| self.space.flush.owe(&gather))
    }

    /// Ends a discard whose storage was dropped.
    fn finish(mut self) -> Discarded {
        self.finished = true;
        self.end();
        let zero_bytes = self.whole.iter().map(|(_, part)| part.len()).sum();
        Discarded {
            zero_bytes,
            dirty_bytes: self.range.len() - zero_bytes,
        }
    }

    /// Z6 and Z7.
    fn end(&self) {
        let members = {
            // A consumer that joins waits for this, or is one of those below; and so does a lease
            // of everything: see `space::bounds`.
            let _walk = self.space.walks.enter();
            for (area, part) in &self.whole {
                // F8 of the walk comes after Z3 and before this.
                let clear = |zeros: &Zeros| self.flight.clear_zeros(*part, zeros);
                self.space.visit_younger_zeros(area, *part, clear);
            }
            let members = self.space.members();
            for (_, part) in &self.whole {
                for member in members.iter() {
                    if performs(Step::TellDiscard)
                        && let Some(told) = part.intersection(member.range)
                    {
                        // Before anything is allocated, as in a join.
                        match member.has_room_for(told) {
                            true => member.pending.mark(told),
                            false => member.whole.put_back(told, &self.space.walks),
                        }
                    }
                }
            }
            members
        };
        let too_much = |member| self.space.keep_own_in_bounds(member);
        members.iter().for_each(too_much);
        let whole = self.whole.iter().map(|(_, part)| *part);
        for end in without(self.range, whole) {
            // An error says that the area has gone meanwhile. It is counted.
            let _ = self.space.mark(end);
        }
        for (_, part) in &self.whole {
            self.flight.hand_over(*part, |_, _| {});
        }
        self.flight.free();
        self.at_work.free();
    }
}

impl Drop for Discarding<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // As in an abort: the debt first, then the pages.
            let _ = self.owe();
            for (area, part) in &self.whole {
                area.marks().zeros_or_new().clear(*part);
            }
            self.end();
        }
    }
}
