//! The records of a run, as a table, a verdict and JSON.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use comfy_table::{CellAlignment, Table, TableComponent, presets};
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
    /// Invalidation commands that the sync needed.
    pub(crate) invalidation_commands: u64,
    /// Translations that IOTLBs dropped because of them.
    pub(crate) dropped_translations: u64,
    /// Writes in flight that the sync waited for.
    pub(crate) drained_writes: u64,
    /// Dirty pages for each second since the harvest before.
    pub(crate) dirty_rate_pages_per_s: f64,
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
    /// Totals of the library and the simulator, by name.
    pub(crate) counters: BTreeMap<&'static str, u64>,
}

impl RunRecord {
    /// Whether every page of every area was compared and is identical.
    pub(crate) fn verified(&self) -> bool {
        self.comparison.identical() && self.comparison.pages_compared == self.pages
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

    /// The lost pages and their places.
    fn print_loss(&self, out: &mut impl Write) -> io::Result<()> {
        let found = &self.comparison;
        if found.pages_compared != self.pages {
            writeln!(
                out,
                "NOT VERIFIED: only {} of {} pages were compared",
                text::count(found.pages_compared),
                text::count(self.pages)
            )?;
        }
        if found.identical() {
            return Ok(());
        }
        writeln!(
            out,
            "NOT VERIFIED: {} of {} differ in {}: their last writes were lost",
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

/// Made-up records for tests.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    const DIRTY: [u64; 8] = [199_005, 50_200, 21_940, 9_310, 4_020, 1_760, 812, 395];

    fn round(at: usize, started_ms: u64) -> RoundRecord {
        let dirty_pages = DIRTY[at];
        let full = at == 0;
        RoundRecord {
            round: at as u32,
            kind: match at {
                0 => RoundKind::Full,
                7 => RoundKind::Final,
                _ => RoundKind::Precopy,
            },
            started_ms,
            dirty_pages,
            bytes_copied: dirty_pages * 4096,
            harvest_us: if full { 0 } else { 3_700 + dirty_pages / 256 },
            flush_us: if full { 0 } else { 160 + dirty_pages / 1000 },
            copy_us: dirty_pages * 1_000_000 / 39_642,
            invalidation_commands: if full { 0 } else { 3 },
            dropped_translations: if full { 0 } else { dirty_pages.min(192) },
            drained_writes: if full { 0 } else { at as u64 % 3 },
            dirty_rate_pages_per_s: [
                0.0, 9980.0, 17_300.0, 16_800.0, 17_100.0, 17_350.0, 17_900.0, 18_200.0,
            ][at],
        }
    }

    /// A run of eight rounds in which all went well.
    pub(crate) fn run() -> RunRecord {
        let mut started_ms = 0;
        let mut rounds: Vec<RoundRecord> = Vec::new();
        for at in 0..DIRTY.len() {
            let record = round(at, started_ms);
            started_ms += 10 + record.copy_us / 1000;
            rounds.push(record);
        }
        let mut comparison = Comparison::default();
        comparison.pages_compared = DIRTY[0];
        comparison.bytes_compared = DIRTY[0] * 4096;
        RunRecord {
            trace: "pgbench.iolog.gz".to_owned(),
            files: 67,
            writes_total: 98_787,
            writes_replayed: 61_204,
            pages: DIRTY[0],
            format: TableFormat::AmdV1,
            page_size: 4096,
            devices: 3,
            cpus: 2,
            seed: 1,
            speed: Some(3.6),
            bandwidth_bytes_per_s: Some(162_000_000.0),
            sabotage: None,
            migration_ms: started_ms,
            rounds,
            comparison,
            counters: BTreeMap::from([("dma_bytes", 1_000), ("iotlb_hits", 5)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::PageAt;

    fn printed(run: &RunRecord) -> Vec<String> {
        let mut out = Vec::new();
        run.print(&mut out).unwrap();
        String::from_utf8(out)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// The run, with every second page of `pages` changed.
    fn broken(pages: u64) -> RunRecord {
        let mut run = samples::run();
        run.pages = pages;
        run.comparison = Comparison::default();
        for page in 0..pages {
            let at = PageAt {
                iova: page * 4096,
                file: 0,
                name: "pg_wal/000000010000000000000010",
                offset: page * 4096,
            };
            run.comparison
                .page(at, &[(page % 2) as u8; 4096], &[0; 4096]);
        }
        run
    }

    #[test]
    fn the_last_line_of_a_success_is_for_scripts() {
        let run = samples::run();
        let lines = printed(&run);
        assert_eq!(
            lines.last().unwrap(),
            "verified: 199005 pages identical (815124480 bytes)"
        );
        assert!(
            lines.iter().all(|line| line.trim_end().len() <= 110),
            "{lines:#?}"
        );
        let row = lines.iter().find(|line| line.contains("full")).unwrap();
        assert!(
            row.contains("199,005") && row.contains("777.4 MiB"),
            "{row}"
        );
    }

    #[test]
    fn a_failure_tells_where_and_how_much() {
        let mut run = broken(24);
        run.sabotage = Some(Sabotage::SkipFlush);
        let lines = printed(&run);
        let at = lines
            .iter()
            .position(|line| line.starts_with("NOT VERIFIED"))
            .unwrap();
        assert_eq!(
            lines[at],
            "NOT VERIFIED: 12 of 24 pages differ in 49,152 bytes: their last writes were lost"
        );
        assert_eq!(
            lines[at + 1],
            "  IOVA [0x1000, 0x1fff]: 1 page from byte 4,096 of pg_wal/000000010000000000000010, \
             4,096 bytes lost"
        );
        assert_eq!(lines[at + 11], "  and 2 more ranges");
        assert!(lines[at + 12].starts_with("sabotage skip-flush: sync did not flush"));
        run.sabotage = None;
        let lines = printed(&run);
        assert_eq!(
            lines.last().unwrap(),
            "no step was broken on purpose: this is a defect"
        );
        assert!(!lines.iter().any(|line| line.starts_with("verified")));
    }

    #[test]
    fn comparing_too_few_pages_is_no_success() {
        let mut run = samples::run();
        run.comparison = Comparison::default();
        assert!(!run.verified());
        assert_eq!(
            printed(&run).last().unwrap(),
            "NOT VERIFIED: only 0 of 199,005 pages were compared"
        );
    }

    #[test]
    fn json_holds_the_verdict_and_every_round() {
        let path = std::env::temp_dir().join(format!("precopy-report-{}.json", std::process::id()));
        let mut run = broken(4);
        run.sabotage = Some(Sabotage::NoDrain);
        run.write_json(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["verified"], false);
        assert_eq!(json["sabotage"], "no-drain");
        assert_eq!(json["format"], "amdv1");
        assert_eq!(json["rounds"].as_array().unwrap().len(), 8);
        assert_eq!(json["rounds"][7]["kind"], "final");
        assert_eq!(json["rounds"][1]["dirty_pages"], 50_200);
        assert_eq!(json["comparison"]["differing_pages"], 2);
        assert_eq!(
            json["comparison"]["first_differing_ranges"][0]["iova_start"],
            4096
        );
        assert_eq!(json["counters"]["iotlb_hits"], 5);
        assert_eq!(json["downtime_us"], run.downtime_us());
    }
}
