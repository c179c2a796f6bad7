//! The entries of one table that a request touches, and comparisons of entries.

use dirtymap::sync::Ordering;
use dirtymap::{Iova, IovaRange};

use crate::fmt::{AtomicIopte, Format, Iopte};

/// One entry of a table, and its share of a request.
pub(super) struct Slot<'g> {
    pub(super) entry: &'g AtomicIopte,
    /// All addresses that the entry covers: for a group, its share of the leaf.
    pub(super) span: IovaRange,
    /// Those of them that the request covers.
    pub(super) part: IovaRange,
}

/// Whether `now`, of a table of `level`, still leads to the table that `entry` led to: A may have
/// been set in between.
pub(super) fn leads_to_same<F: Format>(now: Iopte, entry: Iopte, level: u32) -> bool {
    F::is_present(now)
        && !F::is_leaf(now, level)
        && F::table_address(now) == F::table_address(entry)
}

/// Whether any of the entries of a leaf says that it was written. Entries that changed in between
/// count if their new leaf is dirty.
pub(super) fn any_dirty<F: Format>(group: &[AtomicIopte], level: u32) -> bool {
    group.iter().any(|slot| {
        // Relaxed: D is all that is read. A D that was set before the call began is seen, because
        // the order of the two calls orders this load after it.
        let entry = slot.load(Ordering::Relaxed);
        F::is_present(entry) && F::is_leaf(entry, level) && F::is_dirty(entry)
    })
}

/// The entries of `page`, a table of `level`, that `range` touches; the range lies inside the
/// table's span.
pub(super) fn slots<F: Format>(
    page: &[AtomicIopte],
    level: u32,
    range: IovaRange,
) -> impl Iterator<Item = (usize, Slot<'_>)> {
    let first = F::index(range.start().get(), level);
    let last = F::index(range.last().get(), level);
    let base = range.start().granule_start(F::size(level)).get();
    page[first..=last]
        .iter()
        .enumerate()
        .filter_map(move |(nth, entry)| {
            let start = base + ((nth as u64) << F::size(level).lg2());
            let span = IovaRange::granule_at(Iova::new(start), F::size(level));
            let part = span.intersection(range)?;
            Some((first + nth, Slot { entry, span, part }))
        })
}
