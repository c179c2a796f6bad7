#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(target_os = "linux")]
mod device;
mod logger;
mod range;

#[cfg(target_os = "linux")]
pub use device::{DeviceLog, DeviceLogError, LoggingDevice, MAX_RANGES, VfioDeviceFd};
pub use logger::{DmaLogger, LogError, Reported};
pub use range::DmaRange;

/// The guide, as in the folder `docs`.
#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}
