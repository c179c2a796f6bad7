//! Harvests that stop: the lease has everything below the stop, and nothing from it on was taken.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::{
    Access, AddressSpace, Error, Granule, HarvestRequest, Holes, Iova, IovaRange, Lease, Owed,
    UserBitmap,
};
use std::sync::Arc;

/// Pages 0 to 63 in one area, two sources, tracking on.
fn tracked() -> (AddressSpace, Arc<Fake>, Arc<Fake>) {
    let (space, first, second) = two_sources();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (space, first, second)
}

fn request(range: IovaRange) -> HarvestRequest<'static> {
    HarvestRequest::new(range, Granule::K4)
}

/// Harvests `n` pages, syncs and commits. Returns the numbers of the dirty pages.
fn take(space: &AddressSpace, n: u64) -> Vec<u64> {
    let mut words = vec![0u64; (n as usize).div_ceil(64)];
    let bitmap = UserBitmap::new(&mut words);
    let lease = space.harvest(&request(pages(0, n)), bitmap).unwrap();
    let lease = lease.sync().unwrap();
    let taken = numbers(lease.runs());
    lease.commit();
    taken
}

fn numbers(runs: impl Iterator<Item = IovaRange>) -> Vec<u64> {
    let number = |at: Iova| at.get() / PAGE;
    runs.flat_map(|run| number(run.start())..=number(run.last()))
        .collect()
}

/// The address and the error of a stop, and the lease.
struct Stop<'a> {
    at: Iova,
    error: String,
    lease: Lease<'a, Owed>,
}

fn stopped<'a>(answer: Result<Lease<'a, Owed>, Error>) -> Stop<'a> {
    let lease = answer.unwrap();
    let Some(stopped) = lease.stopped() else {
        panic!("{lease:?}");
    };
    Stop {
        at: stopped.at,
        error: stopped.error.to_string(),
        lease: lease.partial(),
    }
}

/// The live leases aside, each byte that was leased was committed or aborted.
fn accounts_hold(space: &AddressSpace) {
    let stats = space.stats();
    let settled = stats.committed_bytes + stats.aborted_bytes;
    assert_eq!(stats.leased_bytes, settled, "{stats:?}");
}

/// A source with dirty pages 5 and 50 was attached before one that stops at page 10. `at` was 10,
/// and yet page 50 was cleared and in the lease: a consumer that copied below `at`, committed, and
/// went on from there lost it (firecracker#4545 is a snapshot that lost pages so).
#[test]
fn from_a_stop_on_what_an_earlier_source_gave_is_put_back() {
    let (space, first, second) = tracked();
    [5, 50].iter().for_each(|page| first.dirty(*page));
    second.dirty(9);
    second.with(|s| s.stop_at = Some(10));
    let mut words = [0u64];
    let answer = space.harvest(&request(pages(0, 64)), UserBitmap::new(&mut words));
    let stop = stopped(answer);
    assert_eq!(stop.at, Iova::new(10 * PAGE));
    assert_eq!(stop.lease.report().bits_set, 2);
    // Before the lease is settled, another harvest finds page 50, and its sync pays for it.
    second.with(|s| s.stop_at = None);
    assert_eq!(take(&space, 64), [50]);
    let paid = first.with(|s| s.invalidated.clone());
    assert!(
        paid.iter().any(|range| range.covers(pages(50, 1))),
        "{paid:?}"
    );
    let lease = stop.lease.sync().unwrap();
    assert_eq!(lease.dirty(), 2);
    assert_eq!(numbers(lease.runs()), [5, 9]);
    assert_eq!(lease.commit_range(pages(0, 64)), 2);
    assert_eq!(lease.abort().bytes, 0);
    assert_eq!(take(&space, 64), [0u64; 0]);
    accounts_hold(&space);
}

/// The same, dropped: everything is dirty again, once.
#[test]
fn a_stopped_lease_that_is_dropped_puts_back_what_it_has() {
    let (space, first, second) = tracked();
    [5, 50].iter().for_each(|page| first.dirty(*page));
    second.with(|s| s.stop_at = Some(10));
    let mut words = [0u64];
    let bitmap = UserBitmap::new(&mut words);
    let stop = stopped(space.harvest(&request(pages(0, 64)), bitmap));
    let aborted = stop.lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (PAGE, 0));
    second.with(|s| s.stop_at = None);
    assert_eq!(take(&space, 64), [5, 50]);
    accounts_hold(&space);
}

