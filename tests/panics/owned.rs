//! Values of users are dropped outside of all locks, and may panic there.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::Duration;

use dirtymap::{Access, AddressSpace, Error, Granule, HarvestRequest, IovaRange, UserBitmap};

use crate::mock::{Device, Fault, Owned, Points, pages, panics, reclaim_until};

const RW: Access = Access::ReadWrite;

/// Runs `call` on a thread of its own, and fails if it hangs.
fn ends(call: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        call();
        let _ = done.send(());
    });
    match ended.recv_timeout(Duration::from_secs(120)) {
        Err(RecvTimeoutError::Timeout) => panic!("a deadlock"),
        _ => thread.join().unwrap(),
    }
}

/// The calls that the destructor of a source may make, and here makes.
fn call_everything(space: &AddressSpace) {
    let _ = space.stats();
    for id in space.domains().into_iter().skip(1) {
        space.detach(id).unwrap();
    }
    space.stop_tracking().unwrap();
    space.start_tracking().unwrap();
    space.map(pages(900, 2), 0, RW).unwrap();
    space.cut(pages(901, 1).start()).unwrap();
    space.unmap_discarding(pages(900, 2)).unwrap();
    space.reclaim();
}

/// An update of the tree drops the values that earlier updates replaced, and did so under the lock
/// of the domains: a source whose `Drop` detached another one deadlocked.
#[test]
fn a_source_that_is_dropped_may_call_its_space() {
    ends(|| {
        let points = Arc::new(Points::default());
        let space = Arc::new(AddressSpace::new(Granule::K4));
        let dropped = Arc::new(AtomicU64::new(0));
        space.attach(Device::new(&points)).unwrap();
        space.map(pages(0, 16), 0, RW).unwrap();
        for _ in 0..40 {
            let (weak, count): (Weak<AddressSpace>, _) =
                (Arc::downgrade(&space), Arc::clone(&dropped));
            let owned = Owned::new(&Device::new(&points)).then(move || {
                count.fetch_add(1, SeqCst);
                if let Some(space) = weak.upgrade() {
                    call_everything(&space);
                }
            });
            let id = space.attach(owned).unwrap();
            // The destructor of an earlier source may have detached it already.
            let _ = space.detach(id);
            space.start_tracking().unwrap();
        }
        // Each kind of call runs destructors in turn.
        for n in 0..100 {
            space.map(pages(100 + n, 1), 0, RW).unwrap();
            space.reserve(pages(1000 + n, 1)).unwrap();
            space.unmap_discarding(pages(100 + n, 1)).unwrap();
        }
        reclaim_until(&space, || dropped.load(SeqCst) == 40);
    });
}

/// The same for a source that the attach refuses, and for sources that are still attached when the
/// space is dropped.
#[test]
fn a_source_that_is_refused_is_dropped_at_once_and_without_locks() {
    ends(|| {
        let points = Arc::new(Points::default());
        let space = Arc::new(AddressSpace::new(Granule::K4));
        space.attach(Device::new(&points)).unwrap();
        space.map(pages(0, 4), 0, RW).unwrap();
        let dropped = Arc::new(AtomicU64::new(0));
        let owned = |device: &Arc<Device>| {
            let (weak, count) = (Arc::downgrade(&space), Arc::clone(&dropped));
            Owned::new(device).then(move || {
                count.fetch_add(1, SeqCst);
                if let Some(space) = weak.upgrade() {
                    call_everything(&space);
                }
            })
        };
        let device = Device::new(&points);
        device.with(|s| s.refuse_map = true);
        assert!(space.attach(owned(&device)).is_err());
        reclaim_until(&space, || dropped.load(SeqCst) == 1);
        // A source that was never published is dropped by the call itself, which did so under the
        // lock of the domains.
        space.start_tracking().unwrap();
        points.arm("tracking: begun", 0, 1);
        assert!(panics(|| space.attach(owned(&device))).is_err());
        assert_eq!(dropped.load(SeqCst), 2);
        device.with(|s| s.refuse_map = false);
        space.attach(owned(&device)).unwrap();
        assert!(space.attach(owned(&device)).is_err(), "attached twice");
        assert_eq!(dropped.load(SeqCst), 3);
        let still = owned(&Device::new(&points));
        space.attach(still).unwrap();
        drop(space);
        // The garbage of a space that is gone is dropped by the work of other spaces.
        let other = AddressSpace::new(Granule::K4);
        reclaim_until(&other, || {
            other.map(pages(0, 1), 0, RW).unwrap();
            other.unmap_discarding(IovaRange::ALL).unwrap();
            dropped.load(SeqCst) == 5
        });
    });
}

