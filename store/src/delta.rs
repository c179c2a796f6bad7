//! Which pages of which extents are dirty: a sparse map from extents to masks of pages.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::convert::Infallible;
use std::iter;

/// Extents of a chunk.
const CHUNK: u64 = 256;
/// Above so many entries a chunk is an array.
const FEW: usize = 64;
/// From so many times the entries on, the entries of the other delta are added one by one.
const MUCH_LARGER: usize = 16;

/// The dirty pages of extents, in memory in proportion to what is dirty: 8 bytes for a lone extent,
/// 1 KiB at most for 256 neighbours. A run of any length takes no more than the chunks at its ends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delta {
    /// By the number of the chunk, or of the first of several.
    chunks: BTreeMap<u64, Chunk>,
}

#[derive(Clone, Debug)]
enum Chunk {
    /// Ascending by extent. No mask is 0.
    Few(Vec<(u8, u32)>),
    Many(Box<[u32; CHUNK as usize]>),
    /// All extents of this chunk, and of those above it, `chunks` in all, have this mask.
    Same {
        mask: u32,
        chunks: u64,
    },
}

/// Extents that lie side by side and have the same mask, which is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) mask: u32,
}

#[cfg(all(test, not(dirtymap_loom)))]
thread_local! {
    /// How many entries deltas of this thread looked at, one after the other.
    pub(crate) static LOOKED_AT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Counts for tests.
#[inline(always)]
fn look_at(entries: usize) {
    #[cfg(all(test, not(dirtymap_loom)))]
    LOOKED_AT.set(LOOKED_AT.get() + entries);
    #[cfg(not(all(test, not(dirtymap_loom))))]
    let _ = entries;
}

impl Delta {
    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The pages of `mask` become dirty in `count` extents from `first` on.
    pub(crate) fn add(&mut self, run: Run) {
        for (number, part) in parts(run) {
            look_at(1);
            // Most runs are a few extents of a chunk that has some.
            if part.count < CHUNK
                && let Some(chunk @ (Chunk::Few(_) | Chunk::Many(_))) = self.chunks.get_mut(&number)
            {
                chunk.add(part);
                continue;
            }
            let end = number + part.count.div_ceil(CHUNK);
            if self.has_all(number, end, part.mask) {
                continue;
            }
            self.split(number);
            self.split(end);
            if part.count < CHUNK {
                match self.chunks.entry(number) {
                    Entry::Vacant(place) => {
                        place.insert(Chunk::new(part));
                    }
                    Entry::Occupied(chunk) => chunk.into_mut().add(part),
                }
            } else {
                self.add_chunks(number, end, part.mask);
            }
        }
    }

    /// The pages of `mask` become dirty in all extents of the chunks `from..end`, of which no entry
    /// crosses either end.
    fn add_chunks(&mut self, from: u64, end: u64, mask: u32) {
        let mut at = from;
        while at < end {
            look_at(1);
            let gap_end = match self.chunks.range_mut(at..end).next() {
                Some((start, chunk)) if *start == at => {
                    chunk.add_all(mask);
                    at += chunk.chunks();
                    continue;
                }
                Some((start, _)) => *start,
                None => end,
            };
            let chunks = gap_end - at;
            self.chunks.insert(at, Chunk::Same { mask, chunks });
            at = gap_end;
        }
    }

    /// Whether one entry says that all extents of the chunks `from..end` have the pages of `mask`.
    fn has_all(&self, from: u64, end: u64, mask: u32) -> bool {
        let below = self.chunks.range(..=from).next_back();
        below.is_some_and(|(start, chunk)| match chunk {
            Chunk::Same { mask: all, chunks } => start + chunks >= end && all & mask == mask,
            Chunk::Few(_) | Chunk::Many(_) => false,
        })
    }

    /// No entry has chunks on both sides of `border` after this.
    fn split(&mut self, border: u64) {
        if let Some((start, Chunk::Same { mask, chunks })) =
            self.chunks.range_mut(..border).next_back()
            && let Some(above) = (*start + *chunks).checked_sub(border)
            && above > 0
        {
            *chunks -= above;
            let (mask, chunks) = (*mask, above);
            self.chunks.insert(border, Chunk::Same { mask, chunks });
        }
    }

    /// The delta of ascending runs, made in one go.
    pub(crate) fn try_from_runs<E>(runs: impl Iterator<Item = Result<Run, E>>) -> Result<Delta, E> {
        let mut chunks: Vec<(u64, Chunk)> = Vec::new();
        for run in runs {
            for (number, part) in parts(run?) {
                match chunks.last_mut() {
                    Some((last, chunk)) if *last == number => chunk.add(part),
                    _ => chunks.push((number, Chunk::new(part))),
                }
            }
        }
        // Sorted already, which makes this one pass.
        let chunks = BTreeMap::from_iter(chunks);
        Ok(Delta { chunks })
    }

    /// All pages of ascending extents.
    pub(crate) fn from_extents(extents: impl Iterator<Item = u64>) -> Delta {
        let mask = u32::MAX;
        let count = 1;
        let runs = extents.map(|first| Ok::<_, Infallible>(Run { first, count, mask }));
        match Delta::try_from_runs(runs) {
            Ok(delta) => delta,
            Err(never) => match never {},
        }
    }

    /// All of `other` becomes dirty here, too. Takes time in proportion to the smaller of the two,
    /// so that a consumer that aborts again and again does not pay for what it waits for.
    pub(crate) fn merge(&mut self, mut other: Delta) {
        if other.chunks.len() > self.chunks.len() {
            std::mem::swap(self, &mut other);
        }
        if other.chunks.len() < self.chunks.len() / MUCH_LARGER {
            return other.runs().for_each(|run| self.add(run));
        }
        self.merge_all(other);
    }

    /// The same. Takes time in proportion to both.
    fn merge_all(&mut self, other: Delta) {
        if self.is_empty() || other.is_empty() {
            if self.is_empty() {
                *self = other;
            }
            return;
        }
        look_at(self.chunks.len() + other.chunks.len());
        let mut mine = std::mem::take(&mut self.chunks).into_iter();
        let mut theirs = other.chunks.into_iter();
        let (mut one, mut two) = (mine.next(), theirs.next());
        let mut both = Vec::new();
        loop {
            let (a, b) = match (one.take(), two.take()) {
                (Some(a), Some(b)) => (a, b),
                (rest, None) | (None, rest) => {
                    both.extend(rest);
                    break;
                }
            };
            // What lies below the other, or what they share.
            let (a_end, b_end) = (a.0 + a.1.chunks(), b.0 + b.1.chunks());
            match a.0.cmp(&b.0) {
                Ordering::Less => {
                    let (low, rest) = cut(a, b.0);
                    both.push(low);
                    (one, two) = (rest.or_else(|| mine.next()), Some(b));
                }
                Ordering::Greater => {
                    let (low, rest) = cut(b, a.0);
                    both.push(low);
                    (one, two) = (Some(a), rest.or_else(|| theirs.next()));
                }
                Ordering::Equal => {
                    let (mut low, rest) = cut(a, b_end);
                    let (more, their_rest) = cut(b, a_end);
                    low.1.merge(&more.1);
                    both.push(low);
                    one = rest.or_else(|| mine.next());
                    two = their_rest.or_else(|| theirs.next());
                }
            }
        }
        both.extend(mine.chain(theirs));
        self.chunks = BTreeMap::from_iter(both);
    }

    /// What is dirty, ascending: maximal runs of extents with one mask.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> {
        let mut pieces = self.pieces().peekable();
        iter::from_fn(move || {
            let mut run = pieces.next()?;
            while let Some(next) = pieces.peek()
                && next.first == run.first + run.count
                && next.mask == run.mask
            {
                run.count += next.count;
                pieces.next();
            }
            Some(run)
        })
    }

    fn pieces(&self) -> impl Iterator<Item = Run> {
        let chunks = self.chunks.iter();
        chunks.flat_map(|(number, chunk)| chunk.pieces(number * CHUNK))
    }
}

