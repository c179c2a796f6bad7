//! The modes of harvest: the call of each, and the runs that it walks.

use dirtymap::{
    AddressSpace, Consumer, Error, Granule, HarvestRequest, Holes, Iova, IovaRange, Lease, Owed,
    UserBitmap,
};

use super::Runner;
use super::request::Request;
use crate::op::{Ask, Mask, Mode, Share};
use crate::pages::{PAGE, pages, pages_of};
use crate::violation::{Rule, Violation, check, same};

/// The start of a bounded harvest, a multiple of `unit`.
pub(super) fn cursor(range: IovaRange, unit: Granule, from: u8) -> Iova {
    let at = (range.len() * u128::from(from) / 256) as u64;
    let start = Iova::new(range.start().get() + at).granule_start(unit);
    match from {
        240.. => Iova::new(start.get() + 512),
        _ => start,
    }
}

/// The part of `range` that an operand names.
pub(super) fn share_of(range: IovaRange, Share(one, other): Share) -> IovaRange {
    let place = |n: u8| ((range.len() - 1) * u128::from(n) / 255) as u64;
    let at = |n: u8| Iova::new(range.start().get() + place(n));
    IovaRange::new(at(one.min(other)), at(one.max(other))).unwrap_or(range)
}

/// Performs the call of `mode`, for a named consumer if there is one. `page` is the unit of areas.
pub(super) fn call<'b>(
    (space, consumer): (&'b AddressSpace, Option<&Consumer<'b>>),
    request: &HarvestRequest<'_>,
    mode: Mode,
    page: Granule,
    bitmap: UserBitmap<'b>,
) -> Result<Lease<'b, Owed>, Error> {
    let range = request.range();
    let harvest = |request: &HarvestRequest<'_>, bitmap| match consumer {
        Some(consumer) => consumer.harvest(request, bitmap),
        None => space.harvest(request, bitmap),
    };
    match mode {
        Mode::Whole => harvest(request, bitmap),
        Mode::Parallel => harvest(&request.parallel(), bitmap),
        Mode::Bounded { from, bits } => {
            let from = cursor(range, request.granule().max(page), from);
            harvest(&request.resume_at(from).max_bits(bits.into()), bitmap)
        }
        Mode::Masked(mask) => {
            let granule = Granule::from_lg2(mask.granule_lg2).unwrap_or(Granule::K4);
            let over = range.round_out(granule);
            let mut words = mask_words(mask, over, granule);
            let view = UserBitmap::new(&mut words).view(over, granule);
            harvest(&request.masked(view?), bitmap)
        }
    }
}

fn mask_words(mask: Mask, over: IovaRange, granule: Granule) -> Vec<u64> {
    let mut words = vec![0; over.granules(granule).div_ceil(64) as usize];
    for bit in 0..over.granules(granule) as u64 {
        let at = over.start().get() + (bit << granule.lg2());
        words[(bit / 64) as usize] |= u64::from(mask.has(at / PAGE)) << (bit % 64);
    }
    words
}

