//! The checks after each step, and at the end.

use dirtymap::space::SpaceStats;
use dirtymap::{Holes, IovaRange, Mapping};

use super::{Checked, Runner, broken};
use crate::op::{Ask, Cut, Op};
use crate::oracle::Area;
use crate::pages::{Bytes, PAGE, pages_of};
use crate::violation::{Rule, check, same};

impl Runner<'_> {
    pub(super) fn check_counts(&self) -> Checked {
        let stats = self.space.stats();
        let live: u64 = self.leases.iter().flatten().map(|held| held.bytes).sum();
        let settled = stats.committed_bytes + stats.aborted_bytes;
        same(
            Rule::Accounting,
            "bytes leased",
            stats.leased_bytes,
            settled + live + self.forgotten,
        )?;
        let flush = stats.flush;
        same(
            Rule::Accounting,
            "gathers owed",
            flush.owed,
            flush.retired + flush.pending,
        )?;
        same(
            Rule::Accounting,
            "flushes that failed",
            flush.failed,
            self.counts.flush.failed,
        )?;
        let counted = SpaceStats {
            flush: self.counts.flush,
            ..stats
        };
        same(Rule::Accounting, "the counts", counted, self.counts)?;
        self.check_consumers()
    }

    pub(super) fn check_areas(&self) -> Checked {
        let right: Vec<Mapping> = self
            .oracle
            .areas
            .values()
            .map(|area| Mapping {
                range: area.range(),
                backing: area.frame * PAGE,
                access: area.access,
            })
            .collect();
        same(Rule::Answer, "the areas", self.space.mappings(), right)
    }

    /// Devices stop, all leases are committed, and one last harvest runs. After it the copy must
    /// equal the memory, and nothing is dirty.
    pub(super) fn finish(mut self) -> Checked {
        self.world.quiesce();
        self.step(&Op::EndWrite(0))?;
        self.step(&Op::EndWrite(1))?;
        // Requested faults must not fail the last harvest.
        self.world.heal();
        self.step(&Op::Commit(0))?;
        self.step(&Op::Commit(1))?;
        if self.oracle.ever_tracked(&Ask::EVERYTHING) {
            let all = self.oracle.present();
            // A harvest may take the pending pages of a consumer out of bounds.
            let told = self.oracle.consumers.iter().flatten();
            let rounds = if told.into_iter().any(|told| told.is_loose) {
                3
            } else {
                1
            };
            for whose in (0..rounds).flat_map(|_| &all) {
                self.last_harvest(*whose)?;
            }
            self.compare()?;
            let before = self.space.stats().leased_bytes;
            for whose in all {
                self.last_harvest(whose)?;
            }
            same(
                Rule::Excess,
                "bytes dirty after the last harvest",
                self.space.stats().leased_bytes,
                before,
            )?;
            // Each flush takes all debts.
            if !self.oracle.areas.is_empty() {
                let pending = self.space.stats().flush.pending;
                same(Rule::Accounting, "gathers pending at the end", pending, 0)?;
                self.check_all_paid()?;
            }
        }
        while !self.oracle.areas.is_empty() {
            self.step(&Op::UnmapDiscarding {
                area: 0,
                cut: Cut::Rest,
            })?;
        }
        Ok(())
    }

    pub(super) fn last_harvest(&mut self, whose: usize) -> Checked {
        let all = Ask {
            holes: Holes::Refuse,
            ..Ask::EVERYTHING.by(whose as u8)
        };
        for range in self.told_about(whose) {
            self.harvest_range(0, range, &all)?;
            self.step(&Op::Commit(0))?;
        }
        Ok(())
    }

    /// The areas, or parts of them, that a consumer is told about.
    pub(super) fn told_about(&self, whose: usize) -> Vec<IovaRange> {
        let told = self.oracle.consumers[whose].as_ref();
        let within = told.and_then(|told| told.range);
        let areas = self.oracle.areas.values().map(Area::range);
        areas
            .filter_map(|area| within.map_or(Some(area), |range| range.intersection(area)))
            .collect()
    }

    pub(super) fn compare(&self) -> Checked {
        let areas: Vec<Area> = self.oracle.areas.values().copied().collect();
        self.compare_areas(&areas)
    }

    /// Compares the memory with the oracle's, and the copy of each consumer with the memory, except
    /// for the pages of its live leases.
    pub(super) fn compare_areas(&self, areas: &[Area]) -> Checked {
        for whose in self.oracle.present() {
            self.compare_for(whose, areas)?;
        }
        Ok(())
    }

    fn compare_for(&self, whose: usize, areas: &[Area]) -> Checked {
        let told = self.oracle.consumers[whose].as_ref();
        let hears = |page: u64| told.is_some_and(|told| told.hears(page));
        for area in areas {
            for page in pages_of(area.range()) {
                let frame = area.frame_of(page);
                let Some(right) = self.oracle.memory.get(&frame) else {
                    continue;
                };
                let mut memory = [0; PAGE as usize];
                self.memory()
                    .read(frame * PAGE, &mut memory)
                    .map_err(broken)?;
                let at = page * PAGE;
                let (leased, unknown) = (
                    self.oracle.is_leased(whose, page),
                    self.oracle.is_unknown(whose, page),
                );
                if leased || unknown || !hears(page) {
                    continue;
                }
                check(memory == **right, Rule::Answer, || {
                    format!("the memory behind {at:#x} is wrong")
                })?;
                // A page that is not in a copy is zero.
                let has = |copy: Option<&Box<Bytes>>| match copy {
                    Some(copy) => **copy == memory,
                    None => memory == [0; PAGE as usize],
                };
                check(has(self.copies[whose].get(&page)), Rule::Lost, || {
                    format!("copy {whose} of page {at:#x} differs from the memory")
                })?;
                let image = self.images[whose].as_ref().filter(|image| !image.is_stale);
                let image = image.is_none_or(|image| has(image.pages.get(&page)));
                check(image, Rule::Lost, || {
                    format!("image {whose} of page {at:#x} differs from the memory")
                })?;
            }
        }
        Ok(())
    }
}
