#![doc = include_str!("../README.md")]
#![cfg(target_os = "linux")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod device;
mod error;
mod hwpt;
mod ioas;
mod iommufd;
mod kernel;
mod log;
mod options;
mod source;
mod table;
mod uapi;

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests;

pub use device::{Device, VfioDevice};
pub use error::IommufdError;
pub use hwpt::Hwpt;
pub use ioas::Ioas;
pub use iommufd::Iommufd;
pub use options::{IoasOptions, OnUnmap};
