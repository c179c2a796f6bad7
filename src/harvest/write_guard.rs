//! Writes that take long: their pages are dirty from before they begin until after they end.

use crate::error::Error;
use crate::marks::FlightSlot;
use crate::space::AddressSpace;
use crate::sync::{Step, performs};
use crate::units::{IovaRange, ToIovaRange};

/// A write in flight. While it lives, every harvest and peek reports its pages, and they stay
/// dirty; when it is dropped, the write is done and its pages are marked.
///
/// For writes that others perform, such as an asynchronous read of a disk into guest memory: with
/// [`mark`](AddressSpace::mark) alone, the program that submits them would have to mark at the
/// completion, on every path.
///
/// ```
/// # use dirtymap::{Access, AddressSpace, Granule, Iova, IovaRange};
/// # fn main() -> Result<(), dirtymap::Error> {
/// # let space = AddressSpace::new(Granule::K4);
/// # let ram = IovaRange::from_len(Iova::MIN, 1 << 20)?;
/// # space.map(ram, 0, Access::ReadWrite)?;
/// let guard = space.begin_write(IovaRange::from_len(Iova::new(0x2000), 512)?)?;
/// // Submit the read; harvests report page 2 from here on, whatever they clear.
/// drop(guard); // when it has completed
/// # Ok(())
/// # }
/// ```
#[must_use = "the write is in flight only while the guard lives"]
#[derive(Debug)]
pub struct WriteGuard<'a> {
    space: &'a AddressSpace,
    slot: &'a FlightSlot,
    range: IovaRange,
}

impl WriteGuard<'_> {
    /// The pages that are being written.
    pub fn range(&self) -> IovaRange {
        self.range
    }
}

impl AddressSpace {
    /// Declares that a write to `range` is about to begin. It is in flight until the guard is
    /// dropped. A page that `range` touches in part counts as a whole.
    ///
    /// Lock-free. Allocates only when more writes are in flight than ever before in this space.
    /// Every harvest looks at each of them once for each area, so this is meant for some tens at a
    /// time.
    ///
    /// If an area of the range is unmapped meanwhile, the drop of the guard counts in
    /// [`SpaceStats::outside_marks`](crate::space::SpaceStats::outside_marks).
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let write = space.begin_write(0x3000..0x4000)?; // then submit it
    /// assert_eq!(space.rounds().next()?.commit().bits_set, 1); // it may be half done
    /// drop(write); // when it has completed
    /// assert_eq!(space.rounds().next()?.commit().bits_set, 1); // all of it
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Outside`] with the first address that no area holds. Nothing is in flight then, and
    /// the call is counted in
    /// [`SpaceStats::outside_marks`](crate::space::SpaceStats::outside_marks).
    pub fn begin_write(&self, range: impl ToIovaRange) -> Result<WriteGuard<'_>, Error> {
        let range = range.to_iova_range()?;
        if let Some(at) = self.snapshot().contiguous(range).find_map(Result::err) {
            let bytes = range.last().get() - at.get();
            self.report_outside_mark(at, bytes.saturating_add(1));
            return Err(Error::Outside { at });
        }
        let range = range.round_out(self.page());
        Ok(WriteGuard {
            space: self,
            slot: self.in_flight.publish(range),
            range,
        })
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        let early = !performs(Step::MarkBeforeFree);
        if early {
            self.slot.free();
        }
        // The mark first, then the slot: one of the two always names the pages. See
        // `marks::in_flight`.
        let _ = self.space.mark(self.range);
        if !early {
            self.slot.free();
        }
    }
}
