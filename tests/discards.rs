//! Discards: pages that read as zero, and writes that win over them.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use dirtymap::harvest::Content::{self, Data, Zero};
use dirtymap::harvest::{Bounds, Parent};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, Change, Consumer, DirtySource, Error, Granule, HarvestRequest, Iova,
    IovaRange, Lease, SharedLog, Start, Synced, Tracking, UserBitmap,
};

const PAGE: u64 = 4096;
const NONE: [(u64, u64, Content); 0] = [];

fn space(pages: u64) -> AddressSpace {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..pages * PAGE, 0, Access::ReadWrite).unwrap();
    space
}

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), n * PAGE).unwrap()
}

fn discard(space: &AddressSpace, range: IovaRange) {
    let done = space.discard(range, || Ok(())).unwrap();
    assert_eq!((done.zero_bytes, done.dirty_bytes), (range.len(), 0));
}

/// First page, number of pages, contents.
fn told(lease: &Lease<'_, Synced>) -> Vec<(u64, u64, Content)> {
    let told: Vec<_> = lease
        .contents()
        .map(|(run, content)| {
            assert!(run.is_aligned(Granule::K4));
            let pages = run.len() as u64 / PAGE;
            (run.start().get() / PAGE, pages, content)
        })
        .collect();
    // Together they are the runs.
    let pages: u64 = told.iter().map(|(_, pages, _)| pages).sum();
    let all: u128 = lease.runs().map(IovaRange::len).sum();
    assert_eq!(u128::from(pages * PAGE), all);
    told
}

fn next(consumer: &Consumer<'_>) -> Vec<(u64, u64, Content)> {
    let lease = consumer.rounds().next().unwrap();
    let told = told(&lease);
    lease.commit();
    told
}

/// The same for the unnamed consumer.
fn unnamed(space: &AddressSpace) -> Vec<(u64, u64, Content)> {
    let lease = space.rounds().next().unwrap();
    let told = told(&lease);
    lease.commit();
    told
}

/// A discard of more pages than a consumer may hold. They became pending one by one, without a
/// look at its bounds, and were dropped afterwards. A TRIM of a large disk took memory for each
/// consumer. Then each was told everything that is mapped.
#[test]
fn a_discard_out_of_bounds_is_told_as_what_it_is() {
    const CHUNK: u64 = 32768;
    let space = space(8 * CHUNK);
    let one = space.consumer("one", Start::Clean).unwrap();
    one.set_bounds(Bounds {
        bytes: 2 * PAGE,
        ..Bounds::default()
    });
    discard(&space, pages(CHUNK, 3 * CHUNK));
    let stats = one.stats();
    assert_eq!((stats.held_bytes, stats.dropped), (0, 0));
    assert!(stats.everything);
    one.rounds().next().unwrap().abort();
    space.mark(pages(CHUNK, 1)).unwrap();
    let lease = one.rounds().next().unwrap();
    let parent = Parent::Epoch(one.epoch());
    assert_eq!(lease.lineage().unwrap().parent, parent);
    let all = [(CHUNK, 1, Data), (CHUNK + 1, 3 * CHUNK - 1, Zero)];
    assert_eq!(told(&lease), all);
    lease.commit();
    assert_eq!(next(&one), NONE);
    assert!(!one.stats().everything);
    // Within its bounds.
    discard(&space, pages(CHUNK, 10));
    assert_eq!(one.stats().pending_bytes, 10 * PAGE);
    assert_eq!(next(&one), [(CHUNK, 10, Zero)]);
}

/// An area that begins inside of a chunk: a chunk of its marks lies in two of the bitmaps that all
/// consumers share. The zero bits of written pages are cleared in both.
#[test]
fn a_write_wins_wherever_the_area_begins() {
    const CHUNK: u64 = 32768;
    for start in [300, CHUNK - 70] {
        let space = AddressSpace::tracked(Granule::K4);
        space
            .map(pages(start, 2 * CHUNK), 0, Access::ReadWrite)
            .unwrap();
        let one = space.consumer("one", Start::Clean).unwrap();
        discard(&space, pages(start, 2 * CHUNK));
        for page in [start, CHUNK - 1, CHUNK, CHUNK + 200, 2 * CHUNK] {
            space.mark(pages(page, 1)).unwrap();
        }
        assert!(!unnamed(&space).is_empty());
        let written = next(&one);
        let data = written.iter().filter(|(.., content)| *content == Data);
        let data: Vec<(u64, u64)> = data.map(|(first, pages, _)| (*first, *pages)).collect();
        let mut expected = vec![(start, 1), (CHUNK - 1, 2), (CHUNK + 200, 1), (2 * CHUNK, 1)];
        expected.retain(|(first, _)| *first >= start);
        assert_eq!(data, expected, "from page {start}");
    }
}

