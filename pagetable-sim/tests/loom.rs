//! Every interleaving of one device with one harvester, and proof that leaving out a step of the protocol is noticed.
//!
//! ```text
//! RUSTFLAGS="--cfg dirtymap_loom --cfg crossbeam_loom" cargo test --profile loom -p pagetable-sim --test loom
//! ```
#![cfg(dirtymap_loom)]
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use dirtymap::sync::{Arc, AtomicU64, Ordering, Step, leave_out, thread};
use dirtymap::{
    Access, DirtySource, FlushGather, Granule, Iova, IovaRange, LeafSink, Mapping, UserBitmap,
};
use pagetable_sim::{
    AmdHost, AmdV1, ArmS1, Breakage, Device, DeviceConfig, Domain, DomainConfig, Format,
    PhysMemory, Table,
};

const PAGE: u64 = Domain::PAGE.bytes();

/// As small as a device can be that still caches and posts.
const DEVICE: DeviceConfig = DeviceConfig {
    iotlb_sets: 1,
    iotlb_ways: 1,
    posted_writes: 1,
    walk_entries: 0,
    ..DeviceConfig::DEFAULT
};

fn all() -> IovaRange {
    IovaRange::from_len(Iova::MIN, PAGE).unwrap()
}

/// A domain of one page.
fn domain<F: Format>() -> Arc<Domain<F>> {
    let memory = Arc::new(PhysMemory::new(2 * PAGE).unwrap());
    let domain = Domain::with_format(memory, DomainConfig::default());
    domain
        .map(&Mapping {
            range: all(),
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    domain
}

fn write<F: Format>(device: &mut Device<F>, value: u64) {
    device.write(Iova::MIN, &value.to_le_bytes()).unwrap();
}

fn word(memory: &PhysMemory) -> u64 {
    let mut bytes = [0; 8];
    memory.read(0, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Harvests, flushes, and copies the page if it was reported.
fn pass<F: Format>(domain: &Domain<F>, copy: &mut u64) {
    let words = [AtomicU64::new(0)];
    let view = UserBitmap::shared(&words)
        .view(all(), Domain::PAGE)
        .unwrap();
    let mut gather = FlushGather::new();
    domain
        .read_and_clear(all(), &mut LeafSink::new(&mut view.sink(), &mut gather))
        .unwrap();
    domain.invalidate(&gather).unwrap();
    // Relaxed: this thread's own bitmap.
    if words[0].load(Ordering::Relaxed) != 0 {
        *copy = word(domain.memory());
    }
}

/// Lets the other thread go on. A thread that waits for an answer is scheduled again only when this one pauses, blocks
/// or ends, so without a pause after the answer the model would never copy while the device goes on.
fn idle() {
    thread::yield_now();
}

/// A device writes twice to one page and then answers once more, while a harvester copies what it finds. When the
/// device is gone, one last pass must make the copy equal to the memory. Returns whether it did.
fn two_writes_against_a_harvest<F: Format>() -> bool {
    let domain = domain::<F>();
    domain.set_tracking(true).unwrap();
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        write(&mut device, 1);
        idle();
        write(&mut device, 2);
        idle();
        device.service();
        idle();
    });
    let mut copy = 0;
    pass(&domain, &mut copy);
    writer.join().unwrap();
    pass(&domain, &mut copy);
    assert_eq!(word(domain.memory()), 2);
    copy == 2
}

/// A device that sleeps with a cached translation wakes and writes while a harvester flushes: it is either waited for,
/// or finds the request.
fn waking_against_a_harvest() -> bool {
    waking(|_| ())
}

/// The same while the inbox is full, so that the device is told to drop everything.
fn waking_with_a_full_inbox() -> bool {
    waking(|domain| {
        let mut gather = FlushGather::new();
        gather.add(all(), Domain::PAGE);
        domain.invalidate(&gather).unwrap();
    })
}

/// Returns whether the copies end up equal to the memory.
fn waking(while_it_sleeps: fn(&Domain)) -> bool {
    let domain = domain::<AmdV1>();
    domain.set_tracking(true).unwrap();
    let mut device = domain.attach(DEVICE);
    write(&mut device, 1);
    device.quiesce();
    while_it_sleeps(&domain);
    let writer = thread::spawn(move || {
        write(&mut device, 2);
        idle();
    });
    let mut copy = 0;
    pass(&domain, &mut copy);
    writer.join().unwrap();
    pass(&domain, &mut copy);
    assert_eq!(word(domain.memory()), 2);
    copy == 2
}

/// A device that cached its translation untracked writes while tracking is being enabled. Returns whether the write is
/// copied if it began after the enabling.
fn a_write_against_enabling() -> bool {
    let domain = domain::<AmdV1>();
    let mut device = domain.attach(DEVICE);
    write(&mut device, 1);
    let enabled = Arc::new(AtomicU64::new(0));
    let writer = thread::spawn({
        let enabled = Arc::clone(&enabled);
        move || {
            write(&mut device, 2);
            idle();
            // Acquire: pairs with the Release below; a write that sees 1 begins after tracking was enabled.
            let tracked = enabled.load(Ordering::Acquire) == 1;
            write(&mut device, 3);
            tracked
        }
    });
    domain.set_tracking(true).unwrap();
    let mut copy = word(domain.memory());
    // Release: as above.
    enabled.store(1, Ordering::Release);
    let tracked = writer.join().unwrap();
    pass(&domain, &mut copy);
    !tracked || copy == 3
}

/// A harvest cleans a dirty leaf of two pages while the leaf is unmapped and one of its pages is mapped anew, which takes
/// a table in the same entry. Returns whether the new page is mapped, and the other one is not.
fn a_clean_against_a_remap<F: Format>() -> bool {
    let table = Arc::new(Table::<F>::new());
    let both = IovaRange::from_len(Iova::MIN, 2 * PAGE).unwrap();
    let map = |range| table.map(range, 0, Access::ReadWrite, F::size(1));
    map(both).unwrap();
    assert_eq!(table.set_dirty(Iova::MIN).unwrap().range, both);
    let harvester = thread::spawn({
        let table = Arc::clone(&table);
        move || table.clean()
    });
    table.unmap(both, |_, _, _| ()).unwrap();
    map(all()).unwrap();
    let found = table.set_dirty(Iova::MIN).map(|leaf| leaf.range);
    harvester.join().unwrap();
    found == Some(all()) && table.translate(Iova::new(PAGE)).is_none()
}

/// A device whose own TLB is in front of its IOTLB writes three times while a harvester copies what it finds. Returns
/// whether the copies end up equal to the memory.
fn a_device_tlb_against_a_harvest(breakage: Breakage) -> bool {
    let domain = domain::<AmdV1>();
    domain.set_tracking(true).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(DeviceConfig {
        tlb_entries: 1,
        ..DEVICE
    });
    write(&mut device, 1);
    let writer = thread::spawn(move || {
        write(&mut device, 2);
        idle();
        write(&mut device, 3);
        idle();
        device.service();
        idle();
    });
    let mut copy = 0;
    pass(&domain, &mut copy);
    writer.join().unwrap();
    pass(&domain, &mut copy);
    assert_eq!(word(domain.memory()), 3);
    copy == 3
}

/// The last table of two pages is unmapped and flushed, and a large leaf takes its place, while a device walks through
/// it and caches a pointer to it. Returns whether a write that begins after that is done and reported.
fn a_cached_table_against_its_replacement(breakage: Breakage) -> bool {
    let domain = domain::<AmdV1>();
    domain.set_tracking(true).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(DeviceConfig {
        walk_entries: 1,
        ..DEVICE
    });
    let replaced = Arc::new(AtomicU64::new(0));
    let writer = thread::spawn({
        let replaced = Arc::clone(&replaced);
        move || {
            // To the page that is not mapped at first: this one fails, or finds the large leaf.
            let _ = device.write(Iova::new(PAGE), &[1]);
            idle();
            // Acquire: pairs with the Release below.
            let mapped = replaced.load(Ordering::Acquire) == 1;
            let done = device.write(Iova::MIN, &2u64.to_le_bytes()).is_ok();
            (mapped, done)
        }
    });
    let mut gather = FlushGather::new();
    domain.unmap(all(), &mut gather, &mut |_| ());
    domain.invalidate(&gather).unwrap();
    domain
        .map(&Mapping {
            range: both(),
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    // Release: whoever sees it writes to the large leaf.
    replaced.store(1, Ordering::Release);
    let (mapped, done) = writer.join().unwrap();
    let leaf = domain.translate(Iova::MIN).unwrap();
    assert_eq!(leaf.range, both());
    !mapped || done && leaf.dirty
}

/// A device that faults twice while the log, which has room for one fault, is read: each fault is read or counted.
fn faults_against_their_reader() -> bool {
    let domain = domain::<AmdV1>();
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        let wide = Iova::new(1 << 40);
        device.write(wide, &[1]).is_err() && device.write(wide, &[1]).is_err()
    });
    let taken = domain.take_faults();
    assert!(writer.join().unwrap());
    let rest = domain.take_faults();
    let read = taken.records.len() + rest.records.len();
    read as u64 + taken.dropped + rest.dropped == 2
}

/// The pages of a model of a leaf of two.
fn both() -> IovaRange {
    IovaRange::from_len(Iova::MIN, 2 * PAGE).unwrap()
}

fn page(nth: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(nth * PAGE), PAGE).unwrap()
}

/// A domain of two pages, by leaves up to `max_leaf`, that tracks.
fn two_pages<F: Format>(max_leaf: Granule) -> Arc<Domain<F>> {
    let memory = Arc::new(PhysMemory::new(2 * PAGE).unwrap());
    let config = DomainConfig {
        max_leaf,
        ..DomainConfig::default()
    };
    let domain = Domain::with_format(memory, config);
    domain
        .map(&Mapping {
            range: both(),
            backing: 0,
            access: Access::ReadWrite,
        })
        .unwrap();
    domain.set_tracking(true).unwrap();
    domain
}

fn write_page<F: Format>(device: &mut Device<F>, nth: u64, value: u64) {
    let bytes = value.to_le_bytes();
    device.write(Iova::new(nth * PAGE), &bytes).unwrap();
}

/// Harvests `range`, flushes, and copies the pages that were reported.
fn pass_over<F: Format>(domain: &Domain<F>, range: IovaRange, copy: &mut [u64; 2]) {
    let words = [AtomicU64::new(0)];
    let view = UserBitmap::shared(&words).view(range, F::PAGE).unwrap();
    let mut gather = FlushGather::new();
    domain
        .read_and_clear(range, &mut LeafSink::new(&mut view.sink(), &mut gather))
        .unwrap();
    domain.invalidate(&gather).unwrap();
    // Relaxed: this thread's own bitmap.
    let word = words[0].load(Ordering::Relaxed);
    let first = range.start().get() / PAGE;
    for nth in first..2 {
        if word >> (nth - first) & 1 != 0 {
            copy[nth as usize] = memory_of(domain, nth);
        }
    }
}

fn memory_of<F: Format>(domain: &Domain<F>, nth: u64) -> u64 {
    let mut bytes = [0; 8];
    domain.memory().read(nth * PAGE, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Whether the copies are equal to the memory after a last pass.
fn copied<F: Format>(domain: &Domain<F>, copy: &mut [u64; 2]) -> bool {
    pass_over(domain, both(), copy);
    *copy == [memory_of(domain, 0), memory_of(domain, 1)]
}

/// A device writes to both pages of a leaf, and again, while the leaf is split and one of its parts harvested.
fn writes_against_a_split<F: Format>() -> bool {
    let domain = two_pages::<F>(granule_of_both());
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        write_page(&mut device, 0, 1);
        idle();
        write_page(&mut device, 1, 2);
        idle();
    });
    let mut copy = [0; 2];
    let mut owed = 0;
    domain
        .table()
        .split_at(Iova::new(PAGE), |_, _| owed += 1)
        .unwrap();
    let parts = domain.translate(Iova::MIN).map(|leaf| leaf.range) == Some(page(0));
    pass_over(&domain, page(0), &mut copy);
    writer.join().unwrap();
    copied(&domain, &mut copy) && parts && owed == 1
}

/// A leaf that was dirtied and cached as a whole is split; a harvest of one part must make the device forget the whole,
/// or its next write to the other part, which was harvested before, goes unseen.
fn a_split_with_a_cached_whole<F: Format>() -> bool {
    let domain = two_pages::<F>(granule_of_both());
    let mut device = domain.attach(DEVICE);
    write_page(&mut device, 0, 1);
    device.quiesce();
    domain.table().split_at(Iova::new(PAGE), |_, _| ()).unwrap();
    let writer = thread::spawn(move || {
        write_page(&mut device, 1, 2);
        idle();
        write_page(&mut device, 0, 3);
        idle();
    });
    let mut copy = [0; 2];
    pass_over(&domain, page(1), &mut copy);
    pass_over(&domain, page(0), &mut copy);
    writer.join().unwrap();
    copied(&domain, &mut copy)
}

/// A device writes to both parts of what becomes one leaf, while that is merged and harvested.
fn writes_against_a_merge<F: Format>() -> bool {
    let domain = two_pages::<F>(F::PAGE);
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        write_page(&mut device, 0, 1);
        idle();
        write_page(&mut device, 0, 2);
        idle();
    });
    let mut copy = [0; 2];
    domain
        .table()
        .merge(both(), granule_of_both(), |_, _, _| ())
        .unwrap();
    let merged = domain.translate(Iova::MIN).map(|leaf| leaf.range) == Some(both());
    pass_over(&domain, both(), &mut copy);
    writer.join().unwrap();
    copied(&domain, &mut copy) && merged
}