/// The part of an entry below chunk `border`, and the rest.
fn cut((start, chunk): (u64, Chunk), border: u64) -> ((u64, Chunk), Option<(u64, Chunk)>) {
    match chunk {
        Chunk::Same { mask, chunks } if start + chunks > border => {
            let same = |start, end| {
                let chunks = end - start;
                (start, Chunk::Same { mask, chunks })
            };
            (same(start, border), Some(same(border, start + chunks)))
        }
        chunk => ((start, chunk), None),
    }
}

/// The parts of a run: inside one chunk, or all of one or more. The number of the first chunk, and
/// the part, counted from there.
fn parts(run: Run) -> impl Iterator<Item = (u64, Run)> {
    let end = match run.mask {
        0 => run.first,
        _ => run.first.saturating_add(run.count),
    };
    let mut at = run.first;
    iter::from_fn(move || {
        let number = at / CHUNK;
        let whole = end.saturating_sub(at) / CHUNK * CHUNK;
        let next = match at % CHUNK {
            0 if whole > 0 => at + whole,
            _ => end.min((number + 1) * CHUNK),
        };
        let part = Run {
            first: at % CHUNK,
            count: next.saturating_sub(at),
            mask: run.mask,
        };
        at = next;
        (part.count > 0).then_some((number, part))
    })
}

