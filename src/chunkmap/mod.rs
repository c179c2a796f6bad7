//! The concurrent two-level bitmap under all marks.
//!
//! ```text
//!  ChunkMap --> group --> summaries, side by side
//!                     --> chunk: 64 lines of 8 words, one bit for each page
//! ```
//!
//! * [`map`]: the map of chunks, which installs what is missing
//! * [`group`]: neighbouring chunks, and where their summaries, states and bits lie
//! * [`chunk`]: a chunk with its summary and its state, the protocol of the two, and the marker's
//!   side of it
//! * [`take`]: the harvester's side
//! * [`place`]: the place of what a harvester takes
//! * [`handed`]: bits that one harvest records, and others see
//! * [`left`]: bits that many threads leave, and few take
//! * [`few`]: the list of the bits of such a chunk that has few
//! * [`slab`]: the memory of chunks that lie side by side
//!
//! The bitmap knows bits, and neither addresses nor areas. The marks of an area, the put-back store
//! of a domain and a sparse bitmap of the user are made of it.

mod chunk;
mod few;
mod group;
mod handed;
mod left;
mod map;
mod place;
mod slab;
mod take;

#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;
#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests;

pub(crate) use chunk::LINE_WORDS;
pub(crate) use few::{Few, MOST};
pub(crate) use handed::{ChunkWords, Handed};
pub(crate) use map::{CHUNK_WORDS, ChunkMap, OneGroup};
pub(crate) use place::Place;
pub(crate) use take::{Taker, Visitor};
