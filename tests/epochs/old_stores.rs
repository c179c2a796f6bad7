//! Harvests of others that still use a store that a consumer had before.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use dirtymap::harvest::Bounds;
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, Consumer, DirtySource, Error, Granule, Iova, IovaRange, Start, Tracking,
    UserBitmap,
};

use super::{PAGE, next, pages, space};

type Call = Box<dyn FnOnce() + Send>;

/// A device with 128 pages. After its first look at page 0, it makes a call: in the middle of the
/// harvest that looks.
#[derive(Default)]
struct Device {
    dirty: [AtomicU64; 2],
    meanwhile: Mutex<Option<Call>>,
    /// Flushes of everything.
    whole_flushes: AtomicU64,
}

impl Device {
    fn write(&self, page: u64) {
        self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), SeqCst);
    }

    /// The next harvest makes `call` when it has taken what is dirty in the first 64 pages, and
    /// before it leaves that to others.
    fn meanwhile(&self, call: impl FnOnce() + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::new(call));
    }
}

impl DirtySource for Device {
    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn map(&self, _: &dirtymap::source::Mapping) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        for page in range.start().get() / PAGE..=range.last().get() / PAGE {
            let (word, bit) = (&self.dirty[(page / 64) as usize], 1 << (page % 64));
            if word.load(SeqCst) & bit != 0 {
                let clear = || word.fetch_and(!bit, SeqCst) & bit != 0;
                let at = Iova::new(page * PAGE);
                let taken = out.take(pages(page, 1), Granule::K4, clear);
                taken.map_err(|error| Stopped { at, error })?;
            }
        }
        if range.start() == Iova::MIN {
            let call = self.meanwhile.lock().unwrap().take();
            call.into_iter().for_each(|call| call());
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        if gather.ranges() == [IovaRange::ALL] {
            self.whole_flushes.fetch_add(1, SeqCst);
        }
        Ok(Invalidated::default())
    }
}

