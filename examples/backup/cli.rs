//! The options.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

const TRACE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../testdata/pgbench.iolog.gz"
);

/// Backs up a disk image under a write trace, kills the writer, recovers, and restores every
/// generation.
#[derive(Parser, Debug)]
#[command(name = "backup")]
pub(crate) struct Cli {
    /// The trace that is replayed: a version 2 or 3 iolog of fio, plain or gzip
    #[arg(long, default_value = TRACE)]
    pub(crate) trace: PathBuf,
    /// Size of the disk image in MiB; the trace is folded into it
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub(crate) size: u64,
    /// How many writes of the trace are replayed
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) writes: u64,
    /// How long the trace is replayed, in seconds
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,
    /// Milliseconds between two increments
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u64).range(50..))]
    pub(crate) interval: u64,
    /// How often the worker is killed
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(0..=1000))]
    pub(crate) kills: u64,
    /// Repeats the contents, and the choice of the moments
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Where the image, the store and the increments are; a scratch folder unless given
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// The place of the objects: a directory, by default `objects` in the folder of the run; or,
    /// with the feature `s3`, `s3://BUCKET/PREFIX`, with the variables AWS_ACCESS_KEY_ID,
    /// AWS_SECRET_ACCESS_KEY, AWS_REGION and so on
    #[cfg(feature = "objects")]
    #[arg(long)]
    pub(crate) objects: Option<String>,
    /// Breaks one step on purpose
    #[arg(long)]
    pub(crate) sabotage: Option<Sabotage>,
    /// Loses the log after the first kill: the next increment has to be everything
    #[arg(long)]
    pub(crate) lose_log: bool,
    /// Writes a picture of the run to this file, as SVG
    #[arg(long)]
    pub(crate) plot: Option<PathBuf>,
    /// Prints the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The worker's own: its folder
    #[arg(long, hide = true)]
    pub(crate) worker: Option<PathBuf>,
}

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sabotage {
    /// One write of eight is not announced
    Unannounced,
}