#[test]
fn a_discarded_page_is_zero_until_it_is_written() {
    let space = space(100);
    space.mark(pages(3, 4)).unwrap();
    discard(&space, pages(4, 10));
    space.mark(pages(13, 2)).unwrap();
    let all = [(3, 1, Data), (4, 9, Zero), (13, 2, Data)];
    assert_eq!(unnamed(&space), all);
    assert_eq!(unnamed(&space), NONE);
    // A write to a page that was told as zero, and zero again.
    space.mark(pages(5, 1)).unwrap();
    assert_eq!(unnamed(&space), [(5, 1, Data)]);
    discard(&space, pages(5, 1));
    assert_eq!(unnamed(&space), [(5, 1, Zero)]);
    // A page that was clean is told, too: its copy has bytes.
    discard(&space, pages(50, 1));
    assert_eq!(unnamed(&space), [(50, 1, Zero)]);
}

#[test]
fn a_space_without_discards_has_data_only() {
    let space = space(100);
    space.mark(pages(3, 40)).unwrap();
    assert_eq!(unnamed(&space), [(3, 40, Data)]);
}

#[test]
fn each_consumer_is_told_of_a_discard() {
    let space = space(100_000);
    let one = space.consumer("one", Start::Clean).unwrap();
    let part = space
        .consumer_of("part", pages(40_000, 10), Start::Clean)
        .unwrap();
    space.mark(pages(1, 2)).unwrap();
    discard(&space, pages(2, 80_000));
    space.mark(pages(40_005, 1)).unwrap();
    let all = [
        (1, 1, Data),
        (2, 40_003, Zero),
        (40_005, 1, Data),
        (40_006, 39_996, Zero),
    ];
    assert_eq!(next(&one), all);
    let inside = [(40_000, 5, Zero), (40_005, 1, Data), (40_006, 4, Zero)];
    assert_eq!(next(&part), inside);
    assert_eq!(unnamed(&space), all);
    assert_eq!(next(&one), NONE);
    // One consumer takes a write; the page is zero for no other one.
    space.mark(pages(7, 1)).unwrap();
    discard(&space, pages(8, 1));
    assert_eq!(next(&one), [(7, 1, Data), (8, 1, Zero)]);
    assert_eq!(unnamed(&space), [(7, 1, Data), (8, 1, Zero)]);
}

/// The discard comes first, for both; one consumer takes the write that comes after it.
#[test]
fn a_write_that_another_consumer_took_is_data() {
    let space = space(100);
    let one = space.consumer("one", Start::Clean).unwrap();
    discard(&space, pages(3, 3));
    space.mark(pages(4, 1)).unwrap();
    assert_eq!(unnamed(&space), [(3, 1, Zero), (4, 1, Data), (5, 1, Zero)]);
    assert_eq!(next(&one), [(3, 1, Zero), (4, 1, Data), (5, 1, Zero)]);
}

#[test]
fn an_abort_puts_back_what_the_page_is_by_then() {
    let space = space(100);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(1, 1)).unwrap();
    discard(&space, pages(2, 3));
    let lease = one.rounds().next().unwrap();
    assert_eq!(told(&lease), [(1, 1, Data), (2, 3, Zero)]);
    space.mark(pages(3, 1)).unwrap(); // written since
    discard(&space, pages(1, 1)); // discarded since
    assert_eq!(lease.abort().bytes, 4 * PAGE);
    let all = [(1, 2, Zero), (3, 1, Data), (4, 1, Zero)];
    assert_eq!(next(&one), all);
    assert_eq!(unnamed(&space), all);
    assert_eq!(next(&one), NONE);
    // Without other consumers.
    drop(one);
    discard(&space, pages(9, 2));
    drop(space.rounds().next().unwrap());
    assert_eq!(unnamed(&space), [(9, 2, Zero)]);
}

