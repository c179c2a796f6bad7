//! The flushes of a space: all sources are invalidated together, when a thread waits or when the
//! debt is due.

use std::time::Instant;

use super::AddressSpace;
use crate::error::Error;
use crate::events;
use crate::flush::{FlushGather, FlushPolicy, Invalidated, Ticket};

impl AddressSpace {
    /// Sets the bounds at which a debt is due although no thread waits for it, such as the debt of
    /// leases that were dropped. Without this there are no bounds, and the next call that waits
    /// pays.
    ///
    /// ```
    /// # use dirtymap::{AddressSpace, FlushPolicy, Granule};
    /// # use std::time::Duration;
    /// let policy = FlushPolicy {
    ///     max_age: Some(Duration::from_millis(10)),
    ///     ..FlushPolicy::default()
    /// };
    /// let space = AddressSpace::new(Granule::K4).with_flush_policy(policy);
    /// assert_eq!(space.flush_deadline(), None); // nothing is owed yet
    /// ```
    #[must_use]
    pub fn with_flush_policy(mut self, policy: FlushPolicy) -> Self {
        self.flush.set_policy(policy);
        self
    }

    /// When the oldest pending debt reaches the greatest age of the [`FlushPolicy`]; `None` if
    /// nothing is pending, or age is no bound.
    pub fn flush_deadline(&self) -> Option<Instant> {
        self.flush.deadline()
    }

    /// Flushes if the debt reaches a bound of the [`FlushPolicy`] at the time `now`. Returns
    /// whether it did. Call it from a timer, or after leases were dropped. Waits for devices.
    ///
    /// # Errors
    /// The error of a source that could not flush; the debt stays owed, and due.
    pub fn flush_due(&self, now: Instant) -> Result<bool, Error> {
        self.flush
            .flush_due(now, |gather| self.invalidate(gather))
            .inspect_err(events::flush_failed)
    }

    /// Invalidates `gather` in every domain of this moment. That is enough: a domain was attached
    /// when a thread owed something for it, and it leaves the list only after a flush of its own.
    pub(crate) fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let mut all = Invalidated::default();
        for domain in self.attachments().iter() {
            all.add(domain.source.invalidate(gather)?);
        }
        Ok(all)
    }

    /// Returns after the flush that covers `ticket` has finished.
    pub(crate) fn flush_until(&self, ticket: Ticket) -> Result<(), Error> {
        self.flush
            .wait(ticket, |gather| self.invalidate(gather))
            .inspect_err(events::flush_failed)
    }
}
