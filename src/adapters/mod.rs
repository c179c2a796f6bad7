//! Adapters: the tracker in the hands of other crates and of the kernel.
//!
//! An adapter uses the types of another crate or of the kernel. It implements their traits over an
//! [`AddressSpace`](crate::AddressSpace), or is a [`DirtySource`](crate::DirtySource) over a log
//! that they keep, which then joins every harvest. Each is a public module behind a feature of its
//! own, so that nothing of it enters the core: not its dependencies, not its types.
//!
//! Foreign types are unknown to the model checker. What an adapter does concurrently on its own is
//! generic code beside it, and that is modelled.

#[cfg(any(
    all(feature = "vhost", target_os = "linux", not(dirtymap_loom)),
    all(test, dirtymap_loom)
))]
mod log_list;
#[cfg(any(
    all(feature = "vhost", target_os = "linux", not(dirtymap_loom)),
    all(test, dirtymap_loom)
))]
mod replaceable;

#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;

#[cfg(all(
    any(feature = "kvm", feature = "pagemap", feature = "vhost"),
    target_os = "linux",
    not(dirtymap_loom)
))]
mod host;
#[cfg(all(feature = "kvm", target_os = "linux", not(dirtymap_loom)))]
pub mod kvm;
#[cfg(all(
    any(feature = "kvm", feature = "pagemap", feature = "vhost"),
    target_os = "linux",
    not(dirtymap_loom)
))]
mod maker;
#[cfg(all(feature = "pagemap", target_os = "linux", not(dirtymap_loom)))]
pub mod pagemap;
#[cfg(all(
    any(feature = "kvm", feature = "pagemap"),
    target_os = "linux",
    not(dirtymap_loom)
))]
mod placed;
#[cfg(all(feature = "vhost", target_os = "linux", not(dirtymap_loom)))]
pub mod vhost;
#[cfg(all(feature = "vm-memory", not(dirtymap_loom)))]
pub mod vm_memory;
