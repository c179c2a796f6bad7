//! Ending translations: hand over the debt, then mark the dirty pages. If a source panics, assume
//! the worst.

use super::AddressSpace;
use super::domain::Attachment;
use crate::failure::{Failure, Panic, attempt, call, keep_first};
use crate::flush::{FlushGather, Ticket};
use crate::marks::Marks;
use crate::ranges::add_joined;
use crate::sync::{Step, performs};
use crate::units::{Granule, IovaRange};

impl AddressSpace {
    /// Ends the translations of `range` in `attachment`, owes their flush, and marks the dirty
    /// pages in `marks`. If the source panics, all of `range` counts as dirty, because the source
    /// may have taken a leaf without reporting it.
    pub(super) fn empty(
        &self,
        attachment: &Attachment,
        range: IovaRange,
        marks: &Marks,
    ) -> Emptied {
        let mut gather = FlushGather::new();
        let mut dirty = DirtyRuns::new(range, self.page());
        let panic = call(|| {
            let mut tell = |leaf| dirty.add(leaf);
            attachment.source.unmap(range, &mut gather, &mut tell);
        })
        .err();
        if panic.is_some() && performs(Step::PanicIsDirty) {
            dirty.add(range);
            self.owe_all_of(&mut gather, range, attachment);
        }
        let mark_all = || dirty.runs.iter().for_each(|run| marks.mark(*run));
        // The debt first, then the pages: a harvest that takes the pages then finds the debt. See
        // "Why no write is lost" in the module `harvest`.
        let ticket = if performs(Step::OweBeforeMark) {
            let ticket = self.flush.owe(&gather);
            mark_all();
            ticket
        } else {
            mark_all();
            self.flush.owe(&gather)
        };
        Emptied {
            ticket: Some(ticket),
            panic,
        }
    }

    /// Owes everything that the source may have touched in `range` before it panicked: leaves of
    /// any size, and tables.
    pub(crate) fn owe_all_of(
        &self,
        gather: &mut FlushGather,
        range: IovaRange,
        attachment: &Attachment,
    ) {
        let declared = Some(attachment.page).filter(|page| *page != Granule::BYTE);
        gather.add(range, self.page().min(declared.unwrap_or(self.page())));
        let largest = Granule::from_lg2(range.len().ilog2().min(63) as u8);
        gather.add(range, largest.unwrap_or(Granule::MAX));
        gather.add_table(range);
    }

    /// Waits for the flush of what was emptied; if a source panicked, returns its panic instead.
    pub(super) fn settle(&self, emptied: Emptied) -> Result<(), Failure> {
        match emptied {
            Emptied {
                panic: Some(panic), ..
            } => Err(Failure::Panicked(panic)),
            Emptied {
                ticket: Some(ticket),
                ..
            } => attempt(|| self.flush_until(ticket)),
            _ => Ok(()),
        }
    }
}

/// The result of emptying.
#[derive(Default)]
pub(super) struct Emptied {
    /// The last ticket of the debt, if anything was emptied.
    pub(super) ticket: Option<Ticket>,
    /// The first panic of a source. Each source that panicked is asked again when the call is
    /// repeated.
    pub(super) panic: Option<Panic>,
}

impl Emptied {
    /// Adds the result of a later step.
    pub(super) fn add(&mut self, later: Emptied) {
        self.ticket = later.ticket.or(self.ticket);
        if let Some(panic) = later.panic {
            keep_first(&mut self.panic, panic);
        }
    }
}

/// The ranges that an unmap reports as dirty, as runs of whole pages inside its range.
struct DirtyRuns {
    range: IovaRange,
    page: Granule,
    runs: Vec<IovaRange>,
}

impl DirtyRuns {
    fn new(range: IovaRange, page: Granule) -> Self {
        DirtyRuns {
            range,
            page,
            runs: Vec::new(),
        }
    }

    /// Adds the part of `leaf` inside the range; joins it to the last run if they touch.
    fn add(&mut self, leaf: IovaRange) {
        let Some(part) = leaf.intersection(self.range) else {
            return;
        };
        let part = part.round_out(self.page);
        add_joined(&mut self.runs, part);
        // In ascending order, runs that do not touch are at most half as many as the pages. More
        // runs mean that the order was another, and the whole range stands in for them.
        if self.runs.len() as u128 > (self.range.len() >> self.page.lg2()) / 2 + 1 {
            self.runs.clear();
            self.runs.push(self.range);
        }
    }
}
