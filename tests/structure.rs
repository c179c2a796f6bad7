//! The files of a crate form floors: no imports lead in a circle, and none of the library's leads
//! from a folder to one that stands on it.
#![allow(clippy::expect_used)]

mod common_documents;

use std::collections::{BTreeMap, BTreeSet};

use common_documents::{Source, sources};

/// The path of a module from the root of its crate; of the root itself, nothing.
type Module = Vec<String>;

/// The folders and files of the library by floor, the highest first. Those of one floor do not know
/// each other.
const FLOORS: [&[&str]; 11] = [
    &["adapter", "source_kit"],
    &["exchange", "meter"],
    &["harvest"],
    &["space"],
    &["source"],
    &["marks"],
    &["area", "bitmap", "flush"],
    &["chunkmap", "events"],
    &["failure", "ranges", "report"],
    &["error", "words"],
    &["units", "sync", "compared"],
];

/// Circles that DESIGN.md argues: a crate, and the import without which there is none.
const ARGUED: [(&str, &str, &str); 1] = [("adapters/pagemap/src/", "owners", "memory")];

/// The modules of one crate, with the imports and paths in their code.
struct Files {
    /// The code of each module, without comments and unit tests.
    code: BTreeMap<Module, String>,
    /// What a module hands on under a name of its own: the path that the name stands for.
    handed_on: BTreeMap<(Module, String), Module>,
}

impl Files {
    /// The files below `root`, such as `src/`.
    fn of(root: &str, sources: &[Source]) -> Files {
        let mut code = BTreeMap::new();
        for source in sources {
            let Some(path) = source.path.strip_prefix(root) else {
                continue;
            };
            if path.contains("test") {
                continue;
            }
            let mut module: Module = path
                .trim_end_matches(".rs")
                .split('/')
                .map(str::to_owned)
                .collect();
            if matches!(module.last().map(String::as_str), Some("mod" | "lib")) {
                module.pop();
            }
            let lines = source
                .text
                .lines()
                .take_while(|line| *line != "mod tests {");
            let lines = lines.map(|line| line.split("//").next().unwrap_or_default());
            code.insert(module, lines.collect::<Vec<_>>().join("\n"));
        }
        let mut files = Files {
            code,
            handed_on: BTreeMap::new(),
        };
        for (module, code) in &files.code {
            for (is_public, path) in imports(code) {
                if let Some(path) = files.absolute(module, &path).filter(|_| is_public) {
                    let name = path.last().expect("a path").clone();
                    files.handed_on.insert((module.clone(), name), path);
                }
            }
        }
        files
    }

    /// `path` of an import in `module` from the root of the crate; `None` if it leads out of it.
    fn absolute(&self, module: &Module, path: &[String]) -> Option<Module> {
        let mut from: Module = match path.first()?.as_str() {
            "crate" => Vec::new(),
            "self" | "super" => module.clone(),
            first => {
                let child = [module.as_slice(), &[first.to_owned()]].concat();
                return self.code.contains_key(&child).then(|| {
                    let rest = &path[1..];
                    [child.as_slice(), rest].concat()
                });
            }
        };
        let mut rest = path;
        while let Some((first, behind)) = rest.split_first()
            && matches!(first.as_str(), "crate" | "self" | "super")
        {
            if first == "super" {
                from.pop();
            }
            rest = behind;
        }
        from.extend_from_slice(rest);
        (!from.is_empty()).then_some(from)
    }

    /// The module in which the item of `path` is defined.
    fn home(&self, path: &Module) -> Module {
        let mut path = path.clone();
        // Names that are handed on lead elsewhere, a few times.
        for _ in 0..8 {
            let at = (0..=path.len())
                .rev()
                .find(|at| self.code.contains_key(&path[..*at]))
                .unwrap_or_default();
            let module: Module = path[..at].to_vec();
            let Some(name) = path.get(at) else {
                return module;
            };
            let Some(further) = self.handed_on.get(&(module.clone(), name.clone())) else {
                return module;
            };
            path = [further.as_slice(), &path[at + 1..]].concat();
        }
        path
    }

    /// For each module those that its code names. A folder that hands on what its files have does
    /// not name them, and the root of the crate does not count.
    fn named(&self) -> BTreeMap<Module, BTreeSet<Module>> {
        let mut named: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
        for (module, code) in &self.code {
            let inline = inline(code).map(|path| (false, path));
            let homes = imports(code).chain(inline).filter_map(|(is_public, path)| {
                let path = self.absolute(module, &path)?;
                let hands_on = is_public && path.starts_with(module);
                (!hands_on).then(|| self.home(&path))
            });
            let others = homes.filter(|home| home != module && !home.is_empty());
            named.entry(module.clone()).or_default().extend(others);
        }
        named.remove(&Module::new());
        named
    }
}

