//! Harvests and peeks, and what they should find.
//!
//! A new mode of harvest is a field of [`Ask`], a call in `harvest_range`, and bounds in the oracle.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::sync::AtomicU64;
use dirtymap::{
    Error, Granule, HarvestError, HarvestRequest, Iova, IovaRange, Lease, Owed, Scope, UserBitmap,
};

use super::{Checked, Held, Live, Runner, same_answer};
use crate::bits::{Buffer, Found, check_bits, pages_in, runs_in, words_for};
use crate::op::{Ask, Sabotage};
use crate::oracle::{Area, PAGE, pages};
use crate::rig::ToldToDie;
use crate::violation::{Rule, Violation, check, same};

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
        let space = self.space;
        let bitmap = UserBitmap::shared(request.words);
        let answer = catch_unwind(AssertUnwindSafe(|| space.harvest(&request.inner, bitmap)));
        let answer = match answer {
            Ok(answer) => answer,
            Err(panic) if panic.is::<ToldToDie>() => {
                return self.died(&request, ask, &buffer.read());
            }
            Err(panic) => resume_unwind(panic),
        };
        let (lease, hole) = match answer {
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
        let found = self.check_bits(&request, ask, &buffer.read())?;
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
            .harvested(nth, ask, (first, last), pages_in(&found.runs, first, last));
        self.hold(nth, lease, request.inner, request.walked, &found)
    }

    /// A domain panicked half-way through the first area: what was recorded must be dirty again.
    fn died(&mut self, request: &Request<'_>, ask: &Ask, after: &[u64]) -> Checked {
        let first = request.walked.map_or(0, |(first, _)| first);
        let last = self.oracle.area_at(first).map_or(first, Area::last);
        let range = request.inner.range();
        let walked = pages(first, last.min(range.last().get() / PAGE));
        let runs = runs_in(after, range, request.inner.granule());
        let runs: Vec<IovaRange> = runs.iter().filter_map(|r| r.intersection(walked)).collect();
        check(request.refusal.is_none(), Rule::Answer, || {
            "a harvest that must be refused asked a domain".to_owned()
        })?;
        self.oracle.died(ask, &runs);
        self.counts.harvests += 1;
        self.counts.aborts += 1;
        self.peek_everything()
    }

    /// What must be reported is reported, everywhere.
    pub(super) fn peek_everything(&mut self) -> Checked {
        for area in self.oracle.areas.clone().into_values() {
            self.peek_range(area.range(), &Ask::EVERYTHING)?;
        }
        Ok(())
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
        self.peek_range(self.oracle.range_of(ask), ask)
    }

    fn peek_range(&mut self, range: IovaRange, ask: &Ask) -> Checked {
        let buffer = Buffer::new();
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
        self.check_bits(&request, ask, &buffer.read()).map(|_| ())
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
        let inner = match self.oracle.asked_domain(ask) {
            Some((_, id)) => inner.in_scope(Scope::Domain(id)),
            None => inner,
        };
        Request {
            inner: if ask.all_or_nothing {
                inner.all_or_nothing()
            } else {
                inner
            },
            words,
            before: buffer.read(),
            refusal: self.oracle.refusal(range, granule, bits, ask),
            hole,
            walked: (first < end).then(|| (first, end - 1)),
        }
    }

    /// Checks what a request made of its buffer against what the oracle knows.
    fn check_bits(
        &self,
        request: &Request<'_>,
        ask: &Ask,
        after: &[u64],
    ) -> Result<Found, Violation> {
        let (must, may) = match request.walked {
            Some((first, last)) => self.oracle.bounds(ask, first, last),
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
