//! Compares `dirtymap` with its peers and prints one table for each family.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use std::{fs, io};

use clap::Parser;
use dirtymap_benches::compare::document::{self, Origin};
use dirtymap_benches::compare::{FAMILIES, Report, Settings, memory::Counting};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Compares dirtymap with its peers, which take turns in one process, and prints one table for each
/// family of workloads. At the end, it lists the targets that are met and those that are missed.
#[derive(Parser)]
struct Options {
    /// Take a minute or two instead of some minutes for each family, to see the effect of a change.
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
    /// Also write the tables into docs/benchmarks.md and README.md of this source tree, and draw
    /// the pictures of docs/plots. The README needs the families marks and harvest in one run.
    #[arg(long, conflicts_with_all = ["quick", "matching"])]
    update: bool,
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
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let tables = root.join("docs/benchmarks.md");
    let mut settings = if options.quick {
        Settings::quick()
    } else {
        Settings::thorough()
    };
    settings.matching.clone_from(&options.matching);
    let origin = Origin::of(root);
    let mut report = Report::default();
    let chosen =
        |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    let families = || FAMILIES.iter().filter(|family| chosen(family.name));
    for family in families() {
        let began = Instant::now();
        (family.run)(&settings, &mut report);
        let took = began.elapsed().as_secs_f64();
        if report.rows_of(family.name) == 0 && settings.matching.is_empty() {
            report.problem(family.name, "not a single row".to_owned());
        }
        let section = document::section(&origin, &settings, &report, family.name);
        println!("## {}\n\n{section}", family.name);
        eprintln!("{}: {took:.1} s", family.name);
        if options.update {
            document::update(&tables, family.name, &section)?;
            // The pictures that the document shows.
            let shown = format!("(plots/{}", family.name);
            if fs::read_to_string(&tables)?.contains(&shown) {
                report.plot(family.name, &root.join("docs/plots"))?;
            }
        }
        if let Some(directory) = &options.plot {
            report.plot(family.name, directory)?;
        }
    }
    println!("## Targets\n");
    families().for_each(|family| print!("{}", report.targets_of(family.name)));
    if options.update {
        match document::readme(&origin, &report) {
            Some(section) => document::update(&root.join("README.md"), "readme", &section)?,
            None => eprintln!("README.md stays: it needs the families marks and harvest"),
        }
        let written = fs::read_to_string(&tables)?;
        let origins = document::origins(&written);
        if origins.len() > 1 {
            eprintln!("docs/benchmarks.md has tables of several runs:");
            for (origin, families) in origins {
                eprintln!("  {}: {origin}", families.join(", "));
            }
        }
    }
    if let Some(path) = &options.json {
        fs::write(path, format!("{:#}\n", report.records()))?;
    }
    Ok(report.problems().to_vec())
}
