//! First-stage tables in the format of x86-64 processors, which the IOMMUs of Intel and AMD walk as
//! well.
//!
//! Layout of an entry, from the Intel 64 and IA-32 Architectures Software Developer's Manual,
//! volume 3, chapter "Paging", and the VT-d specification, first-stage paging entries:
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 0 | P | present |
//! | 1 | R/W | devices may write |
//! | 2 | U/S | user requests may access, such as those of devices: set everywhere |
//! | 5 | A | accessed |
//! | 6 | D | written; leaves only |
//! | 7 | PS | a leaf, above the lowest level |
//! | 51:12 | address | frame of the page, or of the next table |
//! | 62:52 | | ignored above leaves; 54:52 are software's there |
//! | 63 | XD | no instruction fetches; leaves only |
//!
//! Four levels translate 48 bits, five translate 57; leaves of 4 KiB, 2 MiB and 1 GiB. Addresses
//! are canonical: the bits above equal the highest bit that is translated.
//!
//! Every present leaf is readable, so a write-only mapping is refused. Leaves are born clean, and a
//! write sets A and D; systems that do not track set both when they map.

use super::entry::MakeClean;
use super::format::{Format, INDEX_LG2, sealed, shape};
use super::reach::Reach;

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const ADDRESS_SHIFT: u32 = 12;
const ADDRESS: u64 = ((1 << 40) - 1) << ADDRESS_SHIFT;
const XD: u64 = 1 << 63;

/// First-stage tables in the format of x86-64, of `N` levels, 4 or 5: 48 or 57 bits of
/// sign-extended address, leaves of 4 KiB, 2 MiB and 1 GiB, D in bit 6. Has no write-only leaves.
#[derive(Clone, Copy, Debug)]
pub struct X86_64<const N: u32 = 4>;

impl sealed::Sealed for X86_64<4> {}
impl sealed::Sealed for X86_64<5> {}

impl<const N: u32> Format for X86_64<N>
where
    Self: sealed::Sealed,
{
    const NAME: &'static str = "x86-64 first stage";
    const LEVELS: u32 = shape(N, 2);
    const INDEX_LG2: u32 = INDEX_LG2;
    const PAGE_LG2: u32 = shape(12, 3);
    const LEAF_LEVELS: u32 = shape(3, 2);
    const ADDRESS: u64 = ADDRESS;
    const PRESENT: u64 = P;
    const LEAF: u64 = P | US | XD;
    const TABLE: u64 = P | RW | US;
    const READ: u64 = 0;
    const WRITE: u64 = RW;
    const WRITTEN: u64 = A | D;
    const MAKE_CLEAN: MakeClean = MakeClean::Clear(D);
    const REACH: Reach = Reach::Aligned { max_lg2: 63 };
    const LEAF_SET: u64 = PS;
    const TABLE_ACCESSED: u64 = A;
    const KNOWN: u64 = 0b111 << 52;
    const SIGN_EXTENDED: bool = true;
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use dirtymap::{Access, Granule};

    type F = X86_64;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let leaf = F::leaf(0x000f_1234_5678_9000, Access::ReadWrite, Granule::K4);
        assert_eq!(leaf.0, 0x800f_1234_5678_9007);
        assert_eq!(F::written(leaf).0, 0x800f_1234_5678_9067);
        assert_eq!(
            F::leaf(0x4000_0000, Access::Read, Granule::G1).0,
            0x8000_0000_4000_0085
        );
        assert_eq!(F::table(0x7f00_dead_b000, 3).0, 0x7f00_dead_b007);
        assert_eq!(F::MAKE_CLEAN, MakeClean::Clear(1 << 6));
        assert_eq!([X86_64::<4>::WIDTH, X86_64::<5>::WIDTH], [48, 57]);
        assert!(!F::grants(Access::Write));
    }
}
