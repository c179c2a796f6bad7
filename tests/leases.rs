//! Leases that are forgotten, aborted after their area is gone, committed part by part.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{PAGE, leaked, pages, two_sources};
use dirtymap::harvest::Aborted;
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, Change, DirtySource, Error, Granule, HarvestRequest, Iova, IovaRange,
    Lease, Mapping, Owed, Scope, Tracking, UserBitmap,
};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, mpsc};

/// 64 pages. A device may have cached that their dirty bit is set.
#[derive(Default)]
struct Cached(Mutex<State>);

#[derive(Default)]
struct State {
    dirty: BTreeSet<u64>,
    cached: BTreeSet<u64>,
}

impl Cached {
    fn write(&self, page: u64) {
        let mut state = self.0.lock().unwrap();
        // A device that has cached "D is set" does not touch the table.
        if state.cached.insert(page) {
            state.dirty.insert(page);
        }
    }
}

fn numbers(range: IovaRange) -> std::ops::RangeInclusive<u64> {
    range.start().get() / PAGE..=range.last().get() / PAGE
}

impl DirtySource for Cached {
    fn map(&self, _: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        gather.add(range, Granule::K4);
        let mut state = self.0.lock().unwrap();
        let gone: Vec<u64> = state.dirty.range(numbers(range)).copied().collect();
        state.dirty.retain(|page| !gone.contains(page));
        drop(state);
        gone.into_iter().for_each(|page| dirty(pages(page, 1)));
    }

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let mut state = self.0.lock().unwrap();
        let found: Vec<u64> = state.dirty.range(numbers(range)).copied().collect();
        for page in found {
            out.take(pages(page, 1), Granule::K4, || state.dirty.remove(&page))
                .map_err(|error| Stopped {
                    at: Iova::new(page * PAGE),
                    error,
                })?;
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let mut state = self.0.lock().unwrap();
        for range in gather.ranges() {
            state.cached.retain(|page| !numbers(*range).contains(page));
        }
        Ok(Invalidated::default())
    }
}

fn harvest<'a>(space: &'a AddressSpace, range: IovaRange, words: &'a mut [u64]) -> Lease<'a, Owed> {
    let request = HarvestRequest::new(range, Granule::K4);
    space.harvest(&request, UserBitmap::new(words)).unwrap()
}

/// Harvests and commits. Returns the bits of the first 64 pages.
fn take(space: &AddressSpace, range: IovaRange) -> u64 {
    let mut words = [0u64];
    harvest(space, range, &mut words).sync().unwrap().commit();
    words[0]
}

