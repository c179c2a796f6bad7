//! Unmap: claim, empty the sources, flush, and only then give the addresses free.
//!
//! ```text
//!  claim all ----> for each area: end its translations, owe, move D to the marks ----> flush ----> out of the tree
//!    |                                                                                  |              |
//!    +-- one is busy: give back                    it fails: owe again, give back <-----+              v
//!                                                                                       take and count the marks
//! ```
//!
//! What was dirty in a source moves to the area's marks, behind the debt, as in an abort. So if the flush fails, the area is
//! still there and its pages are still dirty; if it succeeds, the marks are all that there is to discard.
//!
//! # The last mark
//! A mark may come while the area goes. Both sides have a fence between their two steps:
//!
//! ```text
//!  marker                                     unmap
//!  M1  set the mark (it was clear)            U1  state := gone
//!  F3  fence(SeqCst)                          F4  fence(SeqCst)
//!  M2  look at the state                      U2  take the marks and count them
//! ```
//!
//! Either F3 or F4 comes first in the one order of all SeqCst fences:
//! - if F3 does, U2 sees the mark of M1: it is counted as discarded;
//! - if F4 does, M2 sees that the area is gone: the mark is an error, and counted as outside.
//!
//! A marker that finds the page marked already (no M1) leaves it to the one who marked it.

use super::{AddressSpace, Area};
use crate::error::Error;
use crate::flush::FlushGather;
use crate::sync::{Arc, Ordering, Step, fence, performs};
use crate::units::IovaRange;

/// What [`AddressSpace::unmap_discarding`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    /// Areas that were removed.
    pub areas: u64,
    /// Their bytes.
    pub bytes: u128,
    /// Bytes of dirty pages that went with them.
    pub discarded_bytes: u128,
}

impl AddressSpace {
    /// Unmaps every area inside `range` and **discards** what was dirty in them. All or nothing; holes in `range` are
    /// fine.
    ///
    /// Waits for the flush, so that on return no device reaches the memory and its addresses can be mapped again.
    ///
    /// # Errors
    /// [`Error::NothingMapped`]; [`Error::PartOfArea`] if an area sticks out of `range`; [`Error::Busy`] if another
    /// call maps or unmaps one of them. Nothing is unmapped then. If a source cannot flush: its error; the areas keep
    /// their addresses and what is dirty in them, although devices can no longer reach their memory by new
    /// translations, and the call can be repeated.
    pub fn unmap_discarding(&self, range: IovaRange) -> Result<Unmapped, Error> {
        let areas = self.whole_areas(range)?;
        let mut claimed = Claimed::new(self, &areas)?;
        let mut ticket = None;
        for area in &areas {
            let mut gather = FlushGather::new();
            let mut dirty = Vec::new();
            for source in &self.sources {
                source.unmap(area.mapping.range, &mut gather, &mut |leaf| {
                    append(&mut dirty, leaf);
                });
            }
            // The debt first, then the pages.
            ticket = Some(self.flush.owe(&gather));
            for run in dirty {
                area.marks.mark(run);
            }
        }
        if let Some(ticket) = ticket {
            self.flush.wait(ticket, |gather| self.invalidate(gather))?;
        }
        self.remove(&areas);
        claimed.removed = true;
        let mut unmapped = Unmapped::default();
        for area in &areas {
            unmapped.areas += 1;
            unmapped.bytes += area.mapping.range.len();
            unmapped.discarded_bytes += u128::from(area.marks.clear()) << self.page().lg2();
        }
        self.counters.discarded(unmapped.discarded_bytes);
        Ok(unmapped)
    }

    /// The areas inside `range`, one at least, none of which sticks out.
    fn whole_areas(&self, range: IovaRange) -> Result<Vec<Arc<Area>>, Error> {
        let mut areas = Vec::new();
        for entry in self.snapshot().iter(range) {
            if !range.covers(entry.range) {
                return Err(Error::PartOfArea {
                    range,
                    area: entry.range,
                });
            }
            areas.push(entry.to_arc());
        }
        if areas.is_empty() {
            return Err(Error::NothingMapped { range });
        }
        Ok(areas)
    }

    /// Takes areas that this thread owns out of the tree, in one step.
    pub(super) fn remove(&self, areas: &[Arc<Area>]) {
        let removed: Result<(), std::convert::Infallible> = self.areas.update(|edit| {
            for area in areas {
                edit.remove(area.mapping.range.start());
            }
            Ok(())
        });
        match removed {
            Ok(()) => areas.iter().for_each(|area| area.retire()),
        }
        if performs(Step::GoneFence) {
            // SeqCst: F4 of the module's protocol; pairs with F3 in `Marks::mark_inside`.
            fence(Ordering::SeqCst);
        }
    }
}

/// Areas that this thread is unmapping. Dropped before they are removed, it gives them back.
struct Claimed<'a> {
    space: &'a AddressSpace,
    areas: &'a [Arc<Area>],
    removed: bool,
}

impl<'a> Claimed<'a> {
    /// Claims all of `areas` or none.
    fn new(space: &'a AddressSpace, areas: &'a [Arc<Area>]) -> Result<Self, Error> {
        for (claimed, area) in areas.iter().enumerate() {
            if let Err(busy) = area.claim() {
                areas[..claimed].iter().for_each(|area| area.give_back());
                return Err(busy);
            }
        }
        Ok(Claimed {
            space,
            areas,
            removed: false,
        })
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        // The flush failed, or a source panicked, and with it may have gone what it had gathered: owe all of it.
        let mut gather = FlushGather::new();
        for area in self.areas {
            gather.add(area.mapping.range, self.space.page());
        }
        let _ = self.space.flush.owe(&gather);
        self.areas.iter().for_each(|area| area.give_back());
    }
}

/// Adds `leaf` to ascending `runs`, to the last one if they touch.
fn append(runs: &mut Vec<IovaRange>, leaf: IovaRange) {
    if let Some(last) = runs.last_mut()
        && last.last().checked_add(1) == Some(leaf.start())
        && let Ok(joined) = IovaRange::new(last.start(), leaf.last())
    {
        *last = joined;
    } else {
        runs.push(leaf);
    }
}
