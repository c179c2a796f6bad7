//! User bitmaps, into which a harvest records dirty pages.
//!
//! Bit `n` stands for the bytes `[base + n * granule, base + (n + 1) * granule)`, least significant
//! bit first, words little endian on every host. A harvest only ever ORs bits in, inside the
//! request; bits that were set stay set, bits outside stay as they were.
//!
//! ```text
//!  IOVA range --record--> bits --window by window--> words of the user
//!                          |
//!                          +-- a chunk is one 4 KiB page of bitmap, 32768 bits;
//!                              a window is at most 512 chunks
//! ```
//!
//! A harvest records a page **before** it clears the page's dirty bit, so a record that fails
//! leaves the bit where it was (contract: never clear what cannot be recorded).

mod combine;
#[cfg(all(feature = "mmap", not(dirtymap_loom)))]
mod file;
mod runs;
mod sink;
mod span;
mod sparse;
mod user;
mod view;
mod window;

pub use crate::error::BitmapError;
#[cfg(all(feature = "mmap", not(dirtymap_loom)))]
pub use file::FileBitmap;
pub(crate) use runs::RunBits;
pub use runs::{Bits, Runs, Words};
pub use sink::Sink;
pub use sparse::SparseBitmap;
pub(crate) use user::Bound;
pub use user::UserBitmap;
pub use view::BitmapView;

/// Bits of one chunk: a 4 KiB page of bitmap.
pub const CHUNK_BITS: u64 = 1 << 15;
/// Bits of one window: 512 chunks, 2 MiB of bitmap, 64 GiB of address space at 4 KiB a bit.
pub const WINDOW_BITS: u64 = 512 * CHUNK_BITS;
/// The most bits that a bitmap of any form is used for: positions then never wrap.
const MAX_BITS: u64 = 1 << 63;