/// A device that caches a pointer to a table writes by it while the table is merged away, and the leaf that took its
/// place is harvested before the device forgets the table.
fn a_merge_of_a_cached_table_against_a_harvest() -> bool {
    let domain = two_pages::<AmdV1>(AmdV1::PAGE);
    let mut device = domain.attach(DeviceConfig {
        walk_entries: 1,
        ..DEVICE
    });
    write_page(&mut device, 0, 1);
    device.quiesce();
    let merger = thread::spawn({
        let domain = Arc::clone(&domain);
        move || domain.merge(both(), granule_of_both()).unwrap()
    });
    let mut copy = [0; 2];
    pass_over(&domain, both(), &mut copy);
    write_page(&mut device, 0, 2);
    drop(device);
    let merged = merger.join().unwrap();
    copied(&domain, &mut copy) && merged == 1
}

/// Two pages by leaves of one, whose harvests skip what is quiet, and a device that caches a pointer to their table.
fn quiet_pages(breakage: Breakage) -> (Arc<Domain>, Device) {
    let memory = Arc::new(PhysMemory::new(2 * PAGE).unwrap());
    let config = DomainConfig {
        max_leaf: AmdV1::PAGE,
        skip_quiet: true,
        ..DomainConfig::default()
    };
    let domain = Domain::new(memory, config);
    let mapping = Mapping {
        range: both(),
        backing: 0,
        access: Access::ReadWrite,
    };
    domain.map(&mapping).unwrap();
    domain.set_tracking(true).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(DeviceConfig {
        walk_entries: 1,
        ..DEVICE
    });
    write_page(&mut device, 0, 1);
    device.quiesce();
    (domain, device)
}

