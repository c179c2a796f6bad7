//! Tests of [`ChunkMap`] against sets of bits.

use super::handed::Handed;
use super::map::{BITS_LG2, CHUNK_WORDS, ChunkMap};
use super::place::Place;
use super::take::{Taker, Visitor};
use crate::sync::{AtomicU64, Ordering};
use std::collections::BTreeSet;
use std::convert::Infallible;

fn bits(map: &ChunkMap, first: u64, last: u64, clear: bool) -> Vec<u64> {
    let mut out = vec![];
    let visit = |base: u64, seen: u64| -> Result<(), Infallible> {
        out.extend((0..64).filter(|b| seen >> b & 1 == 1).map(|b| base + b));
        Ok(())
    };
    match clear {
        true => map.take(first, last, visit).unwrap(),
        false => map.peek(first, last, visit).unwrap(),
    }
    out
}

#[test]
fn agrees_with_a_set_of_bits_at_every_depth() {
    for lg2 in [3u32, 4, 14, 15, 16, 17, 24, 25, 40, 41, 52, 63] {
        let size = 1u64 << lg2;
        let map = match lg2 % 2 {
            0 => ChunkMap::new(size - 1),
            _ => ChunkMap::in_slabs(size - 1),
        };
        let mut model = BTreeSet::new();
        let mut x = 88172645463325252u64;
        for _ in 0..if cfg!(miri) { 4 } else { 200 } {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let first = (x >> 1) % size;
            let last = (first + x % 97).min(size - 1);
            map.set(first, last, || ());
            model.extend(first..=last);
            let (a, b) = (first.saturating_sub(40), (last + 17).min(size - 1));
            assert_eq!(
                bits(&map, a, b, false),
                model.range(a..=b).copied().collect::<Vec<_>>()
            );
            if x.is_multiple_of(3) {
                bits(&map, a, b, true);
                model.retain(|m| !(a..=b).contains(m));
            }
        }
        assert_eq!(
            bits(&map, 0, size - 1, false),
            model.iter().copied().collect::<Vec<_>>()
        );
        assert_eq!(
            bits(&map, 0, size - 1, false).len() as u64,
            model.len() as u64
        );
    }
}

/// Ranges that cover chunks as a whole, single bits in them, and harvests of all and of parts. A
/// chunk that was whole and also had words reported these twice, so that an unmap counted discarded
/// pages twice.
#[test]
fn whole_chunks_agree_with_a_list_of_bits() {
    const CHUNK: u64 = 1 << BITS_LG2;
    let size = 3 * CHUNK + 777;
    let map = ChunkMap::in_slabs(size - 1);
    let mut model = vec![false; size as usize];
    let mut x = 88172645463325252u64;
    let mut random = |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 8) % below
    };
    for _ in 0..150 {
        let ranges = [
            (random(2) * CHUNK, 2 * CHUNK - 1),
            (random(CHUNK), 2 * CHUNK + random(CHUNK)),
            (0, size - 1),
            (CHUNK + random(CHUNK), 0),
        ];
        let (first, last) = ranges[random(4) as usize];
        let last = last.max(first);
        map.set(first, last, || ());
        model[first as usize..=last as usize].fill(true);
        let parts = [
            (0, size - 1),
            (CHUNK, 2 * CHUNK - 1),
            (random(size - 100), 99),
            (random(2 * CHUNK), CHUNK),
        ];
        let (first, last) = parts[random(4) as usize];
        let last = if last < first { first + last } else { last };
        let expected: Vec<u64> = (first..=last).filter(|bit| model[*bit as usize]).collect();
        assert_eq!(bits(&map, first, last, false), expected);
        if random(2) == 0 {
            assert_eq!(bits(&map, first, last, true), expected);
            model[first as usize..=last as usize].fill(false);
        }
    }
    let left: Vec<u64> = (0..size).filter(|bit| model[*bit as usize]).collect();
    assert_eq!(bits(&map, 0, size - 1, true), left);
    assert!(bits(&map, 0, size - 1, true).is_empty());
}

