//! The soak: everything at once, at full speed, with real bytes, for any length of time.
//!
//! ```text
//!  devices, CPUs ---> memory --harvesters, mappers: harvest or unmap, sync--> copy
//!       |                |                                                     |
//!       +--> shadows     +----------------- compared, byte for byte, ----------+
//!              |                            while all rest
//!              +---- what each writer wrote last, lane by lane
//! ```
//!
//! * Each writer owns a lane of every page, and remembers its last write there: `writer.rs`.
//! * Slots are mapped and unmapped: `mapper.rs`. Domains are attached and detached: `attacher.rs`.
//!   The phase of a slot tells a device whether its write must be refused.
//! * A lease ends in every possible way: `harvester.rs`. A new mode of harvest gets an arm there.
//!   Named consumers have a rhythm each, and leave and come back. `book.rs` checks their epochs.
//! * Pages are written and discarded: `discarder.rs`.
//! * `compare.rs` compares all bytes, without sampling. The first difference ends the run.
#![allow(clippy::unwrap_used)] // helpers of tests

mod attacher;
mod book;
mod compare;
mod control;
mod discarder;
mod failure;
mod finish;
mod harvester;
mod layout;
mod machine;
mod mapper;
mod options;
mod panics;
mod tally;
mod world;
mod writer;

use std::time::{Duration, Instant};

use dirtymap::sync::thread;

use attacher::Attacher;
use compare::Progress;
use discarder::Discarder;
use failure::Failure;
use harvester::Harvester;
use mapper::Mapper;
pub use options::{Options, Sabotage};
use tally::resident;
use world::World;
use writer::Pen;

/// Runs the soak. Progress goes to stderr, the table at the end to stdout.
///
/// # Errors
/// The report of the first failure.
pub fn run(options: &Options) -> Result<(), String> {
    let world = World::new(options.clone()).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let (mut grown, mut progress) = (None, Progress::new(&world));
    let outcome = thread::scope(|scope| {
        spawn_all(scope, &world);
        let outcome = conduct(&world, began, &mut progress, &mut grown);
        world.control.stop();
        match outcome.and_then(|()| world.control.wait_for_end()) {
            Err(failure) if failure.hangs() => {
                // Threads that hang cannot be joined.
                println!("{}", report(&world, &failure));
                std::process::exit(1);
            }
            outcome => outcome,
        }
    });
    // The failure of an actor takes precedence, because it may be the cause of the one here.
    let outcome = world.control.failure().map_or(outcome, Err);
    world.panics.switch(false);
    let elapsed = began.elapsed();
    let left = match outcome.and_then(|()| progress.compare(&world)) {
        Ok(()) => finish::take_down(world, elapsed)
            .map_err(|what| format!("{what}\n{}", repeat(options)))?,
        Err(failure) => return Err(report(&world, &failure)),
    };
    if let Some((first, last)) = grown {
        let kib = u64::saturating_sub(last, first);
        println!(
            "{left}resident memory from the first comparison to the last: {first} to {last} KiB"
        );
        // A forgotten lease keeps its domains in memory, also those that were detached.
        if kib >> 10 > options.growth && !options.forget {
            return Err(format!(
                "FAILED: memory grew by {kib} KiB\n{}",
                repeat(options)
            ));
        }
    }
    Ok(())
}

fn report(world: &World, failure: &Failure) -> String {
    format!(
        "{}\n{}",
        world.events.report(failure),
        repeat(&world.options)
    )
}

fn repeat(options: &Options) -> String {
    format!("seed {}; to repeat:\n  {}", options.seed, options.command())
}

/// Starts all actors.
fn spawn_all<'scope, 'env>(scope: &'scope thread::Scope<'scope, 'env>, world: &'env World) {
    let options = &world.options;
    let act = |body: Box<dyn FnOnce() -> Result<(), Failure> + Send + 'env>| {
        world.control.enter();
        scope.spawn(move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            world.control.leave(outcome.ok());
        });
    };
    for nth in 0..options.devices as usize {
        let config = machine::device_config(nth as u64);
        let dma = world.machines[nth % world::DOMAINS].device(config);
        act(Box::new(move || Pen::new(world, nth).device(dma)));
    }
    for nth in 0..options.cpus {
        let lane = (options.devices + options.attachers + nth) as usize;
        act(Box::new(move || Pen::new(world, lane).cpu()));
    }
    for nth in 0..options.mappers {
        act(Box::new(move || Mapper::new(world, nth).run()));
    }
    for nth in 0..options.attachers {
        act(Box::new(move || Attacher::new(world, nth).run()));
    }
    for nth in 0..options.harvesters {
        act(Box::new(move || Harvester::new(world, nth).run()));
    }
    for whose in 1..=options.consumers as usize {
        act(Box::new(move || Harvester::of_consumer(world, whose).run()));
    }
    for nth in 0..options.discarders {
        act(Box::new(move || Discarder::new(world, nth).run()));
    }
}

/// Prints the progress each second, and compares every few seconds, until the time is over. `grown`
/// becomes the resident memory at the first and the last comparison.
fn conduct(
    world: &World,
    began: Instant,
    progress: &mut Progress,
    grown: &mut Option<(u64, u64)>,
) -> Result<(), Failure> {
    let duration = world.options.duration();
    let every = Duration::from_secs_f64(world.options.checkpoint);
    let (mut next_line, mut next_comparison) = (Duration::from_secs(1), every);
    while began.elapsed() < duration && !world.control.has_failed() {
        thread::sleep(Duration::from_millis(10));
        if began.elapsed() >= next_comparison {
            world.control.rest()?;
            if world.control.has_failed() {
                break;
            }
            world.panics.switch(false);
            progress.compare(world)?;
            world.panics.switch(world.options.panics);
            let now = resident("VmRSS");
            *grown = Some((grown.map_or(now, |(first, _)| first), now));
            world.control.resume()?;
            next_comparison = began.elapsed() + every;
        }
        if began.elapsed() >= next_line {
            eprintln!("{}", world.tally.line(began.elapsed()));
            next_line += Duration::from_secs(1);
        }
    }
    Ok(())
}
