//! The runner: executes a program on the library and on the oracle, and compares after every step.
//!
//! It keeps a copy of the memory, like a migrator: the whole area when the area is mapped or
//! tracking is switched on, and from then on only the pages of synced leases. At the end the copy
//! must equal the memory.

mod areas;
mod changes;
mod checks;
mod consumer;
mod discards;
mod domains;
mod epochs;
mod guards;
mod harvest;
mod image;
mod members;
mod modes;
mod panics;
mod pass;
mod request;
mod writers;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use dirtymap::space::SpaceStats;
use dirtymap::{
    Access, AddressSpace, AreaHandle, Consumer, Error, Granule, HarvestRequest, Iova, IovaRange,
    Lease, Owed, Synced, WriteGuard,
};
use pagetable_sim::PhysMemory;

use self::image::{Fresh, Image, Kept};
use crate::bits::Buffer;
use crate::op::{CONSUMERS, CURSORS, Config, MapFault, Op, Sabotage, Stretch};
use crate::oracle::{Free, Ledger, Oracle};
use crate::pages::{Bytes, PAGE};
use crate::violation::{Rule, Violation, same, violation};
use crate::world::World;

type Checked = Result<(), Violation>;

/// Executes `ops` in the world of `config`, on the library and on the oracle. Returns the counts of
/// the space.
///
/// # Errors
/// The first [`Violation`].
pub fn run(ops: &[Op], config: &Config) -> Result<SpaceStats, Violation> {
    let _broken = members::LeftOut::of(config.sabotage);
    let world = World::new(config).map_err(broken)?;
    let page = Granule::from_lg2(config.space_lg2).unwrap_or(Granule::K4);
    let space = AddressSpace::new(page);
    let buffers = [Buffer::new(), Buffer::new()];
    let mut runner = Runner {
        config: *config,
        oracle: Oracle::new(config, &world),
        world,
        space: &space,
        buffers: &buffers,
        leases: [None, None],
        guards: [None, None],
        handles: [None, None],
        consumers: [None, None, None, None],
        tallies: Default::default(),
        copies: Default::default(),
        images: [Some(Image::default()), None, None, None],
        ledgers: [None, None, None, None],
        cursors: [None, None, None, None],
        counts: SpaceStats::default(),
        unsure: Vec::new(),
        vanished: Vec::new(),
        forgotten: 0,
        time: 0,
    };
    let prelude = if config.warm { &PRELUDE } else { &PRELUDE[..1] };
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

/// A domain, a large leaf followed by small ones, a few pages elsewhere, and tracking.
const PRELUDE: [Op; 4] = [
    Op::Attach(0),
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
    world: World,
    space: &'a AddressSpace,
    buffers: &'a [Buffer; 2],
    leases: [Option<Held<'a>>; 2],
    guards: [Option<Guard<'a>>; 2],
    /// Handles, each with the number of the map that made its area.
    handles: [Option<(AreaHandle, u64)>; 2],
    /// The named consumers. The first is none: the unnamed one is the space.
    consumers: [Option<Rc<Consumer<'a>>>; CONSUMERS],
    /// The bytes of each consumer.
    tallies: [Tally; CONSUMERS],
    /// The copy of each consumer, by page. An absent page is zero.
    copies: [BTreeMap<u64, Box<Bytes>>; CONSUMERS],
    /// The image of each consumer that follows the lineage of its leases.
    images: [Option<Image>; CONSUMERS],
    /// The epochs of the named consumers.
    ledgers: [Option<Ledger>; CONSUMERS],
    cursors: [Option<Kept>; CURSORS],
    /// The expected counts of the space. Of those of flushes, only `failed`.
    counts: SpaceStats,
    /// The ranges of the unmaps of this step in which a source panicked.
    unsure: Vec<IovaRange>,
    /// Leases that were forgotten. They are not used again, and are dropped after all checks, so
    /// that the test leaks no memory.
    vanished: Vec<Live<'a>>,
    /// The bytes of the forgotten leases.
    forgotten: u64,
    /// Incremented with each step, so that each write has bytes of its own.
    time: u8,
}

/// The bytes that the harvests of a consumer have reported.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    leased: u64,
    committed: u64,
    aborted: u64,
}

/// A live lease.
struct Held<'a> {
    live: Live<'a>,
    /// The consumer. Whether it has left, the oracle knows.
    whose: usize,
    request: HarvestRequest<'static>,
    /// The addresses of the lease.
    view: IovaRange,
    /// The lease has no addresses.
    empty: bool,
    /// The number of maps before it. A later area has no page of it.
    maps: u64,
    /// The runs that the harvest walked.
    reached: Option<IovaRange>,
    /// The starts of granules that were committed by parts.
    committed: BTreeSet<u64>,
    /// The number of bytes that are neither committed nor put back.
    bytes: u64,
    copied: bool,
    /// Its number, if its consumer has epochs.
    number: Option<u64>,
    /// What was copied for the image of the consumer.
    fresh: Fresh,
}

/// A write in flight.
struct Guard<'a> {
    /// `None` if the writer writes without a guard.
    guard: Option<WriteGuard<'a>>,
    range: IovaRange,
}

/// The end of a lease that is not committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Abort,
    Drop,
    /// Its holder panics.
    Crash,
}

