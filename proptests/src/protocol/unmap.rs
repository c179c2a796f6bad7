//! An unmap that returns dirty pages, beside a harvest, while the device continues.
//!
//! One exchange removes the leaf and returns its last D. After the flush no device reaches the
//! memory. Then the page is copied, and then the addresses may be used again.

use super::explore::{Outcome, explore};
use super::machine::Machine;

pub(super) const WEAKNESSES: &[&str] = &[
    "reads D, then removes the leaf",
    "copies before the flush",
    "flushes without draining",
    "frees the memory before the flush",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Harvest {
    Start,
    ClearD,
    Flush,
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Unmap {
    Look,
    Remove,
    Flush,
    Copy,
    Free,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    machine: Machine,
    harvest: Harvest,
    harvests: u8,
    unmap: Unmap,
    returned: bool,
    copy: u8,
    /// The memory has another owner.
    reused: bool,
    /// A write of the device reached that owner.
    trampled: bool,
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    let weak = super::chosen(weakness, WEAKNESSES);
    let in_two_steps = weak("reads D, then removes the leaf");
    let copy_early = weak("copies before the flush");
    let no_drain = weak("flushes without draining");
    let free_early = weak("frees the memory before the flush");
    let order = if copy_early {
        [Unmap::Copy, Unmap::Flush, Unmap::Free]
    } else if free_early {
        [Unmap::Free, Unmap::Flush, Unmap::Copy]
    } else {
        [Unmap::Flush, Unmap::Copy, Unmap::Free]
    };
    let behind = |step| {
        let mut rest = order.into_iter().skip_while(|other| *other != step).skip(1);
        rest.next().unwrap_or(Unmap::Done)
    };
    let first = State {
        machine: Machine::new(3),
        harvest: Harvest::Start,
        harvests: 2,
        unmap: Unmap::Look,
        returned: false,
        copy: 0,
        reused: false,
        trampled: false,
    };
    explore(
        first,
        |now, out| {
            let s = *now;
            s.machine.steps(out, |machine| State {
                trampled: s.trampled || s.reused && machine.data != s.machine.data,
                machine,
                ..s
            });
            let flushed = s.machine.flushed(true);
            let drained = s.machine.is_drained() || no_drain;
            match s.harvest {
                Harvest::Start if s.harvests > 0 && s.machine.d => out.push(
                    "harvest: sees D, records, owes",
                    State {
                        harvest: Harvest::ClearD,
                        harvests: s.harvests - 1,
                        ..s
                    },
                ),
                Harvest::Start => {}
                Harvest::ClearD => out.push(
                    "harvest: clears D",
                    State {
                        machine: s.machine.clean(),
                        harvest: Harvest::Flush,
                        ..s
                    },
                ),
                Harvest::Flush if drained => out.push(
                    "harvest: flushes",
                    State {
                        machine: flushed,
                        harvest: Harvest::Copy,
                        ..s
                    },
                ),
                Harvest::Flush => {}
                Harvest::Copy => out.push(
                    "harvest: copies",
                    State {
                        copy: s.machine.data,
                        harvest: Harvest::Start,
                        ..s
                    },
                ),
            }
            let removed = s.machine.removed();
            match s.unmap {
                Unmap::Look if in_two_steps => out.push(
                    "unmap: reads D",
                    State {
                        returned: s.machine.d,
                        unmap: Unmap::Remove,
                        ..s
                    },
                ),
                Unmap::Look => out.push(
                    "unmap: takes the leaf and its D",
                    State {
                        returned: s.machine.d,
                        machine: removed,
                        unmap: order[0],
                        ..s
                    },
                ),
                Unmap::Remove => out.push(
                    "unmap: removes the leaf",
                    State {
                        machine: removed,
                        unmap: order[0],
                        ..s
                    },
                ),
                Unmap::Flush if drained => out.push(
                    "unmap: flushes",
                    State {
                        machine: flushed,
                        unmap: behind(Unmap::Flush),
                        ..s
                    },
                ),
                Unmap::Flush => {}
                Unmap::Copy => out.push(
                    "unmap: its caller copies",
                    State {
                        copy: if s.returned { s.machine.data } else { s.copy },
                        unmap: behind(Unmap::Copy),
                        ..s
                    },
                ),
                Unmap::Free => out.push(
                    "unmap: the memory is used again",
                    State {
                        reused: true,
                        unmap: behind(Unmap::Free),
                        ..s
                    },
                ),
                Unmap::Done => {}
            }
        },
        |s| {
            let over = s.machine.is_over() && s.unmap == Unmap::Done && s.harvest == Harvest::Start;
            s.trampled || over && s.copy != s.machine.data
        },
    )
}
