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

use super::area::Pairs;
use super::{AddressSpace, Area};
use crate::error::Error;
use crate::flush::FlushGather;
use crate::sync::{Arc, MutexGuard, Ordering, Step, fence, performs};
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
        let mut claimed = Claimed::new(&areas)?;
        // SeqCst: F6 of the protocol in `attachment`; pairs with F5 in `put_back`.
        fence(Ordering::SeqCst);
        // Held to the end, so that nobody fills a domain with an area that goes.
        let mut pairs: Vec<_> = areas.iter().map(|area| area.pairs()).collect();
        self.empty_areas(&areas, &mut pairs)?;
        self.remove(&areas);
        claimed.removed = true;
        pairs.iter_mut().for_each(|pairs| **pairs = None);
        let mut unmapped = Unmapped::default();
        for area in &areas {
            let range = area.mapping.range;
            unmapped.areas += 1;
            unmapped.bytes += range.len();
            unmapped.discarded_bytes += u128::from(area.marks.clear(range)) << self.page().lg2();
        }
        self.counters.discarded(unmapped.discarded_bytes);
        Ok(unmapped)
    }

    /// Ends all translations of `areas`, flushes, and has what is dirty in them in their marks.
    fn empty_areas(
        &self,
        areas: &[Arc<Area>],
        pairs: &mut [MutexGuard<'_, Pairs>],
    ) -> Result<(), Error> {
        let mut ticket = self.flush.owe(&FlushGather::new());
        for (area, filled) in areas.iter().zip(pairs) {
            while let Some(domain) = filled.as_ref().and_then(|filled| filled.last().cloned()) {
                let (owed, dirty) = self.empty(&domain, area.mapping.range);
                ticket = owed;
                dirty.into_iter().for_each(|run| domain.kept.mark(run));
                // Only now: a source that panics is asked again.
                filled.as_mut().and_then(Vec::pop);
            }
        }
        if performs(Step::FlushBeforeReuse) {
            self.flush_until(ticket)?;
        }
        let domains = self.attachments();
        for area in areas {
            for domain in domains.iter() {
                let kept = domain.kept.take_runs(area.mapping.range);
                kept.into_iter().for_each(|run| area.marks.mark(run));
            }
        }
        Ok(())
    }

    /// Undoes the map of an area that is not live, whose range some domains have been filled with.
    pub(super) fn take_out(&self, area: &Arc<Area>) -> Result<(), Error> {
        let mut pairs = [area.pairs()];
        self.empty_areas(std::slice::from_ref(area), &mut pairs)?;
        self.remove(std::slice::from_ref(area));
        *pairs[0] = None;
        Ok(())
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
            // SeqCst: F4 of the module's protocol; pairs with F3 in `Marks::mark`.
            fence(Ordering::SeqCst);
        }
    }
}

/// Areas that this thread is unmapping. Dropped before they are removed, it gives them back.
struct Claimed<'a> {
    areas: &'a [Arc<Area>],
    removed: bool,
}

impl<'a> Claimed<'a> {
    /// Claims all of `areas` or none.
    fn new(areas: &'a [Arc<Area>]) -> Result<Self, Error> {
        for (claimed, area) in areas.iter().enumerate() {
            if let Err(busy) = area.claim() {
                areas[..claimed].iter().for_each(|area| area.give_back());
                return Err(busy);
            }
        }
        Ok(Claimed {
            areas,
            removed: false,
        })
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if !self.removed {
            self.areas.iter().for_each(|area| area.give_back());
        }
    }
}
