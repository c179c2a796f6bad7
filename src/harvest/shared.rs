//! Harvests of a space with several consumers.
//!
//! Each consumer is told every write by harvests of its own (contract: each consumer its own
//! truth). A write leaves one trace: the dirty bit of a leaf, or a mark. The harvest that clears it
//! takes it from all consumers, and leaves the page *pending* for the others.
//!
//! # The protocol
//! ```text
//!  T0  claim the piece: its summaries may be hidden
//!      for each dirty leaf:
//!  T1    record the page in the flight of this harvest
//!  T2    clear it
//!  T3  hand the debt of all of them to the flush queue
//!      for each chunk of put-back stores and marks:
//!  T1    record its words in our own bitmap, and in the flight
//!  T2    clear them
//!  T4    leave them pending for the other consumers
//!  T5    wipe them from the flight
//!      end the claim; for the leaves:
//!  T4  leave them pending for the other consumers; record them for our own
//!  T5  wipe the flight
//!
//!  L1  look at tables, put-back stores and marks (with T1 and T2)
//!  L2  look at words that other harvests have hidden, then at their flights
//!  L3  take what is pending for our own consumer
//!      sync: a flush that pays what the queue owes; copy
//! ```
//!
//! # Why no consumer misses a write
//! Take a write W to page p that completed before a harvest of consumer Y began, and that no other
//! harvest of Y has reported. D(p) or its mark was set by then.
//! * If it is set when Y's harvest comes to p, Y records p.
//! * If it is clear, a harvest of another consumer X has cleared it (T2), after it had recorded p
//!   in its flight (T1). Y looks at flights after tables and marks, and sees p there; or X has
//!   wiped it (T5), and Y finds it pending (T4).
//! * X clears the summary of marks before it takes their words. A harvest that trusts the summary
//!   in between finds neither the word nor a flight. So X says before (T0) that it may hide
//!   summaries of the piece, and Y looks at all words of a piece for which it finds such a claim
//!   (L2). If the claim has ended, X has recorded the words in its flight.
//! * Y copies p after its sync. A device may still write through "D is set", cached before T2. X
//!   hands its debt to the queue (T3) before p is pending (T4), and after T2. So the sync of a
//!   harvest that finds p pending pays it: a device that writes later sets D anew. A harvest that
//!   finds p in flight owes nothing for it, because p becomes pending afterwards.
//! * A consumer that joins waits for the harvests that do not know it, and flushes what their
//!   leases owe: see `space::walks` and `space::members`.
//!
//! An abort puts back into the store of its own consumer. Pages that are merely *seen*, in flight
//! of a write guard or of another harvest, are not taken, and so are not left to others.
//!
//! # Cost
//! A space without named consumers pays two counts for each harvest. With several consumers, the
//! flush queue is locked once for each piece of 64 GiB (at 4 KiB a page) that owes something. A
//! harvest that walks no tables has one piece. Marks are taken in one pass, and each line of dirty
//! pages is added to the store of each other consumer by plain loads and stores: see
//! [`Pending`](crate::marks::Pending). The flight is looked at as far as leaves were recorded in
//! it.

use super::look::{Look, below, look};
use super::shares::{Shares, Sharing, address};
use crate::bitmap::{Sink, WINDOW_BITS};
use crate::chunkmap::{CHUNK_WORDS, Handed};
use crate::error::Stopped;
use crate::flush::FlushGather;
use crate::marks::{Flight, FlightSlot};
use crate::space::{AddressSpace, Area, Covered, Member};
use crate::sync::{Arc, Ordering, Step, fence, performs};
use crate::units::{Iova, IovaRange};

