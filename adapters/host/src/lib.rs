//! What the adapters of [dirtymap](https://docs.rs/dirtymap) share about the system that they run
//! on: its page, the process that a log belongs to, and memory into which the kernel writes bits.
//!
//! ```
//! use dirtymap_host::page;
//!
//! assert!(page().bytes() >= 4096);
//! ```
//!
//! An adapter of yours may use it too. It is a crate of its own because both need calls of the
//! system, which the core does without.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[doc(hidden)]
pub mod counted;
#[cfg(target_os = "linux")]
mod maker;
mod page;
#[cfg(target_os = "linux")]
mod scratch;

#[cfg(target_os = "linux")]
pub use maker::Maker;
pub use page::page;
#[cfg(target_os = "linux")]
pub use scratch::BitPool;

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
