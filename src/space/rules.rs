//! The part of a root besides the areas: the reserved ranges, the ranges for allocation, and the
//! attached domains.
//!
//! Rules are immutable; a change makes new ones. They are published together with the areas, so if
//! a map and a reservation race, one of them sees the other. A change takes time in proportion to
//! the number of reserved and allowed ranges, of which a platform has a handful.

use super::domain::{Attachment, Attachments};
use super::member::{Member, Members};
use crate::error::Error;
use crate::ranges::{add_joined, without};
use crate::sync::Arc;
use crate::units::{Granule, Iova, IovaRange};

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    /// In order of address, each as often as it was reserved; they may overlap.
    reserved: Vec<IovaRange>,
    /// The reserved addresses as disjoint ranges that do not touch, in order.
    blocked: Vec<IovaRange>,
    /// The ranges in which allocation is allowed, in the same form. Empty means everywhere. Never
    /// intersects `blocked`.
    allowed: Vec<IovaRange>,
    /// The addresses that batches are about to map: taken, though no area holds them yet. Disjoint,
    /// in order.
    promised: Vec<IovaRange>,
    attachments: Attachments,
    members: Members,
}

impl Rules {
    /// The attached domains.
    pub(crate) fn attachments(&self) -> &Attachments {
        &self.attachments
    }

    /// The consumers.
    pub(crate) fn members(&self) -> &Members {
        &self.members
    }

    /// The rules with the list of consumers that `change` makes of the present one.
    pub(crate) fn with_members(&self, change: impl FnOnce(&mut Vec<Arc<Member>>)) -> Rules {
        let mut members = self.members.to_vec();
        change(&mut members);
        Rules {
            members: Members::new(members),
            ..self.clone()
        }
    }

    /// The rules with the list of domains that `change` makes of the present one.
    pub(crate) fn with_attachments(&self, change: impl FnOnce(&mut Vec<Arc<Attachment>>)) -> Rules {
        let mut attachments = self.attachments.to_vec();
        change(&mut attachments);
        Rules {
            attachments: Attachments(Arc::new(attachments)),
            ..self.clone()
        }
    }

    /// The granule of areas, in a space whose own smallest page is `own`.
    pub(crate) fn alignment(&self, own: Granule) -> Granule {
        self.attachments.alignment(own)
    }

    /// The first range inside `range` that a batch is about to map.
    pub(crate) fn promised_in(&self, range: IovaRange) -> Option<IovaRange> {
        first_in(&self.promised, range)
    }

