//! A compact set of pages.
//!
//! Pages are numbered, and 32768 of them make a chunk. A chunk that is full costs nothing of its
//! own: neighbours that are full are one range. A chunk with few runs has a list of them, 4 bytes
//! each, and any other chunk a bitmap of 4 KiB.

use std::collections::BTreeMap;

use super::{RangeSet, add_joined};
use crate::units::{Granule, Iova, IovaRange};
use crate::words::{next_run, set};

/// Pages of a chunk, as a logarithm.
const CHUNK_LG2: u32 = 15;
/// The number of the last page of a chunk.
const LAST: u64 = (1 << CHUNK_LG2) - 1;
const WORDS: usize = 1 << (CHUNK_LG2 - 6);
/// The most runs of a chunk without a bitmap, which then costs half as much as one.
const MOST_RUNS: usize = 512;
/// What a chunk costs besides its contents: its entry, and its share of the nodes of a map.
const ENTRY: usize = 64;

/// See the [module](self).
#[derive(Clone, Debug)]
pub(crate) struct PageSet {
    page: Granule,
    /// The numbers of the chunks that are full. A number stands in the place of an address.
    full: RangeSet,
    /// Chunks that are neither full nor empty.
    parts: BTreeMap<u64, Part>,
    /// Bytes that `parts` takes.
    bytes: usize,
}

/// The pages of a chunk.
#[derive(Clone, Debug)]
enum Part {
    /// Runs, each as its first and its last page.
    Runs(Box<[(u16, u16)]>),
    Bitmap(Box<[u64; WORDS]>),
}

