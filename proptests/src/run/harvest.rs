//! Harvests and peeks, and the pages that they should report.
//!
//! A new mode of harvest needs a [`Mode`], and in `modes.rs` its call and the runs of pages that it
//! walks.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::harvest::HarvestReport;
use dirtymap::{
    AddressSpace, Error, Granule, HarvestRequest, Iova, IovaRange, Lease, Owed, Scope, UserBitmap,
};

use super::image::Fresh;
use super::modes::{call, cursor};
use super::panics::{Panicked, caught};
use super::request::Request;

use super::{Checked, Held, Live, Runner, same_answer};
use crate::bits::{Buffer, Found, check_bits, pages_in, runs_in, words_for};
use crate::faults::{ToldToStop, was_told};
use crate::op::{Ask, Mode, Sabotage};
use crate::pages::{PAGE, pages};
use crate::rig::ToldToDie;
use crate::violation::{Rule, Violation, check, same};

/// The results of a harvest: its report, the address at which it goes on, the error and address of
/// its stop, and the number of bytes that were put back outside of all areas.
pub(super) type Said = (HarvestReport, Option<Iova>, Option<(Iova, String)>, u64);

/// The results of `lease`, before anything is put back.
pub(super) fn said(space: &AddressSpace, lease: &Lease<'_, Owed>) -> Result<Said, Violation> {
    let put_back = space.stats().put_back_outside_bytes;
    let stopped = lease.stopped().map(|at| (at.at, at.error.to_string()));
    let Some((at, _)) = &stopped else {
        return Ok((lease.report(), lease.next(), None, put_back));
    };
    let at = Some(*at);
    same(
        Rule::Answer,
        "where to go on after a stop",
        lease.next(),
        at,
    )?;
    Ok((lease.report(), None, stopped, put_back))
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
        let mut request = self.request(range, ask, buffer);
        let (space, inner) = (self.space, request.inner);
        let bitmap = UserBitmap::shared(buffer.bitmap(request.words));
        let page = self.oracle.alignment();
        let consumer = self.consumers[self.oracle.whose(ask)].clone();
        let answer = catch_unwind(AssertUnwindSafe(|| {
            call((space, consumer.as_deref()), &inner, ask.mode, page, bitmap)
        }));
        let lease = match answer {
            Ok(Ok(lease)) => lease,
            Ok(Err(error)) => {
                return Self::refused(request, &buffer.read(), error);
            }
            Err(panic) if was_told(&*panic) => {
                let first = panic.is::<ToldToDie>();
                return self.died(&request, ask, &buffer.read(), first);
            }
            Err(panic) => resume_unwind(panic),
        };
        let said = said(space, &lease)?;
        let found = self.check_harvest(&mut request, ask, said, &buffer.read())?;
        self.took(nth, &request, ask, &found);
        let number = self.numbered(self.oracle.whose(ask), lease.lineage())?;
        self.hold(nth, (lease.partial(), number), &request, ask, &found)
    }

    /// A harvest was refused, and its buffer is now `after`.
    pub(super) fn refused(request: Request, after: &[u64], error: Error) -> Checked {
        same(
            Rule::Bitmap,
            "the bitmap of a refused harvest",
            after,
            &request.before,
        )?;
        same_answer("a harvest", Err(error), request.refusal.map_or(Ok(()), Err))
    }

    /// Checks the results of a harvest and its buffer, and completes `request` with its end. Pages
    /// above a stop that other sources had reported are dirty again.
    pub(super) fn check_harvest(
        &mut self,
        request: &mut Request,
        ask: &Ask,
        (report, next, stopped, put_back): Said,
        after: &[u64],
    ) -> Result<Found, Violation> {
        self.ended(request, ask, next)?;
        let at = stopped.as_ref().map(|(at, _)| *at);
        let (stop, granule) = (request.stop, request.inner.granule());
        let right = stop.map(|at| at.granule_start(granule)).or(request.hole);
        same(Rule::Answer, "where a harvest stopped", at, right)?;
        let whole = request.walked.clone();
        if let Some(stop) = stop {
            let page = stop.granule_start(granule).get() / PAGE;
            // A masked harvest walks an area stretch by stretch, and may stop in a later one.
            let is_walked =
                |first: u64, last: u64| first <= last && first >= page && last < stop.get() / PAGE;
            request.overshot = self.oracle.areas.values().any(|area| {
                whole
                    .iter()
                    .any(|(first, last)| is_walked(area.first.max(*first), area.last().min(*last)))
            });
            request.walked.retain(|(first, _)| *first < page);
            for (_, last) in &mut request.walked {
                *last = (*last).min(page - 1);
            }
        }
        let (must, _) = self.oracle.bounds(ask, &request.walked);
        let (_, may) = self.oracle.bounds(ask, &whole);
        let mut found = check_bits(&request.inner, &request.before, after, &must, &may)?;
        let range = request.inner.range();
        let right = request.refusal.take();
        let right = right.or(match stop {
            Some(_) => Some(Error::source_failed(ToldToStop)),
            None => request.hole.map(|at| Error::Hole { at, range }),
        });
        let right = right.map(|error| error.to_string());
        let answer = stopped.map(|(_, error)| error);
        same(Rule::Answer, "a harvest", answer, right)?;
        if at.is_some() {
            let view = request.view_of(None, at);
            request.empty = view.is_none();
            request.view = view.unwrap_or(request.view);
        }
        if stop.is_some() {
            let said = (report.bits_set, put_back);
            self.check_above(request, ask, &whole, &mut found, after, said)?;
        }
        same(Rule::Accounting, "bits set", report.bits_set, found.set)?;
        let last = stop.map_or(u64::MAX, |stop| stop.get() / PAGE);
        let touched = whole.iter().filter(|(first, _)| *first <= last);
        let touched: Vec<(u64, u64)> = touched.map(|(f, l)| (*f, (*l).min(last))).collect();
        let areas = self.areas_in(&touched);
        same(Rule::Accounting, "areas walked", report.areas, areas)?;
        self.check_bound(request, ask, next, found.set)?;
        Ok(found)
    }

    /// A source stopped a harvest of `whole`. Pages above the lease were put back, so only the bits
    /// of the lease count as set.
    fn check_above(
        &mut self,
        request: &Request,
        ask: &Ask,
        whole: &[(u64, u64)],
        found: &mut Found,
        after: &[u64],
        (said, counted): (u64, u64),
    ) -> Checked {
        let (range, granule) = (request.inner.range(), request.inner.granule());
        let count = |runs: &[IovaRange]| -> u64 {
            let all: u128 = runs.iter().map(|run| run.granules(granule)).sum();
            all as u64
        };
        let mine = request.leased(&found.runs);
        let before = runs_in(&request.before, range, granule);
        let fresh = count(&mine) - count(&request.leased(&before));
        let end = match request.empty {
            true => Some(request.view.start()),
            false => request.view.last().checked_add(1),
        };
        let last = whole.last().map(|(_, last)| pages(*last, *last).last());
        let above = end
            .zip(last)
            .and_then(|(end, last)| IovaRange::new(end, last).ok());
        let inside = |runs: &[IovaRange]| -> Vec<IovaRange> {
            runs.iter()
                .filter_map(|run| run.intersection(above?))
                .collect()
        };
        // A bit that was set before looks like a bit of a source, so the count may be lower.
        let known = inside(&before).is_empty();
        let least = if known { fresh } else { 0 };
        check((least..=fresh).contains(&said), Rule::Accounting, || {
            format!("{said} bits set below a stop, of {fresh}")
        })?;
        found.set = said;
        let runs = inside(&runs_in(after, range, granule));
        let outside = self.right_abort(&runs, u64::MAX).outside_bytes;
        let known = self.counts.put_back_outside_bytes;
        check(
            (known..=known + outside).contains(&counted),
            Rule::Accounting,
            || format!("{counted} bytes put back outside, not {known} and {outside}"),
        )?;
        self.counts.put_back_outside_bytes = counted;
        self.oracle.died(ask, &runs, whole);
        Ok(())
    }

    /// Passes the reported pages of a harvest to the oracle.
    pub(super) fn took(&mut self, nth: usize, request: &Request, ask: &Ask, found: &Found) {
        let walked = &request.walked;
        let reported = walked
            .iter()
            .flat_map(|(first, last)| pages_in(&found.runs, *first, *last));
        let reported = reported.collect();
        self.oracle.harvested(nth, ask, walked, reported);
    }

    /// A domain panicked; if `first`, half-way through the first area. The recorded pages must be
    /// dirty again.
    pub(super) fn died(
        &mut self,
        request: &Request,
        ask: &Ask,
        after: &[u64],
        first: bool,
    ) -> Checked {
        check(request.refusal.is_none(), Rule::Answer, || {
            "a harvest that must be refused asked a domain".to_owned()
        })?;
        let runs = runs_in(after, request.inner.range(), request.inner.granule());
        let died_in = if first {
            self.died_in(request, ask)
        } else {
            request.reached()
        };
        let runs: Vec<IovaRange> = runs
            .iter()
            .filter_map(|run| run.intersection(died_in?))
            .collect();
        let outside = self.right_abort(&runs, u64::MAX).outside_bytes;
        let before = self.counts.put_back_outside_bytes;
        let counted = self.space.stats().put_back_outside_bytes;
        // The place of the panic is known only in the first area.
        let least = before + if first { outside } else { 0 };
        check(
            (least..=before + outside).contains(&counted),
            Rule::Accounting,
            || format!("{counted} bytes put back outside, not {before} and {outside}"),
        )?;
        self.counts.put_back_outside_bytes = counted;
        self.oracle.died(ask, &runs, &request.walked);
        self.after_panic();
        self.counts.harvests += 1;
        self.counts.aborts += 1;
        self.peek_everything()
    }

    /// Each page that must be reported is reported, to each consumer.
    pub(super) fn peek_everything(&mut self) -> Checked {
        for whose in self.oracle.present() {
            for range in self.told_about(whose) {
                self.peek_range(range, &Ask::EVERYTHING.by(whose as u8))?;
            }
        }
        Ok(())
    }

    /// Keeps a new lease.
    fn hold(
        &mut self,
        nth: usize,
        (lease, number): (Lease<'a, Owed>, Option<u64>),
        request: &Request,
        ask: &Ask,
        found: &Found,
    ) -> Checked {
        let bytes = found.set << request.inner.granule().lg2();
        let whose = self.oracle.whose(ask);
        self.counts.harvests += 1;
        self.counts.leased_bytes += bytes;
        self.tallies[whose].leased += bytes;
        let copied = self.config.sabotage == Sabotage::CopyBeforeSync;
        if copied {
            self.copy_for(whose, &found.runs)?;
        }
        self.leases[nth] = Some(Held {
            live: Live::Owed(lease),
            whose,
            request: request.inner,
            view: request.view,
            empty: request.empty,
            maps: self.oracle.maps(),
            reached: request.reached(),
            committed: BTreeSet::new(),
            bytes,
            copied,
            number,
            fresh: Fresh::new(),
        });
        Ok(())
    }

    pub(super) fn peek(&mut self, ask: &Ask) -> Checked {
        self.peek_range(self.oracle.range_of(ask), ask)
    }

    fn peek_range(&mut self, range: IovaRange, ask: &Ask) -> Checked {
        let buffer = Buffer::new();
        let ask = &Ask {
            mode: Mode::Whole,
            ..*ask
        };
        let request = self.request(range, ask, &buffer);
        let answer = loop {
            let bitmap = UserBitmap::shared(buffer.bitmap(request.words));
            let (space, inner) = (self.space, &request.inner);
            let consumer = self.consumers[self.oracle.whose(ask)].clone();
            let peek = || match &consumer {
                Some(consumer) => consumer.peek(inner, bitmap).map(|_| ()),
                None => space.peek(inner, bitmap).map(|_| ()),
            };
            match caught(peek) {
                Ok(answer) => break answer,
                Err(Panicked) => buffer.fill(ask.preset),
            }
        };
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

    /// Prepares `buffer` for a request, and gets the expected result from the oracle.
    pub(super) fn request(&self, range: IovaRange, ask: &Ask, buffer: &Buffer) -> Request {
        let granule = Granule::from_lg2(ask.granule_lg2).unwrap_or(Granule::K4);
        buffer.fill(ask.preset);
        let words = words_for(range, granule) - usize::from(ask.short);
        let bits = words as u64 * 64;
        let inner = HarvestRequest::new(range, granule);
        let inner = match self.oracle.asked_domain(ask) {
            Some((_, id)) => inner.in_scope(Scope::Domain(id)),
            None => inner,
        };
        let unit = granule.max(self.oracle.alignment());
        let start = match ask.mode {
            Mode::Bounded { from, .. } => cursor(range, unit, from),
            _ => range.start(),
        };
        let from = (start, unit);
        let refusal = self.oracle.refusal(range, granule, bits, from, ask);
        let (walked, hole) = match refusal {
            Some(_) => Default::default(),
            None => self.ways(range, granule, ask),
        };
        Request {
            inner: inner.holes(ask.holes),
            words,
            before: buffer.read(),
            refusal,
            hole,
            stop: self.stop_in(&walked, ask),
            walked,
            view: IovaRange::new(start, range.last()).unwrap_or(range),
            empty: false,
            overshot: false,
        }
    }

    /// Checks the buffer of a request against the oracle.
    fn check_bits(&self, request: &Request, ask: &Ask, after: &[u64]) -> Result<Found, Violation> {
        let (must, may) = self.oracle.bounds(ask, &request.walked);
        check_bits(&request.inner, &request.before, after, &must, &may)
    }
}
