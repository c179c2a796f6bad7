//! The records of a run, as a table, a verdict and JSON.

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use comfy_table::{CellAlignment, Table, TableComponent, presets};
use dirtymap::meter::Prediction;
use serde::Serialize;

use crate::cli::{Sabotage, TableFormat};
use crate::compare::Comparison;
use crate::text;

/// The kind of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RoundKind {
    /// Copies every page, while the devices run.
    Full,
    /// Copies the pages that became dirty since the round before, while the devices run.
    Precopy,
    /// Copies the rest, with the devices stopped. Its time is the downtime.
    Final,
}

impl RoundKind {
    /// One word for tables and legends.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            RoundKind::Full => "full",
            RoundKind::Precopy => "precopy",
            RoundKind::Final => "final",
        }
    }
}

/// One round. Pages are pages of 4 KiB, independent of the page size of the table.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RoundRecord {
    /// 0 for the full copy.
    pub(crate) round: u32,
    /// The kind of the round.
    pub(crate) kind: RoundKind,
    /// The start of the round, in milliseconds after the start of the migration.
    pub(crate) started_ms: u64,
    /// Pages that the harvest reported; all pages in the full copy.
    pub(crate) dirty_pages: u64,
    /// Bytes that went over the link.
    pub(crate) bytes_copied: u64,
    /// Microseconds of the harvest.
    pub(crate) harvest_us: u64,
    /// Microseconds of the sync.
    pub(crate) flush_us: u64,
    /// Microseconds of the copy.
    pub(crate) copy_us: u64,
    /// Invalidation commands in the time of the round, those for the backup and the meter included.
    pub(crate) invalidation_commands: u64,
    /// Translations that IOTLBs dropped because of them.
    pub(crate) dropped_translations: u64,
    /// Writes in flight that were waited for.
    pub(crate) drained_writes: u64,
    /// Dirty pages for each second since the harvest before.
    pub(crate) dirty_rate_pages_per_s: f64,
}

/// One increment of the backup.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct IncrementRecord {
    /// 0 for the first one, which has everything.
    pub(crate) increment: u32,
    /// Its start, in milliseconds after the start of the backup.
    pub(crate) started_ms: u64,
    /// Pages that its harvest reported.
    pub(crate) dirty_pages: u64,
    /// Bytes that were copied.
    pub(crate) bytes_copied: u64,
    /// Microseconds of all of it.
    pub(crate) took_us: u64,
}

/// The backup.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BackupRecord {
    /// Increment by increment.
    pub(crate) increments: Vec<IncrementRecord>,
    /// The result of the comparison.
    pub(crate) comparison: Comparison,
}

/// One look of the rate meter.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LookRecord {
    /// Its time, in milliseconds after the start of the meter.
    pub(crate) at_ms: u64,
    /// Pages that were written since the look before.
    pub(crate) dirty_pages: u64,
    /// The rate after it, with decay.
    pub(crate) rate_bytes_per_s: f64,
    /// Microseconds of the look.
    pub(crate) took_us: u64,
}

/// The looks of the rate meter, compared with a log of all writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct MeterCheck {
    /// Pages of all looks.
    pub(crate) pages: u64,
    /// Pages that a look had to have and did not.
    pub(crate) missed: u64,
    /// Pages of a look that no write had touched since the look before, which did not have them.
    pub(crate) excess: u64,
    /// The same of pages that the look before had: another consumer's harvest had them in hand.
    pub(crate) twice: u64,
    /// Pages by which the counts of the looks are wrong.
    pub(crate) miscounted: u64,
}

impl MeterCheck {
    /// Whether each look has exactly what was written.
    pub(crate) fn exact(&self) -> bool {
        (self.missed, self.excess, self.miscounted) == (0, 0, 0)
    }
}

/// The rate of one area.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct AreaRate {
    /// The file of the trace.
    pub(crate) file: String,
    /// Bytes a second at the end of the run.
    pub(crate) rate_bytes_per_s: f64,
}

/// The rate meter.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MeterRecord {
    /// Look by look.
    pub(crate) looks: Vec<LookRecord>,
    /// The areas with the highest rates, the highest first.
    pub(crate) hottest: Vec<AreaRate>,
    /// The result of the comparison.
    pub(crate) check: MeterCheck,
}

/// What the meter predicted after the full copy.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct PredictionRecord {
    /// Rounds after the full copy, the last one included.
    pub(crate) rounds: u32,
    /// Microseconds with the machine stopped.
    pub(crate) downtime_us: u64,
    /// Milliseconds of all of it, the full copy included.
    pub(crate) migration_ms: u64,
    /// Whether a round becomes short enough.
    pub(crate) converges: bool,
}

