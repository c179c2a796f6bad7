//! Several consumers of one space: each is told every write, whatever the others do.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, Change, Consumer, DirtySource, Error, Granule, HarvestRequest, Iova,
    IovaRange, Lease, SharedLog, Start, Tracking, UserBitmap,
};

const PAGE: u64 = 4096;
const NONE: [u64; 0] = [];

fn space(pages: u64) -> AddressSpace {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..pages * PAGE, 0, Access::ReadWrite).unwrap();
    space
}

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first * PAGE), n * PAGE).unwrap()
}

/// The pages of a lease.
fn told<S>(lease: &Lease<'_, S>, runs: impl Iterator<Item = IovaRange>) -> Vec<u64> {
    assert_eq!(lease.granule(), Granule::K4);
    runs.flat_map(|run| run.start().get() / PAGE..=run.last().get() / PAGE)
        .collect()
}

/// Harvests all for `consumer`, and commits.
fn next(consumer: &Consumer<'_>) -> Vec<u64> {
    let lease = consumer.rounds().next().unwrap();
    let pages = told(&lease, lease.runs());
    lease.commit();
    pages
}

/// The same for the unnamed consumer.
fn unnamed(space: &AddressSpace) -> Vec<u64> {
    let lease = space.rounds().next().unwrap();
    let pages = told(&lease, lease.runs());
    lease.commit();
    pages
}

#[test]
fn each_consumer_is_told_every_write_once() {
    let space = space(300);
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    assert_eq!(space.consumers(), ["one", "two"]);
    space.mark(pages(3, 2)).unwrap();
    assert_eq!(next(&one), [3, 4]);
    space.mark(pages(4, 2)).unwrap();
    assert_eq!(next(&two), [3, 4, 5]);
    assert_eq!(next(&one), [4, 5]);
    assert_eq!(next(&one), NONE);
    assert_eq!(unnamed(&space), [3, 4, 5]);
    assert_eq!(unnamed(&space), NONE);
    space.mark(pages(299, 1)).unwrap();
    assert_eq!(unnamed(&space), [299]);
    assert_eq!(next(&one), [299]);
    assert_eq!(next(&two), [299]);
    assert_eq!(next(&two), NONE);
}

/// Dirty bits of a source take the same way as marks, and so do whole chunks of marks.
#[test]
fn a_log_of_a_device_and_whole_chunks_reach_every_consumer() {
    let space = space(100_000);
    let log: Arc<[AtomicU64]> = (0..100_000 / 64 + 1).map(|_| AtomicU64::new(0)).collect();
    let shared = SharedLog::new(
        0..(100_000 / 64 + 1) * 64 * PAGE,
        Granule::K4,
        Arc::clone(&log),
    );
    space.attach(shared.unwrap()).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    log[1000].store(0b101, SeqCst);
    space.mark(pages(0, 70_000)).unwrap();
    let mut all: Vec<u64> = (0..70_000).collect();
    let lease = one.rounds().next().unwrap();
    assert_eq!(told(&lease, lease.runs()), all);
    assert_eq!(lease.commit().leaves, 2, "of the log");
    log[1500].store(1, SeqCst);
    all.push(96_000);
    assert_eq!(next(&two), all);
    assert_eq!(unnamed(&space), all);
    assert_eq!(next(&one), [96_000]);
    assert_eq!([next(&one), next(&two), unnamed(&space)].concat(), NONE);
}

#[test]
fn an_abort_puts_back_for_its_own_consumer_alone() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    space.mark(pages(7, 1)).unwrap();
    let aborted = one.rounds().next().unwrap().abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (PAGE, 0));
    assert_eq!(next(&two), [7]);
    assert_eq!(next(&two), NONE);
    drop(one.rounds().harvest().unwrap());
    assert_eq!(next(&two), NONE);
    assert_eq!(next(&one), [7]);
    assert_eq!(unnamed(&space), [7]);
    // Parts that were committed stay committed.
    space.mark(pages(10, 2)).unwrap();
    let lease = one.rounds().next().unwrap();
    assert_eq!(lease.commit_range(pages(10, 1)), 1);
    assert_eq!(lease.abort().bytes, PAGE);
    assert_eq!((next(&one), next(&two)), (vec![11], vec![10, 11]));
    assert_eq!(one.stats().aborted_bytes, 3 * PAGE);
}

