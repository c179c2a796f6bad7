//! The results, as a table and as records, and the problems of them.

use std::fmt::Write;

use serde_json::{Value, json};

use super::row::{Cell, Ratio, Role, Row, Unit, Workload, short};

/// All results.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    /// Lines below the table.
    notes: Vec<(&'static str, String)>,
    /// The problems that make the numbers invalid.
    problems: Vec<String>,
}

/// The growth of a contestant's time with the size: the slope of the logarithm of the time over
/// that of the size. 0 means that the size does not matter, 1 that the time is in proportion.
pub(super) struct Curve<'a> {
    pub(super) peer: &'static str,
    /// Size and time.
    pub(super) points: Vec<(f64, f64)>,
    pub(super) rows: Vec<&'a Row>,
}

impl Curve<'_> {
    /// The slope by least squares. `None` for fewer than two sizes.
    pub(super) fn slope(&self) -> Option<f64> {
        let logs = self.points.iter().map(|(x, y)| (x.ln(), y.ln()));
        let logs: Vec<(f64, f64)> = logs.collect();
        let count = logs.len() as f64;
        let (x, y) = logs
            .iter()
            .fold((0.0, 0.0), |sum, log| (sum.0 + log.0, sum.1 + log.1));
        let (x, y) = (x / count, y / count);
        let covariance: f64 = logs.iter().map(|log| (log.0 - x) * (log.1 - y)).sum();
        let variance: f64 = logs.iter().map(|log| (log.0 - x).powi(2)).sum();
        (variance > 0.0).then(|| covariance / variance)
    }
}

