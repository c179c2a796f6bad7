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
    let argued = argued();
    let known = |step: &String| Step::ALL.iter().any(|s| format!("{s:?}") == *step);
    assert!(argued.iter().all(known), "{argued:?} are not all steps");
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
            if source.path.starts_with("src/sync") || !source.text.contains(&name) {
                continue;
            }
            for function in source.functions_with(performs) {
                text += &format!("* code: `{function}` in `{}`\n", source.path);
                used = true;
            }
        }
        assert!(used, "nothing performs {step:?}");
        let models = caught
            .get(&format!("{step:?}"))
            .cloned()
            .unwrap_or_default();
        let is_argued = argued.contains(&format!("{step:?}"));
        assert!(
            !models.is_empty() || is_argued,
            "nothing fails without {step:?}, and nothing says why"
        );
        assert!(
            models.is_empty() || !is_argued,
            "{step:?} is argued to be superfluous, and {models:?} fail without it"
        );
        if is_argued {
            text += "* no model: see below\n";
        }
        for model in models {
            text += &format!("* model: `{model}`\n");
        }
        text += "\n";
    }
    check_part("docs/sabotage.md", "steps", &text);
}

/// The steps that no model misses, with an argument in the document.
fn argued() -> BTreeSet<String> {
    let (_, section) = DOCUMENT
        .split_once("\n## Steps that no model misses\n")
        .expect("the section");
    let section = section.split("\n## ").next().unwrap_or(section);
    let entries = section.lines().filter_map(|line| line.strip_prefix("* `"));
    let names = entries.filter_map(|line| line.split_once("`: "));
    names.map(|(name, _)| name.to_owned()).collect()
}

/// A step is one place of the code. Where it was several, a model failed without all of them, and
/// nothing told which of them it needed: of nine fences under one name, four had no model.
///
/// A place may ask twice, once for what it does and once for what stands in the place of that, as a
/// swap of two calls does: the second asks by `!performs`.
#[test]
fn each_step_is_asked_at_one_place_of_the_code() {
    let Some(sources) = sources() else { return };
    let code: Vec<_> = sources
        .iter()
        .filter(|source| source.is_code() && !source.path.starts_with("src/sync"))
        .collect();
    // For each step, where the code asks for it, and where for what stands in its place.
    let mut asked: BTreeMap<String, [Vec<String>; 2]> = BTreeMap::new();
    for source in &code {
        for (number, line) in (1..).zip(source.text.lines()) {
            let line = line.split("//").next().unwrap_or_default();
            for (at, start) in line.match_indices("Step::") {
                let rest = &line[at + start.len()..];
                let end = rest.find(|c: char| !c.is_alphanumeric());
                let step = rest[..end.unwrap_or(rest.len())].to_owned();
                let stands_in = usize::from(line[..at].ends_with("!performs("));
                let places = &mut asked.entry(step).or_default()[stands_in];
                places.push(format!("{}:{number}", source.path));
            }
        }
    }
    for step in Step::ALL {
        let places = asked.get(&format!("{step:?}"));
        let places = places.unwrap_or_else(|| panic!("no code asks for {step:?}"));
        for places in places {
            assert!(places.len() <= 1, "{step:?} is asked at {places:?}");
        }
    }
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
