//! The dirty bit: set, recorded, cleared, at every level and at every border.

use super::*;
use crate::table::leaf::{Batch, DirtyLeaf};
use crate::table::scan::{Upper, Visitor};

use dirtymap::source::Stopped;

/// Receives a way to clean each leaf that a scan found dirty.
struct Finder<V>(V);

impl<F: Format, V: FnMut(&dyn Fn() -> bool)> Visitor<F> for Finder<V> {
    type Look = ();

    fn leaf(&mut self, leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error> {
        (self.0)(&|| leaf.clear::<F>());
        Ok(())
    }

    fn leaves(&mut self, batch: &Batch<'_>, mask: u64) -> Result<(), Stopped> {
        (self.0)(&|| batch.clear::<F>(mask) != 0);
        Ok(())
    }

    fn skips(&self, _entry: Iopte) -> bool {
        false
    }

    fn enter(&mut self, _upper: &Upper<'_>) -> Option<()> {
        Some(())
    }

    fn leave(&mut self, _upper: &Upper<'_>, _look: ()) {}
}

pub(super) fn only_writable_leaves_become_dirty<F: Format>() {
    let table = Table::<F>::new();
    let mut expect = vec![];
    for (start, access) in [
        (0, Access::Read),
        (k::<F>(), Access::Write),
        (2 * k::<F>(), Access::ReadWrite),
    ] {
        let done = table.map(range(start, k::<F>()), 0, access, F::PAGE);
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
    assert_eq!(dirty(&table, range(0, m::<F>()), true).0, expect);
}

/// At every level and for every leaf size, written through every entry of the leaf.
pub(super) fn every_leaf_size_is_written_cleaned_and_written_again<F: Format>() {
    for size in F::LEAF_SIZES.iter() {
        let bytes = size.bytes();
        let table = Table::<F>::new();
        // The second leaf of its size, where the lower half has one.
        let end = 1u128 << (F::WIDTH - u32::from(F::SIGN_EXTENDED));
        let second = 2 * u128::from(bytes) <= end;
        let leaf = range(if second { bytes } else { 0 }, bytes);
        table
            .map(leaf, 0, Access::ReadWrite, LeafSizes::only(size))
            .unwrap();
        let found = table.translate(leaf.last()).unwrap();
        assert_eq!((found.range, found.dirty), (leaf, false), "{size}");
        let above_page = u32::from(size.lg2()) - F::PAGE_LG2;
        let entry = F::size(above_page / F::INDEX_LG2).bytes();
        // The whole leaf, with as many bits as fit in a few words.
        let mut words = [0u64; 8];
        let grain = granule(u32::from(size.lg2()).saturating_sub(9).max(F::PAGE_LG2));
        let bits = bytes >> grain.lg2();
        let entries = (0..bytes / entry).map(|nth| nth * entry + nth % entry);
        for at in entries.chain([k::<F>() - 1, bytes / 2, bytes - 1]) {
            let at = iova(leaf.start().get() + at);
            for round in 0..2 {
                let before = table.set_dirty(at).unwrap();
                assert_eq!((before.range, before.dirty), (leaf, false), "round {round}");
                assert!(table.set_dirty(at).unwrap().dirty);
                assert!(table.translate(leaf.start()).unwrap().dirty);
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
        table.set_dirty(leaf.last()).unwrap();
        let mut gone = vec![];
        table
            .unmap(leaf, |r, size, d| gone.push((r, size, d)))
            .unwrap();
        assert_eq!(gone, [(leaf, size, true)]);
        assert_eq!(table.translate(leaf.start()), None);
    }
}

pub(super) fn part_of_a_dirty_leaf_is_recorded_and_the_leaf_stays_dirty<F: Format>() {
    let table = Table::<F>::new();
    table
        .map(range(0, 2 * m::<F>()), 0, Access::ReadWrite, F::size(1))
        .unwrap();
    table.set_dirty(iova(17)).unwrap();
    table.set_dirty(iova(m::<F>() + 17)).unwrap();
    // The second half of the first leaf, the first page of the second one.
    let part = range(m::<F>() / 2, m::<F>() / 2 + k::<F>());
    for clear in [true, false, true] {
        let (found, gather) = dirty(&table, part, clear);
        assert_eq!(found, pages::<F>(m::<F>() / 2, m::<F>() / 2 + k::<F>()));
        let drained: &[IovaRange] = if clear { &[part] } else { &[] };
        assert_eq!(gather.ranges(), drained, "what is copied is drained");
    }
    let (found, gather) = dirty(&table, range(0, m::<F>() + k::<F>()), true);
    assert_eq!(found, pages::<F>(0, m::<F>() + k::<F>()));
    assert_eq!(
        (gather.ranges(), gather.entries()),
        (&[range(0, m::<F>() + k::<F>())][..], 2)
    );
    assert!(!table.translate(iova(0)).unwrap().dirty);
    assert_eq!(
        dirty(&table, range(0, 2 * m::<F>()), true).0,
        pages::<F>(m::<F>(), m::<F>())
    );
    assert_eq!(dirty(&table, range(0, 2 * m::<F>()), true).0, [0u64; 0]);
}

pub(super) fn one_dirty_leaf_of_every_place_in_a_group_is_found<F: Format>() {
    let table = Table::<F>::new();
    let entries = 1 << F::INDEX_LG2;
    table
        .map(range(0, 4 * m::<F>()), 0, Access::ReadWrite, F::PAGE)
        .unwrap();
    for first in [0, 1, 7, 8, 13] {
        for last in [
            2 * entries - 24,
            2 * entries - 1,
            2 * entries,
            2 * entries + 7,
            4 * entries - 1,
        ] {
            let request = range(first * k::<F>(), (last - first + 1) * k::<F>());
            for page in [
                0,
                first,
                first + 3,
                entries - 1,
                entries,
                last - 1,
                last,
                (last + 1) % (4 * entries),
            ] {
                table.set_dirty(iova(page * k::<F>())).unwrap();
                let expect = if (first..=last).contains(&page) {
                    vec![page * k::<F>()]
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
        (1 << (F::WIDTH - u32::from(F::SIGN_EXTENDED))) - k::<F>(),
        k::<F>(),
    )];
    ends.extend(upper::<F>().map(|at| range(at, k::<F>())));
    for end in &ends {
        table.map(*end, 0, Access::ReadWrite, F::PAGE).unwrap();
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

/// Also where the bitmap has room for more.
pub(super) fn a_look_at_a_part_of_a_leaf_records_that_part<F: Format>() {
    let table = Table::<F>::new();
    let all = range(0, m::<F>());
    table
        .map(all, 0, Access::ReadWrite, LeafSizes::only(F::size(1)))
        .unwrap();
    table.set_dirty(iova(0)).unwrap();
    let mut words = vec![0u64; (all.granules(F::PAGE) as usize).div_ceil(64)];
    let view = UserBitmap::new(&mut words).view(all, F::PAGE).unwrap();
    let part = range(2 * k::<F>(), k::<F>());
    table.peek(part, &mut view.sink()).unwrap();
    assert_eq!(view.runs().collect::<Vec<_>>(), [part]);
}

/// A harvest that saw a dirty leaf makes it clean after it was unmapped, and even mapped anew.
pub(super) fn cleaning_what_was_unmapped_meanwhile_maps_nothing<F: Format>() {
    for limit in [F::PAGE, F::size(1)] {
        let table = Table::<F>::new();
        let map = |limit| table.map(range(0, m::<F>()), 0, Access::ReadWrite, limit);
        map(F::size(1)).unwrap();
        table.set_dirty(iova(0)).unwrap();
        let mut seen = 0;
        let visit = |clear: &dyn Fn() -> bool| {
            seen += 1;
            table
                .unmap(range(0, m::<F>()), |_, _, d| assert!(d))
                .unwrap();
            assert!(!clear());
            assert_eq!(table.translate(iova(0)), None);
            assert!(table.set_dirty(iova(0)).is_none());
            assert_eq!(dirty(&table, range(0, m::<F>()), true).0, [0u64; 0]);
            table
                .unmap(range(0, m::<F>()), |_, _, _| panic!("nothing is there"))
                .unwrap();
            map(limit).unwrap();
            clear();
        };
        let found = table.scan(range(0, m::<F>()), &mut Finder(visit));
        assert!(found.is_ok() && seen == 1);
        let leaf = table.translate(iova(m::<F>() - 1)).unwrap();
        assert_eq!(
            (leaf.range.len(), leaf.dirty),
            (u128::from(limit.bytes()), false)
        );
        table.set_dirty(iova(m::<F>() - 1)).unwrap();
        let first = m::<F>() - limit.bytes();
        assert_eq!(
            dirty(&table, range(0, m::<F>()), true).0,
            pages::<F>(first, limit.bytes())
        );
    }
}

/// Counts the entries beside its way that a scan looks at for its prefetches, and skips all of
/// them.
#[derive(Default)]
struct Ahead(std::cell::Cell<u64>);

impl<F: Format> Visitor<F> for Ahead {
    type Look = ();

    fn leaf(&mut self, _leaf: &DirtyLeaf<'_>) -> Result<(), dirtymap::Error> {
        Ok(())
    }

    fn leaves(&mut self, _batch: &Batch<'_>, _mask: u64) -> Result<(), Stopped> {
        Ok(())
    }

    fn skips(&self, _entry: Iopte) -> bool {
        self.0.set(self.0.get() + 1);
        true
    }

    fn enter(&mut self, _upper: &Upper<'_>) -> Option<()> {
        Some(())
    }

    fn leave(&mut self, _upper: &Upper<'_>, _look: ()) {}
}

/// A harvest of one table among quiet ones, as a run of a mask asks for, looked through the rest of
/// the table above for the next one to prefetch, although the harvest ends before it.
pub(super) fn a_harvest_of_one_table_looks_at_no_table_after_it<F: Format>() {
    let table = Table::<F>::new();
    for nth in 0..8 {
        let page = range(nth * m::<F>(), k::<F>());
        table.map(page, 0, Access::ReadWrite, F::PAGE).unwrap();
        table.set_dirty(page.start()).unwrap();
    }
    for (first, tables, after) in [(0, 1, 0), (3, 1, 0), (0, 3, 3)] {
        let mut ahead = Ahead::default();
        let part = range(first * m::<F>(), tables * m::<F>());
        assert!(table.scan(part, &mut ahead).is_ok());
        assert_eq!(ahead.0.get(), after, "{tables} from {first}");
    }
}
