//! The table against a model that knows pages only, and the borders of map, unmap and harvest.

use std::collections::BTreeMap;

use super::*;
use crate::fmt::AmdV1;
use dirtymap::{FlushGather, Granule, UserBitmap};

type Amd = Table<AmdV1>;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

fn iova(at: u64) -> Iova {
    Iova::new(at)
}

/// The dirty 4 KiB pages of `range`, by a harvest or a peek, and the gather.
fn dirty(table: &Amd, range: IovaRange, clear: bool) -> (Vec<u64>, FlushGather) {
    let mut words = vec![0u64; (range.granules(Granule::K4) as usize).div_ceil(64)];
    let view = UserBitmap::new(&mut words)
        .view(range, Granule::K4)
        .unwrap();
    let mut gather = FlushGather::new();
    if clear {
        table
            .read_and_clear(range, &mut view.sink(), &mut gather)
            .unwrap();
    } else {
        table.peek(range, &mut view.sink()).unwrap();
    }
    let pages = view
        .runs()
        .flat_map(|run| (run.start().get()..=run.last().get()).step_by(4096))
        .collect();
    (pages, gather)
}

fn pages(start: u64, len: u64) -> Vec<u64> {
    (start..start + len).step_by(4096).collect()
}

const K4: u64 = 1 << 12;
const M2: u64 = 1 << 21;
const G1: u64 = 1 << 30;

#[test]
fn leaves_are_as_large_as_both_addresses_and_the_limit_allow() {
    for (start, phys, len, limit, expect) in [
        (0, 0, G1, Granule::G1, vec![(0, G1)]),
        (0, 0, M2, Granule::G1, vec![(0, M2)]),
        (0, 0, 2 * K4, Granule::G1, vec![(0, K4), (K4, K4)]),
        (G1, M2, G1, Granule::G1, vec![(G1, M2), (2 * G1 - 1, M2)]),
        (M2, K4, M2, Granule::G1, vec![(M2, K4), (2 * M2 - 1, K4)]),
        (0, 0, G1, Granule::M2, vec![(0, M2), (G1 - 1, M2)]),
        (0, 0, M2, Granule::K4, vec![(0, K4), (M2 - 1, K4)]),
        (
            0,
            0,
            M2,
            Granule::from_bytes(1).unwrap(),
            vec![(5 * K4, K4)],
        ),
        (
            G1 - M2,
            G1 - M2,
            G1 + 2 * M2,
            Granule::G1,
            vec![(G1 - M2, M2), (G1, G1), (2 * G1, M2)],
        ),
        (
            M2 - K4,
            M2 - K4,
            M2 + 2 * K4,
            Granule::G1,
            vec![(M2 - K4, K4), (M2, M2), (2 * M2, K4)],
        ),
    ] {
        let table = Amd::new();
        table
            .map(range(start, len), phys, Access::ReadWrite, limit)
            .unwrap();
        for (at, size) in expect {
            let leaf = table.translate(iova(at)).unwrap();
            assert_eq!(
                leaf.range.len(),
                u128::from(size),
                "{start:#x} to {phys:#x}"
            );
            assert_eq!(leaf.phys - phys, leaf.range.start().get() - start);
            assert!(!leaf.dirty);
        }
        for outside in [start.wrapping_sub(1), start + len] {
            assert_eq!(table.translate(iova(outside)), None);
        }
    }
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let table = Amd::new();
    let map = |range, phys| table.map(range, phys, Access::ReadWrite, Granule::G1);
    assert!(matches!(
        map(range(0, 1 << 49), 0),
        Err(Error::TooWide { width: 48, .. })
    ));
    assert!(matches!(map(IovaRange::ALL, 1), Err(Error::TooWide { .. })));
    assert!(matches!(
        map(range(0, 4095), 0),
        Err(Error::Unaligned { .. })
    ));
    assert!(matches!(
        map(range(512, 4096), 0),
        Err(Error::Unaligned { .. })
    ));
    assert!(matches!(
        map(range(0, 4096), 8),
        Err(Error::UnalignedPhys { phys: 8, .. })
    ));
    for phys in [(1 << 52) - 4096, 1 << 52, u64::MAX - 4095] {
        assert!(matches!(
            map(range(0, 8192), phys),
            Err(Error::PhysTooWide { width: 52, .. })
        ));
    }
    map(range((1 << 48) - 4096, 4096), (1 << 52) - 4096).unwrap();
    assert!(table.translate(iova((1 << 48) - 1)).is_some());
    assert_eq!(table.translate(iova(u64::MAX)), None);
    assert!(table.set_dirty(iova(u64::MAX)).is_none());

    map(range(0x10_0000, 0x4000), 0).unwrap();
    let inside = |at| table.translate(iova(at)).is_some();
    let leaf = range(0x10_0000, K4);
    for over in [
        range(0xf_f000, 0x2000),
        range(0, 1 << 47),
        range(0x10_0000, 0x1000),
    ] {
        assert!(matches!(map(over, 0), Err(Error::AlreadyMapped { leaf: l, .. }) if l == leaf));
        assert!(!inside(0xf_f000) && !inside(0) && !inside(0x10_4000) && inside(0x10_3fff));
    }
}

