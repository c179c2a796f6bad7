//! The dirty bit: set, recorded, cleared, at every level and at every border.

use super::*;

pub(super) fn only_writable_leaves_become_dirty<F: Format>() {
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

pub(super) fn every_leaf_size_is_written_cleaned_and_written_again<F: Format>() {
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
                    .read_and_clear(leaf, &mut LeafSink::new(&mut view.sink(), &mut gather))
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

pub(super) fn part_of_a_dirty_leaf_is_recorded_and_the_leaf_stays_dirty<F: Format>() {
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

pub(super) fn one_dirty_leaf_of_every_place_in_a_group_is_found<F: Format>() {
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

pub(super) fn a_harvest_beyond_the_width_sees_what_is_there<F: Format>() {
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
        .read_and_clear(
            IovaRange::ALL,
            &mut LeafSink::new(&mut view.sink(), &mut gather),
        )
        .unwrap();
    assert_eq!(
        (gather.ranges(), view.count()),
        (&ends[..], ends.len() as u64)
    );
    table
        .read_and_clear(
            range(1 << 60, 1 << 20),
            &mut LeafSink::new(&mut view.sink(), &mut gather),
        )
        .unwrap();
}

/// A harvest that saw a dirty leaf makes it clean after it was unmapped, and even mapped anew.
pub(super) fn cleaning_what_was_unmapped_meanwhile_maps_nothing<F: Format>() {
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
