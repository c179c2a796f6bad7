//! Each function, model, test and step that docs/orderings.md and docs/assurance.md name exists.
//! The first test writes the index, which lists the rows of each ordered access of the code.
#![allow(clippy::expect_used)]

mod common_documents;

use std::collections::{BTreeMap, BTreeSet};

use common_documents::{Source, check_part, defines, part, qualified, sources, wrap};
use dirtymap::sync::Step;

const DESIGN: &str = include_str!("../DESIGN.md");
const ORDERINGS: &str = include_str!("../docs/orderings.md");
const ASSURANCE: &str = include_str!("../docs/assurance.md");

/// A row of docs/orderings.md: its number, the lines of its sides, and the line of its models.
#[derive(Default)]
struct Row {
    number: String,
    sides: String,
    models: String,
}

fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let (mut in_row, mut in_models) = (false, false);
    for line in ORDERINGS
        .lines()
        .take_while(|line| !line.starts_with("## Index"))
    {
        if let Some(number) = line.strip_prefix("### Row ") {
            let number = number.to_owned();
            rows.push(Row {
                number,
                ..Row::default()
            });
            in_row = true;
        } else if line.starts_with("* ") {
            in_models = line.starts_with("* model: ");
        } else if !line.is_empty() && !line.starts_with("  ") {
            in_row = false; // what follows the list is no part of the row
        }
        if let Some(row) = rows.last_mut().filter(|_| in_row && !line.starts_with('#')) {
            let part = if in_models {
                &mut row.models
            } else {
                &mut row.sides
            };
            *part += line.trim_start();
            part.push(' ');
        }
    }
    rows
}

/// The text in back quotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn is_step(name: &str) -> bool {
    Step::ALL.iter().any(|step| format!("{step:?}") == name)
}

/// Whether a name is that of a test or a model: snake case, and neither a path, a file nor an
/// expression.
fn is_test(name: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    name.contains('_') && name.chars().all(is_letter)
}

/// Whether `name`, as a row has it, names `function` of `source`: the last part is the function's
/// name; the part before it, if there is one, is its type, or for a function without a type a part
/// of the path of the file.
fn names(name: &str, source: &Source, function: &str) -> bool {
    let (of, name) = name.rsplit_once("::").unwrap_or(("", name));
    let of = of.rsplit("::").next().unwrap_or(of);
    let (own, function) = function.rsplit_once("::").unwrap_or(("", function));
    let mut path = source.path.trim_end_matches(".rs").split('/');
    name == function
        && (of.is_empty() || of == own || own.is_empty() && path.any(|part| part == of))
}

/// How many orderings a line of code names.
fn orderings(code: &str) -> usize {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let words = code.split(|c: char| !is_word(c));
    let orders = |word: &&str| matches!(*word, "Acquire" | "Release" | "AcqRel" | "SeqCst");
    let fences = [
        "fence_after_rmw(",
        "fence_after_look(",
        "fence_after_looks(",
    ];
    let calls = fences.iter().map(|fence| code.matches(fence).count());
    words.filter(orders).count() + calls.sum::<usize>()
}

/// A part of an ordering that a model reaches: the call, with a number from the second of its name
/// on, and the part.
type Place = (String, String);

/// The models that fail without each of the orderings of a function; none if it is argued.
type Found = BTreeMap<String, Vec<(Place, Option<String>)>>;

/// The orderings that no model misses, with an argument in the document. A function without
/// anything more stands for all of its orderings, which no model reaches.
fn argued() -> BTreeSet<String> {
    let (_, section) = ORDERINGS
        .split_once("\n## Orderings that no model misses\n")
        .expect("the section");
    let section = section.split("\n## ").next().unwrap_or(section);
    let mut entries = String::new();
    for line in section.lines() {
        match line.strip_prefix("* ") {
            Some(entry) => entries += &format!("\n{entry}"),
            None => entries += &format!(" {}", line.trim()),
        }
    }
    let heads = entries.lines().skip(1).map(|entry| {
        let (head, argument) = entry.split_once(": ").expect("an argument");
        assert!(argument.len() > 20, "{head}: no argument");
        head
    });
    let places = heads.flat_map(|head| head.split(", "));
    places.map(|place| place.replace('`', "")).collect()
}

/// The orderings with neither.
fn open() -> BTreeSet<String> {
    let (_, section) = ORDERINGS
        .split_once("\n## Open orderings\n")
        .expect("the section");
    let section = section.split("\n## ").next().unwrap_or(section);
    let entries = section.lines().filter_map(|line| line.strip_prefix("* "));
    entries.map(|place| place.replace('`', "")).collect()
}

