//! The generated parts of documents, and the source files from which they are generated.
#![allow(dead_code)] // each test uses a part of it

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A file of the repository's sources: its path from the top, with slashes, its text, and the names
/// of the functions that it defines.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
    functions: BTreeSet<String>,
}

/// The Rust files of the repository, in order of their paths; `None` where the crate is alone, as
/// it is published.
pub(crate) fn sources() -> Option<Vec<Source>> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !top.join("pagetable-sim").exists() {
        return None;
    }
    let mut found = Vec::new();
    let mut directories = vec![top.to_owned()];
    while let Some(directory) = directories.pop() {
        for file in std::fs::read_dir(directory).expect("a directory of the sources") {
            let path = file.expect("a file of the sources").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                directories.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                let path = path.strip_prefix(top).expect("a file below the top");
                let path = path.to_string_lossy().replace('\\', "/");
                found.push(Source::new(path, text));
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Some(found)
}

impl Source {
    pub(crate) fn new(path: String, text: String) -> Self {
        let functions = functions(&text).map(str::to_owned).collect();
        Source {
            path,
            text,
            functions,
        }
    }

    /// Whether the file is part of a crate and not a test.
    pub(crate) fn is_code(&self) -> bool {
        let (before, _) = self.path.split_once("src/").unwrap_or(("-", ""));
        let crates = ["", "formats/", "pagetable-sim/"];
        let is_crate = crates.contains(&before) || before.starts_with("adapters/");
        is_crate && !self.path.contains("test")
    }

    /// The functions in which `wanted` says yes to a line of code, each once, in order.
    pub(crate) fn functions_with(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for (_, name, _) in self.lines_with(wanted) {
            if !found.contains(&name) {
                found.push(name);
            }
        }
        found
    }

    /// The number of each line of code for which `wanted` says yes, the function that it is in,
    /// methods as `Type::method`, and the line without its comment. Unit tests at the end of the
    /// file and imports do not count. What is outside of all functions is in `file`.
    pub(crate) fn lines_with(&self, wanted: impl Fn(&str) -> bool) -> Vec<(usize, String, &str)> {
        let mut found = Vec::new();
        let mut enclosing: Vec<(usize, bool, String)> = Vec::new();
        let tests = |line: &&str| *line == "mod tests {";
        for (number, line) in (1..).zip(self.text.lines().take_while(|line| !tests(line))) {
            let code = line.split("//").next().unwrap_or_default().trim_start();
            let indent = line.len() - line.trim_start().len();
            let goes_on = code.starts_with([')', '}', '{', '#']) || code.starts_with("where");
            if !code.is_empty() && !goes_on {
                while enclosing.last().is_some_and(|(above, ..)| *above >= indent) {
                    enclosing.pop();
                }
            }
            if let Some(name) = function(code) {
                enclosing.push((indent, true, name.to_owned()));
            } else if let Some(name) = type_of_impl(code) {
                enclosing.push((indent, false, name.to_owned()));
            }
            let import = code.starts_with("use ") || code.starts_with("pub use ");
            if !import && !code.is_empty() && wanted(code) {
                let path: Vec<&str> = enclosing.iter().map(|(.., name)| name.as_str()).collect();
                let name = match enclosing
                    .iter()
                    .position(|(_, is_function, _)| *is_function)
                {
                    Some(function) => path[..=function].join("::"),
                    None => "file".to_owned(),
                };
                found.push((number, name, code));
            }
        }
        found
    }

    /// The name of `function` in all of the code: a function without a type is named after its
    /// file.
    pub(crate) fn qualified(&self, function: &str) -> String {
        qualified(&self.path, function)
    }
}

/// The name of `function`, of the file `path`, in all of the code: it stays when the file moves.
pub(crate) fn qualified(path: &str, function: &str) -> String {
    let path = path.trim_end_matches(".rs").trim_end_matches("/mod");
    let stem = path.rsplit('/').next().unwrap_or(path);
    let simulator = if path.starts_with("pagetable-sim/") {
        "sim::"
    } else {
        ""
    };
    match function.contains("::") {
        true => function.to_owned(),
        false => format!("{simulator}{stem}::{function}"),
    }
}

/// The type of which `code` begins an `impl`, or the trait that it begins to define.
fn type_of_impl(code: &str) -> Option<&str> {
    let code = code.trim_start_matches("unsafe ");
    let rest = match code.strip_prefix("impl") {
        Some(rest) if rest.starts_with('<') => &rest[rest.find("> ")? + 2..],
        Some(rest) => rest.strip_prefix(' ')?,
        None => code.trim_start_matches("pub ").strip_prefix("trait ")?,
    };
    let rest = rest.rsplit(" for ").next()?;
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':')?;
    rest[..end]
        .rsplit("::")
        .next()
        .filter(|name| !name.is_empty())
}

