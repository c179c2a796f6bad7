//! Bugs of programs with dirty tracking of their own, each as a test that such a program would
//! fail.
//!
//! Each bug was found in a released program, in its issues, or by reading its code:
//! docs/guide/bugs.md says where. The code here is ours. The comment of each test tells the bug.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod areas;
mod granules;
mod in_flight;
mod logs;
mod merging;
mod runs;
mod transactions;

use dirtymap::{AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};

const PAGE: u64 = 4096;
const RW: dirtymap::Access = dirtymap::Access::ReadWrite;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// The `n` pages from page `first` on.
fn pages(first: u64, n: u64) -> IovaRange {
    range(first * PAGE, n * PAGE)
}

/// Harvests `range`, and commits.
fn take(space: &AddressSpace, range: IovaRange) -> Vec<IovaRange> {
    let mut words = vec![0; range.granules(Granule::K4).div_ceil(64) as usize];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap()
        .sync()
        .unwrap();
    let runs = lease.runs().collect();
    lease.commit();
    runs
}

/// Each test is in the guide, and each test that the guide names exists. Those of `files` are tests
/// of the crate that has the file format: formats/tests/exchange/files.rs.
#[test]
fn each_of_these_tests_is_in_the_guide() {
    let guide = include_str!("../../docs/guide/bugs.md");
    let modules = [
        ("areas", include_str!("areas.rs")),
        ("granules", include_str!("granules.rs")),
        ("in_flight", include_str!("in_flight.rs")),
        ("merging", include_str!("merging.rs")),
        ("runs", include_str!("runs.rs")),
        ("transactions", include_str!("transactions.rs")),
    ];
    let mut tests = 0;
    for (module, text) in modules {
        for test in text.split("#[test]\nfn ").skip(1) {
            let name = test.split('(').next().unwrap();
            let link = format!("`{module}::{name}`");
            assert!(guide.contains(&link), "{link} is not in the guide");
            tests += 1;
        }
    }
    let links = modules.map(|(module, _)| guide.matches(&format!("`{module}::")).count());
    assert_eq!(
        tests,
        links.iter().sum::<usize>(),
        "the guide names a test that is not there"
    );
}
