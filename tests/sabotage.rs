//! The list of steps that a model can leave out is closed: each is in the table of docs/sabotage.md, with the models that fail
#![allow(clippy::expect_used)]
//! without it, and after the models have run, what they caught is what the table says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dirtymap::sync::Step;

const DOCUMENT: &str = include_str!("../docs/sabotage.md");

/// A row: the step, what it is, and the models that fail without it.
fn rows() -> Vec<(String, String, BTreeSet<String>)> {
    let table = DOCUMENT
        .lines()
        .skip_while(|line| !line.starts_with("| step"));
    let lines = table.skip(2).take_while(|line| !line.is_empty());
    lines
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            assert_eq!(cells.len(), 3, "{line}");
            let models = cells[2].split(", ").map(bare).collect();
            (bare(cells[0]), cells[1].to_owned(), models)
        })
        .collect()
}

fn bare(name: &str) -> String {
    name.trim_matches('`').to_owned()
}

#[test]
fn the_table_has_every_step_and_what_it_is() {
    let listed: Vec<(String, String)> = rows().into_iter().map(|(s, what, _)| (s, what)).collect();
    let steps = Step::ALL.iter();
    let all: Vec<_> = steps
        .map(|s| (format!("{s:?}"), s.what().to_owned()))
        .collect();
    assert_eq!(listed, all);
}

#[test]
fn the_models_of_the_table_exist() {
    let sources = [
        "src/area",
        "src/bitmap",
        "src/source",
        "src/adapters",
        "tests",
        "pagetable-sim/tests/loom",
    ];
    let mut text = String::new();
    for source in sources {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        // Where the crate is alone, as it is published, the simulator is not there.
        let Ok(files) = std::fs::read_dir(directory) else {
            assert!(source.starts_with("pagetable-sim"), "no {source}");
            return;
        };
        for file in files {
            let path = file.expect("a file of the sources").path();
            if path.to_string_lossy().contains("loom") {
                text += &std::fs::read_to_string(path).expect("a source");
            }
        }
    }
    for (step, _, models) in rows() {
        assert!(!models.is_empty(), "nothing fails without {step}");
        for model in models {
            let begins = |end| text.contains(&format!("fn {model}{end}"));
            assert!(begins('(') || begins('<'), "{step}: there is no {model}");
        }
    }
}

/// The models write what they caught into the file that `DIRTYMAP_CAUGHT` names; `.ci/run loom` sets it, and runs this last.
#[test]
fn what_was_caught_is_what_the_table_says() {
    let Some(path) = std::env::var_os("DIRTYMAP_CAUGHT") else {
        return;
    };
    let record = std::fs::read_to_string(path).expect("a record of what was caught");
    let mut caught = BTreeMap::<&str, BTreeSet<String>>::new();
    for (step, model) in record.lines().filter_map(|line| line.split_once(' ')) {
        caught.entry(step).or_default().insert(model.to_owned());
    }
    let mut wrong = String::new();
    for (step, what) in Step::ALL
        .iter()
        .map(|step| (format!("{step:?}"), step.what()))
    {
        let now = caught.get(step.as_str()).cloned().unwrap_or_default();
        let row = rows().into_iter().find(|(listed, ..)| *listed == step);
        if now.is_empty() || row.is_none_or(|(_, _, models)| models != now) {
            let models: Vec<String> = now.iter().map(|model| format!("`{model}`")).collect();
            wrong += &format!("| `{step}` | {what} | {} |\n", models.join(", "));
        }
    }
    assert!(
        wrong.is_empty(),
        "what was caught is not what docs/sabotage.md says; now it is\n{wrong}"
    );
}
