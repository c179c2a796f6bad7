//! One suite for every format: the table against a model that knows pages only, and the borders of
//! map, unmap and harvest. Differences between formats are asked of the format (`LEAF_LEVELS`,
//! `WIDTH`, `grants`), never listed by name.

mod dirty;
mod history;
mod model;
mod reshape;
mod slabs;

use crossbeam_epoch::Guard;
use dirtymap::flush::FlushGather;
use dirtymap::source::LeafSink;
use dirtymap::sync::Ordering;
use dirtymap::{Access, Granule, Iova, IovaRange, UserBitmap};

use super::page::Node;
use super::*;
use crate::error::Error;
use crate::fmt::{Format, Iopte, LeafSizes, granule};

use self::dirty::*;
use self::history::*;
use self::model::*;
use self::reshape::*;
use self::slabs::*;

/// Stamps the tests of this file on a format.
macro_rules! suite {
    ($($name:ident: $format:ty),* $(,)?) => {$(
        mod $name {
            suite!(@tests $format:
                entries_are_decoded_as_they_were_encoded,
                leaves_are_as_large_as_both_addresses_and_the_limit_allow,
                leaves_have_the_sizes_that_the_caller_names,
                bad_requests_are_refused_and_change_nothing,
                both_ends_of_what_is_translated_are_mapped,
                unmap_reports_leaves_and_refuses_parts_of_them,
                a_large_leaf_takes_the_place_of_an_empty_table_only,
                only_writable_leaves_become_dirty,
                every_leaf_size_is_written_cleaned_and_written_again,
                part_of_a_dirty_leaf_is_recorded_and_the_leaf_stays_dirty,
                a_look_at_a_part_of_a_leaf_records_that_part,
                one_dirty_leaf_of_every_place_in_a_group_is_found,
                a_harvest_beyond_the_width_sees_what_is_there,
                cleaning_what_was_unmapped_meanwhile_maps_nothing,
                a_harvest_of_one_table_looks_at_no_table_after_it,
                agrees_with_a_map_of_pages,
                threads_map_walk_and_harvest_at_once,
                writers_and_a_harvester_lose_nothing,
                no_leaf_maps_both_sides_of_a_split,
                a_split_and_a_merge_keep_what_is_dirty,
                only_what_belongs_together_is_merged,
                bad_splits_and_merges_change_nothing,
                rights_change_and_what_is_dirty_stays,
                nothing_is_lost_while_leaves_change_their_size,
                of_two_maps_of_the_same_addresses_one_wins,
                many_tables_lie_side_by_side_and_few_do_not,
                a_place_is_used_again_when_nobody_holds_the_table_there,
                a_table_that_is_held_outlives_its_slab_mates,
                bug_11a_one_half_of_a_leaf_is_read_then_the_other,
                bug_11b_the_last_page_of_a_leaf_is_reported,
                bug_12_a_request_from_inside_a_leaf_or_a_hole_reaches_the_next,
                bug_16_an_unmap_of_the_start_of_a_leaf_is_refused_or_owes_all_of_it,
                bug_23_no_change_of_a_leaf_writes_a_stale_copy_back,
                bug_25_the_page_of_a_writes_tail_is_dirty,
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
    amdv1_3: crate::fmt::AmdHost<3>,
    amdv1_5: crate::fmt::AmdHost<5>,
    amdv1_2k: crate::fmt::AmdHost<4, 11>,
    vtdss_3: crate::fmt::VtdSs<3>,
    vtdss_4: crate::fmt::VtdSs<4>,
    vtdss_5: crate::fmt::VtdSs<5>,
    x86_64_4: crate::fmt::X86_64<4>,
    x86_64_5: crate::fmt::X86_64<5>,
    arm_s1: crate::fmt::ArmS1,
    arm_s1_16k: crate::fmt::ArmS1<14>,
    arm_s1_64k: crate::fmt::ArmS1<16>,
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

/// The dirty pages of `range`, by a harvest or a peek, and the gather.
fn dirty<F: Format>(table: &Table<F>, range: IovaRange, clear: bool) -> (Vec<u64>, FlushGather) {
    let mut words = vec![0u64; (range.granules(F::PAGE) as usize).div_ceil(64)];
    let view = UserBitmap::new(&mut words).view(range, F::PAGE).unwrap();
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
        .flat_map(|run| (run.start().get()..=run.last().get()).step_by(F::PAGE.bytes() as usize))
        .collect();
    (pages, gather)
}

fn pages<F: Format>(start: u64, len: u64) -> Vec<u64> {
    (start..start + len)
        .step_by(F::PAGE.bytes() as usize)
        .collect()
}

/// Bytes of the smallest page.
fn k<F: Format>() -> u64 {
    F::PAGE.bytes()
}

/// Bytes of a leaf of one entry, one level up.
fn m<F: Format>() -> u64 {
    F::size(1).bytes()
}

/// Bytes of an entry two levels up.
fn g<F: Format>() -> u64 {
    F::size(2).bytes()
}

/// The leaf that must map `at`, inside the mapping of `start..end`, by a naive search.
fn leaf_for<F: Format>(at: u64, start: u64, end: u64, phys: u64, limit: u64) -> (u64, u64) {
    let mut best = (at & !(k::<F>() - 1), k::<F>());
    for size in F::LEAF_SIZES.iter().map(Granule::bytes) {
        let first = at & !(size - 1);
        let fits = first >= start && u128::from(first) + u128::from(size) <= u128::from(end);
        let backing = phys.wrapping_add(first.wrapping_sub(start));
        if size <= limit && fits && backing.is_multiple_of(size) {
            best = (first, size);
        }
    }
    best
}

fn leaves_are_as_large_as_both_addresses_and_the_limit_allow<F: Format>() {
    let (k, m, g) = (k::<F>(), m::<F>(), g::<F>());
    for (start, phys, len, limit) in [
        (0, 0, g, F::size(2)),
        (0, 0, m, F::size(2)),
        (0, 0, 2 * k, F::size(2)),
        (0, 0, 16 * k, granule(63)),
        (g, m, g, F::size(2)),
        (m, k, m, F::size(2)),
        (m, 16 * k, m, F::size(2)),
        (0, 0, 4 * m, F::size(1)),
        (0, 0, m, F::PAGE),
        (0, 0, m, granule(0)),
        (g - m, g - m, g + 2 * m, F::size(2)),
        (m - k, m - k, m + 2 * k, granule(63)),
        (m - 3 * k, 2 * m - 3 * k, 35 * k, granule(63)),
    ] {
        let table = Table::<F>::new();
        table
            .map(range(start, len), phys, Access::ReadWrite, limit)
            .unwrap();
        let mut at = start;
        let mut nth = 0;
        while at < start + len {
            let expect = leaf_for::<F>(at, start, start + len, phys, limit.bytes());
            let leaf = table.translate(iova(at)).unwrap();
            assert_eq!(
                leaf.range,
                range(expect.0, expect.1),
                "{start:#x} to {phys:#x}"
            );
            assert_eq!(leaf.phys - phys, at - start);
            assert!(!leaf.dirty);
            // The first few hundred leaves, then big steps.
            nth += 1;
            at += expect.1 * (1 + nth / 600 * 97);
        }
        for outside in [start.wrapping_sub(1), start + len] {
            assert_eq!(table.translate(iova(outside)), None);
        }
    }
}

fn leaves_have_the_sizes_that_the_caller_names<F: Format>() {
    for size in F::LEAF_SIZES.iter().take(12) {
        let table = Table::<F>::new();
        let area = range(size.bytes(), 3 * size.bytes());
        table
            .map(area, size.bytes(), Access::ReadWrite, LeafSizes::only(size))
            .unwrap();
        let mut gone = vec![];
        table.unmap(area, |r, _, _| gone.push(r)).unwrap();
        let expect: Vec<_> = (1..4)
            .map(|n| range(n * size.bytes(), size.bytes()))
            .collect();
        assert_eq!(gone, expect);
    }
}

fn bad_requests_are_refused_and_change_nothing<F: Format>() {
    let table = Table::<F>::new();
    let map = |range, phys| table.map(range, phys, Access::ReadWrite, F::size(2));
    // The first address that is not translated from 0 on, and the page before it.
    let end = 1 << (F::WIDTH - u32::from(F::SIGN_EXTENDED));
    for wide in [
        range(0, end + k::<F>()),
        range(end, k::<F>()),
        range(end - k::<F>(), 2 * k::<F>()),
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
    let page = k::<F>();
    for unaligned in [range(0, page - 1), range(512, page)] {
        assert!(matches!(map(unaligned, 0), Err(Error::Unaligned { .. })));
    }
    assert!(matches!(
        map(range(0, page), 8),
        Err(Error::UnalignedPhys { phys: 8, .. })
    ));
    let end_of_memory = 1 << F::OUTPUT_LG2;
    for phys in [end_of_memory - page, end_of_memory, !F::PAGE.mask()] {
        assert!(matches!(
            map(range(0, 2 * page), phys),
            Err(Error::PhysTooWide { width, .. }) if width == F::OUTPUT_LG2
        ));
    }
    map(range(end - page, page), end_of_memory - page).unwrap();
    let last = table.translate(iova(end - 1)).unwrap();
    assert_eq!(
        (last.phys, last.range),
        (end_of_memory - page, range(end - k::<F>(), k::<F>()))
    );

    // An odd page, so that no larger leaf fits there.
    let at = 17 * page;
    map(range(at, 4 * page), page).unwrap();
    let inside = |at| table.translate(iova(at)).is_some();
    let leaf = range(at, page);
    for over in [
        range(at - page, 2 * page),
        range(0, (end / 2).min(1 << 46)),
        range(at, page),
    ] {
        assert!(matches!(map(over, 0), Err(Error::AlreadyMapped { leaf: l, .. }) if l == leaf));
        assert!(
            !inside(at - 1) && !inside(0) && !inside(at + 4 * page) && inside(at + 4 * page - 1)
        );
    }
}

/// The lowest address of the upper half, where there is one.
fn upper<F: Format>() -> Option<u64> {
    F::SIGN_EXTENDED.then(|| u64::MAX << (F::WIDTH - 1))
}

fn both_ends_of_what_is_translated_are_mapped<F: Format>() {
    let table = Table::<F>::new();
    let map = |range| table.map(range, 0, Access::ReadWrite, F::size(2));
    let top = IovaRange::granule_at(Iova::MAX, F::PAGE);
    let Some(upper) = upper::<F>() else {
        assert!(matches!(map(top), Err(Error::TooWide { .. })));
        assert!(table.set_dirty(Iova::MAX).is_none());
        return;
    };
    let below = range(upper - k::<F>(), 2 * k::<F>());
    assert!(matches!(map(below), Err(Error::TooWide { .. })));
    let ends = [range(0, k::<F>()), range(upper, k::<F>()), top];
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
    for absent in [Iopte::ABSENT, Iopte::FROZEN] {
        assert!(!F::is_present(absent));
        for level in 0..F::LEVELS {
            assert_eq!(F::worth_a_look(absent, level), 0);
        }
    }
    for level in 0..F::LEVELS {
        let lg2 = F::PAGE_LG2 + level * F::INDEX_LG2;
        assert_eq!(u32::from(F::size(level).lg2()), lg2);
        assert_eq!(F::index(u64::MAX << lg2, level) & 63, 63);
    }
    for size in F::LEAF_SIZES.iter() {
        let above_page = u32::from(size.lg2()) - F::PAGE_LG2;
        let (level, group_lg2) = (above_page / F::INDEX_LG2, above_page % F::INDEX_LG2);
        assert!(level < F::LEAF_LEVELS);
        let high = (1u64 << (F::OUTPUT_LG2 - 1)) | size.bytes() & ((1 << F::OUTPUT_LG2) - 1);
        for access in [Access::Read, Access::Write, Access::ReadWrite] {
            if !F::grants(access) {
                assert_eq!(access, Access::Write);
                continue;
            }
            for phys in [0, high & !size.mask()] {
                let clean = F::leaf(phys, access, size);
                let single = group_lg2 == 0;
                assert!(!F::is_dirty(clean));
                assert!(!single || F::worth_a_look(clean, level) == 0);
                assert_eq!(single, clean.0 & F::GROUPED == 0);
                assert!(level == 0 || !single || clean.0 & F::TABLE_SET == 0);
                assert!(level == 0 || clean.0 & F::LEAF_SET == F::LEAF_SET);
                let written = F::written(clean);
                assert!(F::is_dirty(written) && F::worth_a_look(written, level) != 0);
                for leaf in [clean, written] {
                    assert!(F::is_present(leaf) && F::is_leaf(leaf, level));
                    assert_eq!((F::output(leaf), F::access(leaf)), (phys, access));
                    assert_eq!(F::leaf_size(leaf, level), size);
                    assert_eq!(F::group_lg2(leaf, level), group_lg2);
                    let cleaned = F::MAKE_CLEAN.of(leaf);
                    assert!(!F::is_dirty(cleaned));
                    assert!(!single || F::worth_a_look(cleaned, level) == 0);
                    assert_eq!((F::output(cleaned), F::access(cleaned)), (phys, access));
                    assert_eq!(F::MAKE_CLEAN.of(cleaned), cleaned);
                    for other in [Access::Read, Access::ReadWrite] {
                        let changed = F::with_access(leaf, other);
                        assert_eq!(F::access(changed), other);
                        assert_eq!(F::is_dirty(changed), F::is_dirty(leaf));
                        assert!(
                            !single || (F::worth_a_look(changed, level) != 0) == F::is_dirty(leaf)
                        );
                        let back = F::with_access(changed, access);
                        assert_eq!(F::is_dirty(back), F::is_dirty(leaf));
                        assert_eq!((F::output(back), F::access(back)), (phys, access));
                    }
                }
            }
        }
    }
    for level in 1..F::LEVELS {
        for address in [0x1_0000, 0x5555_0001_0000, 0x7fff_ffff_0000] {
            let table = F::table(address, level);
            assert!(F::is_present(table) && !F::is_leaf(table, level));
            assert!(F::worth_a_look(table, level) != 0);
            assert!(table.0 & F::TABLE_SET != 0 || F::LEAF_SET != 0 && table.0 & F::LEAF_SET == 0);
            assert_eq!(F::table_address(table), address);
        }
    }
}

fn unmap_reports_leaves_and_refuses_parts_of_them<F: Format>() {
    let table = Table::<F>::new();
    table
        .map(range(0, 2 * m::<F>()), 0, Access::ReadWrite, F::size(1))
        .unwrap();
    table
        .map(
            range(2 * m::<F>() + k::<F>(), 2 * k::<F>()),
            0,
            Access::ReadWrite,
            F::size(1),
        )
        .unwrap();
    table.set_dirty(iova(m::<F>() + 5)).unwrap();
    let none = |_: IovaRange, _: Granule, _: bool| panic!("nothing goes");
    for (part, leaf) in [
        (range(m::<F>(), k::<F>()), m::<F>()),
        (range(0, m::<F>() + k::<F>()), m::<F>()),
        (range(k::<F>(), 4 * m::<F>()), 0),
    ] {
        let Err(Error::PartOfLeaf {
            leaf: sticks_out, ..
        }) = table.unmap(part, none)
        else {
            panic!("{part} cuts through a leaf");
        };
        assert_eq!(sticks_out, range(leaf, m::<F>()));
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
        .unmap(range(0, 2 * g::<F>()), |r, size, d| gone.push((r, size, d)))
        .unwrap();
    assert_eq!(
        gone,
        [
            (range(0, m::<F>()), F::size(1), false),
            (range(m::<F>(), m::<F>()), F::size(1), true),
            (range(2 * m::<F>() + k::<F>(), k::<F>()), F::PAGE, false),
            (range(2 * m::<F>() + 2 * k::<F>(), k::<F>()), F::PAGE, false),
        ]
    );
    table.unmap(range(0, 2 * g::<F>()), none).unwrap();
    assert!(
        table.set_dirty(iova(m::<F>())).is_none(),
        "no D for unmapped pages"
    );
}

fn a_large_leaf_takes_the_place_of_an_empty_table_only<F: Format>() {
    let table = Table::<F>::new();
    let map = |start, len| table.map(range(start, len), start, Access::ReadWrite, F::size(2));
    let unmap = |start, len| table.unmap(range(start, len), |_, _, _| ());
    map(g::<F>() + m::<F>() + k::<F>(), k::<F>()).unwrap();
    map(g::<F>() + 2 * m::<F>(), m::<F>()).unwrap();
    for (start, len) in [(g::<F>(), g::<F>()), (g::<F>() + m::<F>(), m::<F>())] {
        assert!(matches!(map(start, len), Err(Error::AlreadyMapped { .. })));
    }
    unmap(g::<F>(), g::<F>()).unwrap();
    map(g::<F>(), g::<F>()).unwrap();
    let at = g::<F>() + m::<F>();
    let expect = leaf_for::<F>(at, g::<F>(), 2 * g::<F>(), g::<F>(), g::<F>());
    assert_eq!(
        table.translate(iova(at)).unwrap().range,
        range(expect.0, expect.1)
    );
    unmap(g::<F>(), g::<F>()).unwrap();
    map(g::<F>() + m::<F>() + k::<F>(), k::<F>()).unwrap();
    assert_eq!(
        table
            .translate(iova(g::<F>() + m::<F>() + k::<F>()))
            .unwrap()
            .range,
        range(g::<F>() + m::<F>() + k::<F>(), k::<F>())
    );
}

#[test]
fn six_levels_translate_all_addresses() {
    type F = crate::fmt::AmdHost<6>;
    let table = Table::<F>::new();
    let page = F::PAGE;
    let (first, last) = (
        IovaRange::granule_at(Iova::MIN, page),
        IovaRange::granule_at(Iova::MAX, page),
    );
    // The largest leaf, in the middle of the address space.
    let size = granule(51);
    let large = range(1 << 63, size.bytes());
    for area in [first, last, large] {
        table.map(area, 0, Access::ReadWrite, size).unwrap();
        let again = table.map(area, 0, Access::ReadWrite, size);
        assert!(matches!(again, Err(Error::AlreadyMapped { leaf, .. }) if leaf == area));
        for at in [area.start(), area.last()] {
            assert_eq!(table.set_dirty(at).unwrap().range, area);
        }
    }
    let mut word = [0u64];
    let view = UserBitmap::new(&mut word)
        .view(IovaRange::ALL, granule(58))
        .unwrap();
    let mut gather = FlushGather::new();
    table
        .read_and_clear(
            IovaRange::ALL,
            &mut LeafSink::new(&mut view.sink(), &mut gather),
        )
        .unwrap();
    assert_eq!(gather.ranges(), [first, large, last]);
    assert_eq!(word[0], 1 | 1 << 32 | 1 << 63);
    table
        .split_at(iova((1 << 63) + (1 << 40)), |r, _| assert_eq!(r, large))
        .unwrap();
    let mut gone = vec![];
    table
        .unmap(IovaRange::ALL, |leaf, _, dirty| {
            gone.push((leaf.len(), dirty))
        })
        .unwrap();
    // 512 GiB is no size of a leaf, and 1 TiB is: no part of the split is as small as that.
    assert_eq!(
        gone.iter().map(|leaf| leaf.0).sum::<u128>(),
        2 * 4096 + (1 << 51)
    );
    assert!(gone.len() < 20 && gone.iter().all(|leaf| !leaf.1));
}
