//! The peers, one file each.

mod btree;
mod dirtymap;
mod flat;
mod imbl;
pub mod naive_table;
mod rangemap;
mod scc;
mod skiplist;
mod vm_memory;

pub use self::dirtymap::{ThroughHandle, ThroughSpace};
pub use self::imbl::SwappedOrdMap;
pub use self::rangemap::LockedRangeMap;
pub use self::scc::SccTree;
pub use btree::LockedBTree;
pub use flat::Flat;
pub use skiplist::SkipList;
pub use vm_memory::VmMemory;

/// The locked tree with the lock of `parking_lot`.
pub type ParkingLotBTree =
    LockedBTree<parking_lot::RwLock<std::collections::BTreeMap<u64, ::dirtymap::Mapping>>>;
