//! Records what a kernel answers, in the format of `testdata/README.md`.
//!
//! Each sequence is one IOAS of the kernel with some page tables. Its calls are drawn from a
//! generator with a fixed seed. What the kernel did is measured around each call. Only the tags of
//! a read are concluded, from what was dirty before it.

mod bitmap;
mod model;
mod rng;
mod run;
mod tags;

use std::fs::{self, File};
use std::io::{BufWriter, Write};

use rng::Rng;

/// The seed of the generator.
const SEED: u64 = 20251;
/// Sequences of a recording.
const SEQUENCES: u64 = 24;
/// Calls of a sequence.
const CALLS: u64 = 60;

/// Records into `file`.
pub(crate) fn run(file: File) -> crate::Outcome {
    let mut out = BufWriter::new(file);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    writeln!(
        out,
        "{{\"t\":\"meta\",\"kernel\":\"{}\",\"machine\":\"{}\",\"host_page_size\":4096,\
         \"granule\":2048,\"seed\":{SEED},\"format\":1}}",
        kernel.trim(),
        std::env::consts::ARCH
    )?;
    let mut rng = Rng::new(SEED);
    let mut calls = 0;
    for number in 0..SEQUENCES {
        let mut sequence = run::Sequence::begin(number, &mut rng, &mut out)?;
        for _ in 0..CALLS {
            sequence.call(&mut rng, &mut out)?;
            calls += 1;
        }
    }
    writeln!(out, "{{\"t\":\"end\"}}")?;
    out.flush()?;
    println!("recorded: {SEQUENCES} sequences, {calls} calls");
    Ok(())
}
