//! The store on a real folder, by its public interface.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::io;
use std::path::Path;
use std::sync::Barrier;
use std::thread;

use dirtymap::{Granule, IovaRange, ToIovaRange};
use dirtymap_store::{Device, DirFolder, Error, Increment, Opened, Options, Store, Why};

const DEVICE: Device = Device {
    id: 1,
    len: 1 << 30,
};
const EXTENT: u64 = 64 << 10;

fn create(path: &Path, options: &Options) -> Store {
    Store::create(
        DirFolder::new(path.join("store")).unwrap(),
        &DEVICE,
        options,
    )
    .unwrap()
}

fn open(path: &Path, device: &Device) -> Opened {
    let folder = DirFolder::new(path.join("store")).unwrap();
    Store::open(folder, device, &Options::new()).unwrap()
}

fn known(path: &Path, device: &Device) -> Store {
    match open(path, device) {
        Opened::Known(store) => store,
        Opened::Everything(lost) => panic!("{}", lost.why()),
    }
}

fn write(store: &Store, range: std::ops::Range<u64>) {
    drop(store.begin_write(range).unwrap().wait().unwrap());
}

fn runs(increment: &Increment<'_>) -> Vec<IovaRange> {
    increment.runs().runs().to_vec()
}

fn range(range: std::ops::Range<u64>) -> IovaRange {
    range.to_iova_range().unwrap()
}

#[test]
fn increments_follow_each_other_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    store.join("nightly").unwrap();
    let first = store.harvest("nightly", None).unwrap();
    assert_eq!(
        (first.everything(), first.parent()),
        (Some(&Why::New), None)
    );
    assert_eq!(runs(&first), [range(0..DEVICE.len)]);
    let first = first.commit(|| Ok(())).unwrap();
    write(&store, 0x1ffe..0x2002);
    write(&store, EXTENT - 1..EXTENT + 1);
    // A clean end: to the page.
    store.close_extents().unwrap();
    drop(store);
    let store = known(dir.path(), &DEVICE);
    assert_eq!(store.recovery().open_extents, 0);
    let second = store.harvest("nightly", Some(first)).unwrap();
    assert_eq!(second.parent(), Some(first));
    let pages = [range(0x1000..0x3000), range(EXTENT - 4096..EXTENT + 4096)];
    assert_eq!(runs(&second), pages);
    // Not committed: it is still there after a restart, which is none of a clean end.
    write(&store, 0x9000..0x9001);
    std::mem::forget(second);
    drop(store);
    let store = known(dir.path(), &DEVICE);
    assert_eq!(store.recovery().open_extents, 1);
    let third = store.harvest("nightly", Some(first)).unwrap();
    assert_eq!(runs(&third), [range(0..EXTENT + 4096)]);
}

#[test]
fn an_unknown_parent_means_everything() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    store.join("a").unwrap();
    let first = store.harvest("a", None).unwrap().commit(|| Ok(())).unwrap();
    let none = store.harvest("a", None).unwrap();
    assert_eq!(none.everything(), Some(&Why::NoParent));
    assert_eq!(runs(&none), [range(0..DEVICE.len)]);
    none.abort().unwrap();
    let asked = "0000000000000000000000000000002a-0-1".parse().unwrap();
    let other = store.harvest("a", Some(asked)).unwrap();
    assert_eq!(other.everything(), Some(&Why::UnknownParent { asked }));
    drop(other);
    assert_eq!(store.harvest("a", Some(first)).unwrap().everything(), None);
}

/// The numbers of each consumer begin with 1, and so do those of a consumer that left and came
/// back. An epoch of another one was taken for an own one of that number: a copy that was older
/// than the increment got a list that was too short.
#[test]
fn an_epoch_of_another_consumer_or_of_an_earlier_life_means_everything() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    let join = |name: &str| {
        store.join(name).unwrap();
        let first = store.harvest(name, None).unwrap();
        first.commit(|| Ok(())).unwrap()
    };
    let old = join("a");
    write(&store, 0..1);
    // Its copy has the write, and that of `a` does not.
    let other = join("b");
    for (name, asked) in [("b", old), ("a", other)] {
        let increment = store.harvest(name, Some(asked)).unwrap();
        assert_eq!(increment.everything(), Some(&Why::UnknownParent { asked }));
    }
    store.leave("a").unwrap();
    let new = join("a");
    let increment = store.harvest("a", Some(old)).unwrap();
    let asked = old;
    assert_eq!(increment.everything(), Some(&Why::UnknownParent { asked }));
    drop(increment);
    store.rename("a", "c").unwrap();
    assert_eq!(store.harvest("c", Some(new)).unwrap().everything(), None);
}

