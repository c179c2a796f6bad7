//! Models of the marks and harvests of a chunk and its summary: see `chunk`.

use std::convert::Infallible;

use super::{CHUNK_WORDS, ChunkMap, Handed, Place, Taker, Visitor};
use crate::sync::model::{Bound, holds_only_with, holds_within};
use crate::sync::{Arc, AtomicU64, Ordering, Step, fence, thread};

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

/// A mark in a line that is being harvested: this harvest has it, or the summary leads the next one
/// to it.
#[test]
fn a_mark_survives_the_clear_of_its_summary() {
    let steps = [Step::SummaryFirst, Step::SummaryFence, Step::WordFence];
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

/// A mark that finds its bit set has returned. A harvest that starts then finds the bit, unless
/// another harvest has it, though the thread that set the bit may not have reached the summary.
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

/// Takes nothing, because it has no place to record.
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

/// A harvest that cannot record hides nothing: another harvest, which began after the mark had
/// returned, finds it.
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

/// Two threads set bits in an empty bitmap, and a harvester comes: a thread that finds a chunk that
/// another thread has installed finds it whole.
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

/// Some models fail with three preemptions only.
const THREE: Bound = Bound::between(3, usize::MAX);
/// Some with four.
const FOUR: Bound = Bound::between(4, usize::MAX);

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

/// A mark of a whole chunk while all of it is harvested: this harvest has it, or the next one finds
/// it.
#[test]
fn a_whole_chunk_survives_a_harvest_of_all() {
    let steps = [Step::SummaryFirst, Step::SummaryFence, Step::WholeFence];
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

/// Two harvests of the two halves of a chunk that is whole: each gets its half.
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
        // A harvest after the lower one finds the upper half, unless the upper harvest has it.
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

/// Takes words line by line, as a fallible taker does. Says which of them had their second bit.
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

/// A mark of a whole chunk whose words have bits already, while a harvest takes it line by line:
/// this harvest has it, or the next one finds it.
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

/// A chunk is whole, and one harvest takes its lower half. A look at the upper half that begins
/// after the mark finds it, whole or in the words.
fn a_look_beside_a_split(look: fn(&ChunkMap) -> u64) -> bool {
    let map = Arc::new(ChunkMap::new(CHUNK - 1));
    mark_whole(&map);
    // In a thread of its own, which has performed no fence and has seen no word.
    let upper = thread::spawn({
        let map = map.clone();
        move || look(&map)
    });
    let lower = take_words(&map, 0, 63);
    lower == 0b01 && upper.join().unwrap() == 0b10
}

/// The look of a peek.
#[test]
fn a_peek_finds_the_rest_of_a_split() {
    holds_within(THREE, &[], || {
        a_look_beside_a_split(|map| {
            let mut found = 0;
            let done: Result<(), Infallible> = map.peek(64, CHUNK - 1, |bit, seen| {
                found |= u64::from(seen != 0) << (bit / 64);
                Ok(())
            });
            done.unwrap();
            found
        })
    });
}

/// The look of a harvest that may fail.
#[test]
fn a_harvest_that_may_fail_finds_the_rest_of_a_split() {
    holds_within(THREE, &[], || {
        a_look_beside_a_split(|map| {
            let mut found = 0;
            let done = map.take(64, CHUNK - 1, ByLine(&mut found));
            done.unwrap();
            found
        })
    });
}

/// A mark finds a chunk whole while one harvest splits it. Another harvest, which had looked before
/// the chunk was whole, took the words of that split. The next harvest finds the mark.
#[test]
fn a_mark_does_not_rely_on_a_chunk_that_is_being_split() {
    holds_within(THREE, &[Step::AnnounceSplit], || {
        a_mark_against_a_split(|map| mark(map, 64))
    });
}

/// The same, where the harvest that splits finds the words set already. Without a fence it may find
/// the words as they were before the other harvest took them, and so leave them clear.
#[test]
fn a_split_does_not_rely_on_words_that_are_being_taken() {
    holds_within(THREE, &[Step::SplitFence], || {
        a_mark_against_a_split(|map| {
            map.set(64, CHUNK - 1, || fence(Ordering::SeqCst));
        })
    });
}

fn a_mark_against_a_split(before: fn(&ChunkMap)) -> bool {
    let map = Arc::new(ChunkMap::new(CHUNK - 1));
    before(&map);
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
}

/// Two harvests split a chunk, one of them late: it announced its split before the chunk was whole
/// anew. If both splits were one state, the late harvest would end the split of the other before
/// the words are set, and a harvest that comes then would find nothing.
#[test]
fn a_late_split_does_not_end_the_next_one() {
    holds_within(THREE, &[Step::NextNumber], || {
        let map = Arc::new(ChunkMap::new(CHUNK - 1));
        let marked = Arc::new(AtomicU64::new(0));
        mark_whole(&map);
        let late = thread::spawn({
            let (map, marked) = (map.clone(), marked.clone());
            move || {
                take_words(&map, 0, 63);
                // Acquire: pairs with the Release below; the next harvest begins after the mark.
                let after = marked.load(Ordering::Acquire) == 1;
                !after || take_words(&map, 64, CHUNK - 1) == 0b10
            }
        });
        // Ends the first split, perhaps.
        take_words(&map, 64, CHUNK - 1);
        mark_whole(&map);
        // Release: as above.
        marked.store(1, Ordering::Release);
        take_words(&map, 0, 63);
        late.join().unwrap()
    });
}

/// A mark of several words while their lines are harvested: this harvest has them, or the summary
/// leads the next one to them.
#[test]
fn a_mark_of_words_survives_the_clear_of_their_summary() {
    let steps = [Step::SummaryFirst, Step::SummaryFence, Step::WordsFence];
    holds_within(THREE, &steps, || {
        let map = Arc::new(ChunkMap::new(CHUNK - 1));
        for bit in [0, 64] {
            mark(&map, bit);
            // A part of a line: its summary stays.
            take_words(&map, bit, bit);
        }
        let marker = thread::spawn({
            let map = map.clone();
            move || {
                map.set(1, CHUNK - 1, || fence(Ordering::SeqCst));
            }
        });
        let first = take_words(&map, 0, CHUNK - 1);
        marker.join().unwrap();
        first | take_words(&map, 0, CHUNK - 1) == 0b11
    });
}

/// A mark finds its bit set, and the summary set, while a harvest clears the summary: the harvest
/// has the bit, or the mark sees the clear and sets the summary again. A harvest that starts after
/// the mark must not find the line clean.
#[test]
fn a_mark_that_is_skipped_sees_the_clear_of_its_summary() {
    holds_within(FOUR, &[Step::SkipFence, Step::SummaryOnSkip], || {
        let map = Arc::new(ChunkMap::new(63));
        mark(&map, 1);
        // A part of a line: its summary stays.
        take_words(&map, 1, 1);
        let skips = thread::spawn({
            let map = map.clone();
            move || {
                mark(&map, 0);
                take(&map)
            }
        });
        let harvester = thread::spawn({
            let map = map.clone();
            move || take(&map)
        });
        mark(&map, 0);
        let ours = skips.join().unwrap();
        (ours | harvester.join().unwrap()) & 1 == 1
    });
}

/// A mark looks at its area after it has returned from the bitmap, and an unmap takes the bits
/// after it has declared the area gone: the unmap has the bit, or the mark sees that the area has
/// gone.
#[test]
fn a_mark_that_sets_the_summary_and_an_unmap_do_not_miss_each_other() {
    holds_within(THREE, &[Step::SummarizedFence], || {
        a_mark_against_an_unmap(|_| ())
    });
}

/// The same, where another mark sets the summary of both.
#[test]
fn a_mark_that_finds_the_summary_set_and_an_unmap_do_not_miss_each_other() {
    holds_within(FOUR, &[Step::FoundFence], || {
        a_mark_against_an_unmap(|map| {
            let map = map.clone();
            thread::spawn(move || mark(&map, 1));
        })
    });
}

fn a_mark_against_an_unmap(beside: fn(&Arc<ChunkMap>)) -> bool {
    let map = Arc::new(ChunkMap::new(63));
    let gone = Arc::new(AtomicU64::new(0));
    // Installs the chunk.
    mark(&map, 2);
    take(&map);
    beside(&map);
    let unmap = thread::spawn({
        let (map, gone) = (map.clone(), gone.clone());
        move || {
            // Relaxed: ordered by the fence.
            gone.store(1, Ordering::Relaxed);
            // SeqCst: F6, as in `space::change`.
            fence(Ordering::SeqCst);
            take(&map)
        }
    });
    mark(&map, 0);
    // Relaxed: ordered by M3.
    let sees = gone.load(Ordering::Relaxed) == 1;
    sees | (unmap.join().unwrap() & 1 == 1)
}

/// A harvest that finds a mark sees the data that was written before the mark, in spaces whose
/// marks perform no fence too.
#[test]
fn a_mark_of_a_word_publishes_its_data() {
    holds_only_with(&[Step::PublishMark], || publishes_data(0, 0));
}

/// The same for a mark of several words.
#[test]
fn a_mark_of_words_publishes_its_data() {
    holds_only_with(&[Step::PublishMarks], || publishes_data(1, CHUNK - 1));
}

/// The same for a mark of a whole chunk.
#[test]
fn a_mark_of_a_whole_chunk_publishes_its_data() {
    holds_only_with(&[Step::PublishWhole], || publishes_data(0, CHUNK - 1));
}

/// Whether a harvest that finds a mark of `first..=last` sees the data of the mark.
fn publishes_data(first: u64, last: u64) -> bool {
    let map = Arc::new(ChunkMap::new(CHUNK - 1));
    let data = Arc::new(AtomicU64::new(0));
    // Summaries that stay, so that the harvest looks.
    for bit in [0, 64] {
        mark(&map, bit);
        take_words(&map, bit, bit);
    }
    let marker = thread::spawn({
        let (map, data) = (map.clone(), data.clone());
        move || {
            // Relaxed: what the mark publishes.
            data.store(1, Ordering::Relaxed);
            map.set(first, last, || ());
        }
    });
    let found = take_words(&map, 0, CHUNK - 1) != 0;
    // Relaxed: ordered by the Acquire of the harvest.
    let seen = data.load(Ordering::Relaxed) == 1;
    marker.join().unwrap();
    !found || seen
}

/// A look that trusts no summary reaches a chunk that another thread has just installed, and finds
/// it whole.
#[test]
fn a_look_at_all_words_finds_a_fresh_chunk_whole() {
    holds_only_with(&[Step::PublishChunk], || {
        let map = Arc::new(ChunkMap::new(63));
        let look = |map: &ChunkMap| {
            let mut found = 0;
            let done: Result<(), Infallible> = map.peek_all(0, 63, |_, seen| {
                found |= seen;
                Ok(())
            });
            done.unwrap();
            found
        };
        let early = thread::spawn({
            let map = map.clone();
            move || look(&map)
        });
        mark(&map, 0);
        early.join().unwrap() <= 1 && look(&map) == 1
    });
}

/// The bitmap of a harvest: it has a place for each word, and so for a list as a whole.
struct Whole([AtomicU64; CHUNK_WORDS as usize]);

impl Visitor for &Whole {
    type Error = Infallible;

    fn visit(&mut self, first: u64, mask: u64) -> Result<(), Infallible> {
        // Relaxed: one thread.
        self.0[first as usize / 64].fetch_or(mask, Ordering::Relaxed);
        Ok(())
    }

    fn place(&self, first: u64, _: u64) -> Place<'_> {
        Place::new(&self.0[first as usize / 64..])
    }
}

/// Takes what was left in the chunk, as a harvest of its consumer does; returns the first word.
fn take_left(map: &ChunkMap) -> u64 {
    let taken = Whole(std::array::from_fn(|_| AtomicU64::new(0)));
    map.take_left(0, CHUNK_WORDS * 64 - 1, &taken).unwrap();
    // Relaxed: one thread.
    taken.0[0].load(Ordering::Relaxed)
}

/// Leaves bits of the first word of the chunk, unless it is claimed; returns those that were left.
fn leave(map: &ChunkMap, mask: u64) -> u64 {
    match Handed::of(&[(0, mask)], |left| map.leave(0, left)) {
        true => mask,
        false => 0,
    }
}

/// A harvest leaves bits, few or too many for a list, while their consumer takes a list: each bit
/// is taken now or later, and none comes back.
#[test]
fn what_is_left_while_a_list_is_taken_is_taken_now_or_later() {
    for mask in [0b1, 0b1_1111_0001] {
        holds_only_with(&[Step::ClaimLeft, Step::PublishLeft], move || {
            let map = Arc::new(ChunkMap::new(CHUNK_WORDS * 64 - 1));
            assert_eq!(leave(&map, 0b100), 0b100);
            let other = thread::spawn({
                let map = map.clone();
                move || leave(&map, mask)
            });
            let taken = take_left(&map);
            let left = other.join().unwrap();
            taken | take_left(&map) == 0b100 | left && take_left(&map) == 0
        });
    }
}