/// A forgotten lease never pays its debt. So its pages are lost, and later writes of devices to
/// them are hidden as well, until a flush names these pages. This test holds what the documentation
/// of `Lease` says.
#[test]
fn a_lease_that_is_forgotten_hides_its_pages_until_a_flush_names_them() {
    let by_sync = |space: &AddressSpace, source: &Cached| {
        // Another lease, whose gather spans the page.
        source.write(2);
        source.write(4);
        let request = HarvestRequest::new(pages(0, 64), Granule::K4);
        let mut words = [0u64];
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        assert_eq!(lease.sync().unwrap().dirty(), 2);
        // The gather has two ranges, and page 3 is in neither.
        source.write(3);
        assert_eq!(take(space, pages(0, 64)), 0b10100, "put back by the drop");
        let mut gather = FlushGather::new();
        gather.add(pages(3, 1), Granule::K4);
        source.invalidate(&gather).unwrap();
    };
    let by_unmap = |space: &AddressSpace, _: &Cached| {
        space.unmap_discarding(pages(0, 64)).unwrap();
        space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    };
    type Way<'a> = &'a dyn Fn(&AddressSpace, &Cached);
    let ways: [Way<'_>; 2] = [&by_sync, &by_unmap];
    for way in ways {
        let source = Arc::new(Cached::default());
        let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
        space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        source.write(3);
        let words = leaked([0u64]);
        leaked(harvest(&space, pages(0, 64), words));
        assert_eq!(take(&space, pages(0, 64)), 0, "nobody reports what it took");
        source.write(3);
        source.write(40);
        assert_eq!(take(&space, pages(0, 64)), 1 << 40, "nor what comes later");
        source.write(3);
        assert_eq!(take(&space, pages(0, 64)), 0, "whatever else was flushed");
        way(&space, &source);
        source.write(3);
        assert_eq!(take(&space, pages(0, 64)), 1 << 3);
        // Writes to other pages were seen all the time.
        source.write(40);
        assert_eq!(take(&space, pages(0, 64)), 1 << 40);
    }
    // A lease that was synced has paid its debt.
    let source = Arc::new(Cached::default());
    let space = AddressSpace::with_source(Granule::K4, source.clone()).unwrap();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    source.write(3);
    let words = leaked([0u64]);
    leaked(harvest(&space, pages(0, 64), words).sync().unwrap());
    source.write(3);
    assert_eq!(take(&space, pages(0, 64)), 1 << 3);
}

/// A lease outlived its area, and was aborted when another area had its addresses. The abort
/// reported that everything was dirty again, and counted nothing as outside. The writes to the
/// first area were lost in silence, and the second area became dirty without a write.
#[test]
fn an_abort_counts_what_was_lost_with_an_area_that_was_mapped_again() {
    let unmap = |space: &AddressSpace| {
        space.unmap_discarding(pages(16, 16)).unwrap();
    };
    let map = |space: &AddressSpace, range: IovaRange| {
        space.map(range, 0, Access::ReadWrite).unwrap();
    };
    let batch = |space: &AddressSpace, range: IovaRange| {
        let (backing, access) = (0, Access::ReadWrite);
        let map = Change::Map {
            range,
            backing,
            access,
        };
        space.apply(&[map]).unwrap();
    };
    let allocate = |space: &AddressSpace, range: IovaRange| {
        let len = u64::try_from(range.len()).unwrap();
        let at = space.map_anywhere(len, 0, Access::ReadWrite);
        assert_eq!(at.unwrap(), range);
    };
    type Way<'a> = &'a dyn Fn(&AddressSpace, IovaRange);
    let ways: [Way<'_>; 3] = [&map, &batch, &allocate];
    for way in ways {
        for one_domain in [false, true] {
            let (space, first, _) = two_sources();
            space.map(pages(16, 16), 0, Access::ReadWrite).unwrap();
            space.map(pages(32, 16), 0, Access::ReadWrite).unwrap();
            space.start_tracking().unwrap();
            [19, 36].iter().for_each(|page| first.dirty(*page));
            let mut words = [0u64];
            let scope = match one_domain {
                true => Scope::Domain(space.domains()[0]),
                false => Scope::All,
            };
            let request = HarvestRequest::new(pages(16, 32), Granule::K4).in_scope(scope);
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            unmap(&space);
            way(&space, pages(16, 16));
            let aborted = lease.abort();
            let expected = Aborted {
                bytes: PAGE,
                outside_bytes: PAGE,
            };
            assert_eq!(aborted, expected);
            assert_eq!(space.stats().put_back_outside_bytes, PAGE);
            assert_eq!(take(&space, pages(16, 32)), 1 << 20);
        }
    }
}

/// Pages of an area that was cut meanwhile are put back into its pieces. Pages of a piece that was
/// unmapped and mapped again are outside.
#[test]
fn the_pieces_of_an_area_are_as_old_as_it_was() {
    let (space, first, _) = two_sources();
    space.map(pages(0, 32), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    [3, 10, 20].iter().for_each(|page| first.dirty(*page));
    let mut words = [0u64];
    let lease = harvest(&space, pages(0, 32), &mut words);
    assert!(space.cut(Iova::new(8 * PAGE)).unwrap());
    assert!(space.cut(Iova::new(16 * PAGE)).unwrap());
    space.unmap_discarding(pages(8, 8)).unwrap();
    space.map(pages(8, 8), 0, Access::ReadWrite).unwrap();
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (2 * PAGE, PAGE));
    assert_eq!(take(&space, pages(0, 32)), 1 << 3 | 1 << 20);
}

/// An area that is mapped during a harvest may be in its lease, if the source was harvested after
/// the fill. Its pages are not outside.
#[test]
fn an_area_that_comes_during_the_harvest_is_put_back() {
    let (space, first, second) = two_sources();
    let space = Arc::new(space);
    space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    first.with(|s| {
        let (space, second) = (space.clone(), second.clone());
        let swap = move || {
            // While the first source is harvested, another thread fills it again.
            space.unmap_discarding(pages(0, 16)).unwrap();
            space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
            second.dirty(9);
        };
        s.on_read = Some(Box::new(swap));
    });
    let mut words = [0u64];
    let lease = harvest(&space, pages(0, 16), &mut words);
    assert_eq!(lease.report().bits_set, 1);
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (PAGE, 0));
    assert_eq!(take(&space, pages(0, 16)), 1 << 9);
}

/// Parts that are committed in any order are committed once, and the rest is put back.
#[test]
fn parts_in_any_order_are_committed_once() {
    const N: u64 = 4096;
    for stride in [1, N - 1, 1597] {
        let (space, _, _) = two_sources();
        space.map(pages(0, N), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        space.mark(pages(0, N)).unwrap();
        let mut words = vec![0u64; (N / 64) as usize];
        let lease = harvest(&space, pages(0, N), &mut words).sync().unwrap();
        for n in 0..N {
            let page = n * stride % N;
            if page % 4 == 1 {
                continue;
            }
            assert_eq!(lease.commit_range(pages(page, 1)), 1);
        }
        assert_eq!(lease.commit_range(pages(0, 9)), 2);
        assert_eq!(lease.abort().bytes, (N / 4 - 2) * PAGE);
        let stats = space.stats();
        assert_eq!(stats.aborted_bytes, (N / 4 - 2) * PAGE);
        assert_eq!(
            stats.leased_bytes,
            stats.committed_bytes + stats.aborted_bytes
        );
    }
}

/// A batch fills its areas before they are in the tree. A harvest with an older list of areas took
/// a page that a device had written there, and was aborted before the batch ended. The page was in
/// no area, so it was counted as outside, and the new area lacked it.
#[test]
fn an_abort_keeps_pages_of_an_area_that_a_batch_is_about_to_publish() {
    for one_domain in [false, true] {
        let (space, first, second) = two_sources();
        let space = Arc::new(space);
        space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let scope = match one_domain {
            true => Scope::Domain(space.domains()[0]),
            false => Scope::All,
        };
        let (filled, is_filled) = mpsc::channel();
        let (go_on, goes_on) = mpsc::channel::<()>();
        second.with(|s| {
            s.on_map = Some(Box::new(move || {
                filled.send(()).unwrap();
                goes_on.recv().unwrap();
            }));
        });
        let (batch, running) = mpsc::channel();
        first.with(|s| {
            let (space, first) = (space.clone(), first.clone());
            // The harvest is under way.
            s.on_read = Some(Box::new(move || {
                space.unmap_discarding(pages(0, 16)).unwrap();
                let thread = std::thread::spawn(move || {
                    let (range, backing, access) = (pages(0, 16), 0, Access::ReadWrite);
                    let map = Change::Map {
                        range,
                        backing,
                        access,
                    };
                    space.apply(&[map]).unwrap();
                });
                is_filled.recv().unwrap();
                first.dirty(5);
                batch.send(thread).unwrap();
            }));
        });
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 16), Granule::K4).in_scope(scope);
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        let lease = lease.unwrap();
        assert_eq!(lease.report().bits_set, 1);
        drop(lease);
        go_on.send(()).unwrap();
        running.recv().unwrap().join().unwrap();
        let mut words = [0u64];
        let lease = space.harvest(&request, UserBitmap::new(&mut words));
        lease.unwrap().sync().unwrap().commit();
        assert_eq!(words, [1 << 5]);
    }
}