/// A consumer that made an increment durable, and did not commit it, may name it: by then it is
/// dirty again, so the next one has its pages once more. After the next commit it is unknown.
#[test]
fn an_increment_that_was_not_committed_may_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    store.join("a").unwrap();
    let first = store.harvest("a", None).unwrap().commit(|| Ok(())).unwrap();
    write(&store, 0..1);
    let mut named = Vec::new();
    for end in 0..3 {
        let increment = store.harvest("a", Some(first)).unwrap();
        named.push(increment.epoch());
        match end {
            0 => increment.abort().unwrap(),
            1 => drop(increment),
            _ => drop(
                increment
                    .commit(|| Err(io::Error::other("full")))
                    .unwrap_err(),
            ),
        }
    }
    write(&store, 0x8000..0x8001);
    for epoch in &named {
        let next = store.harvest("a", Some(*epoch)).unwrap();
        assert_eq!(next.parent(), Some(*epoch));
        assert_eq!(runs(&next), [range(0..0x1000), range(0x8000..0x9000)]);
    }
    let last = store.harvest("a", Some(first)).unwrap();
    last.commit(|| Ok(())).unwrap();
    for asked in named {
        let next = store.harvest("a", Some(asked)).unwrap();
        assert_eq!(next.everything(), Some(&Why::UnknownParent { asked }));
    }
}

/// One that is forgotten blocks its consumer until the store is opened again, which aborts it.
#[test]
fn an_increment_that_is_forgotten_ends_with_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    store.join("a").unwrap();
    std::mem::forget(store.harvest("a", None).unwrap());
    assert!(store.consumers().unwrap()[0].outstanding.is_some());
    let refused = store.harvest("a", None).unwrap_err();
    assert!(matches!(refused, Error::Outstanding { number: 1, .. }));
    let other = io::Error::from(refused); // for code that returns errors of files
    assert!(other.downcast::<Error>().is_ok());
    drop(store);
    let store = known(dir.path(), &DEVICE);
    assert_eq!(store.consumers().unwrap()[0].outstanding, None);
    assert_eq!(
        runs(&store.harvest("a", None).unwrap()),
        [range(0..DEVICE.len)]
    );
}

/// A copy that is not durable commits nothing, and one consumer takes nothing from another.
#[test]
fn consumers_are_independent_and_a_failed_commit_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    let mut parents = Vec::new();
    for name in ["a", "b"] {
        store.join(name).unwrap();
        let first = store.harvest(name, None).unwrap();
        parents.push(first.commit(|| Ok(())).unwrap());
    }
    write(&store, 0..1);
    let a = store.harvest("a", Some(parents[0])).unwrap();
    assert!(matches!(
        store.harvest("a", None),
        Err(Error::Outstanding { number: 2, .. })
    ));
    let full = || Err(io::Error::from(io::ErrorKind::StorageFull));
    assert!(matches!(a.commit(full), Err(Error::NotDurable { .. })));
    let a = store.harvest("a", Some(parents[0])).unwrap();
    assert_eq!(runs(&a), [range(0..0x1000)]);
    write(&store, 0x8000..0x8001); // after the harvest
    let second = a.commit(|| Ok(())).unwrap();
    let b = store.harvest("b", Some(parents[1])).unwrap();
    assert_eq!(runs(&b), [range(0..0x1000), range(0x8000..0x9000)]);
    let a = store.harvest("a", Some(second)).unwrap();
    assert_eq!(runs(&a), [range(0x8000..0x9000)]);
}

/// An abort is durable, or an error: one of a consumer that left has nothing to put back.
#[test]
fn an_abort_says_whether_it_put_the_increment_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    store.join("a").unwrap();
    let batches = store.stats().batches;
    store.harvest("a", None).unwrap().abort().unwrap();
    assert_eq!(
        store.stats().batches,
        batches + 2,
        "the harvest, and the abort"
    );
    let gone = store.harvest("a", None).unwrap();
    store.leave("a").unwrap();
    assert!(matches!(gone.abort(), Err(Error::Gone { number: 2, .. })));
}

