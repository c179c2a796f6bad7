//! The flush queue against a naive one: which gathers a flush covers, in which order things are
//! freed, and the counts, with failures and panics in between.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dirtymap::flush::{FlushCost, FlushGather, FlushQueue, Invalidated, Ticket};
use dirtymap::{Error, FlushPolicy, Granule, Iova, IovaRange, RangeError};

/// The naive queue, which holds each gather by itself.
#[derive(Default)]
struct Naive {
    /// Gathers that no flush has covered, by number, and whether each has a free.
    owed: Vec<(FlushGather, Option<u64>)>,
    /// The numbers of the freed gathers, in order.
    freed: Vec<u64>,
    retired: u64,
    flushes: u64,
    full: u64,
    forced: u64,
    failed: u64,
    merged: u64,
}

/// How an invalidation ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Done,
    Fails,
    Panics,
}

struct Run {
    queue: FlushQueue,
    policy: FlushPolicy,
    cost: FlushCost,
    naive: Naive,
    freed: Arc<Mutex<Vec<u64>>>,
    /// All tickets, each with the number of gathers that were handed over before it.
    tickets: Vec<(Ticket, u64)>,
    numbers: u64,
}

impl Run {
    fn new(bounds: u8) -> Self {
        let policy = FlushPolicy {
            max_pending: (bounds & 1 != 0).then_some(3),
            max_bytes: (bounds & 2 != 0).then_some(5 << 12),
            max_age: (bounds & 4 != 0).then_some(Duration::from_secs(3600)),
        };
        let cost = FlushCost {
            per_range: u64::from(bounds >> 3 & 3),
            per_leaf: u64::from(bounds >> 5),
            full: 8,
        };
        Run {
            queue: FlushQueue::new().with_policy(policy).with_cost(cost),
            policy,
            cost,
            naive: Naive::default(),
            freed: Arc::default(),
            tickets: Vec::new(),
            numbers: 0,
        }
    }

    fn owe(&mut self, gather: FlushGather, frees: bool) {
        let ticket = if frees {
            let (n, freed) = (self.numbers, self.freed.clone());
            self.numbers += 1;
            self.naive.owed.push((gather.clone(), Some(n)));
            self.queue.owe_then(&gather, move || {
                freed.lock().unwrap_or_else(|e| e.into_inner()).push(n)
            })
        } else {
            self.naive.owed.push((gather.clone(), None));
            self.queue.owe(&gather)
        };
        let handed = self.naive.retired + self.naive.owed.len() as u64;
        self.tickets.push((ticket, handed));
    }

    /// All pending gathers, merged.
    fn debt(&self) -> FlushGather {
        let mut debt = FlushGather::new();
        for (gather, _) in &self.naive.owed {
            debt.merge(gather);
        }
        debt
    }

    /// Runs `flush` of the queue, with an invalidation that ends in `end`. It must happen exactly
    /// if `expected`.
    fn flush(
        &mut self,
        end: End,
        expected: bool,
        forced: bool,
        flush: impl FnOnce(
            &FlushQueue,
            &mut dyn FnMut(&FlushGather) -> Result<Invalidated, Error>,
        ) -> Result<(), Error>,
    ) -> Result<(), String> {
        let debt = self.debt();
        let full = self.cost.prefers_full(&debt);
        let (mut asked, mut early) = (Vec::new(), false);
        let freed = self.freed.clone();
        let before = self.naive.freed.len();
        let mut invalidate = |gather: &FlushGather| {
            asked.push(gather.clone());
            early |= freed.lock().unwrap_or_else(|e| e.into_inner()).len() != before;
            match end {
                End::Done => Ok(Invalidated {
                    bytes: gather.bytes(),
                    ..Invalidated::default()
                }),
                End::Fails => Err(Error::Range(RangeError::ZeroLength { start: Iova::MIN })),
                End::Panics => std::panic::resume_unwind(Box::new("on purpose")),
            }
        };
        let queue = &self.queue;
        let outcome = catch_unwind(AssertUnwindSafe(|| flush(queue, &mut invalidate)));
        let done = matches!(outcome, Ok(Ok(())));
        if early {
            return Err("something was freed before its flush had finished".into());
        }
        let asks = expected && !debt.is_empty();
        if asked.len() != usize::from(asks) {
            return Err(format!("{} invalidations for {debt:?}", asked.len()));
        }
        if let Some(asked) = asked.first() {
            let covered = debt
                .ranges()
                .iter()
                .all(|owed| asked.ranges().iter().any(|range| range.covers(*owed)));
            if !covered || asked.is_full() != (full || debt.is_full()) {
                return Err(format!("{asked:?} was asked for {debt:?}"));
            }
        }
        let ends_well = !asks || end == End::Done;
        if done != ends_well {
            return Err(format!("an outcome of {done} instead of {ends_well}"));
        }
        if !expected {
            return Ok(());
        }
        if !ends_well {
            self.naive.failed += 1;
            return Ok(());
        }
        self.naive.flushes += u64::from(asks);
        self.naive.full += u64::from(asks && full);
        self.naive.forced += u64::from(asks && forced);
        self.naive.retired += self.naive.owed.len() as u64;
        self.naive.merged += (self.naive.owed.len() as u64).saturating_sub(1);
        let frees = self.naive.owed.drain(..).filter_map(|(_, free)| free);
        self.naive.freed.extend(frees);
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let freed = self.freed.lock().unwrap_or_else(|e| e.into_inner());
        if *freed != self.naive.freed {
            return Err(format!("freed {freed:?}, not {:?}", self.naive.freed));
        }
        let stats = self.queue.stats();
        let naive = &self.naive;
        let pending = naive.owed.len() as u64;
        let entries = naive.owed.iter().map(|(g, _)| u128::from(g.entries()));
        let frees = naive.owed.iter().filter(|(_, free)| free.is_some());
        let counts = [
            ("owed", stats.owed, naive.retired + pending),
            ("retired", stats.retired, naive.retired),
            ("pending", stats.pending, pending),
            ("merged", stats.merged, naive.merged),
            ("flushes", stats.flushes, naive.flushes),
            ("full", stats.full, naive.full),
            ("forced", stats.forced, naive.forced),
            ("failed", stats.failed, naive.failed),
            ("frees owed", stats.frees_owed, self.numbers),
            ("frees", stats.frees_released, freed.len() as u64),
            ("frees pending", stats.frees_pending, frees.count() as u64),
        ];
        for (name, is, should) in counts {
            if is != should {
                return Err(format!("{name}: {is} instead of {should}"));
            }
        }
        if stats.entries_pending != entries.sum::<u128>()
            || stats.entries_owed != stats.entries + stats.entries_pending
        {
            return Err(format!("the entries are wrong: {stats:?}"));
        }
        if stats.invalidated.bytes < stats.bytes {
            return Err(format!("less invalidated than owed: {stats:?}"));
        }
        Ok(())
    }

