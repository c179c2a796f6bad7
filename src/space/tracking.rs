//! The switch: whether writes are tracked.
//!
//! ```text
//!            on                    off
//!  Never ----------> On <-------------------> Off          a switch that fails half-way back ends in
//!                                     on                   Mixed, from which both ways lead out
//! ```
//!
//! A later `on` must not trust that sources are on because the last one was asked to be: so the state says `Mixed` before the
//! first source is asked to go off, and from `Mixed` every source is asked again. To ask one that is on is a no-op.

use super::AddressSpace;
use crate::error::Error;
use crate::sync::{AtomicU8, Mutex, Ordering, fence, lock};
use crate::units::IovaRange;

const NEVER: u8 = 0;
const ON: u8 = 1;
const OFF: u8 = 2;
const MIXED: u8 = 3;

/// The state of the switch.
#[derive(Debug)]
pub(super) struct Tracking {
    /// Held while tracking is switched.
    switching: Mutex<()>,
    state: AtomicU8,
}

impl Tracking {
    pub(super) fn new() -> Self {
        Tracking {
            switching: Mutex::new(()),
            state: AtomicU8::new(NEVER),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        // Acquire: as in `ever_tracked`.
        self.state.load(Ordering::Acquire) == ON
    }

    fn set(&self, state: u8) {
        // Release: pairs with the Acquire in `ever_tracked`; a harvest that sees it finds a clean baseline.
        self.state.store(state, Ordering::Release);
    }
}

impl AddressSpace {
    /// Switches tracking of writes.
    ///
    /// On, when it was off: the baseline becomes clean (what was dirty or marked before is discarded) and is flushed; every write
    /// that begins after the return is reported. On when it is on changes nothing and keeps what is dirty. Off keeps what is dirty
    /// for a last harvest.
    ///
    /// # Errors
    /// That of the first source that refuses. An `on` is then taken back, although sources that had agreed may have discarded what
    /// was dirty in them; marks are kept. An `off` goes on with the other sources, and can be repeated, as can an `on` after it.
    pub fn set_tracking(&self, on: bool) -> Result<(), Error> {
        let _switching = lock(&self.tracking.switching);
        // Relaxed: only changed under the lock that we hold.
        let now = self.tracking.state.load(Ordering::Relaxed);
        match (on, now) {
            (true, ON) | (false, OFF | NEVER) => Ok(()),
            (true, _) => self.switch_on(now),
            (false, _) => self.switch_off(),
        }
    }

    fn switch_on(&self, now: u8) -> Result<(), Error> {
        for (switched, source) in self.sources.iter().enumerate() {
            if let Err(error) = source.set_tracking(true) {
                if now != MIXED {
                    for source in &self.sources[..switched] {
                        // One that can't go back stays on, which only costs: asked to go on again, it changes nothing.
                        let _ = source.set_tracking(false);
                    }
                }
                return Err(error);
            }
        }
        if now != MIXED {
            // Only now, when nothing can fail any more. Writes whose marks go here began before the return.
            for entry in self.snapshot().iter(IovaRange::ALL) {
                let cleared = entry.area.marks.clear();
                self.counters
                    .discarded(u128::from(cleared) << self.page().lg2());
            }
        }
        // SeqCst: F2 of the marks' protocol (`source::marks`), for the first full copy that follows.
        fence(Ordering::SeqCst);
        self.tracking.set(ON);
        Ok(())
    }

    fn switch_off(&self) -> Result<(), Error> {
        self.tracking.set(MIXED);
        let mut refused = None;
        for source in &self.sources {
            if let Err(error) = source.set_tracking(false) {
                refused.get_or_insert(error);
            }
        }
        match refused {
            Some(error) => Err(error),
            None => {
                self.tracking.set(OFF);
                Ok(())
            }
        }
    }

    /// Whether tracking was ever switched on.
    pub(crate) fn ever_tracked(&self) -> bool {
        // Acquire: pairs with the Release in `Tracking::set`.
        self.tracking.state.load(Ordering::Acquire) != NEVER
    }
}
