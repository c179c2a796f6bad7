//! The host page table of AMD's IOMMU, version 1.
//!
//! Layout of an entry, from the AMD I/O Virtualization Technology (IOMMU) Specification, document
//! 48882:
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 0 | PR | present |
//! | 4:1 | | ignored; above leaves 3:1 are software's |
//! | 5 | A | accessed |
//! | 6 | D | written; leaves only |
//! | 11:9 | next level | level of the table it leads to, 0 for a leaf of the default size |
//! | 51:12 | address | frame of the page, or of the next table |
//! | 58:52 | | reserved, 0 |
//! | 60 | FC | force coherent; leaves only |
//! | 61 | IR | devices may read |
//! | 62 | IW | devices may write |
//!
//! The document counts levels from 1 at the bottom, so an entry of our level `l` leads to the
//! document's level `l`. Four levels translate 48 bits, six translate all 64: the topmost table of
//! six has 128 entries and no leaves.
//!
//! A leaf may have any other power of two from twice the page up to 2^51 bytes, but not 512 GiB:
//! next level 7 says that its size is in the address field. There the bits below the size are all
//! set, except for the highest of them, which is clear: 0 for 8 KiB, 01 for 16 KiB, 011 for 32 KiB.
//! Every entry that the leaf covers holds the same value, and hardware sets D in any of them.
//!
//! The address field holds the number of the frame, so it is free of the low bits at any page size:
//! 2 KiB pages exist here as they do in the kernel's mock of an IOMMU. The model checker gets two
//! levels, or three for three, and pages of 8 bytes, with the same bits: tables of two entries, or
//! of four where pages would have 2 KiB, so that there are groups.

use dirtymap::Granule;

use super::entry::{Iopte, MakeClean};
use super::format::{Format, INDEX_LG2, sealed, shape};
use super::reach::Reach;
use super::sizes::{LeafSizes, granule};

const PR: u64 = 1 << 0;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const NEXT_LEVEL_SHIFT: u32 = 9;
const NEXT_LEVEL: u64 = 0b111 << NEXT_LEVEL_SHIFT;
const SIZED: u64 = 7 << NEXT_LEVEL_SHIFT;
const ADDRESS_SHIFT: u32 = 12;
const ADDRESS: u64 = ((1 << 40) - 1) << ADDRESS_SHIFT;
const FC: u64 = 1 << 60;
const IR: u64 = 1 << 61;
const IW: u64 = 1 << 62;
const RESERVED: u64 = 0x7f << 52;

/// The host page table of AMD's IOMMU, version 1, of `N` levels, 3 to 6, and with pages of 2^`P`
/// bytes, 11 or 12: 39, 48, 57 or 64 bits of address at 4 KiB, leaves of any power of two from a
/// page to 2^51 bytes except for 2^39, D in bit 6.
#[derive(Clone, Copy, Debug)]
pub struct AmdHost<const N: u32, const P: u32 = 12>;

/// Four levels: 48 bits of address.
pub type AmdV1 = AmdHost<4>;

impl sealed::Sealed for AmdHost<3> {}
impl sealed::Sealed for AmdHost<4> {}
impl sealed::Sealed for AmdHost<5> {}
impl sealed::Sealed for AmdHost<6> {}
impl sealed::Sealed for AmdHost<3, 11> {}
impl sealed::Sealed for AmdHost<4, 11> {}

