//! No write is lost, whatever mode KVM is in and whichever call fails.

use super::*;

/// Guest and VMM write, harvests of parts are committed, aborted, refused by KVM, or fail to flush,
/// and the guest writes in the middle of each. In the end the copy is the memory.
#[test]
fn no_write_is_lost_in_any_mode() {
    for mode in MODES {
        for seed in 1..=60u64 {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let (space, log, fake) = machine(mode);
            // The first full copy, which follows the begin of tracking.
            let mut copy = fake.with(|state| state.memory.clone());
            let page = |random: &mut Random| {
                let (_, first, n) = SLOTS[random.below(2) as usize];
                first + random.below(n)
            };
            for _ in 0..60 {
                for _ in 0..random.below(6) {
                    let page = page(&mut random);
                    if random.below(3) > 0 {
                        fake.with(|state| state.write(page));
                    } else {
                        fake.with(|state| state.memory[page as usize] += 1);
                        space.mark(pages(page, 1)).unwrap();
                    }
                }
                if random.below(4) == 0 {
                    let before_clear = (0..random.below(4)).map(|_| page(&mut random)).collect();
                    fake.with(|state| state.before_clear = before_clear);
                }
                if random.below(3) == 0 {
                    let calls = random.below(4) as u32;
                    fake.with(|state| state.fail_in = Some(calls));
                }
                if random.below(20) == 0 {
                    let _ = log.drain_rings();
                }
                let (_, first, n) = SLOTS[random.below(2) as usize];
                let from = random.below(n);
                let range = pages(first + from, 1 + random.below(n - from));
                let mut words = [0u64; 8];
                let request = HarvestRequest::new(range, Granule::K4);
                let lease = space
                    .harvest(&request, UserBitmap::new(&mut words))
                    .unwrap()
                    .partial();
                let (late, outcome) = (page(&mut random), random.below(4));
                fake.with(|state| state.write(late));
                if let Ok(lease) = lease.sync()
                    && outcome > 0
                {
                    for run in lease.runs() {
                        for n in run.start().get() >> 12..=run.last().get() >> 12 {
                            copy[n as usize] = fake.with(|state| state.memory[n as usize]);
                        }
                    }
                    lease.commit();
                }
                fake.with(|state| state.fail_in = None);
            }
            // The machine stops.
            fake.with(|state| state.before_clear.clear());
            for n in SLOTS
                .iter()
                .flat_map(|(_, first, n)| harvest(&space, pages(*first, *n)))
            {
                copy[n as usize] = fake.with(|state| state.memory[n as usize]);
            }
            fake.with(|state| assert_eq!(copy, state.memory, "{mode:?}, seed {seed}"));
            let rest: Vec<_> = SLOTS
                .iter()
                .flat_map(|(_, first, n)| harvest(&space, pages(*first, *n)))
                .collect();
            assert!(rest.is_empty(), "{mode:?}, seed {seed}: {rest:?} twice");
        }
    }
}

/// stratovirt and Cloud Hypervisor read slot after slot, and KVM clears what it tells: when a later
/// slot failed, what the earlier ones had said was dropped, and what this one had said as well if
/// the bitmap beside it could not be read.
#[test]
fn an_error_in_one_slot_loses_nothing_of_the_others() {
    for mode in [MODES[0], MODES[1]] {
        let (space, _log, fake) = machine(mode);
        fake.with(|state| [5, 199, 300, 369].map(|page| state.write(page)));
        space.unmap_discarding(pages(200, 100)).unwrap_err();
        space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 370), Granule::K4);
        // The first slot is read (and cleared); the second one fails.
        fake.with(|state| state.fail_in = Some(if mode.is_manual() { 2 } else { 1 }));
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the second slot cannot be read"));
        assert_eq!(stopped.at, Iova::new(300 << 12));
        assert_eq!(lease.report().bits_set, 2);
        drop(lease);
        assert_eq!(harvest(&space, pages(0, 370)), [5, 199, 300, 369]);
    }
}

/// Firecracker's snapshots read KVM's log, and lost the pages when the file could not be written.
#[test]
fn a_lease_that_is_dropped_puts_back_what_kvm_has_forgotten() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| [1, 64, 199].map(|page| state.write(page)));
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 200), Granule::K4);
        for _ in 0..3 {
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            assert_eq!(lease.report().bits_set, 3, "{mode:?}");
            drop(lease);
            words = [0; 8];
        }
        assert_eq!(harvest(&space, pages(0, 200)), [1, 64, 199]);
        assert_eq!(harvest(&space, pages(0, 200)), [0u64; 0]);
    }
}

/// A page that came out of a ring is written on unseen until the reset. Another harvest, which
/// takes it from what is pending, waits for that reset too.
#[test]
fn a_harvest_that_finds_a_page_of_a_ring_waits_for_its_reset() {
    let (space, _log, fake) = machine(MODES[3]);
    fake.with(|state| [5, 100].map(|page| state.write(page)));
    let mut words = [0u64; 8];
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    // Takes page 5 and leaves page 100 pending; its sync fails.
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    fake.with(|state| state.fail_in = Some(0));
    drop(lease.sync().unwrap_err());
    assert_eq!(harvest(&space, pages(64, 136)), [100]);
    // Whether it is copied before or after its write, no write after that harvest is lost.
    fake.with(|state| state.write(100));
    assert_eq!(harvest(&space, pages(64, 136)), [100]);
    assert_eq!(harvest(&space, pages(0, 64)), [5]);
}
