//! The adapter of KVM under the KVM of this machine. Without KVM, each test reports that it is
//! skipped.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common_kvm;
#[path = "../../../tests/common_skip/mod.rs"]
mod common_skip;

use std::collections::BTreeSet;

use common_kvm::{Guest, MODES, SLOTS, in_every_mode, kvm};
use dirtymap::{Access, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_kvm::{KvmError, KvmLog, KvmMode};
use kvm_bindings::{
    KVM_CAP_MULTI_ADDRESS_SPACE, KVM_MEM_LOG_DIRTY_PAGES, Msrs, kvm_msr_entry,
    kvm_userspace_memory_region,
};

#[test]
fn a_page_that_the_guest_wrote_is_reported() {
    in_every_mode(|mode, mut guest| {
        assert_eq!(guest.harvest_all(), [0u64; 0], "{mode:?}");
        guest.write(8, 1, 0);
        assert_eq!(guest.memory[0].byte(8 * guest.page), 1, "the guest ran");
        assert_eq!(guest.harvest_all(), [8], "{mode:?}");
        assert_eq!(guest.harvest_all(), [0u64; 0]);
        guest.write(8, 1, 0);
        assert_eq!(guest.harvest_all(), [8], "{mode:?}: written again");
    });
}

#[test]
fn guest_and_vmm_come_out_of_one_harvest() {
    in_every_mode(|mode, mut guest| {
        guest.write(10, 3, 2);
        guest.memory[0].write(11 * guest.page, b"by the VMM");
        guest.space.mark(guest.pages(11, 1)).unwrap();
        guest.space.mark(guest.pages(12, 1)).unwrap();
        assert_eq!(guest.harvest(0, 90), [10, 11, 12, 14], "{mode:?}");
        assert_eq!(guest.harvest_all(), [0u64; 0]);
    });
}

/// KVM itself writes guest memory, without an instruction of the guest.
#[test]
fn a_page_that_kvm_wrote_is_reported() {
    in_every_mode(|mode, guest| {
        let msr = kvm_msr_entry {
            index: 0x4b56_4d00, // MSR_KVM_WALL_CLOCK_NEW
            data: 42 * guest.page,
            ..Default::default()
        };
        let set = guest.vcpu.set_msrs(&Msrs::from_entries(&[msr]).unwrap());
        assert_eq!(set.unwrap(), 1);
        assert_eq!(guest.harvest_all(), [42], "{mode:?}");
    });
}

/// Slots of 90 and 130 pages: KVM clears pages in multiples of 64 only, except at the end of a
/// slot.
#[test]
fn the_last_pages_of_a_slot_are_cleared_by_themselves() {
    in_every_mode(|mode, mut guest| {
        guest.write(60, 30, 1);
        guest.write(229, 1, 0);
        guest.write(100, 1, 0);
        assert_eq!(guest.harvest(89, 1), [89], "{mode:?}");
        assert_eq!(guest.harvest(63, 2), [63, 64]);
        let rest: Vec<u64> = (60..63).chain(65..89).collect();
        assert_eq!(guest.harvest(0, 90), rest);
        assert_eq!(guest.harvest(224, 6), [229]);
        assert_eq!(guest.harvest(100, 130), [100]);
        assert_eq!(guest.harvest_all(), [0u64; 0]);
    });
}

#[test]
fn a_lease_that_is_dropped_puts_back_and_the_guest_may_go_on() {
    in_every_mode(|mode, mut guest| {
        guest.write(20, 5, 1);
        for n in 0..4 {
            let mut words = [0u64; 4];
            let request = guest.request(0, 90);
            let lease = guest
                .space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            assert_eq!(lease.report().bits_set, 5 + n, "{mode:?}");
            drop(lease);
            guest.write(30 + n, 1, 0);
        }
        assert_eq!(guest.harvest(0, 90), [20, 21, 22, 23, 24, 30, 31, 32, 33]);
        assert_eq!(guest.harvest_all(), [0u64; 0]);
    });
}

/// Firecracker reads slot after slot and collects the results. When one read failed, KVM had
/// cleared the logs of the slots before it, and their pages were dropped.
#[test]
fn an_error_in_the_second_slot_loses_nothing_of_the_first() {
    in_every_mode(|mode, mut guest| {
        if matches!(mode, KvmMode::Ring { .. }) {
            return; // no call for each slot
        }
        guest.write(30, 2, 1);
        guest.write(101, 1, 0);
        let hole = guest.pages(90, 10);
        guest.space.map(hole, 0, Access::ReadWrite).unwrap();
        let gone = kvm_userspace_memory_region {
            slot: SLOTS[1].0,
            ..Default::default()
        };
        // SAFETY: a slot without size gives the guest nothing; KVM then has no log of it to write.
        unsafe { guest.vm.set_user_memory_region(gone) }.unwrap();
        let mut words = [0u64; 4];
        let lease = guest
            .space
            .harvest(&guest.request(0, 230), UserBitmap::new(&mut words))
            .unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("{mode:?}: the log of a slot that is not there"));
        assert_eq!(stopped.at, Iova::new(100 * guest.page));
        assert_eq!(lease.report().bits_set, 2);
        let text = stopped.error.to_string();
        assert!(
            text.contains("KVM_GET_DIRTY_LOG failed for slot 5"),
            "{text}"
        );
        drop(lease);
        assert_eq!(guest.harvest(0, 90), [30, 31], "{mode:?}");
    });
}

