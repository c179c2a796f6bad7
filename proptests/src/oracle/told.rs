//! The consumers, and the pages that are pending for each of them.
//!
//! A page that a harvest takes for one consumer leaves its place, a domain or the marks, for all of
//! them, and is pending for the others. The oracle leaves the *duty* to report it at the place: the
//! next harvest of another consumer that covers the place must report the page, as if it were still
//! there. That it **may** be reported by a harvest of any scope is known of the pending pages.

use std::collections::BTreeSet;

use super::dirt::{Dirt, Leased};
use super::{Area, Oracle, first_of};
use crate::op::{Ask, Begin, CONSUMERS, Reach, Stretch};
use crate::pages::{LARGE, pages, pages_of};
use dirtymap::IovaRange;

/// The pages that are pending for a consumer: any harvest of it that reaches them takes them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pending {
    /// Pages that its next harvest must report.
    pub(crate) must: BTreeSet<u64>,
    /// Pages that it may report.
    pub(crate) pages: BTreeSet<u64>,
}

/// A consumer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    /// The number of its join.
    number: u64,
    /// Its addresses; `None` for all.
    pub(crate) range: Option<IovaRange>,
    pub(crate) pending: Pending,
    /// Pages of leases that were forgotten, for which the copy is undefined.
    pub(crate) lost: BTreeSet<u64>,
    /// Pages of forgotten leases that had not been flushed, to which writes of devices may leave no
    /// trace.
    pub(crate) hidden: BTreeSet<u64>,
    /// How many of its leases were forgotten.
    pub(crate) forgotten: u64,
    /// How often its pending pages were dropped.
    pub(crate) dropped: u64,
    /// Its bounds are such that its pending pages may be dropped.
    pub(crate) is_bounded: bool,
    /// It may be told everything.
    pub(crate) is_loose: bool,
    /// This was so at some time.
    pub(crate) was_loose: bool,
}

/// The places at which a harvest looks.
pub(crate) struct Places<'o> {
    places: Vec<&'o Dirt>,
    told: Option<&'o Told>,
}

impl Places<'_> {
    pub(super) fn must(&self, whose: usize) -> impl Iterator<Item = u64> {
        let pending = self.told.into_iter().flat_map(|told| &told.pending.must);
        let places = self.places.iter();
        let places = places.flat_map(move |place| &place.must[whose]);
        places.chain(pending).copied()
    }

    pub(super) fn may(&self) -> impl Iterator<Item = u64> {
        let pending = self.told.into_iter().flat_map(|told| &told.pending.pages);
        self.dirty().chain(pending.copied())
    }

    /// The dirty pages that a harvest takes from all consumers.
    pub(super) fn dirty(&self) -> impl Iterator<Item = u64> {
        self.places.iter().flat_map(|place| place.may())
    }
}

impl Told {
    /// Whether it is told about `page`.
    pub(crate) fn hears(&self, page: u64) -> bool {
        let whole = pages(page, page);
        self.range.is_none_or(|range| range.covers(whole))
    }

    pub(super) fn unmap(&mut self, area: &Area) {
        let pending = &mut self.pending;
        for set in [&mut pending.must, &mut pending.pages] {
            set.retain(|page| !area.holds(*page));
        }
        for set in [&mut self.lost, &mut self.hidden] {
            set.retain(|page| !area.holds(*page));
        }
    }
}

impl Reach {
    /// The addresses; `None` for all.
    pub(crate) fn range(self) -> Option<IovaRange> {
        let Reach::Slots(slot, count) = self else {
            return None;
        };
        let first = first_of(Stretch {
            slot,
            skip: 0,
            pages: 0,
        });
        Some(pages(first, first + u64::from(count) * LARGE - 1))
    }
}

impl Oracle {
    /// The consumer that an operand names: the unnamed one if that is not there.
    pub(crate) fn whose(&self, ask: &Ask) -> usize {
        let whose = usize::from(ask.whose);
        match self.consumers[whose] {
            Some(_) => whose,
            None => 0,
        }
    }

