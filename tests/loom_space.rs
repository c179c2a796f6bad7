//! Model checking of domains that come and go, unmaps that return what was dirty, and cuts, against
//! each other and against harvests. As in `loom.rs`, each model is run again with single steps left
//! out, and must fail then.
#![cfg(dirtymap_loom)]
#![allow(clippy::unwrap_used)] // helpers of tests

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::model::{Bound, holds_within};
use dirtymap::sync::{Arc, AtomicU64, Mutex, Ordering, Ordering::Relaxed, Step, lock, thread};
use dirtymap::{
    Access, AddressSpace, DirtySource, DomainId, Error, Granule, HarvestRequest, Iova, IovaRange,
    Mapping, RangeError, Scope, Tracking, UserBitmap,
};

const PAGE: Granule = Granule::K4;
/// Two preemptions find every fault that more preemptions find here, in a tenth of the time.
const BOUND: Bound = Bound::between(2, 2);
const RW: Access = Access::ReadWrite;

fn page(n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(n << 12), 1 << 12).unwrap()
}

/// Page 0 behind a leaf with a dirty bit, and a device that caches the leaf with "D is set". The
/// lock stands for a write in flight: an invalidation waits for it.
struct OnePage {
    /// The fills of the page minus its removals.
    filled: AtomicU64,
    most: AtomicU64,
    dirty: AtomicU64,
    cached: Mutex<bool>,
    data: AtomicU64,
    /// An unmap panics after it has cleared D and before it reports the page. Set before threads
    /// run.
    panics: AtomicU64,
}

impl OnePage {
    fn new() -> Arc<Self> {
        Arc::new(OnePage {
            filled: AtomicU64::new(0),
            most: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            cached: Mutex::new(false),
            data: AtomicU64::new(0),
            panics: AtomicU64::new(0),
        })
    }

    /// A device writes; false if it faults.
    fn device_writes(&self, value: u64) -> bool {
        let mut cached = lock(&self.cached);
        if !*cached {
            // One step of the walk: present, and D set.
            if self.filled.load(Ordering::SeqCst) == 0 {
                return false;
            }
            self.dirty.store(1, Ordering::SeqCst);
            *cached = true;
        }
        self.data.store(value, Relaxed);
        true
    }
}

struct Source(Arc<OnePage>);

impl DirtySource for Source {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        let filled = self.0.filled.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most.fetch_max(filled, Ordering::SeqCst);
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        // The lock makes the walk of a device without a cached translation one step. A device with
        // one goes by its cache.
        let was_dirty = {
            let _walk = lock(&self.0.cached);
            self.0.filled.fetch_sub(1, Ordering::SeqCst);
            self.0.dirty.swap(0, Ordering::SeqCst) == 1
        };
        if self.0.panics.load(Relaxed) == 1 {
            // Says nothing on standard error, unlike `panic!`.
            resume_unwind(Box::new(()));
        }
        gather.add(range, PAGE);
        if was_dirty {
            dirty(range);
        }
    }

    fn split_at(&self, _: Iova, _: &mut FlushGather) -> Result<(), Error> {
        Ok(())
    }

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let dirty = &self.0.dirty;
        if dirty.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        let clear = || dirty.swap(0, Ordering::SeqCst) == 1;
        out.take(range, PAGE, clear).map_err(|error| Stopped {
            at: range.start(),
            error,
        })
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        *lock(&self.0.cached) = false;
        Ok(Invalidated::default())
    }
}

/// A tracked space with page 0 mapped in one domain.
fn tracked() -> (Arc<AddressSpace>, DomainId, Arc<OnePage>) {
    let hardware = OnePage::new();
    let space = AddressSpace::new(PAGE);
    let domain = space.attach(Source(hardware.clone())).unwrap();
    space.map(page(0), 0, RW).unwrap();
    space.start_tracking().unwrap();
    (Arc::new(space), domain, hardware)
}