#[test]
fn unmap_reports_leaves_and_refuses_parts_of_them() {
    let table = Amd::new();
    table
        .map(range(0, 2 * M2), 0, Access::ReadWrite, Granule::M2)
        .unwrap();
    table
        .map(range(2 * M2, 2 * K4), 0, Access::ReadWrite, Granule::M2)
        .unwrap();
    table.set_dirty(iova(M2 + 5)).unwrap();
    let none = |_: IovaRange, _: Granule, _: bool| panic!("nothing goes");
    for (part, leaf) in [
        (range(M2, K4), M2),
        (range(0, M2 + K4), M2),
        (range(K4, 4 * M2), 0),
    ] {
        assert!(
            matches!(table.unmap(part, none), Err(Error::PartOfLeaf { leaf: l, .. }) if l == range(leaf, M2))
        );
    }
    assert!(matches!(
        table.unmap(range(0, 5), none),
        Err(Error::Unaligned { .. })
    ));
    assert!(matches!(
        table.unmap(range(0, 1 << 50), none),
        Err(Error::TooWide { .. })
    ));
    let mut gone = vec![];
    table
        .unmap(range(0, 1 << 40), |r, size, d| gone.push((r, size, d)))
        .unwrap();
    assert_eq!(
        gone,
        [
            (range(0, M2), Granule::M2, false),
            (range(M2, M2), Granule::M2, true),
            (range(2 * M2, K4), Granule::K4, false),
            (range(2 * M2 + K4, K4), Granule::K4, false),
        ]
    );
    table.unmap(range(0, 1 << 48), none).unwrap();
    assert!(table.set_dirty(iova(M2)).is_none(), "no D for what is gone");
}

#[test]
fn a_large_leaf_takes_the_place_of_an_empty_table_only() {
    let table = Amd::new();
    let map = |start, len| table.map(range(start, len), start, Access::ReadWrite, Granule::G1);
    let unmap = |start, len| table.unmap(range(start, len), |_, _, _| ());
    map(G1 + M2 + K4, K4).unwrap();
    map(G1 + 2 * M2, M2).unwrap();
    for (start, len) in [(G1, G1), (G1 + M2, M2)] {
        assert!(matches!(map(start, len), Err(Error::AlreadyMapped { .. })));
    }
    unmap(G1, G1).unwrap();
    map(G1, G1).unwrap();
    assert_eq!(table.translate(iova(G1 + M2)).unwrap().range, range(G1, G1));
    unmap(G1, G1).unwrap();
    map(G1 + M2 + K4, K4).unwrap();
    assert_eq!(
        table.translate(iova(G1 + M2 + K4)).unwrap().range,
        range(G1 + M2 + K4, K4)
    );
}

#[test]
fn only_writable_leaves_become_dirty() {
    let table = Amd::new();
    for (start, access) in [
        (0, Access::Read),
        (K4, Access::Write),
        (2 * K4, Access::ReadWrite),
    ] {
        table.map(range(start, K4), 0, access, Granule::K4).unwrap();
        let found = table.set_dirty(iova(start + 9)).unwrap();
        assert_eq!((found.access, found.dirty), (access, false));
        assert_eq!(table.set_dirty(iova(start)).unwrap().dirty, access.writes());
    }
    assert_eq!(dirty(&table, range(0, M2), true).0, [K4, 2 * K4]);
}

