//! One switch of tracking: of the space, or of a domain.
//!
//! ```text
//!            on                    off
//!  Never ----------> On <-------------------> Off
//!                                     on
//! ```
//!
//! The switch of a domain stores the last state that its source confirmed. A source that panics may
//! be on or off: its switch is *in doubt*, and the next switch asks it, for on and for off.

use crate::sync::{AtomicU8, Ordering, Step, weaken};

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
    pub(super) fn is_on(&self) -> bool {
        // Acquire: as in `was_ever_on`.
        self.0.load(Ordering::Acquire) == ON
    }

    /// Whether its state is `on` for certain.
    pub(super) fn is(&self, on: bool) -> bool {
        // Acquire: as in `was_ever_on`.
        match self.0.load(Ordering::Acquire) {
            ON => on,
            NEVER | OFF => !on,
            _ => false,
        }
    }

    pub(super) fn was_ever_on(&self) -> bool {
        // Acquire: pairs with the Release in `set`.
        self.0.load(Ordering::Acquire) & !IN_DOUBT != NEVER
    }

    /// "Off" is stored only if the switch was ever on; otherwise it stays "never".
    pub(super) fn set(&self, on: bool) {
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
    pub(super) fn doubt(&self) {
        // Relaxed: the lock of the domains orders all stores.
        let said = self.0.load(Ordering::Relaxed);
        // Release: a thread that reads this store also sees what the store in `set` published.
        self.0.store(said | IN_DOUBT, Ordering::Release);
    }
}
