//! Every callback of a source panics once, at each of its first calls, before, in the middle and
//! after, in programs with every call of the space. Random programs cover the rest.

use dirtymap::Access;

use crate::op::Stretch;
use crate::watch::run_watched;
use crate::{
    Ask, Begin, Callback, Config, Cut, JoinFault, MapFault, Mask, Master, Mode, Moment, Op, Place,
    Reach, Share, Step,
};

const MOMENTS: [Moment; 3] = [Moment::Before, Moment::Middle, Moment::After];

/// The first call, the second one, which is for another area, and a later one.
const CALLS: u8 = 3;

fn place(area: u8, page: u8) -> Place {
    Place {
        area,
        page,
        byte: 0,
    }
}

fn write(domain: u8, area: u8, page: u8) -> Op {
    let device = Master { domain, device: 0 };
    let at = place(area, page);
    Op::DmaWrite { device, at, len: 8 }
}

fn map(slot: u8) -> Op {
    Op::Map {
        slot,
        skip: 0,
        pages: 64,
        shifted: false,
        access: Access::ReadWrite,
        fault: MapFault::None,
    }
}

/// Dirty pages in two domains and by marks, in both areas.
fn dirty() -> Vec<Op> {
    let mut ops = Vec::new();
    for area in [0, 1] {
        for page in [0, 3, 15, 30] {
            ops.push(write(0, area, page));
            ops.push(write(1, area, page));
        }
        let at = place(area, 8);
        ops.push(Op::Mark {
            at,
            len: 64,
            by_handle: false,
        });
    }
    ops
}

/// The calls of a space that reach callbacks, each with writes before it.
fn calls() -> Vec<(&'static str, Vec<Op>)> {
    let everywhere = Ask {
        span: 14,
        ..Ask::EVERYTHING
    };
    let by = |mode| {
        Op::Harvest(Ask {
            mode,
            ..Ask::EVERYTHING
        })
    };
    let mask = Mask {
        stretches: 0x55,
        pages_lg2: 4,
        granule_lg2: 12,
    };
    let stretch = Stretch {
        slot: 2,
        skip: 0,
        pages: 40,
    };
    let batch = [
        Step::Cut(place(0, 15)),
        Step::Unmap(1),
        Step::Map(stretch, Access::ReadWrite),
    ];
    let unmap = |area| Op::Unmap {
        area,
        cut: Cut::Whole,
        granule_lg2: 12,
        short: false,
    };
    let discard = Op::UnmapDiscarding {
        area: 0,
        cut: Cut::Rest,
    };
    let anywhere = Op::MapAnywhere {
        piece: 0,
        pages: 40,
        skip: 0,
        access: Access::ReadWrite,
        ragged: false,
    };
    vec![
        ("harvest", vec![Op::Harvest(everywhere), Op::Commit(0)]),
        ("masked", vec![by(Mode::Masked(mask)), Op::Commit(0)]),
        (
            "bounded",
            vec![by(Mode::Bounded { from: 0, bits: 2 }), Op::Commit(0)],
        ),
        ("parallel", vec![by(Mode::Parallel), Op::Commit(0)]),
        (
            "one domain",
            vec![
                Op::Harvest(Ask {
                    domain: Some(1),
                    ..everywhere
                }),
                Op::Commit(0),
            ],
        ),
        ("abort", vec![Op::Harvest(everywhere), Op::Abort(0)]),
        (
            "a consumer",
            vec![Op::Harvest(everywhere.by(1)), Op::Commit(0), join(2)],
        ),
        (
            "a part",
            vec![
                Op::Harvest(everywhere),
                Op::CommitRange {
                    lease: 0,
                    part: Share(0, 99),
                },
                Op::DropLease(0),
            ],
        ),
        ("peek", vec![Op::Peek(everywhere)]),
        ("map", vec![map(2), map(3)]),
        ("map anywhere", vec![anywhere]),
        ("unmap", vec![unmap(0)]),
        ("discard", vec![discard]),
        (
            "cut",
            vec![
                Op::CutAt {
                    at: place(0, 15),
                    unaligned: false,
                },
                unmap(1),
            ],
        ),
        ("batch", vec![Op::Batch(batch)]),
        (
            "cuts",
            vec![Op::Batch([
                Step::Cut(place(0, 3)),
                Step::Cut(place(0, 15)),
                Step::Unmap(1),
            ])],
        ),
        ("detach", vec![Op::Detach(1), Op::Attach(1)]),
        ("attach", vec![Op::Attach(2), Op::Detach(2)]),
        ("switch", vec![Op::Track(false), Op::Track(true)]),
        (
            "switch a domain",
            vec![Op::TrackDomain(1, false), Op::TrackDomain(1, true)],
        ),
    ]
}

fn join(consumer: u8) -> Op {
    Op::Join {
        consumer,
        start: Begin::Clean,
        reach: Reach::Everything,
        fault: JoinFault::None,
    }
}

/// A world with two areas that two domains translate. With large leaves, it has a named consumer as
/// well, to which every harvest leaves what it takes.
fn world(large: bool) -> (Config, Vec<Op>) {
    let config = Config {
        large_leaves: [large; 3],
        tlb_entries: 16,
        warm: false,
        ..Config::PLAIN
    };
    let mut ops = vec![map(0), map(1), Op::Attach(1), Op::Track(true)];
    ops.extend(large.then(|| join(1)));
    (config, ops)
}

/// Four bugs. When a source panicked in `unmap` after it had reported leaves, these were lost. A
/// source that panicked half-way through `map` was never called to unmap the part that it had
/// mapped. The second of two splits lost the debt of the first one. An invalidation that panicked
/// during the undo of a batch aborted the process.
#[test]
fn every_callback_may_panic_at_every_call() {
    let mut wrong = Vec::new();
    let mut runs = 0;
    for callback in Callback::ALL.iter().copied() {
        for ((name, call), large) in calls()
            .into_iter()
            .flat_map(|call| [(call.clone(), false), (call, true)])
        {
            for (calls, moment) in (0..CALLS).flat_map(|n| MOMENTS.map(|moment| (n, moment))) {
                let (config, mut ops) = world(large);
                ops.extend(dirty());
                ops.extend([0, 1].map(|domain| Op::Panics {
                    domain,
                    callback,
                    calls,
                    moment,
                }));
                ops.extend(call.clone());
                ops.extend(dirty());
                runs += 1;
                if let Err(violation) = run_watched(&ops, &config) {
                    wrong.push(format!(
                        "{name}, {callback:?}, call {calls}, {moment:?}, large {large}: {violation}"
                    ));
                }
            }
        }
    }
    println!("{runs} programs");
    let some: Vec<&String> = wrong.iter().take(40).collect();
    assert!(wrong.is_empty(), "{} of {runs}: {some:#?}", wrong.len());
}
