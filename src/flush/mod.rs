//! Flush accounting: each cleared leaf is owed a flush.
//!
//! ```text
//!  harvest, unmap --owe--> FlushGather --> FlushQueue (pending) --one flush--> finished generation
//! ```
//!
//! Between the clear of a dirty bit and the end of the flush, a device may write through a cached
//! "already dirty" translation and leave no trace. So no range of a gather may be copied, reused or
//! freed before the end of a flush that **began after** the gather was handed to the queue and that
//! has drained the writes in flight.
//!
//! # The protocol
//! This is *group commit*. Each gather is merged into the pending one, and its ticket names the
//! generation *g* that the pending gather will be flushed as. A thread that waits for *g* takes the
//! leader's lock. If *g* has finished by then, another leader did the work. Otherwise the thread
//! takes all that is pending, flushes it, and finishes that generation. If its flush fails, or
//! panics, the leader makes its gather pending again: it stays owed, and none of its pages may be
//! copied yet.
//!
//! If N threads sync at one moment, at most two flushes follow: the one that is running, and one
//! for all threads that came during it.
//!
//! # What is freed
//! A free that is handed over with a gather goes where the gather goes: into the pending debt, and
//! to the leader that takes it. If the flush fails, it goes back to the pending debt, ahead of the
//! frees that came meanwhile. When its generation finishes, it becomes ready. The leader then gives
//! up all locks and runs the ready frees, one thread at a time. A thread that finds another one
//! running frees leaves its own to that thread, which looks again before it stops. So all frees run
//! in the order in which they were handed over.
//!
//! # Without a thread of its own
//! Whether the debt is due depends on the debt alone, not on an event. [`FlushQueue::is_due`] says
//! so again after a flush that failed, and for gathers that came during a flush, so no debt is
//! forgotten. A thread that reaches a bound when it hands over a gather waits for the flush under
//! way and then for one of its own, so the debt stays bounded.

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