#[test]
fn a_consumer_begins_clean_dirty_or_as_a_copy() {
    let space = space(8);
    space.map(pages(100, 4), 0, Access::ReadWrite).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(5, 1)).unwrap();
    assert_eq!(unnamed(&space), [5]);
    // The bit of page 6 is still where every consumer finds it, also a new one: a superset.
    space.mark(pages(6, 1)).unwrap();
    let clean = space.consumer("clean", Start::Clean).unwrap();
    assert_eq!(next(&clean), [6]);
    let dirty = space.consumer("dirty", Start::Dirty).unwrap();
    let all: Vec<u64> = (0..8).chain(100..104).collect();
    assert_eq!((next(&dirty), next(&dirty)), (all, vec![]));
    let lease = one.rounds().next().unwrap();
    let busy = space.consumer("like", Start::LikeOf(&one)).unwrap_err();
    assert!(
        matches!(busy, Error::ConsumerBusy { leases: 1, .. }),
        "{busy}"
    );
    assert_eq!(space.consumers(), ["one", "clean", "dirty"]);
    lease.abort();
    let like = space.consumer("like", Start::LikeOf(&one)).unwrap();
    assert_eq!((next(&like), next(&one)), (vec![5, 6], vec![5, 6]));
    assert_eq!((next(&like), next(&clean)), (vec![], vec![]));
}

#[test]
fn a_consumer_of_a_range_is_told_of_that_range() {
    let space = space(1000);
    let part = space
        .consumer_of("part", pages(70, 100), Start::Dirty)
        .unwrap();
    assert_eq!(part.range(), pages(70, 100));
    assert_eq!(next(&part), (70..170).collect::<Vec<u64>>());
    space.mark(pages(60, 20)).unwrap();
    space.mark(pages(169, 2)).unwrap();
    assert_eq!(unnamed(&space).len(), 22);
    assert_eq!(part.stats().pending_bytes, 11 * PAGE);
    let mut words = [0; 16];
    let request = HarvestRequest::new(pages(0, 1000), Granule::K4);
    let refused = part
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap_err();
    assert!(
        matches!(refused, Error::OutsideConsumer { consumer, .. } if consumer == pages(70, 100)),
        "{refused}"
    );
    assert_eq!(next(&part), (70..80).chain([169]).collect::<Vec<u64>>());
    let odd = space
        .consumer_of("odd", 0..PAGE + 1, Start::Clean)
        .unwrap_err();
    assert!(matches!(odd, Error::Unaligned { .. }), "{odd}");
}

/// A consumer of a range is left its pages, and no others, also if the area begins inside of a
/// chunk of the bitmaps that all consumers share.
#[test]
fn a_consumer_of_a_range_is_told_wherever_the_area_begins() {
    const CHUNK: u64 = 32768;
    for start in [300, CHUNK - 70] {
        let space = AddressSpace::tracked(Granule::K4);
        let area = pages(start, 2 * CHUNK);
        space.map(area, 0, Access::ReadWrite).unwrap();
        let part = pages(CHUNK - 10, 30);
        let part = space.consumer_of("part", part, Start::Clean).unwrap();
        let high = pages(2 * CHUNK - 5, 20);
        let high = space.consumer_of("high", high, Start::Clean).unwrap();
        space.mark(area).unwrap();
        assert_eq!(unnamed(&space).len() as u64, 2 * CHUNK);
        assert_eq!(part.stats().pending_bytes, 30 * PAGE);
        assert_eq!(next(&part), (CHUNK - 10..CHUNK + 20).collect::<Vec<u64>>());
        let all = 2 * CHUNK - 5..2 * CHUNK + 15;
        assert_eq!(next(&high), all.collect::<Vec<u64>>());
        for page in [CHUNK - 11, CHUNK - 1, CHUNK, CHUNK + 20, 2 * CHUNK + 3] {
            space.mark(pages(page, 1)).unwrap();
        }
        assert_eq!(unnamed(&space).len(), 5);
        assert_eq!(next(&part), [CHUNK - 1, CHUNK]);
        assert_eq!(next(&high), [2 * CHUNK + 3]);
    }
}

