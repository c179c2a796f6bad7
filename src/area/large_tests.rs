//! Large trees and large areas.

use std::collections::BTreeMap;
use std::convert::Infallible;

use super::{AreaTree, Entry};
use crate::sync::Arc;
use crate::units::{Granule, Iova, IovaRange};

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
}

/// The lowest free `len` bytes at a multiple of `len`, by looking at every hole.
fn first_fit(model: &BTreeMap<u64, u64>, len: u64) -> u64 {
    let mut floor = 0;
    for (&start, &last) in model {
        if floor + len <= start {
            break;
        }
        floor = floor.max((last + 1).next_multiple_of(len));
    }
    floor
}

/// `batches` of `size` inserts, each batch with some removes; then lookups, holes and first fits,
/// compared with the model.
fn agrees(batches: u64, size: u64) {
    const PAGE: u64 = 4096;
    let tree: AreaTree<u64> = AreaTree::new();
    let mut model = BTreeMap::new();
    let (mut start, mut random) = (0u64, 1u64);
    let mut below = |bound: u64| {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (random >> 33) % bound
    };
    for _ in 0..batches {
        let removed: Vec<u64> = (0..size / 16)
            .filter_map(|_| {
                model
                    .range(below(start + 1)..)
                    .next()
                    .map(|(&start, _)| start)
            })
            .collect();
        tree.update(|edit| {
            for at in &removed {
                edit.remove(Iova::new(*at));
                model.remove(at);
            }
            for _ in 0..size {
                start += below(16) * PAGE;
                let last = start + (1 + below(16)) * PAGE - 1;
                edit.insert(range(start, last), Arc::new(last))?;
                model.insert(start, last);
                start = last + 1;
            }
            Ok::<_, crate::error::Error>(())
        })
        .unwrap();
    }
    tree.internal_validate();
    let snapshot = tree.snapshot();
    assert_eq!(snapshot.len(), model.len());
    let all = snapshot.iter(IovaRange::ALL);
    assert!(all.map(|e| e.range.start().get()).eq(model.keys().copied()));
    for _ in 0..size {
        let at = below(start);
        let expected = model
            .range(..=at)
            .next_back()
            .filter(|(_, last)| at <= **last);
        let found = snapshot.lookup(Iova::new(at));
        assert_eq!(found.map(|e| *e.area), expected.map(|(_, last)| *last));
    }
    for pages in [1, 2, 4, 8, 16, 32] {
        let alignment = Granule::from_lg2((pages * PAGE).trailing_zeros() as u8).unwrap();
        let found = snapshot.first_fit(IovaRange::ALL, pages * PAGE, alignment);
        let expected = first_fit(&model, pages * PAGE);
        assert_eq!(found.map(|found| found.start().get()), Some(expected));
    }
}

#[test]
fn many_areas_agree_with_a_btree_map() {
    agrees(40, 1_000);
}

#[test]
fn one_million_areas_agree_with_a_btree_map() {
    // Unoptimised builds run a fifth of it.
    let batches = if cfg!(debug_assertions) { 20 } else { 107 };
    agrees(batches, 10_000);
}

