//! Harvests that skip tables which no device walked through.

use super::leaves::{both, copied, memory_of, page, pass_over, write_page};
use super::*;

/// Two pages by leaves of one, whose harvests skip quiet tables, and a device that caches a pointer
/// to their table.
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
    domain.set_tracking(Tracking::On).unwrap();
    domain.break_hardware(breakage);
    let mut device = domain.attach(DeviceConfig {
        walk_entries: 1,
        ..DEVICE
    });
    write_page(&mut device, 0, 1);
    device.quiesce();
    (domain, device)
}

/// A device writes by a cached pointer while a harvester clears A, flushes, looks, and skips; it
/// also clears and looks before the flush. Returns whether the copies end up equal to the memory.
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

/// A harvester looks, and a device that cached a pointer to a table while nothing was tracked
/// writes by it, while tracking is being enabled. Returns whether the page is reported if it is
/// dirty in the end.
fn a_cached_table_against_enabling() -> bool {
    let (domain, mut device) = quiet_pages(Breakage::None);
    let mut copy = [0; 2];
    // The pages that the device wrote, and then: A is cleared and the flush is over, so that the
    // next look counts.
    for _ in 0..2 {
        pass_over(&domain, both(), &mut copy);
    }
    domain.set_tracking(Tracking::Off).unwrap();
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
    domain.set_tracking(Tracking::On).unwrap();
    looker.join().unwrap();
    let dirty = domain.translate(Iova::new(PAGE)).unwrap().dirty;
    copy[1] = 9;
    pass_over(&domain, both(), &mut copy);
    !dirty || copy[1] == 2
}

/// A page is made dirty by hand while a harvester looks, which decides whether later harvests skip.
/// Returns whether the page is reported, now or next time.
fn a_change_by_hand_against_a_look() -> bool {
    a_change_against_a_look(|domain| domain.table().make_dirty(page(1)).unwrap())
}

/// The same for the write of a processor that walks the table by software.
fn a_write_by_hand_against_a_look() -> bool {
    a_change_against_a_look(|domain| {
        domain.table().set_dirty(page(1).start()).unwrap();
    })
}

fn a_change_against_a_look(change: fn(&Domain)) -> bool {
    let (domain, device) = quiet_pages(Breakage::None);
    drop(device);
    let mut copy = [0; 2];
    for _ in 0..2 {
        pass_over(&domain, both(), &mut copy);
    }
    let hand = thread::spawn({
        let domain = Arc::clone(&domain);
        move || change(&domain)
    });
    // No page holds that value.
    copy[1] = 9;
    pass_over(&domain, both(), &mut copy);
    hand.join().unwrap();
    pass_over(&domain, both(), &mut copy);
    copy[1] == 0
}

/// Two harvesters look, clear A, flush and skip at once, and then a device writes by the pointer
/// that it has cached, or by a new walk. Returns whether the page that was written is reported
/// afterwards. The model of the table alone, `two_harvesters_that_skip`, has a fifth of the
/// executions.
fn two_harvesters_of_a_domain() -> bool {
    let (domain, mut device) = quiet_pages(Breakage::None);
    let mut copy = [0; 2];
    pass_over(&domain, both(), &mut copy);
    let other = thread::spawn({
        let domain = Arc::clone(&domain);
        move || {
            let mut copy = [0; 2];
            pass_over(&domain, both(), &mut copy);
            copy[1]
        }
    });
    pass_over(&domain, both(), &mut copy);
    write_page(&mut device, 1, 2);
    device.quiesce();
    pass_over(&domain, both(), &mut copy);
    let theirs = other.join().unwrap();
    pass_over(&domain, both(), &mut copy);
    copy[1].max(theirs) == 2
}

#[test]
fn what_is_skipped_is_clean_unless_a_step_is_left_out() {
    fn a_cached_table_against_sound_skipping() -> bool {
        a_cached_table_against_skipping(Breakage::None)
    }
    fn leaves_only() -> bool {
        a_cached_table_against_skipping(Breakage::SkipNonLeaf)
    }
    let steps = [Step::LookAfterFlush];
    holds_within(TABLES, &steps, a_cached_table_against_sound_skipping);
    fails(leaves_only);
    let steps = [Step::HeatAll];
    holds_within(TABLES, &steps, a_cached_table_against_enabling);
    let steps = [Step::HeatByHand];
    holds_within(TABLES, &steps, a_change_by_hand_against_a_look);
    let steps = [Step::HeatWrite];
    holds_within(TABLES, &steps, a_write_by_hand_against_a_look);
    if is_deep() {
        holds_within(TABLES, &[], two_harvesters_of_a_domain);
    }
}
