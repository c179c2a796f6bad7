//! The consumer: it harvests, and keeps its copy of the memory up to date by what the leases name.

use dirtymap::sync::AtomicU64;
use dirtymap::{
    Aborted, Error, Granule, HarvestError, HarvestRequest, Iova, IovaRange, Lease, Owed, UserBitmap,
};

use super::{Checked, Held, Live, Runner, broken, same_answer};
use crate::bits::{Buffer, Found, check_bits, pages_in, runs_in, words_for};
use crate::op::{Ask, Sabotage};
use crate::oracle::{Area, PAGE, pages, pieces};
use crate::violation::{Rule, Violation, same};

/// A request, ready to be made, and how it should be answered.
struct Request<'b> {
    inner: HarvestRequest,
    words: &'b [AtomicU64],
    /// The whole buffer before the request.
    before: Vec<u64>,
    /// Why it is refused.
    refusal: Option<Error>,
    /// Where it stops.
    hole: Option<Iova>,
    /// The first and last page that it goes over; `None` if it stops at once.
    walked: Option<(u64, u64)>,
}

impl<'a> Runner<'a> {
    /// Harvests into the first free lease, if there is one.
    pub(super) fn harvest(&mut self, ask: &Ask) -> Checked {
        match self.leases.iter().position(Option::is_none) {
            Some(nth) => self.harvest_range(nth, self.oracle.range_of(ask), ask),
            None => Ok(()),
        }
    }

    pub(super) fn harvest_range(&mut self, nth: usize, range: IovaRange, ask: &Ask) -> Checked {
        let buffer = &self.buffers[nth];
        let request = self.request(range, ask, buffer);
        let (lease, hole) = match self
            .space
            .harvest(&request.inner, UserBitmap::shared(request.words))
        {
            Ok(lease) => (lease, None),
            Err(HarvestError::Stopped(stopped)) => {
                same(
                    Rule::Answer,
                    "where a harvest stopped",
                    Some(stopped.at),
                    request.hole,
                )?;
                (stopped.lease, Some(stopped.error))
            }
            Err(HarvestError::Refused(error)) => {
                same(
                    Rule::Bitmap,
                    "the bitmap of a refused harvest",
                    buffer.read(),
                    request.before,
                )?;
                return same_answer("a harvest", Err(error), request.refusal.map_or(Ok(()), Err));
            }
        };
        let found = self.check_bits(&request, &buffer.read())?;
        let right = request
            .refusal
            .or(request.hole.map(|at| Error::Hole { at, range }));
        same_answer(
            "a harvest",
            hole.map_or(Ok(()), Err),
            right.map_or(Ok(()), Err),
        )?;
        let report = lease.report();
        same(Rule::Accounting, "bits set", report.bits_set, found.set)?;
        same(
            Rule::Accounting,
            "areas walked",
            report.areas,
            self.areas_in(request.walked),
        )?;
        let (first, last) = request.walked.unwrap_or((1, 0));
        self.oracle
            .harvested(nth, first, last, pages_in(&found.runs, first, last));
        self.hold(nth, lease, request.inner, request.walked, &found)
    }

    /// Keeps a new lease.
    fn hold(
        &mut self,
        nth: usize,
        lease: Lease<'a, Owed>,
        request: HarvestRequest,
        walked: Option<(u64, u64)>,
        found: &Found,
    ) -> Checked {
        let bytes = found.set << request.granule().lg2();
        self.counts.harvests += 1;
        self.counts.leased_bytes += bytes;
        let copied = self.config.sabotage == Sabotage::CopyBeforeSync;
        if copied {
            self.copy_runs(&found.runs)?;
        }
        self.leases[nth] = Some(Held {
            live: Live::Owed(lease),
            range: request.range(),
            granule: request.granule(),
            reached: walked.map(|(_, last)| last),
            bytes,
            copied,
        });
        Ok(())
    }