/// A domain comes whose pages are larger than the range of a consumer. A harvest has to cover whole
/// pages of it, and so was refused, because these extend past the range: the consumer could not be
/// told a write any more. The same with a granule that is larger than the range.
#[test]
fn a_consumer_of_a_part_of_a_larger_page_is_told() {
    let space = space(64);
    let part = space
        .consumer_of("part", pages(3, 2), Start::Clean)
        .unwrap();
    let large = Granule::from_lg2(16).unwrap();
    space.mark(pages(2, 2)).unwrap();
    let lease = { part.rounds().granule(large) }.next().unwrap();
    assert_eq!((lease.range(), lease.dirty()), (pages(0, 16), 1));
    lease.abort();

    let log: Arc<[AtomicU64]> = [AtomicU64::new(0)].into();
    let source = SharedLog::new(0..64 * PAGE, large, Arc::clone(&log));
    space.attach(source.unwrap()).unwrap();
    assert!(next(&part).contains(&3));
    assert_eq!(unnamed(&space), [2, 3]);
    log[0].store(0b11, SeqCst);
    assert_eq!(unnamed(&space).len(), 32);
    assert_eq!(part.stats().pending_bytes, 2 * PAGE);
    part.rounds().next().unwrap().abort();
    assert_eq!(next(&part), [3, 4]);
    let mut words = [0];
    let request = HarvestRequest::new(pages(0, 32), Granule::K4);
    let refused = part.harvest(&request, UserBitmap::new(&mut words));
    let refused = refused.unwrap_err();
    assert!(
        matches!(refused, Error::OutsideConsumer { .. }),
        "{refused}"
    );
    assert_eq!(next(&part), NONE);
}

/// A peek shows what is pending, and takes nothing.
#[test]
fn a_peek_shows_what_a_harvest_would_take() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(1, 1)).unwrap();
    assert_eq!(unnamed(&space), [1]);
    space.mark(pages(2, 1)).unwrap();
    for _ in 0..2 {
        let mut words = [0; 1];
        let request = HarvestRequest::new(pages(0, 64), Granule::K4);
        let seen = one.peek(&request, UserBitmap::new(&mut words)).unwrap();
        assert_eq!(seen.bits().collect::<Vec<u64>>(), [1, 2]);
        let seen = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        assert_eq!(seen.bits().collect::<Vec<u64>>(), [1, 2]);
    }
    assert_eq!((next(&one), unnamed(&space)), (vec![1, 2], vec![2]));
}