impl From<Prediction> for PredictionRecord {
    fn from(said: Prediction) -> Self {
        PredictionRecord {
            rounds: said.rounds,
            downtime_us: u64::try_from(said.downtime.as_micros()).unwrap_or(u64::MAX),
            migration_ms: u64::try_from(said.took.as_millis()).unwrap_or(u64::MAX),
            converges: said.converges,
        }
    }
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RunRecord {
    /// The file name of the trace.
    pub(crate) trace: String,
    /// Files in the trace; each is an area.
    pub(crate) files: u64,
    /// Writes in the trace.
    pub(crate) writes_total: u64,
    /// Writes that devices had issued when they were stopped.
    pub(crate) writes_replayed: u64,
    /// Pages of 4 KiB in all areas.
    pub(crate) pages: u64,
    /// The format of the IO page table.
    pub(crate) format: TableFormat,
    /// The page size of the IO page table, in bytes.
    pub(crate) page_size: u64,
    /// Devices that wrote.
    pub(crate) devices: u32,
    /// CPU threads that wrote and marked.
    pub(crate) cpus: u32,
    /// The seed.
    pub(crate) seed: u64,
    /// The factor of the recorded speed; `None` without pauses.
    pub(crate) speed: Option<f64>,
    /// The limit of the link; `None` without limit.
    pub(crate) bandwidth_bytes_per_s: Option<f64>,
    /// The step that was broken on purpose.
    pub(crate) sabotage: Option<Sabotage>,
    /// Milliseconds from the first copy to the end of the last.
    pub(crate) migration_ms: u64,
    /// Round by round.
    pub(crate) rounds: Vec<RoundRecord>,
    /// The result of the comparison.
    pub(crate) comparison: Comparison,
    /// The backup beside the migration.
    pub(crate) backup: BackupRecord,
    /// The rate meter beside the migration.
    pub(crate) meter: MeterRecord,
    /// `None` without a limit of the link.
    pub(crate) prediction: Option<PredictionRecord>,
    /// Totals of the library and the simulator, by name.
    pub(crate) counters: BTreeMap<&'static str, u64>,
}

impl RunRecord {
    /// Whether every page of every area was compared and is identical, in both copies, and each
    /// look of the meter is exact.
    pub(crate) fn verified(&self) -> bool {
        let whole = |copy: &Comparison| copy.identical() && copy.pages_compared == self.pages;
        whole(&self.comparison) && whole(&self.backup.comparison) && self.meter.check.exact()
    }

    /// Microseconds for which the devices stood still.
    pub(crate) fn downtime_us(&self) -> u64 {
        let last = self
            .rounds
            .iter()
            .filter(|round| round.kind == RoundKind::Final);
        last.map(|round| round.harvest_us + round.flush_us + round.copy_us)
            .sum()
    }

