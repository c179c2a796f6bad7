//! Dirty state of [dirtymap](https://docs.rs/dirtymap) in the forms that files and other programs
//! keep it in.
//!
//! | form | here |
//! |---|---|
//! | a bitmap in a file with a header and checksums, written crash-safely | [`BitmapFile`] |
//! | the dirty state of a space over a restart of its process | [`BitmapFile::save_space`] |
//! | sets of the crate `roaring`, and their portable format | the feature `roaring` |
//! | metadata contexts of network block devices, for copies over a socket | [`nbd`] |
//! | persistent bitmaps in qcow2 images, for QEMU and raw disks | [`qcow2`] |
//! | increments in the format `rbd diff v1` of Ceph | [`rbd`] |
//!
//! Nothing here takes part in a harvest: what goes in is recorded through a view, or marked; what
//! goes out is read from a view or a lease.
//!
//! No reader trusts its input: lengths and offsets are held against the file or the export before
//! anything is allocated or used, and an error names the place and the value.
//!
//! # Features
//!
//! * `nbd`, `qcow2`, `rbd` (on by default): the modules of these names. [`storage`] is their guide.
//! * `roaring` (off by default, Rust 1.90): views to and from the sets of that crate.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod data;
mod file;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(feature = "qcow2")]
pub mod qcow2;
#[cfg(feature = "rbd")]
pub mod rbd;
#[cfg(feature = "roaring")]
pub mod roaring;

pub use data::ReadAt;
pub use file::{BitmapFile, BitmapFileError, Restored, Truncate};

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/storage.md")]
pub mod storage {}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