/// A device writes by a cached pointer while a harvester clears A, flushes, looks, and skips; it clears and looks before
/// the flush, too. Returns whether the copies end up equal to the memory.
fn a_cached_table_against_skipping(breakage: Breakage) -> bool {
    let (domain, mut device) = quiet_pages(breakage);
    let mut copy = [0; 2];
    pass_over(&domain, both(), &mut copy);
    let writer = thread::spawn(move || {
        write_page(&mut device, 1, 2);
        idle();
    });
    let words = [AtomicU64::new(0)];
    let view = UserBitmap::shared(&words)
        .view(both(), AmdV1::PAGE)
        .unwrap();
    let mut gather = FlushGather::new();
    for _ in 0..2 {
        domain
            .read_and_clear(both(), &mut LeafSink::new(&mut view.sink(), &mut gather))
            .unwrap();
    }
    domain.invalidate(&gather).unwrap();
    // Relaxed: this thread's own bitmap.
    if words[0].load(Ordering::Relaxed) & 2 != 0 {
        copy[1] = memory_of(&domain, 1);
    }
    pass_over(&domain, both(), &mut copy);
    writer.join().unwrap();
    copied(&domain, &mut copy)
}

/// A harvester looks, and a device that cached a pointer to a table while nothing was tracked writes by it, while tracking
/// is being enabled. Returns whether what is dirty in the end is reported.
fn a_cached_table_against_enabling() -> bool {
    let (domain, mut device) = quiet_pages(Breakage::None);
    let mut copy = [0; 2];
    // What the device wrote, and then: A is cleared and the flush is over, so that the next look counts.
    for _ in 0..2 {
        pass_over(&domain, both(), &mut copy);
    }
    domain.set_tracking(false).unwrap();
    write_page(&mut device, 0, 1);
    device.quiesce();
    let looker = thread::spawn({
        let domain = Arc::clone(&domain);
        move || {
            let words = [AtomicU64::new(0)];
            let view = UserBitmap::shared(&words)
                .view(both(), AmdV1::PAGE)
                .unwrap();
            let mut gather = FlushGather::new();
            domain
                .read_and_clear(both(), &mut LeafSink::new(&mut view.sink(), &mut gather))
                .unwrap();
            write_page(&mut device, 1, 2);
            idle();
        }
    });
    domain.set_tracking(true).unwrap();
    looker.join().unwrap();
    let dirty = domain.translate(Iova::new(PAGE)).unwrap().dirty;
    copy[1] = 9;
    pass_over(&domain, both(), &mut copy);
    !dirty || copy[1] == 2
}

