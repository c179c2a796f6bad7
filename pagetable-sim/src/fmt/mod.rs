//! Page-table formats: what the bits of an entry mean.
//!
//! The table algorithms are written once, over [`Format`]; a format is one file of pure functions on an entry. Levels
//! count from the bottom: a table of level 0 holds the smallest pages, the root has level `LEVELS - 1`.
//!
//! | format | levels | address | leaves | written, when | made clean by |
//! |---|---|---|---|---|---|
//! | [`AmdV1`] | 4 | 48 bits | 4K 2M 1G | D 6 is set | `fetch_and` |
//! | [`VtdSs`] | 3 to 5 | 39, 48, 57 bits | 4K 2M 1G | D 9 is set | `fetch_and` |
//! | [`X86_64`] | 4, 5 | 48, 57 bits, sign-extended | 4K 2M 1G | D 6 is set | `fetch_and` |
//! | [`ArmS1`] | 4 | 48 bits | 4K 2M 1G | DBM 51 is set and read-only 7 is not | `fetch_or` |
//! | [`Riscv`] | 3 to 5 | 39, 48, 57 bits, sign-extended | one size at every level | D 7 is set | `fetch_and` |

mod amdv1;
mod arm_s1;
mod reach;
mod riscv;
mod vtdss;
mod x86_64;

pub use amdv1::AmdV1;
pub use arm_s1::ArmS1;
pub use reach::Reach;
pub use riscv::{Riscv, RiscvSv39, RiscvSv48, RiscvSv57};
pub use vtdss::VtdSs;
pub use x86_64::X86_64;

use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{Access, Granule};

/// Entries of a page that holds a table, as a logarithm: 512 entries fill 4 KiB. Tiny in the model checker.
pub(crate) const TABLE_LG2: u32 = if cfg!(dirtymap_loom) { 1 } else { 9 };

/// `real`, or `tiny` in the model checker.
const fn shape(real: u32, tiny: u32) -> u32 {
    if cfg!(dirtymap_loom) { tiny } else { real }
}

/// The value of one entry of an IO page table. Zero is "not present" in every format. Other values may be, too: making a
/// leaf clean that was unmapped meanwhile can leave a bit behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Iopte(pub u64);

impl Iopte {
    /// The entry that translates nothing.
    pub const ABSENT: Iopte = Iopte(0);
}

/// The one atomic operation that makes a leaf clean. It may hit an entry that changed since it was looked at, so it must
/// keep an absent entry absent, and a table a table at the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MakeClean {
    /// `fetch_and`: clears these bits.
    Clear(u64),
    /// `fetch_or`: sets these bits.
    Set(u64),
}

impl MakeClean {
    /// Whether the operation would change `entry`.
    #[inline]
    fn changes(self, entry: Iopte) -> bool {
        match self {
            MakeClean::Clear(bits) => entry.0 & bits != 0,
            MakeClean::Set(bits) => !entry.0 & bits != 0,
        }
    }
}

