//! The modes of harvest: writes in flight, parts of leaves, masks, bounds, threads, commits by
//! range.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages};
use dirtymap::{Access, AddressSpace, Error, Granule, HarvestRequest, Iova, IovaRange, UserBitmap};
use std::sync::Arc;
use std::time::Instant;

/// 64 pages in areas of 16, leaves of `leaf` pages, tracking on.
fn space(leaf: u64) -> (AddressSpace, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    fake.with(|s| s.leaf_pages = leaf);
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    for first in (0..64).step_by(16) {
        space
            .map(pages(first, 16), first * PAGE, Access::ReadWrite)
            .unwrap();
    }
    space.start_tracking().unwrap();
    (space, fake)
}

fn request(range: IovaRange) -> HarvestRequest<'static> {
    HarvestRequest::new(range, Granule::K4)
}

/// Harvests, syncs and commits. Returns the bits, shifted to their pages.
fn take(space: &AddressSpace, first: u64, n: u64) -> u64 {
    let mut words = [0u64];
    let request = request(pages(first, n));
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    words[0] << first
}

#[test]
fn a_write_in_flight_is_reported_by_everybody_and_is_dirty_when_it_ends() {
    let (space, _) = space(1);
    let guard = space
        .begin_write(IovaRange::from_len(Iova::new(3 * PAGE + 5), PAGE).unwrap())
        .unwrap();
    assert_eq!(guard.range(), pages(3, 2));
    for _ in 0..3 {
        assert_eq!(take(&space, 0, 64), 0b11 << 3);
    }
    assert_eq!(take(&space, 4, 8), 1 << 4, "as far as it is asked for");
    let across = space.begin_write(pages(15, 2)).unwrap();
    drop(guard);
    assert_eq!(take(&space, 0, 64), 0b11 << 3 | 0b11 << 15);
    drop(across);
    assert_eq!(take(&space, 0, 64), 0b11 << 15);
    assert_eq!(take(&space, 0, 64), 0);
}

#[test]
fn a_write_outside_is_refused_and_counted_and_so_is_one_that_ends_there() {
    let (space, _) = space(1);
    let refused = space.begin_write(pages(60, 8)).unwrap_err();
    assert!(matches!(refused, Error::Outside { at } if at.get() == 64 * PAGE));
    let guard = space.begin_write(pages(20, 1)).unwrap();
    space.unmap_discarding(pages(16, 16)).unwrap();
    drop(guard);
    assert_eq!(space.stats().outside_marks, 2);
    assert_eq!(take(&space, 0, 16), 0, "nothing was in flight");
}

/// Kernel history 11 and 12: a request covered a leaf in part, and the rest of the leaf, or its
/// last page, was lost.
#[test]
fn every_part_of_a_leaf_is_reported_once() {
    for leaf in [2, 4, 16] {
        for first in 0..16 {
            for n in 1..=16 - first {
                let (space, fake) = space(leaf);
                fake.dirty(5);
                let whole = (1u64 << leaf) - 1;
                let whole = whole << (5 / leaf * leaf);
                let part = take(&space, first, n);
                assert_eq!(part, whole & (((1u64 << n) - 1) << first));
                assert_eq!(take(&space, first, n), 0, "read and cleared");
                assert_eq!(
                    take(&space, 0, 16),
                    whole & !part,
                    "leaf {leaf}, {first}+{n}"
                );
            }
        }
    }
}

