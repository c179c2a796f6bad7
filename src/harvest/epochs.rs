//! The calls of a consumer that concern its epochs and bounds, and the cursor that holds an epoch.

use std::fmt;

use super::Consumer;
use crate::space::{AddressSpace, Bounds, Epoch, Party, Since};
use crate::sync::Arc;

/// A hold of one epoch of a consumer. For as long as it lives, [`Consumer::since`] knows the pages
/// that were committed after that epoch, within the [`Bounds`] of the consumer.
///
/// It takes memory in proportion to the pages that were committed after the epoch and before the
/// next epoch that has a cursor: 4 bytes for each run, and at most 4 KiB for 32768 pages. A clone
/// holds the same epoch, and takes no more memory. A cursor may live longer than its consumer.
///
/// ```
/// use dirtymap::harvest::{Since, Why};
/// use dirtymap::{Access, AddressSpace, Granule, Start};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let space = AddressSpace::tracked(Granule::K4);
/// space.map(0..1 << 20, 0, Access::ReadWrite)?;
/// let backup = space.consumer("backup", Start::Clean)?;
/// let cursor = backup.cursor();
/// let monday = cursor.epoch();
/// space.mark(0x3000..0x3001)?;
/// backup.rounds().next()?.commit();
/// assert!(matches!(backup.since(monday), Since::Runs(written) if written.runs().count() == 1));
///
/// drop(cursor); // the epoch is no longer held
/// assert!(matches!(backup.since(monday), Since::Everything(Why::Merged)));
/// # Ok(())
/// # }
/// ```
#[must_use = "a cursor that is dropped holds nothing"]
pub struct Cursor {
    party: Arc<Party>,
    epoch: Epoch,
}

impl Cursor {
    /// The epoch that it holds.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

impl Clone for Cursor {
    /// Another hold of the same epoch.
    fn clone(&self) -> Self {
        self.party.epochs.hold_again(self.epoch);
        Cursor {
            party: Arc::clone(&self.party),
            epoch: self.epoch,
        }
    }
}

impl fmt::Debug for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cursor")
            .field("consumer", &self.party.name())
            .field("epoch", &self.epoch)
            .finish()
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        self.party.epochs.release(self.epoch);
    }
}

