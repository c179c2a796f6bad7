//! One suite for every format: the table against a model that knows pages only, and the borders of map, unmap and
//! harvest. What differs between formats is asked of the format (`LEAF_LEVELS`, `WIDTH`, `grants`), never listed by
//! name.

use std::collections::BTreeMap;

use super::*;
use dirtymap::{FlushGather, Granule, UserBitmap};

/// Stamps the tests of this file on a format.
macro_rules! suite {
    ($($name:ident: $format:ty),* $(,)?) => {$(
        mod $name {
            suite!(@tests $format:
                entries_are_decoded_as_they_were_encoded,
                leaves_are_as_large_as_both_addresses_and_the_limit_allow,
                bad_requests_are_refused_and_change_nothing,
                both_ends_of_what_is_translated_are_mapped,
                unmap_reports_leaves_and_refuses_parts_of_them,
                a_large_leaf_takes_the_place_of_an_empty_table_only,
                only_writable_leaves_become_dirty,
                every_leaf_size_is_written_cleaned_and_written_again,
                part_of_a_dirty_leaf_is_recorded_and_the_leaf_stays_dirty,
                one_dirty_leaf_of_every_place_in_a_group_is_found,
                a_harvest_beyond_the_width_sees_what_is_there,
                cleaning_what_was_unmapped_meanwhile_maps_nothing,
                agrees_with_a_map_of_pages,
                threads_map_walk_and_harvest_at_once,
                writers_and_a_harvester_lose_nothing,
            );
        }
    )*};
    (@tests $format:ty: $($test:ident),* $(,)?) => {$(
        #[test]
        fn $test() {
            super::$test::<$format>();
        }
    )*};
}

suite! {
    amdv1: crate::fmt::AmdV1,
    vtdss_3: crate::fmt::VtdSs<3>,
    vtdss_4: crate::fmt::VtdSs<4>,
    vtdss_5: crate::fmt::VtdSs<5>,
    x86_64_4: crate::fmt::X86_64<4>,
    x86_64_5: crate::fmt::X86_64<5>,
    arm_s1: crate::fmt::ArmS1,
    riscv_sv39: crate::fmt::RiscvSv39,
    riscv_sv48: crate::fmt::RiscvSv48,
    riscv_sv57: crate::fmt::RiscvSv57,
}

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

fn iova(at: u64) -> Iova {
    Iova::new(at)
}

