//! The walk: the pieces of a request, in their order.
//!
//! ```text
//!  request --> runs of the mask, or all of it --> steps, up to a bound --> areas --> look at each
//! ```

use super::HarvestRequest;
use super::holding::Holding;
use super::request::Holes;
use crate::bitmap::{BitmapView, Runs, Sink};
use crate::error::Error;
use crate::source::Stopped;
use crate::space::{Area, Areas};
use crate::units::{Granule, Iova, IovaRange};

/// The parts of a request in ascending order: runs of its mask, or all of it.
pub(super) struct Parts<'m> {
    /// From where the request begins.
    asked: IovaRange,
    /// The granule of the walk, so that no page of a source is cut.
    page: Granule,
    granule: Granule,
    mask: Option<Runs<'m>>,
    /// The lowest address at which the next part may begin. `None` at the end.
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
                error: error.into(),
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

/// Takes the dirty pages of `request`. Returns the address at which to go on if a bound was
/// reached.
pub(super) fn walk(
    holding: &mut Holding<'_>,
    snapshot: &Areas<'_>,
    request: &HarvestRequest<'_>,
    asked: IovaRange,
    sink: &mut Sink<'_>,
) -> Result<Option<Iova>, Stopped> {
    // Steps end at pages of all sources, so that no page is cut.
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