#[test]
fn the_rest_of_a_leaf_carries_its_debt_and_is_discarded_with_its_area() {
    let (space, fake) = space(16);
    fake.dirty(1);
    let mut words = [0u64];
    let lower = space
        .harvest(&request(pages(0, 4)), UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(take(&space, 8, 8), 0xff00);
    assert_eq!(
        fake.with(|s| s.invalidated.clone()),
        [pages(0, 16)],
        "the sync of the lease that took the rest"
    );
    assert_eq!(lower.abort().bytes, 4 * PAGE);
    let unmapped = space.unmap_discarding(pages(0, 16)).unwrap();
    assert_eq!(unmapped.discarded_bytes, u128::from(8 * PAGE));
}

#[test]
fn a_mask_clears_what_it_holds_and_nothing_else() {
    let (space, fake) = space(1);
    [3, 9, 17, 40].iter().for_each(|page| fake.dirty(*page));
    space.mark(pages(10, 2)).unwrap();
    let mut seen = [0u64];
    let mask = space
        .peek(&request(pages(0, 64)), UserBitmap::new(&mut seen))
        .unwrap();
    [9, 50].iter().for_each(|page| fake.dirty(*page)); // 9 again, 50 not in the mask
    let mut words = [0u64];
    let all = request(pages(0, 32));
    let lease = space
        .harvest(&all.masked(mask), UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(lease.report().bits_set, 5);
    lease.sync().unwrap().commit();
    assert_eq!(words, [1 << 3 | 0b111 << 9 | 1 << 17]);
    assert_eq!(take(&space, 0, 64), 1 << 40 | 1 << 50, "the rest is dirty");
    // Every page of the mask is clean now. Pages of a leaf outside of the mask stay dirty.
    let (space, fake) = self::space(16);
    fake.dirty(0);
    let mut alternating = [0x5555u64];
    let mask = UserBitmap::new(&mut alternating)
        .view(pages(0, 16), Granule::K4)
        .unwrap();
    let mut words = [0u64];
    let lease = space
        .harvest(&all.masked(mask), UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    assert_eq!(words, [0x5555]);
    assert_eq!(take(&space, 0, 64), 0xaaaa);
}

#[test]
fn instalments_see_the_whole_request_and_stop_at_their_bounds() {
    for (leaf, limit) in [(1, 1), (1, 70), (16, 1), (4, 1000)] {
        let fake = Arc::new(Fake::default());
        fake.with(|s| s.leaf_pages = leaf);
        let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
        space.map(pages(0, 320), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        (0..320).step_by(3).for_each(|page| fake.dirty(page));
        let all = request(pages(0, 320));
        let mut next = Some(Iova::MIN);
        let mut words = [0u64; 5];
        let mut calls = 0;
        while let Some(from) = next {
            let part = space
                .harvest(
                    &all.resume_at(from).max_bits(limit),
                    UserBitmap::new(&mut words),
                )
                .unwrap();
            assert!(part.report().bits_set <= limit + 63);
            assert!(part.next().is_none_or(|next| next > from));
            next = part.next();
            calls += 1;
            let lease = part.sync().unwrap();
            assert!(lease.runs().all(|run| run.start() >= from), "its own part");
            if calls == 2 {
                lease.abort(); // by this only its own part is dirty again
            } else {
                lease.commit();
            }
            // The beginning is written again before each part.
            space.mark(pages(0, 1)).unwrap();
        }
        let dirty = words.iter().map(|word| word.count_ones()).sum::<u32>();
        assert_eq!(dirty, if leaf == 1 { 107 } else { 320 });
        assert_eq!(calls > 1, limit < 320);
    }
}

#[test]
fn a_deadline_that_has_passed_still_makes_progress() {
    let (space, fake) = space(1);
    fake.dirty(0);
    let mut words = [0u64];
    let lease = space
        .harvest(
            &request(pages(0, 64))
                .resume_at(Iova::MIN)
                .until(Instant::now()),
            UserBitmap::new(&mut words),
        )
        .unwrap();
    assert!(lease.next().is_none());
    lease.sync().unwrap().commit();
    assert_eq!(words, [1]);
    for from in [64 * PAGE, 5] {
        let mut words = [0u64];
        let refused = space.harvest(
            &request(pages(0, 64)).resume_at(Iova::new(from)),
            UserBitmap::new(&mut words),
        );
        assert!(matches!(refused, Err(Error::BadCursor { at, .. }) if at.get() == from));
    }
}

#[test]
fn what_was_committed_by_range_is_not_put_back() {
    let (space, fake) = space(1);
    (0..64).step_by(2).for_each(|page| fake.dirty(page));
    let mut words = [0u64];
    let lease = space
        .harvest(&request(pages(0, 64)), UserBitmap::new(&mut words))
        .unwrap()
        .sync()
        .unwrap();
    assert_eq!(lease.commit_range(pages(32, 8)), 4);
    assert_eq!(lease.commit_range(pages(0, 4)), 2);
    assert_eq!(lease.commit_range(pages(4, 6)), 3, "joins the one before");
    assert_eq!(lease.commit_range(pages(2, 33)), 11, "again and more");
    let cut = IovaRange::from_len(Iova::new(48 * PAGE), PAGE - 1).unwrap();
    assert_eq!(lease.commit_range(cut), 0, "not a whole granule");
    assert_eq!(lease.commit_range(pages(100, 3)), 0, "outside");
    let aborted = lease.abort();
    assert_eq!(aborted.bytes, 12 * PAGE);
    let expect = (40..64)
        .step_by(2)
        .fold(0, |bits, page| bits | 1u64 << page);
    assert_eq!(take(&space, 0, 64), expect);
    let stats = space.stats();
    assert_eq!(
        stats.leased_bytes,
        stats.committed_bytes + stats.aborted_bytes
    );
    assert_eq!(stats.aborted_bytes, 12 * PAGE);
}

#[cfg(feature = "rayon")]
#[test]
fn the_number_of_threads_changes_nothing() {
    // 2^20 pages are four pieces; the marks and leaves straddle them.
    let n = 1u64 << 20;
    let mut reports = Vec::new();
    for threads in [0, 1, 2, 5] {
        let fake = Arc::new(Fake::default());
        fake.with(|s| s.leaf_pages = 1 << 19);
        let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
        space.map(pages(0, n / 2), 0, Access::ReadWrite).unwrap();
        space
            .map(pages(n / 2, n / 2), 0, Access::ReadWrite)
            .unwrap();
        space.start_tracking().unwrap();
        fake.dirty(n / 2 + 9);
        (0..n / 2)
            .step_by(997)
            .for_each(|page| space.mark(pages(page, 3)).unwrap());
        let mut words = vec![0u64; (n / 64) as usize];
        let all = request(pages(1, n - 2));
        let report = if threads == 0 {
            let lease = space.harvest(&all, UserBitmap::new(&mut words)).unwrap();
            lease.sync().unwrap().commit()
        } else {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let lease =
                pool.install(|| space.harvest(&all.parallel(), UserBitmap::new(&mut words)));
            lease.unwrap().sync().unwrap().commit()
        };
        let mut left = vec![0u64; (n / 64) as usize];
        let rest = space
            .peek(&request(pages(0, n)), UserBitmap::new(&mut left))
            .unwrap();
        let rest: Vec<_> = rest.runs().collect();
        assert_eq!(rest, [pages(0, 1), pages(n - 1, 1)], "the two ends");
        reports.push((words, report.areas, report.bits_set));
    }
    assert!(reports.windows(2).all(|pair| pair[0] == pair[1]));
}

#[cfg(feature = "rayon")]
#[test]
fn a_thread_that_panics_or_stops_puts_back_and_owes_what_all_took() {
    let n = 1u64 << 20;
    for panics in [true, false] {
        let fake = Arc::new(Fake::default());
        let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
        space.map(pages(0, n), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let dirty = [3, n / 2 - 1, n / 2 + 7, n - 1];
        dirty.iter().for_each(|page| fake.dirty(*page));
        space.mark(pages(n / 4, 1)).unwrap();
        fake.with(|s| match panics {
            true => s.panic_at = Some(n / 2 + 7),
            false => s.stop_at = Some(n / 2 + 7),
        });
        let mut words = vec![0u64; (n / 64) as usize];
        let all = request(pages(0, n));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let lease = space
                .harvest(&all.parallel(), UserBitmap::new(&mut words))
                .unwrap();
            let at = lease.stopped().unwrap().at;
            assert_eq!(at, Iova::new((n / 2 + 7) * PAGE));
            // The lease is dropped here.
        }));
        assert_eq!(outcome.is_err(), panics);
        fake.with(|s| (s.panic_at, s.stop_at) = (None, None));
        let mut words = vec![0u64; (n / 64) as usize];
        let lease = space.harvest(&all, UserBitmap::new(&mut words)).unwrap();
        let lease = lease.sync().unwrap();
        let found: Vec<u64> = lease.runs().map(|run| run.start().get() / PAGE).collect();
        assert_eq!(found, [3, n / 4, n / 2 - 1, n / 2 + 7, n - 1]);
        let paid = fake.with(|s| s.invalidated.clone());
        for page in dirty {
            assert!(paid.iter().any(|range| range.covers(pages(page, 1))));
        }
        lease.commit();
    }
}

/// A mask of a finer granule than the page has a bit for a part of page 3, and bits for all of
/// page 5. A page is cleared as a whole, so the part of page 3 does not count: rounded out, the
/// harvest would clear a page that its consumer did not ask for.
#[test]
fn a_mask_takes_whole_pages_alone() {
    let (space, fake) = space(1);
    [3, 4, 5, 6].iter().for_each(|page| fake.dirty(*page));
    space.mark(pages(3, 4)).unwrap();
    let mut words = [0b11 << 10 | 1 << 6 | 1 << 9 | 1 << 12, 0];
    let half = Granule::from_lg2(11).unwrap();
    let mask = UserBitmap::new(&mut words).view(pages(0, 64), half);
    let mut words = [0u64];
    let masked = request(pages(0, 64)).masked(mask.unwrap());
    let lease = space.harvest(&masked, UserBitmap::new(&mut words)).unwrap();
    lease.sync().unwrap().commit();
    assert_eq!(words, [1 << 5]);
    assert_eq!(take(&space, 0, 64), 1 << 3 | 1 << 4 | 1 << 6);
}

/// The bits of a request are so fine that 64 of them, the smallest step of a bounded harvest, are a
/// part of a page. The step goes on to the end of the page, and the next harvest begins there.
#[test]
fn a_step_of_a_bounded_harvest_ends_at_a_page() {
    let (space, fake) = space(1);
    [0, 1].iter().for_each(|page| fake.dirty(*page));
    let fine = Granule::from_lg2(4).unwrap();
    let mut words = [0u64; 16];
    let mut from = Some(Iova::MIN);
    for page in 0..4 {
        let start = from.unwrap();
        assert_eq!(start, Iova::new(page * PAGE));
        let bounded = HarvestRequest::new(pages(0, 4), fine).max_bits(1);
        let bounded = bounded.resume_at(start);
        let lease = space.harvest(&bounded, UserBitmap::new(&mut words));
        let lease = lease.unwrap();
        from = lease.next();
        // Clean pages are looked at until there is a dirty one.
        if page < 2 {
            assert_eq!(lease.range(), pages(page, 1));
        }
        let done = lease.sync().unwrap().commit().bits_set;
        assert_eq!(done, if page < 2 { 256 } else { 0 });
        if from.is_none() {
            return;
        }
    }
    panic!("the harvests do not end");
}

/// A bound is reached one page before the end: the next harvest is told to go on there. A page of
/// one byte makes the last page the last address as well.
#[test]
fn a_bounded_harvest_goes_on_at_the_last_page() {
    let space = AddressSpace::tracked(Granule::BYTE);
    space.map(0..65, 0, Access::ReadWrite).unwrap();
    space.mark(0..65).unwrap();
    let mut words = [0u64; 2];
    let whole = IovaRange::from_len(Iova::MIN, 65).unwrap();
    let bounded = HarvestRequest::new(whole, Granule::BYTE).max_bits(1);
    let lease = space.harvest(&bounded, UserBitmap::new(&mut words));
    let lease = lease.unwrap();
    assert_eq!(lease.next(), Some(Iova::new(64)));
    assert_eq!(lease.sync().unwrap().commit().bits_set, 64);
    let bounded = bounded.resume_at(Iova::new(64));
    let lease = space.harvest(&bounded, UserBitmap::new(&mut words));
    let lease = lease.unwrap();
    assert_eq!(lease.next(), None);
    assert_eq!(lease.sync().unwrap().commit().bits_set, 1);
}

/// Without a domain, writes in flight and marks are all that is looked at, in the second area as in
/// the first.
#[test]
fn a_write_in_flight_in_a_later_area_is_reported_without_domains() {
    let space = AddressSpace::tracked(Granule::K4);
    for first in [0, 16] {
        space
            .map(pages(first, 16), first * PAGE, Access::ReadWrite)
            .unwrap();
    }
    let guard = space.begin_write(pages(20, 1)).unwrap();
    assert_eq!(take(&space, 0, 32), 1 << 20);
    drop(guard);
    assert_eq!(take(&space, 0, 32), 1 << 20);
}

/// The bitmap holds bits that others have set. Parts that are committed count them, and the account
/// of the lease ends at what it has taken.
#[test]
fn parts_with_bits_of_others_commit_no_more_than_was_leased() {
    let (space, fake) = space(1);
    fake.dirty(5);
    let mut words = [0b1111u64];
    let lease = space.harvest(&request(pages(0, 64)), UserBitmap::new(&mut words));
    let lease = lease.unwrap().sync().unwrap();
    assert_eq!(lease.commit_range(pages(0, 64)), 5);
    lease.commit();
    let stats = space.stats();
    assert_eq!((stats.leased_bytes, stats.committed_bytes), (PAGE, PAGE));
}

/// A bound that is met exactly ends the harvest, and one in the past leaves the smallest step.
#[test]
fn bounds_end_the_harvest_as_soon_as_they_are_met() {
    let bounded = |request: HarvestRequest<'static>| {
        let fake = Arc::new(Fake::default());
        let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
        space.map(pages(0, 256), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        (0..256).for_each(|page| fake.dirty(page));
        let mut words = [0u64; 4];
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        let lease = lease.unwrap();
        let next = lease.next();
        (next, lease.sync().unwrap().commit().bits_set)
    };
    let first = (Some(Iova::new(64 * PAGE)), 64);
    assert_eq!(bounded(request(pages(0, 256)).max_bits(64)), first);
    let now = Instant::now();
    assert_eq!(bounded(request(pages(0, 256)).until(now)), first);
}

/// A harvest that refuses holes looks for them from its cursor on: those below were not asked for.
#[test]
fn a_hole_below_the_cursor_is_not_refused() {
    let space = AddressSpace::tracked(Granule::K4);
    for first in [0, 32] {
        space
            .map(pages(first, 16), first * PAGE, Access::ReadWrite)
            .unwrap();
    }
    space.mark(pages(40, 1)).unwrap();
    let mut words = [0u64];
    let refuses = request(pages(0, 48)).holes(dirtymap::Holes::Refuse);
    let whole = space.harvest(&refuses, UserBitmap::new(&mut words));
    assert!(matches!(whole, Err(Error::Hole { at, .. }) if at == Iova::new(16 * PAGE)));
    let above = refuses.resume_at(Iova::new(32 * PAGE));
    let mut words = [0u64];
    let lease = space.harvest(&above, UserBitmap::new(&mut words));
    assert_eq!(lease.unwrap().sync().unwrap().commit().bits_set, 1);
}

/// A source stopped a parallel harvest in the first of two areas. Another thread had walked the
/// second one, in a piece above the stop, and the report counted both.
#[cfg(feature = "rayon")]
#[test]
fn a_parallel_harvest_that_stops_counts_no_area_above_the_stop() {
    let n = 1u64 << 20;
    let mut reports = Vec::new();
    for parallel in [false, true] {
        let fake = Arc::new(Fake::default());
        let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
        for first in [0, n / 2] {
            space
                .map(pages(first, n / 2), 0, Access::ReadWrite)
                .unwrap();
        }
        space.start_tracking().unwrap();
        fake.with(|s| s.stop_at = Some(5));
        let mut all = request(pages(0, n));
        if parallel {
            all = all.parallel();
        }
        let mut words = vec![0u64; (n / 64) as usize];
        let lease = space.harvest(&all, UserBitmap::new(&mut words)).unwrap();
        assert!(lease.stopped().is_some());
        reports.push(lease.report().areas);
    }
    assert_eq!(reports, [1, 1]);
}
