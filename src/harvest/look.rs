//! The look at a part of one area: the places that may have dirty pages, in their order.
//!
//! Harvest and peek look at the same places, and differ in their treatment of a dirty page.

use super::shares::Sharing;
use crate::bitmap::Sink;
use crate::error::Stopped;
use crate::flush::FlushGather;
use crate::source::{LeafSink, Rests};
use crate::space::{AddressSpace, Area, Covered};
use crate::sync::{Ordering, fence};
use crate::units::{Granule, Iova, IovaRange};

/// The treatment of a dirty page.
pub(super) enum Look<'g> {
    /// It is recorded, owed and cleared.
    Take(&'g mut FlushGather),
    /// It is recorded.
    Peek,
}

/// Looks for dirty pages in `part` of `area`, and records them in `sink`: in the tables of the
/// domains, then in the writes in flight, then in the put-back store of each domain, then in the
/// marks. A leaf that extends past `part` is taken as far as it is inside `limit`.
///
/// A source that stops ends the look for the places after it. The stop is rounded down to the pages
/// of all sources, so that no page is cut, and to a granule of the sink, so that no bit below the
/// stop stands for bytes above it. Pages above the stop that earlier sources reported are in the
/// sink, and the caller puts them back.
///
/// In a space with several consumers, `sink` is that of a flight, and `sharing` has the harvest's
/// own sink. What is in flight is seen and not taken: it goes to the harvest's own sink. So do
/// put-back pages and marks, which are left to the others here. What sources had is in the flight
/// afterwards, and its debt in the queue.
pub(super) fn look(
    space: &AddressSpace,
    covered: &Covered,
    area: &Area,
    (part, limit): (IovaRange, IovaRange),
    (sink, mut sharing): (&mut Sink<'_>, Option<&mut Sharing<'_, '_>>),
    mut how: Look<'_>,
) -> Result<(), Stopped> {
    let page = covered.alignment(space.page());
    // A stop ends the part for all places after this source: below the stop, the lease has
    // everything.
    let mut rest = Some(part);
    let mut outcome = Ok(());
    for domain in covered.domains() {
        let Some(part) = rest else { break };
        sink.limit_to(if outcome.is_ok() { limit } else { part });
        let looked = match &mut how {
            Look::Peek => domain.source.peek(part, sink),
            Look::Take(gather) => {
                let keep = |run| {
                    // The area of the leaf may be younger than this walk.
                    let outside = space.put_back(run, &covered.only(domain), u64::MAX);
                    space.counters.put_back_outside(outside.bytes);
                };
                let rests = Rests {
                    in_flight: &space.in_flight,
                    keep: &keep,
                    flush: &space.flush,
                    shared: covered.audience.own().is_some(),
                };
                let mut out = LeafSink::keeping(sink, gather, rests);
                domain.source.read_and_clear(part, &mut out)
            }
        };
        if let Err(stopped) = looked {
            (rest, outcome) = below(part, stopped, page);
        }
    }
    // Acquire: pairs with the Release fence in `LeafSink`; a thread that found a leaf clean sees
    // its rest in flight.
    fence(Ordering::Acquire);
    if let Some(part) = rest {
        sink.limit_to(part);
        let takes = matches!(how, Look::Take(_));
        let visited = space.in_flight.visit(part, |write| {
            if takes && let Some(zeros) = space.zeros_to_clear(area) {
                zeros.clear(write);
            }
            match &mut sharing {
                Some(sharing) => sharing.own.record(write),
                None => sink.record(write),
            }
        });
        if let Err(error) = visited {
            let at = part.start();
            (rest, outcome) = below(part, Stopped { at, error }, page);
        }
    }
    if let (Some(sharing), Look::Take(gather)) = (&mut sharing, &mut how) {
        sharing.owe(gather);
    }
    // The tables come first, because an unmap moves pages from the tables to the put-back stores,
    // and then to the marks.
    let kept = covered.domains().iter().map(|domain| &domain.put_back);
    for marks in kept.chain(covered.marks.then_some(area.marks())) {
        let Some(part) = rest else { break };
        // Acquire: pairs with the Release fence of a detach; a thread that finds the put-back store
        // empty sees the pages marked.
        fence(Ordering::Acquire);
        sink.limit_to(part);
        let looked = match (&how, &mut sharing) {
            (Look::Peek, _) => marks.peek(part, sink),
            (Look::Take(_), None) => marks.read_and_clear(part, sink),
            (Look::Take(_), Some(sharing)) => sharing.take(marks, part),
        };
        if let Err(stopped) = looked {
            (rest, outcome) = below(part, stopped, page);
        }
    }
    outcome.map_err(|stopped: Stopped| Stopped {
        at: stopped.at.granule_start(sink.granule()),
        ..stopped
    })
}

/// The part of `part` below the page at which a source stopped, and the stop, with an address
/// inside `part`.
pub(super) fn below(
    part: IovaRange,
    stopped: Stopped,
    page: Granule,
) -> (Option<IovaRange>, Result<(), Stopped>) {
    let at = stopped.at.granule_start(page);
    let at = if part.contains(at) { at } else { part.start() };
    let rest = at
        .get()
        .checked_sub(1)
        .and_then(|last| IovaRange::new(part.start(), Iova::new(last)).ok());
    let error = stopped.error;
    (rest, Err(Stopped { at, error }))
}
