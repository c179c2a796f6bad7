//! Consumers, each of which keeps its copy of the memory up to date by its leases.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::harvest::{Aborted, Content};
use dirtymap::sync::Arc;
use dirtymap::{Granule, HarvestRequest, Iova, IovaRange};

use super::discards::Contents;
use super::modes::share_of;
use super::panics::{Panicked, caught};
use super::{Checked, End, Held, Live, Runner, broken};
use crate::bits::{clear, runs_in};
use crate::op::{Master, Place, Sabotage, Share};
use crate::pages::{PAGE, pieces};
use crate::rig::Busy;
use crate::violation::{Rule, check, same, violation};

/// The buffer `after` of a request for `range`, without the granules that begin at `starts`.
pub(super) fn without(
    after: &[u64],
    range: IovaRange,
    granule: Granule,
    starts: &BTreeSet<u64>,
) -> Vec<u64> {
    let mut left = after.to_vec();
    for start in starts {
        clear(&mut left, (start - range.start().get()) >> granule.lg2());
    }
    left
}

/// The granules of `runs` that do not begin at `starts`.
pub(super) fn rest_of(
    runs: &[IovaRange],
    granule: Granule,
    starts: &BTreeSet<u64>,
) -> Vec<IovaRange> {
    let all = runs.iter().flat_map(|run| {
        let granules = (run.start().get()..=run.last().get()).step_by(1 << granule.lg2());
        granules.filter(|start| !starts.contains(start))
    });
    all.map(|start| IovaRange::granule_at(Iova::new(start), granule))
        .collect()
}

impl Live<'_> {
    fn is_synced(&self) -> bool {
        matches!(self, Live::Synced(_))
    }
}

