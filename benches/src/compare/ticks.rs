//! A clock that is cheap enough to time one lookup.

use std::time::{Duration, Instant};

/// Now, in ticks of an unknown length.
#[inline]
pub(crate) fn now() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: reads a counter that every x86-64 processor has.
        unsafe { std::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        use std::sync::OnceLock;
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// The scale of ticks.
#[derive(Clone, Copy)]
pub(super) struct Clock {
    nanoseconds_per_tick: f64,
    /// The ticks between two consecutive readings.
    overhead: f64,
}

impl Clock {
    /// Compares the ticks with the clock of the system, for 20 ms.
    pub(super) fn calibrated() -> Self {
        let (began, first) = (Instant::now(), now());
        let (mut pairs, mut apart) = (0, 0);
        while began.elapsed() < Duration::from_millis(20) {
            let before = now();
            apart += now() - before;
            pairs += 1;
        }
        let nanoseconds_per_tick = began.elapsed().as_nanos() as f64 / (now() - first) as f64;
        Clock {
            nanoseconds_per_tick,
            overhead: apart as f64 / f64::from(pairs),
        }
    }

    /// The number of ticks in `time`.
    pub(super) fn ticks(self, time: Duration) -> u64 {
        (time.as_nanos() as f64 / self.nanoseconds_per_tick) as u64
    }

    /// `ticks` in nanoseconds.
    pub(super) fn nanoseconds(self, ticks: u64) -> f64 {
        ticks as f64 * self.nanoseconds_per_tick
    }

    /// The overhead of a measurement, which is included in the results.
    pub(super) fn overhead(self) -> f64 {
        self.overhead * self.nanoseconds_per_tick
    }

    /// The value below which `per_mille` of the sorted `ticks` lie, in nanoseconds.
    pub(super) fn percentile(self, ticks: &[u64], per_mille: usize) -> f64 {
        let at = (ticks.len() * per_mille / 1000).min(ticks.len().saturating_sub(1));
        ticks
            .get(at)
            .map_or(f64::NAN, |ticks| self.nanoseconds(*ticks))
    }
}
