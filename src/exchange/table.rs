//! An owned list of runs, to send to another machine, to write to a file, or to merge with that of
//! a device.

use super::runs::{cut, merge_runs};
use crate::error::Error;
use crate::units::{Granule, IovaRange};

/// Ranges of addresses: ascending, and neither touching nor overlapping each other.
///
/// It is collected from runs in any order, overlapping or not. So the tables of several devices
/// become one table in which no page is twice:
///
/// ```
/// use dirtymap::exchange::RunTable;
/// use dirtymap::{Iova, IovaRange};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let disk = [IovaRange::from_len(Iova::new(0x3000), 0x2000)?];
/// let net = [IovaRange::from_len(Iova::new(0x1000), 0x3000)?];
/// let all: RunTable = disk.into_iter().chain(net).collect();
/// assert_eq!(all.runs(), [IovaRange::from_len(Iova::new(0x1000), 0x4000)?]);
/// # Ok(())
/// # }
/// ```
///
/// With the feature `serde` it is serialized as a sequence of ranges, and deserialized if they are
/// in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(transparent))]
pub struct RunTable {
    runs: Vec<IovaRange>,
}

impl RunTable {
    /// The table of `runs`, as they are.
    ///
    /// # Errors
    /// [`Error::UnorderedRuns`] if one of them does not begin above the end of the one before it,
    /// with at least a byte in between.
    pub fn from_ordered(runs: Vec<IovaRange>) -> Result<Self, Error> {
        match runs.windows(2).find(|pair| !apart(pair[0], pair[1])) {
            Some(pair) => Err(Error::UnorderedRuns {
                before: pair[0],
                run: pair[1],
            }),
            None => Ok(RunTable { runs }),
        }
    }

    /// The runs, ascending.
    pub fn runs(&self) -> &[IovaRange] {
        &self.runs
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The total bytes of the runs, at most 2^64.
    pub fn total_bytes(&self) -> u128 {
        self.runs.iter().map(|run| run.len()).sum()
    }

    /// Cuts the table into tables of `bytes` bytes each, the last of which may have fewer: for
    /// senders that work side by side. Runs are cut where a table is full, which is at granules of
    /// the request if those are no larger than `bytes`.
    pub fn partition(&self, bytes: Granule) -> impl Iterator<Item = RunTable> {
        let mut runs = self.runs.iter().copied();
        let mut rest = None;
        std::iter::from_fn(move || {
            let mut part = RunTable::default();
            let mut room = bytes.bytes();
            while room > 0
                && let Some(run) = rest.take().or_else(|| runs.next())
            {
                let end = run.start().checked_add(room - 1).unwrap_or(run.last());
                let (piece, behind) = cut(run, end);
                rest = behind;
                // A piece has no more bytes than there is room for.
                room -= u64::try_from(piece.len()).unwrap_or(room);
                part.runs.push(piece);
            }
            (!part.is_empty()).then_some(part)
        })
    }
}

/// Whether `next` begins above the end of `run`, with at least a byte in between.
fn apart(run: IovaRange, next: IovaRange) -> bool {
    run.last() < next.start() && !run.touches(next)
}

impl FromIterator<IovaRange> for RunTable {
    fn from_iter<T: IntoIterator<Item = IovaRange>>(runs: T) -> Self {
        let mut runs: Vec<IovaRange> = runs.into_iter().collect();
        if !runs.windows(2).all(|pair| apart(pair[0], pair[1])) {
            runs.sort_unstable_by_key(|run| run.start());
            runs = merge_runs([runs.into_iter()]).collect();
        }
        RunTable { runs }
    }
}

impl Extend<IovaRange> for RunTable {
    fn extend<T: IntoIterator<Item = IovaRange>>(&mut self, runs: T) {
        let old = std::mem::take(&mut self.runs);
        *self = old.into_iter().chain(runs).collect();
    }
}

impl<'t> IntoIterator for &'t RunTable {
    type Item = IovaRange;
    type IntoIter = std::iter::Copied<std::slice::Iter<'t, IovaRange>>;

    fn into_iter(self) -> Self::IntoIter {
        self.runs.iter().copied()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::units::Iova;

    fn run(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    #[test]
    fn any_order_becomes_one_table() {
        let mut table: RunTable = [run(8, 9), run(0, 3), run(2, 5)].into_iter().collect();
        assert_eq!(table.runs(), [run(0, 5), run(8, 9)]);
        table.extend([run(6, 7), run(20, 20)]);
        assert_eq!(table.runs(), [run(0, 9), run(20, 20)]);
        assert_eq!(table.total_bytes(), 11);
        assert_eq!(RunTable::from_iter(&table), table);
    }

    #[test]
    fn only_runs_in_order_are_taken_as_they_are() {
        assert!(RunTable::from_ordered(vec![run(0, 3), run(5, 5)]).is_ok());
        for (before, next) in [
            (run(0, 3), run(4, 5)), // would be one run
            (run(0, 3), run(2, 5)),
            (run(8, 9), run(2, 5)),
            (run(8, u64::MAX), run(0, 0)),
        ] {
            let error = RunTable::from_ordered(vec![before, next]).unwrap_err();
            assert!(matches!(error, Error::UnorderedRuns { before: b, run }
                    if b == before && run == next));
        }
    }

    #[test]
    fn parts_are_full_and_make_up_the_whole() {
        let eight = Granule::from_bytes(8).unwrap();
        let table: RunTable = [run(0, 2), run(4, 20), run(30, 31)].into_iter().collect();
        let parts: Vec<RunTable> = table.partition(eight).collect();
        let bytes: Vec<u128> = parts.iter().map(RunTable::total_bytes).collect();
        assert_eq!(bytes, [8, 8, 6]);
        assert_eq!(parts[0].runs(), [run(0, 2), run(4, 8)]);
        assert_eq!(parts.iter().flatten().collect::<RunTable>(), table);
        // The whole address space, in halves.
        let all: RunTable = [IovaRange::ALL].into_iter().collect();
        let halves: Vec<_> = all.partition(Granule::MAX).collect();
        assert_eq!(halves[1].runs(), [run(1 << 63, u64::MAX)]);
        assert_eq!(halves.len(), 2);
        assert!(RunTable::default().partition(eight).next().is_none());
    }
}
