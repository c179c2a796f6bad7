//! What programs at random have found, minimised, each with the bug it tells of.

use dirtymap::Access;

use crate::watch::run_watched as run;
use crate::{Ask, Config, Cut, MapFault, Master, Op, Place, check_gather};

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

/// A map that a source refuses flushes to take back what other sources had mapped. There was nothing to take back,
/// but the flush also carried the debt of an aborted lease; when it failed, the area stayed in the tree for ever,
/// neither usable nor unmappable.
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

/// An unmap whose flush fails has removed the leaves already, and with them their dirty bits; the call that succeeds
/// later finds them clean. So nobody counted them as discarded.
#[test]
fn an_unmap_whose_flush_fails_counts_what_it_discarded() {
    let unmap = Op::UnmapDiscarding {
        area: 0,
        cut: Cut::Whole,
    };
    run(&[WRITE, Op::FlushFails(0), unmap], &Config::PLAIN).unwrap();
}

/// Two gathers that are merged into each other double what they count with each step: the count of entries wrapped, which
/// is a panic in a debug build.
#[test]
fn gathers_that_are_merged_to_and_fro_do_not_wrap() {
    let add = [3, 0, 0, 0];
    let to_and_fro = [[0, 0, 0, 0], [1, 0, 0, 0]].concat();
    let steps = [add.to_vec(), to_and_fro.repeat(70)].concat();
    check_gather(&steps).unwrap();
}
