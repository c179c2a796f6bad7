//! The effect of cuts and batches on the areas, one change after the other.

use dirtymap::{Change, Error, Iova, IovaRange};

use super::{Area, Oracle, page_in};
use crate::op::{Place, Step};
use crate::pages::PAGE;

/// The plan of a batch.
pub(crate) struct Plan<'o> {
    oracle: &'o Oracle,
    /// The pieces of the areas, each with whether it is unmapped.
    pieces: Vec<(Area, bool)>,
    /// New areas, each with the number of its change.
    new: Vec<(usize, Area)>,
}

/// The result of a plan.
pub(crate) struct Outcome {
    pub(crate) gone: Vec<Area>,
    pub(crate) kept: Vec<Area>,
    pub(crate) new: Vec<Area>,
}

impl<'o> Plan<'o> {
    pub(crate) fn new(oracle: &'o Oracle) -> Self {
        let pieces = oracle.areas.values().map(|area| (*area, false)).collect();
        Plan {
            oracle,
            pieces,
            new: Vec::new(),
        }
    }

    /// The area that an operand names, among those that are left.
    fn nth(&self, nth: u8) -> Option<Area> {
        let left: Vec<Area> = self
            .pieces
            .iter()
            .filter(|(_, goes)| !goes)
            .map(|(area, _)| *area)
            .collect();
        left.get(usize::from(nth).checked_rem(left.len())?).copied()
    }

    /// Where an operand cuts.
    pub(crate) fn place(&self, at: Place) -> Option<Iova> {
        let area = self.nth(at.area)?;
        // Borders that suit the attached domains, or all domains.
        let unit = match at.page {
            0..4 => self.oracle.unit(),
            _ => self.oracle.largest_unit(),
        };
        let page = page_in(&area, at.page) / unit * unit;
        Some(Iova::new(page * PAGE + u64::from(at.byte)))
    }

    /// The change that an operand names, if it is possible. `new` is the area of a map.
    pub(crate) fn change(&self, step: Step, new: Area) -> Option<Change> {
        Some(match step {
            Step::Nothing => return None,
            Step::Cut(at) => Change::Cut {
                at: self.place(at)?,
            },
            Step::Unmap(nth) => Change::Unmap {
                range: self.nth(nth)?.range(),
            },
            Step::UnmapNew => Change::Unmap {
                range: self.new.last()?.1.range(),
            },
            Step::Map(..) => Change::Map {
                range: new.range(),
                backing: new.frame * PAGE,
                access: new.access,
            },
        })
    }

    /// Adds a change to the plan. `new` is the area of a map.
    ///
    /// # Errors
    /// Why it is refused.
    pub(crate) fn add(&mut self, index: usize, change: Change, new: Area) -> Result<(), Error> {
        match change {
            Change::Cut { at } => self.cut(at),
            Change::Unmap { range } => self.unmap(range),
            Change::Map { range, .. } => {
                if let Some(reserved) = self.oracle.free.reserved_in(range) {
                    return Err(Error::Reserved { range, reserved });
                }
                // An area that is unmapped also takes its addresses until the flush.
                let mut areas = self.oracle.areas.values().map(Area::range);
                let area = areas.find(|other| other.intersects(range));
                if let Some(existing) = area.or(self.lowest_new_in(range)) {
                    return Err(Error::Overlap { range, existing });
                }
                self.new.push((index, new));
                Ok(())
            }
        }
    }

    /// # Errors
    /// Why it is refused.
    pub(crate) fn cut(&mut self, at: Iova) -> Result<(), Error> {
        let granule = self.oracle.alignment();
        if !at.is_aligned(granule) {
            return Err(Error::UnalignedCut { at, granule });
        }
        let page = at.get() / PAGE;
        let across = |area: &Area| area.holds(page) && area.first < page;
        if let Some((_, new)) = self.new.iter().find(|(_, new)| across(new)) {
            return Err(Error::Busy { area: new.range() });
        }
        if let Some(nth) = self
            .pieces
            .iter()
            .position(|(area, goes)| !goes && across(area))
        {
            let (whole, _) = self.pieces[nth];
            self.pieces[nth].0 = whole.part(whole.first, page - 1);
            let right = whole.part(page, whole.last());
            self.pieces.insert(nth + 1, (right, false));
        }
        Ok(())
    }

    /// The lowest of the new areas that intersect `range`.
    fn lowest_new_in(&self, range: IovaRange) -> Option<IovaRange> {
        let new = self.new.iter().map(|(_, area)| area.range());
        let inside = new.filter(|new| new.intersects(range));
        inside.min_by_key(|new| new.start())
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), Error> {
        if let Some(area) = self.lowest_new_in(range) {
            return Err(Error::Busy { area });
        }
        let mut any = false;
        for (area, goes) in self.pieces.iter_mut().filter(|(_, goes)| !goes) {
            if range.covers(area.range()) {
                *goes = true;
                any = true;
            } else if range.intersects(area.range()) {
                let area = area.range();
                return Err(Error::PartOfArea { range, area });
            }
        }
        if any {
            Ok(())
        } else {
            Err(Error::NothingMapped { range })
        }
    }

    /// The result of the plan.
    ///
    /// # Errors
    /// Why a domain refuses.
    pub(crate) fn outcome(self) -> Result<Outcome, Error> {
        for (index, area) in &self.new {
            if let Some(error) = self.oracle.refuses(area, &self.oracle.attached) {
                return Err(Error::Change {
                    index: *index,
                    error: Box::new(error),
                });
            }
        }
        let which = |going: bool| {
            let pieces = self.pieces.iter().filter(move |(_, goes)| *goes == going);
            pieces.map(|(area, _)| *area).collect()
        };
        Ok(Outcome {
            gone: which(true),
            kept: which(false),
            new: self.new.iter().map(|(_, area)| *area).collect(),
        })
    }
}

impl Oracle {
    /// Performs the cuts and unmaps of a batch. The caller adds the new areas when it maps them.
    pub(crate) fn perform(&mut self, outcome: &Outcome) {
        self.areas.clear();
        for area in outcome.kept.iter().chain(&outcome.gone) {
            self.map(*area);
        }
        outcome.gone.iter().for_each(|area| self.unmap(area));
        outcome.new.iter().for_each(|area| self.map(*area));
    }
}