/// The name of the function that `code` begins to define.
fn function(code: &str) -> Option<&str> {
    let at = code.find("fn ")?;
    let words = ["pub", "unsafe", "const", "async", "extern"];
    let is_word = |word: &str| words.iter().any(|known| word.starts_with(known));
    if !code[..at]
        .split_whitespace()
        .all(|word| is_word(word) || word.ends_with(')'))
    {
        return None;
    }
    let name = &code[at + 3..];
    let end = name.find(|c: char| !c.is_alphanumeric() && c != '_')?;
    Some(&name[..end]).filter(|name| !name.is_empty())
}

/// Whether one of the sources defines the function.
pub(crate) fn defines(sources: &[Source], function: &str) -> bool {
    sources
        .iter()
        .any(|source| source.functions.contains(function))
}

/// The names that `fn` comes before, and a parenthesis or parameters of types after.
fn functions(text: &str) -> impl Iterator<Item = &str> {
    text.split("fn ").skip(1).filter_map(|rest| {
        let end = rest.find(['(', '<'])?;
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        rest.get(..end).filter(|name| name.chars().all(is_name))
    })
}

/// The part of a document between `<!-- NAME -->` and `<!-- end -->`, without the blank lines
/// around it.
pub(crate) fn part<'d>(document: &'d str, name: &str) -> &'d str {
    let (_, rest) = document
        .split_once(&format!("<!-- {name} -->"))
        .expect("the beginning of a part");
    let (part, _) = rest.split_once("<!-- end -->").expect("the end of a part");
    part.trim()
}

/// Compares a part of a document of the repository with `wanted`. With `DIRTYMAP_WRITE` set, writes
/// the part instead.
pub(crate) fn check_part(path: &str, name: &str, wanted: &str) {
    let file: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let document = std::fs::read_to_string(&file)
        .expect("a document")
        .replace("\r\n", "\n");
    let there = part(&document, name);
    if there == wanted.trim() {
        return;
    }
    if std::env::var_os("DIRTYMAP_WRITE").is_some() {
        let start = document
            .find(&format!("<!-- {name} -->"))
            .expect("the beginning of a part");
        let end = start
            + document[start..]
                .find("<!-- end -->")
                .expect("the end of a part");
        let (before, after) = (&document[..start], &document[end..]);
        let written = format!("{before}<!-- {name} -->\n\n{}\n\n{after}", wanted.trim());
        std::fs::write(file, written).expect("a document that can be written");
        return;
    }
    let line = there
        .lines()
        .zip(wanted.trim().lines())
        .find(|(a, b)| a != b);
    panic!(
        "{path} is not what the code says, first at {line:?}; DIRTYMAP_WRITE=1 with the command of \
         this test writes it"
    );
}

/// `text` as lines of at most 100 columns; those after the first begin with `indent`.
pub(crate) fn wrap(text: &str, indent: &str) -> String {
    let mut lines = String::new();
    let mut width = 0;
    for word in text.split_whitespace() {
        let columns = word.chars().count();
        if width > 0 && width + 1 + columns > 100 {
            lines += "\n";
            lines += indent;
            width = indent.len();
        } else if width > 0 {
            lines.push(' ');
            width += 1;
        }
        lines += word;
        width += columns;
    }
    lines
}
