//! The switches: whether writes are tracked, in the space and in each domain.
//!
//! The switch of the space applies to the marks, and to domains that are attached later. Each
//! domain has a [`switch`](super::switch) of its own. A source that refuses keeps its state, so
//! after a switch that failed half-way, the next one asks exactly the sources that still differ.
//! All switches change under the lock that attach and detach take.

use super::AddressSpace;
use super::domain::{Attachment, Covered};
use crate::error::Error;
use crate::events;
use crate::failure::Failure;
use crate::source::Tracking;
use crate::sync::{Arc, Step, lock};
use crate::units::{DomainId, Granule, IovaRange};

impl AddressSpace {
    /// An empty space that [tracks](Self::start_tracking) from the start: whatever is mapped is
    /// tracked at once.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.mark(0x3000..0x3001)?; // the next harvest reports it
    /// # Ok(())
    /// # }
    /// ```
    pub fn tracked(page: Granule) -> Self {
        let space = Self::new(page);
        space.tracking.set(true);
        space
    }

    /// Starts to track writes, in all domains and for marks. Domains that are attached later track
    /// from the start.
    ///
    /// The baseline becomes clean (pages that were dirty or marked are discarded) and is flushed.
    /// Every write that begins after the return is reported. If writes are tracked already, nothing
    /// changes, and dirty pages stay dirty. A domain that tracks already, by
    /// [`start_domain_tracking`](Self::start_domain_tracking), is not touched.
    ///
    /// No increment of a [consumer](crate::Consumer) has writes from while tracking was off. So the
    /// full copy that follows is a new [epoch](crate::Consumer::epoch) of each consumer, to which
    /// no older epoch leads: see [`Why::Untracked`](crate::harvest::Why::Untracked). The same holds
    /// if the call fails.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = AddressSpace::new(Granule::K4);
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.start_tracking()?;
    /// // Copy everything once, then harvest, round after round.
    /// space.stop_tracking()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The error of the first source that refuses. The call is then undone, although the sources
    /// before it may have discarded their dirty pages; marks stay. It can be repeated. The same
    /// holds if a source [panics](crate::DirtySource#panics): whether that source tracks is in
    /// doubt until a switch succeeds.
    #[doc(alias = "set_dirty_tracking")]
    #[doc(alias = "IOMMU_HWPT_SET_DIRTY_TRACKING")]
    #[doc(alias = "iopt_set_dirty_tracking")]
    #[doc(alias = "memory_global_dirty_log_start")]
    #[doc(alias = "log_global_start")]
    pub fn start_tracking(&self) -> Result<(), Error> {
        self.switch_all(Tracking::On)
    }

    /// Stops tracking writes, in all domains and for marks. Dirty pages stay dirty for a last
    /// harvest. A write after it may still be reported; the next start discards it.
    ///
    /// Increments of [consumers](crate::Consumer) that are committed until the next start may
    /// lack writes of that time, and only the start makes that known, by
    /// [`Why::Untracked`](crate::harvest::Why::Untracked). So call this when no consumer needs
    /// increments any more, not when one of them ends.
    ///
    /// # Errors
    /// The error of the first source that refuses. The other sources are switched nevertheless, and
    /// the call can be repeated, as can a [start](Self::start_tracking) after it. The same holds if
    /// a source [panics](crate::DirtySource#panics): whether that source tracks is in doubt until a
    /// switch succeeds.
    #[doc(alias = "log_global_stop")]
    #[doc(alias = "memory_global_dirty_log_stop")]
    pub fn stop_tracking(&self) -> Result<(), Error> {
        self.switch_all(Tracking::Off)
    }

    /// Starts to track writes in one domain, as [`start_tracking`](Self::start_tracking) does in
    /// all: the domain becomes clean and is flushed, and each consumer begins a new chain of
    /// epochs. If the domain tracks already, nothing changes. Marks are left alone.
    ///
    /// # Errors
    /// [`Error::NotAttached`], or the error of the source, which keeps its state. After a
    /// [panic](crate::DirtySource#panics) its state is in doubt until a switch succeeds.
    #[doc(alias = "IOMMU_HWPT_SET_DIRTY_TRACKING")]
    pub fn start_domain_tracking(&self, domain: DomainId) -> Result<(), Error> {
        self.switch_domain(domain, Tracking::On)
    }

    /// Stops tracking writes in one domain. Its dirty pages stay dirty for a last harvest. Marks do
    /// not change.
    ///
    /// # Errors
    /// As [`start_domain_tracking`](Self::start_domain_tracking).
    pub fn stop_domain_tracking(&self, domain: DomainId) -> Result<(), Error> {
        self.switch_domain(domain, Tracking::Off)
    }

