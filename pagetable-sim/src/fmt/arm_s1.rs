//! Stage 1 tables of Arm's SMMU and processors (VMSAv8-64, "LPAE"), granule 4 KiB, with hardware management of the
//! dirty state.
//!
//! Layout of a descriptor, from the Arm Architecture Reference Manual for A-profile, DDI 0487, chapter "The AArch64
//! Virtual Memory System Architecture", stage 1 descriptors, which the SMMUv3 specification, IHI 0070, refers to:
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 0 | valid | present |
//! | 1 | table, page | 1: leads to a table; at the lowest level, a page. 0: a block |
//! | 6 | AP\[1\] | unprivileged requests may access: set, for requests of devices are unprivileged |
//! | 7 | AP\[2\] | read-only |
//! | 9:8 | SH | shareability, 3: inner |
//! | 10 | AF | accessed |
//! | 11 | nG | belongs to one address space |
//! | 47:12 | address | frame of the page, or of the next table |
//! | 51 | DBM | hardware may clear AP\[2\] |
//! | 53, 54 | PXN, UXN | no instruction fetches |
//!
//! The dirty state is not a bit of its own:
//!
//! | DBM | AP\[2\] | meaning |
//! |---|---|---|
//! | 1 | 1 | writable, clean |
//! | 1 | 0 | writable, written |
//! | 0 | 1 | read-only |
//!
//! So a write clears AP\[2\], and making a leaf clean **sets** it: in an entry whose leaf was unmapped meanwhile that
//! leaves a bit behind, which says nothing without the valid bit.
//!
//! Four levels translate 48 bits, from 0 on; blocks of 2 MiB and 1 GiB. The document counts levels down to 3 at the
//! bottom. Write-only does not exist and is refused. Leaves are born clean and accessed.

use dirtymap::Access;

use super::{Format, Iopte, MakeClean, Reach, TABLE_LG2, sealed, shape};

const VALID: u64 = 1 << 0;
const TABLE: u64 = 1 << 1;
const UNPRIVILEGED: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const AF: u64 = 1 << 10;
const NG: u64 = 1 << 11;
const ADDRESS_SHIFT: u32 = 12;
const ADDRESS: u64 = ((1 << 36) - 1) << ADDRESS_SHIFT;
const DBM: u64 = 1 << 51;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;

/// Stage 1 tables of Arm, granule 4 KiB: four levels, 48 bits of address, leaves of 4 KiB, 2 MiB and 1 GiB; written means
/// that DBM, bit 51, is set and read-only, bit 7, is not. Has no write-only leaves.
#[derive(Clone, Copy, Debug)]
pub struct ArmS1;

impl sealed::Sealed for ArmS1 {}

impl Format for ArmS1 {
    const NAME: &'static str = "Arm stage 1";
    const LEVELS: u32 = shape(4, 2);
    const INDEX_LG2: u32 = TABLE_LG2;
    const PAGE_LG2: u32 = shape(12, 3);
    const LEAF_LEVELS: u32 = shape(3, 2);
    const OUTPUT_LG2: u32 = 36 + Self::PAGE_LG2;
    const MAKE_CLEAN: MakeClean = MakeClean::Set(READ_ONLY);
    // Without invalidation by range: from as many granules on as a table has entries, everything.
    const REACH: Reach = Reach::Strides {
        max: (1 << (Self::PAGE_LG2 - 3)) - 1,
    };

    #[inline]
    fn is_present(entry: Iopte) -> bool {
        entry.0 & VALID != 0
    }

    #[inline]
    fn is_leaf(entry: Iopte, level: u32) -> bool {
        level == 0 || entry.0 & TABLE == 0
    }

    #[inline]
    fn leaf(phys: u64, access: Access, level: u32) -> Iopte {
        let page = if level == 0 { TABLE } else { 0 };
        let write = if access.writes() { DBM } else { 0 };
        let frame = phys >> Self::PAGE_LG2 << ADDRESS_SHIFT & ADDRESS;
        let attributes = UNPRIVILEGED | READ_ONLY | INNER_SHAREABLE | AF | NG | PXN | UXN;
        Iopte(VALID | page | attributes | write | frame)
    }

    #[inline]
    fn table(address: u64, _level: u32) -> Iopte {
        Iopte(VALID | TABLE | address & ADDRESS)
    }

    #[inline]
    fn table_address(entry: Iopte) -> u64 {
        entry.0 & ADDRESS
    }

    #[inline]
    fn output(entry: Iopte) -> u64 {
        (entry.0 & ADDRESS) >> ADDRESS_SHIFT << Self::PAGE_LG2
    }

    #[inline]
    fn access(entry: Iopte) -> Access {
        if entry.0 & DBM != 0 {
            Access::ReadWrite
        } else {
            Access::Read
        }
    }

    #[inline]
    fn grants(access: Access) -> bool {
        access.reads()
    }

    #[inline]
    fn written(entry: Iopte) -> Iopte {
        Iopte(entry.0 & !READ_ONLY | AF)
    }

    #[inline]
    fn is_dirty(entry: Iopte) -> bool {
        entry.0 & (DBM | READ_ONLY) == DBM
    }

    #[inline]
    fn worth_a_look(entry: Iopte, level: u32) -> u64 {
        // DBM, shifted on to the place of the bit that must be clear.
        let dirty = entry.0 >> (DBM / READ_ONLY).ilog2() & !entry.0 & READ_ONLY;
        dirty | if level == 0 { 0 } else { entry.0 & TABLE }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;

    type F = ArmS1;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let leaf = F::leaf(0x0000_f234_5678_9000, Access::ReadWrite, 0);
        assert_eq!(leaf.0, 0x0068_f234_5678_9fc3);
        assert_eq!(F::written(leaf).0, 0x0068_f234_5678_9f43);
        assert_eq!(
            F::leaf(0x4000_0000, Access::Read, 2).0,
            0x0060_0000_4000_0fc1
        );
        assert_eq!(F::table(0x7f00_dead_b000, 3).0, 0x7f00_dead_b003);
        assert_eq!(F::MAKE_CLEAN, MakeClean::Set(1 << 7));
        assert!(!F::is_dirty(F::leaf(0, Access::Read, 0)) && !F::grants(Access::Write));
    }
}
