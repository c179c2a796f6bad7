//! Writes that others complete.

use std::cell::Cell;

use dirtymap::{AddressSpace, Granule, HarvestRequest, UserBitmap};

use crate::{RW, pages, take};

/// One page of memory, and a copy of it that a harvester keeps up to date.
struct Machine {
    space: AddressSpace,
    memory: Cell<u64>,
    copy: Cell<u64>,
}

impl Machine {
    fn new() -> Self {
        let space = AddressSpace::new(Granule::K4);
        space.map(pages(0, 1), 0, RW).unwrap();
        space.start_tracking().unwrap();
        Machine {
            space,
            memory: Cell::new(0),
            copy: Cell::new(0),
        }
    }

    /// Copies the page if it is dirty, and returns whether it was.
    fn round(&self) -> bool {
        let dirty = !take(&self.space, pages(0, 1)).is_empty();
        if dirty {
            self.copy.set(self.memory.get());
        }
        dirty
    }
}

/// A block device marked the buffer of a read and then submitted it. A harvest between the
/// submission and the completion took the mark and copied the old bytes; the data came later, by
/// DMA, and no harvest looked at the page again.
#[test]
fn a_write_that_is_marked_before_it_is_submitted_is_reported_until_it_has_landed() {
    let machine = Machine::new();
    // The bug, to show that this test detects it.
    machine.space.mark(pages(0, 1)).unwrap();
    assert!(machine.round());
    machine.memory.set(1);
    assert!(!machine.round());
    assert_ne!(machine.copy, machine.memory, "the trap is there");
    // With a guard from the submission to the completion.
    let guard = machine.space.begin_write(pages(0, 1)).unwrap();
    assert!(machine.round() && machine.round(), "dirty in every round");
    machine.memory.set(2);
    drop(guard);
    assert!(machine.round());
    assert_eq!(machine.copy, machine.memory);
    assert!(!machine.round());
}

/// The right way without a guard: the mark comes with the completion.
#[test]
fn a_write_that_is_marked_at_its_completion_is_copied() {
    let machine = Machine::new();
    assert!(!machine.round());
    machine.memory.set(1);
    machine.space.mark(pages(0, 1)).unwrap();
    assert!(machine.round());
    assert_eq!(machine.copy, machine.memory);
}

/// A harvest fails while a write is in flight, and puts its pages back. Once the write has landed,
/// it is still reported.
#[test]
fn an_abort_and_a_write_in_flight_do_not_hide_each_other() {
    let machine = Machine::new();
    let guard = machine.space.begin_write(pages(0, 1)).unwrap();
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 1), Granule::K4);
    let lease = machine.space.harvest(&request, UserBitmap::new(&mut words));
    machine.memory.set(1);
    drop(guard);
    lease.unwrap().abort();
    assert!(machine.round());
    assert_eq!(machine.copy, machine.memory);
    assert!(!machine.round());
}
