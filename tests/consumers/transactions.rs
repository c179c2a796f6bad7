//! What was read and not saved.

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

/// The logs of all slots were fetched one after the other, and the list of results made into a
/// result of a list. When one failed, those before it had been read, were thus clear, and went with
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
    // A consumer that leaves with the error of the sync, by a question mark, puts the lease back.
    assert!(lease.sync().is_err());
    high.broken.store(false, SeqCst);
    assert_eq!(
        take(&space, pages(0, 64)),
        [pages(3, 2), pages(9, 1), pages(40, 1)]
    );
}

/// The same inside one log: it fails half-way.
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
    // What was read can be used, too.
    let lease = lease.partial().sync().unwrap();
    assert!(lease.runs().eq([pages(33, 1)]));
    lease.commit();
    high.broken.store(false, SeqCst);
    assert_eq!(take(&space, pages(0, 64)), [pages(50, 1)]);
}

/// A snapshot failed when the logs had been read: the disk was full. The next one said of those
/// pages that they had not changed. A second snapshot after one that failed half-way needs all that
/// the first did not finish, and nothing of what it did.
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
/// synced after that. Where the sync failed, the pages were neither on the disk nor dirty.
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
        // ... every run is written here, without an error; and then:
        fsync.map_err(Error::source_failed)?;
        lease.commit();
        Ok(())
    };
    let failed = snapshot(Err(std::io::Error::other("write back failed")));
    // The error borrows nothing of the snapshot any more, and the page is dirty again.
    assert!(failed.is_err());
    snapshot(Ok(())).unwrap();
    assert_eq!(take(&space, pages(0, 64)), []);
}

/// A migration failed in its last round, and the guest went on at the source. The second migration
/// believed the dirty state, which the first had cleared: the guest at the target had old pages,
/// and died of them.
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
    // The connection breaks: nobody knows what arrived.
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

/// To follow a change of its map, tracking was stopped and started again. What was dirty between
/// the last look and the stop was lost, since the start cleans the slate.
#[test]
fn what_is_dirty_when_tracking_stops_is_there_for_a_last_harvest() {
    let (space, low, _) = two_slots();
    low.write(pages(2, 1));
    space.mark(pages(20, 1)).unwrap();
    space.stop_tracking().unwrap();
    assert_eq!(take(&space, pages(0, 64)), [pages(2, 1), pages(20, 1)]);
    // And a change of the map needs no stop.
    space.start_tracking().unwrap();
    space.mark(pages(21, 1)).unwrap();
    space.map(pages(64, 8), 0, RW).unwrap();
    space.mark(pages(70, 1)).unwrap();
    assert_eq!(take(&space, pages(0, 72)), [pages(21, 1), pages(70, 1)]);
}
