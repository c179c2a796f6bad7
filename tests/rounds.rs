//! Rounds: one lease over everything that is mapped, with a bitmap of its own, while areas come and
//! go.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages, two_sources};
use dirtymap::{
    Access, AddressSpace, Error, Granule, HarvestRequest, Iova, IovaRange, Lease, Owed, RangeError,
    Rounds, Synced, UserBitmap,
};
use std::collections::BTreeSet;
use std::sync::Arc;

const RW: Access = Access::ReadWrite;

/// Pages 0 to 15, a hole, and pages 32 to 47: all tracked.
fn with_a_hole() -> AddressSpace {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..16 * PAGE, 0, RW).unwrap();
    space.map(32 * PAGE..48 * PAGE, 16 * PAGE, RW).unwrap();
    space
}

fn mark(space: &AddressSpace, page: u64) {
    space.mark(pages(page, 1)).unwrap();
}

fn numbers<State>(lease: &Lease<'_, State>, runs: impl Iterator<Item = IovaRange>) -> Vec<u64> {
    let numbers = |run: IovaRange| run.start().get() / PAGE..=run.last().get() / PAGE;
    let found: Vec<u64> = runs.flat_map(numbers).collect();
    let inside = |page: &u64| lease.range().covers(pages(*page, 1));
    assert!(found.iter().all(inside), "{found:?} of {lease:?}");
    found
}

/// Commits the next round, and returns its pages.
fn next(rounds: &mut Rounds<'_>) -> Vec<u64> {
    let lease = rounds.next().unwrap();
    let found = numbers(&lease, lease.runs());
    assert_eq!(lease.dirty(), found.len() as u64);
    lease.commit();
    found
}

/// The live leases aside, each byte that was leased was committed or aborted.
fn accounts_hold(space: &AddressSpace) {
    let stats = space.stats();
    let settled = stats.committed_bytes + stats.aborted_bytes;
    assert_eq!(stats.leased_bytes, settled, "{stats:?}");
}

#[test]
fn one_lease_covers_both_sides_of_a_hole() {
    let space = with_a_hole();
    let mut rounds = space.rounds();
    assert_eq!(next(&mut rounds), [0u64; 0]);
    [0, 15, 32, 47].iter().for_each(|page| mark(&space, *page));
    let lease = rounds.next().unwrap();
    assert_eq!(lease.range(), pages(0, 48));
    assert_eq!(numbers(&lease, lease.runs()), [0, 15, 32, 47]);
    assert_eq!((lease.report().areas, lease.report().bits_set), (2, 4));
    assert!(lease.stopped().is_none() && lease.next().is_none());
    lease.commit();
    // The bitmap of a round has no bits of the round before.
    mark(&space, 33);
    assert_eq!(next(&mut rounds), [33]);
    assert_eq!(next(&mut rounds), [0u64; 0]);
    accounts_hold(&space);
}

/// If a lease is dropped, also by a `?` in the middle of the copy, its pages are in the next round,
/// except for those that were committed.
#[test]
fn what_was_not_committed_is_in_the_next_round() {
    let space = with_a_hole();
    let mut rounds = space.rounds();
    let all = [3, 4, 40];
    all.iter().for_each(|page| mark(&space, *page));
    let mut copy = |fails_at: Option<u64>| -> Result<Vec<u64>, Box<dyn std::error::Error>> {
        let lease = rounds.next()?;
        let mut copied = Vec::new();
        for run in lease.runs() {
            if fails_at == Some(run.start().get() / PAGE) {
                return Err("the target is full".into());
            }
            copied.push(run.start().get() / PAGE);
            lease.commit_range(run);
        }
        lease.commit();
        Ok(copied)
    };
    assert!(copy(Some(40)).is_err());
    assert_eq!(copy(None).unwrap(), [40]);
    assert_eq!(copy(None).unwrap(), [0u64; 0]);
    accounts_hold(&space);
}

#[test]
fn areas_come_and_go_between_rounds() {
    let space = with_a_hole();
    let mut rounds = space.rounds();
    mark(&space, 5);
    assert_eq!(next(&mut rounds), [5]);
    // Above all others, below all others, inside the hole.
    space.map(pages(100, 4), 1 << 30, RW).unwrap();
    mark(&space, 103);
    mark(&space, 40);
    assert_eq!(next(&mut rounds), [40, 103]);
    space.unmap_discarding(pages(0, 16)).unwrap();
    space.map(pages(20, 2), 1 << 31, RW).unwrap();
    mark(&space, 21);
    let lease = rounds.next().unwrap();
    assert_eq!(
        lease.range(),
        pages(20, 84),
        "it begins with what is mapped"
    );
    assert_eq!(numbers(&lease, lease.runs()), [21]);
    drop(lease);
    space.unmap_discarding(pages(100, 4)).unwrap();
    assert_eq!(next(&mut rounds), [21], "smaller again");
    // A page whose area is unmapped before the abort is outside.
    mark(&space, 20);
    mark(&space, 33);
    let lease = rounds.next().unwrap();
    space.unmap_discarding(pages(20, 2)).unwrap();
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (PAGE, PAGE));
    assert_eq!(next(&mut rounds), [33]);
    accounts_hold(&space);
}

