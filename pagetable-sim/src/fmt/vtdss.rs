//! Second-stage tables of Intel's VT-d.
//!
//! Layout of an entry, from the Intel Virtualization Technology for Directed I/O Architecture
//! Specification, chapter "Translation Structure Formats", second-stage paging entries:
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 0 | R | devices may read |
//! | 1 | W | devices may write |
//! | 7 | PS | a leaf, above the lowest level |
//! | 8 | A | accessed, at all levels |
//! | 9 | D | written; leaves only |
//! | 11 | SNP | snoop; left 0 |
//! | 51:12 | ADDR | frame of the page, or of the next table |
//! | 61:52 | | ignored; above leaves 54:52 are software's |
//!
//! There is no present bit: an entry is present if R or W is set. Three, four or five levels
//! translate 39, 48 or 57 bits; leaves of 4 KiB, 2 MiB and 1 GiB. The document counts levels from 1
//! at the bottom.

use super::entry::MakeClean;
use super::format::{Format, INDEX_LG2, sealed, shape};
use super::reach::Reach;

const R: u64 = 1 << 0;
const W: u64 = 1 << 1;
const PS: u64 = 1 << 7;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;
const ADDRESS_SHIFT: u32 = 12;
const ADDRESS: u64 = ((1 << 40) - 1) << ADDRESS_SHIFT;

/// Second-stage tables of Intel's VT-d, of `N` levels, 3 to 5: 39, 48 or 57 bits of address, leaves
/// of 4 KiB, 2 MiB and 1 GiB, D in bit 9.
#[derive(Clone, Copy, Debug)]
pub struct VtdSs<const N: u32 = 4>;

impl sealed::Sealed for VtdSs<3> {}
impl sealed::Sealed for VtdSs<4> {}
impl sealed::Sealed for VtdSs<5> {}

impl<const N: u32> Format for VtdSs<N>
where
    Self: sealed::Sealed,
{
    const NAME: &'static str = "VT-d second stage";
    const LEVELS: u32 = shape(N, 2);
    const INDEX_LG2: u32 = INDEX_LG2;
    const PAGE_LG2: u32 = shape(12, 3);
    const LEAF_LEVELS: u32 = shape(3, 2);
    const ADDRESS: u64 = ADDRESS;
    const PRESENT: u64 = R | W;
    const LEAF: u64 = 0;
    const TABLE: u64 = R | W;
    const READ: u64 = R;
    const WRITE: u64 = W;
    const WRITE_ONLY: bool = true;
    const WRITTEN: u64 = A | D;
    const MAKE_CLEAN: MakeClean = MakeClean::Clear(D);
    const REACH: Reach = Reach::Aligned { max_lg2: 63 };
    const LEAF_SET: u64 = PS;
    const TABLE_ACCESSED: u64 = A;
    const KNOWN: u64 = 0b111 << 52;
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use crate::fmt::Iopte;
    use dirtymap::{Access, Granule};

    type F = VtdSs;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let leaf = F::leaf(0x000f_1234_5678_9000, Access::ReadWrite, Granule::K4);
        assert_eq!(leaf.0, 0x000f_1234_5678_9003);
        assert_eq!(F::written(leaf).0, 0x000f_1234_5678_9303);
        assert_eq!(
            F::leaf(0x4000_0000, Access::Read, Granule::G1).0,
            0x4000_0081
        );
        assert_eq!(F::leaf(0x20_0000, Access::Write, Granule::M2).0, 0x20_0082);
        assert!(F::is_present(Iopte(W)) && F::is_present(Iopte(R)));
        assert_eq!(F::table(0x7f00_dead_b000, 3).0, 0x7f00_dead_b003);
        assert_eq!(F::MAKE_CLEAN, MakeClean::Clear(1 << 9));
        let widths = [VtdSs::<3>::WIDTH, VtdSs::<4>::WIDTH, VtdSs::<5>::WIDTH];
        assert_eq!(widths, [39, 48, 57]);
    }
}
