//! One pass counts the points of a scenario with every kind of call. Each further pass panics at
//! one of them: first at this point alone, then also at all later points of the same call, so that
//! the clean-up panics as well.

use std::collections::BTreeSet;
use std::sync::Arc;

use dirtymap::{
    Access, AddressSpace, Change, DomainId, Error, Granule, HarvestRequest, IovaRange,
    SparseBitmap, UserBitmap,
};

use crate::mock::{Device, Fault, Owned, Points, numbers, pages, panics, reclaim_until};

const RW: Access = Access::ReadWrite;
/// All pages of the scenario are below this one.
const END: u64 = 64;

struct World {
    space: AddressSpace,
    points: Arc<Points>,
    devices: Vec<Arc<Device>>,
    /// The domain of each device.
    ids: Vec<Option<DomainId>>,
    /// Pages that were written and not reported yet.
    written: BTreeSet<u64>,
}

type Step = fn(&mut World) -> Result<(), Error>;

/// Every call, with writes between them. Each step has a goal: if it is repeated, it does the part
/// that is left.
const STEPS: [(&str, Step); 23] = [
    ("attach the first", |w| w.attach(0)),
    ("attach the second", |w| w.attach(1)),
    ("map", |w| w.map(pages(0, 16))),
    ("switch on", |w| w.space.start_tracking()),
    ("write", World::write),
    ("attach the third", |w| w.attach(2)),
    ("map in a batch", |w| w.batch(None, pages(20, 8))),
    ("write again", World::write),
    ("a map that is refused", World::refused_map),
    ("an attach that is refused", World::refused_attach),
    ("cut", |w| w.space.cut(pages(6, 1).start()).map(|_| ())),
    ("a cut that is refused", World::refused_cut),
    ("peek", World::peek),
    ("abort", |w| w.harvest(false)),
    ("commit", |w| w.harvest(true)),
    ("write once more", World::write),
    ("replace", |w| w.batch(Some(pages(10, 3)), pages(40, 4))),
    ("unmap with a bitmap", |w| w.unmap(pages(20, 8))),
    ("switch one off and on", World::switch_one),
    ("switch all off and on", World::switch_all),
    ("detach the third", |w| w.detach(2)),
    ("write for the last time", World::write),
    ("detach the first", |w| w.detach(0)),
];

impl World {
    fn new() -> Self {
        let points = Arc::new(Points::default());
        World {
            space: AddressSpace::new(Granule::K4),
            devices: (0..3).map(|_| Device::new(&points)).collect(),
            points,
            ids: vec![None; 3],
            written: BTreeSet::new(),
        }
    }

    fn maps(&self, range: IovaRange) -> bool {
        let mappings = self.space.mappings();
        mappings.iter().any(|mapping| mapping.range == range)
    }

    /// Detaches a domain that a failed attach has left.
    fn detach_unknown(&self) -> Result<(), Error> {
        for id in self.space.domains() {
            if !self.ids.contains(&Some(id)) {
                self.space.detach(id)?;
            }
        }
        Ok(())
    }

    fn owned(&self, nth: usize) -> Owned {
        let points = Arc::clone(&self.points);
        Owned::new(&self.devices[nth]).then(move || points.at("drop"))
    }

    fn attach(&mut self, nth: usize) -> Result<(), Error> {
        self.detach_unknown()?;
        self.ids[nth] = Some(self.space.attach(self.owned(nth))?);
        Ok(())
    }

    fn detach(&mut self, nth: usize) -> Result<(), Error> {
        if let Some(id) = self.ids[nth].filter(|id| self.space.domains().contains(id)) {
            self.space.detach(id)?;
        }
        self.ids[nth] = None;
        let device = &self.devices[nth];
        reclaim_until(&self.space, || Arc::strong_count(device) == 1);
        Ok(())
    }

    /// Maps `range`, which may still be taken.
    fn map(&mut self, range: IovaRange) -> Result<(), Error> {
        if self.maps(range) {
            self.space.unmap_discarding(range)?;
        }
        self.space.map(range, 0, RW)
    }

