//! One suite for every format: the table against a model that knows pages only, and the borders of map, unmap and
//! harvest. What differs between formats is asked of the format (`LEAF_LEVELS`, `WIDTH`, `grants`), never listed by
//! name.

mod dirty;
mod model;

use super::*;
use dirtymap::{FlushGather, Granule, LeafSink, UserBitmap};

use self::dirty::*;
use self::model::*;

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
            .read_and_clear(range, &mut LeafSink::new(&mut view.sink(), &mut gather))
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
