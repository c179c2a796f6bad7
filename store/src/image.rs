//! What the log says: the fold of its records. The leader holds one in memory, a replay makes one,
//! and a new log begins with one.

use std::collections::{BTreeMap, BTreeSet};

use crate::codec::{Bad, Reader, put, put_bytes};
use crate::delta::{Delta, Run};
use crate::geometry::Geometry;
use crate::record::{self, MAX_NAME, Record};
use crate::step::{Step, performs};

/// The most extents that are open at a time: 16 MiB of memory.
pub(crate) const MAX_OPEN: usize = 1 << 20;
/// The highest number of an increment: none that counts from 1 gets there.
pub(crate) const MAX_EPOCH: u64 = u64::MAX / 2;
/// The most consumers of a store.
pub(crate) const MAX_CONSUMERS: usize = 64;

/// A program that copies what was written, and what it has not copied yet.
#[derive(Clone, Debug)]
pub(crate) struct Consumer {
    pub(crate) id: u32,
    /// The number of its last durable commit, 0 for none.
    pub(crate) committed: u64,
    /// The number of its next increment.
    pub(crate) next: u64,
    /// It has never committed, so it needs everything.
    pub(crate) new: bool,
    /// Dirty, and not harvested.
    pub(crate) pending: Delta,
    pub(crate) lease: Option<Lease>,
}

/// What was harvested and not committed.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) epoch: u64,
    pub(crate) whole: bool,
    pub(crate) delta: Delta,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    pub(crate) open: BTreeSet<u64>,
    pub(crate) consumers: BTreeMap<String, Consumer>,
    next_id: u32,
}

impl Image {
    pub(crate) fn next_id(&self) -> u32 {
        self.next_id
    }

    fn by_id(&mut self, id: u32) -> Result<&mut Consumer, Bad> {
        let mut all = self.consumers.values_mut();
        all.find(|consumer| consumer.id == id)
            .ok_or(Bad("no consumer has this number"))
    }

    /// Performs `record`. Everything in it is checked, because it may come from a hostile file.
    pub(crate) fn apply(&mut self, geometry: &mut Geometry, record: &Record) -> Result<(), Bad> {
        match record {
            Record::Open { first, count } => {
                let end = first.saturating_add(*count);
                if end > geometry.extents() {
                    return Err(Bad("an open extent lies past the end of the device"));
                }
                // A store opens what is closed. Otherwise a few bytes could open a million extents,
                // again and again.
                if self.open.range(*first..end).next().is_some() {
                    return Err(Bad("an extent is opened that is open"));
                }
                let count = usize::try_from(*count).unwrap_or(usize::MAX);
                if count > MAX_OPEN - self.open.len().min(MAX_OPEN) {
                    return Err(Bad("there are too many open extents"));
                }
                self.open.extend(*first..end);
            }
            Record::Close { extent, mask } => {
                if !self.open.remove(extent) {
                    return Err(Bad("an extent is closed that is not open"));
                }
                self.dirty(*extent, *mask);
            }
            Record::Dirty { extent, mask } => {
                if !self.open.contains(extent) {
                    return Err(Bad("an extent is dirty that is not open"));
                }
                self.dirty(*extent, *mask);
            }
            Record::Join { id, name } => self.join(*id, name)?,
            Record::Leave { id } => {
                self.by_id(*id)?;
                self.consumers.retain(|_, consumer| consumer.id != *id);
            }
            Record::Rename { id, name } => {
                self.by_id(*id)?;
                if self.consumers.contains_key(name) {
                    return Err(Bad("two consumers have one name"));
                }
                let mut all = self.consumers.iter();
                let old = all.find(|(_, consumer)| consumer.id == *id);
                let old = old.map(|(name, _)| name.clone());
                if let Some(consumer) = old.and_then(|old| self.consumers.remove(&old)) {
                    self.consumers.insert(name.clone(), consumer);
                }
            }
            Record::Harvest { id, epoch, whole } => {
                let consumer = self.by_id(*id)?;
                if consumer.lease.is_some() || *epoch != consumer.next {
                    return Err(Bad("an increment is out of order"));
                }
                consumer.next = epoch
                    .checked_add(1)
                    .ok_or(Bad("there are no more epochs"))?;
                let mut delta = std::mem::take(&mut consumer.pending);
                if !performs(Step::HoldUntilCommit) {
                    delta = Delta::default();
                }
                consumer.lease = Some(Lease {
                    epoch: *epoch,
                    whole: *whole,
                    delta,
                });
            }
            Record::Commit { id, epoch } => {
                let consumer = self.by_id(*id)?;
                take_lease(consumer, *epoch)?;
                consumer.committed = *epoch;
                consumer.new = false;
                if !performs(Step::DropHarvestedOnly) {
                    consumer.pending = Delta::default();
                }
            }
            Record::Abort { id, epoch } => {
                let consumer = self.by_id(*id)?;
                let lease = take_lease(consumer, *epoch)?;
                put_back(consumer, lease);
            }
            Record::Grow { len } => {
                let new = geometry
                    .grown(*len)
                    .ok_or(Bad("the device cannot grow so"))?;
                *geometry = Geometry {
                    len: *len,
                    ..*geometry
                };
                let all = self.consumers.values_mut();
                all.for_each(|consumer| consumer.pending.add(new));
            }
        }
        Ok(())
    }

