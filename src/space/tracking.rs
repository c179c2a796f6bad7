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
use crate::sync::{Arc, AtomicU8, Ordering, Step, lock, weaken};
use crate::units::{DomainId, IovaRange};

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
    pub(super) fn switch(&self, on: bool) -> Result<bool, Failure> {
        if self.tracking.is(on) {
            return Ok(false);
        }
        let switched = attempt(|| self.source.set_tracking(on));
        match switched {
            Ok(()) => self.tracking.set(on),
            Err(Failure::Panicked(_)) => self.tracking.doubt(),
            Err(Failure::Refused(_)) => (),
        }
        switched.map(|()| true)
    }

    /// Switches the source off after `failure`. A source that refuses keeps tracking, which costs
    /// time and loses nothing; its switch says so.
    pub(super) fn switch_back(&self, failure: Failure) -> Failure {
        match self.switch(false) {
            Err(panicked @ Failure::Panicked(_)) => failure.then(panicked),
            Ok(_) | Err(Failure::Refused(_)) => failure,
        }
    }
}

impl AddressSpace {
    /// Switches tracking of writes, in all domains and for marks. A domain that is attached later
    /// tracks if this is on.
    ///
    /// *On*, if it was off: everything becomes clean, and is flushed. What was dirty or marked
    /// before is discarded. Every write that begins after the return is reported. *On*, if it was
    /// on, changes nothing: dirty pages stay dirty. *Off*: dirty pages stay dirty for a last
    /// harvest. A domain that is in the requested state already, by
    /// [`set_domain_tracking`](Self::set_domain_tracking), is not touched. May wait for devices.
    ///
    /// # Errors
    /// The error of the first source that refuses. After a failed *on*, the sources that the call
    /// had switched on are switched off again. They may have discarded their dirty pages; marks
    /// stay. After a failed *off*, the other sources are off. Both can be repeated. The same holds
    /// for the first source that [panics](crate::DirtySource#panics): whether it tracks is in doubt
    /// until a switch succeeds.
    #[doc(alias = "IOMMU_HWPT_SET_DIRTY_TRACKING")]
    #[doc(alias = "iopt_set_dirty_tracking")]
    #[doc(alias = "memory_global_dirty_log_start")]
    pub fn set_tracking(&self, on: bool) -> Result<(), Error> {
        self.retired.drop_all();
        {
            let _membership = lock(&self.membership);
            let switched = if on {
                self.switch_on()
            } else {
                self.switch_off()
            };
            switched.map_err(Failure::raise)?;
        }
        events::tracking(on);
        Ok(())
    }

    /// Switches tracking of writes in one domain, as [`set_tracking`](Self::set_tracking) does in
    /// all. *On*, if it was off: the domain becomes clean and is flushed. *Off*: its dirty pages
    /// stay dirty for a last harvest. Marks do not change. May wait for devices.
    ///
    /// # Errors
    /// [`Error::NotAttached`], or the error of the source, which keeps its state. After a
    /// [panic](crate::DirtySource#panics) its state is in doubt until a switch succeeds.
    #[doc(alias = "IOMMU_HWPT_SET_DIRTY_TRACKING")]
    pub fn set_domain_tracking(&self, domain: DomainId, on: bool) -> Result<(), Error> {
        self.retired.drop_all();
        {
            let _membership = lock(&self.membership);
            let attachments = self.attachments();
            let attachment = attachments.find(domain)?;
            if attachment.switch(on).map_err(Failure::raise)? && on {
                self.discard(attachment.put_back.clear(IovaRange::ALL));
            }
        }
        events::domain_tracking(domain, on);
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
            match attachment.switch(true) {
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
        self.ordering.before_copies();
        self.tracking.set(true);
        Ok(())
    }

    fn switch_off(&self) -> Result<(), Failure> {
        let mut failed: Option<Failure> = None;
        for attachment in self.attachments().iter() {
            if let Err(failure) = attachment.switch(false) {
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
