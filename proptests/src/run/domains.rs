//! Attaches, detaches, and the switches of tracking.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::sync::Arc;
use dirtymap::{Error, IovaRange};

use super::panics::{Panicked, caught};
use super::{Checked, Runner, same_answer};
use crate::faults::{Source, was_told};
use crate::op::Place;
use crate::oracle::{Area, Dirt, Tracking};
use crate::pages::{PAGE, pages};
use crate::violation::{Rule, check, same, violation};

impl Runner<'_> {
    pub(super) fn attach(&mut self, nth: usize) -> Checked {
        let node = Arc::clone(self.world.node(nth));
        let space = self.space;
        self.oracle.zeros.doubt();
        let answer = self.stubbornly(|| space.attach(Source(Arc::clone(&node))))?;
        let twin = self.oracle.attached.contains(&nth);
        let right = match self.oracle.domains[nth].id {
            Some(domain) if twin => Err(Error::AttachedTwice { domain }),
            _ => {
                let refused = |area: &Area| self.oracle.refuses(area, &[nth]);
                let mut areas = self.oracle.areas.values();
                let odd = self.oracle.cannot_attach(nth);
                odd.or_else(|| areas.find_map(refused)).map_or(Ok(()), Err)
            }
        };
        match answer {
            Ok(id) => {
                same_answer("an attach", Ok(()), right)?;
                let in_doubt = self.world.nodes[nth].is_in_doubt();
                self.oracle.zeros.forget();
                self.oracle.attach(nth, id, in_doubt);
            }
            Err(error) => same_answer("an attach", Err(error), right)?,
        }
        self.check_domains()
    }

    pub(super) fn detach(&mut self, nth: usize) -> Checked {
        let Some(id) = self.oracle.domains[nth].id else {
            return Ok(());
        };
        let space = self.space;
        self.oracle.zeros.doubt();
        let mut again = false;
        let answer = self.stubbornly(|| {
            if std::mem::replace(&mut again, true) && !space.domains().contains(&id) {
                return Ok(());
            }
            // The last callback comes after the detach is done, so a panic in it does not undo the
            // detach.
            catch_unwind(AssertUnwindSafe(|| space.detach(id))).unwrap_or_else(|panic| {
                match was_told(&*panic) && !space.domains().contains(&id) {
                    true => Ok(()),
                    false => resume_unwind(panic),
                }
            })
        })?;
        self.after_panic();
        let attached = self.oracle.attached.contains(&nth);
        let right = if attached {
            Ok(())
        } else {
            Err(Error::NotAttached { domain: id })
        };
        same_answer("a detach", answer, right)?;
        if attached {
            if self.oracle.domains[nth].tracking != Tracking::On {
                self.oracle.zeros.forget();
                self.may_have_restarted()?;
            }
            self.oracle.detach(nth);
            let owed = self.world.node(nth).owed();
            check(owed.is_empty(), Rule::Answer, || {
                format!("domain {nth} was detached and not told to forget {owed:?}")
            })?;
        }
        self.check_domains()?;
        self.check_translations()?;
        self.peek_everything()
    }

    fn check_domains(&self) -> Checked {
        let ids = self.oracle.attached.iter();
        let right: Vec<_> = ids.filter_map(|nth| self.oracle.domains[*nth].id).collect();
        same(Rule::Answer, "the domains", self.space.domains(), right)
    }

    /// Exactly the attached domains translate the areas.
    pub(super) fn check_translations(&self) -> Checked {
        for area in self.oracle.areas.values() {
            let at = area.range().start();
            for (nth, node) in self.world.nodes.iter().enumerate() {
                let right = self.oracle.attached.contains(&nth);
                check(node.translates(at) == right, Rule::Answer, || {
                    format!("domain {nth} does not translate {at} as it should: {right}")
                })?;
            }
        }
        Ok(())
    }

    /// Performs a call. If a requested failure of a flush or a requested panic hits it, all areas
    /// must still be there, and the call is repeated.
    pub(super) fn stubbornly<T>(
        &mut self,
        mut call: impl FnMut() -> Result<T, Error>,
    ) -> Result<Result<T, Error>, crate::violation::Violation> {
        loop {
            let failures = self.world.failures_ahead();
            match caught(&mut call) {
                Ok(answer) if self.world.failures_ahead() == failures || answer.is_ok() => {
                    self.may_have_restarted()?;
                    return Ok(answer);
                }
                Ok(_) => {}
                Err(Panicked) => self.after_panic(),
            }
            self.clear_leftovers()?;
            // The areas of an unmap may have lost their translations, but no dirty pages.
            self.peek_everything()?;
        }
    }

    /// Unmaps and detaches the rest of a call that failed, and whose undo failed as well.
    fn clear_leftovers(&mut self) -> Checked {
        for mapping in self.space.mappings() {
            let page = mapping.range.start().get() / PAGE;
            let known = self.oracle.area_at(page);
            if known.is_none() {
                let done = loop {
                    match caught(|| self.space.unmap_discarding(mapping.range)) {
                        Ok(Ok(done)) => break done,
                        Ok(Err(error)) => self.only_told_to_fail(error)?,
                        Err(Panicked) => self.after_panic(),
                    }
                };
                for (nth, node) in self.world.nodes.iter().enumerate() {
                    let start = mapping.range.start();
                    check(!node.translates(start), Rule::Answer, || {
                        format!("domain {nth} still translates {start}, whose map failed")
                    })?;
                }
                // Only pages of writes in flight are dirty in it.
                let flying = self.oracle.guards.iter().flatten();
                let parts = flying.filter_map(|write| write.intersection(mapping.range));
                let most: u128 = parts.map(|part| part.len()).sum();
                let range = mapping.range;
                let unsure = self.unsure.iter().any(|unsure| unsure.intersects(range));
                // All of it, to a consumer whose pending pages were dropped.
                let told = self.oracle.consumers.iter().flatten();
                let unsure = unsure || told.into_iter().any(|told| told.is_loose);
                let most = if unsure { range.len() } else { most };
                check(done.discarded_bytes <= most, Rule::Accounting, || {
                    format!("{done:?} of an area that was never there")
                })?;
                self.counts.discarded_bytes += done.discarded_bytes as u64;
            }
        }
        for id in self.space.domains() {
            let ours = |nth: &usize| self.oracle.domains[*nth].id == Some(id);
            if !self.oracle.attached.iter().any(ours) {
                while self.space.domains().contains(&id) {
                    match caught(|| self.space.detach(id)) {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => self.only_told_to_fail(error)?,
                        Err(Panicked) => self.after_panic(),
                    }
                }
            }
        }
        Ok(())
    }

    fn only_told_to_fail(&self, error: Error) -> Checked {
        match error {
            Error::Source(_) => Ok(()),
            error => Err(violation(
                Rule::Answer,
                format!("what was left over: {error}"),
            )),
        }
    }

    /// Merges the leaves of an area, or splits one of them, if the domain can.
    pub(super) fn reshape(&mut self, nth: usize, at: Place, merge: bool) -> Checked {
        let page = self.oracle.address_of(at) / PAGE;
        let attached = self.oracle.attached.contains(&nth);
        let Some(area) = self.oracle.area_at(page).copied().filter(|_| attached) else {
            return Ok(());
        };
        let node = self.world.node(nth);
        let done = match merge {
            true => node.merge(area.range()).map_err(|error| error.to_string()),
            false => match node.split(pages(page, page).start().granule_start(node.page())) {
                Ok(()) | Err(Error::CannotSplit { .. }) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
        };
        if merge {
            self.oracle.merged(nth, &area);
        }
        check(done.is_ok(), Rule::Answer, || {
            format!("leaves of {} in domain {nth}: {done:?}", area.range())
        })
    }

    /// Switches tracking, in one domain or everywhere.
    pub(super) fn track(&mut self, domain: Option<usize>, on: bool) -> Checked {
        let attached = domain.is_none_or(|nth| self.oracle.attached.contains(&nth));
        self.oracle.zeros.doubt();
        let id = domain.map(|nth| self.oracle.domains[nth].id);
        let answer = loop {
            let answer = caught(|| match (id, on) {
                (None, true) => self.space.start_tracking(),
                (None, false) => self.space.stop_tracking(),
                (Some(Some(id)), true) => self.space.start_domain_tracking(id),
                (Some(Some(id)), false) => self.space.stop_domain_tracking(id),
                (Some(None), _) => Ok(()),
            });
            match answer {
                Ok(answer) => break answer,
                Err(Panicked) => self.after_panic(),
            }
        };
        match id {
            Some(Some(domain)) if !attached => {
                let right = Err(Error::NotAttached { domain });
                return same_answer("switching a domain", answer, right);
            }
            Some(None) => return Ok(()),
            _ => {}
        }
        same_answer("switching tracking", answer, Ok(()))?;
        let mut starting = self.oracle.not_tracking();
        starting.retain(|nth| on && domain.is_none_or(|domain| domain == *nth));
        let marks = on && domain.is_none() && self.oracle.tracking != Tracking::On;
        // Dirty leaves of tables do not count. Pages in the put-back stores of domains do.
        let kept = starting.iter().map(|nth| &self.oracle.domains[*nth].dirt);
        let rounded = |dirt: &Dirt| self.oracle.rounded(dirt.may()).len() as u64;
        let mut most: u64 = kept.map(rounded).sum();
        let mut least = 0;
        if marks {
            // Once there are consumers, a page that must be reported may be pending and not marked.
            if !self.oracle.named {
                least = self.oracle.marks.must[0].len() as u64;
            }
            most += rounded(&self.oracle.marks);
        }
        let counted = self.space.stats().discarded_bytes;
        let pages = (counted - self.counts.discarded_bytes) / PAGE;
        self.counts.discarded_bytes = counted;
        check((least..=most).contains(&pages), Rule::Accounting, || {
            format!("{pages} pages discarded, not {least} to {most}")
        })?;
        match domain {
            Some(nth) => self.oracle.track_domain(nth, on),
            None => self.oracle.track(on),
        }
        if marks || !starting.is_empty() {
            self.oracle.zeros.forget();
            let areas: Vec<IovaRange> = self.oracle.areas.values().map(Area::range).collect();
            self.copy_runs(&areas)?;
            if self.oracle.named {
                // The lineage has to say that the images lack what was not tracked.
                let images = self.images.iter_mut().flatten();
                images.for_each(|image| image.is_stale = true);
            } else {
                self.add_to_images(&areas)?;
            }
            self.restarted()?;
            self.oracle.untracked.clear();
            for told in self.oracle.consumers.iter_mut().flatten() {
                told.lost.clear();
                if marks && starting == self.oracle.attached {
                    // Their caches are flushed.
                    told.hidden.clear();
                }
            }
        }
        Ok(())
    }
}
