//! Which pages of which extents are dirty: a sparse map from extents to masks of pages.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::iter;

/// Extents of a chunk.
const CHUNK: u64 = 256;
/// Above so many entries a chunk is an array.
const FEW: usize = 64;

/// The dirty pages of extents, in memory in proportion to what is dirty: 8 bytes for a lone extent,
/// 1 KiB at most for 256 neighbours.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delta {
    chunks: BTreeMap<u64, Chunk>,
}

#[derive(Clone, Debug)]
enum Chunk {
    /// Ascending by extent. No mask is 0.
    Few(Vec<(u8, u32)>),
    Many(Box<[u32; CHUNK as usize]>),
    /// All extents have this mask.
    Same(u32),
}

/// Extents that lie side by side and have the same mask, which is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) mask: u32,
}

impl Delta {
    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The pages of `mask` become dirty in `count` extents from `first` on.
    pub(crate) fn add(&mut self, run: Run) {
        for (number, part) in parts(run) {
            match self.chunks.entry(number) {
                Entry::Vacant(place) => {
                    place.insert(Chunk::new(part));
                }
                Entry::Occupied(chunk) => chunk.into_mut().add(part),
            }
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

    /// All of `other` becomes dirty here, too. Takes time in proportion to both.
    pub(crate) fn merge(&mut self, other: Delta) {
        if self.is_empty() || other.is_empty() {
            if self.is_empty() {
                *self = other;
            }
            return;
        }
        let mut mine = std::mem::take(&mut self.chunks).into_iter().peekable();
        let mut theirs = other.chunks.into_iter().peekable();
        let both = iter::from_fn(|| match (mine.peek(), theirs.peek()) {
            (Some((one, _)), Some((two, _))) if one == two => {
                let ((number, mut chunk), (_, more)) = (mine.next()?, theirs.next()?);
                more.pieces(0).for_each(|part| chunk.add(part));
                Some((number, chunk))
            }
            (Some((one, _)), Some((two, _))) if one > two => theirs.next(),
            (Some(_), _) => mine.next(),
            (None, _) => theirs.next(),
        });
        self.chunks = BTreeMap::from_iter(both.collect::<Vec<_>>());
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

/// The parts of a run in chunks: the number of the chunk, and the part inside it.
fn parts(run: Run) -> impl Iterator<Item = (u64, Run)> {
    let end = match run.mask {
        0 => run.first,
        _ => run.first.saturating_add(run.count),
    };
    let mut at = run.first;
    iter::from_fn(move || {
        let number = at / CHUNK;
        let next = end.min((number + 1) * CHUNK);
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
        if part.count == CHUNK {
            return Chunk::Same(part.mask);
        }
        let mut chunk = Chunk::Few(Vec::new());
        chunk.add(part);
        chunk
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
            Chunk::Same(mask) => (&[][..], &[][..], Some(*mask)),
        };
        let same = same.map(|mask| Run {
            first: base,
            count: CHUNK,
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
            Chunk::Same(all) if *all & mask == mask => {}
            Chunk::Same(_) | Chunk::Many(_) => self.spread()[usize::from(extent)] |= mask,
        }
    }

    fn add_all(&mut self, mask: u32) {
        match self {
            Chunk::Same(all) => *all |= mask,
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
            Chunk::Same(mask) => array.fill(*mask),
        }
        if !matches!(self, Chunk::Many(_)) {
            *self = Chunk::Many(array);
        }
        match self {
            Chunk::Many(array) => array,
            Chunk::Few(_) | Chunk::Same(_) => unreachable!("it was made an array above"),
        }
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
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
        let run = (0..2_000u64, 1..600u64, 1..4u64, mask);
        let run = run.prop_map(|(first, count, short, mask)| Run {
            first,
            count: if short == 1 { count } else { short },
            mask,
        });
        vec(run, 0..120)
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
