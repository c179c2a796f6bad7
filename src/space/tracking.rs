//! The switches: whether writes are tracked, in the space and in each domain.
//!
//! ```text
//!            on                    off
//!  Never ----------> On <-------------------> Off
//!                                     on
//! ```
//!
//! The switch of the space applies to the marks, and to domains that are attached later. Each
//! domain has a switch of its own, which stores the last state that its source confirmed. A source
//! that refuses keeps its state, so after a switch that failed half-way, the next one asks exactly
//! the sources that still differ. A source that panics may be on or off: its switch is *in doubt*,
//! and the next switch asks it, for on and for off. All switches change under the lock that attach
//! and detach take.

use super::AddressSpace;
use super::attachment::{Attachment, Covered};
use crate::error::Error;
use crate::events;
use crate::failure::{Failure, attempt};
use crate::source::Tracking;
use crate::sync::{Arc, AtomicU8, Ordering, Step, lock, weaken};
use crate::units::{DomainId, Granule, IovaRange};

const NEVER: u8 = 0;
const ON: u8 = 1;
const OFF: u8 = 2;
/// Added to the last confirmed state if the source has panicked since.
const IN_DOUBT: u8 = 4;

/// One switch.
#[derive(Debug)]
pub(super) struct Switch(AtomicU8);

impl Switch {
    pub(super) fn new() -> Self {
        Switch(AtomicU8::new(NEVER))
    }

    /// Whether it is on for certain.
    fn is_on(&self) -> bool {
        // Acquire: as in `was_ever_on`.
        self.0.load(Ordering::Acquire) == ON
    }

    /// Whether its state is `on` for certain.
    fn is(&self, on: bool) -> bool {
        // Acquire: as in `was_ever_on`.
        match self.0.load(Ordering::Acquire) {
            ON => on,
            NEVER | OFF => !on,
            _ => false,
        }
    }

    fn was_ever_on(&self) -> bool {
        // Acquire: pairs with the Release in `set`.
        self.0.load(Ordering::Acquire) & !IN_DOUBT != NEVER
    }

    /// "Off" is stored only if the switch was ever on; otherwise it stays "never".
    fn set(&self, on: bool) {
        let state = match on {
            true => ON,
            false if self.was_ever_on() => OFF,
            false => NEVER,
        };
        // Release: pairs with the Acquire in `was_ever_on`. A harvest that sees the switch on finds
        // a clean baseline; one that does not is refused, or runs as before the switch.
        let order = weaken(Step::PublishBaseline, Ordering::Release);
        self.0.store(state, order);
    }

    /// The state of the source is unknown. Whether a harvest is allowed stays as it is.
    fn doubt(&self) {
        // Relaxed: the lock of the domains orders all stores.
        let said = self.0.load(Ordering::Relaxed);
        // Release: a thread that reads this store also sees what the store in `set` published.
        self.0.store(said | IN_DOUBT, Ordering::Release);
    }
}

impl Attachment {
    /// Switches the source if it is not in the state `on` for certain. Returns whether it was
    /// asked.
    ///
    /// # Errors
    /// The error of the source, which keeps its state; or its panic, after which the next switch
    /// asks it again.
    pub(super) fn switch(&self, to: Tracking) -> Result<bool, Failure> {
        if self.tracking.is(to.is_on()) {
            return Ok(false);
        }
        let switched = attempt(|| self.source.set_tracking(to));
        match switched {
            Ok(()) => self.tracking.set(to.is_on()),
            Err(Failure::Panicked(_)) => self.tracking.doubt(),
            Err(Failure::Refused(_)) => (),
        }
        switched.map(|()| true)
    }

