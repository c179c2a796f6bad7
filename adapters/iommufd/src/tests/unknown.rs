//! What the kernel does not tell counts as dirty, and what it told is not lost.

use std::sync::Arc;

use dirtymap::{Access, AddressSpace, Error, Granule, HarvestRequest, UserBitmap};

use super::fake::{Fake, Fault, pages};
use crate::error::TRIES;
use crate::log::Log;
use crate::table::Table;
use crate::{Hwpt, IoasOptions, IommufdError, OnUnmap};

/// 64 pages in two pieces, of which pages 3, 40 and 41 were written.
fn written() -> (Fake, Arc<Hwpt>, AddressSpace) {
    let fake = Fake::new(Granule::K4);
    let piece = Granule::from_lg2(17).unwrap();
    let hwpt = fake
        .ioas(IoasOptions::default().piece(piece))
        .hwpt(1)
        .unwrap();
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&hwpt)).unwrap();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    for page in [3, 40, 41] {
        fake.write(hwpt.id(), page << 12);
    }
    (fake, hwpt, space)
}

/// What a harvest reports, and the kind of the error at which it stopped, if it did.
fn harvest(space: &AddressSpace) -> (u64, String) {
    let mut words = [0];
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let why = lease.stopped().map_or(String::new(), |stopped| {
        let Error::Source(error) = &stopped.error else {
            panic!("not an error of the source: {}", stopped.error);
        };
        let error = error.downcast_ref::<IommufdError>().unwrap();
        let text = format!("{error:?}");
        text.split(' ').next().unwrap().to_owned()
    });
    lease.partial().sync().unwrap().commit();
    (words[0], why)
}

/// That of a harvest which did not stop.
fn all(words: u64) -> (u64, String) {
    (words, String::new())
}

const WRITTEN: u64 = 1 << 3 | 1 << 40 | 1 << 41;

/// The error of the source inside the error of the space.
pub(super) fn inner(error: Error) -> IommufdError {
    match error {
        Error::Source(error) => *error.downcast().unwrap(),
        Error::Change { error, .. } => inner(*error),
        other => panic!("not an error of the source: {other}"),
    }
}

#[test]
fn a_harvest_that_fails_in_the_second_piece_has_the_first() {
    for (errno, kind) in [
        (libc::ENODEV, "Gone"),
        (libc::EIO, "Unknown"),
        (libc::EFAULT, "Unknown"),
    ] {
        let (fake, _hwpt, space) = written();
        fake.fail(Fault {
            after: 1,
            ..Fault::once("dirty", errno)
        });
        assert_eq!(
            harvest(&space),
            (1 << 3, kind.into()),
            "what lies below the stop"
        );
        // The kernel has forgotten page 40, and did not tell.
        assert_eq!(harvest(&space), all(!0 << 32), "all of the second piece");
        assert_eq!(harvest(&space), all(0));
    }
}

/// As long as the device is gone, harvests stop. When the domain goes, all of it is dirty.
#[test]
fn a_device_that_is_unplugged_leaves_everything_dirty() {
    let (fake, _hwpt, space) = written();
    fake.fail(Fault::always("dirty", libc::ENODEV));
    assert_eq!(harvest(&space), (0, "Gone".into()));
    assert_eq!(harvest(&space), (0, "Gone".into()));
    fake.fail(Fault::always("peek", libc::ENODEV));
    let domain = space.domains()[0];
    space.detach(domain).unwrap();
    assert_eq!(harvest(&space), all(u64::MAX));
}

#[test]
fn a_call_that_signals_interrupt_is_made_again_and_its_piece_is_dirty() {
    let (fake, _hwpt, space) = written();
    fake.fail(Fault {
        times: 3,
        ..Fault::once("dirty", libc::EINTR)
    });
    assert_eq!(
        harvest(&space),
        all(0xffff_ffff | WRITTEN),
        "the first piece; the written ones"
    );
    fake.fail(Fault::always("dirty", libc::EINTR));
    let made = fake.count("dirty");
    assert_eq!(harvest(&space), (0, "Interrupted".into()));
    assert_eq!(fake.count("dirty") - made, TRIES as usize);
    fake.mend();
    assert_eq!(harvest(&space), all(0xffff_ffff));
}