impl Chunk {
    fn new(part: Run) -> Chunk {
        if part.count >= CHUNK {
            let (mask, chunks) = (part.mask, part.count / CHUNK);
            return Chunk::Same { mask, chunks };
        }
        let mut chunk = Chunk::Few(Vec::new());
        chunk.add(part);
        chunk
    }

    /// How many chunks it stands for.
    fn chunks(&self) -> u64 {
        match self {
            Chunk::Same { chunks, .. } => *chunks,
            Chunk::Few(_) | Chunk::Many(_) => 1,
        }
    }

    /// All of `other`, which stands for as many chunks, becomes dirty here, too.
    fn merge(&mut self, other: &Chunk) {
        match other {
            Chunk::Same { mask, .. } => self.add_all(*mask),
            Chunk::Few(_) | Chunk::Many(_) => other.pieces(0).for_each(|part| self.add(part)),
        }
    }

    /// A run inside the chunk becomes dirty.
    fn add(&mut self, part: Run) {
        if part.count == CHUNK {
            return self.add_all(part.mask);
        }
        let extents = part.first..part.first + part.count;
        extents.for_each(|extent| self.add_one(extent as u8, part.mask));
    }

    /// What is dirty, ascending, counted from `base`.
    fn pieces(&self, base: u64) -> impl Iterator<Item = Run> {
        let one = move |(extent, mask): (u64, u32)| Run {
            first: base + extent,
            count: 1,
            mask,
        };
        let (few, many, same) = match self {
            Chunk::Few(few) => (few.as_slice(), &[][..], None),
            Chunk::Many(many) => (&[][..], &many[..], None),
            Chunk::Same { mask, chunks } => (&[][..], &[][..], Some((*mask, *chunks))),
        };
        let same = same.map(|(mask, chunks)| Run {
            first: base,
            count: CHUNK * chunks,
            mask,
        });
        let few = few.iter().map(|(extent, mask)| (u64::from(*extent), *mask));
        let many = (0..).zip(many.iter().copied());
        let many = many.filter(|(_, mask)| *mask != 0);
        few.chain(many).map(one).chain(same)
    }