/// A walk to its end goes leaf by leaf, and looks up ahead for the next node above the leaves. The
/// same areas come as in a walk that asks for each, wherever it begins and ends, in trees of each
/// height, and after removes that leave nodes of any length.
#[test]
fn a_walk_by_leaves_visits_what_a_walk_by_areas_does() {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut below = |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    let (largest, rounds) = if cfg!(miri) { (60, 5) } else { (2000, 300) };
    let sizes = [0u64, 1, 4, 5, 17, 60, 300, 2000].into_iter();
    for size in sizes.filter(|size| *size <= largest) {
        let tree: AreaTree<u64, 4> = AreaTree::new();
        // Areas of 5 addresses and holes of 5; the last one ends at the last address of all.
        let start = |nth: u64| u64::MAX - 4 - 10 * (size - 1 - nth);
        for nth in 0..size {
            let area = range(start(nth), start(nth) + 4);
            tree.insert(area, Arc::new(nth)).unwrap();
        }
        for round in 0..rounds {
            if round % 3 == 2 && size > 20 {
                let gone = Iova::new(start(below(size)));
                let _: Result<(), Infallible> = tree.update(|edit| {
                    edit.remove(gone);
                    Ok(())
                });
            }
            let snapshot = tree.snapshot();
            let lowest = u64::MAX - 10 * size - 20;
            let (a, b) = (below(10 * size + 21), below(10 * size + 21));
            let asked = match round {
                0 => IovaRange::ALL,
                _ => range(lowest + a.min(b), lowest + a.max(b)),
            };
            let mut one_by_one = Vec::new();
            for entry in snapshot.iter(asked) {
                one_by_one.push((entry.range, *entry.area));
            }
            let mut by_leaves = Vec::new();
            let mut walk = snapshot.iter(asked);
            for entry in walk.by_ref().take(below(size + 2) as usize) {
                by_leaves.push((entry.range, *entry.area));
            }
            walk.for_each(|entry| by_leaves.push((entry.range, *entry.area)));
            assert_eq!(by_leaves, one_by_one, "{size} areas in {asked}");
            let expected = (0..size).filter(|nth| {
                let found = snapshot.lookup(Iova::new(start(*nth)));
                found.is_some_and(|entry| entry.range.intersects(asked))
            });
            assert!(expected.eq(one_by_one.iter().map(|(_, nth)| *nth)));
        }
    }
}

#[test]
fn areas_of_one_byte_and_of_half_the_address_space() {
    const HALF: u64 = 1 << 63;
    let tree: AreaTree<u64, 4> = AreaTree::new();
    let fit = |within, len, lg2| {
        let alignment = Granule::from_lg2(lg2).unwrap();
        let found = tree.snapshot().first_fit(within, len, alignment);
        found.map(|found| (found.start().get(), found.last().get()))
    };
    tree.insert(range(HALF, u64::MAX), Arc::new(1)).unwrap();
    assert_eq!(fit(IovaRange::ALL, HALF, 63), Some((0, HALF - 1)));
    assert_eq!(fit(range(1, u64::MAX), HALF, 0), None);
    // A page that ends where the large one begins, and one byte before it.
    tree.insert(range(HALF - 4096, HALF - 1), Arc::new(2))
        .unwrap();
    tree.insert(range(HALF - 4097, HALF - 4097), Arc::new(3))
        .unwrap();
    for (at, area) in [
        (HALF, 1),
        (u64::MAX, 1),
        (HALF - 1, 2),
        (HALF - 4096, 2),
        (HALF - 4097, 3),
    ] {
        assert_eq!(
            tree.snapshot().lookup(Iova::new(at)).map(|e| *e.area),
            Some(area)
        );
    }
    assert!(tree.snapshot().lookup(Iova::new(HALF - 4098)).is_none());
    assert!(tree.insert(range(0, HALF - 4097), Arc::new(4)).is_err());
    tree.insert(range(0, HALF - 4098), Arc::new(4)).unwrap();
    assert_eq!(fit(IovaRange::ALL, 1, 0), None);
    // The upper half goes, and is filled again from the top of the address space down.
    let removed = tree.update(|edit| Ok::<_, ()>(edit.remove(Iova::new(HALF)).map(Entry::to_arc)));
    assert!(removed.unwrap().is_some());
    assert_eq!(fit(IovaRange::ALL, HALF, 63), Some((HALF, u64::MAX)));
    for page in 0..64 {
        let last = u64::MAX - page * 4096;
        tree.insert(range(last - 4095, last), Arc::new(page))
            .unwrap();
        let rest = HALF - (page + 1) * 4096;
        assert_eq!(fit(IovaRange::ALL, rest, 12), Some((HALF, last - 4096)));
        assert_eq!(fit(IovaRange::ALL, rest + 1, 0), None);
        assert_eq!(
            fit(range(last - 4096, u64::MAX), 1, 0),
            Some((last - 4096, last - 4096))
        );
        assert_eq!(fit(range(last - 4095, u64::MAX), 1, 0), None);
    }
    tree.internal_validate();
}
