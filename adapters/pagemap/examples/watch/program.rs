//! The run: starts the program, watches it, and tells what was seen.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use dirtymap::{Access, AddressSpace, Iova, IovaRange};
use dirtymap_pagemap::{PagemapError, ProcessMemory};

use crate::cli::Cli;
use crate::live::Live;
use crate::watch::{Watch, bytes};
use crate::workload::{self, Control};
use crate::{plain, plot};

/// The input was refused, or something failed.
const FAILED: u8 = 2;

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(cli: &Cli) -> Result<(), Box<dyn std::error::Error>> {
    let memory = match ProcessMemory::new() {
        Ok(memory) => Arc::new(memory),
        Err(error @ PagemapError::Unsupported { .. }) => {
            writeln!(io::stdout(), "SKIP watch: {error}")?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let page = memory.page();
    // Room for whole pages in the middle; sixteenths are whole pages too.
    let size = cli.size.next_multiple_of(16 * page.bytes());
    let words = usize::try_from((size + page.bytes()) / 8)?;
    let mut block = Vec::new();
    block
        .try_reserve_exact(words)
        .map_err(|error| format!("--size {}: {error}", bytes(cli.size as f64)))?;
    block.resize(words, 0u64);
    let address = block.as_ptr().addr() as u64;
    let first = address.next_multiple_of(page.bytes());
    let range = IovaRange::from_len(Iova::new(first), size)?;

    memory.add(range, first)?;
    let space = AddressSpace::with_source(page, Arc::clone(&memory))?;
    space.map(range, 0, Access::ReadWrite)?;
    space.start_tracking()?;

    let from = ((first - address) / 8) as usize;
    let program = &mut block[from..from + (size / 8) as usize];
    let control = Control::default();
    let mut watch = Watch::new(&space, range, cli.window);
    let watched = thread::scope(|scope| {
        scope.spawn(|| workload::run(cli.workload, program, cli.seed, &control));
        let watched = look(cli, &mut watch, &control);
        // Whatever happened, the program must end before the scope can.
        control.stop.store(true, Relaxed);
        watched
    });
    watched?;
    // Before the memory goes.
    memory.remove(range)?;

    if let Some(path) = &cli.plot {
        plot::write(cli, watch.bytes(), &watch.samples, path)
            .map_err(|error| format!("--plot {}: {error}", path.display()))?;
    }
    summary(cli, &watch, control.operations.load(Relaxed))?;
    Ok(())
}

/// Harvests and shows, until the time is over or the user has seen enough.
fn look(
    cli: &Cli,
    watch: &mut Watch<'_>,
    control: &Control,
) -> Result<(), Box<dyn std::error::Error>> {
    let began = Instant::now();
    let mut live = match !cli.plain && io::stdout().is_terminal() {
        true => Some(Live::new()?),
        false => None,
    };
    for round in 1u32.. {
        let due = cli.interval.saturating_mul(round).min(cli.seconds);
        let rest = |began: Instant| due.saturating_sub(began.elapsed());
        match &mut live {
            Some(live) => {
                let operations = control.operations.load(Relaxed);
                if live.show(cli, watch, operations, rest(began))? {
                    break;
                }
            }
            None => thread::sleep(rest(began)),
        }
        let sample = watch.sample()?;
        if live.is_none() {
            plain::line(&mut io::stdout().lock(), sample)?;
        }
        if began.elapsed() >= cli.seconds {
            break;
        }
    }
    Ok(())
}

/// What there was to see, in a few lines.
fn summary(cli: &Cli, watch: &Watch<'_>, operations: u64) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let samples = &watch.samples;
    let seconds = samples.last().map_or(0.0, |last| last.at.as_secs_f64());
    let written: u64 = samples.iter().map(|sample| sample.dirty_bytes).sum();
    let most = samples
        .iter()
        .map(|sample| sample.rate())
        .fold(0.0, f64::max);
    let took: Duration = samples.iter().map(|sample| sample.took).sum();
    writeln!(
        out,
        "{} in {}, {seconds:.1} s, {operations} operations",
        cli.workload.name(),
        bytes(watch.bytes() as f64),
    )?;
    writeln!(
        out,
        "{} harvests, {:.0} us each: {} of pages written, {}/s, at most {}/s; {} never",
        samples.len(),
        took.as_micros() as f64 / samples.len().max(1) as f64,
        bytes(written as f64),
        bytes(written as f64 / seconds.max(1e-9)),
        bytes(most),
        bytes(watch.untouched() as f64),
    )?;
    if let Some(path) = &cli.plot {
        writeln!(out, "picture: {}", path.display())?;
    }
    Ok(())
}