    fn add_one(&mut self, extent: u8, mask: u32) {
        match self {
            Chunk::Few(few) => match few.binary_search_by_key(&extent, |(extent, _)| *extent) {
                Ok(at) => few[at].1 |= mask,
                Err(at) if few.len() < FEW => few.insert(at, (extent, mask)),
                Err(_) => self.spread()[usize::from(extent)] |= mask,
            },
            Chunk::Same { mask: all, .. } if *all & mask == mask => {}
            Chunk::Same { .. } | Chunk::Many(_) => self.spread()[usize::from(extent)] |= mask,
        }
    }

    fn add_all(&mut self, mask: u32) {
        match self {
            Chunk::Same { mask: all, .. } => *all |= mask,
            _ => self.spread().iter_mut().for_each(|entry| *entry |= mask),
        }
    }

    /// The chunk as an array.
    fn spread(&mut self) -> &mut [u32; CHUNK as usize] {
        let mut array = Box::new([0; CHUNK as usize]);
        match self {
            Chunk::Many(_) => {}
            Chunk::Few(few) => few
                .iter()
                .for_each(|(extent, mask)| array[usize::from(*extent)] = *mask),
            Chunk::Same { mask, .. } => array.fill(*mask),
        }
        if !matches!(self, Chunk::Many(_)) {
            *self = Chunk::Many(array);
        }
        match self {
            Chunk::Many(array) => array,
            Chunk::Few(_) | Chunk::Same { .. } => unreachable!("it was made an array above"),
        }
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::{Delta, Run};

    /// The dumb version.
    fn naive(runs: &[Run]) -> BTreeMap<u64, u32> {
        let mut map = BTreeMap::new();
        for run in runs {
            for extent in run.first..run.first + run.count {
                *map.entry(extent).or_insert(0) |= run.mask;
            }
        }
        map
    }

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let mask = prop_oneof![Just(1u32), Just(u32::MAX), 1..16u32];
        let run = (0..2_000u64, 1..1_800u64, 1..4u64, mask);
        let run = run.prop_map(|(first, count, short, mask)| Run {
            first,
            count: if short == 1 { count } else { short },
            mask,
        });
        vec(run, 0..120)
    }

    /// A log says in ten bytes that all of a device is dirty, for each of 64 consumers. If each 256
    /// extents of it took memory of their own, a forged log of a few KiB would take 80 GB.
    #[test]
    fn a_long_run_takes_no_more_memory_than_a_short_one() {
        let all = Run {
            first: 1,
            count: (1 << 24) - 2,
            mask: 1,
        };
        let mut delta = Delta::default();
        delta.add(all);
        let read = Delta::try_from_runs([Ok::<_, ()>(all)].into_iter()).unwrap();
        let part = Run {
            first: 300,
            count: 1 << 20,
            mask: 3,
        };
        // Written again, in part and as a whole.
        for run in [part, all] {
            delta.add(run);
        }
        delta.merge(read.clone());
        for delta in [&read, &delta] {
            assert!(delta.chunks.len() < 10, "{} entries", delta.chunks.len());
        }
        assert!(read.runs().eq([all]));
        let mask = |first: u64, count: u64, mask: u32| Run { first, count, mask };
        let end = all.first + all.count;
        let above = part.first + part.count;
        let split = [mask(1, 299, 1), part, mask(above, end - above, 1)];
        assert!(delta.runs().eq(split));
    }

    proptest! {
        #[test]
        fn a_delta_holds_what_a_map_holds(one in runs(), two in runs()) {
            let mut delta = Delta::default();
            one.iter().for_each(|run| delta.add(*run));
            let mut other = Delta::default();
            two.iter().for_each(|run| other.add(*run));
            delta.merge(other);
            let found: Vec<Run> = delta.runs().collect();
            let all: Vec<Run> = one.into_iter().chain(two).collect();
            prop_assert_eq!(naive(&found), naive(&all));
            for pair in found.windows(2) {
                let touch = pair[0].first + pair[0].count == pair[1].first;
                prop_assert!(pair[0].first + pair[0].count <= pair[1].first);
                prop_assert!(!touch || pair[0].mask != pair[1].mask, "not maximal");
            }
        }
    }
}