/// A harvest of a granule, by bounds and by masks leaves exactly what it takes.
#[test]
fn every_mode_leaves_what_it_takes() {
    let space = space(1 << 12);
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    let dirty: Vec<u64> = (0..1 << 12).step_by(7).collect();
    for page in &dirty {
        space.mark(pages(*page, 1)).unwrap();
    }
    let all = pages(0, 1 << 12);
    let request = HarvestRequest::new(all, Granule::K4).max_bits(100);
    let (mut from, mut seen) = (Some(all.start()), Vec::new());
    while let Some(at) = from {
        let mut words = [0; 64];
        let lease = one.harvest(&request.resume_at(at), UserBitmap::new(&mut words));
        let lease = lease.unwrap();
        from = lease.next();
        let lease = lease.sync().unwrap();
        seen.extend(told(&lease, lease.runs()));
        lease.commit();
    }
    assert_eq!(seen, dirty);
    // Every second page, by a mask.
    let mut mask = [0xaaaa_aaaa_aaaa_aaaa; 64];
    let mask = UserBitmap::new(&mut mask).view(all, Granule::K4).unwrap();
    let request = HarvestRequest::new(all, Granule::K4).masked(mask);
    let mut words = [0; 64];
    let lease = two.harvest(&request, UserBitmap::new(&mut words)).unwrap();
    let lease = lease.sync().unwrap();
    let odd: Vec<u64> = dirty.iter().copied().filter(|page| page % 2 == 1).collect();
    assert_eq!(told(&lease, lease.runs()), odd);
    lease.commit();
    let even: Vec<u64> = dirty.iter().copied().filter(|page| page % 2 == 0).collect();
    assert_eq!(next(&two), even);
    // A coarse granule.
    let lease = space.rounds().granule(Granule::from_lg2(16).unwrap());
    assert_eq!({ lease }.next().unwrap().commit().bits_set, 1 << 8);
    assert_eq!([next(&one), next(&two), unnamed(&space)].concat(), NONE);
}

/// What is pending for any consumer is in the result of an unmap, and is not dirty in the next area
/// at the addresses.
#[test]
fn an_unmap_returns_what_some_consumer_was_not_told() {
    let space = space(64);
    space.map(pages(64, 64), 0, Access::ReadWrite).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    space.mark(pages(3, 1)).unwrap();
    assert_eq!(next(&one), [3]);
    space.mark(pages(5, 1)).unwrap();
    one.rounds().next().unwrap().abort();
    let mut words = [0; 1];
    let (unmapped, view) = space
        .unmap(pages(0, 64), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(view.bits().collect::<Vec<u64>>(), [3, 5]);
    assert_eq!(
        (unmapped.dirty_bytes, unmapped.discarded_bytes),
        (2 * u128::from(PAGE), 0)
    );
    let lost = |consumer: &Consumer<'_>| consumer.stats().unmapped_bytes / PAGE;
    assert_eq!((lost(&one), lost(&two)), (1, 2));
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    assert_eq!([next(&one), next(&two), unnamed(&space)].concat(), NONE);
    // Discarding counts, and a batch is no exception.
    space.mark(pages(70, 1)).unwrap();
    assert_eq!(next(&one), [70]);
    let cut = pages(80, 1).start();
    let gone = space
        .apply(&[
            Change::Cut { at: cut },
            Change::Unmap {
                range: pages(64, 16),
            },
        ])
        .unwrap();
    assert_eq!(gone.discarded_bytes, u128::from(PAGE));
    assert_eq!((lost(&one), lost(&two)), (1, 3));
    space.map(pages(64, 16), 0, Access::ReadWrite).unwrap();
    assert_eq!([next(&one), next(&two), unnamed(&space)].concat(), NONE);
}

/// A lease of pages whose area went, or was mapped again, puts back nothing there.
#[test]
fn an_abort_after_an_unmap_counts_its_pages() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(3, 1)).unwrap();
    let lease = one.rounds().next().unwrap();
    space.unmap_discarding(pages(0, 64)).unwrap();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    let aborted = lease.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (0, PAGE));
    assert_eq!(next(&one), NONE);
}

