//! The IO page table: a tree that hardware walks and writes while software maps, unmaps and
//! harvests. All of it is lock-free. Each leaf carries D.
//!
//! ```text
//!  root (level 3) --> table (level 2) --> table (level 1) --> table (level 0) --> page
//!                           |                   |                   |
//!                       1 GiB leaf          2 MiB leaf          4 KiB leaf
//! ```
//!
//! * **Tables** are installed by compare-exchange into an absent entry, and stay until the whole
//!   `Table` is dropped. Two calls remove one: `map` puts a large leaf in the place of a table
//!   without leaves, `merge` in the place of a table of parts. That table is retired. Its memory is
//!   freed when two things have happened: the epoch has passed, so that a walker that is inside has
//!   finished, **and** no device caches a pointer to it any more. Pointers are counted. So a
//!   missing invalidation makes devices use a retired table, as on real hardware, but never freed
//!   memory.
//! * **Leaves** are installed by compare-exchange into an absent entry, removed by
//!   compare-exchange, and cleaned by compare-exchange. Hardware sets D by a compare-exchange that
//!   fails once the leaf is gone, so D of a removed leaf is final.
//! * **A group** of entries that make up one leaf comes and goes entry by entry. Each entry
//!   describes the whole leaf, so a walk that hits one of them sees the leaf or nothing, never
//!   another leaf. D of a group is the OR over all its entries; D of a removed group is the OR of
//!   its entries as each was removed.
//! * **Ownership.** A call that maps, unmaps, protects or merges a range owns the range until it
//!   returns: no two such calls overlap. The address space ensures that. Calls on disjoint ranges,
//!   walks and scans may run at any time. If two `map`s overlap all the same, at least one is
//!   refused and removes the leaves that it installed. Other calls that overlap end in one of their
//!   possible results, or in leaves that vanish. Memory stays safe.

mod dirty;
mod entries;
mod leaf;
mod map;
mod merge;
mod page;
mod protect;
mod scan;
mod skip;
mod slab;
mod split;
mod tree;
mod unmap;
mod walk;
mod wide;

pub use leaf::Leaf;
pub(crate) use page::TableRef;
pub use tree::Table;
pub(crate) use walk::Walk;

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests;

#[cfg(all(test, dirtymap_loom))]
mod loom_tests;
