//! A harvest that skips a subtree by the accessed bit of its upper entry.
//!
//! Two rules make it sound. Who clears A owes a flush of the subtree, caches of upper entries included: a device that
//! goes on through such a cache dirties leaves and never sets A again. And a subtree is skipped only if A is clear now
//! *and* was clear at the harvest before: between clear and flush a leaf may have been dirtied through the cache.

use super::explore::{Outcome, explore};
use super::machine::Machine;

pub(super) const WEAKNESSES: &[&str] = &[
    "skips after one quiet harvest",
    "clears A and does not flush the subtree",
    "does not flush the dirty leaf",
    "flushes without draining",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Start,
    ClearA,
    ClearD,
    Flush,
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    machine: Machine,
    step: Step,
    /// Whether A was set at the harvest before.
    before: bool,
    took_a: bool,
    took_d: bool,
    copy: u8,
    harvests: u8,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = |name| weakness == Some(name);
    let one_quiet = weak("skips after one quiet harvest");
    let no_subtree = weak("clears A and does not flush the subtree");
    let no_leaf = weak("does not flush the dirty leaf");
    let no_drain = weak("flushes without draining");
    let skips = |s: &State| !s.machine.a && (one_quiet || !s.before);
    let first = State {
        machine: Machine::new(3),
        step: Step::Start,
        // The first harvest looks at everything.
        before: true,
        took_a: false,
        took_d: false,
        copy: 0,
        harvests: 4,
    };
    explore(
        first,
        |now, out| {
            let s = *now;
            s.machine.steps(out, |machine| State { machine, ..s });
            match s.step {
                Step::Start if s.harvests == 0 => {}
                Step::Start if skips(&s) => out.push(
                    "harvest: skips the subtree",
                    State {
                        before: false,
                        harvests: s.harvests - 1,
                        ..s
                    },
                ),
                Step::Start => out.push(
                    "harvest: begins",
                    State {
                        step: Step::ClearA,
                        ..s
                    },
                ),
                Step::ClearA => out.push(
                    "harvest: clears A",
                    State {
                        took_a: s.machine.a,
                        machine: s.machine.unaccessed(),
                        step: Step::ClearD,
                        ..s
                    },
                ),
                Step::ClearD => out.push(
                    "harvest: records and clears D",
                    State {
                        took_d: s.machine.d,
                        machine: s.machine.clean(),
                        step: Step::Flush,
                        ..s
                    },
                ),
                Step::Flush if s.machine.is_drained() || no_drain => {
                    let subtree = s.took_a && !no_subtree;
                    let machine = if subtree || s.took_d && !no_leaf {
                        s.machine.flushed(subtree)
                    } else {
                        s.machine
                    };
                    let step = Step::Copy;
                    out.push("harvest: flushes", State { machine, step, ..s });
                }
                Step::Flush => {}
                Step::Copy => out.push(
                    "harvest: copies",
                    State {
                        copy: if s.took_d { s.machine.data } else { s.copy },
                        before: s.took_a,
                        took_a: false,
                        took_d: false,
                        harvests: s.harvests - 1,
                        step: Step::Start,
                        ..s
                    },
                ),
            }
        },
        |s| {
            // One more harvest, after the end, copies what it would find.
            let finds = !skips(s) && s.machine.d;
            s.machine.is_over() && s.step == Step::Start && !finds && s.copy != s.machine.data
        },
    )
}
