//! One workload: the unit of its numbers, the results of all contestants, and the targets of our
//! library.

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds for one operation; less is better. Tables show them as ns, µs, ms or s.
    Time,
    /// Bytes for one item; less is better.
    Bytes,
    /// A plain count, such as flushes for each harvest. Less is better, and 0 is a valid value.
    Count,
    /// A rate in a second; more is better.
    Rate,
}

impl Unit {
    /// The name of the field in a record.
    pub(super) fn key(self) -> &'static str {
        match self {
            Unit::Time => "ns",
            Unit::Bytes => "bytes",
            Unit::Count => "count",
            Unit::Rate => "per_second",
        }
    }

    /// The unit in which `number` is best read: its size and its name.
    fn scale(self, number: f64) -> (f64, &'static str) {
        let steps: &[(f64, &str)] = match self {
            Unit::Time => &[(1.0, " ns"), (1e3, " µs"), (1e6, " ms"), (1e9, " s")],
            Unit::Bytes => &[
                (1.0, " B"),
                (1024.0, " KiB"),
                (1048576.0, " MiB"),
                (1073741824.0, " GiB"),
            ],
            Unit::Count => &[(1.0, "")],
            Unit::Rate => &[(1.0, "/s"), (1e3, " k/s"), (1e6, " M/s"), (1e9, " G/s")],
        };
        // The largest unit in which the number is not below 1.
        let fits = steps.iter().rev().find(|(step, _)| number.abs() >= *step);
        fits.copied().unwrap_or(steps[0])
    }

    /// A number as text.
    pub fn show(self, number: f64) -> String {
        let (step, name) = self.scale(number);
        format!("{}{name}", short(number / step))
    }

    /// Two numbers of about the same size, in one unit.
    pub(super) fn show_two(self, one: f64, other: f64) -> String {
        let (step, name) = self.scale(one);
        format!("{} / {}{name}", short(one / step), short(other / step))
    }

    /// The ratio by which `ours` is better than `theirs`: above 1 we are ahead.
    fn ratio(self, theirs: f64, ours: f64) -> f64 {
        match self {
            Unit::Rate => ours / theirs,
            _ if theirs == ours => 1.0, // both may be 0
            _ => theirs / ours,
        }
    }
}

/// A target of our library in a workload.
///
/// Ratios are compared with the median of all rounds, absolute values with the least.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// This many times as good as the best peer.
    Ratio(f64),
    /// This many times as good as the peer of this name.
    RatioTo(&'static str, f64),
    /// At most this value, in the unit of the workload.
    AtMost(f64),
    /// At most this value, for the contestant of this name.
    AtMostOf(&'static str, f64),
    /// At most this many times the limit, which must be a contestant: see [`Role::Limit`].
    TimesLimit(f64),
}

/// How ours stands to a target.
pub(super) struct Verdict {
    pub(super) wanted: String,
    pub(super) got: f64,
    /// `got` as text.
    pub(super) is: String,
    pub(super) met: bool,
    /// The fraction of the target by which it is missed; 0 if it is met.
    pub(super) missed_by: f64,
}

/// The role of a contestant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A variant of our library. Ratios and targets are those of the first one.
    Ours,
    /// A peer.
    Peer,
    /// A limit: the best that the machine allows, such as the time to read the memory.
    Limit,
}

/// The unit of a workload's size in a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Items: 1K is 1000.
    Items,
    /// Bytes: 1 KiB is 1024.
    Bytes,
}

impl Scale {
    /// A size as text.
    pub(super) fn show(self, size: f64) -> String {
        let (base, names) = match self {
            Scale::Items => (1000.0, ["", "K", "M", "G", "T"]),
            Scale::Bytes => (1024.0, [" B", " KiB", " MiB", " GiB", " TiB"]),
        };
        let (mut size, mut name) = (size, 0);
        while size >= base && name + 1 < names.len() {
            size /= base;
            name += 1;
        }
        format!("{}{}", (size * 10.0).round() / 10.0, names[name])
    }
}

/// A place in a series of sizes.
#[derive(Clone, Debug)]
pub(super) struct Size {
    /// The name of the series: the workload without the size.
    pub(super) curve: String,
    pub(super) value: f64,
    pub(super) scale: Scale,
}

/// The meaning of a number of a contest.
#[derive(Clone, Debug)]
pub struct Workload {
    pub(super) name: String,
    pub(super) unit: Unit,
    pub(super) targets: Vec<Target>,
    /// The bound that stops the targets that are missed: a key that docs/benchmarks.md explains.
    pub(super) bound: Option<&'static str>,
    pub(super) size: Option<Size>,
}

impl Workload {
    /// A workload of this name.
    pub fn new(name: impl Into<String>, unit: Unit) -> Self {
        Workload {
            name: name.into(),
            unit,
            targets: Vec::new(),
            bound: None,
            size: None,
        }
    }

    /// A workload that counts nanoseconds.
    pub fn time(name: impl Into<String>) -> Self {
        Workload::new(name, Unit::Time)
    }

