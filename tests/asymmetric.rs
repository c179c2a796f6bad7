//! Marks without a fence, ordered by `membarrier(2)`: the same answers, and no lost write by real
//! threads.
#![cfg(all(feature = "membarrier", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::space::MarkOrdering;
use dirtymap::{Access, AddressSpace, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

fn space() -> (AddressSpace, IovaRange) {
    let page = IovaRange::from_len(Iova::MIN, 4096).unwrap();
    let space = AddressSpace::new(Granule::K4).with_asymmetric_marks();
    space.map(page, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (space, page)
}

/// Harvests; copies `data` if its page was dirty.
fn pass(space: &AddressSpace, page: IovaRange, data: &AtomicU64, copy: &mut u64) {
    let mut words = [0u64];
    let request = HarvestRequest::new(page, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    if lease.dirty() == 1 {
        *copy = data.load(Relaxed);
    }
    lease.commit();
}

#[test]
fn a_space_says_what_it_uses() {
    assert_eq!(
        AddressSpace::new(Granule::K4).mark_ordering(),
        MarkOrdering::Fences
    );
    let (space, _) = space();
    println!("marks are ordered by {:?}", space.mark_ordering());
}

/// The writer pauses now and then, after it has marked its last write. One more pass must copy that
/// write.
#[test]
fn the_last_write_is_copied() {
    let (space, page) = space();
    let handle = space.area(Iova::MIN).unwrap();
    let data = AtomicU64::new(0);
    // The round in which the writer may write, and the round that it has finished.
    let (round, finished) = (AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut written = 0;
            while !stop.load(Relaxed) {
                let now = round.load(std::sync::atomic::Ordering::Acquire);
                if now == finished.load(Relaxed) {
                    std::hint::spin_loop();
                    continue;
                }
                for _ in 0..200 {
                    written += 1;
                    data.store(written, Relaxed);
                    handle.mark(page).unwrap();
                }
                finished.store(now, std::sync::atomic::Ordering::Release);
            }
        });
        let began = Instant::now();
        let mut copy = 0;
        let mut now = 0;
        while began.elapsed() < Duration::from_millis(300) {
            now += 1;
            round.store(now, std::sync::atomic::Ordering::Release);
            while finished.load(std::sync::atomic::Ordering::Acquire) != now {
                pass(&space, page, &data, &mut copy);
            }
            pass(&space, page, &data, &mut copy);
            assert_eq!(copy, data.load(Relaxed), "round {now}");
        }
        stop.store(true, Relaxed);
    });
}