/// An error in the midst of a chunk that is whole: what was not visited stays.
#[test]
fn an_error_leaves_the_rest_of_a_whole_chunk() {
    const CHUNK: u64 = 1 << BITS_LG2;
    let map = ChunkMap::in_slabs(CHUNK - 1);
    map.set(0, CHUNK - 1, || ());
    let stopped = map.take(0, CHUNK - 1, Up(6399));
    assert_eq!(stopped, Err(6400));
    let left: Vec<u64> = (6400..CHUNK).collect();
    assert_eq!(bits(&map, 0, CHUNK - 1, false), left);
    assert_eq!(bits(&map, 0, CHUNK - 1, true), left);
}

#[test]
fn the_last_bit_of_the_largest_map() {
    let map = ChunkMap::new(u64::MAX);
    map.set(u64::MAX - 64, u64::MAX, || ());
    assert_eq!(bits(&map, 0, u64::MAX, false).len() as u64, 65);
    assert_eq!(bits(&map, 5, u64::MAX, true).last(), Some(&u64::MAX));
    assert_eq!(bits(&map, 0, u64::MAX, false).len() as u64, 0);
}

/// Takes bits up to this one and fails after it. Secures the bits that it can take.
struct Up(u64);

impl Visitor for Up {
    type Error = u64;

    fn visit(&mut self, first: u64, _: u64) -> Result<(), u64> {
        if first > self.0 { Err(first) } else { Ok(()) }
    }
}

impl Taker for Up {
    fn may_fail(&self) -> bool {
        true
    }

    fn secure(&mut self, _: u64, last: u64) -> Result<bool, u64> {
        Ok(last <= self.0)
    }
}

#[test]
fn an_error_leaves_the_bits() {
    let map = ChunkMap::new((1 << 20) - 1);
    map.set(10, 10, || ());
    map.set(700_000, 700_001, || ());
    let stopped = map.take(0, (1 << 20) - 1, Up(64));
    assert_eq!(stopped, Err(699_968));
    assert_eq!(bits(&map, 0, (1 << 20) - 1, false), [700_000, 700_001]);
}

/// A request that ends with the first chunk of a group looks there too, and a look at all words
/// reports no bit outside of it.
#[test]
fn a_request_ends_where_it_says_also_at_the_border_of_groups() {
    let map = ChunkMap::new((1 << 40) - 1);
    let border = 512 << BITS_LG2;
    for bit in [border - 1, border, border + 1, border + 700] {
        map.set(bit, bit, || ());
    }
    let all = |first, last| {
        let mut out = vec![];
        let visit = |base: u64, seen: u64| -> Result<(), Infallible> {
            out.extend((0..64).filter(|b| seen >> b & 1 == 1).map(|b| base + b));
            Ok(())
        };
        map.peek_all(first, last, visit).unwrap();
        out
    };
    for last in [border, border + 1, border + 699, border + 700] {
        for first in [0, border - 1, border, border + 1] {
            let expected: Vec<u64> = [border - 1, border, border + 1, border + 700]
                .into_iter()
                .filter(|bit| (first..=last).contains(bit))
                .collect();
            assert_eq!(bits(&map, first, last, false), expected);
            assert_eq!(all(first, last), expected);
        }
    }
    let found = map.next_words(511, 512).map(|(index, _)| index);
    let above = map.next_words(512, 512).map(|(index, _)| index);
    assert_eq!((found, above), (Some(511), Some(512)));
    let sparse = ChunkMap::new((1 << 40) - 1);
    sparse.set(border - (1 << BITS_LG2), border - (1 << BITS_LG2), || ());
    sparse.set(border, border, || ());
    let above = sparse.next_words(512, 512).map(|(index, _)| index);
    assert_eq!(above, Some(512));
    bits(&sparse, 0, border, true);
    assert_eq!(bits(&sparse, 0, border, false), []);
    // A group whose chunks end below the request, and the first chunk of the next one.
    let low = ChunkMap::new((1 << 40) - 1);
    [0, border]
        .iter()
        .for_each(|bit| assert!(low.set(*bit, *bit, || ())));
    assert_eq!(low.next_words(1, 512).map(|(index, _)| index), Some(512));
}