/// A page is made dirty by hand while a harvester looks, and what it finds makes it skip or not. Returns whether the page
/// is reported, now or next time.
fn a_change_by_hand_against_a_look() -> bool {
    let (domain, device) = quiet_pages(Breakage::None);
    drop(device);
    let mut copy = [0; 2];
    for _ in 0..2 {
        pass_over(&domain, both(), &mut copy);
    }
    let hand = thread::spawn({
        let domain = Arc::clone(&domain);
        move || domain.table().make_dirty(page(1)).unwrap()
    });
    // No page holds that.
    copy[1] = 9;
    pass_over(&domain, both(), &mut copy);
    hand.join().unwrap();
    pass_over(&domain, both(), &mut copy);
    copy[1] == 0
}

/// A device writes through the second entry of a leaf of two entries, while the leaf is harvested.
fn a_write_to_a_later_entry_against_a_harvest() -> bool {
    let domain = two_pages::<Grouped>(granule_of_both());
    let mut device = domain.attach(DEVICE);
    let writer = thread::spawn(move || {
        write_page(&mut device, 1, 1);
        idle();
        write_page(&mut device, 0, 2);
        idle();
        write_page(&mut device, 1, 3);
        idle();
    });
    let mut copy = [0; 2];
    pass_over(&domain, both(), &mut copy);
    writer.join().unwrap();
    // The second harvest finds nothing if the first one made all entries clean.
    let lost = !copied(&domain, &mut copy);
    let still_dirty = domain.translate(Iova::MIN).is_some_and(|leaf| leaf.dirty);
    !lost && !still_dirty
}

