//! What a pre-copy migration takes.

use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::time::Duration;

/// The most rounds of a plan that says nothing else.
const ROUNDS: u32 = 30;
/// A round that has more than this part of the one before does not shrink.
const SHRINKS: f64 = 0.95;

/// A migration that copies everything, then what became dirty, round after round, until a round is
/// short enough. Then the machine is stopped, and the last harvest is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// Bytes of the first copy.
    pub bytes: u64,
    /// The bandwidth of the link.
    pub bytes_per_second: NonZeroU64,
    /// The machine is stopped after a round whose transfer took no longer than this.
    pub downtime: Duration,
    /// The least and the most rounds while the machine runs, without the first copy.
    pub rounds: RangeInclusive<u32>,
    /// What each round takes beside the transfer: the harvest and its flush.
    pub overhead: Duration,
}

impl Plan {
    /// A migration with 1 to 30 rounds and no overhead. Set the fields to change that:
    ///
    /// ```
    /// use dirtymap::meter::Plan;
    /// use std::num::NonZeroU64;
    /// use std::time::Duration;
    ///
    /// let link = NonZeroU64::new(125_000_000).unwrap_or(NonZeroU64::MIN); // a gigabit
    /// let mut plan = Plan::new(4 << 30, link, Duration::from_millis(100));
    /// plan.rounds = 1..=8;
    /// plan.overhead = Duration::from_millis(2);
    /// ```
    pub fn new(bytes: u64, bytes_per_second: NonZeroU64, downtime: Duration) -> Self {
        Plan {
            bytes,
            bytes_per_second,
            downtime,
            rounds: 1..=ROUNDS,
            overhead: Duration::ZERO,
        }
    }
}

/// What a migration would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prediction {
    /// Harvests: the rounds while the machine runs, and the last one, after it was stopped.
    pub rounds: u32,
    /// For how long the machine stands still.
    pub downtime: Duration,
    /// From the first byte to the last.
    pub took: Duration,
    /// Bytes over the link.
    pub sent: u64,
    /// Whether a round becomes short enough. If not, the rounds stop shrinking or are used up, and
    /// the machine is stopped all the same.
    pub converges: bool,
}

/// The prediction for memory of which `within` bytes are written in so many seconds.
pub(super) fn predict(plan: &Plan, within: impl Fn(f64) -> f64) -> Prediction {
    let all = plan.bytes as f64;
    let overhead = plan.overhead.as_secs_f64();
    let transfer = |bytes: f64| bytes / plan.bytes_per_second.get() as f64;
    let time_of = |bytes: f64| transfer(bytes) + overhead;
    let enough = plan.downtime.as_secs_f64();
    let (least, most) = (*plan.rounds.start(), *plan.rounds.end());
    let (mut dirty, mut took, mut sent) = (all, time_of(all), all);
    let mut round = took;
    let (mut rounds, mut converges) = (0u32, false);
    while rounds < most {
        let before = dirty;
        dirty = within(round).min(all);
        round = time_of(dirty);
        rounds += 1;
        took += round;
        sent += dirty;
        converges = transfer(dirty) <= enough;
        if rounds >= least && (converges || dirty > before * SHRINKS) {
            break;
        }
    }
    let last = within(round).min(all);
    let downtime = time_of(last);
    let duration = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    Prediction {
        rounds: rounds.saturating_add(1),
        downtime: duration(downtime),
        took: duration(took + downtime),
        // Saturates.
        sent: (sent + last) as u64,
        converges,
    }
}
