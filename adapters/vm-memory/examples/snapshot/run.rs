//! The run: snapshots beside devices, then the comparison.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::Parser;
use dirtymap::{HarvestRequest, IovaRange, Lease, Synced, UserBitmap};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::cli::Cli;
use crate::file::{self, ReadError, Writer};
use crate::machine::{Machine, PAGE};

/// All bytes are identical.
const VERIFIED: u8 = 0;
/// A page differs.
const NOT_IDENTICAL: u8 = 1;
/// Something could not be done.
const FAILED: u8 = 2;

/// Why a run fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0}")]
    Tracking(#[from] dirtymap::Error),
    #[error("{0}")]
    Range(#[from] dirtymap::RangeError),
    #[error("guest memory: {0}")]
    Memory(String),
    #[error("{}: {error}; --dir names a place with more room, or another owner", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("--dir {}: it is not empty; name a new directory, or empty it", .0.display())]
    NotEmpty(PathBuf),
    #[error("{}: {error}", path.display())]
    Restore { path: PathBuf, error: ReadError },
    #[error("a device thread panicked")]
    Device,
    #[error("{0}")]
    Output(#[from] io::Error),
}

pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse().and_then(Cli::checked) {
        Ok(cli) => cli,
        // A request for help comes this way as well, with status 0.
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(FAILED));
        }
    };
    match run(&cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(cli: &Cli) -> Result<u8, Failure> {
    let at = |path: &Path, error| Failure::File {
        path: path.to_owned(),
        error,
    };
    let temporary;
    let dir = match &cli.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(|error| at(dir, error))?;
            let mut files = std::fs::read_dir(dir).map_err(|error| at(dir, error))?;
            if files.next().is_some() {
                return Err(Failure::NotEmpty(dir.clone()));
            }
            dir.as_path()
        }
        None => {
            temporary = tempfile::tempdir()?;
            temporary.path()
        }
    };
    let machine = Machine::new(cli.memory << 20)?;
    let regions = machine.regions();
    writeln!(
        io::stdout(),
        "machine: {} of memory in {} regions, {} network devices and a disk",
        HumanBytes(cli.memory << 20),
        regions.len(),
        cli.devices
    )?;
    // From here on every write is reported, so the first snapshot may be taken while devices write.
    machine.space.start_tracking()?;
    let mut snapshots = Snapshots::new(cli, &machine, &regions, dir);
    std::thread::scope(|scope| {
        let mut devices: Vec<_> = (0..u64::from(cli.devices))
            .map(|n| cli.seed.wrapping_mul(1000).wrapping_add(n))
            .map(|seed| {
                let machine = &machine;
                scope.spawn(move || machine.network(seed))
            })
            .collect();
        devices.push(scope.spawn(|| machine.disk(!cli.seed)));
        let taken = snapshots.take_all();
        // In every case, the devices must stop before the scope can end.
        machine.stop();
        for device in devices {
            device.join().map_err(|_| Failure::Device)??;
        }
        taken
    })?;
    snapshots.increment()?;
    snapshots.bar.finish_and_clear();
    compare(&machine, &regions, dir, &snapshots)
}

/// The snapshots of one run.
struct Snapshots<'a> {
    cli: &'a Cli,
    machine: &'a Machine,
    regions: &'a [IovaRange],
    dir: &'a Path,
    /// The number of the next one, and the numbers of those that failed.
    next: u32,
    failed: Vec<u32>,
    /// Bitmaps for harvests, one for each region, used again and again.
    words: Vec<Vec<u64>>,
    bar: ProgressBar,
}

impl<'a> Snapshots<'a> {
    fn new(cli: &'a Cli, machine: &'a Machine, regions: &'a [IovaRange], dir: &'a Path) -> Self {
        let bar = match io::stderr().is_terminal() {
            true => ProgressBar::new(u64::from(cli.increments) + 1),
            false => ProgressBar::hidden(),
        };
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} snapshots  {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let words = |region: &IovaRange| vec![0; (region.granules(PAGE) as usize).div_ceil(64)];
        Snapshots {
            cli,
            machine,
            regions,
            dir,
            next: 0,
            failed: Vec::new(),
            words: regions.iter().map(words).collect(),
            bar,
        }
    }

    /// The first snapshot, and all increments but the last.
    fn take_all(&mut self) -> Result<(), Failure> {
        let began = Instant::now();
        let mut writer = self.writer()?;
        for region in self.regions {
            writer
                .run(&self.machine.memory, *region)
                .map_err(|error| self.file_error(error))?;
        }
        let bytes = writer
            .finish(false)
            .map_err(|error| self.file_error(error))?;
        self.report(&format!("{} written", HumanBytes(bytes)), began)?;
        for _ in 1..self.cli.increments {
            std::thread::sleep(Duration::from_millis(self.cli.pause));
            self.increment()?;
        }
        Ok(())
    }