impl Runner<'_> {
    /// The runs of pages that a harvest walks if only a hole stops it, and that hole.
    pub(super) fn ways(
        &self,
        range: IovaRange,
        granule: Granule,
        ask: &Ask,
    ) -> (Vec<(u64, u64)>, Option<Iova>) {
        let (first, last) = (range.start().get() / PAGE, range.last().get() / PAGE);
        let asked = match ask.mode {
            Mode::Whole | Mode::Parallel => vec![(first, last)],
            Mode::Bounded { from, .. } => {
                let unit = granule.max(self.oracle.alignment());
                vec![(cursor(range, unit, from).get() / PAGE, last)]
            }
            Mode::Masked(mask) => self.oracle.masked(range, mask),
        };
        let mut walked = Vec::new();
        for (first, last) in asked {
            if ask.holes == Holes::Skip {
                walked.extend(self.oracle.mapped_in(first, last));
                continue;
            }
            let hole = self.oracle.first_hole(first, last);
            let end = hole.unwrap_or(last + 1);
            if first < end {
                walked.push((first, end - 1));
            }
            if let Some(hole) = hole {
                return (walked, Some(Iova::new(hole * PAGE)));
            }
        }
        (walked, None)
    }

    /// Checks the end of a bounded harvest: within its bounds, and not before it had reached them.
    pub(super) fn ended(
        &self,
        request: &mut Request,
        ask: &Ask,
        next: Option<Iova>,
    ) -> Result<(), Violation> {
        let Mode::Bounded { from, .. } = ask.mode else {
            return same(Rule::Answer, "where to go on", next, None);
        };
        let (range, granule) = (request.inner.range(), request.inner.granule());
        let granule = granule.max(self.oracle.alignment());
        let from = cursor(range, granule, from);
        let Some(next) = next else {
            return Ok(());
        };
        let good = from < next && range.contains(next) && next.is_aligned(granule);
        check(good, Rule::Answer, || {
            format!("a bounded harvest of {range} from {from} goes on at {next}")
        })?;
        let page = next.get() / PAGE;
        // It reaches the hole only if its bounds allow.
        if request.hole.is_some_and(|hole| next <= hole) {
            request.hole = None;
        }
        if request.stop.is_some_and(|stop| next <= stop) {
            request.stop = None;
        }
        request.walked.retain(|(first, _)| *first < page);
        for (_, last) in &mut request.walked {
            *last = (*last).min(page - 1);
        }
        request.view = pages(from.get() / PAGE, page - 1);
        Ok(())
    }

    /// A bounded harvest found about as many bits as it should.
    pub(super) fn check_bound(
        &self,
        request: &Request,
        ask: &Ask,
        next: Option<Iova>,
        set: u64,
    ) -> Result<(), Violation> {
        let Mode::Bounded { bits, .. } = ask.mode else {
            return Ok(());
        };
        let page = self.oracle.unit() * PAGE;
        let of_page = (page >> request.inner.granule().lg2()).saturating_sub(1);
        let most = u64::from(bits).max(1) + 63 + of_page;
        let least = if next.is_some() { bits.into() } else { 0 };
        check((least..=most).contains(&set), Rule::Answer, || {
            format!("{set} bits of a harvest that is bounded to {bits}")
        })
    }

    /// The pages that a harvest walked.
    pub(super) fn areas_in(&self, walked: &[(u64, u64)]) -> u64 {
        let touched = |area: &&crate::oracle::Area| {
            let mut runs = walked.iter();
            runs.any(|(first, last)| area.first <= *last && area.last() >= *first)
        };
        self.oracle.areas.values().filter(touched).count() as u64
    }

    /// The pages that a harvest may have recorded before a domain panicked: in its first area, or
    /// anywhere if several threads harvested, as they do only for a space without consumers.
    pub(super) fn died_in(&self, request: &Request, ask: &Ask) -> Option<IovaRange> {
        let (first, last) = *request.walked.first()?;
        let end = match ask.mode {
            Mode::Parallel if !self.oracle.named => request.walked.last()?.1,
            _ => last.min(self.oracle.area_at(first)?.last()),
        };
        Some(pages(request.view.start().get() / PAGE, end))
    }

    /// The stop of a harvest that walks `walked`. The lowest one counts.
    pub(super) fn stop_in(&self, walked: &[(u64, u64)], ask: &Ask) -> Option<Iova> {
        let within = |at: &Iova| {
            let page = at.get() / PAGE;
            walked
                .iter()
                .any(|(first, last)| (*first..=*last).contains(&page))
        };
        let domains = self.oracle.covered(ask).into_iter();
        let stops = domains.filter_map(|nth| self.world.nodes[nth].stop());
        let lowest = stops.filter(within).min()?;
        Some(lowest.granule_start(self.oracle.alignment()))
    }

    /// The expected result of an abort of `runs`, for a lease that is as old as this number of
    /// maps.
    pub(super) fn right_abort(&self, runs: &[IovaRange], maps: u64) -> dirtymap::harvest::Aborted {
        let mut right = dirtymap::harvest::Aborted::default();
        for run in runs {
            for page in pages_of(*run) {
                let part = pages(page, page).intersection(*run);
                let len = part.map_or(0, |part| part.len() as u64);
                match self.oracle.area_at(page).filter(|area| area.origin <= maps) {
                    Some(_) => right.bytes += len,
                    None => right.outside_bytes += len,
                }
            }
        }
        right
    }
}
