//! Models of the summary over the words of a chunk: see `chunk`.

use std::convert::Infallible;

use super::{ChunkMap, Taker, Visitor};
use crate::sync::model::{Bound, holds_only_with, holds_within};
use crate::sync::{Arc, Ordering, Step, fence, thread};

fn mark(map: &ChunkMap, bit: u64) {
    map.set(bit, bit, || fence(Ordering::SeqCst));
}

/// Takes all bits of the first word.
fn take(map: &ChunkMap) -> u64 {
    let mut taken = 0;
    let done: Result<(), Infallible> = map.take(0, 63, |_, seen| {
        taken |= seen;
        Ok(())
    });
    done.unwrap();
    taken
}

/// A mark in a line that is being harvested: this harvest has it, or the summary leads the next one to it.
#[test]
fn a_mark_survives_the_clear_of_its_summary() {
    let steps = [Step::SummaryFirst, Step::SummaryFence, Step::GoneFence];
    holds_only_with(&steps, || {
        let map = Arc::new(ChunkMap::new(63));
        mark(&map, 0);
        let marker = thread::spawn({
            let map = map.clone();
            move || mark(&map, 1)
        });
        let first = take(&map);
        marker.join().unwrap();
        first | take(&map) == 0b11
    });
}

/// A mark that finds its bit set has returned: a harvest that starts then finds it, though the one who set the bit may
/// not have come to the summary, unless another harvest has it.
#[test]
fn a_mark_that_is_skipped_is_in_the_summary() {
    holds_only_with(&[Step::SummaryOnSkip], || {
        let map = Arc::new(ChunkMap::new(63));
        let run = |work: fn(&ChunkMap) -> u64| {
            let map = map.clone();
            thread::spawn(move || work(&map))
        };
        let other = run(|map| {
            mark(map, 0);
            0
        });
        let harvester = run(take);
        mark(&map, 0);
        let ours = take(&map);
        let theirs = harvester.join().unwrap();
        other.join().unwrap();
        (ours | theirs) & 1 == 1
    });
}

/// Takes nothing: it has no place for it.
struct Refuses;

impl Visitor for Refuses {
    type Error = ();

    fn visit(&mut self, _: u64, _: u64) -> Result<(), ()> {
        Err(())
    }
}

impl Taker for Refuses {
    fn may_fail(&self) -> bool {
        true
    }

    fn secure(&mut self, _: u64, _: u64) -> Result<bool, ()> {
        Err(())
    }
}

/// A harvest that cannot record hides nothing: a mark that returned before another harvest began is found by that one.
#[test]
fn a_harvest_that_cannot_record_hides_nothing() {
    holds_only_with(&[Step::SecureBeforeHide], || {
        let map = Arc::new(ChunkMap::new(63));
        mark(&map, 0);
        let other = thread::spawn({
            let map = map.clone();
            move || take(&map)
        });
        // The other may have been first.
        let _ = map.take(0, 63, Refuses);
        let found = other.join().unwrap() == 1;
        found
    });
}

/// Two threads set bits in a bitmap that has nothing yet, and a harvester comes: who gets to what another one has installed
/// finds it whole.
#[test]
fn what_is_installed_is_whole() {
    holds_only_with(&[Step::PublishChunk], || {
        let map = Arc::new(ChunkMap::new(63));
        let marker = thread::spawn({
            let map = map.clone();
            move || mark(&map, 1)
        });
        mark(&map, 0);
        let first = take(&map);
        marker.join().unwrap();
        first | take(&map) == 0b11
    });
}

/// One of the models fails with three preemptions only.
const THREE: Bound = Bound::between(3, usize::MAX);

/// The bits of a chunk of the model: two lines of a word.
const CHUNK: u64 = 128;

fn mark_whole(map: &ChunkMap) {
    map.set(0, CHUNK - 1, || fence(Ordering::SeqCst));
}

/// Takes the bits `first..=last`; which words had any.
fn take_words(map: &ChunkMap, first: u64, last: u64) -> u64 {
    let mut taken = 0;
    let done: Result<(), Infallible> = map.take(first, last, |bit, seen| {
        taken |= u64::from(seen != 0) << (bit / 64);
        Ok(())
    });
    done.unwrap();
    taken
}

