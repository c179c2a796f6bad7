//! The places of tables: adjacent if there are many, and never in the place of a table that is
//! held.

use super::*;

/// The lowest tables of the first entry two levels up, in order: host addresses.
fn places<F: Format>(table: &Table<F>) -> Vec<u64> {
    let guard = crossbeam_epoch::pin();
    let above = above(table, &guard);
    let entries = above.iter().map(|slot| slot.load(Ordering::Acquire));
    entries
        .filter(|entry| F::is_present(*entry) && !F::is_leaf(*entry, 1))
        .map(F::table_address)
        .collect()
}

/// The table of level 1 that translates address 0.
fn above<'g, F: Format>(table: &'g Table<F>, guard: &'g Guard) -> Node<'g> {
    let mut node = table.root.node();
    for _ in 2..F::LEVELS {
        node = node.below::<F>(node[0].load(Ordering::Acquire), guard);
    }
    node
}

fn map<F: Format>(table: &Table<F>, start: u64, len: u64) {
    table
        .map(range(start, len), 0, Access::ReadWrite, F::PAGE)
        .unwrap();
}

/// The number of tables that directly follow the one before in memory.
fn side_by_side(places: &[u64], bytes: u64) -> usize {
    let follows = |pair: &&[u64]| pair[1] == pair[0] + bytes;
    places.windows(2).filter(follows).count()
}

pub(super) fn many_tables_lie_side_by_side_and_few_do_not<F: Format>() {
    let bytes = 1 << F::TABLE_LG2;
    let few = slab::FEW as usize;
    let in_slabs = F::TABLE_LG2 == 12;
    let count = 16.min(1 << F::INDEX_LG2);
    // At once.
    let table = Table::<F>::new();
    map(&table, 0, count * m::<F>());
    let expected = if in_slabs { count as usize - 1 } else { 0 };
    let found = side_by_side(&places(&table), bytes);
    assert!(!in_slabs || found == expected, "{found}");
    // One by one, from above: those up to the bound lie anywhere.
    let table = Table::<F>::new();
    for nth in (0..count).rev() {
        map(&table, nth * m::<F>(), k::<F>());
        let guard = crossbeam_epoch::pin();
        let made = places(&table).len();
        let slab = above(&table, &guard).has_slab();
        assert_eq!(slab, in_slabs && made >= few, "{made}");
    }
    let found = places(&table);
    let expected = count as usize - few;
    assert!(!in_slabs || side_by_side(&found, bytes) >= expected);
    // Never.
    let table = Table::<F>::scattered();
    map(&table, 0, count * m::<F>());
    assert!(!above(&table, &crossbeam_epoch::pin()).has_slab());
}

pub(super) fn a_place_is_used_again_when_nobody_holds_the_table_there<F: Format>() {
    if F::TABLE_LG2 != 12 {
        return;
    }
    let table = Table::<F>::new();
    map(&table, 0, 8 * m::<F>());
    let before = places(&table);
    let hold = {
        let guard = crossbeam_epoch::pin();
        let above = above(&table, &guard);
        let entry = above[0].load(Ordering::Acquire);
        above.below::<F>(entry, &guard).hold::<F>(0)
    };
    let first = range(0, m::<F>());
    let merge_and_split = |free: bool| {
        table.merge(first, F::size(1), |_, _, _| ()).unwrap();
        assert_eq!(places(&table).len(), 7);
        // The entry's own hold ends when all threads that were pinned have left, those of other
        // tests too.
        while free && !above(&table, &crossbeam_epoch::pin()).is_free(0) {
            crossbeam_epoch::pin().flush();
            std::thread::yield_now();
        }
        table.split(first, F::PAGE, |_, _| ()).unwrap();
        places(&table)
    };
    table.set_dirty(iova(0)).unwrap();
    let apart = merge_and_split(false);
    assert_ne!(apart[0], before[0], "the place is held");
    assert_eq!(apart[1..], before[1..]);
    // The held table is as it was, dirty bits too.
    assert!(
        hold.iter()
            .all(|slot| F::is_present(slot.load(Ordering::Relaxed)))
    );
    assert!(F::is_dirty(hold[0].load(Ordering::Relaxed)));
    drop(hold);
    assert_eq!(merge_and_split(true), before, "the place is free");
    assert_eq!(dirty(&table, first, true).0, pages::<F>(0, m::<F>()));
}

pub(super) fn a_table_that_is_held_outlives_its_slab_mates<F: Format>() {
    let table = Table::<F>::new();
    map(&table, 0, 8 * m::<F>());
    let hold = {
        let guard = crossbeam_epoch::pin();
        let above = above(&table, &guard);
        let entry = above[5].load(Ordering::Acquire);
        above.below::<F>(entry, &guard).hold::<F>(0)
    };
    drop(table);
    assert!(
        hold.iter()
            .all(|slot| F::is_present(slot.load(Ordering::Relaxed)))
    );
}
