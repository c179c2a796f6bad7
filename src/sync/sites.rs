//! The atomics of models: loom's, each of whose orderings can be weakened alone.
//!
//! A *site* is one part of an ordering at one place of the code: the acquire or the release half
//! of an access, the ordering of a compare-exchange that fails, or a fence. The place is that of
//! the call, so a site needs no name, and a new access is a site from its first build on. The
//! models collect the sites that they reach, and weaken each of them: an access becomes Relaxed in
//! that part, and a fence is left out. See `model::explore`.

use std::collections::BTreeSet;
use std::fmt;
use std::panic::Location;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicU8 as StdU8, Ordering::SeqCst};

use loom::sync::atomic as inner;

use super::Ordering;

/// The part of an ordering that a site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// What a load sees.
    Acquire,
    /// What a store publishes.
    Release,
    /// What a compare-exchange sees that fails.
    Failure,
    /// A fence.
    Fence,
}

/// A part of an ordering, at a place of the code: see the [module](self).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Site {
    /// The file, from the top of the repository.
    pub file: String,
    /// The line of the call, from 1.
    pub line: u32,
    /// The column of the call, from 1.
    pub column: u32,
    /// The part of its ordering.
    pub part: Part,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Site {
            file, line, column, ..
        } = self;
        write!(f, "{file}:{line}:{column} {:?}", self.part)
    }
}

const OFF: u8 = 0;
const COLLECT: u8 = 1;
const WEAKEN: u8 = 2;

/// What the accesses do.
static MODE: StdU8 = StdU8::new(OFF);
static REACHED: StdMutex<BTreeSet<Site>> = StdMutex::new(BTreeSet::new());
static WEAKENED: StdMutex<Option<Site>> = StdMutex::new(None);

/// Collects the sites that `run` reaches in the code, models excepted.
pub(super) fn collect(run: impl FnOnce()) -> BTreeSet<Site> {
    REACHED.lock().unwrap_or_else(|e| e.into_inner()).clear();
    MODE.store(COLLECT, SeqCst);
    run();
    MODE.store(OFF, SeqCst);
    std::mem::take(&mut *REACHED.lock().unwrap_or_else(|e| e.into_inner()))
}

/// Weakens `site` while `run` runs.
pub(super) fn without<T>(site: &Site, run: impl FnOnce() -> T) -> T {
    *WEAKENED.lock().unwrap_or_else(|e| e.into_inner()) = Some(site.clone());
    MODE.store(WEAKEN, SeqCst);
    let done = run();
    MODE.store(OFF, SeqCst);
    done
}

/// Whether the access at `place` performs `part` of its ordering.
fn performs_at(place: &Location<'_>, part: Part) -> bool {
    match MODE.load(SeqCst) {
        OFF => true,
        WEAKEN => {
            let weakened = WEAKENED.lock().unwrap_or_else(|e| e.into_inner());
            !weakened.as_ref().is_some_and(|site| {
                (site.line, site.column, site.part) == (place.line(), place.column(), part)
                    && site.file == place.file()
            })
        }
        _ => {
            if !place.file().contains("test") {
                let mut reached = REACHED.lock().unwrap_or_else(|e| e.into_inner());
                reached.insert(Site {
                    file: place.file().to_owned(),
                    line: place.line(),
                    column: place.column(),
                    part,
                });
            }
            true
        }
    }
}

/// The ordering of an access: `order`, without the parts that are weakened.
fn weakened(place: &Location<'_>, order: Ordering) -> Ordering {
    let acquires =
        matches!(order, Ordering::Acquire | Ordering::AcqRel) && performs_at(place, Part::Acquire);
    let releases =
        matches!(order, Ordering::Release | Ordering::AcqRel) && performs_at(place, Part::Release);
    match (acquires, releases) {
        (true, true) => Ordering::AcqRel,
        (true, false) => Ordering::Acquire,
        (false, true) => Ordering::Release,
        (false, false) if order == Ordering::SeqCst => order,
        (false, false) => Ordering::Relaxed,
    }
}

/// The ordering of a compare-exchange that fails.
fn weakened_failure(place: &Location<'_>, order: Ordering) -> Ordering {
    match order {
        Ordering::Acquire if !performs_at(place, Part::Failure) => Ordering::Relaxed,
        _ => order,
    }
}

