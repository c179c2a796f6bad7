//! What a consumer says about its epochs, and what holds one of them.

use std::fmt;

use super::Consumer;
use crate::space::{AddressSpace, Bounds, Epoch, Party, Since};
use crate::sync::Arc;

/// Holds an epoch of a consumer: [`Consumer::since`] can tell what was written after it, for as
/// long as this lives.
///
/// It costs memory in proportion to the pages that were committed after the epoch and before the
/// next one that has a cursor: 4 bytes for each run, and at most 4 KiB for 32768 pages. See
/// [`Bounds`].
#[must_use = "a cursor that is dropped holds nothing"]
pub struct Cursor {
    party: Arc<Party>,
    epoch: Epoch,
}

impl Cursor {
    /// The epoch.
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
    /// at which it joined.
    pub fn epoch(&self) -> Epoch {
        self.member.epochs.newest()
    }

    /// A cursor on the newest epoch. If parts of leases that have not ended
    /// [were committed](crate::Lease::commit_range), they become an epoch of their own first.
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

    /// The pages that this consumer has committed after `epoch`: a copy of that epoch becomes one
    /// of the newest epoch if they are copied now. The union of all increments in between.
    ///
    /// What is dirty and not committed is in none of them. Harvest and commit first, to have
    /// everything that was written before.
    ///
    /// The epoch is known if a [cursor](Self::cursor) has held it ever since it was the newest one,
    /// or if it is the newest one still. In each other case the answer is
    /// [`Since::Everything`], never a shorter list.
    ///
    /// Costs time in proportion to the pages of the answer, and allocates that much.
    pub fn since(&self, epoch: Epoch) -> Since {
        self.member.epochs.since(epoch)
    }

    /// How much it may hold.
    pub fn bounds(&self) -> Bounds {
        self.member.bounds()
    }

    /// Changes how much it may hold, from the next harvest or commit on.
    ///
    /// The pending pages of a consumer that holds too much are dropped, and everything that is
    /// mapped in its range becomes pending instead. Its next lease says so by its
    /// [`lineage`](crate::Lease::lineage), once; the sync of a lease that has such pages waits for
    /// the harvests that are running, and flushes all sources. Memory goes with a later change of
    /// the space, when no snapshot of it is held that is older.
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
    /// As [`Consumer::set_bounds`], for the unnamed consumer: [`harvest`](Self::harvest) and
    /// [`rounds`](Self::rounds) tell everything once after it held too much. Changes nothing before
    /// the first consumer [joined](Self::consumer), because nothing is left to it until then.
    pub fn set_unnamed_bounds(&self, bounds: Bounds) {
        if let Some(unnamed) = self.members().first() {
            unnamed.set_bounds(bounds);
        }
    }
}