    /// Prints the table, then the verdict.
    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "{}", self.table())?;
        writeln!(out)?;
        let copied = self.rounds.iter().map(|round| round.bytes_copied).sum();
        writeln!(
            out,
            "{} writes replayed ({:.2} times the trace), {} copied in {:.2} s, downtime {}",
            text::count(self.writes_replayed),
            self.writes_replayed as f64 / self.writes_total as f64,
            text::bytes(copied),
            self.migration_ms as f64 / 1e3,
            text::micros(self.downtime_us()),
        )?;
        self.print_others(out)?;
        if self.verified() {
            // Scripts read this line, which is always the last, and has plain numbers.
            let Comparison {
                pages_compared,
                bytes_compared,
                ..
            } = self.comparison;
            if let Some(sabotage) = self.sabotage {
                writeln!(
                    out,
                    "sabotage {} had no effect in this run",
                    sabotage.name()
                )?;
            }
            return writeln!(
                out,
                "verified: {pages_compared} pages identical ({bytes_compared} bytes)"
            );
        }
        self.print_loss(out)
    }

    /// One line for each round.
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_style(TableComponent::HeaderLines, '-');
        table.set_header([
            "round",
            "kind",
            "start",
            "dirty pages",
            "pages/s",
            "copied",
            "harvest",
            "flush",
            "copy",
            "inval.",
            "dropped",
            "drained",
        ]);
        for record in &self.rounds {
            table.add_row([
                record.round.to_string(),
                record.kind.name().to_owned(),
                format!("{:.2} s", record.started_ms as f64 / 1e3),
                text::count(record.dirty_pages),
                match record.kind {
                    RoundKind::Full => "-".to_owned(),
                    _ => text::count(record.dirty_rate_pages_per_s as u64),
                },
                text::bytes(record.bytes_copied),
                text::micros(record.harvest_us),
                text::micros(record.flush_us),
                text::micros(record.copy_us),
                text::count(record.invalidation_commands),
                text::count(record.dropped_translations),
                text::count(record.drained_writes),
            ]);
        }
        for (at, column) in table.column_iter_mut().enumerate() {
            // Words to the left, numbers to the right.
            const KIND: usize = 1;
            column.set_padding((0, 2));
            column.set_cell_alignment(if at == KIND {
                CellAlignment::Left
            } else {
                CellAlignment::Right
            });
        }
        table
    }

    /// The backup, the meter, and its prediction, a line each.
    fn print_others(&self, out: &mut impl Write) -> io::Result<()> {
        let increments = &self.backup.increments;
        let copied = increments
            .iter()
            .map(|increment| increment.bytes_copied)
            .sum();
        let identical = self.backup.comparison.identical();
        writeln!(
            out,
            "backup: {}, {} in all, {}",
            text::plural(increments.len() as u64, "increment"),
            text::bytes(copied),
            if identical {
                "identical"
            } else {
                "NOT identical"
            },
        )?;
        let looks = &self.meter.looks;
        let rate = looks.last().map_or(0.0, |look| look.rate_bytes_per_s);
        let hottest: Vec<String> = self
            .meter
            .hottest
            .iter()
            .map(|area| {
                let rate = text::bytes(area.rate_bytes_per_s as u64);
                format!("{rate}/s in {}", area.file)
            })
            .collect();
        writeln!(
            out,
            "meter: {}, {} written, {}; {}/s at the end: {}",
            text::plural(looks.len() as u64, "look"),
            text::plural(self.meter.check.pages, "page"),
            if self.meter.check.exact() {
                "exact"
            } else {
                "NOT exact"
            },
            text::bytes(rate as u64),
            hottest.join(", "),
        )?;
        if let Some(said) = &self.prediction {
            let rounds = self.rounds.len().saturating_sub(1) as u64;
            writeln!(
                out,
                "predicted after the full copy: {}, downtime {}, {:.2} s{}; it took {}, {}, \
                 {:.2} s",
                text::plural(said.rounds.into(), "round"),
                text::micros(said.downtime_us),
                said.migration_ms as f64 / 1e3,
                if said.converges {
                    ""
                } else {
                    ", no round short enough"
                },
                text::plural(rounds, "round"),
                text::micros(self.downtime_us()),
                self.migration_ms as f64 / 1e3,
            )?;
        }
        Ok(())
    }

    /// The losses.
    fn print_loss(&self, out: &mut impl Write) -> io::Result<()> {
        self.print_differences(out, "", &self.comparison)?;
        self.print_differences(out, "the backup: ", &self.backup.comparison)?;
        let check = &self.meter.check;
        if !check.exact() {
            writeln!(
                out,
                "NOT VERIFIED: the meter: {} missed, {} too many, {} miscounted",
                text::plural(check.missed, "page"),
                text::count(check.excess),
                text::count(check.miscounted),
            )?;
        }
        if self.comparison.identical() && self.backup.comparison.identical() && check.exact() {
            return Ok(());
        }
        match self.sabotage {
            Some(sabotage) => writeln!(
                out,
                "sabotage {}: {}",
                sabotage.name(),
                sabotage.broken_step()
            ),
            None => writeln!(out, "no step was broken on purpose: this is a defect"),
        }
    }

    /// The lost pages of one copy, and their places.
    fn print_differences(
        &self,
        out: &mut impl Write,
        whose: &str,
        found: &Comparison,
    ) -> io::Result<()> {
        if found.pages_compared != self.pages {
            writeln!(
                out,
                "NOT VERIFIED: {whose}only {} of {} pages were compared",
                text::count(found.pages_compared),
                text::count(self.pages)
            )?;
        }
        if found.identical() {
            return Ok(());
        }
        writeln!(
            out,
            "NOT VERIFIED: {whose}{} of {} differ in {}: their last writes were lost",
            text::count(found.differing_pages),
            text::plural(found.pages_compared, "page"),
            text::plural(found.differing_bytes, "byte"),
        )?;
        for range in &found.first_differing_ranges {
            writeln!(
                out,
                "  IOVA [{:#x}, {:#x}]: {} from byte {} of {}, {} lost",
                range.iova_start,
                range.iova_last,
                text::plural(range.pages, "page"),
                text::count(range.file_offset),
                range.file,
                text::plural(range.differing_bytes, "byte"),
            )?;
        }
        let more = found.differing_ranges - found.first_differing_ranges.len() as u64;
        if more > 0 {
            writeln!(out, "  and {}", text::plural(more, "more range"))?;
        }
        Ok(())
    }

    /// Writes everything to the file at `path` as one JSON object.
    pub(crate) fn write_json(&self, path: &Path) -> io::Result<()> {
        /// The record with the values that are computed from it.
        #[derive(Serialize)]
        struct Whole<'a> {
            verified: bool,
            downtime_us: u64,
            #[serde(flatten)]
            run: &'a RunRecord,
        }
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer_pretty(
            &mut file,
            &Whole {
                verified: self.verified(),
                downtime_us: self.downtime_us(),
                run: self,
            },
        )?;
        writeln!(file)?;
        file.flush()
    }
}