    /// A workload of a series that differs in size only. Its nanoseconds grow with the size, and
    /// the report has the slope.
    pub fn grown(curve: &str, value: f64, scale: Scale) -> Self {
        Workload {
            size: Some(Size {
                curve: curve.to_owned(),
                value,
                scale,
            }),
            ..Workload::time(format!("{curve}, {}", scale.show(value)))
        }
    }

    /// The same, with one more target.
    pub fn target(mut self, target: Target) -> Self {
        self.targets.push(target);
        self
    }

    /// The same, with the name of the bound by which its targets are missed, where they are.
    pub fn bound(mut self, bound: &'static str) -> Self {
        self.bound = Some(bound);
        self
    }
}

/// The samples of a contestant.
pub(super) struct Cell {
    pub(super) name: &'static str,
    pub(super) role: Role,
    /// One for each round.
    pub(super) samples: Vec<f64>,
}

impl Cell {
    pub(super) fn min(&self) -> f64 {
        self.samples.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub(super) fn median(&self) -> f64 {
        median(&self.samples)
    }
}

/// The ratios of another contestant to ours: the least, the median and the greatest of all rounds.
pub(super) struct Ratio {
    pub(super) least: f64,
    pub(super) median: f64,
    pub(super) greatest: f64,
}

pub(super) struct Row {
    pub(super) family: &'static str,
    pub(super) workload: Workload,
    pub(super) cells: Vec<Cell>,
}

impl Row {
    pub(super) fn of(&self, role: Role) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(move |cell| cell.role == role)
    }

    pub(super) fn ours(&self) -> Option<&Cell> {
        self.of(Role::Ours).next()
    }

    pub(super) fn best_peer(&self) -> Option<&Cell> {
        let worse = |a: &&Cell, b: &&Cell| match self.workload.unit {
            Unit::Rate => b.median().total_cmp(&a.median()),
            _ => a.median().total_cmp(&b.median()),
        };
        self.of(Role::Peer).min_by(worse)
    }

    pub(super) fn ratio(&self, other: &Cell) -> Option<Ratio> {
        let ours = self.ours()?;
        let rounds = other.samples.iter().zip(&ours.samples);
        let ratio = |(theirs, ours): (&f64, &f64)| self.workload.unit.ratio(*theirs, *ours);
        let ratios: Vec<f64> = rounds.map(ratio).collect();
        Some(Ratio {
            least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            median: median(&ratios),
            greatest: ratios.iter().copied().fold(0.0, f64::max),
        })
    }

    /// The verdict on a target. `None` if the other side of the comparison is missing.
    pub(super) fn verdict(&self, target: Target) -> Option<Verdict> {
        let at_least = |wanted: f64, got: f64, whom: &str| Verdict {
            wanted: format!("{whom} ≥ {}", short(wanted)),
            got,
            is: short(got),
            met: got >= wanted,
            missed_by: (1.0 - got / wanted).max(0.0),
        };
        let at_most = |wanted: f64, got: f64, shown: String, is: String| Verdict {
            wanted: shown,
            got,
            is,
            met: got <= wanted,
            missed_by: (got / wanted - 1.0).max(0.0),
        };
        Some(match target {
            Target::Ratio(wanted) => {
                at_least(wanted, self.ratio(self.best_peer()?)?.median, "ratio")
            }
            Target::RatioTo(name, wanted) => {
                let peer = self.cells.iter().find(|cell| cell.name == name)?;
                at_least(wanted, self.ratio(peer)?.median, name)
            }
            Target::AtMost(wanted) => {
                let (unit, least) = (self.workload.unit, self.ours()?.min());
                at_most(
                    wanted,
                    least,
                    format!("≤ {}", unit.show(wanted)),
                    unit.show(least),
                )
            }
            Target::AtMostOf(name, wanted) => {
                let cell = self.cells.iter().find(|cell| cell.name == name)?;
                let (unit, least) = (self.workload.unit, cell.min());
                at_most(
                    wanted,
                    least,
                    format!("{name} ≤ {}", unit.show(wanted)),
                    unit.show(least),
                )
            }
            Target::TimesLimit(wanted) => {
                let limit = self.of(Role::Limit).next()?;
                let times = 1.0 / self.ratio(limit)?.median;
                at_most(
                    wanted,
                    times,
                    format!("≤ {} x limit", short(wanted)),
                    short(times),
                )
            }
        })
    }

    /// All verdicts, with the targets that cannot be judged as text.
    pub(super) fn verdicts(&self) -> impl Iterator<Item = (Target, Option<Verdict>)> {
        let targets = self.workload.targets.iter();
        targets.map(|target| (*target, self.verdict(*target)))
    }
}

pub(super) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

/// Three significant digits.
pub(super) fn short(number: f64) -> String {
    match number.abs() {
        0.0 => "0".to_owned(),
        infinite if infinite.is_infinite() => "∞".to_owned(),
        below if below < 9.995 => format!("{number:.2}"),
        below if below < 99.95 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}
