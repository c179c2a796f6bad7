//! Bits of words of 64.

/// The bits `first..=last` of a word, both below 64.
#[inline]
pub(crate) const fn word_mask(first: u32, last: u32) -> u64 {
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// Splits the bits `first..=last` into words: yields each word's index and the mask of its bits.
#[inline]
pub(crate) fn word_masks(first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
    (first / 64..=last / 64).map(move |word| {
        let from = if word == first / 64 { first % 64 } else { 0 };
        let to = if word == last / 64 { last % 64 } else { 63 };
        (word, word_mask(from as u32, to as u32))
    })
}

/// Yields the maximal runs of ones in a word as `(first, last)`.
#[inline]
pub(crate) fn word_runs(mut word: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let first = word.trailing_zeros();
        let len = (!(word >> first)).trailing_zeros();
        let last = first + len - 1;
        word &= !word_mask(first, last);
        Some((first, last))
    })
}

/// The numbers of the bits of `mask`.
#[inline(always)]
pub(crate) fn ones(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let nth = mask.trailing_zeros() as usize;
        (mask != 0).then(|| {
            mask &= mask - 1;
            nth
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_runs_agree_with_bits() {
        for first in 0..130u64 {
            for last in first..130 {
                let mut bits = Vec::new();
                for (word, mask) in word_masks(first, last) {
                    bits.extend(
                        (0..64)
                            .filter(|b| mask >> b & 1 == 1)
                            .map(|b| word * 64 + b),
                    );
                }
                assert_eq!(bits, (first..=last).collect::<Vec<_>>());
            }
        }
        for word in [
            0,
            1,
            u64::MAX,
            0b1011_0110,
            1 << 63,
            0x8000_0000_0000_0001,
            !1,
        ] {
            let mut back = 0;
            for (a, b) in word_runs(word) {
                back |= word_mask(a, b);
            }
            assert_eq!(back, word);
        }
        assert_eq!(word_runs(0b1110_0110).collect::<Vec<_>>(), [(1, 2), (5, 7)]);
    }
}
