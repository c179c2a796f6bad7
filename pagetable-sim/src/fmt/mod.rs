//! Page-table formats: what the bits of an entry mean.
//!
//! The table algorithms are written once, over [`Format`]; a format is one file of pure functions on an entry. Levels
//! count from the bottom: a table of level 0 holds the smallest pages, the root has level `LEVELS - 1`.
//!
//! | format | levels | address | leaves | written, when |
//! |---|---|---|---|---|
//! | [`AmdV1`] | 4, or 3 to 6 by [`AmdHost`] | 48 bits, 39 to 64 | any power of two from 4K on, but for 512G | D 6 is set |
//! | [`VtdSs`] | 3 to 5 | 39, 48, 57 bits | 4K 2M 1G | D 9 is set |
//! | [`X86_64`] | 4, 5 | 48, 57 bits, sign-extended | 4K 2M 1G | D 6 is set |
//! | [`ArmS1`] | 4, 4, 3 | 48 bits | 4K 2M 1G, or 16K 32M, or 64K 512M | DBM 51 is set and read-only 7 is not |
//! | [`Riscv`] | 3 to 5 | 39, 48, 57 bits, sign-extended | 64K, and one size at every level | D 7 is set |
//!
//! A leaf that is larger than what an entry of its level covers is a **group**: a power of two of entries with the same
//! value, naturally aligned, inside one table. Hardware sets D in the entry that its walk goes through, so a group is
//! dirty when any of its entries is, and clean when all are.

mod amdv1;
mod arm_s1;
mod reach;
mod riscv;
mod sizes;
mod vtdss;
mod x86_64;

pub use amdv1::{AmdHost, AmdV1};
pub use arm_s1::ArmS1;
pub use reach::Reach;
pub use riscv::{Riscv, RiscvSv39, RiscvSv48, RiscvSv57};
pub use sizes::LeafSizes;
pub use vtdss::VtdSs;
pub use x86_64::X86_64;

use dirtymap::sync::{AtomicU64, Ordering, TINY};
use dirtymap::{Access, Granule};

/// Entries of a table of 4 KiB, as a logarithm. Tiny in the model checker.
const INDEX_LG2: u32 = shape(9, 1);
/// Tables of host memory lie at multiples of 2^12 bytes, or of their own size if that is more.
const HOST_PAGE_LG2: u32 = 12;

/// `real`, or `tiny` in the model checker.
const fn shape(real: u32, tiny: u32) -> u32 {
    if TINY { tiny } else { real }
}

/// The value of one entry of an IO page table. Zero is "not present" in every format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Iopte(pub u64);

impl Iopte {
    /// The entry that translates nothing.
    pub const ABSENT: Iopte = Iopte(0);
    /// An entry that translates nothing and never will again: its table is about to go. Not present in every format,
    /// which then ignores all bits but those that say so.
    pub(crate) const FROZEN: Iopte = Iopte(1 << 58);
}

/// What makes a written leaf clean. A clean leaf stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MakeClean {
    /// Clears these bits.
    Clear(u64),
    /// Sets these bits.
    Set(u64),
}

impl MakeClean {
    /// The entry, clean.
    #[inline]
    pub(crate) fn of(self, entry: Iopte) -> Iopte {
        match self {
            MakeClean::Clear(bits) => Iopte(entry.0 & !bits),
            MakeClean::Set(bits) => Iopte(entry.0 | bits),
        }
    }

    /// Whether that would change `entry`.
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
    /// Entries of a table, as a logarithm; at most 13.
    const INDEX_LG2: u32;
    /// The size of the smallest page, as a logarithm.
    const PAGE_LG2: u32;
    /// How many levels, from the bottom, may hold leaves.
    const LEAF_LEVELS: u32;
    /// The bits of an entry that hold the number of a frame: of the page, or of the next table.
    const ADDRESS: u64;
    /// What the number of a table's frame counts, as a logarithm of bytes. Tables lie at multiples of it.
    const TABLE_LG2: u32 = HOST_PAGE_LG2;
    /// How many bits of physical address an entry can hold.
    const OUTPUT_LG2: u32 = Self::ADDRESS.count_ones() + Self::PAGE_LG2;
    /// The sizes of leaves, at most half a table each.
    const LEAF_SIZES: LeafSizes =
        one_size_a_level(Self::PAGE_LG2, Self::INDEX_LG2, Self::LEAF_LEVELS);
    /// The bits that say what devices may do.
    const ACCESS: u64;
    /// What turns a leaf that was written into the same leaf, clean.
    const MAKE_CLEAN: MakeClean;
    /// Whether the bits above those that the tables translate must all equal the highest of them: then the tables
    /// translate the lowest and the highest part of the address space, half of their reach each, and nothing between.
    const SIGN_EXTENDED: bool = false;
    /// What one invalidation command can name: it reaches at least what is asked for, and often more.
    const REACH: Reach;
    /// The bits that a walk sets in an entry that leads to a table; 0 if hardware leaves such entries alone.
    const TABLE_ACCESSED: u64 = 0;
    /// Three bits of an entry that leads to a table which hardware ignores there, and which are 0 in leaves: what software
    /// knows of the tables below. 0 if the format has no [`TABLE_ACCESSED`](Self::TABLE_ACCESSED).
    const KNOWN: u64 = 0;
    /// The bits that are not all 0 in an entry of a leaf of several entries, and all 0 in a leaf of one.
    const GROUPED: u64 = 0;
    /// The bits that are not all 0 in an entry that leads to a table, and all 0 in a leaf of one entry above the lowest level; 0 if
    /// a table is told by [`LEAF_SET`](Self::LEAF_SET).
    const TABLE_SET: u64 = 0;
    /// A bit that is set in every leaf above the lowest level, and in no entry that leads to a table.
    const LEAF_SET: u64 = 0;
    /// The bits that are 0 in every present entry: a walk that finds one of them set faults. 0 if there are none.
    const RESERVED: u64 = 0;

