//! The cost of calls, counted in comparisons. It grows in proportion to the number of ranges that a
//! call names, regardless of earlier cuts, maps and unmaps, and never quadratically.

use super::{AddressSpace, AreaHandle, Change};
use crate::bitmap::{CHUNK_BITS, Sink, SparseBitmap, UserBitmap, WINDOW_BITS};
use crate::compared::{count, grows_gently};
use crate::error::Error;
use crate::flush::{FlushGather, Invalidated};
use crate::harvest::{HarvestRequest, Start};
use crate::source::{DirtySource, LeafSink, Mapping, Stopped, Tracking};
use crate::sync::{Arc, Mutex, lock};
use crate::units::{Access, Granule, Iova, IovaRange};

const RW: Access = Access::ReadWrite;

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
}

/// `n` numbers, each once, in an order that is neither ascending nor descending.
fn shuffled(n: u64) -> impl Iterator<Item = u64> {
    (0..n).map(move |nth| nth * 1231 % n)
}

fn map(nth: u64) -> Change {
    Change::Map {
        range: pages(2 * nth, 1),
        backing: 0,
        access: RW,
    }
}

fn unmap(first: u64, n: u64) -> Change {
    let range = pages(first, n);
    Change::Unmap { range }
}

fn cut(page: u64) -> Change {
    let at = Iova::new(page << 12);
    Change::Cut { at }
}

