//! Cuts, batches, and which addresses may be mapped.

use dirtymap::{Change, Error, IovaRange};

use super::{Checked, Runner, same_answer};
use crate::op::{Place, Step, Stretch};
use crate::oracle::{Outcome, Plan, range_of};
use crate::violation::{Rule, same};

impl Runner<'_> {
    pub(super) fn cut(&mut self, at: Place, unaligned: bool) -> Checked {
        let mut plan = Plan::new(&self.oracle);
        let byte = if unaligned { 100 } else { 0 };
        let Some(at) = plan.place(Place { byte, ..at }) else {
            return Ok(());
        };
        let right = plan.cut(at).and_then(|()| plan.outcome());
        let space = self.space;
        let answer = self.stubbornly(|| space.cut(at))?;
        match (answer, right) {
            (Ok(cut), Ok(outcome)) => {
                let areas = self.oracle.areas.len();
                self.oracle.perform(&outcome);
                let right = self.oracle.areas.len() > areas;
                same(
                    Rule::Answer,
                    "whether there was something to cut",
                    cut,
                    right,
                )?;
            }
            (answer, right) => same_answer("a cut", answer.map(|_| ()), right.map(|_| ()))?,
        }
        self.check_areas()?;
        self.check_translations()
    }

    /// Each change is planned on the areas after the changes before it. All are performed at once.
    pub(super) fn batch(&mut self, steps: &[Step; 3]) -> Checked {
        let new = steps.map(|step| match step {
            Step::Map(at, access) => self.oracle.new_area(at, false, access),
            _ => self.oracle.new_area(NOWHERE, false, dirtymap::Access::Read),
        });
        let mut plan = Plan::new(&self.oracle);
        let mut changes: Vec<Change> = Vec::new();
        let mut refusal = None;
        for (step, new) in steps.iter().zip(new) {
            let Some(change) = plan.change(*step, new) else {
                continue;
            };
            let index = changes.len();
            changes.push(change);
            if let Err(error) = plan.add(index, change, new) {
                let error = Box::new(error);
                refusal = Some(Error::Change { index, error });
                break;
            }
        }
        let right = match refusal {
            Some(error) => Err(error),
            None => plan.outcome(),
        };
        let space = self.space;
        let answer = self.stubbornly(|| space.apply(&changes))?;
        match (answer, right) {
            (Ok(done), Ok(outcome)) => self.applied(done, &outcome)?,
            (answer, right) => same_answer("a batch", answer.map(|_| ()), right.map(|_| ()))?,
        }
        self.check_areas()?;
        self.check_translations()
    }

    fn applied(&mut self, done: dirtymap::space::Unmapped, outcome: &Outcome) -> Checked {
        self.check_discarded(&outcome.gone, done)?;
        self.oracle.perform(outcome);
        self.forget_copies(&outcome.gone)?;
        let new: Vec<IovaRange> = outcome.new.iter().map(|area| area.range()).collect();
        self.copy_mapped(&new)
    }

    pub(super) fn reserve(&mut self, at: Stretch) -> Checked {
        let range = range_of(at);
        let answer = self.space.reserve(range);
        same_answer("a reservation", answer, self.oracle.reserve(range))?;
        self.check_ranges()
    }

    pub(super) fn release(&mut self, nth: u8) -> Checked {
        let reserved = &mut self.oracle.free.reserved;
        let nth = usize::from(nth) % (reserved.len() + 1);
        let (range, right) = if nth < reserved.len() {
            (reserved.remove(nth), Ok(()))
        } else {
            let range = range_of(NOWHERE);
            (range, Err(Error::NotReserved { range }))
        };
        let answer = self.space.release_reserved(range);
        same_answer("the end of a reservation", answer, right)?;
        self.check_ranges()
    }

    pub(super) fn allow(&mut self, ranges: Vec<IovaRange>) -> Checked {
        let answer = self.space.set_allowed(&ranges);
        same_answer("what is allowed", answer, self.oracle.free.allow(ranges))?;
        self.check_ranges()
    }

    fn check_ranges(&self) -> Checked {
        let ranges = self.space.ranges();
        let free = &self.oracle.free;
        same(
            Rule::Answer,
            "what is reserved",
            ranges.reserved,
            free.blocked(),
        )?;
        same(
            Rule::Answer,
            "what is allowed",
            ranges.allowed,
            free.allowed(),
        )?;
        same(Rule::Answer, "the holes", ranges.holes, self.oracle.holes())
    }
}

/// A stretch of the window that no operand names.
const NOWHERE: Stretch = Stretch {
    slot: 6,
    skip: 3,
    pages: 5,
};
