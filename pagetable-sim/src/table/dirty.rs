//! The dirty bit: hardware sets it, a harvest reads and clears it.
//!
//! ```text
//!  device write --walk--> D := 1 in the entry it hits (compare-exchange, while present and writable)
//!  harvest ------scan---> record, owe, then D := 0 in every entry of the leaf (compare-exchange)
//! ```
//!
//! For one leaf the harvest sees D set, records the leaf, owes its invalidation and clears D, in this order. Hardware
//! may act in between:
//! - a write that sets nothing because D is still set lands in a leaf that is recorded already;
//! - a write after the clear sets D anew, unless the device goes by a cached "D is set": then it leaves no trace, until
//!   the invalidation that the harvest owes makes the device forget. The page is recorded and copied after that, so the
//!   write is in the copy.
//!
//! "D" is what the format calls written: a bit that is set or, for Arm, one that is not.
//!
//! # What may be cleaned
//! D is cleared only in an entry whose leaf, at that moment, lies inside what was recorded. So if the leaf was unmapped,
//! split or merged since it was seen: an absent entry stays absent, a table a table; a smaller leaf becomes clean, all of
//! it was recorded; a larger one stays dirty. That is why cleaning is a compare-exchange, and no `fetch_and`, which would
//! take the D of whatever it hits.

use std::ops::ControlFlow;

use crossbeam_epoch::Guard;
use dirtymap::sync::{Ordering, Step, performs};
use dirtymap::{Granule, Iova, IovaRange, LeafSink, Sink, Stopped};

use super::skip::{Harvest, Upper, is_quiet};
use super::{AtomicIopte, Found, Leaf, Table, any_dirty, child, is_leaf};
use crate::error::Error;
use crate::fmt::Format;

/// A dirty leaf that a scan found.
pub(super) struct DirtyLeaf<'g> {
    /// All entries of the leaf.
    group: &'g [AtomicIopte],
    level: u32,
    /// All addresses of the leaf.
    pub(super) span: IovaRange,
    pub(super) size: Granule,
}

impl DirtyLeaf<'_> {
    /// Makes the leaf clean; whether it was dirty until now.
    pub(super) fn clear<F: Format>(&self) -> bool {
        let mut was_dirty = false;
        for slot in self.group {
            // Relaxed: only the first guess of the compare-exchange.
            let mut entry = slot.load(Ordering::Relaxed);
            while F::is_present(entry)
                && is_leaf::<F>(entry, self.level)
                && F::is_dirty(entry)
                && F::leaf_size(entry, self.level) <= self.size
            {
                // Acquire on success: pairs with the Release of `set_dirty`. Release: whoever finds D clear, hardware or
                // an unmap, sees what the scan did before. Relaxed on failure: the next guess.
                match slot.replace(
                    entry,
                    F::MAKE_CLEAN.of(entry),
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                ) {
                    Ok(()) => {
                        was_dirty = true;
                        break;
                    }
                    Err(now) => entry = now,
                }
            }
            if !performs(Step::CleanEveryEntry) {
                break;
            }
        }
        was_dirty
    }
}

/// What a scan is for.
pub(super) trait Visitor<F: Format> {
    /// What it remembers while it is below an entry.
    type Look;

