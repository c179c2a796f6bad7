//! The live picture in a terminal.

use std::io;
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Sparkline, Widget};

use crate::cli::Cli;
use crate::watch::{Sample, Watch, bytes, squeeze};

/// The terminal, which is as it was when this is dropped.
pub(crate) struct Live(DefaultTerminal);

impl Live {
    /// Takes the terminal.
    pub(crate) fn new() -> io::Result<Self> {
        ratatui::try_init().map(Live)
    }

    /// Draws, and waits for at most `rest`. Returns whether the user wants to end it.
    pub(crate) fn show(
        &mut self,
        cli: &Cli,
        watch: &Watch<'_>,
        operations: u64,
        rest: Duration,
    ) -> io::Result<bool> {
        self.0
            .draw(|frame| draw(frame, cli, watch.bytes(), &watch.samples, operations))?;
        let end = std::time::Instant::now() + rest;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            if !event::poll(left)? {
                return Ok(false);
            }
            if let Event::Key(key) = event::read()? {
                let interrupt =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    return Ok(true);
                }
            }
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // An error of the terminal cannot be shown on that terminal.
        let _ = ratatui::try_restore();
    }
}

fn draw(frame: &mut Frame<'_>, cli: &Cli, size: u64, samples: &[Sample], operations: u64) {
    let Some(now) = samples.last() else { return };
    let [head, names, map, rate, set, foot] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(1),
        Constraint::Min(4),
        Constraint::Length(6),
        Constraint::Length(5),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let seconds = now.at.as_secs_f64();
    frame.render_widget(
        Line::from(vec![
            format!(" {} ", cli.workload.name()).bold().reversed(),
            format!(
                "  {} of memory   {seconds:.1} of {:.0} s   {} operations/s",
                bytes(size as f64),
                cli.seconds.as_secs_f64(),
                rounded(operations as f64 / seconds.max(1e-3)),
            )
            .into(),
        ]),
        head,
    );
    frame.render_widget(Names(cli), names);
    frame.render_widget(Waterfall(samples), map);

    let width = usize::from(rate.width.saturating_sub(2));
    let recent = &samples[samples.len().saturating_sub(width)..];
    let rates: Vec<u64> = recent.iter().map(|sample| sample.rate() as u64).collect();
    let most = samples.iter().map(|sample| sample.rate() as u64).max();
    let title = format!(
        " written {}/s   most {}/s ",
        bytes(now.rate()),
        bytes(most.unwrap_or(0) as f64)
    );
    frame.render_widget(
        Sparkline::default()
            .block(Block::bordered().title(title).dim())
            .style(Style::new().not_dim().fg(Color::LightRed))
            .max(most.unwrap_or(1).max(1))
            .data(&rates),
        rate,
    );
    let sets: Vec<u64> = recent.iter().map(|sample| sample.working_set).collect();
    let title = format!(
        " working set {} of the last {} s ",
        bytes(now.working_set as f64),
        cli.window.as_secs_f64()
    );
    frame.render_widget(
        Sparkline::default()
            .block(Block::bordered().title(title).dim())
            .style(Style::new().not_dim().fg(Color::LightBlue))
            .max(size)
            .data(&sets),
        set,
    );
    let took = now.took.as_micros();
    let line = format!(
        " harvest {took} us   every {} s   q ends",
        cli.interval.as_secs_f64()
    );
    frame.render_widget(Line::from(line).dim(), foot);
}

/// What lies where in the memory, above the map.
struct Names<'a>(&'a Cli);

impl Widget for Names<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        for section in self.0.workload.sections() {
            let (from, to) = section.sixteenths;
            let column = |sixteenth: u64| (u64::from(area.width) * sixteenth / 16) as u16;
            let width = (column(to) - column(from)).saturating_sub(1);
            let name = format!("|{}", section.name);
            buffer.set_stringn(
                area.x + column(from),
                area.y,
                name,
                usize::from(width),
                Style::new().fg(Color::Gray),
            );
        }
    }
}