/// hyperlight met first reads that report everything as dirty, and bits past the end. KVM with
/// `initially_set` reports everything, too.
#[test]
fn what_is_initially_set_ends_with_the_slot() {
    let Some(kvm) = kvm() else { return };
    let Some(mut guest) = Guest::new(&kvm, MODES[2]) else {
        return;
    };
    guest.write(8, 1, 0);
    let first = guest.harvest_all();
    let everything: Vec<u64> = (0..90).chain(100..230).collect();
    assert_eq!(first, everything);
    assert_eq!(guest.harvest_all(), [0u64; 0]);
    guest.write(8, 1, 0);
    assert_eq!(guest.harvest_all(), [8]);
}

#[test]
fn a_peek_takes_nothing() {
    in_every_mode(|mode, mut guest| {
        guest.write(89, 1, 0);
        for _ in 0..2 {
            let mut words = [0u64; 4];
            let view = guest
                .space
                .peek(&guest.request(0, 90), UserBitmap::new(&mut words))
                .unwrap();
            assert_eq!(
                view.runs().collect::<Vec<_>>(),
                [guest.pages(89, 1)],
                "{mode:?}"
            );
        }
        assert_eq!(guest.harvest_all(), [89]);
    });
}

#[test]
fn a_ring_that_is_full_stops_the_guest_and_loses_nothing() {
    let Some(kvm) = kvm() else { return };
    // The smallest ring that KVM accepts if the hardware does not log pages itself. With such
    // hardware no smaller ring fits.
    let Some(mut guest) = Guest::new(&kvm, KvmMode::Ring { entries: 256 }) else {
        return;
    };
    let mut full = 0;
    for _ in 0..4 {
        // The guest writes 210 pages, and KVM reserves 64 entries of the ring.
        full += guest.write(2, 80, 1);
        full += guest.write(100, 130, 1);
    }
    assert!(full > 0, "the guest was never stopped");
    let expected: Vec<u64> = (2..82).chain(100..230).collect();
    assert_eq!(guest.harvest_all(), expected);
    assert_eq!(guest.harvest_all(), [0u64; 0]);
    assert_eq!(guest.log.foreign_entries(), 0);
}

#[test]
fn a_slot_is_removed_and_its_last_writes_come_with_the_unmap() {
    in_every_mode(|mode, mut guest| {
        guest.write(150, 3, 1);
        guest.log.remove_slot(5).unwrap();
        let mut words = [0u64; 4];
        let bitmap = UserBitmap::new(&mut words);
        let (unmapped, view) = guest
            .space
            .unmap(guest.pages(100, 130), guest.log.page(), bitmap)
            .unwrap();
        assert_eq!(unmapped.dirty_bytes, u128::from(3 * guest.page), "{mode:?}");
        assert_eq!(view.runs().collect::<Vec<_>>(), [guest.pages(150, 3)]);
        // The number and the addresses of the slot can be used again, and are tracked at once.
        let range = guest.pages(100, 64);
        // SAFETY: the memory that the slot had.
        unsafe { guest.log.add_slot(5, range, guest.memory[1].address()) }.unwrap();
        guest.space.map(range, 0, Access::ReadWrite).unwrap();
        if mode == MODES[2] {
            assert_eq!(guest.harvest(100, 64).len(), 64);
        }
        guest.write(163, 1, 0);
        assert_eq!(guest.harvest(100, 64), [163], "{mode:?}");
    });
}

