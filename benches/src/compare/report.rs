//! What was measured: as a table, and as records.

use std::fmt::Write;

use serde_json::{Value, json};

use super::Unit;

/// The samples of one peer in one workload.
struct Cell {
    peer: &'static str,
    ours: bool,
    /// One for each round.
    samples: Vec<f64>,
}

impl Cell {
    fn min(&self) -> f64 {
        self.samples.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn median(&self) -> f64 {
        median(&self.samples)
    }
}

struct Row {
    family: &'static str,
    workload: String,
    unit: Unit,
    cells: Vec<Cell>,
}

/// How many times longer a peer takes than ours: the least, the median and the greatest of all rounds.
struct Ratio {
    least: f64,
    median: f64,
    greatest: f64,
}

impl Row {
    fn ours(&self) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.ours)
    }

    fn best_peer(&self) -> Option<&Cell> {
        let peers = self.cells.iter().filter(|cell| !cell.ours);
        peers.min_by(|a, b| a.median().total_cmp(&b.median()))
    }

    fn ratio(&self, peer: &Cell) -> Option<Ratio> {
        let ours = self.ours()?;
        let rounds = peer.samples.iter().zip(&ours.samples);
        let ratios: Vec<f64> = rounds.map(|(theirs, ours)| theirs / ours).collect();
        Some(Ratio {
            least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            median: median(&ratios),
            greatest: ratios.iter().copied().fold(0.0, f64::max),
        })
    }
}

/// All that was measured.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    /// Lines below the table.
    notes: Vec<(&'static str, String)>,
}

impl Report {
    pub(super) fn add(
        &mut self,
        family: &'static str,
        workload: String,
        unit: Unit,
        cells: Vec<(&'static str, bool, Vec<f64>)>,
    ) {
        let cells = cells.into_iter().map(|(peer, ours, samples)| Cell {
            peer,
            ours,
            samples,
        });
        self.rows.push(Row {
            family,
            workload,
            unit,
            cells: cells.collect(),
        });
    }

    /// Adds a line below the table of `family`, once.
    pub(super) fn note(&mut self, family: &'static str, note: String) {
        if !self
            .notes
            .iter()
            .any(|(of, other)| *of == family && *other == note)
        {
            self.notes.push((family, note));
        }
    }

    /// One table for each family, in Markdown.
    pub fn table(&self, family: &str) -> String {
        let rows: Vec<&Row> = self
            .rows
            .iter()
            .filter(|row| row.family == family)
            .collect();
        let mut peers: Vec<&'static str> = Vec::new();
        for cell in rows.iter().flat_map(|row| &row.cells) {
            if !peers.contains(&cell.peer) {
                peers.push(cell.peer);
            }
        }
        let mut table = String::from("| workload |");
        for peer in &peers {
            let _ = write!(table, " {peer} |");
        }
        table.push_str(" best peer : ours |\n|---|");
        table.push_str(&"--:|".repeat(peers.len() + 1));
        table.push('\n');
        for row in rows {
            let ratio = row.best_peer().and_then(|peer| row.ratio(peer));
            let lost = ratio.as_ref().is_some_and(|ratio| ratio.median < 1.0);
            let unit = if row.unit == Unit::Bytes {
                ", bytes"
            } else {
                ""
            };
            let mark = if lost { " ▼" } else { "" };
            let _ = write!(table, "| {}{unit}{mark} |", row.workload);
            for peer in &peers {
                let cell = row.cells.iter().find(|cell| cell.peer == *peer);
                let _ = match cell {
                    Some(cell) if row.unit == Unit::Bytes => {
                        write!(table, " {} |", short(cell.min()))
                    }
                    Some(cell) => {
                        write!(table, " {} / {} |", short(cell.min()), short(cell.median()))
                    }
                    None => write!(table, " |"),
                };
            }
            let _ = match ratio {
                Some(ratio) => writeln!(
                    table,
                    " **{}** ({} to {}) |",
                    short(ratio.median),
                    short(ratio.least),
                    short(ratio.greatest)
                ),
                None => writeln!(table, " |"),
            };
        }
        for (_, note) in self.notes.iter().filter(|(of, _)| *of == family) {
            let _ = write!(table, "\n{note}\n");
        }
        table
    }

    /// One record for each row and peer.
    pub fn records(&self) -> Value {
        let mut records = Vec::new();
        for row in &self.rows {
            for cell in &row.cells {
                let ratio = row.ratio(cell).map(|ratio| ratio.median);
                let (min, median) = match row.unit {
                    Unit::Nanoseconds => ("ns_min", "ns_median"),
                    Unit::Bytes => ("bytes_min", "bytes_median"),
                };
                records.push(json!({
                    "family": row.family,
                    "workload": row.workload,
                    "peer": cell.peer,
                    "ours": cell.ours,
                    min: cell.min(),
                    median: cell.median(),
                    "ratio": ratio,
                    "rounds": cell.samples.len(),
                }));
            }
        }
        Value::Array(records)
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

/// Three digits that count.
fn short(number: f64) -> String {
    match number.abs() {
        below if below < 10.0 => format!("{number:.2}"),
        below if below < 100.0 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}
