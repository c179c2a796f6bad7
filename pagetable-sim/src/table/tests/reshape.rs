//! Splitting, merging and protecting: dirty leaves stay dirty, with devices and without.

use super::*;

/// The leaves of `area`, in order: addresses, rights and whether they are dirty.
fn leaves<F: Format>(table: &Table<F>, area: IovaRange) -> Vec<(IovaRange, Access, bool)> {
    let mut all: Vec<(IovaRange, Access, bool)> = vec![];
    let mut at = Some(area.start());
    while let Some(next) = at.filter(|at| area.contains(*at)) {
        let leaf = table.translate(next).unwrap();
        all.push((leaf.range, leaf.access, leaf.dirty));
        at = leaf.range.last().checked_add(1);
    }
    all
}

/// Whether the addresses of `area` translate to themselves.
fn is_identity<F: Format>(table: &Table<F>, area: IovaRange) -> bool {
    let step = (area.len() / 64).max(u128::from(k::<F>())) as usize;
    (area.start().get()..=area.last().get())
        .step_by(step)
        .all(|at| {
            let leaf = table.translate(iova(at)).unwrap();
            leaf.phys + (at - leaf.range.start().get()) == at
        })
}

/// The sizes above the page that are split into thousands of parts at most.
fn sizes<F: Format>() -> impl Iterator<Item = Granule> {
    F::LEAF_SIZES
        .iter()
        .filter(|size| *size > F::PAGE && *size <= F::size(1))
        .chain(F::LEAF_SIZES.iter().find(|size| *size > F::size(1)))
}

pub(super) fn no_leaf_maps_both_sides_of_a_split<F: Format>() {
    for size in sizes::<F>() {
        for (at, dirty) in [
            (size.bytes() / 2, false),
            (size.bytes() / 2, true),
            (k::<F>(), true),
            (size.bytes() - k::<F>(), true),
        ] {
            let table = Table::<F>::new();
            let area = range(size.bytes(), size.bytes());
            let at = area.start().checked_add(at).unwrap();
            let only = LeafSizes::only(size);
            table
                .map(area, size.bytes(), Access::ReadWrite, only)
                .unwrap();
            if dirty {
                table.set_dirty(area.last()).unwrap();
            }
            let mut owed = vec![];
            for _ in 0..2 {
                table.split_at(at, |r, s| owed.push((r, s))).unwrap();
            }
            assert_eq!(owed, [(area, size)], "once");
            let parts = leaves(&table, area);
            for (part, access, d) in &parts {
                assert!(part.last() < at || part.start() >= at);
                assert_eq!((*access, *d), (Access::ReadWrite, dirty));
            }
            assert!(is_identity(&table, area));
            // Either side is now a range of whole leaves.
            let right = IovaRange::new(at, area.last()).unwrap();
            let mut gone = 0;
            table
                .unmap(right, |_, _, d| gone += u64::from(d == dirty))
                .unwrap();
            let expect = parts.iter().filter(|(part, ..)| part.start() >= at).count();
            assert_eq!(gone, expect as u64);
            assert!(table.translate(at).is_none() && table.translate(area.start()).is_some());
        }
    }
}

pub(super) fn a_split_and_a_merge_keep_what_is_dirty<F: Format>() {
    for size in sizes::<F>() {
        for access in [Access::Read, Access::ReadWrite] {
            let table = Table::<F>::new();
            let area = range(0, 2 * size.bytes());
            let first = range(0, size.bytes());
            table.map(area, 0, access, LeafSizes::only(size)).unwrap();
            table.make_dirty(range(0, k::<F>())).unwrap();
            assert_eq!(
                leaves(&table, area).iter().map(|l| l.2).collect::<Vec<_>>(),
                [true, false]
            );
            let mut owed = vec![];
            table
                .split(area, F::PAGE, |r, s| owed.push((r, s)))
                .unwrap();
            assert_eq!(
                owed,
                [(first, size), (range(size.bytes(), size.bytes()), size)]
            );
            for (part, rights, dirty) in leaves(&table, area) {
                assert_eq!(part.len(), u128::from(k::<F>()));
                assert_eq!((rights, dirty), (access, first.covers(part)));
            }
            // One dirty page in the second half, none in the first.
            assert_eq!(dirty(&table, area, true).0, pages::<F>(0, size.bytes()));
            table
                .make_dirty(range(size.bytes() + k::<F>(), k::<F>()))
                .unwrap();
            let mut whole = vec![];
            table
                .merge(area, size, |r, s, _| whole.push((r, s)))
                .unwrap();
            let last = &leaves(&table, area)[..];
            assert_eq!(last.len(), 2);
            assert!(whole.contains(&(first, size)));
            // Superset: only a writable leaf that took the place of a table is dirty without a
            // dirty part.
            let bound = access.writes() && size >= F::size(1);
            assert_eq!((last[0].2, last[1].2), (bound, true), "{size}");
            assert!(is_identity(&table, area));
        }
    }
}

