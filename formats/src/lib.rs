//! Dirty state of [dirtymap](https://docs.rs/dirtymap) in the forms that files and other programs
//! keep it in.
//!
//! | form | here |
//! |---|---|
//! | a bitmap in a file with a header and checksums, written crash-safely | [`BitmapFile`] |
//! | the dirty state of a space over a restart of its process | [`BitmapFile::save_space`] |
//! | sets of the crate `roaring`, and their portable format | the feature `roaring` |
//!
//! Nothing here takes part in a harvest: what goes in is recorded through a view, or marked; what
//! goes out is read from a view or a lease.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod file;
#[cfg(feature = "roaring")]
pub mod roaring;

pub use file::{BitmapFile, BitmapFileError, Restored, Truncate};

#[cfg(any(doc, doctest))]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
