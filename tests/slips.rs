//! Small slips of the hand in `space` that changed the code in one place, and that no other test
//! noticed.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, Change, Consumer, DirtySource, Error, Granule, HarvestRequest, Iova,
    IovaRange, Mapping, Scope, SparseBitmap, Start, Tracking, UserBitmap,
};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};

const RW: Access = Access::ReadWrite;

fn at(page: u64) -> Iova {
    Iova::new(page * PAGE)
}

fn map(range: IovaRange) -> Change {
    Change::Map {
        range,
        backing: 0,
        access: RW,
    }
}

/// Sixteen mapped and tracked pages over two sources.
fn tracked() -> (AddressSpace, Arc<Fake>, Arc<Fake>) {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    (space, first, second)
}

fn request(scope: Scope) -> HarvestRequest<'static> {
    HarvestRequest::new(pages(0, 16), Granule::K4).in_scope(scope)
}

/// Harvests and commits.
fn take(space: &AddressSpace) -> u64 {
    let mut words = [0u64];
    let lease = space.harvest(&request(Scope::All), UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    words[0]
}

/// A cut inside an area that an earlier change of the same batch unmaps cuts nothing. The upper
/// half stayed mapped when the cut took it for a piece of its own.
#[test]
fn a_cut_of_what_the_batch_unmaps_brings_nothing_back() {
    let (space, first, _) = tracked();
    let unmap = Change::Unmap {
        range: pages(0, 16),
    };
    let unmapped = space.apply(&[unmap, Change::Cut { at: at(8) }]).unwrap();
    assert_eq!(unmapped.areas, 1);
    assert_eq!(space.mappings(), []);
    assert!(first.with(|s| s.mapped.is_empty()));
}

/// At the first address of a new area of the same batch there is nothing to cut. Inside of it the
/// cut has to wait.
#[test]
fn a_cut_at_the_start_of_an_area_of_the_batch_is_one_of_nothing() {
    let (space, ..) = two_sources();
    let new = pages(4, 4);
    space.apply(&[map(new), Change::Cut { at: at(4) }]).unwrap();
    assert_eq!(space.mappings()[0].range, new);
    let refused = space.apply(&[map(pages(20, 4)), Change::Cut { at: at(22) }]);
    assert!(refused.is_err());
    assert_eq!(space.mappings().len(), 1);
}

/// A source that refuses an area was never given it, so the undo of the attach takes it from no
/// source.
#[test]
fn an_attach_that_is_refused_unmaps_only_what_it_mapped() {
    let (space, ..) = tracked();
    space.map(pages(20, 4), 0, RW).unwrap();
    let late = Arc::new(Fake::default());
    late.with(|s| s.refuse_map_at = Some(pages(20, 4)));
    late.dirty(2);
    late.dirty(21);
    // Tracking would begin with a clean table.
    space.stop_tracking().unwrap();
    assert!(space.attach(late.clone()).is_err());
    assert_eq!(
        late.with(|s| s.dirty.iter().copied().collect::<Vec<_>>()),
        [21]
    );
}

/// A domain whose tracking begins anew begins clean, though the space has tracked all the time:
/// what an abort had put back for it is discarded, and counted.
#[test]
fn a_domain_that_is_switched_on_with_all_begins_clean() {
    let (space, first, _) = tracked();
    let id = space.domains()[0];
    [3, 4].iter().for_each(|page| first.dirty(*page));
    let mut words = [0u64];
    let lease = space.harvest(&request(Scope::Domain(id)), UserBitmap::new(&mut words));
    lease.unwrap().abort();
    space.mark(pages(5, 1)).unwrap();
    space.stop_domain_tracking(id).unwrap();
    space.start_tracking().unwrap();
    assert_eq!(space.stats().discarded_bytes, 2 * PAGE);
    assert_eq!(
        take(&space),
        1 << 5,
        "a mark stays: the space tracks already"
    );
}

/// If the second domain refuses to track, the first is switched back. One that panics may be on,
/// and is switched back as well.
#[test]
fn a_switch_that_fails_switches_all_back() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, RW).unwrap();
    second.with(|s| s.refuse_tracking = true);
    assert!(space.start_tracking().is_err());
    assert!(!first.with(|s| s.tracking));
    second.with(|s| s.refuse_tracking = false);
    let half_way = Arc::clone(&second);
    let switches = move || {
        half_way.with(|s| s.tracking = true);
        panic!("a switch that panics");
    };
    second.with(|s| s.on_tracking = Some(Box::new(switches)));
    let switched = std::panic::catch_unwind(AssertUnwindSafe(|| space.start_tracking()));
    assert!(switched.is_err());
    assert!(!first.with(|s| s.tracking) && !second.with(|s| s.tracking));
    space.start_tracking().unwrap();
    assert!(first.with(|s| s.tracking) && second.with(|s| s.tracking));
}