/// A lease that was taken before the first discard is put back as dirty pages of the space.
#[test]
fn an_abort_of_a_lease_that_is_older_than_the_first_discard_is_data() {
    let space = space(100);
    space.mark(pages(1, 2)).unwrap();
    let lease = space.rounds().next().unwrap();
    discard(&space, pages(2, 2));
    lease.abort();
    assert_eq!(unnamed(&space), [(1, 2, Data), (3, 1, Zero)]);
}

#[test]
fn parts_of_pages_at_the_ends_are_dirty() {
    let space = space(100);
    let range = IovaRange::new(Iova::new(0x2e00), Iova::new(0x51ff)).unwrap();
    let done = space.discard(range, || Ok(())).unwrap();
    assert_eq!((done.zero_bytes, done.dirty_bytes), (0x2000, 0x400));
    assert_eq!(unnamed(&space), [(2, 1, Data), (3, 2, Zero), (5, 1, Data)]);
    // Less than a page.
    let done = space.discard(0x2100..0x2200, || Ok(())).unwrap();
    assert_eq!((done.zero_bytes, done.dirty_bytes), (0, 0x100));
    assert_eq!(unnamed(&space), [(2, 1, Data)]);
    // Across two areas, of which neither has a whole page of the other.
    space
        .map(100 * PAGE..200 * PAGE, 1 << 30, Access::ReadWrite)
        .unwrap();
    let done = space.discard(99 * PAGE + 1..102 * PAGE, || Ok(())).unwrap();
    assert_eq!(done.zero_bytes, 2 * u128::from(PAGE));
    assert_eq!(unnamed(&space), [(99, 1, Data), (100, 2, Zero)]);
}

#[test]
fn a_discard_that_fails_leaves_everything_dirty() {
    let space = space(100);
    let one = space.consumer("one", Start::Clean).unwrap();
    discard(&space, pages(4, 1));
    let failed = space.discard(pages(3, 3), || Err(io::ErrorKind::StorageFull.into()));
    let Err(Error::NotDropped { range, error }) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(
        (range, error.kind()),
        (pages(3, 3), io::ErrorKind::StorageFull)
    );
    assert_eq!(unnamed(&space), [(3, 3, Data)]);
    assert_eq!(next(&one), [(3, 3, Data)]);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        space.discard(pages(7, 1), || panic!("a closure"))
    }));
    assert!(panicked.is_err());
    assert_eq!(unnamed(&space), [(7, 1, Data)]);
    assert_eq!(next(&one), [(7, 1, Data)]);
    discard(&space, pages(7, 1));
    assert_eq!(unnamed(&space), [(7, 1, Zero)]);
}

#[test]
fn a_write_while_the_storage_is_dropped_is_data() {
    let space = space(100);
    space.mark(pages(3, 1)).unwrap();
    let dropped = space.discard(pages(2, 3), || {
        space.mark(pages(3, 1)).unwrap();
        Ok(())
    });
    dropped.unwrap();
    assert_eq!(unnamed(&space), [(2, 1, Zero), (3, 1, Data), (4, 1, Zero)]);
}

/// The storage is still there: what was dirty is data, also for a last harvest in between, and
/// nothing is zero yet, not even for a lease that was taken before.
#[test]
fn a_harvest_in_the_middle_of_a_discard_has_data() {
    let space = space(100);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(3, 1)).unwrap();
    space.mark(pages(9, 1)).unwrap();
    let before = space.rounds().next().unwrap();
    let dropped = space.discard(pages(2, 3), || {
        assert_eq!(next(&one), [(3, 1, Data), (9, 1, Data)]);
        assert_eq!(told(&before), [(3, 1, Data), (9, 1, Data)]);
        discard(&space, pages(9, 1)); // one in another
        Ok(())
    });
    dropped.unwrap();
    assert_eq!(told(&before), [(3, 1, Zero), (9, 1, Zero)]);
    before.commit();
    let all = [(2, 3, Zero), (9, 1, Zero)];
    assert_eq!(unnamed(&space), all);
    assert_eq!(next(&one), all);
}

