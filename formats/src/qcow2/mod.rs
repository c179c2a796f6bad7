//! Persistent bitmaps in qcow2 images: the ones of QEMU, read and written without QEMU.
//!
//! ```text
//!  header, with an extension -> directory -> entry: name, granule, flags -> table -> clusters
//!                                            entry ...                      0: all bits are zero
//!                                                                           1: all bits are one
//! ```
//!
//! * **In use**: a bitmap has this flag while a program that writes the disk keeps the bitmap in
//!   its memory. If the flag is there and no such program is, it has crashed, so all of the disk
//!   counts as dirty. [`Image::read`] refuses such a bitmap. Only [`Image::write`], which replaces
//!   the whole content, clears the flag.
//! * **Stale**: a program that does not know bitmaps clears a bit of the header when it writes the
//!   image. Then none of the bitmaps is true.
//! * **A raw disk** has its bitmaps in an image of metadata alone: [`create_for_raw`].
//!
//! [`Image::write`] leaves an image that opens, whatever moment it is cut off at: the flag *in use*
//! is durable first, then the new content, in clusters that were free, then the directory that
//! names it, and then the flag goes. At each moment the bitmap is the old one, the new one, or in
//! use. Clusters that are lost to a crash are found by `qemu-img check -r leaks`.

mod bits;
mod create;
mod directory;
mod error;
mod extension;
mod file;
mod header;
mod image;
mod refcount;
mod write;

pub use create::create_for_raw;
pub use error::QcowError;
pub use file::ImageFile;
pub use image::{BitmapInfo, Image};
pub use write::BitmapOptions;