#[test]
fn what_is_dirty_when_tracking_ends_stays() {
    in_every_mode(|mode, mut guest| {
        guest.write(40, 2, 1);
        guest.space.stop_tracking().unwrap();
        guest.write(50, 2, 1);
        assert_eq!(guest.harvest_all(), [40, 41], "{mode:?}");
        guest.space.start_tracking().unwrap();
        if mode == MODES[2] {
            assert_eq!(guest.harvest_all().len(), 220);
        }
        guest.write(60, 2, 1);
        assert_eq!(guest.harvest_all(), [60, 61], "{mode:?}");
    });
}

/// The processor runs in a thread of its own while another thread harvests. All harvests together
/// report exactly the written pages, and the copy after the last harvest equals the memory.
#[test]
fn a_guest_that_runs_on_loses_nothing() {
    in_every_mode(|mode, mut guest| {
        let (space, page) = (&guest.space, guest.page);
        let log = &guest.log;
        let mut found = BTreeSet::new();
        // The thread owns the processor, the test owns the space and the memory.
        let vcpu = &mut guest.vcpu;
        let memory = &guest.memory;
        let mut copy = [0u8; 90];
        let mut harvest = |found: &mut BTreeSet<u64>| {
            let range = IovaRange::from_len(Iova::new(0), 90 * page).unwrap();
            let mut words = [0u64; 4];
            let request = HarvestRequest::new(range, log.page());
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            let lease = lease.sync().unwrap();
            for run in lease.runs() {
                for n in run.start().get() / page..=run.last().get() / page {
                    found.insert(n);
                    copy[n as usize] = memory[0].byte(n * page);
                }
            }
            lease.commit();
        };
        std::thread::scope(|scope| {
            let guest = scope.spawn(move || {
                for round in 0..300u64 {
                    let mut regs = vcpu.get_regs().unwrap();
                    regs.rip = page;
                    regs.rflags = 2;
                    regs.rbx = (2 + round % 7) * page / 16;
                    regs.rcx = 12;
                    regs.rdx = 7 * page / 16;
                    vcpu.set_regs(&regs).unwrap();
                    loop {
                        match vcpu.run().unwrap() {
                            kvm_ioctls::VcpuExit::Hlt => break,
                            kvm_ioctls::VcpuExit::Unsupported(common_kvm::RING_FULL) => {
                                log.drain_rings().unwrap();
                            }
                            exit => panic!("{exit:?}"),
                        }
                    }
                }
            });
            while !guest.is_finished() {
                harvest(&mut found);
            }
        });
        harvest(&mut found);
        assert_eq!(found, (2..86).collect(), "{mode:?}");
        for n in 2..86 {
            assert_eq!(
                copy[n as usize],
                memory[0].byte(n * page),
                "{mode:?}: page {n}"
            );
            assert!(copy[n as usize] >= 42);
        }
    });
}

