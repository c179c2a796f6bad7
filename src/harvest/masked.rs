//! Clear by mask: read first, and clear later exactly what was read.

use super::{HarvestError, HarvestRequest, Lease, Owed};
use crate::bitmap::{BitmapView, UserBitmap};
use crate::source::Stopped;
use crate::space::AddressSpace;

use super::lease::Holding;

impl AddressSpace {
    /// As [`harvest`](Self::harvest), but takes only what is set in `mask`, and leaves everything else dirty. So a consumer
    /// [peeks](Self::peek) once, and clears piece by piece just before it copies a piece: pages that are written again in
    /// between cost one copy, not two. `KVM_CLEAR_DIRTY_LOG` is the model.
    ///
    /// `mask` may have another base and granule than the request. Marks and leaves are cleared as far as whole smallest pages lie
    /// in a run of it; bits of it that are clean are fine. The lease holds what was dirty, in `bitmap`, which must not be the
    /// memory of `mask`: what is set there already counts as taken by an abort.
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest); a hole stops only a harvest whose mask has a bit there. [`HarvestError::Stopped`] also if a
    /// window of a mask in a file cannot be read.
    pub fn harvest_masked<'a>(
        &'a self,
        request: &HarvestRequest,
        mask: &BitmapView<'_>,
        bitmap: UserBitmap<'a>,
    ) -> Result<Lease<'a, Owed>, HarvestError<'a>> {
        let snapshot = self.snapshot();
        let (bound, covered) = self
            .check(request, bitmap, &snapshot)
            .map_err(HarvestError::Refused)?;
        let mut holding = Holding::begin(self, bound.view(), covered);
        let mut sink = bound.into_sink();
        // Sources clear whole pages of theirs.
        let page = snapshot.alignment();
        let mut runs = mask.runs();
        let mut at = request.range().start();
        loop {
            let run = match runs.next_readable() {
                Ok(Some(run)) => run,
                Ok(None) => {
                    holding.walked(&snapshot);
                    return Ok(holding.into_lease(&sink));
                }
                Err(error) => {
                    holding.walked(&snapshot);
                    let at = at.granule_start(request.granule());
                    return Err(holding.stopped(Stopped { at, error }, &sink));
                }
            };
            let whole_pages = run
                .round_in(page)
                .and_then(|run| run.intersection(request.range()));
            let Some(run) = whole_pages else { continue };
            if let Err(stopped) = self.walk(&mut holding, &snapshot, run, &mut sink) {
                holding.walked(&snapshot);
                return Err(holding.stopped(stopped, &sink));
            }
            at = run.last().checked_add(1).unwrap_or(run.last());
        }
    }
}
