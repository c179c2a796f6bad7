//! What the kernel does to parts of leaves, and what this source makes of it.

use std::sync::Arc;

use dirtymap::{
    Access, AddressSpace, DirtySource, Granule, HarvestRequest, IovaRange, ToIovaRange, Tracking,
    UserBitmap,
};

use super::fake::{Fake, pages};
use crate::kernel::Kernel;
use crate::{Hwpt, IoasOptions};

/// A space over page tables of leaves of 2 MiB, with 8 MiB mapped.
fn space(options: IoasOptions) -> (Fake, Arc<Hwpt>, AddressSpace) {
    let fake = Fake::new(Granule::M2);
    let hwpt = fake.ioas(options).hwpt(1).unwrap();
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&hwpt)).unwrap();
    space.map(pages(0, 2048), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    (fake, hwpt, space)
}

fn harvest(space: &AddressSpace, range: IovaRange) -> Vec<IovaRange> {
    let mut words = vec![0; 64];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    let runs = lease.runs().collect();
    lease.commit();
    runs
}

/// The kernel itself, with the same leaf: a read of 1 MiB to 2 MiB of a leaf that begins at 0
/// cleans it and tells nothing; a read of its first 64 KiB writes 496 bits past the end of the
/// bitmap.
#[test]
fn the_kernel_loses_and_overruns_what_this_source_keeps() {
    let (fake, hwpt, space) = space(IoasOptions::default());
    let ask = |range, clear: bool| {
        let mut bits = [0; 16];
        fake.dirty(hwpt.id(), range, Granule::K4, clear, &mut bits)
            .unwrap();
        bits.iter().map(|word| word.count_ones()).sum::<u32>()
    };
    fake.write(hwpt.id(), 0x3000);
    assert_eq!(ask(pages(256, 256), true), 0, "not told");
    assert_eq!(ask(pages(0, 512), false), 0, "and clean: lost");
    fake.write(hwpt.id(), 0x3000);
    assert_eq!(ask(pages(0, 16), true), 512, "16 bits were asked for");

    fake.write(hwpt.id(), 0x3000);
    assert_eq!(harvest(&space, pages(256, 256)), [pages(256, 256)]);
    assert_eq!(
        harvest(&space, pages(0, 16)),
        [pages(0, 16)],
        "the rest was kept"
    );
    assert_eq!(
        harvest(&space, pages(0, 2048)),
        [pages(16, 240)],
        "and the rest of that"
    );
    assert_eq!(harvest(&space, pages(0, 2048)), []);
}

#[test]
fn parts_of_two_leaves_in_a_row() {
    let (fake, hwpt, space) = space(IoasOptions::default());
    fake.write(hwpt.id(), 0);
    fake.write(hwpt.id(), 2 << 20);
    assert_eq!(harvest(&space, pages(256, 512)), [pages(256, 512)]);
    assert_eq!(
        harvest(&space, pages(0, 2048)),
        [pages(0, 256), pages(768, 256)]
    );
}

#[test]
fn no_leaf_crosses_a_piece_and_reads_are_of_whole_pieces() {
    let k64 = Granule::from_lg2(16).unwrap();
    let (fake, hwpt, space) = space(IoasOptions::default().piece(k64));
    assert_eq!(fake.count("map"), 128, "8 MiB in pieces of 64 KiB");
    fake.write(hwpt.id(), 0x1_5000);
    assert_eq!(harvest(&space, pages(21, 1)), [pages(21, 1)]);
    assert_eq!(fake.count("dirty"), 1, "one piece was read");
    assert_eq!(
        harvest(&space, pages(0, 2048)),
        [pages(16, 5), pages(22, 10)]
    );
}

#[test]
fn small_pages_report_single_pages() {
    let (fake, hwpt, space) = space(IoasOptions::default().small_pages());
    fake.write(hwpt.id(), 0x3000);
    assert_eq!(harvest(&space, pages(0, 2048)), [pages(3, 1)]);
}

#[test]
fn areas_are_cut_between_pieces_and_not_inside() {
    let (fake, hwpt, space) = space(IoasOptions::default().piece(Granule::M2));
    fake.write(hwpt.id(), 0x3000);
    fake.write(hwpt.id(), 0x20_3000);
    assert!(space.cut((2 << 20).into()).unwrap());
    let refused = space.cut((3 << 20).into()).unwrap_err();
    assert!(
        matches!(refused, dirtymap::Error::CannotSplit { .. }),
        "{refused}"
    );
    let mut words = [0; 8];
    let low = (0..2 << 20).to_iova_range().unwrap();
    let (_, dirty) = space
        .unmap(low, Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(dirty.count(), 512);
    assert!(!fake.write(hwpt.id(), 0x3000), "no device reaches it");
    assert_eq!(harvest(&space, pages(512, 1536)), [pages(512, 512)]);
}

#[test]
fn a_peek_asks_without_clearing() {
    let (fake, hwpt, space) = space(IoasOptions::default());
    fake.write(hwpt.id(), 0x3000);
    let request = HarvestRequest::new(pages(0, 2048), Granule::K4);
    for _ in 0..2 {
        let mut words = vec![0; 32];
        let view = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        assert_eq!(view.count(), 512);
    }
    assert_eq!((fake.count("peek"), fake.count("dirty")), (2, 0));
    assert_eq!(
        harvest(&space, pages(0, 2048)),
        [pages(0, 512)],
        "told once"
    );
    assert_eq!(harvest(&space, pages(0, 2048)), []);
}

/// The kernel cleans everything on a second "on".
#[test]
fn a_second_on_is_not_passed_on() {
    let (fake, hwpt, space) = space(IoasOptions::default());
    fake.write(hwpt.id(), 0x3000);
    hwpt.set_tracking(Tracking::On).unwrap();
    assert_eq!(fake.count("track"), 1);
    assert_eq!(harvest(&space, pages(0, 2048)), [pages(0, 512)]);
}

/// The played kernel tells nothing once tracking is off, as that of Linux 6.12.
#[test]
fn what_was_dirty_before_the_end_of_tracking_is_kept() {
    let (fake, hwpt, space) = space(IoasOptions::default());
    fake.write(hwpt.id(), 0x3000);
    space.stop_tracking().unwrap();
    assert_eq!(harvest(&space, pages(0, 2048)), [pages(0, 512)]);
}
