//! Models of what a harvest may conclude from an entry of which another thread made something. A
//! pin of the epoch is a full fence, so the threads are pinned from their starts on.

use super::*;

/// The change of a quiet entry published nothing, so a harvest that skipped it missed the record.
/// A harvest takes page 1 and makes the entry above quiet, while another one looks, which may skip
/// it. A harvest records a leaf before it clears D. So the one that finds no D, and then performs
/// `fence(Acquire)`, sees the record: that is how a harvest for one consumer finds what a harvest
/// for another one has taken.
fn a_skip_after_a_look_that_took_a_page() -> bool {
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
    let record = Arc::new([AtomicU64::new(0)]);
    let looker = thread::spawn({
        let (table, record) = (Arc::clone(&table), Arc::clone(&record));
        move || {
            let words = [AtomicU64::new(0)];
            harvest(&table, pages(0, 2), &words);
            // Acquire: as in `harvest::shared` of the library.
            fence(Ordering::Acquire);
            bits(&words) | bits(&record)
        }
    });
    harvest(&table, pages(0, 2), &record);
    let found = looker.join().unwrap();
    read.is_ok() && written.is_ok() && found == 0b10
}

#[test]
fn what_a_harvest_skips_was_recorded() {
    holds_within(ONCE, &[], a_skip_after_a_look_that_took_a_page);
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