/// The memory from left to right, the newest harvest on top, two in each line.
struct Waterfall<'a>(&'a [Sample]);

impl Widget for Waterfall<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let mut newest = self.0.iter().rev();
        for y in 0..area.height {
            let (upper, lower) = (newest.next(), newest.next());
            for x in 0..area.width {
                let heat = |sample: Option<&Sample>| {
                    sample.map_or(Color::Reset, |sample| {
                        let cells = sample.heat.len().max(1);
                        let (x, width) = (usize::from(x), usize::from(area.width));
                        let first = (x * cells / width).min(cells - 1);
                        let next = ((x + 1) * cells / width).clamp(first + 1, cells);
                        let hottest = squeeze(&sample.heat[first..next], 1);
                        colour(hottest.first().copied().unwrap_or(0))
                    })
                };
                if let Some(cell) = buffer.cell_mut((area.x + x, area.y + y)) {
                    cell.set_symbol("\u{2580}") // the upper half
                        .set_fg(heat(upper))
                        .set_bg(heat(lower));
                }
            }
        }
    }
}

/// From dark to bright.
fn colour(heat: u8) -> Color {
    const STEPS: [(u8, u8, u8); 6] = [
        (22, 24, 32),
        (66, 24, 96),
        (140, 41, 99),
        (214, 72, 62),
        (250, 142, 20),
        (252, 240, 140),
    ];
    if heat == 0 {
        let (red, green, blue) = STEPS[0];
        return Color::Rgb(red, green, blue);
    }
    // Few writes are visible too.
    let place = (f64::from(heat) / 255.0).sqrt() * (STEPS.len() - 1) as f64;
    let step = (place as usize).min(STEPS.len() - 2);
    let between = place - step as f64;
    let mix = |low: u8, high: u8| {
        (f64::from(low) + (f64::from(high) - f64::from(low)) * between).round() as u8
    };
    let (low, high) = (STEPS[step], STEPS[step + 1]);
    Color::Rgb(mix(low.0, high.0), mix(low.1, high.1), mix(low.2, high.2))
}

fn rounded(number: f64) -> String {
    match number {
        large if large >= 1e6 => format!("{:.1} M", large / 1e6),
        large if large >= 1e3 => format!("{:.0} k", large / 1e3),
        small => format!("{small:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    #[test]
    fn the_picture_shows_where_and_how_much_in_any_size() {
        let cli = Cli::parse_from(["watch", "--workload", "join"]);
        let samples: Vec<Sample> = (0..90)
            .map(|n| Sample {
                at: Duration::from_millis(100 * (n + 1)),
                interval: Duration::from_millis(100),
                dirty_bytes: n << 16,
                working_set: n << 18,
                took: Duration::from_micros(77),
                heat: (0..256)
                    .map(|cell| if cell < 64 { 255 } else { 0 })
                    .collect(),
            })
            .collect();
        for (width, height) in [(80, 30), (200, 60), (20, 10), (3, 2), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal
                .draw(|frame| draw(frame, &cli, 128 << 20, &samples, 1_000_000))
                .unwrap();
            if (width, height) != (80, 30) {
                continue;
            }
            let buffer = terminal.backend().buffer();
            let row = |y: u16| -> String { (0..80).map(|x| buffer[(x, y)].symbol()).collect() };
            let all: String = (0..30).map(|y| row(y) + "\n").collect();
            for part in [
                "hash join",
                "|hash table",
                "|probed",
                "most 56 MiB/s",
                "harvest 77 us",
            ] {
                assert!(all.contains(part), "{part} in\n{all}");
            }
            // A quarter of the memory is hot.
            assert_eq!(buffer[(0, 3)].fg, colour(255));
            assert_eq!(buffer[(19, 5)].bg, colour(255));
            assert_eq!(buffer[(20, 3)].fg, colour(0));
        }
    }
}
