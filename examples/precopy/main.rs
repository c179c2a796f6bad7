//! Pre-copy live migration of a simulated machine whose devices replay a recorded write trace.
//!
//! ```text
//! trace --> areas, one for each file --> devices and CPU markers write, each its own bytes
//!                                               |
//!     copy everything --> harvest --> sync --> copy dirty pages --> ... --> stop the devices
//!                                                                               |
//!     compare source and destination, all bytes <-- last copy <-- sync <-- last harvest
//! ```
//!
//! Two named consumers harvest the same memory at the same time, and are verified as well: a backup
//! (`backup.rs`) and a rate meter (`rate.rs`).
//!
//! Exit status: 0 if every page is identical, 1 if one differs, 2 if an option or the trace is
//! refused.

mod backup;
mod cli;
mod compare;
mod destination;
mod machine;
mod migrate;
mod plot;
mod progress;
mod rate;
mod replay;
mod report;
mod sabotage;
mod text;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Parser;
use dirtymap::meter::{Meter, Plan};
use dirtymap::{Granule, Start};
use dirtymap_examples::iolog::Trace;
use pagetable_sim::{AmdV1, ArmS1, Format, RiscvSv48, VtdSs, X86_64};

use backup::Backup;
use cli::{Cli, TableFormat};
use machine::{Machine, PAGE};
use migrate::{Decision, Migration};
use rate::Rate;
use report::{AreaRate, BackupRecord, MeterRecord, PredictionRecord, RoundKind, RunRecord};

/// Every page is identical.
const VERIFIED: u8 = 0;
/// A page differs.
const NOT_IDENTICAL: u8 = 1;
/// An option or the trace was refused, and nothing ran.
const BAD_INPUT: u8 = 2;

/// Bytes for which the meter keeps a rate.
const HEAT: u64 = 64 << 10;

/// Areas whose rates are shown.
const HOTTEST: usize = 2;

/// Microseconds between two operations of a trace that was recorded without times.
const UNTIMED_US: u64 = 100;

/// Failures of a run after its input is accepted.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Tracking(#[from] dirtymap::Error),
    #[error("{0}")]
    Range(#[from] dirtymap::RangeError),
    #[error("the simulated memory: {0}")]
    Memory(#[from] pagetable_sim::Error),
    #[error("a device: {0}")]
    Dma(#[from] pagetable_sim::DmaError),
    #[error("a worker thread panicked")]
    WorkerPanicked,
    #[error("{0}")]
    Output(#[from] io::Error),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse().and_then(Cli::checked) {
        Ok(cli) => cli,
        // A request for help is an error of clap as well, with status 0.
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(BAD_INPUT));
        }
    };
    match run(&cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(BAD_INPUT)
        }
    }
}

fn run(cli: &Cli) -> Result<u8, Box<dyn std::error::Error>> {
    let path = cli.trace_path();
    let mut trace =
        Trace::open(&path).map_err(|error| format!("trace {}: {error}", path.display()))?;
    if trace.duration_us == 0 {
        trace.space_evenly(UNTIMED_US);
    }
    let memory = cli.check_memory(&trace)?;
    print_facts(cli, &trace, memory)?;
    let migrate = match cli.format {
        TableFormat::AmdV1 => migrate::<AmdV1>,
        TableFormat::VtdSs => migrate::<VtdSs>,
        TableFormat::X86_64 => migrate::<X86_64>,
        TableFormat::ArmS1 => migrate::<ArmS1>,
        TableFormat::RiscvSv48 => migrate::<RiscvSv48>,
    };
    let run = migrate(cli, &trace, memory)?;
    if let Some(path) = &cli.json {
        run.write_json(path)
            .map_err(|error| format!("--json {}: {error}", path.display()))?;
    }
    if let Some(path) = &cli.plot {
        plot::write(&run, path).map_err(|error| format!("--plot {}: {error}", path.display()))?;
    }
    run.print(&mut io::stdout().lock())?;
    Ok(if run.verified() {
        VERIFIED
    } else {
        NOT_IDENTICAL
    })
}