#[test]
fn a_cut_keeps_what_is_pending() {
    let space = space(64);
    let one = space
        .consumer_of("one", pages(10, 20), Start::Clean)
        .unwrap();
    space.mark(pages(0, 64)).unwrap();
    assert_eq!(unnamed(&space).len(), 64);
    assert!(space.cut(pages(15, 1).start()).unwrap());
    assert!(space.cut(pages(25, 1).start()).unwrap());
    space.unmap_discarding(pages(15, 10)).unwrap();
    assert_eq!(one.stats().unmapped_bytes, 10 * PAGE);
    assert_eq!(next(&one), (10..15).chain(25..30).collect::<Vec<u64>>());
    // Nothing of its range is left.
    space.unmap_discarding(pages(0, 15)).unwrap();
    space.unmap_discarding(pages(25, 39)).unwrap();
    let nothing = one.rounds().next().unwrap_err();
    assert!(matches!(nothing, Error::NothingMapped { .. }), "{nothing}");
    space.map(pages(12, 2), 0, Access::ReadWrite).unwrap();
    space.mark(pages(12, 1)).unwrap();
    assert_eq!(next(&one), [12]);
}

/// What a domain has found dirty when it goes is told to each consumer.
#[test]
fn a_detach_loses_nothing_of_any_consumer() {
    let space = space(64);
    let log: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(0)]);
    let log_of = |log: &Arc<[AtomicU64]>| {
        SharedLog::new(0..64 * PAGE, Granule::K4, Arc::clone(log)).unwrap()
    };
    let domain = space.attach(log_of(&log)).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    log[0].store(1 << 9, SeqCst);
    // One domain alone is a harvest of the unnamed consumer, too.
    let lease = space.rounds().domain(domain).next().unwrap();
    assert_eq!(told(&lease, lease.runs()), [9]);
    lease.abort();
    log[0].store(1 << 20, SeqCst);
    space.detach(domain).unwrap();
    let found = next(&one);
    assert!(found.contains(&9) && found.contains(&20), "{found:?}");
    let found = unnamed(&space);
    assert!(found.contains(&9) && found.contains(&20), "{found:?}");
}

/// An abort of a lease that had covered a domain which was detached since also marked the pages, so
/// that every consumer was told them again.
#[test]
fn an_abort_after_a_detach_tells_the_others_nothing() {
    let space = space(64);
    let log: Arc<[AtomicU64]> = [AtomicU64::new(0)].into();
    let shared = SharedLog::new(0..64 * PAGE, Granule::K4, Arc::clone(&log)).unwrap();
    let domain = space.attach(shared).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    log[0].store(1 << 5, SeqCst);
    let lease = one.rounds().next().unwrap();
    assert_eq!(next(&two), [5]);
    space.detach(domain).unwrap();
    assert_eq!(lease.abort().bytes, PAGE);
    assert_eq!(next(&two), NONE);
    assert_eq!(next(&one), [5]);
    assert_eq!(unnamed(&space), [5]);
}

#[test]
fn names_are_checked() {
    let space = space(1);
    let refused = |name: &str| space.consumer(name, Start::Clean).unwrap_err();
    assert!(matches!(refused(""), Error::BadName { len: 0, most: 255 }));
    let long = "x".repeat(256);
    let error = refused(&long);
    assert!(matches!(
        error,
        Error::BadName {
            len: 256,
            most: 255
        }
    ));
    assert_eq!(
        error.to_string(),
        "the name of a consumer has 256 bytes: it needs 1 to 255"
    );
    let longest = space.consumer(&long[1..], Start::Clean).unwrap();
    let twice = refused(longest.name());
    assert!(matches!(twice, Error::ConsumerTwice { .. }), "{twice}");
    drop(longest);
    let _ = space.consumer(&long[1..], Start::Clean).unwrap();
}

#[test]
fn a_consumer_of_another_space_is_no_model() {
    let (here, there) = (space(1), space(1));
    let other = there.consumer("one", Start::Clean).unwrap();
    let own = here.consumer("one", Start::Clean).unwrap();
    let refused = here.consumer("two", Start::LikeOf(&other)).unwrap_err();
    assert!(matches!(refused, Error::ConsumerLeft { .. }), "{refused}");
    assert!(here.consumer("two", Start::LikeOf(&own)).is_ok());
}

