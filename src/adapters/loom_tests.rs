//! Models of what adapters do concurrently on their own: a log that is replaced under those who mark in it.

use super::replaceable::Replaceable;
use crate::sync::{Arc, AtomicU64, ONE_MODEL, Ordering, Step, leave_out, thread};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Explores `model`, which says whether all is well, whole and without each of `steps`: it must fail exactly without them.
fn explore(steps: &[Step], model: fn() -> bool) {
    let _one = ONE_MODEL.lock().unwrap_or_else(|e| e.into_inner());
    for step in std::iter::once(None).chain(steps.iter().copied().map(Some)) {
        static COUNTS: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
        COUNTS.iter().for_each(|count| count.store(0, SeqCst));
        leave_out(step);
        loom::model(move || {
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

/// After the acknowledgement nobody marks in the old log, and what is in it and in the new one is all there is.
#[test]
fn no_mark_goes_to_a_log_that_was_replaced() {
    explore(&[Step::WaitForInside, Step::EnterFence], || {
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
    });
}

/// The first log: who found none has written before it was in place, and the first full copy has it.
#[test]
fn who_finds_no_log_has_written_before_there_was_one() {
    explore(&[Step::EnterFence], || {
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
