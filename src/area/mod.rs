//! The tree of areas: a concurrent map from non-overlapping, inclusive IOVA ranges to areas.
//!
//! ```text
//!               root (the one atomic word) --> rules
//!                 |
//!             [ A | B ]      An update of an area below B copies the path (B', b2') and then
//!             /       \      moves the root to [ A | B' ] by one compare-exchange. A, b1 and
//!          [..]     [b1|b2]  every area stay where they are.
//! ```
//!
//! # The protocol
//! A *copy-on-write* B+tree, read in the manner of *RCU*: nodes never change after they are
//! published, and are freed after a grace period. The kernel keeps the same set in the interval
//! tree of an `io_pagetable`, under a lock.
//!
//! * **Reader**: pins the epoch, loads the root, walks. It never blocks and never retries, and
//!   writes to no shared word except its own epoch.
//! * **Update**: pins, loads the root, edits private copies of the nodes on its path, and publishes
//!   all of them by one compare-exchange of the root. If another update was published first, it
//!   frees its copies and starts again from the new root. Each failure means that another update
//!   succeeded, so updates are lock-free.
//! * **Retire**: the update that succeeded collects the nodes that it replaced and the areas that
//!   it removed. When there are enough of them, an update hands them to the epoch. After every
//!   reader that was pinned at that time has unpinned (the grace period), the epoch hands them
//!   back: updates use the nodes again and drop the areas. No reader ever frees or drops anything.
//!   See `reclaim.rs`.
//!
//! # Invariants
//! 1. *No overlap.* The areas of a tree are ordered, and no address lies in two of them. An edit
//!    checks against the state that it changes, and is published only if that state is still the
//!    current one.
//! 2. *One moment.* A snapshot is the set of areas that one root leads to. Nodes never change after
//!    a compare-exchange has published them, so a reader sees all of a batch of inserts and
//!    removes, or nothing of it.
//! 3. *Reachable memory stays.* A node or area is retired only by the update that made it
//!    unreachable from the root, and after it did. A reader that can still reach it was pinned
//!    before that, and holds the epoch back.
//! 4. *Freed once.* At any moment a node belongs to exactly one of: the edit that made it, the
//!    tree, the pool, the epoch. It becomes unreachable by exactly one compare-exchange, and only
//!    the update that performed it retires the node. The tree owns one strong count of an
//!    [`Arc`](crate::sync::Arc) for each range that an area is mapped at, however many nodes point
//!    to it, and one count of its rules, however many roots carry them. That count is handed on
//!    together with the range, or the rules, by the same rule.
//! 5. *Stamps.* No node carries a later stamp than its parent, and an edit stamps its nodes one
//!    later than the root that it started from. So an edit made a node itself, and may change it in
//!    place, exactly if the stamps are equal.
//! 6. *Holes.* A slot above the leaves stores the length of the longest hole between two
//!    neighbouring areas below it, or 0 if they all touch. A hole between two subtrees is the gap
//!    between their slots, and counts in their common parent. The free addresses below the first
//!    area and above the last one count nowhere: a search has bounds of its own. An edit that
//!    changes a node above the leaves twice leaves its slot *uncounted*, which stands for a hole
//!    that is longer than all others. It counts all such slots once, before it is published.
//!
//! # Rules
//! Next to the areas, the root carries one value of any type: the *rules*, which say what may be
//! inserted where. An edit reads and replaces them together with areas, so a decision that depends
//! on both is atomic. Readers of areas never look at them.
//!
//! # What a snapshot holds back
//! A live snapshot keeps the epoch of the process from advancing, so the memory that updates
//! replace stays allocated until the snapshot is dropped. Updates do not wait for it. They allocate
//! nodes, about one for each level and update. `Snapshot::age` returns how many updates were
//! published since. When the snapshot is dropped, all of it comes back: to the pool of the tree up
//! to the pool's bound, else to the allocator.
//!
//! There is no ABA problem. A pinned root is not freed, so its address cannot return for another
//! node; and a published node leads to the same areas for ever.

mod edit;
mod fit;
mod map;
mod node;
mod reclaim;
mod root;
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
