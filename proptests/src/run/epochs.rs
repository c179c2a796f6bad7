//! Epochs: their lineage, the images that follow it, and the pages since one of them.

use std::collections::BTreeSet;

use dirtymap::harvest::{Bounds, Content, Epoch, Lineage, Parent, Since, Why};
use dirtymap::{Iova, IovaRange};

use super::discards::Contents;
use super::image::{Fresh, Image, Kept};
use super::{Checked, Runner, broken};
use crate::op::{Limits, Named};
use crate::oracle::{Ledger, Right};
use crate::pages::{PAGE, pages_of, pieces};
use crate::violation::{Rule, Violation, check, same, violation};

/// The epoch of a consumer with this number.
fn epoch(consumer: u128, number: u64) -> Result<Epoch, Violation> {
    let text = format!("{consumer:032x}-{number}");
    let wrong = |error| violation(Rule::Answer, format!("the epoch {text}: {error}"));
    text.parse().map_err(wrong)
}

impl Runner<'_> {
    /// The bytes of the contents of a lease, as they are now.
    pub(super) fn fresh(&self, contents: &Contents) -> Result<Fresh, Violation> {
        let mut fresh = Fresh::new();
        for (part, content) in contents {
            for (at, piece) in pieces(part.start().get(), part.len() as usize) {
                let Some(phys) = self.phys(at) else { continue };
                let mut bytes = vec![0; piece.len()];
                if *content == Content::Data && self.oracle.memory.contains_key(&(phys / PAGE)) {
                    self.memory().read(phys, &mut bytes).map_err(broken)?;
                }
                fresh.push((at, bytes));
            }
        }
        Ok(fresh)
    }

    fn fresh_runs(&self, runs: &[IovaRange]) -> Result<Fresh, Violation> {
        let contents: Contents = runs.iter().map(|run| (*run, Content::Data)).collect();
        self.fresh(&contents)
    }

    /// The images of all consumers have the pages of `runs`.
    pub(super) fn add_to_images(&mut self, runs: &[IovaRange]) -> Checked {
        let fresh = self.fresh_runs(runs)?;
        for image in self.images.iter_mut().flatten() {
            image.apply(&fresh);
            image.mapped.extend(fresh.iter().map(|(at, _)| at / PAGE));
        }
        Ok(())
    }

    /// A named consumer has joined; `model` is the one that it copies.
    pub(super) fn image_of(
        &mut self,
        whose: usize,
        model: Option<usize>,
        is_dirty: bool,
    ) -> Checked {
        let Some(consumer) = self.consumers[whose].clone() else {
            return Ok(());
        };
        let first = consumer.epoch();
        let covers = |model: usize| {
            let [theirs, own] = [model, whose].map(|nth| {
                let told = self.oracle.consumers[nth].as_ref();
                told.and_then(|told| told.range).unwrap_or(IovaRange::ALL)
            });
            theirs.covers(own)
        };
        let top = match model.and_then(|model| self.ledgers[model].as_ref()) {
            // No copy of the model has the rest.
            Some(_) if !model.is_some_and(covers) => Parent::Unknown(Why::Beginning),
            Some(model) => model.top,
            None if is_dirty => Parent::Everything(Why::Beginning),
            None => Parent::Epoch(first),
        };
        self.ledgers[whose] = Some(Ledger::new(first, top));
        self.images[whose] = is_dirty.then(Image::default);
        if is_dirty {
            return Ok(());
        }
        let areas = self.told_about(0);
        let mut image = Image {
            epoch: Some(first),
            ..Image::default()
        };
        image.apply(&self.fresh_runs(&areas)?);
        if let Some(model) = model {
            let told = self.oracle.consumers[model].as_ref();
            let hears = |page: &u64| told.is_some_and(|told| told.hears(*page));
            let Some(theirs) = &self.images[model] else {
                return Ok(());
            };
            let theirs = theirs.clone();
            image.pages.retain(|page, _| !hears(page));
            let heard = theirs.pages.into_iter().filter(|(page, _)| hears(page));
            image.pages.extend(heard);
            image.epoch = theirs.epoch;
            image.is_stale = theirs.is_stale;
            image.mapped = theirs.mapped;
        }
        self.images[whose] = Some(image);
        Ok(())
    }

    /// A harvest of a consumer has a lease with this lineage. Returns the number of the lease.
    pub(super) fn numbered(
        &mut self,
        whose: usize,
        lineage: Option<Lineage>,
    ) -> Result<Option<u64>, Violation> {
        let Some(lineage) = lineage else {
            return Ok(None);
        };
        let number = lineage.epoch.number();
        if let Some(ledger) = &mut self.ledgers[whose] {
            same(
                Rule::Answer,
                "the consumer of a lease",
                lineage.epoch.consumer(),
                ledger.head.consumer(),
            )?;
            check(number > ledger.last, Rule::Answer, || {
                format!("lease {number} after number {}", ledger.last)
            })?;
            ledger.last = number;
        }
        self.check_lineage(whose, number, lineage.parent)?;
        Ok(Some(number))
    }

    fn check_lineage(&self, whose: usize, number: u64, parent: Parent) -> Checked {
        let Some(ledger) = &self.ledgers[whose] else {
            return Ok(());
        };
        let told = self.oracle.consumers[whose].as_ref();
        let whole = told.is_some_and(|told| told.was_loose);
        let right = ledger.parents(number, whole);
        check(right.contains(&parent), Rule::Answer, || {
            format!("the parent of lease {number}: {parent:?}, none of {right:?}")
        })
    }

    /// A lease of a consumer that is there was committed. `runs` were not committed by parts.
    pub(super) fn committed(
        &mut self,
        whose: usize,
        (number, lineage): (Option<u64>, Option<Lineage>),
        runs: &[IovaRange],
        fresh: &Fresh,
    ) -> Checked {
        let (Some(number), Some(lineage)) = (number, lineage) else {
            same(Rule::Answer, "the lineage of a commit", lineage, None)?;
            // From before the first consumer. Its copies may be older than those of an epoch.
            return match self.oracle.named {
                true => self.refresh_image(whose),
                false => self.copy_to_image(whose, runs),
            };
        };
        self.check_lineage(whose, number, lineage.parent)?;
        let pages = self
            .oracle
            .rounded(runs.iter().flat_map(|run| pages_of(*run)));
        if let Some(ledger) = &mut self.ledgers[whose] {
            let epoch = lineage.epoch.number();
            let is_late = number <= ledger.head.number();
            check(
                if is_late {
                    epoch > ledger.last
                } else {
                    epoch == number
                },
                Rule::Answer,
                || format!("lease {number} made epoch {epoch} after {:?}", ledger.head),
            )?;
            ledger.add(&pages, None);
            ledger.commit(lineage.epoch);
        }
        let image = self.images[whose].take();
        let follows = |image: &Image, parent: Epoch| match image.epoch {
            Some(epoch) => epoch == parent,
            None => parent.number() == 0,
        };
        let mut image = match (lineage.parent, image) {
            (Parent::Epoch(parent), Some(mut image)) if follows(&image, parent) => {
                image.apply(fresh);
                image
            }
            (Parent::Everything(_), image) => {
                // All but what was mapped since the join is reported, by this lease or later.
                let mut image = image.unwrap_or_default();
                let mapped = &image.mapped;
                image.pages.retain(|page, _| mapped.contains(page));
                image.apply(fresh);
                image
            }
            _ => {
                let mut image = Image::default();
                // Not what the lease has copied, which may be older.
                image.apply(&self.fresh_runs(&self.told_about(whose))?);
                image
            }
        };
        image.epoch = Some(lineage.epoch);
        image.is_stale = false;
        self.images[whose] = Some(image);
        Ok(())
    }

    /// The image of a consumer has all that is mapped now.
    fn refresh_image(&mut self, whose: usize) -> Checked {
        self.copy_to_image(whose, &self.told_about(whose))
    }

    /// The image of a consumer without epochs has the pages of `runs` as they are now, because no
    /// lineage orders the copies of its leases.
    fn copy_to_image(&mut self, whose: usize, runs: &[IovaRange]) -> Checked {
        let fresh = self.fresh_runs(runs)?;
        self.images[whose]
            .iter_mut()
            .for_each(|image| image.apply(&fresh));
        Ok(())
    }

    /// A part of a lease of a consumer that is there was committed: the granules of `bytes` bytes
    /// that begin at `granules`.
    pub(super) fn committed_part(
        &mut self,
        whose: usize,
        number: Option<u64>,
        granules: &BTreeSet<u64>,
        bytes: u64,
    ) -> Checked {
        if number.is_none() && self.oracle.named && !granules.is_empty() {
            self.refresh_image(whose)?;
        } else {
            let runs = granules.iter();
            let runs = runs.map(|start| IovaRange::from_len(Iova::new(*start), bytes));
            let runs: Vec<IovaRange> = runs.flatten().collect();
            self.copy_to_image(whose, &runs)?;
        }
        let pages = granules.iter();
        let pages = pages.flat_map(|start| start / PAGE..=(start + (bytes - 1)) / PAGE);
        let pages = self.oracle.rounded(pages);
        if let (Some(ledger), false) = (&mut self.ledgers[whose], pages.is_empty()) {
            ledger.add(&pages, number);
        }
        Ok(())
    }

    /// A lease of a consumer that is there was put back. If parts of it were committed, they are
    /// an epoch.
    pub(super) fn end_of_parts(&mut self, whose: usize, number: Option<u64>) -> Checked {
        let (Some(ledger), Some(number)) = (&mut self.ledgers[whose], number) else {
            return Ok(());
        };
        let Some(consumer) = &self.consumers[whose] else {
            return Ok(());
        };
        let newest = consumer.epoch();
        if !ledger.has_part(number) {
            return same(Rule::Answer, "the newest epoch", newest, ledger.head);
        }
        let is_late = number <= ledger.head.number();
        check(
            if is_late {
                newest.number() > ledger.last
            } else {
                newest.number() == number
            },
            Rule::Answer,
            || {
                format!(
                    "the end of lease {number} made {newest} after {:?}",
                    ledger.head
                )
            },
        )?;
        ledger.make(newest);
        Ok(())
    }

    /// Writes were not tracked for a while: a new chain of epochs begins for each consumer.
    pub(super) fn restarted(&mut self) -> Checked {
        for (consumer, ledger) in self.consumers.iter().zip(&mut self.ledgers) {
            let (Some(consumer), Some(ledger)) = (consumer, ledger) else {
                continue;
            };
            let newest = consumer.epoch();
            check(newest.number() > ledger.last, Rule::Answer, || {
                format!("{newest} after a gap that follows {:?}", ledger.head)
            })?;
            ledger.restart(newest);
        }
        Ok(())
    }

    /// The same if a call failed, and its undo has switched a domain.
    pub(super) fn may_have_restarted(&mut self) -> Checked {
        let mut all = self.consumers.iter().zip(&self.ledgers);
        let restarted = all.any(|(consumer, ledger)| match (consumer, ledger) {
            (Some(consumer), Some(ledger)) => consumer.epoch() != ledger.head,
            _ => false,
        });
        if !restarted {
            return Ok(());
        }
        self.oracle.zeros.doubt();
        let images = self.images.iter_mut().flatten();
        images.for_each(|image| image.is_stale = true);
        self.restarted()
    }

    pub(super) fn keep_cursor(&mut self, nth: usize, whose: usize) -> Checked {
        let (Some(consumer), Some(ledger)) = (&self.consumers[whose], &mut self.ledgers[whose])
        else {
            return Ok(());
        };
        if self.cursors[nth].is_some() {
            return Ok(());
        }
        let cursor = consumer.cursor();
        let newest = cursor.epoch();
        same(Rule::Answer, "the newest epoch", consumer.epoch(), newest)?;
        match ledger.has_parts() {
            true => {
                check(newest.number() > ledger.last, Rule::Answer, || {
                    format!("a cursor made {newest} after {:?}", ledger.head)
                })?;
                ledger.make(newest);
            }
            false => same(Rule::Answer, "the epoch of a cursor", newest, ledger.head)?,
        }
        ledger.hold();
        let (_, join) = self.oracle.number_of(whose);
        self.cursors[nth] = Some(Kept {
            whose,
            join,
            cursor,
        });
        Ok(())
    }

    pub(super) fn drop_cursor(&mut self, nth: usize) {
        let Some(kept) = self.cursors[nth].take() else {
            return;
        };
        let number = kept.cursor.epoch().number();
        drop(kept.cursor);
        let there = self.consumers[kept.whose].is_some();
        if there
            && self.oracle.number_of(kept.whose) == (kept.whose, kept.join)
            && let Some(ledger) = &mut self.ledgers[kept.whose]
        {
            ledger.release(number);
        }
    }

    pub(super) fn since(&mut self, whose: usize, which: Named) -> Checked {
        let (Some(consumer), Some(ledger)) = (self.consumers[whose].clone(), &self.ledgers[whose])
        else {
            return Ok(());
        };
        let asked = match which {
            Named::Cursor(nth) => match &self.cursors[usize::from(nth)] {
                Some(kept) => kept.cursor.epoch(),
                None => ledger.head,
            },
            Named::Newest => ledger.head,
            Named::Past(back) => {
                let mut past = ledger.past.iter().rev();
                past.nth(back.into()).copied().unwrap_or(ledger.head)
            }
            Named::Future => epoch(ledger.head.consumer(), ledger.head.number() + 1)?,
            Named::Foreign => epoch(42, 0)?,
        };
        let right = ledger.since(asked);
        let answer = consumer.since(asked);
        let what = format!("what consumer {whose} committed after {asked}");
        match (answer, right) {
            (Since::Everything(Why::Bounds), Right::PagesOrBounds(_)) => {
                if let Some(ledger) = &mut self.ledgers[whose] {
                    ledger.was_dropped(asked.number());
                }
                Ok(())
            }
            (Since::Everything(why), right) => {
                same(Rule::Answer, &what, Right::Everything(why), right)
            }
            (Since::Runs(written), Right::Pages(right) | Right::PagesOrBounds(right)) => {
                same(Rule::Answer, "its begin", written.from(), asked)?;
                same(Rule::Answer, "its end", written.to(), consumer.epoch())?;
                same(
                    Rule::Answer,
                    "whether it is empty",
                    written.is_empty(),
                    right.is_empty(),
                )?;
                let pages: BTreeSet<u64> = written.runs().flat_map(pages_of).collect();
                same(Rule::Answer, &what, pages, right)
            }
            (Since::Runs(written), right) => {
                let pages = written.runs().flat_map(pages_of).collect();
                same(Rule::Answer, &what, Right::Pages(pages), right)
            }
        }
    }

    pub(super) fn bound(&mut self, whose: usize, limits: Limits) {
        let bounds = Bounds {
            bytes: limits.bytes,
            deltas: limits.deltas,
            age: limits.age,
        };
        match &self.consumers[whose] {
            Some(consumer) => consumer.set_bounds(bounds),
            None if whose == 0 => self.space.set_unnamed_bounds(bounds),
            None => return,
        }
        if let Some(ledger) = &mut self.ledgers[whose] {
            ledger.limits = limits;
        }
        if let Some(told) = &mut self.oracle.consumers[whose] {
            told.is_bounded = limits.drops_pending();
            told.is_loose |= told.is_bounded;
            told.was_loose |= told.is_bounded;
        }
    }

    /// Consumers whose pending pages were dropped are told everything.
    pub(super) fn notice_drops(&mut self) -> Checked {
        for (whose, consumer) in self.consumers.iter().enumerate() {
            let Some(consumer) = consumer else { continue };
            let stats = consumer.stats();
            let mapped = self.told_about(whose);
            let Some(told) = &mut self.oracle.consumers[whose] else {
                continue;
            };
            if stats.dropped > told.dropped {
                check(told.is_loose, Rule::Answer, || {
                    format!("the pages of consumer {whose} were dropped within its bounds")
                })?;
                let mapped: BTreeSet<u64> = mapped.iter().flat_map(|run| pages_of(*run)).collect();
                told.pending.must.extend(&mapped);
                told.pending.pages.extend(&mapped);
                told.dropped = stats.dropped;
            }
            told.is_loose = told.is_bounded || stats.everything;
            if let Some(deltas) = self.ledgers[whose].as_ref().and_then(Ledger::deltas) {
                same(Rule::Accounting, "deltas", stats.deltas, deltas)?;
            }
        }
        Ok(())
    }
}