#[test]
fn part_of_a_dirty_leaf_is_recorded_and_the_leaf_stays_dirty() {
    let table = Amd::new();
    table
        .map(range(0, 2 * M2), 0, Access::ReadWrite, Granule::M2)
        .unwrap();
    table.set_dirty(iova(17)).unwrap();
    table.set_dirty(iova(M2 + 17)).unwrap();
    // The second half of the first leaf, the first page of the second one.
    let part = range(M2 / 2, M2 / 2 + K4);
    for clear in [true, false, true] {
        let (found, gather) = dirty(&table, part, clear);
        assert_eq!(found, pages(M2 / 2, M2 / 2 + K4));
        let drained: &[IovaRange] = if clear { &[part] } else { &[] };
        assert_eq!(gather.ranges(), drained, "what is copied is drained");
    }
    let (found, gather) = dirty(&table, range(0, M2 + K4), true);
    assert_eq!(found, pages(0, M2 + K4));
    assert_eq!(
        (gather.ranges(), gather.entries()),
        (&[range(0, M2 + K4)][..], 2)
    );
    assert!(!table.translate(iova(0)).unwrap().dirty);
    assert_eq!(dirty(&table, range(0, 2 * M2), true).0, pages(M2, M2));
    assert_eq!(dirty(&table, range(0, 2 * M2), true).0, []);
}

#[test]
fn one_dirty_leaf_of_every_place_in_a_group_is_found() {
    let table = Amd::new();
    table
        .map(range(0, 4 * M2), 0, Access::ReadWrite, Granule::K4)
        .unwrap();
    for first in [0, 1, 7, 8, 13] {
        for last in [1000, 1023, 1024, 1031, 2047] {
            let request = range(first * K4, (last - first + 1) * K4);
            for page in [
                0,
                first,
                first + 3,
                511,
                512,
                last - 1,
                last,
                (last + 1) % 2048,
            ] {
                table.set_dirty(iova(page * K4)).unwrap();
                let expect = if (first..=last).contains(&page) {
                    vec![page * K4]
                } else {
                    vec![]
                };
                assert_eq!(dirty(&table, request, true).0, expect);
                table.clean();
            }
        }
    }
}

#[test]
fn a_harvest_beyond_the_width_sees_what_is_there() {
    let table = Amd::new();
    let top = range((1 << 48) - K4, K4);
    table.map(top, 0, Access::ReadWrite, Granule::K4).unwrap();
    table.set_dirty(top.last()).unwrap();
    let mut word = [0u64];
    let view = UserBitmap::new(&mut word)
        .view(IovaRange::ALL, Granule::from_lg2(58).unwrap())
        .unwrap();
    let mut gather = FlushGather::new();
    table
        .read_and_clear(IovaRange::ALL, &mut view.sink(), &mut gather)
        .unwrap();
    assert_eq!((gather.ranges(), view.count()), (&[top][..], 1));
    table
        .read_and_clear(range(1 << 50, 1 << 20), &mut view.sink(), &mut gather)
        .unwrap();
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// What the model knows of a 4 KiB page.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Page {
    phys: u64,
    writable: bool,
    dirty: bool,
    /// The first page and the size of the leaf that maps it.
    leaf: (u64, u64),
}

/// The leaf that must map `at`, inside the mapping of `start..end`.
fn leaf_for(at: u64, start: u64, end: u64, phys: u64, limit: u64) -> (u64, u64) {
    for size in [G1, M2, K4] {
        let first = at & !(size - 1);
        let fits = first >= start && first + size <= end;
        let behind = phys.wrapping_add(first.wrapping_sub(start));
        if size <= limit && fits && behind.is_multiple_of(size) {
            return (first, size);
        }
    }
    unreachable!("4 KiB always fit");
}