    /// Whether a bound is reached, `late` or not.
    fn is_due(&self, late: bool) -> bool {
        let pending = self.naive.owed.len() as u64;
        let policy = self.policy;
        pending > 0
            && (policy.max_pending.is_some_and(|max| pending >= max)
                || policy
                    .max_bytes
                    .is_some_and(|max| self.debt().bytes() >= max)
                || late && policy.max_age.is_some())
    }
}

/// Performs the hand-overs and flushes that are decoded from `bytes`, and drops the queue at the
/// end.
///
/// # Errors
/// The first difference.
pub fn check_flush(bytes: &[u8]) -> Result<(), String> {
    let Some((&bounds, steps)) = bytes.split_first() else {
        return Ok(());
    };
    let mut run = Run::new(bounds);
    for step in steps.as_chunks::<2>().0 {
        let [kind, arg] = *step;
        let end = match arg & 7 {
            0 | 1 => End::Fails,
            2 => End::Panics,
            _ => End::Done,
        };
        match kind % 8 {
            0 => run.owe(FlushGather::new(), arg & 1 != 0),
            1..=4 => run.owe(one_leaf(arg), kind & 8 != 0),
            5 => {
                let Some(&(ticket, handed)) = run.tickets.get(usize::from(arg >> 3)) else {
                    continue;
                };
                let expected = handed > run.naive.retired;
                run.flush(end, expected, false, |queue, invalidate| {
                    queue.wait(ticket, invalidate)
                })?;
            }
            _ => {
                let late = kind & 16 != 0;
                let due = run.is_due(late);
                // A fixed moment instead of a clock: the one at which the bound of age is reached.
                let now = match run.queue.deadline() {
                    Some(deadline) if late => deadline,
                    Some(deadline) => deadline - Duration::from_nanos(1),
                    None => Instant::now(),
                };
                if run.queue.is_due(now) != due {
                    return Err(format!("due should be {due}"));
                }
                run.flush(end, due, true, |queue, invalidate| {
                    queue.flush_due(now, invalidate).map(|_| ())
                })?;
            }
        }
        run.check()?;
    }
    let Run {
        queue,
        freed,
        numbers,
        ..
    } = run;
    drop(queue);
    let freed = freed.lock().unwrap_or_else(|e| e.into_inner());
    if !freed.iter().copied().eq(0..numbers) {
        return Err(format!("freed {freed:?} in the end, of {numbers}"));
    }
    Ok(())
}

fn one_leaf(arg: u8) -> FlushGather {
    let mut gather = FlushGather::new();
    let range = match arg {
        255 => IovaRange::ALL,
        _ => IovaRange::granule_at(Iova::new(u64::from(arg) << 12), Granule::K4),
    };
    if arg % 16 == 15 {
        gather.add_table(range);
    } else {
        gather.add(range, Granule::K4);
    }
    gather
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_is_freed_early_twice_or_never(bytes in vec(any::<u8>(), 0..200)) {
            check_flush(&bytes).map_err(TestCaseError::fail)?;
        }
    }
}
