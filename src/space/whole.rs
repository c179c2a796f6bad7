//! The ranges that are pending as a whole for a consumer: everything that is mapped there is dirty
//! for it, page by page unknown. See [`bounds`](super::bounds).

use super::walks::Walks;
use crate::ranges::RangeSet;
use crate::sync::{AtomicBool, Mutex, Ordering, Step, fence, lock, performs};
use crate::units::IovaRange;

/// What is pending as a whole for one consumer.
#[derive(Debug)]
pub(crate) struct Whole {
    is_due: AtomicBool,
    ranges: Mutex<RangeSet>,
}

impl Whole {
    /// Nothing.
    pub(super) fn new() -> Self {
        Whole {
            is_due: AtomicBool::new(false),
            ranges: Mutex::new(RangeSet::new()),
        }
    }

    pub(crate) fn is_due(&self) -> bool {
        // Relaxed: the flag is stored before the consumer is published, or by an abort of the same
        // consumer. A harvest that begins after that abort sees the store by coherence. The lock
        // orders the ranges.
        self.is_due.load(Ordering::Relaxed)
    }

    /// Adds `range`, before the store of the consumer is published.
    pub(super) fn begin(&self, range: IovaRange) {
        lock(&self.ranges).add(range);
        // Relaxed: see `is_due`.
        self.is_due.store(true, Ordering::Relaxed);
    }

    /// Adds `range`, which a lease of the consumer has taken and puts back.
    pub(crate) fn put_back(&self, range: IovaRange, walks: &Walks) {
        let mut ranges = lock(&self.ranges);
        ranges.add(range);
        // Relaxed: see `is_due`.
        self.is_due.store(true, Ordering::Relaxed);
        if performs(Step::SayPutBack) {
            walks.say_put_back();
        }
        drop(ranges);
        // SeqCst: as M3 of a mark, for an abort that looks at the areas next; pairs with F6 of an
        // unmap.
        // - If this fence is first, the unmap finds the range that was added.
        // - If F6 is first, the abort finds that the area is going, and marks its pages.
        fence(Ordering::SeqCst);
    }

    /// Takes what there is in `holes`, after a harvest that has walked all areas there. Takes
    /// nothing if something was put back since, which may be of areas that the harvest has walked
    /// before, or does not know: `put_backs` is the count before the harvest loaded the root.
    pub(super) fn forget(
        &self,
        holes: impl IntoIterator<Item = IovaRange>,
        (put_backs, walks): (u64, &Walks),
    ) {
        let mut ranges = lock(&self.ranges);
        if !walks.is_put_back_count(put_backs) {
            return;
        }
        for hole in holes {
            let _ = ranges.remove(hole);
        }
        if ranges.is_empty() {
            // Relaxed: as in `take`.
            self.is_due.store(false, Ordering::Relaxed);
        }
    }

    /// Takes what there is in `part`.
    pub(crate) fn take(&self, part: IovaRange) -> Vec<IovaRange> {
        if !self.is_due() {
            return Vec::new();
        }
        let mut ranges = lock(&self.ranges);
        let taken = ranges.remove(part);
        if ranges.is_empty() {
            // Relaxed: see `is_due`; under the lock, as the stores of true.
            self.is_due.store(false, Ordering::Relaxed);
        }
        taken
    }

    /// The parts of the ranges in `part`.
    pub(crate) fn parts(&self, part: IovaRange) -> Vec<IovaRange> {
        if !self.is_due() {
            return Vec::new();
        }
        let ranges = lock(&self.ranges);
        let inside = ranges.iter().filter_map(|range| range.intersection(part));
        inside.collect()
    }

    /// Whether all of `part` is in it.
    pub(super) fn covers(&self, part: IovaRange) -> bool {
        self.is_due() && lock(&self.ranges).without(part).next().is_none()
    }
}
