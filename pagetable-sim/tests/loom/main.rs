//! Every interleaving of one device with one harvester, and proof that leaving out a step of the
//! protocol is noticed.
//!
//! ```text
//! RUSTFLAGS="--cfg dirtymap_loom --cfg crossbeam_loom" \
//!   cargo test --profile loom -p pagetable-sim --features __loom --test loom
//! ```
#![cfg(dirtymap_loom)]
#![allow(clippy::unwrap_used)]

use dirtymap::source::{FlushGather, LeafSink};
use dirtymap::sync::model::{
    Bound, breaks_without, explore, fails_without, holds_only_with, holds_within, is_deep, name_of,
};
use dirtymap::sync::{Arc, AtomicU64, Ordering, Step, thread};
use dirtymap::{Access, DirtySource, Granule, Iova, IovaRange, Mapping, Tracking, UserBitmap};
use pagetable_sim::{
    AmdHost, AmdV1, ArmS1, Breakage, Device, DeviceConfig, Domain, DomainConfig, Format,
    PhysMemory, Table,
};

/// Two preemptions find every fault that more preemptions find in models of tables, in a tenth of
/// the time.
const TABLES: Bound = Bound::between(2, 2);

mod leaves;
mod quiet;

use leaves::both;

const PAGE: u64 = Domain::PAGE.bytes();

/// The smallest device that still caches and posts.
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

/// Lets the other thread run. A thread that waits for an answer is scheduled again only when this
/// one pauses, blocks or ends. Without a pause after the answer, the model would never copy while
/// the device continues.
fn idle() {
    thread::yield_now();
}

/// A device writes twice to one page and then answers once more, while a harvester copies the pages
/// that it finds. When the device is gone, one last pass must make the copy equal to the memory.
/// Returns whether it did.
fn two_writes_against_a_harvest<F: Format>() -> bool {
    let domain = domain::<F>();
    domain.set_tracking(Tracking::On).unwrap();
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

/// A device that sleeps with a cached translation wakes and writes while a harvester flushes: it is
/// either waited for, or finds the request.
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
    domain.set_tracking(Tracking::On).unwrap();
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

/// A device that cached its translation untracked writes while tracking is being enabled. Returns
/// whether the write is copied if it began after the enabling.
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
            // Acquire: pairs with the Release below; a write that sees 1 begins after tracking was
            // enabled.
            let tracked = enabled.load(Ordering::Acquire) == 1;
            write(&mut device, 3);
            tracked
        }
    });
    domain.set_tracking(Tracking::On).unwrap();
    let mut copy = word(domain.memory());
    // Release: as above.
    enabled.store(1, Ordering::Release);
    let tracked = writer.join().unwrap();
    pass(&domain, &mut copy);
    !tracked || copy == 3
}

/// A harvest cleans a dirty leaf of two pages while the leaf is unmapped and one of its pages is
/// mapped anew, which takes a table in the same entry. Returns whether the new page is mapped, and
/// the other one is not.
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

/// A device with a TLB of its own writes three times while a harvester copies the pages that it
/// finds. Returns whether the copies end up equal to the memory.
fn a_device_tlb_against_a_harvest(breakage: Breakage) -> bool {
    let domain = domain::<AmdV1>();
    domain.set_tracking(Tracking::On).unwrap();
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

/// The last table of two pages is unmapped and flushed, and a large leaf takes its place, while a
/// device walks through it and caches a pointer to it. Returns whether a write that begins after
/// that is done and reported.
fn a_cached_table_against_its_replacement(breakage: Breakage) -> bool {
    let domain = domain::<AmdV1>();
    domain.set_tracking(Tracking::On).unwrap();
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
    // Release: a device that sees it writes to the large leaf.
    replaced.store(1, Ordering::Release);
    let (mapped, done) = writer.join().unwrap();
    let leaf = domain.translate(Iova::MIN).unwrap();
    assert_eq!(leaf.range, both());
    !mapped || done && leaf.dirty
}

/// A device that faults twice while the log, which has room for one fault, is read: each fault is
/// read or counted.
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

/// Rule 1 of the contract, with its three steps: recording before the clear, dropping cached
/// entries, and waiting for writes in flight.
#[test]
fn no_write_is_lost_by_a_harvest() {
    let steps = [Step::DropCached, Step::DrainInFlight, Step::RecordLeaves];
    holds_only_with(&steps, two_writes_against_a_harvest::<AmdV1>);
    holds_only_with(&steps, two_writes_against_a_harvest::<ArmS1>);
    // With fewer preemptions the copy never comes between the two.
    let bound = Bound::between(3, usize::MAX);
    fails_without(
        bound,
        &[Step::PublishLanded],
        two_writes_against_a_harvest::<AmdV1>,
    );
}

#[test]
fn a_clean_spares_what_took_the_place_of_a_leaf() {
    holds_within(TABLES, &[], a_clean_against_a_remap::<AmdV1>);
    holds_within(TABLES, &[], a_clean_against_a_remap::<ArmS1>);
}

/// Rule 4 of the contract for devices that sleep.
#[test]
fn a_device_that_wakes_is_waited_for_or_finds_the_request() {
    let steps = [Step::DropCached, Step::WakeFence, Step::AskFence];
    holds_only_with(&steps, waking_against_a_harvest);
    holds_only_with(
        &[Step::OverflowFence, Step::PublishAsleep],
        waking_with_a_full_inbox,
    );
}

#[test]
fn a_write_that_begins_after_enabling_is_reported() {
    holds_only_with(&[Step::DropCached], a_write_against_enabling);
}

/// Rule 11 of the contract in the simulator.
#[test]
fn a_fault_is_read_or_counted() {
    holds_only_with(&[Step::PublishRequest], faults_against_their_reader);
}

/// The order of the rounds of an invalidation, which hardware that breaks it shows.
#[test]
fn device_tlbs_are_emptied_behind_what_refills_them() {
    fn sound() -> bool {
        a_device_tlb_against_a_harvest(Breakage::None)
    }
    fn swapped() -> bool {
        a_device_tlb_against_a_harvest(Breakage::DeviceTlbFirst)
    }
    holds_only_with(&[], sound);
    fails(swapped);
}

/// Rule 10 of the contract: no write uses a table that was replaced.
#[test]
fn a_replaced_table_is_forgotten() {
    fn sound() -> bool {
        a_cached_table_against_its_replacement(Breakage::None)
    }
    fn leaves_only() -> bool {
        a_cached_table_against_its_replacement(Breakage::SkipNonLeaf)
    }
    holds_within(TABLES, &[], sound);
    fails(leaves_only);
}

/// `model` has broken hardware.
fn fails(model: impl Fn() -> bool + Sync + Send + Copy + 'static) {
    let explored = explore(Bound::USUAL, None, model);
    let name = name_of(&model);
    println!("{name}: fails in {} executions", explored.failures);
    assert!(explored.failures > 0, "{name} goes unnoticed");
}
