//! A discard of one page, against a device that writes it and two consumers.
//!
//! A page reads as zero while its zero bit says so. The device does not know of that bit. The
//! harvest that clears D clears the zero bit *after* that, before the page is left to the other
//! consumer; and so does a harvest that sees the page in the other one's flight. The discard sets
//! the bit *before* it flushes all that devices cache of the page and drops the storage. So a D
//! whose data lands after the drop never goes without the zero bit.
//!
//! A consumer says "zero" if it finds the bit, no discard at work, and the bit again.

use super::explore::{Outcome, Steps, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "the zero bit is set between flush and drop",
    "the zero bit is set after the drop",
    "no flush before the drop",
    "a flush of what the discard has taken alone",
    "the discard takes D without a flight",
    "nothing is left pending",
    "a harvest that takes D leaves the zero bit",
    "a harvest clears the zero bit before it clears D",
    "a harvest clears the zero bit after it has left the page",
    "a harvest that sees the page in flight leaves the zero bit",
    "a consumer ignores discards at work",
    "a consumer looks for discards at work, then at the zero bit",
    "a consumer looks at the zero bit once, then for discards at work",
    "a discard that cannot flush forgets its debt",
    "a discard that fails leaves the zero bit",
    "a discard that fails ends before it clears the zero bit",
    "a discard that fails leaves nothing pending",
    "a discard that fails marks the page instead of leaving it pending",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Device {
    Idle,
    /// About to set D.
    Leaf,
    /// Translated; the data has not landed.
    Data,
}

/// What the discard does next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Discard {
    Begin,
    SetZero,
    Look,
    Fly,
    Clear,
    Flush,
    Drop,
    LateZero,
    Leave,
    Wipe,
    End,
    /// It fails.
    ClearZero,
    FailLeave,
    FailMark,
    FailWipe,
    Done,
}

/// What a consumer does next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Start,
    Table,
    Fly,
    Clear,
    ClearZero,
    /// With the debt handed over before.
    Leave,
    Wipe,
    Flights,
    ClearSeen,
    Pending,
    Sync,
    /// R1 to R3.
    Zero,
    AtWork,
    Copy,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Consumer {
    step: Step,
    rounds: u8,
    /// The harvest began after the last write had landed.
    after_writes: bool,
    /// The harvest began when no discard was at work and none followed.
    after_all: bool,
    recorded: bool,
    /// It cleared D, and nobody has flushed since.
    gather: bool,
    flight: bool,
    pending: bool,
    /// What it has found at R1 and R2.
    zero: bool,
    copy: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    d: bool,
    zero: bool,
    /// The device caches "D is set".
    cached: bool,
    device: Device,
    /// The contents: the number of a write, or 0.
    data: u8,
    written: u8,
    writes: u8,
    /// A debt in the queue.
    queue: bool,
    discard: Discard,
    discard_flies: bool,
    consumers: [Consumer; 2],
}

/// Which steps are in which order.
struct Order {
    discard: &'static [Discard],
    fails: &'static [Discard],
    flushes_all: bool,
    owes_again: bool,
    take: &'static [Step],
    clears_seen: bool,
    says: &'static [Step],
}