#[test]
fn what_kvm_cannot_do_is_said_before_anything_is_made() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm().unwrap();
    for entries in [0, 3, 1 << 31] {
        match KvmLog::new(&vm, KvmMode::Ring { entries }) {
            Err(KvmError::BadRing { entries: bad, .. }) => assert_eq!(bad, entries),
            Err(KvmError::Unsupported { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    let log = KvmLog::new(&vm, KvmMode::Clearing).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(log.add_vcpu(&vcpu), Err(KvmError::NoRings)));
    // A ring must come before the first processor.
    match KvmLog::new(&vm, KvmMode::Ring { entries: 1024 }) {
        Err(KvmError::Call { .. } | KvmError::Unsupported { .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// Runs `call` in a child of `fork`, and returns its result.
///
/// The child has one thread, and copies of all locks as they were. So `call` must take no lock that
/// another test may hold, and must not print.
fn in_child(call: impl FnOnce() -> u8) -> i32 {
    // SAFETY: the child runs `call`, which keeps to what is said above, and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if pid == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
        // SAFETY: ends the child at once: no destructor and no handler of the parent runs.
        unsafe { libc::_exit(i32::from(result.unwrap_or(u8::MAX))) };
    }
    let mut status = 0;
    // SAFETY: of the child above; the call writes one number.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid);
    assert!(libc::WIFEXITED(status), "the child was killed: {status:#x}");
    libc::WEXITSTATUS(status)
}

/// A child shares the rings of its parent. Entries that it read, even by a `peek`, were marked as
/// read, and never reached the parent. With logs, KVM refuses the child. botan#602 is the same bug
/// with the state of a generator of random numbers.
#[test]
fn a_child_of_fork_takes_nothing_from_its_parent() {
    in_every_mode(|mode, mut guest| {
        let parent = std::process::id();
        for (n, name) in ["peek", "harvest", "drain_rings", "set_tracking", "slots"]
            .into_iter()
            .enumerate()
        {
            let page = 20 + n as u64;
            guest.write(page, 1, 0);
            let guest = &guest;
            let says = |error: &dyn std::fmt::Display| {
                let text = format!("this log is of process {parent}");
                u8::from(!error.to_string().contains(&text))
            };
            let call = || {
                let mut words = [0u64; 4];
                let bitmap = UserBitmap::new(&mut words);
                let request = guest.request(0, 90);
                match name {
                    "peek" => match guest.space.peek(&request, bitmap) {
                        Err(error) => says(&error),
                        Ok(_) => 2,
                    },
                    "harvest" => match guest.space.harvest(&request, bitmap) {
                        Ok(lease) if lease.stopped().is_some() => {
                            says(&lease.sync().map(drop).unwrap_err())
                        }
                        _ => 2,
                    },
                    "drain_rings" => match guest.log.drain_rings() {
                        Err(error) => says(&error),
                        Ok(_) => 2,
                    },
                    "set_tracking" => match guest.space.stop_tracking() {
                        Err(error) => says(&error),
                        Ok(()) => 2,
                    },
                    _ => {
                        let range = guest.pages(300, 1);
                        // SAFETY: no guest runs in the child.
                        let added = unsafe { guest.log.add_slot(9, range, 0) };
                        let removed = guest.log.remove_slot(5);
                        let vcpu = guest.log.add_vcpu(&guest.vcpu);
                        [added, removed, vcpu]
                            .into_iter()
                            .map(|refused| refused.map_or_else(|error| says(&error), |()| 2))
                            .max()
                            .unwrap_or(3)
                    }
                }
            };
            assert_eq!(in_child(call), 0, "{mode:?}: {name}");
            assert_eq!(guest.harvest_all(), [page], "{mode:?}: {name}");
            assert_eq!(guest.harvest_all(), [0u64; 0], "{mode:?}: {name}");
        }
    });
}

/// KVM maps a ring of any processor in any size. If the virtual machine has no rings or smaller
/// ones, the first switch ended in SIGBUS. If it has larger ones, some entries were never read.
#[test]
fn a_processor_without_such_a_ring_is_refused() {
    let Some(kvm) = kvm() else { return };
    let Some(guest) = Guest::new(&kvm, KvmMode::Ring { entries: 1024 }) else {
        return;
    };
    let other = kvm.create_vm().unwrap();
    let without = other.create_vcpu(0).unwrap();
    let refused = guest.log.add_vcpu(&without);
    assert!(
        matches!(refused, Err(KvmError::NoSuchRing { entries: 1024 })),
        "{refused:?}"
    );
    for entries in [256, 512, 2048, 4096] {
        let other = kvm.create_vm().unwrap();
        let _log = KvmLog::new(&other, KvmMode::Ring { entries }).unwrap();
        let differs = other.create_vcpu(0).unwrap();
        let refused = guest.log.add_vcpu(&differs);
        assert!(
            matches!(refused, Err(KvmError::NoSuchRing { entries: 1024 })),
            "{entries}: {refused:?}"
        );
    }
    // The log goes on.
    guest.space.stop_tracking().unwrap();
    guest.space.start_tracking().unwrap();
}

/// No call of KVM tells to which virtual machine a processor belongs. So a ring of the same size is
/// accepted, but the reset of the log's own machine does not reset its entries: each flush reports
/// that as an error.
#[test]
fn a_ring_of_another_machine_is_noticed_when_it_is_flushed() {
    let Some(kvm) = kvm() else { return };
    let mode = KvmMode::Ring { entries: 1024 };
    let (Some(mut guest), Some(mut other)) = (Guest::new(&kvm, mode), Guest::new(&kvm, mode))
    else {
        return;
    };
    guest.log.add_vcpu(&other.vcpu).unwrap();
    guest.write(8, 1, 0);
    assert_eq!(guest.harvest_all(), [8], "nothing of the other one yet");
    other.write(9, 1, 0);
    let mut words = [0u64; 4];
    let lease = guest
        .space
        .harvest(&guest.request(0, 90), UserBitmap::new(&mut words))
        .unwrap();
    let error = lease.sync().unwrap_err().to_string();
    assert!(error.contains("added as number 1 is not of"), "{error}");
    assert!(matches!(
        guest.log.drain_rings(),
        Err(KvmError::ForeignRing { ring: 1 })
    ));
}

/// Other code that clears and sets the flags of a slot ends KVM's log of it, and no call of KVM
/// reveals this. A table of the guide lists which pages are reported then. `renew_slot` makes the
/// whole slot dirty.
#[test]
fn flags_that_other_code_switched_are_what_the_guide_says() {
    in_every_mode(|mode, mut guest| {
        let (slot, first, n) = SLOTS[1];
        let set = |guest: &Guest, flags| {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: first * guest.page,
                memory_size: n * guest.page,
                userspace_addr: guest.memory[1].address(),
            };
            // SAFETY: the slot as it is, with other flags.
            unsafe { guest.vm.set_user_memory_region(region) }.unwrap();
        };
        let stops = |guest: &Guest| {
            let mut words = [0u64; 4];
            let bitmap = UserBitmap::new(&mut words);
            let request = guest.request(first, n);
            let lease = guest.space.harvest(&request, bitmap).unwrap();
            lease.stopped().is_some()
        };
        let all: Vec<u64> = (first..first + n).collect();

        // Off and on, and no harvest between.
        guest.write(110, 1, 0);
        set(&guest, 0);
        guest.write(120, 1, 0);
        set(&guest, KVM_MEM_LOG_DIRTY_PAGES);
        guest.write(130, 1, 0);
        let found = guest.harvest(first, n);
        let expected = match mode {
            KvmMode::Ring { .. } => vec![110, 130],
            _ if mode == MODES[2] => all.clone(),
            _ => vec![130],
        };
        assert_eq!(found, expected, "{mode:?}");
        // The code that changed the flags calls `renew_slot`.
        guest.log.renew_slot(slot).unwrap();
        assert_eq!(guest.harvest(first, n), all, "{mode:?}");
        assert_eq!(guest.harvest(first, n), [0u64; 0], "{mode:?}");

        // Off at the harvest.
        guest.write(111, 1, 0);
        set(&guest, 0);
        guest.write(121, 1, 0);
        let is_ring = matches!(mode, KvmMode::Ring { .. });
        assert_eq!(stops(&guest), !is_ring, "{mode:?}");
        set(&guest, KVM_MEM_LOG_DIRTY_PAGES);
        guest.write(131, 1, 0);
        let found = guest.harvest(first, n);
        let expected = if is_ring { vec![111, 131] } else { all.clone() };
        assert_eq!(found, expected, "{mode:?}");

        // Off, and set again by the log.
        set(&guest, 0);
        guest.write(122, 1, 0);
        guest.log.renew_slot(slot).unwrap();
        guest.write(132, 1, 0);
        assert_eq!(guest.harvest(first, n), all, "{mode:?}");
        guest.write(133, 1, 0);
        assert_eq!(guest.harvest(first, n), [133], "{mode:?}");
    });
}

/// If KVM supports system management mode, the slots of that mode may overlap others.
#[test]
fn slots_of_two_address_spaces_may_share_addresses() {
    in_every_mode(|mode, mut guest| {
        let spaces = guest
            .vm
            .check_extension_raw(KVM_CAP_MULTI_ADDRESS_SPACE.into());
        let (slot, first, n) = SLOTS[1];
        let range = guest.pages(first, n);
        let host = guest.memory[1].address();
        // SAFETY: the memory that the guest has at these addresses already.
        let added = unsafe { guest.log.add_slot(1 << 16 | slot, range, host) };
        if spaces < 2 {
            assert!(matches!(added, Err(KvmError::SlotCall { .. })), "{added:?}");
            eprintln!("SKIP {mode:?}: this KVM has one address space");
        } else {
            added.unwrap();
            if mode == MODES[2] {
                assert_eq!(guest.harvest(first, n).len() as u64, n);
            }
        }
        guest.write(150, 3, 1);
        assert_eq!(guest.harvest(first, n), [150, 151, 152], "{mode:?}");
        assert_eq!(guest.harvest(first, n), [0u64; 0], "{mode:?}");
    });
}
