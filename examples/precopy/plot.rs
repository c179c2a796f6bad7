//! The picture of a run: dirty pages and dirty rate, round by round, as an SVG file.

use std::error::Error;
use std::fs;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{RoundKind, RoundRecord, RunRecord};
use crate::text;

type Drawn<T> = Result<T, Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (960, 900);
/// Where the lower panel starts.
const SPLIT: u32 = 430;
/// The height of that panel. The one below it has the other consumers.
const RATE: u32 = 230;
const FONT: &str = "sans-serif";
const TEXT: RGBColor = RGBColor(33, 37, 41);
const GRID: RGBColor = RGBColor(222, 226, 230);
const LINE: RGBColor = RGBColor(11, 114, 133);
const BACKUP: RGBColor = RGBColor(156, 54, 181);
/// The most bars with a number above. With more of them, the numbers would touch.
const MOST_LABELLED_ROUNDS: usize = 14;

/// The colour of a round's bar.
const fn colour(kind: RoundKind) -> RGBColor {
    match kind {
        RoundKind::Full => RGBColor(134, 142, 150),
        RoundKind::Precopy => RGBColor(34, 139, 230),
        RoundKind::Final => RGBColor(232, 89, 12),
    }
}

/// Draws `run` and writes it to `path`.
pub(crate) fn write(run: &RunRecord, path: &Path) -> Drawn<()> {
    Ok(fs::write(path, draw(run)?)?)
}

