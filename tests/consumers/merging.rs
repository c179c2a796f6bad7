//! Several logs, one answer.

use std::sync::Arc;

use dirtymap::bitmap::BitmapError;
use dirtymap::exchange::{DirtyLog, RunTable, RunsExt, merge_runs};
use dirtymap::{AddressSpace, Granule, IovaRange};

use crate::logs::Log;
use crate::{PAGE, RW, pages, range, take};

/// The kernel's log of a slot and the program's own log were walked in parallel until one of them
/// ended. For a slot without a map the program's log was empty: the kernel had cleared its log by
/// then, and its pages were lost.
#[test]
fn a_slot_without_a_map_of_our_own_keeps_what_the_kernel_said() {
    let kernel = [0b1010u64];
    let kernel = DirtyLog::words(&kernel, pages(0, 64), Granule::K4).unwrap();
    let ours: Option<DirtyLog<'_>> = None;
    let logs = [Some(kernel), ours];
    let merged = merge_runs(logs.iter().flatten().map(DirtyLog::runs));
    assert!(merged.eq([pages(1, 1), pages(3, 1)]));
    // In a space no area needs a map: one without marks has none.
    let log = Arc::new(Log::new(pages(0, 64), Granule::K4));
    let space = AddressSpace::new(Granule::K4);
    space.attach(log.clone()).unwrap();
    space.map(pages(0, 64), 0, RW).unwrap();
    space.start_tracking().unwrap();
    log.write(pages(3, 1));
    assert_eq!(take(&space, pages(0, 64)), [pages(3, 1)]);
}

/// A parallel walk ends with the shorter of two logs, and ignores the rest of the longer one in
/// silence.
#[test]
fn the_shorter_of_two_logs_does_not_cut_the_longer_one() {
    let (long, short) = ([0u64, 0, 1 << 5], [1u64]);
    let long = DirtyLog::words(&long, pages(0, 192), Granule::K4).unwrap();
    let log = DirtyLog::words(&short, pages(0, 64), Granule::K4).unwrap();
    let merged = merge_runs([long.runs(), log.runs()]);
    assert!(merged.eq([pages(0, 1), pages(133, 1)]));
    // A log that is too short is an error with both numbers.
    let error = DirtyLog::words(&short, pages(0, 192), Granule::K4).unwrap_err();
    assert!(matches!(
        error,
        BitmapError::TooShort {
            bits: 64,
            needed: 192,
            ..
        }
    ));
}

/// The tables of several devices were concatenated. Where they overlapped, pages were sent twice,
/// and the size in the table was too large.
#[test]
fn tables_that_overlap_are_sent_once() {
    let tables: [&[IovaRange]; 3] = [
        &[pages(0, 10), pages(20, 5)],
        &[pages(5, 10)],
        &[pages(24, 2), pages(0, 1)],
    ];
    let table: RunTable = tables.into_iter().flatten().copied().collect();
    assert_eq!(table.runs(), [pages(0, 15), pages(20, 6)]);
    assert_eq!(table.total_bytes(), 21 * u128::from(PAGE));
    let mut sent = std::collections::BTreeSet::new();
    for part in table.partition(Granule::from_bytes(4 * PAGE).unwrap()) {
        for (start, len) in part.into_iter().pairs() {
            assert!(
                (start..start + len)
                    .step_by(PAGE as usize)
                    .all(|page| sent.insert(page))
            );
        }
    }
    assert_eq!(sent.len(), 21);
}

/// A log counts from the start of its slot, another from address 0. Words of the two that are ORed
/// without a shift name wrong pages.
#[test]
fn logs_that_count_from_different_places_agree_on_addresses() {
    let slot = range(0x8_0000, 64 * PAGE);
    let kernel = [1u64 << 2];
    let kernel = DirtyLog::words(&kernel, slot, Granule::K4).unwrap();
    let mut device = [0u8; 24];
    device[(0x80 + 3) / 8] |= 1 << ((0x80 + 3) % 8);
    let device = DirtyLog::bytes(&device, pages(0, 192), Granule::K4).unwrap();
    let merged: Vec<_> = merge_runs([kernel.runs(), device.runs()]).pairs().collect();
    assert_eq!(merged, [(0x8_2000, 2 * PAGE)]);
}