impl<const N: u32, const P: u32> Format for AmdHost<N, P>
where
    Self: sealed::Sealed,
{
    const NAME: &'static str = "AMD v1";
    const LEVELS: u32 = shape(N, if N == 3 { 3 } else { 2 });
    const INDEX_LG2: u32 = shape(INDEX_LG2, if P == 11 { 2 } else { 1 });
    const PAGE_LG2: u32 = shape(P, 3);
    const WIDTH: u32 = {
        let bits = Self::PAGE_LG2 + Self::LEVELS * Self::INDEX_LG2;
        if bits < 64 { bits } else { 64 }
    };
    const LEAF_LEVELS: u32 = if Self::LEVELS < 5 { Self::LEVELS } else { 5 };
    const ADDRESS: u64 = ADDRESS;
    const PRESENT: u64 = PR;
    const LEAF: u64 = PR | FC;
    const TABLE: u64 = PR | IR | IW;
    const READ: u64 = IR;
    const WRITE: u64 = IW;
    const WRITE_ONLY: bool = true;
    const WRITTEN: u64 = A | D;
    const LEAF_SIZES: LeafSizes = {
        // Half of a table at the highest level that may hold leaves.
        let half = Self::PAGE_LG2 + Self::LEAF_LEVELS * Self::INDEX_LG2 - 1;
        let largest = granule(if half < 51 { half } else { 51 });
        LeafSizes::up_to(largest)
            .without(LeafSizes::up_to(granule(Self::PAGE_LG2 - 1)))
            .without(LeafSizes::only(granule(39)))
    };
    const MAKE_CLEAN: MakeClean = MakeClean::Clear(D);
    const REACH: Reach = Reach::Aligned { max_lg2: 52 };
    const TABLE_ACCESSED: u64 = A;
    const KNOWN: u64 = 0b111 << 1;
    const GROUPED: u64 = NEXT_LEVEL;
    const TABLE_SET: u64 = NEXT_LEVEL;
    const RESERVED: u64 = RESERVED;

    #[inline]
    fn is_large_leaf(entry: Iopte) -> bool {
        let next = entry.0 & NEXT_LEVEL;
        next == 0 || next == SIZED
    }

    #[inline]
    fn size_bits(size: Granule) -> u64 {
        let above_page = u32::from(size.lg2()) - Self::PAGE_LG2;
        if above_page.is_multiple_of(Self::INDEX_LG2) {
            0
        } else {
            SIZED | ((1 << (above_page - 1)) - 1) << ADDRESS_SHIFT
        }
    }

    #[inline]
    fn table(address: u64, level: u32) -> Iopte {
        let next = u64::from(level) << NEXT_LEVEL_SHIFT & NEXT_LEVEL;
        Iopte(Self::TABLE | next | Self::table_bits(address))
    }

    #[inline]
    fn group_lg2(entry: Iopte, level: u32) -> u32 {
        if entry.0 & NEXT_LEVEL != SIZED {
            return 0;
        }
        let above_page = 1 + (entry.0 >> ADDRESS_SHIFT).trailing_ones();
        above_page
            .saturating_sub(level * Self::INDEX_LG2)
            .min(Self::INDEX_LG2)
    }

    #[inline]
    fn output(entry: Iopte) -> u64 {
        let frame = (entry.0 & ADDRESS) >> ADDRESS_SHIFT;
        let size = if entry.0 & NEXT_LEVEL == SIZED {
            frame & !(frame + 1)
        } else {
            0
        };
        (frame ^ size) << Self::PAGE_LG2
    }

    #[inline]
    fn worth_a_look(entry: Iopte, level: u32) -> u64 {
        // Above the lowest level: all but leaves of one entry.
        entry.0 & if level == 0 { D } else { D | NEXT_LEVEL }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use dirtymap::Access;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let leaf = AmdV1::leaf(0x000f_1234_5678_9000, Access::ReadWrite, Granule::K4);
        assert_eq!(leaf.0, 0x700f_1234_5678_9001);
        assert_eq!(AmdV1::written(leaf).0, 0x700f_1234_5678_9061);
        let table = AmdV1::table(0x7f00_dead_b000, 3);
        assert_eq!(table.0, 0x6000_7f00_dead_b601);
        assert_eq!(AmdV1::table_address(table), 0x7f00_dead_b000);
        assert_eq!(AmdV1::MAKE_CLEAN, MakeClean::Clear(1 << 6));
    }

    #[test]
    fn the_size_of_a_leaf_is_a_run_of_ones_in_its_address() {
        for (lg2, ones) in [
            (13, 0),
            (14, 0x1000),
            (15, 0x3000),
            (16, 0x7000),
            (20, 0x7_f000),
            (29, 0xfff_f000),
        ] {
            let size = granule(lg2);
            let leaf = AmdV1::leaf(0x40_0000_0000, Access::Read, size);
            assert_eq!(leaf.0, 0x3000_0040_0000_0e01 | ones, "{size}");
            let level = (lg2 - 12) / 9;
            assert_eq!(AmdV1::leaf_size(leaf, level), size);
            assert_eq!(AmdV1::output(leaf), 0x40_0000_0000);
        }
        assert_eq!(AmdV1::leaf(0, Access::Read, Granule::M2).0 & NEXT_LEVEL, 0);
    }

    #[test]
    fn every_power_of_two_is_a_leaf_but_for_512_gib() {
        let sizes: Vec<_> = AmdHost::<6>::LEAF_SIZES.iter().map(Granule::lg2).collect();
        let expect: Vec<_> = (12..=51).filter(|lg2| *lg2 != 39).collect();
        assert_eq!(sizes, expect);
        assert_eq!(AmdV1::LEAF_SIZES.largest(), Some(granule(47)));
        assert_eq!(
            [AmdV1::WIDTH, AmdHost::<5>::WIDTH, AmdHost::<6>::WIDTH],
            [48, 57, 64]
        );
        assert_eq!(
            AmdHost::<4, 11>::LEAF_SIZES.iter().next(),
            Some(granule(11))
        );
    }
}