impl Report {
    /// Adds a row: for each contestant a name, a role and a sample for each round.
    ///
    /// A row without ours, without a sample, or with a sample that is no number is a
    /// [problem](Report::problems).
    pub fn add(
        &mut self,
        family: &'static str,
        workload: Workload,
        cells: Vec<(&'static str, Role, Vec<f64>)>,
    ) {
        let cells = cells.into_iter().map(|(name, role, samples)| Cell {
            name,
            role,
            samples,
        });
        let row = Row {
            family,
            workload,
            cells: cells.collect(),
        };
        let least = match row.workload.unit {
            Unit::Count => 0.0,
            _ => f64::MIN_POSITIVE,
        };
        for cell in &row.cells {
            let broken = |sample: &&f64| !sample.is_finite() || **sample < least;
            match cell.samples.iter().find(broken) {
                Some(sample) => self.problem(
                    family,
                    format!(
                        "{}: {} has the sample {sample}",
                        row.workload.name, cell.name
                    ),
                ),
                None if cell.samples.is_empty() => self.problem(
                    family,
                    format!("{}: {} has no samples", row.workload.name, cell.name),
                ),
                None => {}
            }
        }
        if row.ours().is_none() {
            self.problem(family, format!("{}: ours is missing", row.workload.name));
        }
        for (target, _) in row.verdicts().filter(|(_, verdict)| verdict.is_none()) {
            let text = format!("{}: no contestant for {target:?}", row.workload.name);
            self.problem(family, text);
        }
        self.rows.push(row);
    }

    /// Adds a line below the table of `family`, once.
    pub fn note(&mut self, family: &'static str, note: String) {
        if !self
            .notes
            .iter()
            .any(|(of, other)| *of == family && *other == note)
        {
            self.notes.push((family, note));
        }
    }

    /// Records a problem that makes the numbers invalid: outputs that differ, a missing row.
    pub fn problem(&mut self, family: &'static str, text: String) {
        self.problems.push(format!("{family}: {text}"));
    }

    /// The problems that make the numbers invalid, a line for each.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The number of rows of a family.
    pub fn rows_of(&self, family: &str) -> usize {
        self.rows(family).count()
    }

    pub(super) fn rows<'a>(&'a self, family: &str) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.family == family)
    }

    /// The contestants of a family, in the order of the rows.
    pub(super) fn peers(&self, family: &str) -> Vec<&'static str> {
        let mut peers: Vec<&'static str> = Vec::new();
        for cell in self.rows(family).flat_map(|row| &row.cells) {
            if !peers.contains(&cell.name) {
                peers.push(cell.name);
            }
        }
        peers
    }

    /// The series of a family, by name.
    pub(super) fn curves<'a>(&'a self, family: &str) -> Vec<(String, Vec<Curve<'a>>)> {
        let mut curves: Vec<(String, Vec<Curve<'_>>)> = Vec::new();
        for row in self.rows(family) {
            let Some(size) = &row.workload.size else {
                continue;
            };
            if !curves.iter().any(|(name, _)| *name == size.curve) {
                curves.push((size.curve.clone(), Vec::new()));
            }
            let Some((_, of_name)) = curves.iter_mut().find(|(name, _)| *name == size.curve) else {
                continue;
            };
            for cell in &row.cells {
                let point = (size.value, cell.min());
                match of_name.iter_mut().find(|curve| curve.peer == cell.name) {
                    Some(curve) => {
                        curve.points.push(point);
                        curve.rows.push(row);
                    }
                    None => of_name.push(Curve {
                        peer: cell.name,
                        points: vec![point],
                        rows: vec![row],
                    }),
                }
            }
        }
        curves
    }

    /// The table of a family, in Markdown, with its notes.
    pub fn table(&self, family: &str) -> String {
        let peers = self.peers(family);
        let with_targets = self
            .rows(family)
            .any(|row| !row.workload.targets.is_empty());
        let with_peers = self.rows(family).any(|row| row.best_peer().is_some());
        let mut table = String::from("| workload |");
        for peer in &peers {
            let _ = write!(table, " {peer} |");
        }
        let mut columns = peers.len();
        for (head, _) in [
            (" best peer : ours |", with_peers),
            (" target |", with_targets),
        ]
        .iter()
        .filter(|(_, with)| *with)
        {
            table.push_str(head);
            columns += 1;
        }
        table.push_str("\n|---|");
        table.push_str(&"--:|".repeat(columns));
        table.push('\n');
        for row in self.rows(family) {
            let ratio = row.best_peer().and_then(|peer| row.ratio(peer));
            let lost = ratio.as_ref().is_some_and(|ratio| ratio.median < 1.0);
            let mark = if lost { " ▼" } else { "" };
            let _ = write!(table, "| {}{mark} |", row.workload.name);
            for peer in &peers {
                let cell = row.cells.iter().find(|cell| cell.name == *peer);
                let _ = write!(
                    table,
                    " {} |",
                    cell.map_or_else(String::new, |cell| shown(row, cell))
                );
            }
            if with_peers {
                let _ = write!(table, " {} |", ratio.map_or_else(String::new, shown_ratio));
            }
            if with_targets {
                let _ = write!(table, " {} |", targets(row));
            }
            table.push('\n');
        }
        for (name, curves) in self.curves(family) {
            let slopes = curves.iter().filter_map(|curve| {
                let slope = curve.slope()?;
                Some(format!("{} {slope:.2}", curve.peer))
            });
            let slopes: Vec<String> = slopes.collect();
            let _ = write!(table, "\nSlope of *{name}*: {}.\n", slopes.join(",\n"));
        }
        for (_, note) in self.notes.iter().filter(|(of, _)| *of == family) {
            let _ = write!(table, "\n{note}\n");
        }
        table
    }

    /// How many targets of a family are met, and a line for each target: whether it is met, and the
    /// bound that stops it if it is not.
    pub fn targets_of(&self, family: &str) -> String {
        let (mut met, mut all, mut lines) = (0, 0, String::new());
        for row in self.rows(family) {
            for verdict in row.verdicts().filter_map(|(_, verdict)| verdict) {
                all += 1;
                met += usize::from(verdict.met);
                let name = &row.workload.name;
                let (wanted, is) = (&verdict.wanted, &verdict.is);
                let _ = match verdict.met {
                    true => writeln!(lines, "  met     {name}: {wanted}; is {is}"),
                    false => writeln!(
                        lines,
                        "  MISSED  {name}: {wanted}; is {is}, {}",
                        missed(row, verdict.missed_by)
                    ),
                };
            }
        }
        format!("{family}: {met} of {all} targets met\n{lines}")
    }

    /// The least number of a contestant in a row: as text, and in the unit of the row.
    pub(super) fn least(&self, family: &str, workload: &str, peer: &str) -> Option<(String, f64)> {
        let mut rows = self.rows(family);
        let row = rows.find(|row| row.workload.name == workload)?;
        let cell = row.cells.iter().find(|cell| cell.name == peer)?;
        Some((row.workload.unit.show(cell.min()), cell.min()))
    }

    /// One record for each row and contestant.
    pub fn records(&self) -> Value {
        let mut records = Vec::new();
        for row in &self.rows {
            let targets: Vec<Value> = row
                .verdicts()
                .filter_map(|(_, verdict)| verdict)
                .map(|verdict| {
                    json!({ "wanted": verdict.wanted, "got": verdict.got, "met": verdict.met })
                })
                .collect();
            for cell in &row.cells {
                let ratio = row.ratio(cell);
                let key = row.workload.unit.key();
                let ours = row.ours().is_some_and(|ours| ours.name == cell.name);
                let mut record = json!({
                    "family": row.family,
                    "workload": row.workload.name,
                    "peer": cell.name,
                    "role": match cell.role {
                        Role::Ours => "ours",
                        Role::Peer => "peer",
                        Role::Limit => "limit",
                    },
                    format!("{key}_min"): cell.min(),
                    format!("{key}_median"): cell.median(),
                    "ratio": ratio.map(|ratio| json!({
                        "least": ratio.least,
                        "median": ratio.median,
                        "greatest": ratio.greatest,
                    })),
                    "rounds": cell.samples.len(),
                });
                if let Some(size) = &row.workload.size {
                    record["curve"] = json!(size.curve);
                    record["size"] = json!(size.value);
                }
                if ours && !targets.is_empty() {
                    record["targets"] = json!(targets);
                }
                records.push(record);
            }
        }
        Value::Array(records)
    }
}

