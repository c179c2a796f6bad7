//! The epochs of a consumer. There are no merges here: each cursor has all pages that were
//! committed since.

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::harvest::{Epoch, Parent, Why};

use crate::op::Limits;

/// No bounds.
const WIDE: Limits = Limits {
    bytes: 1 << 30,
    deltas: 64,
    age: u64::MAX,
};

/// The epochs of one consumer.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    /// The newest epoch.
    pub(crate) head: Epoch,
    /// The parent of the next lease.
    pub(crate) top: Parent,
    /// The highest number of a lease or an epoch.
    pub(crate) last: u64,
    made: u64,
    /// The number of the first epoch since writes were untracked.
    first: u64,
    cursors: BTreeMap<u64, Kept>,
    /// The leases of which parts were committed since the newest epoch.
    parts: BTreeSet<u64>,
    /// All epochs, ascending.
    pub(crate) past: Vec<Epoch>,
    pub(crate) limits: Limits,
}

/// An epoch with cursors.
#[derive(Clone, Debug)]
struct Kept {
    holds: u64,
    /// The number of epochs before it.
    born: u64,
    /// The pages that were committed after it.
    written: BTreeSet<u64>,
    delta: Delta,
}

/// Whether the library has dropped what was committed after a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delta {
    No,
    /// The oracle does not know the bytes that deltas take.
    Maybe,
    Yes,
}

/// The right answer about an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    /// These pages.
    Pages(BTreeSet<u64>),
    /// These pages, or everything because of bounds.
    PagesOrBounds(BTreeSet<u64>),
    Everything(Why),
}

impl Limits {
    /// Whether the memory of pending pages and deltas is limited.
    pub(crate) fn is_small(self) -> bool {
        self.bytes < WIDE.bytes
    }

    /// Whether pending pages may be dropped.
    pub(crate) fn drops_pending(self) -> bool {
        self.is_small() || self.age < WIDE.age
    }
}

impl Ledger {
    pub(crate) fn new(first: Epoch, top: Parent) -> Self {
        Ledger {
            head: first,
            top,
            last: 0,
            made: 0,
            first: 0,
            cursors: BTreeMap::new(),
            parts: BTreeSet::new(),
            past: vec![first],
            limits: WIDE,
        }
    }

    /// The parents that a lease with this number may name now. One that took everything, because
    /// of bounds, may say so.
    pub(crate) fn parents(&self, number: u64, whole: bool) -> Vec<Parent> {
        if number <= self.head.number() {
            return vec![Parent::Unknown(Why::Late)];
        }
        let parent = match self.parts.iter().any(|part| *part != number) {
            true => Parent::Unknown(Why::Parts),
            false => self.top,
        };
        let bounds = whole.then_some(Parent::Everything(Why::Bounds));
        [parent].into_iter().chain(bounds).collect()
    }

    /// Pages are committed, as an epoch or as a part of the lease with this number.
    pub(crate) fn add(&mut self, pages: &BTreeSet<u64>, part_of: Option<u64>) {
        for kept in self.cursors.values_mut() {
            kept.written.extend(pages);
        }
        self.parts.extend(part_of);
        if part_of.is_some() {
            self.keep_within();
        }
    }

    /// An epoch was made.
    pub(crate) fn make(&mut self, epoch: Epoch) {
        self.head = epoch;
        self.top = Parent::Epoch(epoch);
        self.last = self.last.max(epoch.number());
        self.made += 1;
        self.parts.clear();
        self.past.push(epoch);
    }

    /// An epoch was made by a commit.
    pub(crate) fn commit(&mut self, epoch: Epoch) {
        self.make(epoch);
        self.keep_within();
    }

    /// Writes were not tracked for a while, and a new chain began with this epoch.
    pub(crate) fn restart(&mut self, epoch: Epoch) {
        self.make(epoch);
        self.first = epoch.number();
        for kept in self.cursors.values_mut() {
            kept.delta = Delta::Yes;
        }
    }

    /// Whether the end of the lease with this number makes an epoch, although it is aborted.
    pub(crate) fn has_part(&self, number: u64) -> bool {
        self.parts.contains(&number)
    }

    /// Whether a cursor makes an epoch first.
    pub(crate) fn has_parts(&self) -> bool {
        !self.parts.is_empty()
    }

    /// A cursor on the newest epoch.
    pub(crate) fn hold(&mut self) {
        let kept = self.cursors.entry(self.head.number()).or_insert(Kept {
            holds: 0,
            born: self.made,
            written: BTreeSet::new(),
            delta: Delta::No,
        });
        kept.holds += 1;
        if kept.delta != Delta::No {
            // Nothing was committed since, so the delta is empty, and known again.
            kept.delta = Delta::No;
        }
        self.keep_within();
    }

    pub(crate) fn release(&mut self, number: u64) {
        if let Some(kept) = self.cursors.get_mut(&number) {
            kept.holds -= 1;
            if kept.holds == 0 {
                self.cursors.remove(&number);
            }
        }
    }

    /// The epochs that have cursors.
    pub(crate) fn deltas(&self) -> Option<u64> {
        let known = self.cursors.values().all(|kept| kept.delta != Delta::Maybe);
        let held = self.cursors.values().filter(|kept| kept.delta == Delta::No);
        known.then(|| held.count() as u64)
    }

    pub(crate) fn since(&self, epoch: Epoch) -> Right {
        if epoch.consumer() != self.head.consumer() {
            return Right::Everything(Why::Foreign);
        }
        if epoch.number() > self.head.number() {
            return Right::Everything(Why::Future);
        }
        if epoch.number() < self.first {
            return Right::Everything(Why::Untracked);
        }
        match self.cursors.get(&epoch.number()) {
            Some(kept) => match kept.delta {
                Delta::No => Right::Pages(kept.written.clone()),
                Delta::Maybe => Right::PagesOrBounds(kept.written.clone()),
                Delta::Yes => Right::Everything(Why::Bounds),
            },
            None if epoch == self.head && self.parts.is_empty() => Right::Pages(BTreeSet::new()),
            None => Right::Everything(Why::Merged),
        }
    }

    /// The answer about the epoch with this number was that its delta is out of bounds.
    pub(crate) fn was_dropped(&mut self, number: u64) {
        if let Some(kept) = self.cursors.get_mut(&number) {
            kept.delta = Delta::Yes;
        }
    }

    /// The oldest deltas go until the others are within bounds.
    fn keep_within(&mut self) {
        let limits = self.limits;
        let made = self.made;
        let mut held = self
            .cursors
            .values_mut()
            .filter(|kept| kept.delta != Delta::Yes);
        let mut left: Vec<&mut Kept> = held.by_ref().collect();
        let unsure = left.iter().any(|kept| kept.delta == Delta::Maybe);
        let mut count = left.len() as u64;
        for kept in &mut left {
            if made - kept.born <= limits.age && count <= limits.deltas {
                break;
            }
            // If older ones may be gone already, the number of the others is uncertain.
            let by_age = made - kept.born > limits.age;
            kept.delta = match unsure && !by_age {
                true => Delta::Maybe,
                false => Delta::Yes,
            };
            count -= 1;
        }
        if limits.is_small() {
            let left = left.into_iter().filter(|kept| kept.delta == Delta::No);
            left.for_each(|kept| kept.delta = Delta::Maybe);
        }
    }
}
