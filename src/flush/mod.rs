//! Flush accounting: what was cleared is owed a flush.
//!
//! ```text
//!  harvest, unmap --owe--> FlushGather --> FlushQueue (pending) --one flush for all that wait--> finished generation
//! ```
//!
//! Between clearing a dirty bit and the end of the flush, a device may write through a cached "already dirty"
//! translation and leave no trace. So nothing that a gather names may be copied, reused or freed before a flush
//! that **began after** the gather was handed to the queue has finished, with the writes in flight drained.
//!
//! # The protocol
//! Each gather is merged into the pending one and gets the generation *g* that the pending gather will be flushed
//! as. A waiter of *g* takes the leader's lock; if *g* is finished by then, another leader did the work; otherwise
//! it takes all that is pending, flushes it, and finishes that generation. A flush that fails, or panics, puts its
//! gather back: it stays owed and nothing becomes copyable.
//!
//! N threads that sync at one moment need at most two flushes: the one that is running, and one for all who came
//! meanwhile.

mod gather;
mod queue;

pub use gather::{FlushGather, Leaves};
pub use queue::{FlushQueue, FlushStats, Invalidated, Ticket};
