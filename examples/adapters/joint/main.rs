//! One harvest over everything that writes to the memory of a virtual machine: its processor, a
//! vhost back end, devices behind an IOMMU, and threads of the program, with marks and without.
//!
//! ```text
//!  guest (KVM) --------> log of each slot ----+
//!  back end -----------> log from address 0 --+
//!                                             +--> one harvest, one lease
//!                                             |    --> copy --> commit, or abort
//!  device -> IOTLB ----> leaves of a table ---+
//!  device, by iommufd -> leaves of a table ---+
//!  device that logs ---> its own log ---------+
//!  thread of the VMM --> marks ---------------+
//!  another, quietly ---> pagemap -------------+
//! ```
//!
//! All of them write to the same pages at the same time. Some rounds of the migrator fail half-way
//! and put back what they did not copy. At the end the copy is compared with the memory, byte for
//! byte.
//!
//! Exit status: 0 if every page is identical, 1 if one differs, 2 if something could not be run.
//! Without `/dev/kvm` there is no guest, without userfaultfd there are no writes without a mark,
//! without `/dev/iommu` or a device there is no IOMMU of this machine. The output says so.

#[cfg(target_os = "linux")]
mod linux {
    pub(super) mod guest;
    pub(super) mod hardware;
    pub(super) mod logging;
    pub(super) mod machine;
    pub(super) mod memory;
    pub(super) mod migrate;
    #[cfg(test)]
    mod tests;
    pub(super) mod writers;
}

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    linux::migrate::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> std::process::ExitCode {
    eprintln!("SKIP joint: KVM and the vhost log are interfaces of Linux");
    std::process::ExitCode::SUCCESS
}