impl Consumer<'_> {
    /// Its newest epoch: that of the lease that was committed last. Number 0 stands for the moment
    /// at which the consumer joined. Waits for a short lock that commits take as well.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Dirty)?;
    /// assert_eq!(backup.epoch().number(), 0);
    /// let (_, lineage) = backup.rounds().next()?.commit_epoch();
    /// assert_eq!(lineage.map(|lineage| lineage.epoch), Some(backup.epoch()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn epoch(&self) -> Epoch {
        self.member.epochs.newest()
    }

    /// A cursor on the newest epoch. If [parts](crate::Lease::commit_range) of leases that have not
    /// ended were committed, these parts become an epoch of their own first.
    ///
    /// Waits for a short lock that commits and aborts of this consumer take as well. No mark and no
    /// harvest waits for it.
    ///
    /// ```
    /// use dirtymap::harvest::Since;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start, ToIovaRange};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// let monday = backup.cursor();
    /// for page in [3, 5] {
    ///     space.mark(page << 12..(page << 12) + 1)?;
    ///     backup.rounds().next()?.commit(); // an epoch, and an increment
    /// }
    /// let Since::Runs(written) = backup.since(monday.epoch()) else {
    ///     return Ok(()); // copy everything
    /// };
    /// let runs: Vec<_> = written.runs().collect(); // one increment instead of two
    /// assert_eq!(runs, [(0x3000..0x4000).to_iova_range()?, (0x5000..0x6000).to_iova_range()?]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn cursor(&self) -> Cursor {
        let store = self.space.member(&self.member);
        let bounds = store.map_or_else(|| self.member.bounds(), |store| store.room());
        Cursor {
            party: Arc::clone(&self.member),
            epoch: self.member.epochs.hold(&bounds),
        }
    }

    /// The pages that this consumer has committed after `epoch`: the union of all increments in
    /// between. A copy of that epoch becomes a copy of [`to`](super::Written::to), if these pages
    /// are copied over it now.
    ///
    /// For the next call, hold the epoch of the copy by a [cursor](Self::cursor). If other threads
    /// commit leases of this consumer, take that cursor before this call, and store its epoch: a
    /// cursor that is taken after the call may hold a newer epoch than the copy has.
    ///
    /// Pages that are dirty and not committed are not included. To include every write up to now,
    /// harvest and commit first.
    ///
    /// The answer is known if a [cursor](Self::cursor) has held the epoch since it was the newest
    /// one, or if it is still the newest one. In each other case the result is
    /// [`Since::Everything`] with the reason, never a shorter list. It is no error.
    ///
    /// Takes time and memory in proportion to the result. Waits for a short lock that commits and
    /// aborts of this consumer take as well. No mark and no harvest waits for it.
    ///
    /// ```
    /// use dirtymap::harvest::{Since, Why};
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// let cursor = backup.cursor();
    /// let stored = cursor.epoch().to_string(); // beside the copy
    /// space.mark(0x3000..0x3001)?;
    /// backup.rounds().next()?.commit();
    ///
    /// match backup.since(stored.parse()?) {
    ///     Since::Runs(written) => {
    ///         assert_eq!(written.to(), backup.epoch());
    ///         for run in written.runs() {
    ///             println!("copy {run}"); // [0x3000, 0x3fff]
    ///         }
    ///     }
    ///     Since::Everything(why) => panic!("copy everything: {why:?}"),
    /// }
    /// let other = "0000000000000000000000000000002a-7".parse()?;
    /// assert!(matches!(backup.since(other), Since::Everything(Why::Foreign)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn since(&self, epoch: Epoch) -> Since {
        self.member.epochs.since(epoch)
    }

    /// The bounds of its memory, as [`set_bounds`](Self::set_bounds) set them.
    pub fn bounds(&self) -> Bounds {
        self.member.bounds()
    }

    /// Bounds the memory of its pending pages and its deltas, from the next harvest or commit on.
    ///
    /// If the pending pages are out of bounds, they are dropped, and everything that is mapped in
    /// the consumer's range becomes pending instead. Its next lease has all of that, once, and says
    /// so by its [`lineage`](crate::Lease::lineage). The first sync after that waits for the
    /// harvests that are running, and flushes all sources. The memory is freed by a later
    /// change of the space, when no older snapshot of the space is held.
    ///
    /// ```
    /// use dirtymap::harvest::Bounds;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let rare = space.consumer("rare", Start::Clean)?;
    /// rare.set_bounds(Bounds { bytes: 1000, ..Bounds::default() });
    /// space.mark(0x3000..0x3001)?;
    /// space.rounds().next()?.commit(); // leaves the page to `rare`: 4 KiB of bitmap
    /// assert_eq!(rare.rounds().next()?.commit().bits_set, 256); // everything
    /// assert_eq!(rare.rounds().next()?.commit().bits_set, 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_bounds(&self, bounds: Bounds) {
        self.member.set_bounds(bounds);
    }
}

impl AddressSpace {
    /// As [`Consumer::set_bounds`], for the unnamed consumer: when its pending pages were out of
    /// bounds, the next [`harvest`](Self::harvest) or round of [`rounds`](Self::rounds) reports
    /// everything, once. Has no effect before the first consumer [joined](Self::consumer), because
    /// the unnamed consumer has no pending pages until then.
    ///
    /// ```
    /// use dirtymap::harvest::Bounds;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// // All harvests of this program have names, so the unnamed consumer needs no memory.
    /// space.set_unnamed_bounds(Bounds { bytes: 0, ..Bounds::default() });
    /// space.mark(0x3000..0x3001)?;
    /// assert_eq!(backup.rounds().next()?.commit().bits_set, 1);
    /// assert_eq!(space.rounds().next()?.commit().bits_set, 256); // everything
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_unnamed_bounds(&self, bounds: Bounds) {
        if let Some(unnamed) = self.members().first() {
            unnamed.set_bounds(bounds);
        }
    }
}