/// A leaf of two entries is unmapped while a device writes: what the unmap says of D holds for every write before.
fn a_write_against_an_unmap_of_a_group() -> bool {
    let table = Arc::new(Table::<Grouped>::new());
    table
        .map(both(), 0, Access::ReadWrite, granule_of_both())
        .unwrap();
    let writer = thread::spawn({
        let table = Arc::clone(&table);
        move || table.set_dirty(Iova::new(PAGE)).map(|leaf| leaf.range)
    });
    let mut gone = Vec::new();
    table
        .unmap(both(), |leaf, _, dirty| gone.push((leaf, dirty)))
        .unwrap();
    // A walk finds the leaf, all of it, or nothing.
    match writer.join().unwrap() {
        Some(leaf) => leaf == both() && gone == [(both(), true)],
        None => gone == [(both(), false)],
    }
}

/// Two calls map overlapping ranges, one of them by a leaf of two entries: at most one is in the table.
fn two_maps_of_a_range<F: Format>() -> bool {
    let table = Arc::new(Table::<F>::new());
    let map =
        |table: &Table<F>, range, max: Granule| table.map(range, 0, Access::ReadWrite, max).is_ok();
    let other = thread::spawn({
        let table = Arc::clone(&table);
        move || map(&table, page(1), F::PAGE)
    });
    let whole = map(&table, both(), granule_of_both());
    let part = other.join().unwrap();
    let at = |nth: u64| {
        table
            .translate(Iova::new(nth * PAGE))
            .map(|leaf| leaf.range)
    };
    match (whole, part) {
        (true, false) => at(0) == Some(both()) && at(1) == Some(both()),
        (false, true) => at(0).is_none() && at(1) == Some(page(1)),
        (false, false) => at(0).is_none() && at(1).is_none(),
        (true, true) => false,
    }
}

