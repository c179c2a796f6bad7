//! What is broken on purpose must be noticed: a run that passes without a flush, a drain or a mark checks nothing.

use dirtymap::{Access, SpaceStats};

use crate::random::Random;
use crate::{Ask, Config, Cut, MapFault, Master, Op, Place, Rule, Sabotage, run};

/// Programs that are tried before a sabotage counts as unnoticed: as many as a property tries.
const TRIES: u64 = 256;

fn program(seed: u64) -> (Config, Vec<Op>) {
    let mut random = Random::new(seed);
    let config = Config::decode(&mut random).unwrap();
    let ops = (0..60).map(|_| Op::decode(&mut random).unwrap()).collect();
    (config, ops)
}

/// Tries programs until one breaks `rule`, and makes sure that the same one passes when nothing is broken.
fn expect_caught(sabotage: Sabotage, rule: Rule) {
    expect(sabotage, Some(rule), program);
}

/// As `expect_caught`, by any rule.
fn expect_noticed(sabotage: Sabotage, program: impl Fn(u64) -> (Config, Vec<Op>)) {
    expect(sabotage, None, program);
}

fn expect(sabotage: Sabotage, rule: Option<Rule>, program: impl Fn(u64) -> (Config, Vec<Op>)) {
    for seed in 0..TRIES {
        let (config, ops) = program(seed);
        let broken = Config { sabotage, ..config };
        let noticed = run(&ops, &broken).err().map(|violation| violation.rule);
        if noticed.is_some_and(|noticed| rule.is_none_or(|rule| rule == noticed)) {
            run(&ops, &config).unwrap();
            println!("{sabotage:?}: {noticed:?} by program {seed}");
            return;
        }
    }
    panic!("{sabotage:?} was not noticed by {rule:?} in {TRIES} programs");
}

#[test]
fn ignored_invalidations_lose_writes() {
    expect_caught(Sabotage::IgnoreInvalidations, Rule::Lost);
    expect_caught(Sabotage::IgnoreInvalidations, Rule::Unreported);
}

#[test]
fn writes_in_flight_that_are_not_drained_are_lost() {
    expect_caught(Sabotage::AcknowledgeWithoutDraining, Rule::Lost);
}

#[test]
fn copies_before_the_flush_lose_writes() {
    expect_caught(Sabotage::CopyBeforeSync, Rule::Lost);
}

#[test]
fn writes_without_marks_are_lost() {
    expect_caught(Sabotage::ForgetMarks, Rule::Lost);
}

#[test]
fn what_the_sources_and_the_consumer_leave_out_is_noticed() {
    for sabotage in [
        Sabotage::FlushShortByOnePage,
        Sabotage::HideFailedFlush,
        Sabotage::TrackWithoutFlush,
        Sabotage::UnmapForgetsDirty,
        Sabotage::UnmapOwesNothing,
        Sabotage::SplitNothing,
        Sabotage::HarvestFirstDomainOnly,
        Sabotage::ForgetGuards,
        Sabotage::LeakLease,
    ] {
        expect_noticed(sabotage, program);
    }
}

/// Few programs meet these by chance: a table whose place a large leaf takes, and a device that writes between the two
/// rounds of a flush. So the steps that matter come first, and any program after them.
#[test]
fn what_few_programs_meet_is_noticed() {
    let device = Master {
        domain: 0,
        device: 0,
    };
    let at = Place {
        area: 0,
        page: 0,
        byte: 0,
    };
    let write = Op::DmaWrite { device, at, len: 8 };
    let busy = Op::BusySync {
        lease: 0,
        device,
        at,
        len: 8,
    };
    let between_rounds = [
        write,
        Op::Harvest(Ask::EVERYTHING),
        busy,
        Op::Commit(0),
        write,
    ];
    expect_noticed(Sabotage::DeviceTlbFirst, |seed| {
        let (config, ops) = program(seed);
        let config = Config {
            tlb_entries: 64,
            warm: true,
            ..config
        };
        (config, [&between_rounds[..], &ops].concat())
    });
    let unmap = Op::UnmapDiscarding {
        area: 0,
        cut: Cut::Whole,
    };
    let map = |shifted| Op::Map {
        slot: 0,
        skip: 0,
        pages: 512,
        shifted,
        access: Access::ReadWrite,
        fault: MapFault::None,
    };
    let table_replaced = [unmap, map(true), write, unmap, map(false), write];
    expect_noticed(Sabotage::SkipNonLeaf, |seed| {
        let (config, ops) = program(seed);
        let config = Config {
            large_leaves: [true; 3],
            warm: true,
            ..config
        };
        (config, [&table_replaced[..], &ops].concat())
    });
}

#[test]
fn programs_reach_everything() {
    let mut sum = SpaceStats::default();
    for seed in 0..100 {
        let (config, ops) = program(seed);
        let stats = run(&ops, &config).unwrap();
        sum.harvests += stats.harvests;
        sum.committed_bytes += stats.committed_bytes;
        sum.aborted_bytes += stats.aborted_bytes;
        sum.put_back_outside_bytes += stats.put_back_outside_bytes;
        sum.discarded_bytes += stats.discarded_bytes;
        sum.outside_marks += stats.outside_marks;
        sum.unmapped_dirty_bytes += stats.unmapped_dirty_bytes;
        sum.flush.failed += stats.flush.failed;
        sum.flush.invalidated.add(stats.flush.invalidated);
    }
    assert!(sum.harvests > 500, "{sum:?}");
    assert!(sum.committed_bytes > 0 && sum.aborted_bytes > 0, "{sum:?}");
    assert!(
        sum.put_back_outside_bytes > 0 && sum.discarded_bytes > 0,
        "{sum:?}"
    );
    assert!(sum.unmapped_dirty_bytes > 0, "{sum:?}");
    assert!(sum.outside_marks > 0 && sum.flush.failed > 0, "{sum:?}");
    assert!(
        sum.flush.invalidated.dropped > 0 && sum.flush.invalidated.drained > 0,
        "{sum:?}"
    );
}
