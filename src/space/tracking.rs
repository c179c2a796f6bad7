//! The switches: whether writes are tracked, in the space and in each domain.
//!
//! ```text
//!            on                    off
//!  Never ----------> On <-------------------> Off
//!                                     on
//! ```
//!
//! The switch of the space stands for the marks, and for domains to come. Each domain has its own, which says what its source
//! said last: a source that refuses keeps its state, so after a switch that failed half-way, the next one asks exactly those
//! that it has to. All are changed under one lock, with the coming and going of domains.

use super::AddressSpace;
use super::attachment::{Attachment, Covered};
use crate::error::Error;
use crate::events;
use crate::sync::{AtomicU8, Ordering, Step, lock, weaken};
use crate::units::{DomainId, Granule, IovaRange};

const NEVER: u8 = 0;
const ON: u8 = 1;
const OFF: u8 = 2;

/// One switch.
#[derive(Debug)]
pub(super) struct Switch(AtomicU8);

impl Switch {
    pub(super) fn new() -> Self {
        Switch(AtomicU8::new(NEVER))
    }

    fn is_on(&self) -> bool {
        // Acquire: as in `was_ever_on`.
        self.0.load(Ordering::Acquire) == ON
    }

    fn was_ever_on(&self) -> bool {
        // Acquire: pairs with the Release in `set`.
        self.0.load(Ordering::Acquire) != NEVER
    }

    /// Off is only said of what was on.
    fn set(&self, on: bool) {
        // Release: pairs with the Acquire in `was_ever_on`; a harvest that sees it finds a clean baseline.
        let order = weaken(Step::PublishBaseline, Ordering::Release);
        self.0.store(if on { ON } else { OFF }, order);
    }
}

impl Attachment {
    /// Switches the source, if it is not as it should be; whether it was not.
    ///
    /// # Errors
    /// That of the source, which keeps its state.
    pub(super) fn switch(&self, on: bool) -> Result<bool, Error> {
        if self.tracking.is_on() == on {
            return Ok(false);
        }
        self.source.set_tracking(on)?;
        self.tracking.set(on);
        Ok(true)
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
    /// That of the first source that refuses. An `on` is then taken back, although sources that had agreed may have discarded what
    /// was dirty in them; marks are kept. An `off` goes on with the other sources, and can be repeated, as can an `on` after it.
    pub fn set_tracking(&self, on: bool) -> Result<(), Error> {
        let _membership = lock(&self.membership);
        if on {
            self.switch_on()?;
        } else {
            self.switch_off()?;
        }
        events::tracking(on);
        Ok(())
    }

    /// Switches tracking of writes in one domain, as [`set_tracking`](Self::set_tracking) does in all: on makes the domain clean
    /// and flushes it, unless it was on; off keeps what is dirty for a last harvest. Marks are left alone.
    ///
    /// # Errors
    /// [`Error::NotAttached`], or that of the source, which keeps its state.
    pub fn set_domain_tracking(&self, domain: DomainId, on: bool) -> Result<(), Error> {
        let _membership = lock(&self.membership);
        let attachments = self.attachments();
        let attachment = attachments.find(domain)?;
        if attachment.switch(on)? && on {
            self.discard(attachment.kept.clear(IovaRange::ALL));
        }
        events::domain_tracking(domain, on);
        Ok(())
    }

    /// Whether writes are tracked, in domains to come too.
    pub(super) fn tracks(&self) -> bool {
        self.tracking.is_on()
    }

    fn switch_on(&self) -> Result<(), Error> {
        let attachments = self.attachments();
        let mut switched = Vec::new();
        for attachment in attachments.iter() {
            match attachment.switch(true) {
                Ok(true) => switched.push(attachment),
                Ok(false) => {}
                Err(error) => {
                    for attachment in switched {
                        // One that can't go back stays on, which only costs: its switch says so.
                        let _ = attachment.switch(false);
                    }
                    return Err(error);
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

    fn switch_off(&self) -> Result<(), Error> {
        let mut refused = None;
        for attachment in self.attachments().iter() {
            if let Err(error) = attachment.switch(false) {
                refused.get_or_insert(error);
            }
        }
        if let Some(error) = refused {
            return Err(error);
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
        let domain = |attachment: &crate::sync::Arc<Attachment>| attachment.tracking.was_ever_on();
        (covered.marks && self.tracking.was_ever_on()) || covered.domains().iter().any(domain)
    }
}
