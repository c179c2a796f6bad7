//! The peers, one file each.

mod btree;
mod dirtymap;
mod flat;
mod vm_memory;

pub use self::dirtymap::{ThroughHandle, ThroughSpace};
pub use btree::LockedBTree;
pub use flat::Flat;
pub use vm_memory::VmMemory;