/// The picture as SVG text.
fn draw(run: &RunRecord) -> Drawn<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        title(&root, run)?;
        legend(&root)?;
        let (upper, lower) = root.split_vertically(SPLIT);
        let upper = upper.margin(92, 0, 0, 0);
        if !run.rounds.is_empty() {
            dirty_pages(&upper, &run.rounds)?;
            let (middle, lower) = lower.split_vertically(RATE);
            dirty_rate(&middle, &run.rounds)?;
            others(&lower, run)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn title(root: &Area<'_>, run: &RunRecord) -> Drawn<()> {
    let bold = (FONT, 20).into_font().style(FontStyle::Bold).color(&TEXT);
    root.draw_text(
        &format!("Pre-copy migration under {}", run.trace),
        &bold,
        (24, 18),
    )?;
    let machine = format!(
        "{} of memory, {} and {}, migrated in {:.1} s with {} of downtime, {}",
        text::bytes(run.pages.saturating_mul(4096)),
        text::plural(u64::from(run.devices), "device"),
        text::plural(u64::from(run.cpus), "CPU"),
        run.migration_ms as f64 / 1e3,
        text::micros(run.downtime_us()),
        if run.verified() {
            "verified"
        } else {
            "NOT verified"
        },
    );
    root.draw_text(&machine, &(FONT, 14).into_font().color(&TEXT), (24, 46))?;
    Ok(())
}

/// The legend of the colours, in one row under the title.
fn legend(root: &Area<'_>) -> Drawn<()> {
    const ENTRIES: [(i32, RoundKind, &str); 3] = [
        (24, RoundKind::Full, "everything"),
        (140, RoundKind::Precopy, "dirty, devices running"),
        (336, RoundKind::Final, "dirty, devices stopped"),
    ];
    let style = (FONT, 14).into_font().color(&TEXT);
    for (x, kind, meaning) in ENTRIES {
        root.draw(&Rectangle::new(
            [(x, 71), (x + 12, 83)],
            colour(kind).filled(),
        ))?;
        root.draw_text(meaning, &style, (x + 18, 70))?;
    }
    Ok(())
}

/// A bar for each round, on a logarithmic axis: the first round has all pages, the last a few
/// hundred.
fn dirty_pages(area: &Area<'_>, rounds: &[RoundRecord]) -> Drawn<()> {
    // A bar of no pages has no height, because the axis starts at 1.
    let bottom = 1.0;
    let most = rounds
        .iter()
        .map(|round| round.dirty_pages)
        .max()
        .unwrap_or(0)
        .max(9);
    // Room above the highest bar for its number.
    let top = most as f64 * 3.0;
    let mut chart = ChartBuilder::on(area)
        .margin_left(18)
        .margin_right(24)
        .x_label_area_size(26)
        .y_label_area_size(74)
        .build_cartesian_2d(columns(rounds), (bottom..top).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .axis_desc_style((FONT, 15).into_font().color(&TEXT))
        .x_labels(rounds.len().min(20) + 1)
        .x_label_formatter(&|x| whole(*x))
        .y_labels(7)
        .y_label_formatter(&|y| text::short(*y))
        .y_desc("pages to copy (log)")
        .draw()?;
    for kind in [RoundKind::Full, RoundKind::Precopy, RoundKind::Final] {
        let bars = rounds
            .iter()
            .filter(|round| round.kind == kind)
            .map(|round| {
                let x = f64::from(round.round);
                let height = (round.dirty_pages as f64).max(bottom);
                Rectangle::new(
                    [(x - 0.36, bottom), (x + 0.36, height)],
                    colour(kind).filled(),
                )
            });
        chart.draw_series(bars)?;
    }
    if rounds.len() <= MOST_LABELLED_ROUNDS {
        let above = (FONT, 13)
            .into_font()
            .color(&TEXT)
            .pos(Pos::new(HPos::Center, VPos::Bottom));
        chart.draw_series(rounds.iter().map(|round| {
            let at = (
                f64::from(round.round),
                (round.dirty_pages as f64).max(bottom),
            );
            EmptyElement::at(at) + Text::new(text::count(round.dirty_pages), (0, -4), above.clone())
        }))?;
    }
    Ok(())
}

/// The rate at which the machine made pages dirty before each harvest. The full copy has no rate.
fn dirty_rate(area: &Area<'_>, rounds: &[RoundRecord]) -> Drawn<()> {
    let points: Vec<(f64, f64)> = rounds
        .iter()
        .filter(|round| round.kind != RoundKind::Full)
        .map(|round| (f64::from(round.round), round.dirty_rate_pages_per_s))
        .collect();
    let most = points.iter().map(|point| point.1).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin_left(18)
        .margin_right(24)
        .margin_top(6)
        .margin_bottom(8)
        .x_label_area_size(46)
        .y_label_area_size(74)
        .build_cartesian_2d(columns(rounds), 0.0..most * 1.15)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .axis_desc_style((FONT, 15).into_font().color(&TEXT))
        .x_labels(rounds.len().min(20) + 1)
        .x_label_formatter(&|x| whole(*x))
        .y_labels(5)
        .y_label_formatter(&|y| text::short(*y))
        .x_desc("round")
        .y_desc("dirty pages/s")
        .draw()?;
    chart.draw_series(LineSeries::new(
        points.iter().copied(),
        LINE.stroke_width(2),
    ))?;
    chart.draw_series(
        points
            .iter()
            .map(|point| Circle::new(*point, 4, LINE.filled())),
    )?;
    Ok(())
}

/// The other consumers, over time: the rate of the meter, and the increments of the backup after
/// the first one, which has everything.
fn others(area: &Area<'_>, run: &RunRecord) -> Drawn<()> {
    const MIB: f64 = (1 << 20) as f64;
    let seconds = |ms: u64| ms as f64 / 1e3;
    let looks = run.meter.looks.iter();
    let rate: Vec<(f64, f64)> = looks
        .map(|look| (seconds(look.at_ms), look.rate_bytes_per_s / MIB))
        .collect();
    let increments = run.backup.increments.iter().skip(1);
    let copied: Vec<(f64, f64)> = increments
        .map(|one| (seconds(one.started_ms), one.bytes_copied as f64 / MIB))
        .collect();
    let all = || rate.iter().chain(&copied);
    let most = all().map(|point| point.1).fold(1.0, f64::max);
    let last = all().map(|point| point.0).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin_left(18)
        .margin_right(24)
        .margin_top(6)
        .margin_bottom(8)
        .x_label_area_size(46)
        .y_label_area_size(74)
        .build_cartesian_2d(0.0..last * 1.02, 0.0..most * 1.15)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .axis_desc_style((FONT, 15).into_font().color(&TEXT))
        .x_label_formatter(&|x| text::short(*x))
        .y_labels(5)
        .y_label_formatter(&|y| text::short(*y))
        .x_desc("seconds: line, MiB/s by the meter; dots, MiB of an increment of the backup")
        .y_desc("MiB/s, MiB")
        .draw()?;
    chart.draw_series(LineSeries::new(rate.iter().copied(), LINE.stroke_width(2)))?;
    let dots = copied.iter();
    chart.draw_series(dots.map(|point| Circle::new(*point, 5, BACKUP.filled())))?;
    Ok(())
}

/// The horizontal axis: one unit for each round, with room for half a bar on both sides.
fn columns(rounds: &[RoundRecord]) -> Range<f64> {
    let last = rounds.iter().map(|round| round.round).max().unwrap_or(0);
    -0.6..f64::from(last) + 0.6
}

/// The number of a round. No text between two rounds.
fn whole(x: f64) -> String {
    if (x - x.round()).abs() < 1e-9 {
        format!("{}", x.round())
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples;

    #[test]
    fn the_picture_names_what_it_shows() {
        let svg = draw(&samples::run()).unwrap();
        for part in [
            "<svg",
            "Pre-copy migration under pgbench.iolog.gz",
            "199,005",
            "pages to copy (log)",
            "dirty pages/s",
            "dirty, devices stopped",
            "an increment of the backup",
            "</svg>",
        ] {
            assert!(svg.contains(part), "{part}");
        }
    }

    #[test]
    fn any_number_of_rounds_can_be_drawn() {
        let mut run = samples::run();
        for _ in 0..7 {
            let mut more = run.rounds.clone();
            run.rounds.append(&mut more);
        }
        for (at, round) in run.rounds.iter_mut().enumerate() {
            round.round = at as u32;
        }
        assert!(draw(&run).is_ok());
        run.rounds.truncate(1);
        assert!(draw(&run).is_ok());
        run.rounds[0].dirty_pages = 0;
        run.rounds[0].kind = RoundKind::Final;
        run.rounds[0].dirty_rate_pages_per_s = 0.0;
        assert!(draw(&run).is_ok());
        run.rounds.clear();
        assert!(draw(&run).is_ok());
    }
}
