//! The migrator: rounds of harvest, sync, copy and commit, some of which fail; then the last one,
//! and the comparison.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use dirtymap::{HarvestRequest, IovaRange, Scope, UserBitmap};
use dirtymap_kvm::KvmMode;

use super::machine::{Failure, GRANULE, Machine, PAGE, PAGES, pages};
use super::writers::{Random, Written, while_all_write};

/// Every page is identical.
const VERIFIED: u8 = 0;
/// A page differs.
const NOT_IDENTICAL: u8 = 1;
/// A part of the program could not be run.
const FAILED: u8 = 2;

/// One harvest over a guest, a vhost back end, devices behind an IOMMU and threads of the program.
#[derive(Debug, Parser)]
#[command(name = "joint")]
pub(crate) struct Cli {
    /// Rounds before the writers stop.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rounds: u32,
    /// Chooses the pages that are written, and the rounds that fail.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// How the log of KVM is read.
    #[arg(long, value_enum, default_value_t = Mode::Manual)]
    pub(crate) kvm: Mode,
    /// A VFIO device behind the IOMMU of this machine, by its file in /dev/vfio/devices.
    #[arg(long)]
    pub(crate) vfio: Option<PathBuf>,
    /// Breaks one step on purpose.
    #[arg(long, value_enum)]
    pub(crate) sabotage: Option<Sabotage>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Reading the log clears it.
    Clearing,
    /// Exactly what was recorded is cleared.
    Manual,
    /// As manual, and everything is dirty at the start.
    InitiallySet,
    /// A ring for each processor.
    Ring,
    /// No guest.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sabotage {
    /// Rounds that fail are committed, though a part of their pages was not copied.
    CommitFailed,
}

impl Mode {
    pub(crate) fn kvm(self) -> Option<KvmMode> {
        match self {
            Mode::Clearing => Some(KvmMode::Clearing),
            Mode::Manual => Some(KvmMode::Manual {
                initially_set: false,
            }),
            Mode::InitiallySet => Some(KvmMode::Manual {
                initially_set: true,
            }),
            Mode::Ring => Some(KvmMode::Ring { entries: 1024 }),
            Mode::None => None,
        }
    }
}

/// Words of a bitmap with a bit for each granule of the machine.
const WORDS: usize = ((PAGES * PAGE) >> GRANULE.lg2()).div_ceil(64) as usize;

/// The copy of both halves of every page.
struct Copy {
    memory: Vec<u64>,
    devices: Vec<u8>,
}

impl Copy {
    fn new() -> Self {
        Copy {
            memory: vec![0; (PAGES * PAGE / 8) as usize],
            devices: vec![0; (PAGES * PAGE) as usize],
        }
    }

    fn take(&mut self, machine: &Machine, run: IovaRange) -> Result<(), Failure> {
        let (start, end) = (run.start().get(), run.last().get() + 1);
        let words = (start / 8) as usize..(end / 8) as usize;
        for (to, from) in self.memory[words.clone()]
            .iter_mut()
            .zip(&machine.memory.words()[words])
        {
            // Relaxed: a write that comes now makes the page dirty again.
            *to = from.load(Ordering::Relaxed);
        }
        let to = &mut self.devices[start as usize..end as usize];
        Ok(machine.devices.read(start, to)?)
    }

    /// Pages that differ from the memory. All writers have stopped before.
    fn differing(&self, machine: &Machine) -> Result<Vec<u64>, Failure> {
        let mut now = Copy::new();
        now.take(machine, pages(0, PAGES)?)?;
        let differs = |page: &u64| {
            let words = (page * PAGE / 8) as usize..((page + 1) * PAGE / 8) as usize;
            let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            now.memory[words.clone()] != self.memory[words]
                || now.devices[bytes.clone()] != self.devices[bytes]
        };
        Ok((0..PAGES).filter(differs).collect())
    }
}

/// The counts of a migration.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) written: Written,
    pub(crate) failed_rounds: u64,
    pub(crate) copied_bytes: u128,
    pub(crate) aborted_bytes: u64,
    /// Granules that KVM, the vhost log, the IOMMU, the page tables of the processor and the device
    /// that logs each reported, over all rounds.
    pub(crate) seen: [u64; 5],
    pub(crate) no_guest: Option<String>,
    pub(crate) no_pagemap: Option<String>,
    pub(crate) no_hardware: Option<String>,
    pub(crate) differing: Vec<u64>,
}

