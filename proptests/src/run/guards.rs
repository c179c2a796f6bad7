//! Writes in flight, and handles that are kept, also after an unmap of their areas.

use dirtymap::space::{Fault, FaultSource};
use dirtymap::{Error, Iova, IovaRange};

use super::{Checked, Guard, Runner, same_answer};
use crate::op::{Place, Sabotage};
use crate::oracle::{Area, page_in};
use crate::pages::{PAGE, pages, pages_of};
use crate::violation::{Rule, same};

impl Runner<'_> {
    pub(super) fn begin_write(&mut self, nth: usize, at: Place, len: u16) -> Checked {
        let at = Iova::new(self.oracle.address_of(at));
        let Ok(range) = IovaRange::from_len(at, len.into()) else {
            return Ok(());
        };
        if self.guards[nth].is_some() {
            return Ok(());
        }
        let outside = self.oracle.hole_in(range).map(|hole| hole.max(at));
        if self.config.sabotage == Sabotage::ForgetGuards {
            let guard = None;
            self.guards[nth] = outside.is_none().then_some(Guard { guard, range });
            return Ok(());
        }
        let begun = self.space.begin_write(range);
        self.counts.outside_marks += u64::from(outside.is_some());
        let right = outside.map_or(Ok(()), |at| Err(Error::Outside { at }));
        match begun {
            Err(error) => same_answer("a write that begins", Err(error), right),
            Ok(guard) => {
                same_answer("a write that begins", Ok(()), right)?;
                let whole = range.round_out(self.oracle.space_page());
                same(Rule::Answer, "what is being written", guard.range(), whole)?;
                self.oracle.guards[nth] = Some(whole);
                let guard = Some(guard);
                self.guards[nth] = Some(Guard { guard, range });
                Ok(())
            }
        }
    }

    pub(super) fn fill_write(&mut self, nth: usize, skip: u16, len: u16) -> Checked {
        let Some(Guard { range, .. }) = self.guards[nth] else {
            return Ok(());
        };
        let start = range.start().get() + u64::from(skip);
        let asked = IovaRange::from_len(Iova::new(start), len.into()).ok();
        match asked.and_then(|asked| asked.intersection(range)) {
            Some(part) => {
                let bytes = self.fresh_bytes(part.len() as u16);
                self.store(part, &bytes, false)
            }
            None => Ok(()),
        }
    }

    /// The pages are marked. If an area was unmapped meanwhile, that is a mark outside.
    pub(super) fn end_write(&mut self, nth: usize) -> Checked {
        if let Some(Guard { guard, .. }) = self.guards[nth].take() {
            drop(guard);
        }
        if let Some(range) = self.oracle.guards[nth].take() {
            let missing = self.oracle.hole_in(range).is_some();
            self.counts.outside_marks += u64::from(missing);
            for page in pages_of(range) {
                if self.oracle.area_at(page).is_some() {
                    self.oracle.marked(page);
                }
            }
        }
        Ok(())
    }

    pub(super) fn keep_handle(&mut self, nth: usize, area: u8) {
        if let Some(area) = self.oracle.nth_area(area) {
            let handle = self.space.area(area.range().start());
            self.handles[nth] = handle.map(|handle| (handle, area.origin));
        }
    }

    /// Marks by a kept handle: the pieces of its area that are still mapped.
    pub(super) fn mark_by_kept(&mut self, nth: usize, page: u8, len: u16) -> Checked {
        let Some((handle, origin)) = self.handles[nth].clone() else {
            return Ok(());
        };
        let own = handle.mapping().range;
        let mapping = handle.mapping();
        let area = Area {
            first: own.start().get() / PAGE,
            pages: (own.len() / u128::from(PAGE)) as u64,
            frame: mapping.backing / PAGE,
            access: mapping.access,
            origin,
        };
        let at = Iova::new(page_in(&area, page % 32) * PAGE);
        let asked = IovaRange::from_len(at, len.into()).ok();
        let Some(range) = asked.and_then(|asked| asked.intersection(own)) else {
            return Ok(());
        };
        let there = |page: &u64| {
            let area = self.oracle.area_at(*page);
            area.is_some_and(|area| area.origin == origin)
        };
        let (left, gone): (Vec<u64>, Vec<u64>) = pages_of(range).partition(there);
        if let Some(first) = gone.first() {
            // Nothing is written, but the mapped pages may be marked.
            left.into_iter()
                .for_each(|page| self.oracle.may_be_marked(page));
            self.counts.outside_marks += 1;
            let at = range.start().max(Iova::new(first * PAGE));
            let right = Err(Error::Outside { at });
            same_answer("a mark by a kept handle", handle.mark(range), right)?;
            let outside = |page: &u64| {
                let part = pages(*page, *page).intersection(range);
                part.map_or(0, |part| part.len() as u64)
            };
            let fault = Fault {
                at,
                len: gone.iter().map(outside).sum(),
                source: FaultSource::Handle,
            };
            let newest = self.space.faults().recent.last().copied();
            return same(Rule::Answer, "the newest fault", newest, Some(fault));
        }
        let bytes = self.fresh_bytes(range.len() as u16);
        self.store(range, &bytes, self.marks())?;
        if self.marks() {
            same_answer("a mark by a kept handle", handle.mark(range), Ok(()))?;
        }
        Ok(())
    }
}