#[test]
fn agrees_with_a_map_of_pages() {
    // Around the border of a 1 GiB leaf: 8 MiB on both sides, with 2 MiB leaves and 4 KiB leaves among them.
    let (low, high) = (G1 - 4 * M2, G1 + 4 * M2);
    let mut random = Random(0x5DEE_CE66_D1CE_4E5B);
    for _ in 0..6 {
        let table = Amd::new();
        let mut model: BTreeMap<u64, Page> = BTreeMap::new();
        for _ in 0..400 {
            let grain = [K4, K4, M2 / 4, M2][random.below(4) as usize];
            let start = low + random.below((high - low) / grain) * grain;
            let len = ((1 + random.below(6)) * grain).min(high - start);
            let (end, request) = (start + len, range(start, len));
            match random.below(6) {
                0 | 1 => {
                    let phys = [start, start + M2, start + 16 * K4][random.below(3) as usize];
                    let limit = [Granule::K4, Granule::M2, Granule::G1][random.below(3) as usize];
                    let writable = random.below(4) != 0;
                    let access = if writable {
                        Access::ReadWrite
                    } else {
                        Access::Read
                    };
                    let free = model.range(start..end).next().is_none();
                    assert_eq!(table.map(request, phys, access, limit).is_ok(), free);
                    if free {
                        for at in pages(start, len) {
                            let leaf = leaf_for(at, start, end, phys, limit.bytes());
                            let phys = phys + (at - start);
                            model.insert(
                                at,
                                Page {
                                    phys,
                                    writable,
                                    dirty: false,
                                    leaf,
                                },
                            );
                        }
                    }
                }
                2 => {
                    let cut = model
                        .range(start..end)
                        .any(|(_, p)| p.leaf.0 < start || p.leaf.0 + p.leaf.1 > end);
                    let mut gone = vec![];
                    let done = table.unmap(request, |r, size, d| {
                        gone.push((r.start().get(), size.bytes(), d))
                    });
                    assert_eq!(done.is_err(), cut);
                    if !cut {
                        let mut expect: Vec<_> = model
                            .range(start..end)
                            .map(|(_, p)| (p.leaf.0, p.leaf.1, p.dirty))
                            .collect();
                        expect.dedup();
                        assert_eq!(gone, expect);
                        model.retain(|at, _| !(start..end).contains(at));
                    }
                }
                3 | 4 => {
                    let at = start + random.below(len);
                    let known = model.get(&(at & !(K4 - 1))).copied();
                    let found = table.set_dirty(iova(at));
                    assert_eq!(
                        found.map(|l| (l.range, l.dirty)),
                        known.map(|p| (range(p.leaf.0, p.leaf.1), p.dirty))
                    );
                    if let Some(page) = known
                        && page.writable
                    {
                        model
                            .range_mut(page.leaf.0..page.leaf.0 + page.leaf.1)
                            .for_each(|(_, p)| p.dirty = true);
                    }
                }
                _ => {
                    let clear = random.below(3) != 0;
                    let (found, gather) = dirty(&table, request, clear);
                    let expect: Vec<_> = model
                        .range(start..end)
                        .filter(|(_, p)| p.dirty)
                        .map(|(at, _)| *at)
                        .collect();
                    assert_eq!(found, expect);
                    let mut owed = 0;
                    for page in model.values_mut().filter(|p| p.dirty && clear) {
                        if page.leaf.0 >= start && page.leaf.0 + page.leaf.1 <= end {
                            page.dirty = false;
                            owed += K4;
                            let first = iova(page.leaf.0);
                            assert!(gather.ranges().iter().any(|r| r.contains(first)));
                        }
                    }
                    assert!(gather.bytes() >= u128::from(owed));
                    assert_eq!(gather.is_empty(), !clear || found.is_empty());
                }
            }
        }
        for at in pages(low, high - low) {
            let leaf = table.translate(iova(at));
            let known = model.get(&at);
            assert_eq!(
                leaf.map(|l| l.phys + (at - l.range.start().get())),
                known.map(|p| p.phys)
            );
            assert_eq!(
                leaf.map(|l| (l.access.writes(), l.dirty)),
                known.map(|p| (p.writable, p.dirty))
            );
            assert_eq!(
                leaf.map(|l| l.range),
                known.map(|p| range(p.leaf.0, p.leaf.1))
            );
        }
    }
}

#[test]
fn threads_map_walk_and_harvest_at_once() {
    let table = Amd::new();
    std::thread::scope(|s| {
        for half in 0..2 {
            let table = &table;
            s.spawn(move || {
                // Both halves lie under one table of level 1; each turns from 4 KiB leaves to one 2 MiB leaf and back.
                let mine = range(half * M2, M2);
                for round in 0..200 {
                    let limit = if round % 2 == 0 {
                        Granule::K4
                    } else {
                        Granule::M2
                    };
                    table.map(mine, 0, Access::ReadWrite, limit).unwrap();
                    table.set_dirty(iova(half * M2 + round * K4)).unwrap();
                    let mut dirty = 0;
                    table.unmap(mine, |_, _, d| dirty += u64::from(d)).unwrap();
                    assert!(dirty <= 2, "ours, and that of the thread below");
                }
            });
        }
        s.spawn(|| {
            for _ in 0..400 {
                let (found, gather) = dirty(&table, range(0, 2 * M2), true);
                assert_eq!(found.is_empty(), gather.is_empty());
                table.set_dirty(iova(M2 - 1));
            }
        });
    });
    assert_eq!(dirty(&table, range(0, 2 * M2), true).0, []);
}
