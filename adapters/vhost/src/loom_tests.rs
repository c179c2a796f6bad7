//! Models of what adapters do concurrently on their own: a log that is replaced while threads mark
//! in it.

use super::log_list::{LogList, LogWords, clear, seen};
use super::replaceable::Replaceable;
use dirtymap::sync::model::holds_only_with;
use dirtymap::sync::{Arc, AtomicU64, Ordering, Step, thread};

/// A back end that writes one page and marks it, while its log is replaced.
struct BackEnd {
    data: AtomicU64,
    logs: [AtomicU64; 2],
    /// Which of the logs is marked in.
    log: Replaceable<usize>,
}

impl BackEnd {
    fn new() -> Arc<Self> {
        Arc::new(BackEnd {
            data: AtomicU64::new(0),
            logs: [AtomicU64::new(0), AtomicU64::new(0)],
            log: Replaceable::default(),
        })
    }

    fn write(&self, value: u64) {
        self.data.store(value, Ordering::Relaxed);
        self.log.read(|log| {
            if let Some(log) = log {
                self.logs[*log].fetch_or(1, Ordering::Release);
            }
        });
    }

    /// Copies the page if it is dirty in `log`.
    fn harvest(&self, log: usize, copy: &mut u64) {
        if self.logs[log].swap(0, Ordering::AcqRel) == 1 {
            *copy = self.data.load(Ordering::Relaxed);
        }
    }
}

/// After the acknowledgement no thread marks in the old log, and the two logs have all marks.
#[test]
fn no_mark_goes_to_a_log_that_was_replaced() {
    holds_only_with(
        &[Step::WaitForInside, Step::EnterFence, Step::ReplaceFence],
        || {
            let back_end = BackEnd::new();
            back_end.log.replace(Box::new(0));
            let writer = thread::spawn({
                let back_end = Arc::clone(&back_end);
                move || {
                    back_end.write(1);
                    back_end.write(2);
                }
            });
            // Kept, for without the wait a reader may still be at it.
            let _old = back_end.log.replace(Box::new(1));
            let mut copy = 0;
            back_end.harvest(0, &mut copy);
            writer.join().unwrap();
            let late = back_end.logs[0].load(Ordering::Relaxed) != 0;
            back_end.harvest(1, &mut copy);
            !late && copy == 2
        },
    );
}

/// The first log: a writer that found none wrote before it was in place, and the first full copy
/// has that write.
#[test]
fn a_writer_without_a_log_wrote_before_the_first_copy() {
    holds_only_with(&[Step::EnterFence, Step::ReplaceFence], || {
        let back_end = BackEnd::new();
        let writer = thread::spawn({
            let back_end = Arc::clone(&back_end);
            move || back_end.write(1)
        });
        back_end.log.replace(Box::new(0));
        let mut copy = back_end.data.load(Ordering::Relaxed);
        writer.join().unwrap();
        back_end.harvest(0, &mut copy);
        copy == 1
    });
}

/// A log of one word.
struct Word([AtomicU64; 1]);

impl Word {
    fn new() -> Self {
        Word([AtomicU64::new(0)])
    }
}

impl LogWords for Word {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// A front end with its back end.
struct Swapping {
    data: AtomicU64,
    logs: LogList<Word>,
    /// What the back end marks in.
    log: Replaceable<Arc<Word>>,
}

impl Swapping {
    fn write(&self, value: u64) {
        self.data.store(value, Ordering::Relaxed);
        self.log.read(|log| {
            if let Some(log) = log {
                log.0[0].fetch_or(1, Ordering::Release);
            }
        });
    }

    fn harvest(&self, copy: &mut u64) {
        let dirty = self.logs.read(|logs| {
            let found = seen(logs, 0, 1);
            found != 0 && clear(logs, 0, found) != 0
        });
        if dirty {
            *copy = self.data.load(Ordering::Relaxed);
        }
    }
}

/// At every moment of a swap, a harvest that begins after a write finds it, or another one has;
/// after it nothing is left behind.
#[test]
fn a_mark_is_found_at_every_moment_of_a_swap() {
    holds_only_with(&[Step::ListFirst, Step::CarryOver], || {
        let logs = LogList::new(Word::new());
        let log = Replaceable::default();
        log.replace(Box::new(logs.newest()));
        let all = Arc::new(Swapping {
            data: AtomicU64::new(0),
            logs,
            log,
        });
        let back_end = thread::spawn({
            let all = Arc::clone(&all);
            move || all.write(1)
        });
        let swap = thread::spawn({
            let all = Arc::clone(&all);
            move || {
                let fresh = all.logs.push(|_| Ok::<_, ()>(Word::new())).unwrap();
                let _old = all.log.replace(Box::new(Arc::clone(&fresh)));
                all.logs.acknowledge(&fresh);
            }
        });
        back_end.join().unwrap();
        let mut copy = 0;
        all.harvest(&mut copy);
        swap.join().unwrap();
        copy == 1
    });
}

/// A mark in the old log is carried over while two harvests look: whichever of the logs a harvest
/// finds it in, it sees the data of the mark.
fn a_mark_that_is_carried_over(find: fn(&LogList<Word>) -> bool) -> bool {
    let logs = Arc::new(LogList::new(Word::new()));
    let old = logs.newest();
    let data = Arc::new(AtomicU64::new(0));
    let fresh = logs.push(|_| Ok::<_, ()>(Word::new())).unwrap();
    let back_end = thread::spawn({
        let (old, data) = (Arc::clone(&old), Arc::clone(&data));
        move || {
            // Relaxed: what the mark publishes.
            data.store(1, Ordering::Relaxed);
            // Release: the mark of a back end.
            old.0[0].fetch_or(1, Ordering::Release);
        }
    });
    let carries = thread::spawn({
        let (logs, fresh) = (Arc::clone(&logs), Arc::clone(&fresh));
        move || logs.acknowledge(&fresh)
    });
    let found = find(&logs);
    // Relaxed: ordered by what found the mark.
    let seen = data.load(Ordering::Relaxed) == 1;
    back_end.join().unwrap();
    carries.join().unwrap();
    !found || seen
}

/// A look that takes nothing.
#[test]
fn a_mark_that_is_carried_over_shows_its_data() {
    holds_only_with(&[], || {
        a_mark_that_is_carried_over(|logs| logs.read(|logs| seen(logs, 0, 1) != 0))
    });
}

/// A harvest, which clears what it finds.
#[test]
fn a_mark_that_is_carried_over_is_taken_with_its_data() {
    holds_only_with(&[], || {
        a_mark_that_is_carried_over(|logs| logs.read(|logs| clear(logs, 0, 1) != 0))
    });
}
