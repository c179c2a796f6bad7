//! The runner: executes a program on the library and on the oracle, and compares after every step.
//!
//! It keeps a copy of the memory as a migrator would: all of an area when the area is mapped or tracking is switched
//! on, and from then on only what synced leases name. In the end the copy must equal the memory.

mod areas;
mod checks;
mod consumer;
mod writers;

use std::collections::BTreeMap;

use dirtymap::sync::Arc;
use dirtymap::{Access, AddressSpace, Error, Granule, IovaRange, Lease, Owed, SpaceStats, Synced};
use pagetable_sim::PhysMemory;

use crate::bits::Buffer;
use crate::op::{Config, MapFault, Op};
use crate::oracle::{Bytes, Oracle, PAGE};
use crate::rig::Rig;
use crate::violation::{Rule, Violation, same, violation};

type Checked = Result<(), Violation>;

/// Executes `ops` in the world of `config`, on the library and on the oracle. Returns what the space counted.
///
/// # Errors
/// The first [`Violation`].
pub fn run(ops: &[Op], config: &Config) -> Result<SpaceStats, Violation> {
    let rig = Rig::new(config).map_err(|error| violation(Rule::Answer, error.to_string()))?;
    let space = AddressSpace::new(Granule::K4)
        .with_source(rig.clone())
        .map_err(|error| violation(Rule::Answer, error.to_string()))?;
    let buffers = [Buffer::new(), Buffer::new()];
    let mut runner = Runner {
        config: *config,
        oracle: Oracle::new(config.large_leaves),
        rig,
        space: &space,
        buffers: &buffers,
        leases: [None, None],
        copy: BTreeMap::new(),
        counts: SpaceStats::default(),
        time: 0,
    };
    let prelude: &[Op] = if config.warm { &PRELUDE } else { &[] };
    for (step, op) in prelude.iter().chain(ops).enumerate() {
        let step = step.saturating_sub(prelude.len());
        runner
            .step(op)
            .map_err(|violation| Violation { step, ..violation })?;
    }
    runner.finish().map_err(|violation| Violation {
        step: ops.len(),
        ..violation
    })?;
    Ok(space.stats())
}

/// A large leaf with small ones behind it, a few pages elsewhere, and tracking.
const PRELUDE: [Op; 3] = [
    Op::Map {
        slot: 0,
        skip: 0,
        pages: 513,
        shifted: false,
        access: Access::ReadWrite,
        fault: MapFault::None,
    },
    Op::Map {
        slot: 3,
        skip: 0,
        pages: 5,
        shifted: false,
        access: Access::ReadWrite,
        fault: MapFault::None,
    },
    Op::Track(true),
];

struct Runner<'a> {
    config: Config,
    oracle: Oracle,
    rig: Arc<Rig>,
    space: &'a AddressSpace,
    buffers: &'a [Buffer; 2],
    leases: [Option<Held<'a>>; 2],
    /// The migrator's copy, by page; absent is zero.
    copy: BTreeMap<u64, Box<Bytes>>,
    /// What the space should have counted; of the flushes only `failed`.
    counts: SpaceStats,
    /// Goes up with every step, so that every write has bytes of its own.
    time: u8,
}

/// A live lease.
struct Held<'a> {
    live: Live<'a>,
    range: IovaRange,
    granule: Granule,
    /// The last page that the harvest went over.
    reached: Option<u64>,
    bytes: u64,
    copied: bool,
}

enum Live<'a> {
    Owed(Lease<'a, Owed>),
    Synced(Lease<'a, Synced>),
}

impl<'a> Runner<'a> {
    fn step(&mut self, op: &Op) -> Checked {
        self.time = self.time.wrapping_add(1);
        let told_to_fail = self.rig.will_fail();
        match *op {
            Op::DmaWrite { device, at, len } => self.dma_write(device, at, len)?,
            Op::DmaRead { device, at, len } => self.dma_read(device, at, len)?,
            Op::Mark { at, len, by_handle } => self.cpu_write(at, len, by_handle)?,
            Op::Harvest(ask) => self.harvest(&ask)?,
            Op::Peek(ask) => self.peek(&ask)?,
            Op::Sync(lease) => self.sync(lease.into())?,
            Op::Copy(lease) => self.copy_lease(lease.into())?,
            Op::Commit(lease) => self.commit(lease.into())?,
            Op::Abort(lease) => self.abort(lease.into(), false)?,
            Op::DropLease(lease) => self.abort(lease.into(), true)?,
            Op::FlushFails => self.rig.fail_next(),
            Op::Map {
                slot,
                skip,
                pages,
                shifted,
                access,
                fault,
            } => self.map(Oracle::new_area(slot, skip, pages, shifted, access), fault)?,
            Op::UnmapDiscarding { area, cut } => self.unmap(area, cut)?,
            Op::Track(on) => self.track(on)?,
            Op::Land(device) => self.rig.land(device),
            Op::Quiesce(device) => self.rig.quiesce(device),
        }
        if told_to_fail && !self.rig.will_fail() {
            self.counts.flush.failed += 1;
        }
        self.check_counts()
    }

    fn memory(&self) -> &PhysMemory {
        self.rig.memory()
    }

    /// Where the byte at `at` lies in memory.
    fn phys(&self, at: u64) -> Option<u64> {
        let area = self.oracle.area_at(at / PAGE)?;
        Some(area.frame_of(at / PAGE) * PAGE + at % PAGE)
    }
}

/// Both succeeded, or both failed in the same way: an error's text has every value in it.
fn same_answer(what: &str, got: Result<(), Error>, right: Result<(), Error>) -> Checked {
    let text = |answer: Result<(), Error>| answer.map_err(|error| error.to_string());
    same(Rule::Answer, what, text(got), text(right))
}

fn broken(error: pagetable_sim::Error) -> Violation {
    violation(Rule::Answer, format!("the simulator: {error}"))
}
