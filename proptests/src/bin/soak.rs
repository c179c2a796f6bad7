//! Runs the soak: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use proptests::soak::{Options, run};

fn main() -> ExitCode {
    match run(&Options::parse()) {
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
