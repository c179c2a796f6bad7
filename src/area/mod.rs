//! Which ranges exist: a concurrent map from non-overlapping, inclusive IOVA ranges to areas.
//!
//! ```text
//!               root (the one atomic word) --> rules
//!                 |
//!             [ A | B ]              update of an area below B: copies the path (B', b2'), then moves the root to
//!             /       \              [ A | B' ] by one compare-exchange. A, b1 and every area stay where they are.
//!          [..]     [b1|b2]
//! ```
//!
//! # The protocol
//! A B+tree whose nodes never change once they are published.
//!
//! * **Reader**: pins the epoch, loads the root, walks. It waits for nobody, retries nothing and writes to no shared
//!   word but its own epoch.
//! * **Update**: pins, loads the root, edits private copies of the nodes on its way, and publishes all of it by one
//!   compare-exchange of the root. If another update was faster, it frees its copies and starts again from the new
//!   root: each failure is somebody else's success, so updates are lock-free.
//! * **Retire**: the winner keeps the nodes it replaced and the areas it removed; when there are enough of them, an update
//!   hands them to the epoch. When every reader that was pinned then has unpinned, the epoch hands them back, and updates
//!   use the nodes again and drop the areas. No reader ever frees or drops anything. See `reclaim.rs`.
//!
//! # Invariants
//! 1. *No overlap.* The areas of a tree are ordered, and no address lies in two of them. An edit checks against the
//!    state that it changes, and is published only if that state is still the current one.
//! 2. *One moment.* A snapshot is the set of areas that one root leads to. Once a compare-exchange has published them,
//!    nodes never change, so a batch of inserts and removes is seen whole or not at all.
//! 3. *What a reader can reach stays.* A node or area is retired only by the update that made it unreachable from the
//!    root, and after it did; a reader that can still reach it was pinned before that and holds the epoch back.
//! 4. *Freed once.* A node belongs either to the one edit that made it, or to the tree, or to the pool, or to the epoch. It
//!    becomes unreachable by exactly one compare-exchange, whose winner alone retires it. The tree owns one strong count of an
//!    [`Arc`](crate::sync::Arc) for each range that it is mapped at, however many nodes point to it, and one of its rules,
//!    however many roots carry them; the count moves with the range, and with the rules, by the same rule.
//! 5. *Stamps.* No node carries a later stamp than its parent, and an edit stamps its nodes one later than the root it
//!    started from. So a node that an edit meets is its own, and may be changed in place, exactly if the stamps are
//!    equal.
//! 6. *Holes.* A slot above the leaves says how long the longest hole between two neighbouring areas below it is, 0 if
//!    they all touch. A hole between two subtrees is the difference of their slots, and counts where they have a common
//!    parent. What is free below the first and behind the last area counts nowhere: a search knows its own bounds.
//!
//! # Rules
//! Beside the areas, the root carries one value of any type, the *rules* of what may be inserted where. An edit reads
//! and replaces them together with areas, so that a decision that depends on both is atomic. Readers of areas never look
//! at them.
//!
//! # What a snapshot holds back
//! A snapshot that is held keeps the epoch of the process from advancing: what updates replace stays allocated until
//! it is dropped. Updates do not wait for it; they allocate nodes, about one for each level and update. `Snapshot::age` says
//! how many updates were published since. As soon as it is dropped all comes back, to the pool of the tree as far as that
//! is bounded, else to the allocator.
//!
//! There is no ABA: a pinned root cannot be freed and so its address cannot return for another node, and a node that
//! was published leads to the same areas for ever.

mod edit;
mod fit;
mod map;
mod node;
mod reclaim;
mod snapshot;
mod tree;
#[cfg(test)]
mod validate;

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod large_tests;
#[cfg(all(test, dirtymap_loom))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod loom_tests;
#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod reclaim_tests;
#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests
mod tests;

pub use map::AreaMap;
pub(crate) use snapshot::{Contiguous, Entry, Iter, Snapshot};
pub(crate) use tree::AreaTree;