#[test]
fn a_space_without_areas_says_so_and_can_get_some() {
    let space = AddressSpace::tracked(Granule::K4);
    let mut rounds = space.rounds();
    assert!(
        matches!(rounds.next(), Err(Error::NothingMapped { range }) if range == IovaRange::ALL)
    );
    assert!(matches!(rounds.harvest(), Err(Error::NothingMapped { .. })));
    space.map(pages(7, 1), 0, RW).unwrap();
    mark(&space, 7);
    assert_eq!(next(&mut rounds), [7]);
    space.unmap_discarding(pages(7, 1)).unwrap();
    assert!(matches!(rounds.next(), Err(Error::NothingMapped { .. })));
    // A domain that was never tracked.
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(7, 1), 0, RW).unwrap();
    assert!(matches!(
        space.rounds().next(),
        Err(Error::NeverTracked { .. })
    ));
}

/// While a lease lives, the next round has another bitmap.
#[test]
fn a_lease_that_is_kept_over_the_next_rounds_keeps_its_pages() {
    let space = with_a_hole();
    let mut rounds = space.rounds();
    mark(&space, 1);
    let first = rounds.next().unwrap();
    mark(&space, 2);
    let second = rounds.harvest().unwrap();
    mark(&space, 3);
    let third = rounds.next().unwrap();
    assert_eq!(numbers(&third, third.runs()), [3]);
    let second = second.sync().unwrap();
    assert_eq!(numbers(&second, second.runs()), [2]);
    assert_eq!(numbers(&first, first.runs()), [1]);
    third.commit();
    drop(first);
    assert_eq!(next(&mut rounds), [1]);
    drop(second);
    assert_eq!(next(&mut rounds), [2]);
    accounts_hold(&space);
}

#[test]
fn a_part_of_the_addresses_alone() {
    let space = with_a_hole();
    [0, 9, 15, 33, 47]
        .iter()
        .for_each(|page| mark(&space, *page));
    let mut middle = space.rounds().within(9 * PAGE..40 * PAGE).unwrap();
    let lease = middle.next().unwrap();
    assert_eq!(lease.range(), pages(9, 31));
    assert_eq!(numbers(&lease, lease.runs()), [9, 15, 33]);
    lease.commit();
    // Borders inside a page are rounded out to the page.
    let mut inside = space
        .rounds()
        .within(15 * PAGE + 100..47 * PAGE + 1)
        .unwrap();
    [8, 15].iter().for_each(|page| mark(&space, *page));
    let lease = inside.next().unwrap();
    assert_eq!(lease.range(), pages(15, 33));
    assert_eq!(numbers(&lease, lease.runs()), [15, 47]);
    lease.commit();
    assert_eq!(next(&mut space.rounds()), [0, 8]);
    let mut hole = space.rounds().within(16 * PAGE..32 * PAGE).unwrap();
    assert!(matches!(
        hole.next(),
        Err(Error::NothingMapped { range }) if range == pages(16, 16)
    ));
    let empty = space.rounds().within(5..5);
    assert!(matches!(
        empty,
        Err(Error::Range(RangeError::ZeroLength { .. }))
    ));
}

#[test]
fn bits_of_many_pages_and_of_parts_of_one() {
    let space = with_a_hole();
    mark(&space, 5);
    mark(&space, 35);
    let mut coarse = space.rounds().granule(Granule::from_lg2(14).unwrap());
    let lease = coarse.next().unwrap();
    assert_eq!(lease.granule().bytes(), 4 * PAGE);
    assert_eq!(numbers(&lease, lease.runs()), [4, 5, 6, 7, 32, 33, 34, 35]);
    assert_eq!(lease.dirty(), 2);
    drop(lease);
    let mut fine = space.rounds().granule(Granule::from_lg2(11).unwrap());
    let lease = fine.next().unwrap();
    assert_eq!(lease.dirty(), 8 * 2, "the abort put whole granules back");
    lease.commit();
    // An area that begins inside a granule, and one that ends inside.
    let space = AddressSpace::tracked(Granule::K4);
    space.map(pages(5, 6), 0, RW).unwrap();
    mark(&space, 5);
    mark(&space, 10);
    let mut coarse = space.rounds().granule(Granule::from_lg2(15).unwrap());
    let lease = coarse.next().unwrap();
    assert_eq!((lease.range(), lease.dirty()), (pages(0, 16), 2));
    lease.commit();
}