/// Harvests page 0, copies it if it is dirty, and returns whether it was.
fn harvest(space: &AddressSpace, scope: Scope, data: &AtomicU64) -> Option<u64> {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(0), PAGE).in_scope(scope);
    let lease = space.harvest(&request, UserBitmap::shared(&words)).ok()?;
    let lease = lease.sync().unwrap();
    let copy = (lease.dirty() == 1).then(|| data.load(Relaxed));
    lease.commit();
    copy
}

/// Each pair is filled once, by the later of map and attach.
#[test]
fn a_map_and_an_attach_fill_their_pair_once() {
    holds_within(BOUND, &[Step::FillOnce, Step::LookAfterPublish], || {
        let hardware = OnePage::new();
        let space = Arc::new(AddressSpace::new(PAGE));
        let attach = {
            let (space, source) = (space.clone(), Source(hardware.clone()));
            thread::spawn(move || space.attach(source).is_ok())
        };
        let mapped = space.map(page(0), 0, RW).is_ok();
        let attached = attach.join().unwrap();
        let filled = hardware.filled.load(Relaxed);
        mapped && attached && filled == 1 && hardware.most.load(Relaxed) == 1
    });
}

/// A domain is attached while an area is unmapped. In the end it has nothing of that area.
#[test]
fn an_unmap_and_an_attach_leave_nothing_behind() {
    holds_within(BOUND, &[Step::ClosePairs], || {
        let hardware = OnePage::new();
        let space = Arc::new(AddressSpace::new(PAGE));
        space.map(page(0), 0, RW).unwrap();
        let attach = {
            let (space, source) = (space.clone(), Source(hardware.clone()));
            thread::spawn(move || space.attach(source).is_ok())
        };
        let unmapped = space.unmap_discarding(page(0)).is_ok();
        let attached = attach.join().unwrap();
        unmapped && attached && hardware.filled.load(Relaxed) == 0
    });
}

/// A domain is detached while an area is mapped. In the end it has nothing of that area.
#[test]
fn a_map_and_a_detach_leave_nothing_behind() {
    holds_within(BOUND, &[Step::RefuseLeaving], || {
        let hardware = OnePage::new();
        let space = Arc::new(AddressSpace::new(PAGE));
        let domain = space.attach(Source(hardware.clone())).unwrap();
        let detach = {
            let space = space.clone();
            thread::spawn(move || space.detach(domain).is_ok())
        };
        let mapped = space.map(page(0), 0, RW).is_ok();
        let detached = detach.join().unwrap();
        mapped && detached && hardware.filled.load(Relaxed) == 0
    });
}

/// An unmap that returns dirty pages, a harvest, and a device that writes through a cached
/// translation: the one that gets the page copies it after the last write.
#[test]
fn an_unmap_and_a_harvest_share_a_stale_write() {
    holds_within(BOUND, &[Step::FlushBeforeReuse], || {
        let (space, _, hardware) = tracked();
        hardware.device_writes(1);
        let unmap = {
            let (space, hardware) = (space.clone(), hardware.clone());
            thread::spawn(move || {
                let words = [AtomicU64::new(0)];
                let done = space.unmap(page(0), PAGE, UserBitmap::shared(&words));
                let dirty = done.is_ok_and(|(unmapped, _)| unmapped.dirty_bytes != 0);
                dirty.then(|| hardware.data.load(Relaxed))
            })
        };
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(page(0), PAGE);
        let lease = space.harvest(&request, UserBitmap::shared(&words));
        let wrote = if hardware.device_writes(2) { 2 } else { 1 };
        let mut ours = None;
        if let Ok(lease) = lease {
            let lease = lease.sync().unwrap();
            ours = (lease.dirty() == 1).then(|| hardware.data.load(Relaxed));
            lease.commit();
        }
        let theirs = unmap.join().unwrap();
        ours.max(theirs) == Some(wrote)
    });
}