/// Pages of the put-back store and of the marks are put back like those of sources. Pages in flight
/// stay in flight.
#[test]
fn from_a_stop_on_marks_and_kept_pages_stay() {
    for stop_at in [0, 10, 63] {
        let (space, first, second) = tracked();
        [3, 20].iter().for_each(|page| first.dirty(*page));
        let mut words = [0u64];
        let bitmap = UserBitmap::new(&mut words);
        drop(space.harvest(&request(pages(0, 64)), bitmap).unwrap());
        [4, 30].iter().for_each(|page| second.dirty(*page));
        [5, 40]
            .iter()
            .for_each(|page| space.mark(pages(*page, 1)).unwrap());
        let guard = space.begin_write(pages(50, 1)).unwrap();
        second.with(|s| s.stop_at = Some(stop_at));
        let mut words = [0u64];
        let bitmap = UserBitmap::new(&mut words);
        let stop = stopped(space.harvest(&request(pages(0, 64)), bitmap));
        assert_eq!(stop.at, Iova::new(stop_at * PAGE));
        second.with(|s| s.stop_at = None);
        let lease = stop.lease.sync().unwrap();
        let below = |page: &u64| *page < stop_at;
        let all = [3, 4, 5, 20, 30, 40, 50];
        let expect: Vec<u64> = all.into_iter().filter(below).collect();
        assert_eq!(numbers(lease.runs()), expect);
        assert_eq!(lease.dirty(), expect.len() as u64);
        assert_eq!(lease.report().bits_set, expect.len() as u64);
        lease.commit();
        drop(guard);
        // Page 50 was in flight, so it stays dirty although a harvest has reported it.
        let rest = all.into_iter().filter(|page| !below(page) || *page == 50);
        assert_eq!(take(&space, 64), rest.collect::<Vec<u64>>());
        accounts_hold(&space);
    }
}

/// A source stops inside a page of the space, or inside a granule of the request. The stop is
/// rounded down, so that each bit of the lease stands for a granule that was taken as a whole.
#[test]
fn a_stop_is_a_border_of_pages_and_of_granules() {
    for (granule, page, at) in [
        (2048, 8, 8),
        (4096, 8, 8),
        (16384, 8, 8),
        (16384, 10, 8),
        (65536, 10, 0),
        (131_072, 50, 32),
    ] {
        let (space, first, second) = tracked();
        [1, 9, 33, 60].iter().for_each(|page| first.dirty(*page));
        second.with(|s| {
            s.stop_at = Some(page);
            s.stop_inside = 2048;
        });
        let granule = Granule::from_bytes(granule).unwrap();
        let mut words = [0u64; 2];
        let request = HarvestRequest::new(pages(0, 64), granule);
        let stop = stopped(space.harvest(&request, UserBitmap::new(&mut words)));
        assert_eq!(stop.at, Iova::new(at * PAGE), "{granule}, at {page}");
        second.with(|s| s.stop_at = None);
        let lease = stop.lease.sync().unwrap();
        let all = [1, 9, 33, 60];
        for run in lease.runs() {
            assert!(run.last() < stop.at, "{run} is not below the stop");
        }
        for page in all.into_iter().filter(|page| *page < at) {
            assert!(lease.runs().any(|run| run.covers(pages(page, 1))));
        }
        lease.commit();
        let left = take(&space, 64);
        for page in all.into_iter().filter(|page| *page >= at) {
            assert!(left.contains(&page), "{page} of {left:?}");
        }
        assert!(left.iter().all(|page| *page >= at), "{left:?}");
        accounts_hold(&space);
    }
}

/// The page of one source is larger than the space's, and another source stops inside such a page.
#[test]
fn a_stop_is_a_border_of_the_pages_of_all_sources() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    let large = Arc::new(Fake::default());
    large.with(|s| (s.page, s.leaf_pages) = (Granule::from_lg2(16), 16));
    space.attach(large.clone()).unwrap();
    space.start_tracking().unwrap();
    [5, 20].iter().for_each(|page| large.dirty(*page));
    first.dirty(17);
    second.with(|s| s.stop_at = Some(20));
    let mut words = [0u64];
    let stop = stopped(space.harvest(&request(pages(0, 64)), UserBitmap::new(&mut words)));
    assert_eq!(stop.at, Iova::new(16 * PAGE));
    second.with(|s| s.stop_at = None);
    let lease = stop.lease.sync().unwrap();
    assert_eq!(numbers(lease.runs()), (0..16).collect::<Vec<u64>>());
    lease.commit();
    assert_eq!(take(&space, 64), (16..32).collect::<Vec<u64>>());
}