    /// The parts of `range` that batches are about to map.
    pub(crate) fn promised_parts(&self, range: IovaRange) -> impl Iterator<Item = IovaRange> + '_ {
        let from = self.promised.partition_point(|p| p.last() < range.start());
        let promised = self.promised[from..].iter();
        promised.map_while(move |promised| promised.intersection(range))
    }

    /// The rules with `ranges` promised in addition. They are disjoint, also from those promised so
    /// far.
    pub(crate) fn promise(&self, ranges: &[IovaRange]) -> Rules {
        let mut rules = self.clone();
        rules.promised.extend_from_slice(ranges);
        rules.promised.sort_unstable_by_key(|range| key(*range));
        rules
    }

    /// The rules without the promise of `ranges`.
    pub(crate) fn end_promise(&self, ranges: &[IovaRange]) -> Rules {
        let mut ended = ranges.to_vec();
        ended.sort_unstable_by_key(|range| key(*range));
        let mut rules = self.clone();
        rules.promised.retain(|promised| {
            ended
                .binary_search_by_key(&key(*promised), |r| key(*r))
                .is_err()
        });
        rules
    }

    /// The first stretch of reserved addresses that intersects `range`.
    pub(crate) fn reserved_in(&self, range: IovaRange) -> Option<IovaRange> {
        first_in(&self.blocked, range)
    }

    /// The rules with `range` reserved once more.
    ///
    /// # Errors
    /// [`Error::CannotReserve`] if it intersects an allowed range.
    pub(crate) fn reserve(&self, range: IovaRange) -> Result<Rules, Error> {
        if let Some(existing) = first_in(&self.allowed, range) {
            return Err(Error::CannotReserve { range, existing });
        }
        let mut rules = self.clone();
        let at = rules.reserved.partition_point(|r| key(*r) <= key(range));
        rules.reserved.insert(at, range);
        rules.blocked = merged(&rules.reserved);
        Ok(rules)
    }

    /// The rules with one reservation of `range` removed.
    ///
    /// # Errors
    /// [`Error::NotReserved`] unless exactly this range was reserved.
    pub(crate) fn release(&self, range: IovaRange) -> Result<Rules, Error> {
        let Ok(at) = self.reserved.binary_search_by_key(&key(range), |r| key(*r)) else {
            return Err(Error::NotReserved { range });
        };
        let mut rules = self.clone();
        rules.reserved.remove(at);
        rules.blocked = merged(&rules.reserved);
        Ok(rules)
    }

    /// The rules with `ranges`, in any order, as the only ones in which allocation is allowed.
    ///
    /// # Errors
    /// [`Error::AllowedTwice`] if two of them overlap, then [`Error::CannotAllow`] if one
    /// intersects a reserved one.
    pub(crate) fn allow(&self, ranges: &[IovaRange]) -> Result<Rules, Error> {
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| key(*range));
        for pair in sorted.windows(2) {
            if pair[0].intersects(pair[1]) {
                return Err(Error::AllowedTwice {
                    range: pair[0],
                    other: pair[1],
                });
            }
        }
        for range in &sorted {
            if let Some(reserved) = self.reserved_in(*range) {
                return Err(Error::CannotAllow {
                    range: *range,
                    reserved,
                });
            }
        }
        Ok(Rules {
            allowed: merged(&sorted),
            ..self.clone()
        })
    }

    /// The allowed ranges; empty if there is no restriction.
    pub(crate) fn allowed(&self) -> &[IovaRange] {
        &self.allowed
    }

    /// The reserved addresses, as disjoint ranges that do not touch.
    pub(crate) fn blocked(&self) -> &[IovaRange] {
        &self.blocked
    }

    /// The ranges in which allocation is allowed inside `bounds`: disjoint, in ascending order.
    pub(crate) fn windows(&self, bounds: IovaRange) -> Vec<IovaRange> {
        let mut windows: Vec<IovaRange> = if self.allowed.is_empty() {
            without(bounds, self.blocked.iter().copied()).collect()
        } else {
            let inside = |allowed: &IovaRange| allowed.intersection(bounds);
            self.allowed.iter().filter_map(inside).collect()
        };
        if !self.promised.is_empty() {
            // Windows are disjoint and in order, so each promised range is compared with one or two
            // of them.
            let unpromised = |window: IovaRange| {
                let from = self.promised.partition_point(|p| p.last() < window.start());
                let inside = self.promised[from..].iter().copied();
                without(
                    window,
                    inside.take_while(move |p| p.start() <= window.last()),
                )
            };
            windows = windows.into_iter().flat_map(unpromised).collect();
        }
        windows
    }
}

fn key(range: IovaRange) -> (Iova, Iova) {
    (range.start(), range.last())
}

/// The first of `ranges`, which are disjoint and in order, that intersects `range`.
fn first_in(ranges: &[IovaRange], range: IovaRange) -> Option<IovaRange> {
    let at = ranges.partition_point(|r| r.last() < range.start());
    ranges.get(at).copied().filter(|r| r.intersects(range))
}

/// The addresses of `ranges`, which are in order of start, as disjoint ranges that do not touch.
fn merged(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut merged = Vec::with_capacity(ranges.len());
    for range in ranges {
        add_joined(&mut merged, *range);
    }
    merged
}

#[cfg(all(test, not(dirtymap_loom)))]
mod tests {
    use super::*;

    fn bytes(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first), n).unwrap_or(IovaRange::ALL)
    }

    /// In a space of pages of one byte, a range may begin at the last byte of another one.
    #[test]
    fn a_promise_holds_for_its_last_byte() {
        let rules = Rules::default().promise(&[bytes(0, 6)]);
        assert_eq!(rules.promised_in(bytes(5, 2)), Some(bytes(0, 6)));
        let parts: Vec<IovaRange> = rules.promised_parts(bytes(5, 2)).collect();
        assert_eq!(parts, [bytes(5, 1)]);
        assert_eq!(rules.windows(bytes(5, 3)), [bytes(6, 2)]);
    }
}