/// The imports in `code`, one path for each name, and whether each is handed on.
fn imports(code: &str) -> impl Iterator<Item = (bool, Module)> {
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find("use ") {
        let line = rest[..at].rsplit('\n').next().unwrap_or_default().trim();
        rest = &rest[at + 4..];
        let is_public = line.starts_with("pub");
        if line.is_empty() || (is_public && !line.contains(' ')) || line.starts_with("pub(") {
            let end = rest.find(';').unwrap_or(rest.len());
            let mut paths = Vec::new();
            expand(&[], &rest[..end], &mut paths);
            found.extend(paths.into_iter().map(|path| (is_public, path)));
            rest = &rest[end..];
        }
    }
    found.into_iter()
}

/// Adds the paths of one import, whose braces may hold further ones, to `paths`.
fn expand(before: &[String], import: &str, paths: &mut Vec<Module>) {
    let import = import.trim();
    let head = import.find('{').unwrap_or(import.len());
    let parts = import[..head].split("::").map(str::trim);
    let mut path = before.to_vec();
    path.extend(
        parts
            .filter(|part| !part.is_empty())
            .map(|part| part.split(" as ").next().unwrap_or(part).to_owned()),
    );
    let Some(group) = import[head..].strip_prefix('{') else {
        if !path.is_empty() {
            paths.push(path);
        }
        return;
    };
    let group = &group[..group.rfind('}').unwrap_or(group.len())];
    let mut depth = 0;
    let each = group.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    for one in each.filter(|one| !one.trim().is_empty()) {
        expand(&path, one, paths);
    }
}

/// The paths in `code` that begin with `crate::` or `super::`, outside of imports.
fn inline(code: &str) -> impl Iterator<Item = Module> {
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    code.split(move |c| !is_path(c))
        .filter(|word| word.starts_with("crate::") || word.starts_with("super::"))
        .map(|word| word.split("::").map(str::to_owned).collect())
}

/// Whether `named` leads from `from` to `to`.
fn leads(named: &BTreeMap<Module, BTreeSet<Module>>, from: &Module, to: &Module) -> bool {
    let mut seen = BTreeSet::new();
    let mut next = vec![from];
    while let Some(module) = next.pop() {
        for other in named.get(module).into_iter().flatten() {
            if other == to {
                return true;
            }
            if seen.insert(other) {
                next.push(other);
            }
        }
    }
    false
}

#[test]
fn no_imports_of_files_lead_in_a_circle() {
    let Some(sources) = sources() else { return };
    let roots = sources
        .iter()
        .filter_map(|source| source.path.strip_suffix("lib.rs"))
        .filter(|root| root.ends_with("src/"));
    for root in roots {
        let mut named = Files::of(root, &sources).named();
        for (_, from, to) in ARGUED.iter().filter(|(argued, ..)| *argued == root) {
            let others = named.get_mut(&vec![(*from).to_owned()]);
            let was = others.is_some_and(|others| others.remove(&vec![(*to).to_owned()]));
            assert!(was, "{root}: {from} does not import {to}");
        }
        let mut circles = Vec::new();
        for (module, others) in &named {
            for other in others.iter().filter(|other| leads(&named, other, module)) {
                circles.push(format!("{} -> {}", module.join("::"), other.join("::")));
            }
        }
        assert!(circles.is_empty(), "{root}: {circles:#?}");
    }
}

#[test]
fn no_import_of_the_library_leads_to_a_higher_floor() {
    let Some(sources) = sources() else { return };
    let floor = |module: &Module| {
        let on = |floor: &&[&str]| floor.contains(&module[0].as_str());
        FLOORS.iter().position(on)
    };
    let mut wrong = Vec::new();
    for (module, others) in Files::of("src/", &sources).named() {
        if module[0] == "guide" {
            continue;
        }
        for other in others.iter().filter(|other| other[0] != module[0]) {
            // What is on no floor is wrong, too.
            if floor(&module).is_none() || floor(&module) >= floor(other) {
                wrong.push(format!("{} -> {}", module.join("::"), other.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Code that names each other, through a folder that hands a name on, and by a path in place.
#[test]
fn circles_are_found() {
    let source = |path: &str, text: &str| Source::new(path.to_owned(), text.to_owned());
    let sources = [
        source("src/lib.rs", "mod low;\nmod high;\npub use high::Top;\n"),
        source("src/low.rs", "fn f() {\n    crate::high::top();\n}\n"),
        source(
            "src/high/mod.rs",
            "mod top;\nmod side;\npub(crate) use top::{Top, top};\n",
        ),
        source(
            "src/high/top.rs",
            "use super::side::Side;\nuse crate::{low::f, high::Top as T};\n",
        ),
        source(
            "src/high/side.rs",
            "use std::fmt;\n// use super::top::Top;\n",
        ),
    ];
    let named = Files::of("src/", &sources).named();
    let module = |path: &str| -> Module { path.split("::").map(str::to_owned).collect() };
    let names = |from: &str| {
        named[&module(from)]
            .iter()
            .map(|to| to.join("::"))
            .collect::<Vec<_>>()
    };
    assert_eq!(names("low"), ["high::top"]);
    assert_eq!(names("high::top"), ["high::side", "low"]);
    assert!(names("high::side").is_empty());
    assert!(leads(&named, &module("low"), &module("low")));
    assert!(!leads(&named, &module("high::side"), &module("low")));
}