/// A mark of a whole chunk while all of it is harvested: this harvest has it, or the next one finds it.
#[test]
fn a_whole_chunk_survives_a_harvest_of_all() {
    let steps = [Step::SummaryFirst, Step::SummaryFence, Step::GoneFence];
    holds_within(THREE, &steps, || {
        let map = Arc::new(ChunkMap::new(CHUNK - 1));
        for bit in [0, 64] {
            mark(&map, bit);
            // A part of a line: its summary stays.
            take_words(&map, bit, bit);
        }
        let marker = thread::spawn({
            let map = map.clone();
            move || mark_whole(&map)
        });
        let first = take_words(&map, 0, CHUNK - 1);
        marker.join().unwrap();
        first | take_words(&map, 0, CHUNK - 1) == 0b11
    });
}

/// Two harvests of the two halves of a chunk that is whole: each has its half, and beside a single mark nothing is lost.
#[test]
fn a_whole_chunk_is_split_between_harvests() {
    holds_within(THREE, &[Step::PublishRest], || {
        let map = Arc::new(ChunkMap::new(CHUNK - 1));
        mark_whole(&map);
        let upper = thread::spawn({
            let map = map.clone();
            move || take_words(&map, 64, CHUNK - 1)
        });
        let lower = take_words(&map, 0, 63);
        // Whoever comes behind the lower harvest finds the upper half, unless the upper one has it.
        let rest = take_words(&map, 0, CHUNK - 1);
        let upper = upper.join().unwrap();
        lower & 1 == 1 && (upper | rest) & 0b10 == 0b10
    });
}

/// A single mark in a chunk that is split meanwhile.
#[test]
fn a_single_mark_survives_a_split() {
    holds_within(THREE, &[], || {
        let map = Arc::new(ChunkMap::new(CHUNK - 1));
        mark_whole(&map);
        let marker = thread::spawn({
            let map = map.clone();
            move || mark(&map, 64)
        });
        let lower = take_words(&map, 0, 63);
        marker.join().unwrap();
        lower & 1 == 1 && take_words(&map, 64, CHUNK - 1) == 0b10
    });
}

/// Takes words line by line, as one whose recording may fail; which of them had their second bit.
struct ByLine<'a>(&'a mut u64);

impl Visitor for ByLine<'_> {
    type Error = Infallible;

    fn visit(&mut self, bit: u64, seen: u64) -> Result<(), Infallible> {
        *self.0 |= (seen >> 1 & 1) << (bit / 64);
        Ok(())
    }
}

impl Taker for ByLine<'_> {
    fn may_fail(&self) -> bool {
        true
    }

    fn secure(&mut self, _: u64, _: u64) -> Result<bool, Infallible> {
        Ok(true)
    }
}

/// A mark of a whole chunk whose words have bits already, while a harvest takes it line by line: this harvest has it, or the next
/// one finds it.
#[test]
fn a_whole_chunk_survives_a_harvest_that_may_fail() {
    holds_within(THREE, &[Step::LookBehindHide], || {
        let map = Arc::new(ChunkMap::new(CHUNK - 1));
        mark(&map, 0);
        mark(&map, 64);
        let marker = thread::spawn({
            let map = map.clone();
            move || mark_whole(&map)
        });
        let mut found = 0;
        let first = map.take(0, CHUNK - 1, ByLine(&mut found));
        marker.join().unwrap();
        let second = map.take(0, CHUNK - 1, ByLine(&mut found));
        first.is_ok() && second.is_ok() && found == 0b11
    });
}

/// A mark that finds a chunk whole, while one harvest splits it and another one, which had looked before the chunk was whole, has
/// taken the words of that split: the mark is found by the next harvest.
#[test]
fn a_mark_does_not_rely_on_a_chunk_that_is_being_split() {
    holds_within(THREE, &[Step::AnnounceSplit], || {
        let map = Arc::new(ChunkMap::new(CHUNK - 1));
        mark(&map, 64);
        let split = thread::spawn({
            let map = map.clone();
            move || {
                mark_whole(&map);
                take_words(&map, 0, 63)
            }
        });
        take_words(&map, 64, CHUNK - 1);
        mark_whole(&map);
        split.join().unwrap();
        take_words(&map, 64, CHUNK - 1) == 0b10
    });
}
