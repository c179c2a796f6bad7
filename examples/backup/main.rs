//! Incremental backup of a disk image that survives `kill -9`: a worker replays a write trace and
//! backs itself up, and is killed at random moments. At the end every generation is restored, and
//! compared byte for byte.
//!
//! ```text
//!  worker: trace --> begin_write, write --> disk image --> increment --> gen-0001, gen-0002, ...
//!             ^                                ^
//!             +---- kill -9, and again --------+---- recovery: only what was written is read
//!
//!  at the end: trace, up to each generation  == restored generation, byte for byte
//! ```
//!
//! Each increment is written as a file and as `rbd diff`. With `--features objects` it is an object
//! as well: in a directory, or in S3 with `--features s3`. The increment is committed when all of
//! these are durable.
//!
//! Exit status: 0 if every generation is identical, 1 if one differs, 2 if the input is refused.

mod cli;
mod copies;
mod generation;
#[cfg(feature = "objects")]
mod objects;
mod plot;
mod rbd;
mod report;
mod supervise;
mod verify;
mod work;
mod writers;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use cli::Cli;
use copies::Copies;
use report::Report;
use writers::Plan;

/// Every generation is identical.
const VERIFIED: u8 = 0;
/// A generation differs.
const NOT_IDENTICAL: u8 = 1;
/// The input was refused; nothing was run.
const BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let plan = match Plan::read(&cli) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("backup: {}: {error}", cli.trace.display());
            return ExitCode::from(BAD_INPUT);
        }
    };
    let outcome = match &cli.worker {
        Some(folder) => work::run(&cli, &plan, folder).map(|()| VERIFIED),
        None => supervised(&cli, &plan),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("backup: {error}");
            ExitCode::from(NOT_IDENTICAL)
        }
    }
}

fn supervised(cli: &Cli, plan: &Plan) -> Result<u8, Box<dyn Error>> {
    let scratch;
    let folder = match &cli.dir {
        Some(folder) => folder.as_path(),
        None => {
            scratch = tempfile::tempdir()?;
            scratch.path()
        }
    };
    let kills = supervise::run(cli, folder)?;
    let copies = Copies::open(cli, folder)?;
    let outcome = verify::run(plan, &copies)?;
    let report = Report::new(cli, plan, kills, outcome, &copies)?;
    if let Some(path) = &cli.plot {
        std::fs::write(path, plot::draw(&report)?)?;
    }
    let mut out = io::stdout().lock();
    if cli.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(if report.verified() {
        VERIFIED
    } else {
        NOT_IDENTICAL
    })
}
