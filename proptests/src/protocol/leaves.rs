//! One leaf over two pages that is split into two and merged again while the device writes.
//!
//! * **Split**: both small leaves start with the D that the large one had when it was replaced, by
//!   a compare-exchange that fails if D changed. A device that still caches the large leaf writes
//!   through it without a look at the table. So a flush drops each translation that it overlaps, of
//!   any size.
//! * **Merge**: the large leaf starts dirty, whether or not the small ones were, because a walk
//!   inside the old table may still set a D there that no harvest reads.

use super::explore::{Outcome, Steps, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "a split starts clean",
    "a split replaces the leaf without looking at D again",
    "a merge takes the D of the small leaves and no more",
    "a flush drops only leaves of the size it asks for",
    "flushes without draining",
];

/// The state of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Leaves {
    Large(bool),
    Small,
}

/// The state of the device's cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Tlb {
    Nothing,
    /// The large leaf, dirty.
    Large,
    /// The small leaf of a page, dirty.
    Small(usize),
}

/// The progress of the device in a write to a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum At {
    Idle,
    Walk(usize),
    /// The walk is inside the table of small leaves.
    Inside(usize),
    Data(usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Harvest {
    Start,
    Clear(Leaves),
    Flush,
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Change {
    Look,
    Split(bool),
    MergeLook,
    Merge(bool),
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    leaves: Leaves,
    /// D of the small leaves, whether or not the table leads to them.
    small: [bool; 2],
    tlb: Tlb,
    at: At,
    writes: u8,
    stopped: bool,
    data: [u8; 2],
    copy: [u8; 2],
    harvest: Harvest,
    recorded: [bool; 2],
    harvests: u8,
    change: Change,
}

/// The weaknesses of this run.
#[derive(Clone, Copy)]
struct Weak {
    clean_split: bool,
    blind_split: bool,
    short_merge: bool,
    exact_flush: bool,
    no_drain: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let weak = Weak {
        clean_split: weak("a split starts clean"),
        blind_split: weak("a split replaces the leaf without looking at D again"),
        short_merge: weak("a merge takes the D of the small leaves and no more"),
        exact_flush: weak("a flush drops only leaves of the size it asks for"),
        no_drain: weak("flushes without draining"),
    };
    let first = State {
        leaves: Leaves::Large(false),
        small: [false; 2],
        tlb: Tlb::Nothing,
        at: At::Idle,
        writes: 3,
        stopped: false,
        data: [0; 2],
        copy: [0; 2],
        harvest: Harvest::Start,
        recorded: [false; 2],
        harvests: 3,
        change: Change::Look,
    };
    explore(
        first,
        |s, out| {
            device(*s, out);
            harvest(*s, weak, out);
            change(*s, weak, out);
        },
        |s| {
            let dirty = dirty_pages(s, s.leaves);
            let lost = (0..2).any(|page| !dirty[page] && s.copy[page] != s.data[page]);
            s.stopped && s.at == At::Idle && s.harvest == Harvest::Start && lost
        },
    )
}

/// Which pages a look at `leaves` finds dirty.
fn dirty_pages(s: &State, leaves: Leaves) -> [bool; 2] {
    match leaves {
        Leaves::Large(dirty) => [dirty; 2],
        Leaves::Small => s.small,
    }
}

fn device(s: State, out: &mut Steps<State>) {
    match s.at {
        At::Idle if !s.stopped => {
            for page in (0..2).filter(|_| s.writes > 0) {
                let cached = s.tlb == Tlb::Large || s.tlb == Tlb::Small(page);
                let state = State {
                    at: if cached {
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
        At::Walk(page) => match s.leaves {
            Leaves::Large(_) => {
                let state = State {
                    leaves: Leaves::Large(true),
                    tlb: Tlb::Large,
                    at: At::Data(page),
                    ..s
                };
                out.push("device: sets D of the large leaf", state);
            }
            Leaves::Small => {
                let at = At::Inside(page);
                out.push(
                    "device: walks into the table of small leaves",
                    State { at, ..s },
                );
            }
        },
        At::Inside(page) => {
            let mut state = State {
                tlb: Tlb::Small(page),
                at: At::Data(page),
                ..s
            };
            state.small[page] = true;
            out.push("device: sets D of a small leaf", state);
        }
        At::Data(page) => {
            let mut state = State { at: At::Idle, ..s };
            state.data[page] += 1;
            out.push("device: its data lands", state);
        }
    }
    if s.tlb != Tlb::Nothing {
        let tlb = Tlb::Nothing;
        out.push("device: evicts", State { tlb, ..s });
    }
}

fn harvest(s: State, weak: Weak, out: &mut Steps<State>) {
    match s.harvest {
        Harvest::Start if s.harvests > 0 => {
            let state = State {
                recorded: dirty_pages(&s, s.leaves),
                harvest: Harvest::Clear(s.leaves),
                harvests: s.harvests - 1,
                ..s
            };
            out.push("harvest: looks, records, owes", state);
        }
        Harvest::Start => {}
        Harvest::Clear(seen) => {
            let mut state = State {
                harvest: Harvest::Flush,
                ..s
            };
            match (seen, s.leaves) {
                // It clears the entry that it looked at. If that entry leads to a table by now,
                // nothing happens.
                (Leaves::Large(_), Leaves::Large(dirty)) => {
                    state.leaves = Leaves::Large(dirty && !s.recorded[0]);
                }
                (Leaves::Large(_), Leaves::Small) => {}
                (Leaves::Small, _) => {
                    for page in 0..2 {
                        state.small[page] &= !s.recorded[page];
                    }
                }
            }
            out.push("harvest: clears what it recorded", state);
        }
        Harvest::Flush if s.recorded == [false; 2] => {
            let harvest = Harvest::Copy;
            out.push("harvest: owes nothing", State { harvest, ..s });
        }
        Harvest::Flush if s.at == At::Idle || weak.no_drain => {
            let dropped = match s.tlb {
                Tlb::Nothing => true,
                Tlb::Large => !weak.exact_flush || matches!(s.leaves, Leaves::Large(_)),
                Tlb::Small(page) => s.recorded[page],
            };
            let state = State {
                tlb: if dropped { Tlb::Nothing } else { s.tlb },
                harvest: Harvest::Copy,
                ..s
            };
            out.push("harvest: flushes", state);
        }
        Harvest::Flush => {}
        Harvest::Copy => {
            let mut state = State {
                harvest: Harvest::Start,
                recorded: [false; 2],
                ..s
            };
            for page in (0..2).filter(|page| s.recorded[*page]) {
                state.copy[page] = s.data[page];
            }
            out.push("harvest: copies", state);
        }
    }
}

/// Splits once, then merges once.
fn change(s: State, weak: Weak, out: &mut Steps<State>) {
    match (s.change, s.leaves) {
        (Change::Look, Leaves::Large(dirty)) => {
            let change = Change::Split(dirty);
            out.push("split: looks at the large leaf", State { change, ..s });
        }
        (Change::Split(seen), Leaves::Large(dirty)) if seen == dirty || weak.blind_split => {
            let state = State {
                leaves: Leaves::Small,
                small: [seen && !weak.clean_split; 2],
                change: Change::MergeLook,
                ..s
            };
            out.push("split: installs small leaves", state);
        }
        (Change::Split(_), _) => {
            let change = Change::Look;
            out.push("split: D has changed, looks again", State { change, ..s });
        }
        (Change::MergeLook, _) => {
            let change = Change::Merge(s.small[0] || s.small[1]);
            out.push("merge: looks at the small leaves", State { change, ..s });
        }
        (Change::Merge(seen), _) => {
            let state = State {
                leaves: Leaves::Large(seen || !weak.short_merge),
                change: Change::Done,
                ..s
            };
            out.push("merge: installs the large leaf", state);
        }
        (Change::Look, Leaves::Small) | (Change::Done, _) => {}
    }
}
