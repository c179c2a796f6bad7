//! Bad input, and a kernel that refuses: each has an error of its own, and changes nothing.

use std::io;
use std::sync::Arc;

use dirtymap::flush::FlushGather;
use dirtymap::{Access, AddressSpace, DirtySource, Granule, Iova, IovaRange};

use super::fake::{Dev, Fake, Fault, pages};
use super::unknown::inner;
use crate::uapi::Span;
use crate::{Ioas, IoasOptions, Iommufd, IommufdError, VfioDevice};

/// This machine may have one or not, and may let us or not.
#[test]
fn a_missing_file_says_what_to_load() {
    match Iommufd::open() {
        Ok(_) => (),
        Err(error @ IommufdError::NoIommufd { .. }) => {
            let text = error.to_string();
            assert!(
                text.contains("/dev/iommu") && text.contains("CONFIG_IOMMUFD"),
                "{text}"
            );
        }
        Err(error @ IommufdError::NoPermission { .. }) => {
            assert!(error.to_string().contains("/dev/iommu"));
        }
        Err(other) => panic!("{other}"),
    }
}

/// Whatever the error of the open was, it said that the module is missing: also without a free
/// descriptor.
#[test]
fn each_error_of_the_open_says_what_to_do() {
    type Right = fn(&IommufdError) -> bool;
    let missing: Right = |error| matches!(error, IommufdError::NoIommufd { .. });
    let forbidden: Right = |error| matches!(error, IommufdError::NoPermission { .. });
    let other: Right = |error| matches!(error, IommufdError::Call { .. });
    let cases = [
        (libc::ENOENT, missing),
        (libc::ENODEV, missing),
        (libc::ENXIO, missing),
        (libc::EACCES, forbidden),
        (libc::EPERM, forbidden),
        (libc::EMFILE, other),
        (libc::ENOMEM, other),
    ];
    for (errno, is_right) in cases {
        let error = crate::kernel::open_error(io::Error::from_raw_os_error(errno));
        assert!(is_right(&error), "errno {errno}: {error}");
        assert!(error.to_string().contains("/dev/iommu"), "{error}");
    }
}

/// A file that is not iommufd, or a device of VFIO: the call is unknown.
#[test]
fn a_file_of_another_kind_is_told() {
    let null = || std::fs::File::open("/dev/null").unwrap();
    let iommufd = Iommufd::from_fd(null().into()).unwrap();
    // SAFETY: no device exists.
    let error = unsafe { Ioas::new(&iommufd, IoasOptions::default()) }.unwrap_err();
    assert!(matches!(error, IommufdError::Unsupported { .. }), "{error}");
    let error = VfioDevice::bind(null().into(), &iommufd).unwrap_err();
    assert!(matches!(error, IommufdError::Unsupported { .. }), "{error}");
}

/// A child of `fork` that harvested would clear what its parent has to learn.
#[test]
fn a_child_of_fork_is_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let iommufd = Iommufd::from_fd(null.into()).unwrap();
    // SAFETY: the child calls one function that only looks, and ends without unwinding.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = iommufd.kernel().ioas_alloc().unwrap_err();
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(refused.raw_os_error().is_some())) };
    }
    let mut status = -1;
    // SAFETY: waits for the child above, and writes one number.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "refused before the kernel was asked");
    let asked = iommufd.kernel().ioas_alloc().unwrap_err();
    assert_eq!(asked.raw_os_error(), Some(libc::ENOTTY));
}

#[test]
fn a_device_whose_iommu_cannot_track() {
    let fake = Fake::new(Granule::K4);
    let ioas = fake.ioas(IoasOptions::default());
    fake.fail(Fault::once("hwpt_alloc", libc::EOPNOTSUPP));
    let error = ioas.hwpt(7).unwrap_err();
    assert!(
        matches!(error, IommufdError::CannotTrack { device: 7, .. }),
        "{error}"
    );
    fake.fail(Fault::once("hwpt_alloc", libc::ENOENT));
    let error = ioas.hwpt(7).unwrap_err();
    assert!(matches!(error, IommufdError::Call { .. }), "{error}");
}

#[test]
fn pages_and_pieces_that_do_not_fit() {
    let fake = Fake::new(Granule::K4);
    fake.state().alignment = 65536;
    let k64 = Granule::from_lg2(16).unwrap();
    let table = |options| fake.ioas(options).hwpt(1);
    let error = table(IoasOptions::default().page(Granule::K4)).unwrap_err();
    assert!(
        matches!(error, IommufdError::PageTooSmall { smallest, .. } if smallest == k64),
        "{error}"
    );
    assert_eq!(table(IoasOptions::default()).unwrap().table().page, k64);
    for piece in [Granule::K4, Granule::from_lg2(41).unwrap(), Granule::MAX] {
        let error = table(IoasOptions::default().piece(piece)).unwrap_err();
        assert!(matches!(error, IommufdError::BadPiece { .. }), "{error}");
    }
    assert_eq!(
        fake.count("destroy"),
        10,
        "five tables, each with an IOAS of its own"
    );
    table(IoasOptions::default().piece(Granule::from_lg2(40).unwrap())).unwrap();
}

