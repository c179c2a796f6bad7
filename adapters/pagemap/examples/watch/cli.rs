//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

/// Watches which parts of a running program's memory are written, at what rate.
///
/// The program is started in here: a sort, a hash join or an LRU cache over one block of memory.
/// Its writes are found by the page tables of the processor (userfaultfd and PAGEMAP_SCAN, Linux
/// 6.7): the program marks nothing. In a terminal the picture is live, and `q` ends it; elsewhere
/// each interval is a line.
///
/// Exit status: 0 if it was watched, or is skipped because this kernel cannot; 2 if the input is
/// refused.
#[derive(Parser, Clone, Debug)]
#[command(name = "watch", max_term_width = 100)]
pub(crate) struct Cli {
    /// What the program does
    #[arg(long, value_enum, value_name = "NAME", default_value = "sort")]
    pub(crate) workload: Workload,

    /// The memory of the program: bytes, or with K, M or G; 1M to 64G
    #[arg(long, value_name = "BYTES", default_value = "128M", value_parser = parse_bytes)]
    pub(crate) size: u64,

    /// How long to watch, 0.1 to 86400
    #[arg(
        long, value_name = "S", default_value = "8",
        value_parser = |s: &str| seconds(s, 0.1, 86_400.0),
    )]
    pub(crate) seconds: Duration,

    /// How often to harvest, in seconds, 0.005 to 60
    #[arg(
        long, value_name = "S", default_value = "0.05",
        value_parser = |s: &str| seconds(s, 0.005, 60.0),
    )]
    pub(crate) interval: Duration,

    /// The working set is what was written in the last S seconds, 0.005 to 3600
    #[arg(
        long, value_name = "S", default_value = "0.5",
        value_parser = |s: &str| seconds(s, 0.005, 3600.0),
    )]
    pub(crate) window: Duration,

    /// Draw what was seen as an SVG picture
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,

    /// Print lines in a terminal too
    #[arg(long)]
    pub(crate) plain: bool,

    /// Seed of the program's data
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

/// What the program does.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Fills an array with random numbers and sorts it, again and again
    Sort,
    /// Builds a hash table of one relation, and probes it with another
    Join,
    /// A cache that answers bursts of lookups of skewed keys, the least recently used record out
    Lru,
}

impl Workload {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Workload::Sort => "sort",
            Workload::Join => "hash join",
            Workload::Lru => "LRU cache",
        }
    }
}

fn seconds(text: &str, least: f64, most: f64) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (least..=most).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("give seconds, {least} to {most}")),
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| (1 << 20..=64 << 30).contains(bytes))
        .ok_or_else(|| "give bytes, 1M to 64G".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_bounded() {
        assert_eq!(parse_bytes("128M"), Ok(128 << 20));
        assert_eq!(parse_bytes("64g"), Ok(64 << 30));
        for bad in ["", "1K", "65G", "M", "-1", "18446744073709551615G", "1é"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("watch --workload join --interval 0.01 --plain").is_ok());
        for bad in [
            "--interval 0",
            "--seconds nan",
            "--window 4000",
            "--size 5",
            "--workload x",
        ] {
            assert!(parse(&format!("watch {bad}")).is_err(), "{bad}");
        }
    }
}
