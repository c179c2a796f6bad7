//! The documents that show the tables: docs/benchmarks.md, README.md and the pictures in
//! docs/plots.
//!
//! A section begins with `<!-- compare NAME -->` and ends with `<!-- end -->`. `NAME` is that of a
//! family, or `readme`.

use std::path::Path;
use std::process::Command;
use std::{fs, io};

use super::{FAMILIES, Report, Settings};

/// The commit and the machine of a run. Made before the run, because the run changes documents.
pub struct Origin {
    date: String,
    commit: String,
    machine: String,
}

impl Origin {
    /// Of this moment, in the source tree at `root`. The commit ends with `-dirty` if a file is
    /// changed that is not a document.
    pub fn of(root: &Path) -> Self {
        let git = |arguments: &[&str]| output("git", arguments, root);
        let mut commit = git(&["describe", "--always", "--abbrev=7"]);
        let changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/"];
        let code = [":(exclude,top)docs", ":(exclude,top)*.md"];
        if !git(&[&changed[..], &code].concat()).is_empty() {
            commit += "-dirty";
        }
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = model
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        Origin {
            date: output("date", &["+%F"], root),
            commit,
            machine: format!("{cpus} CPUs of a virtual machine ({model})"),
        }
    }

    /// The first line of a section.
    fn line(&self) -> String {
        format!("{}, commit {}, {},", self.date, self.commit, self.machine)
    }
}

fn output(program: &str, arguments: &[&str], directory: &Path) -> String {
    let mut command = Command::new(program);
    let output = command.args(arguments).current_dir(directory).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_else(|_| "unknown".to_owned())
}

/// The section of a family.
pub fn section(origin: &Origin, settings: &Settings, report: &Report, family: &str) -> String {
    format!(
        "{}\n{} to {} rounds. Least / median of all rounds.\n\n{}",
        origin.line(),
        settings.least_rounds,
        settings.rounds,
        report.table(family)
    )
}

/// The section of the README, if `report` has all of its rows.
pub fn readme(origin: &Origin, report: &Report) -> Option<String> {
    const PEERS: [&str; 3] = ["dirtymap-handle", "vm-memory", "flat"];
    const ROWS: [(&str, &str, &str); 7] = [
        ("harvest", "1 TiB, 0 % dirty", "harvest of 1 TiB, clean"),
        (
            "harvest",
            "1 TiB, 0.01 % dirty",
            "harvest of 1 TiB, 0.01 % dirty",
        ),
        ("harvest", "1 TiB, 1 % dirty", "harvest of 1 TiB, 1 % dirty"),
        ("marks", "1 GiB, clean", "mark of 1 GiB"),
        ("marks", "hot page", "mark of a page that is dirty"),
        (
            "marks",
            "hot page, its line marked by two threads",
            "the same, two threads, one line",
        ),
        ("marks", "cold page", "mark of a page that is clean"),
    ];
    let mut text = format!(
        "{}\nthe least time of each row. ▼: a peer is faster.\n\n\
         | | dirtymap | `AtomicBitmap` of vm-memory | array of atomic words |\n|---|--:|--:|--:|\n",
        origin.line()
    );
    for (family, workload, label) in ROWS {
        let times = PEERS.map(|peer| report.least(family, workload, peer));
        let [Some(ours), Some(theirs), Some(flat)] = times else {
            return None;
        };
        let lost = if theirs.1.min(flat.1) < ours.1 {
            " ▼"
        } else {
            ""
        };
        let shown = [ours, theirs, flat].map(|(shown, _)| shown).join(" | ");
        text += &format!("| {label}{lost} | {shown} |\n");
    }
    Some(text)
}

/// Replaces a section of the document at `path`.
///
/// # Errors
/// If the document cannot be read or written, or has no such section.
pub fn update(path: &Path, name: &str, section: &str) -> io::Result<()> {
    let document = fs::read_to_string(path)?;
    let document = replaced(&document, name, section).ok_or_else(|| {
        io::Error::other(format!(
            "{} has no <!-- compare {name} --> followed by <!-- end -->",
            path.display()
        ))
    })?;
    fs::write(path, document)
}

/// `document` with `section` between the marks of `name`.
fn replaced(document: &str, name: &str, section: &str) -> Option<String> {
    let begin = format!("<!-- compare {name} -->");
    let (before, rest) = document.split_once(&begin)?;
    let (_, after) = rest.split_once("<!-- end -->")?;
    let section = section.trim_end();
    Some(format!(
        "{before}{begin}\n\n{section}\n\n<!-- end -->{after}"
    ))
}

/// The families of `document`, by the commit and the machine of their tables: one entry if all are
/// of one run.
pub fn origins(document: &str) -> Vec<(&str, Vec<&'static str>)> {
    let mut origins: Vec<(&str, Vec<&'static str>)> = Vec::new();
    for family in FAMILIES {
        let Some(origin) = origin(document, family.name) else {
            continue;
        };
        match origins.iter_mut().find(|(other, _)| *other == origin) {
            Some((_, families)) => families.push(family.name),
            None => origins.push((origin, vec![family.name])),
        }
    }
    origins
}

/// The commit and the machine of a section.
fn origin<'a>(document: &'a str, name: &str) -> Option<&'a str> {
    let begin = format!("<!-- compare {name} -->");
    let (_, section) = document.split_once(&begin)?;
    let (_, origin) = section.trim_start().lines().next()?.split_once(", ")?;
    Some(origin)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // files of this source tree
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_the_rest_stays() {
        let document = "a\n<!-- compare marks -->\nold\n<!-- end -->\nb\n<!-- end -->\n";
        let new = replaced(document, "marks", "new\n");
        assert_eq!(
            new.as_deref(),
            Some("a\n<!-- compare marks -->\n\nnew\n\n<!-- end -->\nb\n<!-- end -->\n")
        );
        assert_eq!(replaced(document, "areas", "new"), None);
        assert_eq!(replaced("<!-- compare marks -->", "marks", "new"), None);
    }

    #[test]
    fn tables_of_several_runs_are_told_apart() {
        let of = |name, commit| {
            format!(
                "<!-- compare {name} -->\n\n2026-01-01, commit {commit}, 2 CPUs,\n<!-- end -->\n"
            )
        };
        let families = |document: &str| {
            let origins = origins(document).into_iter();
            origins.map(|(_, families)| families).collect::<Vec<_>>()
        };
        let same = of("marks", "a") + &of("areas", "a");
        assert_eq!(families(&same), [["marks", "areas"]]);
        let other = of("marks", "a") + &of("areas", "b");
        assert_eq!(families(&other), [["marks"], ["areas"]]);
    }

    /// Once, the tables were of six commits and three machines, and a reader compared rows of
    /// different runs.
    #[test]
    fn all_tables_are_of_one_commit_and_one_machine() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let tables = fs::read_to_string(root.join("docs/benchmarks.md")).unwrap();
        let origins = origins(&tables);
        let [(commit, families)] = &origins[..] else {
            panic!("run `compare --update`: the tables are of several runs: {origins:#?}");
        };
        assert_eq!(families.len(), FAMILIES.len(), "{families:?}");
        assert!(!commit.contains("-dirty"), "{commit}");
        let readme = fs::read_to_string(root.join("README.md")).unwrap();
        assert_eq!(origin(&readme, "readme"), Some(*commit));
    }

    #[test]
    fn the_readme_needs_all_of_its_rows() {
        let origin = Origin::of(Path::new("."));
        assert_eq!(readme(&origin, &Report::default()), None);
    }
}
