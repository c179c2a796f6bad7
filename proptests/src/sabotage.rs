//! Each fault that is made on purpose must be noticed: a run that passes without a flush, a drain
//! or a mark checks nothing.

use dirtymap::Access;
use dirtymap::space::SpaceStats;

use crate::random::Random;
use crate::watch::run_watched as run;
use crate::{
    Ask, Begin, Callback, Config, Cut, Fate, Form, Format, JoinFault, Limits, MapFault, Master,
    Meanwhile, Moment, Named, Op, Place, Reach, Rule, Sabotage, Storage,
};

/// The number of programs that are tried before a sabotage counts as unnoticed: as many as a
/// property tries.
const TRIES: u64 = 256;

fn program(seed: u64) -> (Config, Vec<Op>) {
    let mut random = Random::new(seed);
    let config = Config::decode(&mut random).unwrap();
    let ops = (0..60).map(|_| Op::decode(&mut random).unwrap()).collect();
    (config, ops)
}

/// Tries programs until one breaks `rule`, and checks that the same program passes without the
/// sabotage.
fn expect_caught(sabotage: Sabotage, rule: Rule) {
    expect(sabotage, Some(rule), program);
}

/// As `expect_caught`, for any rule.
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

/// Every sabotage. The match has no wildcard arm, so a new sabotage needs an arm with the rule that
/// notices it.
#[test]
fn every_sabotage_is_noticed() {
    for sabotage in Sabotage::ALL.iter().copied() {
        match sabotage {
            Sabotage::None => (),
            Sabotage::IgnoreInvalidations => {
                expect_caught(sabotage, Rule::Lost);
                expect_caught(sabotage, Rule::Unreported);
            }
            Sabotage::AcknowledgeWithoutDraining
            | Sabotage::CopyBeforeSync
            | Sabotage::ForgetMarks => expect_caught(sabotage, Rule::Lost),
            Sabotage::FlushShortByOnePage
            | Sabotage::HideFailedFlush
            | Sabotage::TrackWithoutFlush
            | Sabotage::UnmapForgetsDirty
            | Sabotage::UnmapOwesNothing
            | Sabotage::SplitNothing
            | Sabotage::HarvestFirstDomainOnly
            | Sabotage::ForgetGuards
            | Sabotage::LeakLease => expect_noticed(sabotage, program),
            Sabotage::StopShort => expect_caught_by(sabotage, Rule::Unreported, stopped),
            Sabotage::HidePanickedFlush => expect_noticed(sabotage, panicked),
            Sabotage::ClearWholeWords => expect_caught_by(sabotage, Rule::Unreported, logged),
            Sabotage::ForgetConsumer => expect_caught(sabotage, Rule::Unreported),
            Sabotage::ForgetDebt => expect_caught_by(sabotage, Rule::Unreported, shared),
            Sabotage::DiscardWithoutFlush | Sabotage::ZeroOverData => {
                expect_caught_by(sabotage, Rule::Lost, discarded);
            }
            Sabotage::ForgetDiscard => expect_caught(sabotage, Rule::Unreported),
            Sabotage::ForgetMerge => expect_caught_by(sabotage, Rule::Answer, cursors),
            Sabotage::ForgetWhole => expect_caught_by(sabotage, Rule::Unreported, bounded),
            Sabotage::DeviceTlbFirst => expect_noticed(sabotage, between_rounds),
            Sabotage::SkipNonLeaf => expect_noticed(sabotage, table_replaced),
        }
    }
}

/// As `expect_caught`, with programs of another kind.
fn expect_caught_by(sabotage: Sabotage, rule: Rule, program: impl Fn(u64) -> (Config, Vec<Op>)) {
    expect(sabotage, Some(rule), program);
}

/// Two pages of the first area are dirty, and a source stops at the second one.
fn stopped(seed: u64) -> (Config, Vec<Op>) {
    let device = Master {
        domain: 0,
        device: 0,
    };
    let page = |page| Place {
        area: 0,
        page,
        byte: 0,
    };
    let write = |at| Op::DmaWrite { device, at, len: 8 };
    let at = page(3);
    let stop = Op::Stops { domain: 0, at };
    let first = [
        write(page(2)),
        write(at),
        stop,
        Op::Harvest(Ask::EVERYTHING),
        Op::Commit(0),
    ];
    let (config, ops) = program(seed);
    let config = Config {
        warm: true,
        ..config
    };
    (config, [&first[..], &ops].concat())
}