/// The dirty 4 KiB pages of `range`, by a harvest or a peek, and the gather.
fn dirty<F: Format>(table: &Table<F>, range: IovaRange, clear: bool) -> (Vec<u64>, FlushGather) {
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

fn leaves_are_as_large_as_both_addresses_and_the_limit_allow<F: Format>() {
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
        let table = Table::<F>::new();
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

fn bad_requests_are_refused_and_change_nothing<F: Format>() {
    let table = Table::<F>::new();
    let map = |range, phys| table.map(range, phys, Access::ReadWrite, Granule::G1);
    // The first address past what is translated from 0 on, and the page before it.
    let end = 1 << (F::WIDTH - u32::from(F::SIGN_EXTENDED));
    for wide in [
        range(0, end + K4),
        range(end, K4),
        range(end - K4, 2 * K4),
        IovaRange::ALL,
    ] {
        // The physical address is bad as well: the width is checked first.
        assert!(
            matches!(map(wide, 1), Err(Error::TooWide { width, .. }) if width == F::WIDTH),
            "{wide}"
        );
    }
    assert_eq!(table.translate(iova(end)), None);
    assert!(table.set_dirty(iova(end)).is_none() && !table.reaches(iova(end)));
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
    let behind = 1 << F::OUTPUT_LG2;
    for phys in [behind - 4096, behind, u64::MAX - 4095] {
        assert!(matches!(
            map(range(0, 8192), phys),
            Err(Error::PhysTooWide { width, .. }) if width == F::OUTPUT_LG2
        ));
    }
    map(range(end - 4096, 4096), behind - 4096).unwrap();
    let last = table.translate(iova(end - 1)).unwrap();
    assert_eq!(
        (last.phys, last.range),
        (behind - 4096, range(end - K4, K4))
    );

    map(range(0x10_0000, 0x4000), 0).unwrap();
    let inside = |at| table.translate(iova(at)).is_some();
    let leaf = range(0x10_0000, K4);
    for over in [
        range(0xf_f000, 0x2000),
        range(0, 1 << 37),
        range(0x10_0000, 0x1000),
    ] {
        assert!(matches!(map(over, 0), Err(Error::AlreadyMapped { leaf: l, .. }) if l == leaf));
        assert!(!inside(0xf_f000) && !inside(0) && !inside(0x10_4000) && inside(0x10_3fff));
    }
}

/// The lowest address of the upper half, where there is one.
fn upper<F: Format>() -> Option<u64> {
    F::SIGN_EXTENDED.then(|| u64::MAX << (F::WIDTH - 1))
}

fn both_ends_of_what_is_translated_are_mapped<F: Format>() {
    let table = Table::<F>::new();
    let map = |range| table.map(range, 0, Access::ReadWrite, Granule::G1);
    let top = IovaRange::granule_at(Iova::MAX, Granule::K4);
    let Some(upper) = upper::<F>() else {
        assert!(matches!(map(top), Err(Error::TooWide { .. })));
        assert!(table.set_dirty(Iova::MAX).is_none());
        return;
    };
    let below = range(upper - K4, 2 * K4);
    assert!(matches!(map(below), Err(Error::TooWide { .. })));
    let ends = [range(0, K4), range(upper, K4), top];
    for (nth, end) in ends.into_iter().enumerate() {
        map(end).unwrap();
        assert!(matches!(map(end), Err(Error::AlreadyMapped { leaf, .. }) if leaf == end));
        let found = table.set_dirty(end.last()).unwrap();
        assert_eq!((found.range, found.dirty), (end, false));
        assert_eq!(table.translate(Iova::MIN).unwrap().dirty, nth == 0);
        let (pages, gather) = dirty(&table, end, true);
        assert_eq!(
            (pages, gather.ranges()),
            (vec![end.start().get()], &[end][..])
        );
    }
    for end in ends {
        table.set_dirty(end.start()).unwrap();
    }
    table.clean();
    for end in ends {
        assert!(!table.translate(end.start()).unwrap().dirty);
        table
            .unmap(end, |r, _, d| assert_eq!((r, d), (end, false)))
            .unwrap();
        assert_eq!(table.translate(end.start()), None);
    }
}

fn entries_are_decoded_as_they_were_encoded<F: Format>() {
    assert!(!F::is_present(Iopte::ABSENT));
    let bits = match F::MAKE_CLEAN {
        crate::fmt::MakeClean::Clear(bits) | crate::fmt::MakeClean::Set(bits) => bits,
    };
    for level in 0..F::LEVELS {
        assert_eq!(F::worth_a_look(Iopte::ABSENT, level), 0);
        assert_eq!(
            F::worth_a_look(Iopte(bits), level) != 0,
            F::is_dirty(Iopte(bits))
        );
        assert_eq!(u32::from(F::size(level).lg2()), 12 + 9 * level);
        assert_eq!(F::index(0x1ff << (12 + 9 * level), level), 511);
    }
    for level in 0..F::LEAF_LEVELS {
        let high = (1u64 << (F::OUTPUT_LG2 - 1)) | F::size(level).bytes();
        for access in [Access::Read, Access::Write, Access::ReadWrite] {
            if !F::grants(access) {
                assert_eq!(access, Access::Write);
                continue;
            }
            for phys in [0, high] {
                let clean = F::leaf(phys, access, level);
                assert!(!F::is_dirty(clean) && F::worth_a_look(clean, level) == 0);
                for leaf in [clean, F::written(clean)] {
                    assert!(F::is_present(leaf) && is_leaf::<F>(leaf, level));
                    assert_eq!((F::output(leaf), F::access(leaf)), (phys, access));
                }
                if access.writes() {
                    let written = F::written(clean);
                    assert!(F::is_dirty(written) && F::worth_a_look(written, level) != 0);
                    let entry = AtomicIopte::absent();
                    // Relaxed, all: one thread.
                    entry
                        .replace(Iopte::ABSENT, written, Ordering::Relaxed, Ordering::Relaxed)
                        .unwrap();
                    entry.make_clean(F::MAKE_CLEAN, Ordering::Relaxed);
                    let cleaned = entry.load(Ordering::Relaxed);
                    assert!(!F::is_dirty(cleaned) && F::worth_a_look(cleaned, level) == 0);
                    assert_eq!((F::output(cleaned), F::access(cleaned)), (phys, access));
                    assert_eq!(F::written(cleaned), written);
                    entry.make_clean(F::MAKE_CLEAN, Ordering::Relaxed);
                    assert_eq!(entry.load(Ordering::Relaxed), cleaned);
                }
            }
        }
    }
    for level in 1..F::LEVELS {
        for address in [0x1000, 0x5555_0000_1000, 0x7fff_ffff_f000] {
            let table = F::table(address, level);
            assert!(F::is_present(table) && !F::is_leaf(table, level));
            assert!(F::worth_a_look(table, level) != 0);
            assert_eq!(F::table_address(table), address);
            // A late clean hits a table.
            let entry = AtomicIopte::absent();
            entry
                .replace(Iopte::ABSENT, table, Ordering::Relaxed, Ordering::Relaxed)
                .unwrap();
            entry.make_clean(F::MAKE_CLEAN, Ordering::Relaxed);
            let hit = entry.load(Ordering::Relaxed);
            assert!(F::is_present(hit) && !F::is_leaf(hit, level));
            assert!(F::worth_a_look(hit, level) != 0);
            assert_eq!(F::table_address(hit), address);
        }
    }
    let entry = AtomicIopte::absent();
    entry.make_clean(F::MAKE_CLEAN, Ordering::Relaxed);
    assert!(!F::is_present(entry.load(Ordering::Relaxed)));
}

fn every_leaf_size_is_written_cleaned_and_written_again<F: Format>() {
    let every: Vec<_> = (0..F::LEAF_LEVELS).map(F::size).collect();
    for (level, size) in every.iter().enumerate() {
        let bytes = size.bytes();
        let table = Table::<F>::new();
        // The second leaf of its size, where the lower half has one.
        let end = 1u64 << (F::WIDTH - u32::from(F::SIGN_EXTENDED));
        let leaf = range(if 2 * bytes <= end { bytes } else { 0 }, bytes);
        table.map(leaf, 0, Access::ReadWrite, *size).unwrap();
        let found = table.translate(leaf.last()).unwrap();
        assert_eq!((found.range, found.dirty), (leaf, false), "level {level}");
        // The whole leaf as one bit, or as many as fit a few words.
        let mut words = [0u64; 8];
        let grain = F::size(level as u32 - u32::from(level > 0));
        let bits = bytes >> grain.lg2();
        for at in [0, K4 - 1, bytes / 2, bytes - 1] {
            for round in 0..2 {
                let before = table.set_dirty(iova(leaf.start().get() + at)).unwrap();
                assert_eq!((before.range, before.dirty), (leaf, false), "round {round}");
                assert!(table.set_dirty(leaf.start()).unwrap().dirty);
                words.fill(0);
                let mut gather = FlushGather::new();
                let view = UserBitmap::new(&mut words).view(leaf, grain).unwrap();
                table.peek(leaf, &mut view.sink()).unwrap();
                assert!(
                    table.translate(leaf.last()).unwrap().dirty,
                    "peek clears nothing"
                );
                table
                    .read_and_clear(leaf, &mut view.sink(), &mut gather)
                    .unwrap();
                assert_eq!((view.count(), gather.ranges()), (bits, &[leaf][..]));
                assert!(!table.translate(leaf.last()).unwrap().dirty);
            }
        }
        table.set_dirty(leaf.start()).unwrap();
        let mut gone = vec![];
        table
            .unmap(leaf, |r, size, d| gone.push((r, size, d)))
            .unwrap();
        assert_eq!(gone, [(leaf, *size, true)]);
    }
}

/// A harvest that saw a dirty leaf makes it clean after it was unmapped, and even mapped anew.
fn cleaning_what_was_unmapped_meanwhile_maps_nothing<F: Format>() {
    for limit in [Granule::K4, Granule::M2] {
        let table = Table::<F>::new();
        let map = |limit| table.map(range(0, M2), 0, Access::ReadWrite, limit);
        let guard = crossbeam_epoch::pin();
        map(Granule::M2).unwrap();
        table.set_dirty(iova(0)).unwrap();
        let (slot, _, _) = table.walk(iova(0), &guard).unwrap();
        table.unmap(range(0, M2), |_, _, d| assert!(d)).unwrap();
        // Relaxed: one thread.
        slot.make_clean(F::MAKE_CLEAN, Ordering::Relaxed);
        assert_eq!(table.translate(iova(0)), None);
        assert!(table.set_dirty(iova(0)).is_none());
        assert_eq!(dirty(&table, range(0, M2), true).0, []);
        table
            .unmap(range(0, M2), |_, _, _| panic!("nothing is there"))
            .unwrap();

        map(limit).unwrap();
        slot.make_clean(F::MAKE_CLEAN, Ordering::Relaxed);
        let leaf = table.translate(iova(M2 - 1)).unwrap();
        assert_eq!(
            (leaf.range.len(), leaf.dirty),
            (u128::from(limit.bytes()), false)
        );
        table.set_dirty(iova(M2 - 1)).unwrap();
        let first = M2 - limit.bytes();
        assert_eq!(
            dirty(&table, range(0, M2), true).0,
            pages(first, limit.bytes())
        );
    }
}

/// Writers keep setting D while a harvester takes it: a page that was written is dirty, or was taken since the write
/// before it.
fn writers_and_a_harvester_lose_nothing<F: Format>() {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    const WRITES: u64 = 4000;
    let table = Table::<F>::new();
    // 1024 pages of 4 KiB and two leaves of 2 MiB behind them.
    table
        .map(range(0, 2 * M2), 0, Access::ReadWrite, Granule::K4)
        .unwrap();
    table
        .map(range(2 * M2, 2 * M2), 0, Access::ReadWrite, Granule::M2)
        .unwrap();
    let leaf_of = |at: u64| {
        if at < 2 * M2 {
            at / K4
        } else {
            1024 + (at - 2 * M2) / M2
        }
    };
    let set: Vec<AtomicU64> = (0..1026).map(|_| AtomicU64::new(0)).collect();
    let mut taken = vec![0u64; 1026];
    let running = AtomicBool::new(true);
    let mut take = || {
        for page in dirty(&table, range(0, 4 * M2), true).0 {
            if page < 2 * M2 || page % M2 == 0 {
                taken[leaf_of(page) as usize] += 1;
            }
        }
    };
    std::thread::scope(|s| {
        let writers: Vec<_> = (1..3u64)
            .map(|seed| {
                let (table, set) = (&table, &set);
                s.spawn(move || {
                    let mut random = Random(seed);
                    for _ in 0..WRITES {
                        let at = random.below(4 * M2);
                        if !table.set_dirty(iova(at)).unwrap().dirty {
                            // Relaxed: read after the join.
                            set[leaf_of(at) as usize].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        s.spawn(|| {
            writers
                .into_iter()
                .for_each(|writer| writer.join().unwrap());
            // Release: pairs with the Acquire below.
            running.store(false, Ordering::Release);
        });
        // Acquire: pairs with the Release above; the last harvest sees every write.
        while running.load(Ordering::Acquire) {
            take();
        }
    });
    take();
    // Each time D went from 0 to 1 it was taken exactly once.
    for (leaf, (set, taken)) in set.iter().zip(&taken).enumerate() {
        assert_eq!(set.load(Ordering::Relaxed), *taken, "leaf {leaf}");
    }
}

fn unmap_reports_leaves_and_refuses_parts_of_them<F: Format>() {
    let table = Table::<F>::new();
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
        table.unmap(IovaRange::ALL, none),
        Err(Error::TooWide { .. })
    ));
    let mut gone = vec![];
    table
        .unmap(range(0, 1 << 38), |r, size, d| gone.push((r, size, d)))
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
    table.unmap(range(0, 1 << 38), none).unwrap();
    assert!(table.set_dirty(iova(M2)).is_none(), "no D for what is gone");
}

fn a_large_leaf_takes_the_place_of_an_empty_table_only<F: Format>() {
    let table = Table::<F>::new();
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

fn only_writable_leaves_become_dirty<F: Format>() {
    let table = Table::<F>::new();
    let mut expect = vec![];
    for (start, access) in [
        (0, Access::Read),
        (K4, Access::Write),
        (2 * K4, Access::ReadWrite),
    ] {
        let done = table.map(range(start, K4), 0, access, Granule::K4);
        if !F::grants(access) {
            assert!(matches!(done, Err(Error::NoSuchAccess { access: a, .. }) if a == access));
            assert_eq!(table.translate(iova(start)), None);
            continue;
        }
        done.unwrap();
        let found = table.set_dirty(iova(start + 9)).unwrap();
        assert_eq!((found.access, found.dirty), (access, false));
        assert_eq!(table.set_dirty(iova(start)).unwrap().dirty, access.writes());
        if access.writes() {
            expect.push(start);
        }
    }
    assert_eq!(dirty(&table, range(0, M2), true).0, expect);
}

fn part_of_a_dirty_leaf_is_recorded_and_the_leaf_stays_dirty<F: Format>() {
    let table = Table::<F>::new();
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
        assert!(gather.is_empty(), "nothing was cleared");
    }
    let (found, gather) = dirty(&table, range(0, M2 + K4), true);
    assert_eq!(found, pages(0, M2 + K4));
    assert_eq!(
        (gather.ranges(), gather.entries()),
        (&[range(0, M2)][..], 1)
    );
    assert!(!table.translate(iova(0)).unwrap().dirty);
    assert_eq!(dirty(&table, range(0, 2 * M2), true).0, pages(M2, M2));
    assert_eq!(dirty(&table, range(0, 2 * M2), true).0, []);
}

fn one_dirty_leaf_of_every_place_in_a_group_is_found<F: Format>() {
    let table = Table::<F>::new();
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

fn a_harvest_beyond_the_width_sees_what_is_there<F: Format>() {
    let table = Table::<F>::new();
    let mut ends = vec![range(
        (1 << (F::WIDTH - u32::from(F::SIGN_EXTENDED))) - K4,
        K4,
    )];
    ends.extend(upper::<F>().map(|at| range(at, K4)));
    for end in &ends {
        table.map(*end, 0, Access::ReadWrite, Granule::K4).unwrap();
        table.set_dirty(end.last()).unwrap();
    }
    let mut word = [0u64];
    let view = UserBitmap::new(&mut word)
        .view(IovaRange::ALL, Granule::from_lg2(58).unwrap())
        .unwrap();
    let mut gather = FlushGather::new();
    table
        .read_and_clear(IovaRange::ALL, &mut view.sink(), &mut gather)
        .unwrap();
    assert_eq!(
        (gather.ranges(), view.count()),
        (&ends[..], ends.len() as u64)
    );
    table
        .read_and_clear(range(1 << 60, 1 << 20), &mut view.sink(), &mut gather)
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

fn agrees_with_a_map_of_pages<F: Format>() {
    // Around the border of a 1 GiB leaf: 8 MiB on both sides, with 2 MiB leaves and 4 KiB leaves among them.
    let (low, high) = (G1 - 4 * M2, G1 + 4 * M2);
    let mut random = Random(0x5DEE_CE66_D1CE_4E5B);
    for _ in 0..6 {
        let table = Table::<F>::new();
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
                    assert!(gather.bytes() >= u128::from(owed) && gather.is_empty() == (owed == 0));
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

fn threads_map_walk_and_harvest_at_once<F: Format>() {
    let table = Table::<F>::new();
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
