//! The user's bitmap in the runner: a buffer with guard words, and the changes of a harvest, bit by
//! bit.

use std::collections::BTreeSet;

use dirtymap::sync::{AtomicU64, Ordering};
use dirtymap::{Granule, HarvestRequest, Iova, IovaRange};

use crate::pages::{PAGE, pages_of};
use crate::violation::{Rule, Violation, check};

/// Guard words before and after the bitmap, which must not change.
const GUARDS: usize = 2;
/// Words of the bitmap: the whole window at 2 KiB a bit.
const WORDS: usize = 112;

/// A bitmap with guards around it.
pub(crate) struct Buffer {
    words: Vec<AtomicU64>,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        let words = (0..WORDS + 2 * GUARDS).map(|_| AtomicU64::new(0)).collect();
        Buffer { words }
    }

    /// Prepares the buffer: some bits of the user, and guards.
    pub(crate) fn fill(&self, preset: u8) {
        for (nth, word) in self.words.iter().enumerate() {
            let user = u64::from(preset).rotate_left(nth as u32 * 21);
            let guard = !(GUARDS..GUARDS + WORDS).contains(&nth);
            // Relaxed, here and below: one thread.
            word.store(
                if guard { 0xA5C3_0FF0_5A3C_9669 } else { user },
                Ordering::Relaxed,
            );
        }
    }

    /// The first `count` words between the guards.
    pub(crate) fn bitmap(&self, count: usize) -> &[AtomicU64] {
        &self.words[GUARDS..GUARDS + count]
    }

    /// The first `count` words, with the guards before them and as many words after them.
    pub(crate) fn cut(&self, count: usize) -> Vec<u64> {
        let all = self.read();
        let behind = &all[GUARDS + WORDS..];
        [&all[..GUARDS + count], behind].concat()
    }

    /// All words, guards included.
    pub(crate) fn read(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect()
    }
}

/// The words that `range` needs.
pub(crate) fn words_for(range: IovaRange, granule: Granule) -> usize {
    range.granules(granule).div_ceil(64) as usize
}

/// The result of a harvest or peek in a buffer.
pub(crate) struct Found {
    /// Bits that it set.
    pub(crate) set: u64,
    /// The maximal runs of set bits, those of the user included.
    pub(crate) runs: Vec<IovaRange>,
}

/// Checks the result of `request` in a whole buffer, which was `before`. The request had to report
/// the pages `must`, and was allowed to report the pages `may`.
pub(crate) fn check_bits(
    request: &HarvestRequest<'_>,
    before: &[u64],
    after: &[u64],
    must: &BTreeSet<u64>,
    may: &BTreeSet<u64>,
) -> Result<Found, Violation> {
    let (range, granule) = (request.range(), request.granule());
    let bits_of = |page: &u64| bits_of_page(*page, range, granule);
    let may: BTreeSet<u64> = may.iter().flat_map(bits_of).collect();
    let must: BTreeSet<u64> = must.iter().flat_map(bits_of).collect();
    let mut set = 0;
    for bit in 0..after.len() as u64 * 64 {
        let (was, is) = (is_set(before, bit), is_set(after, bit));
        let named = bit.checked_sub(GUARDS as u64 * 64);
        check(is || !was, Rule::Bitmap, || {
            format!("bit {named:?} of {range} was cleared")
        })?;
        if is && !was {
            set += 1;
            let inside = named.filter(|bit| u128::from(*bit) < range.granules(granule));
            check(inside.is_some(), Rule::Bitmap, || {
                format!("bit {named:?}, outside {range}, was set")
            })?;
            check(
                inside.is_some_and(|bit| may.contains(&bit)),
                Rule::Excess,
                || format!("bit {named:?} of {range} at {granule}, which may have {may:?}"),
            )?;
        }
    }
    for bit in must {
        check(
            is_set(after, bit + GUARDS as u64 * 64),
            Rule::Unreported,
            || format!("bit {bit} of {range} at {granule}"),
        )?;
    }
    let runs = runs_in(after, range, granule);
    Ok(Found { set, runs })
}

/// The maximal runs of set bits of a whole buffer, inside `range`.
pub(crate) fn runs_in(after: &[u64], range: IovaRange, granule: Granule) -> Vec<IovaRange> {
    let mut runs: Vec<IovaRange> = Vec::new();
    for bit in 0..range.granules(granule) as u64 {
        if !is_set(after, bit + GUARDS as u64 * 64) {
            continue;
        }
        let start = Iova::new(range.start().get() + (bit << granule.lg2()));
        let last = start.granule_last(granule);
        let joined = runs
            .last()
            .filter(|run| run.last().checked_add(1) == Some(start))
            .copied();
        let run = IovaRange::new(joined.map_or(start, |run| run.start()), last);
        if joined.is_some() {
            runs.pop();
        }
        runs.extend(run);
    }
    runs
}

/// The pages of `runs` among `first..=last`.
pub(crate) fn pages_in(runs: &[IovaRange], first: u64, last: u64) -> BTreeSet<u64> {
    let all = runs.iter().flat_map(|run| pages_of(*run));
    all.filter(|page| (first..=last).contains(page)).collect()
}

fn is_set(words: &[u64], bit: u64) -> bool {
    words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
}

/// Clears a bit of a whole buffer.
pub(crate) fn clear(words: &mut [u64], bit: u64) {
    let bit = bit + GUARDS as u64 * 64;
    words[(bit / 64) as usize] &= !(1 << (bit % 64));
}

/// The bits that stand for a part of `page`.
fn bits_of_page(page: u64, range: IovaRange, granule: Granule) -> std::ops::RangeInclusive<u64> {
    let bit = |at: u64| (at - range.start().get()) >> granule.lg2();
    bit((page * PAGE).max(range.start().get()))..=bit(page * PAGE + PAGE - 1)
}
