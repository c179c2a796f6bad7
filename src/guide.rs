#![doc = page!("README.md")]

#[doc = page!("exchange.md")]
pub mod exchange {}

#[doc = page!("consumers.md")]
pub mod many {}

#[doc = page!("monitors.md")]
pub mod monitors {}

#[doc = page!("joint.md")]
pub mod joint {}

#[doc = page!("bugs.md")]
pub mod bugs {}

#[cfg_attr(all(feature = "kvm", target_os = "linux"), doc = page!("kvm.md"))]
#[cfg_attr(
    not(all(feature = "kvm", target_os = "linux")),
    doc = "This page needs the feature `kvm`."
)]
pub mod kvm {}

#[cfg_attr(all(feature = "pagemap", target_os = "linux"), doc = page!("pagemap.md"))]
#[cfg_attr(
    not(all(feature = "pagemap", target_os = "linux")),
    doc = "This page needs the feature `pagemap`."
)]
pub mod pagemap {}

#[cfg_attr(all(feature = "vhost", target_os = "linux"), doc = page!("vhost.md"))]
#[cfg_attr(
    not(all(feature = "vhost", target_os = "linux")),
    doc = "This page needs the feature `vhost`."
)]
pub mod vhost {}

#[cfg_attr(all(feature = "vm-memory", unix), doc = page!("vm-memory.md"))]
#[cfg_attr(
    not(all(feature = "vm-memory", unix)),
    doc = "This page needs the feature `vm-memory`."
)]
pub mod vm_memory {}
