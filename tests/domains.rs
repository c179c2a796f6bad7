//! Domains that come and go, their own switches, and harvests of one of them.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::flush::FlushCost;
use dirtymap::{
    Access, AddressSpace, DomainId, Error, Granule, HarvestRequest, Iova, IovaRange, Scope,
    UserBitmap,
};
use std::sync::Arc;

const RW: Access = Access::ReadWrite;

/// Sixteen mapped and tracked pages over two sources, and the ids of the two domains.
fn tracked() -> (AddressSpace, Arc<Fake>, Arc<Fake>, DomainId, DomainId) {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    let ids = space.domains();
    (space, first, second, ids[0], ids[1])
}

fn request(scope: Scope) -> HarvestRequest<'static> {
    HarvestRequest::new(pages(0, 16), Granule::K4).in_scope(scope)
}

/// Harvests and commits.
fn take(space: &AddressSpace, scope: Scope) -> u64 {
    let mut words = [0u64];
    let lease = space.harvest(&request(scope), UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    words[0]
}

fn abort(space: &AddressSpace, scope: Scope) -> u64 {
    let mut words = [0u64];
    let lease = space.harvest(&request(scope), UserBitmap::new(&mut words));
    lease.unwrap().abort();
    words[0]
}

fn peek(space: &AddressSpace, scope: Scope) -> u64 {
    let mut words = [0u64];
    space
        .peek(&request(scope), UserBitmap::new(&mut words))
        .unwrap();
    words[0]
}

/// Linux lost dirty pages when a domain for one process was attached to a nested parent that
/// tracked: the new attachment did not know that tracking was on.
#[test]
fn a_domain_that_comes_late_is_filled_once_and_tracks() {
    let (space, first, ..) = tracked();
    space.map(pages(20, 2), 0, RW).unwrap();
    let late = Arc::new(Fake::default());
    let id = space.attach(late.clone()).unwrap();
    assert_eq!(
        late.with(|s| s.mapped.clone()),
        [pages(0, 16), pages(20, 2)]
    );
    assert!(late.with(|s| s.tracking));
    space.map(pages(30, 1), 0, RW).unwrap();
    assert_eq!(late.with(|s| s.mapped.len()), 3);
    assert_eq!(first.with(|s| s.mapped.len()), 3);
    late.dirty(5);
    assert_eq!(take(&space, Scope::Domain(id)), 1 << 5);
    space.unmap_discarding(IovaRange::ALL).unwrap();
    assert!(late.with(|s| s.mapped.is_empty()));
}

#[test]
fn a_source_is_attached_once_at_a_time() {
    let (space, first, _, a, _) = tracked();
    let error = space.attach(first.clone()).unwrap_err();
    assert!(matches!(error, Error::AttachedTwice { domain } if domain == a));
    assert_eq!(error.errno(), 17);
    assert_eq!(first.with(|s| s.mapped.clone()), [pages(0, 16)]);
    space.detach(a).unwrap();
    let again = space.attach(first.clone()).unwrap();
    assert_ne!(again, a, "an id is not given twice");
    let error = space.detach(a).unwrap_err();
    assert!(matches!(error, Error::NotAttached { domain } if domain == a));
    assert_eq!(error.errno(), 2);
}

#[test]
fn detach_moves_what_is_dirty_to_the_marks_after_the_debt() {
    let (space, first, second, a, b) = tracked();
    first.dirty(3);
    second.dirty(4);
    space.mark(pages(5, 1)).unwrap();
    space.detach(a).unwrap();
    assert_eq!(first.with(|s| s.invalidated.clone()), [pages(0, 16)]);
    assert!(first.with(|s| s.mapped.is_empty() && !s.tracking));
    assert_eq!(space.domains(), [b]);
    assert_eq!(take(&space, Scope::Domain(b)), 1 << 4);
    assert_eq!(take(&space, Scope::All), 1 << 3 | 1 << 5);
    space.map(pages(20, 1), 0, RW).unwrap();
    assert!(first.with(|s| s.mapped.is_empty()));
}

#[test]
fn a_lease_that_is_aborted_after_its_domain_went_is_dirty_again() {
    for scope in [Scope::All, Scope::Domain(tracked().3)] {
        let (space, first, _, a, _) = tracked();
        let scope = match scope {
            Scope::All => Scope::All,
            Scope::Domain(_) => Scope::Domain(a),
        };
        first.dirty(3);
        let mut words = [0u64];
        let lease = space
            .harvest(&request(scope), UserBitmap::new(&mut words))
            .unwrap();
        space.detach(a).unwrap();
        assert_eq!(take(&space, Scope::All), 0);
        assert_eq!(lease.abort().bytes, PAGE);
        assert_eq!(take(&space, Scope::All), 1 << 3);
    }
}

#[test]
fn a_detach_that_cannot_flush_can_be_repeated() {
    let (space, first, _, a, b) = tracked();
    first.dirty(3);
    first.with(|s| s.fail_invalidations = 1);
    assert_eq!(space.detach(a).unwrap_err().errno(), 5);
    assert_eq!(space.domains(), [a, b]);
    // It is not filled with later areas, and flushes still include it.
    space.map(pages(20, 1), 0, RW).unwrap();
    assert!(first.with(|s| s.mapped.is_empty() && s.invalidated.is_empty()));
    space.detach(a).unwrap();
    assert_eq!(first.with(|s| s.invalidated.clone()), [pages(0, 16)]);
    assert_eq!(take(&space, Scope::All), 1 << 3);
}

#[test]
fn an_attach_that_is_refused_leaves_nothing_behind() {
    let (space, ..) = tracked();
    space.map(pages(20, 2), 0, RW).unwrap();
    let refusing = Arc::new(Fake::default());
    refusing.with(|s| s.refuse_map = true);
    assert_eq!(space.attach(refusing.clone()).unwrap_err().errno(), 5);
    refusing.with(|s| (s.refuse_map, s.refuse_tracking) = (false, true));
    assert_eq!(space.attach(refusing.clone()).unwrap_err().errno(), 5);
    assert!(refusing.with(|s| s.mapped.is_empty() && !s.tracking));
    assert_eq!(space.domains().len(), 2);
    refusing.with(|s| s.refuse_tracking = false);
    space.attach(refusing).unwrap();
}

#[test]
fn the_alignment_follows_the_domains() {
    let space = AddressSpace::new(Granule::K4);
    let coarse = || {
        let fake = Fake::default();
        fake.with(|s| s.page = Some(Granule::from_lg2(14).unwrap()));
        Arc::new(fake)
    };
    space.map(pages(4, 4), 16 * PAGE, RW).unwrap();
    let id = space.attach(coarse()).unwrap();
    assert_eq!(
        (space.page(), space.alignment().bytes()),
        (Granule::K4, 4 * PAGE)
    );
    let refused = |range, backing| space.map(range, backing, RW).unwrap_err();
    assert!(
        matches!(refused(pages(9, 4), 0), Error::Unaligned { granule, .. }
            if granule.bytes() == 4 * PAGE)
    );
    assert!(matches!(refused(pages(8, 3), 0), Error::Unaligned { .. }));
    assert!(matches!(
        refused(pages(8, 4), PAGE),
        Error::UnalignedBacking { .. }
    ));
    assert!(matches!(
        space.map_anywhere(PAGE, 0, RW),
        Err(Error::UnalignedLength { .. })
    ));
    space.start_tracking().unwrap();
    let mut words = [0u64];
    let odd = HarvestRequest::new(pages(4, 1), Granule::K4);
    let refused = space.harvest(&odd, UserBitmap::new(&mut words));
    assert!(matches!(refused, Err(Error::Unaligned { .. })));
    space.detach(id).unwrap();
    assert_eq!(space.alignment(), Granule::K4);
    space.map(pages(9, 1), PAGE, RW).unwrap();
    let error = space.attach(coarse()).unwrap_err();
    assert!(matches!(error, Error::CannotAttach { page, area }
            if page.bytes() == 4 * PAGE && area == pages(9, 1)));
    assert_eq!(error.errno(), 98);
    space.unmap_discarding(pages(9, 1)).unwrap();
    // The memory behind an area counts as well.
    space.map(pages(12, 4), PAGE, RW).unwrap();
    assert_eq!(space.attach(coarse()).unwrap_err().errno(), 98);
    assert!(space.domains().is_empty());
}

#[test]
fn a_domain_is_harvested_alone_and_aborts_are_seen_by_all_it_covered() {
    let (space, first, second, a, b) = tracked();
    let (a, b) = (Scope::Domain(a), Scope::Domain(b));
    first.dirty(1);
    second.dirty(2);
    space.mark(pages(3, 1)).unwrap();
    assert_eq!((peek(&space, a), peek(&space, b)), (1 << 1, 1 << 2));
    assert_eq!(peek(&space, Scope::All), 0b1110);
    assert_eq!(abort(&space, a), 1 << 1);
    assert_eq!((peek(&space, a), peek(&space, b)), (1 << 1, 1 << 2));
    assert_eq!(take(&space, a), 1 << 1);
    assert_eq!((take(&space, a), take(&space, b)), (0, 1 << 2));
    first.dirty(1);
    second.dirty(2);
    // What a lease over everything puts back is found by a harvest of any scope.
    assert_eq!(abort(&space, Scope::All), 0b1110);
    assert_eq!(take(&space, a) & 1 << 1, 1 << 1);
    assert_eq!(take(&space, b) & 1 << 2, 1 << 2);
    assert_eq!(take(&space, Scope::All), 0b1110);
    assert_eq!(take(&space, Scope::All), 0);
    let mut words = [0u64];
    let nobody = Scope::Domain(tracked().0.attach(Arc::new(Fake::default())).unwrap());
    let refused = space.harvest(&request(nobody), UserBitmap::new(&mut words));
    assert!(matches!(refused, Err(Error::NotAttached { .. })));
}

#[test]
fn each_domain_has_a_switch() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, RW).unwrap();
    let (a, b) = (space.domains()[0], space.domains()[1]);
    first.dirty(1);
    space.start_domain_tracking(a).unwrap();
    assert!(first.with(|s| s.tracking && s.dirty.is_empty()));
    assert!(second.with(|s| !s.tracking));
    let mut words = [0u64];
    assert!(matches!(
        space.harvest(&request(Scope::Domain(b)), UserBitmap::new(&mut words)),
        Err(Error::NeverTracked { .. })
    ));
    first.dirty(2);
    space.start_domain_tracking(a).unwrap();
    space.start_tracking().unwrap();
    assert_eq!(
        take(&space, Scope::Domain(a)),
        1 << 2,
        "twice on loses nothing"
    );
    first.dirty(2);
    abort(&space, Scope::Domain(a));
    space.stop_domain_tracking(a).unwrap();
    space.stop_domain_tracking(a).unwrap();
    assert!(first.with(|s| !s.tracking) && second.with(|s| s.tracking));
    assert_eq!(peek(&space, Scope::Domain(a)), 1 << 2, "a last harvest");
    second.dirty(3);
    space.start_domain_tracking(a).unwrap();
    assert_eq!(
        take(&space, Scope::All),
        1 << 3,
        "the baseline of one domain is clean, the others keep theirs"
    );
    space.detach(b).unwrap();
    let error = space.start_domain_tracking(b).unwrap_err();
    assert_eq!(error.errno(), 2);
}