#[test]
fn maps_that_the_kernel_refuses_leave_nothing() {
    let k64 = Granule::from_lg2(16).unwrap();
    let refuse = |errno| {
        let fake = Fake::new(Granule::K4);
        let hwpt = fake
            .ioas(IoasOptions::default().piece(k64))
            .hwpt(1)
            .unwrap();
        let space = AddressSpace::with_source(Granule::K4, Arc::clone(&hwpt)).unwrap();
        fake.fail(Fault {
            after: 2,
            ..Fault::once("map", errno)
        });
        let error = inner(
            space
                .map(pages(0, 64), 0x7000_0000, Access::ReadWrite)
                .unwrap_err(),
        );
        assert!(fake.state().areas.is_empty(), "the first pieces are gone");
        space
            .map(pages(0, 64), 0x7000_0000, Access::ReadWrite)
            .unwrap();
        assert_eq!(fake.state().areas.len(), 4);
        error
    };
    let third = pages(32, 16);
    let is = |error: IommufdError, right: bool| assert!(right, "{error}");
    let error = refuse(libc::EEXIST);
    is(
        error,
        matches!(refuse(libc::EEXIST), IommufdError::Occupied { range } if range == third),
    );
    let error = refuse(libc::EINVAL);
    is(
        error,
        matches!(refuse(libc::EINVAL), IommufdError::NotUsable { range, .. } if range == third),
    );
    let error = refuse(libc::EFAULT);
    is(
        error,
        matches!(
            refuse(libc::EFAULT),
            IommufdError::NotMemory {
                backing: 0x7002_0000,
                ..
            }
        ),
    );
    let error = refuse(libc::ENOMEM);
    is(
        error,
        matches!(refuse(libc::ENOMEM), IommufdError::NoMemory { .. }),
    );
    let error = refuse(libc::EIO);
    is(
        error,
        matches!(refuse(libc::EIO), IommufdError::Call { .. }),
    );
}

/// The third of four pieces is refused, and so is the unmap of the first two. The space called
/// their addresses free. Devices reached them ever after, because no flush was owed that would
/// have tried again.
#[test]
fn a_map_that_cannot_be_undone_is_undone_by_the_next_call_that_can() {
    let k64 = Granule::from_lg2(16).unwrap();
    let options = IoasOptions::default().piece(k64);
    let still_mapped = |error: IommufdError| {
        assert!(
            matches!(error, IommufdError::StillMapped { range } if range == pages(0, 16)),
            "{error}"
        );
    };
    let broken = || {
        let fake = Fake::new(Granule::K4);
        let hwpt = fake.ioas(options).hwpt(1).unwrap();
        let space = AddressSpace::with_source(Granule::K4, Arc::clone(&hwpt)).unwrap();
        space.map(pages(64, 64), 0, Access::ReadWrite).unwrap();
        fake.state().areas.insert(32 << 12, ((33 << 12) - 1, 0));
        fake.fail(Fault::always("unmap", libc::EBUSY));
        let error = space.map(pages(0, 64), 0, Access::ReadWrite).unwrap_err();
        still_mapped(inner(error));
        assert!(fake.write(hwpt.id(), 5 << 12), "a device reaches it");
        (fake, hwpt, space)
    };
    // A map: of other addresses, too.
    let (fake, hwpt, space) = broken();
    let other = || space.map(pages(128, 16), 0, Access::ReadWrite);
    still_mapped(inner(other().unwrap_err()));
    fake.mend();
    other().unwrap();
    assert!(!fake.write(hwpt.id(), 5 << 12), "no device reaches it");
    // A flush: of other addresses, too.
    let (fake, hwpt, _space) = broken();
    let flush = || {
        let mut gather = FlushGather::new();
        gather.add(pages(64, 1), Granule::K4);
        hwpt.invalidate(&gather)
    };
    still_mapped(inner(flush().unwrap_err()));
    fake.mend();
    flush().unwrap();
    assert!(!fake.write(hwpt.id(), 5 << 12), "no device reaches it");
    // A detach, whose own four pieces leave nothing to flush.
    let (fake, hwpt, space) = broken();
    let only = space.domains()[0];
    fake.fail(Fault {
        after: 4,
        ..Fault::always("unmap", libc::EBUSY)
    });
    still_mapped(inner(space.detach(only).unwrap_err()));
    fake.mend();
    space.detach(only).unwrap();
    assert!(!fake.write(hwpt.id(), 5 << 12), "no device reaches it");
    // Then it is as if it had never been.
    fake.state().areas.remove(&(32 << 12));
    space.attach(Arc::clone(&hwpt)).unwrap();
    space.map(pages(0, 64), 0, Access::ReadWrite).unwrap();
    assert!(fake.write(hwpt.id(), 5 << 12));
}

