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
//!
//! # What is freed
//! A free that was handed over with a gather goes where the gather goes: into the pending debt, to the leader that
//! takes it, and after a failure back, in front of what came meanwhile. When its generation finishes it becomes ready.
//! The leader then gives up all locks and runs what is ready, one thread at a time: a thread that finds another one
//! running leaves its own to that one, which looks again before it stops. So all run in the order of handing over.
//!
//! # Without a thread of its own
//! Whether the debt is due is a function of the debt that is there, not an event: [`FlushQueue::is_due`] says so again
//! after a flush that failed, and for what came during a flush, so nothing is stranded. Who hands over when a bound is
//! reached waits for the flush under way and then for one of its own, so the debt stays bounded.

mod debt;
mod gather;
mod policy;
mod queue;
mod stats;
#[cfg(all(test, not(dirtymap_loom)))]
mod tests;

pub use gather::{FlushGather, Leaves};
pub use policy::{FlushCost, FlushPolicy};
pub use queue::{FlushQueue, Ticket};
pub use stats::{FlushStats, Invalidated};
