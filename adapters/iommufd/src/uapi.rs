//! The numbers and structs of the kernel's interface: iommufd, and of VFIO the calls that bind a
//! device to it. Every struct of iommufd begins with its own size, those of VFIO alike.

/// `_IO(';', number)`: a call without a direction or a size.
const fn io(number: u32) -> libc::Ioctl {
    ((b';' as u32) << 8 | number) as libc::Ioctl
}

pub(crate) const DESTROY: libc::Ioctl = io(0x80);
pub(crate) const IOAS_ALLOC: libc::Ioctl = io(0x81);
pub(crate) const IOAS_IOVA_RANGES: libc::Ioctl = io(0x84);
pub(crate) const IOAS_MAP: libc::Ioctl = io(0x85);
pub(crate) const IOAS_UNMAP: libc::Ioctl = io(0x86);
pub(crate) const OPTION: libc::Ioctl = io(0x87);
pub(crate) const HWPT_ALLOC: libc::Ioctl = io(0x89);
pub(crate) const HWPT_SET_DIRTY_TRACKING: libc::Ioctl = io(0x8b);
pub(crate) const HWPT_GET_DIRTY_BITMAP: libc::Ioctl = io(0x8c);

pub(crate) const VFIO_BIND_IOMMUFD: libc::Ioctl = io(100 + 18);
pub(crate) const VFIO_ATTACH_IOMMUFD_PT: libc::Ioctl = io(100 + 19);
pub(crate) const VFIO_DETACH_IOMMUFD_PT: libc::Ioctl = io(100 + 20);

pub(crate) const MAP_FIXED_IOVA: u32 = 1;
pub(crate) const MAP_WRITEABLE: u32 = 1 << 1;
pub(crate) const MAP_READABLE: u32 = 1 << 2;
pub(crate) const OPTION_HUGE_PAGES: u32 = 1;
pub(crate) const OPTION_SET: u16 = 0;
pub(crate) const ALLOC_DIRTY_TRACKING: u32 = 1 << 1;
pub(crate) const DIRTY_TRACKING_ENABLE: u32 = 1;
pub(crate) const NO_CLEAR: u32 = 1;

/// A struct of the interface, whose first field is the size of all of it.
///
/// # Safety
/// `repr(C)`, without padding that has no field, and with its size in the first four bytes.
pub(crate) unsafe trait Sized32: Sized {
    /// The size that goes into the first field.
    const SIZE: u32 = size_of::<Self>() as u32;
}

/// Declares structs, their sizes as the kernel documents them, and [`Sized32`].
macro_rules! structs {
    ($($(#[$doc:meta])* $name:ident, $size:literal { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $name {
            pub(crate) size: u32,
            $(pub(crate) $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            // Without padding: the fields are as large as the whole.
            assert!(4 $(+ size_of::<$type>())* == $size);
        };

        // SAFETY: `repr(C)`; the assertions above exclude padding; the first field is the size.
        unsafe impl Sized32 for $name {}
    )*};
}

structs! {
    /// `IOMMU_DESTROY`.
    Destroy, 8 { id: u32 }

    /// `IOMMU_IOAS_ALLOC`.
    IoasAlloc, 12 { flags: u32, out_ioas_id: u32 }

    /// `IOMMU_IOAS_IOVA_RANGES`.
    IovaRanges, 32 {
        ioas_id: u32,
        num_iovas: u32,
        reserved: u32,
        allowed_iovas: u64,
        out_iova_alignment: u64,
    }

    /// `IOMMU_IOAS_MAP`.
    IoasMap, 40 {
        flags: u32,
        ioas_id: u32,
        reserved: u32,
        user_va: u64,
        length: u64,
        iova: u64,
    }

    /// `IOMMU_IOAS_UNMAP`.
    IoasUnmap, 24 { ioas_id: u32, iova: u64, length: u64 }

    /// `IOMMU_OPTION`.
    IommuOption, 24 { option_id: u32, op: u16, reserved: u16, object_id: u32, val64: u64 }

    /// `IOMMU_HWPT_ALLOC`, up to the first version that knew dirty tracking.
    HwptAlloc, 40 {
        flags: u32,
        dev_id: u32,
        pt_id: u32,
        out_hwpt_id: u32,
        reserved: u32,
        data_type: u32,
        data_len: u32,
        data_uptr: u64,
    }

    /// `IOMMU_HWPT_SET_DIRTY_TRACKING`.
    SetDirtyTracking, 16 { flags: u32, hwpt_id: u32, reserved: u32 }

    /// `IOMMU_HWPT_GET_DIRTY_BITMAP`.
    GetDirtyBitmap, 48 {
        hwpt_id: u32,
        flags: u32,
        reserved: u32,
        iova: u64,
        length: u64,
        page_size: u64,
        data: u64,
    }

    /// `VFIO_DEVICE_BIND_IOMMUFD`.
    VfioBind, 16 { flags: u32, iommufd: i32, out_devid: u32 }

    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
    VfioAttach, 12 { flags: u32, pt_id: u32 }

    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
    VfioDetach, 8 { flags: u32 }
}

/// One entry of [`IovaRanges`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) last: u64,
}

const _: () = assert!(size_of::<Span>() == 16);
