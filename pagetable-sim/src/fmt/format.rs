//! The definition of a format, and the parts that all formats share.

use dirtymap::sync::TINY;
use dirtymap::{Access, Granule};

use super::entry::{Iopte, MakeClean};
use super::reach::Reach;
use super::sizes::{LeafSizes, granule, one_size_a_level};

/// Entries of a table of 4 KiB, as a logarithm. Tiny in the model checker.
pub(super) const INDEX_LG2: u32 = shape(9, 1);
/// Tables of host memory lie at multiples of 2^12 bytes, or of their own size if that is more.
pub(super) const HOST_PAGE_LG2: u32 = 12;

/// `real`, or `tiny` in the model checker.
pub(super) const fn shape(real: u32, tiny: u32) -> u32 {
    if TINY { tiny } else { real }
}

/// The meaning of an entry's bits, and the shape of the tables.
///
/// The functions are pure. Those that take a present entry may return nonsense for one of the wrong
/// kind (a leaf for a table or the reverse), and never panic.
///
/// Sealed: the tables follow the host addresses that [`table_address`](Self::table_address)
/// returns, so memory safety rests on each format keeping leaves and tables apart.
///
/// ```
/// use dirtymap::{Access, Granule};
/// use pagetable_sim::{Format, VtdSs};
///
/// fn clean_and_written<F: Format>() -> (u64, u64) {
///     let leaf = F::leaf(0x20_0000, Access::ReadWrite, Granule::M2);
///     (leaf.0, F::written(leaf).0)
/// }
/// // Read, write and page size; then accessed and dirty as well.
/// assert_eq!(clean_and_written::<VtdSs>(), (0x20_0083, 0x20_0383));
/// ```
pub trait Format: sealed::Sealed + Send + Sync + 'static {
    /// The name of the format.
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
    /// The unit in which the number of a table's frame counts, as a logarithm of bytes. Tables lie
    /// at multiples of it.
    const TABLE_LG2: u32 = HOST_PAGE_LG2;
    /// How many bits of physical address an entry can hold.
    const OUTPUT_LG2: u32 = Self::ADDRESS.count_ones() + Self::PAGE_LG2;
    /// The sizes of leaves, at most half a table each.
    const LEAF_SIZES: LeafSizes =
        one_size_a_level(Self::PAGE_LG2, Self::INDEX_LG2, Self::LEAF_LEVELS);
    /// The bits that are not all 0 in a present entry, and all 0 in any other.
    const PRESENT: u64;
    /// The bits that are set in every leaf.
    const LEAF: u64;
    /// The bits that are set in every entry that leads to a table.
    const TABLE: u64;
    /// The bit of a leaf that lets devices read; 0 if every leaf does.
    const READ: u64;
    /// The bit of a leaf that lets devices write.
    const WRITE: u64;
    /// Whether there are leaves that devices may write and not read.
    const WRITE_ONLY: bool = false;
    /// The bits that a walk for a write sets in a leaf; 0 if [`written`](Self::written) says more.
    const WRITTEN: u64 = 0;
    /// The change that makes a written leaf clean.
    const MAKE_CLEAN: MakeClean;
    /// Whether the bits above those that the tables translate must all equal the highest of them:
    /// then the tables translate the lowest and the highest part of the address space, half of
    /// their reach each, and nothing between.
    const SIGN_EXTENDED: bool = false;
    /// The ranges that one invalidation command can name: at least the range that is asked for, and
    /// often more.
    const REACH: Reach;
    /// The bits that a walk sets in an entry that leads to a table; 0 if hardware leaves such
    /// entries alone.
    const TABLE_ACCESSED: u64 = 0;
    /// Three bits of an entry that leads to a table which hardware ignores there, and which are 0
    /// in leaves: the software's state of the tables below. 0 if the format has no
    /// [`TABLE_ACCESSED`](Self::TABLE_ACCESSED).
    const KNOWN: u64 = 0;
    /// The bits that are not all 0 in an entry of a leaf of several entries, and all 0 in a leaf of
    /// one.
    const GROUPED: u64 = 0;
    /// The bits that are not all 0 in an entry that leads to a table, and all 0 in a leaf of one
    /// entry above the lowest level; 0 if [`LEAF_SET`](Self::LEAF_SET) tells them apart.
    const TABLE_SET: u64 = 0;
    /// A bit that is set in every leaf above the lowest level, and in no entry that leads to a
    /// table; 0 if [`TABLE_SET`](Self::TABLE_SET) tells them apart.
    const LEAF_SET: u64 = 0;
    /// The bits that are 0 in every present entry: a walk that finds one of them set faults. 0 if
    /// there are none.
    const RESERVED: u64 = 0;

    /// How many bits of address the tables translate, at most 64.
    const WIDTH: u32 = Self::PAGE_LG2 + Self::LEVELS * Self::INDEX_LG2;
    /// The smallest page.
    const PAGE: Granule = granule(Self::PAGE_LG2);

    /// Whether the entry translates anything or leads to a table.
    #[inline]
    fn is_present(entry: Iopte) -> bool {
        entry.0 & Self::PRESENT != 0
    }

    /// Whether a present entry of a table of `level` is a leaf. Below the lowest tables there are
    /// pages only.
    #[inline]
    fn is_leaf(entry: Iopte, level: u32) -> bool {
        level == 0 || Self::is_large_leaf(entry)
    }

    /// Whether a present entry above the lowest level is a leaf, and does not lead to a table.
    #[inline]
    fn is_large_leaf(entry: Iopte) -> bool {
        if Self::LEAF_SET != 0 {
            entry.0 & Self::LEAF_SET != 0
        } else {
            entry.0 & Self::TABLE_SET == 0
        }
    }

    /// A clean leaf of `size`, one of [`LEAF_SIZES`](Self::LEAF_SIZES), that translates to `phys`,
    /// which is aligned to it. All entries of a group have this value.
    #[inline]
    fn leaf(phys: u64, access: Access, size: Granule) -> Iopte {
        let (rights, size) = (Self::access_bits(access), Self::size_bits(size));
        Iopte(Self::LEAF | rights | size | Self::frame_bits(phys))
    }

    /// The bits of a leaf that say its size.
    #[inline]
    fn size_bits(size: Granule) -> u64 {
        if size == Self::PAGE {
            0
        } else {
            Self::LEAF_SET
        }
    }

    /// An entry of a table of `level` (1 or more) that leads to the table at the host address
    /// `address`, a multiple of 2^[`TABLE_LG2`](Self::TABLE_LG2).
    #[inline]
    fn table(address: u64, _level: u32) -> Iopte {
        Iopte(Self::TABLE | Self::table_bits(address))
    }

    /// The bits of a leaf that lets devices do `access`, one that it [`grants`](Self::grants).
    #[inline]
    fn access_bits(access: Access) -> u64 {
        let read = if access.reads() { Self::READ } else { 0 };
        let write = if access.writes() { Self::WRITE } else { 0 };
        read | write
    }

    /// The rights that a leaf grants to devices.
    #[inline]
    fn access(entry: Iopte) -> Access {
        let reads = !Self::WRITE_ONLY || entry.0 & Self::READ != 0;
        match (reads, entry.0 & Self::WRITE != 0) {
            (true, true) => Access::ReadWrite,
            (false, true) => Access::Write,
            (_, false) => Access::Read,
        }
    }

    /// Whether a leaf can let devices do `access` and nothing else.
    #[inline]
    fn grants(access: Access) -> bool {
        Self::WRITE_ONLY || access.reads()
    }

    /// The leaf with other rights, and D as it was.
    #[inline]
    fn with_access(entry: Iopte, access: Access) -> Iopte {
        Iopte(entry.0 & !(Self::READ | Self::WRITE) | Self::access_bits(access))
    }

    /// The leaf, written: as hardware leaves it when it translates a write.
    #[inline]
    fn written(entry: Iopte) -> Iopte {
        Iopte(entry.0 | Self::WRITTEN)
    }

    /// Whether a leaf was written: whether there is anything to make clean.
    #[inline]
    fn is_dirty(entry: Iopte) -> bool {
        Self::MAKE_CLEAN.changes(entry)
    }

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

    /// Not zero for every entry of a table of `level` that a scan for dirty leaves must look at:
    /// dirty leaves, and at level 1 and up entries that lead to tables. Zero for absent entries and
    /// for clean leaves of one entry.
    ///
    /// Without branches on the entry: the scan passes eight clean entries by the OR of eight of
    /// these words. As it stands, for formats with [`LEAF_SET`](Self::LEAF_SET) whose D is a bit
    /// that a write sets, and whose [`TABLE`](Self::TABLE) has bit 0.
    #[inline]
    fn worth_a_look(entry: Iopte, level: u32) -> u64 {
        // LEAF_SET, shifted to bit 0, is clear in entries that lead to tables; bit 0 itself is set.
        let table = entry.0 & !(entry.0 >> Self::LEAF_SET.ilog2()) & 1;
        let MakeClean::Clear(dirty) = Self::MAKE_CLEAN else {
            return u64::MAX;
        };
        entry.0 & dirty | if level == 0 { 0 } else { table }
    }

    /// The size of the range that one entry of a table of `level` covers.
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
