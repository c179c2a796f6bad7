//! Map, unmap, and the switch of tracking.

use dirtymap::{Error, Granule, Iova, IovaRange, Unmapped};

use super::{Checked, Runner, same_answer};
use crate::op::{Cut, MapFault};
use crate::oracle::{Area, MEMORY, PAGE, Tracking, pages};
use crate::violation::{Rule, Violation, check, same, violation};

impl Runner<'_> {
    pub(super) fn map(&mut self, area: Area, fault: MapFault) -> Checked {
        let mut range = area.range();
        let mut backing = area.frame * PAGE;
        match fault {
            MapFault::None => (),
            MapFault::Unaligned => {
                let start = Iova::new(range.start().get() + 512);
                range = IovaRange::new(start, range.last()).unwrap_or(range);
            }
            MapFault::UnalignedBacking => backing += 512,
            MapFault::Wraps => {
                range = pages(area.first, area.last().max(area.first + 1));
                backing = u64::MAX - (PAGE - 1);
            }
            MapFault::OutsideMemory => backing = MEMORY,
        }
        let before = self.space.mappings();
        let answer = self.space.map(range, backing, area.access);
        let granule = Granule::K4;
        let existing = self
            .oracle
            .areas
            .values()
            .find(|other| other.range().intersects(range));
        let right = match (fault, existing) {
            (MapFault::Unaligned, _) => Err(Error::Unaligned { range, granule }),
            (MapFault::UnalignedBacking, _) => Err(Error::UnalignedBacking { backing, granule }),
            (MapFault::Wraps, _) => Err(Error::BackingWraps { backing, range }),
            (_, Some(existing)) => Err(Error::Overlap {
                range,
                existing: existing.range(),
            }),
            (MapFault::OutsideMemory, None) => {
                same(
                    Rule::Answer,
                    "areas after a map that failed",
                    self.space.mappings(),
                    before,
                )?;
                let unmapped = !self.rig.translates(range.start());
                return check(
                    unmapped && matches!(answer, Err(Error::Source(_))),
                    Rule::Answer,
                    || format!("a map of missing memory: {answer:?}, no translation: {unmapped}"),
                );
            }
            (MapFault::None, None) => {
                self.oracle.map(area);
                if self.oracle.tracking == Tracking::On {
                    self.copy_runs(&[range])?;
                }
                Ok(())
            }
        };
        same_answer("a map", answer, right)?;
        self.check_areas()
    }

    pub(super) fn unmap(&mut self, nth: u8, cut: Cut) -> Checked {
        let Some(area) = self.oracle.nth_area(nth) else {
            let range = IovaRange::ALL;
            let right = Err(Error::NothingMapped { range });
            return same_answer(
                "an unmap of nothing",
                self.space.unmap_discarding(range).map(|_| ()),
                right,
            );
        };
        let last = self
            .oracle
            .areas
            .values()
            .next_back()
            .unwrap_or(&area)
            .last();
        let range = match cut {
            Cut::Part if area.pages > 1 => {
                let range = pages(area.first, area.last() - 1);
                let right = Err(Error::PartOfArea {
                    range,
                    area: area.range(),
                });
                let answer = self.space.unmap_discarding(range).map(|_| ());
                same_answer("an unmap of a part", answer, right)?;
                return self.check_areas();
            }
            Cut::Rest => pages(area.first, last),
            Cut::Whole | Cut::Part => area.range(),
        };
        let gone: Vec<Area> = self.oracle.areas.values().copied().collect();
        let gone: Vec<Area> = gone
            .into_iter()
            .filter(|area| range.covers(area.range()))
            .collect();
        let handle = self.space.area(range.start());
        let done = self.unmap_stubbornly(range)?;
        same(
            Rule::Answer,
            "areas unmapped",
            done.areas,
            gone.len() as u64,
        )?;
        let bytes: u128 = gone.iter().map(|area| area.range().len()).sum();
        same(Rule::Answer, "bytes unmapped", done.bytes, bytes)?;
        self.check_discarded(&gone)?;
        for area in &gone {
            self.oracle.unmap(area);
            self.copy
                .retain(|page, _| !(area.first..=area.last()).contains(page));
            let unmapped = !self.rig.translates(area.range().start());
            check(unmapped, Rule::Answer, || {
                format!("{} is still translated", area.range())
            })?;
        }
        if let Some(handle) = handle {
            let range = handle.mapping().range;
            let right = Err(Error::Outside { at: range.start() });
            self.counts.outside_marks += 1;
            same_answer(
                "a mark by the handle of a gone area",
                handle.mark(range),
                right,
            )?;
        }
        self.check_areas()
    }

    /// Unmaps `range`; if the flush was told to fail, the areas must still be there, and a second call must do.
    fn unmap_stubbornly(&mut self, range: IovaRange) -> Result<Unmapped, Violation> {
        let told_to_fail = self.rig.will_fail();
        let mut answer = self.space.unmap_discarding(range);
        if told_to_fail && !self.rig.will_fail() {
            check(
                matches!(answer, Err(Error::Source(_))),
                Rule::Answer,
                || format!("an unmap whose flush failed: {answer:?}"),
            )?;
            self.check_areas()?;
            answer = self.space.unmap_discarding(range);
        }
        answer.map_err(|error| violation(Rule::Answer, format!("an unmap: {error}")))
    }

    /// What the space has counted as discarded now: each marked page of the areas `gone`, and each dirty leaf.
    fn check_discarded(&mut self, gone: &[Area]) -> Checked {
        let inside = |page: &u64| {
            gone.iter()
                .any(|area| (area.first..=area.last()).contains(page))
        };
        let oracle = &self.oracle;
        let marked = oracle.marks.iter().copied().filter(inside).count() as u64;
        let dirty = oracle
            .marks
            .union(&oracle.pending)
            .copied()
            .filter(inside)
            .count() as u64;
        let leaves = oracle.leaves.iter().filter(|(page, _)| inside(page));
        let rests = oracle.rests.iter().copied().filter(inside).count() as u64;
        let most = marked + rests + leaves.map(|(_, count)| count).sum::<u64>();
        let counted = self.space.stats().discarded_bytes;
        let discarded = counted - self.counts.discarded_bytes;
        self.counts.discarded_bytes = counted;
        check(
            (dirty * PAGE..=most * PAGE).contains(&discarded),
            Rule::Accounting,
            || {
                format!(
                    "{} pages discarded, not {dirty} to {most}",
                    discarded / PAGE
                )
            },
        )
    }

    pub(super) fn track(&mut self, on: bool) -> Checked {
        same_answer("switching tracking", self.space.set_tracking(on), Ok(()))?;
        let starts = on && self.oracle.tracking != Tracking::On;
        if starts {
            let marked = self.oracle.marks.len() as u64;
            let most = self.oracle.marks.union(&self.oracle.rests).count() as u64;
            let counted = self.space.stats().discarded_bytes;
            let discarded = (counted - self.counts.discarded_bytes) / PAGE;
            self.counts.discarded_bytes = counted;
            check(
                (marked..=most).contains(&discarded),
                Rule::Accounting,
                || format!("{discarded} marked pages discarded, not {marked} to {most}"),
            )?;
        }
        self.oracle.track(on);
        if starts {
            let areas: Vec<IovaRange> = self.oracle.areas.values().map(Area::range).collect();
            self.copy_runs(&areas)?;
        }
        Ok(())
    }
}
