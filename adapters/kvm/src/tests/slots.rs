//! Slots are added and removed.

use super::*;

#[test]
fn a_slot_that_goes_leaves_what_was_dirty_to_the_unmap() {
    for mode in MODES {
        let (space, log, fake) = machine(mode);
        harvest(&space, pages(300, 70));
        fake.with(|state| [301, 369].map(|page| state.write(page)));
        space.mark(pages(310, 1)).unwrap();
        log.remove_slot(7).unwrap();
        assert!(matches!(
            log.remove_slot(7),
            Err(KvmError::NoSlot { slot: 7 })
        ));
        let mut words = [0u64; 2];
        let bitmap = UserBitmap::new(&mut words);
        let (unmapped, view) = space.unmap(pages(300, 70), Granule::K4, bitmap).unwrap();
        assert_eq!(unmapped.dirty_bytes, 3 << 12, "{mode:?}");
        let runs: Vec<_> = view.runs().collect();
        assert_eq!(runs, [pages(301, 1), pages(310, 1), pages(369, 1)]);
        // Number and addresses are free again.
        // SAFETY: the fake has no guest.
        unsafe { log.add_slot(7, pages(320, 10), 0) }.unwrap();
        assert_eq!(log.slots().placed.iter().len(), 2);
    }
}

#[test]
fn an_unmap_reports_the_log_of_a_slot_that_stays() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| [3, 199].map(|page| state.write(page)));
        assert!(space.cut(Iova::new(64 << 12)).unwrap());
        let mut words = [0u64; 4];
        let bitmap = UserBitmap::new(&mut words);
        let (_, view) = space.unmap(pages(64, 136), Granule::K4, bitmap).unwrap();
        assert_eq!(view.runs().collect::<Vec<_>>(), [pages(199, 1)], "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 64)), [3]);
        // If KVM cannot tell, all of it was dirty.
        fake.with(|state| state.fail_in = Some(0));
        let unmapped = space.unmap_discarding(pages(0, 64));
        if mode.is_ring() {
            unmapped.unwrap_err(); // the reset; nothing is unmapped
        } else {
            assert_eq!(unmapped.unwrap().discarded_bytes, 64 << 12);
        }
    }
}

#[test]
fn every_refusal_of_a_slot_names_what_is_wrong() {
    let (_space, log, _fake) = machine(MODES[0]);
    // SAFETY: the fake has no guest.
    let add = |slot, range, host| unsafe { log.add_slot(slot, range, host) };
    let top = IovaRange::new(Iova::MIN, Iova::new((1 << 43) - 1)).unwrap();
    assert!(matches!(add(0, top, 0), Err(KvmError::TooLarge { pages, .. }) if pages == 1 << 31));
    let wraps = add(0, pages(512, 2), !0 << 12);
    assert!(matches!(wraps, Err(KvmError::HostWraps { .. })));
    assert!(matches!(
        add(3, pages(512, 1), 0),
        Err(KvmError::SlotTaken { slot: 3 })
    ));
    let overlaps = add(0, pages(299, 2), 0);
    assert!(matches!(overlaps, Err(KvmError::Overlap { other: 7, .. })));
    assert!(matches!(log.drain_rings(), Ok(0)));
}
