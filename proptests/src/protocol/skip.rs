//! Harvests that skip a subtree by the accessed bit of its upper entry, while another harvest does
//! the same.
//!
//! The upper entry has A, which the device sets when it walks the entry in memory. The same word
//! has the software's state of the subtree:
//!
//! ```text
//!      nothing dirty:            flush of the subtree,      A clear: one
//!      clear A                   upper entries too          harvest looks     A still clear
//!  Hot --------------> Cleared ---> Flushing ---> Flushed ---> Looking ----------------> Quiet
//!   ^                                                             |                        |
//!   +------------------------- A is set --------------------------+------------------------+
//! ```
//!
//! A harvest skips only a quiet subtree with A clear. Between the clear and the flush, a device may
//! dirty leaves through a cached upper entry without setting A. So the look that counts begins
//! after the flush. The clear of A and the new state are one step. A flush covers only a clear
//! before its beginning. While one harvest looks, no other one clears A, because the first one
//! would not see that A was set meanwhile.

use super::explore::{Outcome, Steps, explore};
use super::machine::Machine;

pub(super) const WEAKNESSES: &[&str] = &[
    "a look before the flush counts",
    "the flush leaves upper entries cached",
    "clears A, then says so",
    "the flush stands for what was cleared meanwhile",
    "what is skipped need not have A clear",
    "A is cleared while another harvest looks",
    "does not flush the dirty leaf",
    "flushes without draining",
];

/// The software's state of the subtree.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Known {
    Hot,
    Cleared,
    Flushing,
    Flushed,
    Looking,
    Quiet,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Start,
    LookD,
    ClearD,
    Judge,
    SayCleared,
    Sync,
    Flush,
    SayFlushed,
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Harvester {
    step: Step,
    rounds: u8,
    /// The upper entry at the beginning of the look.
    a: bool,
    known: Known,
    /// It may set the state to quiet.
    looks: bool,
    recorded: bool,
    owes_subtree: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    machine: Machine,
    known: Known,
    /// A flush of the subtree runs. Flushes run one after the other.
    flushing: bool,
    harvesters: [Harvester; 2],
    copy: u8,
    /// A harvest that began after the last write did not report it, and no other lease has it.
    missed: bool,
}

#[derive(Clone, Copy)]
struct Weak {
    early_look: bool,
    leaf_only: bool,
    two_steps: bool,
    late_clear: bool,
    ignores_a: bool,
    shared_look: bool,
    no_leaf: bool,
    no_drain: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let weak = Weak {
        early_look: weak("a look before the flush counts"),
        leaf_only: weak("the flush leaves upper entries cached"),
        two_steps: weak("clears A, then says so"),
        late_clear: weak("the flush stands for what was cleared meanwhile"),
        ignores_a: weak("what is skipped need not have A clear"),
        shared_look: weak("A is cleared while another harvest looks"),
        no_leaf: weak("does not flush the dirty leaf"),
        no_drain: weak("flushes without draining"),
    };
    let harvester = |rounds| Harvester {
        step: Step::Start,
        rounds,
        a: false,
        known: Known::Hot,
        looks: false,
        recorded: false,
        owes_subtree: false,
    };
    let first = State {
        machine: Machine::new(2),
        known: Known::Hot,
        flushing: false,
        harvesters: [harvester(3), harvester(2)],
        copy: 0,
        missed: false,
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
            let finds = s.machine.d && !skips(s, weak);
            s.missed || s.machine.is_over() && idle && !finds && s.copy != s.machine.data
        },
    )
}

fn skips(s: &State, weak: Weak) -> bool {
    (!s.machine.a || weak.ignores_a) && s.known == Known::Quiet
}