/// The log wraps many times while consumers join, leave and get other names.
#[test]
fn consumers_come_and_go_while_the_log_wraps() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::new().hot(2).log_bytes(8192);
    let store = create(dir.path(), &options);
    store.join("stays").unwrap();
    let first = store.harvest("stays", None).unwrap();
    let first = first.commit(|| Ok(())).unwrap();
    for round in 0..20u64 {
        store.join("guest").unwrap();
        write(&store, round * EXTENT..round * EXTENT + 1);
        store.rename("guest", "visitor").unwrap();
        assert!(matches!(
            store.rename("guest", "x"),
            Err(Error::UnknownConsumer { .. })
        ));
        assert!(matches!(
            store.join("visitor"),
            Err(Error::NameTaken { .. })
        ));
        let increment = store.harvest("visitor", None).unwrap();
        store.leave("visitor").unwrap();
        assert!(matches!(
            increment.commit(|| Ok(())),
            Err(Error::Gone { .. })
        ));
    }
    assert!(store.stats().switches > 20);
    drop(store);
    let store = known(dir.path(), &DEVICE);
    assert_eq!(store.consumers().unwrap().len(), 1);
    let next = store.harvest("stays", Some(first)).unwrap();
    let all = next.runs().total_bytes();
    // 18 pages to the page, and the two extents that were open.
    assert_eq!(all, u128::from(18 * 4096 + 2 * EXTENT));
}

/// The old bug of a changed-block tracker: a disk that grew was tracked as before, and its new part
/// never.
#[test]
fn a_device_that_grows_is_dirty_where_it_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    store.join("a").unwrap();
    let first = store.harvest("a", None).unwrap().commit(|| Ok(())).unwrap();
    let len = DEVICE.len + 3 * EXTENT;
    assert!(matches!(
        store.begin_write(DEVICE.len..len),
        Err(Error::PastEnd { .. })
    ));
    store.grow(len).unwrap();
    assert!(matches!(
        store.grow(1),
        Err(Error::Shrinks { asked: 1, .. })
    ));
    write(&store, len - 1..len);
    drop(store);
    let grown = Device { len, ..DEVICE };
    // Opened with the old length, it is another device.
    match open(dir.path(), &DEVICE) {
        Opened::Everything(lost) => assert_eq!(
            *lost.why(),
            Why::Resized {
                recorded: len,
                found: DEVICE.len
            }
        ),
        Opened::Known(_) => panic!("a device of another length is taken"),
    }
    let store = known(dir.path(), &grown);
    let next = store.harvest("a", Some(first)).unwrap();
    assert_eq!(runs(&next), [range(DEVICE.len..len)]);
}

/// Extents and pages are those of the store. Those of the options were checked against the device,
/// which has too many of them, so a large device could not be opened with other options.
#[test]
fn a_store_is_opened_with_the_extents_that_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let device = Device {
        id: 1,
        len: 1 << 49,
    };
    let coarse = Options::new().extent(Granule::M2).page(Granule::M2);
    let folder = || DirFolder::new(dir.path().join("store")).unwrap();
    drop(Store::create(folder(), &device, &coarse).unwrap());
    let Opened::Known(store) = Store::open(folder(), &device, &Options::new()).unwrap() else {
        panic!("nothing is known");
    };
    assert_eq!(store.extent(), Granule::M2);
}

