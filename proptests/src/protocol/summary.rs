//! A summary over marks: two CPUs mark one page, two harvesters look at the summary first, and one
//! of them may be unable to record.
//!
//! A harvester that finds the summary clear takes the line for clean, and may be the last one to
//! look. So the summary may be clear only while the line has no marks, or while another harvester
//! is certain to take them.

use super::explore::{Outcome, Steps, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "clears the summary before it has a place to record",
    "takes the marks, then clears the summary",
    "a marker that finds the mark set leaves the summary alone",
    "a failure does not put the summary back",
];

/// The progress of a CPU. Each CPU writes twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Cpu {
    Write,
    Mark,
    Summarize,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Harvester {
    Look,
    Secure,
    ClearSummary,
    Take,
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    cpus: [(Cpu, u8); 2],
    /// The number of writes of each CPU. The newest one is in memory.
    data: [u8; 2],
    /// The number of those whose mark has returned.
    returned: [u8; 2],
    mark: bool,
    summary: bool,
    harvesters: [(Harvester, u8); 2],
    copy: [u8; 2],
    /// A harvest found the summary clear while the other one was at the line, and passed over marks
    /// that had returned by then.
    passed: [u8; 2],
    /// The other one failed, or no other one was there.
    lost: bool,
}

/// The weaknesses of this run.
#[derive(Clone, Copy)]
struct Weak {
    hide_first: bool,
    take_first: bool,
    skip_summary: bool,
    keep_hidden: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let is = |nth: usize| weakness == Some(WEAKNESSES[nth]);
    let weak = Weak {
        hide_first: is(0) || is(3),
        take_first: is(1),
        skip_summary: is(2),
        keep_hidden: is(3),
    };
    let first = State {
        cpus: [(Cpu::Write, 2); 2],
        data: [0; 2],
        returned: [0; 2],
        mark: false,
        summary: false,
        harvesters: [(Harvester::Look, 3); 2],
        copy: [0; 2],
        passed: [0; 2],
        lost: false,
    };
    explore(
        first,
        |now, out| {
            for who in 0..2 {
                cpu(*now, who, weak, out);
                harvest(*now, who, weak, out);
            }
        },
        |s| {
            let over = s.cpus.iter().all(|cpu| *cpu == (Cpu::Write, 0))
                && s.harvesters.iter().all(|(at, _)| *at == Harvester::Look);
            // No harvest finds a mark under a clear summary.
            let hidden = s.mark && !s.summary;
            s.lost || over && (hidden || !s.mark && s.copy != s.data)
        },
    )
}

fn cpu(s: State, who: usize, weak: Weak, out: &mut Steps<State>) {
    let (at, left) = s.cpus[who];
    let to = |at, left| {
        let mut cpus = s.cpus;
        cpus[who] = (at, left);
        cpus
    };
    let returned = {
        let mut returned = s.returned;
        returned[who] = s.data[who];
        returned
    };
    match at {
        Cpu::Write if left > 0 => {
            let mut data = s.data;
            data[who] += 1;
            let cpus = to(Cpu::Mark, left - 1);
            out.push("cpu: writes", State { cpus, data, ..s });
        }
        Cpu::Write => {}
        Cpu::Mark if s.mark && weak.skip_summary => {
            let cpus = to(Cpu::Write, left);
            out.push(
                "cpu: finds the mark set",
                State {
                    cpus,
                    returned,
                    ..s
                },
            );
        }
        Cpu::Mark => out.push(
            "cpu: marks",
            State {
                cpus: to(Cpu::Summarize, left),
                mark: true,
                ..s
            },
        ),
        Cpu::Summarize => out.push(
            "cpu: sets the summary",
            State {
                cpus: to(Cpu::Write, left),
                summary: true,
                returned,
                ..s
            },
        ),
    }
}

/// The first harvester may fail; the second has memory of its own.
fn harvest(s: State, who: usize, weak: Weak, out: &mut Steps<State>) {
    let (at, left) = s.harvesters[who];
    let to = |at| {
        let mut harvesters = s.harvesters;
        harvesters[who] = (at, left);
        harvesters
    };
    let clear = |next| State {
        harvesters: to(next),
        summary: false,
        ..s
    };
    let take = |next| State {
        harvesters: to(next),
        mark: false,
        ..s
    };
    // The marks that the other harvester passed over because of this one are this one's duty from
    // now on.
    let others_passed = s.passed[1 - who];
    let next_of = |mine| match (mine, weak.take_first, weak.hide_first) {
        (Harvester::Look, _, true) => Harvester::ClearSummary,
        (Harvester::Look, true, _) => Harvester::Take,
        (Harvester::Look, ..) => Harvester::Secure,
        (Harvester::ClearSummary, _, true) => Harvester::Secure,
        (Harvester::Secure, ..) if !weak.hide_first => Harvester::ClearSummary,
        _ => Harvester::Take,
    };
    match at {
        Harvester::Look if left == 0 => {}
        Harvester::Look if s.summary => {
            let mut next = s;
            next.harvesters[who] = (next_of(Harvester::Look), left - 1);
            out.push("harvest: sees the summary", next);
        }
        Harvester::Look => {
            let mut next = s;
            next.harvesters[who].1 -= 1;
            // It has to report the marks that had returned, unless the other harvester is about to
            // report them.
            let owes = s.mark && (0..2).any(|cpu| s.returned[cpu] > s.copy[cpu]);
            match s.harvesters[1 - who].0 {
                Harvester::Look => next.lost |= owes,
                Harvester::Copy => {}
                _ if owes => next.passed[who] = 1,
                _ => {}
            }
            out.push("harvest: finds the summary clear", next);
        }
        Harvester::Secure => {
            let next = next_of(Harvester::Secure);
            out.push(
                "harvest: has a place to record",
                State {
                    harvesters: to(next),
                    ..s
                },
            );
            if who == 0 {
                let mut next = s;
                next.harvesters[who].0 = Harvester::Look;
                next.summary |= weak.hide_first && !weak.keep_hidden;
                next.lost |= weak.hide_first && others_passed == 1 && s.mark;
                out.push("harvest: has no place to record", next);
            }
        }
        Harvester::ClearSummary if weak.take_first => {
            out.push("harvest: clears the summary", clear(Harvester::Copy));
        }
        Harvester::ClearSummary => {
            let next = next_of(Harvester::ClearSummary);
            out.push("harvest: clears the summary", clear(next));
        }
        Harvester::Take => {
            let next = match weak.take_first {
                true => Harvester::ClearSummary,
                false => Harvester::Copy,
            };
            let mut next = take(next);
            next.passed[1 - who] = 0;
            out.push("harvest: records and takes the mark", next);
        }
        Harvester::Copy => out.push(
            "harvest: copies",
            State {
                harvesters: to(Harvester::Look),
                copy: s.data,
                ..s
            },
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{WEAKNESSES, explore_with};

    #[test]
    fn the_summary_holds_and_each_weakness_loses_a_write() {
        let whole = explore_with(None);
        assert!(whole.loss.is_none(), "{whole:?}");
        for weakness in WEAKNESSES {
            let weak = explore_with(Some(weakness));
            println!("{weakness}: {weak:?}");
            assert!(weak.loss.is_some(), "{weakness}: {weak:?}");
        }
    }
}