/// The next steps of a harvester.
fn harvest(mut s: State, who: usize, weak: Weak, out: &mut Steps<State>) {
    let mut h = s.harvesters[who];
    let held = s.harvesters[1 - who].recorded;
    if h.step == Step::LookD {
        // A bitmap that cannot record more ends the harvest half-way.
        let mut s = s;
        s.harvesters[who].step = Step::Sync;
        if h.looks {
            s.known = Known::Hot;
        }
        out.push("harvest: stops", s);
    }
    let name = match h.step {
        Step::Start if h.rounds == 0 => return,
        Step::Start if skips(&s, weak) => {
            h.rounds -= 1;
            s.missed |= s.machine.is_over() && !held && s.copy != s.machine.data;
            "harvest: skips the subtree"
        }
        Step::Start => {
            h.rounds -= 1;
            h.a = s.machine.a;
            h.known = s.known;
            h.looks = !s.machine.a
                && (s.known == Known::Flushed || weak.early_look && s.known == Known::Cleared);
            if h.looks {
                s.known = Known::Looking;
            }
            h.step = Step::LookD;
            "harvest: looks at the upper entry"
        }
        Step::LookD => {
            h.recorded = s.machine.d;
            h.step = if s.machine.d {
                Step::ClearD
            } else {
                Step::Judge
            };
            "harvest: looks at D, records"
        }
        Step::ClearD => {
            s.machine = s.machine.clean();
            h.step = Step::Judge;
            "harvest: clears D"
        }
        // One compare-exchange of the upper entry, which succeeds only if the entry is as at the
        // beginning of the look.
        Step::Judge => {
            h.step = Step::Sync;
            let free = s.known == h.known && h.known != Known::Looking;
            if h.looks && s.known == Known::Looking {
                s.known = if s.machine.a {
                    Known::Hot
                } else {
                    Known::Quiet
                };
                "harvest: its look is over"
            } else if !h.a && !h.recorded && matches!(h.known, Known::Cleared | Known::Flushing) {
                // The harvester that cleared A may never reach the flush.
                h.owes_subtree = true;
                "harvest: owes the flush again"
            } else if h.a == s.machine.a
                && (h.a || h.known == Known::Hot)
                && !h.recorded
                && (free || weak.shared_look)
            {
                s.machine = s.machine.unaccessed();
                h.owes_subtree = true;
                if weak.two_steps {
                    h.step = Step::SayCleared;
                } else {
                    s.known = Known::Cleared;
                }
                "harvest: clears A"
            } else {
                "harvest: leaves the upper entry as it is"
            }
        }
        Step::SayCleared => {
            s.known = Known::Cleared;
            h.step = Step::Sync;
            "harvest: says that A was cleared"
        }
        Step::Sync if h.owes_subtree => {
            if s.flushing {
                return;
            }
            s.flushing = true;
            if s.known == Known::Cleared {
                s.known = Known::Flushing;
            }
            h.step = Step::Flush;
            "sync: begins to flush the subtree"
        }
        Step::Sync => {
            h.step = Step::Flush;
            "sync: begins to flush the leaf"
        }
        Step::Flush if h.owes_subtree || h.recorded => {
            if !s.machine.is_drained() && !weak.no_drain {
                return;
            }
            if h.owes_subtree || !weak.no_leaf {
                let subtree = h.owes_subtree && !weak.leaf_only;
                s.machine = s.machine.flushed(subtree);
            }
            h.step = if h.owes_subtree {
                Step::SayFlushed
            } else {
                Step::Copy
            };
            "sync: the flush ends"
        }
        Step::SayFlushed => {
            s.flushing = false;
            if s.known == Known::Flushing || weak.late_clear && s.known == Known::Cleared {
                s.known = Known::Flushed;
            }
            h.step = Step::Copy;
            "sync: says what was flushed"
        }
        Step::Flush => {
            h.step = Step::Copy;
            "sync: nothing is owed"
        }
        Step::Copy => {
            if h.recorded {
                s.copy = s.machine.data;
            }
            h = Harvester {
                step: Step::Start,
                rounds: h.rounds,
                a: false,
                known: Known::Hot,
                looks: false,
                recorded: false,
                owes_subtree: false,
            };
            "consumer: copies"
        }
    };
    s.harvesters[who] = h;
    out.push(name, s);
}