/// What the index lists, of the files that `of` returns true for.
fn listed(of: impl Fn(&str) -> bool) -> Found {
    let mut found = Found::new();
    let (mut path, mut function) = (String::new(), String::new());
    for line in part(ORDERINGS, "index").replace(":\n    `", ": `").lines() {
        if let Some(name) = line.strip_prefix("* `") {
            function = name.split('`').next().unwrap_or_default().to_owned();
        } else if let Some(entry) = line.strip_prefix("  * `").filter(|_| of(&path)) {
            let (place, model) = entry.split_once(": ").expect("a model");
            let (call, kind) = place.split_once('`').expect("a call");
            let place = (call.to_owned(), kind.trim().to_owned());
            let model = quoted(model).next().map(str::to_owned);
            let all = found.entry(qualified(&path, &function)).or_default();
            all.push((place, model));
        } else if line.starts_with('`') {
            path = bare(line);
        }
    }
    found
}

fn bare(name: &str) -> String {
    name.trim_matches('`').to_owned()
}

/// The folder of the package that a file is of.
fn package(path: &str) -> &str {
    let folder = path.split("src/").next().unwrap_or_default();
    folder.trim_end_matches('/')
}

/// What the models have found, in the file that `DIRTYMAP_SITES` names: `.ci/orderings` sets it,
/// and runs this after the models. A package none of whose models ran is as the index lists it.
fn recorded(sources: &[Source]) -> Option<Found> {
    let record = std::env::var_os("DIRTYMAP_SITES")?;
    let record = std::fs::read_to_string(record).expect("a record of the orderings");
    let ran = |path: &str| {
        let mut places = record.lines().filter_map(|line| line.split(' ').nth(1));
        places.any(|place| package(place) == package(path))
    };
    let mut sites: BTreeMap<(&str, usize, usize, &str), Option<&str>> = BTreeMap::new();
    for line in record.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [kind, at, part] = words[..3] else {
            panic!("{line}: not an entry");
        };
        let mut at = at.rsplitn(3, ':');
        let mut number = || at.next().and_then(|n| n.parse().ok()).expect("a number");
        let (column, row) = (number(), number());
        let path = at.next().expect("a path");
        let model = sites.entry((path, row, column, part)).or_default();
        if kind == "caught" {
            *model = (*model).or(words.get(3).copied());
        }
    }
    let mut found = listed(|path| !ran(path));
    let mut calls: BTreeMap<String, Vec<(usize, usize, String)>> = BTreeMap::new();
    let mut lines = BTreeMap::new();
    for ((path, row, column, part), model) in sites {
        let source = sources.iter().find(|source| source.path == path);
        let source = source.expect("a source of the record");
        let lines = lines
            .entry(path)
            .or_insert_with(|| source.lines_with(|_| true));
        let line = lines.iter().find(|(number, ..)| *number == row);
        let (_, function, _) = line.expect("a line of code; the record is older than the code");
        let text = source.text.lines().nth(row - 1).unwrap_or_default();
        let call: String = text[column - 1..]
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        // Calls of one name are told apart by their order.
        let key = source.qualified(function);
        let known = calls.entry(key.clone()).or_default();
        if !known.contains(&(row, column, call.clone())) {
            known.push((row, column, call.clone()));
        }
        let nth = known.iter().filter(|(.., name)| *name == call).count();
        let call = if nth == 1 {
            call
        } else {
            format!("{call} {nth}")
        };
        let all = found.entry(key).or_default();
        all.push(((call, part.to_lowercase()), model.map(str::to_owned)));
    }
    Some(found)
}

