//! Discards: the pages that a lease may call zero, and those that it must.
//!
//! A page reads as zero from its discard on. A lease **may** call it zero unless it reports a write
//! that came after the drop of the storage. It **must** call it zero if the discard covered the
//! page as a whole, and no harvest has found the page dirty since: harvests find leaves and pages
//! of the space, so a neighbour may make the page data.

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::IovaRange;

use super::dirt::Dirt;
use super::{Oracle, Tracking};
use crate::op::Ask;
use crate::pages::pages_of;

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub(crate) struct Zeros {
    /// Pages whose storage was dropped, with the number of harvests before the first write since.
    dropped: BTreeMap<u64, Option<u64>>,
    /// Pages that must be called zero.
    surely: BTreeSet<u64>,
    /// The range of the discard at work, which is data.
    at_work: Option<IovaRange>,
    /// Dirty pages that the discard at work has taken, and that harvests see in its hands.
    flight: BTreeSet<u64>,
    /// The number of harvests so far.
    pub(super) harvests: u64,
}

impl Zeros {
    /// Bytes of `page` were written.
    pub(super) fn wrote(&mut self, page: u64) {
        if let Some(first) = self.dropped.get_mut(&page) {
            first.get_or_insert(self.harvests);
        }
    }

    /// No page is zero any more.
    pub(crate) fn forget(&mut self) {
        self.dropped.clear();
        self.surely.clear();
    }

    /// Any page may be data.
    pub(crate) fn doubt(&mut self) {
        self.surely.clear();
    }

    pub(super) fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        self.dropped.retain(|page, _| keep(*page));
        self.surely.retain(|page| keep(*page));
    }
}

impl Oracle {
    /// Whether every write leaves a trace.
    pub(crate) fn tracks_all(&self) -> bool {
        let on = |nth: &usize| self.domains[*nth].tracking == Tracking::On;
        self.tracking == Tracking::On && self.attached.iter().all(on)
    }

    /// The parts of `range` that a discard makes zero: whole pages, by area.
    pub(crate) fn whole_in(&self, range: IovaRange) -> Vec<IovaRange> {
        if !self.tracks_all() {
            return Vec::new();
        }
        let page = self.alignment();
        let areas = self.areas.values().map(|area| area.range());
        let parts = areas.filter_map(|area| area.intersection(range));
        parts.filter_map(|part| part.round_in(page)).collect()
    }

    /// A harvest walked `walked`: what it found dirty, or in other hands, is data.
    pub(crate) fn found_dirty(&mut self, ask: &Ask, walked: &[(u64, u64)]) {
        let inside = |page: &u64| walked.iter().any(|(f, l)| (*f..=*l).contains(page));
        let flying = self.guards.iter().flatten().flat_map(|w| pages_of(*w));
        let dirty = self.places(ask);
        // What is only pending stays as it is.
        let found = dirty.dirty().chain(self.zeros.flight.iter().copied());
        let found = self.rounded(found.chain(flying).filter(inside));
        self.zeros.surely.retain(|page| !found.contains(page));
        self.zeros.harvests += 1;
    }

    /// A discard has taken what was dirty in the parts `whole` of `range`, and drops the storage.
    /// Harvests see what it took.
    pub(crate) fn discard_takes(&mut self, range: IovaRange, whole: &[IovaRange]) {
        self.zeros.at_work = Some(range.round_out(self.space_page()));
        let flying = self.guards.iter().flatten().flat_map(|w| pages_of(*w));
        let flying: BTreeSet<u64> = flying.collect();
        for part in whole {
            let pages: BTreeSet<u64> = pages_of(*part).collect();
            let mut taken: BTreeSet<u64> = BTreeSet::new();
            for whose in self.present() {
                let mut must: BTreeSet<u64> = BTreeSet::new();
                for place in self.all_places() {
                    must.extend(place.must[whose].intersection(&pages));
                    taken.extend(place.may().filter(|page| pages.contains(page)));
                    place.must[whose].retain(|page| !pages.contains(page));
                }
                if let Some(told) = &mut self.consumers[whose] {
                    told.pending.must.extend(must);
                }
            }
            if let (Some(first), Some(last)) = (pages.first(), pages.last()) {
                for place in self.all_places() {
                    place.take(0, *first, *last);
                }
            }
            self.zeros.flight.extend(&taken);
            for told in self.consumers.iter_mut().flatten() {
                let heard: Vec<u64> = taken.iter().copied().filter(|p| told.hears(*p)).collect();
                told.pending.pages.extend(heard);
            }
            for page in pages {
                self.zeros.dropped.insert(page, None);
                // A discard takes a page with a write in flight for data.
                if !flying.contains(&page) {
                    self.zeros.surely.insert(page);
                }
            }
        }
    }

    /// A discard has ended: its range is pending for each consumer, or marked. If `is_zero`, the
    /// storage of the parts `whole` was dropped.
    pub(crate) fn discarded(&mut self, range: IovaRange, whole: &[IovaRange], is_zero: bool) {
        self.zeros.at_work = None;
        self.zeros.flight.clear();
        let pages: BTreeSet<u64> = whole.iter().flat_map(|part| pages_of(*part)).collect();
        for told in self.consumers.iter_mut().flatten() {
            let heard: Vec<u64> = pages.iter().copied().filter(|p| told.hears(*p)).collect();
            told.pending.must.extend(&heard);
            told.pending.pages.extend(&heard);
            if is_zero {
                // The range was flushed, and is reported again.
                for set in [&mut told.lost, &mut told.hidden] {
                    set.retain(|page| !heard.contains(page));
                }
            }
        }
        if !is_zero {
            self.zeros.retain(|page| !pages.contains(&page));
        }
        for page in pages_of(range).filter(|page| !pages.contains(page)) {
            self.marked(page);
        }
    }

    /// Whether a live lease may call `page` zero, and whether it must.
    pub(crate) fn is_zero(&self, lease: usize, page: u64) -> (bool, bool) {
        let Some(lease) = &self.leases[lease] else {
            return (false, false);
        };
        let whole = crate::pages::pages(page, page);
        let at_work = self.zeros.at_work.is_some_and(|at| at.intersects(whole));
        let area = self.area_at(page);
        let old = area.is_some_and(|area| area.origin <= lease.maps);
        let known = lease.marks && self.tracks_all() && old && !at_work;
        let Some(first) = self.zeros.dropped.get(&page).filter(|_| known) else {
            return (false, false);
        };
        // A page that only shares a granule of the lease keeps its writes for a later lease.
        let mut walked = lease.walked.iter();
        let has = walked.any(|(first, last)| (*first..=*last).contains(&page));
        let reports = has && first.is_some_and(|first| first < lease.harvest);
        (!reports, !reports && self.zeros.surely.contains(&page))
    }

    fn all_places(&mut self) -> impl Iterator<Item = &mut Dirt> {
        let attached = &self.attached;
        let domains = self.domains.iter_mut().enumerate();
        let domains = domains.filter(|(nth, _)| attached.contains(nth));
        domains
            .map(|(_, state)| &mut state.dirt)
            .chain([&mut self.marks])
    }
}
