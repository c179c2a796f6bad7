//! Splitting leaves while devices write: tracking gets finer, and a range can be unmapped in part.
//!
//! ```text
//!  one entry, to a table     build a table of parts, D as in the entry --> compare-exchange
//!  a group, entry by entry   D set?  set D in every entry of the leaf --> compare-exchange
//! ```
//!
//! # Why no write is lost
//! **Invariant.** A device holds "D is set" for a range R only if each page of R is dirty in the
//! table, or is in a harvest whose flush of that page is still to come.
//!
//! * A device that holds it for the whole leaf continues to write without a trace in the parts. It
//!   cached that from a D in some entry of the leaf, and each part starts dirty if the leaf is: for
//!   a single entry because the table of parts is installed by a compare-exchange against the very
//!   value, D included, that its parts were made from; for a group because an entry with D leaves
//!   it only after D is set in all others.
//! * The parts are then cleaned one by one. A harvest that cleans one has recorded it, and owes the
//!   flush of its addresses. That flush drops every cached translation that touches them, also
//!   those of the whole leaf. So the device walks again before it writes to another part, and sets
//!   D there.
//! * A device that walks while the entry changes fails to set D in the old value and walks anew.
//!   There is a translation at every moment.
//!
//! The parts of a dirty leaf are all dirty: a superset of the written pages, and no more than the
//! leaf reported before. A harvest that runs during the split of a group may miss a D that moves
//! between two of its entries: the next one finds it, because the table holds it from before until
//! after the split.

use std::ops::ControlFlow;

use crossbeam_epoch::Guard;
use dirtymap::sync::{Ordering, Step, performs};
use dirtymap::{Granule, Iova, IovaRange};

use super::leaf::Found;
use super::map::{Job, fill};
use super::page::{Node, TableRef, entry_for};
use super::tree::Table;
use crate::error::Error;
use crate::fmt::{Format, Iopte, LeafSizes};

impl<F: Format> Table<F> {
    /// Splits the leaf that maps both sides of `at`, so that afterwards none does: into the largest
    /// leaves of the format that fit on either side. Every part has the rights of the leaf, and is
    /// dirty if the leaf was.
    ///
    /// Calls `split` with the addresses and the size of the old leaf: devices may use it until its
    /// addresses are invalidated. For tracking it is enough to invalidate the addresses of each
    /// part when it is cleaned.
    ///
    /// Lock-free. Devices may write at the same time, and the leaf may be unmapped: the entries
    /// that are left are split.
    ///
    /// # Errors
    /// [`Error::TooWide`]; [`Error::Unaligned`] if `at` is not the start of a smallest page.
    /// Nothing is changed then.
    pub fn split_at(
        &self,
        at: Iova,
        mut split: impl FnMut(IovaRange, Granule),
    ) -> Result<(), Error> {
        let page = IovaRange::granule_at(at, F::PAGE);
        Self::check_range(page)?;
        if at != page.start() {
            let range = IovaRange::new(at, page.last()).unwrap_or(page);
            return Err(Error::Unaligned {
                range,
                page: F::PAGE,
            });
        }
        let guard = crossbeam_epoch::pin();
        if let Some(found) = self.walk(at, &guard)
            && found.range::<F>().start() < at
        {
            self.split_leaf(&found, LeafSizes::ALL, Some(at), page, &guard);
            split(found.range::<F>(), found.size::<F>());
        }
        Ok(())
    }

    /// Splits every leaf that `range` touches and whose size is not among `sizes`, into the largest
    /// that are: a set, or a [`Granule`] for all sizes up to it; the smallest page always is among
    /// them. Otherwise as [`split_at`](Self::split_at).
    ///
    /// # Errors
    /// [`Error::TooWide`], [`Error::Unaligned`]; nothing is changed then.
    pub fn split(
        &self,
        range: IovaRange,
        sizes: impl Into<LeafSizes>,
        mut split: impl FnMut(IovaRange, Granule),
    ) -> Result<(), Error> {
        Self::check_range(range)?;
        let guard = crossbeam_epoch::pin();
        self.split_all(range, sizes.into(), &mut split, &guard);
        Ok(())
    }

    /// As [`split`](Self::split), of everything.
    pub fn split_everything(
        &self,
        sizes: impl Into<LeafSizes>,
        mut split: impl FnMut(IovaRange, Granule),
    ) {
        let sizes = sizes.into();
        let guard = crossbeam_epoch::pin();
        for reach in Self::reach() {
            self.split_all(reach, sizes, &mut split, &guard);
        }
    }