    fn switch_all(&self, to: Tracking) -> Result<(), Error> {
        self.retired.drop_all();
        {
            let _membership = lock(&self.membership);
            // Before the switch. The pin of this look is a full fence, which the collector does
            // not promise: after the clear it would hide from the models whether F2 is there.
            let members = self.members();
            let tracked = self.tracks_all();
            let switched = match to {
                Tracking::On => {
                    let _restart = self.discards.restart();
                    self.switch_on()
                }
                Tracking::Off => self.switch_off(),
            };
            if to.is_on() && !tracked {
                // Also if it fails: a source may have discarded its dirty pages before.
                members.restart_epochs();
            }
            switched.map_err(Failure::raise)?;
        }
        events::tracking(to.is_on());
        Ok(())
    }

    fn switch_domain(&self, domain: DomainId, to: Tracking) -> Result<(), Error> {
        self.retired.drop_all();
        {
            let _membership = lock(&self.membership);
            let attachments = self.attachments();
            let attachment = attachments.find(domain)?;
            let members = self.members();
            let tracked = attachment.tracking.is_on();
            let _restart = to.is_on().then(|| self.discards.restart());
            let switched = attachment.switch(to);
            if to.is_on() && !tracked {
                // Also if it fails, as in `switch_all`.
                members.restart_epochs();
            }
            if switched.map_err(Failure::raise)? && to.is_on() {
                self.forget_zeros();
                self.count_discarded(attachment.put_back.clear(IovaRange::ALL));
            }
        }
        events::domain_tracking(domain, to.is_on());
        Ok(())
    }

    /// Whether writes are tracked. A domain that is attached takes this state.
    pub(super) fn tracks(&self) -> bool {
        self.tracking.is_on()
    }

    fn switch_on(&self) -> Result<(), Failure> {
        let attachments = self.attachments();
        let mut switched = Vec::new();
        for attachment in attachments.iter() {
            match attachment.switch(Tracking::On) {
                Ok(true) => switched.push(attachment),
                Ok(false) => {}
                Err(failure) => {
                    // The source that failed as well: if it panicked, it may be on.
                    switched.push(attachment);
                    let back =
                        |failure, attachment: &Arc<Attachment>| attachment.switch_back(failure);
                    return Err(switched.into_iter().fold(failure, back));
                }
            }
        }
        // Last, because nothing can fail any more. A write whose mark is cleared here began before
        // the return.
        let marks_too = !self.tracking.is_on();
        for area in self.areas.snapshot().iter(IovaRange::ALL) {
            let (range, marks) = (area.range, area.area.marks());
            for attachment in &switched {
                if marks_too {
                    // So that a page that is both put back and marked counts once.
                    let stored = attachment.put_back.take_runs(range);
                    stored.into_iter().for_each(|run| marks.mark(run));
                } else {
                    self.count_discarded(attachment.put_back.clear(range));
                }
            }
            if marks_too {
                self.count_discarded(marks.clear(range));
            }
        }
        if marks_too || !switched.is_empty() {
            self.forget_zeros();
        }
        // F2 of the marks' protocol (`marks`), for the first full copy that follows: it has
        // the data of each marker that found its mark set, or that marker sees the clear and marks
        // again.
        self.ordering.before_copies(Step::SwitchFence);
        self.tracking.set(true);
        Ok(())
    }

    fn switch_off(&self) -> Result<(), Failure> {
        let mut failed: Option<Failure> = None;
        for attachment in self.attachments().iter() {
            if let Err(failure) = attachment.switch(Tracking::Off) {
                failed = Some(match failed {
                    // The first failure wins, except that a panic wins over an error.
                    Some(first) if matches!(failure, Failure::Refused(_)) => first,
                    Some(first) => first.then(failure),
                    None => failure,
                });
            }
        }
        if let Some(failure) = failed {
            return Err(failure);
        }
        if self.tracking.is_on() {
            self.tracking.set(false);
        }
        Ok(())
    }

    /// Counts `pages` whose dirty state is discarded.
    pub(super) fn count_discarded(&self, pages: u64) {
        self.counters
            .discarded(u128::from(pages) << self.page().lg2());
    }

    /// Whether tracking was ever on for any of the sources that are covered.
    pub(crate) fn ever_tracked(&self, covered: &Covered) -> bool {
        let domain = |attachment: &Arc<Attachment>| attachment.tracking.was_ever_on();
        (covered.marks && self.tracking.was_ever_on()) || covered.domains().iter().any(domain)
    }
}
