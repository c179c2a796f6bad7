//! Tracking begins and ends.

use super::*;

#[test]
fn what_is_dirty_when_tracking_ends_stays_and_what_was_before_it_begins_does_not() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| [1, 2].map(|page| state.write(page)));
        space.stop_tracking().unwrap();
        fake.with(|state| state.write(50));
        assert_eq!(harvest(&space, pages(0, 200)), [1, 2], "{mode:?}");
        fake.with(|state| state.write(60));
        space.start_tracking().unwrap();
        if mode == MODES[2] {
            harvest(&space, pages(0, 200));
        }
        fake.with(|state| state.write(70));
        assert_eq!(harvest(&space, pages(0, 200)), [70]);
    }
}

/// A switch that one slot refuses leaves all as they were; what was written to the others meanwhile
/// is not known, so it is dirty.
#[test]
fn a_switch_that_fails_loses_nothing() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| state.write(7));
        // Each slot is read, if it has a log, and then switched.
        let calls = if mode.is_ring() { 1 } else { 3 };
        fake.with(|state| state.fail_in = Some(calls));
        // The first slot has no log at that moment.
        fake.with(|state| state.when_failed = vec![9]);
        space.stop_tracking().unwrap_err();
        fake.with(|state| state.write(8));
        let found = harvest(&space, pages(0, 200));
        assert!(
            [7, 8, 9].iter().all(|page| found.contains(page)),
            "{mode:?}: {found:?}"
        );
    }
}

/// A switch to on that the second slot refuses: the first one has no log either.
#[test]
fn a_switch_to_on_that_fails_leaves_all_slots_off() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        space.stop_tracking().unwrap();
        fake.with(|state| state.fail_in = Some(1));
        space.start_tracking().unwrap_err();
        fake.with(|state| {
            assert_eq!(state.fail_in, None, "{mode:?}: no call failed");
            let logging = state.slots.values().filter(|slot| slot.logging).count();
            assert_eq!(logging, 0, "{mode:?}");
        });
    }
}

/// A switch that fails is undone: the slots that were off are dirty as a whole, once. The second of
/// two harvests is clean.
#[test]
fn a_switch_that_fails_is_reported_once() {
    for mode in [MODES[1], MODES[2]] {
        let (space, _log, fake) = machine(mode);
        space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
        harvest(&space, pages(0, 370));
        // The second slot cannot be read.
        fake.with(|state| state.fail_in = Some(2));
        space.stop_tracking().unwrap_err();
        let first: Vec<u64> = (0..200).collect();
        let again: Vec<u64> = (300..370).collect();
        let found = harvest(&space, pages(0, 370));
        assert!(found.starts_with(&first), "{mode:?}: {found:?}");
        assert!(found.len() == 200 || found[200..] == again, "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0], "{mode:?}");
        fake.with(|state| [3, 310].iter().for_each(|page| state.write(*page)));
        assert_eq!(harvest(&space, pages(0, 370)), [3, 310], "{mode:?}");
    }
}
