//! Other code, other processes and other machines interfere.

use super::*;

/// Other code that clears a slot's flags ends its log, and KVM says so as long as they are off.
/// What was written by then, and until they are on again, is not known.
#[test]
fn a_log_that_other_code_switched_off_is_dirty_as_a_whole() {
    for mode in [MODES[0], MODES[1]] {
        let (space, log, fake) = machine(mode);
        fake.with(|state| {
            state.write(5);
            state.slots.get_mut(&3).unwrap().logging = false;
            state.write(6);
        });
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 200), Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the slot has no log"));
        assert_eq!(stopped.at, Iova::new(0), "{mode:?}");
        drop(lease);
        // It can be removed all the same, or be set again.
        log.renew_slot(3).unwrap();
        assert_eq!(harvest(&space, pages(0, 200)).len(), 200, "{mode:?}");
        fake.with(|state| state.write(7));
        assert_eq!(harvest(&space, pages(0, 200)), [7], "{mode:?}");
        fake.with(|state| state.slots.get_mut(&3).unwrap().logging = false);
        log.remove_slot(3).unwrap();
        assert_eq!(harvest(&space, pages(0, 200)).len(), 200, "{mode:?}");
        let none = log.renew_slot(3);
        assert!(matches!(none, Err(KvmError::NoSlot { slot: 3 })));
    }
}

/// Botan's generator had its state twice after a `fork`; here the child has the rings, which it
/// shares with its parent: what it read, by a `peek` even, the parent never got.
#[test]
fn a_child_of_fork_is_refused_by_every_call() {
    for mode in MODES {
        let (space, log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| {
            state.write(5);
            state.maker = Some(4711);
        });
        let refused = |error: &dyn std::fmt::Display| {
            let error = error.to_string();
            assert!(error.contains("this log is of process 4711"), "{error}");
        };
        // The locks may be held by threads that the child has not got: no call takes them.
        let held = (lock(&log.tracking), lock(&log.slots), lock(&log.rings));
        // SAFETY: the fake has no guest.
        refused(&unsafe { log.add_slot(9, pages(380, 1), 0) }.unwrap_err());
        refused(&log.remove_slot(3).unwrap_err());
        refused(&log.renew_slot(3).unwrap_err());
        refused(&log.drain_rings().unwrap_err());
        refused(&space.stop_tracking().unwrap_err());
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 200), Granule::K4);
        refused(
            &space
                .peek(&request, UserBitmap::new(&mut words))
                .unwrap_err(),
        );
        let refusal = space.harvest(&request, UserBitmap::new(&mut words));
        let lease = refusal.unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the child harvests"));
        assert_eq!(stopped.at, Iova::new(0));
        refused(&stopped.error);
        refused(&log.invalidate(&FlushGather::new()).unwrap_err());
        refused(&space.map(pages(380, 1), 0, Access::ReadWrite).unwrap_err());
        space.unmap_discarding(pages(0, 200)).unwrap_err();
        drop(held);
        fake.with(|state| state.maker = None);
        // The unmap told that all is dirty, here of the space that the child has a copy of.
        assert!(harvest(&space, pages(0, 200)).contains(&5), "{mode:?}");
    }
}

/// KVM does not tell of which machine a processor is. A ring of another machine keeps the entries
/// that were handed back, so each flush says so, instead of pages that are missing in both logs.
#[test]
fn a_ring_of_another_machine_is_noticed_when_it_is_flushed() {
    let (space, log, fake) = machine(MODES[3]);
    fake.with(|state| {
        state.foreign_ring = true;
        state.write(5);
    });
    let mut words = [0u64; 8];
    let request = HarvestRequest::new(pages(0, 200), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let error = lease.sync().unwrap_err().to_string();
    assert!(error.contains("added as number 0 is not of"), "{error}");
    let refused = log.drain_rings();
    assert!(matches!(refused, Err(KvmError::ForeignRing { ring: 0 })));
    fake.with(|state| state.foreign_ring = false);
    assert_eq!(harvest(&space, pages(0, 200)), [5]);
}
