//! The look at 16 entries at once, where every processor of the target has vectors of 16 bytes.
//!
//! An entry is tested by its lower half, which has to hold all bits that the test needs. Entry by
//! entry, a test takes five instructions; by vectors it takes two and a half, and no branch.

use crate::fmt::{Format, MakeClean};

pub(super) use imp::Wide;

/// The number of entries that are looked at together.
pub(super) const WIDE: usize = 16;

/// Whether such a look can be had for the format: its leaves are written if one bit is set, and
/// that bit lies in the lower half, as do those that tell leaves of one entry from all others.
pub(super) const fn is_wide<F: Format>() -> bool {
    let used = dirty_bit::<F>() | F::GROUPED | F::TABLE_SET | F::LEAF_SET;
    imp::HAS_IT && dirty_bit::<F>().is_power_of_two() && used <= u32::MAX as u64
}

/// The bits that say that a leaf was written; 0 if it takes more than a bit that is set.
const fn dirty_bit<F: Format>() -> u64 {
    match F::MAKE_CLEAN {
        MakeClean::Clear(dirty) => dirty,
        MakeClean::Set(_) => 0,
    }
}

#[cfg(all(
    target_arch = "x86_64",
    not(any(dirtymap_loom, dirtymap_shuttle, miri))
))]
mod imp {
    use std::arch::asm;
    use std::arch::x86_64::__m128i;
    use std::mem::transmute;

    use super::{WIDE, dirty_bit, is_wide};
    use crate::fmt::{AtomicIopte, Format};

    pub(super) const HAS_IT: bool = true;

    /// The lower halves of the entries that were looked at, four side by side.
    pub(in crate::table) struct Wide {
        any: __m128i,
        all: __m128i,
    }

    impl Wide {
        #[inline(always)]
        pub(in crate::table) fn new() -> Self {
            // SAFETY: as long as four numbers each, and any bits are a value.
            let [any, all]: [__m128i; 2] = unsafe { transmute([[0u32; 4], [u32::MAX; 4]]) };
            Wide { any, all }
        }

        /// The mask of those of `entries` in which the dirty bit is set; for formats that are
        /// [wide](is_wide).
        #[inline(always)]
        pub(in crate::table) fn look<F: Format>(&mut self, entries: &[AtomicIopte; WIDE]) -> u64 {
            const { assert!(size_of::<AtomicIopte>() == 8) };
            debug_assert!(is_wide::<F>());
            let mask: u32;
            // SAFETY:
            // - the processor has the instructions: SSE2 is a part of x86-64.
            // - `entries` are valid for atomic reads of 8 bytes each, and each load reads all of
            //   one of them. In the terms of the language these are 16 Relaxed loads.
            // - memory is only read; neither the stack nor the flags are used.
            unsafe {
                asm!(
                    "movq {a}, qword ptr [{at}]",
                    "movhps {a}, qword ptr [{at} + 8]",
                    "movq {t}, qword ptr [{at} + 16]",
                    "movhps {t}, qword ptr [{at} + 24]",
                    "shufps {a}, {t}, 0x88", // the lower halves of four entries
                    "movq {b}, qword ptr [{at} + 32]",
                    "movhps {b}, qword ptr [{at} + 40]",
                    "movq {t}, qword ptr [{at} + 48]",
                    "movhps {t}, qword ptr [{at} + 56]",
                    "shufps {b}, {t}, 0x88",
                    "movq {c}, qword ptr [{at} + 64]",
                    "movhps {c}, qword ptr [{at} + 72]",
                    "movq {t}, qword ptr [{at} + 80]",
                    "movhps {t}, qword ptr [{at} + 88]",
                    "shufps {c}, {t}, 0x88",
                    "movq {d}, qword ptr [{at} + 96]",
                    "movhps {d}, qword ptr [{at} + 104]",
                    "movq {t}, qword ptr [{at} + 112]",
                    "movhps {t}, qword ptr [{at} + 120]",
                    "shufps {d}, {t}, 0x88",
                    "por {any}, {a}",
                    "por {any}, {b}",
                    "por {any}, {c}",
                    "por {any}, {d}",
                    "pand {all}, {a}",
                    "pand {all}, {b}",
                    "pand {all}, {c}",
                    "pand {all}, {d}",
                    "pslld {a}, {shift}", // D becomes the sign of a number
                    "pslld {b}, {shift}",
                    "pslld {c}, {shift}",
                    "pslld {d}, {shift}",
                    "packssdw {a}, {b}", // of numbers of two bytes, and of one
                    "packssdw {c}, {d}",
                    "packsswb {a}, {c}",
                    "pmovmskb {mask:e}, {a}",
                    at = in(reg) entries.as_ptr(),
                    shift = const 31 - dirty_bit::<F>().trailing_zeros() % 32,
                    any = inout(xmm_reg) self.any,
                    all = inout(xmm_reg) self.all,
                    a = out(xmm_reg) _,
                    b = out(xmm_reg) _,
                    c = out(xmm_reg) _,
                    d = out(xmm_reg) _,
                    t = out(xmm_reg) _,
                    mask = lateout(reg) mask,
                    options(nostack, readonly, preserves_flags),
                );
            }
            mask.into()
        }

        /// The OR and the AND of all that was looked at.
        #[inline(always)]
        pub(in crate::table) fn any_all(self) -> (u64, u64) {
            // SAFETY: as in `new`.
            let [any, all]: [[u32; 4]; 2] = unsafe { transmute([self.any, self.all]) };
            let any = any.into_iter().fold(0, |any, some| any | some);
            let all = all.into_iter().fold(u32::MAX, |all, some| all & some);
            (any.into(), all.into())
        }
    }
}

#[cfg(not(all(
    target_arch = "x86_64",
    not(any(dirtymap_loom, dirtymap_shuttle, miri))
)))]
mod imp {
    use super::WIDE;
    use crate::fmt::{AtomicIopte, Format};

    pub(super) const HAS_IT: bool = false;

    /// Is never used: see `is_wide`.
    pub(in crate::table) struct Wide;

    impl Wide {
        pub(in crate::table) fn new() -> Self {
            Wide
        }

        pub(in crate::table) fn look<F: Format>(&mut self, _: &[AtomicIopte; WIDE]) -> u64 {
            0
        }

        pub(in crate::table) fn any_all(self) -> (u64, u64) {
            (u64::MAX, 0)
        }
    }
}
