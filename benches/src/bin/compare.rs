//! Compares `dirtymap` with its peers and prints one table for each family.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;
use std::{fs, io};

use clap::Parser;
use dirtymap_benches::compare::{FAMILIES, Report, Settings, memory::Counting};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Compares dirtymap with its peers, which take turns in one process, and prints one table for each
/// family of workloads.
#[derive(Parser)]
struct Options {
    /// Take under a minute instead of some minutes for each family, to see the effect of a change.
    /// The numbers are not worth keeping.
    #[arg(long)]
    quick: bool,
    /// Run this family only; may be given several times.
    #[arg(
        long, value_name = "FAMILY",
        value_parser = FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>()
    )]
    only: Vec<String>,
    /// Run only workloads whose name contains this text.
    #[arg(long, value_name = "TEXT", default_value = "")]
    matching: String,
    /// Also write one record for each workload and peer into this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also draw the ratios of each family, and the growth of costs, into this directory.
    #[arg(long, value_name = "DIRECTORY")]
    plot: Option<PathBuf>,
    /// Also put each table into this document, between `<!-- compare FAMILY -->` and `<!-- end
    /// -->`.
    #[arg(long, value_name = "FILE")]
    update: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(problems) if problems.is_empty() => ExitCode::SUCCESS,
        Ok(problems) => {
            eprintln!("compare: the numbers are not valid:");
            problems.iter().for_each(|problem| eprintln!("  {problem}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the families. Returns the problems that make the numbers invalid.
fn run(options: &Options) -> io::Result<Vec<String>> {
    let mut settings = if options.quick {
        Settings::quick()
    } else {
        Settings::thorough()
    };
    settings.matching.clone_from(&options.matching);
    let mut report = Report::default();
    let chosen =
        |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    for family in FAMILIES.iter().filter(|family| chosen(family.name)) {
        let began = Instant::now();
        (family.run)(&settings, &mut report);
        let took = began.elapsed().as_secs_f64();
        if report.rows_of(family.name) == 0 && settings.matching.is_empty() {
            report.problem(family.name, "not a single row".to_owned());
        }
        let section = format!("{}\n\n{}", heading(&settings), report.table(family.name));
        println!("## {}\n\n{section}", family.name);
        let (met, all) = report.targets(family.name);
        eprintln!("{}: {met} of {all} targets met, {took:.1} s", family.name);
        if let Some(path) = &options.update {
            let document = fs::read_to_string(path)?;
            fs::write(path, replaced(&document, family.name, &section)?)?;
        }
        if let Some(directory) = &options.plot {
            report.plot(family.name, directory)?;
        }
    }
    if let Some(path) = &options.json {
        fs::write(path, format!("{:#}\n", report.records()))?;
    }
    Ok(report.problems().to_vec())
}

/// The date, commit and machine of the run.
fn heading(settings: &Settings) -> String {
    let date = output("date", &["+%F"]);
    let commit = output("git", &["describe", "--always", "--dirty"]);
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, model)| model);
    format!(
        "{date}, commit {commit}, {cpus} CPUs of a virtual machine ({model}),\n\
         {} to {} rounds. Least / median of all rounds.",
        settings.least_rounds, settings.rounds
    )
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_else(|_| "unknown".to_owned())
}

/// `document` with `section` between the marks of `family`.
fn replaced(document: &str, family: &str, section: &str) -> io::Result<String> {
    let begin = format!("<!-- compare {family} -->");
    let missing = || {
        io::Error::other(format!(
            "the document has no {begin} followed by <!-- end -->"
        ))
    };
    let (before, rest) = document.split_once(&begin).ok_or_else(missing)?;
    let (_, after) = rest.split_once("<!-- end -->").ok_or_else(missing)?;
    Ok(format!(
        "{before}{begin}\n\n{}\n\n<!-- end -->{after}",
        section.trim_end()
    ))
}
