//! What the addresses of a lease were mapped to when they were written.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::{Fake, PAGE, pages};
use dirtymap::harvest::Backing;
use dirtymap::{
    Access, AddressSpace, Change, Error, Granule, HarvestRequest, IovaRange, Lease, Mapping,
    SparseBitmap, Start, Synced, UserBitmap,
};

const RW: Access = Access::ReadWrite;

/// A space over one source, which tracks.
fn space() -> (Arc<AddressSpace>, Arc<Fake>) {
    let source = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
    space.start_tracking().unwrap();
    (Arc::new(space), source)
}

/// The guest pages that back dirty runs.
fn guest(runs: impl Iterator<Item = IovaRange>, backing: &Backing) -> Vec<u64> {
    let mut found = Vec::new();
    for part in runs.flat_map(|run| backing.of(run)) {
        let first = part.backing / PAGE;
        found.extend(first..first + (part.range.len() as u64).div_ceil(PAGE));
    }
    found
}

fn of(lease: &Lease<'_, Synced>) -> Vec<u64> {
    guest(lease.runs(), lease.backing().unwrap())
}

fn unmapped(space: &AddressSpace, range: IovaRange) -> Vec<u64> {
    let bits = SparseBitmap::new(range.granules(Granule::K4) as u64);
    let bitmap = UserBitmap::sparse(&bits);
    let (_, dirty, backing) = space
        .unmap_with_backing(range, Granule::K4, bitmap)
        .unwrap();
    guest(dirty.runs(), &backing)
}

/// Cloud Hypervisor refuses to migrate VFIO devices behind a virtual IOMMU (its issue 8567): by the
/// time of the copy a device address may be mapped to other memory than that which was written, or
/// to none.
#[test]
fn a_lease_knows_what_was_mapped_when_it_was_written() {
    let (space, source) = space();
    space.map(pages(10, 4), 100 * PAGE, RW).unwrap();
    space.map(pages(14, 4), 50 * PAGE, RW).unwrap();
    source.dirty(12);
    space.mark(pages(13, 2)).unwrap();
    let lease = space.rounds().with_backing().next().unwrap();
    space.unmap_discarding(pages(10, 8)).unwrap();
    space.map(pages(8, 16), 900 * PAGE, RW).unwrap();
    assert!(lease.runs().eq([pages(12, 3)]), "one run over both areas");
    assert_eq!(of(&lease), [102, 103, 50]);
    let backing = lease.backing().unwrap();
    let accessed: Vec<_> = backing.of(pages(0, 100)).map(|part| part.access).collect();
    assert_eq!(accessed, [RW, RW]);
    lease.commit();
}

/// Nothing is recorded for harvests that do not ask for it.
#[test]
fn without_the_request_there_is_no_backing() {
    let (space, _) = space();
    space.map(pages(0, 4), 0, RW).unwrap();
    assert!(space.rounds().next().unwrap().backing().is_none());
}

/// A granule larger than the page, pages of a cut area, and holes.
#[test]
fn runs_that_reach_into_holes_have_parts_of_areas_only() {
    let (space, source) = space();
    space.map(pages(2, 4), 20 * PAGE, RW).unwrap();
    space.cut(pages(4, 1).start()).unwrap();
    source.dirty(3);
    source.dirty(5);
    let k16 = Granule::from_lg2(14).unwrap();
    let mut words = [0];
    let request = HarvestRequest::new(pages(0, 16), k16).with_backing();
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    assert!(lease.runs().eq([pages(0, 8)]));
    assert_eq!(of(&lease), [20, 21, 22, 23]);
}

/// The harvest has a snapshot with the old area. While it looks, the area is unmapped, another one
/// is mapped to other memory, and a device writes through it. The source knows only addresses, so
/// the harvest takes that page: its memory is that of the new area.
#[test]
fn a_page_that_was_written_through_a_younger_area_has_its_backing() {
    let (space, source) = space();
    space.map(pages(0, 4), 100 * PAGE, RW).unwrap();
    source.dirty(1);
    let remap = {
        let (space, source) = (space.clone(), source.clone());
        move || {
            assert_eq!(unmapped(&space, pages(0, 4)), [101]);
            space.map(pages(0, 4), 200 * PAGE, RW).unwrap();
            source.dirty(2);
        }
    };
    source.with(|state| state.on_read = Some(Box::new(remap)));
    let lease = space.rounds().with_backing().next().unwrap();
    assert!(lease.runs().eq([pages(2, 1)]));
    // That of the old area as well: the harvest cannot tell them apart.
    assert_eq!(of(&lease), [102, 202]);
    let mappings: Vec<_> = lease.backing().unwrap().mappings().collect();
    assert_eq!(mappings.len(), 2);
    lease.commit();
    assert_eq!(unmapped(&space, pages(0, 4)), []);
}

