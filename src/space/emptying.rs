//! Ends translations: owe, then mark what was dirty; and what that means of a source that panics.

use super::AddressSpace;
use super::attachment::Attachment;
use crate::failure::{Failure, Panic, attempt, call, keep_first};
use crate::flush::{FlushGather, Ticket};
use crate::source::Marks;
use crate::sync::{Step, performs};
use crate::units::{Granule, IovaRange};

impl AddressSpace {
    /// Ends the translations of `range` in `attachment`, owes their flush, and marks in `marks`
    /// what was dirty. If the source panics, that is all of `range`: it may have taken a leaf and
    /// told nobody.
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
        // The debt first, then the pages: see "Why no write is lost" in the module `harvest`.
        let ticket = if performs(Step::OweBeforePutBack) {
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

    /// Owes all that the source may have touched in `range` before it panicked: leaves of any size,
    /// and tables.
    pub(super) fn owe_all_of(
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

    /// Waits for the flush of what was emptied, unless a source has panicked.
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

/// What emptying came to.
#[derive(Default)]
pub(super) struct Emptied {
    /// The last one of what is owed, if anything was emptied.
    pub(super) ticket: Option<Ticket>,
    /// The first of the sources that panicked, each of which is asked again when the call is
    /// repeated.
    pub(super) panic: Option<Panic>,
}

impl Emptied {
    /// Adds what was emptied later.
    pub(super) fn add(&mut self, later: Emptied) {
        self.ticket = later.ticket.or(self.ticket);
        if let Some(panic) = later.panic {
            keep_first(&mut self.panic, panic);
        }
    }
}

/// What an unmap tells of, as runs of whole pages inside its range.
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

    /// Adds `leaf`, as far as it lies in the range; to the last run if they touch.
    fn add(&mut self, leaf: IovaRange) {
        let Some(part) = leaf.intersection(self.range) else {
            return;
        };
        let part = part.round_out(self.page);
        if let Some(last) = self.runs.last_mut()
            && last.start() <= part.start()
            && (last.intersects(part) || last.last().checked_add(1) == Some(part.start()))
        {
            *last = last.hull(part);
            return;
        }
        self.runs.push(part);
        // In ascending order, runs that do not touch are no more than half of the pages.
        if self.runs.len() as u128 > (self.range.len() >> self.page.lg2()) / 2 + 1 {
            self.runs.clear();
            self.runs.push(self.range);
        }
    }
}