/// A destructor panicked inside of an update of the tree, and so cut short a detach that had
/// succeeded.
#[test]
fn a_source_whose_drop_panics_undoes_nothing() {
    let points = Arc::new(Points::default());
    let space = AddressSpace::new(Granule::K4);
    let stays = Device::new(&points);
    space.attach(Arc::clone(&stays)).unwrap();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    // Calls of each kind. Each of them may be the one that runs a destructor.
    type Call = fn(&AddressSpace) -> Result<(), Error>;
    let calls: [Call; 5] = [
        |space| space.map(pages(20, 2), 0, RW),
        |space| space.cut(pages(21, 1).start()).map(|_| ()),
        |space| space.reserve(pages(30, 1)),
        |space| space.release_reserved(pages(30, 1)),
        |space| space.unmap_discarding(pages(20, 2)).map(|_| ()),
    ];
    let mut faults = 0;
    for _ in 0..20 {
        let dropped = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&dropped);
        let owned = Owned::new(&Device::new(&points)).then(move || {
            count.fetch_add(1, SeqCst);
            std::panic::resume_unwind(Box::new(Fault("drop".into())));
        });
        let id = space.attach(owned).unwrap();
        space.detach(id).unwrap();
        while dropped.load(SeqCst) == 0 {
            for call in calls {
                let before = space.ranges();
                if panics(|| call(&space).unwrap()).is_err() {
                    faults += 1;
                    assert_eq!(space.ranges(), before, "the call had not begun");
                    call(&space).unwrap();
                }
            }
            std::thread::yield_now();
        }
        assert!(stays.write(3));
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 16), Granule::K4);
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        lease.unwrap().sync().unwrap().commit();
        assert_eq!(words[0], 0xf);
    }
    assert_eq!((space.domains().len(), faults), (1, 20));
    space.unmap_discarding(IovaRange::ALL).unwrap();
}

/// A space, or a lease, that is dropped during unwinding must not panic again, because a second
/// panic aborts the process.
#[test]
fn a_source_whose_drop_panics_during_a_panic_is_silent() {
    let points = Arc::new(Points::default());
    let panicked = panics(|| {
        let space = AddressSpace::new(Granule::K4);
        for _ in 0..3 {
            let fault = || {
                std::panic::resume_unwind(Box::new(Fault("drop".into())));
            };
            let owned = Owned::new(&Device::new(&points)).then(fault);
            space.attach(owned).unwrap();
        }
        space.map(pages(0, 16), 0, RW).unwrap();
        space.start_tracking().unwrap();
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 16), Granule::K4);
        let _lease = space.harvest(&request, UserBitmap::new(&mut words));
        std::panic::resume_unwind(Box::new(Fault("the consumer".into())));
    });
    let panicked: Result<(), Fault> = panicked;
    assert_eq!(panicked.unwrap_err(), Fault("the consumer".into()));
    // Outside of unwinding, their panic is raised after all sources are dropped.
    let panicked = panics(|| {
        let space = AddressSpace::new(Granule::K4);
        for _ in 0..3 {
            let fault = || {
                std::panic::resume_unwind(Box::new(Fault("drop".into())));
            };
            let owned = Owned::new(&Device::new(&points)).then(fault);
            space.attach(owned).unwrap();
        }
    });
    assert_eq!(panicked.unwrap_err(), Fault("drop".into()));
}

/// Replaced rules of a space refer to its domains until no reader can hold them. So sources may be
/// dropped together with such rules, after the space, and no caller is there to receive a panic of
/// their destructors.
#[test]
fn a_source_that_garbage_holds_goes_with_it_in_silence() {
    let points = Arc::new(Points::default());
    let dropped = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&dropped);
    let owned = Owned::new(&Device::new(&points)).then(move || {
        count.fetch_add(1, SeqCst);
        std::panic::resume_unwind(Box::new(Fault("drop".into())));
    });
    // A reader of any space delays the garbage of all spaces.
    let readers = AddressSpace::new(Granule::K4);
    let reader = readers.snapshot();
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 4), 0, RW).unwrap();
    let domain = space.attach(owned).unwrap();
    space.detach(domain).unwrap();
    // Garbage is handed to the epoch collector in batches.
    for _ in 0..1000 {
        space.map(pages(4, 1), 0, RW).unwrap();
        space.unmap_discarding(pages(4, 1)).unwrap();
    }
    drop(space);
    assert_eq!(dropped.load(SeqCst), 0);
    drop(reader);
    // The rules of the space are dropped by the work of other spaces.
    let other = AddressSpace::new(Granule::K4);
    reclaim_until(&other, || {
        other.map(pages(0, 1), 0, RW).unwrap();
        other.unmap_discarding(IovaRange::ALL).unwrap();
        dropped.load(SeqCst) == 1
    });
}
