//! What is the same for all interfaces of this kernel.

use crate::units::Granule;

/// The page of this system: 4 KiB on most, 16 or 64 KiB on some.
pub(super) fn page() -> Granule {
    // SAFETY: this call takes a number and touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // Never an error: every system has pages, of a power of two.
    u64::try_from(bytes)
        .ok()
        .and_then(|bytes| Granule::from_bytes(bytes).ok())
        .unwrap_or(Granule::K4)
}