/// A page is written again, and its invalidation is told to panic.
fn panicked(seed: u64) -> (Config, Vec<Op>) {
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
    let panics = Op::Panics {
        domain: 0,
        callback: Callback::Invalidate,
        calls: 0,
        moment: Moment::Before,
    };
    let first = [
        write,
        Op::Harvest(Ask::EVERYTHING),
        panics,
        Op::Commit(0),
        write,
    ];
    let (config, ops) = program(seed);
    let config = Config {
        warm: true,
        ..config
    };
    (config, [&first[..], &ops].concat())
}

/// A page is taken for one consumer, and copied for another one before the first one syncs. Then it
/// is written again.
fn shared(seed: u64) -> (Config, Vec<Op>) {
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
    let join = Op::Join {
        consumer: 1,
        start: Begin::Clean,
        reach: Reach::Everything,
        fault: JoinFault::None,
    };
    let pass = Op::Pass {
        ask: Ask::EVERYTHING.by(1),
        form: Form::Words,
        fate: Fate::Commit,
    };
    let taken = Op::Harvest(Ask::EVERYTHING);
    let first = [join, write, taken, pass, write];
    let (config, ops) = program(seed);
    let config = Config {
        warm: true,
        ..config
    };
    (config, [&first[..], &ops].concat())
}

const JOIN: Op = Op::Join {
    consumer: 1,
    start: Begin::Clean,
    reach: Reach::Everything,
    fault: JoinFault::None,
};

/// A device writes a page.
const fn write(page: u8) -> Op {
    Op::DmaWrite {
        device: Master {
            domain: 0,
            device: 0,
        },
        at: Place {
            area: 0,
            page,
            byte: 0,
        },
        len: 8,
    }
}

/// A harvest of one consumer, from the begin to the commit.
const fn pass(whose: u8) -> Op {
    Op::Pass {
        ask: Ask::EVERYTHING.by(whose),
        form: Form::Words,
        fate: Fate::Commit,
    }
}

/// `first`, in a warm world, and then a random program.
fn after(first: &[Op], seed: u64) -> (Config, Vec<Op>) {
    let (config, ops) = program(seed);
    let config = Config {
        warm: true,
        ..config
    };
    (config, [first, &ops].concat())
}

/// A page is written, discarded, and written again.
fn discarded(seed: u64) -> (Config, Vec<Op>) {
    let discard = Op::Discard {
        at: Place {
            area: 0,
            page: 0,
            byte: 0,
        },
        pages: 64,
        ragged: false,
        storage: Storage::Drops,
        meanwhile: Meanwhile::Nothing,
    };
    let first = [write(0), discard, write(0), pass(0)];
    after(&first, seed)
}

/// Two cursors, and an increment after each of them. The younger cursor is dropped.
fn cursors(seed: u64) -> (Config, Vec<Op>) {
    let keep = |cursor| Op::KeepCursor { cursor, whose: 1 };
    let since = Op::Since {
        whose: 1,
        epoch: Named::Cursor(0),
    };
    let drop = Op::DropCursor(1);
    let first = [
        JOIN,
        keep(0),
        write(0),
        pass(1),
        keep(1),
        write(1),
        pass(1),
        drop,
        since,
    ];
    after(&first, seed)
}

/// A consumer may have no pending page, and one is left to it.
fn bounded(seed: u64) -> (Config, Vec<Op>) {
    let limits = Limits {
        bytes: 0,
        deltas: 64,
        age: u64::MAX,
    };
    let bound = Op::Bound { whose: 1, limits };
    let first = [JOIN, bound, write(0), pass(0), pass(1)];
    after(&first, seed)
}

/// Programs over logs.
fn logged(seed: u64) -> (Config, Vec<Op>) {
    let (config, ops) = program(seed);
    let config = Config {
        formats: [Format::Log4K, Format::Log8K, Format::Log64K],
        warm: true,
        ..config
    };
    (config, ops)
}

/// Few random programs have a device that writes between the two rounds of a flush. So the steps
/// that matter come first, and a random program follows.
fn between_rounds(seed: u64) -> (Config, Vec<Op>) {
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
    let first = [
        write,
        Op::Harvest(Ask::EVERYTHING),
        busy,
        Op::Commit(0),
        write,
    ];
    let (config, ops) = program(seed);
    let config = Config {
        tlb_entries: 64,
        warm: true,
        ..config
    };
    (config, [&first[..], &ops].concat())
}

/// The same for a table that a large leaf replaces.
fn table_replaced(seed: u64) -> (Config, Vec<Op>) {
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
    let first = [unmap, map(true), write, unmap, map(false), write];
    let (config, ops) = program(seed);
    let config = Config {
        large_leaves: [true; 3],
        warm: true,
        ..config
    };
    (config, [&first[..], &ops].concat())
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
