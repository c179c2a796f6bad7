//! The command line, and the settings that follow from it for a given trace.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use dirtymap_examples::iolog::Trace;
use serde::Serialize;

use crate::text;

/// How long the replay takes with `--speed auto`.
const AUTO_REPLAY_SECONDS: f64 = 20.0;
/// How long the first copy of everything takes with `--bandwidth auto`.
const AUTO_FULL_COPY_SECONDS: f64 = 8.0;

/// Live migration of a simulated machine while its devices replay a recorded write trace.
///
/// Each file of the trace becomes an area of IOVA space. Devices issue the trace's writes, and CPU
/// threads write and mark. Meanwhile a migrator copies everything, and then harvests, syncs and
/// copies the pages that became dirty, round after round. A backup takes an increment every few
/// seconds, and a rate meter looks four times a second. Every write is reported to each of the
/// three. At the end both copies are compared byte for byte, and the looks of the meter are
/// compared with a log of all writes.
///
/// Exit status: 0 if all pages are identical, 1 if a page differs, 2 if an option or the trace is
/// refused.
#[derive(Parser, Clone, Debug)]
#[command(name = "precopy", max_term_width = 100)]
pub(crate) struct Cli {
    /// The trace: a fio iolog, version 2 or 3, plain or gzip [default: testdata/pgbench.iolog.gz of
    /// this repository]
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,

    /// Devices that issue the writes, 1 to 64
    #[arg(
        long, value_name = "N", default_value_t = 3,
        value_parser = clap::value_parser!(u32).range(1..=64)
    )]
    pub(crate) devices: u32,

    /// CPU threads that write and mark, 0 to 64
    #[arg(
        long, value_name = "N", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(0..=64)
    )]
    pub(crate) cpus: u32,

    /// Speed of the replay: X times as fast as recorded; max: without pauses; auto: the whole trace
    /// in about 20 seconds
    #[arg(long, value_name = "X|max|auto", default_value = "auto")]
    pub(crate) speed: Speed,

    /// Bandwidth of the simulated link; max: no limit; auto: the first copy takes about 8 seconds,
    /// or max with --speed max
    #[arg(long, value_name = "MiB/s|max|auto", default_value = "auto")]
    pub(crate) bandwidth: Bandwidth,

    /// The page size of the IO page table
    #[arg(long, value_enum, value_name = "SIZE", default_value = "4k")]
    pub(crate) page_size: PageSize,

    /// The format of the IO page table
    #[arg(long, value_enum, value_name = "NAME", default_value = "amdv1")]
    pub(crate) format: TableFormat,

    /// Seed of all random choices
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,

    /// Stop the devices after this many rounds at the latest, 1 to 1000
    #[arg(
        long, value_name = "N", default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..=1000)
    )]
    pub(crate) max_rounds: u32,

    /// Seconds between two increments of the backup
    #[arg(long, value_name = "N", default_value_t = 2.0, value_parser = seconds)]
    pub(crate) backup: f64,

    /// Draw the rounds as an SVG picture
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,

    /// Write the records of the run as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Break one step, to see that the comparison finds the loss
    #[arg(long, value_enum, value_name = "NAME")]
    pub(crate) sabotage: Option<Sabotage>,

    /// Most simulated memory that the areas of the trace may need, in bytes, or with K, M, G or T
    #[arg(long, value_name = "BYTES", default_value = "64G", value_parser = parse_bytes)]
    pub(crate) memory_limit: u64,
}

/// How fast the trace is replayed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Speed {
    /// in about 20 seconds.
    Auto,
    /// Without pauses.
    Max,
    /// This many times as fast as it was recorded.
    Times(f64),
}

impl Speed {
    /// The divisor of the recorded times; `None` for no pauses.
    pub(crate) fn factor(self, duration_us: u64) -> Option<f64> {
        match self {
            Speed::Max => None,
            Speed::Times(factor) => Some(factor),
            Speed::Auto if duration_us == 0 => None,
            Speed::Auto => Some(duration_us as f64 / 1e6 / AUTO_REPLAY_SECONDS),
        }
    }
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Speed::Auto),
            "max" => Ok(Speed::Max),
            _ => positive(text).map(Speed::Times),
        }
    }
}

/// How fast the simulated link is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bandwidth {
    /// The first copy takes about 8 seconds. No limit if the replay has no pauses.
    Auto,
    /// No limit.
    Max,
    /// MiB in a second.
    MibPerSecond(f64),
}

