//! Output as lines, for anything but a terminal.

use std::io::{self, Write};

use crate::watch::{Sample, bytes, squeeze};

/// From cold to hot.
const SHADES: &[u8; 10] = b" .:-=+*#%@";
/// Cells of the strip.
const STRIP: usize = 64;

/// One line for a sample.
pub(crate) fn line(out: &mut impl Write, sample: &Sample) -> io::Result<()> {
    writeln!(
        out,
        "{:6.2} s  {:>8}/s  working set {:>8}  harvest {:>5} us  |{}|",
        sample.at.as_secs_f64(),
        bytes(sample.rate()),
        bytes(sample.working_set as f64),
        sample.took.as_micros(),
        strip(&sample.heat),
    )
}

fn strip(heat: &[u8]) -> String {
    let shade = |heat: u8| {
        // The coldest shade is for nothing at all.
        let at = (usize::from(heat) * (SHADES.len() - 1)).div_ceil(255);
        char::from(SHADES[at])
    };
    squeeze(heat, STRIP).into_iter().map(shade).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_rate_and_place() {
        let mut heat = vec![0; 128];
        (heat[0], heat[64], heat[127]) = (255, 1, 128);
        let sample = Sample {
            at: std::time::Duration::from_millis(1500),
            interval: std::time::Duration::from_millis(500),
            dirty_bytes: 1 << 20,
            working_set: 3 << 20,
            took: std::time::Duration::from_micros(42),
            heat,
        };
        let mut text = Vec::new();
        line(&mut text, &sample).unwrap();
        let strip = format!("|@{}.{}+|", " ".repeat(31), " ".repeat(30));
        let line =
            format!("  1.50 s   2.0 MiB/s  working set  3.0 MiB  harvest    42 us  {strip}\n");
        assert_eq!(String::from_utf8(text).unwrap(), line);
    }
}