    /// Harvests all regions, writes what was dirty, and commits when it is safe. If it cannot be
    /// written, everything is dirty again, and the next increment has it.
    fn increment(&mut self) -> Result<(), Failure> {
        let began = Instant::now();
        let mut words = std::mem::take(&mut self.words);
        let mut leases = Vec::new();
        for (region, words) in self.regions.iter().zip(&mut words) {
            words.fill(0);
            let request = HarvestRequest::new(*region, PAGE);
            let lease = self
                .machine
                .space
                .harvest(&request, UserBitmap::new(words))?;
            leases.push(lease.sync()?);
        }
        let dirty: u64 = leases.iter().map(Lease::dirty).sum();
        let written = self.write(&leases);
        if written.is_ok() || self.cli.commit_early {
            // The files are safe, or leases are committed early on purpose.
            for lease in leases {
                lease.commit();
            }
        } else {
            drop(leases); // what was taken becomes dirty again
        }
        self.words = words;
        let pages = HumanCount(dirty);
        match written {
            Ok(bytes) => {
                let what = format!("{pages} dirty pages, {} written", HumanBytes(bytes));
                self.report(&what, began)
            }
            Err(error) if self.cli.fail == Some(self.next) => {
                self.failed.push(self.next);
                let fate = match self.cli.commit_early {
                    true => "committed all the same",
                    false => "dirty again",
                };
                self.report(&format!("FAILED: {error}; {pages} pages are {fate}"), began)
            }
            Err(error) => Err(self.file_error(error)),
        }
    }

    /// Writes the pages of `leases` to a file. Returns how many bytes they have.
    fn write(&self, leases: &[Lease<'_, Synced>]) -> io::Result<u64> {
        let mut writer = Writer::create(self.dir, self.next)?;
        for run in leases.iter().flat_map(Lease::runs) {
            writer.run(&self.machine.memory, run)?;
        }
        writer.finish(self.cli.fail == Some(self.next))
    }

    fn writer(&self) -> Result<Writer, Failure> {
        Writer::create(self.dir, self.next).map_err(|error| self.file_error(error))
    }

    fn file_error(&self, error: io::Error) -> Failure {
        Failure::File {
            path: file::path(self.dir, self.next),
            error,
        }
    }

    /// One line for the snapshot that is done.
    fn report(&mut self, what: &str, began: Instant) -> Result<(), Failure> {
        let kind = if self.next == 0 { "first" } else { "increment" };
        let line = format!(
            "{kind:9} {:3}: {what} in {:.1} ms",
            self.next,
            began.elapsed().as_secs_f64() * 1e3
        );
        self.bar.suspend(|| writeln!(io::stdout(), "{line}"))?;
        self.bar.inc(1);
        self.next += 1;
        Ok(())
    }
}

/// Restores fresh memory from the files and compares it with the machine's.
fn compare(
    machine: &Machine,
    regions: &[IovaRange],
    dir: &Path,
    snapshots: &Snapshots<'_>,
) -> Result<u8, Failure> {
    let ranges: Vec<_> = regions
        .iter()
        .map(|region| (GuestAddress(region.start().get()), region.len() as usize))
        .collect();
    let fresh = GuestMemoryMmap::<()>::from_ranges(&ranges)
        .map_err(|error| Failure::Memory(error.to_string()))?;
    let kept = (0..snapshots.next).filter(|number| !snapshots.failed.contains(number));
    let mut files = 0u64;
    for number in kept {
        file::restore(dir, number, &fresh).map_err(|error| Failure::Restore {
            path: file::path(dir, number),
            error,
        })?;
        files += 1;
    }
    let (mut identical, mut differ) = (0u64, 0u64);
    let mut first = None;
    let read = |error: vm_memory::GuestMemoryError| Failure::Memory(error.to_string());
    let mut pages = [[0u8; 4096]; 2];
    for region in regions {
        for at in (region.start().get()..=region.last().get()).step_by(4096) {
            let [ours, restored] = &mut pages;
            let address = GuestAddress(at);
            machine.memory.read_slice(ours, address).map_err(read)?;
            fresh.read_slice(restored, address).map_err(read)?;
            if ours == restored {
                identical += 1;
            } else {
                differ += 1;
                first.get_or_insert(at);
            }
        }
    }
    let writes = HumanCount(machine.writes.load(Ordering::Relaxed));
    let mut out = io::stdout().lock();
    writeln!(out, "{writes} writes by devices, {files} files")?;
    if let Some(first) = first {
        let all = identical + differ;
        writeln!(
            out,
            "NOT VERIFIED: {differ} of {all} pages differ, the first one at {first:#x}"
        )?;
        return Ok(NOT_IDENTICAL);
    }
    writeln!(
        out,
        "verified: {identical} pages identical after a restore from {files} files, {} failed",
        snapshots.failed.len()
    )?;
    Ok(VERIFIED)
}