#[test]
fn an_area_that_goes_takes_its_zeros_along() {
    let space = space(64);
    discard(&space, pages(3, 3));
    space.mark(pages(4, 1)).unwrap();
    let lease = space.rounds().next().unwrap();
    discard(&space, pages(10, 2));
    let mut words = [0];
    let bitmap = UserBitmap::new(&mut words);
    let (unmapped, dirty) = space.unmap(pages(0, 64), Granule::K4, bitmap).unwrap();
    assert_eq!((unmapped.dirty_bytes, dirty.count()), (0x2000, 2)); // zero is dirty here
    assert_eq!(words, [0b11 << 10]);
    // A young area at the same addresses, with another backing.
    space.map(pages(0, 64), 1 << 20, Access::ReadWrite).unwrap();
    assert_eq!(unnamed(&space), NONE);
    discard(&space, pages(5, 1));
    assert_eq!(
        told(&lease),
        [(3, 3, Data)],
        "its pages are those of the area that is gone"
    );
    assert_eq!(lease.abort().outside_bytes, 3 * PAGE);
    assert_eq!(unnamed(&space), [(5, 1, Zero)]);
    space.mark(pages(3, 1)).unwrap();
    assert_eq!(unnamed(&space), [(3, 1, Data)]);
}

#[test]
fn an_unmap_while_the_storage_is_dropped_ends_the_zeros() {
    let space = space(64);
    space.mark(pages(3, 1)).unwrap();
    let mut words = [0];
    let dropped = space.discard(pages(3, 2), || {
        let bitmap = UserBitmap::new(&mut words);
        let unmapped = space.unmap(pages(0, 64), Granule::K4, bitmap);
        assert_eq!(
            unmapped.unwrap().1.count(),
            1,
            "it was dirty, and is in hand"
        );
        space.map(pages(0, 64), 1 << 20, Access::ReadWrite).unwrap();
        Ok(())
    });
    dropped.unwrap();
    // A superset, and no zeros: the storage of the young area was not dropped.
    assert_eq!(unnamed(&space), [(3, 2, Data)]);
}

#[test]
fn a_cut_changes_nothing() {
    let space = space(64);
    discard(&space, pages(3, 10));
    space.cut(Iova::new(5 * PAGE)).unwrap();
    space.cut(Iova::new(8 * PAGE)).unwrap();
    space.mark(pages(6, 1)).unwrap();
    let range = pages(8, 56);
    space.apply(&[Change::Unmap { range }]).unwrap();
    assert_eq!(unnamed(&space), [(3, 3, Zero), (6, 1, Data), (7, 1, Zero)]);
    discard(&space, pages(4, 2)); // across the cut
    assert_eq!(unnamed(&space), [(4, 2, Zero)]);
}

/// A switch to on makes the baseline clean: a write before it is not tracked, and what was
/// discarded before that may hold anything.
#[test]
fn writes_that_were_not_tracked_leave_no_zeros() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    discard(&space, pages(3, 2));
    space.stop_tracking().unwrap();
    space.mark(pages(3, 1)).unwrap();
    let lease = space.rounds().next().unwrap();
    assert_eq!(told(&lease), [(3, 2, Data)], "nothing is certain meanwhile");
    space.start_tracking().unwrap(); // forgets the mark
    assert_eq!(told(&lease), [(3, 2, Data)]);
    lease.commit();
    assert_eq!(next(&one), [(3, 2, Data)]);
    discard(&space, pages(3, 2));
    assert_eq!(next(&one), [(3, 2, Zero)]);
    // Not tracked: the storage goes, and nothing is zero.
    space.stop_tracking().unwrap();
    let mut dropped = false;
    let done = space.discard(pages(9, 1), || {
        dropped = true;
        Ok(())
    });
    assert_eq!((done.unwrap().zero_bytes, dropped), (0, true));
    space.start_tracking().unwrap();
    assert_eq!(next(&one), NONE);
    let never = AddressSpace::new(Granule::K4);
    never.map(pages(0, 4), 0, Access::ReadWrite).unwrap();
    assert_eq!(never.discard(pages(1, 1), || Ok(())).unwrap().zero_bytes, 0);
}

