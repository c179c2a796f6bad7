//! The rounds, the time and the downtime of a pre-copy migration.

use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::time::Duration;

/// The most rounds of a plan by default.
const ROUNDS: u32 = 30;
/// A round does not shrink if it has more than this part of the pages of the round before.
const SHRINKS: f64 = 0.95;

/// A pre-copy migration. It copies everything, and then the pages that became dirty, round after
/// round, until a round is short enough. Then the machine is stopped, and the pages of the last
/// harvest are copied.
///
/// ```
/// use dirtymap::meter::Plan;
/// use std::num::NonZeroU64;
/// use std::time::Duration;
///
/// let gigabit = NonZeroU64::new(125_000_000).unwrap_or(NonZeroU64::MIN);
/// let mut plan = Plan::new(4 << 30, gigabit, Duration::from_millis(300));
/// plan.rounds = 1..=5;
/// plan.overhead = Duration::from_millis(2); // of each harvest and its flush
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// Bytes of the first copy.
    pub bytes: u64,
    /// The bandwidth of the link, in bytes a second.
    pub bytes_per_second: NonZeroU64,
    /// The machine is stopped after a round whose transfer took no longer than this.
    pub downtime: Duration,
    /// The least and the most rounds while the machine runs, without the first copy.
    pub rounds: RangeInclusive<u32>,
    /// The time of each round besides the transfer: the harvest and its flush.
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

/// The result of [`Meter::predict`](super::Meter::predict).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prediction {
    /// Harvests: the rounds while the machine runs, and the last one, after it was stopped.
    pub rounds: u32,
    /// The time for which the machine is stopped. [`Duration::MAX`] if it is longer than that.
    pub downtime: Duration,
    /// The time from the first byte to the last one, `downtime` included.
    pub took: Duration,
    /// Bytes over the link, those of the first copy included. Saturates.
    pub sent: u64,
    /// Whether a round becomes short enough. If not, the machine is stopped when the rounds stop
    /// shrinking, or after the most rounds of the plan.
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
