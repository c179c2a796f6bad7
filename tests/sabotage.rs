//! The list of steps that a model can leave out is complete. The first test writes the steps of
//! docs/sabotage.md from `sync::Step`, from the code that performs them, and from the record of the
//! models that noticed an absence.
#![allow(clippy::expect_used)]

mod common_documents;

use std::collections::{BTreeMap, BTreeSet};

use common_documents::{check_part, defines, part, sources, wrap};
use dirtymap::sync::Step;

const DOCUMENT: &str = include_str!("../docs/sabotage.md");

/// For each step, the models that fail without it.
type Caught = BTreeMap<String, BTreeSet<String>>;

/// The models that the document lists.
fn listed() -> Caught {
    let mut caught = Caught::new();
    let mut step = String::new();
    for line in part(DOCUMENT, "steps").lines() {
        if let Some(name) = line.strip_prefix("### ") {
            step = bare(name);
        } else if let Some(name) = line.strip_prefix("* model: ") {
            caught.entry(step.clone()).or_default().insert(bare(name));
        }
    }
    caught
}

fn bare(name: &str) -> String {
    name.trim_matches('`').to_owned()
}

/// The models that failed without a step, from the file that `DIRTYMAP_CAUGHT` names. `.ci/run
/// loom` sets the variable, and runs this test after the models.
fn recorded() -> Option<Caught> {
    let path = std::env::var_os("DIRTYMAP_CAUGHT")?;
    let record = std::fs::read_to_string(path).expect("a record of what was caught");
    let mut caught = Caught::new();
    for (step, model) in record.lines().filter_map(|line| line.split_once(' ')) {
        let models = caught.entry(step.to_owned()).or_default();
        models.insert(model.to_owned());
    }
    Some(caught)
}

/// Writes or compares the steps. `DIRTYMAP_WRITE=1 cargo test -p dirtymap --test sabotage` writes
/// them. The lists of models stay as they are unless `DIRTYMAP_CAUGHT` names a record.
#[test]
fn the_document_has_every_step_with_its_code_and_its_models() {
    let Some(sources) = sources() else { return };
    let caught = recorded().unwrap_or_else(listed);
    let mut text = String::new();
    for step in Step::ALL {
        let name = format!("Step::{step:?}");
        let performs = |code: &str| {
            code.split_once(&name)
                .is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_alphanumeric()))
        };
        text += &format!("### `{step:?}`\n\n{}\n\n", wrap(step.what(), ""));
        let mut used = false;
        for source in sources.iter().filter(|source| source.is_code()) {
            if source.path.starts_with("src/sync") {
                continue;
            }
            for function in source.functions_with(performs) {
                text += &format!("* code: `{function}` in `{}`\n", source.path);
                used = true;
            }
        }
        if !used {
            let asks = format!("performs({name})");
            let in_model = sources.iter().any(|source| source.text.contains(&asks));
            assert!(in_model, "nothing performs {step:?}");
            text += "* code: none; the model performs it, in the place of the kernel\n";
        }
        let models = caught
            .get(&format!("{step:?}"))
            .cloned()
            .unwrap_or_default();
        assert!(!models.is_empty(), "nothing fails without {step:?}");
        for model in models {
            text += &format!("* model: `{model}`\n");
        }
        text += "\n";
    }
    check_part("docs/sabotage.md", "steps", &text);
}

#[test]
fn the_models_of_the_document_exist() {
    let Some(mut sources) = sources() else { return };
    sources.retain(|source| source.path.contains("loom"));
    for (step, models) in listed() {
        for model in models {
            assert!(defines(&sources, &model), "{step}: there is no {model}");
        }
    }
}
