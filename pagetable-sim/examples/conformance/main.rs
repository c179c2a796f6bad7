//! Replays recorded calls to a running Linux kernel, and compares the answers: see
//! `testdata/README.md`.
//!
//! ```text
//! cargo run --release -p pagetable-sim --example conformance -- testdata/linux-7.3.4.jsonl.gz
//! ```
//!
//! ```text
//!  file --parse--> sequences, operations --replay--> AddressSpace over Domains --compare--> report
//! ```
//!
//! Exit status: 0 if everything passed, 1 if something failed, 2 if a file cannot be replayed.

mod hwpt;
mod image;
mod ioas;
mod parse;
mod ranges;
mod replay;
mod report;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

use replay::Replay;

/// Replays recorded kernel sequences, plain or gzip, and compares the answers.
#[derive(Parser)]
struct Cli {
    /// Files of recorded sequences.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// The interval between two lines of progress.
const TELL: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.files) {
        Ok(replay) => {
            println!("{}", replay.report);
            if replay.report.failed() > 0 {
                ExitCode::from(1)
            } else {
                ExitCode::SUCCESS
            }
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(files: &[PathBuf]) -> Result<Replay, Box<dyn std::error::Error>> {
    let mut replay = Replay::new()?;
    for file in files {
        play(&mut replay, file).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(replay)
}

fn play(replay: &mut Replay, file: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut told = Instant::now();
    parse::parse(File::open(file)?, |line, item| {
        replay.play(line, &item);
        if told.elapsed() >= TELL {
            told = Instant::now();
            let report = &replay.report;
            eprintln!(
                "{}: line {line}, {} sequences, {} passed, {} failed",
                file.display(),
                report.sequences,
                report.passed(),
                report.failed()
            );
        }
    })?;
    Ok(())
}