/// In every mode of harvest, a lease knows the version of its areas: its pages of an area that is
/// gone are outside, even if another area, or pieces of one, have its addresses.
#[test]
fn leases_of_all_modes_know_their_age() {
    for (mode, cut) in (0..4).flat_map(|mode| [(mode, false), (mode, true)]) {
        let (space, first, _) = two_sources();
        space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        first.dirty(5);
        let (mut words, mut mask) = ([0u64], [1u64 << 5]);
        let mask = UserBitmap::new(&mut mask);
        let mask = mask.view(pages(0, 16), Granule::K4).unwrap();
        let request = HarvestRequest::new(pages(0, 16), Granule::K4);
        let bitmap = UserBitmap::new(&mut words);
        let lease = match mode {
            0 => space.harvest(&request, bitmap).unwrap(),
            1 => space.harvest(&request.masked(mask), bitmap).unwrap(),
            2 => space.harvest(&request.max_bits(64), bitmap).unwrap(),
            #[cfg(feature = "rayon")]
            _ => space.harvest(&request.parallel(), bitmap).unwrap(),
            #[cfg(not(feature = "rayon"))]
            _ => continue,
        };
        space.unmap_discarding(pages(0, 16)).unwrap();
        space.map(pages(0, 16), 0, Access::ReadWrite).unwrap();
        if cut {
            assert!(space.cut(Iova::new(4 * PAGE)).unwrap());
        }
        let aborted = lease.abort();
        let told = (aborted.bytes, aborted.outside_bytes);
        assert_eq!(told, (0, PAGE), "mode {mode}, cut {cut}");
        assert_eq!(take(&space, pages(0, 16)), 0);
    }
}