    /// The places at which a harvest looks.
    pub(super) fn places(&self, ask: &Ask) -> Places<'_> {
        let (domains, marks) = self.scope(ask);
        let domains = domains.into_iter().map(|nth| &self.domains[nth].dirt);
        Places {
            places: domains.chain(marks.then_some(&self.marks)).collect(),
            told: self.consumers[self.whose(ask)].as_ref(),
        }
    }

    /// The numbers of the consumers that are there.
    pub(crate) fn present(&self) -> Vec<usize> {
        let all = 0..CONSUMERS;
        all.filter(|whose| self.consumers[*whose].is_some())
            .collect()
    }

    /// The consumers that are told about `page`.
    pub(super) fn telling(&self, page: u64) -> Vec<usize> {
        let hears = |whose: &usize| {
            self.consumers[*whose]
                .as_ref()
                .is_some_and(|c| c.hears(page))
        };
        (0..CONSUMERS).filter(hears).collect()
    }

    /// The consumer, and the number of its join.
    pub(crate) fn number_of(&self, whose: usize) -> (usize, u64) {
        let told = self.consumers[whose].as_ref();
        (whose, told.map_or(0, |told| told.number))
    }

    /// Whether `lease` is one of the consumer `whose` that is there now.
    pub(super) fn is_of(&self, lease: &Leased, whose: usize) -> bool {
        self.consumers[whose].is_some() && lease.whose == self.number_of(whose)
    }

    /// The consumer of `lease`, if it is still there.
    pub(super) fn told_by(&mut self, lease: &Leased) -> Option<&mut Told> {
        let (whose, number) = lease.whose;
        let told = self.consumers[whose].as_mut();
        told.filter(|told| told.number == number)
    }

    /// Whether the consumer of a live lease has left.
    pub(crate) fn has_left(&self, lease: usize) -> bool {
        let lease = self.leases[lease].as_ref();
        lease.is_some_and(|lease| !self.is_of(lease, lease.whose.0))
    }

    /// How many leases of the consumer `whose` have not ended.
    pub(crate) fn leases_of(&self, whose: usize) -> u64 {
        let leases = self.leases.iter().flatten();
        let live = leases.filter(|lease| self.is_of(lease, whose)).count() as u64;
        let told = self.consumers[whose].as_ref();
        live + told.map_or(0, |told| told.forgotten)
    }

    /// A harvest took `reported` of the runs of pages `walked`.
    pub(super) fn leave_to_others(
        &mut self,
        ask: &Ask,
        walked: &[(u64, u64)],
        reported: &BTreeSet<u64>,
    ) {
        let own = self.whose(ask);
        let reported = self.rounded(reported.iter().copied());
        let taken = self.taken(ask, walked);
        let taken: BTreeSet<u64> = taken.intersection(&reported).copied().collect();
        self.leave(&taken, |whose| whose != own);
    }

    /// A harvest took any of the runs of pages `walked`, and may have recorded none.
    pub(super) fn leave_to_all(&mut self, ask: &Ask, walked: &[(u64, u64)]) {
        let taken = self.taken(ask, walked);
        self.leave(&taken, |_| true);
    }

    fn taken(&self, ask: &Ask, walked: &[(u64, u64)]) -> BTreeSet<u64> {
        let inside = |page: &u64| walked.iter().any(|(f, l)| (*f..=*l).contains(page));
        self.rounded(self.places(ask).dirty().filter(inside))
    }

    fn leave(&mut self, taken: &BTreeSet<u64>, to: impl Fn(usize) -> bool) {
        for whose in self.present().into_iter().filter(|whose| to(*whose)) {
            if let Some(told) = &mut self.consumers[whose] {
                let heard: Vec<u64> = taken.iter().copied().filter(|p| told.hears(*p)).collect();
                told.pending.pages.extend(heard);
            }
        }
    }

    /// A harvest of the consumer `whose` reported `reported` of the runs of pages `walked`: those
    /// that were pending are told, whatever place they came from.
    pub(super) fn take_pending(
        &mut self,
        whose: usize,
        walked: &[(u64, u64)],
        reported: &BTreeSet<u64>,
    ) {
        let Some(told) = &mut self.consumers[whose] else {
            return;
        };
        let inside = |page: &u64| walked.iter().any(|(f, l)| (*f..=*l).contains(page));
        let pending = told.pending.pages.iter();
        let from_pending: BTreeSet<u64> = pending
            .filter(|page| inside(page) && reported.contains(page))
            .copied()
            .collect();
        told.pending.must.retain(|page| !inside(page));
        told.pending.pages.retain(|page| !inside(page));
        let places = self.domains.iter_mut().map(|domain| &mut domain.dirt);
        for place in places.chain([&mut self.marks]) {
            place.must[whose].retain(|page| !from_pending.contains(page));
        }
    }

    /// A named consumer has joined. All caches were flushed.
    pub(crate) fn joined(&mut self, whose: usize, start: Begin, reach: Reach) {
        for told in self.consumers.iter_mut().flatten() {
            let hidden = std::mem::take(&mut told.hidden);
            told.lost.extend(hidden);
        }
        self.joins += 1;
        let mut told = Told {
            number: self.joins,
            range: reach.range(),
            ..Told::default()
        };
        let all: Vec<u64> = self
            .areas
            .values()
            .flat_map(|area| pages_of(area.range()))
            .filter(|page| told.hears(*page))
            .collect();
        match start {
            Begin::Clean => {}
            Begin::Dirty => {
                told.pending.must.extend(&all);
                told.pending.pages.extend(&all);
            }
            Begin::LikeOf(other) => {
                let other = usize::from(other);
                if let Some(model) = &self.consumers[other] {
                    told.pending = model.pending.clone();
                    told.lost = model.lost.clone();
                    told.is_loose = model.is_loose;
                    told.was_loose = model.is_loose;
                }
                told.pending.must.retain(|page| all.contains(page));
                told.pending.pages.retain(|page| all.contains(page));
                let places = self.domains.iter_mut().map(|domain| &mut domain.dirt);
                for place in places.chain([&mut self.marks]) {
                    let mut must = place.must[other].clone();
                    must.retain(|page| all.contains(page));
                    place.must[whose] = must;
                }
            }
        }
        self.consumers[whose] = Some(told);
    }

    /// A named consumer has left.
    pub(crate) fn left(&mut self, whose: usize) {
        self.consumers[whose] = None;
        let places = self.domains.iter_mut().map(|domain| &mut domain.dirt);
        for place in places.chain([&mut self.marks]) {
            place.must[whose].clear();
        }
    }
}