/// Rights are taken away while a device sets D: it is kept, or the device finds the leaf read-only.
fn a_write_against_protect<F: Format>() -> bool {
    let table = Arc::new(Table::<F>::new());
    table.map(all(), 0, Access::ReadWrite, F::PAGE).unwrap();
    let writer = thread::spawn({
        let table = Arc::clone(&table);
        move || table.set_dirty(Iova::MIN).unwrap().access.writes()
    });
    table.protect(all(), Access::Read, |_, _| ()).unwrap();
    let wrote = writer.join().unwrap();
    let leaf = table.translate(Iova::MIN).unwrap();
    leaf.dirty == wrote && leaf.access == Access::Read
}

/// AMD v1 with tables of four entries: two pages are a leaf of two entries.
type Grouped = AmdHost<4, 11>;

fn granule_of_both() -> Granule {
    Granule::from_bytes(2 * PAGE).unwrap()
}

/// Explores `model` without `step`; returns how many executions there were and how many of them lost a write. A lost
/// write is counted, not asserted: a panic would drop the epoch's state outside of the model.
fn explore(step: Option<Step>, name: &str, model: fn() -> bool) -> (usize, usize) {
    // What is left out is left out for the whole process.
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    leave_out(step);
    let counts = std::sync::Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let inner = std::sync::Arc::clone(&counts);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(move || {
        inner.0.fetch_add(1, SeqCst);
        if !model() {
            inner.1.fetch_add(1, SeqCst);
        }
    });
    leave_out(None);
    let (executions, lost) = (counts.0.load(SeqCst), counts.1.load(SeqCst));
    eprintln!("{name} without {step:?}: {executions} executions, {lost} lost a write");
    assert!(executions > 1, "{name} explored nothing");
    (executions, lost)
}

macro_rules! explore {
    ($step:expr, $model:expr) => {
        explore($step, stringify!($model), $model).1
    };
}