/// A page behind a table, and one device that caches "D is set".
#[derive(Default)]
struct Hardware {
    dirty: AtomicBool,
    cached: AtomicBool,
    flush_fails: AtomicBool,
    look_fails: AtomicBool,
}

impl Hardware {
    fn writes(&self) {
        if !self.cached.swap(true, SeqCst) {
            self.dirty.store(true, SeqCst);
        }
    }
}

struct Source {
    hardware: Arc<Hardware>,
    /// Its page.
    leaf: IovaRange,
}

fn source(leaf: IovaRange) -> (Arc<Hardware>, Source) {
    let hardware = Arc::new(Hardware::default());
    let source = Source {
        hardware: Arc::clone(&hardware),
        leaf,
    };
    (hardware, source)
}

fn refused() -> Error {
    Error::source_failed(io::Error::from(io::ErrorKind::Other))
}

impl DirtySource for Source {
    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        if to == Tracking::On {
            self.hardware.dirty.store(false, SeqCst);
            self.hardware.cached.store(false, SeqCst);
        }
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let stopped = |error| Stopped {
            at: range.start(),
            error,
        };
        if self.hardware.look_fails.load(SeqCst) {
            return Err(stopped(refused()));
        }
        if !range.intersects(self.leaf) || !self.hardware.dirty.load(SeqCst) {
            return Ok(());
        }
        let size = Granule::from_lg2(self.leaf.len().ilog2() as u8).unwrap();
        let clear = || self.hardware.dirty.swap(false, SeqCst);
        out.take(self.leaf, size, clear).map_err(stopped)
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        if self.hardware.flush_fails.load(SeqCst) {
            return Err(refused());
        }
        if gather
            .ranges()
            .iter()
            .any(|owed| owed.intersects(self.leaf))
        {
            self.hardware.cached.store(false, SeqCst);
        }
        Ok(Invalidated::default())
    }
}

/// A lease that is not synced has taken the dirty bit, and only it knows its debt. The device still
/// caches "D is set". So the discard has to flush what it has not taken itself; or the write after
/// it leaves no trace, and the next lease would say zero.
#[test]
fn a_device_that_caches_d_writes_data_after_a_discard() {
    let space = space(64);
    let (hardware, source) = source(pages(3, 1));
    space.attach(source).unwrap();
    hardware.writes();
    let owed = space.rounds().harvest().unwrap();
    discard(&space, pages(2, 3));
    hardware.writes();
    let lease = owed.sync().unwrap();
    assert_eq!(lease.dirty(), 1);
    lease.commit();
    assert_eq!(unnamed(&space), [(2, 1, Zero), (3, 1, Data), (4, 1, Zero)]);
    // The discard itself takes the bit.
    discard(&space, pages(2, 3));
    hardware.writes();
    assert_eq!(unnamed(&space), [(2, 1, Zero), (3, 1, Data), (4, 1, Zero)]);
    discard(&space, pages(2, 3));
    assert_eq!(unnamed(&space), [(2, 3, Zero)]);
}

#[test]
fn a_source_that_fails_leaves_everything_dirty_and_keeps_the_storage() {
    let space = space(64);
    let (hardware, source) = source(pages(3, 1));
    space.attach(source).unwrap();
    hardware.writes();
    let kept = || space.discard(pages(2, 3), || panic!("the storage is dropped"));
    hardware.flush_fails.store(true, SeqCst);
    assert!(matches!(kept(), Err(Error::Source(_))));
    hardware.flush_fails.store(false, SeqCst);
    assert_eq!(unnamed(&space), [(2, 3, Data)]);
    hardware.look_fails.store(true, SeqCst);
    assert!(matches!(kept(), Err(Error::Source(_))));
    hardware.look_fails.store(false, SeqCst);
    hardware.writes();
    assert_eq!(unnamed(&space), [(2, 3, Data)]);
}

/// A discard of a part of a large leaf: the rest stays dirty. A write to the leaf makes all of it
/// dirty, a superset.
#[test]
fn a_discard_of_a_part_of_a_leaf_leaves_the_rest_dirty() {
    let space = space(1024);
    let (hardware, source) = source(pages(512, 512));
    space.attach(source).unwrap();
    hardware.writes();
    discard(&space, pages(600, 10));
    assert_eq!(
        unnamed(&space),
        [(512, 88, Data), (600, 10, Zero), (610, 414, Data)]
    );
    hardware.writes();
    assert_eq!(unnamed(&space), [(512, 512, Data)]);
}

