#![doc = include_str!("../README.md")]
#![cfg(target_os = "linux")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod device;
mod error;
mod hwpt;
mod ioas;
mod kernel;
mod log;
mod scratch;
mod source;
mod uapi;

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests;

pub use device::{Device, VfioDevice};
pub use error::IommufdError;
pub use hwpt::Hwpt;
pub use ioas::{Ioas, IoasOptions, Iommufd, OnUnmap};
