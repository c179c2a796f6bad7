//! The reader of recorded kernel sequences: for any bytes, plain or gzip, the result is items in
//! the order of their lines, or an error.
#![no_main]

#[allow(dead_code, unreachable_pub)] // the replay uses more of it
#[path = "../../pagetable-sim/examples/conformance/parse.rs"]
mod parse;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut newest = 0;
    let parsed = parse::parse(bytes, |line, _| {
        assert!(line > newest, "line {line} comes after line {newest}");
        newest = line;
    });
    if let Err(error) = parsed {
        assert!(!error.to_string().is_empty());
    }
});
