//! Pages that were read and cleared, and not saved.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use dirtymap::{AddressSpace, Error, Granule, HarvestRequest, IovaRange, UserBitmap};

use crate::logs::{Log, dirty_bytes};
use crate::{PAGE, RW, pages, take};

/// A space of 64 pages over the logs of two slots, the second of which begins with page 32.
fn two_slots() -> (AddressSpace, Arc<Log>, Arc<Log>) {
    let low = Arc::new(Log::new(pages(0, 32), Granule::K4));
    let high = Arc::new(Log::new(pages(32, 32), Granule::K4));
    let space = AddressSpace::new(Granule::K4);
    for (log, slot) in [(&low, pages(0, 32)), (&high, pages(32, 32))] {
        space.attach(log.clone()).unwrap();
        space.map(slot, 0, RW).unwrap();
    }
    space.start_tracking().unwrap();
    (space, low, high)
}

/// The logs of all slots were fetched one after the other, and collected into a result of a list.
/// When one fetch failed, the logs before it were clear already, and their pages were dropped with
/// the list. Elsewhere a question mark between two logs did the same.
#[test]
fn a_log_that_fails_does_not_take_those_before_it_along() {
    let (space, low, high) = two_slots();
    low.write(pages(3, 2));
    space.mark(pages(9, 1)).unwrap();
    high.write(pages(40, 1));
    high.broken.store(true, SeqCst);
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease.stopped().unwrap();
    assert_eq!(stopped.at, pages(32, 1).start());
    assert_eq!(dirty_bytes(&low), 0, "it has been read");
    // A consumer that returns the error of the sync by a question mark puts the pages of the lease
    // back.
    assert!(lease.sync().is_err());
    high.broken.store(false, SeqCst);
    assert_eq!(
        take(&space, pages(0, 64)),
        [pages(3, 2), pages(9, 1), pages(40, 1)]
    );
}

/// The same within one log, which fails half-way.
#[test]
fn a_log_that_fails_half_way_keeps_what_it_did_not_say() {
    let (space, _, high) = two_slots();
    high.write(pages(33, 1));
    high.write(pages(50, 1));
    high.broken_at.store(40 * PAGE, SeqCst);
    high.broken.store(true, SeqCst);
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease.stopped().unwrap();
    assert_eq!(stopped.at.get(), 40 * PAGE);
    // The part that was read can be used as well.
    let lease = lease.partial().sync().unwrap();
    assert!(lease.runs().eq([pages(33, 1)]));
    lease.commit();
    high.broken.store(false, SeqCst);
    assert_eq!(take(&space, pages(0, 64)), [pages(50, 1)]);
}

/// A snapshot failed after it had read the logs: the disk was full. The next snapshot took those
/// pages for unchanged. After a snapshot that failed half-way, the next one needs exactly the pages
/// that the first one did not save.
#[test]
fn a_save_that_fails_half_way_puts_back_what_it_did_not_save() {
    let (space, low, high) = two_slots();
    low.write(pages(1, 4));
    high.write(pages(60, 4));
    space.mark(pages(30, 4)).unwrap();
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    let mut room = 6 * u128::from(PAGE);
    let save = |run: IovaRange| -> Result<(), std::io::Error> {
        room = room
            .checked_sub(run.len())
            .ok_or(std::io::ErrorKind::StorageFull)?;
        Ok(())
    };
    let mut save = save;
    let outcome = lease.runs().try_for_each(|run| {
        save(run)?;
        lease.commit_range(run);
        Ok::<_, std::io::Error>(())
    });
    assert!(outcome.is_err());
    drop(lease);
    assert_eq!(take(&space, pages(0, 64)), [pages(30, 4), pages(60, 4)]);
}

/// The marks were reset when the pages had been written to the file, and the file was flushed and
/// synced after that. If the sync failed, the pages were neither on the disk nor dirty.
#[test]
fn pages_stay_dirty_until_the_file_is_on_the_disk() {
    let (space, low, _) = two_slots();
    low.write(pages(7, 1));
    let snapshot = |fsync: Result<(), std::io::Error>| -> Result<(), Error> {
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 64), Granule::K4);
        let lease = space.harvest(&request, UserBitmap::new(&mut words))?;
        let lease = lease.sync()?;
        assert!(lease.runs().eq([pages(7, 1)]));
        // Each run is written here, without an error. Then the sync of the file fails.
        fsync.map_err(Error::source_failed)?;
        lease.commit();
        Ok(())
    };
    let failed = snapshot(Err(std::io::Error::other("write back failed")));
    // The error borrows nothing of the snapshot, and the page is dirty again.
    assert!(failed.is_err());
    snapshot(Ok(())).unwrap();
    assert_eq!(take(&space, pages(0, 64)), []);
}

/// A migration failed in its last round, and the guest went on at the source. The second migration
/// relied on the dirty state, which the first one had cleared: the guest at the target had old
/// pages, and crashed.
#[test]
fn a_second_migration_after_one_that_failed_sends_what_the_first_had_taken() {
    let (space, low, high) = two_slots();
    let mut source: BTreeMap<u64, u64> = (0..64).map(|page| (page, 0)).collect();
    let write = |source: &mut BTreeMap<u64, u64>, page: u64, value: u64| {
        source.insert(page, value);
        match page {
            0..32 => low.write(pages(page, 1)),
            32..48 => high.write(pages(page, 1)),
            _ => space.mark(pages(page, 1)).unwrap(),
        }
    };
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    // Both targets have the first copy.
    let mut target = source.clone();
    for (page, value) in [(5, 1), (40, 1), (50, 1)] {
        write(&mut source, page, value);
    }
    let mut words = [0u64];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    assert_eq!(lease.dirty(), 3);
    // The connection breaks: it is unknown which pages arrived.
    let back = lease.abort();
    assert_eq!((back.bytes, back.outside_bytes), (3 * PAGE, 0));
    write(&mut source, 6, 2);
    for run in take(&space, pages(0, 64)) {
        for page in run.start().get() / PAGE..=run.last().get() / PAGE {
            target.insert(page, source[&page]);
        }
    }
    assert_eq!(target, source);
}

/// To follow a change of the memory map, tracking was stopped and started again. The start makes
/// everything clean, so pages that were dirtied between the last harvest and the stop were lost.
#[test]
fn what_is_dirty_when_tracking_stops_is_there_for_a_last_harvest() {
    let (space, low, _) = two_slots();
    low.write(pages(2, 1));
    space.mark(pages(20, 1)).unwrap();
    space.stop_tracking().unwrap();
    assert_eq!(take(&space, pages(0, 64)), [pages(2, 1), pages(20, 1)]);
    // A change of the map needs no stop.
    space.start_tracking().unwrap();
    space.mark(pages(21, 1)).unwrap();
    space.map(pages(64, 8), 0, RW).unwrap();
    space.mark(pages(70, 1)).unwrap();
    assert_eq!(take(&space, pages(0, 72)), [pages(21, 1), pages(70, 1)]);
}
