//! Two consumers of one page: each is told every write by harvests of its own.
//!
//! The harvest that clears D takes it from the other consumer too, and leaves the page to it. The
//! order that holds is: publish the page as in flight, clear D, hand the debt to the flush queue,
//! leave the page pending for the other consumer, end the flight. A harvest looks at the table, at
//! the flights of the other one, and at what is pending for it, in this order. Its sync pays what
//! the queue owes.
//!
//! A page that is left pending *before* the clear can be taken, synced without a debt and copied.
//! Then the device writes again by a cached "D is set", and the clear destroys the only trace. A
//! page that is left *after* the clear, without a flight, is nowhere between the two, and a last
//! harvest that looks then misses it. Both together fail like the first.

use super::explore::{Outcome, Steps, explore};

pub(super) const WEAKNESSES: &[&str] = &[
    "left before the clear, no flight",
    "left after the clear, no flight",
    "left before and after the clear, no flight",
    "the flight ends, and nothing is left",
    "left without a debt in the queue",
    "the debt is handed over before the clear",
    "the flight ends before the page is left",
    "a sync pays only its own debt",
    "looks at what is pending before the table",
    "looks at flights after what is pending",
    "an abort forgets what it took",
    "a consumer joins without waiting for harvests that do not know it",
    "a consumer joins without a flush",
];

/// What the device caches.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Tlb {
    Nothing,
    Clean,
    Dirty,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Device {
    Idle,
    /// About to set D.
    Leaf,
    /// Translated; the data has not landed.
    Data,
}

/// What a consumer does next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    /// Not a consumer yet: it publishes itself.
    Join,
    /// Waits for harvests that began before.
    Grace,
    /// Flushes everything.
    JoinFlush,
    /// Copies everything.
    Baseline,
    Start,
    Table,
    LeaveEarly,
    Publish,
    Clear,
    Owe,
    Leave,
    End,
    Flights,
    Pending,
    Sync,
    Copy,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Consumer {
    step: Step,
    rounds: u8,
    /// The harvest began after the last write had landed.
    after_all: bool,
    recorded: bool,
    /// It cleared D, and nobody has flushed since.
    gather: bool,
    /// The harvest knows the other consumer.
    knows: bool,
    flight: bool,
    pending: bool,
    copy: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    d: bool,
    tlb: Tlb,
    device: Device,
    data: u8,
    writes: u8,
    stopped: bool,
    queue: bool,
    consumers: [Consumer; 2],
}

/// The orders of steps.
struct Order {
    /// From the look at D to the end of the flight.
    take: &'static [Step],
    looks: [Step; 3],
    pays_all: bool,
    forgets: bool,
    waits: bool,
    flushes: bool,
}

const FLIGHTS: Step = Step::Flights;
const PENDING: Step = Step::Pending;
const TABLE: Step = Step::Table;

/// Explores the model, weakened as `weakness` says: two consumers from the beginning, and then one
/// that joins.
pub(super) fn explore_with(weakness: Option<&'static str>) -> Outcome {
    use Step::{Clear, End, Leave, LeaveEarly, Owe, Publish};
    let weak = super::chosen(weakness, WEAKNESSES);
    let take: &[Step] = if weak("left before the clear, no flight") {
        &[LeaveEarly, Clear]
    } else if weak("left after the clear, no flight") {
        &[Clear, Owe, Leave]
    } else if weak("left before and after the clear, no flight") {
        &[LeaveEarly, Clear, Owe, Leave]
    } else if weak("the flight ends, and nothing is left") {
        &[Publish, Clear, Owe, End]
    } else if weak("left without a debt in the queue") {
        &[Publish, Clear, Leave, End]
    } else if weak("the debt is handed over before the clear") {
        &[Publish, Owe, Clear, Leave, End]
    } else if weak("the flight ends before the page is left") {
        &[Publish, Clear, Owe, End, Leave]
    } else {
        &[Publish, Clear, Owe, Leave, End]
    };
    let looks = if weak("looks at what is pending before the table") {
        [PENDING, TABLE, FLIGHTS]
    } else if weak("looks at flights after what is pending") {
        [TABLE, PENDING, FLIGHTS]
    } else {
        [TABLE, FLIGHTS, PENDING]
    };
    let order = Order {
        take,
        looks,
        pays_all: !weak("a sync pays only its own debt"),
        forgets: weak("an abort forgets what it took"),
        waits: !weak("a consumer joins without waiting for harvests that do not know it"),
        flushes: !weak("a consumer joins without a flush"),
    };
    let (both, joins) = (run(&order, false), run(&order, true));
    let states = both.states + joins.states;
    let loss = both.loss.or(joins.loss);
    Outcome { states, loss }
}

fn run(order: &Order, joins: bool) -> Outcome {
    let consumer = Consumer {
        step: Step::Start,
        rounds: 2,
        after_all: false,
        recorded: false,
        gather: false,
        knows: true,
        flight: false,
        pending: false,
        copy: 0,
    };
    let late = Consumer {
        step: if joins { Step::Join } else { Step::Start },
        ..consumer
    };
    let first = State {
        d: false,
        tlb: Tlb::Nothing,
        device: Device::Idle,
        data: 0,
        writes: 2,
        stopped: false,
        queue: false,
        consumers: [consumer, late],
    };
    let lost = |s: &State| {
        let wrong = |c: &Consumer| c.step == Step::Done && c.after_all && c.copy != s.data;
        s.consumers.iter().any(wrong)
    };
    let next = |s: &State, out: &mut Steps<State>| {
        device(*s, out);
        consume(*s, 0, order, out);
        consume(*s, 1, order, out);
    };
    explore(first, next, lost)
}