    /// How many bits of address the tables translate, at most 64.
    const WIDTH: u32 = Self::PAGE_LG2 + Self::LEVELS * Self::INDEX_LG2;
    /// The smallest page.
    const PAGE: Granule = granule(Self::PAGE_LG2);

    /// Whether the entry translates anything or leads to a table.
    fn is_present(entry: Iopte) -> bool;
    /// Whether a present entry of a table of `level` is a leaf, and does not lead to a table.
    fn is_leaf(entry: Iopte, level: u32) -> bool;
    /// A clean leaf of `size`, one of [`LEAF_SIZES`](Self::LEAF_SIZES), translating to `phys`, which is aligned to it.
    /// All entries of a group have this value.
    fn leaf(phys: u64, access: Access, size: Granule) -> Iopte;
    /// An entry of a table of `level` (1 or more) that leads to the table at the host address `address`, a multiple of
    /// 2^[`TABLE_LG2`](Self::TABLE_LG2).
    fn table(address: u64, level: u32) -> Iopte;
    /// The [`ACCESS`](Self::ACCESS) bits of a leaf that lets devices do `access`.
    fn access_bits(access: Access) -> u64;
    /// What a leaf lets devices do.
    fn access(entry: Iopte) -> Access;
    /// The leaf, written: as hardware leaves it when it translates a write.
    fn written(entry: Iopte) -> Iopte;
    /// How many entries the leaf `entry`, in a table of `level`, consists of, as a logarithm.
    #[inline]
    fn group_lg2(_entry: Iopte, _level: u32) -> u32 {
        0
    }
    /// The host address that [`table`](Self::table) was given.
    #[inline]
    fn table_address(entry: Iopte) -> u64 {
        (entry.0 & Self::ADDRESS) >> Self::ADDRESS.trailing_zeros() << Self::TABLE_LG2
    }
    /// The physical address that a leaf translates to: where all of it begins, for a group.
    #[inline]
    fn output(entry: Iopte) -> u64 {
        (entry.0 & Self::ADDRESS) >> Self::ADDRESS.trailing_zeros() << Self::PAGE_LG2
    }
    /// The leaf with other rights, and D as it was.
    #[inline]
    fn with_access(entry: Iopte, access: Access) -> Iopte {
        Iopte(entry.0 & !Self::ACCESS | Self::access_bits(access))
    }
    /// Whether a leaf was written: whether there is anything to make clean.
    #[inline]
    fn is_dirty(entry: Iopte) -> bool {
        Self::MAKE_CLEAN.changes(entry)
    }
    /// Not zero for every entry of a table of `level` that a scan for dirty leaves must look at: dirty leaves, and at
    /// level 1 and up entries that lead to tables. Zero for absent entries and for clean leaves of one entry.
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

    /// The size of the leaf `entry` in a table of `level`.
    #[inline]
    fn leaf_size(entry: Iopte, level: u32) -> Granule {
        granule(Self::PAGE_LG2 + level * Self::INDEX_LG2 + Self::group_lg2(entry, level))
    }

    /// The [`ADDRESS`](Self::ADDRESS) bits for the frame of `phys`.
    #[inline]
    fn frame_bits(phys: u64) -> u64 {
        phys >> Self::PAGE_LG2 << Self::ADDRESS.trailing_zeros() & Self::ADDRESS
    }

    /// The [`ADDRESS`](Self::ADDRESS) bits for the table at the host address `address`.
    #[inline]
    fn table_bits(address: u64) -> u64 {
        address >> Self::TABLE_LG2 << Self::ADDRESS.trailing_zeros() & Self::ADDRESS
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

/// The sizes of what single entries cover.
const fn one_size_a_level(page_lg2: u32, index_lg2: u32, levels: u32) -> LeafSizes {
    let mut sizes = LeafSizes::NONE;
    let mut level = 0;
    while level < levels {
        sizes = sizes.or(LeafSizes::only(granule(page_lg2 + level * index_lg2)));
        level += 1;
    }
    sizes
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
/// Changes of leaves are compare-exchanges: the new value follows from the whole old one. Hardware changes only entries without
/// D, so whoever clears D does not fight with it.
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

    /// Has the processor fetch the line that the entry lies in, where it can be told to.
    #[inline]
    pub(crate) fn prefetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: every x86-64 processor has it, and it accesses nothing that the program could see.
            unsafe { _mm_prefetch(std::ptr::from_ref(self).cast::<i8>(), _MM_HINT_T0) };
        }
    }

    /// Clears `bits`, whatever the others are.
    pub(crate) fn clear_bits(&self, bits: u64, order: Ordering) {
        self.0.fetch_and(!bits, order);
    }

    /// Replaces `old` by `new`; otherwise returns what is there.
    #[inline]
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
}