/// Memory that an unmap has released belongs to its next owner: no write through a cached
/// translation reaches it.
#[test]
fn no_stale_write_reaches_the_next_owner() {
    holds_within(BOUND, &[Step::FlushBeforeReuse], || {
        let (space, _, hardware) = tracked();
        hardware.device_writes(1);
        let device = {
            let hardware = hardware.clone();
            thread::spawn(move || hardware.device_writes(2))
        };
        space.unmap_discarding(page(0)).unwrap();
        let next_owner = 100;
        hardware.data.store(next_owner, Relaxed);
        device.join().unwrap();
        hardware.data.load(Relaxed) == next_owner
    });
}

/// A domain is detached during a harvest, and a device writes through a cached translation: the
/// last write is copied.
#[test]
fn a_detach_and_a_harvest_lose_no_write() {
    holds_within(BOUND, &[Step::OweBeforeMark], || {
        let (space, domain, hardware) = tracked();
        hardware.device_writes(1);
        let detach = {
            let space = space.clone();
            thread::spawn(move || space.detach(domain).is_ok())
        };
        let first = harvest(&space, Scope::All, &hardware.data);
        let wrote = if hardware.device_writes(2) { 2 } else { 1 };
        let detached = detach.join().unwrap();
        let second = harvest(&space, Scope::All, &hardware.data);
        detached && first.max(second) == Some(wrote)
    });
}

/// The source panics in a detach, after it has cleared D and before it reports the page. A
/// concurrent harvest, or the next one, copies the last write, and the domain is still attached.
#[test]
fn a_detach_that_panics_and_a_harvest_lose_no_write() {
    holds_within(BOUND, &[Step::PanicIsDirty, Step::OweBeforeMark], || {
        let (space, domain, hardware) = tracked();
        hardware.panics.store(1, Relaxed);
        hardware.device_writes(1);
        let detach = {
            let space = space.clone();
            thread::spawn(move || catch_unwind(AssertUnwindSafe(|| space.detach(domain))).is_err())
        };
        let first = harvest(&space, Scope::All, &hardware.data);
        let wrote = if hardware.device_writes(2) { 2 } else { 1 };
        let panicked = detach.join().unwrap();
        let second = harvest(&space, Scope::All, &hardware.data);
        let attached = space.domains() == [domain];
        panicked && attached && first.max(second) == Some(wrote)
    });
}

/// Pages that an aborted lease over one domain puts back during the detach of that domain are found
/// by a harvest of all.
#[test]
fn an_abort_and_a_detach_do_not_miss_each_other() {
    // The fence of the detach is not in the list: the fence of the snapshot of areas that follows
    // it has the same effect.
    holds_within(BOUND, &[Step::MarkIfGoing, Step::SummarizedFence], || {
        let (space, domain, hardware) = tracked();
        hardware.device_writes(1);
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(page(0), PAGE).in_scope(Scope::Domain(domain));
        let lease = space
            .harvest(&request, UserBitmap::shared(&words))
            .unwrap()
            .sync()
            .unwrap();
        let detach = {
            let space = space.clone();
            thread::spawn(move || space.detach(domain).is_ok())
        };
        lease.abort();
        let detached = detach.join().unwrap();
        detached && harvest(&space, Scope::All, &hardware.data).is_some()
    });
}

/// Pages that an aborted lease over one domain puts back during an unmap are returned by the unmap,
/// or counted as outside.
#[test]
fn an_abort_and_an_unmap_do_not_miss_each_other() {
    holds_within(BOUND, &[Step::MarkIfGoing], || {
        let (space, domain, hardware) = tracked();
        hardware.device_writes(1);
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(page(0), PAGE).in_scope(Scope::Domain(domain));
        let lease = space
            .harvest(&request, UserBitmap::shared(&words))
            .unwrap()
            .sync()
            .unwrap();
        let unmap = {
            let space = space.clone();
            thread::spawn(move || space.unmap_discarding(page(0)).unwrap().discarded_bytes)
        };
        let outside = lease.abort().outside_bytes;
        unmap.join().unwrap() != 0 || outside != 0
    });
}

