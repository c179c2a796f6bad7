//! The set of ranges that a flush invalidates, against a naive one: no range may be lost, up to
//! both ends of the address space.

use dirtymap::flush::{FlushCost, FlushGather};
use dirtymap::{Granule, Iova, IovaRange};

/// The most ranges of a gather.
const BOUND: usize = 32;

/// A gather, and the same ranges in a sorted list without a bound.
#[derive(Default)]
struct Pair {
    gather: FlushGather,
    naive: Vec<IovaRange>,
    entries: u64,
    tables: bool,
    /// Whether the bound was reached, so that ranges were joined over gaps.
    coarse: bool,
}

impl Pair {
    fn add(&mut self, range: IovaRange, leaf: Granule) {
        self.gather.add(range, leaf);
        self.entries = self.entries.saturating_add(1);
        self.insert(range);
        self.coarse |= self.naive.len() > BOUND;
    }

    fn add_table(&mut self, range: IovaRange) {
        self.gather.add_table(range);
        self.tables = true;
        self.insert(range);
        self.coarse |= self.naive.len() > BOUND;
    }

    fn merge(&mut self, other: &Pair) {
        self.gather.merge(&other.gather);
        self.tables |= other.tables;
        self.entries = self.entries.saturating_add(other.entries);
        self.coarse |= other.coarse || self.naive.len() + other.naive.len() > BOUND;
        other.naive.iter().for_each(|range| self.insert(*range));
    }

    fn insert(&mut self, range: IovaRange) {
        self.naive.push(range);
        self.naive.sort_by_key(|range| range.start());
        let mut joined: Vec<IovaRange> = Vec::new();
        for range in self.naive.drain(..) {
            match joined.last_mut() {
                Some(last)
                    if last
                        .last()
                        .checked_add(1)
                        .is_none_or(|behind| range.start() <= behind) =>
                {
                    let end = last.last().max(range.last());
                    *last = IovaRange::new(last.start(), end).unwrap_or(*last);
                }
                _ => joined.push(range),
            }
        }
        self.naive = joined;
    }

    fn check(&self) -> Result<(), String> {
        let ranges = self.gather.ranges();
        let fail = |what: &str| Err(format!("{what}: {ranges:?} for {:?}", self.naive));
        if !self.coarse && ranges != self.naive {
            return fail("ranges differ below the bound");
        }
        if ranges.len() > BOUND {
            return fail("more ranges than the bound");
        }
        if !ranges
            .windows(2)
            .all(|pair| pair[0].last() < pair[1].start())
        {
            return fail("ranges out of order");
        }
        if let Some(lost) = self
            .naive
            .iter()
            .find(|range| !ranges.iter().any(|held| held.covers(**range)))
        {
            return fail(&format!("{lost} was forgotten"));
        }
        let ends = |ranges: &[IovaRange]| Some((ranges.first()?.start(), ranges.last()?.last()));
        if ends(ranges) != ends(&self.naive) {
            return fail("something outside was added");
        }
        if self.gather.is_empty() != self.naive.is_empty() || self.gather.entries() != self.entries
        {
            return fail("the entries are wrong");
        }
        if self.gather.tables() != self.tables {
            return fail("the tables are wrong");
        }
        if self
            .gather
            .leaves()
            .is_some_and(|leaves| leaves.smallest > leaves.largest)
        {
            return fail("the leaves are wrong");
        }
        let bytes: u128 = ranges.iter().map(|range| range.len()).sum();
        if self.gather.bytes() != bytes {
            return fail("the bytes are wrong");
        }
        let full = self.gather.to_full();
        if !full.is_full() || full.entries() != self.entries || full.tables() != self.tables {
            return fail("a full one is another debt");
        }
        self.check_costs().or_else(|what| fail(&what))
    }

    /// The costs of the ranges and of the leaves add up to the total, up to the limits of the
    /// arithmetic.
    fn check_costs(&self) -> Result<(), String> {
        for unit in [0, 1, u64::MAX] {
            let cost = |per_range, per_leaf| FlushCost {
                per_range,
                per_leaf,
                full: unit,
            };
            let [ranges, leaves, both] = [cost(unit, 0), cost(0, unit), cost(unit, unit)]
                .map(|cost| cost.of_ranges(&self.gather));
            if ranges != u128::from(unit) * self.gather.ranges().len() as u128
                || both != ranges.saturating_add(leaves)
            {
                return Err(format!("a cost of {both} for {ranges} and {leaves}"));
            }
            let all = cost(unit, unit);
            if all.prefers_full(&self.gather) != (both > u128::from(unit)) {
                return Err(format!("the wrong choice at a cost of {both}"));
            }
        }
        Ok(())
    }
}

/// Adds and merges the ranges that are decoded from `bytes`.
///
/// # Errors
/// The first difference.
pub fn check_gather(bytes: &[u8]) -> Result<(), String> {
    let mut pairs = [Pair::default(), Pair::default()];
    for step in bytes.as_chunks::<4>().0 {
        let [kind, base, offset, len] = *step;
        let [first, second] = &mut pairs;
        match kind % 16 {
            0 => first.merge(second),
            1 => second.merge(first),
            2 => *second = Pair::default(),
            3 => first.add_table(range_of(kind, base, offset, len)),
            to => pairs[usize::from(to % 2)].add(range_of(kind, base, offset, len), leaf_of(kind)),
        }
        pairs.iter().try_for_each(Pair::check)?;
    }
    Ok(())
}

/// A range near one of the places where numbers wrap.
fn range_of(kind: u8, base: u8, offset: u8, len: u8) -> IovaRange {
    let unit = leaf_of(kind).bytes();
    let base = [0, 1 << 32, 1 << 48, 1 << 63, u64::MAX][usize::from(base) % 5];
    let offset = unit.wrapping_mul(u64::from(offset));
    let start = if base == u64::MAX {
        base - offset
    } else {
        base + offset
    };
    let last = start.saturating_add(unit.saturating_mul(u64::from(len % 8) + 1) - 1);
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap_or(IovaRange::ALL)
}

fn leaf_of(kind: u8) -> Granule {
    [Granule::K4, Granule::M2, Granule::G1, granule_of_one_byte()][usize::from(kind / 16) % 4]
}

fn granule_of_one_byte() -> Granule {
    Granule::from_lg2(0).unwrap_or(Granule::K4)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_is_forgotten(bytes in vec(any::<u8>(), 0..800)) {
            check_gather(&bytes).map_err(TestCaseError::fail)?;
        }
    }
}
