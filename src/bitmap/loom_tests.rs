//! Models of the summary over the words of a chunk: see `chunk`.

use std::convert::Infallible;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::ChunkMap;
use crate::sync::{Arc, Ordering, Step, fence, leave_out, thread};

/// One model at a time: the step that is left out is global.
static ONE_AT_A_TIME: StdMutex<()> = StdMutex::new(());

/// Runs `model` whole, when it must hold, and without each of `steps`, when it must fail.
fn holds_only_with(steps: &[Step], model: impl Fn() -> bool + Sync + Send + Copy + 'static) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    static COUNTS: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
    for step in std::iter::once(None).chain(steps.iter().copied().map(Some)) {
        COUNTS.iter().for_each(|count| count.store(0, SeqCst));
        leave_out(step);
        let mut builder = loom::model::Builder::new();
        // One of the models fails with three preemptions only.
        builder.preemption_bound = builder.preemption_bound.map(|bound| bound.max(3));
        builder.check(move || {
            COUNTS[0].fetch_add(1, SeqCst);
            COUNTS[1].fetch_add(usize::from(!model()), SeqCst);
        });
        leave_out(None);
        let [executions, failures] = COUNTS.each_ref().map(|count| count.load(SeqCst));
        println!("without {step:?}: fails in {failures} of {executions} executions");
        assert!(executions > 1, "the model explored nothing");
        assert_eq!(failures == 0, step.is_none(), "without {step:?}");
    }
}

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
    holds_only_with(&steps, || {
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
    holds_only_with(&[Step::PublishRest], || {
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
    holds_only_with(&[], || {
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

/// A mark that finds a chunk whole, while one harvest splits it and another one, which had looked before the chunk was whole, has
/// taken the words of that split: the mark is found by the next harvest.
#[test]
fn a_mark_does_not_rely_on_a_chunk_that_is_being_split() {
    holds_only_with(&[Step::AnnounceSplit], || {
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