enum Live<'a> {
    Owed(Lease<'a, Owed>),
    Synced(Lease<'a, Synced>),
}

impl<'a> Runner<'a> {
    fn step(&mut self, op: &Op) -> Checked {
        self.time = self.time.wrapping_add(1);
        let failures = self.world.failures_ahead();
        self.unsure.clear();
        match *op {
            Op::DmaWrite { device, at, len } => self.dma_write(device, at, len)?,
            Op::DmaRead { device, at, len } => self.dma_read(device, at, len)?,
            Op::Mark { at, len, by_handle } => self.cpu_write(at, len, by_handle)?,
            Op::Harvest(ask) => self.harvest(&ask)?,
            Op::Pass { ask, form, fate } => self.pass(&ask, form, fate)?,
            Op::Peek(ask) => self.peek(&ask)?,
            Op::Sync(lease) => self.sync(lease.into())?,
            Op::BusySync {
                lease,
                device,
                at,
                len,
            } => self.busy_sync(lease.into(), device, at, len)?,
            Op::Copy(lease) => self.copy_lease(lease.into())?,
            Op::Commit(lease) => self.commit(lease.into())?,
            Op::CommitRange { lease, part } => self.commit_range(lease.into(), part)?,
            Op::Abort(lease) => self.put_back(lease.into(), End::Abort)?,
            Op::DropLease(lease) => self.put_back(lease.into(), End::Drop)?,
            Op::Crash(lease) => self.put_back(lease.into(), End::Crash)?,
            Op::HarvestDies(domain) => self.world.node(domain).dies().set(true),
            Op::FlushFails(domain) => self.world.node(domain).fails().set(true),
            Op::Panics {
                domain,
                callback,
                calls,
                moment,
            } => self.world.node(domain).panic_at(callback, calls, moment),
            Op::Stops { domain, at } => {
                let at = Iova::new(self.oracle.address_of(at));
                self.world.node(domain).stop_at(Some(at));
            }
            Op::Forget(lease) => self.forget_lease(lease.into()),
            Op::Reshape { domain, at, merge } => self.reshape(domain.into(), at, merge)?,
            Op::Map {
                slot,
                skip,
                pages,
                shifted,
                access,
                fault,
            } => {
                let at = Stretch { slot, skip, pages };
                let area = self.oracle.new_area(at, shifted, access);
                self.map(area, fault)?;
            }
            Op::MapAnywhere {
                piece,
                pages,
                skip,
                access,
                ragged,
            } => {
                if let Some(area) = self.oracle.new_piece(piece, skip, pages, access) {
                    self.map_anywhere(area, ragged)?;
                }
            }
            Op::UnmapDiscarding { area, cut } => self.unmap(area, cut, None)?,
            Op::Unmap {
                area,
                cut,
                granule_lg2,
                short,
            } => self.unmap(area, cut, Some((granule_lg2, short)))?,
            Op::CutAt { at, unaligned } => self.cut(at, unaligned)?,
            Op::Batch(steps) => self.batch(&steps)?,
            Op::Reserve(at) => self.reserve(at)?,
            Op::Release(nth) => self.release(nth)?,
            Op::Allow(code) => self.allow(Free::list(code))?,
            Op::Join {
                consumer,
                start,
                reach,
                fault,
            } => self.join(consumer.into(), start, reach, fault)?,
            Op::Leave(consumer) => self.leave(consumer.into()),
            Op::Attach(domain) => self.attach(domain.into())?,
            Op::Detach(domain) => self.detach(domain.into())?,
            Op::Track(on) => self.track(None, on)?,
            Op::TrackDomain(domain, on) => self.track(Some(domain.into()), on)?,
            Op::Land(device) => self.world.node(device.domain).land(device.device),
            Op::Quiesce(device) => self.world.node(device.domain).quiesce(device.device),
            Op::BeginWrite { guard, at, len } => self.begin_write(guard.into(), at, len)?,
            Op::FillWrite { guard, skip, len } => self.fill_write(guard.into(), skip, len)?,
            Op::EndWrite(guard) => self.end_write(guard.into())?,
            Op::KeepHandle { handle, area } => self.keep_handle(handle.into(), area),
            Op::Discard {
                at,
                pages,
                ragged,
                storage,
                meanwhile,
            } => self.discard(at, pages, ragged, (storage, meanwhile))?,
            Op::KeepCursor { cursor, whose } => self.keep_cursor(cursor.into(), whose.into())?,
            Op::DropCursor(cursor) => self.drop_cursor(cursor.into()),
            Op::Since { whose, epoch } => self.since(whose.into(), epoch)?,
            Op::Bound { whose, limits } => self.bound(whose.into(), limits),
            Op::MarkByKept { handle, page, len } => self.mark_by_kept(handle.into(), page, len)?,
        }
        let failed = failures.saturating_sub(self.world.failures_ahead());
        if !matches!(op, Op::FlushFails(_)) && !self.hides_failures() {
            self.counts.flush.failed += failed;
        }
        self.count_broken_flushes(op)?;
        self.notice_drops()?;
        self.check_counts()
    }

    fn hides_failures(&self) -> bool {
        self.config.sabotage == Sabotage::HideFailedFlush
    }

    fn memory(&self) -> &PhysMemory {
        &self.world.memory
    }

    /// The place of the byte at `at` in memory.
    fn phys(&self, at: u64) -> Option<u64> {
        let area = self.oracle.area_at(at / PAGE)?;
        Some(area.frame_of(at / PAGE) * PAGE + at % PAGE)
    }
}

/// Both succeeded, or both failed with the same text, which has all values of the error.
fn same_answer(what: &str, got: Result<(), Error>, right: Result<(), Error>) -> Checked {
    let text = |answer: Result<(), Error>| answer.map_err(|error| error.to_string());
    same(Rule::Answer, what, text(got), text(right))
}

fn broken(error: pagetable_sim::Error) -> Violation {
    violation(Rule::Answer, format!("the simulator: {error}"))
}
