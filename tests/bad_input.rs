//! Every refusal: which input gets which error and errno, which of two faults is reported, and that
//! nothing was touched.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Fake, PAGE, pages};
use dirtymap::bitmap::BitmapError;
use dirtymap::{
    Access, AddressSpace, Change, Error, Granule, HarvestRequest, Holes, Iova, IovaRange,
    RangeError, Scope, UserBitmap,
};
use std::sync::Arc;

const RW: Access = Access::ReadWrite;
/// The last page of the address space.
const TOP: u64 = u64::MAX - (PAGE - 1);

/// The name of an error's variant, and its number.
fn name(error: &Error) -> (String, i32) {
    let debug = match error {
        Error::Range(error) => format!("{error:?}"),
        Error::Bitmap(error) => format!("Bitmap{error:?}"),
        error => format!("{error:?}"),
    };
    let end = debug.find([' ', '(']).unwrap_or(debug.len());
    (debug[..end].to_string(), error.errno())
}

fn bytes(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

fn lg2(lg2: u8) -> Granule {
    Granule::from_lg2(lg2).unwrap()
}

#[test]
fn ranges_and_granules_that_do_not_exist() {
    let range = |start, len| IovaRange::from_len(Iova::new(start), len).map(drop);
    let between = |start, last| IovaRange::new(Iova::new(start), Iova::new(last)).map(drop);
    let granule = |bytes| Granule::from_bytes(bytes).map(drop);
    // (what is asked for, its error, its number, what the text names)
    let rows = [
        (range(5, 0), "ZeroLength", 22, "0x5"),
        (range(u64::MAX, 0), "ZeroLength", 22, "0xffffffffffffffff"),
        (range(u64::MAX, 2), "Wraps", 75, "0x2 bytes"),
        (range(1, u64::MAX), "", 0, ""),
        (range(2, u64::MAX), "Wraps", 75, "0xffffffffffffffff bytes"),
        (range(TOP, PAGE), "", 0, ""),
        (range(TOP, PAGE + 1), "Wraps", 75, "0x1001 bytes"),
        (between(1, 0), "ReversedRange", 22, "0x0"),
        (between(0, u64::MAX), "", 0, ""),
        (granule(0), "BadGranule", 22, "0 bytes"),
        (granule(3), "BadGranule", 22, "3 bytes"),
        (granule(u64::MAX), "BadGranule", 22, "18446744073709551615"),
        (granule((1 << 63) + 1), "BadGranule", 22, "2^63"),
        (granule(1), "", 0, ""),
        (granule(1 << 63), "", 0, ""),
    ];
    for (nth, (result, error, errno, text)) in rows.into_iter().enumerate() {
        match result {
            Ok(()) => assert_eq!(error, "", "row {nth}"),
            Err(refused) => {
                assert_eq!(refused.errno(), errno, "row {nth}");
                let refused = Error::from(refused);
                assert_eq!(name(&refused), (error.to_string(), errno), "row {nth}");
                assert!(refused.to_string().contains(text), "row {nth}: {refused}");
            }
        }
    }
    assert!(Granule::from_lg2(64).is_none() && Granule::from_lg2(255).is_none());
}

/// A space of 64 pages, a hole and 8 pages, and its source. A device wrote page 1, a thread marked
/// page 2.
struct World {
    space: AddressSpace,
    fake: Arc<Fake>,
}

impl World {
    fn new(tracked: bool) -> World {
        let fake = Arc::new(Fake::default());
        let space = AddressSpace::with_source(Granule::K4, fake.clone()).unwrap();
        space.map(pages(0, 64), 0, RW).unwrap();
        space.map(pages(72, 8), 0, RW).unwrap();
        space.reserve(pages(90, 2)).unwrap();
        if tracked {
            space.start_tracking().unwrap();
            space.mark(pages(2, 1)).unwrap();
        }
        fake.dirty(1);
        World { space, fake }
    }

    /// The state that a refused call must not change.
    fn state(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let mut words = [0u64];
        let request = HarvestRequest::new(pages(0, 64), Granule::K4);
        let peeked = self.space.peek(&request, UserBitmap::new(&mut words));
        let peeked = peeked.map(drop).map_err(|error| name(&error));
        let fake = self.fake.with(|s| {
            (
                s.dirty.clone(),
                s.mapped.clone(),
                s.tracking,
                s.split.clone(),
            )
        });
        let stats = format!("{:?}", self.space.stats());
        let space = (
            self.space.mappings(),
            self.space.ranges(),
            self.space.domains(),
        );
        (words, peeked, fake, space, stats)
    }
}

type Ask<'a> = dyn Fn(&AddressSpace, &HarvestRequest<'_>, &mut [u64]) -> Result<(), Error> + 'a;

