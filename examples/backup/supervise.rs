//! The supervisor: starts the worker, kills it at random moments, starts it again.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::Cli;
use crate::copies::Copies;
use crate::{generation, work};

/// A worker that is gone when its handle is.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs workers until one gets to the end of the trace. Returns how many were killed.
pub(crate) fn run(cli: &Cli, folder: &Path) -> Result<u64, Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    if folder.join("disk.img").exists() {
        return Err(format!(
            "{} has a run already: name another folder",
            folder.display()
        )
        .into());
    }
    let copies = Copies::open(cli, folder)?;
    for consumer in [work::INCREMENTS, work::FULL] {
        if copies.any(consumer)? {
            return Err(
                format!("increments of {consumer} are there already: name another place").into(),
            );
        }
    }
    let bar = ProgressBar::new(cli.seconds * 1000);
    let style = ProgressStyle::with_template("{bar:30} {elapsed} {msg}")?;
    bar.set_style(style);
    let start = Instant::now();
    let mut random = cli.seed;
    let mut killed = 0;
    loop {
        let this = std::env::current_exe()?;
        let args = std::env::args_os().skip(1);
        let child = Command::new(this)
            .args(args)
            .arg("--worker")
            .arg(folder)
            .spawn()?;
        let mut worker = Worker(child);
        // Moments that share out the time that is left among the kills that are left.
        let left = Duration::from_secs(cli.seconds).saturating_sub(start.elapsed());
        let mean = left / (cli.kills - killed + 1) as u32;
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let share = (random >> 33) as f64 / f64::from(1u32 << 31);
        let life = mean.mul_f64(0.5 + share).max(Duration::from_millis(150));
        let moment = (killed < cli.kills).then(|| Instant::now() + life);
        match wait(&mut worker, moment, &bar, folder, start)? {
            Some(status) if status.success() => break,
            Some(status) => return Err(format!("the worker ended with {status}").into()),
            None => killed += 1,
        }
        drop(worker); // kill -9
        bar.println(format!(
            "killed the worker after {:.1} s",
            start.elapsed().as_secs_f64()
        ));
        if cli.lose_log && killed == 1 {
            work::lose_log(folder)?;
        }
    }
    bar.finish_and_clear();
    Ok(killed)
}

/// Waits until the worker ends, or until `moment`.
fn wait(
    worker: &mut Worker,
    moment: Option<Instant>,
    bar: &ProgressBar,
    folder: &Path,
    start: Instant,
) -> Result<Option<ExitStatus>, Box<dyn Error>> {
    loop {
        if let Some(status) = worker.0.try_wait()? {
            return Ok(Some(status));
        }
        let generations = generation::all(folder, work::INCREMENTS)?.len();
        if moment.is_some_and(|moment| Instant::now() >= moment) && generations > 0 {
            return Ok(None);
        }
        bar.set_position(start.elapsed().as_millis() as u64);
        bar.set_message(format!("{generations} generations"));
        thread::sleep(Duration::from_millis(25));
    }
}
