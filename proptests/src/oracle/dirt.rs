//! The dirty pages of each place, the pages that harvests take, and the places to which these are
//! put back.

use std::collections::BTreeSet;

use dirtymap::{DomainId, IovaRange};

use super::{Area, Oracle};
use crate::op::{Ask, CONSUMERS};
use crate::pages::pages_of;

/// The dirty pages of one place: a domain, or the marks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dirt {
    /// For each consumer, pages that its next harvest that covers them must report.
    pub(crate) must: [BTreeSet<u64>; CONSUMERS],
    /// Pages that are marked, or may be in a put-back store.
    pub(crate) pages: BTreeSet<u64>,
    /// First page and number of pages of leaves that may be dirty, and of the remaining parts of
    /// such leaves.
    pub(crate) leaves: BTreeSet<(u64, u64)>,
}

/// Whether writes of devices are tracked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tracking {
    #[default]
    Never,
    On,
    Off,
}

/// The state of a domain.
#[derive(Clone, Debug, Default)]
pub(crate) struct DomainState {
    /// The id under which it is or was attached.
    pub(crate) id: Option<DomainId>,
    pub(crate) tracking: Tracking,
    /// Whether it may track before it is switched on, because its last switch, in a detach,
    /// panicked.
    in_doubt: bool,
    pub(crate) dirt: Dirt,
    /// Pages that its devices may have written without tracking.
    pub(crate) untracked: BTreeSet<u64>,
    /// Ranges in which leaves were merged, so they may be larger than those of a map.
    pub(crate) merged: Vec<(u64, u64)>,
}

/// The pages of a live lease.
#[derive(Clone, Debug)]
pub(crate) struct Leased {
    /// Pages that it reported and that have not been unmapped since.
    pub(crate) pages: BTreeSet<u64>,
    /// The domains that it covers, each with its id at that time.
    domains: Vec<(usize, Option<DomainId>)>,
    pub(super) marks: bool,
    /// The number of maps at that time. A later area has no page of it.
    pub(super) maps: u64,
    pub(crate) synced: bool,
    /// The number of its harvest.
    pub(super) harvest: u64,
    /// The runs of pages that its harvest walked. Its granules may hold others.
    pub(super) walked: Vec<(u64, u64)>,
    /// The consumer, with the number of its join.
    pub(super) whose: (usize, u64),
    /// Whether what it puts back is pending for the consumer. Before the first join it goes to the
    /// domains and marks.
    pub(super) own: bool,
}

impl Tracking {
    pub(crate) fn switch(&mut self, on: bool) {
        *self = match (on, *self) {
            (true, _) => Tracking::On,
            (false, Tracking::Never) => Tracking::Never,
            (false, _) => Tracking::Off,
        };
    }
}

impl Dirt {
    /// The pages that a harvest may report.
    pub(crate) fn may(&self) -> impl Iterator<Item = u64> {
        let leaves = self.leaves.iter();
        let leaves = leaves.flat_map(|(page, count)| *page..page + count);
        leaves.chain(self.pages.iter().copied())
    }

    /// Removes the pages `first..=last`, which were harvested for the consumer `whose`.
    pub(super) fn take(&mut self, whose: usize, first: u64, last: u64) {
        let covered = |page: &u64| (first..=last).contains(page);
        self.must[whose].retain(|page| !covered(page));
        self.pages.retain(|page| !covered(page));
        // The rest of a leaf stays dirty.
        let rests = |(page, count): (u64, u64)| {
            let behind = page + count;
            let below = (page, behind.min(first).saturating_sub(page));
            let above = page.max(last + 1);
            [below, (above, behind.saturating_sub(above))]
        };
        let leaves = std::mem::take(&mut self.leaves);
        self.leaves = leaves.into_iter().flat_map(rests).collect();
        self.leaves.retain(|(_, count)| *count > 0);
    }

    /// Removes the pages of `area`, which was unmapped.
    pub(super) fn take_all(&mut self, area: &Area) {
        for whose in 0..CONSUMERS {
            self.take(whose, area.first, area.last());
        }
    }

    fn add(&mut self, other: Dirt) {
        for (must, more) in self.must.iter_mut().zip(other.must) {
            must.extend(more);
        }
        self.pages.extend(other.pages);
        self.leaves.extend(other.leaves);
    }
}

impl Oracle {
    // The events of a program.

    pub(crate) fn map(&mut self, area: Area) {
        self.areas.insert(area.first, area);
    }

