//! A meter: how fast memory is written and where, and what a migration of it would take.
//!
//! A [`Meter`] is one more [consumer](crate::Consumer). So it takes nothing from other consumers,
//! and counts every page that was written, without sampling. It reads no clock: the caller passes
//! the elapsed time, which may be simulated.
//!
//! ```
//! use dirtymap::meter::{Meter, Plan};
//! use dirtymap::{Access, AddressSpace, Granule, Start};
//! use std::num::NonZeroU64;
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), dirtymap::Error> {
//! let space = AddressSpace::tracked(Granule::K4);
//! space.map(0..64 << 20, 0, Access::ReadWrite)?;
//! let mut meter = Meter::new(space.consumer("rate", Start::Clean)?, Duration::from_secs(10));
//! for _ in 0..8 {
//!     space.mark(0..1 << 20)?; // the same MiB, each second
//!     assert_eq!(meter.look(Duration::from_secs(1))?, 1 << 20);
//! }
//! assert!((meter.rate() / f64::from(1 << 20) - 1.0).abs() < 1e-9); // bytes a second
//! assert_eq!(meter.dirty_within(Duration::from_secs(4)), 1 << 20); // the same MiB
//!
//! let link = NonZeroU64::new(32 << 20).unwrap_or(NonZeroU64::MIN);
//! let migration = meter.predict(&Plan::new(64 << 20, link, Duration::from_millis(50)));
//! assert_eq!((migration.rounds, migration.converges), (2, true));
//! # Ok(())
//! # }
//! ```

mod growth;
mod heat;
mod predict;

use std::time::Duration;

use crate::error::Error;
use crate::harvest::{Consumer, Rounds};
use crate::units::{Granule, IovaRange};

use growth::Growth;
use heat::Heat;
pub use predict::{Plan, Prediction};

/// Measures what is written, as a consumer of its own: see the [module](self).
///
/// It takes some 100 bytes of memory for each [granule](Self::by) of its rates that was ever
/// written, and for each window of 1, 2, 4, ... looks a bit for each page that was written within
/// the window.
#[derive(Debug)]
pub struct Meter<'a> {
    consumer: Consumer<'a>,
    rounds: Rounds<'a>,
    heat: Heat,
    growth: Growth,
    /// The time that no look has covered, because the last ones failed.
    waiting: Duration,
}

impl<'a> Meter<'a> {
    /// A meter over the range of `consumer`. A write that is `half_life` old counts half in the
    /// rates. So a short half-life makes the rates follow a change quickly. With a half-life of
    /// zero, the rates are those of the last look.
    ///
    /// The first look includes the pages that are dirty for the consumer at its join. So begin it
    /// [clean](crate::Start::Clean), to measure writes alone.
    pub fn new(consumer: Consumer<'a>, half_life: Duration) -> Self {
        Meter {
            rounds: consumer.rounds(),
            consumer,
            heat: Heat::new(half_life, Granule::M2),
            growth: Growth::new(half_life),
            waiting: Duration::ZERO,
        }
    }

    /// Keeps the rates by `granule`, instead of by 2 MiB. A larger page of the space takes the
    /// place of both. Forgets the rates so far.
    #[must_use]
    pub fn by(mut self, granule: Granule) -> Self {
        self.heat = self.heat.by(granule);
        self
    }