/// The same, and the younger area has left again before the harvest ends: no snapshot has it.
#[test]
fn a_page_that_was_written_through_an_area_which_left_again_has_its_backing() {
    for by_batch in [false, true] {
        let (space, source) = space();
        space.map(pages(0, 4), 100 * PAGE, RW).unwrap();
        space.map(pages(8, 1), 80 * PAGE, RW).unwrap();
        let go = {
            let space = space.clone();
            move || {
                assert_eq!(unmapped(&space, pages(0, 2)), [], "the harvest has it");
                space.map(pages(0, 4), 300 * PAGE, RW).unwrap();
            }
        };
        let come = {
            let (space, source) = (space.clone(), source.clone());
            move || {
                unmapped(&space, pages(0, 4));
                let (range, backing, access) = (pages(0, 2), 200 * PAGE, RW);
                let map = Change::Map {
                    range,
                    backing,
                    access,
                };
                match by_batch {
                    true => space.apply(&[map]).map(|_| ()).unwrap(),
                    false => space.map(range, backing, access).unwrap(),
                }
                source.dirty(1);
                // At the look at the next area.
                source.with(|state| state.on_read = Some(Box::new(go)));
            }
        };
        source.with(|state| state.on_read = Some(Box::new(come)));
        let lease = space.rounds().with_backing().next().unwrap();
        assert!(lease.runs().eq([pages(1, 1)]));
        assert_eq!(of(&lease), [101, 201, 301], "by batch: {by_batch}");
    }
}

/// An area that is cut while the harvest looks has the same memory before and after.
#[test]
fn a_cut_during_the_harvest_adds_nothing() {
    let (space, source) = space();
    space.map(pages(0, 4), 100 * PAGE, RW).unwrap();
    source.dirty(1);
    source.dirty(3);
    let cut = {
        let space = space.clone();
        move || {
            space.cut(pages(2, 1).start()).unwrap();
            assert_eq!(unmapped(&space, pages(2, 2)), [103]);
        }
    };
    source.with(|state| state.on_read = Some(Box::new(cut)));
    let lease = space.rounds().with_backing().next().unwrap();
    assert_eq!(of(&lease), [101]);
}

/// A consumer is told what others took, with the backing.
#[test]
fn each_consumer_has_the_backing_of_its_leases() {
    let (space, source) = space();
    space.map(pages(0, 8), 100 * PAGE, RW).unwrap();
    let migration = space.consumer("migration", Start::Clean).unwrap();
    source.dirty(5);
    space.rounds().next().unwrap().commit();
    let lease = migration.rounds().with_backing().next().unwrap();
    assert_eq!(of(&lease), [105]);
    lease.abort();
    assert_eq!(unmapped(&space, pages(0, 8)), [105]);
}

/// Random programs in one thread, against a log of all writes: (address, guest page) of each. Each
/// write is told by the next lease, or by the unmap of its area, with the guest page that it went
/// to, and no other page is.
#[test]
fn random_programs_tell_each_write_with_its_guest_page() {
    for seed in 0..400u64 {
        let (space, source) = space();
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut below = move |bound: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % bound
        };
        // First guest page of each area of four pages.
        let mut mapped: BTreeMap<u64, u64> = BTreeMap::new();
        // Several areas may have the same memory.
        let mut log: BTreeSet<(u64, u64)> = BTreeSet::new();
        for step in 0..80 {
            let area = below(6) * 4;
            match (below(5), mapped.get(&area).copied()) {
                (0, None) => {
                    let guest = below(16) * 4;
                    space.map(pages(area, 4), guest * PAGE, RW).unwrap();
                    mapped.insert(area, guest);
                }
                (0, Some(_)) => {
                    let told: BTreeSet<u64> =
                        unmapped(&space, pages(area, 4)).into_iter().collect();
                    mapped.remove(&area);
                    let is_there = |(page, _): &(u64, u64)| page / 4 == area / 4;
                    let gone = log.iter().filter(|write| is_there(write));
                    assert_eq!(told, gone.map(|(_, guest)| *guest).collect(), "seed {seed}");
                    log.retain(|write| !is_there(write));
                }
                (1, _) if !mapped.is_empty() => {
                    let lease = space.rounds().with_backing().next().unwrap();
                    let told: BTreeSet<u64> = of(&lease).into_iter().collect();
                    let log_pages: BTreeSet<u64> = log.iter().map(|(_, guest)| *guest).collect();
                    assert_eq!(told, log_pages, "seed {seed}, step {step}");
                    if below(3) == 0 {
                        lease.abort();
                    } else {
                        lease.commit();
                        log.clear();
                    }
                }
                (_, Some(guest)) => {
                    let page = below(4);
                    match below(2) {
                        0 => source.dirty(area + page),
                        _ => space.mark(pages(area + page, 1)).unwrap(),
                    }
                    log.insert((area + page, guest + page));
                }
                _ => {}
            }
        }
        for area in mapped.keys() {
            let told = unmapped(&space, pages(*area, 4));
            log.retain(|(page, guest)| page / 4 != area / 4 || !told.contains(guest));
        }
        assert!(log.is_empty(), "seed {seed}: {log:?} were not told");
    }
}

/// The backing of each part of a lease is a range to mark, up to the last address.
#[test]
fn a_part_has_its_backing_as_a_range() {
    let range = pages(3, 2);
    let part = |backing| Mapping {
        range,
        backing,
        access: RW,
    };
    assert_eq!(part(7 * PAGE).backing_range().unwrap(), pages(7, 2));
    let top = u64::MAX - 2 * PAGE + 1;
    let last = part(top).backing_range().unwrap();
    assert_eq!((last.start().get(), last.last().get()), (top, u64::MAX));
    let refused = part(top + 1).backing_range();
    assert!(matches!(refused, Err(Error::BackingWraps { backing, .. }) if backing == top + 1));
}
