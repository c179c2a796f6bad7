//! Areas that leave the tree while a harvest records backing addresses.
//!
//! A harvest walks the areas of a snapshot, and asks sources by address. So a page that it takes
//! may have been written through an area that is younger than its snapshot. That area may even
//! leave again before the harvest ends. A harvest that [reports the
//! backing](crate::harvest::Backing) therefore needs each area that was in the tree at some time
//! between its snapshot and its end:
//!
//! ```text
//!  harvest                              unmap of an area
//!  W1  watch, under the lock            U1  empty the sources
//!  W2  load the root                    U2  record the area, under the lock, if there is a watch
//!  W3  take pages                       U3  publish the root without the area
//!  W4  load the root again
//!  W5  read what was recorded
//! ```
//!
//! Each area whose page W3 took is in the root of W2, in the root of W4, or in the record. Take an
//! area that is in neither root, and whose page was taken. It came after W2 and left before W4. So
//! its U3 is before W4, and its U2 before W5. The lock orders U2 and W1:
//! * If W1 comes first, U2 records the area, and W5 reads it.
//! * If U2 comes first, its U1 is before W1, so before W3: no source had a page of that area when
//!   the harvest looked.
//!
//! A record is dropped when the oldest watch that needs it has ended. So the memory grows with the
//! number of unmaps during the longest harvest, and not with the number of all unmaps.

use std::collections::{BTreeMap, VecDeque};

use crate::source::Mapping;
use crate::sync::{Arc, Mutex, Step, lock, performs};

/// The areas that left, shared by a space and its watches.
#[derive(Clone, Debug)]
pub(crate) struct Past(Arc<Mutex<Record>>);

#[derive(Debug, Default)]
struct Record {
    /// The areas that left, in order. The first one has number `first`.
    left: VecDeque<Mapping>,
    first: u64,
    /// The number of the first area that each watch needs, and how many watches need it.
    watches: BTreeMap<u64, u64>,
}

/// Each area that leaves while this lives is recorded.
#[derive(Debug)]
pub(crate) struct Watch {
    past: Past,
    from: u64,
}

impl Past {
    pub(super) fn new() -> Self {
        Past(Arc::new(Mutex::new(Record::default())))
    }

    /// Step W1.
    pub(crate) fn watch(&self) -> Watch {
        let mut record = lock(&self.0);
        let from = record.first + record.left.len() as u64;
        *record.watches.entry(from).or_default() += 1;
        let past = self.clone();
        Watch { past, from }
    }

    /// Step U2: before the areas leave the tree. An area that stays after all does no harm.
    pub(super) fn record(&self, leaving: impl Iterator<Item = Mapping>) {
        if !performs(Step::RecordLeaving) {
            return;
        }
        let mut record = lock(&self.0);
        if !record.watches.is_empty() {
            record.left.extend(leaving);
        }
    }
}

impl Watch {
    /// Step W5: the areas that left since this was made.
    pub(crate) fn left(&self) -> Vec<Mapping> {
        let record = lock(&self.past.0);
        let skipped = usize::try_from(self.from - record.first).unwrap_or(usize::MAX);
        record.left.iter().skip(skipped).copied().collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut record = lock(&self.past.0);
        if let Some(watches) = record.watches.get_mut(&self.from) {
            *watches -= 1;
            if *watches == 0 {
                record.watches.remove(&self.from);
            }
        }
        let end = record.first + record.left.len() as u64;
        let needed = record.watches.keys().next().copied().unwrap_or(end);
        let gone = usize::try_from(needed - record.first).unwrap_or(usize::MAX);
        record.left.drain(..gone);
        record.first = needed;
        if record.left.is_empty() {
            record.left = VecDeque::new();
        }
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::units::{Access, Iova, IovaRange};

    fn area(n: u64) -> Mapping {
        Mapping {
            range: IovaRange::from_len(Iova::new(n << 12), 1 << 12).unwrap(),
            backing: n,
            access: Access::ReadWrite,
        }
    }

    /// Harvests that overlap for ever must not keep what left long ago.
    #[test]
    fn what_no_watch_needs_is_forgotten() {
        let past = Past::new();
        past.record([area(0)].into_iter());
        let mut oldest = past.watch();
        for n in 1..1000 {
            past.record([area(n)].into_iter());
            let next = past.watch();
            assert_eq!(oldest.left(), [area(n)]);
            assert_eq!(next.left(), []);
            drop(std::mem::replace(&mut oldest, next));
            assert_eq!(lock(&past.0).left.len(), 0);
        }
        past.record((5..8).map(area));
        let second = past.watch();
        past.record([area(9)].into_iter());
        assert_eq!(oldest.left(), [5, 6, 7, 9].map(area));
        drop(oldest);
        assert_eq!(second.left(), [area(9)]);
        drop(second);
        past.record([area(1)].into_iter());
        let record = lock(&past.0);
        assert!(record.left.is_empty() && record.watches.is_empty());
    }
}