/// A mark that extends past its area marks nothing, so the fault names all of it. The error names
/// the first address outside.
#[test]
fn a_mark_past_its_area_is_a_fault_from_its_beginning() {
    let (space, ..) = tracked();
    let handle = space.area(at(0)).unwrap();
    let refused = handle.mark(pages(14, 4));
    assert!(matches!(refused, Err(Error::Outside { at: first }) if first == at(16)));
    let fault = space.faults().recent[0];
    assert_eq!((fault.at, fault.len), (at(14), 4 * PAGE));
    assert_eq!(take(&space), 0);
}

/// The statistics have the commands of all domains.
#[test]
fn each_domain_counts_what_it_invalidates() {
    let (space, first, second) = tracked();
    first.dirty(3);
    assert_eq!(take(&space), 1 << 3);
    let sent = |fake: &Fake| fake.with(|s| s.invalidated.len() as u64);
    assert_eq!((sent(&first), sent(&second)), (1, 1));
    assert_eq!(space.stats().flush.invalidated.commands, 2);
}

/// A source that cannot be switched off, and says which one it is.
struct Stuck(&'static str);

#[derive(Debug, thiserror::Error)]
#[error("{0} is stuck")]
struct IsStuck(&'static str);

impl DirtySource for Stuck {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        match to {
            Tracking::On => Ok(()),
            Tracking::Off => Err(Error::source_failed(IsStuck(self.0))),
        }
    }

    fn read_and_clear(&self, _: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

/// If several domains cannot be switched off, the error is that of the first.
#[test]
fn of_several_domains_that_stay_on_the_first_is_named() {
    let space = AddressSpace::with_source(Granule::K4, Stuck("one")).unwrap();
    space.attach(Stuck("two")).unwrap();
    space.start_tracking().unwrap();
    let error = space.stop_tracking().unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string);
    assert_eq!(source.as_deref(), Some("one is stuck"));
}

/// The place of an area is a multiple of the domains' page, also where that page is larger than the
/// largest alignment that allocation asks for on its own account.
#[test]
fn an_area_is_as_aligned_as_the_pages_of_a_domain() {
    let (space, first) = (AddressSpace::new(Granule::K4), Arc::new(Fake::default()));
    first.with(|s| s.page = Some(Granule::G1));
    space.attach(first).unwrap();
    let (two_mib, one_gib) = (512 * PAGE, 1 << 30);
    space
        .reserve(IovaRange::from_len(Iova::MIN, one_gib + two_mib).unwrap())
        .unwrap();
    let range = space.map_anywhere(one_gib, 0, RW).unwrap();
    assert_eq!(range.start(), Iova::new(2 * one_gib));
}

/// Addresses that a batch is about to map are taken, also where the one of them that allocation is
/// allowed to use is the last of its range.
#[test]
fn the_last_allowed_address_is_taken_while_a_batch_maps_it() {
    let source = Arc::new(Fake::default());
    let space = Arc::new(AddressSpace::with_source(Granule::BYTE, source.clone()).unwrap());
    let bytes = |first, n| IovaRange::from_len(Iova::new(first), n).unwrap();
    space.set_allowed(&[bytes(16, 1)]).unwrap();
    let told = Arc::new(Mutex::new(None));
    let (inner, tells) = (Arc::clone(&space), Arc::clone(&told));
    let allocates = move || *tells.lock().unwrap() = Some(inner.map_anywhere(1, 0, RW));
    source.with(|s| s.on_map = Some(Box::new(allocates)));
    space.apply(&[map(bytes(16, 4))]).unwrap();
    let told = told.lock().unwrap().take();
    assert!(matches!(told, Some(Err(Error::NoSpace { .. }))), "{told:?}");
}

/// A debt of pages of one size that joins a debt of another owes both sizes.
#[test]
fn debts_that_are_joined_owe_the_leaves_of_both() {
    let (mut all, mut large) = (FlushGather::new(), FlushGather::new());
    all.add(pages(0, 1), Granule::K4);
    large.add(pages(512, 512), Granule::M2);
    all.merge(&large);
    let leaves = all.leaves().unwrap();
    assert_eq!(
        (leaves.smallest, leaves.largest),
        (Granule::K4, Granule::M2)
    );
    assert_eq!(all.entries(), 2);
    large.merge(&all);
    assert_eq!(large.leaves(), Some(leaves));
}

/// A harvest that stops keeps what lies below, and puts back what an earlier source found above. It
/// knows how far up that is, also when a later source has written in a lower window of the bitmap
/// since.
#[test]
fn above_a_stop_everything_is_put_back_in_whatever_order_windows_were_open() {
    let (space, first, second) = two_sources();
    let range = pages(0, 1 << 17);
    space.map(range, 0, RW).unwrap();
    space.start_tracking().unwrap();
    first.dirty(100_000);
    second.dirty(1);
    second.with(|s| s.stop_at = Some(5));
    let request = HarvestRequest::new(range, Granule::K4);
    for expected in [[pages(1, 1)], [pages(100_000, 1)]] {
        let found = SparseBitmap::new(1 << 17);
        let lease = space.harvest(&request, UserBitmap::sparse(&found)).unwrap();
        let at_stop = lease.stopped().map(|stopped| stopped.at);
        assert_eq!(at_stop, (expected == [pages(1, 1)]).then_some(at(5)));
        let lease = lease.partial().sync().unwrap();
        assert_eq!(lease.runs().collect::<Vec<_>>(), expected);
        lease.commit();
        second.with(|s| s.stop_at = None);
    }
}

/// The pieces of a cut share the marks of the whole. A handle of one piece marks nothing in
/// another.
#[test]
fn a_handle_of_a_piece_marks_no_other_piece() {
    let (space, ..) = tracked();
    space.cut(at(8)).unwrap();
    for (own, other) in [(0, 8), (8, 0)] {
        let handle = space.area(at(own)).unwrap();
        let refused = handle.mark(pages(other + 1, 1));
        assert!(matches!(refused, Err(Error::Outside { .. })), "{refused:?}");
        handle.mark(pages(own + 2, 1)).unwrap();
    }
    assert_eq!(take(&space), 1 << 2 | 1 << 10);
}

/// The report of a harvest counts its leaves, and its stop is a border of granules, also when it
/// leaves what it takes to other consumers.
#[test]
fn a_harvest_for_several_consumers_reports_as_one_for_a_single_one() {
    let (space, first, _) = tracked();
    let _other = space.consumer("other", Start::Clean).unwrap();
    [1, 3].iter().for_each(|page| first.dirty(*page));
    first.with(|s| (s.stop_at, s.stop_inside) = (Some(10), 100));
    for (granule, stop) in [(Granule::K4, 10), (Granule::from_lg2(14).unwrap(), 8)] {
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 16), granule);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        assert_eq!(lease.stopped().map(|stopped| stopped.at), Some(at(stop)));
        let leaves = if granule == Granule::K4 { 2 } else { 0 };
        assert_eq!(lease.report().leaves, leaves);
        lease.partial().sync().unwrap().commit();
    }
}