    fn dirty(&mut self, first: u64, mask: u32) {
        let run = Run {
            first,
            count: 1,
            mask,
        };
        let all = performs(Step::RecordForAll);
        let consumers = self.consumers.values_mut();
        for consumer in consumers.take(if all { usize::MAX } else { 1 }) {
            consumer.pending.add(run);
        }
    }

    fn join(&mut self, id: u32, name: &str) -> Result<(), Bad> {
        if id != self.next_id || self.consumers.contains_key(name) {
            return Err(Bad("a consumer joins twice"));
        }
        if self.consumers.len() >= MAX_CONSUMERS {
            return Err(Bad("there are too many consumers"));
        }
        self.next_id = id.checked_add(1).ok_or(Bad("there are no more numbers"))?;
        let consumer = Consumer {
            id,
            committed: 0,
            next: 1,
            new: true,
            pending: Delta::default(),
            lease: None,
        };
        self.consumers.insert(name.to_owned(), consumer);
        Ok(())
    }

    /// After a crash: what was open may have been written, and what was harvested was not
    /// committed. Both are dirty, for each consumer.
    pub(crate) fn recover(&mut self) {
        let open = std::mem::take(&mut self.open);
        let open = Delta::from_extents(open.into_iter());
        for consumer in self.consumers.values_mut() {
            if let Some(lease) = consumer.lease.take() {
                put_back(consumer, lease);
            }
            if performs(Step::ReportOpen) {
                consumer.pending.merge(open.clone());
            }
        }
    }

