//! Models of the summary over the words of a chunk: see `chunk`.

use std::convert::Infallible;

use super::{ChunkMap, Taker};
use crate::sync::model::holds_only_with;
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

impl Taker for Refuses {
    type Error = ();

    fn may_fail(&self) -> bool {
        true
    }

    fn secure(&mut self, _: u64, _: u64) -> Result<bool, ()> {
        Err(())
    }

    fn visit(&mut self, _: u64, _: u64) -> Result<(), ()> {
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
