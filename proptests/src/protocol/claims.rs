//! The store: a writer with a handle, which claims its extent in a slot of its own, and the leader,
//! which takes marks and closes extents.
//!
//! One extent of one page. The writer marks the page before the write, while its claim says that
//! the write is in flight. Two pairs of steps are store buffering (Dekker): the writer claims, then
//! looks at the word of the extent; the leader changes the word, then looks at the claims.
//!
//! A state is bad if a crash now loses a write: the log has the extent closed, nothing is recorded
//! for the consumer, and its copy may differ from the device. It is also bad if nothing waits for
//! the consumer any more without a crash, and its copy differs.

use super::explore::{Outcome, Steps, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "looks at the extent before it claims it",
    "ends its claim before the write lands",
    "goes on though the extent is about to be closed",
    "closes without a look at the claims",
    "looks at the claims before it says that it closes",
    "a harvest puts back nothing that is claimed",
    "a harvest looks at the claims before it takes the mark",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Writer {
    Idle,
    /// Weak: it looked, and claims now. It saw the mark, or not.
    Looked(bool),
    Claimed,
    /// The extent is open, and the page is not marked yet.
    Unmarked,
    InFlight,
    Landed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Leader {
    Idle,
    /// A harvest took the mark, if there was one.
    Took(bool),
    /// Weak: it looked at the claims first.
    LookedForHarvest(bool),
    LookedForClose(bool),
    /// The word says that the extent is about to be closed.
    Closing,
    /// No claim was found.
    Unclaimed,
    /// The word is closed. The record is not durable yet: whether it has the page.
    Closed(bool),
    /// The consumer copies.
    Copies,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    data: u8,
    copy: u8,
    writer: Writer,
    writes: u8,
    claim: bool,
    // The word of the extent.
    open: bool,
    closing: bool,
    dirty: bool,
    // The log.
    log_open: bool,
    pending: bool,
    leader: Leader,
    turns: u8,
}

#[derive(Clone, Copy)]
struct Weak {
    look_first: bool,
    end_early: bool,
    go_on: bool,
    no_look: bool,
    close_late: bool,
    no_put_back: bool,
    take_late: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let weak = Weak {
        look_first: weak("looks at the extent before it claims it"),
        end_early: weak("ends its claim before the write lands"),
        go_on: weak("goes on though the extent is about to be closed"),
        no_look: weak("closes without a look at the claims"),
        close_late: weak("looks at the claims before it says that it closes"),
        no_put_back: weak("a harvest puts back nothing that is claimed"),
        take_late: weak("a harvest looks at the claims before it takes the mark"),
    };
    let first = State {
        data: 0,
        copy: 0,
        writer: Writer::Idle,
        writes: 3,
        claim: false,
        open: true,
        closing: false,
        dirty: false,
        log_open: true,
        pending: false,
        leader: Leader::Idle,
        turns: 5,
    };
    explore(
        first,
        |s, out| {
            write(*s, weak, out);
            lead(*s, weak, out);
        },
        |s| loses_in_a_crash(s) || has_lost(s),
    )
}

fn write(s: State, weak: Weak, out: &mut Steps<State>) {
    let to = |writer| State { writer, ..s };
    let may_write = s.open && (!s.closing || weak.go_on);
    match s.writer {
        Writer::Idle if s.writes > 0 && weak.look_first && may_write => {
            out.push("write: looks at the extent", to(Writer::Looked(s.dirty)));
        }
        Writer::Idle if s.writes > 0 && !weak.look_first => {
            let writer = Writer::Claimed;
            let claimed = State {
                writer,
                claim: true,
                ..s
            };
            out.push("write: claims the extent", claimed);
        }
        Writer::Looked(marked) => {
            let writer = if marked {
                Writer::InFlight
            } else {
                Writer::Unmarked
            };
            let claimed = State {
                writer,
                claim: true,
                ..s
            };
            out.push("write: claims the extent", claimed);
        }
        Writer::Claimed if !may_write => {
            let writer = Writer::Idle;
            let back = State {
                writer,
                claim: false,
                ..s
            };
            out.push(
                "write: finds the extent closed, and takes its claim back",
                back,
            );
        }
        Writer::Claimed if s.dirty => {
            out.push(
                "write: finds the extent open and marked",
                to(Writer::InFlight),
            );
        }
        Writer::Claimed => out.push("write: finds the extent open", to(Writer::Unmarked)),
        Writer::Unmarked => {
            let writer = Writer::InFlight;
            out.push(
                "write: marks its page",
                State {
                    writer,
                    dirty: true,
                    ..s
                },
            );
        }
        Writer::InFlight => {
            let landed = State {
                writer: Writer::Landed,
                data: s.data + 1,
                writes: s.writes - 1,
                claim: !weak.end_early && s.claim,
                ..s
            };
            out.push("write: lands", landed);
            if weak.end_early && s.claim {
                out.push("write: ends its claim", State { claim: false, ..s });
            }
        }
        Writer::Landed => {
            let writer = Writer::Idle;
            out.push(
                "write: ends its claim",
                State {
                    writer,
                    claim: false,
                    ..s
                },
            );
        }
        Writer::Idle => {}
    }
}

fn lead(s: State, weak: Weak, out: &mut Steps<State>) {
    let to = |leader| State { leader, ..s };
    match s.leader {
        Leader::Idle if s.turns > 0 => {
            let s = State {
                turns: s.turns - 1,
                ..s
            };
            let to = |leader| State { leader, ..s };
            if !s.log_open {
                let open = State {
                    open: true,
                    log_open: true,
                    ..s
                };
                out.push("open: is durable", open);
            }
            match weak.take_late {
                true => out.push(
                    "harvest: looks at the claims",
                    to(Leader::LookedForHarvest(s.claim)),
                ),
                false => out.push("harvest: takes the mark", taken(s, Leader::Took(s.dirty))),
            }
            match weak.close_late {
                _ if !s.open => {}
                true => out.push(
                    "close: looks at the claims",
                    to(Leader::LookedForClose(s.claim)),
                ),
                false => out.push(
                    "close: says that it closes",
                    State {
                        closing: true,
                        ..to(Leader::Closing)
                    },
                ),
            }
        }
        Leader::Took(marked) => {
            let back = marked && s.claim && !weak.no_put_back;
            out.push(
                "harvest: puts back what is claimed",
                harvested(s, marked, back),
            );
        }
        Leader::LookedForHarvest(claimed) => {
            let marked = s.dirty;
            let s = taken(s, Leader::Idle);
            out.push(
                "harvest: takes the mark",
                harvested(s, marked, marked && claimed),
            );
        }
        Leader::Copies => {
            let copied = State {
                copy: s.data,
                ..to(Leader::Idle)
            };
            out.push("consumer: copies", copied);
        }
        Leader::LookedForClose(claimed) => match claimed {
            true => out.push("close: leaves the extent open", to(Leader::Idle)),
            false => out.push("close: closes the word", closed(s)),
        },
        Leader::Closing if s.claim && !weak.no_look => {
            let open = State {
                closing: false,
                ..to(Leader::Idle)
            };
            out.push("close: finds a claim", open);
        }
        Leader::Closing => out.push("close: finds no claim", to(Leader::Unclaimed)),
        Leader::Unclaimed => out.push("close: closes the word", closed(s)),
        Leader::Closed(dirty) => {
            let durable = State {
                log_open: false,
                pending: s.pending || dirty,
                ..to(Leader::Idle)
            };
            out.push("close: is durable", durable);
        }
        Leader::Idle => {}
    }
}

fn taken(s: State, leader: Leader) -> State {
    State {
        dirty: false,
        leader,
        ..s
    }
}

/// The increment has what was recorded and what was taken. Its copy and its commit are one step.
fn harvested(s: State, marked: bool, back: bool) -> State {
    let leader = if marked || s.pending {
        Leader::Copies
    } else {
        Leader::Idle
    };
    State {
        dirty: s.dirty || back,
        pending: false,
        leader,
        ..s
    }
}

fn closed(s: State) -> State {
    let leader = Leader::Closed(s.dirty);
    State {
        open: false,
        closing: false,
        dirty: false,
        leader,
        ..s
    }
}

/// Whether the device may have another value than the copy.
fn differs(s: &State) -> bool {
    s.data != s.copy || s.writer == Writer::InFlight
}

fn loses_in_a_crash(s: &State) -> bool {
    // What a consumer copies is in the log until its commit.
    !s.log_open && !s.pending && s.leader != Leader::Copies && differs(s)
}

fn has_lost(s: &State) -> bool {
    let quiet = s.writer == Writer::Idle && s.leader == Leader::Idle;
    quiet && !s.dirty && !s.pending && s.data != s.copy
}