/// Each function with an ordered access is in the index, with as many orderings as the code has,
/// its rows, and for each ordering the model that fails without it, or an argument. So a new access
/// is missing there. `.ci/orderings` finds what each model fails without;
/// `DIRTYMAP_WRITE=1 cargo test -p dirtymap --test documents` writes the rest of the index.
#[test]
fn the_index_has_every_ordered_access_with_its_rows() {
    let Some(sources) = sources() else { return };
    let rows = rows();
    let found = recorded(&sources).unwrap_or_else(|| listed(|_| true));
    let (argued, open) = (argued(), open());
    let (mut all, mut used) = (BTreeSet::new(), BTreeSet::new());
    let mut wrong = Vec::new();
    let (mut counts, mut text) = ([0usize; 4], String::new());
    for source in sources.iter().filter(|source| source.is_code()) {
        if source.path.starts_with("src/sync") {
            continue;
        }
        let mut entries = String::new();
        let lines = source.lines_with(|code| orderings(code) > 0);
        for function in source.functions_with(|code| orderings(code) > 0) {
            let own = lines.iter().filter(|(_, of, _)| *of == function);
            let count: usize = own.map(|(.., code)| orderings(code)).sum();
            let named = |row: &&Row| quoted(&row.sides).any(|name| names(name, source, &function));
            let numbers: Vec<&str> = rows
                .iter()
                .filter(named)
                .map(|row| row.number.as_str())
                .collect();
            let rows = match numbers[..] {
                [] => String::new(),
                [one] => format!(", row {one}"),
                _ => format!(", rows {}", numbers.join(", ")),
            };
            let plural = if count == 1 { "" } else { "s" };
            let head = format!("* `{function}`, {count} ordering{plural}{rows}");
            let name = source.qualified(&function);
            assert!(all.insert(name.clone()), "two functions are called {name}");
            let Some(places) = found.get(&name) else {
                entries += &wrap(&format!("{head}: no model reaches it"), "  ");
                entries.push('\n');
                counts[3] += 1;
                match argued.contains(&name) {
                    true => drop(used.insert(name)),
                    false => wrong.push(format!("{name}: no model reaches it")),
                }
                continue;
            };
            entries += &wrap(&head, "  ");
            entries.push('\n');
            for ((call, part), model) in places {
                let key = format!("{name} {call} {part}");
                let is_open = open.contains(&key);
                let by = match (model, argued.contains(&key) || is_open) {
                    (Some(model), false) => {
                        counts[0] += 1;
                        if !defines(&sources, model) {
                            wrong.push(format!("{key}: there is no model {model}"));
                        }
                        format!("`{model}`")
                    }
                    (None, true) => {
                        counts[1 + usize::from(is_open)] += 1;
                        used.insert(key);
                        if is_open { "open" } else { "argued" }.to_owned()
                    }
                    (Some(model), true) => {
                        wrong.push(format!("{key}: argued, and {model} fails"));
                        continue;
                    }
                    (None, false) => {
                        wrong.push(format!("{key}: no model fails without it"));
                        continue;
                    }
                };
                let entry = format!("  * `{call}` {part}: {by}");
                entries += &match entry.len() > 100 {
                    true => entry.replace(": `", ":\n    `"),
                    false => entry,
                };
                entries.push('\n');
            }
        }
        if !entries.is_empty() {
            text += &format!("`{}`\n\n{entries}\n", source.path);
        }
    }
    let entries: BTreeSet<String> = argued.union(&open).cloned().collect();
    let unused: Vec<&String> = entries.difference(&used).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(
        unused.is_empty(),
        "argued or open, and not there: {unused:?}"
    );
    let [caught, argued, open, unreached] = counts;
    let totals = format!(
        "Orderings that a model reaches: {}. Each was weakened alone: without {caught} of them a \
         model fails, {argued} are argued, and {open} are open. Functions that no model reaches, \
         all argued: {unreached}.",
        caught + argued + open
    );
    let text = format!("{}\n\n{text}", wrap(&totals, ""));
    check_part("docs/orderings.md", "index", &text);
    // The stage fails for an ordering with neither.
    let is_set = |name| std::env::var_os(name).is_some();
    let stage = is_set("DIRTYMAP_SITES") && !is_set("DIRTYMAP_WRITE");
    assert!(!stage || open == 0, "{open} orderings are open");
}

#[test]
fn the_rows_are_in_order() {
    let key = |number: &str| {
        let digits: String = number.chars().filter(char::is_ascii_digit).collect();
        let letters: String = number.chars().filter(|c| !c.is_ascii_digit()).collect();
        let kernel = letters.starts_with('K');
        (
            kernel,
            digits.parse::<u32>().expect("the number of a row"),
            letters,
        )
    };
    let numbers: Vec<_> = rows().iter().map(|row| key(&row.number)).collect();
    assert!(numbers.len() >= 60, "there are {} rows", numbers.len());
    for pair in numbers.windows(2) {
        assert!(
            pair[0] < pair[1],
            "row {:?} is before row {:?}",
            pair[0],
            pair[1]
        );
    }
}

