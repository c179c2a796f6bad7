//! What is the same for all interfaces of this kernel.

#[cfg(any(feature = "kvm", feature = "pagemap"))]
use crate::units::Granule;

/// The process that made something. A child of a fork has a copy of it, which is not its own: what
/// it takes from the system by that is missing in its parent.
#[cfg(feature = "vhost")]
#[derive(Debug)]
pub(super) struct Owner(u32);

#[cfg(feature = "vhost")]
impl Owner {
    /// This process.
    pub(super) fn new() -> Self {
        Owner(std::process::id())
    }

    /// # Errors
    /// The number of the owner, and of this process, if it is another one.
    pub(super) fn check(&self) -> Result<(), (u32, u32)> {
        match std::process::id() {
            process if process == self.0 => Ok(()),
            process => Err((self.0, process)),
        }
    }
}

/// The page of this system: 4 KiB on most, 16 or 64 KiB on some.
#[cfg(any(feature = "kvm", feature = "pagemap"))]
pub(super) fn page() -> Granule {
    // SAFETY: this call takes a number and touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // Never an error: every system has pages, of a power of two.
    u64::try_from(bytes)
        .ok()
        .and_then(|bytes| Granule::from_bytes(bytes).ok())
        .unwrap_or(Granule::K4)
}