fn device(s: State, out: &mut Steps<State>) {
    match s.device {
        Device::Idle if !s.stopped => {
            if s.writes > 0 {
                let device = match s.tlb {
                    Tlb::Dirty => Device::Data,
                    Tlb::Clean | Tlb::Nothing => Device::Leaf,
                };
                let writes = s.writes - 1;
                let next = State {
                    device,
                    writes,
                    ..s
                };
                out.push("device: begins a write", next);
            }
            if s.tlb == Tlb::Nothing {
                let tlb = if s.d { Tlb::Dirty } else { Tlb::Clean };
                out.push("device: reads", State { tlb, ..s });
            }
            out.push("device: stops", State { stopped: true, ..s });
        }
        Device::Idle => {}
        Device::Leaf => {
            let (device, tlb) = (Device::Data, Tlb::Dirty);
            let next = State {
                d: true,
                device,
                tlb,
                ..s
            };
            out.push("device: sets D", next);
        }
        Device::Data => {
            let (device, data) = (Device::Idle, s.data + 1);
            out.push("device: its data lands", State { device, data, ..s });
        }
    }
    if s.tlb != Tlb::Nothing {
        let tlb = Tlb::Nothing;
        out.push("device: evicts the leaf", State { tlb, ..s });
    }
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
    let after = |look: Step| {
        let at = order.looks.iter().position(|l| *l == look);
        *at.and_then(|at| order.looks.get(at + 1))
            .unwrap_or(&Step::Sync)
    };
    // A harvest that does not know the other consumer leaves it nothing.
    let alone: &[Step] = &[Step::Clear];
    let take = if me.knows { order.take } else { alone };
    let then = |step: Step| {
        let at = take.iter().position(|s| *s == step);
        *at.and_then(|at| take.get(at + 1)).unwrap_or(&after(TABLE))
    };
    let leave = |s: State, step| {
        let mut s = with(go(step), s);
        s.consumers[1 - whose].pending = true;
        s
    };
    match me.step {
        Step::Join if order.waits => out.push("join: publishes itself", with(go(Step::Grace), s)),
        Step::Join => out.push("join: publishes itself", with(go(Step::JoinFlush), s)),
        // The harvest of the other one that does not know us has ended.
        Step::Grace => {
            if other.knows
                || matches!(
                    other.step,
                    Step::Start | Step::Sync | Step::Copy | Step::Done
                )
            {
                out.push("join: waited", with(go(Step::JoinFlush), s));
            }
        }
        Step::JoinFlush if !order.flushes => out.push("join", with(go(Step::Baseline), s)),
        Step::JoinFlush => {
            if s.device == Device::Idle {
                let flushed = State {
                    tlb: Tlb::Nothing,
                    queue: false,
                    ..s
                };
                out.push("join: flushes all", with(go(Step::Baseline), flushed));
            }
        }
        Step::Baseline => {
            let me = Consumer {
                copy: s.data,
                ..go(Step::Start)
            };
            out.push("join: copies everything", with(me, s));
        }
        Step::Start if me.rounds == 0 => {}
        Step::Start => {
            let me = Consumer {
                step: order.looks[0],
                after_all: s.stopped && s.device == Device::Idle,
                rounds: me.rounds - 1,
                knows: other.step != Step::Join,
                ..me
            };
            out.push("harvest: begins", with(me, s));
        }
        Step::Table if s.d => {
            let me = Consumer {
                recorded: true,
                ..go(take[0])
            };
            out.push("harvest: finds D, records", with(me, s));
        }
        Step::Table => out.push("harvest: finds D clear", with(go(after(TABLE)), s)),
        Step::LeaveEarly => out.push("harvest: leaves it early", leave(s, then(me.step))),
        Step::Publish => {
            let me = Consumer {
                flight: true,
                ..go(then(me.step))
            };
            out.push("harvest: publishes it as in flight", with(me, s));
        }
        Step::Clear => {
            let me = Consumer {
                gather: true,
                ..go(then(me.step))
            };
            out.push("harvest: clears D", with(me, State { d: false, ..s }));
        }
        Step::Owe => {
            let s = State { queue: true, ..s };
            out.push("harvest: hands over the debt", with(go(then(me.step)), s));
        }
        Step::Leave => out.push("harvest: leaves it pending", leave(s, then(me.step))),
        Step::End => {
            let me = Consumer {
                flight: false,
                ..go(then(me.step))
            };
            out.push("harvest: ends the flight", with(me, s));
        }
        Step::Flights => {
            let recorded = me.recorded || other.flight;
            let me = Consumer {
                recorded,
                ..go(after(FLIGHTS))
            };
            out.push("harvest: looks at the flight", with(me, s));
        }
        Step::Pending => {
            let me = Consumer {
                recorded: me.recorded || me.pending,
                pending: false,
                ..go(after(PENDING))
            };
            out.push("harvest: takes what is pending", with(me, s));
        }
        Step::Sync => {
            if me.recorded {
                let aborted = Consumer {
                    recorded: false,
                    gather: false,
                    after_all: false,
                    pending: !order.forgets || me.pending,
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
                ..go(Step::Copy)
            };
            let owed = me.gather || (s.queue && order.pays_all);
            if !owed {
                out.push("sync: nothing is owed", with(synced, s));
            } else if s.device == Device::Idle {
                let flushed = State {
                    tlb: Tlb::Nothing,
                    queue: false,
                    ..s
                };
                out.push("sync: flushes", with(synced, flushed));
            }
        }
        Step::Copy => {
            let copy = if me.recorded { s.data } else { me.copy };
            let me = Consumer {
                copy,
                ..go(Step::Done)
            };
            out.push("consumer: copies", with(me, s));
        }
        Step::Done => {
            let me = Consumer {
                recorded: false,
                after_all: false,
                ..go(Step::Start)
            };
            out.push("consumer: commits", with(me, s));
        }
    }
}
