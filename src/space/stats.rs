//! The counts of an address space.

use crate::flush::FlushStats;
use crate::sync::{AtomicU64, Ordering};

/// Counts of an [`AddressSpace`](crate::AddressSpace), in bytes and calls, since it was made.
///
/// While no call is under way, `harvests = commits + aborts +` the number of live leases, and
/// `leased_bytes = committed_bytes + aborted_bytes +` the bytes of live leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct SpaceStats {
    /// Harvests that were begun.
    pub harvests: u64,
    /// Of these: leases that were committed.
    pub commits: u64,
    /// Of these: leases that were aborted or dropped.
    pub aborts: u64,
    /// Bytes that harvests reported in user bitmaps and that were not set there before.
    pub leased_bytes: u64,
    /// Of these: bytes of leases that were committed.
    pub committed_bytes: u64,
    /// Of these: bytes of leases that were aborted or dropped, and so became dirty again.
    pub aborted_bytes: u64,
    /// Bytes that an aborted lease, or a harvest with the rest of a leaf, could not put back
    /// because they were unmapped meanwhile.
    pub put_back_outside_bytes: u64,
    /// Dirty bytes that unmaps returned in user bitmaps.
    pub unmapped_dirty_bytes: u64,
    /// Dirty bytes that were discarded: by unmaps that discard, by maps that failed, and by
    /// switching tracking on.
    pub discarded_bytes: u64,
    /// Marks that touched addresses outside every area.
    pub outside_marks: u64,
    /// The flushes.
    pub flush: FlushStats,
}

/// The live counters. All accesses are Relaxed: they are statistics, and publish nothing.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    harvests: Count,
    commits: Count,
    aborts: Count,
    leased: Count,
    committed: Count,
    aborted: Count,
    put_back_outside: Count,
    unmapped: Count,
    discarded: Count,
    outside_marks: Count,
}

impl Counters {
    pub(crate) fn harvest(&self) {
        self.harvests.add(1);
    }

    pub(crate) fn commit(&self) {
        self.commits.add(1);
    }

    pub(crate) fn leased(&self, bytes: u64) {
        self.leased.add(bytes);
    }

    pub(crate) fn committed(&self, bytes: u64) {
        self.committed.add(bytes);
    }

    pub(crate) fn aborted(&self, bytes: u64, outside: u64) {
        self.aborts.add(1);
        self.aborted.add(bytes);
        self.put_back_outside(outside);
    }

    pub(crate) fn put_back_outside(&self, bytes: u64) {
        if bytes > 0 {
            self.put_back_outside.add(bytes);
        }
    }

    pub(crate) fn unmapped(&self, bytes: u128) {
        self.unmapped.add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    pub(crate) fn discarded(&self, bytes: u128) {
        self.discarded.add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    pub(crate) fn outside_mark(&self) {
        self.outside_marks.add(1);
    }

    pub(crate) fn read(&self, flush: FlushStats) -> SpaceStats {
        SpaceStats {
            harvests: self.harvests.get(),
            commits: self.commits.get(),
            aborts: self.aborts.get(),
            leased_bytes: self.leased.get(),
            committed_bytes: self.committed.get(),
            aborted_bytes: self.aborted.get(),
            put_back_outside_bytes: self.put_back_outside.get(),
            unmapped_dirty_bytes: self.unmapped.get(),
            discarded_bytes: self.discarded.get(),
            outside_marks: self.outside_marks.get(),
            flush,
        }
    }
}

#[derive(Debug, Default)]
struct Count(AtomicU64);

impl Count {
    fn add(&self, n: u64) {
        // Relaxed: a statistic.
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        // Relaxed: a statistic.
        self.0.load(Ordering::Relaxed)
    }
}