impl PageSet {
    /// The empty set, of pages of size `page`.
    pub(crate) fn new(page: Granule) -> Self {
        PageSet {
            page,
            full: RangeSet::new(),
            parts: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Whether it has no page.
    pub(crate) fn is_empty(&self) -> bool {
        self.full.is_empty() && self.parts.is_empty()
    }

    /// The bytes of memory that it takes.
    pub(crate) fn held_bytes(&self) -> u64 {
        (self.bytes + ENTRY * self.full.len()) as u64
    }

    /// Adds the pages that `runs` touch. Runs in ascending order cost least.
    pub(crate) fn extend(&mut self, runs: impl IntoIterator<Item = IovaRange>) {
        let mut open: Option<(u64, Box<[u64; WORDS]>)> = None;
        for run in runs {
            let number = |iova: Iova| iova.get() >> self.page.lg2();
            let (first, last) = (number(run.start()), number(run.last()));
            let (from, to) = (first >> CHUNK_LG2, last >> CHUNK_LG2);
            let (low, high) = (first & LAST, last & LAST);
            // Up to three pieces: a part of the first chunk, full ones, a part of the last one.
            let above = u64::from(low != 0);
            let end = to + u64::from(high == LAST);
            if from + above < end {
                let chunks = IovaRange::ascending(Iova::new(from + above), Iova::new(end - 1));
                self.add_full(chunks);
            }
            let alone = from == to;
            if low != 0 || (alone && high != LAST) {
                self.add_part(&mut open, from, low, if alone { high } else { LAST });
            }
            if !alone && high != LAST {
                self.add_part(&mut open, to, 0, high);
            }
        }
        if let Some((chunk, words)) = open {
            self.merge(chunk, words);
        }
    }

    /// Adds the pages of `other`.
    pub(crate) fn merge_with(&mut self, other: &PageSet) {
        self.extend(other.runs());
    }

    /// Its pages as maximal runs in ascending order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = IovaRange> + '_ {
        let mut full = self.full.iter().peekable();
        let mut parts = self.parts.iter().peekable();
        let mut waiting: Vec<IovaRange> = Vec::new();
        let mut ended = false;
        // The runs of the next piece wait here in descending order; the first of them is held back
        // until the piece after it is known, because the two may touch.
        std::iter::from_fn(move || {
            while waiting.len() < 2 && !ended {
                let mut runs = Vec::new();
                if let Some(chunks) = full.next_if(|chunks| {
                    let part = parts.peek();
                    part.is_none_or(|(part, _)| chunks.last().get() < **part)
                }) {
                    runs.push(self.addresses(chunks.start().get() << CHUNK_LG2, {
                        chunks.last().get() << CHUNK_LG2 | LAST
                    }));
                } else if let Some((chunk, part)) = parts.next() {
                    let base = chunk << CHUNK_LG2;
                    part.runs(|first, last| {
                        runs.push(self.addresses(base | first, base | last));
                    });
                } else {
                    ended = true;
                }
                waiting.reverse();
                runs.into_iter()
                    .for_each(|run| add_joined(&mut waiting, run));
                waiting.reverse();
            }
            waiting.pop()
        })
    }

    /// The addresses of the pages `first` to `last`.
    fn addresses(&self, first: u64, last: u64) -> IovaRange {
        let start = Iova::new(first << self.page.lg2());
        let last = Iova::new(last << self.page.lg2()).granule_last(self.page);
        IovaRange::ascending(start, last)
    }

    /// Adds a part of a chunk, in the words that are open for it.
    fn add_part(
        &mut self,
        open: &mut Option<(u64, Box<[u64; WORDS]>)>,
        chunk: u64,
        low: u64,
        high: u64,
    ) {
        if open.as_ref().is_some_and(|(there, _)| *there != chunk)
            && let Some((there, words)) = open.take()
        {
            self.merge(there, words);
        }
        let (_, words) = open.get_or_insert_with(|| (chunk, Box::new([0; WORDS])));
        set(&mut words[..], low, high);
    }

    /// Adds full chunks, by their numbers.
    fn add_full(&mut self, chunks: IovaRange) {
        let range = chunks.start().get()..=chunks.last().get();
        while let Some((&chunk, _)) = self.parts.range(range.clone()).next() {
            self.bytes -= self.parts.remove(&chunk).map_or(0, |part| part.bytes());
        }
        self.full.add(chunks);
    }

    /// Adds the pages of `words` to those of a chunk.
    fn merge(&mut self, chunk: u64, mut words: Box<[u64; WORDS]>) {
        let at = IovaRange::at(Iova::new(chunk));
        if self.full.without(at).next().is_none() {
            return;
        }
        if let Some(old) = self.parts.remove(&chunk) {
            self.bytes -= old.bytes();
            old.runs(|first, last| set(&mut words[..], first, last));
        }
        let mut runs = Vec::new();
        let mut next = Some(0);
        while let Some(from) = next
            && runs.len() <= MOST_RUNS
            && let Some((first, last)) = next_run(&words[..], from, LAST)
        {
            // Both are below 32768.
            runs.push((first as u16, last as u16));
            next = (last < LAST).then_some(last + 1);
        }
        let part = match runs[..] {
            [] => return,
            [(0, last)] if u64::from(last) == LAST => return self.add_full(at),
            _ if runs.len() <= MOST_RUNS => Part::Runs(runs.into_boxed_slice()),
            _ => Part::Bitmap(words),
        };
        self.bytes += part.bytes();
        self.parts.insert(chunk, part);
    }
}

impl Part {
    fn bytes(&self) -> usize {
        ENTRY
            + match self {
                Part::Runs(runs) => size_of_val(&**runs),
                Part::Bitmap(words) => size_of_val(&**words),
            }
    }

