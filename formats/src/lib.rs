//! Dirty state of [`dirtymap`] in the formats of the storage world.
//!
//! | module | format | for |
//! |---|---|---|
//! | [`nbd`] | metadata contexts of network block devices | copies of a disk over a socket |
//! | [`qcow2`] | persistent bitmaps in qcow2 images | QEMU, and disks that it has or had open |
//! | [`rbd`] | `rbd diff v1` | increments in Ceph's form, as files |
//!
//! Everything takes runs of bytes ([`RunTable`](dirtymap::RunTable), or an iterator of
//! [`IovaRange`](dirtymap::IovaRange), where an address is an offset in the disk), and gives them
//! back. No reader trusts what it reads: lengths and offsets are held against the file or the
//! export before anything is allocated or used, and an error names the place and the value.
//!
//! [`storage`] is the guide.
//!
//! # Features
//!
//! * `nbd` (on by default): [`nbd::serve`], [`nbd::Connect`].
//! * `qcow2` (on by default): [`qcow2::Image`].
//! * `rbd` (on by default): [`rbd::Reader`], [`rbd::Writer`], [`rbd::merge`].
#![cfg_attr(docsrs, feature(doc_cfg))]

mod data;

#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(feature = "qcow2")]
pub mod qcow2;
#[cfg(feature = "rbd")]
pub mod rbd;

pub use data::ReadAt;

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/storage.md")]
pub mod storage {}

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
