//! Stage 1 tables of Arm's SMMU and processors (VMSAv8-64, "LPAE"), granules of 4, 16 and 64 KiB,
//! with hardware management of the dirty state.
//!
//! Layout of a descriptor, from the Arm Architecture Reference Manual for A-profile, DDI 0487,
//! chapter "The AArch64 Virtual Memory System Architecture", stage 1 descriptors, which the SMMUv3
//! specification, IHI 0070, refers to:
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 0 | valid | present |
//! | 1 | table, page | 1: leads to a table; at the lowest level, a page. 0: a block |
//! | 6 | AP\[1\] | unprivileged requests may access, such as those of devices: set |
//! | 7 | AP\[2\] | read-only |
//! | 9:8 | SH | shareability, 3: inner |
//! | 10 | AF | accessed |
//! | 11 | nG | belongs to one address space |
//! | 47:12, 47:14, 47:16 | address | of the page, or of the next table |
//! | 51 | DBM | hardware may clear AP\[2\] |
//! | 53, 54 | PXN, UXN | no instruction fetches |
//! | 55 | for software | not written before the leaf became read-only |
//!
//! The dirty state is not a bit of its own:
//!
//! | DBM | AP\[2\] | 55 | meaning |
//! |---|---|---|---|
//! | 1 | 1 | 1 | writable, clean |
//! | 1 | 0 | - | writable, written |
//! | 0 | 1 | 1 | read-only, clean |
//! | 0 | 1 | 0 | read-only, written while it was writable |
//!
//! So a write clears AP\[2\], and making a leaf clean **sets** it. Hardware cannot say of a
//! read-only leaf that it was written; bit 55, which hardware ignores, keeps that when a leaf is
//! write-protected.
//!
//! | granule | levels | entries | leaves |
//! |---|---|---|---|
//! | 4 KiB | 4 | 512 | 4 KiB, 2 MiB, 1 GiB |
//! | 16 KiB | 4, two entries in the topmost table | 2048 | 16 KiB, 32 MiB |
//! | 64 KiB | 3, 64 entries in the topmost table | 8192 | 64 KiB, 512 MiB |
//!
//! All translate 48 bits, from 0 on. The document counts levels down to 3 at the bottom. Write-only
//! does not exist and is refused. Leaves are born clean and accessed.

use dirtymap::{Access, Granule};

use super::entry::{Iopte, MakeClean};
use super::format::{Format, HOST_PAGE_LG2, INDEX_LG2, sealed, shape};
use super::reach::Reach;

const VALID: u64 = 1 << 0;
const TABLE: u64 = 1 << 1;
const UNPRIVILEGED: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const AF: u64 = 1 << 10;
const NG: u64 = 1 << 11;
const DBM: u64 = 1 << 51;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
const UNWRITTEN: u64 = 1 << 55;
/// How many bits of address the tables translate and hold.
const BITS: u32 = 48;

/// Stage 1 tables of Arm with a granule of 2^`P` bytes, 12, 14 or 16: 48 bits of address, leaves of
/// 4 KiB, 2 MiB and 1 GiB, or of 16 KiB and 32 MiB, or of 64 KiB and 512 MiB; written means that
/// DBM, bit 51, is set and read-only, bit 7, is not. Has no write-only leaves.
#[derive(Clone, Copy, Debug)]
pub struct ArmS1<const P: u32 = 12>;

impl sealed::Sealed for ArmS1<12> {}
impl sealed::Sealed for ArmS1<14> {}
impl sealed::Sealed for ArmS1<16> {}

