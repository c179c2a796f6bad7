//! The look: what is dirty in a part of one area, and in which order the places are looked at.
//!
//! Harvest and peek differ in what they do with a page that they find, not in where they look.

use crate::bitmap::Sink;
use crate::error::Stopped;
use crate::flush::FlushGather;
use crate::source::{LeafSink, Rests};
use crate::space::{AddressSpace, Area, Covered};
use crate::sync::{Ordering, fence};
use crate::units::{Granule, Iova, IovaRange};

/// What is done with a dirty page.
pub(super) enum Look<'g> {
    /// It is recorded, owed and cleared.
    Take(&'g mut FlushGather),
    /// It is recorded.
    Peek,
}

/// Looks at what is dirty in `part` of `area`, and records it in `sink`: the tables of the domains, then what is in flight, then what
/// is kept for each domain, then the marks. Leaves that stick out of `part` are taken as far as they lie in `limit`.
///
/// A source that stops ends it for those that follow. The place where it stopped is rounded down to
/// the pages of all sources, so that none of them is cut, and told as the beginning of a granule of
/// the sink, so that no bit below it stands for anything above it. What earlier sources gave from
/// there on is in the sink: the caller puts it back.
pub(super) fn look(
    space: &AddressSpace,
    covered: &Covered,
    area: &Area,
    (part, limit): (IovaRange, IovaRange),
    sink: &mut Sink<'_>,
    mut how: Look<'_>,
) -> Result<(), Stopped> {
    let page = covered.alignment(space.page());
    // What one source could not process ends the part for all that follow: below it, the lease has everything.
    let mut rest = Some(part);
    let mut outcome = Ok(());
    for domain in covered.domains() {
        let Some(part) = rest else { break };
        sink.limit_to(if outcome.is_ok() { limit } else { part });
        let looked = match &mut how {
            Look::Peek => domain.source.peek(part, sink),
            Look::Take(gather) => {
                let keep = |run| {
                    // Whatever area the leaf belongs to, it may be younger than this walk.
                    let outside = space.put_back(run, &covered.only(domain), u64::MAX);
                    space.counters.put_back_outside(outside.bytes);
                };
                let rests = Rests {
                    in_flight: &space.in_flight,
                    keep: &keep,
                    flush: &space.flush,
                };
                let mut out = LeafSink::keeping(sink, gather, rests);
                domain.source.read_and_clear(part, &mut out)
            }
        };
        if let Err(stopped) = looked {
            (rest, outcome) = below(part, stopped, page);
        }
    }
    // Acquire: pairs with the Release fence in `LeafSink`; a thread that found a leaf clean sees its
    // rest in flight.
    fence(Ordering::Acquire);
    if let Some(part) = rest {
        sink.limit_to(part);
        if let Err(error) = space.in_flight.visit(part, |write| sink.record(write)) {
            let at = part.start();
            (rest, outcome) = below(part, Stopped { at, error }, page);
        }
    }
    // The tables came first: what an unmap takes out of them comes to what is kept, and then to the marks.
    let kept = covered.domains().iter().map(|domain| &domain.put_back);
    for marks in kept.chain(covered.marks.then_some(&*area.marks)) {
        let Some(part) = rest else { break };
        // Acquire: pairs with the Release fence of a detach; a thread that found what is kept gone
        // sees it marked.
        fence(Ordering::Acquire);
        sink.limit_to(part);
        let looked = match &how {
            Look::Peek => marks.peek(part, sink),
            Look::Take(_) => marks.read_and_clear(part, sink),
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

/// What is left of `part` below the page at which a source stopped, and the stop, at an address inside `part`.
fn below(
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
