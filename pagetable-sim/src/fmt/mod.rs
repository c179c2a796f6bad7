//! Page-table formats: the meaning of the bits of an entry.
//!
//! The table algorithms are written once, over [`Format`]. A format is one file: mostly constants,
//! and pure functions on an entry where it differs from the others. Levels count from the bottom: a
//! table of level 0 holds the smallest pages, the root has level `LEVELS - 1`.
//!
//! | format | levels | address | leaves | written, when |
//! |---|---|---|---|---|
//! | [`AmdV1`] | 3 to 6, by [`AmdHost`] | 39 to 64 bits | any 2^n from 4K, not 512G | D 6 is set |
//! | [`VtdSs`] | 3 to 5 | 39, 48, 57 bits | 4K 2M 1G | D 9 is set |
//! | [`X86_64`] | 4, 5 | 48, 57 bits, sign-extended | 4K 2M 1G | D 6 is set |
//! | [`ArmS1`] | 4, 4, 3 | 48 bits | 4K 2M 1G, or 16K 32M, or 64K 512M | DBM 51 set, 7 clear |
//! | [`Riscv`] | 3 to 5 | 39, 48, 57 bits, sign-extended | 64K, and one a level | D 7 is set |
//!
//! A leaf that is larger than the range that one entry of its level covers is a **group**: a power
//! of two of entries with the same value, naturally aligned, inside one table. Hardware sets D in
//! the entry that its walk goes through. So a group is dirty when any of its entries is, and clean
//! when all are.

mod amdv1;
mod arm_s1;
mod entry;
mod format;
mod reach;
mod riscv;
mod sizes;
mod vtdss;
mod x86_64;

pub use amdv1::{AmdHost, AmdV1};
pub use arm_s1::ArmS1;
pub(crate) use entry::AtomicIopte;
pub use entry::{Iopte, MakeClean};
pub use format::Format;
pub use reach::Reach;
pub use riscv::{Riscv, RiscvSv39, RiscvSv48, RiscvSv57};
pub use sizes::LeafSizes;
pub(crate) use sizes::granule;
pub use vtdss::VtdSs;
pub use x86_64::X86_64;