/// Replays the trace on a machine of `memory` bytes, with an IO page table of the format `F`, while
/// the machine migrates. Then compares the two ends.
fn migrate<F: Format>(cli: &Cli, trace: &Trace, memory: u64) -> Result<RunRecord, Failure> {
    let granule = dirtymap::Granule::from_bytes(cli.page_size.bytes())?;
    let machine = Machine::<F>::new(trace, memory, granule, cli.sabotage, cli.seed)?;
    let settings = replay::Settings {
        devices: cli.devices as usize,
        cpus: cli.cpus as usize,
        seed: cli.seed,
        speed: cli.speed.factor(trace.duration_us),
        sabotage: cli.sabotage,
    };
    let bandwidth = cli.bandwidth.bytes_per_second(memory, cli.speed);
    let progress = progress::Progress::new(trace.ops.len() as u64);
    let replayed = replay::Progress::default();
    machine.space.start_tracking()?;
    let consumer = machine.space.consumer("backup", Start::Dirty)?;
    let mut migration = Migration::new(
        &machine,
        &progress,
        &replayed,
        cli.sabotage,
        &consumer,
        bandwidth,
    )?;
    let mut backup = Backup::new(&machine, &consumer, &progress)?;
    let meter = machine.space.consumer("rate", Start::Clean)?;
    let meter = Meter::new(meter, rate::HALF_LIFE).by(Granule::from_bytes(HEAT)?);
    let rate = Rate::new(meter, &replayed.phase);

    let every = Duration::from_secs_f64(cli.backup);
    let mut prediction = None;
    let log = std::thread::scope(|scope| {
        let replay = replay::Replay::start(scope, &machine, trace, &settings, &replayed);
        let backups = scope.spawn(|| backup.run(every, &replayed));
        let looks = scope.spawn(|| rate.run(&replayed));
        let copied = precopy(&mut migration, cli.max_rounds, |plan| {
            prediction = Some(PredictionRecord::from(rate.predict(plan)));
        });
        // In any case the workers must stop before the scope can end.
        replayed.stop();
        let log = replay.join();
        for other in [backups, looks] {
            other.join().unwrap_or(Err(Failure::WorkerPanicked))?;
        }
        copied.and(log)
    })?;
    migration.round(RoundKind::Final)?;
    backup.increment()?;
    rate.last_look()?;
    progress.finish();

    let comparison = migration.compare()?;
    let backup = BackupRecord {
        comparison: backup.compare()?,
        increments: backup.into_increments(),
    };
    let pages = machine.range.granules(PAGE) as u64;
    let leaf = cli.page_size.bytes() / PAGE.bytes();
    let check = rate.check(&log, pages, leaf);
    let hottest = hottest(&machine, &rate);
    let meter = MeterRecord {
        check,
        hottest,
        looks: rate.into_looks(),
    };
    let (rounds, took) = migration.into_rounds();
    Ok(RunRecord {
        trace: cli.trace_name(),
        files: trace.files.len() as u64,
        writes_total: trace.writes,
        writes_replayed: replayed.writes.load(Ordering::Relaxed),
        pages,
        format: cli.format,
        page_size: cli.page_size.bytes(),
        devices: cli.devices,
        cpus: cli.cpus,
        seed: cli.seed,
        speed: settings.speed,
        bandwidth_bytes_per_s: bandwidth,
        sabotage: cli.sabotage,
        migration_ms: took.as_millis() as u64,
        rounds,
        comparison,
        backup,
        meter,
        prediction,
        counters: counters(&machine),
    })
}

/// The areas with the highest rates.
fn hottest<F: Format>(machine: &Machine<F>, rate: &Rate<'_>) -> Vec<AreaRate> {
    let mut areas: Vec<AreaRate> = machine
        .files
        .iter()
        .map(|area| AreaRate {
            file: area.name.clone(),
            rate_bytes_per_s: rate.rate_of(area.range),
        })
        .collect();
    areas.sort_by(|one, other| other.rate_bytes_per_s.total_cmp(&one.rate_bytes_per_s));
    areas.truncate(HOTTEST);
    areas
}

/// Copies while the machine runs, until it is time to stop it. `predict` is called after the full
/// copy, if the link has a limit.
fn precopy<F: Format>(
    migration: &mut Migration<'_, F>,
    max_rounds: u32,
    predict: impl FnOnce(Plan),
) -> Result<(), Failure> {
    migration.copy_everything()?;
    if let Some(plan) = migration.plan(max_rounds) {
        predict(plan);
    }
    while migration.decide(max_rounds) == Decision::Continue {
        migration.round(RoundKind::Precopy)?;
    }
    Ok(())
}

/// Totals of the library and the simulator.
fn counters<F: Format>(machine: &Machine<F>) -> BTreeMap<&'static str, u64> {
    let space = machine.space.stats();
    let domain = machine.domain.stats();
    BTreeMap::from([
        ("harvests", space.harvests),
        ("leased_bytes", space.leased_bytes),
        ("committed_bytes", space.committed_bytes),
        ("aborted_bytes", space.aborted_bytes),
        ("flushes", space.flush.flushes),
        (
            "leaves_invalidated",
            u64::try_from(space.flush.entries).unwrap_or(u64::MAX),
        ),
        ("invalidation_commands", domain.commands),
        ("dirty_walks", domain.dirty_walks),
        ("dma_faults", domain.faults),
        ("outside_marks", space.outside_marks),
    ])
}

/// A few lines about the replay.
fn print_facts(cli: &Cli, trace: &Trace, memory: u64) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "trace: {}, {} files, {} writes of {} in {:.1} s",
        cli.trace_name(),
        text::count(trace.files.len() as u64),
        text::count(trace.writes),
        text::bytes(u64::try_from(trace.bytes_written).unwrap_or(u64::MAX)),
        trace.duration_us as f64 / 1e6,
    )?;
    let speed = match cli.speed.factor(trace.duration_us) {
        Some(factor) => format!("{factor:.1} times the recorded speed"),
        None => "as fast as possible".to_owned(),
    };
    let link = match cli.bandwidth.bytes_per_second(memory, cli.speed) {
        Some(rate) => format!("{}/s", text::bytes(rate as u64)),
        None => "unlimited".to_owned(),
    };
    writeln!(
        out,
        "machine: {} of memory in pages of {}, table {}, {} devices, {} CPUs; replay {speed}, \
         link {link}",
        text::bytes(memory),
        text::bytes(cli.page_size.bytes()),
        cli.format.name(),
        cli.devices,
        cli.cpus,
    )
}