/// Makes the request in every mode. All modes refuse it alike, and leave the bitmap, the space and
/// the source as they were.
fn refuse_everywhere(
    world: &World,
    request: HarvestRequest<'_>,
    words: usize,
    expected: (&str, i32),
) {
    let full = &mut [u64::MAX; 2];
    let mask = UserBitmap::new(full).view(pages(0, 128), Granule::K4);
    let mask = mask.unwrap();
    let modes: &[(&str, &Ask<'_>)] = &[
        ("harvest", &|space, request, words| {
            let lease = space.harvest(request, UserBitmap::new(words));
            lease.map(drop)
        }),
        ("peek", &|space, request, words| {
            space.peek(request, UserBitmap::new(words)).map(drop)
        }),
        ("masked", &|space, request, words| {
            let lease = space.harvest(&request.masked(mask), UserBitmap::new(words));
            lease.map(drop)
        }),
        ("bounded", &|space, request, words| {
            let from = request.range().start();
            let bounded = request.resume_at(from).max_bits(u64::MAX);
            let part = space.harvest(&bounded, UserBitmap::new(words));
            part.map(drop)
        }),
        #[cfg(feature = "rayon")]
        ("parallel", &|space, request, words| {
            let lease = space.harvest(&request.parallel(), UserBitmap::new(words));
            lease.map(drop)
        }),
    ];
    for (mode, ask) in modes {
        let before = world.state();
        let mut bitmap = vec![0xA5A5_0000_FFFF_1234; words];
        let error = ask(&world.space, &request, &mut bitmap).unwrap_err();
        let expected = (expected.0.to_string(), expected.1);
        assert_eq!(name(&error), expected, "{mode} of {request:?}: {error}");
        assert!(bitmap.iter().all(|word| *word == 0xA5A5_0000_FFFF_1234));
        assert_eq!(world.state(), before, "{mode} of {request:?}");
    }
}

#[test]
fn harvests_are_refused_in_order() {
    let new = HarvestRequest::new;
    let k4 = Granule::K4;
    let gone = {
        let world = World::new(false);
        let domain = world.space.attach(Arc::new(Fake::default())).unwrap();
        world.space.detach(domain).unwrap();
        Scope::Domain(domain)
    };
    let unaligned = ("Unaligned", 22);
    let short = ("BitmapTooShort", 22);
    let never = ("NeverTracked", 22);
    // (request, words of its bitmap, its error if nothing was ever tracked, its error if it was)
    let rows = [
        // Unaligned to the page: the start, the end, both. This fault comes before those of the
        // granule, the bitmap and the hole.
        (new(bytes(1, PAGE - 1), lg2(0)), 64, unaligned, unaligned),
        (new(bytes(0, PAGE + 512), lg2(9)), 1, unaligned, unaligned),
        (new(bytes(2048, PAGE), lg2(11)), 1, unaligned, unaligned),
        (new(bytes(2048, PAGE), lg2(13)), 0, unaligned, unaligned),
        (new(bytes(1, u64::MAX - 1), k4), 0, unaligned, unaligned),
        // Unaligned to the granule: the start, the end. This fault comes before that of the bitmap.
        (new(pages(1, 3), lg2(13)), 1, unaligned, unaligned),
        (new(pages(0, 3), lg2(13)), 1, unaligned, unaligned),
        (new(pages(0, 64), lg2(63)), 0, unaligned, unaligned),
        // The bitmap is too short, by one bit or by far. This fault comes before those of the
        // scope, the tracking and the hole.
        (new(pages(0, 64), k4), 0, short, short),
        (new(pages(0, 65), k4).holes(Holes::Refuse), 1, short, short),
        (new(pages(0, 16), lg2(9)), 1, short, short),
        (new(pages(0, 65), k4).in_scope(gone), 1, short, short),
        (new(IovaRange::ALL, lg2(0)), 1, short, short),
        (new(IovaRange::ALL, k4), 1, short, short),
        // The scope, then the tracking; both come before the hole.
        (
            new(pages(0, 65), k4).holes(Holes::Refuse).in_scope(gone),
            2,
            ("NotAttached", 2),
            ("NotAttached", 2),
        ),
        (
            new(pages(0, 65), k4).holes(Holes::Refuse),
            2,
            never,
            ("Hole", 22),
        ),
        // A hole at the end, in the middle, at the start, everywhere, over all addresses.
        (
            new(pages(0, 80), k4).holes(Holes::Refuse),
            2,
            never,
            ("Hole", 22),
        ),
        (
            new(pages(64, 16), k4).holes(Holes::Refuse),
            1,
            never,
            ("Hole", 22),
        ),
        (
            new(bytes(TOP, PAGE), k4).holes(Holes::Refuse),
            1,
            never,
            ("Hole", 22),
        ),
        (
            new(IovaRange::ALL, lg2(63)).holes(Holes::Refuse),
            1,
            never,
            ("Hole", 22),
        ),
    ];
    let (untracked, tracked) = (World::new(false), World::new(true));
    for (request, words, before, after) in rows {
        refuse_everywhere(&untracked, request, words, before);
        refuse_everywhere(&tracked, request, words, after);
    }
    // A request without a fault succeeds after all those refusals.
    let mut words = [0u64];
    let request = new(pages(0, 64), k4);
    let lease = tracked
        .space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    assert_eq!(words, [0b110]);
}

/// A hole stops the harvest: the lease has the dirty pages below it, the rest is as it was.
#[test]
fn a_hole_stops_where_it_begins() {
    let world = World::new(true);
    world.space.mark(pages(73, 1)).unwrap();
    let rows = [
        (pages(0, 80), 64, 0b110),
        (pages(2, 78), 64, 0b1),
        (pages(64, 16), 64, 0),
        (pages(72, 20), 80, 0b10),
    ];
    for (range, hole, bits) in rows {
        let mut words = [0u64; 2];
        let request = HarvestRequest::new(range, Granule::K4).holes(Holes::Stop);
        let lease = world
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let Some(stopped) = lease.stopped() else {
            panic!("{range} has a hole: {lease:?}");
        };
        assert_eq!(stopped.at, Iova::new(hole * PAGE));
        assert_eq!(name(&stopped.error), ("Hole".to_string(), 22));
        assert!(matches!(
            stopped.error,
            Error::Hole { at, range: asked } if at == stopped.at && asked == range
        ));
        drop(lease); // what it had is put back
        assert_eq!(words, [bits, 0], "{range}");
        for (range, bits) in [(pages(0, 64), 0b110), (pages(72, 8), 0b10)] {
            let mut words = [0u64];
            let request = HarvestRequest::new(range, Granule::K4);
            let peeked = world.space.peek(&request, UserBitmap::new(&mut words));
            peeked.unwrap();
            assert_eq!(words, [bits], "{range}");
        }
    }
}

/// The calls that change a space, and their refusals.
#[test]
fn changes_are_refused_in_order() {
    let world = World::new(true);
    world.space.set_allowed(&[pages(100, 4)]).unwrap();
    let space = &world.space;
    let domain = space.domains()[0];
    let gone = space.attach(Arc::new(Fake::default())).unwrap();
    space.detach(gone).unwrap();
    let coarse = Arc::new(Fake::default());
    coarse.with(|s| s.page = Some(lg2(21)));
    let change = |changes: &[Change]| space.apply(changes).map(drop);
    let map = |range, backing| Change::Map {
        range,
        backing,
        access: RW,
    };
    let at = |page: u64| Iova::new(page * PAGE);
    let unmap = |range| space.unmap_discarding(range).map(drop);
    let anywhere = |len, backing| space.map_anywhere(len, backing, RW).map(drop);
    type Call<'a> = Box<dyn Fn() -> Result<(), Error> + 'a>;
    let row = |call: Call<'_>, error: &'static str, errno: i32| {
        let before = world.state();
        let refused = call().expect_err(error);
        assert_eq!(name(&refused), (error.to_string(), errno), "{refused}");
        assert_eq!(world.state(), before, "{refused}");
    };
    // Map: the range, the backing, its wrap, the reservation, the area.
    let fixed = |range, backing| -> Call<'_> { Box::new(move || space.map(range, backing, RW)) };
    row(fixed(bytes(1, PAGE), 1), "Unaligned", 22);
    row(fixed(bytes(0, PAGE + 1), 1), "Unaligned", 22);
    row(fixed(pages(60, 31), TOP + 1), "UnalignedBacking", 22);
    row(fixed(pages(60, 31), TOP), "BackingWraps", 75);
    row(fixed(pages(60, 31), 0), "Reserved", 22);
    row(fixed(pages(91, 2), 0), "Reserved", 22);
    row(fixed(pages(60, 30), 0), "Overlap", 17);
    row(fixed(IovaRange::ALL, 1 << 12), "BackingWraps", 75);
    row(fixed(IovaRange::ALL, 0), "Reserved", 22);
    row(Box::new(|| anywhere(0, 1)), "ZeroLength", 22);
    row(Box::new(|| anywhere(PAGE - 1, 1)), "UnalignedLength", 22);
    row(Box::new(|| anywhere(u64::MAX, 1)), "UnalignedLength", 22);
    row(Box::new(|| anywhere(2 * PAGE, 1)), "UnalignedBacking", 22);
    row(Box::new(|| anywhere(2 * PAGE, TOP)), "BackingWraps", 75);
    row(Box::new(|| anywhere(8 * PAGE, 0)), "NoSpace", 28);
    row(Box::new(|| anywhere(TOP, 0)), "NoSpace", 28);
    // Unmap.
    row(Box::new(|| unmap(pages(64, 8))), "NothingMapped", 2);
    row(Box::new(|| unmap(bytes(TOP, PAGE))), "NothingMapped", 2);
    row(Box::new(|| unmap(pages(0, 63))), "PartOfArea", 2);
    row(Box::new(|| unmap(pages(0, 79))), "PartOfArea", 2);
    row(Box::new(|| unmap(bytes(1, 80 * PAGE))), "PartOfArea", 2);
    let returning = |range, granule, n: usize| -> Call<'_> {
        Box::new(move || {
            let mut words = vec![0u64; n];
            let unmapped = space.unmap(range, granule, UserBitmap::new(&mut words));
            let unmapped = unmapped.map(drop);
            assert!(words.iter().all(|word| *word == 0));
            unmapped
        })
    };
    row(returning(pages(0, 64), lg2(63), 0), "Unaligned", 22);
    row(
        returning(pages(0, 64), Granule::K4, 0),
        "BitmapTooShort",
        22,
    );
    row(returning(pages(0, 63), Granule::K4, 1), "PartOfArea", 2);
    row(returning(pages(64, 8), Granule::K4, 1), "NothingMapped", 2);
    // Cut.
    row(
        Box::new(|| space.cut(Iova::new(PAGE + 1)).map(drop)),
        "UnalignedCut",
        22,
    );
    row(
        Box::new(|| space.cut(Iova::MAX).map(drop)),
        "UnalignedCut",
        22,
    );
    // Reserve, release, allow.
    row(
        Box::new(|| space.reserve(bytes(63 * PAGE + 9, 1))),
        "CannotReserve",
        98,
    );
    row(
        Box::new(|| space.reserve(IovaRange::ALL)),
        "CannotReserve",
        98,
    );
    row(
        Box::new(|| space.reserve(pages(103, 5))),
        "CannotReserve",
        98,
    );
    row(
        Box::new(|| space.release_reserved(pages(90, 1))),
        "NotReserved",
        2,
    );
    row(
        Box::new(|| space.set_allowed(&[pages(90, 4), pages(93, 2)])),
        "AllowedTwice",
        22,
    );
    row(
        Box::new(|| space.set_allowed(&[pages(91, 1)])),
        "CannotAllow",
        98,
    );
    // Domains.
    row(
        Box::new(|| space.attach(world.fake.clone()).map(drop)),
        "AttachedTwice",
        17,
    );
    row(
        Box::new(|| space.attach(coarse.clone()).map(drop)),
        "CannotAttach",
        98,
    );
    row(Box::new(|| space.detach(gone)), "NotAttached", 2);
    row(
        Box::new(|| space.start_domain_tracking(gone)),
        "NotAttached",
        2,
    );
    // Batches: the error is that of the first fault, and no earlier change of the batch was made.
    let batches: [(Vec<Change>, usize, &str, i32); 4] = [
        (
            vec![map(pages(200, 1), 0), map(pages(200, 1), 0)],
            1,
            "Overlap",
            17,
        ),
        (
            vec![
                Change::Cut { at: at(8) },
                Change::Unmap { range: pages(0, 8) },
                Change::Unmap { range: pages(8, 8) },
            ],
            2,
            "PartOfArea",
            2,
        ),
        (
            vec![Change::Cut { at: Iova::new(9) }, map(bytes(1, 1), 1)],
            0,
            "UnalignedCut",
            22,
        ),
        (
            vec![
                map(pages(300, 2), 0),
                Change::Unmap {
                    range: pages(300, 2),
                },
            ],
            1,
            "Busy",
            16,
        ),
    ];
    for (changes, nth, error, errno) in &batches {
        let before = world.state();
        let refused = change(changes).unwrap_err();
        assert_eq!(refused.errno(), *errno);
        let Error::Change {
            index,
            error: inner,
        } = &refused
        else {
            panic!("{refused}");
        };
        assert_eq!((*index, name(inner)), (*nth, (error.to_string(), *errno)));
        assert_eq!(world.state(), before, "{refused}");
    }
    assert_eq!(space.domains(), [domain]);
}

/// Code between files and calls of this library returns `io::Result`. A failed write to a socket
/// was "the dirty source failed" there, because no error of the library turned into one of files.
#[test]
fn errors_turn_into_those_of_files_and_back() {
    fn io<T>(result: Result<T, impl Into<std::io::Error>>) -> Error {
        let error = result.map(drop).map_err(Into::into).unwrap_err();
        error.downcast::<Error>().unwrap()
    }
    let refused = io(IovaRange::from_len(Iova::new(1), 0));
    assert!(matches!(
        refused,
        Error::Range(RangeError::ZeroLength { .. })
    ));
    let range = bytes(0, 1 << 20);
    let refused = io(UserBitmap::new(&mut [0]).view(range, Granule::K4));
    assert!(matches!(
        refused,
        Error::Bitmap(BitmapError::TooShort { .. })
    ));
    let refused = io(AddressSpace::tracked(Granule::K4).rounds().next());
    assert!(matches!(refused, Error::NothingMapped { .. }));
}
