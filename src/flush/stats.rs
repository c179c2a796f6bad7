//! The counts of a queue, and the report of an invalidator.

/// The report of one invalidation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Invalidated {
    /// Invalidation commands that were sent.
    pub commands: u64,
    /// Bytes that those commands named, rounding included; 2^64 for a full invalidation. 0 if the
    /// invalidator does not know.
    pub bytes: u128,
    /// Cached translations that were dropped.
    pub dropped: u64,
    /// Writes that were already translated, and that had to land first.
    pub drained: u64,
}

impl Invalidated {
    /// Adds what another source did for the same gather. Saturates.
    pub fn add(&mut self, other: Invalidated) {
        self.commands = self.commands.saturating_add(other.commands);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.dropped = self.dropped.saturating_add(other.dropped);
        self.drained = self.drained.saturating_add(other.drained);
    }
}

/// Counts of a [`FlushQueue`](super::FlushQueue) since it was made, all read under one lock.
///
/// At every moment:
/// * `owed = retired + pending`, and `merged <= retired`;
/// * `entries_owed = entries + entries_pending`;
/// * `frees_owed = frees_released + frees_pending`;
/// * `full <= flushes` and `forced <= flushes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct FlushStats {
    /// Gathers handed over, empty ones included.
    pub owed: u64,
    /// Gathers whose flush has finished.
    pub retired: u64,
    /// Gathers that wait for a flush, or whose flush is under way.
    pub pending: u64,
    /// Of the retired: gathers that needed no flush of their own, because they shared the flush of
    /// an earlier one.
    pub merged: u64,
    /// Flushes that finished. Generations in which nothing had to be invalidated are not flushes.
    pub flushes: u64,
    /// Of these: full invalidations, because the ranges would have cost more.
    pub full: u64,
    /// Of these: flushes that [`flush_due`](super::FlushQueue::flush_due) performed because a bound
    /// was reached.
    pub forced: u64,
    /// Flushes that failed; what they carried is owed again.
    pub failed: u64,
    /// Calls that waited for a flush, whether they performed it or another thread did.
    pub waits: u64,
    /// Ranges that finished flushes owed, counted before the choice of a full one.
    pub ranges: u64,
    /// Bytes of those ranges.
    pub bytes: u128,
    /// Leaves that were cleared or unmapped, of all gathers that were handed over.
    pub entries_owed: u128,
    /// Of these: leaves whose flush has finished.
    pub entries: u128,
    /// Of these: leaves that are not flushed yet. Devices may still use their cached translations.
    pub entries_pending: u128,
    /// Deferred frees handed over.
    pub frees_owed: u64,
    /// Of these: frees that have run, those that panicked included.
    pub frees_released: u64,
    /// Of these: frees that wait for a flush, or for their turn after it.
    pub frees_pending: u64,
    /// The sum of the reports of all invalidations.
    pub invalidated: Invalidated,
}

impl FlushStats {
    /// Counts a flush that finished.
    pub(super) fn flushed(&mut self, done: Invalidated, forced: bool) {
        self.flushes += 1;
        self.forced += u64::from(forced);
        self.invalidated.add(done);
    }

    /// Whether the identities of [`FlushStats`] hold.
    pub(super) fn is_consistent(&self) -> bool {
        self.retired.checked_add(self.pending) == Some(self.owed)
            && self.entries.checked_add(self.entries_pending) == Some(self.entries_owed)
            && self.frees_released.checked_add(self.frees_pending) == Some(self.frees_owed)
            && self.merged <= self.retired
            && self.full <= self.flushes
            && self.forced <= self.flushes
    }
}
