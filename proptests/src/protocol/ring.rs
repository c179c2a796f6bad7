//! A guest whose dirty pages are reported by KVM's ring, and two harvesters that share the entries.
//!
//! A write to a write-protected page puts the page into the ring and removes the protection. From
//! then on, writes of the guest leave no trace, until the entry is handed back and
//! KVM_RESET_DIRTY_RINGS has protected the page again. So the reset is a flush: it comes before the
//! copy, whichever harvester took the page out. It must not miss an entry whose page another
//! harvester can already take.

use super::explore::{Outcome, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "copies before the reset",
    "resets only what it took out itself",
    "resets beside a harvester that takes entries out",
    "commits what was not copied",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Entry {
    Free,
    Dirty,
    HandedBack,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Start,
    /// Holds the lock of the rings; the page is pending, its entry not yet handed back.
    HandBack,
    Take,
    Reset,
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Harvester {
    step: Step,
    /// The number of harvests that it may still make.
    harvests: u8,
    /// It took an entry out.
    reaped: bool,
    /// It has the page in its lease.
    has: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    data: u8,
    writes: u8,
    protected: bool,
    entry: Entry,
    /// The page is in memory of the source, or marked by an abort.
    pending: bool,
    harvesters: [Harvester; 2],
    copy: u8,
}

const TAKES_OUT: [&str; 2] = [
    "A keeps the page of an entry",
    "B keeps the page of an entry",
];
const HANDS_BACK: [&str; 2] = ["A hands the entry back", "B hands the entry back"];
const NO_ENTRY: [&str; 2] = ["A finds no entry", "B finds no entry"];
const TAKES: [&str; 2] = ["A records the page", "B records the page"];
const NO_PAGE: [&str; 2] = ["A finds no page", "B finds no page"];
const RESETS: [&str; 2] = ["A resets the ring", "B resets the ring"];
const COPIES: [&str; 2] = ["A copies, commits", "B copies, commits"];
const ABORTS: [&str; 2] = ["A aborts", "B aborts"];

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let copy_early = weak("copies before the reset");
    let reset_own = weak("resets only what it took out itself");
    let no_lock = weak("resets beside a harvester that takes entries out");
    let no_put_back = weak("commits what was not copied");
    let harvester = Harvester {
        step: Step::Start,
        harvests: 2,
        reaped: false,
        has: false,
    };
    let first = State {
        data: 0,
        writes: 3,
        protected: true,
        entry: Entry::Free,
        pending: false,
        harvesters: [harvester; 2],
        copy: 0,
    };
    explore(
        first,
        |now, out| {
            let s = *now;
            if s.writes > 0 && s.protected {
                let entry = Entry::Dirty;
                let protected = false;
                out.push(
                    "the guest faults",
                    State {
                        entry,
                        protected,
                        ..s
                    },
                );
            } else if s.writes > 0 {
                let (data, writes) = (s.data + 1, s.writes - 1);
                out.push("the guest writes", State { data, writes, ..s });
            }
            for (who, now) in s.harvesters.into_iter().enumerate() {
                // In `state`, this harvester becomes `mine`.
                let with = |state: State, mine: Harvester| {
                    let mut state = state;
                    state.harvesters[who] = mine;
                    state
                };
                let at = |step| Harvester { step, ..now };
                let locked = s.harvesters[1 - who].step == Step::HandBack;
                match now.step {
                    Step::Start if now.harvests == 0 || locked => {}
                    Step::Start => {
                        let harvests = now.harvests - 1;
                        let begun = |step, reaped| Harvester {
                            step,
                            harvests,
                            reaped,
                            has: false,
                        };
                        if s.entry == Entry::Dirty {
                            let state = State { pending: true, ..s };
                            out.push(TAKES_OUT[who], with(state, begun(Step::HandBack, true)));
                        } else {
                            out.push(NO_ENTRY[who], with(s, begun(Step::Take, false)));
                        }
                    }
                    Step::HandBack => {
                        let entry = Entry::HandedBack;
                        out.push(HANDS_BACK[who], with(State { entry, ..s }, at(Step::Take)));
                    }
                    Step::Take if s.pending => {
                        let step = if copy_early { Step::Copy } else { Step::Reset };
                        let mine = Harvester {
                            has: true,
                            ..at(step)
                        };
                        let pending = false;
                        out.push(TAKES[who], with(State { pending, ..s }, mine));
                    }
                    Step::Take => out.push(NO_PAGE[who], with(s, at(Step::Start))),
                    Step::Reset if locked && !no_lock => {}
                    Step::Reset => {
                        let step = if copy_early { Step::Start } else { Step::Copy };
                        let mut state = s;
                        if s.entry == Entry::HandedBack && (now.reaped || !reset_own) {
                            (state.entry, state.protected) = (Entry::Free, true);
                        }
                        out.push(RESETS[who], with(state, at(step)));
                        // Or the lease is dropped before, and its debt is paid by the harvester
                        // that takes the page next.
                        let pending = s.pending || (now.has && !no_put_back);
                        if !copy_early {
                            out.push(ABORTS[who], with(State { pending, ..s }, at(Step::Start)));
                        }
                    }
                    Step::Copy => {
                        let step = if copy_early { Step::Reset } else { Step::Start };
                        let copy = s.data;
                        out.push(COPIES[who], with(State { copy, ..s }, at(step)));
                    }
                }
            }
        },
        |s| {
            let idle = s.harvesters.iter().all(|h| h.step == Step::Start);
            let clean = s.entry != Entry::Dirty && !s.pending;
            s.writes == 0 && idle && clean && s.copy != s.data
        },
    )
}