    /// Appends all of it.
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        put(out, u64::from(self.next_id));
        put(out, self.open.len() as u64);
        let mut next = 0;
        for extent in &self.open {
            put(out, extent - next);
            next = extent + 1;
        }
        put(out, self.consumers.len() as u64);
        for (name, consumer) in &self.consumers {
            put(out, u64::from(consumer.id));
            put_bytes(out, name.as_bytes());
            put(out, consumer.committed);
            put(out, consumer.next);
            put(out, u64::from(consumer.new));
            put_delta(out, &consumer.pending);
            put(out, u64::from(consumer.lease.is_some()));
            if let Some(lease) = &consumer.lease {
                put(out, lease.epoch);
                put(out, u64::from(lease.whole));
                put_delta(out, &lease.delta);
            }
        }
    }

    /// The most bytes that [`put`](Image::put) appends for a device with so many extents.
    pub(crate) fn most_bytes(extents: u64) -> u64 {
        /// A number of 32 bits, and one of 64.
        const SMALL: u64 = 5;
        const LARGE: u64 = 10;
        let delta = LARGE + extents * 3 * SMALL;
        let consumer = SMALL + 2 + MAX_NAME as u64 + 3 * LARGE + 3 + 2 * delta;
        let open = extents.min(MAX_OPEN as u64) * SMALL;
        3 * SMALL + open + MAX_CONSUMERS as u64 * consumer
    }

    /// Reads what was put. Nothing is allocated before the bytes for it were read, and nothing lies
    /// past the end of the device.
    pub(crate) fn read(bytes: &[u8], geometry: &Geometry) -> Result<Image, Bad> {
        let from = &mut Reader::new(bytes);
        let mut image = Image {
            next_id: record::id(from)?,
            ..Image::default()
        };
        let mut next = 0;
        for _ in 0..from.at_most(MAX_OPEN as u64, "there are too many open extents")? {
            let extent = next_extent(from, &mut next, geometry)?;
            image.open.insert(extent);
        }
        let most = MAX_CONSUMERS as u64;
        for _ in 0..from.at_most(most, "there are too many consumers")? {
            let id = record::id(from)?;
            let name = record::name(from)?;
            let mut consumer = Consumer {
                id,
                committed: from.number()?,
                next: from.number()?,
                new: from.flag()?,
                pending: read_delta(from, geometry)?,
                lease: None,
            };
            if from.flag()? {
                consumer.lease = Some(Lease {
                    epoch: from.number()?,
                    whole: from.flag()?,
                    delta: read_delta(from, geometry)?,
                });
            }
            let epochs = consumer.lease.as_ref().map(|lease| lease.epoch);
            let newest = epochs.unwrap_or(consumer.committed);
            if consumer.committed > newest || newest >= consumer.next {
                return Err(Bad("epochs are out of order"));
            }
            if consumer.next > MAX_EPOCH {
                return Err(Bad("there are no more epochs"));
            }
            if id >= image.next_id || image.by_id(id).is_ok() {
                return Err(Bad("two consumers have one number"));
            }
            if image.consumers.insert(name, consumer).is_some() {
                return Err(Bad("two consumers have one name"));
            }
        }
        if from.is_empty() {
            Ok(image)
        } else {
            Err(Bad("there are bytes after the end"))
        }
    }
}

fn take_lease(consumer: &mut Consumer, epoch: u64) -> Result<Lease, Bad> {
    match consumer.lease.take() {
        Some(lease) if lease.epoch == epoch => Ok(lease),
        _ => Err(Bad("an increment ends that is not there")),
    }
}

/// A whole increment was made because the consumer could not build on what it had. After an abort
/// it says so again, so only the delta is put back.
fn put_back(consumer: &mut Consumer, lease: Lease) {
    let newer = std::mem::replace(&mut consumer.pending, lease.delta);
    consumer.pending.merge(newer);
}

fn put_delta(out: &mut Vec<u8>, delta: &Delta) {
    let (mut runs, mut count, mut next) = (Vec::new(), 0, 0);
    for run in delta.runs() {
        put(&mut runs, run.first - next);
        put(&mut runs, run.count);
        put(&mut runs, u64::from(run.mask));
        next = run.first + run.count;
        count += 1;
    }
    put(out, count);
    out.append(&mut runs);
}

fn read_delta(from: &mut Reader<'_>, geometry: &Geometry) -> Result<Delta, Bad> {
    let mut next = 0;
    let count = from.number()?;
    Delta::try_from_runs((0..count).map(|_| {
        let first = next_extent(from, &mut next, geometry)?;
        let count = from.at_most(geometry.extents() - first, "a run leaves the device")?;
        let mask = record::mask(from)?;
        if count == 0 || mask == 0 {
            return Err(Bad("a run is empty"));
        }
        next = first + count;
        Ok(Run { first, count, mask })
    }))
}

/// The extent that lies so many above the last one.
fn next_extent(from: &mut Reader<'_>, next: &mut u64, geometry: &Geometry) -> Result<u64, Bad> {
    let extent = next.checked_add(from.number()?);
    match extent {
        Some(extent) if extent < geometry.extents() => {
            *next = extent + 1;
            Ok(extent)
        }
        _ => Err(Bad("an extent lies past the end of the device")),
    }
}