/// A write that has begun before the unmap of its area is in the result of the unmap, whether it
/// has ended or not.
#[test]
fn an_unmap_finds_a_write_in_flight() {
    holds_within(BOUND, &[Step::LookInFlight, Step::MarkBeforeFree], || {
        let space = Arc::new(AddressSpace::new(PAGE));
        space.map(page(0), 0, RW).unwrap();
        space.start_tracking().unwrap();
        let begun = Arc::new(AtomicU64::new(0));
        let writer = {
            let (space, begun) = (space.clone(), begun.clone());
            thread::spawn(move || {
                let guard = space.begin_write(page(0)).ok();
                // Release: pairs with the Acquire below; an unmap that sees it began during or
                // after the write.
                begun.store(u64::from(guard.is_some()), Ordering::Release);
                drop(guard);
            })
        };
        let had_begun = begun.load(Ordering::Acquire) == 1;
        let words = [AtomicU64::new(0)];
        let unmapped = space.unmap(page(0), PAGE, UserBitmap::shared(&words));
        let found = unmapped.is_ok_and(|(unmapped, _)| unmapped.dirty_bytes != 0);
        writer.join().unwrap();
        found || !had_begun
    });
}

/// Page 0 of a source whose own accesses are all relaxed, so that only the library orders them.
struct Lax {
    dirty: AtomicU64,
    /// The baseline is clean.
    baseline: AtomicU64,
    /// A harvest reached the source before it could see the clean baseline.
    early: AtomicU64,
}

impl Lax {
    fn new() -> Arc<Self> {
        Arc::new(Lax {
            dirty: AtomicU64::new(0),
            baseline: AtomicU64::new(0),
            early: AtomicU64::new(0),
        })
    }
}

struct LaxSource(Arc<Lax>);

