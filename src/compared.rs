//! Comparisons of addresses and ids, counted in unit tests: that a cost grows no faster than it may
//! is held against such counts, never against time. In other builds there is nothing of it.

/// Functions that unit tests count; `const` in other builds.
macro_rules! counted {
    ($(
        $(#[$meta:meta])*
        $vis:vis const fn $name:ident($($argument:tt)*) -> $out:ty $body:block
    )+) => {$(
        #[cfg(not(test))]
        $(#[$meta])*
        $vis const fn $name($($argument)*) -> $out $body

        #[cfg(test)]
        $(#[$meta])*
        $vis fn $name($($argument)*) -> $out {
            crate::compared::one();
            $body
        }
    )+};
}

/// The order that is derived in other builds, counted.
#[cfg(test)]
macro_rules! counted_order {
    ($type:ident) => {
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                crate::compared::one();
                self.0 == other.0
            }
        }

        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $type {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                crate::compared::one();
                self.0.cmp(&other.0)
            }
        }
    };
}

#[cfg(test)]
thread_local! {
    static COUNT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Counts one comparison of this thread.
#[cfg(test)]
pub(crate) fn one() {
    COUNT.with(|count| count.set(count.get() + 1));
}

/// How many comparisons `run` makes in this thread.
#[cfg(all(test, not(dirtymap_loom)))]
pub(crate) fn count(run: impl FnOnce()) -> u64 {
    let before = COUNT.with(std::cell::Cell::get);
    run();
    COUNT.with(std::cell::Cell::get) - before
}

/// Asserts that what `cost` counts for `n` things grows as `n log n` at most: eight times the
/// things cost at most sixteen times as much, where a quadratic path costs sixty-four times as
/// much.
#[cfg(all(test, not(dirtymap_loom)))]
pub(crate) fn grows_gently(what: &str, cost: impl Fn(u64) -> u64) {
    let (few, many) = (cost(500), cost(4000));
    assert!(few > 0, "{what}: nothing is counted");
    assert!(many <= 16 * few, "{what}: 500 cost {few}, 4000 cost {many}");
}
