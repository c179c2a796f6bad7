//! The switches: whether writes are tracked, in the space and in each domain.
//!
//! ```text
//!            on                    off
//!  Never ----------> On <-------------------> Off
//!                                     on
//! ```
//!
//! The switch of the space stands for the marks, and for domains to come. Each domain has its own,
//! which says what its source said last: a source that refuses keeps its state, so after a switch
//! that failed half-way, the next one asks exactly those that it has to. A source that panics may
//! be on or off: its switch is *in doubt*, and the next one, either way, asks it. All are changed
//! under one lock, with the coming and going of domains.

use super::AddressSpace;
use super::attachment::{Attachment, Covered};
use crate::error::Error;
use crate::events;
use crate::failure::{Failure, attempt};
use crate::sync::{Arc, AtomicU8, Ordering, Step, lock, weaken};
use crate::units::{DomainId, Granule, IovaRange};

const NEVER: u8 = 0;
const ON: u8 = 1;
const OFF: u8 = 2;
/// Added to what was said last, when a source has panicked since.
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

    /// Whether it is what `on` says, for certain.
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

    /// Off is only said of what was on.
    fn set(&self, on: bool) {
        let state = match on {
            true => ON,
            false if self.was_ever_on() => OFF,
            false => NEVER,
        };
        // Release: pairs with the Acquire in `was_ever_on`; a harvest that sees it finds a clean baseline.
        let order = weaken(Step::PublishBaseline, Ordering::Release);
        self.0.store(state, order);
    }

    /// Nobody knows what the source is now. What a harvest may ask for stays.
    fn doubt(&self) {
        // Relaxed: the lock of the domains orders all stores.
        let said = self.0.load(Ordering::Relaxed);
        // Release: the store of `set` is passed on to a thread that reads this one.
        self.0.store(said | IN_DOUBT, Ordering::Release);
    }
}

impl Attachment {
    /// Switches the source, if it is not as it should be; whether it was not.
    ///
    /// # Errors
    /// That of the source, which keeps its state; or its panic, after which the next switch asks it
    /// again.
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

    /// Switches the source off after `failure`. One that can't go back stays on, which only costs:
    /// its switch says so.
    pub(super) fn switch_back(&self, failure: Failure) -> Failure {
        match self.switch(false) {
            Err(panicked @ Failure::Panicked(_)) => failure.then(panicked),
            Ok(_) | Err(Failure::Refused(_)) => failure,
        }
    }
}

impl AddressSpace {
    /// An empty space that [tracks](Self::set_tracking) from the start: whatever is mapped is tracked at
    /// once.
    pub fn tracked(page: Granule) -> Self {
        let space = Self::new(page);
        space.tracking.set(true);
        space
    }

    /// Switches tracking of writes, in all domains and for marks. Domains that are attached later track if this is on.
    ///
    /// On, when it was off: the baseline becomes clean (what was dirty or marked before is discarded) and is flushed; every write
    /// that begins after the return is reported. On when it is on changes nothing and keeps what is dirty. Off keeps what is dirty
    /// for a last harvest. A domain that is as it should be, by [`set_domain_tracking`](Self::set_domain_tracking), is not touched.
    ///
    /// # Errors
    /// That of the first source that refuses. An `on` is then taken back, although sources that had
    /// agreed may have discarded what was dirty in them; marks are kept. An `off` goes on with the
    /// other sources, and can be repeated, as can an `on` after it. The same holds of the first one
    /// that [panics](crate::DirtySource#panics): whether it tracks is in doubt until a switch
    /// succeeds.
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

    /// Switches tracking of writes in one domain, as [`set_tracking`](Self::set_tracking) does in all: on makes the domain clean
    /// and flushes it, unless it was on; off keeps what is dirty for a last harvest. Marks are left alone.
    ///
    /// # Errors
    /// [`Error::NotAttached`], or that of the source, which keeps its state. After a
    /// [panic](crate::DirtySource#panics) its state is in doubt until a switch succeeds.
    pub fn set_domain_tracking(&self, domain: DomainId, on: bool) -> Result<(), Error> {
        self.retired.drop_all();
        {
            let _membership = lock(&self.membership);
            let attachments = self.attachments();
            let attachment = attachments.find(domain)?;
            if attachment.switch(on).map_err(Failure::raise)? && on {
                self.discard(attachment.kept.clear(IovaRange::ALL));
            }
        }
        events::domain_tracking(domain, on);
        Ok(())
    }

    /// Whether writes are tracked, in domains to come too.
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
                    // The one that failed, too: if it panicked, it may be on.
                    switched.push(attachment);
                    let back =
                        |failure, attachment: &Arc<Attachment>| attachment.switch_back(failure);
                    return Err(switched.into_iter().fold(failure, back));
                }
            }
        }
        // Only now, when nothing can fail any more. Writes whose marks go here began before the return.
        let marks_too = !self.tracking.is_on();
        for area in self.areas.snapshot().iter(IovaRange::ALL) {
            let (range, marks) = (area.range, &area.area.marks);
            for attachment in &switched {
                if marks_too {
                    // So that a page that is both kept and marked counts once.
                    let kept = attachment.kept.take_runs(range);
                    kept.into_iter().for_each(|run| marks.mark(run));
                } else {
                    self.discard(attachment.kept.clear(range));
                }
            }
            if marks_too {
                self.discard(marks.clear(range));
            }
        }
        // F2 of the marks' protocol (`source::marks`), for the first full copy that follows.
        self.ordering.before_copies();
        self.tracking.set(true);
        Ok(())
    }

    fn switch_off(&self) -> Result<(), Failure> {
        let mut failed: Option<Failure> = None;
        for attachment in self.attachments().iter() {
            if let Err(failure) = attachment.switch(false) {
                failed = Some(match failed {
                    // The first one, but for a panic, which goes on before an error.
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

    /// Counts `pages` that were dirty and are forgotten.
    pub(super) fn discard(&self, pages: u64) {
        self.counters
            .discarded(u128::from(pages) << self.page().lg2());
    }

    /// Whether anything that is covered was ever tracked.
    pub(crate) fn ever_tracked(&self, covered: &Covered) -> bool {
        let domain = |attachment: &Arc<Attachment>| attachment.tracking.was_ever_on();
        (covered.marks && self.tracking.was_ever_on()) || covered.domains().iter().any(domain)
    }
}
