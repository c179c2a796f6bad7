//! The page of this system.

use dirtymap::Granule;

/// The page of this system: 4 KiB on most, 16 or 64 KiB on some. It is what a hypervisor of this
/// system tracks in.
pub fn page() -> Granule {
    #[cfg(unix)]
    // SAFETY: this call takes a number, returns one, and touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    #[cfg(not(unix))]
    let bytes = 4096;
    let page = u64::try_from(bytes).map(Granule::from_bytes);
    // Every system has pages of a power of two.
    page.ok().and_then(Result::ok).unwrap_or(Granule::K4)
}
