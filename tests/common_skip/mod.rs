//! A test that this machine cannot run passes, and reports that it tested nothing.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;

/// The file that collects what was skipped, a line for each: `test`, its name, and the reason.
const SKIPS: &str = "DIRTYMAP_SKIPS";

/// Reports that the running test leaves something out, and why. The output of a test that passes is
/// not shown, so `.ci/run` sets [`SKIPS`], prints the lines of that file, and counts them.
pub(crate) fn skip(why: impl Display) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a thread without a name");
    let line = format!("test {}::{test}: {why}\n", env!("CARGO_CRATE_NAME"));
    eprint!("SKIP {line}");
    let Some(path) = std::env::var_os(SKIPS) else {
        return;
    };
    let file = OpenOptions::new().create(true).append(true).open(&path);
    // One write, so that lines of several tests do not mix.
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    assert!(written.is_ok(), "{path:?}: {written:?}");
}