    /// Switches the source off after `failure`. A source that refuses keeps tracking, which costs
    /// time and loses nothing; its switch says so.
    pub(super) fn switch_back(&self, failure: Failure) -> Failure {
        match self.switch(Tracking::Off) {
            Err(panicked @ Failure::Panicked(_)) => failure.then(panicked),
            Ok(_) | Err(Failure::Refused(_)) => failure,
        }
    }
}

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
    /// The baseline becomes clean (what was dirty or marked before is discarded) and is flushed;
    /// every write that begins after the return is reported. If writes are tracked already, nothing
    /// changes, and what is dirty stays dirty. A domain that tracks already, by
    /// [`start_domain_tracking`](Self::start_domain_tracking), is not touched.
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
    /// That of the first source that refuses. The call is then taken back, although sources that had
    /// agreed may have discarded what was dirty in them; marks are kept. It can be repeated. The same
    /// holds of the first source that [panics](crate::DirtySource#panics): whether it tracks is in
    /// doubt until a switch succeeds.
    #[doc(alias = "set_dirty_tracking")]
    #[doc(alias = "IOMMU_HWPT_SET_DIRTY_TRACKING")]
    #[doc(alias = "iopt_set_dirty_tracking")]
    #[doc(alias = "memory_global_dirty_log_start")]
    #[doc(alias = "log_global_start")]
    pub fn start_tracking(&self) -> Result<(), Error> {
        self.switch_all(Tracking::On)
    }

    /// Stops tracking writes, in all domains and for marks. What is dirty stays for a last harvest.
    ///
    /// # Errors
    /// That of the first source that refuses; the others are switched all the same, and the call can
    /// be repeated, as can a [start](Self::start_tracking) after it. The same holds of the first
    /// source that [panics](crate::DirtySource#panics): whether it tracks is in doubt until a switch
    /// succeeds.
    #[doc(alias = "log_global_stop")]
    #[doc(alias = "memory_global_dirty_log_stop")]
    pub fn stop_tracking(&self) -> Result<(), Error> {
        self.switch_all(Tracking::Off)
    }

    /// Starts to track writes in one domain, as [`start_tracking`](Self::start_tracking) does in all:
    /// the domain becomes clean and is flushed, unless it tracks already. Marks are left alone.
    ///
    /// # Errors
    /// [`Error::NotAttached`], or the error of the source, which keeps its state. After a
    /// [panic](crate::DirtySource#panics) its state is in doubt until a switch succeeds.
    #[doc(alias = "IOMMU_HWPT_SET_DIRTY_TRACKING")]
    pub fn start_domain_tracking(&self, domain: DomainId) -> Result<(), Error> {
        self.switch_domain(domain, Tracking::On)
    }

    /// Stops tracking writes in one domain. What is dirty there stays for a last harvest. Marks are
    /// left alone.
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
            let switched = match to {
                Tracking::On => self.switch_on(),
                Tracking::Off => self.switch_off(),
            };
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
            if attachment.switch(to).map_err(Failure::raise)? && to.is_on() {
                self.discard(attachment.put_back.clear(IovaRange::ALL));
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
            let (range, marks) = (area.range, &area.area.marks);
            for attachment in &switched {
                if marks_too {
                    // So that a page that is both put back and marked counts once.
                    let stored = attachment.put_back.take_runs(range);
                    stored.into_iter().for_each(|run| marks.mark(run));
                } else {
                    self.discard(attachment.put_back.clear(range));
                }
            }
            if marks_too {
                self.discard(marks.clear(range));
            }
        }
        // F2 of the marks' protocol (`source::marks`), for the first full copy that follows: it has
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

    /// Counts `pages` that were dirty and whose dirty state is discarded.
    pub(super) fn discard(&self, pages: u64) {
        self.counters
            .discarded(u128::from(pages) << self.page().lg2());
    }

    /// Whether tracking was ever on for any of the sources that are covered.
    pub(crate) fn ever_tracked(&self, covered: &Covered) -> bool {
        let domain = |attachment: &Arc<Attachment>| attachment.tracking.was_ever_on();
        (covered.marks && self.tracking.was_ever_on()) || covered.domains().iter().any(domain)
    }
}