/// The pages that a consumer of a range is told next.
fn told_of(consumer: &Consumer<'_>, range: IovaRange, page: Granule) -> Vec<IovaRange> {
    let found = SparseBitmap::new(1 << 26);
    let request = HarvestRequest::new(range, page);
    let lease = consumer.harvest(&request, UserBitmap::sparse(&found));
    let lease = lease.unwrap().sync().unwrap();
    let runs = lease.runs().collect();
    lease.commit();
    runs
}

/// A consumer of a range is told the last page of a word, and keeps nothing outside of its range:
/// an unmap would report that as a page that somebody was not told.
#[test]
fn a_consumer_of_a_range_keeps_its_pages_and_no_others() {
    let (space, ..) = two_sources();
    space.map(pages(0, 256), 0, RW).unwrap();
    space.start_tracking().unwrap();
    let whole = space.consumer("whole", Start::Clean).unwrap();
    let range = pages(70, 100);
    let part = space.consumer_of("part", range, Start::Dirty).unwrap();
    let clean = space.consumer_of("clean", range, Start::Clean).unwrap();
    space.mark(pages(60, 20)).unwrap();
    space.mark(pages(127, 1)).unwrap();
    take(&space);
    let mut words = [0; 4];
    let request = HarvestRequest::new(pages(0, 256), Granule::K4);
    let lease = space.harvest(&request, UserBitmap::new(&mut words));
    lease.unwrap().sync().unwrap().commit();
    let like = space
        .consumer_of("like", range, Start::LikeOf(&whole))
        .unwrap();
    assert_eq!(told_of(&part, range, Granule::K4), [range]);
    assert_eq!(
        told_of(&like, range, Granule::K4),
        [pages(70, 10), pages(127, 1)]
    );
    assert_eq!(
        told_of(&clean, range, Granule::K4),
        [pages(70, 10), pages(127, 1)]
    );
    let all = [pages(60, 20), pages(127, 1)];
    assert_eq!(told_of(&whole, pages(0, 256), Granule::K4), all);
    let gone = space.unmap_discarding(pages(0, 256)).unwrap();
    assert_eq!(gone.discarded_bytes, 0);
}