/// A mark over several chunks that sets a bit in the first of them has set one, whatever the last
/// of them had.
#[test]
fn a_mark_over_several_chunks_is_new_if_it_is_in_one() {
    let map = ChunkMap::new((1 << 20) - 1);
    let border = 1 << BITS_LG2;
    assert!(map.set(border, border + 2, || ()));
    assert!(map.set(border - 1, border, || ()));
    assert!(!map.set(border - 1, border, || ()));
}

/// A taker with a bitmap of its own, which shows a window of it as a place, as a user's bitmap
/// does.
struct Windowed {
    words: Vec<AtomicU64>,
    /// Words of a window.
    window: u64,
    /// The first word of the window that is open.
    open: u64,
    /// Bits that were recorded and clear.
    fresh: u64,
}

impl Visitor for &mut Windowed {
    type Error = Infallible;

    fn visit(&mut self, first: u64, mask: u64) -> Result<(), Infallible> {
        let word = first / 64;
        self.open = word / self.window * self.window;
        let old = self.words[word as usize].fetch_or(mask, Ordering::Relaxed);
        self.fresh += u64::from((mask & !old).count_ones());
        Ok(())
    }

    fn place(&self, first: u64, words: u64) -> Place<'_> {
        let word = first / 64;
        let end = (self.open + self.window).min(self.words.len() as u64);
        if !(self.open..end).contains(&word) {
            return Place::NONE;
        }
        Place::new(&self.words[word as usize..(word + words).min(end) as usize])
    }

    fn placed(&mut self, bits: u64) {
        self.fresh += bits;
    }
}

impl Taker for &mut Windowed {
    fn may_fail(&self) -> bool {
        false
    }

    fn secure(&mut self, _: u64, _: u64) -> Result<bool, Infallible> {
        Ok(true)
    }
}

/// What is recorded in a place, by whole lines and whole chunks, is what is visited word by word:
/// the same bits, no others, each counted if it was clear. Windows of the place end in the middle
/// of chunks and of lines, and its bits may be set before.
#[test]
fn a_place_gets_what_a_visit_gets() {
    const CHUNK: u64 = 1 << BITS_LG2;
    let size = 4 * CHUNK + 777;
    let mut x = 88172645463325252u64;
    let mut random = |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 8) % below
    };
    for round in 0..if cfg!(miri) { 3 } else { 150 } {
        let maps = [ChunkMap::in_slabs(size - 1), ChunkMap::in_slabs(size - 1)];
        let set = |first: u64, last: u64| {
            maps.iter().for_each(|map| {
                map.set(first, last.min(size - 1), || ());
            });
        };
        for _ in 0..random(3) {
            let chunk = random(4) * CHUNK;
            set(chunk, chunk + CHUNK - 1);
        }
        for _ in 0..random(200) {
            let first = random(size);
            set(first, first + [0, 1, 63, 700][random(4) as usize]);
        }
        let words = (size.div_ceil(64)) as usize;
        let before: Vec<u64> = (0..words)
            .map(|_| [0, 0, random(1 << 56)][round % 3])
            .collect();
        let mut user = Windowed {
            words: before.iter().map(|word| AtomicU64::new(*word)).collect(),
            window: [1 << 9, 1 << 18, 7, 100][random(4) as usize],
            open: 0,
            fresh: 0,
        };
        let mut expected = before.clone();
        for _ in 0..2 {
            let first = [0, 0, random(size)][random(3) as usize];
            let last = [size - 1, first + random(size - first)][random(2) as usize];
            maps[0].take(first, last, &mut user).unwrap();
            for bit in bits(&maps[1], first, last, true) {
                expected[(bit / 64) as usize] |= 1 << (bit % 64);
            }
            assert_eq!(
                bits(&maps[0], 0, size - 1, false),
                bits(&maps[1], 0, size - 1, false)
            );
        }
        let user_words: Vec<u64> = user
            .words
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect();
        assert_eq!(user_words, expected, "round {round}");
        let ones = |words: &[u64]| {
            words
                .iter()
                .map(|word| u64::from(word.count_ones()))
                .sum::<u64>()
        };
        assert_eq!(user.fresh, ones(&expected) - ones(&before), "round {round}");
    }
}