    /// Maps `new`, and unmaps `gone`, which is a part of an area.
    fn batch(&mut self, gone: Option<IovaRange>, new: IovaRange) -> Result<(), Error> {
        if self.maps(new) {
            // The range may be taken by a call that failed. Or the call has succeeded, if the old
            // range is gone.
            self.space.unmap_discarding(new)?;
        }
        let mut changes = vec![Change::Map {
            range: new,
            backing: 0,
            access: RW,
        }];
        if let Some(gone) = gone {
            let last = pages(*numbers(gone).end() + 1, 1);
            changes.extend([gone, last].map(|at| Change::Cut { at: at.start() }));
            changes.push(Change::Unmap { range: gone });
        }
        let before = self.space.stats().discarded_bytes;
        self.space.apply(&changes)?;
        if let Some(gone) = gone {
            let all = self.written.len();
            self.written.retain(|page| !numbers(gone).contains(page));
            let pages = (all - self.written.len()) as u64;
            let discarded = self.space.stats().discarded_bytes - before;
            assert!(discarded >= pages << 12, "not counted as discarded");
        }
        Ok(())
    }

    fn refused_map(&mut self) -> Result<(), Error> {
        let range = pages(50, 6);
        if self.maps(range) {
            self.space.unmap_discarding(range)?;
        }
        self.devices[1].with(|s| s.refuse_map = true);
        let mapped = panics(|| self.space.map(range, 0, RW));
        self.devices[1].with(|s| s.refuse_map = false);
        goes_on(mapped).unwrap_err();
        Ok(())
    }

    fn refused_attach(&mut self) -> Result<(), Error> {
        self.detach_unknown()?;
        let points = Arc::clone(&self.points);
        let device = Device::new(&self.points);
        device.with(|s| s.refuse_map = true);
        let source = Owned::new(&device).then(move || points.at("drop"));
        self.space.attach(source).unwrap_err();
        Ok(())
    }

    fn refused_cut(&mut self) -> Result<(), Error> {
        self.devices[1].with(|s| s.refuse_split = true);
        let cut = panics(|| self.space.cut(pages(2, 1).start()));
        self.devices[1].with(|s| s.refuse_split = false);
        goes_on(cut).unwrap_err();
        Ok(())
    }

    fn ranges(&self) -> Vec<IovaRange> {
        let mappings = self.space.mappings();
        mappings.iter().map(|mapping| mapping.range).collect()
    }

    fn write(&mut self) -> Result<(), Error> {
        for (nth, device) in self.devices.iter().enumerate() {
            // Each leaf is dirty in one of the devices.
            for page in (0..END).filter(|page| (page / 4) % 3 == (3 - nth as u64) % 3) {
                if self.ids[nth].is_some() && device.write(page) {
                    self.written.insert(page);
                }
            }
        }
        for range in self.ranges() {
            let page = *numbers(range).start();
            self.space.mark(pages(page, 1))?;
            self.written.insert(page);
        }
        Ok(())
    }

    fn peek(&mut self) -> Result<(), Error> {
        for range in self.ranges() {
            let seen = SparseBitmap::new(END);
            let view = self.space.peek(
                &HarvestRequest::new(range, Granule::K4),
                UserBitmap::sparse(&seen),
            )?;
            let seen: BTreeSet<u64> = view.runs().flat_map(numbers).collect();
            let mut written = self.written.range(numbers(range));
            assert!(written.all(|page| seen.contains(page)), "{range}");
        }
        Ok(())
    }

    fn harvest(&mut self, commits: bool) -> Result<(), Error> {
        for range in self.ranges() {
            let taken = SparseBitmap::new(END);
            let request = HarvestRequest::new(range, Granule::K4);
            let lease = self.space.harvest(&request, UserBitmap::sparse(&taken))?;
            let synced = lease.sync()?;
            if commits {
                let told: Vec<IovaRange> = synced.runs().collect();
                synced.commit();
                self.told(told);
                let lost = self.written.range(numbers(range)).next();
                assert_eq!(lost, None, "lost in a harvest of {range}");
            } else {
                synced.abort();
            }
        }
        Ok(())
    }

    fn told(&mut self, runs: Vec<IovaRange>) {
        for page in runs.into_iter().flat_map(numbers) {
            self.written.remove(&page);
        }
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), Error> {
        let dirty = SparseBitmap::new(END);
        let (_, view) = self
            .space
            .unmap(range, Granule::K4, UserBitmap::sparse(&dirty))?;
        self.told(view.runs().collect());
        let lost = self.written.range(numbers(range)).next();
        assert_eq!(lost, None, "lost in an unmap of {range}");
        Ok(())
    }

    /// Dirty pages are harvested first, because a switch to on makes everything clean.
    fn switch_one(&mut self) -> Result<(), Error> {
        self.harvest(true)?;
        if let Some(id) = self.ids[1] {
            self.space.stop_domain_tracking(id)?;
            self.space.start_domain_tracking(id)?;
        }
        Ok(())
    }

