//! Model checking of discards. As in `loom.rs`, each model is run again with single steps left out,
//! and must fail then.
//!
//! The storage is a number. A drop takes what is there: what it does not see lands after it.
#![cfg(dirtymap_loom)]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common_loom;

use common_loom::{OnePage, Source};
use dirtymap::harvest::Content;
use dirtymap::sync::model::{Bound, holds_within};
use dirtymap::sync::{Arc, AtomicU64, Ordering::Relaxed, Step, thread};
use dirtymap::{
    Access, AddressSpace, Consumer, Granule, HarvestRequest, Iova, IovaRange, Lease, Owed, Rounds,
    Start, UserBitmap,
};

const PAGE: Granule = Granule::K4;
const BOUND: Bound = Bound::between(1, 1);

fn page(n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(n << 12), 1 << 12).unwrap()
}

/// A space of one page.
fn space() -> AddressSpace {
    let space = AddressSpace::tracked(PAGE);
    space.map(page(0), 0, Access::ReadWrite).unwrap();
    space
}

/// Syncs `lease`, brings `copy` up to date with `data`, and commits.
fn finish(lease: Lease<'_, Owed>, data: &AtomicU64, copy: &mut u64) {
    let lease = lease.sync().unwrap();
    let content = lease.contents().next().map(|(_, content)| content);
    match content {
        None => {}
        Some(Content::Zero) => *copy = 0,
        Some(Content::Data) => *copy = data.load(Relaxed),
    }
    lease.commit();
}

/// Harvests page 0 for `consumer`.
fn harvest(consumer: &Consumer<'_>, data: &AtomicU64, copy: &mut u64) {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(0), PAGE);
    let lease = consumer.harvest(&request, UserBitmap::shared(&words));
    finish(lease.unwrap(), data, copy);
}

/// The same for the unnamed consumer.
fn harvest_unnamed(space: &AddressSpace, data: &AtomicU64, copy: &mut u64) {
    let words = [AtomicU64::new(0)];
    let request = HarvestRequest::new(page(0), PAGE);
    let lease = space.harvest(&request, UserBitmap::shared(&words));
    finish(lease.unwrap(), data, copy);
}

/// A CPU writes a page that is marked already, and its mark finds it so, while the page is
/// discarded: the write is part of what is dropped, or the page is dirty afterwards.
#[test]
fn a_mark_that_is_skipped_is_dropped_or_dirty() {
    holds_within(BOUND, &[Step::MarkFence, Step::DiscardFence], || {
        let space = Arc::new(space());
        let area = space.area(Iova::MIN).unwrap();
        area.mark(page(0)).unwrap();
        let data = Arc::new(AtomicU64::new(1));
        let writer = thread::spawn({
            let data = data.clone();
            move || {
                data.store(2, Relaxed);
                area.mark(page(0)).unwrap();
            }
        });
        let mut dropped = 0;
        let drop_storage = || {
            dropped = data.load(Relaxed);
            Ok(())
        };
        space.discard(page(0), drop_storage).unwrap();
        writer.join().unwrap();
        let lands = if dropped == 2 { 0 } else { 2 };
        let mut copy = 1;
        harvest_unnamed(&space, &AtomicU64::new(lands), &mut copy);
        copy == lands
    });
}

/// A harvest has seen the mark of a page. The page is discarded, and written again. The clear of
/// that harvest may take the new mark: then its lease has data.
#[test]
fn a_harvest_that_is_late_does_not_say_zero() {
    holds_within(BOUND, &[Step::TakenIsData], || {
        let space = Arc::new(space());
        space.discard(page(0), || Ok(())).unwrap();
        space.mark(page(0)).unwrap();
        let data = Arc::new(AtomicU64::new(1));
        let harvester = thread::spawn({
            let (space, data) = (space.clone(), data.clone());
            move || {
                let mut copy = 1;
                harvest_unnamed(&space, &data, &mut copy);
                copy
            }
        });
        let drop_storage = || {
            data.store(0, Relaxed);
            Ok(())
        };
        space.discard(page(0), drop_storage).unwrap();
        data.store(2, Relaxed);
        space.mark(page(0)).unwrap();
        let mut copy = harvester.join().unwrap();
        harvest_unnamed(&space, &data, &mut copy);
        copy == 2
    });
}

/// The same for the first discard of the space: the harvest may not know of discards.
#[test]
fn a_harvest_that_knows_no_discards_does_not_say_zero() {
    holds_within(BOUND, &[Step::WaitForUnaware], || {
        let space = Arc::new(space());
        space.mark(page(0)).unwrap();
        let data = Arc::new(AtomicU64::new(1));
        let harvester = thread::spawn({
            let (space, data) = (space.clone(), data.clone());
            move || {
                let mut copy = 1;
                harvest_unnamed(&space, &data, &mut copy);
                copy
            }
        });
        // The harvest begins first.
        thread::yield_now();
        let drop_storage = || {
            data.store(0, Relaxed);
            Ok(())
        };
        space.discard(page(0), drop_storage).unwrap();
        data.store(2, Relaxed);
        space.mark(page(0)).unwrap();
        let mut copy = harvester.join().unwrap();
        harvest_unnamed(&space, &data, &mut copy);
        copy == 2
    });
}