impl Bandwidth {
    /// The limit for a machine with `memory` bytes; `None` for no limit.
    pub(crate) fn bytes_per_second(self, memory: u64, speed: Speed) -> Option<f64> {
        match self {
            Bandwidth::Max => None,
            Bandwidth::MibPerSecond(rate) => Some(rate * f64::from(1 << 20)),
            Bandwidth::Auto if speed == Speed::Max => None,
            Bandwidth::Auto => Some(memory as f64 / AUTO_FULL_COPY_SECONDS),
        }
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Bandwidth::Auto),
            "max" => Ok(Bandwidth::Max),
            _ => positive(text).map(Bandwidth::MibPerSecond),
        }
    }
}

/// The smallest leaf of the IO page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PageSize {
    /// 4 KiB
    #[value(name = "4k")]
    K4,
    /// 2 MiB: one write makes 512 pages of 4 KiB dirty
    #[value(name = "2m")]
    M2,
}

impl PageSize {
    pub(crate) const fn bytes(self) -> u64 {
        match self {
            PageSize::K4 => 4 << 10,
            PageSize::M2 => 2 << 20,
        }
    }
}

/// The format of the IO page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub(crate) enum TableFormat {
    /// AMD, version 1
    #[value(name = "amdv1")]
    #[serde(rename = "amdv1")]
    AmdV1,
    /// Intel VT-d, second stage
    #[value(name = "vtdss")]
    #[serde(rename = "vtdss")]
    VtdSs,
    /// x86-64, first stage
    #[value(name = "x86-64")]
    #[serde(rename = "x86-64")]
    X86_64,
    /// Arm, stage 1: a written page has one bit less
    #[value(name = "arm-s1")]
    #[serde(rename = "arm-s1")]
    ArmS1,
    /// RISC-V Sv48
    #[value(name = "riscv-sv48")]
    #[serde(rename = "riscv-sv48")]
    RiscvSv48,
}

impl TableFormat {
    /// The name on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            TableFormat::AmdV1 => "amdv1",
            TableFormat::VtdSs => "vtdss",
            TableFormat::X86_64 => "x86-64",
            TableFormat::ArmS1 => "arm-s1",
            TableFormat::RiscvSv48 => "riscv-sv48",
        }
    }
}

/// A step that is left out or done in the wrong order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Sabotage {
    /// Sync flushes nothing: devices go on to write through cached translations with "D is set"
    SkipFlush,
    /// Pages are copied before the sync: a write through an old translation comes after the copy
    /// and leaves no trace
    CopyBeforeSync,
    /// The dirty bits of one 2 MiB piece in sixteen are cleared and not recorded
    ClearThenLose,
    /// The flush does not wait for writes that are translated but not yet in memory
    NoDrain,
    /// CPU threads forget the mark of every eighth write; needs --cpus 1 or more
    SkipMark,
    /// Harvests of the migration do not leave the pages that they take to the backup
    ForgetConsumer,
}

impl Sabotage {
    /// The name on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Sabotage::SkipFlush => "skip-flush",
            Sabotage::CopyBeforeSync => "copy-before-sync",
            Sabotage::ClearThenLose => "clear-then-lose",
            Sabotage::NoDrain => "no-drain",
            Sabotage::SkipMark => "skip-mark",
            Sabotage::ForgetConsumer => "forget-consumer",
        }
    }

    /// The broken step, for the report.
    pub(crate) const fn broken_step(self) -> &'static str {
        match self {
            Sabotage::SkipFlush => {
                "sync did not flush the IOTLBs, so devices went on to write through cached \
                 translations with \"D is set\""
            }
            Sabotage::CopyBeforeSync => {
                "pages were copied before the sync, so a write through an old translation could \
                 come after the copy and leave no trace"
            }
            Sabotage::ClearThenLose => {
                "dirty bits of one 2 MiB piece in sixteen were cleared without being recorded"
            }
            Sabotage::NoDrain => {
                "the flush did not wait for writes that were translated but not yet in memory"
            }
            Sabotage::SkipMark => "CPU threads forgot the mark of every eighth write",
            Sabotage::ForgetConsumer => {
                "harvests of the migration did not leave the pages that they took to the backup"
            }
        }
    }
}

