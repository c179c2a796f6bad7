//! The walk: which pieces of a request are looked at, in which order, and at what in each.
//!
//! ```text
//!  request --> runs of the mask, or all of it --> steps, up to a bound --> areas --> look at each
//! ```
//!
//! Harvest and peek differ in what they do with a page that they find, not in where they look.

use super::HarvestRequest;
use super::lease::Holding;
use super::request::Holes;
use crate::bitmap::{BitmapView, Runs, Sink};
use crate::error::Error;
use crate::flush::FlushGather;
use crate::source::{LeafSink, Rests, Stopped};
use crate::space::{AddressSpace, Area, Areas, Covered};
use crate::sync::{Ordering, fence};
use crate::units::{Granule, Iova, IovaRange};

/// The parts of a request in ascending order: runs of its mask, or all of it.
pub(super) struct Parts<'m> {
    /// From where the request begins.
    asked: IovaRange,
    /// None of the sources' pages is cut.
    page: Granule,
    granule: Granule,
    mask: Option<Runs<'m>>,
    /// Where the next part may begin; `None` when there is none.
    next: Option<Iova>,
}

impl<'m> Parts<'m> {
    pub(super) fn new(request: &HarvestRequest<'m>, asked: IovaRange, page: Granule) -> Self {
        Parts {
            asked,
            page,
            granule: request.granule(),
            mask: request.mask().map(BitmapView::runs),
            next: Some(asked.start()),
        }
    }

    /// The next part.
    ///
    /// # Errors
    /// If a window of a mask in a file cannot be read.
    pub(super) fn next(&mut self) -> Result<Option<IovaRange>, Stopped> {
        let Some(start) = self.next else {
            return Ok(None);
        };
        let Some(runs) = &mut self.mask else {
            self.next = None;
            return Ok(Some(self.asked));
        };
        loop {
            let run = runs.next_readable().map_err(|error| Stopped {
                at: start.granule_start(self.granule),
                error,
            })?;
            let Some(run) = run else {
                self.next = None;
                return Ok(None);
            };
            let whole_pages = run.round_in(self.page);
            if let Some(part) = whole_pages.and_then(|run| run.intersection(self.asked)) {
                self.next = Some(part.last().checked_add(1).unwrap_or(part.last()));
                return Ok(Some(part));
            }
        }
    }
}

/// Takes what `request` asks for. Says where to go on if a bound was reached.
pub(super) fn walk(
    holding: &mut Holding<'_>,
    snapshot: &Areas<'_>,
    request: &HarvestRequest<'_>,
    asked: IovaRange,
    sink: &mut Sink<'_>,
) -> Result<Option<Iova>, Stopped> {
    // Steps end at pages of all sources: none of them is cut.
    let page = snapshot.alignment();
    let step_end = request.granule().max(page);
    let mut parts = Parts::new(request, asked, page);
    let mut step = request.first_step();
    let bounded = step.is_some();
    while let Some(part) = parts.next()? {
        let mut next = Some(part.start());
        while let Some(start) = next {
            if bounded && step.is_none() {
                return Ok(Some(start));
            }
            let last = match step {
                None => part.last(),
                Some(bits) => {
                    let bytes = u128::from(bits) << request.granule().lg2();
                    let end = u128::from(start.get()) + bytes - 1;
                    let last = u64::try_from(end).map_or(Iova::MAX, Iova::new);
                    last.granule_last(step_end).min(part.last())
                }
            };
            let piece = IovaRange::ascending(start, last);
            for entry in areas(snapshot, piece, request) {
                holding.take(entry?, piece, sink)?;
            }
            next = last.checked_add(1).filter(|next| *next <= part.last());
            if bounded {
                step = request.step(sink.bits_set());
            }
        }
    }
    Ok(None)
}

/// The areas in `piece`, in ascending order; with the first hole, if the request does not skip it.
pub(super) fn areas<'s>(
    snapshot: &'s Areas<'_>,
    piece: IovaRange,
    request: &HarvestRequest<'_>,
) -> impl Iterator<Item = Result<&'s Area, Stopped>> {
    let range = request.range();
    let skips = request.on_hole() == Holes::Skip;
    let all = skips.then(|| snapshot.areas_in(piece));
    let contiguous = (!skips).then(|| snapshot.contiguous(piece));
    let found = contiguous.into_iter().flatten();
    let found = found.map(move |entry| match entry {
        Ok(entry) => Ok(entry.area),
        Err(at) => Err(Stopped {
            at,
            error: Error::Hole { at, range },
        }),
    });
    let all = all.into_iter().flatten();
    all.map(|entry| Ok(entry.area)).chain(found)
}

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
///
/// What is in flight is seen and not taken: it goes to the second sink, if there is one.
pub(super) fn look(
    space: &AddressSpace,
    covered: &Covered,
    area: &Area,
    (part, limit): (IovaRange, IovaRange),
    (sink, seen): (&mut Sink<'_>, Option<&mut Sink<'_>>),
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
                    shared: covered.audience.is_shared(),
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
        let visited = match seen {
            Some(seen) => space.in_flight.visit(part, |write| seen.record(write)),
            None => space.in_flight.visit(part, |write| sink.record(write)),
        };
        if let Err(error) = visited {
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