pub(super) fn only_what_belongs_together_is_merged<F: Format>() {
    let m = m::<F>();
    let table = Table::<F>::new();
    let map = |start, len, phys, access| table.map(range(start, len), phys, access, F::PAGE);
    // Whole; one page with other rights; memory that is not contiguous; memory that is not aligned;
    // a hole.
    map(0, m, 0, Access::ReadWrite).unwrap();
    map(m, m - k::<F>(), m, Access::ReadWrite).unwrap();
    map(2 * m - k::<F>(), k::<F>(), 2 * m - k::<F>(), Access::Read).unwrap();
    map(2 * m, m / 2, 2 * m, Access::ReadWrite).unwrap();
    map(2 * m + m / 2, m / 2, 2 * m, Access::ReadWrite).unwrap();
    map(3 * m, m, 3 * m + k::<F>(), Access::ReadWrite).unwrap();
    map(4 * m, m - k::<F>(), 4 * m, Access::ReadWrite).unwrap();
    let mut whole = vec![];
    table
        .merge(range(0, 5 * m), F::size(1), |r, s, table| {
            assert_eq!(table, s == F::size(1), "smaller ones stay in their table");
            if table {
                whole.push(r);
            }
        })
        .unwrap();
    assert_eq!(whole, [range(0, m)]);
    for at in [m, 2 * m, 3 * m, 4 * m] {
        let leaf = table.translate(iova(at)).unwrap();
        assert!(leaf.range.len() < u128::from(m) && leaf.range.start().get() == at);
    }
    assert!(table.translate(iova(5 * m - 1)).is_none());
    let last = table.translate(iova(2 * m - 1)).unwrap();
    assert_eq!(
        (last.range.len(), last.access),
        (u128::from(k::<F>()), Access::Read)
    );
    // A part of the leaf that was split is not merged.
    table.split(range(0, m), F::PAGE, |_, _| ()).unwrap();
    table
        .merge(range(0, m - k::<F>()), F::size(1), |_, _, _| ())
        .unwrap();
    assert!(table.translate(iova(0)).unwrap().range.len() < u128::from(m));
}

pub(super) fn bad_splits_and_merges_change_nothing<F: Format>() {
    let table = Table::<F>::new();
    let area = range(0, m::<F>());
    table.map(area, 0, Access::ReadWrite, F::size(1)).unwrap();
    let none = |_: IovaRange, _: Granule| panic!("nothing changes");
    let merged = |_: IovaRange, _: Granule, _: bool| panic!("nothing changes");
    let unaligned = range(1, k::<F>());
    for error in [
        table.split_at(iova(1), none),
        table.split(unaligned, F::PAGE, none),
        table.merge(unaligned, F::PAGE, merged),
        table.protect(unaligned, Access::Read, none),
        table.make_dirty(unaligned),
    ] {
        assert!(matches!(error, Err(Error::Unaligned { .. })));
    }
    if let Some(wide) = Some(IovaRange::ALL).filter(|_| F::WIDTH < 64) {
        assert!(matches!(
            table.split(wide, F::PAGE, none),
            Err(Error::TooWide { .. })
        ));
        assert!(matches!(
            table.merge(wide, F::PAGE, merged),
            Err(Error::TooWide { .. })
        ));
    }
    let part = range(0, m::<F>() / 2);
    assert!(matches!(
        table.protect(part, Access::Read, none),
        Err(Error::PartOfLeaf { leaf, .. }) if leaf == area
    ));
    // At a border, and where nothing is mapped, there is nothing to do.
    table.split_at(iova(0), none).unwrap();
    table.split_at(iova(m::<F>()), none).unwrap();
    table
        .split(range(m::<F>(), m::<F>()), F::PAGE, none)
        .unwrap();
    table.merge(area, F::size(1), merged).unwrap();
    assert_eq!(leaves(&table, area).len(), 1);
}

