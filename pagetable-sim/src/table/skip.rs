//! Subtrees that a harvest may skip: those whose upper entry shows that no device has walked
//! through it since a harvest found the subtree clean.
//!
//! A walk sets A in each upper entry that it reads in memory. Beside A, in the same word and in
//! bits that the format ignores there ([`Format::KNOWN`]), software stores its state of the
//! subtree:
//!
//! ```text
//!  Hot        nothing is known
//!   |           a harvest finds nothing dirty: clear A
//!  Cleared
//!   |           a flush of the subtree begins, of cached pointers to tables too
//!  Flushing
//!   |           it ends
//!  Flushed
//!   |           A is clear: one harvest begins to look at all of it
//!  Looking
//!   |           A is still clear (if it is set: Hot)
//!  Quiet      harvests skip it while A is clear
//! ```
//!
//! An entry whose A was set starts again, and so does one above a change by hand.
//!
//! # Why no write is lost
//! **Invariant.** Below an entry that is quiet and whose A is clear nothing is dirty, with two
//! exceptions: leaves that a harvest is about to take, and leaves below an entry that a change by
//! hand is about to make hot.
//!
//! * **A cached pointer** to a table lets a device set D and leave A above as it is. So a clear of
//!   A is not enough. The look that counts begins after a flush that made devices forget such
//!   pointers and finish their operations by them. A flush counts only for entries that were
//!   cleared before it began, and flushes of tables run one after the other: that is `Flushing`.
//! * **A walk from above** that comes after the clear sets A before D. If it does so before the
//!   looking harvest sets `Quiet`, the compare-exchange to `Quiet`, which includes "A is clear",
//!   fails. If it does so afterwards, A is set in a quiet entry, and no harvest skips that.
//! * **One harvest looks at a time**, and until it ends no other clears A: that would hide a walk
//!   from it. A harvest that does not reach the end, or leaves a dirty leaf, makes the entry hot.
//! * **Changes by hand** ([`Table::make_dirty`], splits and merges) set D, or move it, without a
//!   walk. They make all entries above hot, and do so last: so a harvest that missed the change
//!   does not cause later ones to skip it.
//!
//! A leaf that is mapped below a quiet entry is clean, and a device reaches it by a walk through
//! that entry.

use crossbeam_epoch::Guard;
use dirtymap::IovaRange;
use dirtymap::source::{LeafSink, Stopped};
use dirtymap::sync::{Ordering, Step, fence, performs};

use super::entries::{Slot, leads_to_same, slots};
use super::leaf::{Batch, DirtyLeaf};
use super::page::child;
use super::scan::{Upper, Visitor};
use super::tree::Table;
use crate::fmt::{AtomicIopte, Format, Iopte};

/// The software's state of the subtree below an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Known {
    /// Nothing.
    Hot = 0,
    /// Nothing was dirty when A was cleared.
    Cleared,
    /// A flush has begun since.
    Flushing,
    /// The flush has ended: a device gets below the entry only by a walk through it.
    Flushed,
    /// A harvest looks at all of it.
    Looking,
    /// That harvest found it clean, or made it so.
    Quiet,
}

impl Known {
    fn of<F: Format>(entry: Iopte) -> Self {
        const ALL: [Known; 6] = [
            Known::Hot,
            Known::Cleared,
            Known::Flushing,
            Known::Flushed,
            Known::Looking,
            Known::Quiet,
        ];
        let number = (entry.0 & F::KNOWN) / lowest_bit::<F>();
        ALL.get(number as usize).copied().unwrap_or(Known::Hot)
    }

    /// `entry`, with this state in it.
    fn put<F: Format>(self, entry: Iopte) -> Iopte {
        Iopte(entry.0 & !F::KNOWN | (self as u64 * lowest_bit::<F>()))
    }
}

const fn lowest_bit<F: Format>() -> u64 {
    match F::KNOWN & F::KNOWN.wrapping_neg() {
        0 => 1,
        bit => bit,
    }
}

fn accessed<F: Format>(entry: Iopte) -> bool {
    entry.0 & F::TABLE_ACCESSED != 0
}

/// Whether the subtree below `entry`, which leads to a table, is known to be clean.
pub(super) fn is_quiet<F: Format>(entry: Iopte) -> bool {
    F::KNOWN != 0 && !accessed::<F>(entry) && Known::of::<F>(entry) == Known::Quiet
}

/// The leaves that a harvest has found below an entry so far.
#[derive(Clone, Copy, Default)]
struct Tally {
    /// A dirty leaf.
    dirty: bool,
    /// A dirty leaf that it did not make clean. If the reason was an error, the scan ends there.
    left: bool,
}