/// A fence; none if it is weakened.
#[track_caller]
pub fn fence(order: Ordering) {
    if performs_at(Location::caller(), Part::Fence) {
        inner::fence(order);
    }
}

/// The calls that all atomics have.
macro_rules! accesses {
    ($value:ty) => {
        /// Loads the value.
        #[track_caller]
        pub fn load(&self, order: Ordering) -> $value {
            self.0.load(weakened(Location::caller(), order))
        }

        /// Stores a value.
        #[track_caller]
        pub fn store(&self, value: $value, order: Ordering) {
            self.0.store(value, weakened(Location::caller(), order));
        }

        /// Stores a value and returns the previous one.
        #[track_caller]
        pub fn swap(&self, value: $value, order: Ordering) -> $value {
            self.0.swap(value, weakened(Location::caller(), order))
        }

        /// Stores `new` if the value is `current`.
        ///
        /// # Errors
        /// The value, if it is another one.
        #[track_caller]
        pub fn compare_exchange(
            &self,
            current: $value,
            new: $value,
            success: Ordering,
            failure: Ordering,
        ) -> Result<$value, $value> {
            let place = Location::caller();
            let success = weakened(place, success);
            let failure = weakened_failure(place, failure);
            self.0.compare_exchange(current, new, success, failure)
        }

        /// As [`compare_exchange`](Self::compare_exchange).
        ///
        /// # Errors
        /// As there.
        #[track_caller]
        pub fn compare_exchange_weak(
            &self,
            current: $value,
            new: $value,
            success: Ordering,
            failure: Ordering,
        ) -> Result<$value, $value> {
            self.compare_exchange(current, new, success, failure)
        }
    };
}

/// The read-modify-writes of a kind of atomics.
macro_rules! changes {
    ($value:ty: $($name:ident),+) => {
        $(
            /// Changes the value and returns the previous one.
            #[track_caller]
            pub fn $name(&self, by: $value, order: Ordering) -> $value {
                self.0.$name(by, weakened(Location::caller(), order))
            }
        )+
    };
}

macro_rules! numbers {
    ($($name:ident: $value:ty,)+) => {
        $(
            /// An atomic of the model checker: see the [module](self).
            #[derive(Debug, Default)]
            pub struct $name(inner::$name);

            impl $name {
                /// An atomic with that value.
                #[track_caller]
                pub fn new(value: $value) -> Self {
                    $name(inner::$name::new(value))
                }

                accesses!($value);
                changes!($value: fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor);
                changes!($value: fetch_max, fetch_min);

                /// Changes the value by `change`, until no other thread interferes.
                ///
                /// # Errors
                /// The value for which `change` has none.
                #[track_caller]
                pub fn fetch_update(
                    &self,
                    success: Ordering,
                    failure: Ordering,
                    change: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    let place = Location::caller();
                    let success = weakened(place, success);
                    let failure = weakened_failure(place, failure);
                    self.0.fetch_update(success, failure, change)
                }
            }
        )+
    };
}

numbers! {
    AtomicU8: u8,
    AtomicU64: u64,
    AtomicUsize: usize,
}

/// An atomic of the model checker: see the [module](self).
#[derive(Debug, Default)]
pub struct AtomicBool(inner::AtomicBool);

impl AtomicBool {
    /// An atomic with that value.
    #[track_caller]
    pub fn new(value: bool) -> Self {
        AtomicBool(inner::AtomicBool::new(value))
    }

    accesses!(bool);
    changes!(bool: fetch_and, fetch_or);
}

/// An atomic of the model checker: see the [module](self).
#[derive(Debug)]
pub struct AtomicPtr<T>(inner::AtomicPtr<T>);

impl<T> AtomicPtr<T> {
    /// An atomic with that value.
    #[track_caller]
    pub fn new(value: *mut T) -> Self {
        AtomicPtr(inner::AtomicPtr::new(value))
    }

    accesses!(*mut T);

    /// Calls `change` with the value.
    pub fn with_mut<R>(&mut self, change: impl FnOnce(&mut *mut T) -> R) -> R {
        self.0.with_mut(change)
    }
}