impl DirtySource for LaxSource {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        gather.add(range, PAGE);
        if self.0.dirty.swap(0, Relaxed) == 1 {
            dirty(range);
        }
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.0.baseline.store(u64::from(to.is_on()), Relaxed);
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        if self.0.baseline.load(Relaxed) == 0 {
            self.0.early.store(1, Relaxed);
        }
        let dirty = &self.0.dirty;
        if dirty.load(Relaxed) == 0 {
            return Ok(());
        }
        let clear = || dirty.swap(0, Relaxed) == 1;
        out.take(range, PAGE, clear).map_err(|error| Stopped {
            at: range.start(),
            error,
        })
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        match self.0.dirty.load(Relaxed) {
            0 => Ok(()),
            _ => sink.record(range).map_err(|error| Stopped {
                at: range.start(),
                error,
            }),
        }
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// Invariant 14: while a detach moves dirty state from the table to the marks, a harvest finds it
/// at every moment.
#[test]
fn what_a_detach_moves_is_never_invisible() {
    let steps = [Step::DetachInFlight, Step::DetachFence];
    holds_within(BOUND, &steps, || {
        let source = Lax::new();
        let space = AddressSpace::new(PAGE);
        let domain = space.attach(LaxSource(source.clone())).unwrap();
        space.map(page(0), 0, RW).unwrap();
        space.start_tracking().unwrap();
        source.dirty.store(1, Relaxed);
        let space = Arc::new(space);
        let detach = {
            let space = space.clone();
            thread::spawn(move || space.detach(domain).is_ok())
        };
        let found = harvest(&space, Scope::All, &source.dirty).is_some();
        detach.join().unwrap() && found
    });
}

/// The same for a page in the put-back store of the domain: an abort put it there, and the detach
/// moves it to the marks.
#[test]
fn what_a_detach_moves_out_of_the_store_is_never_invisible() {
    holds_within(BOUND, &[], || {
        let source = Lax::new();
        let space = AddressSpace::new(PAGE);
        let domain = space.attach(LaxSource(source.clone())).unwrap();
        space.map(page(0), 0, RW).unwrap();
        space.start_tracking().unwrap();
        source.dirty.store(1, Relaxed);
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(page(0), PAGE).in_scope(Scope::Domain(domain));
        let lease = space.harvest(&request, UserBitmap::shared(&words)).unwrap();
        lease.abort();
        let space = Arc::new(space);
        let detach = {
            let space = space.clone();
            thread::spawn(move || space.detach(domain).is_ok())
        };
        let found = harvest(&space, Scope::All, &source.dirty).is_some();
        detach.join().unwrap() && found
    });
}

/// The same for a peek, which looks at the same places in the same order.
#[test]
fn a_peek_finds_what_a_detach_moves() {
    let steps = [Step::DetachInFlight, Step::DetachFence];
    holds_within(BOUND, &steps, || {
        let source = Lax::new();
        let space = AddressSpace::new(PAGE);
        let domain = space.attach(LaxSource(source.clone())).unwrap();
        space.map(page(0), 0, RW).unwrap();
        space.start_tracking().unwrap();
        source.dirty.store(1, Relaxed);
        let space = Arc::new(space);
        let detach = {
            let space = space.clone();
            thread::spawn(move || space.detach(domain).is_ok())
        };
        let words = [AtomicU64::new(0)];
        let request = HarvestRequest::new(page(0), PAGE);
        let peeked = space.peek(&request, UserBitmap::shared(&words)).is_ok();
        let found = words[0].load(Relaxed) == 1;
        detach.join().unwrap() && peeked && found
    });
}

/// A CPU writes a page that is marked already while tracking begins. The first full copy comes
/// after the switch: it has the write, or the mark is set again and the first harvest has it.
#[test]
fn a_write_while_tracking_begins_is_copied() {
    holds_within(BOUND, &[Step::SwitchFence, Step::MarkFence], || {
        let space = AddressSpace::new(PAGE);
        space.map(page(0), 0, RW).unwrap();
        let area = space.area(Iova::MIN).unwrap();
        area.mark(page(0)).unwrap();
        let data = Arc::new(AtomicU64::new(0));
        let writer = {
            let data = data.clone();
            thread::spawn(move || {
                data.store(1, Relaxed);
                area.mark(page(0)).unwrap();
            })
        };
        space.start_tracking().unwrap();
        let copy = data.load(Relaxed);
        writer.join().unwrap();
        copy == 1 || harvest(&space, Scope::All, &data) == Some(1)
    });
}

/// Refuses every area.
struct Refuses;

impl DirtySource for Refuses {
    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let start = mapping.range.start();
        Err(Error::Range(RangeError::ZeroLength { start }))
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// A mark in an area whose map a source refuses is counted by one of the two: by the map, which
/// takes the area out again, as discarded, or by the marker as outside.
#[test]
fn a_mark_and_a_map_that_is_taken_back_do_not_miss_each_other() {
    holds_within(BOUND, &[Step::TakeOutFence], || {
        let space = AddressSpace::new(PAGE);
        space.attach(Refuses).unwrap();
        let space = Arc::new(space);
        let marker = {
            let space = space.clone();
            thread::spawn(move || space.mark(page(0)).is_ok())
        };
        let refused = space.map(page(0), 0, RW).is_err();
        let marked = marker.join().unwrap();
        refused && (!marked || space.stats().discarded_bytes != 0)
    });
}

/// Section 2 of the contract: a harvest that is not refused as never tracked finds the clean
/// baseline.
#[test]
fn a_harvest_that_sees_tracking_sees_its_baseline() {
    holds_within(BOUND, &[Step::PublishBaseline], || {
        let source = Lax::new();
        let space = Arc::new(AddressSpace::new(PAGE));
        let domain = space.attach(LaxSource(source.clone())).unwrap();
        space.map(page(0), 0, RW).unwrap();
        let enable = {
            let space = space.clone();
            thread::spawn(move || space.start_domain_tracking(domain).is_ok())
        };
        let _ = harvest(&space, Scope::Domain(domain), &source.dirty);
        enable.join().unwrap() && source.early.load(Relaxed) == 0
    });
}
