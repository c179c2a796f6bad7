//! Two harvesters of one leaf over two pages. Each of them requests one page and leaves the other
//! one dirty. Then one of them requests both.
//!
//! The harvester that clears D is responsible for the rest of the leaf, which is dirty although the
//! table no longer says so. A guard over the rest is visible from before the clear until the rest
//! is stored as a residual, so that another harvest reports it meanwhile. The debt of the whole
//! leaf enters the queue between the two. If it enters before the clear, a flush may pay it too
//! early. If it enters after the rest is stored, a harvester that takes the rest and finds D clear
//! syncs without a flush.

//!
//! A source that clears by batches, such as a log of KVM, reports many leaves and clears them
//! later. A leaf inside the request may wait for that: until then it is dirty and in a lease, and
//! the clear comes before the flush. A leaf that sticks out must not wait. When the source reports
//! it as clean, its rest is stored. Another harvest may take and copy the rest, and then the late
//! clear destroys the trace of a later write.

use super::explore::{Outcome, Steps, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "no guard over the rest",
    "the guard goes before the rest is kept",
    "the rest is kept before D goes, and no guard",
    "the debt comes before the clear",
    "the debt comes after the rest is kept",
    "looks for guards and residuals before the table",
    "looks for residuals before guards",
    "the rest is forgotten",
    "the rest is kept when the source says that it will clear",
    "a batch is cleared after the flush",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum At {
    Idle,
    Walk(usize),
    Data(usize),
}

/// The next step of a harvester.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Start,
    Table,
    Guard,
    Record,
    Owe,
    Clear,
    Keep,
    Unguard,
    Guards,
    Residual,
    ClearResidual,
    Debt,
    Wait,
    Flush,
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Harvester {
    step: Step,
    rounds: u8,
    recorded: [bool; 2],
    /// It owes the flush of a leaf that it took as a whole.
    took: bool,
    /// Whether D was set when it was cleared.
    was_dirty: bool,
    guards_rest: bool,
    ticket: u8,
    /// It began after the last write.
    after_all: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    d: bool,
    /// Whether the device caches the leaf as dirty.
    cached: bool,
    at: At,
    writes: u8,
    stopped: bool,
    data: [u8; 2],
    copy: [u8; 2],
    residual: [bool; 2],
    owed: bool,
    generation: u8,
    finished: u8,
    running: Option<bool>,
    harvesters: [Harvester; 2],
    /// A harvest that began after the last write did not report it.
    missed: bool,
}

#[derive(Clone, Copy)]
struct Weak {
    no_guard: bool,
    early_unguard: bool,
    early_keep: bool,
    early_debt: bool,
    late_debt: bool,
    table_last: bool,
    guards_last: bool,
    forget: bool,
    /// The source reports a leaf as clean, and clears it after the rest is stored.
    batch_part: bool,
    /// The source clears a leaf that it took as a whole after the flush.
    batch_late: bool,
    /// The second harvester requests both pages.
    whole: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let weak = Weak {
        no_guard: weak("no guard over the rest")
            || weak("the rest is kept before D goes, and no guard"),
        early_unguard: weak("the guard goes before the rest is kept"),
        early_keep: weak("the rest is kept before D goes, and no guard"),
        early_debt: weak("the debt comes before the clear"),
        late_debt: weak("the debt comes after the rest is kept"),
        table_last: weak("looks for guards and residuals before the table"),
        guards_last: weak("looks for residuals before guards"),
        forget: weak("the rest is forgotten"),
        batch_part: weak("the rest is kept when the source says that it will clear"),
        batch_late: weak("a batch is cleared after the flush"),
        whole: false,
    };
    let parts = explore_weak(weak);
    if parts.loss.is_some() {
        return parts;
    }
    let whole = explore_weak(Weak {
        whole: true,
        ..weak
    });
    Outcome {
        states: parts.states + whole.states,
        ..whole
    }
}

fn explore_weak(weak: Weak) -> Outcome {
    let harvester = Harvester {
        step: Step::Start,
        rounds: 2,
        recorded: [false; 2],
        took: false,
        was_dirty: false,
        guards_rest: false,
        ticket: 0,
        after_all: false,
    };
    let first = State {
        d: false,
        cached: false,
        at: At::Idle,
        writes: 2,
        stopped: false,
        data: [0; 2],
        copy: [0; 2],
        residual: [false; 2],
        owed: false,
        generation: 0,
        finished: 0,
        running: None,
        harvesters: [harvester; 2],
        missed: false,
    };
    explore(
        first,
        |s, out| {
            device(*s, out);
            for who in 0..2 {
                harvest(*s, who, weak, out);
            }
        },
        |s| {
            let idle = s.harvesters.iter().all(|h| h.step == Step::Start);
            let lost = (0..2).any(|page| !s.d && !s.residual[page] && s.copy[page] != s.data[page]);
            s.missed || is_over(s) && idle && lost
        },
    )
}

fn is_over(s: &State) -> bool {
    s.stopped && s.at == At::Idle
}

fn device(s: State, out: &mut Steps<State>) {
    match s.at {
        At::Idle if !s.stopped => {
            for page in (0..2).filter(|_| s.writes > 0) {
                let state = State {
                    at: if s.cached {
                        At::Data(page)
                    } else {
                        At::Walk(page)
                    },
                    writes: s.writes - 1,
                    ..s
                };
                out.push("device: begins a write", state);
            }
            let stopped = true;
            out.push("device: stops", State { stopped, ..s });
        }
        At::Idle => {}
        At::Walk(page) => {
            let state = State {
                d: true,
                cached: true,
                at: At::Data(page),
                ..s
            };
            out.push("device: sets D", state);
        }
        At::Data(page) => {
            let mut state = State { at: At::Idle, ..s };
            state.data[page] += 1;
            out.push("device: its data lands", state);
        }
    }
    if s.cached {
        let cached = false;
        out.push("device: evicts", State { cached, ..s });
    }
}

/// The next steps of a harvester, which requests the page of its own number or both pages.
fn harvest(s: State, who: usize, weak: Weak, out: &mut Steps<State>) {
    let rest = 1 - who;
    let whole = weak.whole && who == 1;
    let asks = [whole || who == 0, who == 1];
    let mut h = s.harvesters[who];
    let mut s = s;
    let name = match h.step {
        Step::Start if h.rounds == 0 => return,
        Step::Start => {
            h.rounds -= 1;
            h.recorded = [false; 2];
            h.after_all = is_over(&s);
            h.step = if weak.table_last {
                Step::Guards
            } else {
                Step::Table
            };
            "harvest: begins"
        }
        Step::Table => {
            h.step = match s.d {
                true if whole => Step::Record,
                true if weak.early_keep => Step::Keep,
                true if weak.no_guard => Step::Record,
                true => Step::Guard,
                false => behind_table(weak),
            };
            "harvest: looks at D"
        }
        Step::Guard => {
            h.guards_rest = true;
            h.step = Step::Record;
            "harvest: guards the rest"
        }
        Step::Record => {
            h.recorded = asks;
            h.took = whole;
            h.step = if whole && weak.batch_late {
                behind_table(weak)
            } else if whole {
                Step::Clear
            } else if weak.batch_part {
                h.was_dirty = true;
                Step::Owe
            } else if weak.early_debt {
                Step::Owe
            } else {
                Step::Clear
            };
            "harvest: records its page"
        }
        Step::Owe => {
            s.owed = true;
            h.step = if weak.early_debt {
                Step::Clear
            } else if weak.late_debt || weak.early_keep {
                behind_table(weak)
            } else {
                behind_owe(weak)
            };
            "harvest: hands over the debt of the leaf"
        }
        Step::Clear => {
            h.was_dirty = s.d;
            s.d = false;
            h.step = if whole && weak.batch_late {
                Step::Copy
            } else if whole || weak.batch_part {
                behind_table(weak)
            } else if weak.early_debt || weak.late_debt {
                behind_owe(weak)
            } else {
                Step::Owe
            };
            "harvest: clears D"
        }
        Step::Keep => {
            s.residual[rest] |= (h.was_dirty || weak.early_keep) && !weak.forget;
            h.step = if weak.early_keep {
                Step::Record
            } else if weak.early_unguard {
                behind_keep(weak)
            } else {
                Step::Unguard
            };
            "harvest: keeps the rest"
        }
        Step::Unguard => {
            h.guards_rest = false;
            h.step = if weak.batch_part {
                Step::Clear
            } else if weak.early_unguard {
                Step::Keep
            } else {
                behind_keep(weak)
            };
            "harvest: drops its guard"
        }
        Step::Guards => {
            // The other harvester guards the page that it did not request.
            h.recorded[who] |= s.harvesters[rest].guards_rest;
            h.step = if weak.guards_last {
                Step::Debt
            } else {
                Step::Residual
            };
            "harvest: looks for guards"
        }
        Step::Residual => {
            let found = [0, 1].map(|page| asks[page] && s.residual[page]);
            h.recorded = [0, 1].map(|page| h.recorded[page] || found[page]);
            h.step = if found != [false; 2] {
                Step::ClearResidual
            } else {
                behind_residual(weak)
            };
            "harvest: looks at the residual, records"
        }
        Step::ClearResidual => {
            s.residual = [0, 1].map(|page| s.residual[page] && !asks[page]);
            h.step = behind_residual(weak);
            "harvest: clears the residual"
        }
        Step::Debt => {
            s.owed |= h.took;
            h.ticket = s.generation;
            h.step = Step::Wait;
            "sync: takes a ticket"
        }
        Step::Wait if s.finished > h.ticket => {
            h.step = if h.took && weak.batch_late {
                Step::Clear
            } else {
                Step::Copy
            };
            "sync: its generation has finished"
        }
        Step::Wait if s.running.is_none() => {
            s.running = Some(s.owed);
            s.owed = false;
            s.generation += 1;
            h.step = Step::Flush;
            "sync: begins a flush"
        }
        Step::Wait => return,
        Step::Flush if s.at == At::Idle || s.running == Some(false) => {
            s.cached &= s.running == Some(false);
            s.running = None;
            s.finished = s.generation;
            h.step = Step::Wait;
            "sync: the flush ends"
        }
        Step::Flush => return,
        Step::Copy => {
            for page in (0..2).filter(|page| h.recorded[*page]) {
                s.copy[page] = s.data[page];
            }
            // Unless the other harvester has the page, and copies it later.
            let other = s.harvesters[rest].recorded;
            let missed = |page: usize| asks[page] && !other[page] && s.copy[page] != s.data[page];
            s.missed |= h.after_all && (0..2).any(missed);
            h.step = Step::Start;
            h.recorded = [false; 2];
            h.took = false;
            h.was_dirty = false;
            h.after_all = false;
            "consumer: copies"
        }
    };
    s.harvesters[who] = h;
    out.push(name, s);
}

fn behind_owe(weak: Weak) -> Step {
    if weak.early_unguard {
        Step::Unguard
    } else {
        Step::Keep
    }
}

fn behind_keep(weak: Weak) -> Step {
    if weak.late_debt {
        Step::Owe
    } else {
        behind_table(weak)
    }
}

fn behind_table(weak: Weak) -> Step {
    if weak.table_last {
        Step::Debt
    } else if weak.guards_last {
        Step::Residual
    } else {
        Step::Guards
    }
}

fn behind_residual(weak: Weak) -> Step {
    if weak.guards_last {
        Step::Guards
    } else if weak.table_last {
        Step::Table
    } else {
        Step::Debt
    }
}