    /// Calls `each` with the first and the last page of each run.
    fn runs(&self, mut each: impl FnMut(u64, u64)) {
        match self {
            Part::Runs(runs) => {
                let runs = runs.iter();
                runs.for_each(|(first, last)| each(u64::from(*first), u64::from(*last)));
            }
            Part::Bitmap(words) => {
                let mut next = Some(0);
                while let Some(from) = next
                    && let Some((first, last)) = next_run(&words[..], from, LAST)
                {
                    each(first, last);
                    next = (last < LAST).then_some(last + 1);
                }
            }
        }
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests {
    use super::*;

    fn range(first: u64, last: u64, page: Granule) -> IovaRange {
        let last = Iova::new(last << page.lg2()).granule_last(page);
        IovaRange::new(Iova::new(first << page.lg2()), last).unwrap()
    }

    /// One flag for each page below `flags`, from the maximal runs of `set`.
    fn flags(set: &PageSet, flags: u64) -> Vec<bool> {
        let runs: Vec<IovaRange> = set.runs().collect();
        let apart = |pair: &[IovaRange]| pair[0].last().get() + 1 < pair[1].start().get();
        assert!(runs.windows(2).all(apart), "{runs:?} are not maximal");
        let mut found = vec![false; flags as usize];
        for run in runs {
            let number = |iova: Iova| (iova.get() >> set.page.lg2()) as usize;
            found[number(run.start())..=number(run.last())].fill(true);
        }
        found
    }

    /// Runs in any order, short and over several chunks, dense and sparse, against one flag for
    /// each page.
    #[test]
    fn a_set_of_pages_is_what_flags_say() {
        let mut state = 7u64;
        let mut below = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % bound
        };
        let chunk = LAST + 1;
        for round in 0..12 {
            let mut set = PageSet::new(Granule::K4);
            let mut expected = vec![false; 6 * chunk as usize];
            for _ in 0..4 {
                let mut runs = Vec::new();
                for _ in 0..below(1 + round * 60) {
                    let near = below(4) * chunk;
                    let first = match below(8) {
                        0 => near,
                        1 => near + LAST - below(3),
                        _ => near + below(chunk),
                    };
                    let len = match below(400) {
                        0 => 2 * chunk,
                        1 => chunk,
                        _ => 1 + below(3),
                    };
                    runs.push(range(first, first + len - 1, Granule::K4));
                    expected[first as usize..(first + len) as usize].fill(true);
                }
                if round % 2 == 0 {
                    let mut other = PageSet::new(Granule::K4);
                    other.extend(runs);
                    set.merge_with(&other);
                } else {
                    set.extend(runs);
                }
            }
            assert_eq!(set.is_empty(), !expected.contains(&true));
            assert!(flags(&set, 6 * chunk) == expected, "in round {round}");
            let bytes: usize = set.parts.values().map(Part::bytes).sum();
            assert_eq!(set.bytes, bytes);
        }
    }

    /// Every second page of a chunk is a bitmap, all of them are nothing but a range, and a few are
    /// a list.
    #[test]
    fn a_chunk_takes_its_smallest_form() {
        let mut set = PageSet::new(Granule::K4);
        set.extend([range(5, 6, Granule::K4)]);
        assert_eq!(set.held_bytes(), (ENTRY + 4) as u64);
        set.extend((0..1 << 14).map(|n| range(2 * n, 2 * n, Granule::K4)));
        assert_eq!(set.held_bytes(), (ENTRY + 4096) as u64);
        set.extend((0..1 << 14).map(|n| range(2 * n + 1, 2 * n + 1, Granule::K4)));
        assert_eq!(set.held_bytes(), ENTRY as u64);
        assert_eq!(set.runs().count(), 1);
        // A TiB that is dirty as a whole is one range.
        set.extend([range(1 << 15, 1 << 28, Granule::K4)]);
        assert_eq!(set.held_bytes(), (2 * ENTRY + 4) as u64);
    }

    #[test]
    fn the_ends_of_the_address_space_have_a_place() {
        for page in [Granule::BYTE, Granule::K4, Granule::MAX] {
            let last = IovaRange::granule_at(Iova::MAX, page);
            let first = IovaRange::granule_at(Iova::MIN, page);
            let mut set = PageSet::new(page);
            set.extend([last, first]);
            assert!(
                set.runs()
                    .flat_map(|run| [run.start(), run.last()])
                    .eq(match page {
                        Granule::MAX => vec![Iova::MIN, Iova::MAX],
                        _ => vec![first.start(), first.last(), last.start(), last.last()],
                    })
            );
            set.extend([IovaRange::ALL]);
            assert_eq!(set.runs().collect::<Vec<_>>(), [IovaRange::ALL]);
        }
    }
}