/// A visitor with words for all bits from 0 on, which stops at the bit `end`.
struct Until {
    words: Vec<AtomicU64>,
    end: u64,
}

impl Until {
    fn new(last: u64, end: u64) -> Self {
        let words = (0..=last / 64).map(|_| AtomicU64::new(0)).collect();
        Until { words, end }
    }

    fn bits(&self) -> BTreeSet<u64> {
        let word = |nth: u64| self.words[nth as usize].load(Ordering::Relaxed);
        let is_set = |bit: &u64| word(bit / 64) >> (bit % 64) & 1 == 1;
        let words = (0..self.words.len() as u64).filter(|nth| word(*nth) != 0);
        let bits = words.flat_map(|nth| nth * 64..nth * 64 + 64);
        bits.filter(is_set).collect()
    }
}

impl Visitor for &Until {
    type Error = ();

    fn visit(&mut self, first: u64, mask: u64) -> Result<(), ()> {
        if first >= self.end {
            return Err(());
        }
        self.words[first as usize / 64].fetch_or(mask, Ordering::Relaxed);
        Ok(())
    }

    fn place(&self, first: u64, _: u64) -> Place<'_> {
        match self.end {
            u64::MAX => Place::new(&self.words[first as usize / 64..]),
            _ => Place::NONE,
        }
    }
}

/// Bits that are left, few or many, and taken as a whole, in part, or up to a stop: each is there
/// until it is taken, and none comes back. Lists, words, and the moves from one to the other are
/// one set.
#[test]
fn lists_and_words_of_left_bits_are_one_set() {
    const CHUNK: u64 = CHUNK_WORDS * 64;
    const LAST: u64 = 3 * CHUNK - 77;
    let mut x = 88172645463325252u64;
    let mut random = |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 1) % below
    };
    let map = ChunkMap::new(LAST);
    let mut model = BTreeSet::new();
    for round in 0..if cfg!(miri) { 20 } else { 1000 } {
        let chunk = random(3);
        let count = [1, 3, 63, 64, 65, 500][random(6) as usize];
        let mut masks = std::collections::BTreeMap::new();
        for _ in 0..count {
            let bit = random(CHUNK).min(LAST - chunk * CHUNK);
            *masks.entry((bit / 64) as u16).or_insert(0) |= 1u64 << (bit % 64);
            model.insert(chunk * CHUNK + bit);
        }
        let masks: Vec<_> = masks.into_iter().collect();
        assert!(Handed::of(&masks, |left| map.leave(chunk, left)));
        let (first, last) = [
            (0, LAST),
            (chunk * CHUNK, LAST.min(chunk * CHUNK + CHUNK - 1)),
            (random(CHUNK), CHUNK + random(CHUNK)),
        ][random(3) as usize];
        let seen = Until::new(LAST, u64::MAX - 1);
        map.peek_left(first, last, &seen).unwrap();
        let inside: BTreeSet<u64> = model.range(first..=last).copied().collect();
        assert!(seen.bits() == inside, "seen in round {round}");
        let end = [u64::MAX, u64::MAX - 1, random(LAST) & !63][random(3) as usize];
        if random(3) > 0 {
            let taken = Until::new(LAST, end);
            let whole = map.take_left(first, last, &taken).is_ok();
            let expected: BTreeSet<u64> = inside.range(..end).copied().collect();
            assert!(taken.bits() == expected, "taken in round {round}");
            assert_eq!(whole, expected == inside, "in round {round}");
            model.retain(|bit| !expected.contains(bit));
        }
    }
    let rest = Until::new(LAST, u64::MAX);
    map.take_left(0, LAST, &rest).unwrap();
    assert!(rest.bits() == model, "the rest");
}
