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

mod leaves;
mod quiet;

use leaves::both;

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
