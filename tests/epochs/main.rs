//! Epochs, cursors, lineage and bounds of consumers.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod bounds;
mod breaks;
#[path = "../common/mod.rs"]
mod common;
mod named;
mod old_stores;
mod put_back;
mod reference;

use dirtymap::harvest::{Epoch, Lineage, Parent, Since, Why};
use dirtymap::{Access, AddressSpace, Consumer, Granule, Iova, IovaRange};

const PAGE: u64 = 4096;

fn space(pages: u64) -> AddressSpace {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..pages * PAGE, 0, Access::ReadWrite).unwrap();
    space
}

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), n * PAGE).unwrap()
}

/// The numbers of the pages in `runs`.
fn numbers(runs: impl Iterator<Item = IovaRange>) -> Vec<u64> {
    runs.flat_map(|run| run.start().get() / PAGE..=run.last().get() / PAGE)
        .collect()
}

/// Harvests all for `consumer`, and commits: the pages, and the lineage.
fn next(consumer: &Consumer<'_>) -> (Vec<u64>, Lineage) {
    let lease = consumer.rounds().next().unwrap();
    let pages = numbers(lease.runs());
    let named = lease.lineage().unwrap();
    let (_, lineage) = lease.commit_epoch();
    assert_eq!(lineage, Some(named));
    (pages, named)
}

fn since(consumer: &Consumer<'_>, epoch: Epoch) -> Result<Vec<u64>, Why> {
    match consumer.since(epoch) {
        Since::Runs(written) => {
            assert_eq!((written.from(), written.to()), (epoch, consumer.epoch()));
            assert_eq!(written.is_empty(), written.runs().next().is_none());
            Ok(numbers(written.runs()))
        }
        Since::Everything(why) => Err(why),
    }
}

/// Parents that name an epoch.
fn of(lineage: Lineage) -> Parent {
    Parent::Epoch(lineage.epoch)
}