    /// A dirty leaf.
    fn leaf(&mut self, leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error>;
    /// An entry that leads to a table; `None` if the scan need not look there.
    fn enter(&mut self, upper: &Upper<'_>) -> Option<Self::Look>;
    /// The scan comes back from there; an error of [`leaf`](Self::leaf) may have ended it early.
    fn leave(&mut self, upper: &Upper<'_>, look: Self::Look);
}

/// A scan that says nothing of what is above leaves.
pub(super) struct Plainly<'v, V> {
    pub(super) visit: &'v mut V,
    /// It need not look below what is quiet.
    pub(super) skips: bool,
}

impl<F, V> Visitor<F> for Plainly<'_, V>
where
    F: Format,
    V: FnMut(&DirtyLeaf<'_>) -> Result<(), dirtymap::Error>,
{
    type Look = ();

    fn leaf(&mut self, leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error> {
        (self.visit)(leaf)
    }

    fn enter(&mut self, upper: &Upper<'_>) -> Option<()> {
        (!self.skips || !is_quiet::<F>(upper.entry)).then_some(())
    }

    fn leave(&mut self, _upper: &Upper<'_>, _look: ()) {}
}

impl<F: Format> Table<F> {
    /// The walk of a write: sets D in the entry that maps `iova` in one step, while it is present and writable. Returns
    /// the leaf as it was found (`dirty` tells whether D was set in that entry before), `None` if nothing is mapped
    /// there. A leaf that is not writable stays as it is.
    pub fn set_dirty(&self, iova: Iova) -> Option<Leaf> {
        let guard = crossbeam_epoch::pin();
        loop {
            let found = self.walk(iova, &guard)?;
            let leaf = found.leaf::<F>();
            if leaf.dirty || !leaf.access.writes() {
                return Some(leaf);
            }
            if make_dirty::<F>(&found) {
                self.heat(found.span, &guard);
                return Some(leaf);
            }
            // The entry changed meanwhile. Walk anew: the leaf may have been split or merged, and was never gone then.
        }
    }

    /// Makes every leaf that `range` touches dirty, writable or not. Addresses without a leaf are skipped. Lock-free;
    /// may run at the same time as everything else.
    ///
    /// # Errors
    /// [`Error::TooWide`], [`Error::Unaligned`]; nothing is changed then.
    pub fn make_dirty(&self, range: IovaRange) -> Result<(), Error> {
        Self::check_range(range)?;
        let guard = crossbeam_epoch::pin();
        self.dirty_entries(range, &guard);
        self.heat(range, &guard);
        Ok(())
    }

    /// Sets D in every entry that `range`, which the table can map, touches.
    pub(super) fn dirty_entries(&self, range: IovaRange, guard: &Guard) {
        let done = self.visit(range, guard, &mut |mut found| {
            while !make_dirty::<F>(&found) {
                match self.walk(found.span.start(), guard) {
                    // A table took its place, or the reverse.
                    Some(now) if now.level != found.level => self.dirty_entries(found.span, guard),
                    Some(now) => {
                        found = now;
                        continue;
                    }
                    None => (),
                }
                break;
            }
            ControlFlow::<()>::Continue(())
        });
        debug_assert!(done.is_continue());
    }

    /// Hands the dirty leaves that `range` touches to `out`, which has them cleared. Addresses without a leaf are
    /// skipped. Lock-free; may run at the same time as everything else.
    ///
    /// # Errors
    /// [`Stopped`] with the first address that was not processed, and the error of `out`.
    pub fn read_and_clear(
        &self,
        range: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
        let mut harvest = Harvest::new(out, self.skips());
        let done = self.scan(range, &mut harvest);
        if harvest.skipped != 0 {
            // Relaxed: a count.
            self.skipped.fetch_add(harvest.skipped, Ordering::Relaxed);
        }
        done
    }

    /// Records the dirty state of `range` and changes nothing.
    ///
    /// # Errors
    /// As [`read_and_clear`](Self::read_and_clear).
    pub fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let mut look = |leaf: &DirtyLeaf<'_>| match leaf.span.intersection(range) {
            Some(part) => sink.record(part),
            None => Ok(()),
        };
        let mut visitor = Plainly {
            visit: &mut look,
            skips: self.skips(),
        };
        self.scan(range, &mut visitor)
    }

    /// Makes every leaf clean and tells nobody what was dirty.
    pub fn clean(&self) {
        let mut clear = |leaf: &DirtyLeaf<'_>| {
            leaf.clear::<F>();
            Ok(())
        };
        let mut visitor = Plainly {
            visit: &mut clear,
            skips: false,
        };
        let done = self.scan(IovaRange::ALL, &mut visitor);
        debug_assert!(done.is_ok());
    }

    /// Visits the dirty leaves that `range` touches, in order.
    pub(super) fn scan(
        &self,
        range: IovaRange,
        visit: &mut impl Visitor<F>,
    ) -> Result<(), Stopped> {
        let guard = crossbeam_epoch::pin();
        for part in Self::reach().filter_map(|reach| reach.intersection(range)) {
            scan_table::<F, _>(&self.root, F::LEVELS - 1, part, visit, &guard)?;
        }
        Ok(())
    }
}

/// Sets D in the entry, unless it is set; false if the entry is no longer what was found.
pub(super) fn make_dirty<F: Format>(found: &Found<'_>) -> bool {
    // AcqRel on success: D is in the table before the data is in memory, and after what the last clear of D recorded;
    // pairs with `DirtyLeaf::clear`. Relaxed on failure: the caller walks anew.
    F::is_dirty(found.entry)
        || found
            .slot()
            .replace(
                found.entry,
                F::written(found.entry),
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .is_ok()
}

/// Visits the dirty leaves of `range` in the subtree of `page`. Eight entries with nothing to look at cost eight loads
/// and one OR.
fn scan_table<F, V>(
    page: &[AtomicIopte],
    level: u32,
    range: IovaRange,
    visit: &mut V,
    guard: &Guard,
) -> Result<(), Stopped>
where
    F: Format,
    V: Visitor<F>,
{
    // A leaf that sticks out may be dirty by an entry outside of the range only.
    let first = group_at::<F>(page, level, F::index(range.start().get(), level)).0;
    let last = group_at::<F>(page, level, F::index(range.last().get(), level)).1;
    // Entries below this one belong to a leaf that was visited.
    let mut next = first;
    let mut look = |index: usize| {
        if index >= next {
            next = scan_entry::<F, V>(page, level, index, range, visit, guard)?;
        }
        Ok(())
    };
    let (eights, rest) = page[first..=last].as_chunks::<8>();
    for (nth, eight) in eights.iter().enumerate() {
        // Relaxed: only decides whether to look closer. A D that was set before the harvest began is seen, because
        // whatever tells the harvester that the write is done also orders this load after it.
        let any = eight.iter().fold(0, |any, entry| {
            any | F::worth_a_look(entry.load(Ordering::Relaxed), level)
        });
        if any != 0 {
            for i in 0..8 {
                look(first + nth * 8 + i)?;
            }
        }
    }
    for i in 0..rest.len() {
        look(first + eights.len() * 8 + i)?;
    }
    Ok(())
}

/// The first and the last entry of the leaf that entry `index` belongs to; the entry itself if it holds none.
fn group_at<F: Format>(page: &[AtomicIopte], level: u32, index: usize) -> (usize, usize) {
    // Relaxed: only says where to look.
    let entry = page[index].load(Ordering::Relaxed);
    if !F::is_present(entry) || !is_leaf::<F>(entry, level) {
        return (index, index);
    }
    let others = (1 << F::group_lg2(entry, level)) - 1;
    (index & !others, index | others)
}

/// Visits the dirty leaves that `range` touches under one entry of a table of `level`. Returns the next entry to look
/// at.
fn scan_entry<F, V>(
    page: &[AtomicIopte],
    level: u32,
    index: usize,
    range: IovaRange,
    visit: &mut V,
    guard: &Guard,
) -> Result<usize, Stopped>
where
    F: Format,
    V: Visitor<F>,
{
    // Acquire: pairs with the Release that installed the entry, in `map`; publishes the table it leads to.
    let entry = page[index].load(Ordering::Acquire);
    if !F::is_present(entry) {
        return Ok(index + 1);
    }
    // Bits above what the table covers come from the range; below, the index says them.
    let from = range.start().granule_start(F::size(level)).get();
    let away = (index as u64).wrapping_sub(F::index(from, level) as u64) << F::size(level).lg2();
    let span = IovaRange::granule_at(Iova::new(from.wrapping_add(away)), F::size(level));
    if !is_leaf::<F>(entry, level) {
        if let Some(part) = span.intersection(range) {
            let upper = Upper {
                slot: &page[index],
                entry,
                level,
                span,
                whole: part == span,
            };
            if let Some(look) = visit.enter(&upper) {
                let child = child::<F>(entry, guard);
                let done = scan_table::<F, V>(child, level - 1, part, visit, guard);
                visit.leave(&upper, look);
                done?;
            }
        }
        return Ok(index + 1);
    }
    let found = Found {
        page,
        level,
        index,
        entry,
        span,
    };
    let (group, leaf) = (found.group::<F>(), found.range::<F>());
    let next = (index & !(group.len() - 1)) + group.len();
    let seen = F::is_dirty(entry) || performs(Step::ReadEveryEntry) && any_dirty::<F>(group, level);
    if seen && let Some(part) = leaf.intersection(range) {
        let size = found.size::<F>();
        let leaf = DirtyLeaf {
            group,
            level,
            span: leaf,
            size,
        };
        visit.leaf(&leaf).map_err(|error| Stopped {
            at: part.start(),
            error,
        })?;
    }
    Ok(next)
}