/// Bits that were set before the harvest stay as they are, below the stop and above it. The lease
/// ends below the stop.
#[test]
fn bits_of_others_stay_whatever_stops() {
    let (space, first, second) = tracked();
    [5, 50].iter().for_each(|page| first.dirty(*page));
    second.with(|s| s.stop_at = Some(10));
    let mut words = [1u64 << 2 | 1 << 40];
    {
        let bitmap = UserBitmap::new(&mut words);
        let stop = stopped(space.harvest(&request(pages(0, 64)), bitmap));
        let lease = stop.lease.sync().unwrap();
        assert_eq!(numbers(lease.runs()), [2, 5]);
        lease.commit();
    }
    assert_eq!(
        words[0] & (1 << 2 | 1 << 5 | 1 << 40),
        1 << 2 | 1 << 5 | 1 << 40
    );
    second.with(|s| s.stop_at = None);
    let left = take(&space, 64);
    assert!(left.contains(&50) && !left.contains(&5), "{left:?}");
    accounts_hold(&space);
}

/// A stop at a hole has the exact address of the hole. The dirty bytes below it in the same granule
/// are in the lease.
#[test]
fn a_hole_inside_a_granule_keeps_what_lies_below_it() {
    let (space, first, _) = two_sources();
    space.map(pages(0, 6), 0, Access::ReadWrite).unwrap();
    space.map(pages(7, 9), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    [1, 5, 7].iter().for_each(|page| first.dirty(*page));
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 16), Granule::from_lg2(14).unwrap());
    let request = request.holes(Holes::Stop);
    let stop = stopped(space.harvest(&request, UserBitmap::new(&mut words)));
    assert!(
        stop.error.starts_with("nothing is mapped at "),
        "{}",
        stop.error
    );
    assert_eq!(stop.at, Iova::new(6 * PAGE));
    let lease = stop.lease.sync().unwrap();
    assert_eq!(numbers(lease.runs()), (0..8).collect::<Vec<u64>>());
    lease.commit();
    accounts_hold(&space);
}

