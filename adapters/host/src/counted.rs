//! Counts what unit tests of adapters look at: they check against such counts, and never against
//! time, that a cost grows no faster than it may. Outside of the promise of versions.

use std::cell::Cell;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Counts one look in this thread.
pub fn one() {
    COUNT.with(|count| count.set(count.get() + 1));
}

/// Returns how many looks `run` takes in this thread.
pub fn count(run: impl FnOnce()) -> u64 {
    let before = COUNT.with(Cell::get);
    run();
    COUNT.with(Cell::get) - before
}

/// Asserts that the count of `cost` for `n` things grows as `n log n` at most: eight times as many
/// things cost at most sixteen times as much. A quadratic path would cost sixty-four times as much.
///
/// # Panics
/// If it grows faster, or if nothing is counted.
pub fn grows_gently(what: &str, cost: impl Fn(u64) -> u64) {
    let (few, many) = (cost(500), cost(4000));
    assert!(few > 0, "{what}: nothing is counted");
    assert!(many <= 16 * few, "{what}: 500 cost {few}, 4000 cost {many}");
}