/// Takes what is dirty in `part` of `area` for the consumer of `covered`, and leaves it to the
/// others. What it owes goes to the queue or, if there are no others, to `gather`. Returns how many
/// leaves the queue got, and how the walk ended.
pub(super) fn take(
    space: &AddressSpace,
    covered: &Covered,
    area: &Area,
    part: IovaRange,
    sink: &mut Sink<'_>,
    gather: &mut FlushGather,
) -> (u64, Result<(), Stopped>) {
    if !covered.audience.is_shared() && !space.has_discards() {
        let looked = look(
            space,
            covered,
            area,
            (part, part),
            (sink, None),
            Look::Take(gather),
        );
        let looked = look_further(space, covered, area, part, sink, (looked, None, true));
        return (0, rounded(looked, sink));
    }
    let mut entries = 0;
    let mut next = Some(part.start());
    while let Some(start) = next {
        // Marks owe nothing, and are in flight for a chunk at a time.
        let bits = match covered.domains() {
            [] => u64::MAX,
            _ => WINDOW_BITS,
        };
        let bytes = u128::from(bits) << space.page().lg2();
        let end = (u128::from(start.get()) / bytes + 1) * bytes - 1;
        let last = u64::try_from(end).map_or(part.last(), |end| part.last().min(Iova::new(end)));
        let piece = IovaRange::ascending(start, last);
        let mut taking = Taking::begin(Shares::new(space, covered, area, part));
        let shares = taking.shares;
        let claim = Claim::begin(space, piece);
        let looked = {
            let mut flight = shares.flight.sink(part);
            let how = Look::Take(&mut taking.gather);
            let mut sharing = Sharing::new(shares, sink);
            sharing.own.limit_to(part);
            let sinks = (&mut flight, Some(&mut sharing));
            let looked = look(space, covered, area, (piece, part), sinks, how);
            entries += sharing.entries();
            taking.part = flight.recorded_in();
            looked
        };
        drop(claim);
        sink.limit_to(part);
        let handed = taking.hand_over(sink, gather);
        entries += taking.entries;
        // The lower of two stops counts.
        let looked = match (looked, handed) {
            (Err(one), Err(two)) if two.at < one.at => Err(two),
            (Ok(()), handed) => handed,
            (looked, _) => looked,
        };
        let own = Some(shares.flight);
        let looked = look_further(space, covered, area, piece, sink, (looked, own, true));
        drop(taking);
        if looked.is_err() {
            return (entries, rounded(looked, sink));
        }
        next = last.checked_add(1).filter(|next| *next <= part.last());
    }
    (entries, Ok(()))
}

/// Records in `sink` what is dirty in `part` of `area` for the consumer of `covered`, or for any
/// consumer if `all`, and changes nothing.
pub(super) fn peek(
    space: &AddressSpace,
    covered: &Covered,
    area: &Area,
    part: IovaRange,
    all: bool,
    sink: &mut Sink<'_>,
) -> Result<(), Stopped> {
    let looked = look(space, covered, area, (part, part), (sink, None), Look::Peek);
    let looked = look_further(space, covered, area, part, sink, (looked, None, false));
    rounded(looked, sink)?;
    // After the looks at tables and flights, as the look at what is pending for the one consumer.
    let mut others = covered.audience.others().filter(|_| all);
    others.try_for_each(|other| peek_pending(space, other, part, sink))
}

/// L2 and L3, as far as the look before them got.
fn look_further(
    space: &AddressSpace,
    covered: &Covered,
    area: &Area,
    part: IovaRange,
    sink: &mut Sink<'_>,
    (looked, own, takes): (Result<(), Stopped>, Option<&Flight>, bool),
) -> Result<(), Stopped> {
    let Some(member) = covered.audience.own() else {
        return looked;
    };
    let page = covered.alignment(space.page());
    let (part, outcome) = match looked {
        Ok(()) => (Some(part), Ok(())),
        Err(stopped) => below(part, stopped, page),
    };
    let Some(part) = part else {
        return outcome;
    };
    sink.limit_to(part);
    let stores = covered.domains().iter().map(|domain| &domain.put_back);
    let stores = stores.chain(covered.marks.then_some(area.marks()));
    let again = stores.clone();
    let further = space.look_hidden(part, stores, sink).and_then(|()| {
        // Acquire: pairs with the Release of a clear, or the Release fence before it, in
        // `LeafSink` and `take::clear`. A page that was found clear is seen in flight.
        fence(Ordering::Acquire);
        space.flights.look(part, own, sink)?;
        if takes && let Some(zeros) = space.zeros_to_clear(area) {
            // What was seen above and has gone since, its harvest has cleared.
            let mut clear = |at, mask| zeros.clear_mask_at(at, mask);
            space.visit_hidden(part, again, &mut clear);
            // Acquire: as above, of a hidden word that was taken since.
            fence(Ordering::Acquire);
            space.flights.visit(part, &mut clear);
        }
        Ok(())
    });
    let further = further.and_then(|()| {
        // Acquire: pairs with the Release stores of `ChunkMap::wipe`. A page that was found wiped
        // is seen pending.
        fence(Ordering::Acquire);
        match takes {
            true => member.pending.read_and_clear(part, sink),
            false => peek_pending(space, member, part, sink),
        }
    });
    match (outcome, further) {
        (Err(one), Ok(())) => Err(one),
        // What is looked at further lies below the stop.
        (_, further) => further.map_err(|stopped| Stopped {
            at: stopped.at.granule_start(page).max(part.start()),
            ..stopped
        }),
    }
}