    /// Removes the area with its dirty pages.
    pub(crate) fn unmap(&mut self, area: &Area) {
        self.areas.remove(&area.first);
        self.marks.take_all(area);
        self.zeros.retain(|page| !area.holds(page));
        self.untracked.retain(|page| !area.holds(*page));
        for told in self.consumers.iter_mut().flatten() {
            told.unmap(area);
        }
        for domain in &mut self.domains {
            domain.dirt.take_all(area);
            domain.untracked.retain(|page| !area.holds(*page));
            domain
                .merged
                .retain(|(first, last)| !area.holds(*first) || !area.holds(*last));
        }
        for lease in self.leases.iter_mut().flatten() {
            lease.pages.retain(|page| !area.holds(*page));
        }
    }

    pub(crate) fn attach(&mut self, domain: usize, id: DomainId, in_doubt: bool) {
        self.attached.push(domain);
        self.domains[domain] = DomainState {
            id: Some(id),
            in_doubt,
            ..DomainState::default()
        };
        if self.tracking == Tracking::On {
            self.domains[domain].tracking = Tracking::On;
        }
    }

    /// Moves its dirty pages to the marks.
    pub(crate) fn detach(&mut self, domain: usize) {
        self.attached.retain(|other| *other != domain);
        let gone = std::mem::take(&mut self.domains[domain]);
        self.domains[domain].id = gone.id;
        let may = self.rounded(gone.dirt.may());
        self.marks.pages.extend(may);
        self.marks.add(gone.dirt);
        self.untracked.extend(gone.untracked);
    }

    /// The attached domains whose tracking is not on.
    pub(crate) fn not_tracking(&self) -> Vec<usize> {
        let off = |nth: &usize| self.domains[*nth].tracking != Tracking::On;
        self.attached.iter().copied().filter(off).collect()
    }

    /// Switches the space. In a domain that starts to track, dirty pages are discarded, and the
    /// caller copies them.
    pub(crate) fn track(&mut self, on: bool) {
        for domain in self.attached.clone() {
            self.track_domain(domain, on);
        }
        if on && self.tracking != Tracking::On {
            self.marks = Dirt::default();
        }
        self.tracking.switch(on);
    }

    pub(crate) fn track_domain(&mut self, domain: usize, on: bool) {
        let state = &mut self.domains[domain];
        if on && state.tracking != Tracking::On {
            // In a source that already tracks, dirty pages stay dirty.
            let still_dirty = if state.in_doubt {
                state.dirt.leaves.clone()
            } else {
                BTreeSet::new()
            };
            state.in_doubt = false;
            state.dirt = Dirt {
                leaves: still_dirty,
                ..Dirt::default()
            };
            state.untracked.clear();
        }
        state.tracking.switch(on);
    }

    /// A device of a domain wrote bytes of one mapped page.
    pub(crate) fn device_wrote(&mut self, domain: usize, at: u64, bytes: &[u8]) {
        let page = self.store(at, bytes);
        let leaf = self.leaf_of(domain, page);
        let state = &mut self.domains[domain];
        if state.tracking != Tracking::On {
            state.untracked.insert(page);
            if state.in_doubt {
                state.dirt.leaves.extend(leaf);
            }
            return;
        }
        state.dirt.leaves.extend(leaf);
        for whose in self.telling(page) {
            if !self.is_hidden(whose, domain, page) {
                self.domains[domain].dirt.must[whose].insert(page);
            }
        }
    }

    /// Whether a cached "dirty" from before a harvest may hide a write of a device from the table.
    /// A lease copies after its flush, and a forgotten one does not.
    fn is_hidden(&self, whose: usize, domain: usize, page: u64) -> bool {
        let here = (domain, self.domains[domain].id);
        // What is pending may come from any domain.
        let covers = |lease: &Leased| lease.own || lease.domains.contains(&here);
        let hides = |lease: &Leased| !lease.synced && lease.pages.contains(&page) && covers(lease);
        let mut leases = self.leases.iter().flatten();
        let by_lease = leases.any(|lease| self.is_of(lease, whose) && hides(lease));
        let told = self.consumers[whose].as_ref();
        by_lease || told.is_some_and(|told| told.hidden.contains(&page))
    }

    /// A CPU marked a mapped page.
    pub(crate) fn marked(&mut self, page: u64) {
        self.zeros.wrote(page);
        self.may_be_marked(page);
        for whose in self.telling(page) {
            self.marks.must[whose].insert(page);
        }
    }

    /// Pages that are marked together with `page` may be reported.
    pub(crate) fn may_be_marked(&mut self, page: u64) {
        self.marks.pages.extend(self.marked_with(page));
    }