#[test]
fn no_write_is_lost_unless_a_step_is_left_out() {
    assert_eq!(explore!(None, two_writes_against_a_harvest::<AmdV1>), 0);
    assert_eq!(explore!(None, two_writes_against_a_harvest::<ArmS1>), 0);
    assert_eq!(explore!(None, a_clean_against_a_remap::<AmdV1>), 0);
    assert_eq!(explore!(None, a_clean_against_a_remap::<ArmS1>), 0);
    assert_eq!(explore!(None, waking_against_a_harvest), 0);
    assert_eq!(explore!(None, waking_with_a_full_inbox), 0);
    assert_eq!(explore!(None, a_write_against_enabling), 0);
    assert_eq!(explore!(None, faults_against_their_reader), 0);
    let lost = explore!(None, || a_device_tlb_against_a_harvest(Breakage::None));
    assert_eq!(lost, 0);
    let lost = explore!(None, || a_device_tlb_against_a_harvest(
        Breakage::DeviceTlbFirst
    ));
    assert!(lost > 0, "the wrong order of the rounds goes unnoticed");
    let lost = explore!(None, || a_cached_table_against_its_replacement(
        Breakage::None
    ));
    assert_eq!(lost, 0);
    let lost = explore!(None, || a_cached_table_against_its_replacement(
        Breakage::SkipNonLeaf
    ));
    assert!(lost > 0, "a stale pointer to a table goes unnoticed");
    for step in [
        Step::DropCached,
        Step::DrainInFlight,
        Step::RecordBeforeClear,
    ] {
        let lost = explore!(Some(step), two_writes_against_a_harvest::<AmdV1>);
        assert!(lost > 0, "{step:?} was left out and nobody noticed");
        let lost = explore!(Some(step), two_writes_against_a_harvest::<ArmS1>);
        assert!(lost > 0, "{step:?} was left out and nobody noticed");
    }
    assert!(explore!(Some(Step::DropCached), waking_against_a_harvest) > 0);
    assert!(explore!(Some(Step::DropCached), a_write_against_enabling) > 0);
}

#[test]
fn leaves_change_their_size_under_dma_unless_a_step_is_left_out() {
    assert_eq!(explore!(None, writes_against_a_split::<AmdV1>), 0);
    assert_eq!(explore!(None, writes_against_a_split::<Grouped>), 0);
    assert_eq!(explore!(None, a_split_with_a_cached_whole::<AmdV1>), 0);
    assert_eq!(explore!(None, writes_against_a_merge::<AmdV1>), 0);
    assert_eq!(explore!(None, writes_against_a_merge::<Grouped>), 0);
    assert_eq!(
        explore!(None, a_write_to_a_later_entry_against_a_harvest),
        0
    );
    assert_eq!(explore!(None, a_write_against_an_unmap_of_a_group), 0);
    assert_eq!(explore!(None, two_maps_of_a_range::<Grouped>), 0);
    assert_eq!(explore!(None, two_maps_of_a_range::<AmdV1>), 0);
    assert_eq!(explore!(None, a_write_against_protect::<AmdV1>), 0);
    assert_eq!(explore!(None, a_write_against_protect::<ArmS1>), 0);
    assert!(explore!(Some(Step::DirtyParts), writes_against_a_split::<AmdV1>) > 0);
    assert!(explore!(Some(Step::SpreadDirty), writes_against_a_split::<Grouped>) > 0);
    assert!(explore!(Some(Step::DropLarger), a_split_with_a_cached_whole::<AmdV1>) > 0);
    assert!(explore!(Some(Step::DirtyWhole), writes_against_a_merge::<AmdV1>) > 0);
    let merge = a_merge_of_a_cached_table_against_a_harvest;
    assert_eq!(explore!(None, merge), 0);
    assert!(explore!(Some(Step::DirtyBehindFlush), merge) > 0);
    for step in [Step::ReadEveryEntry, Step::CleanEveryEntry] {
        assert!(explore!(Some(step), a_write_to_a_later_entry_against_a_harvest) > 0);
    }
}

#[test]
fn what_is_skipped_is_clean_unless_a_step_is_left_out() {
    fn sound() -> bool {
        a_cached_table_against_skipping(Breakage::None)
    }
    fn leaves_only() -> bool {
        a_cached_table_against_skipping(Breakage::SkipNonLeaf)
    }
    assert_eq!(explore!(None, sound), 0);
    assert!(explore!(None, leaves_only) > 0);
    assert!(explore!(Some(Step::LookAfterFlush), sound) > 0);
    assert_eq!(explore!(None, a_cached_table_against_enabling), 0);
    assert!(explore!(Some(Step::HeatAbove), a_cached_table_against_enabling) > 0);
    assert_eq!(explore!(None, a_change_by_hand_against_a_look), 0);
    assert!(explore!(Some(Step::HeatAbove), a_change_by_hand_against_a_look) > 0);
}