/// The meaning of an entry's bits, and the shape of the tables.
///
/// The functions are pure. Those that take a present entry of the wrong kind (a leaf for a table or the reverse) may
/// return nonsense, never panic.
///
/// Sealed: the tables follow the host addresses that [`table_address`](Self::table_address) returns, so memory safety
/// rests on each format keeping leaves and tables apart.
pub trait Format: sealed::Sealed + Send + Sync + 'static {
    /// What the format is called.
    const NAME: &'static str;
    /// How many levels of tables a walk goes through.
    const LEVELS: u32;
    /// Entries of a table, as a logarithm; at most 9.
    const INDEX_LG2: u32;
    /// The size of the smallest page, as a logarithm.
    const PAGE_LG2: u32;
    /// How many levels, from the bottom, may hold leaves.
    const LEAF_LEVELS: u32;
    /// How many bits of physical address an entry can hold.
    const OUTPUT_LG2: u32;
    /// What turns a leaf that was written into the same leaf, clean. A clean leaf stays as it is.
    const MAKE_CLEAN: MakeClean;
    /// Whether the bits above those that the tables translate must all equal the highest of them: then the tables
    /// translate the lowest and the highest part of the address space, half of their reach each, and nothing between.
    const SIGN_EXTENDED: bool = false;
    /// What one invalidation command can name: it reaches at least what is asked for, and often more.
    const REACH: Reach;
    /// The bits that a walk sets in an entry that leads to a table; 0 if hardware leaves such entries alone.
    const TABLE_ACCESSED: u64 = 0;
    /// The bits that are 0 in every present entry: a walk that finds one of them set faults. 0 if there are none.
    const RESERVED: u64 = 0;

    /// How many bits of address the tables translate.
    const WIDTH: u32 = Self::PAGE_LG2 + Self::LEVELS * Self::INDEX_LG2;
    /// The smallest page.
    const PAGE: Granule = granule(Self::PAGE_LG2);

    /// Whether the entry translates anything or leads to a table.
    fn is_present(entry: Iopte) -> bool;
    /// Whether a present entry of a table of `level` is a leaf, and does not lead to a table.
    fn is_leaf(entry: Iopte, level: u32) -> bool;
    /// A clean leaf for a table of `level`, translating to `phys`, which is aligned to the size of such a leaf.
    fn leaf(phys: u64, access: Access, level: u32) -> Iopte;
    /// An entry of a table of `level` (1 or more) that leads to the table at the host address `address`, a multiple of
    /// 4096.
    fn table(address: u64, level: u32) -> Iopte;
    /// The host address that [`table`](Self::table) was given.
    fn table_address(entry: Iopte) -> u64;
    /// The physical address that a leaf translates to.
    fn output(entry: Iopte) -> u64;
    /// What a leaf lets devices do.
    fn access(entry: Iopte) -> Access;
    /// The leaf after hardware has translated a write through it.
    fn written(entry: Iopte) -> Iopte;
    /// Whether a leaf was written: whether there is anything to make clean.
    #[inline]
    fn is_dirty(entry: Iopte) -> bool {
        Self::MAKE_CLEAN.changes(entry)
    }
    /// Not zero for every entry of a table of `level` that a scan for dirty leaves must look at: dirty leaves, and at
    /// level 1 and up entries that lead to tables. Zero for absent entries and clean leaves.
    ///
    /// Without branches on the entry: the scan passes eight clean entries by the OR of eight of these words.
    fn worth_a_look(entry: Iopte, level: u32) -> u64;

    /// Whether a leaf can let devices do `access` and nothing else.
    #[inline]
    fn grants(_access: Access) -> bool {
        true
    }

    /// The size of what one entry of a table of `level` covers.
    #[inline]
    fn size(level: u32) -> Granule {
        granule(Self::PAGE_LG2 + level * Self::INDEX_LG2)
    }

    /// Which entry of a table of `level` a walk to `iova` takes.
    #[inline]
    fn index(iova: u64, level: u32) -> usize {
        let shift = Self::PAGE_LG2 + level * Self::INDEX_LG2;
        (iova >> shift) as usize & ((1 << Self::INDEX_LG2) - 1)
    }
}

pub(crate) mod sealed {
    /// Keeps [`Format`](super::Format) to this crate.
    pub trait Sealed {}
}

/// The granule of 2^`lg2` bytes, for logarithms that a format's constants keep below 64.
pub(crate) const fn granule(lg2: u32) -> Granule {
    match Granule::from_lg2(if lg2 < 64 { lg2 as u8 } else { 63 }) {
        Some(granule) => granule,
        None => Granule::K4,
    }
}

/// An entry in memory, changed by hardware and software at once.
///
/// It wraps the atomic word, and is not a generic atomic of a typed entry (`atomic::Atomic<Iopte>`): such a type has no
/// `fetch_and` or `fetch_or`, and clearing D by a compare-exchange loop would fight with the hardware's own updates instead of just
/// clearing D.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct AtomicIopte(AtomicU64);

impl AtomicIopte {
    pub(crate) fn absent() -> Self {
        AtomicIopte(AtomicU64::new(Iopte::ABSENT.0))
    }

    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> Iopte {
        Iopte(self.0.load(order))
    }

    /// Replaces `old` by `new`; otherwise returns what is there.
    pub(crate) fn replace(
        &self,
        old: Iopte,
        new: Iopte,
        success: Ordering,
        failure: Ordering,
    ) -> Result<(), Iopte> {
        match self.0.compare_exchange(old.0, new.0, success, failure) {
            Ok(_) => Ok(()),
            Err(now) => Err(Iopte(now)),
        }
    }

    /// Changes the bits that `how` names in one step, whatever the others are; whether that changed anything.
    #[inline]
    pub(crate) fn make_clean(&self, how: MakeClean, order: Ordering) -> bool {
        let old = match how {
            MakeClean::Clear(bits) => self.0.fetch_and(!bits, order),
            MakeClean::Set(bits) => self.0.fetch_or(bits, order),
        };
        how.changes(Iopte(old))
    }
}
