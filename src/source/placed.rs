//! A list of ranges that may overlap, searched by address.
//!
//! Ranges overlap in two cases: the memory slots of two of KVM's address spaces, and memory that
//! was removed with dirty pages left and memory that was added later. A search by first address
//! alone does not find a long range that begins far below. So each node of the implicit search tree
//! over the sorted list has the greatest last address of its subtree (an augmented interval tree):
//! the next range that touches a request takes a logarithm of the length of the list.

use crate::sync::Arc;
use crate::units::{Iova, IovaRange};

/// A thing at a place: a memory slot, a region.
pub trait Placed {
    /// Its range, which never changes.
    fn range(&self) -> IovaRange;
}

/// Things by address, also where their ranges overlap. A search takes a logarithm of the length of
/// the list. A change is a new list: an adapter shows it to harvests by an `Arc` under a lock.
///
/// ```
/// use dirtymap::adapter::{Placed, PlacedList};
/// use dirtymap::{IovaRange, ToIovaRange};
/// use std::sync::Arc;
///
/// struct Slot(IovaRange);
///
/// impl Placed for Slot {
///     fn range(&self) -> IovaRange {
///         self.0
///     }
/// }
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let slot = |start: u64, end: u64| -> Result<Arc<Slot>, dirtymap::Error> {
///     Ok(Arc::new(Slot((start..end).to_iova_range()?)))
/// };
/// let slots = vec![slot(0, 0x9000)?, slot(0x1000, 0x2000)?, slot(0x4000, 0x5000)?];
/// let slots = PlacedList::new(slots);
/// let parts: Vec<IovaRange> = slots.touched((0x1800..0x2800).to_iova_range()?)
///     .map(|(_, part)| part)
///     .collect();
/// assert_eq!(parts, [(0x1800..0x2800).to_iova_range()?, (0x1800..0x2000).to_iova_range()?]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct PlacedList<T> {
    /// Ascending by first address.
    items: Vec<Arc<T>>,
    /// For the middle item of each part that the search halves: the greatest last address of the
    /// part.
    reach: Vec<Iova>,
}

impl<T> Default for PlacedList<T> {
    fn default() -> Self {
        PlacedList {
            items: Vec::new(),
            reach: Vec::new(),
        }
    }
}

impl<T: Placed> PlacedList<T> {
    /// The list of `items`, in any order.
    pub fn new(mut items: Vec<Arc<T>>) -> Self {
        items.sort_by_key(|item| item.range().start());
        let mut reach = vec![Iova::MIN; items.len()];
        fill(&items, &mut reach);
        PlacedList { items, reach }
    }

    /// All items, ascending by first address.
    pub fn iter(&self) -> std::slice::Iter<'_, Arc<T>> {
        self.items.iter()
    }

    /// The items that `range` touches, each with the part of it, ascending by first address.
    pub fn touched(&self, range: IovaRange) -> impl Iterator<Item = (&Arc<T>, IovaRange)> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let found = self.next(0, self.items.len(), from, range.start())?;
            from = found + 1;
            let item = self.items.get(found)?;
            // None above the request: neither is any that follows.
            Some((item, item.range().intersection(range)?))
        })
    }

    /// The first of the items `begin..end` that is not before `from` and does not end below
    /// `start`.
    ///
    /// A part that lies in `from..` as a whole is entered only if it has one. So a search goes down
    /// two paths of the tree at most: one to the place of `from`, and one to the item.
    fn next(&self, begin: usize, end: usize, from: usize, start: Iova) -> Option<usize> {
        let middle = begin + (end - begin) / 2;
        if end <= from || middle == end || *self.reach.get(middle)? < start {
            return None;
        }
        self.next(begin, middle, from, start).or_else(|| {
            if from <= middle && self.items.get(middle)?.range().last() >= start {
                return Some(middle);
            }
            self.next(middle + 1, end, from, start)
        })
    }
}

/// Fills in the greatest last address of each part, and returns that of all.
fn fill<T: Placed>(items: &[Arc<T>], reach: &mut [Iova]) -> Iova {
    let middle = items.len() / 2;
    let Some(item) = items.get(middle) else {
        return Iova::MIN;
    };
    let below = fill(&items[..middle], &mut reach[..middle]);
    let above = fill(&items[middle + 1..], &mut reach[middle + 1..]);
    reach[middle] = item.range().last().max(below).max(above);
    reach[middle]
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;
    use crate::compared::{count, grows_gently};

    impl Placed for IovaRange {
        fn range(&self) -> IovaRange {
            *self
        }
    }

    fn pages(first: u64, n: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
    }

    fn list(ranges: impl IntoIterator<Item = IovaRange>) -> PlacedList<IovaRange> {
        PlacedList::new(ranges.into_iter().map(Arc::new).collect())
    }

    /// Lists of every length up to 40, of ranges that overlap, repeat and nest, against a look at
    /// each of them.
    #[test]
    fn what_is_touched_is_what_a_scan_finds() {
        for n in 0..40u64 {
            let ranges = (0..n).map(|nth| pages(nth * 13 % 31, 1 + nth * nth % 9));
            let list = list(ranges);
            for first in 0..42 {
                for request in [pages(first, 1), pages(first, 7), IovaRange::ALL] {
                    let scanned: Vec<_> = list
                        .iter()
                        .filter_map(|item| Some((**item, item.intersection(request)?)))
                        .collect();
                    let found: Vec<_> = list
                        .touched(request)
                        .map(|(item, part)| (**item, part))
                        .collect();
                    assert_eq!(found, scanned, "{n} ranges, {request}");
                }
            }
        }
    }

    /// A harvest searches once for each area. With a scan for each search, as many areas as ranges
    /// would cost the square. One range that holds all others must not make a search a scan.
    #[test]
    fn looking_for_each_range_grows_as_a_search_does() {
        for holds_all in [false, true] {
            let what = format!("a look for each range, one holds all: {holds_all}");
            grows_gently(&what, |n| {
                let all = holds_all.then(|| pages(0, 2 * n));
                let list = list((0..n).map(|nth| pages(2 * nth, 1)).chain(all));
                count(|| {
                    for nth in 0..n {
                        let found = list.touched(pages(2 * nth, 1)).count();
                        assert_eq!(found, 1 + usize::from(holds_all));
                    }
                })
            });
        }
    }
}
