//! Runs the soak: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use proptests::soak::{Options, run};

fn main() -> ExitCode {
    let options = Options::parse()
        .checked()
        .unwrap_or_else(|error| error.exit());
    match run(&options) {
        Ok(()) => {
            println!("verified: no write lost, no reuse before a flush, nothing left");
            ExitCode::SUCCESS
        }
        Err(report) => {
            println!("{report}");
            ExitCode::FAILURE
        }
    }
}
