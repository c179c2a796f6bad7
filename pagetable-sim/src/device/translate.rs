//! From an address to memory: the device's own TLB, the IOTLB, cached pointers to tables, the
//! table.
//!
//! ```text
//!  device TLB (ATS)  a miss is a translation request: for a write it sets D before the write
//!  IOTLB             a miss, or a write without D, is a walk
//!  tables            a walk begins at the lowest cached table, and sets no A above it
//! ```
//!
//! The IOTLB refills the device's TLB. So an invalidation reaches the IOTLB first. In the other
//! order, the device's TLB could drop an entry and take it back from the IOTLB before the IOTLB
//! drops it.

use dirtymap::{Access, Iova};

use super::Device;
use crate::error::{DmaError, FaultKind};
use crate::fault::Fault;
use crate::fmt::Format;
use crate::iotlb::{Cached, Iotlb};
use crate::table::Walk;

impl<F: Format> Device<F> {
    /// Asks for the translation of `iova` and caches it, as a device does ahead of its accesses. A
    /// prefetch for writing sets D, so the leaf is reported even if no write follows. Never waits.
    ///
    /// # Errors
    /// [`DmaError`] if the access would fault.
    pub fn prefetch(&mut self, iova: Iova, access: Access) -> Result<(), DmaError> {
        self.begin();
        self.translate(iova, access).map(|_| ())
    }

    /// Where `iova` lies in memory, if the device may do `wanted` there. Sets D for a write, unless
    /// a cached entry says that it is set.
    #[inline(always)]
    pub(super) fn translate(&mut self, iova: Iova, wanted: Access) -> Result<u64, DmaError> {
        let tracking = self.hardware.is_tracking();
        let (nearest, hits) = match &mut self.tlb {
            Some(tlb) => (tlb, &mut self.stats.tlb_hits),
            None => (&mut self.iotlb, &mut self.stats.iotlb_hits),
        };
        if let Some(entry) = usable(nearest, iova, wanted, tracking) {
            *hits += 1;
            return Ok(entry.phys(iova));
        }
        self.miss(iova, wanted, tracking)
    }

    /// Translates an address that misses in the nearest cache.
    #[inline(never)]
    fn miss(&mut self, iova: Iova, wanted: Access, tracking: bool) -> Result<u64, DmaError> {
        if self.tlb.is_none() {
            return Ok(self.walk(iova, wanted, tracking)?.phys(iova));
        }
        let entry = match usable(&mut self.iotlb, iova, wanted, tracking) {
            Some(entry) => {
                self.stats.iotlb_hits += 1;
                *entry
            }
            None => self.walk(iova, wanted, tracking)?,
        };
        if let Some(tlb) = &mut self.tlb {
            tlb.put(iova, entry);
        }
        Ok(entry.phys(iova))
    }

    /// Translates by the table and caches the translation; a fault is not cached.
    fn walk(&mut self, iova: Iova, wanted: Access, tracking: bool) -> Result<Cached, DmaError> {
        self.stats.iotlb_misses += 1;
        let sets_dirty = tracking && wanted.writes();
        let walk = Walk {
            iova,
            tracked: tracking,
            write: wanted.writes(),
        };
        let found = match &mut self.tables {
            None => self.hardware.table.walk_from(None, walk, None),
            Some(tables) => {
                let from = tables.lookup(iova).map(|table| &*table);
                self.stats.short_walks += u64::from(from.is_some());
                let found = self
                    .hardware
                    .table
                    .walk_from(from, walk, Some(&mut self.met));
                for table in self.met.drain(..) {
                    tables.insert(iova, table.span_lg2(), table);
                }
                found
            }
        };
        let leaf = found.map_err(|kind| self.fault(iova, kind))?;
        if wanted.writes() && !leaf.access.writes() {
            return Err(self.fault(iova, FaultKind::ReadOnly));
        }
        if wanted.reads() && !leaf.access.reads() {
            return Err(self.fault(iova, FaultKind::WriteOnly));
        }
        if sets_dirty && !leaf.dirty {
            self.stats.dirty_walks += 1;
            self.hardware.count_dirty_walk();
        }
        let dirty = leaf.dirty || sets_dirty || !tracking;
        let entry = Cached::new(&leaf, iova, self.largest_cached, dirty);
        self.iotlb.put(iova, entry);
        Ok(entry)
    }

    /// Counts and logs a blocked access.
    pub(super) fn fault(&mut self, iova: Iova, kind: FaultKind) -> DmaError {
        self.stats.faults += 1;
        let device = self.number();
        self.hardware.fault(Fault { device, iova, kind });
        DmaError { iova, kind }
    }
}

/// The entry for `iova` in `cache`, if it lets the device do `wanted` without a walk.
#[inline]
fn usable(cache: &mut Iotlb, iova: Iova, wanted: Access, tracking: bool) -> Option<&mut Cached> {
    let entry = cache.lookup(iova)?;
    // While tracking is off, hardware sets no D: the entry counts as dirty until the flush at the
    // end of enabling.
    entry.dirty |= !tracking;
    entry.serves(wanted).then_some(entry)
}