    pub(super) fn peek(&mut self, ask: &Ask) -> Checked {
        let (range, buffer) = (self.oracle.range_of(ask), Buffer::new());
        let request = self.request(range, ask, &buffer);
        let answer = self
            .space
            .peek(&request.inner, UserBitmap::shared(request.words))
            .map(|_| ());
        if let Some(refusal) = request.refusal {
            same(
                Rule::Bitmap,
                "the bitmap of a refused peek",
                buffer.read(),
                request.before,
            )?;
            return same_answer("a peek", answer, Err(refusal));
        }
        let hole = request.hole.map(|at| Error::Hole { at, range });
        same_answer("a peek", answer, hole.map_or(Ok(()), Err))?;
        self.check_bits(&request, &buffer.read()).map(|_| ())
    }

    pub(super) fn sync(&mut self, nth: usize) -> Checked {
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

    /// Copies what a synced lease names, unless that was sabotaged.
    pub(super) fn copy_lease(&mut self, nth: usize) -> Checked {
        if let Some(held) = &mut self.leases[nth]
            && let Live::Synced(lease) = &held.live
            && self.config.sabotage != Sabotage::CopyBeforeSync
        {
            held.copied = true;
            let runs: Vec<IovaRange> = lease.runs().collect();
            self.copy_runs(&runs)?;
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
            unsynced => self.leases[nth] = unsynced,
        }
        Ok(())
    }

    pub(super) fn abort(&mut self, nth: usize, by_drop: bool) -> Checked {
        let Some(held) = self.leases[nth].take() else {
            return Ok(());
        };
        let walked = held
            .reached
            .map(|last| pages(held.range.start().get() / PAGE, last));
        let mut runs = runs_in(&self.buffers[nth].read(), held.range, held.granule);
        runs = runs
            .iter()
            .filter_map(|run| run.intersection(walked?))
            .collect();
        let mut right = Aborted::default();
        for run in &runs {
            for (at, piece) in pieces(run.start().get(), run.len() as usize) {
                match self.oracle.area_at(at / PAGE) {
                    Some(_) => right.bytes += piece.len() as u64,
                    None => right.outside_bytes += piece.len() as u64,
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
    pub(super) fn copy_runs(&mut self, runs: &[IovaRange]) -> Checked {
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

    /// Prepares `buffer` for a request, and asks the oracle what will come of it.
    fn request<'b>(&self, range: IovaRange, ask: &Ask, buffer: &'b Buffer) -> Request<'b> {
        let granule = Granule::from_lg2(ask.granule_lg2).unwrap_or(Granule::K4);
        buffer.fill(ask.preset);
        let words = buffer.bitmap(words_for(range, granule) - usize::from(ask.short));
        let bits = words.len() as u64 * 64;
        let inner = HarvestRequest::new(range, granule);
        let hole = self.oracle.hole_in(range);
        let first = range.start().get() / PAGE;
        let end = hole.map_or(range.last().get() / PAGE + 1, |hole| hole.get() / PAGE);
        Request {
            inner: if ask.all_or_nothing {
                inner.all_or_nothing()
            } else {
                inner
            },
            words,
            before: buffer.read(),
            refusal: self
                .oracle
                .refusal(range, granule, bits, ask.all_or_nothing),
            hole,
            walked: (first < end).then(|| (first, end - 1)),
        }
    }

    /// Checks what a request made of its buffer against what the oracle knows.
    fn check_bits(&self, request: &Request<'_>, after: &[u64]) -> Result<Found, Violation> {
        let (must, may) = match request.walked {
            Some((first, last)) => (
                self.oracle.must_report(first, last),
                self.oracle.may_report(first, last),
            ),
            None => Default::default(),
        };
        check_bits(&request.inner, &request.before, after, &must, &may)
    }

    fn areas_in(&self, walked: Option<(u64, u64)>) -> u64 {
        let touched = |area: &&Area| {
            walked.is_some_and(|(first, last)| area.first <= last && area.last() >= first)
        };
        self.oracle.areas.values().filter(touched).count() as u64
    }
}
