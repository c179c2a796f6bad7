//! The host page table of AMD's IOMMU, version 1.
//!
//! Layout of an entry, from the AMD I/O Virtualization Technology (IOMMU) Specification, document 48882:
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 0 | PR | present |
//! | 5 | A | accessed |
//! | 6 | D | written; leaves only |
//! | 11:9 | next level | level of the table it leads to, 0 for a leaf of the default size |
//! | 51:12 | address | frame of the page, or of the next table |
//! | 58:52 | | reserved, 0 |
//! | 60 | FC | force coherent; leaves only |
//! | 61 | IR | devices may read |
//! | 62 | IW | devices may write |
//!
//! Four levels translate 48 bits; leaves of 4 KiB, 2 MiB and 1 GiB. The document counts levels from 1 at the bottom, so
//! an entry of our level `l` leads to the document's level `l`. Leaves of other sizes (next level 7, replicated
//! entries) are not used.
//!
//! The model checker gets two levels of two entries and pages of 8 bytes: four pages in all, with the same bits. The
//! address field holds the number of the frame, so it is free of the low bits at any page size.

use dirtymap::Access;

use super::{Format, Iopte, MakeClean, Reach, TABLE_LG2, sealed, shape};

const PR: u64 = 1 << 0;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const NEXT_LEVEL_SHIFT: u32 = 9;
const NEXT_LEVEL: u64 = 0b111 << NEXT_LEVEL_SHIFT;
const ADDRESS_SHIFT: u32 = 12;
const ADDRESS: u64 = ((1 << 40) - 1) << ADDRESS_SHIFT;
const FC: u64 = 1 << 60;
const IR: u64 = 1 << 61;
const IW: u64 = 1 << 62;
const RESERVED: u64 = 0x7f << 52;

/// The host page table of AMD's IOMMU, version 1: four levels, 48 bits of address, leaves of 4 KiB, 2 MiB and 1 GiB, D
/// in bit 6.
#[derive(Clone, Copy, Debug)]
pub struct AmdV1;

impl sealed::Sealed for AmdV1 {}

impl Format for AmdV1 {
    const NAME: &'static str = "AMD v1";
    const LEVELS: u32 = shape(4, 2);
    const INDEX_LG2: u32 = TABLE_LG2;
    const PAGE_LG2: u32 = shape(12, 3);
    const LEAF_LEVELS: u32 = shape(3, 2);
    const OUTPUT_LG2: u32 = 40 + Self::PAGE_LG2;
    const MAKE_CLEAN: MakeClean = MakeClean::Clear(D);
    const REACH: Reach = Reach::Aligned { max_lg2: 52 };
    const TABLE_ACCESSED: u64 = A;
    const RESERVED: u64 = RESERVED;

    #[inline]
    fn is_present(entry: Iopte) -> bool {
        entry.0 & PR != 0
    }

    #[inline]
    fn is_leaf(entry: Iopte, _level: u32) -> bool {
        entry.0 & NEXT_LEVEL == 0
    }

    #[inline]
    fn leaf(phys: u64, access: Access, _level: u32) -> Iopte {
        let read = if access.reads() { IR } else { 0 };
        let write = if access.writes() { IW } else { 0 };
        let frame = phys >> Self::PAGE_LG2 << ADDRESS_SHIFT & ADDRESS;
        Iopte(PR | FC | read | write | frame)
    }

    #[inline]
    fn table(address: u64, level: u32) -> Iopte {
        let next = u64::from(level) << NEXT_LEVEL_SHIFT & NEXT_LEVEL;
        Iopte(PR | IR | IW | next | address & ADDRESS)
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
        match (entry.0 & IR != 0, entry.0 & IW != 0) {
            (true, true) => Access::ReadWrite,
            (false, true) => Access::Write,
            (_, false) => Access::Read,
        }
    }

    #[inline]
    fn written(entry: Iopte) -> Iopte {
        Iopte(entry.0 | A | D)
    }

    #[inline]
    fn worth_a_look(entry: Iopte, level: u32) -> u64 {
        entry.0 & if level == 0 { D } else { D | NEXT_LEVEL }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let leaf = AmdV1::leaf(0x000f_1234_5678_9000, Access::ReadWrite, 0);
        assert_eq!(leaf.0, 0x700f_1234_5678_9001);
        assert_eq!(AmdV1::written(leaf).0, 0x700f_1234_5678_9061);
        let table = AmdV1::table(0x7f00_dead_b000, 3);
        assert_eq!(table.0, 0x6000_7f00_dead_b601);
        assert_eq!(AmdV1::table_address(table), 0x7f00_dead_b000);
        assert_eq!(AmdV1::MAKE_CLEAN, MakeClean::Clear(1 << 6));
    }
}
