//! The report: a table, or JSON.

use std::fmt;
use std::fs;
use std::io;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use crate::cli::Cli;
use crate::copies::Copies;
use crate::verify::Restored;
use crate::work::INCREMENTS;
use crate::writers::{Plan, WRITERS};

/// What a run was, and what came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) trace: String,
    pub(crate) disk_bytes: u64,
    pub(crate) writes: u64,
    pub(crate) kills: u64,
    pub(crate) log_bytes: u64,
    /// The forms that every generation was restored from.
    pub(crate) forms: &'static str,
    pub(crate) generations: Vec<Generation>,
}

/// One generation of one consumer.
#[derive(Debug, Serialize)]
pub(crate) struct Generation {
    pub(crate) consumer: String,
    pub(crate) number: u64,
    pub(crate) seconds: f64,
    /// Why it is everything, if it is.
    pub(crate) everything: Option<String>,
    pub(crate) runs: u64,
    pub(crate) bytes: u64,
    /// Extents that were open when the worker before was killed, for its first generation after.
    pub(crate) recovered_extents: u64,
    pub(crate) pages_that_differ: u64,
}

impl Report {
    pub(crate) fn new(
        cli: &Cli,
        plan: &Plan,
        kills: u64,
        restored: Vec<Restored>,
        copies: &Copies<'_>,
    ) -> io::Result<Report> {
        let first = restored.iter().map(|one| one.head.at_ms).min().unwrap_or(0);
        let mut recovered = 0;
        let generations = restored.into_iter().map(|Restored { head, differ }| {
            // All generations of a worker have the count of its recovery.
            let fresh = head.recovered_extents != recovered && head.consumer == INCREMENTS;
            recovered = head.recovered_extents;
            Generation {
                number: head.number,
                seconds: (head.at_ms - first) as f64 / 1e3,
                runs: head.runs.len() as u64,
                bytes: head.bytes(),
                recovered_extents: if fresh { head.recovered_extents } else { 0 },
                pages_that_differ: differ,
                consumer: head.consumer,
                everything: head.why,
            }
        });
        Ok(Report {
            trace: plan.name.clone(),
            disk_bytes: cli.size << 20,
            writes: (0..WRITERS).map(|thread| plan.writes(thread)).sum(),
            kills,
            log_bytes: fs::metadata(copies.folder.join("store").join("log"))?.len(),
            forms: copies.forms(),
            generations: generations.collect(),
        })
    }

    pub(crate) fn verified(&self) -> bool {
        self.generations
            .iter()
            .all(|one| one.pages_that_differ == 0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header([
            "consumer", "gen", "after", "runs", "read", "of disk", "", "differ",
        ]);
        for one in &self.generations {
            let note = match (&one.everything, one.recovered_extents) {
                (Some(why), _) => format!("everything: {why}"),
                (None, 0) => String::new(),
                (None, open) => format!("after kill -9, {open} extents were open"),
            };
            table.add_row([
                one.consumer.clone(),
                one.number.to_string(),
                format!("{:.1} s", one.seconds),
                HumanCount(one.runs).to_string(),
                HumanBytes(one.bytes).to_string(),
                format!("{:.2} %", one.bytes as f64 * 100.0 / self.disk_bytes as f64),
                note,
                one.pages_that_differ.to_string(),
            ]);
        }
        for column in [1, 2, 3, 4, 5, 7] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        writeln!(f, "{table}")?;
        writeln!(
            f,
            "{} pages of {} were written, {} kills, a log of {}",
            HumanCount(self.writes),
            self.trace,
            self.kills,
            HumanBytes(self.log_bytes),
        )?;
        let differ = self
            .generations
            .iter()
            .filter(|one| one.pages_that_differ > 0);
        match differ.count() {
            0 => writeln!(
                f,
                "verified: {} generations restored from {}, each identical byte for byte",
                self.generations.len(),
                self.forms
            ),
            some => writeln!(
                f,
                "NOT VERIFIED: {some} of {} generations differ",
                self.generations.len()
            ),
        }
    }
}
