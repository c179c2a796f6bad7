//! Discards, as the space knows them: whether there ever was one, and which pages read as zero.
//!
//! In a space without discards, harvests have none of these steps. The first discard makes the
//! *unnamed* consumer a member, as the first join does, and waits for the harvests that do not know
//! of discards. From then on each harvest records in its flight the pages that it takes, also if
//! there is no other consumer. `harvest::discard` has the protocol.
//!
//! # What nobody tracks
//! A page reads as zero only while every write to it leaves a trace. So a switch of tracking to on,
//! in the space or in one domain, an attach, and a detach of a domain that does not track, forget
//! all pages that read as zero: what was written before is not tracked. While the space or one of
//! its domains does not track, no page counts as zero. The same holds from before a switch goes on
//! until all pages are forgotten.

use std::ptr;

use super::domain::Attachment;
use super::member::Member;
use super::{AddressSpace, Area, Areas};
use crate::error::Error;
use crate::marks::Zeros;
use crate::ranges::without;
use crate::sync::{Arc, Ordering, Step, fence, lock, performs};
use crate::units::IovaRange;

impl AddressSpace {
    /// Whether harvests have to know of discards. A harvest has entered its walk before.
    pub(crate) fn has_discards(&self) -> bool {
        self.discards.any()
    }

    /// Returns when every harvest that runs knows of discards.
    pub(crate) fn begin_discards(&self) {
        if self.discards.are_known() {
            return;
        }
        self.retired.drop_all();
        let _membership = lock(&self.membership);
        if self.discards.are_known() {
            return;
        }
        self.discards.announce();
        // Relaxed: the edit publishes it, as in a join.
        self.is_shared.store(true, Ordering::Relaxed);
        let unnamed = Arc::new(Member::new("", IovaRange::ALL, self.page()));
        let _: Result<(), Error> = self.areas.update(|edit| {
            if edit.rules().members().is_empty() {
                let with = edit
                    .rules()
                    .with_members(|all| all.push(Arc::clone(&unnamed)));
                edit.set_rules(with);
            }
            Ok(())
        });
        if performs(Step::WaitForUnaware) {
            self.walks.wait();
        }
        self.discards.make_known();
    }

    /// Whether every write leaves a trace: the space tracks, and so do all of its domains.
    pub(crate) fn tracks_all(&self) -> bool {
        let tracks = |domain: &Arc<Attachment>| domain.tracking.is_on();
        // The switches come first: see `Discards::is_restarting`.
        self.tracks() && self.attachments().iter().all(tracks) && !self.discards.is_restarting()
    }

    /// Forgets which pages read as zero: not every write to them was tracked.
    pub(super) fn forget_zeros(&self) {
        // The caller holds the lock of the domains, under which discards are announced.
        if !self.has_discards() {
            return;
        }
        for entry in self.areas.snapshot().iter(IovaRange::ALL) {
            if let Some(zeros) = entry.area.marks().zeros() {
                zeros.clear(entry.range);
            }
        }
    }

    /// The pages of `area` that read as zero, for a harvest that has seen some of them dirty in
    /// other hands: it clears those.
    pub(crate) fn zeros_to_clear<'m>(&self, area: &'m Area) -> Option<&'m Zeros> {
        if !self.has_discards() || !performs(Step::SeenIsData) {
            return None;
        }
        // SeqCst: F10 of `harvest::discard`, for pages that were seen; pairs with F2 there.
        fence(Ordering::SeqCst);
        area.marks().zeros()
    }

    /// Visits the zero bits of areas that have come to the addresses `part` of `area` since it left
    /// the tree, for a walk that has taken pages there. Sources know only addresses, so a walk with
    /// an old snapshot may have taken a write to a younger area.
    ///
    /// The caller has performed a full fence since it took the pages. It pairs with F2 of the
    /// discard of a younger area, which had found that area in the tree:
    /// * If F2 comes first, this sees the claim of the old area. The younger one is in the snapshot
    ///   here, or has gone with its zero bits.
    /// * If the fence of the caller comes first, all that was taken was written before the drop.
    pub(crate) fn visit_younger_zeros(
        &self,
        area: &Area,
        part: IovaRange,
        mut visit: impl FnMut(&Zeros),
    ) {
        if !self.has_discards() || !area.is_going() {
            return;
        }
        for entry in self.snapshot().areas_in(part) {
            // The pieces of an area that was cut share its marks.
            let marks = entry.area.marks();
            if !ptr::eq(marks, area.marks())
                && let Some(zeros) = marks.zeros()
            {
                visit(zeros);
            }
        }
    }

    /// The parts of `range` that read as zero, in ascending order. The caller holds a synced lease
    /// of a harvest that began when the tree had the version `begun`.
    pub(crate) fn zero_parts(&self, range: IovaRange, begun: u64) -> Vec<IovaRange> {
        let mut parts = Vec::new();
        if self.has_discards() && self.tracks_all() {
            let snapshot = self.snapshot();
            self.add_zero_parts(&snapshot, range, begun, &mut parts);
        }
        parts
    }

    fn add_zero_parts(
        &self,
        snapshot: &Areas<'_>,
        range: IovaRange,
        begun: u64,
        parts: &mut Vec<IovaRange>,
    ) {
        for entry in snapshot.areas_in(range) {
            let Some(part) = entry.range.intersection(range) else {
                continue;
            };
            // An area that was mapped later, also while the harvest ran, has another backing than
            // pages of the lease may have.
            let area = entry.area;
            let Some(zeros) = area.marks().zeros().filter(|_| !area.is_younger(begun)) else {
                continue;
            };
            // R1.
            let zero = zeros.runs(part);
            if zero.is_empty() {
                continue;
            }
            // R2: where a discard is at work, the storage may not be dropped yet.
            let mut doubted = Vec::new();
            let at_work = performs(Step::DoubtDiscards);
            let seen: Result<(), std::convert::Infallible> = self.discarding.visit(part, |doubt| {
                if at_work {
                    doubted.push(doubt);
                }
                Ok(())
            });
            debug_assert!(seen.is_ok());
            doubted.sort_unstable_by_key(|doubt| doubt.start());
            // The looks at slots are Acquire, and pair with the Release by which a slot is freed. A
            // discard that failed has cleared its bits before that: R3 does not find them.
            for run in zero {
                let certain = without(run, doubted.iter().copied());
                // R3.
                for run in certain {
                    match performs(Step::LookAgainForZero) {
                        true => parts.extend(zeros.runs(run)),
                        false => parts.push(run),
                    }
                }
            }
        }
    }
}