    fn switch_all(&mut self) -> Result<(), Error> {
        self.harvest(true)?;
        // A switch to off that panics is not repeated. The goal is that tracking is certainly on.
        let off = panics(|| self.space.stop_tracking());
        self.space.start_tracking()?;
        let tracks = |nth: &usize| self.ids[*nth].is_some();
        let mut attached = (0..3).filter(tracks);
        assert!(attached.all(|nth| self.devices[nth].with(|s| s.tracking)));
        goes_on(off)
    }

    /// The invariants between any two calls.
    fn check(&self, when: &str) {
        let mapped = self.ranges();
        // A domain that a failed attach has left may be any unknown one.
        let left_behind = self.space.domains().len() > self.attached();
        for (nth, device) in self.devices.iter().enumerate() {
            let may_reach = self.ids[nth].is_some() || left_behind;
            for page in 0..END {
                let free = !mapped.iter().any(|range| range.intersects(pages(page, 1)));
                assert!(
                    (may_reach && !free) || !device.reaches(page),
                    "{when}: device {nth} reaches page {page}, which is free: {free}"
                );
            }
        }
        let stats = self.space.stats();
        assert_eq!(stats.harvests, stats.commits + stats.aborts, "{when}");
        let settled = stats.committed_bytes + stats.aborted_bytes;
        assert_eq!(stats.leased_bytes, settled, "{when}");
        let flush = stats.flush;
        assert_eq!(flush.owed, flush.retired + flush.pending, "{when}");
        let entries = flush.entries + flush.entries_pending;
        assert_eq!(flush.entries_owed, entries, "{when}");
    }

    fn attached(&self) -> usize {
        self.ids.iter().flatten().count()
    }

    /// At the end, harvests have found each write, nothing is owed, and all addresses are free.
    fn finish(mut self, when: &str) {
        self.harvest(true).unwrap();
        assert!(self.written.is_empty(), "{when}: lost {:?}", self.written);
        assert_eq!(self.attached(), 1);
        self.space.detach(self.ids[1].take().unwrap()).unwrap();
        self.check(when);
        let unmapped = self.space.unmap_discarding(IovaRange::ALL).unwrap();
        assert_eq!(unmapped.areas, 4, "0..6, 6..10, 13..16 and 40..44");
        assert!(self.space.domains().is_empty() && self.space.mappings().is_empty());
        let flush = self.space.stats().flush;
        assert_eq!((flush.pending, flush.entries_pending), (0, 0), "{when}");
        // No address is taken.
        self.space.map(pages(0, END), 0, RW).unwrap();
    }
}

/// Resumes a panic that was caught.
fn goes_on<T>(outcome: Result<T, Fault>) -> T {
    match outcome {
        Ok(value) => value,
        Err(fault) => std::panic::resume_unwind(Box::new(fault)),
    }
}

/// Runs the scenario with a panic at the point `fatal`, if it has that many. Returns the number of
/// its points.
fn run(fatal: usize, all: bool) -> Vec<String> {
    let mut world = World::new();
    world.points.arm_nth(fatal, all);
    let mut when = format!("point {fatal}, all: {all}");
    let mut hit = false;
    for (name, step) in STEPS {
        let before = world.points.fired();
        let outcome = panics(|| step(&mut world));
        let fired = world.points.fired() > before;
        match outcome {
            Ok(done) => done.unwrap(),
            Err(fault) => {
                when = format!("{when} ({}) in {name}", fault.0);
                assert!(fired, "{when}");
            }
        }
        if fired {
            assert!(
                outcome_is_panic(&when, name),
                "{when}: the panic got lost in {name}"
            );
            hit = true;
            world.points.disarm();
            world.check(&when);
            step(&mut world).unwrap();
        }
        world.check(&when);
    }
    let points = match hit {
        true => Vec::new(),
        false => world.points.made(),
    };
    world.points.disarm();
    world.finish(&when);
    points
}

/// Whether `when` already names the step that panicked.
fn outcome_is_panic(when: &str, name: &str) -> bool {
    when.ends_with(&format!(" in {name}"))
}

#[test]
fn a_panic_at_any_point_loses_nothing_and_leaves_nothing_behind() {
    let points = run(usize::MAX, false);
    // The scenario has each callback, and the destructor.
    for kind in [
        "page",
        "identity",
        "cost",
        "map: leaf",
        "unmap: taken",
        "unmap: told",
        "split: parted",
        "tracking: leaf",
        "harvest: cleared",
        "peek: recorded",
        "invalidate: some",
        "drop",
    ] {
        assert!(points.iter().any(|point| point == kind), "no {kind}");
    }
    // The epoch collector may run destructors later than in the first pass.
    for all in [false, true] {
        for fatal in 0..points.len() {
            run(fatal, all);
        }
    }
}
