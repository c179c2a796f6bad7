//! A meter: how fast memory is written and where, and what a migration of it would take.
//!
//! The [`Meter`] is one more [consumer](crate::Consumer), so it disturbs no other one, and counts
//! every page that was written. Nothing is sampled. It reads no clock: the caller says how much
//! time has passed, which may be simulated.
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
/// It takes memory in proportion to what is dirty: some 100 bytes for each granule of
/// [heat](Self::by) that was ever written, and a bit for each page, once for each window of 1, 2,
/// 4, ... looks.
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
    /// A meter over what `consumer` is told. What was written `half_life` ago counts half in the
    /// rates, so it is the time in which they follow a change. With a half-life of zero they are
    /// those of the last look.
    ///
    /// The first look has what the consumer is told first: a consumer that begins
    /// [clean](crate::Start::Clean) measures from its join on.
    pub fn new(consumer: Consumer<'a>, half_life: Duration) -> Self {
        Meter {
            rounds: consumer.rounds(),
            consumer,
            heat: Heat::new(half_life, Granule::M2),
            growth: Growth::new(half_life),
            waiting: Duration::ZERO,
        }
    }

    /// Keeps the rates by `granule`, instead of by 2 MiB. Forgets the rates so far.
    #[must_use]
    pub fn by(mut self, granule: Granule) -> Self {
        self.heat = Heat::new(self.heat.half_life(), granule);
        self
    }

    /// Its consumer.
    pub fn consumer(&self) -> &Consumer<'a> {
        &self.consumer
    }

    /// Looks at what was written since the look before, `elapsed` ago, and returns how many bytes
    /// that is: whole pages, each counted once (pairs of bytes in a space of single bytes). Waits
    /// for devices to drain, as [`Lease::sync`](crate::Lease::sync) does, because a device marks a
    /// page again only after its caches were flushed.
    ///
    /// As in any harvest, a page may be found once more without a write: the rest of a larger leaf,
    /// or a page that a harvest of another consumer had in hand during the look before.
    ///
    /// Regular looks give the best predictions: one in a tenth of the time that the shortest round
    /// takes, or less often.
    ///
    /// # Errors
    /// Those of [`Rounds::next`]. Nothing is lost then: the next look counts the pages and the
    /// time. A space without areas has no error and no bytes.
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
        self.heat.look(runs(), elapsed);
        if let Some(lease) = lease {
            lease.commit();
        }
        Ok(bytes)
    }

    /// The maximal runs of pages that the last look found, in order. None before the first look.
    pub fn runs(&self) -> impl Iterator<Item = IovaRange> {
        self.growth.runs()
    }

    /// Bytes a second: pages that a look found, over the time between looks, with decay. A page
    /// that is written several times between two looks counts once. 0 before any time has passed.
    pub fn rate(&self) -> f64 {
        self.heat.rate()
    }

    /// The same for the bytes of `range`, such as an area. Exact if it is made of whole
    /// [granules](Self::by); a granule that it covers in part counts by the share of its bytes.
    pub fn rate_of(&self, range: IovaRange) -> f64 {
        self.heat.rate_of(range)
    }

    /// The same for each granule that was ever written, in ascending order.
    pub fn rates(&self) -> impl Iterator<Item = (IovaRange, f64)> {
        self.heat.rates()
    }

    /// `runs` with those that are written least first: a migration that sends and commits these,
    /// and aborts the rest of the lease, sends what is hot once, at the end, and not in each round.
    /// Runs are cut at borders of granules of different heat. Equal heat stays in ascending order.
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

    /// The bytes that are written within `time`, each page once: what a round of a migration that
    /// takes so long leaves to the next one. Measured over windows of 1, 2, 4, ... looks, with
    /// decay; between two windows and above the longest one by a straight line.
    pub fn dirty_within(&self, time: Duration) -> u64 {
        // Saturates.
        self.growth.within(time.as_secs_f64()).round() as u64
    }

    /// What a migration by `plan` would take, if memory is written as it was.
    pub fn predict(&self, plan: &Plan) -> Prediction {
        predict::predict(plan, |time| self.growth.within(time))
    }
}