#[test]
fn what_an_area_left_behind_is_not_dirty_in_the_next() {
    let (space, first, _, a, _) = tracked();
    first.dirty(3);
    let mut words = [0u64];
    let lease = space
        .harvest(&request(Scope::Domain(a)), UserBitmap::new(&mut words))
        .unwrap();
    space.unmap_discarding(pages(0, 16)).unwrap();
    assert_eq!(lease.abort().outside_bytes, PAGE);
    space.map(pages(0, 16), 0, RW).unwrap();
    assert_eq!(take(&space, Scope::Domain(a)), 0);
    assert_eq!(space.faults().recent.len(), 1);
    assert_eq!(space.faults().recent[0].at, Iova::new(3 * PAGE));
}

/// An attach checks the areas before it asks the source to track, and again those of the root that
/// it publishes.
#[test]
fn an_area_that_is_mapped_during_an_attach_is_looked_at_too() {
    let (space, ..) = tracked();
    let space = Arc::new(space);
    let late = Arc::new(Fake::default());
    let mapping = Arc::clone(&space);
    late.with(|s| {
        s.page = Some(Granule::from_bytes(2 * PAGE).unwrap());
        s.on_tracking = Some(Box::new(move || {
            mapping.map(pages(21, 1), 0, RW).unwrap();
        }));
    });
    let error = space.attach(late.clone()).unwrap_err();
    assert!(matches!(error, Error::CannotAttach { area, .. } if area == pages(21, 1)));
    assert!(late.with(|s| s.mapped.is_empty() && !s.tracking));
    assert_eq!((space.domains().len(), space.alignment()), (2, Granule::K4));
}

/// The cost of an invalidation is the sum over the domains that are attached now.
#[test]
fn the_cost_of_a_domain_goes_with_it() {
    let dear = Arc::new(Fake::default());
    dear.with(|s| {
        s.flush_cost = FlushCost {
            per_range: 1000,
            per_leaf: 0,
            full: 1,
        }
    });
    let (space, first, ..) = tracked();
    let id = space.attach(dear).unwrap();
    for (detached, full) in [(false, true), (true, false)] {
        if detached {
            space.detach(id).unwrap();
        }
        first.dirty(3);
        first.with(|s| s.invalidated.clear());
        assert_eq!(take(&space, Scope::All), 1 << 3);
        let asked = first.with(|s| s.invalidated.clone());
        assert_eq!(asked == [IovaRange::ALL], full, "{asked:?}");
    }
}
