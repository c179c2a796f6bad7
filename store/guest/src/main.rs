//! A store on a disk that a real kernel records (`dm-log-writes`), and its recovery at each mark.
//!
//! ```text
//!  store --> ext4 --> dm-log-writes --> /dev/ram0, the disk
//!                            |
//!                            +--> /dev/ram1, every write in the order of flushes, and marks
//!
//!  for each mark: image + writes up to it --> /dev/ram2 --> ext4 --> recovery --> compared
//! ```
//!
//! `store-guest IMAGE` runs in the emulator that `.ci/log-writes` starts, which has made the device
//! and mounted it. A mark comes after each call that acknowledged a write or a commit. After a
//! power failure at the mark, the disk would have no more than the writes before the mark.
//!
//! Exit status: 0 if the recovery at each mark has all that was acknowledged, 1 otherwise.

mod record;
mod replay;

use std::collections::BTreeSet;
use std::error::Error;
use std::process::{Command, ExitCode};

use dirtymap_store::{Device, Epoch, Options};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const DEVICE: Device = Device {
    id: 0x10c,
    len: PAGES * PAGE,
};
const CONSUMERS: [&str; 2] = ["backup", "replica"];

/// Few open extents and a short log, so that extents close and logs are replaced all the time.
fn options() -> Options {
    Options::new().hot(4).log_bytes(4 * 4096)
}

/// The commit and the writes that were acknowledged, as one consumer sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    committed: Option<Epoch>,
    /// Pages that were written since.
    dirty: BTreeSet<u64>,
}

/// The same for both consumers, when a mark was set.
type State = [Known; 2];

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("guest: passed");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("guest: FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome {
    let image = std::env::args().nth(1).ok_or("usage: store-guest IMAGE")?;
    let image = std::fs::read(image)?;
    let states = record::run("/mnt")?;
    call("umount", &["/mnt"])?;
    call("dmsetup", &["remove", "recorded"])?;
    replay::run("/dev/ram1", image, &states)
}

/// Runs a program, which has to succeed.
fn call(name: &str, args: &[&str]) -> Outcome {
    let output = Command::new(name).args(args).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{name} {args:?}: {output:?}").into())
}