/// A page was discarded and then written, before two harvests of two consumers begin. Both copy the
/// write, though one of them takes the mark while the other looks.
#[test]
fn a_page_that_is_seen_in_other_hands_is_data() {
    holds_within(BOUND, &[Step::SeenIsData, Step::TakenIsData], || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        let data = Arc::new(AtomicU64::new(0));
        space.discard(page(0), || Ok(())).unwrap();
        data.store(2, Relaxed);
        space.mark(page(0)).unwrap();
        let other = thread::spawn({
            let data = data.clone();
            move || {
                let mut copy = 1;
                harvest(&one, &data, &mut copy);
                copy
            }
        });
        let mut copy = 1;
        harvest_unnamed(&space, &data, &mut copy);
        other.join().unwrap() == 2 && copy == 2
    });
}

/// A harvest runs while a page is discarded that was written before. A harvest that follows leaves
/// the copy as the storage is, whatever the first one found.
#[test]
fn a_discard_is_told_to_every_consumer() {
    holds_within(BOUND, &[Step::TellDiscard], || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        let data = Arc::new(AtomicU64::new(1));
        space.mark(page(0)).unwrap();
        let other = thread::spawn({
            let data = data.clone();
            move || {
                let mut copy = 5;
                harvest(&one, &data, &mut copy);
                (one, copy)
            }
        });
        let drop_storage = || {
            data.store(0, Relaxed);
            Ok(())
        };
        space.discard(page(0), drop_storage).unwrap();
        let (one, mut copy) = other.join().unwrap();
        // It was written before that harvest began.
        let told = copy != 5;
        harvest(&one, &data, &mut copy);
        let mut unnamed = 5;
        harvest_unnamed(&space, &data, &mut unnamed);
        told && copy == 0 && unnamed == 0
    });
}

/// A discard fails while a consumer looks at its lease: the storage is not dropped, and the page is
/// not zero.
#[test]
fn a_discard_that_fails_is_never_zero() {
    let steps = [Step::DoubtDiscards, Step::LookAgainForZero];
    holds_within(Bound::between(2, 2), &steps, || {
        let space = Arc::new(space());
        let one = Consumer::shared(space.clone(), "one", Start::Clean).unwrap();
        // The first discard ends before.
        space.discard(page(0), || Ok(())).unwrap();
        space.mark(page(0)).unwrap();
        let lease = one.rounds().next().unwrap();
        let other = thread::spawn(move || {
            let content = lease.contents().next().map(|(_, content)| content);
            lease.commit();
            content == Some(Content::Data)
        });
        let failed = space.discard(page(0), || Err(std::io::ErrorKind::Other.into()));
        failed.is_err() && other.join().unwrap()
    });
}

/// A lease that owes its flush has taken the dirty bit, while a page is discarded. The device
/// writes after that: by a cached "D is set", unless the discard has flushed.
#[test]
fn a_device_that_writes_after_a_discard_sets_d_anew() {
    holds_within(BOUND, &[Step::FlushAtDiscard], || {
        let hardware = OnePage::new(false);
        let space = Arc::new(AddressSpace::with_source(PAGE, Source(hardware.clone())).unwrap());
        space.map(page(0), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        hardware.device_writes(1);
        let harvester = thread::spawn({
            let space = space.clone();
            move || Rounds::shared(space).harvest().unwrap()
        });
        let drop_storage = || {
            hardware.data.store(0, Relaxed);
            Ok(())
        };
        space.discard(page(0), drop_storage).unwrap();
        hardware.device_writes(3);
        let mut copy = 5;
        finish(harvester.join().unwrap(), &hardware.data, &mut copy);
        harvest_unnamed(&space, &hardware.data, &mut copy);
        copy == 3
    });
}

/// A page was discarded, and then a device wrote to it while its domain did not track. A consumer
/// looks at its lease while the domain starts to track: nothing reports that write later, so the
/// page is data.
#[test]
fn a_page_that_was_written_untracked_is_never_zero() {
    holds_within(Bound::between(2, 2), &[Step::DoubtRestart], || {
        let hardware = OnePage::new(false);
        let space = Arc::new(AddressSpace::new(PAGE));
        let domain = space.attach(Source(hardware.clone())).unwrap();
        space.map(page(0), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        space.discard(page(0), || Ok(())).unwrap();
        let lease = Rounds::shared(space.clone()).next().unwrap();
        space.stop_domain_tracking(domain).unwrap();
        hardware.device_writes(1);
        let starter = thread::spawn(move || space.start_domain_tracking(domain).unwrap());
        let content = lease.contents().next().map(|(_, content)| content);
        lease.commit();
        starter.join().unwrap();
        content == Some(Content::Data)
    });
}