    /// A harvest walked the runs of pages `walked`, all of them mapped, and reported `reported` of
    /// them.
    pub(crate) fn harvested(
        &mut self,
        lease: usize,
        ask: &Ask,
        walked: &[(u64, u64)],
        reported: BTreeSet<u64>,
    ) {
        self.found_dirty(ask, walked);
        let mut leased = self.leased(ask, reported);
        leased.walked = walked.to_vec();
        let whose = leased.whose.0;
        if leased.own {
            self.leave_to_others(ask, walked, &leased.pages);
            self.take_pending(whose, walked, &leased.pages);
        }
        for (first, last) in walked.iter().copied() {
            for (domain, _) in &leased.domains {
                self.domains[*domain].dirt.take(whose, first, last);
            }
            if leased.marks {
                self.marks.take(whose, first, last);
            }
        }
        self.leases[lease] = Some(leased);
    }

    /// A lease was put back: the mapped pages of `runs` are dirty in each place that it covered.
    pub(crate) fn aborted(&mut self, lease: usize, runs: &[IovaRange]) {
        if let Some(lease) = self.leases[lease].take() {
            self.put_back(&lease, runs);
        }
    }

    /// A lease was forgotten. No copy has its pages, and later writes to them stay hidden until a
    /// flush, which the oracle does not see. So its pages need not be reported or compared until
    /// their area is gone.
    pub(crate) fn forgotten(&mut self, lease: usize) {
        let Some(lease) = self.leases[lease].take() else {
            return;
        };
        if let Some(told) = self.told_by(&lease) {
            told.forgotten += 1;
            let hidden = if lease.synced {
                &mut told.lost
            } else {
                &mut told.hidden
            };
            hidden.extend(lease.pages);
        }
    }

    /// A harvest that walked the runs of pages `walked` panicked, or went on above a stop, after it
    /// had reported `runs`.
    pub(crate) fn died(&mut self, ask: &Ask, runs: &[IovaRange], walked: &[(u64, u64)]) {
        self.found_dirty(ask, walked);
        let lease = self.leased(ask, BTreeSet::new());
        if lease.own {
            self.leave_to_all(ask, walked);
        }
        self.put_back(&lease, runs);
    }

    /// A domain may report `page` once more, and so may the marks, if it is mapped.
    pub(crate) fn may_be_dirty(&mut self, domain: usize, page: u64) {
        if self.area_at(page).is_some() {
            let pages = self.marked_with(page);
            self.domains[domain].dirt.pages.extend(pages.clone());
            self.marks.pages.extend(pages);
        }
    }

    /// The leaves of `area` were merged to the largest ones of the domain. A leaf that replaced a
    /// table is dirty.
    pub(crate) fn merged(&mut self, domain: usize, area: &Area) {
        self.domains[domain].merged.push((area.first, area.last()));
        if area.access.writes() {
            self.domains[domain]
                .dirt
                .pages
                .extend(area.first..=area.last());
        }
    }

    fn put_back(&mut self, lease: &Leased, runs: &[IovaRange]) {
        let back: BTreeSet<u64> = runs.iter().flat_map(|run| pages_of(*run)).collect();
        let there = |page: u64| {
            self.area_at(page)
                .is_some_and(|area| area.origin <= lease.maps)
        };
        let mapped = back.iter().filter(|page| there(**page));
        let mapped = self.rounded(mapped.copied());
        // The committed pages are not in the runs.
        let reported: Vec<u64> = lease.pages.intersection(&back).copied().collect();
        if lease.own {
            if let Some(told) = self.told_by(lease) {
                told.pending.pages.extend(&mapped);
                told.pending.must.extend(&reported);
            }
            return;
        }
        let mut marks = lease.marks;
        for (domain, id) in &lease.domains {
            let state = &mut self.domains[*domain];
            if self.attached.contains(domain) && state.id == *id {
                state.dirt.pages.extend(&mapped);
                state.dirt.must[0].extend(&reported);
            } else {
                marks = true;
            }
        }
        if marks {
            self.marks.pages.extend(&mapped);
            self.marks.must[0].extend(&reported);
        }
    }

    // The checks.

    /// The domains that an operand names.
    pub(crate) fn covered(&self, ask: &Ask) -> Vec<usize> {
        self.scope(ask).0
    }

    /// The number of maps so far.
    pub(crate) fn maps(&self) -> u64 {
        self.maps
    }

    /// The domains that an operand names, and whether marks are covered as well.
    pub(super) fn scope(&self, ask: &Ask) -> (Vec<usize>, bool) {
        match self.asked_domain(ask) {
            Some((domain, _)) => (vec![domain], false),
            None => (self.attached.clone(), true),
        }
    }

