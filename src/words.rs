//! Bits of words of 64.

/// The bits `first..=last` of a word, both below 64.
#[inline]
pub(crate) const fn word_mask(first: u32, last: u32) -> u64 {
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// Splits the bits `first..=last` into words: yields each word's index and the mask of its bits.
#[inline]
pub fn word_masks(first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
    (first / 64..=last / 64).map(move |word| {
        let from = if word == first / 64 { first % 64 } else { 0 };
        let to = if word == last / 64 { last % 64 } else { 63 };
        (word, word_mask(from as u32, to as u32))
    })
}

/// Yields the maximal runs of ones in a word as `(first, last)`.
#[inline]
pub fn word_runs(mut word: u64) -> impl Iterator<Item = (u32, u32)> {
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

/// Sets the bits `first` to `last`, as far as `words` has them.
pub fn set(words: &mut [u64], first: u64, last: u64) {
    for_each_mask(words, first, last, |word, mask| *word |= mask);
}

/// Clears the bits `first` to `last`, as far as `words` has them.
pub fn clear(words: &mut [u64], first: u64, last: u64) {
    for_each_mask(words, first, last, |word, mask| *word &= !mask);
}

/// Calls `change` with each word that has some of the bits `first` to `last`, and their mask.
fn for_each_mask(words: &mut [u64], first: u64, last: u64, change: impl Fn(&mut u64, u64)) {
    let Some(last) = last_of(words, last) else {
        return;
    };
    for (word, mask) in word_masks(first, last) {
        change(&mut words[word as usize], mask);
    }
}

/// The last bit up to `last` that `words` has; `None` without words.
fn last_of(words: &[u64], last: u64) -> Option<u64> {
    let end = (words.len() as u64).checked_mul(64);
    Some(last.min(end.unwrap_or(u64::MAX).checked_sub(1)?))
}

/// The first run of bits that are set, from `first` to `last`, as its first and its last bit.
pub fn next_run(words: &[u64], first: u64, last: u64) -> Option<(u64, u64)> {
    let last = last_of(words, last)?;
    let from = next_where(words, first, last, 0)?;
    let to = next_where(words, from, last, u64::MAX).map_or(last, |clear| clear - 1);
    Some((from, to))
}

/// The first bit, from `first` to `last`, that differs from those of `skip`.
fn next_where(words: &[u64], first: u64, last: u64, skip: u64) -> Option<u64> {
    if first > last {
        return None;
    }
    let mut word = first / 64;
    let mut differs = (words.get(word as usize)? ^ skip) & (u64::MAX << (first % 64));
    while differs == 0 {
        word += 1;
        if word > last / 64 {
            return None;
        }
        differs = words.get(word as usize)? ^ skip;
    }
    let found = word * 64 + u64::from(differs.trailing_zeros());
    (found <= last).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every run between every two borders, against a look at each bit.
    #[test]
    fn runs_are_what_the_bits_say() {
        let words = [
            0x8000_0000_0000_0001,
            0xffff_ffff_ffff_ffff,
            0x0000_00ff_0000_00f0,
        ];
        let bit = |n: u64| words[(n / 64) as usize] >> (n % 64) & 1 == 1;
        for first in (0..192).step_by(7) {
            for last in first..192 {
                let mut seen = Vec::new();
                let mut at = first;
                while let Some((from, to)) = next_run(&words, at, last) {
                    seen.extend(from..=to);
                    assert!(to == last || !bit(to + 1), "a run that ends too early");
                    at = to + 1;
                }
                let set: Vec<u64> = (first..=last).filter(|n| bit(*n)).collect();
                assert_eq!(seen, set, "from {first} to {last}");
            }
        }
    }

    /// An adapter's kernel may name bits that are not there. They are left out, and nothing wraps.
    #[test]
    fn bits_past_the_end_are_left_out() {
        let mut words = [u64::MAX; 2];
        assert_eq!(next_run(&words, 100, u64::MAX), Some((100, 127)));
        assert_eq!(next_run(&words, 128, u64::MAX), None);
        assert_eq!(next_run(&[], 0, 5), None);
        clear(&mut words, 100, u64::MAX);
        assert_eq!(words, [u64::MAX, (1 << 36) - 1]);
        set(&mut words, 128, 300);
        set(&mut words, 127, 300);
        assert_eq!(words, [u64::MAX, 1 << 63 | ((1 << 36) - 1)]);
        set(&mut [], 0, 9);
    }

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