/// The functions of each side, the models, and the steps that a row names exist. A row has a model,
/// or says that it is argued by reading.
#[test]
fn what_the_rows_name_exists() {
    let Some(sources) = sources() else { return };
    for Row {
        number,
        sides,
        models,
    } in rows()
    {
        for name in quoted(&sides) {
            let last = name.rsplit("::").next().unwrap_or(name);
            let is_path = name.contains("::") || is_test(name);
            if is_path && last.starts_with(|c: char| c.is_ascii_lowercase()) {
                let std = last.starts_with("fetch_");
                assert!(
                    std || defines(&sources, last),
                    "row {number}: there is no {name}"
                );
            }
        }
        assert!(!models.is_empty(), "row {number} has no line of its models");
        let mut tests = 0;
        for name in quoted(&models) {
            if name.starts_with(|c: char| c.is_ascii_uppercase()) && !name.contains("::") {
                assert!(is_step(name), "row {number}: there is no step {name}");
            } else if is_test(name) {
                assert!(defines(&sources, name), "row {number}: there is no {name}");
                tests += 1;
            }
        }
        let argued = models.contains("by reading") || models.contains("protocol");
        assert!(tests > 0 || argued, "row {number} has no model");
    }
}

/// Each rule of docs/assurance.md lists its models, its properties or tests, its sabotage, and what
/// is not covered. Everything that the document names exists.
#[test]
fn every_rule_has_its_sections_and_what_it_names() {
    let mut numbers = BTreeSet::new();
    for rule in ASSURANCE.split("\n### Rule ").skip(1) {
        let rule = rule.split("\n#").next().unwrap_or(rule);
        let (number, rest) = rule.split_once('.').expect("the number of a rule");
        numbers.insert(number.parse::<u32>().expect("the number of a rule"));
        for part in [
            "* models:",
            "* properties and tests:",
            "* sabotage:",
            "* not covered:",
        ] {
            let (_, text) = rest
                .split_once(part)
                .unwrap_or_else(|| panic!("rule {number}: no {part}"));
            let text = text.split("\n* ").next().unwrap_or(text);
            let said = text.contains('`') || part == "* not covered:" || text.contains("none");
            assert!(said, "rule {number} names nothing after {part}");
        }
    }
    let wanted = BTreeSet::from_iter(1..=19);
    assert_eq!(numbers, wanted);

    let sources = sources();
    for name in quoted(&without_code(ASSURANCE)) {
        if let Some(step) = name.strip_prefix("Step::") {
            let known = step.is_empty() || step == "ALL" || is_step(step);
            assert!(known, "docs/assurance.md: there is no step {step}");
        } else if let Some(sources) = sources.as_ref().filter(|_| is_test(name)) {
            assert!(
                defines(sources, name),
                "docs/assurance.md: there is no {name}"
            );
        } else if sources.is_some()
            && (name.ends_with(".rs") || name.ends_with(".md"))
            && !name.contains('*')
        {
            let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
            assert!(file.exists(), "docs/assurance.md: there is no file {name}");
        }
    }
}

/// The document without its blocks of code.
fn without_code(document: &str) -> String {
    document.split("```").step_by(2).collect()
}

/// The section of DESIGN.md about the structure lists exactly the folders and files of the library.
#[test]
fn the_structure_has_every_folder_and_file() {
    let Some(sources) = sources() else { return };
    let (_, structure) = DESIGN.split_once("## 3. Structure").expect("the section");
    let (structure, _) = structure.split_once("\n## ").expect("the next section");
    let mut there: BTreeSet<String> = BTreeSet::new();
    for source in sources.iter().filter(|source| source.is_code()) {
        let Some(path) = source.path.strip_prefix("src/") else {
            continue;
        };
        // `folder/file.rs`, `folder/deeper/` or `file.rs`.
        let mut parts = path.split('/');
        let name: Vec<&str> = parts.by_ref().take(2).collect();
        let deeper = if parts.next().is_some() { "/" } else { "" };
        there.insert(name.join("/") + deeper);
    }
    there.retain(|name| {
        name != "lib.rs" && !name.ends_with("/mod.rs") && !name.starts_with("sync/")
    });
    let mut listed: BTreeSet<String> = BTreeSet::new();
    for section in structure.split("\n### ").skip(1) {
        let folder = quoted(section.lines().next().unwrap_or_default())
            .next()
            .unwrap_or_default();
        let names = section.split("\n").skip(1).flat_map(quoted);
        listed.extend(
            names
                .filter(|name| name.ends_with(".rs") || name.ends_with('/'))
                .map(|name| format!("{folder}{name}")),
        );
    }
    listed.retain(|name| !name.ends_with("/mod.rs") && name != "sync/");
    let wrong: Vec<&String> = listed.symmetric_difference(&there).collect();
    assert!(wrong.is_empty(), "listed or there, and not both: {wrong:?}");
}