/// The scan of a harvest.
pub(super) struct Harvest<'h, 's, 'b> {
    out: &'h mut LeafSink<'s, 'b>,
    /// Skip quiet entries, and look for more of them.
    skips: bool,
    tally: Tally,
    pub(super) skipped: u64,
}

/// A look at a subtree that has begun.
pub(super) struct Look {
    /// The tally of the scan before it came to this subtree.
    before: Tally,
    /// It may set the state to `Quiet`.
    counts: bool,
}

impl<'h, 's, 'b> Harvest<'h, 's, 'b> {
    pub(super) fn new(out: &'h mut LeafSink<'s, 'b>, skips: bool) -> Self {
        Harvest {
            out,
            skips,
            tally: Tally::default(),
            skipped: 0,
        }
    }
}

impl<F: Format> Visitor<F> for Harvest<'_, '_, '_> {
    type Look = Look;

    fn leaf(&mut self, leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error> {
        let mut taken = false;
        let done = self.out.take(leaf.span, leaf.size, || {
            taken = true;
            leaf.clear::<F>()
        });
        self.tally.dirty = true;
        self.tally.left |= !taken;
        done
    }

    #[inline(always)]
    fn leaves(&mut self, batch: &Batch<'_>, mask: u64) -> Result<(), Stopped> {
        let mut taken = 0;
        let done = self.out.take_many(batch.start, batch.size, mask, |some| {
            taken |= some;
            batch.clear::<F>(some)
        });
        self.tally.dirty = true;
        self.tally.left |= taken != mask;
        done
    }

    #[inline]
    fn skips(&self, entry: Iopte) -> bool {
        self.skips && is_quiet::<F>(entry)
    }

    fn enter(&mut self, upper: &Upper<'_>) -> Option<Look> {
        let mut counts = false;
        if self.skips {
            if is_quiet::<F>(upper.entry) {
                self.skipped += 1;
                return None;
            }
            let known = Known::of::<F>(upper.entry);
            let flushed = known == Known::Flushed
                || known == Known::Cleared && !performs(Step::LookAfterFlush);
            if upper.whole && flushed && !accessed::<F>(upper.entry) {
                let looking = Known::Looking.put::<F>(upper.entry);
                // Acquire on success: pairs with the Release of `flush_ends`, maybe of a later
                // flush than the one that the scan saw; a D that was set before is seen below. It
                // pairs with `heat_entry`, too. Relaxed on failure: A was set, or another harvest
                // looks; this look does not count.
                counts = upper
                    .slot
                    .replace(upper.entry, looking, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok();
            }
        }
        Some(Look {
            before: std::mem::take(&mut self.tally),
            counts,
        })
    }

    fn leave(&mut self, upper: &Upper<'_>, look: Look) {
        let found = self.tally;
        self.tally = Tally {
            dirty: look.before.dirty | found.dirty,
            left: look.before.left | found.left,
        };
        if look.counts {
            judge::<F>(upper, !found.left);
        } else if self.skips && upper.whole && !found.dirty && clear::<F>(upper) {
            self.out.owe_table(upper.span);
        }
    }
}

/// Ends a look that counts, which made clean all that it found if `clean`.
fn judge<F: Format>(upper: &Upper<'_>, clean: bool) {
    if !clean {
        heat_entry::<F>(upper.slot);
        return;
    }
    // Acquire: pairs with the Release of each clear of D that this look has seen by Relaxed loads
    // of leaves, or the Release fence before it.
    fence(Ordering::Acquire);
    // Relaxed: the first guess.
    let mut now = upper.slot.load(Ordering::Relaxed);
    while leads_to_same::<F>(now, upper.entry, upper.level) && Known::of::<F>(now) == Known::Looking
    {
        let known = if accessed::<F>(now) {
            Known::Hot
        } else {
            Known::Quiet
        };
        // Release on success: pairs with the Acquire of `Scan::entry`. A harvest that skips sees
        // what we recorded, and by the fence above what others recorded whose leaves we found
        // clean: with several consumers, it looks at their records next. Relaxed on failure: the
        // next guess.
        match upper.slot.replace(
            now,
            known.put::<F>(now),
            Ordering::Release,
            Ordering::Relaxed,
        ) {
            Ok(()) => break,
            Err(other) => now = other,
        }
    }
}

/// Clears A of an entry below which nothing was found, unless the entry changed since the scan came
/// to it. Returns whether a flush is owed for it.
fn clear<F: Format>(upper: &Upper<'_>) -> bool {
    match Known::of::<F>(upper.entry) {
        Known::Looking => return false,
        // The harvest that cleared A may have been unable to flush, or may not have ended.
        Known::Cleared | Known::Flushing if !accessed::<F>(upper.entry) => return true,
        Known::Flushed | Known::Quiet if !accessed::<F>(upper.entry) => return false,
        // Hot with A clear as well: as if a read had set A.
        _ => (),
    }
    let cleared = Iopte(Known::Cleared.put::<F>(upper.entry).0 & !F::TABLE_ACCESSED);
    // Relaxed, both: publishes nothing. The flush that counts changes this very word when it
    // begins, so a device that has answered it sees A clear. What the scan has found below does not
    // count: a look after the flush does. On failure a walk or another harvest was here, and
    // nothing is owed.
    upper
        .slot
        .replace(upper.entry, cleared, Ordering::Relaxed, Ordering::Relaxed)
        .is_ok()
}

/// Resets the state of the subtree. Harmless for an entry that leads to no table.
fn heat_entry<F: Format>(slot: &AtomicIopte) {
    // Release: after all changes below, and in one order with the state changes of harvests. The
    // look of a harvest that begins later sees our change, by the Acquire of `Harvest::enter`. A
    // harvest that changed the state before is overruled.
    slot.clear_bits(F::KNOWN, Ordering::Release);
}

impl<F: Format> Table<F> {
    /// Makes all entries hot that lead to tables for `range`, which the table can map: the last
    /// step of a change by hand.
    pub(super) fn heat(&self, range: IovaRange, guard: &Guard) {
        if self.skips() {
            for_upper::<F>(&self.root, F::LEVELS - 1, range, guard, &mut |slot, _| {
                heat_entry::<F>(slot.entry);
                true
            });
        }
    }

    /// Makes all entries hot.
    pub(crate) fn heat_all(&self) {
        let guard = crossbeam_epoch::pin();
        for reach in Self::reach() {
            self.heat(reach, &guard);
        }
    }

    /// A flush of `ranges`, with pointers to tables, begins. The caller has one such flush at a
    /// time.
    pub(crate) fn flush_begins(&self, ranges: &[IovaRange]) {
        self.tell(ranges, Known::Cleared, Known::Flushing);
    }

    /// The flush has ended: all devices forgot their cached entries of `ranges`.
    pub(crate) fn flush_ends(&self, ranges: &[IovaRange]) {
        self.tell(ranges, Known::Flushing, Known::Flushed);
    }

    /// Changes the state of the subtrees inside `ranges` from `old` to `new`.
    fn tell(&self, ranges: &[IovaRange], old: Known, new: Known) {
        if !self.skips() {
            return;
        }
        let guard = crossbeam_epoch::pin();
        for reach in Self::reach() {
            for range in ranges.iter().filter_map(|range| range.intersection(reach)) {
                for_upper::<F>(
                    &self.root,
                    F::LEVELS - 1,
                    range,
                    &guard,
                    &mut |slot, entry| {
                        let mut now = entry;
                        while slot.part == slot.span && Known::of::<F>(now) == old {
                            // Release on success: a look that begins from the new state comes after
                            // the flush. Nothing is read by the old one: see `clear`. Relaxed on
                            // failure: A was set, or the entry is hot or another one.
                            match slot.entry.replace(
                                now,
                                new.put::<F>(now),
                                Ordering::Release,
                                Ordering::Relaxed,
                            ) {
                                Ok(()) => break,
                                Err(other) => now = other,
                            }
                        }
                        // No harvest looks below a quiet entry. Entries that were cleared there are
                        // flushed when one does.
                        !is_quiet::<F>(now)
                    },
                );
            }
        }
    }

    /// How many subtrees harvests skipped.
    pub(crate) fn skipped(&self) -> u64 {
        // Relaxed: a count.
        self.skipped.load(Ordering::Relaxed)
    }

    /// Whether harvests skip quiet entries.
    #[inline]
    pub(super) fn skips(&self) -> bool {
        F::KNOWN != 0 && self.skip_quiet
    }
}

/// Visits the entries that lead to tables for `range`, from above, and goes below those for which
/// `visit` returns true.
fn for_upper<F: Format>(
    page: &[AtomicIopte],
    level: u32,
    range: IovaRange,
    guard: &Guard,
    visit: &mut impl FnMut(&Slot<'_>, Iopte) -> bool,
) {
    if level == 0 {
        return;
    }
    for (_, slot) in slots::<F>(page, level, range) {
        // Acquire: pairs with the Release that installed the entry; publishes the table.
        let entry = slot.entry.load(Ordering::Acquire);
        let is_table = F::is_present(entry) && !F::is_leaf(entry, level);
        if is_table && visit(&slot, entry) && level > 1 {
            for_upper::<F>(child::<F>(entry, guard), level - 1, slot.part, guard, visit);
        }
    }
}
