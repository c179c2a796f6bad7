//! A request of a harvest, and what the oracle expects of it.

use dirtymap::{Error, HarvestRequest, Iova, IovaRange};

use crate::pages::pages;

/// A request, and the expected result.
pub(super) struct Request {
    pub(super) inner: HarvestRequest<'static>,
    /// The number of words of the bitmap.
    pub(super) words: usize,
    /// The whole buffer before the request.
    pub(super) before: Vec<u64>,
    /// The error with which it is refused.
    pub(super) refusal: Option<Error>,
    /// The hole at which it stops.
    pub(super) hole: Option<Iova>,
    /// The address below the hole at which a source stops it.
    pub(super) stop: Option<Iova>,
    /// The runs of pages that it walks. None if it stops at once.
    pub(super) walked: Vec<(u64, u64)>,
    /// The addresses of its lease.
    pub(super) view: IovaRange,
    /// The harvest walked whole areas above the lease, or whole stretches of a mask in them, in the
    /// granule of its stop. The lease then reaches to its end, whatever hole is there.
    pub(super) overshot: bool,
    /// The lease has no addresses, because the harvest stopped at once.
    pub(super) empty: bool,
}

impl Request {
    /// The addresses of the lease of a harvest that goes on at `next`, or that stopped at `at`.
    /// `None` if the lease has none.
    pub(super) fn view_of(&self, next: Option<Iova>, at: Option<Iova>) -> Option<IovaRange> {
        let below = |end: Iova| Iova::new(end.get() - 1).granule_last(self.inner.granule());
        if at.is_some_and(|at| at <= self.view.start()) {
            return None;
        }
        let last = next.or(at).map_or(self.view.last(), below);
        IovaRange::new(self.view.start(), last.min(self.view.last())).ok()
    }

    /// The parts of `runs` that are in the lease.
    pub(super) fn leased(&self, runs: &[IovaRange]) -> Vec<IovaRange> {
        let view = (!self.empty).then_some(self.view);
        runs.iter()
            .filter_map(|run| run.intersection(view?))
            .collect()
    }

    /// The addresses that an abort puts back: up to the last page that the harvest walked.
    pub(super) fn reached(&self) -> Option<IovaRange> {
        let (_, last) = self.walked.last().filter(|_| !self.empty)?;
        let last = match self.overshot {
            true => self.view.last(),
            false => pages(*last, *last).last(),
        };
        IovaRange::new(self.view.start(), last).ok()
    }
}