/// Explores the model, weakened as `weakness` says.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    use Discard as D;
    let weak = super::chosen(weakness, WEAKNESSES);
    let discard: &[Discard] = if weak("the zero bit is set between flush and drop") {
        &[
            D::Begin,
            D::Look,
            D::Fly,
            D::Clear,
            D::Flush,
            D::SetZero,
            D::Drop,
            D::Leave,
            D::Wipe,
        ]
    } else if weak("the zero bit is set after the drop") {
        &[
            D::Begin,
            D::Look,
            D::Fly,
            D::Clear,
            D::Flush,
            D::Drop,
            D::LateZero,
            D::Leave,
            D::Wipe,
        ]
    } else if weak("no flush before the drop") {
        &[
            D::Begin,
            D::SetZero,
            D::Look,
            D::Fly,
            D::Clear,
            D::Drop,
            D::Leave,
            D::Wipe,
        ]
    } else if weak("the discard takes D without a flight") {
        &[
            D::Begin,
            D::SetZero,
            D::Look,
            D::Clear,
            D::Flush,
            D::Drop,
            D::Leave,
        ]
    } else if weak("nothing is left pending") {
        &[
            D::Begin,
            D::SetZero,
            D::Look,
            D::Fly,
            D::Clear,
            D::Flush,
            D::Drop,
            D::Wipe,
        ]
    } else {
        &[
            D::Begin,
            D::SetZero,
            D::Look,
            D::Fly,
            D::Clear,
            D::Flush,
            D::Drop,
            D::Leave,
            D::Wipe,
        ]
    };
    let fails: &[Discard] = if weak("a discard that fails leaves the zero bit") {
        &[D::FailLeave, D::FailWipe, D::End]
    } else if weak("a discard that fails ends before it clears the zero bit") {
        &[D::FailLeave, D::FailWipe, D::End, D::ClearZero]
    } else if weak("a discard that fails leaves nothing pending") {
        &[D::ClearZero, D::FailWipe, D::End]
    } else if weak("a discard that fails marks the page instead of leaving it pending") {
        &[D::ClearZero, D::FailMark, D::FailWipe, D::End]
    } else {
        &[D::ClearZero, D::FailLeave, D::FailWipe, D::End]
    };
    let take: &[Step] = if weak("a harvest that takes D leaves the zero bit") {
        &[Step::Fly, Step::Clear, Step::Leave, Step::Wipe]
    } else if weak("a harvest clears the zero bit before it clears D") {
        &[
            Step::Fly,
            Step::ClearZero,
            Step::Clear,
            Step::Leave,
            Step::Wipe,
        ]
    } else if weak("a harvest clears the zero bit after it has left the page") {
        &[
            Step::Fly,
            Step::Clear,
            Step::Leave,
            Step::Wipe,
            Step::ClearZero,
        ]
    } else {
        &[
            Step::Fly,
            Step::Clear,
            Step::ClearZero,
            Step::Leave,
            Step::Wipe,
        ]
    };
    let says: &[Step] = if weak("a consumer ignores discards at work") {
        &[Step::Zero, Step::Copy]
    } else if weak("a consumer looks for discards at work, then at the zero bit") {
        &[Step::AtWork, Step::Copy]
    } else if weak("a consumer looks at the zero bit once, then for discards at work") {
        &[Step::Zero, Step::AtWork]
    } else {
        &[Step::Zero, Step::AtWork, Step::Copy]
    };
    let order = Order {
        discard,
        fails,
        flushes_all: !weak("a flush of what the discard has taken alone"),
        owes_again: !weak("a discard that cannot flush forgets its debt"),
        take,
        clears_seen: !weak("a harvest that sees the page in flight leaves the zero bit"),
        says,
    };
    let consumer = Consumer {
        step: Step::Start,
        rounds: 2,
        after_writes: false,
        after_all: false,
        recorded: false,
        gather: false,
        flight: false,
        pending: false,
        zero: false,
        copy: 1,
    };
    let first = State {
        d: false,
        zero: false,
        cached: false,
        device: Device::Idle,
        data: 1,
        written: 1,
        writes: 2,
        queue: false,
        discard: Discard::Begin,
        discard_flies: false,
        // The second one harvests once: what it is told by then, and what it leaves.
        consumers: [
            consumer,
            Consumer {
                rounds: 1,
                ..consumer
            },
        ],
    };
    let lost = |s: &State| {
        let wrong = |c: &Consumer| {
            let must = c.after_all || (c.after_writes && s.data != 0);
            c.step == Step::Done && must && c.copy != s.data
        };
        s.consumers.iter().any(wrong)
    };
    let next = |s: &State, out: &mut Steps<State>| {
        device(*s, out);
        discard_page(*s, &order, out);
        consume(*s, 0, &order, out);
        consume(*s, 1, &order, out);
    };
    explore(first, next, lost)
}

fn device(s: State, out: &mut Steps<State>) {
    match s.device {
        Device::Idle if s.writes > 0 => {
            let device = match s.cached {
                true => Device::Data,
                false => Device::Leaf,
            };
            let writes = s.writes - 1;
            out.push(
                "device: begins a write",
                State {
                    device,
                    writes,
                    ..s
                },
            );
        }
        Device::Idle => {}
        Device::Leaf => {
            let next = State {
                d: true,
                cached: true,
                device: Device::Data,
                ..s
            };
            out.push("device: sets D", next);
        }
        Device::Data => {
            let next = State {
                device: Device::Idle,
                data: s.written + 1,
                written: s.written + 1,
                ..s
            };
            out.push("device: its data lands", next);
        }
    }
}