impl Cli {
    /// Checks that concern several arguments.
    ///
    /// # Errors
    /// `--sabotage skip-mark` without CPU threads; an output file in a directory that does not
    /// exist.
    pub(crate) fn checked(self) -> Result<Self, clap::Error> {
        if self.sabotage == Some(Sabotage::SkipMark) && self.cpus == 0 {
            return Err(Cli::command().error(
                ErrorKind::ArgumentConflict,
                "--sabotage skip-mark needs --cpus 1 or more: with --cpus 0 there is no mark to \
                 skip",
            ));
        }
        for (option, path) in [("--plot", &self.plot), ("--json", &self.json)] {
            let Some(path) = path else { continue };
            let folder = match path.parent() {
                Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
                Some(folder) => folder,
                None => path,
            };
            if path.is_dir() || !folder.is_dir() {
                let what = if path.is_dir() {
                    "it is a directory"
                } else {
                    "its directory does not exist"
                };
                return Err(Cli::command().error(
                    ErrorKind::ValueValidation,
                    format!("{option} {}: cannot write there, {what}", path.display()),
                ));
            }
        }
        Ok(self)
    }

    /// The path of the trace.
    pub(crate) fn trace_path(&self) -> Cow<'_, Path> {
        match &self.trace {
            Some(path) => Cow::Borrowed(path),
            None => Cow::Owned(
                Path::new(env!("CARGO_MANIFEST_DIR"))
                    .with_file_name("testdata")
                    .join("pgbench.iolog.gz"),
            ),
        }
    }

    /// The trace's file name without its folder.
    pub(crate) fn trace_name(&self) -> String {
        let path = self.trace_path();
        path.file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned()
    }

    /// The bytes of all areas together: every file of the trace, rounded up to whole pages.
    ///
    /// # Errors
    /// If the areas need more than `--memory-limit`. The text has the needed bytes.
    pub(crate) fn check_memory(&self, trace: &Trace) -> Result<u64, MemoryError> {
        let page = u128::from(self.page_size.bytes());
        let needed = trace
            .files
            .iter()
            .map(|file| u128::from(file.bytes).next_multiple_of(page))
            .sum();
        match u64::try_from(needed) {
            Ok(bytes) if bytes <= self.memory_limit => Ok(bytes),
            _ => Err(MemoryError {
                files: trace.files.len(),
                needed,
                limit: self.memory_limit,
            }),
        }
    }
}

/// The trace's areas do not fit the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the areas of the trace's {files} files need {needed} bytes of simulated memory, more than \
     the {limit} bytes ({}) of --memory-limit: pass a larger limit or a smaller trace",
    text::bytes(*limit)
)]
pub(crate) struct MemoryError {
    files: usize,
    needed: u128,
    limit: u64,
}

/// A number of seconds above 0.
fn seconds(text: &str) -> Result<f64, String> {
    const MOST: f64 = 1e6;
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= MOST => Ok(number),
        _ => Err(format!("expected a number above 0 and up to {MOST}")),
    }
}

/// A number above 0.
fn positive(text: &str) -> Result<f64, String> {
    const MOST: f64 = 1e9;
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= MOST => Ok(number),
        _ => Err(format!(
            "expected auto, max, or a number above 0 and up to {MOST}"
        )),
    }
}