    /// Its consumer.
    pub fn consumer(&self) -> &Consumer<'a> {
        &self.consumer
    }

    /// Harvests the pages that were written since the look before, and returns their bytes. A page
    /// that was written several times counts once. `elapsed` is the time since the look before. In
    /// a space with pages of one byte, pairs of bytes are counted.
    ///
    /// Waits for devices to drain, as [`Lease::sync`](crate::Lease::sync) does, because a device
    /// sets a dirty bit again only after its caches were flushed.
    ///
    /// As in any harvest, a page may be found once more without a write: the rest of a larger leaf,
    /// or a page that was in flight in a harvest of another consumer during the look before.
    ///
    /// Regular looks give the best predictions. An interval of a tenth of the shortest round of the
    /// migration is short enough.
    ///
    /// ```
    /// # use dirtymap::meter::Meter;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # use std::time::Duration;
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..64 << 20, 0, Access::ReadWrite)?;
    /// # let rate = space.consumer("rate", Start::Clean)?;
    /// # let mut meter = Meter::new(rate, Duration::from_secs(10));
    /// assert_eq!(meter.look(Duration::from_secs(1))?, 0);
    /// space.mark(0x3fff..0x4001)?;
    /// assert_eq!(meter.look(Duration::from_secs(1))?, 0x2000); // two pages
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`Rounds::next`]. Then nothing is lost: the next look counts the pages and the
    /// time. In a space without areas the result is 0, and no error.
    pub fn look(&mut self, elapsed: Duration) -> Result<u64, Error> {
        self.waiting = self.waiting.saturating_add(elapsed);
        let lease = match self.rounds.next() {
            Ok(lease) => Some(lease),
            Err(Error::NothingMapped { .. }) => None,
            Err(error) => return Err(error),
        };
        let elapsed = std::mem::take(&mut self.waiting);
        let runs = || lease.iter().flat_map(crate::harvest::Lease::runs);
        let granule = lease.as_ref().map(crate::harvest::Lease::granule);
        let bytes = self.growth.look(runs(), granule, elapsed)?;
        self.heat.look(runs(), granule, elapsed);
        if let Some(lease) = lease {
            lease.commit();
        }
        Ok(bytes)
    }

    /// The maximal runs of pages that the last look found, in order. None before the first look.
    pub fn runs(&self) -> impl Iterator<Item = IovaRange> {
        self.growth.runs()
    }

    /// The dirty rate in bytes a second, with decay: the bytes of the looks over their time. A page
    /// that is written several times between two looks counts once. 0 before any time has passed.
    pub fn rate(&self) -> f64 {
        self.heat.rate()
    }

    /// The [`rate`](Self::rate) of `range`, such as an area. It is exact if `range` consists of
    /// whole [granules](Self::by). A granule that `range` covers in part counts by the share of its
    /// bytes.
    ///
    /// ```
    /// # use dirtymap::ToIovaRange;
    /// # use dirtymap::meter::Meter;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # use std::time::Duration;
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..64 << 20, 0, Access::ReadWrite)?;
    /// # let rate = space.consumer("rate", Start::Clean)?;
    /// # let mut meter = Meter::new(rate, Duration::from_secs(10));
    /// space.mark(0..1 << 20)?;
    /// meter.look(Duration::from_secs(1))?;
    /// assert!((meter.rate_of((0..2 << 20).to_iova_range()?) - 1_048_576.0).abs() < 0.1);
    /// assert_eq!(meter.rate_of((2 << 20..64 << 20).to_iova_range()?), 0.0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn rate_of(&self, range: IovaRange) -> f64 {
        self.heat.rate_of(range)
    }

    /// The rate of each [granule](Self::by) that was ever written, in ascending order of addresses.
    ///
    /// ```
    /// # use dirtymap::meter::Meter;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # use std::time::Duration;
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..64 << 20, 0, Access::ReadWrite)?;
    /// # let rate = space.consumer("rate", Start::Clean)?;
    /// # let mut meter = Meter::new(rate, Duration::from_secs(10));
    /// space.mark(6 << 20..7 << 20)?;
    /// meter.look(Duration::from_secs(1))?;
    /// let hottest = meter.rates().max_by(|one, other| one.1.total_cmp(&other.1));
    /// assert_eq!(hottest.map(|(range, _)| range.start().get()), Some(6 << 20));
    /// # Ok(())
    /// # }
    /// ```
    pub fn rates(&self) -> impl Iterator<Item = (IovaRange, f64)> {
        self.heat.rates()
    }

    /// `runs` in ascending order of their rates. A migration can send and commit the runs with low
    /// rates, and abort the rest of the lease. Then pages with high rates are sent once, at the
    /// end, and not in each round. Runs are cut where the rate of the granule changes. Runs of
    /// equal rates stay in ascending order of addresses.
    /// Costs a step for each run, and for each granule of it that was ever written.
    ///
    /// ```
    /// # use dirtymap::meter::Meter;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # use std::time::Duration;
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..64 << 20, 0, Access::ReadWrite)?;
    /// # let rate = space.consumer("rate", Start::Clean)?;
    /// # let mut meter = Meter::new(rate, Duration::from_secs(10));
    /// space.mark(0..1 << 20)?;
    /// meter.look(Duration::from_secs(1))?;
    /// space.mark(0..4 << 20)?;
    /// let lease = space.rounds().next()?;
    /// for run in meter.coldest_first(lease.runs()) {
    ///     if meter.rate_of(run) < 100_000.0 {
    ///         // send it, then
    ///         lease.commit_range(run);
    ///     }
    /// }
    /// # let first = meter.coldest_first(lease.runs())[0];
    /// # assert_eq!(first.start().get(), 2 << 20);
    /// # assert_eq!(lease.abort().bytes, 2 << 20);
    /// # Ok(())
    /// # }
    /// ```
    pub fn coldest_first(&self, runs: impl IntoIterator<Item = IovaRange>) -> Vec<IovaRange> {
        self.heat.coldest_first(runs)
    }

    /// The bytes of the different pages that are written within `time`: if a round of a migration
    /// takes that time, the next round has to send these bytes. Measured over windows of 1, 2, 4,
    /// ... looks, with decay. Times between two windows, and above the longest one, are
    /// interpolated by a straight line. 0 before the first look.
    ///
    /// ```
    /// # use dirtymap::meter::Meter;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # use std::time::Duration;
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..64 << 20, 0, Access::ReadWrite)?;
    /// # let rate = space.consumer("rate", Start::Clean)?;
    /// # let mut meter = Meter::new(rate, Duration::from_secs(10));
    /// for _ in 0..8 {
    ///     space.mark(0..1 << 20)?; // the same MiB, each second
    ///     meter.look(Duration::from_secs(1))?;
    /// }
    /// assert_eq!(meter.dirty_within(Duration::from_secs(8)), 1 << 20);
    /// # Ok(())
    /// # }
    /// ```
    pub fn dirty_within(&self, time: Duration) -> u64 {
        // Saturates.
        self.growth.within(time.as_secs_f64()).round() as u64
    }

    /// The rounds, the time and the downtime of a migration by `plan`, if memory is written in the
    /// future as it was during the looks. Before the first look, the prediction is that nothing is
    /// written.
    ///
    /// ```
    /// # use dirtymap::meter::Plan;
    /// # use std::num::NonZeroU64;
    /// # use dirtymap::meter::Meter;
    /// # use dirtymap::{Access, AddressSpace, Granule, Start};
    /// # use std::time::Duration;
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..64 << 20, 0, Access::ReadWrite)?;
    /// # let rate = space.consumer("rate", Start::Clean)?;
    /// # let mut meter = Meter::new(rate, Duration::from_secs(10));
    /// space.mark(0..64 << 20)?; // all of the memory, each second
    /// meter.look(Duration::from_secs(1))?;
    /// let link = NonZeroU64::new(32 << 20).unwrap_or(NonZeroU64::MIN); // 32 MiB a second
    /// let migration = meter.predict(&Plan::new(64 << 20, link, Duration::from_millis(50)));
    /// assert!(!migration.converges); // slow the machine down, or stop it for 2 seconds
    /// assert_eq!(migration.downtime, Duration::from_secs(2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn predict(&self, plan: &Plan) -> Prediction {
        predict::predict(plan, |time| self.growth.within(time))
    }
}