/// A holder of the same IOAS mapped there.
#[test]
fn an_ioas_that_someone_else_maps_is_told_with_the_range() {
    let fake = Fake::new(Granule::K4);
    let hwpt = fake.ioas(IoasOptions::default()).hwpt(1).unwrap();
    let space = AddressSpace::with_source(Granule::K4, hwpt).unwrap();
    fake.state().areas.insert(0x3000, (0x3fff, 0));
    let error = inner(space.map(pages(0, 64), 0, Access::ReadWrite).unwrap_err());
    assert!(
        matches!(error, IommufdError::Occupied { range } if range == pages(0, 64)),
        "{error}"
    );
    assert_eq!(
        fake.state().areas.len(),
        1,
        "that of the other holder stays"
    );
}

#[test]
fn signals_during_a_map_are_waited_out_or_told() {
    let fake = Fake::new(Granule::K4);
    let hwpt = fake.ioas(IoasOptions::default()).hwpt(1).unwrap();
    let space = AddressSpace::with_source(Granule::K4, hwpt).unwrap();
    fake.fail(Fault {
        times: 5,
        ..Fault::once("map", libc::EINTR)
    });
    space.map(pages(0, 1), 0, Access::ReadWrite).unwrap();
    fake.fail(Fault::always("map", libc::EINTR));
    let error = inner(space.map(pages(1, 1), 0, Access::ReadWrite).unwrap_err());
    assert!(matches!(error, IommufdError::Interrupted { .. }), "{error}");
}

/// The same for every other call: the error said only that the call was interrupted.
#[test]
fn signals_during_any_call_are_told_as_such() {
    let fake = Fake::new(Granule::K4);
    let ioas = fake.ioas(IoasOptions::default());
    let hwpt = ioas.hwpt(1).unwrap();
    let told = |error: IommufdError| {
        assert!(
            matches!(error, IommufdError::Interrupted { times: 32, .. }),
            "{error}"
        );
    };
    fake.fail(Fault::always("hwpt_alloc", libc::EINTR));
    told(ioas.hwpt(1).unwrap_err());
    fake.fail(Fault::always("iova_ranges", libc::EINTR));
    told(ioas.usable().unwrap_err());
    fake.fail(Fault::always("track", libc::EINTR));
    told(hwpt.switch(true).unwrap_err());
    fake.mend();
    let mut device = Dev::new(1);
    device.answer = Err(io::Error::from_raw_os_error(libc::EINTR));
    told(hwpt.attach(&device).unwrap_err());
    told(hwpt.detach(&device).unwrap_err());
    hwpt.switch(true).unwrap();
}

#[test]
fn a_device_that_refuses_the_table_uses_the_old_one() {
    let fake = Fake::new(Granule::K4);
    let ioas = fake.ioas(IoasOptions::default());
    let (old, new) = (ioas.hwpt(1).unwrap(), ioas.hwpt(1).unwrap());
    let mut device = Dev::new(1);
    old.attach(&device).unwrap();
    device.answer = Err(io::Error::from_raw_os_error(libc::EINVAL));
    let error = new.attach(&device).unwrap_err();
    assert!(
        matches!(error, IommufdError::DeviceRefused { device: 1, .. }),
        "{error}"
    );
    assert_eq!(ioas.iommufd().devices().get(&1), Some(&old.id()));
    device.answer = Err(io::Error::from_raw_os_error(libc::ENODEV));
    assert!(matches!(
        new.attach(&device).unwrap_err(),
        IommufdError::Call { .. }
    ));
    device.answer = Ok(());
    old.detach(&device).unwrap();
    assert!(ioas.iommufd().devices().is_empty());
}

#[test]
fn usable_ranges_however_many_there_are() {
    let fake = Fake::new(Granule::K4);
    let spans = (0..200).map(|n| Span {
        start: n << 20,
        last: (n << 20) + 0xffff,
    });
    fake.state().usable = spans.collect();
    let usable = fake.ioas(IoasOptions::default()).usable().unwrap();
    assert_eq!(usable.len(), 200);
    assert_eq!(
        usable[199],
        IovaRange::from_len(Iova::new(199 << 20), 0x1_0000).unwrap()
    );
}