/// A consumer that is dropped while its lease lives: the lease goes on, and its abort puts back
/// nothing; rounds of it are refused.
#[test]
fn a_lease_outlives_its_consumer() {
    let space = Arc::new(space(64));
    let one = Consumer::shared(Arc::clone(&space), "one", Start::Clean).unwrap();
    space.mark(pages(1, 1)).unwrap();
    let mut rounds = one.rounds();
    let (first, second) = (rounds.harvest().unwrap(), rounds.next().unwrap());
    space.mark(pages(2, 1)).unwrap();
    let third = one.rounds().next().unwrap();
    drop(one);
    assert_eq!(space.consumers(), Vec::<String>::new());
    let gone = rounds.next().unwrap_err();
    assert!(matches!(gone, Error::ConsumerLeft { .. }), "{gone}");
    let first = first.sync().unwrap();
    assert_eq!(told(&first, first.runs()), [1]);
    assert_eq!(first.commit().bits_set, 1);
    second.abort();
    let aborted = third.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (0, PAGE));
    assert_eq!(unnamed(&space), [1, 2]);
    // It goes to other threads.
    let again = Consumer::shared(Arc::clone(&space), "one", Start::Dirty).unwrap();
    let thread = std::thread::spawn(move || next(&again).len());
    assert_eq!(thread.join().unwrap(), 64);
}

/// A harvest borrowed its consumer, so that a consumer could not leave while such a lease lived.
#[test]
fn a_harvest_into_a_bitmap_of_the_caller_outlives_its_consumer() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(1, 2)).unwrap();
    let (mut first, mut second) = ([0], [0]);
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    let kept = one.harvest(&request, UserBitmap::new(&mut first)).unwrap();
    space.mark(pages(3, 1)).unwrap();
    let lost = one.harvest(&request, UserBitmap::new(&mut second)).unwrap();
    drop(one);
    assert_eq!(kept.sync().unwrap().commit().bits_set, 2);
    let aborted = lost.abort();
    assert_eq!((aborted.bytes, aborted.outside_bytes), (0, PAGE));
    assert_eq!(unnamed(&space), [1, 2, 3]);
}

/// A bitmap that fails in the middle of a harvest: what was taken there stays pending for the
/// consumer, and is left to the others.
#[cfg(feature = "mmap")]
mod failing_bitmap {
    use super::*;
    use dirtymap::bitmap::FileBitmap;
    use std::fs::File;

    /// Cuts the file of the bitmap during a harvest, and then takes its dirty pages, if it has any.
    struct Cuts {
        file: File,
        dirty: std::sync::Mutex<Vec<u64>>,
    }

    impl Cuts {
        fn new(file: &File, dirty: &[u64]) -> Self {
            Cuts {
                file: file.try_clone().unwrap(),
                dirty: dirty.to_vec().into(),
            }
        }
    }