/// With a hole at the start of the request, the lease is empty, whatever bits the bitmap has.
#[test]
fn a_lease_of_nothing_is_empty() {
    let (space, _, _) = two_sources();
    space.map(pages(8, 8), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let mut words = [u64::MAX];
    let bitmap = UserBitmap::new(&mut words);
    let request = request(pages(0, 16)).holes(Holes::Stop);
    let stop = stopped(space.harvest(&request, bitmap));
    assert_eq!(stop.at, Iova::MIN);
    let lease = stop.lease.sync().unwrap();
    assert_eq!((lease.dirty(), lease.runs().count()), (0, 0));
    assert_eq!(lease.commit_range(pages(0, 16)), 0);
    assert_eq!(lease.abort().bytes, 0);
    accounts_hold(&space);
}

/// A stop of a bounded harvest, and of a harvest by mask.
#[test]
fn instalments_and_masks_stop_alike() {
    for masked in [false, true] {
        let (space, first, second) = tracked();
        [5, 50].iter().for_each(|page| first.dirty(*page));
        second.with(|s| s.stop_at = Some(10));
        let mut words = [0u64];
        let bitmap = UserBitmap::new(&mut words);
        let all = request(pages(0, 64));
        let mut mask = [u64::MAX];
        let mask = UserBitmap::new(&mut mask)
            .view(pages(0, 64), Granule::K4)
            .unwrap();
        let stop = if masked {
            stopped(space.harvest(&all.masked(mask), bitmap))
        } else {
            stopped(space.harvest(&all.resume_at(Iova::new(PAGE)), bitmap))
        };
        assert_eq!(stop.at, Iova::new(10 * PAGE));
        let lease = stop.lease.sync().unwrap();
        assert_eq!(numbers(lease.runs()), [5]);
        lease.commit();
        second.with(|s| s.stop_at = None);
        assert_eq!(take(&space, 64), [50]);
        accounts_hold(&space);
    }
}

/// Two sources stop, in different pieces of a parallel harvest: at page 100, and at page 2^19 + 7.
/// The lowest stop counts, and the pages that the pieces above it took are put back.
#[cfg(feature = "rayon")]
#[test]
fn of_two_stops_of_a_parallel_harvest_the_lowest_counts() {
    let n = 1u64 << 20;
    let high = (1 << 19) + 7;
    for threads in [1, 3] {
        for stops in [[100, high], [high, 100]] {
            let (space, first, second) = two_sources();
            space.map(pages(0, n), 0, Access::ReadWrite).unwrap();
            space.start_tracking().unwrap();
            first.with(|s| s.stop_at = Some(stops[0]));
            second.with(|s| s.stop_at = Some(stops[1]));
            let dirty = [5, 99, 100, 101, 1 << 18, high - 1, high, n - 1];
            dirty.iter().for_each(|page| first.dirty(*page));
            space.mark(pages((1 << 18) + 1, 1)).unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            let mut words = vec![0u64; (n / 64) as usize];
            let bitmap = UserBitmap::new(&mut words);
            let all = request(pages(0, n));
            let stop = stopped(pool.install(|| space.harvest(&all.parallel(), bitmap)));
            assert_eq!(stop.at, Iova::new(100 * PAGE));
            assert_eq!(stop.lease.report().bits_set, 2);
            let lease = stop.lease.sync().unwrap();
            assert_eq!(numbers(lease.runs()), [5, 99]);
            lease.commit();
            for source in [&first, &second] {
                source.with(|s| s.stop_at = None);
            }
            let mut rest = dirty[2..].to_vec();
            rest.insert(3, (1 << 18) + 1);
            assert_eq!(take(&space, n), rest);
            accounts_hold(&space);
        }
    }
}

/// Areas in one granule, the second of which stops: the harvest has walked the first one, which
/// lies above the stop once that is rounded to the granule. An abort puts back the pages below, in
/// one thread as in several.
#[test]
fn an_abort_puts_back_what_lies_below_a_granule_with_a_stop() {
    let granule = 512;
    let parallel: &[bool] = if cfg!(feature = "rayon") {
        &[false, true]
    } else {
        &[false]
    };
    for parallel in parallel {
        let (space, _first, second) = two_sources();
        for (at, n) in [(0, 8), (granule, 3), (granule + 4, 2)] {
            space.map(pages(at, n), 0, Access::ReadWrite).unwrap();
        }
        space.start_tracking().unwrap();
        space.mark(pages(5, 1)).unwrap();
        second.with(|s| s.stop_at = Some(granule + 4));
        let asked = HarvestRequest::new(pages(0, 2 * granule), Granule::M2);
        #[cfg(feature = "rayon")]
        let asked = if *parallel { asked.parallel() } else { asked };
        let mut words = [0u64];
        let stop = stopped(space.harvest(&asked, UserBitmap::new(&mut words)));
        assert_eq!(stop.at, Iova::new(granule * PAGE));
        assert_eq!(stop.lease.abort().bytes, 8 * PAGE, "parallel: {parallel}");
        second.with(|s| s.stop_at = None);
        assert!(
            take(&space, 2 * granule).contains(&5),
            "parallel: {parallel}"
        );
        accounts_hold(&space);
    }
}

/// Of three pieces of a parallel harvest, the lowest stops and the highest has no dirty pages. The
/// pages of the one in the middle are put back.
#[cfg(feature = "rayon")]
#[test]
fn a_piece_above_that_recorded_nothing_hides_no_other() {
    let piece = 1u64 << 18;
    let (space, first, second) = two_sources();
    space
        .map(pages(0, 3 * piece), 0, Access::ReadWrite)
        .unwrap();
    space.start_tracking().unwrap();
    first.dirty(piece + 7);
    second.with(|s| s.stop_at = Some(100));
    let mut words = vec![0u64; 3 * piece as usize / 64];
    let all = request(pages(0, 3 * piece));
    let stop = stopped(space.harvest(&all.parallel(), UserBitmap::new(&mut words)));
    assert_eq!(stop.lease.report().bits_set, 0);
    drop(stop);
    second.with(|s| s.stop_at = None);
    assert_eq!(take(&space, 3 * piece), [piece + 7]);
    accounts_hold(&space);
}

/// Pages above a stop whose area was unmapped meanwhile cannot be put back, and are counted as
/// outside.
#[test]
fn from_a_stop_on_what_has_gone_meanwhile_is_counted() {
    let (space, first, second) = two_sources();
    let space = Arc::new(space);
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    [5, 50].iter().for_each(|page| first.dirty(*page));
    second.with(|s| {
        let space = space.clone();
        s.on_read = Some(Box::new(move || {
            space.unmap_discarding(pages(0, 64)).unwrap();
        }));
        s.stop_at = Some(10);
    });
    let mut words = [0u64];
    let stop = stopped(space.harvest(&request(pages(0, 64)), UserBitmap::new(&mut words)));
    assert_eq!(stop.lease.report().bits_set, 1);
    assert_eq!(space.stats().put_back_outside_bytes, PAGE);
    let aborted = stop.lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (0, PAGE));
    assert_eq!(space.stats().put_back_outside_bytes, 2 * PAGE);
}