#[test]
fn one_domain_alone() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    first.dirty(1);
    second.dirty(2);
    mark(&space, 3);
    let mut one = space.rounds().domain(space.domains()[0]);
    assert_eq!(next(&mut one), [1]);
    assert_eq!(next(&mut space.rounds()), [2, 3]);
    first.dirty(4);
    drop(one.next().unwrap());
    assert_eq!(next(&mut one), [4], "put back for its domain");
    space.detach(space.domains()[0]).unwrap();
    assert!(matches!(one.next(), Err(Error::NotAttached { .. })));
}

/// A source stops: the round is an error, and all pages below and above the stop are dirty again.
#[test]
fn a_stop_in_a_round_puts_everything_back() {
    let (space, first, second) = two_sources();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.map(pages(32, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    let mut rounds = space.rounds();
    [2, 12, 40].iter().for_each(|page| first.dirty(*page));
    mark(&space, 3);
    second.with(|s| s.stop_at = Some(10));
    let error = rounds.next().unwrap_err();
    assert!(error.to_string().contains("broken on purpose"), "{error}");
    accounts_hold(&space);
    // The same with `partial`: the lease has the pages below the stop, the rest stays dirty.
    let lease = rounds.harvest().unwrap();
    assert_eq!(lease.next(), Some(Iova::new(10 * PAGE)));
    let lease = lease.partial().sync().unwrap();
    assert_eq!(lease.range(), pages(0, 10));
    assert_eq!(numbers(&lease, lease.runs()), [2, 3]);
    lease.commit();
    second.with(|s| s.stop_at = None);
    assert_eq!(next(&mut rounds), [12, 40]);
    assert_eq!(next(&mut rounds), [0u64; 0]);
    accounts_hold(&space);
}

/// A flush fails: the round is an error and is put back. The next round pays the debt.
#[test]
fn a_flush_that_fails_in_a_round_puts_everything_back() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    space.map(pages(0, 16), 0, RW).unwrap();
    space.start_tracking().unwrap();
    let mut rounds = space.rounds();
    fake.dirty(7);
    fake.with(|s| s.fail_invalidations = 1);
    assert!(rounds.next().is_err());
    assert!(fake.with(|s| s.invalidated.is_empty()));
    assert_eq!(next(&mut rounds), [7]);
    assert_eq!(fake.with(|s| s.invalidated.clone()), [pages(7, 1)]);
}

/// The lease of a partial scan cannot be mistaken for a whole one: the only call that leads to its
/// runs is `partial`.
#[test]
fn a_stopped_lease_cannot_be_synced_by_accident() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    space.map(pages(0, 64), 0, RW).unwrap();
    space.start_tracking().unwrap();
    [5, 50].iter().for_each(|page| fake.dirty(*page));
    fake.with(|s| s.stop_at = Some(10));
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    let all = |words: &mut [u64]| -> Result<(), Error> {
        let lease = space.harvest(&request, UserBitmap::new(words))?;
        lease.sync()?.commit();
        Ok(())
    };
    assert!(all(&mut [0]).is_err());
    // An earlier flush does not hide the stop.
    let mut words = [0u64];
    let mut lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    lease.flush().unwrap();
    assert!(lease.sync().is_err());
    let stats = space.stats();
    assert_eq!((stats.commits, stats.aborts), (0, 2));
    fake.with(|s| s.stop_at = None);
    let mut words = [0u64];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    // `partial` changes nothing in the lease of a harvest that did not stop.
    let lease = lease.partial().sync().unwrap();
    assert_eq!(numbers(&lease, lease.runs()), [5, 50]);
    lease.commit();
    accounts_hold(&space);
}

/// Leases that own their space and bitmap are `'static` and `Send`. The test is that this compiles.
#[test]
fn leases_of_a_shared_space_are_static_and_send() {
    fn owned<T: Send + Sync + 'static>(_: &T) {}
    fn shared<T: Send + Sync>(_: &T) {}
    let space = Arc::new(with_a_hole());
    let mut rounds = Rounds::shared(Arc::clone(&space));
    mark(&space, 7);
    mark(&space, 40);
    let lease: Lease<'static, Owed> = rounds.harvest().unwrap();
    owned(&lease);
    owned(&rounds);
    shared(&space.rounds());
    let (jobs, inbox) = std::sync::mpsc::channel::<Lease<'static, Synced>>();
    let copier = std::thread::spawn(move || {
        let copied = inbox.into_iter().map(|lease| {
            let found = numbers(&lease, lease.runs());
            lease.commit();
            found
        });
        copied.collect::<Vec<_>>()
    });
    jobs.send(lease.sync().unwrap()).unwrap();
    mark(&space, 8);
    let last = rounds.next().unwrap();
    // The space lives as long as its last lease, and an abort still works.
    let weak = Arc::downgrade(&space);
    drop((space, rounds));
    assert!(weak.upgrade().is_some());
    let space = weak.upgrade().unwrap();
    last.abort();
    assert_eq!(next(&mut space.rounds()), [8]);
    drop(jobs);
    assert_eq!(copier.join().unwrap(), [vec![7, 40]]);
    accounts_hold(&space);
    drop(space);
    assert!(weak.upgrade().is_none(), "nothing keeps it");
}