fn discard_page(s: State, order: &Order, out: &mut Steps<State>) {
    use Discard as D;
    let next_of = |steps: &[Discard], otherwise: Discard| {
        let at = steps.iter().position(|step| *step == s.discard);
        *at.and_then(|at| steps.get(at + 1)).unwrap_or(&otherwise)
    };
    let then = match s.discard {
        D::ClearZero | D::FailLeave | D::FailMark | D::FailWipe | D::End => {
            next_of(order.fails, D::Done)
        }
        _ => next_of(order.discard, D::End),
    };
    let go = |discard, s: State| State { discard, ..s };
    match s.discard {
        Discard::Begin => out.push("discard: says that it is at work", go(then, s)),
        Discard::SetZero | Discard::LateZero => {
            out.push(
                "discard: sets the zero bit",
                go(then, State { zero: true, ..s }),
            );
        }
        Discard::Look if s.d => out.push("discard: finds D", go(then, s)),
        Discard::Look => {
            let at = order
                .discard
                .iter()
                .position(|step| *step == Discard::Clear);
            let skipped = at.and_then(|at| order.discard.get(at + 1));
            out.push(
                "discard: finds D clear",
                go(*skipped.unwrap_or(&Discard::End), s),
            );
        }
        Discard::Fly => {
            let discard_flies = true;
            out.push(
                "discard: publishes it as in flight",
                go(then, State { discard_flies, ..s }),
            );
        }
        // The flight stands for what it has taken, in the weakness that flushes that alone.
        Discard::Clear => out.push("discard: clears D", go(then, State { d: false, ..s })),
        Discard::Flush if !order.flushes_all && !s.discard_flies && !s.queue => {
            out.push("discard: owes nothing", go(then, s));
        }
        Discard::Flush if s.device == Device::Idle => {
            let flushed = State {
                cached: false,
                queue: false,
                ..s
            };
            out.push("discard: flushes", go(then, flushed));
            let queue = order.owes_again;
            let failed = State { queue, ..s };
            out.push("discard: fails to flush, owes", go(order.fails[0], failed));
        }
        Discard::Flush => {}
        Discard::Drop => {
            // Without a flush, a write that was translated lands after the drop.
            out.push(
                "discard: drops the storage",
                go(then, State { data: 0, ..s }),
            );
            if s.data != 0 {
                out.push("discard: cannot drop it", go(order.fails[0], s));
            }
        }
        Discard::Leave | Discard::FailLeave => {
            let mut s = s;
            s.consumers
                .iter_mut()
                .for_each(|consumer| consumer.pending = true);
            out.push("discard: leaves it pending", go(then, s));
        }
        Discard::Wipe | Discard::FailWipe => {
            let discard_flies = false;
            out.push(
                "discard: ends its flight",
                go(then, State { discard_flies, ..s }),
            );
        }
        Discard::FailMark => out.push("discard: marks it", go(then, State { d: true, ..s })),
        Discard::ClearZero => {
            out.push(
                "discard: clears the zero bit",
                go(then, State { zero: false, ..s }),
            );
        }
        Discard::End => out.push("discard: says that it has ended", go(then, s)),
        Discard::Done => {}
    }
}

/// Whether a discard says that it is at work.
fn at_work(s: State, order: &Order) -> bool {
    let ended = match order.fails.last() {
        // The weakness that clears the bit afterwards.
        Some(Discard::ClearZero) => matches!(s.discard, Discard::Done | Discard::ClearZero),
        _ => s.discard == Discard::Done,
    };
    s.discard != Discard::Begin && !ended
}