#[test]
fn a_domain_that_comes_or_is_switched_forgets_the_zeros() {
    let space = space(64);
    discard(&space, pages(3, 2));
    let (hardware, source) = source(pages(3, 1));
    hardware.writes(); // before the attach
    let domain = space.attach(source).unwrap();
    assert_eq!(unnamed(&space), [(3, 2, Data)]);
    discard(&space, pages(3, 2));
    space.stop_domain_tracking(domain).unwrap();
    assert_eq!(unnamed(&space), [(3, 2, Data)]);
    discard_untracked(&space, pages(3, 2));
    space.start_domain_tracking(domain).unwrap();
    assert_eq!(unnamed(&space), [(3, 2, Data)]);
    discard(&space, pages(3, 2));
    assert_eq!(unnamed(&space), [(3, 2, Zero)]);
    // A discard, a write that is not tracked, a start.
    discard(&space, pages(3, 2));
    space.stop_domain_tracking(domain).unwrap();
    hardware.writes();
    space.start_domain_tracking(domain).unwrap();
    assert_eq!(unnamed(&space), [(3, 2, Data)]);
}

fn discard_untracked(space: &AddressSpace, range: IovaRange) {
    let done = space.discard(range, || Ok(())).unwrap();
    assert_eq!((done.zero_bytes, done.dirty_bytes), (0, range.len()));
}

/// A lease of one domain has not looked at the others, nor at the marks.
#[test]
fn a_lease_of_one_domain_has_data_only() {
    let space = space(64);
    let (hardware, source) = source(pages(3, 1));
    let domain = space.attach(source).unwrap();
    discard(&space, pages(2, 4));
    hardware.writes();
    space.mark(pages(4, 1)).unwrap();
    let lease = space.rounds().domain(domain).next().unwrap();
    assert_eq!(told(&lease), [(2, 4, Data)]);
    lease.abort();
    let all = [(2, 1, Zero), (3, 2, Data), (5, 1, Zero)];
    assert_eq!(unnamed(&space), all);
}

#[test]
fn a_consumer_that_joins_is_told_what_is_zero() {
    let space = space(16);
    let one = space.consumer("one", Start::Clean).unwrap();
    discard(&space, pages(3, 2));
    space.mark(pages(4, 1)).unwrap();
    let dirty = space.consumer("dirty", Start::Dirty).unwrap();
    let like = space.consumer("like", Start::LikeOf(&one)).unwrap();
    let clean = space.consumer("clean", Start::Clean).unwrap();
    assert_eq!(next(&like), [(3, 1, Zero), (4, 1, Data)]);
    assert_eq!(next(&dirty), [(0, 3, Data), (3, 1, Zero), (4, 12, Data)]);
    assert_eq!(next(&clean), [(4, 1, Data)]);
    // It joins while the storage is dropped.
    let late = std::cell::Cell::new(None);
    let dropped = space.discard(pages(8, 1), || {
        late.set(Some(space.consumer("late", Start::LikeOf(&one)).unwrap()));
        Ok(())
    });
    dropped.unwrap();
    let late = late.take().unwrap();
    assert_eq!(next(&late), [(3, 1, Zero), (4, 1, Data), (8, 1, Zero)]);
}

