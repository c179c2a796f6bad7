//! The peers, one file each.

mod bits;
mod btree;
mod dirtymap;
mod flat;
mod hibitset;
mod imbl;
pub mod naive_table;
mod rangemap;
mod roaring;
mod scc;
mod several;
mod skiplist;
mod two_levels;
mod vm_memory;
mod vm_memory_model;

pub use self::dirtymap::{Asymmetric, ThroughHandle, ThroughSpace};
pub use self::hibitset::HiBitSet;
pub use self::imbl::SwappedOrdMap;
pub use self::rangemap::LockedRangeMap;
pub use self::roaring::LockedRoaring;
pub use self::scc::SccTree;
pub use self::several::{ByHand, Several, Shared};
pub use btree::LockedBTree;
pub use flat::{Always, Fenced, Flat, Setting, Tested};
pub use skiplist::SkipList;
pub use two_levels::TwoLevels;
pub use vm_memory::VmMemory;
pub use vm_memory_model::VmMemoryModel;

/// The locked tree of areas that are objects of their own.
pub type CountedBTree = LockedBTree<
    std::sync::RwLock<std::collections::BTreeMap<u64, std::sync::Arc<::dirtymap::Mapping>>>,
>;

/// The locked tree with the lock of `parking_lot`.
pub type ParkingLotBTree =
    LockedBTree<parking_lot::RwLock<std::collections::BTreeMap<u64, ::dirtymap::Mapping>>>;