/// `123`, `64K`, `64M`, `64G`, `1T`, and the same with `iB`; units are powers of 1024.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err("expected a whole number of bytes, or one with K, M, G or T".to_owned()),
    };
    if number.is_empty() {
        return Err("expected a whole number of bytes, or one with K, M, G or T".to_owned());
    }
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift));
    match bytes {
        Some(0) => Err("the limit must be at least 1 byte".to_owned()),
        Some(bytes) => Ok(bytes),
        None => Err(format!("more than the largest limit of {} bytes", u64::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("precopy").chain(arguments.split_whitespace()))
            .and_then(Cli::checked)
    }

    fn refused(arguments: &str) -> String {
        let error = parse(arguments).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn the_defaults_are_those_of_the_help_text() {
        let cli = parse("").unwrap();
        assert_eq!(
            (cli.devices, cli.cpus, cli.seed, cli.max_rounds),
            (3, 2, 1, 30)
        );
        assert_eq!((cli.speed, cli.bandwidth), (Speed::Auto, Bandwidth::Auto));
        assert_eq!((cli.page_size, cli.sabotage), (PageSize::K4, None));
        assert_eq!(cli.format, TableFormat::AmdV1);
        assert_eq!(cli.memory_limit, 64 << 30);
        assert!(cli.trace_path().is_file());
        assert_eq!(cli.trace_name(), "pgbench.iolog.gz");
        Cli::command().debug_assert();
    }

    #[test]
    fn speed_and_bandwidth_follow_the_trace() {
        let cli = parse("--speed 2.5 --bandwidth 100").unwrap();
        assert_eq!(cli.speed.factor(7), Some(2.5));
        assert_eq!(
            cli.bandwidth.bytes_per_second(7, cli.speed),
            Some(104_857_600.0)
        );
        let auto = parse("").unwrap();
        assert_eq!(auto.speed.factor(28_000_000), Some(1.4));
        assert_eq!(auto.speed.factor(0), None);
        assert_eq!(
            auto.bandwidth.bytes_per_second(1000, auto.speed),
            Some(125.0)
        );
        let max = parse("--speed max").unwrap();
        assert_eq!(max.speed.factor(7), None);
        assert_eq!(max.bandwidth.bytes_per_second(1000, max.speed), None);
    }

    #[test]
    fn sizes_have_binary_units() {
        let sizes = ["1", "4096b", "2k", "3KiB", "5M", "64G", "16777215t"]
            .map(|text| parse_bytes(text).unwrap());
        assert_eq!(
            sizes,
            [1, 4096, 2048, 3072, 5 << 20, 64 << 30, 16_777_215 << 40]
        );
        for bad in [
            "",
            "G",
            "1.5G",
            "-1",
            "0",
            "1 G",
            "1X",
            "16777216T",
            "99999999999999999999",
        ] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bad_arguments_are_refused_with_what_would_be_right() {
        for (arguments, part) in [
            ("--devices 0", "1..=64"),
            ("--devices 65", "1..=64"),
            ("--cpus 65", "0..=64"),
            ("--max-rounds 0", "1..=1000"),
            ("--speed 0", "expected auto, max, or a number above 0"),
            ("--speed nan", "expected auto, max, or a number above 0"),
            ("--speed inf", "expected auto, max, or a number above 0"),
            ("--bandwidth -3", "-3"),
            ("--page-size 8k", "possible values: 4k, 2m"),
            (
                "--format amdv2",
                "possible values: amdv1, vtdss, x86-64, arm-s1, riscv-sv48",
            ),
            ("--seed x", "invalid digit"),
            (
                "--sabotage flush",
                "skip-flush, copy-before-sync, clear-then-lose, no-drain, skip-mark",
            ),
            ("--memory-limit 64Q", "with K, M, G or T"),
            ("--sabotage skip-mark --cpus 0", "needs --cpus 1 or more"),
            (
                "--json no/such/folder/run.json",
                "its directory does not exist",
            ),
            ("--plot .", "it is a directory"),
        ] {
            let text = refused(arguments);
            assert!(text.contains(part), "{arguments}: {text}");
        }
        assert!(parse("--sabotage skip-mark --cpus 1 --plot run.svg").is_ok());
    }

    #[test]
    fn sabotage_and_formats_have_one_name_everywhere() {
        for format in TableFormat::value_variants() {
            let argument = format.to_possible_value().unwrap();
            assert_eq!(argument.get_name(), format.name());
            assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        }
        for sabotage in Sabotage::value_variants() {
            let argument = sabotage.to_possible_value().unwrap();
            assert_eq!(argument.get_name(), sabotage.name());
            assert_eq!(serde_json::to_value(sabotage).unwrap(), sabotage.name());
        }
    }

    #[test]
    fn the_memory_that_a_trace_needs_is_checked() {
        let log = "fio version 3 iolog\n0 a add\n0 b add\n0 a write 0 5\n0 b write 4096 1\n";
        let trace = Trace::read(log.as_bytes()).unwrap();
        assert_eq!(parse("").unwrap().check_memory(&trace), Ok(12288));
        assert_eq!(
            parse("--page-size 2m").unwrap().check_memory(&trace),
            Ok(4 << 20)
        );
        assert_eq!(
            parse("--memory-limit 12288").unwrap().check_memory(&trace),
            Ok(12288)
        );
        let error = parse("--memory-limit 8k")
            .unwrap()
            .check_memory(&trace)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the areas of the trace's 2 files need 12288 bytes of simulated memory, more than the \
             8192 bytes (8 KiB) of --memory-limit: pass a larger limit or a smaller trace"
        );
        let huge = format!(
            "fio version 3 iolog\n0 a add\n0 a write {} 1\n",
            u64::MAX - 1
        );
        let trace = Trace::read(huge.as_bytes()).unwrap();
        let error = parse("--memory-limit 16777215T")
            .unwrap()
            .check_memory(&trace)
            .unwrap_err();
        assert!(
            error.to_string().contains("18446744073709551616 bytes"),
            "{error}"
        );
    }
}