/// Two areas of 64 pages over a device, and two consumers beside the unnamed one.
fn three() -> (Arc<AddressSpace>, Arc<Device>, [Arc<Consumer<'static>>; 2]) {
    let space = Arc::new(space(64));
    space.map(pages(64, 64), 0, Access::ReadWrite).unwrap();
    let device = Arc::new(Device::default());
    space.attach(Arc::clone(&device)).unwrap();
    let join = |name| Consumer::shared(Arc::clone(&space), name, Start::Clean).unwrap();
    let consumers = ["one", "two"].map(|name| Arc::new(join(name)));
    (space, device, consumers)
}

/// `two` harvests, and the store of `one` is dropped.
fn drop_store(space: &AddressSpace, [one, two]: [&Consumer<'_>; 2]) {
    let bytes = 1;
    one.set_bounds(Bounds {
        bytes,
        ..Bounds::default()
    });
    space.mark(pages(3, 1)).unwrap();
    next(two);
    assert!(one.stats().everything);
    one.set_bounds(Bounds::default());
}

/// The harvest of a consumer X has an old snapshot: with an area that has gone since, and with the
/// store of `one` that was dropped since. Another area comes to the same addresses, and X takes a
/// write to it, because it asks the source by address. X leaves the page in the old store.
///
/// `one` had harvested between the unmap and the map, and had taken these addresses for a hole. So
/// nothing said that everything there is pending, and no harvest of `one` ever reported the write.
#[test]
fn a_hole_that_was_mapped_again_is_pending_until_old_harvests_have_ended() {
    for syncs_late in [false, true] {
        let (space, device, [one, two]) = three();
        let hole = pages(64, 64);
        let between = Arc::new(Mutex::new(None));
        device.meanwhile({
            let (space, device) = (Arc::clone(&space), Arc::clone(&device));
            let (one, two, between) = (Arc::clone(&one), two, Arc::clone(&between));
            move || {
                drop_store(&space, [&one, &two]);
                space.unmap_discarding(hole).unwrap();
                *between.lock().unwrap() = Some(one.rounds().harvest().unwrap());
                space.map(hole, 0, Access::ReadWrite).unwrap();
                device.write(70);
            }
        });
        space.rounds().next().unwrap().commit();
        let lease = between.lock().unwrap().take().unwrap();
        let told = match syncs_late {
            true => {
                let told = next(&one).0;
                lease.sync().unwrap().commit();
                told
            }
            false => {
                lease.sync().unwrap().commit();
                next(&one).0
            }
        };
        assert!(told.contains(&70), "{told:?}");
        assert!(!next(&one).0.contains(&70), "once");
        assert!(!one.stats().everything);
    }
}

/// A harvest of another consumer that still uses the old store of `one` has taken page 9, and owes
/// its flush. A lease of `one` has everything, and has not waited for that harvest yet. A younger
/// lease of `one` sees page 9 in flight. It has nothing as a whole, so its sync did not wait: its
/// copy could be older than that of the lease of everything, whose epoch comes first. The writes in
/// between were lost to a copy that is made in the order of epochs.
#[test]
fn the_first_sync_over_a_new_store_waits_for_old_harvests() {
    let (space, device, [one, two]) = three();
    device.write(9);
    let between = Arc::new(Mutex::new(None));
    device.meanwhile({
        let (space, one) = (Arc::clone(&space), Arc::clone(&one));
        let between = Arc::clone(&between);
        move || {
            drop_store(&space, [&one, &two]);
            let everything = one.rounds().harvest().unwrap();
            let seen = one.rounds().harvest().unwrap();
            *between.lock().unwrap() = Some((everything, seen));
        }
    });
    space.rounds().next().unwrap().commit();
    let (everything, seen) = between.lock().unwrap().take().unwrap();
    let flushes = || device.whole_flushes.load(SeqCst);
    let before = flushes();
    let seen = seen.sync().unwrap();
    assert_eq!(seen.runs().collect::<Vec<_>>(), [pages(9, 1)]);
    assert_eq!(flushes(), before + 1);
    // Once is enough: no harvest is left that uses the old store.
    everything.sync().unwrap().commit();
    assert_eq!(flushes(), before + 1);
}

/// An unmap of an area that is pending as a whole. It marked each page of the area, which for one
/// of 2^62 bytes takes more memory than any machine has: the process was aborted.
#[test]
fn an_unmap_of_what_is_pending_as_a_whole_takes_no_memory_for_it() {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 62, 0, Access::ReadWrite).unwrap();
    let late = space.consumer("late", Start::Dirty).unwrap();
    assert!(late.stats().everything);
    space.mark(pages(7, 3)).unwrap();
    let unmapped = space.unmap_discarding(0..1 << 62).unwrap();
    let (dirty, discarded) = (unmapped.dirty_bytes, unmapped.discarded_bytes);
    assert_eq!((dirty, discarded), (0, 1 << 62), "each page once");
    assert_eq!(late.stats().unmapped_bytes, 1 << 62);
    // What is pending in a part of the area, and what is marked beside it and in it.
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    let low = space
        .consumer_of("low", pages(0, 32), Start::Clean)
        .unwrap();
    drop(late);
    let bytes = 1;
    low.set_bounds(Bounds {
        bytes,
        ..Bounds::default()
    });
    space.mark(pages(3, 1)).unwrap();
    space.rounds().next().unwrap().commit();
    assert!(low.stats().everything);
    space.mark(pages(30, 4)).unwrap();
    let mut words = [0; 1];
    let bitmap = UserBitmap::new(&mut words);
    let (unmapped, view) = space.unmap(pages(0, 64), Granule::K4, bitmap).unwrap();
    assert_eq!(
        (unmapped.dirty_bytes, unmapped.discarded_bytes),
        (34 * 4096, 0)
    );
    assert_eq!(view.runs().collect::<Vec<_>>(), [pages(0, 34)]);
}

/// An abort of a lease with a large granule. One bit stands for 1 GiB, which is 8 chunks of bitmap
/// for the consumer, more than its bounds allow. The abort allocated them, and dropped them after.
#[test]
fn an_abort_of_large_granules_keeps_the_bounds() {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 30, 0, Access::ReadWrite).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let bytes = 3 << 12;
    one.set_bounds(Bounds {
        bytes,
        ..Bounds::default()
    });
    space.mark(pages(7, 1)).unwrap();
    let lease = one.rounds().granule(Granule::G1).next().unwrap();
    assert_eq!(lease.abort().bytes, 1 << 30);
    let stats = one.stats();
    assert_eq!(
        (stats.dropped, stats.held_bytes, stats.everything),
        (0, 0, true)
    );
    assert_eq!(next(&one).0.len(), 1 << 18);
    assert_eq!(next(&one).0, []);
}
