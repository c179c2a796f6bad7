//! The range of an invalidation command: often larger than the range that is asked for.

use dirtymap::{Granule, IovaRange};

use super::sizes::granule;

/// The ranges that one invalidation command of an IOMMU can name.
///
/// | format | command | command in the specification |
/// |---|---|---|
/// | AMD v1 | one aligned power of two up to 2^52 | AMD: INVALIDATE_IOMMU_PAGES, S bit |
/// | VT-d, x86-64 | one aligned power of two | Intel: page-selective invalidation, address mask |
/// | Arm | one granule; many granules: everything | SMMUv3: CMD_TLBI_NH_VA without range fields |
/// | RISC-V | one leaf; more than 512 of them: everything | IOTINVAL.VMA; the limit is Linux's |
///
/// ```
/// use dirtymap::{Granule, Iova, IovaRange};
/// use pagetable_sim::{AmdV1, Format};
///
/// // Two pages across a border of 64 KiB: no smaller power of two holds both.
/// let asked = IovaRange::from_len(Iova::new(0xf000), 0x2000)?;
/// let named = AmdV1::REACH.covering(asked, Granule::K4);
/// assert_eq!(named, IovaRange::from_len(Iova::new(0), 0x2_0000)?);
/// # Ok::<(), dirtymap::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// A naturally aligned power of two of at most 2^`max_lg2` bytes; a range that fits into none
    /// invalidates everything.
    Aligned {
        /// The largest power of two, as a logarithm.
        max_lg2: u32,
    },
    /// One leaf for each command, and up to `max` commands; a range that takes more invalidates
    /// everything.
    Strides {
        /// How many commands are sent before everything is invalidated.
        max: u64,
    },
}

impl Reach {
    /// The range that is invalidated when `range` is asked for: all of it, rounded out to one that
    /// commands can name. `stride` is the size of the smallest leaf in the range, at least the
    /// smallest page.
    pub fn covering(self, range: IovaRange, stride: Granule) -> IovaRange {
        match self {
            Reach::Aligned { max_lg2 } => {
                // From the highest bit in which the ends differ, never from the length: two pages
                // that lie across a border of 2^n take 2^(n+1) bytes.
                let differ = range.start().get() ^ range.last().get();
                let lg2 = (u64::BITS - differ.leading_zeros()).max(stride.lg2().into());
                if lg2 > max_lg2 {
                    IovaRange::ALL
                } else {
                    IovaRange::granule_at(range.start(), granule(lg2))
                }
            }
            Reach::Strides { max } => {
                if range.granules(stride) > max.into() {
                    IovaRange::ALL
                } else {
                    range.round_out(stride)
                }
            }
        }
    }
}

#[cfg(test)]
#[cfg(not(dirtymap_loom))]
mod tests {
    use super::*;
    use crate::fmt::{AmdV1, ArmS1, Format, RiscvSv48, VtdSs, X86_64};
    use dirtymap::Iova;

    const K4: u64 = 1 << 12;

    fn pages(first: u64, count: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first * K4), count * K4).unwrap()
    }

    /// A mask from the length alone gives pages 6 and 7 for the pages 7 and 8, and page 8 stays
    /// cached.
    #[test]
    fn an_unaligned_range_across_a_power_of_two_is_covered_to_its_end() {
        for reach in [AmdV1::REACH, VtdSs::<4>::REACH, X86_64::<4>::REACH] {
            let covering = |first, count| reach.covering(pages(first, count), Granule::K4);
            assert_eq!(covering(7, 2), pages(0, 16));
            assert_eq!(covering(6, 2), pages(6, 2));
            assert_eq!(covering(0x7ff, 2), pages(0, 0x1000));
            assert_eq!(covering(5, 1), pages(5, 1));
            assert_eq!(covering(9, 3), pages(8, 4));
        }
    }

    #[test]
    fn what_no_command_can_name_is_everything() {
        let half = IovaRange::granule_at(Iova::MIN, granule(63));
        let wide = IovaRange::granule_at(Iova::MIN, granule(52));
        let all = IovaRange::ALL;
        for (reach, asked, got) in [
            (AmdV1::REACH, wide, wide),
            (AmdV1::REACH, half, all),
            (VtdSs::<4>::REACH, half, half),
            (VtdSs::<4>::REACH, all, all),
            (X86_64::<5>::REACH, pages((1 << 51) - 1, 2), all),
            (<ArmS1>::REACH, pages(7, 511), pages(7, 511)),
            (<ArmS1>::REACH, pages(7, 512), all),
            (RiscvSv48::REACH, pages(7, 512), pages(7, 512)),
            (RiscvSv48::REACH, pages(7, 513), all),
            (RiscvSv48::REACH, all, all),
        ] {
            assert_eq!(reach.covering(asked, Granule::K4), got, "{reach:?} {asked}");
        }
    }

    #[test]
    fn a_part_of_a_leaf_takes_the_whole_leaf() {
        for reach in [
            AmdV1::REACH,
            VtdSs::<4>::REACH,
            <ArmS1>::REACH,
            RiscvSv48::REACH,
        ] {
            let got = reach.covering(pages(513, 1), Granule::M2);
            assert_eq!(got, pages(512, 512));
        }
    }

    #[test]
    fn whatever_is_asked_for_is_covered() {
        let mut x = 0x2545_F491_4F6C_DD1Du64;
        for _ in 0..20_000 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let start = x >> (x % 50);
            let len = x.rotate_left(20) >> (x.rotate_left(40) % 60) | 1;
            let Ok(asked) = IovaRange::from_len(Iova::new(start), len) else {
                continue;
            };
            for reach in [
                AmdV1::REACH,
                VtdSs::<4>::REACH,
                <ArmS1>::REACH,
                RiscvSv48::REACH,
            ] {
                let got = reach.covering(asked, Granule::K4);
                assert!(got.covers(asked), "{reach:?} {asked} {got}");
            }
        }
    }
}