/// Pages of a source may be larger than those of the space.
#[test]
fn only_whole_pages_of_all_sources_are_zero() {
    struct Large(SharedLog<Arc<[AtomicU64]>>);
    let space = AddressSpace::tracked(Granule::K4);
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    let words: Arc<[AtomicU64]> = (0..1).map(|_| AtomicU64::new(0)).collect();
    let k16 = Granule::from_lg2(14).unwrap();
    let log = Large(SharedLog::new(0..64 * PAGE, k16, Arc::clone(&words)).unwrap());
    impl DirtySource for Large {
        fn page(&self) -> Granule {
            Granule::from_lg2(14).unwrap()
        }
        fn unmap(&self, r: IovaRange, g: &mut FlushGather, d: &mut dyn FnMut(IovaRange)) {
            self.0.unmap(r, g, d);
        }
        fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
            self.0.set_tracking(to)
        }
        fn read_and_clear(&self, r: IovaRange, o: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
            self.0.read_and_clear(r, o)
        }
        fn peek(&self, r: IovaRange, s: &mut Sink<'_>) -> Result<(), Stopped> {
            self.0.peek(r, s)
        }
        fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
            self.0.invalidate(gather)
        }
    }
    space.attach(log).unwrap();
    assert_eq!(space.alignment(), k16);
    words[0].fetch_or(0b111, SeqCst); // pages 0 to 11
    let done = space.discard(pages(3, 6), || Ok(())).unwrap();
    assert_eq!((done.zero_bytes, done.dirty_bytes), (4 * 4096, 2 * 4096));
    let all = [(0, 4, Data), (4, 4, Zero), (8, 4, Data)];
    assert_eq!(unnamed(&space), all);
    words[0].fetch_or(0b10, SeqCst);
    assert_eq!(unnamed(&space), [(4, 4, Data)]);
}

#[test]
fn granules_of_any_size_are_split_by_pages() {
    let space = space(64);
    discard(&space, pages(3, 2));
    space.mark(pages(1, 1)).unwrap();
    let range = pages(0, 64);
    let split = |granule: Granule, words: &mut [u64]| {
        let request = HarvestRequest::new(range, granule);
        let lease = space.harvest(&request, UserBitmap::new(words)).unwrap();
        let lease = lease.sync().unwrap();
        let told = told(&lease);
        lease.abort();
        told
    };
    let k16 = Granule::from_lg2(14).unwrap();
    let all = [(0, 3, Data), (3, 2, Zero), (5, 3, Data)];
    assert_eq!(
        split(k16, &mut [0; 1]),
        all,
        "the rest of a granule reads as data"
    );
    let fine = Granule::from_lg2(9).unwrap();
    let all = [(0, 3, Data), (3, 2, Zero), (5, 3, Data)];
    assert_eq!(
        split(fine, &mut [0; 8]),
        all,
        "what the abort of 16 KiB put back"
    );
}

#[test]
fn a_range_with_a_hole_is_refused() {
    let space = space(4);
    let never = || -> io::Result<()> { panic!("the storage is dropped") };
    let refused = space.discard(pages(3, 2), never);
    assert!(matches!(refused, Err(Error::Outside { at }) if at == Iova::new(4 * PAGE)));
    assert_eq!(space.stats().outside_marks, 1);
    assert!(space.discard(5..5, never).is_err());
    assert!(space.discard(0..u64::MAX, never).is_err());
    assert_eq!(
        space.rounds().next().unwrap().dirty(),
        0,
        "nothing was touched"
    );
}

/// In several pieces of the look, with borders of them inside of runs.
#[test]
fn many_runs_are_told_in_order() {
    let space = space(1 << 18);
    for nth in 0..400 {
        discard(&space, pages(nth * 600, 300));
        space.mark(pages(nth * 600 + 100, 1)).unwrap();
    }
    let told = unnamed(&space);
    assert_eq!(told.len(), 1200);
    for nth in 0..400 {
        let three = [
            (nth * 600, 100, Zero),
            (nth * 600 + 100, 1, Data),
            (nth * 600 + 101, 199, Zero),
        ];
        assert_eq!(told[nth as usize * 3..][..3], three);
    }
}

/// A write that is in flight when a harvest looks is data, also after it has ended.
#[test]
fn a_write_guard_is_data() {
    let space = space(16);
    discard(&space, pages(3, 2));
    let write = space.begin_write(pages(4, 1)).unwrap();
    let lease = space.rounds().next().unwrap();
    drop(write);
    assert_eq!(told(&lease), [(3, 1, Zero), (4, 1, Data)]);
    lease.commit();
    assert_eq!(unnamed(&space), [(4, 1, Data)]);
    // A guard across a discard.
    let write = space.begin_write(pages(4, 1)).unwrap();
    discard(&space, pages(4, 1));
    drop(write);
    assert_eq!(unnamed(&space), [(4, 1, Data)]);
}
