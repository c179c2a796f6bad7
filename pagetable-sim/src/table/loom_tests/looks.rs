//! Models of a look at what another thread has made of a leaf that a third one took. A harvest
//! records a leaf before it clears D. So a thread that finds no D, and then performs
//! `fence(Acquire)`, sees the record: that is how a harvest for one consumer finds what a harvest
//! for another one has taken. It holds also if the thread reads another entry than the one whose D
//! was cleared: the leaf that came from it by a merge, or the quiet entry above.
//!
//! The main thread is pinned from the start on, because a pin is a full fence.

use dirtymap::sync::relax;

use super::*;
use crate::table::leaf::DirtyLeaf;

/// Records page 1, and clears its D.
fn takes(table: &Table<AmdV1>, record: &AtomicU64) {
    // Relaxed: the clear publishes it.
    record.store(0b10, Ordering::Relaxed);
    // SAFETY: the main thread is pinned until all others have ended, so no table is freed.
    let guard = unsafe { crossbeam_epoch::unprotected() };
    let found = table.walk(page(1).start(), guard).unwrap();
    let leaf = DirtyLeaf {
        group: found.group::<AmdV1>(),
        level: found.level,
        span: found.range::<AmdV1>(),
        size: found.size::<AmdV1>(),
    };
    leaf.clear::<AmdV1>();
}

/// Page 1 of two is dirty. One thread takes it, the main thread runs `changes`, which records what
/// it takes, and then a third thread looks at both pages. Returns whether the third one finds page
/// 1, or sees it in the record of another one.
fn is_found_or_recorded(
    table: Arc<Table<AmdV1>>,
    changes: fn(&Table<AmdV1>, &[AtomicU64; 1]),
) -> bool {
    let records = Arc::new([[AtomicU64::new(0)], [AtomicU64::new(0)]]);
    let taker = thread::spawn({
        let (table, records) = (Arc::clone(&table), Arc::clone(&records));
        move || takes(&table, &records[0][0])
    });
    // Relaxed: the main thread goes second, and may still see the old D.
    while bits(&records[0]) == 0 {
        relax();
    }
    changes(&table, &records[1]);
    let looker = thread::spawn({
        move || {
            let words = [AtomicU64::new(0)];
            harvest(&table, pages(0, 2), &words);
            // Acquire: as in `harvest::shared` of the library.
            fence(Ordering::Acquire);
            bits(&words) | bits(&records[0]) | bits(&records[1])
        }
    });
    let found = looker.join().unwrap();
    taker.join().unwrap();
    found & 0b10 != 0
}

/// The main thread looks at both pages too. It may find both clean, and then the entry above is
/// quiet and the third one skips it.
fn a_skip_after_a_look_that_found_nothing() -> bool {
    let _pinned = crossbeam_epoch::pin();
    let table = Arc::new(Table::skipping());
    assert!(map(&table, pages(0, 2), leaves_of(1)));
    let mut cached: Vec<TableRef<AmdV1>> = Vec::new();
    let read = table.walk_from(None, walk(0, false, true), Some(&mut cached));
    harvest(&table, pages(0, 2), &[AtomicU64::new(0)]);
    // A write by the cached pointer, before the flush of pointers reaches the device: A is clear.
    table.flush_begins(&[pages(0, 2)]);
    let written = table.walk_from(cached.first(), walk(1, true, true), None);
    table.flush_ends(&[pages(0, 2)]);
    assert!(read.is_ok() && written.is_ok());
    is_found_or_recorded(table, |table, record| drop(harvest(table, pages(0, 2), record)))
}

/// The main thread merges the two pages, which are read-only by now, so that the merged leaf is
/// clean if it finds both clean.
fn a_look_at_a_leaf_that_was_merged_clean() -> bool {
    let _pinned = crossbeam_epoch::pin();
    let table = new::<AmdV1>(&[(pages(0, 2), leaves_of(1))]);
    table.set_dirty(page(1).start());
    table
        .protect(pages(0, 2), Access::Read, |_, _| ())
        .unwrap();
    is_found_or_recorded(table, |table, _| {
        table.merge(pages(0, 2), leaves_of(2), |_, _, _| ()).unwrap();
    })
}

#[test]
fn what_is_found_clean_was_recorded() {
    holds_within(ONCE, &[], a_skip_after_a_look_that_found_nothing);
    holds_within(ONCE, &[], a_look_at_a_leaf_that_was_merged_clean);
}

/// A device has cached "D is set" for a leaf of two entries, by the D of the second one, and writes
/// by that. A split sets D in the first one before the second is replaced. So of two harvests, one
/// after the other, that take the second one as a page alone, the later one finds the first.
fn two_harvests_beside_a_split_of_a_group() -> bool {
    let _pinned = crossbeam_epoch::pin();
    let table = new::<Grouped>(&[(pages(0, 2), leaves_of(2))]);
    let written = table.walk_from(None, walk(1, true, true), None);
    assert!(written.is_ok());
    let harvester = thread::spawn({
        let table = Arc::clone(&table);
        move || {
            let _pinned = crossbeam_epoch::pin();
            let words = [AtomicU64::new(0)];
            harvest(&table, pages(0, 2), &words);
            harvest(&table, pages(0, 2), &words);
            bits(&words)
        }
    });
    table.split_at(page(1).start(), |_, _| ()).unwrap();
    harvester.join().unwrap() == 0b11
}

#[test]
fn a_harvest_of_a_part_sees_the_others_dirty() {
    holds_within(ONCE, &[], two_harvests_beside_a_split_of_a_group);
}