    /// An empty file without a name.
    fn unnamed_file(test: &str) -> File {
        let name = format!("dirtymap-{test}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    impl DirtySource for Cuts {
        fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
            Ok(())
        }

        fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

        fn read_and_clear(&self, _: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
            self.file.set_len(1 << 16).unwrap();
            for page in self.dirty.lock().unwrap().drain(..) {
                out.take(pages(page, 1), Granule::K4, || true).unwrap();
            }
            Ok(())
        }

        fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
            Ok(())
        }
    }

    #[test]
    fn a_bitmap_that_fails_loses_nothing() {
        let file = unnamed_file("several");
        file.set_len(1 << 17).unwrap();
        let space = space(1 << 20);
        let cuts = space.attach(Cuts::new(&file, &[])).unwrap();
        let one = space.consumer("one", Start::Clean).unwrap();
        let two = space.consumer("two", Start::Clean).unwrap();
        let dirty = [1, 1 << 18, 1 << 19, (1 << 20) - 1];
        for page in dirty {
            space.mark(pages(page, 1)).unwrap();
        }
        assert_eq!(unnamed(&space), dirty);
        space.mark(pages(1 << 19, 2)).unwrap();
        file.set_len(1 << 17).unwrap();
        let bitmap = FileBitmap::new(file, 0, 1 << 17)
            .with_window(1 << 16)
            .unwrap();
        let request = HarvestRequest::new(pages(0, 1 << 20), Granule::K4);
        let lease = one.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
        assert_eq!(
            lease.stopped().map(|stopped| stopped.at),
            Some(pages(1 << 19, 1).start())
        );
        let lease = lease.partial().sync().unwrap();
        assert_eq!(told(&lease, lease.runs()), [1, 1 << 18]);
        lease.commit();
        space.detach(cuts).unwrap();
        let rest = [1 << 19, (1 << 19) + 1, (1 << 20) - 1];
        assert_eq!(next(&one), rest);
        assert_eq!(next(&two), [&dirty[..2], &rest].concat());
        assert_eq!(unnamed(&space), [1 << 19, (1 << 19) + 1]);
        assert_eq!([next(&one), next(&two), unnamed(&space)].concat(), NONE);
    }

    /// The same for pages of a source. They are taken before the bitmap is looked at, so those that
    /// it cannot record are pending for the consumer itself.
    #[test]
    fn a_bitmap_that_fails_loses_no_page_of_a_source() {
        let file = unnamed_file("source");
        let space = space(1 << 20);
        let dirty = vec![5, 1 << 19, (1 << 19) + 64, (1 << 20) - 1];
        let source = space.attach(Cuts::new(&file, &dirty)).unwrap();
        let one = space.consumer("one", Start::Clean).unwrap();
        let two = space.consumer("two", Start::Clean).unwrap();
        // The look at the marks stops above the first page that is not recorded.
        space.mark(pages((1 << 19) + 1000, 1)).unwrap();
        file.set_len(1 << 17).unwrap();
        let bitmap = FileBitmap::new(file, 0, 1 << 17)
            .with_window(1 << 16)
            .unwrap();
        let request = HarvestRequest::new(pages(0, 1 << 20), Granule::K4);
        let lease = one.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
        let stop = lease.stopped().map(|stopped| stopped.at);
        assert_eq!(stop, Some(pages(1 << 19, 1).start()));
        let lease = lease.partial().sync().unwrap();
        assert_eq!(told(&lease, lease.runs()), [5]);
        lease.commit();
        space.detach(source).unwrap();
        let mut dirty = dirty;
        dirty.insert(3, (1 << 19) + 1000);
        assert_eq!(next(&one), dirty[1..]);
        assert_eq!(next(&two), dirty);
        assert_eq!(unnamed(&space), dirty);
        assert_eq!([next(&one), next(&two), unnamed(&space)].concat(), NONE);
    }

    /// The same for a consumer for which everything is pending. What could not be recorded was in
    /// the lease, and a commit of it lost all of that.
    #[test]
    fn everything_that_cannot_be_recorded_stays_pending() {
        let file = unnamed_file("whole");
        file.set_len(1 << 17).unwrap();
        let space = AddressSpace::tracked(Granule::K4);
        space.map(pages(0, 1 << 19), 0, Access::ReadWrite).unwrap();
        space
            .map(pages(1 << 19, 1 << 19), 1 << 40, Access::ReadWrite)
            .unwrap();
        let cuts = space.attach(Cuts::new(&file, &[])).unwrap();
        let one = space.consumer("one", Start::Clean).unwrap();
        let bounds = one.bounds();
        one.set_bounds(dirtymap::harvest::Bounds { bytes: 1, ..bounds });
        space.mark(pages(1, 1)).unwrap();
        assert_eq!(unnamed(&space), [1]);
        assert!(one.stats().everything);
        one.set_bounds(bounds);
        file.set_len(1 << 17).unwrap();
        let bitmap = FileBitmap::new(file, 0, 1 << 17)
            .with_window(1 << 16)
            .unwrap();
        let request = HarvestRequest::new(pages(0, 1 << 20), Granule::K4);
        let lease = one.harvest(&request, UserBitmap::file(&bitmap)).unwrap();
        let stop = lease.stopped().map(|stopped| stopped.at);
        assert_eq!(stop, Some(pages(1 << 19, 1).start()));
        let report = lease.partial().sync().unwrap().commit();
        assert_eq!(report.bits_set, 1 << 19);
        space.detach(cuts).unwrap();
        assert_eq!(next(&one), ((1 << 19)..1 << 20).collect::<Vec<u64>>());
        assert_eq!(next(&one), NONE);
    }
}