    /// The domain that an operand names, with the id under which it is or was attached.
    pub(crate) fn asked_domain(&self, ask: &Ask) -> Option<(usize, DomainId)> {
        let domain = usize::from(ask.domain?);
        Some((domain, self.domains[domain].id?))
    }

    /// The domain that an operand names, if it is not attached.
    pub(super) fn asked_in_vain(&self, ask: &Ask) -> Option<DomainId> {
        let (domain, id) = self.asked_domain(ask)?;
        (!self.attached.contains(&domain)).then_some(id)
    }

    pub(crate) fn ever_tracked(&self, ask: &Ask) -> bool {
        let (domains, marks) = self.scope(ask);
        let ever = |nth: &usize| self.domains[*nth].tracking != Tracking::Never;
        domains.iter().any(ever) || (marks && self.tracking != Tracking::Never)
    }

    fn leased(&self, ask: &Ask, pages: BTreeSet<u64>) -> Leased {
        let (domains, marks) = self.scope(ask);
        let domains = domains.iter().map(|nth| (*nth, self.domains[*nth].id));
        Leased {
            pages,
            domains: domains.collect(),
            marks,
            maps: self.maps,
            synced: false,
            harvest: self.zeros.harvests,
            walked: Vec::new(),
            whose: self.number_of(self.whose(ask)),
            own: self.named,
        }
    }

    /// Of the runs of pages `walked`, the pages that a harvest must report, and those that it may
    /// report.
    pub(crate) fn bounds(
        &self,
        ask: &Ask,
        walked: &[(u64, u64)],
    ) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let in_run = |page: &u64, (first, last): &(u64, u64)| (first..=last).contains(&page);
        let inside = |page: &u64| walked.iter().any(|run| in_run(page, run));
        let flying = || self.guards.iter().flatten().flat_map(|w| pages_of(*w));
        let places = self.places(ask);
        let must = places.must(self.whose(ask));
        let may = places.may();
        let told = self.consumers[self.whose(ask)].as_ref();
        let all = told.is_some_and(|told| told.is_loose).then_some(walked);
        let all = all.into_iter().flatten();
        let may = may.chain(all.flat_map(|(first, last)| *first..=*last));
        (
            must.chain(flying()).filter(inside).collect(),
            // Dirty state that moves from a table to a put-back store or to marks is rounded to
            // pages of the space.
            self.rounded(may.chain(flying()).filter(inside)),
        )
    }

    /// The pages of `gone` that an unmap must report as dirty, and those that it may report.
    pub(crate) fn dirt_of(&self, gone: &[Area]) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let inside = |page: &u64| gone.iter().any(|area| area.holds(*page));
        let places = || self.domains.iter().map(|domain| &domain.dirt);
        let places = || places().chain([&self.marks]);
        let pending = || self.consumers.iter().flatten().map(|told| &told.pending);
        let flying = || self.guards.iter().flatten().flat_map(|w| pages_of(*w));
        let must = places().flat_map(|place| place.must.iter().flatten().copied());
        let must = must.chain(pending().flat_map(|pending| pending.must.iter().copied()));
        let may = places().flat_map(Dirt::may);
        let may = may.chain(pending().flat_map(|pending| pending.pages.iter().copied()));
        let loose = self.consumers.iter().flatten().filter(|told| told.is_loose);
        let all = || gone.iter().flat_map(|area| pages_of(area.range()));
        let may = may.chain(loose.flat_map(|told| all().filter(|page| told.hears(*page))));
        (
            must.chain(flying()).filter(inside).collect(),
            self.rounded(may.chain(flying()).filter(inside)),
        )
    }

    /// Whether the copy of `page` that the consumer `whose` has may differ from the memory: a
    /// device wrote without tracking, or a write is in flight.
    pub(crate) fn is_unknown(&self, whose: usize, page: u64) -> bool {
        let untracked = self.domains.iter().map(|domain| &domain.untracked);
        let told = self.consumers[whose].iter();
        let flying = self.guards.iter().flatten();
        untracked
            .chain([&self.untracked])
            .chain(told.flat_map(|told| [&told.lost, &told.hidden]))
            .any(|set| set.contains(&page))
            || flying.clone().any(|w| pages_of(*w).any(|p| p == page))
    }

    /// Whether a live lease of the consumer `whose` has `page`.
    pub(crate) fn is_leased(&self, whose: usize, page: u64) -> bool {
        let mut leases = self.leases.iter().flatten();
        leases.any(|lease| self.is_of(lease, whose) && lease.pages.contains(&page))
    }
}