/// The kernel drops the bits of a page that it cannot pin, cleans all the same, and says nothing.
/// So it is not asked before the bitmap is there.
#[test]
fn a_bitmap_that_cannot_be_had_keeps_the_kernel_from_being_asked() {
    let fake = Fake::new(Granule::K4);
    let (iommufd, pool) = (fake.iommufd(), dirtymap_host::BitPool::without_memory());
    let table = Table::new(iommufd, 2, Granule::K4, OnUnmap::Asked, pool);
    let log = Log::new(pages(0, 64), Granule::K4).unwrap();
    let mut state = log.state();
    let error = table.pull(log.range, &mut state, true).unwrap_err();
    assert!(
        matches!(error, IommufdError::BitmapNotPresent { .. }),
        "{error}"
    );
    assert_eq!(fake.count("dirty"), 0);
    assert!(state.pending.is_empty());
}

#[test]
fn a_peek_that_fails_changes_nothing() {
    let (fake, _hwpt, space) = written();
    fake.fail(Fault::once("peek", libc::EIO));
    let mut words = [0];
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    let error = space
        .peek(&request, UserBitmap::new(&mut words))
        .unwrap_err();
    assert!(matches!(inner(error), IommufdError::Unknown { .. }));
    assert_eq!(harvest(&space), all(WRITTEN));
}

#[test]
fn an_unmap_that_cannot_ask_calls_the_piece_dirty() {
    let (fake, _hwpt, space) = written();
    fake.fail(Fault {
        after: 1,
        ..Fault::once("peek", libc::EIO)
    });
    let mut words = [0];
    space
        .unmap(pages(0, 64), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(words[0], 1 << 3 | !0 << 32);
}

/// An IOAS in which a foreign hand unmapped: what was written there until then is not known.
#[test]
fn what_someone_else_unmapped_is_dirty() {
    let (fake, _hwpt, space) = written();
    fake.state().areas.remove(&0);
    let mut words = [0];
    space
        .unmap(pages(0, 64), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(words[0], 0xffff_ffff | WRITTEN);
}

/// Found by the kernel's own fault injection: an unmap answered "nothing is there", and the memory
/// was still mapped. Devices reached what the space called unmapped.
#[test]
fn an_unmap_that_finds_nothing_is_made_again() {
    let (fake, hwpt, space) = written();
    fake.fail(Fault::once("unmap", libc::ENOENT));
    let mut words = [0];
    let bitmap = UserBitmap::new(&mut words);
    space.unmap(pages(0, 64), Granule::K4, bitmap).unwrap();
    assert!(!fake.write(hwpt.id(), 3 << 12), "no device reaches it");
    assert_eq!(words[0], WRITTEN);
}

/// Another driver has the memory pinned: the kernel refuses to unmap it. Devices reach it still,
/// so the space may not call it unmapped.
#[test]
fn what_the_kernel_refuses_to_unmap_stays_mapped_and_dirty() {
    let (fake, hwpt, space) = written();
    fake.fail(Fault::always("unmap", libc::EBUSY));
    let error = inner(space.unmap_discarding(pages(0, 64)).unwrap_err());
    assert!(matches!(error, IommufdError::StillMapped { .. }), "{error}");
    assert!(fake.write(hwpt.id(), 5 << 12), "a device reaches it");
    let again = space.map(pages(0, 64), 0, Access::ReadWrite).unwrap_err();
    assert!(matches!(again, Error::Overlap { .. }), "{again}");
    fake.mend();
    let mut words = [0];
    space
        .unmap(pages(0, 64), Granule::K4, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(words[0], u64::MAX, "everything, page 5 too");
    assert!(!fake.write(hwpt.id(), 5 << 12), "no device reaches it");
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
}

#[test]
fn an_end_of_tracking_that_cannot_read_calls_everything_dirty() {
    let (fake, _hwpt, space) = written();
    fake.fail(Fault::always("dirty", libc::EIO));
    space.stop_tracking().unwrap();
    fake.mend();
    assert_eq!(harvest(&space), all(u64::MAX));
}

#[test]
fn a_switch_that_fails_leaves_tracking_as_it_was() {
    let (fake, hwpt, space) = written();
    fake.fail(Fault::once("track", libc::EIO));
    let error = inner(space.stop_tracking().unwrap_err());
    assert!(matches!(error, IommufdError::Call { .. }), "{error}");
    fake.write(hwpt.id(), 7 << 12);
    assert_eq!(harvest(&space), all(WRITTEN | 1 << 7));
    space.stop_tracking().unwrap();
    fake.fail(Fault::once("track", libc::EIO));
    space.start_tracking().unwrap_err();
    space.start_tracking().unwrap();
    fake.write(hwpt.id(), 9 << 12);
    assert_eq!(harvest(&space), all(1 << 9));
}