/// A debt goes to the queue before the page is left to others: a harvest of another consumer that
/// finds it pays the debt, though the lease that took it was never synced.
#[test]
fn a_page_that_is_left_comes_with_its_debt() {
    let (space, first, _) = tracked();
    let other = space.consumer("other", Start::Clean).unwrap();
    first.with(|s| s.invalidated.clear());
    first.dirty(3);
    let mut words = [0];
    let lease = space.harvest(&request(Scope::All), UserBitmap::new(&mut words));
    drop(lease.unwrap());
    assert_eq!(told_of(&other, pages(0, 16), Granule::K4), [pages(3, 1)]);
    let covered = first.with(|s| s.invalidated.iter().any(|range| range.covers(pages(3, 1))));
    assert!(covered);
}

/// Harvests that leave pages to others work in pieces of 2^24 pages. What is in the second piece,
/// and a piece of one byte, are told as well.
#[test]
fn the_second_piece_of_a_harvest_for_several_is_told() {
    for (page, last) in [(Granule::K4, (1 << 24) + 5), (Granule::BYTE, 1 << 24)] {
        let space = AddressSpace::new(page);
        let range = |first: u64, n: u64| {
            IovaRange::from_len(Iova::new(first << page.lg2()), n << page.lg2()).unwrap()
        };
        let all = range(0, last + 1);
        space.map(all, 0, RW).unwrap();
        space.start_tracking().unwrap();
        let one = space.consumer("one", Start::Clean).unwrap();
        let two = space.consumer("two", Start::Clean).unwrap();
        let (low, high) = (range(1, 1), range(last, 1));
        space.mark(low).unwrap();
        space.mark(high).unwrap();
        for consumer in [&one, &two] {
            assert_eq!(told_of(consumer, all, page), [low, high]);
            assert_eq!(told_of(consumer, all, page), []);
        }
        let guard = space.begin_write(high).unwrap();
        assert_eq!(told_of(&one, all, page), [high], "in flight");
        drop(guard);
        assert_eq!(told_of(&two, all, page), [high]);
    }
}

/// A source that panics after it has cleared a page loses neither that page, for any consumer, nor
/// its debt.
#[test]
fn what_a_source_cleared_before_it_panicked_is_left_to_all() {
    let (space, first, _) = tracked();
    let other = space.consumer("other", Start::Clean).unwrap();
    first.dirty(3);
    first.with(|s| s.panic_at = Some(5));
    first.with(|s| s.invalidated.clear());
    let harvested = std::panic::catch_unwind(AssertUnwindSafe(|| take(&space)));
    assert!(harvested.is_err());
    first.with(|s| s.panic_at = None);
    assert_eq!((take(&space), take(&space)), (1 << 3, 0));
    let paid = first.with(|s| s.invalidated.iter().any(|r| r.covers(pages(3, 1))));
    assert!(paid);
    let told = || told_of(&other, pages(0, 16), Granule::K4);
    assert_eq!((told(), told()), (vec![pages(3, 1)], vec![]));
}
