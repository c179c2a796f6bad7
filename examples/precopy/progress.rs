//! The progress of the migration: two bars on a terminal, one plain line for each round elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::report::{IncrementRecord, RoundKind, RoundRecord};
use crate::text;

/// The interval at which a bar without progress is redrawn.
const TICK: Duration = Duration::from_millis(200);

const REPLAY_BAR: &str = "replay   {wide_bar} {human_pos}/{human_len} writes  {elapsed}";
const ROUND_BAR: &str = "{prefix:8} {wide_bar} {human_pos}/{human_len} pages  {msg}";

/// The bars. All calls take `&self` and may come from any thread.
pub(crate) struct Progress {
    /// `None` if stderr is no terminal.
    bars: Option<Bars>,
}

struct Bars {
    all: MultiProgress,
    replay: ProgressBar,
    round: ProgressBar,
}

impl Progress {
    /// Shows how many of `writes` are replayed, and the current round.
    pub(crate) fn new(writes: u64) -> Self {
        let bars = io::stderr().is_terminal().then(|| {
            let all = MultiProgress::new();
            let replay = all.add(ProgressBar::new(writes));
            replay.set_style(style(REPLAY_BAR));
            replay.enable_steady_tick(TICK);
            let round = all.add(ProgressBar::new(0));
            round.set_style(style(ROUND_BAR));
            Bars { all, replay, round }
        });
        Progress { bars }
    }

    /// `writes` have been issued so far. The trace starts anew at its end, and so does its bar.
    pub(crate) fn replayed(&self, writes: u64) {
        if let Some(bars) = &self.bars {
            let length = bars.replay.length().unwrap_or(0).max(1);
            bars.replay.set_position(writes % length);
        }
    }

    /// A round begins that has `pages` pages of 4 KiB to copy.
    pub(crate) fn round_begins(&self, round: u32, kind: RoundKind, pages: u64, dirty_rate: f64) {
        if let Some(bars) = &self.bars {
            bars.round.reset();
            bars.round.set_length(pages);
            bars.round.set_prefix(match kind {
                RoundKind::Precopy => format!("round {round}"),
                _ => kind.name().to_owned(),
            });
            bars.round.set_message(match kind {
                RoundKind::Full => String::new(),
                _ => format!("dirty rate {} pages/s", text::count(dirty_rate as u64)),
            });
        }
    }

    /// Adds `pages` copied pages to the round.
    pub(crate) fn copied(&self, pages: u64) {
        if let Some(bars) = &self.bars {
            bars.round.inc(pages);
        }
    }

    /// Ends the round with one line about it.
    pub(crate) fn round_ends(&self, record: &RoundRecord) {
        self.say(&round_line(record));
    }

    /// Ends an increment of the backup with one line about it.
    pub(crate) fn increment_ends(&self, record: &IncrementRecord) {
        self.say(&increment_line(record));
    }

    /// Prints one permanent line, above the bars if there are any.
    pub(crate) fn say(&self, line: &str) {
        // A run goes on if its progress cannot be shown.
        let _ = match &self.bars {
            Some(bars) => bars.all.println(line),
            None => writeln!(io::stderr(), "{line}"),
        };
    }

    /// Removes the bars.
    pub(crate) fn finish(&self) {
        if let Some(bars) = &self.bars {
            bars.replay.finish_and_clear();
            bars.round.finish_and_clear();
        }
    }
}

/// One round in one line.
fn round_line(record: &RoundRecord) -> String {
    let mut line = format!(
        "{:>6.2} s  round {:>2} ({}): {} dirty, {} copied in {}",
        record.started_ms as f64 / 1e3,
        record.round,
        record.kind.name(),
        text::plural(record.dirty_pages, "page"),
        text::bytes(record.bytes_copied),
        text::micros(record.copy_us),
    );
    if record.kind != RoundKind::Full {
        line += &format!(
            ", harvest {}, flush {}, dirty rate {} pages/s",
            text::micros(record.harvest_us),
            text::micros(record.flush_us),
            text::count(record.dirty_rate_pages_per_s as u64),
        );
    }
    line
}

/// One increment of the backup in one line.
fn increment_line(record: &IncrementRecord) -> String {
    format!(
        "{:>6.2} s  backup {:>2}: {} dirty, {} copied in {}",
        record.started_ms as f64 / 1e3,
        record.increment,
        text::plural(record.dirty_pages, "page"),
        text::bytes(record.bytes_copied),
        text::micros(record.took_us),
    )
}

/// The style of a template, or the default one if the template has a mistake.
fn style(template: &str) -> ProgressStyle {
    match ProgressStyle::with_template(template) {
        Ok(style) => style.progress_chars("=> "),
        Err(_) => ProgressStyle::default_bar(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples;

    #[test]
    fn the_templates_have_no_mistake() {
        for template in [REPLAY_BAR, ROUND_BAR] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }

    #[test]
    fn a_round_is_told_in_one_line() {
        let run = samples::run();
        assert_eq!(
            round_line(&run.rounds[0]),
            "  0.00 s  round  0 (full): 199,005 pages dirty, 777.4 MiB copied in 5.02 s"
        );
        assert_eq!(
            round_line(&run.rounds[1]),
            "  5.03 s  round  1 (precopy): 50,200 pages dirty, 196.1 MiB copied in 1.27 s, \
             harvest 3.9 ms, flush 210 us, dirty rate 9,980 pages/s"
        );
    }

    #[test]
    fn an_increment_is_told_in_one_line() {
        assert_eq!(
            increment_line(&samples::run().backup.increments[1]),
            "  2.00 s  backup  1: 20,000 pages dirty, 78.1 MiB copied in 41.0 ms"
        );
    }

    #[test]
    fn every_call_is_harmless_without_a_terminal() {
        let progress = Progress { bars: None };
        progress.replayed(5);
        progress.round_begins(0, RoundKind::Full, 10, 0.0);
        progress.copied(10);
        progress.finish();
    }
}
