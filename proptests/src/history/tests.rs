//! The checker on histories that are written by hand, some right and some wrong, and on the records
//! of real threads.

use std::time::Duration;

use dirtymap::sync::Step;
use pagetable_sim::Breakage;

use super::record::{Broken, record};
use super::{Copied, End, Harvest, History, LostWrite, WRITERS, Write, check};

/// Writer 0 writes `number` to page 5.
fn write(number: u64, began: u64, ended: u64) -> Write {
    Write {
        writer: 0,
        page: 5,
        number,
        began,
        ended,
    }
}

/// A harvest of pages 0 to 9. If it reported page 5, it copied `number` from there.
fn harvest(began: u64, looked: u64, number: Option<u64>, end: End) -> Harvest {
    let copied = |number| {
        let mut numbers = [0; WRITERS];
        numbers[0] = number;
        (5, Copied::Data(numbers))
    };
    Harvest {
        whose: Some(0),
        covers: (0, 10),
        began,
        looked,
        reported: number.into_iter().map(copied).collect(),
        end,
    }
}

fn kept(began: u64, number: Option<u64>) -> Harvest {
    harvest(began, began + 5, number, End::Kept(began + 10))
}

fn decide<const W: usize, const H: usize>(
    writes: [Write; W],
    harvests: [Harvest; H],
) -> Result<u64, Box<LostWrite>> {
    check(&History {
        writes: writes.into(),
        harvests: harvests.into(),
    })
}

#[track_caller]
fn lost<const W: usize, const H: usize>(writes: [Write; W], harvests: [Harvest; H], number: u64) {
    let lost = decide(writes, harvests).unwrap_err();
    assert_eq!(lost.write.number, number, "{lost:?}");
}

#[test]
fn what_the_next_harvest_reports_is_not_lost() {
    assert_eq!(decide([write(1, 0, 10)], [kept(20, Some(1))]).unwrap(), 1);
    // Later harvests need not report it again.
    let after = [kept(20, Some(1)), kept(40, None), kept(60, None)];
    assert_eq!(decide([write(1, 0, 10)], after).unwrap(), 1);
}

#[test]
fn what_nobody_reports_is_lost() {
    lost([write(1, 0, 10)], [kept(20, None)], 1);
    // A later write, and the harvest that reports that one, do not make up for it.
    let again = [kept(20, None), kept(50, Some(2))];
    lost([write(1, 0, 10), write(2, 40, 45)], again, 1);
    // A harvest that looked before the write proves nothing.
    lost([write(1, 20, 30)], [kept(0, Some(0)), kept(40, None)], 1);
}

#[test]
fn a_write_and_a_harvest_at_once_owe_each_other_nothing() {
    assert_eq!(decide([write(1, 0, 30)], [kept(20, None)]).unwrap(), 0);
}

#[test]
fn another_harvest_under_way_may_have_it() {
    let other = harvest(15, 60, Some(1), End::Kept(90));
    assert_eq!(
        decide([write(1, 0, 10)], [other, kept(20, None)]).unwrap(),
        1
    );
    // A harvest that began after the first had looked everywhere does not count.
    lost([write(1, 0, 10)], [kept(20, None), kept(26, Some(1))], 1);
}

#[test]
fn a_write_by_a_cached_translation_is_in_the_copy_of_the_harvest_that_owes_the_flush() {
    let owes = harvest(0, 5, Some(1), End::Kept(50));
    decide([write(1, 20, 25)], [owes, kept(30, None)]).unwrap();
    // It copied too early.
    let copied = harvest(0, 5, Some(0), End::Kept(50));
    lost([write(1, 20, 25)], [copied, kept(30, None)], 1);
    // Its flush had ended when the write began.
    let flushed = harvest(0, 5, Some(1), End::Kept(15));
    lost([write(1, 20, 25)], [flushed, kept(30, None)], 1);
}

#[test]
fn what_is_put_back_is_reported_by_the_next() {
    let back = harvest(15, 20, Some(1), End::PutBack(40));
    let whole = [back.clone(), kept(30, None), kept(50, Some(1))];
    decide([write(1, 0, 10)], whole).unwrap();
    lost([write(1, 0, 10)], [back, kept(50, None)], 1);
}

#[test]
fn what_one_consumer_takes_says_nothing_of_another() {
    let other = |harvest| Harvest {
        whose: Some(1),
        ..harvest
    };
    let both = [kept(20, Some(1)), other(kept(40, Some(1)))];
    assert_eq!(decide([write(1, 0, 10)], both).unwrap(), 2);
    lost(
        [write(1, 0, 10)],
        [kept(20, Some(1)), other(kept(40, None))],
        1,
    );
    // An unmap is a harvest of both.
    let unmap = Harvest {
        whose: None,
        ..kept(20, Some(1))
    };
    let after = [unmap, kept(40, None), other(kept(40, None))];
    assert_eq!(decide([write(1, 0, 10)], after).unwrap(), 2);
}

#[test]
fn a_page_that_is_zero_has_what_was_written_before_the_drop() {
    let zero = |dropped| Harvest {
        reported: [(5, Copied::Zero(dropped))].into(),
        ..kept(20, None)
    };
    decide([write(1, 0, 10)], [zero(5), kept(40, None)]).unwrap();
    lost([write(1, 5, 10)], [zero(5), kept(40, None)], 1);
    decide([write(1, 5, 10)], [zero(5), kept(20, Some(1))]).unwrap();
}

#[test]
fn pages_that_a_harvest_did_not_come_to_are_no_matter() {
    let short = Harvest {
        covers: (0, 5),
        ..kept(20, None)
    };
    assert_eq!(decide([write(1, 0, 10)], [short]).unwrap(), 0);
}

/// The seed differs in every run. A failure prints it.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_nanos() as u64
}

#[test]
fn no_write_is_lost_in_what_real_threads_did() {
    let seed = seed();
    for seed in [seed, seed.wrapping_add(1)] {
        let history = record(Broken::Nothing, Duration::from_millis(600), seed);
        let [writes, harvests] = [history.writes.len(), history.harvests.len()];
        match check(&history) {
            Err(lost) => panic!("seed {seed}: {lost:#?}"),
            Ok(decided) => {
                println!("{writes} writes, {harvests} harvests, {decided} pairs");
                assert!(decided > 1000, "{writes} writes, {harvests} harvests");
            }
        }
    }
}

#[test]
fn every_sabotage_is_seen_in_the_history() {
    for broken in [
        Broken::Hardware(Breakage::IgnoreInvalidations),
        Broken::Hardware(Breakage::AcknowledgeWithoutDraining),
        Broken::Hardware(Breakage::FlushShortByOnePage),
        Broken::ForgetMarks,
        Broken::ForgetAborts,
        Broken::CopyBeforeSync,
        Broken::Step(Step::LeaveToOthers),
        Broken::Step(Step::CarryDebt),
        Broken::Step(Step::TellDiscard),
        Broken::Step(Step::TakenIsData),
        Broken::Step(Step::FlushAtDiscard),
    ] {
        let first = seed();
        // The interleavings of 200 ms are a matter of chance. Most faults show in the first run,
        // and on a loaded machine one may need dozens of runs.
        let caught = (0..400).find(|nth| {
            let history = record(broken, Duration::from_millis(200), first.wrapping_add(*nth));
            check(&history).is_err()
        });
        println!("{broken:?}: run {caught:?}");
        assert!(caught.is_some(), "{broken:?} was not seen");
    }
}