impl Runner<'_> {
    pub(super) fn sync(&mut self, nth: usize) -> Checked {
        let Some(mut held) = self.leases[nth].take() else {
            return Ok(());
        };
        let failures = self.world.failures_ahead();
        let open = self.open_runs(nth, &held);
        let end = self.right_end(nth, &held, &open);
        let (whose, bytes, number) = (held.whose, held.bytes, held.number);
        let mut failed = false;
        held.live = match held.live {
            Live::Synced(lease) => Live::Synced(lease),
            Live::Owed(mut lease) => match caught(move || match lease.flush() {
                Ok(()) => lease.sync().map(Live::Synced),
                Err(_) => Ok(Live::Owed(lease)),
            }) {
                Ok(Ok(live)) => {
                    failed = !live.is_synced();
                    live
                }
                Ok(Err(error)) => {
                    let text = format!("the sync of a lease that was flushed: {error}");
                    return Err(violation(Rule::Answer, text));
                }
                Err(Panicked) => {
                    // The panic dropped the lease.
                    return self.was_put_back(
                        nth,
                        &open,
                        (whose, bytes, number),
                        end.outside_bytes,
                    );
                }
            },
        };
        if let (Live::Synced(lease), Some(leased)) = (&held.live, &mut self.oracle.leases[nth]) {
            leased.synced = true;
            let (range, granule) = (held.request.range(), held.request.granule());
            let runs = runs_in(&self.buffers[nth].read(), range, granule);
            let view = (!held.empty).then_some(held.view);
            let inside = runs.iter().filter_map(|run| run.intersection(view?));
            let runs: Vec<IovaRange> = inside.collect();
            let dirty: u128 = runs.iter().map(|run| run.granules(granule)).sum();
            same(
                Rule::Answer,
                "the dirty granules of a lease",
                lease.dirty().into(),
                dirty,
            )?;
            same(
                Rule::Answer,
                "the runs of a lease",
                &lease.runs().collect::<Vec<_>>(),
                &runs,
            )?;
            self.check_contents(nth, &lease.contents().collect(), &runs)?;
        }
        self.leases[nth] = Some(held);
        let was_told = self.world.failures_ahead() < failures && !self.hides_failures();
        same(Rule::Answer, "whether a sync failed", failed, was_told)
    }

    /// A device writes, and repeats the write while the lease is flushed.
    pub(super) fn busy_sync(&mut self, nth: usize, device: Master, at: Place, len: u16) -> Checked {
        let start = self.oracle.address_of(at);
        let bytes = self.fresh_bytes(len);
        self.dma_write(device, at, len)?;
        let node = Arc::clone(self.world.node(device.domain));
        let writes =
            pieces(start, bytes.len()).all(|(at, _)| self.dma_at(device, at, true).is_ok());
        if writes && !bytes.is_empty() {
            let (device, at) = (device.device, Iova::new(start));
            node.keep_busy(Some(Busy { device, at, bytes }));
        }
        let synced = self.sync(nth);
        node.keep_busy(None);
        synced
    }

    /// Copies the pages of a synced lease, unless the copy is sabotaged.
    pub(super) fn copy_lease(&mut self, nth: usize) -> Checked {
        if let Some(held) = &self.leases[nth]
            && let Live::Synced(lease) = &held.live
            && self.config.sabotage != Sabotage::CopyBeforeSync
        {
            let runs: Vec<IovaRange> = lease.runs().collect();
            let contents: Contents = lease.contents().collect();
            let whose = held.whose;
            self.check_contents(nth, &contents, &runs)?;
            let fresh = self.fresh(&contents)?;
            if let Some(held) = &mut self.leases[nth] {
                held.copied = true;
                held.fresh = fresh;
            }
            if !self.oracle.has_left(nth) {
                self.copy_contents(whose, &contents)?;
            }
        }
        Ok(())
    }

    /// Syncs and copies, as far as that has not been done, and commits.
    pub(super) fn commit(&mut self, nth: usize) -> Checked {
        self.sync(nth)?;
        if self.leases[nth].as_ref().is_some_and(|held| !held.copied) {
            self.copy_lease(nth)?;
        }
        match self.leases[nth].take() {
            Some(Held {
                live: Live::Synced(lease),
                whose,
                bytes,
                number,
                fresh,
                request,
                committed,
                ..
            }) => {
                let right = lease.report();
                let all: Vec<IovaRange> = lease.runs().collect();
                let (report, lineage) = lease.commit_epoch();
                same(Rule::Accounting, "the report at commit", report, right)?;
                if !self.oracle.has_left(nth) {
                    let rest = rest_of(&all, request.granule(), &committed);
                    self.committed(whose, (number, lineage), &rest, &fresh)?;
                }
                self.counts.commits += 1;
                self.counts.committed_bytes += bytes;
                if !self.oracle.has_left(nth) {
                    self.tallies[whose].committed += bytes;
                }
                self.oracle.leases[nth] = None;
            }
            unsynced => self.leases[nth] = unsynced,
        }
        Ok(())
    }

    /// Syncs and copies, as far as that has not been done, and commits a part.
    pub(super) fn commit_range(&mut self, nth: usize, part: Share) -> Checked {
        self.sync(nth)?;
        if self.leases[nth].as_ref().is_some_and(|held| !held.copied) {
            self.copy_lease(nth)?;
        }
        let after = self.buffers[nth].read();
        let Some(mut held) = self.leases[nth].take() else {
            return Ok(());
        };
        if let Live::Synced(lease) = &mut held.live {
            let part = share_of(held.view, part);
            let all = match held.empty {
                true => BTreeSet::new(),
                false => self.committed_by(&after, held.request, held.view, part),
            };
            let fresh = all.difference(&held.committed).count() as u64;
            same(
                Rule::Answer,
                "granules committed",
                lease.commit_range(part),
                fresh,
            )?;
            let bytes = held.bytes.min(fresh << held.request.granule().lg2());
            held.bytes -= bytes;
            self.counts.committed_bytes += bytes;
            if !self.oracle.has_left(nth) {
                self.tallies[held.whose].committed += bytes;
            }
            let fresh: BTreeSet<u64> = all.difference(&held.committed).copied().collect();
            if !self.oracle.has_left(nth) {
                let bytes = held.request.granule().bytes();
                self.committed_part(held.whose, held.number, &fresh, bytes)?;
            }
            held.committed.extend(all);
        }
        self.leases[nth] = Some(held);
        Ok(())
    }

    /// The starts of the dirty granules of a lease over `view` that are in `part` as a whole.
    pub(super) fn committed_by(
        &self,
        after: &[u64],
        request: HarvestRequest,
        view: IovaRange,
        part: IovaRange,
    ) -> BTreeSet<u64> {
        let granule = request.granule();
        let whole = part.intersection(view).and_then(|p| p.round_in(granule));
        let runs = runs_in(after, request.range(), granule);
        let dirty = runs.iter().filter_map(|run| run.intersection(whole?));
        let starts =
            |run: IovaRange| (run.start().get()..=run.last().get()).step_by(1 << granule.lg2());
        dirty.flat_map(starts).collect()
    }

    pub(super) fn put_back(&mut self, nth: usize, end: End) -> Checked {
        let Some(held) = self.leases[nth].take() else {
            return Ok(());
        };
        let runs = self.open_runs(nth, &held);
        let right = self.right_end(nth, &held, &runs);
        match held.live {
            live if end == End::Drop => drop(live),
            live if end == End::Crash => {
                let live = AssertUnwindSafe(live);
                let leak = self.config.sabotage == Sabotage::LeakLease;
                let crash = catch_unwind(move || {
                    let live = live;
                    if leak {
                        std::mem::forget(live);
                        return;
                    }
                    // Not by `panic!`, because the panic hook may end the process.
                    resume_unwind(Box::new(live.is_synced()));
                });
                check(leak || crash.is_err(), Rule::Answer, || {
                    "no crash".to_owned()
                })?;
            }
            Live::Owed(lease) => same(Rule::Answer, "an abort", lease.abort(), right)?,
            Live::Synced(lease) => same(Rule::Answer, "an abort", lease.abort(), right)?,
        }
        let bytes = (held.whose, held.bytes, held.number);
        self.was_put_back(nth, &runs, bytes, right.outside_bytes)
    }

    /// The pages that an end of a lease puts back.
    fn open_runs(&self, nth: usize, held: &Held<'_>) -> Vec<IovaRange> {
        let (range, granule) = (held.request.range(), held.request.granule());
        let open = without(&self.buffers[nth].read(), range, granule, &held.committed);
        runs_in(&open, range, granule)
            .iter()
            .filter_map(|run| run.intersection(held.reached?))
            .collect()
    }

    /// The expected result of an end of a lease that puts back `runs`. A consumer that has left has
    /// no use for them.
    fn right_end(&self, nth: usize, held: &Held<'_>, runs: &[IovaRange]) -> Aborted {
        if self.oracle.has_left(nth) {
            let bytes = runs.iter().map(|run| run.len() as u64).sum();
            return Aborted {
                outside_bytes: bytes,
                ..Aborted::default()
            };
        }
        self.right_abort(runs, held.maps)
    }

    /// The runs of a lease of a consumer, and the rest of its bytes, were put back.
    fn was_put_back(
        &mut self,
        nth: usize,
        runs: &[IovaRange],
        (whose, bytes, number): (usize, u64, Option<u64>),
        outside: u64,
    ) -> Checked {
        let has_left = self.oracle.has_left(nth);
        if !has_left {
            self.tallies[whose].aborted += bytes;
        }
        self.oracle.aborted(nth, runs);
        self.counts.aborts += 1;
        self.counts.aborted_bytes += bytes;
        self.counts.put_back_outside_bytes += outside;
        match has_left {
            true => Ok(()),
            false => self.end_of_parts(whose, number),
        }
    }

    /// A lease is forgotten, and its pages are never reported. Until a flush, later writes to them
    /// may be hidden as well.
    pub(super) fn forget_lease(&mut self, nth: usize) {
        if let Some(held) = self.leases[nth].take() {
            self.forgotten += held.bytes;
            self.vanished.push(held.live);
            self.oracle.forgotten(nth);
        }
    }

    /// Copies the mapped pages of `runs`, for every consumer, and for its image.
    pub(super) fn copy_mapped(&mut self, runs: &[IovaRange]) -> Checked {
        self.add_to_images(runs)?;
        self.copy_runs(runs)
    }

    /// Copies the mapped pages of `runs`, for every consumer.
    pub(super) fn copy_runs(&mut self, runs: &[IovaRange]) -> Checked {
        for whose in self.oracle.present() {
            self.copy_for(whose, runs)?;
        }
        Ok(())
    }

    /// Copies what a lease has: the data from the memory, and zeros.
    pub(super) fn copy_contents(&mut self, whose: usize, contents: &Contents) -> Checked {
        for (part, content) in contents {
            match content {
                Content::Data => self.copy_for(whose, &[*part])?,
                Content::Zero => {
                    for (at, piece) in pieces(part.start().get(), part.len() as usize) {
                        let from = (at % PAGE) as usize;
                        if let Some(page) = self.copies[whose].get_mut(&(at / PAGE)) {
                            page[from..from + piece.len()].fill(0);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies the mapped pages of `runs`, for one consumer.
    pub(super) fn copy_for(&mut self, whose: usize, runs: &[IovaRange]) -> Checked {
        for run in runs {
            for (at, piece) in pieces(run.start().get(), run.len() as usize) {
                let Some(phys) = self.phys(at) else {
                    continue;
                };
                // Memory that was never written is zero, and so is a page that is not in the copy.
                if !self.oracle.memory.contains_key(&(phys / PAGE)) {
                    continue;
                }
                let from = (at % PAGE) as usize;
                let memory = &self.world.memory;
                let page = self.copies[whose]
                    .entry(at / PAGE)
                    .or_insert_with(|| Box::new([0; PAGE as usize]));
                memory
                    .read(phys, &mut page[from..from + piece.len()])
                    .map_err(broken)?;
            }
        }
        Ok(())
    }
}
