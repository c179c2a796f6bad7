//! The runner: executes a program on the library and on the oracle, and compares after every step.
//!
//! It keeps a copy of the memory as a migrator would: all of an area when the area is mapped or tracking is switched on, and from then on
//! only what synced leases name. In the end the copy must equal the memory.

use std::collections::BTreeMap;

use dirtymap::sync::Arc;
use dirtymap::{
    Aborted, AddressSpace, Error, Granule, HarvestError, HarvestRequest, Iova, IovaRange, Lease,
    Mapping, Owed, SpaceStats, Synced, UserBitmap,
};
use pagetable_sim::{DmaError, FaultKind, PhysMemory};

use crate::bits::{Bounds, Buffer, check_bits, pages_in, runs_in, words_for};
use crate::op::{Ask, Config, Cut, MapFault, Op, Place, Sabotage};
use crate::oracle::{Area, Bytes, MEMORY, Oracle, PAGE, Tracking, pages, pages_of, pieces};
use crate::rig::Rig;
use crate::violation::{Rule, Violation, check, same, violation};

type Checked = Result<(), Violation>;

/// Executes `ops` in the world of `config`, on the library and on the oracle. Returns what the space counted.
///
/// # Errors
/// The first [`Violation`].
pub fn run(ops: &[Op], config: &Config) -> Result<SpaceStats, Violation> {
    let rig = Rig::new(config).map_err(|error| violation(Rule::Answer, error.to_string()))?;
    let space = AddressSpace::new(Granule::K4).with_source(rig.clone());
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
        access: dirtymap::Access::ReadWrite,
        fault: MapFault::None,
    },
    Op::Map {
        slot: 3,
        skip: 0,
        pages: 5,
        shifted: false,
        access: dirtymap::Access::ReadWrite,
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

    // Writers.

    fn dma_write(&mut self, device: u8, at: Place, len: u16) -> Checked {
        let at = self.oracle.address_of(at);
        let bytes = self.fresh_bytes(len);
        let mut right = Ok(());
        for (at, piece) in pieces(at, bytes.len()) {
            right = self.dma_at(at, true);
            if right.is_err() {
                break;
            }
            self.oracle.device_wrote(at, &bytes[piece]);
        }
        same(
            Rule::Answer,
            "a DMA write",
            self.rig.write(device, Iova::new(at), &bytes),
            right,
        )
    }

    fn dma_read(&mut self, device: u8, at: Place, len: u16) -> Checked {
        let at = self.oracle.address_of(at);
        let mut right = vec![0; len.into()];
        let mut answer = Ok(());
        for (at, piece) in pieces(at, len.into()) {
            answer = self.dma_at(at, false);
            if answer.is_err() {
                break;
            }
            let frame = self
                .oracle
                .area_at(at / PAGE)
                .map(|area| area.frame_of(at / PAGE));
            if let Some(memory) = frame.and_then(|frame| self.oracle.memory.get(&frame)) {
                let from = (at % PAGE) as usize;
                right[piece.clone()].copy_from_slice(&memory[from..from + piece.len()]);
            }
        }
        let mut got = vec![0; len.into()];
        same(
            Rule::Answer,
            "a DMA read",
            self.rig.read(device, Iova::new(at), &mut got),
            answer,
        )?;
        check(got == right, Rule::Answer, || {
            format!("a DMA read of {len} bytes at {at:#x} saw other bytes")
        })
    }

    /// What becomes of a device's access at `at`.
    fn dma_at(&self, at: u64, write: bool) -> Result<(), DmaError> {
        let kind = match self.oracle.area_at(at / PAGE).map(|area| area.access) {
            None => FaultKind::NotMapped,
            Some(access) if write && !access.writes() => FaultKind::ReadOnly,
            Some(access) if !write && !access.reads() => FaultKind::WriteOnly,
            Some(_) => return Ok(()),
        };
        let iova = Iova::new(at);
        Err(DmaError { iova, kind })
    }

    fn cpu_write(&mut self, at: Place, len: u16, by_handle: bool) -> Checked {
        let at = self.oracle.address_of(at);
        let bytes = self.fresh_bytes(len);
        let Ok(range) = IovaRange::from_len(Iova::new(at), len.into()) else {
            return Ok(());
        };
        let mut outside = self
            .oracle
            .hole_in(range)
            .map(|hole| hole.max(range.start()));
        if by_handle && let Some(handle) = self.space.area(range.start()) {
            let own = handle.mapping().range;
            outside = own.last().checked_add(1).filter(|_| !own.covers(range));
            if let Some(at) = outside {
                // Nothing is written, so nothing may be marked.
                let right = Err(Error::Outside { at });
                return same_answer(
                    "a mark that sticks out of the area",
                    handle.mark(range),
                    right,
                );
            }
            self.store(range, &bytes)?;
            if self.config.sabotage != Sabotage::ForgetMarks {
                same_answer("a mark by handle", handle.mark(range), Ok(()))?;
            }
            return Ok(());
        }
        self.store(range, &bytes)?;
        if self.config.sabotage == Sabotage::ForgetMarks {
            return Ok(());
        }
        self.counts.outside_marks += u64::from(outside.is_some());
        let right = outside.map_or(Ok(()), |at| Err(Error::Outside { at }));
        same_answer("a mark", self.space.mark(range), right)
    }

    /// A CPU stores the parts of `bytes` that lie in areas.
    fn store(&mut self, range: IovaRange, bytes: &[u8]) -> Checked {
        self.rig.settle(None, range.start(), bytes.len());
        for (at, piece) in pieces(range.start().get(), bytes.len()) {
            if let Some(phys) = self.phys(at) {
                self.memory()
                    .write(phys, &bytes[piece.clone()])
                    .map_err(broken)?;
                if self.config.sabotage == Sabotage::ForgetMarks {
                    self.oracle.cpu_wrote_unmarked(at, &bytes[piece]);
                } else {
                    self.oracle.cpu_wrote(at, &bytes[piece]);
                }
            }
        }
        Ok(())
    }

    fn fresh_bytes(&self, len: u16) -> Vec<u8> {
        (0..len)
            .map(|i| self.time.wrapping_mul(37).wrapping_add(i as u8) | 1)
            .collect()
    }

    // The consumer.

    fn harvest(&mut self, ask: &Ask) -> Checked {
        let Some(nth) = self.leases.iter().position(Option::is_none) else {
            return Ok(());
        };
        let range = self.oracle.range_of(ask);
        self.harvest_range(nth, range, ask)
    }

    fn harvest_range(&mut self, nth: usize, range: IovaRange, ask: &Ask) -> Checked {
        let granule = granule_of(ask);
        let (space, buffer) = (self.space, &self.buffers[nth]);
        buffer.fill(ask.preset);
        let before = buffer.read();
        let words = buffer.bitmap(words_for(range, granule) - usize::from(ask.short));
        let bits = words.len() as u64 * 64;
        let refusal = self
            .oracle
            .refusal(range, granule, bits, ask.all_or_nothing);
        let mut request = HarvestRequest::new(range, granule);
        if ask.all_or_nothing {
            request = request.all_or_nothing();
        }
        let (lease, stop) = match space.harvest(&request, UserBitmap::shared(words)) {
            Ok(lease) => (lease, None),
            Err(HarvestError::Stopped(stopped)) => {
                (stopped.lease, Some((stopped.at, stopped.error)))
            }
            Err(HarvestError::Refused(error)) => {
                same(
                    Rule::Bitmap,
                    "the bitmap of a refused harvest",
                    buffer.read(),
                    before,
                )?;
                let right = refusal.map_or(Ok(()), Err);
                return same_answer("a harvest", Err::<(), _>(error), right);
            }
        };
        same_answer("a harvest", Ok(()), refusal.map_or(Ok(()), Err))?;
        let hole = self.oracle.hole_in(range);
        same(
            Rule::Answer,
            "where a harvest stopped",
            stop.as_ref().map(|(at, _)| *at),
            hole,
        )?;
        if let Some((at, error)) = stop {
            let right = Err(Error::Hole { at, range });
            same_answer("a harvest that stopped", Err::<(), _>(error), right)?;
        }
        let walked = self.walked(range);
        let after = buffer.read();
        let set = check_bits(range, granule, &before, &after, &self.bounds(walked))?;
        same(Rule::Accounting, "bits set", lease.report().bits_set, set)?;
        let areas = walked.map_or(0, |(first, last)| self.areas_between(first, last));
        same(
            Rule::Accounting,
            "areas walked",
            lease.report().areas,
            areas,
        )?;
        let (first, last) = walked.unwrap_or((1, 0));
        let runs = runs_in(&after, range, granule);
        self.oracle
            .harvested(nth, first, last, pages_in(&runs, first, last));
        let bytes = set << granule.lg2();
        self.counts.harvests += 1;
        self.counts.leased_bytes += bytes;
        if self.config.sabotage == Sabotage::CopyBeforeSync {
            self.copy_runs(&runs)?;
        }
        self.leases[nth] = Some(Held {
            live: Live::Owed(lease),
            range,
            granule,
            reached: walked.map(|(_, last)| last),
            bytes,
            copied: self.config.sabotage == Sabotage::CopyBeforeSync,
        });
        Ok(())
    }

    fn peek(&mut self, ask: &Ask) -> Checked {
        let (range, granule) = (self.oracle.range_of(ask), granule_of(ask));
        let buffer = Buffer::new();
        buffer.fill(ask.preset);
        let before = buffer.read();
        let words = buffer.bitmap(words_for(range, granule) - usize::from(ask.short));
        let bits = words.len() as u64 * 64;
        let refusal = self
            .oracle
            .refusal(range, granule, bits, ask.all_or_nothing);
        let mut request = HarvestRequest::new(range, granule);
        if ask.all_or_nothing {
            request = request.all_or_nothing();
        }
        let answer = self.space.peek(&request, UserBitmap::shared(words));
        let after = buffer.read();
        if let Some(refusal) = refusal {
            same(Rule::Bitmap, "the bitmap of a refused peek", after, before)?;
            return same_answer("a peek", answer.map(|_| ()), Err(refusal));
        }
        let hole = self
            .oracle
            .hole_in(range)
            .map(|at| Error::Hole { at, range });
        same_answer("a peek", answer.map(|_| ()), hole.map_or(Ok(()), Err))?;
        check_bits(
            range,
            granule,
            &before,
            &after,
            &self.bounds(self.walked(range)),
        )?;
        Ok(())
    }

    fn sync(&mut self, nth: usize) -> Checked {
        let Some(mut held) = self.leases[nth].take() else {
            return Ok(());
        };
        let told_to_fail = self.rig.will_fail();
        let mut failed = false;
        held.live = match held.live {
            Live::Synced(lease) => Live::Synced(lease),
            Live::Owed(lease) => match lease.sync() {
                Ok(lease) => Live::Synced(lease),
                Err(error) => {
                    failed = true;
                    Live::Owed(*error.lease)
                }
            },
        };
        if let (Live::Synced(lease), Some(leased)) = (&held.live, &mut self.oracle.leases[nth]) {
            leased.synced = true;
            let runs = runs_in(&self.buffers[nth].read(), held.range, held.granule);
            let dirty: u128 = runs.iter().map(|run| run.granules(held.granule)).sum();
            same(
                Rule::Answer,
                "the dirty granules of a lease",
                lease.dirty().into(),
                dirty,
            )?;
            same(
                Rule::Answer,
                "the runs of a lease",
                lease.runs().collect(),
                runs,
            )?;
        }
        self.leases[nth] = Some(held);
        let was_told = told_to_fail && !self.rig.will_fail();
        same(Rule::Answer, "whether a sync failed", failed, was_told)
    }

    fn copy_lease(&mut self, nth: usize) -> Checked {
        let Some(held) = &mut self.leases[nth] else {
            return Ok(());
        };
        let Live::Synced(lease) = &held.live else {
            return Ok(());
        };
        if self.config.sabotage == Sabotage::CopyBeforeSync {
            return Ok(());
        }
        held.copied = true;
        let runs: Vec<IovaRange> = lease.runs().collect();
        self.copy_runs(&runs)
    }

    fn commit(&mut self, nth: usize) -> Checked {
        self.sync(nth)?;
        if self.leases[nth].as_ref().is_some_and(|held| !held.copied) {
            self.copy_lease(nth)?;
        }
        match self.leases[nth].take() {
            Some(Held {
                live: Live::Synced(lease),
                bytes,
                ..
            }) => {
                let report = lease.report();
                same(
                    Rule::Accounting,
                    "the report at commit",
                    lease.commit(),
                    report,
                )?;
                self.counts.committed_bytes += bytes;
                self.oracle.leases[nth] = None;
            }
            other => self.leases[nth] = other,
        }
        Ok(())
    }

    fn abort(&mut self, nth: usize, by_drop: bool) -> Checked {
        let Some(held) = self.leases[nth].take() else {
            return Ok(());
        };
        let walked = held
            .reached
            .map(|last| held.range.start().get() / PAGE..=last);
        let runs: Vec<IovaRange> = runs_in(&self.buffers[nth].read(), held.range, held.granule)
            .into_iter()
            .filter_map(|run| {
                let walked = walked.clone()?;
                run.intersection(pages(*walked.start(), *walked.end()))
            })
            .collect();
        let mut right = Aborted::default();
        for run in &runs {
            for (at, piece) in pieces(run.start().get(), run.len() as usize) {
                let bytes = piece.len() as u64;
                match self.oracle.area_at(at / PAGE) {
                    Some(_) => right.bytes += bytes,
                    None => right.outside_bytes += bytes,
                }
            }
        }
        match held.live {
            live if by_drop => drop(live),
            Live::Owed(lease) => same(Rule::Answer, "an abort", lease.abort(), right)?,
            Live::Synced(lease) => same(Rule::Answer, "an abort", lease.abort(), right)?,
        }
        self.oracle.aborted(nth, &runs);
        self.counts.aborted_bytes += held.bytes;
        self.counts.put_back_outside_bytes += right.outside_bytes;
        Ok(())
    }

    /// Copies what is mapped of `runs`.
    fn copy_runs(&mut self, runs: &[IovaRange]) -> Checked {
        for run in runs {
            for (at, piece) in pieces(run.start().get(), run.len() as usize) {
                let Some(phys) = self.phys(at) else {
                    continue;
                };
                // Memory that was never written is zero, as is what the copy does not hold.
                if !self.oracle.memory.contains_key(&(phys / PAGE)) {
                    continue;
                }
                let from = (at % PAGE) as usize;
                let memory = self.rig.memory();
                let page = self
                    .copy
                    .entry(at / PAGE)
                    .or_insert_with(|| Box::new([0; PAGE as usize]));
                memory
                    .read(phys, &mut page[from..from + piece.len()])
                    .map_err(broken)?;
            }
        }
        Ok(())
    }

    // Areas and tracking.

    fn map(&mut self, area: Area, fault: MapFault) -> Checked {
        let mut range = area.range();
        let mut backing = area.frame * PAGE;
        match fault {
            MapFault::None => (),
            MapFault::Unaligned => {
                let start = Iova::new(range.start().get() + 512);
                range = IovaRange::new(start, range.last()).unwrap_or(range);
            }
            MapFault::UnalignedBacking => backing += 512,
            MapFault::Wraps => {
                range = pages(area.first, area.last().max(area.first + 1));
                backing = u64::MAX - (PAGE - 1);
            }
            MapFault::OutsideMemory => backing = MEMORY,
        }
        let before = self.space.mappings();
        let answer = self.space.map(range, backing, area.access);
        let granule = Granule::K4;
        let existing = self
            .oracle
            .areas
            .values()
            .find(|other| other.range().intersects(range));
        let right = match (fault, existing) {
            (MapFault::Unaligned, _) => Err(Error::Unaligned { range, granule }),
            (MapFault::UnalignedBacking, _) => Err(Error::UnalignedBacking { backing, granule }),
            (MapFault::Wraps, _) => Err(Error::BackingWraps { backing, range }),
            (_, Some(existing)) => Err(Error::Overlap {
                range,
                existing: existing.range(),
            }),
            (MapFault::OutsideMemory, None) => {
                same(
                    Rule::Answer,
                    "areas after a map that failed",
                    self.space.mappings(),
                    before,
                )?;
                let unmapped = !self.rig.translates(range.start());
                return check(
                    unmapped && matches!(answer, Err(Error::Source(_))),
                    Rule::Answer,
                    || format!("a map of missing memory: {answer:?}, no translation: {unmapped}"),
                );
            }
            (MapFault::None, None) => {
                self.oracle.map(area);
                if self.oracle.tracking == Tracking::On {
                    self.copy_runs(&[range])?;
                }
                Ok(())
            }
        };
        same_answer("a map", answer, right)?;
        self.check_areas()
    }

    fn unmap(&mut self, nth: u8, cut: Cut) -> Checked {
        let Some(area) = self.oracle.nth_area(nth) else {
            let range = IovaRange::ALL;
            let right = Err(Error::NothingMapped { range });
            return same_answer(
                "an unmap of nothing",
                self.space.unmap_discarding(range).map(|_| ()),
                right,
            );
        };
        let last = self
            .oracle
            .areas
            .values()
            .next_back()
            .unwrap_or(&area)
            .last();
        let range = match cut {
            Cut::Part if area.pages > 1 => {
                let range = pages(area.first, area.last() - 1);
                let right = Err(Error::PartOfArea {
                    range,
                    area: area.range(),
                });
                let answer = self.space.unmap_discarding(range).map(|_| ());
                same_answer("an unmap of a part", answer, right)?;
                return self.check_areas();
            }
            Cut::Rest => pages(area.first, last),
            Cut::Whole | Cut::Part => area.range(),
        };
        let handle = self.space.area(range.start());
        let told_to_fail = self.rig.will_fail();
        let mut answer = self.space.unmap_discarding(range);
        if told_to_fail && !self.rig.will_fail() {
            check(
                matches!(answer, Err(Error::Source(_))),
                Rule::Answer,
                || format!("an unmap whose flush failed: {answer:?}"),
            )?;
            self.check_areas()?;
            answer = self.space.unmap_discarding(range);
        }
        let gone: Vec<Area> = self
            .oracle
            .areas
            .range(area.first..=last)
            .map(|(_, area)| *area)
            .collect();
        let gone: Vec<Area> = gone
            .into_iter()
            .filter(|area| range.covers(area.range()))
            .collect();
        match answer {
            Ok(done) => {
                same(
                    Rule::Answer,
                    "areas unmapped",
                    done.areas,
                    gone.len() as u64,
                )?;
                let bytes: u128 = gone.iter().map(|area| area.range().len()).sum();
                same(Rule::Answer, "bytes unmapped", done.bytes, bytes)?;
                self.check_discarded(done.discarded_bytes, &gone)?;
                self.counts.discarded_bytes += done.discarded_bytes as u64;
            }
            Err(error) => return same_answer("an unmap", Err(error), Ok(())),
        }
        for area in &gone {
            self.oracle.unmap(area);
            self.copy
                .retain(|page, _| !(area.first..=area.last()).contains(page));
            let unmapped = !self.rig.translates(area.range().start());
            check(unmapped, Rule::Answer, || {
                format!("{} is still translated", area.range())
            })?;
        }
        if let Some(handle) = handle {
            let range = handle.mapping().range;
            let right = Err(Error::Outside { at: range.start() });
            same_answer(
                "a mark by the handle of a gone area",
                handle.mark(range),
                right,
            )?;
        }
        self.check_areas()
    }

    /// Each marked page counts once, and each dirty leaf.
    fn check_discarded(&self, discarded: u128, gone: &[Area]) -> Checked {
        let inside = |page: u64| {
            gone.iter()
                .any(|area| (area.first..=area.last()).contains(&page))
        };
        let marked = self
            .oracle
            .marks
            .iter()
            .filter(|page| inside(**page))
            .count() as u64;
        let leaves = self.oracle.leaves.iter().filter(|(page, _)| inside(*page));
        let most = marked + leaves.map(|(_, count)| count).sum::<u64>();
        let (least, most) = (u128::from(marked * PAGE), u128::from(most * PAGE));
        check(
            (least..=most).contains(&discarded),
            Rule::Accounting,
            || format!("{discarded} bytes discarded, which should be {least} to {most}"),
        )
    }

    fn track(&mut self, on: bool) -> Checked {
        same_answer("switching tracking", self.space.set_tracking(on), Ok(()))?;
        let starts = on && self.oracle.tracking != Tracking::On;
        self.oracle.track(on);
        if starts {
            let areas: Vec<IovaRange> = self.oracle.areas.values().map(Area::range).collect();
            self.copy_runs(&areas)?;
        }
        Ok(())
    }

    // The checks after each step and at the end.

    fn check_counts(&self) -> Checked {
        let stats = self.space.stats();
        let live: u64 = self.leases.iter().flatten().map(|held| held.bytes).sum();
        let settled = stats.committed_bytes + stats.aborted_bytes;
        same(
            Rule::Accounting,
            "bytes leased",
            stats.leased_bytes,
            settled + live,
        )?;
        let flush = stats.flush;
        same(
            Rule::Accounting,
            "gathers owed",
            flush.owed,
            flush.retired + flush.pending,
        )?;
        same(
            Rule::Accounting,
            "flushes that failed",
            flush.failed,
            self.counts.flush.failed,
        )?;
        let counted = SpaceStats {
            flush: self.counts.flush,
            ..stats
        };
        same(Rule::Accounting, "the counts", counted, self.counts)
    }

    fn check_areas(&self) -> Checked {
        let right: Vec<Mapping> = self
            .oracle
            .areas
            .values()
            .map(|area| Mapping {
                range: area.range(),
                backing: area.frame * PAGE,
                access: area.access,
            })
            .collect();
        same(Rule::Answer, "the areas", self.space.mappings(), right)
    }

    /// Devices stop, all leases are committed, one last harvest: the copy must equal the memory, and nothing is dirty any more.
    fn finish(mut self) -> Checked {
        self.rig.quiesce(0);
        self.rig.quiesce(1);
        if self.rig.will_fail() {
            // The last flush that was told to fail must not fail the last harvest.
            self.step(&Op::Sync(0))?;
            self.step(&Op::Sync(1))?;
            self.rig.heal();
        }
        self.step(&Op::Commit(0))?;
        self.step(&Op::Commit(1))?;
        if self.oracle.tracking != Tracking::Never {
            self.last_harvest()?;
            self.compare()?;
            let before = self.space.stats().leased_bytes;
            self.last_harvest()?;
            same(
                Rule::Excess,
                "bytes dirty after the last harvest",
                self.space.stats().leased_bytes,
                before,
            )?;
            // Each flush takes all that is owed.
            if !self.oracle.areas.is_empty() {
                let pending = self.space.stats().flush.pending;
                same(Rule::Accounting, "gathers pending at the end", pending, 0)?;
            }
        }
        while !self.oracle.areas.is_empty() {
            self.step(&Op::UnmapDiscarding {
                area: 0,
                cut: Cut::Rest,
            })?;
        }
        Ok(())
    }

    fn last_harvest(&mut self) -> Checked {
        let all = Ask {
            area: 0,
            span: 0,
            page: 0,
            granule_lg2: 12,
            ragged: false,
            short: false,
            all_or_nothing: true,
            preset: 0,
        };
        for area in self.oracle.areas.clone().into_values() {
            self.harvest_range(0, area.range(), &all)?;
            self.step(&Op::Commit(0))?;
        }
        Ok(())
    }

    /// Compares the memory with the oracle's, and the copy with the memory.
    fn compare(&self) -> Checked {
        for page in self
            .oracle
            .areas
            .values()
            .flat_map(|area| pages_of(area.range()))
        {
            let phys = self.phys(page * PAGE).unwrap_or(MEMORY);
            let Some(right) = self.oracle.memory.get(&(phys / PAGE)) else {
                continue;
            };
            let mut memory = [0; PAGE as usize];
            self.memory().read(phys, &mut memory).map_err(broken)?;
            let at = page * PAGE;
            check(memory == **right, Rule::Answer, || {
                format!("the memory behind {at:#x} is wrong")
            })?;
            if self.oracle.untracked.contains(&page) {
                continue;
            }
            let copied = self.copy.get(&page).is_some_and(|copy| **copy == memory);
            check(
                copied || memory.iter().all(|byte| *byte == 0),
                Rule::Lost,
                || format!("the copy of page {at:#x} differs from the memory"),
            )?;
        }
        Ok(())
    }

    // Helpers.

    fn memory(&self) -> &PhysMemory {
        self.rig.memory()
    }

    /// Where the byte at `at` lies in memory.
    fn phys(&self, at: u64) -> Option<u64> {
        let area = self.oracle.area_at(at / PAGE)?;
        Some(area.frame_of(at / PAGE) * PAGE + at % PAGE)
    }

    /// The first and last page that a harvest of `range` goes over; `None` if it stops at once.
    fn walked(&self, range: IovaRange) -> Option<(u64, u64)> {
        let first = range.start().get() / PAGE;
        let end = match self.oracle.hole_in(range) {
            Some(hole) => hole.get() / PAGE,
            None => range.last().get() / PAGE + 1,
        };
        (end > first).then(|| (first, end - 1))
    }

    fn bounds(&self, walked: Option<(u64, u64)>) -> Bounds {
        // An empty range of pages would be a reversed one: nothing was walked, nothing is reported.
        let (first, last) = walked.unwrap_or((0, 0));
        Bounds {
            must: self.oracle.must_report(first, last),
            may: self.oracle.may_report(first, last),
        }
    }

    fn areas_between(&self, first: u64, last: u64) -> u64 {
        let touched = |area: &&Area| area.first <= last && area.last() >= first;
        self.oracle.areas.values().filter(touched).count() as u64
    }
}

/// Both succeeded, or both failed in the same way: an error's text has every value in it.
fn same_answer(what: &str, got: Result<(), Error>, right: Result<(), Error>) -> Checked {
    let text = |answer: Result<(), Error>| answer.map_err(|error| error.to_string());
    same(Rule::Answer, what, text(got), text(right))
}

fn granule_of(ask: &Ask) -> Granule {
    Granule::from_lg2(ask.granule_lg2).unwrap_or(Granule::K4)
}

fn broken(error: pagetable_sim::Error) -> Violation {
    violation(Rule::Answer, format!("the simulator: {error}"))
}
