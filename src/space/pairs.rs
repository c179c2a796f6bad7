//! The pairs of areas, for calls that have a list of areas: what to do when it is too old.
//!
//! An attach or a detach that finds the pairs of an area closed has a list that is too old: the
//! area has gone or was cut. It looks at the tree again, from the first address of the area to its
//! last:
//!
//! ```text
//!  cut, unmap, batch (has the pairs of the whole)   attach, detach
//!  C1  publish the pieces, with these pairs         A1  publish the domain; say that it is leaving
//!  C2  close the pairs of the whole                 A2  lock the pairs of what the tree has at `from`
//!                                                       open: fill or empty; `from` := its last + 1
//!                                                       closed: look again
//! ```
//!
//! * *It ends.* `from` goes up with each area that is open. One that is closed left the tree at C1,
//!   before its lock was given back, so the next look at the tree finds another one there, or none:
//!   each look in vain is a change that another thread has completed.
//! * *Nothing is left out.* Take an address that an area held at A1, and that was not unmapped
//!   since. When `from` passes it, the area that holds it then is open and locked. A cut that comes
//!   later copies the pairs as A2 left them; one that came before has published the piece that A2
//!   finds. What was mapped after A1 is filled by its map, or finds the domain leaving (see
//!   [`attachment`](super::attachment)); if A2 comes across it as well, the record makes it once.
//! * *Nothing is left behind.* A piece that goes in the batch that cuts it out is never in the
//!   tree. What an attach had filled before the batch took the lock is in the pairs that the batch
//!   empties.

use super::attachment::Attachment;
use super::{AddressSpace, Area};
use crate::sync::{Arc, Step, performs};
use crate::units::IovaRange;

impl AddressSpace {
    /// All areas from now on, as a list, so that the snapshot does not keep memory alive while
    /// devices are waited for.
    pub(super) fn all_areas(&self) -> Vec<Arc<Area>> {
        let snapshot = self.areas.snapshot();
        snapshot
            .iter(IovaRange::ALL)
            .map(|entry| entry.to_arc())
            .collect()
    }

    /// Calls `visit` with `area` and the domains in which it is filled, under the lock of its
    /// pairs. If the area has gone or was cut, with all that is in its place instead: see the
    /// [module](self).
    pub(super) fn with_pairs<E>(
        &self,
        area: &Area,
        mut visit: impl FnMut(&Area, &mut Vec<Arc<Attachment>>) -> Result<(), E>,
    ) -> Result<(), E> {
        let whole = area.mapping.range;
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
                let Some(above) = area.mapping.range.last().checked_add(1) else {
                    break;
                };
                from = above;
            }
        }
        Ok(())
    }

    /// The lowest area of this moment in `range`.
    fn first_area(&self, range: IovaRange) -> Option<Arc<Area>> {
        let snapshot = self.areas.snapshot();
        snapshot.iter(range).next().map(|entry| entry.to_arc())
    }
}