impl<const P: u32> Format for ArmS1<P>
where
    Self: sealed::Sealed,
{
    const NAME: &'static str = "Arm stage 1";
    const LEVELS: u32 = shape(if P == 16 { 3 } else { 4 }, 2);
    const INDEX_LG2: u32 = shape(P - 3, INDEX_LG2);
    const PAGE_LG2: u32 = shape(P, 3);
    const WIDTH: u32 = shape(BITS, Self::PAGE_LG2 + Self::LEVELS * Self::INDEX_LG2);
    const LEAF_LEVELS: u32 = shape(if P == 12 { 3 } else { 2 }, 2);
    const ADDRESS: u64 = ((1 << BITS) - 1) & !((1 << P) - 1);
    const TABLE_LG2: u32 = shape(P, HOST_PAGE_LG2);
    const PRESENT: u64 = VALID;
    const LEAF: u64 = {
        let attributes = UNPRIVILEGED | INNER_SHAREABLE | AF | NG | PXN | UXN;
        VALID | attributes | READ_ONLY | UNWRITTEN
    };
    const TABLE: u64 = VALID | TABLE;
    const READ: u64 = 0;
    const WRITE: u64 = DBM;
    const TABLE_SET: u64 = TABLE;
    const MAKE_CLEAN: MakeClean = MakeClean::Set(READ_ONLY | UNWRITTEN);
    // Without invalidation by range: from as many granules on as a table has entries, everything.
    const REACH: Reach = Reach::Strides {
        max: (1 << (Self::PAGE_LG2 - 3)) - 1,
    };

    #[inline]
    fn size_bits(size: Granule) -> u64 {
        if size == Self::PAGE { TABLE } else { 0 }
    }

    #[inline]
    fn written(entry: Iopte) -> Iopte {
        if entry.0 & DBM != 0 {
            Iopte(entry.0 & !READ_ONLY | AF)
        } else {
            Iopte(entry.0 & !UNWRITTEN)
        }
    }

    #[inline]
    fn with_access(entry: Iopte, access: Access) -> Iopte {
        let bare = Self::MAKE_CLEAN.of(entry).0 & !DBM | Self::access_bits(access);
        if Self::is_dirty(entry) {
            Self::written(Iopte(bare))
        } else {
            Iopte(bare)
        }
    }

    #[inline]
    fn is_dirty(entry: Iopte) -> bool {
        entry.0 & (DBM | READ_ONLY) == DBM || entry.0 & (VALID | DBM | UNWRITTEN) == VALID
    }

    #[inline]
    fn worth_a_look(entry: Iopte, level: u32) -> u64 {
        // DBM, shifted on to the place of the bit that must be clear.
        let written = entry.0 >> (DBM / READ_ONLY).ilog2() & !entry.0 & READ_ONLY;
        // The same for VALID, with two bits that must be clear.
        let to = UNWRITTEN.ilog2();
        let protected = entry.0 << to & !entry.0 & !(entry.0 << (to - DBM.ilog2())) & UNWRITTEN;
        written | protected | if level == 0 { 0 } else { entry.0 & TABLE }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;

    type F = ArmS1;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let leaf = F::leaf(0x0000_f234_5678_9000, Access::ReadWrite, Granule::K4);
        assert_eq!(leaf.0, 0x00e8_f234_5678_9fc3);
        assert_eq!(F::written(leaf).0, 0x00e8_f234_5678_9f43);
        assert_eq!(
            F::leaf(0x4000_0000, Access::Read, Granule::G1).0,
            0x00e0_0000_4000_0fc1
        );
        assert_eq!(F::table(0x7f00_dead_b000, 3).0, 0x7f00_dead_b003);
        assert_eq!(F::MAKE_CLEAN, MakeClean::Set(1 << 7 | 1 << 55));
        assert!(!F::is_dirty(F::leaf(0, Access::Read, F::PAGE)) && !F::grants(Access::Write));
    }

    #[test]
    fn a_write_is_remembered_while_the_leaf_is_read_only() {
        let leaf = F::leaf(0x5000, Access::ReadWrite, F::PAGE);
        for leaf in [leaf, F::written(leaf)] {
            let protected = F::with_access(leaf, Access::Read);
            assert_eq!(protected.0 & (DBM | READ_ONLY), READ_ONLY);
            assert_eq!(F::is_dirty(protected), F::is_dirty(leaf));
            assert_eq!(F::worth_a_look(protected, 0) != 0, F::is_dirty(leaf));
            assert!(!F::is_dirty(F::MAKE_CLEAN.of(protected)));
            assert_eq!(
                F::is_dirty(F::with_access(protected, Access::ReadWrite)),
                F::is_dirty(leaf)
            );
        }
    }

    #[test]
    fn granules_differ_in_levels_blocks_and_address_bits() {
        fn sizes<F: Format>() -> (Vec<u8>, u32, u32) {
            (
                F::LEAF_SIZES.iter().map(Granule::lg2).collect(),
                F::LEVELS,
                F::OUTPUT_LG2,
            )
        }
        assert_eq!(sizes::<ArmS1>(), (vec![12, 21, 30], 4, 48));
        assert_eq!(sizes::<ArmS1<14>>(), (vec![14, 25], 4, 48));
        assert_eq!(sizes::<ArmS1<16>>(), (vec![16, 29], 3, 48));
        type F64 = ArmS1<16>;
        let leaf = F64::leaf(0x0000_f234_5678_0000, Access::ReadWrite, F64::PAGE);
        assert_eq!(leaf.0, 0x00e8_f234_5678_0fc3);
        assert_eq!(F64::table(0x7f00_dead_0000, 1).0, 0x7f00_dead_0003);
    }
}
