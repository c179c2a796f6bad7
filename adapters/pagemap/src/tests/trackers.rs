//! Several trackers of one process, and a child of fork.

use super::*;

/// A scan goes by addresses, and does not ask whose memory is there: after an unmap and a map, the
/// tracker that had the old memory took the dirty pages of the one that has the new memory.
#[test]
fn memory_that_another_tracker_has_by_now_is_not_taken() {
    let (space, memory, fake) = process();
    fake.write(5);
    // Unmapped, mapped anew, added to another tracker.
    fake.with(|state| state.registered.fill(false));
    let other = ProcessMemory::with_kernel(Box::new(fake.clone()), Granule::K4);
    let other = Arc::new(other);
    let anew = AddressSpace::with_source(Granule::K4, Arc::clone(&other)).unwrap();
    // It is enough that they share a page.
    let last = pages(PAGES - 1, 1);
    other.add(last, HOST + ((PAGES - 1) << 12)).unwrap();
    anew.map(last, 0, Access::ReadWrite).unwrap();
    anew.start_tracking().unwrap();
    fake.write(PAGES - 1);

    let (at, error, below) = stops(&space, pages(0, PAGES));
    assert_eq!((at, below), (pages(0, 1).start(), vec![]));
    let text = format!("the memory from {HOST:#x} on was mapped anew");
    assert!(error.contains(&text), "{error}");
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let error = space
        .peek(&request, UserBitmap::new(&mut words))
        .unwrap_err();
    assert!(error.to_string().contains(&text), "{error}");
    space.stop_tracking().unwrap();
    let error = space.start_tracking().unwrap_err();
    assert!(error.to_string().contains(&text), "{error}");

    // The stale one goes, and takes nothing from the other: not a page, and not the registration.
    memory.remove(pages(0, PAGES)).unwrap();
    assert_eq!(harvest(&anew, last), [PAGES - 1]);
    fake.write(PAGES - 1);
    assert_eq!(harvest(&anew, last), [PAGES - 1]);
    // What was dirty in memory that is not there any more: all of it, for the unmap.
    let unmapped = space.unmap_discarding(pages(0, PAGES)).unwrap();
    assert_eq!(unmapped.discarded_bytes, u128::from(PAGES << 12));
}

/// Another tracker on the same kernel, with a space of its own over `range`, tracking.
fn another(fake: &Fake, range: IovaRange) -> (AddressSpace, Arc<ProcessMemory>) {
    let memory = ProcessMemory::with_kernel(Box::new(fake.clone()), Granule::K4);
    let memory = Arc::new(memory);
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&memory)).unwrap();
    let first = range.start().get() - (GUEST << 12);
    memory.add(range, HOST + first).unwrap();
    space.map(range, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (space, memory)
}

/// The area of memory that another tracker has by now is unmapped, with no call before it: the
/// unmap scans nothing, so the page stays with the other tracker.
#[test]
fn an_unmap_of_memory_that_another_tracker_has_takes_nothing() {
    let (space, _memory, fake) = process();
    fake.with(|state| state.registered.fill(false));
    let (anew, _other) = another(&fake, pages(0, PAGES));
    fake.write(5);
    let unmapped = space.unmap_discarding(pages(0, PAGES)).unwrap();
    assert_eq!(unmapped.discarded_bytes, u128::from(PAGES << 12));
    assert_eq!(harvest(&anew, pages(0, PAGES)), [5]);
}

/// Memory that was removed is on no list: a tracker that is given it later takes nothing over, and
/// what was dirty by the removal is all that is dirty.
#[test]
fn memory_that_was_removed_is_not_lost_to_a_later_tracker() {
    let (space, memory, fake) = process();
    fake.write(5);
    memory.remove(pages(0, PAGES)).unwrap();
    let (_anew, _other) = another(&fake, pages(0, PAGES));
    let unmapped = space.unmap_discarding(pages(0, PAGES)).unwrap();
    assert_eq!(unmapped.discarded_bytes, 1 << 12);
}

/// Memory right below and right above that of a tracker belongs to other ones.
#[test]
fn neighbours_are_not_taken_over() {
    let fake = Fake::new();
    let (space, _memory) = another(&fake, pages(10, 10));
    let (_below, _other) = another(&fake, pages(0, 10));
    let (_above, _third) = another(&fake, pages(20, 10));
    [10, 19].iter().for_each(|page| fake.write(*page));
    assert_eq!(harvest(&space, pages(10, 10)), [10, 19]);
}

/// Botan's generator had its state twice after a `fork`; here the child has the descriptors, which
/// act on the memory of its parent: a scan of the child took what the parent was to report.
#[test]
fn a_child_of_fork_is_refused_by_every_call() {
    let (space, memory, fake) = process();
    fake.write(5);
    let scans = fake.with(|state| {
        state.maker = Some(4711);
        state.scans
    });
    let text = "this tracker is of process 4711";
    let refused = |error: &dyn std::fmt::Display| {
        let error = error.to_string();
        assert!(error.contains(text), "{error}");
    };
    // The lock may be held by a thread that the child has not got: no call takes it.
    let held = (lock(&memory.tracking), lock(&memory.memory));
    refused(&memory.add(pages(PAGES, 1), 1 << 50).unwrap_err());
    refused(&memory.remove(pages(0, PAGES)).unwrap_err());
    refused(&space.stop_tracking().unwrap_err());
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
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
    assert_eq!(stopped.at, pages(0, 1).start());
    refused(&stopped.error);
    refused(&memory.invalidate(&FlushGather::new()).unwrap_err());
    let far = IovaRange::from_len(Iova::new(1 << 50), 4096).unwrap();
    refused(&space.map(far, 0, Access::ReadWrite).unwrap_err());
    space.unmap_discarding(pages(0, PAGES)).unwrap_err();
    drop(held);
    fake.with(|state| {
        assert_eq!(state.scans, scans, "the child looked");
        state.maker = None;
    });
    // The unmap told that all is dirty, here of the space that the child has a copy of.
    assert!(harvest(&space, pages(0, PAGES)).contains(&5));
}
