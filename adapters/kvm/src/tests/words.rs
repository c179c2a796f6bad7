//! Words of a log and entries of a ring: which pages they name, and which calls clear them.

use super::*;

/// hyperlight met logs with bits above the end of the memory, and first reads that say everything.
#[test]
fn a_log_with_bits_behind_the_slot_names_pages_of_the_slot_only() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        fake.with(|state| state.tail = true);
        space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
        let first = harvest(&space, pages(0, 370));
        let everything: Vec<_> = (0..200).chain(300..370).collect();
        let expected = if mode == MODES[2] { everything } else { vec![] };
        assert_eq!(first, expected, "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0]);
    }
}

/// What is cleared is what was asked for: the neighbours in the same words stay. And each clear is
/// one that KVM accepts: the fake refuses others.
#[test]
fn parts_of_words_are_cleared_alone() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        harvest(&space, pages(300, 70));
        fake.with(|state| {
            (190..200)
                .chain(300..370)
                .step_by(3)
                .for_each(|n| state.write(n))
        });
        assert_eq!(harvest(&space, pages(191, 4)), [193], "{mode:?}");
        assert_eq!(harvest(&space, pages(365, 5)), [365, 368]);
        assert_eq!(harvest(&space, pages(0, 200)), [190, 196, 199]);
        let rest: Vec<_> = (302..365).step_by(3).collect();
        assert_eq!(harvest(&space, pages(300, 70)), rest);
        if mode == MODES[1] {
            // A whole word, and what is left behind the last one.
            fake.with(|state| assert!(state.clears.ends_with(&[(64, 6), (128, 72), (0, 64)])));
        }
    }
}

/// A large slot is cleared piece by piece, and a piece that is clean is not.
#[test]
fn clears_are_bounded_and_skip_what_is_clean() {
    let fake = Fake::default();
    fake.with(|state| {
        state.manual = true;
        state.memory = vec![0; 200_001];
    });
    let log = KvmLog::with_kernel(Box::new(fake.clone()), MODES[1], Granule::K4);
    let log = Arc::new(log);
    // SAFETY: the fake has no guest.
    unsafe { log.add_slot(0, pages(0, 200_001), 0) }.unwrap();
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
    space.map(pages(0, 200_001), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    fake.with(|state| [70, 130_000, 200_000].map(|page| state.write(page)));
    let mut words = vec![0u64; 3126];
    let request = HarvestRequest::new(pages(0, 200_001), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(lease.sync().unwrap().commit().bits_set, 3);
    let clears = [(64, 64), (129_984, 64), (200_000, 1)];
    fake.with(|state| assert_eq!(state.clears, clears));
}

/// CubeSandbox and Cloud Hypervisor took a page for 4096 bytes, where the kernel takes its own: on
/// a host with 64 KiB a bit stood for the wrong memory.
#[test]
fn a_bit_is_a_page_of_the_host() {
    let page = Granule::from_bytes(65536).unwrap();
    let fake = Fake::default();
    let log = Arc::new(KvmLog::with_kernel(Box::new(fake.clone()), MODES[0], page));
    let range = |first: u64, n: u64| IovaRange::from_len(Iova::new(first << 16), n << 16).unwrap();
    // SAFETY: the fake has no guest.
    let add = |range, host| unsafe { log.add_slot(0, range, host) };
    assert!(matches!(
        add(pages(0, 8), 0),
        Err(KvmError::Unaligned { .. })
    ));
    assert!(matches!(
        add(range(0, 8), 4096),
        Err(KvmError::Unaligned { .. })
    ));
    let slot = Slot::new(0, range(0, 100), 0, page).unwrap();
    assert!(slot.keep(99) && !slot.keep(100));
    let mut told = Vec::new();
    let slot = Slot::new(0, range(2, 100), 0, page).unwrap();
    slot.keep(3);
    slot.drain(&fake, MODES[3], range(0, 200), &mut |run| told.push(run));
    assert_eq!(told, [range(5, 1)]);
}

/// The kernel's own ring once took an offset near 2^64 for granted, and its sum with a bit number
/// wrapped (CVE-2026-52969).
#[test]
fn an_entry_that_names_no_page_is_not_computed_with() {
    let (space, log, fake) = machine(MODES[3]);
    let ring = fake.with(|state| state.ring.clone().unwrap());
    for (n, (slot, page)) in [(9, 1), (7, u64::MAX), (u32::MAX, u64::MAX - 63), (3, 10)]
        .into_iter()
        .enumerate()
    {
        assert!(ring[n].push(slot, page));
    }
    // Nobody knows which page of slot 7 was meant: all of them.
    assert_eq!(harvest(&space, pages(300, 70)).len(), 70);
    assert_eq!(harvest(&space, pages(0, 200)), [10]);
    assert_eq!(log.foreign_entries(), 3);
}