/// Records what is pending in `part`, page by page and as a whole.
fn peek_pending(
    space: &AddressSpace,
    member: &Arc<Member>,
    part: IovaRange,
    sink: &mut Sink<'_>,
) -> Result<(), Stopped> {
    let younger = space.younger_store(member);
    for store in [Some(member), younger.as_ref()].into_iter().flatten() {
        store.pending.peek(part, sink)?;
        for run in store.whole.parts(part) {
            let at = run.start();
            sink.record(run).map_err(|error| Stopped { at, error })?;
        }
    }
    Ok(())
}

/// A stop, at the beginning of a granule of the user's bitmap.
pub(super) fn rounded(looked: Result<(), Stopped>, sink: &Sink<'_>) -> Result<(), Stopped> {
    looked.map_err(|stopped| Stopped {
        at: stopped.at.granule_start(sink.granule()),
        ..stopped
    })
}

/// T0: a piece whose summaries this harvest may hide.
pub(super) struct Claim<'s>(Option<&'s FlightSlot>);

impl<'s> Claim<'s> {
    pub(super) fn begin(space: &'s AddressSpace, piece: IovaRange) -> Self {
        let claim = performs(Step::ClaimPiece).then(|| space.hiding.publish(piece));
        // Release: T0 before the clear of a summary. Pairs with the Acquire fence in
        // `look_hidden`: a harvest that finds a summary clear because of us sees the claim.
        fence(Ordering::Release);
        Claim(claim)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.free();
        }
    }
}

/// Pages that are taken and not handed over yet. When it is dropped, they are: to the harvest's own
/// consumer too, unless they are recorded.
struct Taking<'s> {
    shares: Shares<'s>,
    /// What may be in the flight.
    part: Option<IovaRange>,
    gather: FlushGather,
    /// Leaves that the queue got.
    entries: u64,
    handed_over: bool,
}

impl<'s> Taking<'s> {
    fn begin(shares: Shares<'s>) -> Self {
        Taking {
            shares,
            part: Some(shares.limit),
            gather: FlushGather::new(),
            entries: 0,
            handed_over: false,
        }
    }

    /// T3 to T5, with a record in `sink`. The pages that cannot be recorded stay pending for our
    /// own consumer.
    fn hand_over(&mut self, sink: &mut Sink<'_>, gather: &mut FlushGather) -> Result<(), Stopped> {
        if !self.gather.is_empty() {
            // Without the step that hands it over.
            gather.merge(&std::mem::take(&mut self.gather));
        }
        let Some(part) = self.part else {
            self.handed_over = true;
            return Ok(());
        };
        let space = self.shares.space;
        let page = space.page();
        let mut outcome = Ok(());
        // The words of the flight are those of the bitmap, if both divide pages into words alike.
        // What is in the flight lies in the range of the sink.
        let first_word = sink.first_word(Iova::MIN, page);
        self.leave(part, |chunk, handed| {
            if outcome.is_err() {
                return 0;
            }
            let recorded = match first_word {
                Some(first) => {
                    sink.or_words(first.wrapping_add(chunk * CHUNK_WORDS), handed.masks())
                }
                None => handed.masks().try_for_each(|(place, mask)| {
                    let recorded = sink.put_mask(address(space, chunk, place), page, mask);
                    recorded.map_err(|error| (place, error))
                }),
            };
            let Err((place, error)) = recorded else {
                return CHUNK_WORDS as u16;
            };
            outcome = Err(Stopped {
                at: address(space, chunk, place).max(part.start()),
                error: error.into(),
            });
            place
        });
        outcome
    }

    /// T3 to T5 of what is in the flight in `part`. `record` gets words of a chunk, and returns the
    /// place of the first one that our own consumer does not have.
    fn leave(&mut self, part: IovaRange, mut record: impl FnMut(u64, Handed<'_>) -> u16) {
        let shares = self.shares;
        self.entries += shares.owe(&mut self.gather);
        shares.flight.hand_over(part, |chunk, handed| {
            shares.leave(chunk, handed);
            let end = record(chunk, handed);
            if u64::from(end) < CHUNK_WORDS
                && let Some(own) = shares.covered.audience.own()
            {
                let rest = |place, mask| if place < end { 0 } else { mask };
                handed.with(rest, |rest| own.leave(chunk, rest));
            }
        });
        self.handed_over = true;
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        if !self.handed_over {
            // A source has panicked.
            self.leave(self.shares.limit, |_, _| 0);
        }
        self.shares.flight.free();
    }
}