/// The result of one contestant.
fn shown(row: &Row, cell: &Cell) -> String {
    let unit = row.workload.unit;
    let (min, median) = (cell.min(), cell.median());
    // Bytes and counts rarely differ from round to round.
    if min == median {
        unit.show(min)
    } else {
        unit.show_two(min, median)
    }
}

fn shown_ratio(ratio: Ratio) -> String {
    let (least, median, greatest) = (ratio.least, ratio.median, ratio.greatest);
    let shown = format!("**{}**", short(median));
    if least == greatest {
        shown
    } else {
        format!("{shown} ({} to {})", short(least), short(greatest))
    }
}

/// The targets of a row, each met or missed by a percentage.
fn targets(row: &Row) -> String {
    let shown = row.verdicts().filter_map(|(_, verdict)| {
        let verdict = verdict?;
        Some(match verdict.met {
            true => format!("{}: met", verdict.wanted),
            false => format!("{}: **{}**", verdict.wanted, missed(row, verdict.missed_by)),
        })
    });
    shown.collect::<Vec<_>>().join("; ")
}

/// By how much a target of `row` is missed, and the bound that stops it.
fn missed(row: &Row, by: f64) -> String {
    let bound = row.workload.bound.map(|bound| format!(", bound: {bound}"));
    format!("missed by {:.0} %{}", by * 100.0, bound.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::row::{Scale, Target};
    use super::*;

    fn report(unit: Unit, ours: Vec<f64>, theirs: Vec<f64>, target: Target) -> Report {
        let mut report = Report::default();
        let workload = Workload::new("w", unit).target(target);
        let cells = vec![("us", Role::Ours, ours), ("them", Role::Peer, theirs)];
        report.add("f", workload, cells);
        report
    }

    #[test]
    fn targets_are_met_or_missed_by_a_part_of_what_is_wanted() {
        let times = (vec![10.0, 20.0], vec![20.0, 20.0]);
        let of = |unit, target| {
            let report = report(unit, times.0.clone(), times.1.clone(), target);
            assert!(report.problems().is_empty(), "{:?}", report.problems());
            (report.targets_of("f"), report.table("f"))
        };
        let met = |target| {
            assert_eq!(
                of(Unit::Time, target).0.lines().next(),
                Some("f: 1 of 1 targets met")
            );
        };
        met(Target::Ratio(1.5));
        met(Target::AtMost(10.0));
        met(Target::AtMostOf("them", 20.0));
        let (listed, table) = of(Unit::Time, Target::Ratio(3.0));
        assert_eq!(
            listed,
            "f: 0 of 1 targets met\n  MISSED  w: ratio ≥ 3.00; is 1.50, missed by 50 %\n"
        );
        assert!(table.contains("**missed by 50 %**"), "{table}");
        let (_, table) = of(Unit::Time, Target::AtMost(8.0));
        assert!(table.contains("≤ 8.00 ns: **missed by 25 %**"), "{table}");
        let (_, table) = of(Unit::Time, Target::AtMostOf("them", 16.0));
        assert!(
            table.contains("them ≤ 16.0 ns: **missed by 25 %**"),
            "{table}"
        );
        // Of rates more is better.
        let (_, table) = of(Unit::Rate, Target::RatioTo("them", 1.0));
        assert!(table.contains("| w ▼ |"), "{table}");
    }

    #[test]
    fn a_missed_target_names_its_bound_and_stays_missed() {
        let mut report = Report::default();
        let workload = Workload::time("w")
            .target(Target::Ratio(4.0))
            .bound("fence");
        let cells = vec![
            ("us", Role::Ours, vec![1.0]),
            ("them", Role::Peer, vec![2.0]),
        ];
        report.add("f", workload, cells);
        let listed = report.targets_of("f");
        assert!(listed.starts_with("f: 0 of 1 targets met\n"), "{listed}");
        let table = report.table("f");
        let shown = "ratio ≥ 4.00: **missed by 50 %, bound: fence**";
        assert!(table.contains(shown), "{table}");
    }

    #[test]
    fn what_makes_numbers_worthless_is_found() {
        let problems =
            |unit, ours, theirs, target| report(unit, ours, theirs, target).problems().len();
        let fine = Target::Ratio(1.0);
        assert_eq!(problems(Unit::Time, vec![1.0], vec![1.0], fine), 0);
        assert_eq!(problems(Unit::Time, vec![1.0], vec![f64::NAN], fine), 1);
        assert_eq!(problems(Unit::Time, vec![0.0], vec![1.0], fine), 1);
        assert_eq!(problems(Unit::Time, vec![1.0], vec![], fine), 1);
        assert_eq!(problems(Unit::Count, vec![0.0], vec![0.0], fine), 0);
        assert_eq!(
            problems(Unit::Time, vec![1.0], vec![1.0], Target::TimesLimit(1.0)),
            1
        );
        assert_eq!(
            problems(
                Unit::Time,
                vec![1.0],
                vec![1.0],
                Target::RatioTo("nobody", 1.0)
            ),
            1
        );
        let mut report = Report::default();
        report.add(
            "f",
            Workload::time("w"),
            vec![("them", Role::Peer, vec![1.0])],
        );
        assert_eq!(report.problems(), ["f: w: ours is missing"]);
    }

    #[test]
    fn slopes_are_those_of_the_logarithms() {
        let mut report = Report::default();
        for size in [1e3f64, 1e4, 1e6] {
            let cells = vec![
                ("linear", Role::Ours, vec![size * 3.0]),
                ("constant", Role::Peer, vec![7.0]),
                ("root", Role::Peer, vec![size.sqrt()]),
            ];
            report.add("f", Workload::grown("walk", size, Scale::Items), cells);
        }
        let curves = report.curves("f");
        assert_eq!(curves.len(), 1);
        let slopes: Vec<f64> = curves[0].1.iter().filter_map(Curve::slope).collect();
        for (slope, expected) in slopes.iter().zip([1.0, 0.0, 0.5]) {
            assert!((slope - expected).abs() < 1e-9, "{slope} for {expected}");
        }
        assert_eq!(slopes.len(), 3);
        assert!(
            report
                .table("f")
                .contains("Slope of *walk*: linear 1.00,\nconstant 0.00,\nroot 0.50.")
        );
    }

    #[test]
    fn numbers_are_read_in_the_unit_that_fits() {
        assert_eq!(Unit::Time.show(999.4), "999 ns");
        assert_eq!(Unit::Time.show(1_234_567.0), "1.23 ms");
        assert_eq!(Unit::Bytes.show(4096.0), "4.00 KiB");
        assert_eq!(Unit::Rate.show(2.5e9), "2.50 G/s");
        assert_eq!(Unit::Count.show(0.0), "0");
        assert_eq!(Scale::Items.show(100_000.0), "100K");
        assert_eq!(Scale::Bytes.show(1024.0 * 1024.0 * 1024.0 * 64.0), "64 GiB");
    }
}