    fn split_all(
        &self,
        range: IovaRange,
        sizes: LeafSizes,
        split: &mut impl FnMut(IovaRange, Granule),
        guard: &Guard,
    ) {
        let sizes = sizes.or(LeafSizes::only(F::PAGE));
        let mut done: Option<IovaRange> = None;
        let all = self.visit(range, guard, &mut |found| {
            let inside = done.is_some_and(|leaf| leaf.covers(found.span));
            if !inside && !sizes.contains(found.size::<F>()) {
                let leaf = found.range::<F>();
                self.split_leaf(&found, sizes, None, range, guard);
                split(leaf, found.size::<F>());
                done = Some(leaf);
            }
            ControlFlow::<()>::Continue(())
        });
        debug_assert!(all.is_continue());
    }

    /// Puts smaller leaves into all entries of the leaf, one of those in `all` that are split.
    fn split_leaf(
        &self,
        leaf: &Found<'_>,
        sizes: LeafSizes,
        cut: Option<Iova>,
        all: IovaRange,
        guard: &Guard,
    ) {
        // If another table has replaced this one, the parts go with the old table.
        let above = self.table_of(leaf, guard);
        let needed = all.granules(F::size(leaf.level)).min(1 << F::INDEX_LG2) as u64;
        let (range, level) = (leaf.range::<F>(), leaf.level);
        let group = leaf.group::<F>();
        let (phys, access) = (F::output(leaf.entry), F::access(leaf.entry));
        let mut job = Job::new::<F>(range, phys, access, sizes, cut);
        // The leaf that an entry becomes a share of.
        let mut part: Option<(IovaRange, Granule)> = None;
        for (nth, slot) in group.iter().enumerate() {
            let start = range.start().get() + ((nth as u64) << F::size(level).lg2());
            let span = IovaRange::granule_at(Iova::new(start), F::size(level));
            let size = match part {
                Some((part, size)) if part.covers(span) => size,
                _ => job.size_at(span.start()),
            };
            part = Some((IovaRange::granule_at(span.start(), size), size));
            // Relaxed: the first guess.
            let mut old = slot.load(Ordering::Relaxed);
            // If it is something else, the leaf was unmapped: then there is nothing to split.
            while F::is_present(old)
                && F::is_leaf(old, level)
                && F::leaf_size(old, level) == leaf.size::<F>()
                && (F::output(old), F::access(old)) == (phys, access)
            {
                let dirty = F::is_dirty(old);
                if dirty && group.len() > 1 && performs(Step::SpreadDirty) {
                    self.dirty_entries(range, guard);
                }
                job.dirty = dirty && performs(Step::DirtyParts);
                let table = || match above {
                    Some(above) => {
                        let index = F::index(span.start().get(), level);
                        TableRef::<F>::below(above, index, level - 1, needed)
                    }
                    None => TableRef::new(level - 1, false),
                };
                let new = Parts::<F>::new(&job, span, level, size, table, guard);
                // Release on success: publishes the table, and D in the other entries before this
                // one goes. Relaxed on failure: D was set or cleared, and the parts follow from
                // that.
                match slot.replace(old, new.entry, Ordering::Release, Ordering::Relaxed) {
                    Ok(()) => {
                        new.publish();
                        break;
                    }
                    Err(now) => old = now,
                }
            }
        }
        if performs(Step::HeatSplit) {
            self.heat(range, guard);
        }
    }

    /// The table that the leaf lies in, unless another one has taken its place.
    fn table_of<'g>(&'g self, leaf: &Found<'_>, guard: &'g Guard) -> Option<Node<'g>> {
        let mut node = self.root.node();
        for level in (leaf.level + 1..F::LEVELS).rev() {
            // Acquire: as the load of a walk; it may be another table than that of the walk.
            let entry = node[F::index(leaf.span.start().get(), level)].load(Ordering::Acquire);
            if !F::is_present(entry) || F::is_leaf(entry, level) {
                return None;
            }
            node = node.below::<F>(entry, guard);
        }
        std::ptr::eq(node.entries, leaf.page).then_some(node)
    }
}

/// The new value of an entry of a split leaf.
struct Parts<F: Format> {
    entry: Iopte,
    /// The table that the entry leads to, if it is no leaf.
    table: Option<TableRef<F>>,
}

impl<F: Format> Parts<F> {
    /// For an entry of a table of `level`, with the addresses `span`, where the first leaf has the
    /// given size; `table` is a new table below.
    fn new(
        job: &Job,
        span: IovaRange,
        level: u32,
        size: Granule,
        table: impl FnOnce() -> TableRef<F>,
        guard: &Guard,
    ) -> Self {
        if size >= F::size(level) {
            return Parts {
                entry: job.leaf::<F>(span.start().granule_start(size), size),
                table: None,
            };
        }
        let table = table();
        let filled = fill::<F>(table.node(), level - 1, span, job, guard);
        debug_assert!(filled.is_ok(), "nothing is in the way in a fresh table");
        Parts {
            entry: entry_for::<F>(&table, level),
            table: Some(table),
        }
    }

    /// The entry is in place.
    fn publish(self) {
        if let Some(table) = self.table {
            table.leak();
        }
    }
}
