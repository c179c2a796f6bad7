//! Pages of one size, bits of another.

use std::sync::Arc;

use dirtymap::exchange::DirtyLog;
use dirtymap::{AddressSpace, Granule, HarvestRequest, UserBitmap};

use crate::logs::Log;
use crate::{PAGE, RW, pages, range, take};

/// The pages of a log and of its consumer differ in size, and bits were moved one by one from one
/// map to the other. The number of the consumer's bit had eight bits. From page 256 on it began
/// again at 0: page 600 of the log became page 44 of the consumer instead of page 300, which was
/// never sent.
#[test]
fn a_log_that_becomes_coarser_does_not_wrap_at_256() {
    let mut bits = vec![0u64; 16];
    bits[600 / 64] |= 1 << (600 % 64);
    let fine = DirtyLog::words(&bits, pages(0, 1024), Granule::K4).unwrap();
    let coarse = Granule::from_bytes(2 * PAGE).unwrap();
    let mut words = [0u64; 8];
    let view = UserBitmap::new(&mut words)
        .view(pages(0, 1024), coarse)
        .unwrap();
    assert_eq!(fine.or_into(&view).unwrap(), 1);
    assert!(view.bits().eq([300]));
}

/// In the other direction the same counter never reached an end above 255, and the loop did not
/// end.
#[test]
fn a_log_that_becomes_finer_ends_and_does_not_wrap_at_256() {
    let coarse = Granule::from_bytes(2 * PAGE).unwrap();
    let mut bits = vec![0u64; 8];
    bits[300 / 64] |= 1 << (300 % 64);
    bits[511 / 64] |= 1 << (511 % 64);
    let log = DirtyLog::words(&bits, pages(0, 1024), coarse).unwrap();
    let mut words = [0u64; 16];
    let view = UserBitmap::new(&mut words)
        .view(pages(0, 1024), Granule::K4)
        .unwrap();
    assert_eq!(log.or_into(&view).unwrap(), 4);
    assert!(view.bits().eq([600, 601, 1022, 1023]));
}

/// "4096" stood where the size of the host's pages belongs. On hosts with pages of 64 KiB, bit `n`
/// of the kernel's log was taken for the 4 KiB at `n * 4096`: snapshots had the wrong pages, and a
/// sixteenth of them.
#[test]
fn pages_of_64_kib_are_not_taken_for_4096_bytes() {
    let host = Granule::from_bytes(64 << 10).unwrap();
    let memory = range(1 << 30, 256 << 10);
    let log = DirtyLog::words(&[0b0100], memory, host).unwrap();
    assert!(log.runs().eq([range((1 << 30) + (128 << 10), 64 << 10)]));
    // The source cannot tell the finer pages of the space apart, so `alignment` is the page of the
    // source.
    let kernel = Arc::new(Log::new(memory, host));
    let space = AddressSpace::new(Granule::K4);
    space.attach(kernel.clone()).unwrap();
    assert_eq!(space.alignment(), host);
    space.map(memory, 0, RW).unwrap();
    space.start_tracking().unwrap();
    kernel.write(range((1 << 30) + (130 << 10), 1));
    // In a request with 4 KiB a bit, one page of the host sets sixteen bits.
    let mut words = [0u64];
    let request = HarvestRequest::new(memory, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    lease.sync().unwrap().commit();
    assert_eq!(words, [0xFFFF_0000_0000]);
}

/// A reset was rounded out to whole bits of the map, as a mark is. So it also cleared pages of the
/// same bit that had not been saved.
#[test]
fn a_reset_rounds_in() {
    let coarse = Granule::from_bytes(4 * PAGE).unwrap();
    let mut words = [0b111u64];
    let view = UserBitmap::new(&mut words)
        .view(pages(0, 12), coarse)
        .unwrap();
    // Pages 2 to 9 are saved. Only the bit in the middle is covered as a whole.
    let mut saved = [0x3FCu64];
    let saved = UserBitmap::new(&mut saved)
        .view(pages(0, 12), Granule::K4)
        .unwrap();
    assert_eq!(view.and_not(&saved).unwrap(), 1);
    assert!(view.bits().eq([0, 2]));
    // The same for a lease that is committed by parts.
    let space = AddressSpace::new(Granule::K4);
    space.map(pages(0, 12), 0, RW).unwrap();
    space.start_tracking().unwrap();
    space.mark(pages(0, 12)).unwrap();
    let mut words = [0u64];
    let request = HarvestRequest::new(pages(0, 12), coarse);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    assert_eq!(lease.commit_range(pages(2, 8)), 1);
    drop(lease);
    assert_eq!(take(&space, pages(0, 12)), [pages(0, 4), pages(8, 4)]);
}

/// A request covered a page of the source in part. The page was cleared as a whole, or reported as
/// a whole, outside of the request too.
#[test]
fn a_request_that_ends_inside_a_page_leaves_the_rest_of_it_dirty() {
    let large = Granule::from_bytes(64 << 10).unwrap();
    let memory = range(0, 256 << 10);
    let log = Arc::new(Log::large(memory, large));
    let space = AddressSpace::new(Granule::K4);
    space.attach(log.clone()).unwrap();
    space.map(memory, 0, RW).unwrap();
    space.start_tracking().unwrap();
    log.write(range(0, 1));
    assert_eq!(take(&space, pages(0, 3)), [pages(0, 3)]);
    assert_eq!(take(&space, memory), [pages(3, 13)]);
    assert_eq!(take(&space, memory), []);
}
