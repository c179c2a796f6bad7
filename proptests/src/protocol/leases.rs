//! Two harvesters of one page that share a flush queue; each lease is committed or aborted.
//!
//! An abort puts pages back into the marks, which every harvest takes as well. A harvester that
//! takes a mark owes no invalidation of its own. It relies on the debt that the abort handed to the
//! queue *before* it set the mark, and on the queue, in which a flush never covers a debt that is
//! handed over after it began.

use super::explore::{Outcome, Steps, explore};
use super::machine::Machine;

pub(super) const WEAKNESSES: &[&str] = &[
    "an abort puts back before it hands over its debt",
    "a flush that has begun stands for a debt that came later",
    "flushes without draining",
    "clears D without having seen it",
    "an abort forgets what it took",
    "copies before the flush",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Start,
    ClearD,
    Marks,
    ClearMark,
    /// The lease is owed: it goes on to sync, or is aborted.
    Owed,
    Wait,
    Flush,
    Copy,
    /// The lease is synced: it is committed, or aborted.
    Synced,
    AbortOwes,
    AbortPutsBack,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Harvester {
    step: Step,
    recorded: bool,
    gather: bool,
    ticket: u8,
    rounds: u8,
}

/// The flush queue: generations below `finished` have been flushed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Queue {
    owed: bool,
    generation: u8,
    finished: u8,
    /// The debt of the running flush, if there is one.
    running: Option<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    machine: Machine,
    mark: bool,
    queue: Queue,
    harvesters: [Harvester; 2],
    copy: u8,
}

/// The weaknesses of this run.
#[derive(Clone, Copy)]
struct Weak {
    put_back_first: bool,
    join_running: bool,
    no_drain: bool,
    clear_unseen: bool,
    forget: bool,
    copy_early: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let weak = Weak {
        put_back_first: weak("an abort puts back before it hands over its debt"),
        join_running: weak("a flush that has begun stands for a debt that came later"),
        no_drain: weak("flushes without draining"),
        clear_unseen: weak("clears D without having seen it"),
        forget: weak("an abort forgets what it took"),
        copy_early: weak("copies before the flush"),
    };
    let harvester = Harvester {
        step: Step::Start,
        recorded: false,
        gather: false,
        ticket: 0,
        rounds: 2,
    };
    let first = State {
        machine: Machine::new(2),
        mark: false,
        queue: Queue {
            owed: false,
            generation: 0,
            finished: 0,
            running: None,
        },
        harvesters: [harvester; 2],
        copy: 0,
    };
    explore(
        first,
        |s, out| {
            s.machine.steps(out, |machine| State { machine, ..*s });
            for who in 0..2 {
                harvest(*s, who, weak, out);
            }
        },
        |s| {
            let idle = s.harvesters.iter().all(|h| h.step == Step::Start);
            let dirty = s.machine.d || s.mark;
            s.machine.is_over() && idle && !dirty && s.copy != s.machine.data
        },
    )
}

/// The next steps of a harvester.
fn harvest(s: State, who: usize, weak: Weak, out: &mut Steps<State>) {
    let h = s.harvesters[who];
    let with = |h: Harvester, s: State| {
        let mut s = s;
        s.harvesters[who] = h;
        s
    };
    let go = |step| Harvester { step, ..h };
    let done = Harvester {
        step: Step::Start,
        recorded: false,
        gather: false,
        ..h
    };
    let copied = State {
        copy: if h.recorded { s.machine.data } else { s.copy },
        ..s
    };
    match h.step {
        Step::Start if h.rounds == 0 => {}
        Step::Start => {
            let h = Harvester {
                rounds: h.rounds - 1,
                recorded: s.machine.d,
                gather: s.machine.d,
                step: if s.machine.d || weak.clear_unseen {
                    Step::ClearD
                } else {
                    Step::Marks
                },
                ..h
            };
            out.push("harvest: looks at D, records, owes", with(h, s));
        }
        Step::ClearD => {
            let machine = s.machine.clean();
            out.push(
                "harvest: clears D",
                with(go(Step::Marks), State { machine, ..s }),
            );
        }
        Step::Marks => {
            let h = Harvester {
                recorded: h.recorded || s.mark,
                step: if s.mark { Step::ClearMark } else { Step::Owed },
                ..h
            };
            out.push("harvest: looks at the mark, records", with(h, s));
        }
        Step::ClearMark => {
            let s = State { mark: false, ..s };
            out.push("harvest: clears the mark", with(go(Step::Owed), s));
        }
        Step::Owed => {
            let late = weak.join_running && s.queue.running.is_some();
            let synced = Harvester {
                ticket: s.queue.generation - u8::from(late),
                step: Step::Wait,
                ..h
            };
            let mut owing = if weak.copy_early { copied } else { s };
            owing.queue.owed |= h.gather;
            out.push("sync: hands over the debt", with(synced, owing));
            let abort = if weak.put_back_first {
                Step::AbortPutsBack
            } else {
                Step::AbortOwes
            };
            out.push("abort: begins", with(go(abort), s));
        }
        Step::Wait if s.queue.finished > h.ticket => {
            out.push("sync: its generation has finished", with(go(Step::Copy), s));
        }
        Step::Wait if s.queue.running.is_none() => {
            let mut s = s;
            s.queue.running = Some(s.queue.owed);
            s.queue.owed = false;
            s.queue.generation += 1;
            out.push("sync: begins a flush", with(go(Step::Flush), s));
        }
        Step::Wait => {}
        Step::Flush
            if s.machine.is_drained() || weak.no_drain || s.queue.running == Some(false) =>
        {
            let mut s = s;
            if s.queue.running == Some(true) {
                s.machine = s.machine.flushed(false);
            }
            s.queue.running = None;
            s.queue.finished = s.queue.generation;
            out.push("sync: the flush ends", with(go(Step::Wait), s));
        }
        Step::Flush => {}
        Step::Copy => {
            let s = if weak.copy_early { s } else { copied };
            out.push("consumer: copies", with(go(Step::Synced), s));
        }
        Step::Synced => {
            out.push("consumer: commits", with(done, s));
            // The debt is paid, so only the pages are put back.
            let h = Harvester {
                gather: false,
                step: Step::AbortPutsBack,
                ..h
            };
            out.push("consumer: aborts", with(h, s));
        }
        Step::AbortOwes => {
            let mut s = s;
            s.queue.owed |= h.gather;
            let next = if weak.put_back_first {
                done
            } else {
                go(Step::AbortPutsBack)
            };
            out.push("abort: hands over the debt", with(next, s));
        }
        Step::AbortPutsBack => {
            let s = State {
                mark: s.mark || h.recorded && !weak.forget,
                ..s
            };
            let next = if weak.put_back_first && h.gather {
                go(Step::AbortOwes)
            } else {
                done
            };
            out.push("abort: puts back", with(next, s));
        }
    }
}
