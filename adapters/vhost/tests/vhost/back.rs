//! The back end: a real daemon in this process, which gets its log from a front end.

use super::rig::{Ram, rig};
use super::{NONE, PAGE, bits, bytes, in_child, taken};
use dirtymap::{Access, AddressSpace, Granule, Iova};
use dirtymap_vhost::{LogBitmap, LogError, LogFollower, VhostLog};
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::GuestAddressSpace;
use vm_memory::bitmap::{Bitmap, NewBitmap};

/// Begins and ends inside of words and bytes of the log.
const START: u64 = (1 << 32) + 3 * PAGE;
const PAGES: u64 = 333;

#[test]
fn marks_land_at_their_guest_physical_addresses() {
    let ram = [Ram::new(0, 16 * PAGE), Ram::new(START, PAGES * PAGE)];
    let rig = rig(&ram, true);
    let log = VhostLog::new(Iova::new(START + PAGES * PAGE - 1)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    let (low, high) = (rig.bitmap(0), rig.bitmap(START));
    assert!(low.has_log() && high.has_log());

    let mut expected = BTreeSet::new();
    let mut mark = |bitmap: &LogBitmap, start: u64, offset: u64, len: u64| {
        if expected.len() as u64 > PAGES / 2 {
            log.memory()
                .file()
                .write_all_at(&vec![0; log.memory().size() as usize], 0)
                .unwrap();
            expected.clear();
        }
        bitmap.slice_at(offset as usize).mark_dirty(0, len as usize);
        expected.extend((start + offset) / PAGE..=(start + offset + len - 1) / PAGE);
        assert_eq!(
            bits(&log.memory()),
            expected.iter().copied().collect::<Vec<_>>(),
            "{len} bytes from {offset:#x} on"
        );
    };
    rig.write(5 * PAGE);
    mark(&low, 0, 5 * PAGE, 1);
    mark(&low, 0, 15 * PAGE + 4095, 1);
    // Heads, tails, whole words, all of it; lengths that are no multiples of a page are rounded up.
    for (page, len) in [
        (0, 1),
        (332, PAGE),
        (4, PAGE + 1),
        (7, 2 * PAGE + 2),
        (60, 3 * PAGE),
        (61, 64 * PAGE),
        (130, 130 * PAGE + 17),
        (300, 33 * PAGE),
        (0, PAGES * PAGE),
    ] {
        mark(&high, START, page * PAGE, len);
    }
    // Anywhere, of any length.
    let mut n = 1u64;
    for _ in 0..300 {
        n = n
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let offset = (n >> 20) % (PAGES * PAGE);
        let len = 1 + (n >> 44) % (PAGES * PAGE - offset).min(1 << (n % 20));
        mark(&high, START, offset, len);
    }
    assert_eq!(low.outside_marks() + high.outside_marks(), 0);
}

#[test]
fn a_slice_shows_what_the_log_has() {
    let ram = [Ram::new(START, PAGES * PAGE)];
    let rig = rig(&ram, true);
    let log = VhostLog::new(Iova::new(START + PAGES * PAGE - 1)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    let bitmap = rig.bitmap(START);
    let slice = bitmap.slice_at(7 * 4096);
    assert!(!slice.dirty_at(0));
    slice.mark_dirty(0, 1);
    assert!(slice.dirty_at(0) && bitmap.dirty_at(8 * 4096 - 1));
    assert!(!bitmap.dirty_at(8 * 4096) && !bitmap.dirty_at(usize::MAX));
}

/// Lengths were rounded down to pages, and the last bytes of a region had no bit.
#[test]
fn the_last_bytes_of_a_region_have_a_bit() {
    let ram = [Ram::new(1 << 20, 2 * PAGE + 100)];
    let rig = rig(&ram, true);
    let log = VhostLog::new(Iova::new((1 << 20) + 2 * PAGE + 99)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    rig.write((1 << 20) + 2 * PAGE + 99);
    assert_eq!(bits(&log.memory()), [258]);
}

#[test]
fn marks_of_no_bytes_and_past_the_end() {
    let ram = [Ram::new(0, 4 * PAGE), Ram::new(4 * PAGE, 4 * PAGE)];
    let rig = rig(&ram, true);
    let log = VhostLog::new(Iova::new(8 * PAGE - 1)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    let low = rig.bitmap(0);
    low.mark_dirty(0, 0);
    low.mark_dirty(usize::MAX, 0);
    assert_eq!(low.outside_marks(), 0);
    low.mark_dirty(4 * 4096, 1); // the next region's
    low.slice_at(usize::MAX).slice_at(2).mark_dirty(0, 4096); // would wrap to page 0
    low.slice_at(usize::MAX).mark_dirty(usize::MAX, usize::MAX);
    assert_eq!(
        (low.outside_marks(), bits(&log.memory())),
        (3, NONE.to_vec())
    );
    low.mark_dirty(3 * 4096, usize::MAX);
    assert_eq!((low.outside_marks(), bits(&log.memory())), (4, vec![3]));
}

/// A log was too short for the memory: a mark wrote past its end, or ended its thread.
#[test]
fn a_log_that_is_too_short_is_refused_and_the_old_one_stays() {
    let ram = [Ram::new(0, 16 * PAGE), Ram::new(1 << 32, 16 * PAGE)];
    let rig = rig(&ram, true);
    let log = VhostLog::new(Iova::new((1 << 32) + 16 * PAGE - 1)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    rig.write(PAGE);
    let short = VhostLog::new(Iova::new((1 << 32) - 1)).unwrap();
    assert!(rig.front_end.set_log(&short.memory()).is_err());
    rig.write((1 << 32) + PAGE);
    assert_eq!(bits(&log.memory()), [1, (1 << 20) + 1]);
    assert_eq!(bits(&short.memory()), NONE);
}

/// Writes to regions that were added after `SET_LOG_BASE` were not logged.
#[test]
fn a_region_that_comes_after_the_log_is_logged() {
    let ram = [Ram::new(0, 16 * PAGE)];
    let added = Ram::new(1 << 20, 16 * PAGE);
    let mut rig = rig(&ram, true);
    let log = VhostLog::new(Iova::new(2 << 20)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    rig.front_end.add(&added).unwrap();
    assert!(rig.bitmap(1 << 20).has_log());
    rig.write((1 << 20) + 5 * PAGE);
    rig.write(PAGE);
    assert_eq!(bits(&log.memory()), [1, 256 + 5]);
}

/// A new memory table recreates all regions, and none of the new ones had the log.
#[test]
fn a_new_table_of_memory_keeps_the_log() {
    let mut rig = rig(&[Ram::new(0, 16 * PAGE)], true);
    let log = VhostLog::new(Iova::new(2 << 20)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    let table = [Ram::new(0, 16 * PAGE), Ram::new(1 << 20, 16 * PAGE)];
    rig.front_end.set_table(&table);
    rig.write(2 * PAGE);
    rig.write((1 << 20) + PAGE);
    assert_eq!(bits(&log.memory()), [2, 257]);
}

/// The only region is removed and added again, as in a resize. The table without regions in between
/// dropped the log, and later writes were never logged.
#[test]
fn a_table_without_regions_keeps_the_log() {
    let ram = [Ram::new(0, 16 * PAGE)];
    let mut rig = rig(&ram, true);
    let log = VhostLog::new(Iova::new(2 << 20)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    rig.front_end.remove(&ram[0]).unwrap();
    rig.front_end.add(&ram[0]).unwrap();
    rig.write(3 * PAGE);
    assert_eq!(bits(&log.memory()), [3]);
}

/// A back end that does not follow the log: writes without a log are remembered, and the first log
/// gets all of them.
#[test]
fn what_was_written_without_a_log_is_in_the_first_one() {
    let mut rig = rig(&[Ram::new(0, 16 * PAGE)], false);
    let added = Ram::new(1 << 20, 16 * PAGE);
    let log = VhostLog::new(Iova::new(2 << 20)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    rig.front_end.add(&added).unwrap();
    rig.write((1 << 20) + 5 * PAGE);
    rig.write((1 << 20) + 7 * PAGE + 9);
    let bitmap = rig.bitmap(1 << 20);
    assert!(!bitmap.has_log());
    assert_eq!(bitmap.early(), Some((5 * PAGE, 7 * PAGE + 9)));
    assert!(bitmap.dirty_at(6 * 4096) && !bitmap.dirty_at(8 * 4096));
    let swap = log.swap(Iova::MIN).unwrap();
    rig.front_end.set_log(swap.memory()).unwrap();
    swap.acknowledged();
    assert_eq!(bits(&log.memory()), [256 + 5, 256 + 6, 256 + 7]);
    assert_eq!(bitmap.early(), None);
}

/// A range of one byte, or one that ends with the first byte of a page: the remembered length was
/// one too short, and the first log lacked that page.
#[test]
fn a_byte_at_a_page_border_without_a_log_is_in_the_first_one() {
    for (at, len, marked) in [
        (5 * PAGE, 1, vec![5]),
        (6 * PAGE - 1, 1, vec![5]),
        (6 * PAGE - 1, 2, vec![5, 6]),
        (0, PAGE + 1, vec![0, 1]),
        (15 * PAGE, PAGE, vec![15]),
    ] {
        let rig = rig(&[Ram::new(0, 16 * PAGE)], false);
        let bitmap = rig.bitmap(0);
        bitmap.mark_dirty(at as usize, len as usize);
        assert_eq!(bitmap.early(), Some((at, at + len - 1)));
        let log = VhostLog::new(Iova::new(16 * PAGE - 1)).unwrap();
        rig.front_end.set_log(&log.memory()).unwrap();
        assert_eq!(bits(&log.memory()), marked, "{len} bytes from {at:#x} on");
    }
}

/// A child of a fork has a copy of the counter of running marks, and never sees them end. So a new
/// log for a region could wait for ever, and the child's marks go to a log that its parent no
/// longer reads.
#[test]
fn a_child_of_a_fork_gives_no_log_on() {
    let rig = rig(&[Ram::new(0, 16 * PAGE)], true);
    let log = VhostLog::new(Iova::new(2 << 20)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    let follower = LogFollower::default();
    assert_eq!(follower.update(&rig.guest.memory()).unwrap(), 0);
    let tried = in_child(|| {
        let error = follower.update(&rig.guest.memory()).unwrap_err();
        let reason = error.get_ref().and_then(|error| error.downcast_ref());
        i32::from(!matches!(reason, Some(LogError::Forked { .. })))
    });
    assert_eq!(tried, 0);
    rig.write(PAGE);
    assert_eq!(bits(&log.memory()), [1]);
}

#[test]
fn a_region_beyond_the_log_is_refused_and_remembered() {
    let mut rig = rig(&[Ram::new(0, 16 * PAGE)], true);
    let added = Ram::new(1 << 30, 16 * PAGE);
    let log = VhostLog::new(Iova::new(2 << 20)).unwrap();
    rig.front_end.set_log(&log.memory()).unwrap();
    assert!(rig.front_end.add(&added).is_err());
    rig.write((1 << 30) + PAGE);
    assert_eq!(rig.bitmap(1 << 30).early(), Some((PAGE, PAGE)));
    assert_eq!(bits(&log.memory()), NONE);
}

/// A log had to be read before the connection was closed, or the last writes of the device were
/// lost. Here the log is memory of the front end.
#[test]
fn what_a_device_marked_is_found_when_it_is_gone() {
    let area = bytes(0, 16 * PAGE);
    let log = Arc::new(VhostLog::new(area.last()).unwrap());
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
    space.map(area, 0, Access::ReadWrite).unwrap();
    let rig = rig(&[Ram::new(0, 16 * PAGE)], true);
    rig.front_end.set_log(&log.memory()).unwrap();
    space.start_tracking().unwrap();
    rig.write(3 * PAGE);
    drop(rig);
    assert_eq!(taken(&space, area), [3]);
}

#[test]
fn a_bitmap_that_nobody_gave_a_log_remembers() {
    let bitmap = LogBitmap::with_len(16 * 4096);
    assert_eq!((bitmap.has_log(), bitmap.early()), (false, None));
    bitmap.clone().mark_dirty(4096, 8192);
    bitmap.mark_dirty(100, 1);
    assert_eq!(bitmap.early(), Some((100, 3 * PAGE - 1)));
    bitmap.mark_dirty(15 * 4096, 8192);
    assert_eq!(bitmap.early(), Some((100, 16 * PAGE - 1)));
    assert_eq!(bitmap.outside_marks(), 1);
}
