//! Rates with exponential decay, of everything and of each granule.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::units::{Granule, Iova, IovaRange};

/// See the [module](self).
///
/// A rate is the mean of the rates of all looks. Each look is weighted by its time and its age. The
/// sum of a granule is brought up to date when a look finds the granule, or when its rate is read.
#[derive(Debug)]
pub(super) struct Heat {
    half_life: f64,
    /// At least a page: one page of a space of large ones may have more parts than memory holds.
    granule: Granule,
    /// Seconds so far.
    now: f64,
    all: Decayed,
    /// By number.
    granules: BTreeMap<u64, Decayed>,
}

/// A sum of what has decayed since a moment.
#[derive(Clone, Copy, Debug, Default)]
struct Decayed {
    sum: f64,
    at: f64,
}

/// The part that is left of something after `seconds`.
pub(super) fn left_after(seconds: f64, half_life: f64) -> f64 {
    (-seconds / half_life).exp2()
}

/// The part that is lost. No difference from 1, which has no digits left for a long half-life.
pub(super) fn lost_after(seconds: f64, half_life: f64) -> f64 {
    -(-seconds / half_life * std::f64::consts::LN_2).exp_m1()
}

impl Decayed {
    fn at(self, now: f64, half_life: f64) -> f64 {
        self.sum * left_after(now - self.at, half_life)
    }
}

impl Heat {
    pub(super) fn new(half_life: Duration, granule: Granule) -> Self {
        Heat {
            // A half-life of zero is the shortest one.
            half_life: half_life.max(Duration::from_nanos(1)).as_secs_f64(),
            granule,
            now: 0.0,
            all: Decayed::default(),
            granules: BTreeMap::new(),
        }
    }

    /// The same by `granule`, without the rates so far.
    pub(super) fn by(&self, granule: Granule) -> Self {
        Heat {
            half_life: self.half_life,
            granule,
            now: 0.0,
            all: Decayed::default(),
            granules: BTreeMap::new(),
        }
    }

    /// A look found `runs` of pages of size `page`, `elapsed` after the one before.
    pub(super) fn look(
        &mut self,
        runs: impl Iterator<Item = IovaRange>,
        page: Option<Granule>,
        elapsed: Duration,
    ) {
        // The first look that finds areas says it, and all others say the same.
        self.granule = self.granule.max(page.unwrap_or(self.granule));
        let seconds = elapsed.as_secs_f64();
        self.now += seconds;
        // The weight of a byte: one over the time of the look, decayed up to now. For a look that
        // took no time, it is the limit of that.
        let weight = match seconds {
            0.0 => std::f64::consts::LN_2 / self.half_life,
            _ => lost_after(seconds, self.half_life) / seconds,
        };
        let (now, half_life) = (self.now, self.half_life);
        let add = |to: &mut Decayed, bytes: u128| {
            let sum = to.at(now, half_life) + bytes as f64 * weight;
            *to = Decayed { sum, at: now };
        };
        let mut bytes = 0;
        for run in runs {
            bytes += run.len();
            for part in cut(run, self.granule) {
                let number = part.start().get() >> self.granule.lg2();
                add(self.granules.entry(number).or_default(), part.len());
            }
        }
        add(&mut self.all, bytes);
    }

    pub(super) fn rate(&self) -> f64 {
        self.read(self.all)
    }

    fn read(&self, sum: Decayed) -> f64 {
        // The weights of all looks so far.
        let weights = lost_after(self.now, self.half_life);
        match weights > 0.0 {
            true => sum.at(self.now, self.half_life) / weights,
            false => 0.0,
        }
    }

    pub(super) fn rate_of(&self, range: IovaRange) -> f64 {
        let number = |at: Iova| at.get() >> self.granule.lg2();
        let inside = self
            .granules
            .range(number(range.start())..=number(range.last()));
        let share = |number: u64| {
            let inside = self.addresses(number).intersection(range);
            inside.map_or(0.0, |part| part.len() as f64 / self.granule_bytes())
        };
        let rates = inside.map(|(n, sum)| self.read(*sum) * share(*n));
        // The sum of no numbers is -0, which a program prints as "-0".
        rates.fold(0.0, |sum, rate| sum + rate)
    }

    pub(super) fn rates(&self) -> impl Iterator<Item = (IovaRange, f64)> {
        let granules = self.granules.iter();
        granules.map(|(number, sum)| (self.addresses(*number), self.read(*sum)))
    }

    pub(super) fn coldest_first(
        &self,
        runs: impl IntoIterator<Item = IovaRange>,
    ) -> Vec<IovaRange> {
        let mut parts: Vec<(f64, IovaRange)> = Vec::new();
        for run in runs {
            for (nth, (heat, part)) in self.parts(run).enumerate() {
                match parts.last_mut() {
                    Some((other, whole)) if nth > 0 && *other == heat => *whole = whole.hull(part),
                    _ => parts.push((heat, part)),
                }
            }
        }
        // Stable, and rates are numbers.
        parts.sort_by(|one, other| one.0.total_cmp(&other.0));
        parts.into_iter().map(|(_, part)| part).collect()
    }

    /// The parts of `run` in ascending order, each with its rate: those in granules that were ever
    /// written, and what is between them as a whole.
    fn parts(&self, run: IovaRange) -> impl Iterator<Item = (f64, IovaRange)> {
        let number = |at: Iova| at.get() >> self.granule.lg2();
        let mut written = self
            .granules
            .range(number(run.start())..=number(run.last()))
            .filter_map(move |(n, sum)| Some((self.addresses(*n).intersection(run)?, sum)))
            .peekable();
        let mut next = Some(run.start());
        std::iter::from_fn(move || {
            let start = next?;
            let (heat, part) = match written.next_if(|(part, _)| part.start() == start) {
                Some((part, sum)) => (self.read(*sum), part),
                None => {
                    let rest = IovaRange::ascending(start, run.last());
                    let gap = written
                        .peek()
                        .map_or(Some(rest), |(part, _)| rest.below(part.start()));
                    (0.0, gap?)
                }
            };
            next = part
                .last()
                .checked_add(1)
                .filter(|next| *next <= run.last());
            Some((heat, part))
        })
    }

    fn addresses(&self, number: u64) -> IovaRange {
        IovaRange::granule_at(Iova::new(number << self.granule.lg2()), self.granule)
    }

    fn granule_bytes(&self) -> f64 {
        f64::from(self.granule.lg2()).exp2()
    }
}

/// The parts of `run` in each granule, ascending.
fn cut(run: IovaRange, granule: Granule) -> impl Iterator<Item = IovaRange> {
    let mut next = Some(run.start());
    std::iter::from_fn(move || {
        let start = next?;
        let last = start.granule_last(granule).min(run.last());
        next = last.checked_add(1).filter(|next| *next <= run.last());
        Some(IovaRange::ascending(start, last))
    })
}