/// Threads commit overlapping parts of one lease: each dirty page is committed once, and the rest
/// is put back.
#[test]
fn many_threads_commit_parts_of_one_lease() {
    const PAGES: u64 = 4096;
    let space = AddressSpace::tracked(Granule::K4);
    space.map(pages(0, PAGES), 0, RW).unwrap();
    let dirty: Vec<u64> = (0..PAGES).filter(|page| page % 3 != 1).collect();
    dirty.iter().for_each(|page| mark(&space, *page));
    let mut rounds = space.rounds();
    let lease = rounds.next().unwrap();
    let (lease_ref, committed) = (&lease, std::sync::Mutex::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let committed = &committed;
            scope.spawn(move || {
                let mut mine = 0;
                for nth in 0..600 {
                    // The parts of all threads overlap. None reaches the last quarter.
                    let first = (nth * 37 + thread * 11) % (PAGES * 3 / 4 - 8);
                    mine += lease_ref.commit_range(pages(first, 1 + nth % 8));
                }
                *committed.lock().unwrap() += mine;
            });
        }
    });
    let committed = committed.into_inner().unwrap();
    let named: BTreeSet<u64> = (0..4u64)
        .flat_map(|thread| {
            (0..600u64).flat_map(move |nth| {
                let first = (nth * 37 + thread * 11) % (PAGES * 3 / 4 - 8);
                first..first + 1 + nth % 8
            })
        })
        .collect();
    let (done, rest): (Vec<u64>, Vec<u64>) = dirty.iter().partition(|page| named.contains(page));
    assert_eq!(committed, done.len() as u64);
    assert_eq!(lease.abort().bytes, rest.len() as u64 * PAGE);
    let stats = space.stats();
    assert_eq!(stats.committed_bytes, done.len() as u64 * PAGE);
    accounts_hold(&space);
    assert_eq!(next(&mut rounds), rest);
}

/// A mask and a bound in one request: the harvest takes exactly the pages of the mask, a part at a
/// time.
#[test]
fn masked_and_bounded_together() {
    let fake = Arc::new(Fake::default());
    let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
    space.map(pages(0, 512), 0, RW).unwrap();
    space.start_tracking().unwrap();
    (0..512).for_each(|page| fake.dirty(page));
    let mut mask = [0x0000_ffff_0000_ffffu64; 8];
    let mask = UserBitmap::new(&mut mask)
        .view(pages(0, 512), Granule::K4)
        .unwrap();
    let request = HarvestRequest::new(pages(0, 512), Granule::K4).masked(mask);
    let (mut next, mut calls, mut taken) = (Some(Iova::MIN), 0, Vec::new());
    while let Some(from) = next {
        let mut words = [0u64; 8];
        let part = request.resume_at(from).max_bits(20);
        let lease = space.harvest(&part, UserBitmap::new(&mut words)).unwrap();
        assert!(lease.report().bits_set <= 20 + 63);
        assert!(lease.next().is_none_or(|next| next > from), "progress");
        next = lease.next();
        calls += 1;
        let lease = lease.sync().unwrap();
        taken.extend(numbers(&lease, lease.runs()));
        if calls == 2 {
            lease.abort();
        } else {
            lease.commit();
        }
    }
    let in_mask = |page: &u64| page % 32 < 16;
    let expect: Vec<u64> = (0..512).filter(in_mask).collect();
    assert_eq!(taken, expect, "each once");
    assert!(calls > 3, "{calls} calls");
    let left = self::next(&mut space.rounds());
    let outside: Vec<u64> = (0..512).filter(|page| !in_mask(page)).collect();
    let back: Vec<u64> = left.iter().copied().filter(in_mask).collect();
    assert!(outside.iter().all(|page| left.contains(page)), "{left:?}");
    assert!(
        !back.is_empty() && back.len() < 128,
        "that of one call: {back:?}"
    );
    accounts_hold(&space);
}