/// A source that accepts every call, and that runs a given function at the next map.
#[derive(Default)]
struct Plain {
    refused: Option<IovaRange>,
    on_map: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl DirtySource for Plain {
    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let happens = lock(&self.on_map).take();
        happens.into_iter().for_each(|happen| happen());
        match self.refused {
            Some(refused) if refused == mapping.range => Err(Error::CannotSplit {
                at: refused.start(),
            }),
            _ => Ok(()),
        }
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn split_at(&self, _: Iova, _: &mut FlushGather) -> Result<(), Error> {
        Ok(())
    }

    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
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

fn space() -> AddressSpace {
    AddressSpace::with_source(Granule::K4, Plain::default()).unwrap()
}

/// A space with `n` areas of one page each, with holes in between.
fn of_areas(n: u64) -> AddressSpace {
    let space = space();
    (0..n).for_each(|nth| space.map(pages(2 * nth, 1), 0, RW).unwrap());
    space
}

/// A space with one area of `n` pages.
fn of_pages(n: u64) -> AddressSpace {
    let space = space();
    space.map(pages(0, n), 0, RW).unwrap();
    space
}

/// The cost of applying `changes` to the space that `space` makes, for `n` changes.
fn batch(
    space: impl Fn(u64) -> AddressSpace,
    changes: impl Fn(u64) -> Vec<Change>,
) -> impl Fn(u64) -> u64 {
    move |n| {
        let space = space(n);
        let changes = changes(n);
        let applied = count(|| assert!(space.apply(&changes).is_ok()));
        // The result is checked, so that no call is cheap because it does nothing.
        space.areas.internal_validate();
        applied
    }
}

/// A restore of a guest maps tens of thousands of ranges by one batch. 32,000 took three seconds;
/// one by one they took 0.02.
#[test]
fn a_batch_costs_what_it_names() {
    let empty = |_| space();
    grows_gently("maps", batch(empty, |n| (0..n).map(map).collect()));
    let shuffle = |n| shuffled(n).map(map).collect();
    grows_gently("maps in any order", batch(empty, shuffle));
    let unmaps = |n| shuffled(n).map(|nth| unmap(2 * nth, 1)).collect();
    grows_gently("unmaps", batch(of_areas, unmaps));
    // Each change covers the ranges of all those before it.
    let longer = |n| (1..=n).map(|nth| unmap(0, 2 * nth)).collect();
    grows_gently("longer and longer unmaps", batch(of_areas, longer));
    let lower = |n| (0..n).rev().map(move |nth| unmap(2 * nth, 2 * (n - nth)));
    grows_gently(
        "unmaps from lower and lower",
        batch(of_areas, |n| lower(n).collect()),
    );
    let exchange = |n| {
        let maps = (0..n).map(|nth| map(n + nth));
        (0..n).map(|nth| unmap(2 * nth, 1)).chain(maps).collect()
    };
    grows_gently("an exchange", batch(of_areas, exchange));
}

#[test]
fn cuts_of_one_area_by_one_batch_cost_what_they_are() {
    let cuts = |n| (1..n).map(cut).collect();
    grows_gently("cuts", batch(of_pages, cuts));
    let shuffle = |n| shuffled(n).map(cut).collect();
    grows_gently("cuts in any order", batch(of_pages, shuffle));
    let gone = |n| {
        let cuts = (1..n).rev().map(cut);
        cuts.chain(shuffled(n).map(|nth| unmap(nth, 1))).collect()
    };
    grows_gently("cuts, and all pieces unmapped", batch(of_pages, gone));
    let twice = |n| (1..n).flat_map(|page| [cut(page), cut(page)]).collect();
    grows_gently("cuts where there is one", batch(of_pages, twice));
}

/// The source refuses the last of many maps: all others are taken out again.
#[test]
fn a_batch_that_is_taken_back_costs_what_it_names() {
    grows_gently("a batch that is refused", |n| {
        let refused = Plain {
            refused: Some(pages(2 * n - 2, 1)),
            ..Plain::default()
        };
        let space = space();
        space.attach(refused).unwrap();
        let changes: Vec<Change> = shuffled(n).map(map).collect();
        count(|| assert!(space.apply(&changes).is_err()))
    });
}

/// While a batch of many maps is under way, other calls map, and search for free addresses.
#[test]
fn promised_addresses_are_found_by_a_search() {
    let during = |what: fn(&AddressSpace, u64)| {
        move |n| {
            let source = Arc::new(Plain::default());
            let space = AddressSpace::with_source(Granule::K4, source.clone());
            let space = Arc::new(space.unwrap());
            let counted = Arc::new(Mutex::new(0));
            let (inner, cost) = (Arc::downgrade(&space), counted.clone());
            *lock(&source.on_map) = Some(Box::new(move || {
                let space = inner.upgrade().unwrap();
                *lock(&cost) = count(|| what(&space, n));
            }));
            let changes: Vec<Change> = (0..n).map(map).collect();
            space.apply(&changes).unwrap();
            *lock(&counted)
        }
    };
    let maps = during(|space, n| {
        for nth in 0..n {
            space.map(pages(2 * nth + 1, 1), 0, RW).unwrap();
        }
    });
    grows_gently("maps beside a batch", maps);
    let allowed = during(|space, n| {
        let allowed: Vec<IovaRange> = (0..n).map(|nth| pages(2 * nth + 1, 1)).collect();
        space.set_allowed(&allowed).unwrap();
        let found = space.map_anywhere(1 << 12, 0, RW).unwrap();
        assert_eq!(found, pages(1, 1));
    });
    grows_gently("a search in many windows beside a batch", allowed);
}

#[test]
fn domains_that_come_and_go_cost_what_there_is() {
    grows_gently("an attach", |n| {
        let space = of_areas(n);
        count(|| assert!(space.attach(Plain::default()).is_ok()))
    });
    grows_gently("a detach", |n| {
        let space = of_areas(n);
        let domain = space.domains()[0];
        count(|| space.detach(domain).unwrap())
    });
    let of_domains = |n| {
        (0..n).fold(space(), |space, _| {
            space.attach(Plain::default()).unwrap();
            space
        })
    };
    grows_gently("a map in many domains", |n| {
        let space = of_domains(n / 10);
        count(|| space.map(pages(0, 1), 0, RW).unwrap())
    });
    grows_gently("an unmap in many domains", |n| {
        let space = of_domains(n / 10);
        space.map(pages(0, 1), 0, RW).unwrap();
        count(|| assert!(space.unmap_discarding(pages(0, 1)).is_ok()))
    });
}

#[test]
fn a_mark_of_many_areas_costs_what_they_are() {
    grows_gently("a mark", |n| {
        let space = of_areas(n);
        count(|| assert!(space.mark(pages(0, 2 * n)).is_err()))
    });
}

/// The largest cost of a mark by the handle of an area that was cut into `n` pieces, and the cost
/// of a mark that looks its area up.
fn marks(space: &AddressSpace, handle: &AreaHandle, n: u64) -> [u64; 2] {
    let marked = (0..n).step_by(n as usize / 50);
    let by_handle = marked.map(|page| count(|| drop(handle.mark(pages(page, 1)))));
    let looked_up = count(|| drop(space.mark(pages(n / 2, 1))));
    [by_handle.max().unwrap(), looked_up]
}

/// 10,000 cuts made a mark by the old handle take 39 ms, and 60,000 of them overflowed its stack.
#[test]
fn a_mark_by_an_old_handle_does_not_pay_for_cuts() {
    const FEW: u64 = 200;
    const MANY: u64 = 20_000;
    let cost = |n: u64, unmap: fn(&AddressSpace, u64)| {
        let space = of_pages(n);
        let handle = space.area(Iova::MIN).unwrap();
        for page in 1..n {
            assert!(space.cut(Iova::new(page << 12)).unwrap());
        }
        (0..n).for_each(|page| unmap(&space, page));
        marks(&space, &handle, n)
    };
    // Two or three levels more, each of which is searched at most twice.
    let compare = |unmap| {
        let (few, many) = (cost(FEW, unmap), cost(MANY, unmap));
        let grown = few
            .iter()
            .zip(many)
            .map(|(few, many)| many - few.min(&many));
        assert!(grown.max().unwrap() <= 6, "{few:?} and {many:?}");
        [few[0], many[0]]
    };
    let [few, many] = compare(|_, _| ());
    assert_eq!(
        few, many,
        "while nothing has gone there is nothing to search"
    );
    // The worst case for the list of parts that have gone: every other page is still mapped.
    let _ = compare(|space, page| {
        if page % 2 == 0 {
            space.unmap_discarding(pages(page, 1)).unwrap();
        }
    });
    // Neighbours that have gone are one range.
    let [few, many] = compare(|space, page| {
        if page % 100 == 99 || page % 200 == 7 {
            return;
        }
        space.unmap_discarding(pages(page, 1)).unwrap();
    });
    assert!(few <= many);
}

/// Reclaims until `count` of `what` is `expected`. Other tests may hold the epoch back.
fn settle(space: &AddressSpace, what: &str, count: impl Fn() -> usize, expected: usize) {
    for _ in 0..1_000_000 {
        if count() == expected {
            return;
        }
        space.reclaim();
        std::thread::yield_now();
    }
    panic!("{} {what} where {expected} should be", count());
}

/// An area that is cut leaves only its pieces in memory and, for their marks, the first whole: no
/// area keeps a record of its pieces. A piece that was cut again goes, even if it has pieces.
#[test]
fn areas_that_were_cut_are_dropped() {
    const CUTS: u64 = 1000;
    let space = of_pages(2 * CUTS);
    let handle = space.area(Iova::MIN).unwrap();
    let whole = Arc::downgrade(&handle.area);
    for page in 1..CUTS {
        assert!(space.cut(Iova::new(page << 12)).unwrap());
    }
    // One count for each piece, and one for the handle.
    settle(&space, "areas", || whole.strong_count(), CUTS as usize + 1);
    for page in 1..CUTS {
        space.unmap_discarding(pages(page - 1, 1)).unwrap();
        assert!(space.cut(Iova::new((CUTS + page) << 12)).unwrap());
    }
    settle(&space, "areas", || whole.strong_count(), CUTS as usize + 1);
    space.unmap_discarding(IovaRange::ALL).unwrap();
    settle(&space, "areas", || whole.strong_count(), 1);
    drop(handle);
    assert_eq!(whole.strong_count(), 0);
}

/// `reclaim` drops everything that was unmapped and detached, even if no update follows, and the
/// memory of the last one, too.
#[test]
fn reclaim_drops_all_that_has_gone() {
    const AREAS: u64 = 100;
    let source = Arc::new(Plain::default());
    let space = AddressSpace::new(Granule::K4);
    let domain = space.attach(source.clone()).unwrap();
    (0..AREAS).for_each(|nth| space.map(pages(nth, 1), 0, RW).unwrap());
    let areas: Vec<_> = (0..AREAS)
        .filter_map(|nth| space.area(Iova::new(nth << 12)))
        .map(|handle| Arc::downgrade(&handle.area))
        .collect();
    let alive = || areas.iter().filter(|area| area.strong_count() > 0).count();
    assert_eq!(alive(), AREAS as usize);
    space.unmap_discarding(pages(0, AREAS - 1)).unwrap();
    settle(&space, "areas", alive, 1);
    space.unmap_discarding(pages(AREAS - 1, 1)).unwrap();
    settle(&space, "areas", alive, 0);
    space.detach(domain).unwrap();
    settle(&space, "sources", || Arc::strong_count(&source), 1);
}

/// A harvest for several consumers claims the pieces that it hides, and ends each claim. A claim
/// that stays has every later harvest look at all words of its piece. It has a flight of its own,
/// which a later harvest uses again.
#[test]
fn a_harvest_for_several_consumers_leaves_no_claim() {
    let space = of_pages(64);
    assert!(space.start_tracking().is_ok());
    let other = space.consumer("other", crate::Start::Clean);
    assert!(other.is_ok(), "a space without consumers claims nothing");
    for _ in 0..3 {
        assert!(space.mark(pages(3, 1)).is_ok());
        let round = space.rounds().next();
        assert_eq!(round.map(|lease| lease.commit().bits_set).ok(), Some(1));
        let claims = space.hiding.visit(IovaRange::ALL, Err);
        assert_eq!(claims, Ok(()));
    }
    let first = space.flights.claim();
    first.free();
    assert!(space.rounds().next().is_ok());
    assert!(std::ptr::eq(first, space.flights.claim()));
}

/// A harvest of a space with consumers leaves pages to the others piece by piece. It looked for
/// them in the flight of the whole area each time, so a large area cost the square of its pieces.
#[test]
fn a_harvest_looks_at_what_it_leaves_to_others_once() {
    let cost = |pieces: u64| {
        let space = AddressSpace::tracked(Granule::K4);
        let all = pages(0, pieces * WINDOW_BITS);
        space.map(all, 0, RW).unwrap();
        let other = space.consumer("other", Start::Clean).unwrap();
        // One page of each eighth chunk.
        let dirty = pieces * WINDOW_BITS / CHUNK_BITS / 8;
        for nth in 0..dirty {
            space.mark(pages(nth * 8 * CHUNK_BITS, 1)).unwrap();
        }
        let bitmap = SparseBitmap::new(pieces * WINDOW_BITS);
        let request = HarvestRequest::new(all, Granule::K4);
        let spent = count(|| {
            let lease = space.harvest(&request, UserBitmap::sparse(&bitmap));
            assert_eq!(lease.unwrap().report().bits_set, dirty);
        });
        assert_eq!(other.stats().pending_bytes, dirty << 12);
        spent
    };
    let (few, many) = (cost(4), cost(32));
    assert!(many <= 16 * few, "4 pieces cost {few}, 32 cost {many}");
}