pub(super) fn rights_change_and_what_is_dirty_stays<F: Format>() {
    for size in sizes::<F>().chain([F::PAGE]) {
        let table = Table::<F>::new();
        let area = range(0, 3 * size.bytes());
        let middle = range(size.bytes(), size.bytes());
        table
            .map(area, 0, Access::ReadWrite, LeafSizes::only(size))
            .unwrap();
        table.set_dirty(middle.last()).unwrap();
        for access in [Access::Read, Access::Read, Access::ReadWrite] {
            let before = leaves(&table, area);
            let mut changed = vec![];
            table
                .protect(area, access, |r, s| changed.push((r, s)))
                .unwrap();
            let expect = before.iter().filter(|l| l.1 != access).map(|l| (l.0, size));
            assert_eq!(changed, expect.collect::<Vec<_>>());
            for (leaf, rights, dirty) in leaves(&table, area) {
                assert_eq!((rights, dirty), (access, leaf == middle), "{size}");
            }
            if !access.writes() {
                assert!(!table.set_dirty(iova(0)).unwrap().access.writes());
            }
        }
        assert_eq!(
            dirty(&table, area, true).0,
            pages::<F>(middle.start().get(), size.bytes())
        );
        assert_eq!(dirty(&table, area, true).0, [0u64; 0]);
    }
}

/// Leaves are split and merged while devices set D and a harvester takes it: every D that was set
/// is seen by a harvest that ends later.
pub(super) fn nothing_is_lost_while_leaves_change_their_size<F: Format>() {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    let area = range(0, 2 * m::<F>());
    let table = Table::<F>::new();
    table.map(area, 0, Access::ReadWrite, F::size(1)).unwrap();
    let count = (area.len() / u128::from(k::<F>())) as usize;
    // When the last write of a page began, and when the last harvest that reported it ended.
    let written: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::new(0)).collect();
    let mut reported = vec![0u64; count];
    let clock = AtomicU64::new(1);
    let running = AtomicBool::new(true);
    std::thread::scope(|s| {
        let shaper = s.spawn(|| {
            for n in 0..12 {
                if n % 3 == 0 {
                    let at = iova((1 + 7 * n) * k::<F>());
                    table.split_at(at, |_, _| ()).unwrap();
                }
                table.split(area, F::PAGE, |_, _| ()).unwrap();
                table.merge(area, F::size(1), |_, _, _| ()).unwrap();
            }
            // Release: pairs with the Acquire below.
            running.store(false, Ordering::Release);
        });
        let writer = s.spawn(|| {
            let mut at = 1u64;
            while running.load(Ordering::Acquire) {
                at = at
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let page = (at >> 33) as usize % count;
                let now = clock.fetch_add(1, Ordering::SeqCst);
                table.set_dirty(iova(page as u64 * k::<F>())).unwrap();
                written[page].fetch_max(now, Ordering::SeqCst);
            }
        });
        let mut take = || {
            let found = dirty(&table, area, true).0;
            let now = clock.fetch_add(1, Ordering::SeqCst);
            for page in found {
                reported[(page / k::<F>()) as usize] = now;
            }
        };
        while running.load(Ordering::Acquire) {
            take();
        }
        shaper.join().unwrap();
        writer.join().unwrap();
        take();
    });
    for (page, (written, reported)) in written.iter().zip(&reported).enumerate() {
        let written = written.load(Ordering::SeqCst);
        assert!(*reported >= written, "page {page}: {reported} < {written}");
    }
}

/// Two threads map the same addresses by leaves of different sizes: one at least is refused, and
/// leaves nothing behind.
pub(super) fn of_two_maps_of_the_same_addresses_one_wins<F: Format>() {
    let area = range(0, 2 * m::<F>());
    for round in 0..20 {
        let table = Table::<F>::new();
        if round % 2 == 0 {
            // Tables without leaves are in the way.
            table.map(area, 0, Access::Read, F::PAGE).unwrap();
            table.unmap(area, |_, _, _| ()).unwrap();
        }
        let barrier = std::sync::Barrier::new(2);
        let map = |limit: Granule| {
            barrier.wait();
            table.map(area, 0, Access::ReadWrite, limit)
        };
        let (large, small) = std::thread::scope(|s| {
            let small = s.spawn(|| map(F::PAGE));
            (map(F::size(1)), small.join().unwrap())
        });
        assert!(large.is_err() || small.is_err());
        for refused in [&large, &small]
            .into_iter()
            .filter_map(|done| done.as_ref().err())
        {
            assert!(matches!(refused, Error::AlreadyMapped { .. }));
        }
        let sizes: Vec<_> = (0..2 * m::<F>())
            .step_by(k::<F>() as usize)
            .map(|at| table.translate(iova(at)).map(|leaf| leaf.range.len()))
            .collect();
        let expect = match (large.is_ok(), small.is_ok()) {
            (true, _) => Some(u128::from(m::<F>())),
            (_, true) => Some(u128::from(k::<F>())),
            _ => None,
        };
        assert!(sizes.iter().all(|size| *size == expect));
    }
}