/// What consumer `whose` may do next.
fn consume(s: State, whose: usize, order: &Order, out: &mut Steps<State>) {
    let me = s.consumers[whose];
    let other = s.consumers[1 - whose];
    let with = |me: Consumer, s: State| {
        let mut s = s;
        s.consumers[whose] = me;
        s
    };
    let go = |step| Consumer { step, ..me };
    let then = {
        let at = order.take.iter().position(|step| *step == me.step);
        *at.and_then(|at| order.take.get(at + 1))
            .unwrap_or(&Step::Flights)
    };
    let say = {
        let at = order.says.iter().position(|step| *step == me.step);
        *at.and_then(|at| order.says.get(at + 1))
            .unwrap_or(&Step::Done)
    };
    let copied = |zero: bool, step| Consumer {
        copy: match (me.recorded, zero) {
            (false, _) => me.copy,
            (true, true) => 0,
            (true, false) => s.data,
        },
        ..go(step)
    };
    match me.step {
        Step::Start if me.rounds == 0 => {}
        Step::Start => {
            let after_writes = s.writes == 0 && s.device == Device::Idle;
            let me = Consumer {
                after_writes,
                after_all: after_writes && s.discard == Discard::Done,
                rounds: me.rounds - 1,
                ..go(Step::Table)
            };
            out.push("harvest: begins", with(me, s));
        }
        Step::Table if s.d => {
            let me = Consumer {
                recorded: true,
                ..go(order.take[0])
            };
            out.push("harvest: finds D, records", with(me, s));
        }
        Step::Table => out.push("harvest: finds D clear", with(go(Step::Flights), s)),
        Step::Fly => {
            let me = Consumer {
                flight: true,
                ..go(then)
            };
            out.push("harvest: publishes it as in flight", with(me, s));
        }
        Step::Clear => {
            let me = Consumer {
                gather: true,
                ..go(then)
            };
            out.push("harvest: clears D", with(me, State { d: false, ..s }));
        }
        Step::ClearZero => {
            out.push(
                "harvest: clears the zero bit",
                with(go(then), State { zero: false, ..s }),
            );
        }
        Step::Leave => {
            let mut s = with(go(then), State { queue: true, ..s });
            s.consumers[1 - whose].pending = true;
            out.push("harvest: owes, leaves it pending", s);
        }
        Step::Wipe => {
            let me = Consumer {
                flight: false,
                ..go(then)
            };
            out.push("harvest: ends the flight", with(me, s));
        }
        Step::Flights => {
            let seen = other.flight || s.discard_flies;
            let step = match seen && order.clears_seen {
                true => Step::ClearSeen,
                false => Step::Pending,
            };
            let me = Consumer {
                recorded: me.recorded || seen,
                ..go(step)
            };
            out.push("harvest: looks at flights", with(me, s));
        }
        Step::ClearSeen => {
            let zero = s.zero && !other.flight && !s.discard_flies;
            let me = go(Step::Pending);
            out.push(
                "harvest: clears the zero bit of what it saw",
                with(me, State { zero, ..s }),
            );
        }
        Step::Pending => {
            let me = Consumer {
                recorded: me.recorded || me.pending,
                pending: false,
                ..go(Step::Sync)
            };
            out.push("harvest: takes what is pending", with(me, s));
        }
        Step::Sync => {
            if me.recorded {
                let aborted = Consumer {
                    recorded: false,
                    gather: false,
                    pending: true,
                    ..go(Step::Start)
                };
                let queue = s.queue || me.gather;
                out.push(
                    "abort: owes, puts back",
                    with(aborted, State { queue, ..s }),
                );
            }
            let synced = Consumer {
                gather: false,
                ..go(order.says[0])
            };
            if !me.gather && !s.queue {
                out.push("sync: nothing is owed", with(synced, s));
            } else if s.device == Device::Idle {
                let flushed = State {
                    cached: false,
                    queue: false,
                    ..s
                };
                out.push("sync: flushes", with(synced, flushed));
            }
        }
        Step::Zero if !s.zero || !me.recorded => {
            out.push("consumer: copies", with(copied(false, Step::Done), s));
        }
        Step::Zero => {
            let me = Consumer {
                zero: true,
                ..go(say)
            };
            out.push("consumer: finds the zero bit", with(me, s));
        }
        Step::AtWork if at_work(s, order) || !me.recorded => {
            out.push(
                "consumer: finds a discard at work, copies",
                with(copied(false, Step::Done), s),
            );
        }
        // The last look decides.
        Step::AtWork if say == Step::Done => {
            out.push("consumer: says zero", with(copied(true, Step::Done), s));
        }
        Step::AtWork => out.push("consumer: finds no discard at work", with(go(say), s)),
        Step::Copy if s.zero => out.push("consumer: says zero", with(copied(true, Step::Done), s)),
        Step::Copy => out.push("consumer: copies", with(copied(false, Step::Done), s)),
        Step::Done => {
            let me = Consumer {
                recorded: false,
                zero: false,
                after_writes: false,
                after_all: false,
                ..go(Step::Start)
            };
            out.push("consumer: commits", with(me, s));
        }
    }
}
