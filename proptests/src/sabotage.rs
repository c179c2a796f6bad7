//! What is broken on purpose must be noticed: a run that passes without a flush, a drain or a mark checks nothing.

use dirtymap::SpaceStats;

use crate::random::Random;
use crate::{Config, Op, Rule, Sabotage, run};

/// Programs that are tried before a sabotage counts as unnoticed.
const TRIES: u64 = 2000;

fn program(seed: u64) -> (Config, Vec<Op>) {
    let mut random = Random::new(seed);
    let config = Config::decode(&mut random).unwrap();
    let ops = (0..60).map(|_| Op::decode(&mut random).unwrap()).collect();
    (config, ops)
}

/// Tries programs until one breaks `rule`, and makes sure that the same one passes when nothing is broken.
fn expect_caught(sabotage: Sabotage, rule: Rule) {
    for seed in 0..TRIES {
        let (config, ops) = program(seed);
        let broken = Config { sabotage, ..config };
        if run(&ops, &broken).is_err_and(|violation| violation.rule == rule) {
            run(&ops, &config).unwrap();
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
        sum.flush.failed += stats.flush.failed;
        sum.flush.invalidated.add(stats.flush.invalidated);
    }
    assert!(sum.harvests > 500, "{sum:?}");
    assert!(sum.committed_bytes > 0 && sum.aborted_bytes > 0, "{sum:?}");
    assert!(
        sum.put_back_outside_bytes > 0 && sum.discarded_bytes > 0,
        "{sum:?}"
    );
    assert!(sum.outside_marks > 0 && sum.flush.failed > 0, "{sum:?}");
    assert!(
        sum.flush.invalidated.dropped > 0 && sum.flush.invalidated.drained > 0,
        "{sum:?}"
    );
}
