//! The IO page table: a tree that hardware walks and writes while software maps, unmaps and harvests. Nobody waits for
//! anybody.
//!
//! ```text
//!  root (level 3) --> table (level 2) --> table (level 1) --> table (level 0) --> page
//!                           |                   |                   |
//!                        1 GiB leaf          2 MiB leaf          4 KiB leaf        each leaf carries D
//! ```
//!
//! * **Tables** are installed by compare-exchange into an absent entry, and stay until the whole `Table` is dropped.
//!   Two calls take one away: `map` puts a large leaf where a table without leaves was, `merge` one where a table of
//!   parts was. That table is retired. Its memory is freed when the epoch has passed, so that a walker that is inside may
//!   finish, **and** no device caches a pointer to it any more: pointers are counted, so a missing invalidation makes
//!   devices go by a retired table, as on real hardware, but never by freed memory.
//! * **Leaves** are installed by compare-exchange into an absent entry, removed by compare-exchange, and cleaned by
//!   compare-exchange. Hardware sets D by a compare-exchange that fails once the leaf is gone, so a removed leaf tells the
//!   last word about D.
//! * **A group** of entries that make up one leaf comes and goes entry by entry. Each entry describes the whole leaf, so a
//!   walk that hits one of them sees the leaf or nothing, never another leaf. What is said of D is the OR over all of
//!   them, and of a removed leaf the OR of what each said when it went.
//! * **Ownership.** Whoever maps, unmaps, protects or merges a range owns it for the time of the call: no two such calls
//!   overlap (the address space sees to that). Calls on disjoint ranges, walks and scans may run at any time. If
//!   two `map`s overlap all the same, one of them at least is refused and takes back what it installed; other calls that
//!   overlap end in one of their possible results, or in leaves that vanish. Memory stays safe.

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

pub use leaf::Leaf;
pub(crate) use page::TableRef;
pub use tree::Table;
pub(crate) use walk::Walk;

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests;
