//! The flushes of a space: all sources are invalidated together, for all who wait, and when the debt is due.

use std::time::Instant;

use super::AddressSpace;
use crate::error::Error;
use crate::events;
use crate::flush::{FlushGather, FlushPolicy, Invalidated, Ticket};

impl AddressSpace {
    /// Sets the bounds at which a debt is due that nobody waits for, such as that of leases that were dropped. Without
    /// this there is none, and the next call that waits pays.
    #[must_use]
    pub fn with_flush_policy(mut self, policy: FlushPolicy) -> Self {
        self.flush.set_policy(policy);
        self
    }

    /// When the oldest debt that no flush has taken reaches the greatest age of the [`FlushPolicy`]; `None` if nothing
    /// is owed, or age is no bound.
    pub fn flush_deadline(&self) -> Option<Instant> {
        self.flush.deadline()
    }

    /// Flushes if the debt reaches a bound of the [`FlushPolicy`] at the time `now`; whether it did. For a timer, or
    /// after leases were dropped. Waits for devices.
    ///
    /// # Errors
    /// That of a source that could not flush; the debt stays owed, and due.
    pub fn flush_due(&self, now: Instant) -> Result<bool, Error> {
        self.flush
            .flush_due(now, |gather| self.invalidate(gather))
            .inspect_err(events::flush_failed)
    }

    /// Invalidates `gather` in every domain. The list is that of now: whoever owed something for a domain had it attached
    /// by then, and a domain leaves the list only after a flush of its own.
    pub(crate) fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        let mut all = Invalidated::default();
        for domain in self.attachments().iter() {
            all.add(domain.source.invalidate(gather)?);
        }
        Ok(all)
    }

    /// Returns when the flush that covers `ticket` has finished.
    pub(crate) fn flush_until(&self, ticket: Ticket) -> Result<(), Error> {
        self.flush
            .wait(ticket, |gather| self.invalidate(gather))
            .inspect_err(events::flush_failed)
    }
}
