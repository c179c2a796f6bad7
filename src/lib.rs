#![doc = "placeholder"]
mod bitmap;
mod error;
mod flush;
mod source;
#[doc(hidden)]
pub mod sync;
mod units;

pub use bitmap::{BitmapView, CHUNK_BITS, Runs, Sink, UserBitmap, WINDOW_BITS};
pub use error::Error;
pub use flush::{FlushGather, FlushQueue, FlushStats, Invalidated, Leaves, Ticket};
pub use source::{DirtySource, Mapping, Stopped};
pub use units::{Access, Granule, Iova, IovaRange};