/// By a handle: the bytes of the guard, a second write meanwhile, a write to several extents, one
/// that the device has not, and a guard that is forgotten, whose extent stays open.
#[test]
fn writes_by_a_handle_are_writes() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), &Options::new());
    store.join("a").unwrap();
    let first = store.harvest("a", None).unwrap();
    let first = first.commit(|| Ok(())).unwrap();
    let writer = store.writer();
    drop(writer.begin_write(0..1).unwrap()); // opens the extent
    let one = writer.begin_write(0x2000..0x2001).unwrap();
    let two = writer.begin_write(0x4000..0x4001).unwrap();
    let both = writer.begin_write(EXTENT - 1..EXTENT + 1).unwrap();
    assert_eq!(one.range(), range(0x2000..0x2001));
    assert!(matches!(
        writer.begin_write(DEVICE.len - 1..DEVICE.len + 1),
        Err(Error::PastEnd { .. })
    ));
    assert!(matches!(writer.begin_write(1..1), Err(Error::Range(_))));
    // What is in flight is in this increment, in the next one, or in both.
    let increment = store.harvest("a", Some(first)).unwrap();
    assert_eq!(runs(&increment), [range(0..0x1000), range(0x2000..0x3000)]);
    let second = increment.commit(|| Ok(())).unwrap();
    store.close_extents().unwrap();
    assert_eq!(store.stats().open, 2, "in flight");
    // By another thread.
    thread::scope(|scope| scope.spawn(move || drop((one, two, both))).join().unwrap());
    let increment = store.harvest("a", Some(second)).unwrap();
    let pages = [range(0x2000..0x3000), range(0x4000..0x5000)];
    let border = range(EXTENT - 4096..EXTENT + 4096);
    assert_eq!(runs(&increment), [pages[0], pages[1], border]);
    increment.commit(|| Ok(())).unwrap();
    std::mem::forget(writer.begin_write(0..1).unwrap());
    drop(writer.begin_write(0x1000..0x1001).unwrap());
    drop(writer);
    store.close_extents().unwrap();
    assert_eq!(store.stats().open, 1, "the guard was forgotten");
}

#[test]
fn bad_input_is_refused_before_anything_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let folder = || DirFolder::new(dir.path().join("store")).unwrap();
    let bad = |device: Device, options: Options| Store::create(folder(), &device, &options);
    let empty = Device { len: 0, ..DEVICE };
    assert!(matches!(
        bad(empty, Options::new()),
        Err(Error::DeviceLength { .. })
    ));
    let huge = Device {
        len: u64::MAX,
        ..DEVICE
    };
    assert!(matches!(
        bad(huge, Options::new()),
        Err(Error::DeviceLength { .. })
    ));
    let coarse = Options::new().page(Granule::M2);
    assert!(matches!(bad(DEVICE, coarse), Err(Error::Granules { .. })));
    for hot in [0, u32::MAX] {
        assert!(matches!(
            bad(DEVICE, Options::new().hot(hot)),
            Err(Error::Hot { .. })
        ));
    }
    for bytes in [1, !4095] {
        let options = Options::new().log_bytes(bytes);
        assert!(matches!(bad(DEVICE, options), Err(Error::LogBytes { .. })));
    }
    let store = bad(DEVICE, Options::new()).unwrap();
    assert!(matches!(bad(DEVICE, Options::new()), Err(Error::Locked)));
    assert!(matches!(store.begin_write(5..5), Err(Error::Range(_))));
    assert!(matches!(
        store.begin_write(0..u64::MAX),
        Err(Error::PastEnd { .. })
    ));
    assert!(matches!(
        store.join(""),
        Err(Error::NameLength { len: 0, .. })
    ));
    assert!(matches!(
        store.join(&"x".repeat(256)),
        Err(Error::NameLength { .. })
    ));
    for number in 0..64 {
        store.join(&number.to_string()).unwrap();
    }
    assert!(matches!(
        store.join("more"),
        Err(Error::TooManyConsumers { limit: 64 })
    ));
    assert_eq!(store.stats().opened, 0);
    drop(store);
    assert!(matches!(bad(DEVICE, Options::new()), Err(Error::Exists)));
}

/// Writers that wait together share flushes: 10,000 cold extents in fewer than 200 of them.
#[test]
fn cold_extents_that_wait_together_share_a_flush() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::new().hot(256);
    let store = create(dir.path(), &options);
    let before = store.stats().flushes;
    let (writers, depth, rounds) = (10, 100, 10);
    let start = Barrier::new(writers);
    thread::scope(|scope| {
        for writer in 0..writers as u64 {
            let (store, start) = (&store, &start);
            scope.spawn(move || {
                start.wait();
                for round in 0..rounds {
                    let first = (writer * rounds + round) * depth;
                    let extents = first..first + depth;
                    let intents: Vec<_> = extents
                        .map(|extent| store.begin_write(extent * EXTENT..extent * EXTENT + 1))
                        .collect();
                    for intent in intents {
                        drop(intent.unwrap().wait().unwrap());
                    }
                }
            });
        }
    });
    let stats = store.stats();
    assert_eq!(stats.opened, 10_000);
    let flushes = stats.flushes - before;
    println!("{flushes} flushes");
    assert!(flushes < 200, "{flushes} flushes for 10,000 extents");
}