/// One round. Of a round that fails, the first half is copied and committed; the rest is dirty
/// again.
fn round(
    machine: &Machine,
    copy: &mut Copy,
    fails: bool,
    cli: &Cli,
    report: &mut Report,
) -> Result<(), Failure> {
    let request = HarvestRequest::new(pages(0, PAGES)?, GRANULE);
    let ids = machine.ids;
    let (vhost, iommu) = (Some(ids.vhost), Some(ids.iommu));
    let all = [ids.kvm, vhost, iommu, ids.pagemap, Some(ids.logging)];
    for (id, seen) in all.into_iter().zip(&mut report.seen) {
        let Some(id) = id else { continue };
        let mut words = [0u64; WORDS];
        let alone = request.in_scope(Scope::Domain(id));
        machine.space.peek(&alone, UserBitmap::new(&mut words))?;
        *seen += words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum::<u64>();
    }
    let mut words = [0u64; WORDS];
    let lease = machine
        .space
        .harvest(&request, UserBitmap::new(&mut words))?;
    let lease = lease.sync()?;
    let runs: Vec<IovaRange> = lease.runs().collect();
    let safe = if fails { runs.len() / 2 } else { runs.len() };
    for run in &runs[..safe] {
        copy.take(machine, *run)?;
        lease.commit_range(*run);
        report.copied_bytes += run.len();
    }
    if !fails || cli.sabotage == Some(Sabotage::CommitFailed) {
        lease.commit();
    } else {
        report.aborted_bytes += lease.abort().bytes;
    }
    report.failed_rounds += u64::from(fails);
    Ok(())
}

/// A whole migration.
pub(crate) fn migrate(cli: &Cli) -> Result<Report, Failure> {
    let (machine, mut guest) = Machine::new(cli.kvm.kvm(), cli.vfio.as_deref())?;
    let mut report = Report {
        no_guest: machine.no_guest.clone(),
        no_pagemap: machine.no_pagemap.clone(),
        no_hardware: machine.no_hardware.clone(),
        ..Report::default()
    };
    let mut copy = Copy::new();
    // One copy of everything: from here on every write is reported.
    copy.take(&machine, pages(0, PAGES)?)?;
    let written = Written::default();
    let mut random = Random(cli.seed.wrapping_add(99));
    while_all_write(&machine, guest.as_mut(), cli.seed, &written, || {
        for _ in 0..cli.rounds {
            thread::sleep(Duration::from_millis(2));
            round(&machine, &mut copy, random.below(3) == 0, cli, &mut report)?;
        }
        Ok(())
    })?;
    // All have stopped. Each writes once more, so that the round that fails now has dirty pages to
    // put back.
    for page in (2..PAGES).step_by(9) {
        machine.program_writes(page, u64::MAX)?;
        machine.back_end_writes(page + 3, u64::MAX);
        machine.logging_device_writes(page + 4, u64::MAX);
    }
    if let Some(guest) = &mut guest {
        guest.write(5, 20, 9)?;
    }
    if machine.ids.pagemap.is_some() {
        machine.program_writes_quietly(PAGES - 1, u64::MAX);
    }
    round(&machine, &mut copy, true, cli, &mut report)?;
    round(&machine, &mut copy, false, cli, &mut report)?;
    report.differing = copy.differing(&machine)?;
    report.written = written;
    Ok(report)
}

pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(FAILED));
        }
    };
    match migrate(&cli) {
        Ok(report) => print(&report, &cli),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(FAILED)
        }
    }
}

fn print(report: &Report, cli: &Cli) -> ExitCode {
    let no_guest = report.no_guest.iter().filter(|_| cli.kvm != Mode::None);
    no_guest.for_each(|why| println!("SKIP guest: {why}"));
    let no_pagemap = report.no_pagemap.iter();
    no_pagemap.for_each(|why| println!("SKIP quiet writes: {why}"));
    let no_hardware = report.no_hardware.iter();
    no_hardware.for_each(|why| println!("SKIP a device by iommufd: {why}"));
    let size = GRANULE.bytes() >> 10;
    let lines = [
        (
            "guest",
            &report.written.guest,
            Some(("log of KVM", report.seen[0])),
        ),
        (
            "back end",
            &report.written.back_end,
            Some(("vhost log", report.seen[1])),
        ),
        (
            "devices",
            &report.written.device,
            Some(("IO page table", report.seen[2])),
        ),
        (
            "logging",
            &report.written.logging,
            Some(("log of the device", report.seen[4])),
        ),
        ("program", &report.written.program, None),
        (
            "quietly",
            &report.written.quietly,
            Some(("page tables of the processor", report.seen[3])),
        ),
    ];
    for (writer, written, log) in lines {
        let written = written.load(Ordering::Relaxed);
        match log {
            Some((log, seen)) => println!(
                "{writer:<9} {written:>7} pages written; {seen:>6} times {size} KiB by the {log}"
            ),
            None => println!("{writer:<9} {written:>7} pages written, and marked"),
        }
    }
    println!(
        "{} rounds, of which {} failed; {} KiB copied, {} KiB put back",
        u64::from(cli.rounds) + 2,
        report.failed_rounds,
        report.copied_bytes >> 10,
        report.aborted_bytes >> 10,
    );
    match report.differing.as_slice() {
        [] => {
            println!("verified: {PAGES} pages identical");
            ExitCode::from(VERIFIED)
        }
        pages => {
            println!(
                "LOST WRITES: {} of {PAGES} pages differ, the first is {}",
                pages.len(),
                pages[0]
            );
            ExitCode::from(NOT_IDENTICAL)
        }
    }
}