/// A source with dirty pages, which counts the invalidations of page 9.
#[derive(Default)]
struct Hardware {
    dirty: Mutex<Vec<u64>>,
    panics: AtomicBool,
    invalidated: AtomicU64,
}

impl DirtySource for Hardware {
    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn read_and_clear(&self, _: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        for page in self.dirty.lock().unwrap().drain(..) {
            out.take(pages(page, 1), Granule::K4, || true).unwrap();
        }
        assert!(!self.panics.swap(false, SeqCst), "on purpose");
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let covers = |range: &IovaRange| range.intersection(pages(9, 1)).is_some();
        if gather.ranges().iter().any(covers) {
            self.invalidated.fetch_add(1, SeqCst);
        }
        Ok(Invalidated::default())
    }
}

/// What a harvest leaves to another consumer carries its debt: the sync of that consumer flushes,
/// although the lease of the first one does not.
#[test]
fn the_sync_of_another_consumer_pays_for_what_it_was_left() {
    let space = space(64);
    let hardware = Arc::new(Hardware::default());
    space.attach(Arc::clone(&hardware)).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    hardware.dirty.lock().unwrap().push(9);
    hardware.invalidated.store(0, SeqCst);
    let lease = one.rounds().harvest().unwrap();
    assert_eq!(hardware.invalidated.load(SeqCst), 0);
    assert_eq!(next(&two), [9]);
    assert_eq!(hardware.invalidated.load(SeqCst), 1);
    lease.abort();
}

/// A source takes a page, and panics. The page has left the table then: every consumer is told of
/// it, and the next sync pays its debt.
#[test]
fn a_source_that_panics_loses_nothing_of_any_consumer() {
    let space = space(64);
    let hardware = Arc::new(Hardware::default());
    space.attach(Arc::clone(&hardware)).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let two = space.consumer("two", Start::Clean).unwrap();
    for _ in 0..3 {
        hardware.dirty.lock().unwrap().push(9);
        hardware.panics.store(true, SeqCst);
        let harvest = AssertUnwindSafe(|| one.rounds().harvest().map(drop));
        catch_unwind(harvest).unwrap_err();
        hardware.invalidated.store(0, SeqCst);
        assert_eq!(next(&two), [9]);
        assert_eq!(hardware.invalidated.load(SeqCst), 1);
        assert_eq!((next(&one), unnamed(&space)), (vec![9], vec![9]));
        assert_eq!([next(&one), next(&two), unnamed(&space)].concat(), NONE);
    }
}

/// 10,000 consumers, each of which is told; fewer without optimisation, because each join copies
/// the list.
#[test]
fn thousands_of_consumers_are_told() {
    let many = if cfg!(debug_assertions) {
        2_000
    } else {
        10_000
    };
    let space = space(64);
    let all: Vec<Consumer<'_>> = (0..many)
        .map(|n| space.consumer(&n.to_string(), Start::Clean).unwrap())
        .collect();
    space.mark(pages(8, 1)).unwrap();
    assert_eq!(unnamed(&space), [8]);
    for consumer in all.iter().step_by(997) {
        assert_eq!((next(consumer), next(consumer)), (vec![8], vec![]));
    }
    drop(all);
    assert!(space.consumers().is_empty());
}
