//! First-stage tables of RISC-V: Sv39, Sv48 and Sv57.
//!
//! Layout of an entry, from The RISC-V Instruction Set Manual, volume II: Privileged Architecture,
//! chapter "Supervisor-Level ISA", which the RISC-V IOMMU Architecture Specification refers to:
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 0 | V | present |
//! | 1 | R | devices may read |
//! | 2 | W | devices may write |
//! | 3 | X | instruction fetches; left 0 |
//! | 4 | U | user requests may access: set in leaves, for requests of devices are user requests |
//! | 6 | A | accessed; leaves only |
//! | 7 | D | written; leaves only |
//! | 53:10 | PPN | frame of the page, or of the next table |
//! | 60:54 | | reserved, 0 |
//! | 63 | N | one of 16 entries of a contiguous leaf (Svnapot) |
//!
//! An entry with R, W or X is a leaf, at any level: Sv39 has leaves of 4 KiB, 2 MiB and 1 GiB, Sv48
//! adds 512 GiB, Sv57 adds 256 TiB. At the lowest level 16 entries with N, all of one value, are a
//! leaf of 64 KiB; its frame ends in the bits
//! 1000. Addresses are sign-extended: the bits above equal the highest
//! bit that is translated.
//!
//! W without R is reserved, so a write-only mapping is refused. Leaves are born clean, and a write
//! sets A and D; systems that do not track set both when they map.

use dirtymap::Granule;

use super::entry::{Iopte, MakeClean};
use super::format::{Format, INDEX_LG2, sealed, shape};
use super::reach::Reach;
use super::sizes::{LeafSizes, granule, one_size_a_level};

const V: u64 = 1 << 0;
const R: u64 = 1 << 1;
const W: u64 = 1 << 2;
const X: u64 = 1 << 3;
const U: u64 = 1 << 4;
const A: u64 = 1 << 6;
const D: u64 = 1 << 7;
const PPN_SHIFT: u32 = 10;
const PPN: u64 = ((1 << 44) - 1) << PPN_SHIFT;
const RESERVED: u64 = 0x7f << 54;
const N: u64 = 1 << 63;
/// A contiguous leaf has 2^4 entries; the number of its frame encodes that: the lowest four bits
/// are 1000.
const NAPOT_LG2: u32 = 4;
const NAPOT: u64 = N | 1 << (NAPOT_LG2 - 1) << PPN_SHIFT;

/// First-stage tables of RISC-V, of `LEVELS` levels, 3 to 5: 39, 48 or 57 bits of sign-extended
/// address, leaves at every level and of 64 KiB, D in bit 7. Has no write-only leaves.
#[derive(Clone, Copy, Debug)]
pub struct Riscv<const LEVELS: u32>;

/// Three levels: leaves of 4 KiB, 2 MiB and 1 GiB.
pub type RiscvSv39 = Riscv<3>;
/// Four levels: leaves of 4 KiB, 2 MiB, 1 GiB and 512 GiB.
pub type RiscvSv48 = Riscv<4>;
/// Five levels: leaves of 4 KiB, 2 MiB, 1 GiB, 512 GiB and 256 TiB.
pub type RiscvSv57 = Riscv<5>;

impl sealed::Sealed for Riscv<3> {}
impl sealed::Sealed for Riscv<4> {}
impl sealed::Sealed for Riscv<5> {}

impl<const LEVELS: u32> Format for Riscv<LEVELS>
where
    Self: sealed::Sealed,
{
    const NAME: &'static str = match LEVELS {
        3 => "RISC-V Sv39",
        4 => "RISC-V Sv48",
        _ => "RISC-V Sv57",
    };
    const LEVELS: u32 = shape(LEVELS, 2);
    const INDEX_LG2: u32 = INDEX_LG2;
    const PAGE_LG2: u32 = shape(12, 3);
    const LEAF_LEVELS: u32 = Self::LEVELS;
    const ADDRESS: u64 = PPN;
    const PRESENT: u64 = V;
    const LEAF: u64 = V | U;
    const TABLE: u64 = V;
    const READ: u64 = R;
    const WRITE: u64 = W;
    const WRITTEN: u64 = A | D;
    const LEAF_SIZES: LeafSizes = {
        let sizes = one_size_a_level(Self::PAGE_LG2, Self::INDEX_LG2, Self::LEVELS);
        if NAPOT_LG2 < Self::INDEX_LG2 {
            sizes.or(LeafSizes::only(granule(Self::PAGE_LG2 + NAPOT_LG2)))
        } else {
            sizes
        }
    };
    const MAKE_CLEAN: MakeClean = MakeClean::Clear(D);
    const REACH: Reach = Reach::Strides { max: 512 };
    const GROUPED: u64 = N;
    const LEAF_SET: u64 = R;
    const RESERVED: u64 = RESERVED;
    const SIGN_EXTENDED: bool = true;

    #[inline]
    fn is_large_leaf(entry: Iopte) -> bool {
        entry.0 & (R | W | X) != 0
    }

    #[inline]
    fn size_bits(size: Granule) -> u64 {
        if u32::from(size.lg2()) == Self::PAGE_LG2 + NAPOT_LG2 {
            NAPOT
        } else {
            0
        }
    }

    #[inline]
    fn group_lg2(entry: Iopte, _level: u32) -> u32 {
        if entry.0 & N == 0 { 0 } else { NAPOT_LG2 }
    }

    #[inline]
    fn output(entry: Iopte) -> u64 {
        let marker = if entry.0 & N == 0 { 0 } else { NAPOT };
        (entry.0 & PPN & !marker) >> PPN_SHIFT << Self::PAGE_LG2
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use dirtymap::Access;

    type F = RiscvSv48;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let leaf = F::leaf(0x00f1_2345_6789_a000, Access::ReadWrite, Granule::K4);
        assert_eq!(leaf.0, 0x003c_48d1_59e2_6817);
        assert_eq!(F::written(leaf).0, 0x003c_48d1_59e2_68d7);
        assert_eq!(
            F::leaf(0x4000_0000, Access::Read, Granule::G1).0,
            0x1000_0013
        );
        let contiguous = F::leaf(0x5_0000, Access::Read, granule(16));
        assert_eq!(contiguous.0, 0x8000_0000_0001_6013);
        assert_eq!(
            (F::output(contiguous), F::group_lg2(contiguous, 0)),
            (0x5_0000, 4)
        );
        assert_eq!(F::table(0x7f00_dead_b000, 3).0, 0x1fc0_37ab_6c01);
        assert_eq!(F::MAKE_CLEAN, MakeClean::Clear(1 << 7));
        let widths = [RiscvSv39::WIDTH, RiscvSv48::WIDTH, RiscvSv57::WIDTH];
        assert_eq!(widths, [39, 48, 57]);
        assert!(!F::grants(Access::Write));
    }
}
