//! Two address spaces of one machine, as a guest with system management mode has.

use super::*;

/// Number and addresses of the slot of system management mode are those of an ordinary one, but for
/// the address space in the upper half of the number.
const SMM: (u32, u64, u64) = (1 << 16 | 3, 100, 230);

/// A machine whose system management mode sees pages 100 to 329.
fn machine_with_smm(mode: KvmMode) -> (AddressSpace, Arc<KvmLog>, Fake) {
    let (space, log, fake) = machine(mode);
    let (slot, first, n) = SMM;
    // SAFETY: the fake has no guest.
    unsafe { log.add_slot(slot, pages(first, n), 0) }.unwrap();
    space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
    harvest(&space, pages(0, 370));
    (space, log, fake)
}

/// KVM has an address space of its own for system management mode, and QEMU gives it the same
/// memory at the same addresses. Slots of it were refused as an overlap.
#[test]
fn slots_of_two_address_spaces_may_share_addresses() {
    for mode in MODES {
        let (space, log, fake) = machine_with_smm(mode);
        // SAFETY: the fake has no guest.
        let add = |slot, range| unsafe { log.add_slot(slot, range, 0) };
        let taken = add(SMM.0, pages(380, 1));
        assert!(matches!(taken, Err(KvmError::SlotTaken { slot }) if slot == SMM.0));
        let overlaps = add(1 << 16, pages(329, 2));
        assert!(matches!(overlaps, Err(KvmError::Overlap { other, .. }) if other == SMM.0));
        let overlaps = add(0, pages(199, 2));
        assert!(matches!(overlaps, Err(KvmError::Overlap { other: 3, .. })));

        // A page is dirty when either of its slots says so, and once if both do.
        fake.with(|state| {
            [10, 120, 310].iter().for_each(|page| state.write(*page));
            [120, 150, 250, 329]
                .iter()
                .for_each(|page| state.write_in(1, *page));
        });
        let written = [10, 120, 150, 250, 310, 329];
        assert_eq!(harvest(&space, pages(0, 370)), written, "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0], "{mode:?}");
        assert_eq!(log.foreign_entries(), 0, "{mode:?}");

        // Each goes by itself.
        fake.with(|state| {
            state.write(150);
            state.write_in(1, 151);
        });
        log.remove_slot(SMM.0).unwrap();
        fake.with(|state| state.write(152));
        assert_eq!(harvest(&space, pages(0, 370)), [150, 151, 152], "{mode:?}");
    }
}

/// The slot that stops lies over one that has told its pages already. Below the stop all is told,
/// from there on nothing is lost.
#[test]
fn a_stop_in_one_address_space_loses_nothing_of_the_other() {
    for mode in [MODES[0], MODES[1]] {
        let (space, _log, fake) = machine_with_smm(mode);
        fake.with(|state| {
            [10, 120, 310].iter().for_each(|page| state.write(*page));
            [150, 250].iter().for_each(|page| state.write_in(1, *page));
        });
        // The slot of system management mode cannot be read.
        fake.with(|state| state.fail_in = Some(if mode.is_manual() { 2 } else { 1 }));
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 370), Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the second slot cannot be read"));
        assert_eq!(stopped.at, Iova::new(100 << 12), "{mode:?}");
        lease.partial().sync().unwrap().commit();
        let found = harvest(&space, pages(0, 370));
        let above = [120, 150, 250, 310];
        assert!(
            above.iter().all(|page| found.contains(page)),
            "{mode:?}: {found:?}"
        );
        assert!(!found.contains(&10), "{mode:?}: told below the stop");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0], "{mode:?}");
    }
}

/// The first of two slots stops in the middle: the second one tells what it has below, and no more.
#[test]
fn a_stop_in_the_middle_leaves_the_other_address_space_whole() {
    const PAGES: u64 = 200_000;
    let fake = Fake::default();
    fake.with(|state| {
        state.manual = true;
        state.memory = vec![0; PAGES as usize + 1];
    });
    let log = KvmLog::with_kernel(Box::new(fake.clone()), MODES[1], Granule::K4);
    let log = Arc::new(log);
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
    for (slot, first) in [(0, 0), (1 << 16, 1)] {
        // SAFETY: the fake has no guest.
        unsafe { log.add_slot(slot, pages(first, PAGES), 0) }.unwrap();
    }
    let all = pages(0, PAGES + 1);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    fake.with(|state| {
        [70, 130_000].iter().for_each(|page| state.write(*page));
        [80, 140_000]
            .iter()
            .for_each(|page| state.write_in(1, *page));
        // One read, one clear; the next clear fails.
        state.fail_in = Some(2);
    });
    let mut words = vec![0u64; PAGES as usize / 64 + 1];
    let request = HarvestRequest::new(all, Granule::K4);
    let numbers = |runs: Vec<IovaRange>| -> Vec<u64> {
        let numbers = |run: &IovaRange| run.start().get() >> 12..=run.last().get() >> 12;
        runs.iter().flat_map(numbers).collect()
    };
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease.stopped().unwrap_or_else(|| panic!("a clear failed"));
    assert_eq!(stopped.at, Iova::new(129_984 << 12));
    let lease = lease.partial().sync().unwrap();
    let below: Vec<_> = numbers(lease.runs().collect());
    assert!(below.starts_with(&[70, 80]), "{below:?}");
    assert!(!below.contains(&140_000), "{below:?}");
    lease.commit();
    let mut words = vec![0u64; PAGES as usize / 64 + 1];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    assert_eq!(numbers(lease.runs().collect()), [130_000, 140_000]);
    lease.commit();
}
