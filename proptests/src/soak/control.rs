//! Rest and end: all actors can be paused between two of their steps, and the first failure ends
//! the run.

use std::time::{Duration, Instant};

use dirtymap::sync::{AtomicBool, AtomicU8, AtomicU64, Mutex, Ordering, lock, thread};

use super::failure::Failure;

const RUN: u8 = 0;
const REST: u8 = 1;
const STOP: u8 = 2;

/// An actor that does not rest within this time is taken to hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the [module](self).
#[derive(Default)]
pub(super) struct Control {
    state: AtomicU8,
    /// Actors that rest, and actors that have not ended.
    resting: AtomicU64,
    acting: AtomicU64,
    failed: AtomicBool,
    failure: Mutex<Option<Failure>>,
}

impl Control {
    /// One more actor.
    pub(super) fn enter(&self) {
        // Relaxed: the thread is spawned after it.
        self.acting.fetch_add(1, Ordering::Relaxed);
    }

    /// Removes an actor. `outcome` is its result, `None` if it panicked.
    pub(super) fn leave(&self, outcome: Option<Result<(), Failure>>) {
        match outcome {
            Some(Ok(())) => {}
            Some(Err(failure)) => self.fail(failure),
            None => self.fail(Failure::new("an actor panicked")),
        }
        // Release: pairs with the Acquire in `rest`.
        self.acting.fetch_sub(1, Ordering::Release);
    }

    /// Called between two steps: rests if requested, and returns whether to go on. The actor calls
    /// `quiesce` before a rest.
    pub(super) fn goes_on(&self, quiesce: impl FnOnce()) -> bool {
        // Acquire: pairs with the Release in `resume`.
        match self.state.load(Ordering::Acquire) {
            RUN => return true,
            STOP => return false,
            _ => quiesce(),
        }
        // Release: pairs with the Acquire in `rest`: all writes are visible there.
        self.resting.fetch_add(1, Ordering::Release);
        // Acquire: as above.
        while self.state.load(Ordering::Acquire) == REST {
            thread::sleep(Duration::from_micros(200));
        }
        // Release, Acquire: pair with `resume`.
        self.resting.fetch_sub(1, Ordering::Release);
        self.state.load(Ordering::Acquire) == RUN
    }

    /// Brings all actors to rest.
    pub(super) fn rest(&self) -> Result<(), Failure> {
        // Relaxed: it only asks the actors to rest, and their answers have the ordering. A failure
        // has stored STOP there.
        let _ = self
            .state
            .compare_exchange(RUN, REST, Ordering::Relaxed, Ordering::Relaxed);
        self.wait("come to rest", || {
            // Acquire, both: pair with the Releases in `goes_on` and `leave`.
            self.resting.load(Ordering::Acquire) >= self.acting.load(Ordering::Acquire)
        })
    }

    /// Lets all actors go on.
    pub(super) fn resume(&self) -> Result<(), Failure> {
        // Release: pairs with the Acquire in `goes_on`.
        let _ = self
            .state
            .compare_exchange(REST, RUN, Ordering::Release, Ordering::Relaxed);
        // Acquire: as in `rest`; nothing depends on it.
        self.wait("go on", || self.resting.load(Ordering::Acquire) == 0)
    }

    /// Ends all actors.
    pub(super) fn stop(&self) {
        // Release: as in `resume`.
        self.state.store(STOP, Ordering::Release);
    }

    /// Waits until all actors have ended.
    pub(super) fn wait_for_end(&self) -> Result<(), Failure> {
        let began = Instant::now();
        // Acquire: pairs with the Release in `leave`.
        while self.acting.load(Ordering::Acquire) != 0 {
            if began.elapsed() > PATIENCE {
                return Err(Failure::hang("end"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits until `done`, or a failure.
    fn wait(&self, what: &str, done: impl Fn() -> bool) -> Result<(), Failure> {
        let began = Instant::now();
        while !done() {
            if self.has_failed() {
                break;
            }
            if began.elapsed() > PATIENCE {
                return Err(Failure::hang(what));
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Keeps the first failure, and ends all actors.
    pub(super) fn fail(&self, failure: Failure) {
        lock(&self.failure).get_or_insert(failure);
        // Relaxed: the failure itself is under the lock.
        self.failed.store(true, Ordering::Relaxed);
        self.stop();
    }

    /// Whether something failed.
    pub(super) fn has_failed(&self) -> bool {
        // Relaxed: as in `fail`.
        self.failed.load(Ordering::Relaxed)
    }

    /// The first failure.
    pub(super) fn failure(&self) -> Option<Failure> {
        lock(&self.failure).take()
    }
}
