//! Failures that random programs have found, minimised, each with the story of its bug.

use dirtymap::Access;

use crate::watch::run_watched as run;
use crate::{
    Ask, Callback, Config, Cut, Format, MapFault, Master, Mode, Moment, Op, Place, check_gather,
};

const FIRST_PAGE: Place = Place {
    area: 0,
    page: 0,
    byte: 0,
};

const DEVICE: Master = Master {
    domain: 0,
    device: 0,
};

const WRITE: Op = Op::DmaWrite {
    device: DEVICE,
    at: FIRST_PAGE,
    len: 8,
};

/// A map that a source refuses flushes the mappings of the other sources. There were none, but the
/// flush also carried the debt of an aborted lease. When it failed, the area stayed in the tree for
/// ever, and could be neither used nor unmapped.
#[test]
fn a_refused_map_does_not_depend_on_the_flush_of_somebody_else() {
    let refused = Op::Map {
        slot: 2,
        skip: 0,
        pages: 1,
        shifted: false,
        access: Access::ReadWrite,
        fault: MapFault::OutsideMemory,
    };
    let ops = [
        WRITE,
        Op::Harvest(Ask::EVERYTHING),
        Op::Abort(0),
        Op::FlushFails(0),
        refused,
    ];
    run(&ops, &Config::PLAIN).unwrap();
}

/// An unmap whose flush fails has already removed the leaves with their dirty bits. The call that
/// succeeds later found no dirty bits, so the pages were not counted as discarded.
#[test]
fn an_unmap_whose_flush_fails_counts_what_it_discarded() {
    let unmap = Op::UnmapDiscarding {
        area: 0,
        cut: Cut::Whole,
    };
    run(&[WRITE, Op::FlushFails(0), unmap], &Config::PLAIN).unwrap();
}

/// Two gathers that are merged into each other double their counts with each step. The count of
/// entries wrapped, which panics in a debug build.
#[test]
fn gathers_that_are_merged_to_and_fro_do_not_wrap() {
    let add = [3, 0, 0, 0];
    let to_and_fro = [[0, 0, 0, 0], [1, 0, 0, 0]].concat();
    let steps = [add.to_vec(), to_and_fro.repeat(70)].concat();
    check_gather(&steps).unwrap();
}

const fn page(page: u8) -> Place {
    Place { page, ..FIRST_PAGE }
}

const fn panics(domain: u8, callback: Callback, calls: u8, moment: Moment) -> Op {
    Op::Panics {
        domain,
        callback,
        calls,
        moment,
    }
}

/// A source that panicked half-way through a map was recorded as empty, so it was not called to
/// unmap: the next attach found the addresses taken in the source, and devices still reached them.
#[test]
fn a_map_that_panics_half_way_is_undone() {
    let half = panics(1, Callback::Map, 0, Moment::Middle);
    run(&[half, Op::Attach(1)], &Config::PLAIN).unwrap();
}

/// The pages that a source had reported in an unmap were lost by its panic. The area stayed, and
/// was clean.
#[test]
fn an_unmap_that_panics_takes_nothing_with_it() {
    let unmap = Op::Unmap {
        area: 0,
        cut: Cut::Whole,
        granule_lg2: 12,
        short: false,
    };
    let half = panics(0, Callback::Unmap, 0, Moment::Middle);
    run(&[WRITE, half, unmap], &Config::PLAIN).unwrap();
}

/// A cut splits a leaf in each domain. The second domain panicked, and the gather with the debt of
/// the first was dropped. The repeated cut found nothing to split there, and owed nothing.
#[test]
fn a_split_that_panics_leaves_the_debt_of_the_one_before() {
    // The second domain has nothing to split, so it owes nothing that covers the first.
    let config = Config {
        large_leaves: [true, false, false],
        ..Config::PLAIN
    };
    let cut = Op::CutAt {
        at: page(15),
        unaligned: false,
    };
    let second = panics(1, Callback::SplitAt, 0, Moment::Before);
    // Nothing is dirty, so no harvest owes the same by chance.
    let ops = [Op::Attach(1), second, cut];
    run(&ops, &config).unwrap();
}

/// A batch that maps and unmaps undid its maps during the unwinding of a panic in an invalidation,
/// and invalidated again: the second panic aborted the process.
#[test]
fn an_invalidation_that_panics_while_a_batch_is_undone_ends_nothing() {
    let stretch = crate::Stretch {
        slot: 2,
        skip: 0,
        pages: 8,
    };
    let batch = Op::Batch([
        crate::Step::Map(stretch, Access::ReadWrite),
        crate::Step::Unmap(0),
        crate::Step::Nothing,
    ]);
    let both = [0, 1].map(|domain| panics(domain, Callback::Invalidate, 0, Moment::Before));
    let ops = [Op::Attach(1), WRITE, both[0], both[1], batch];
    run(&ops, &Config::PLAIN).unwrap();
}

/// A bounded harvest rounded its cursor and its steps to the page of the space, 4 KiB, and not to
/// that of a log, 64 KiB: it took a part of a page of the log.
#[test]
fn a_bounded_harvest_takes_whole_pages_of_all_sources() {
    let config = Config {
        formats: [Format::Log64K, Format::Amd, Format::Arm],
        ..Config::PLAIN
    };
    let bounded = |from| {
        Op::Harvest(Ask {
            mode: Mode::Bounded { from, bits: 1 },
            ..Ask::EVERYTHING
        })
    };
    // The second begins 512 bytes after a page.
    run(&[WRITE, bounded(0), bounded(250)], &config).unwrap();
}

/// The first of two sources had reported a page when the second one stopped below it. The lease had
/// the page, and its consumer copied up to the stop and committed.
#[test]
fn of_two_sources_the_one_that_stops_lower_counts() {
    let ops = [
        Op::Attach(1),
        WRITE,
        Op::DmaWrite {
            device: DEVICE,
            at: page(10),
            len: 8,
        },
        Op::Stops {
            domain: 1,
            at: page(7),
        },
        Op::Harvest(Ask::EVERYTHING),
        Op::Commit(0),
        Op::Harvest(Ask::EVERYTHING),
    ];
    run(&ops, &Config::PLAIN).unwrap();
}

/// A forgotten lease loses its own pages, and hides nothing of other pages.
#[test]
fn a_lease_that_is_forgotten_loses_no_other_page() {
    let other = Op::DmaWrite {
        device: DEVICE,
        at: page(3),
        len: 8,
    };
    let ops = [
        WRITE,
        Op::Harvest(Ask::EVERYTHING),
        Op::Forget(0),
        other,
        WRITE,
        Op::Harvest(Ask::EVERYTHING),
        Op::Commit(0),
        WRITE,
    ];
    run(&ops, &Config::PLAIN).unwrap();
}