/// A source returns a stop outside of its range, so its work is unknown. The harvest stops at the
/// start of that range.
#[test]
fn a_stop_outside_of_what_was_asked_is_one_at_its_beginning() {
    for lie in [0, 40, 1 << 40] {
        let (space, first, second) = tracked();
        [12, 35].iter().for_each(|page| first.dirty(*page));
        space.mark(pages(14, 1)).unwrap();
        second.with(|s| {
            s.stop_at = Some(20);
            s.stop_says = Some(lie);
        });
        let mut words = [0u64];
        let asked = request(pages(10, 20));
        let stop = stopped(space.harvest(&asked, UserBitmap::new(&mut words)));
        assert_eq!(stop.at, Iova::new(10 * PAGE), "a stop at page {lie}");
        let lease = stop.lease.sync().unwrap();
        assert_eq!(lease.dirty(), 0);
        lease.commit();
        second.with(|s| s.stop_at = None);
        assert_eq!(take(&space, 64), [12, 14, 35]);
        accounts_hold(&space);
    }
}

/// An area ends inside a granule, and a hole follows. The bit of that granule stands for the part
/// that is mapped: an abort puts that part back, and counts the rest neither as put back nor as
/// outside, whether the harvest skips the hole or stops there.
#[test]
fn an_abort_counts_no_hole_inside_a_granule() {
    for holes in [Holes::Skip, Holes::Stop] {
        let (space, first, _) = two_sources();
        space.map(pages(0, 6), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        first.dirty(5);
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 8), Granule::from_lg2(14).unwrap());
        let bitmap = UserBitmap::new(&mut words);
        let lease = space.harvest(&request.holes(holes), bitmap).unwrap();
        assert_eq!(lease.report().bits_set, 1);
        let aborted = lease.abort();
        assert_eq!((aborted.bytes, aborted.outside_bytes), (2 * PAGE, 0));
        assert_eq!(take(&space, 6), [4, 5]);
        accounts_hold(&space);
    }
}

/// The walk stops in the first of two areas. Bits that others have set in the second stand for
/// nothing that this harvest took: they are neither subtracted from its count nor made dirty.
#[test]
fn bits_of_others_above_the_area_of_a_stop_are_not_put_back() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 32), 0, Access::ReadWrite).unwrap();
    let above = pages(32, 32);
    space.map(above, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    first.dirty(5);
    second.with(|s| s.stop_at = Some(10));
    let mut words = [1u64 << 40];
    let stop = stopped(space.harvest(&request(pages(0, 64)), UserBitmap::new(&mut words)));
    assert_eq!(stop.lease.report().bits_set, 1);
    stop.lease.sync().unwrap().commit();
    second.with(|s| s.stop_at = None);
    assert_eq!(take(&space, 64), [0u64; 0]);
    accounts_hold(&space);
}

/// An earlier source gave the last page of an area, which ends inside a granule, and a later one
/// stops below it: the page is put back though its granule reaches into a hole. Rounded in instead
/// of out, the page would be in no lease and clean.
#[test]
fn from_a_stop_on_the_last_page_before_a_hole_is_put_back() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 3), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    first.dirty(2);
    second.with(|s| s.stop_at = Some(0));
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 4), Granule::from_lg2(13).unwrap());
    let stop = stopped(space.harvest(&request, UserBitmap::new(&mut words)));
    assert_eq!(stop.at, Iova::MIN);
    drop(stop);
    second.with(|s| s.stop_at = None);
    assert_eq!(take(&space, 3), [2]);
    accounts_hold(&space);
}

/// A harvest that reaches its bound has a lease up to there. Bits that others have set above belong
/// to no lease: they are not copied, and an abort leaves them alone.
#[test]
fn a_bounded_lease_ends_where_the_next_harvest_goes_on() {
    let (space, first, _) = two_sources();
    space.map(pages(0, 256), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (0..64).for_each(|page| first.dirty(page));
    let mut words = [0, 0, 1, 0];
    let bounded = request(pages(0, 256)).max_bits(1);
    let lease = space.harvest(&bounded, UserBitmap::new(&mut words));
    let lease = lease.unwrap();
    assert_eq!(lease.next(), Some(Iova::new(64 * PAGE)));
    assert_eq!(lease.range(), pages(0, 64));
    let lease = lease.sync().unwrap();
    assert_eq!((lease.dirty(), lease.report().bits_set), (64, 64));
    assert_eq!(lease.abort().bytes, 64 * PAGE);
    assert_eq!(take(&space, 256), (0..64).collect::<Vec<u64>>());
    accounts_hold(&space);
}
