//! A call with several debts gets several tickets. If another thread flushes in between, their
//! generations differ. All debts have to be paid before addresses are free or a source is dropped.
//! A call that waited for the first ticket only, or for none because the last area owed nothing,
//! freed addresses that devices still reached.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages};
use dirtymap::{
    Access, AddressSpace, Change, Error, Granule, HarvestRequest, IovaRange, UserBitmap,
};
use std::sync::Arc;

const RW: Access = Access::ReadWrite;

/// A tracked space over `sources`, with two areas of four pages, and a separate area at page 100.
fn space(sources: &[&Arc<Fake>]) -> Arc<AddressSpace> {
    let space = AddressSpace::new(Granule::K4);
    for source in sources {
        space.attach(Arc::clone(source)).unwrap();
    }
    for first in [0, 8, 100] {
        space.map(pages(first, 4), first * PAGE, RW).unwrap();
    }
    space.start_tracking().unwrap();
    Arc::new(space)
}

/// Flushes everything that `space` owes now, and clears the record of calls of `source`.
fn flush_between(space: &AddressSpace, source: &Fake) {
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(100, 4), Granule::K4);
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    source.with(|s| s.invalidated.clear());
}

/// Lets `skipped` more unmaps in `source` pass. In the one after them, before its debt is handed
/// over, all earlier debts are flushed.
fn flush_at_unmap(space: &Arc<AddressSpace>, source: &Arc<Fake>, skipped: u32) {
    let (inner, own) = (Arc::downgrade(space), Arc::downgrade(source));
    source.with(|s| {
        s.on_unmap = Some(Box::new(move || {
            let (space, source) = (inner.upgrade().unwrap(), own.upgrade().unwrap());
            match skipped.checked_sub(1) {
                Some(skipped) => flush_at_unmap(&space, &source, skipped),
                None => flush_between(&space, &source),
            }
        }));
    });
}

fn is_invalidated(source: &Fake, range: IovaRange) -> bool {
    source.with(|s| s.invalidated.iter().any(|done| done.covers(range)))
}

/// The debt of the second of two areas is of a later generation.
#[test]
fn an_unmap_waits_for_its_last_area() {
    let source = Arc::new(Fake::default());
    let space = space(&[&source]);
    flush_at_unmap(&space, &source, 1);
    let unmapped = space.unmap_discarding(pages(0, 12)).unwrap();
    assert_eq!(unmapped.areas, 2);
    assert!(is_invalidated(&source, pages(8, 4)));
}

/// The debt of the second of two domains is of a later generation.
#[test]
fn an_unmap_waits_for_its_last_domain() {
    let [first, second] = [Arc::new(Fake::default()), Arc::new(Fake::default())];
    let space = space(&[&first, &second]);
    flush_at_unmap(&space, &second, 0);
    space.unmap_discarding(pages(0, 4)).unwrap();
    assert!(is_invalidated(&second, pages(0, 4)));
}

/// Only the first of two areas owes anything. The second has no translations, because an earlier
/// unmap emptied it and then failed to flush.
#[test]
fn an_unmap_waits_though_its_last_area_owes_nothing() {
    let source = Arc::new(Fake::default());
    let space = space(&[&source]);
    let map = |first| Change::Map {
        range: pages(first, 1),
        backing: 0,
        access: RW,
    };
    source.with(|s| {
        s.refuse_map_at = Some(pages(24, 1));
        s.fail_invalidations = 1;
    });
    assert!(space.apply(&[map(20), map(24)]).is_err());
    assert_eq!(
        source.with(|s| s.mapped.len()),
        3,
        "20 and 24 are taken, and empty"
    );
    // The debt of the batch is paid first, so no other ticket is left to wait for.
    flush_between(&space, &source);
    flush_at_unmap(&space, &source, 0);
    let unmapped = space.unmap_discarding(pages(8, 20)).unwrap();
    assert_eq!(unmapped.areas, 3);
    assert!(is_invalidated(&source, pages(8, 4)));
}

/// A batch of several maps is refused after only the first has been filled.
#[test]
fn a_batch_that_is_taken_back_waits_for_its_first_area() {
    let source = Arc::new(Fake::default());
    let space = space(&[&source]);
    source.with(|s| s.refuse_map_at = Some(pages(24, 1)));
    flush_at_unmap(&space, &source, 0);
    let map = |first| Change::Map {
        range: pages(first, 1),
        backing: 0,
        access: RW,
    };
    let refused = space.apply(&[map(20), map(24)]).unwrap_err();
    assert!(matches!(refused, Error::Change { index: 1, .. }));
    assert!(is_invalidated(&source, pages(20, 1)));
    space.map(pages(20, 1), 0, RW).unwrap();
}

/// A domain is detached. The debt of its last area is of a later generation than the others.
#[test]
fn a_detach_waits_for_its_last_area() {
    let source = Arc::new(Fake::default());
    let space = space(&[&source]);
    let domain = space.domains()[0];
    flush_at_unmap(&space, &source, 2);
    space.detach(domain).unwrap();
    assert!(is_invalidated(&source, pages(100, 4)));
}

/// A domain that refuses its second area has been filled with the first only, so the later areas
/// owe nothing when it is emptied.
#[test]
fn an_attach_that_is_taken_back_waits_for_its_first_area() {
    let source = Arc::new(Fake::default());
    let space = space(&[]);
    source.with(|s| s.refuse_map_at = Some(pages(8, 4)));
    flush_at_unmap(&space, &source, 0);
    assert!(space.attach(source.clone()).is_err());
    assert!(is_invalidated(&source, pages(0, 4)));
    assert_eq!(space.domains(), []);
}

/// Detaches a domain with three areas. While the first area is emptied, `happens` changes the last
/// one. All debts before that of the unmap after `skipped` more are flushed early, as by
/// `flush_at_unmap`.
fn detach_while(happens: fn(&AddressSpace), skipped: u32) -> Arc<Fake> {
    let source = Arc::new(Fake::default());
    let space = space(&[&source]);
    let domain = space.domains()[0];
    let (inner, own) = (Arc::downgrade(&space), Arc::downgrade(&source));
    source.with(|s| {
        s.on_unmap = Some(Box::new(move || {
            let (space, source) = (inner.upgrade().unwrap(), own.upgrade().unwrap());
            happens(&space);
            flush_at_unmap(&space, &source, skipped);
        }));
    });
    space.detach(domain).unwrap();
    assert_eq!(source.with(|s| s.mapped.clone()), []);
    source
}

fn cut_the_last(space: &AddressSpace) {
    assert!(space.cut(pages(102, 1).start()).unwrap());
}

/// An area is cut meanwhile. The debt of its last piece is of a later generation.
#[test]
fn a_detach_waits_for_the_last_piece() {
    let source = detach_while(cut_the_last, 2);
    assert!(is_invalidated(&source, pages(102, 2)));
}

/// An area is cut meanwhile, and the last area in its place owes nothing, because it was mapped
/// when the domain was already leaving.
#[test]
fn a_detach_waits_for_the_last_piece_that_owes() {
    let happens = |space: &AddressSpace| {
        cut_the_last(space);
        space.unmap_discarding(pages(102, 2)).unwrap();
        space.map(pages(102, 2), 0, RW).unwrap();
    };
    let source = detach_while(happens, 1);
    assert!(is_invalidated(&source, pages(100, 2)));
}
