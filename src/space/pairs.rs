//! The pairs of areas, for a call with a list of areas that may be out of date.
//!
//! An attach or a detach that finds the pairs of an area closed has an old list: the area has left
//! the tree or was cut. It looks at the tree again, from the first address of the area to its last:
//!
//! ```text
//!  cut, unmap, batch (holds the pairs of the whole)  attach, detach
//!  C1  publish the pieces, with these pairs          A1  publish the domain, or that it is leaving
//!  C2  close the pairs of the whole                  A2  lock the pairs of the area at `from`
//!                                                        open: fill or empty it;
//!                                                              `from` := its last address + 1
//!                                                        closed: look at the tree again
//! ```
//!
//! * *It ends.* `from` grows with each area that is open. An area that is closed left the tree at
//!   C1, before its lock was released, so the next look at the tree finds another area there, or
//!   none. Each look in vain is a change that another thread has completed.
//! * *Nothing is left out.* Take an address that an area held at A1, and that was not unmapped
//!   since. When `from` passes it, the area that holds it at that time is open and locked. A cut
//!   that comes later copies the pairs as A2 left them; a cut that came before has published the
//!   piece that A2 finds. An area that was mapped after A1 is filled by its own map, or that map
//!   finds the domain leaving (see [`attachment`](super::attachment)). If A2 meets such an area as
//!   well, the list of its pairs ensures that it is filled once.
//! * *No translation is left over.* A piece that is cut out and unmapped by the same batch is never
//!   in the tree. If an attach filled the whole before the batch took the lock, the domain is in
//!   the pairs that the batch empties.

use super::domain::Attachment;
use super::{AddressSpace, Area};
use crate::sync::{Arc, Step, performs};
use crate::units::IovaRange;

impl AddressSpace {
    /// The areas of this moment as a list, so that no snapshot holds back memory while the caller
    /// waits for devices.
    pub(super) fn all_areas(&self) -> Vec<Arc<Area>> {
        let snapshot = self.areas.snapshot();
        snapshot
            .iter(IovaRange::ALL)
            .map(|entry| entry.to_arc())
            .collect()
    }

    /// Calls `visit` with `area` and the domains into which it is filled, under the lock of its
    /// pairs. If the area has left the tree or was cut, calls it with all areas that are in its
    /// place: see the [module](self).
    pub(super) fn with_pairs<E>(
        &self,
        area: &Area,
        mut visit: impl FnMut(&Area, &mut Box<[Arc<Attachment>]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let whole = area.range();
        if let Some(filled) = &mut *area.pairs() {
            return visit(area, filled);
        }
        let mut from = whole.start();
        while performs(Step::LookAgain)
            && let Ok(rest) = IovaRange::new(from, whole.last())
            && let Some(area) = self.first_area(rest)
        {
            if let Some(filled) = &mut *area.pairs() {
                visit(&area, filled)?;
                let Some(above) = area.range().last().checked_add(1) else {
                    break;
                };
                from = above;
            }
        }
        Ok(())
    }

    /// The lowest area in `range` at this moment.
    fn first_area(&self, range: IovaRange) -> Option<Arc<Area>> {
        let snapshot = self.areas.snapshot();
        snapshot.iter(range).next().map(|entry| entry.to_arc())
    }
}
