//! The picture of a run: the heat of addresses over time, the dirty rate and the working set, as an
//! SVG file.

use std::error::Error;
use std::fs;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::cli::Cli;
use crate::watch::{Sample, bytes, squeeze};

type Drawn<T> = Result<T, Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (1000, 720);
/// Where the lower panel starts.
const SPLIT: u32 = 470;
const FONT: &str = "sans-serif";
const TEXT: RGBColor = RGBColor(33, 37, 41);
const GRID: RGBColor = RGBColor(222, 226, 230);
const RATE: RGBColor = RGBColor(201, 42, 42);
const SET: RGBColor = RGBColor(24, 100, 171);
/// Cells of the map, at most.
const ROWS: usize = 96;
const COLUMNS: usize = 160;

/// Draws what was seen and writes it to `path`.
pub(crate) fn write(cli: &Cli, size: u64, samples: &[Sample], path: &Path) -> Drawn<()> {
    Ok(fs::write(path, draw(cli, size, samples)?)?)
}

/// The picture as SVG text.
fn draw(cli: &Cli, size: u64, samples: &[Sample]) -> Drawn<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        title(&root, cli, size, samples)?;
        let (upper, lower) = root.split_vertically(SPLIT);
        if let Some(last) = samples.last() {
            let end = last.at.as_secs_f64();
            heat_map(&upper.margin(74, 0, 0, 0), cli, size, samples, end)?;
            rates(&lower, size, samples, end)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn title(root: &Area<'_>, cli: &Cli, size: u64, samples: &[Sample]) -> Drawn<()> {
    let bold = (FONT, 20).into_font().style(FontStyle::Bold).color(&TEXT);
    let name = format!(
        "Writes of the {} in {}",
        cli.workload.name(),
        bytes(size as f64)
    );
    root.draw_text(&name, &bold, (24, 16))?;
    let written: u64 = samples.iter().map(|sample| sample.dirty_bytes).sum();
    let seconds = samples.last().map_or(0.0, |last| last.at.as_secs_f64());
    let facts = format!(
        "{} harvests in {seconds:.1} s found {} of pages written, {}/s",
        samples.len(),
        bytes(written as f64),
        bytes(written as f64 / seconds.max(1e-9)),
    );
    let small = (FONT, 14).into_font().color(&TEXT);
    root.draw_text(&facts, &small, (24, 46))?;
    // What the colours mean.
    for n in 0..48 {
        let x = 760 + 3 * n;
        let shade = colour((n * 255 / 47) as u8);
        root.draw(&Rectangle::new([(x, 46), (x + 3, 58)], shade.filled()))?;
    }
    let left = small.pos(Pos::new(HPos::Right, VPos::Top));
    root.draw_text("part written: none", &left, (752, 45))?;
    let small = (FONT, 14).into_font().color(&TEXT);
    root.draw_text("all", &small, (912, 45))?;
    Ok(())
}

/// Time to the right, addresses upwards.
fn heat_map(area: &Area<'_>, cli: &Cli, size: u64, samples: &[Sample], end: f64) -> Drawn<()> {
    let top = size as f64 / f64::from(1 << 20);
    let mut chart = ChartBuilder::on(area)
        .margin_left(18)
        .margin_right(100)
        .x_label_area_size(10)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .axis_desc_style((FONT, 15).into_font().color(&TEXT))
        .x_labels(0)
        .y_labels(9)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .y_desc("address, MiB")
        .draw()?;
    for column in columns(samples) {
        let rows = column.heat.len().max(1) as f64;
        // Cells of one heat are one rectangle.
        let mut from = 0;
        for run in column.heat.chunk_by(|a, b| a == b) {
            let to = from + run.len();
            let y = |row: usize| row as f64 / rows * top;
            chart.draw_series([Rectangle::new(
                [(column.from, y(from)), (column.to, y(to))],
                colour(run[0]).filled(),
            )])?;
            from = to;
        }
    }
    let label = (FONT, 13)
        .into_font()
        .color(&TEXT)
        .pos(Pos::new(HPos::Left, VPos::Center));
    for section in cli.workload.sections() {
        let (from, to) = section.sixteenths;
        let border = to as f64 / 16.0 * top;
        if to < 16 {
            chart.draw_series(LineSeries::new([(0.0, border), (end, border)], &TEXT))?;
        }
        let middle = (from + to) as f64 / 32.0 * top;
        let name = section.name.to_owned();
        chart.draw_series([
            EmptyElement::at((end, middle)) + Text::new(name, (8, 0), label.clone())
        ])?;
    }
    Ok(())
}

/// What is drawn as one column of the map.
struct Column {
    from: f64,
    to: f64,
    heat: Vec<u8>,
}

/// Some samples to a column, so that there are no more columns than can be seen; each cell has the
/// hottest of its own.
fn columns(samples: &[Sample]) -> Vec<Column> {
    let each = samples.len().div_ceil(COLUMNS).max(1);
    samples
        .chunks(each)
        .map(|chunk| {
            let begin = |sample: &Sample| (sample.at - sample.interval).as_secs_f64();
            let mut heat = Vec::new();
            for sample in chunk {
                let rows = squeeze(&sample.heat, ROWS);
                heat.resize(rows.len(), 0);
                heat.iter_mut()
                    .zip(rows)
                    .for_each(|(old, new)| *old = new.max(*old));
            }
            Column {
                from: chunk.first().map_or(0.0, begin),
                to: chunk.last().map_or(0.0, |last| last.at.as_secs_f64()),
                heat,
            }
        })
        .collect()
}

/// The dirty rate with its axis on the left, the working set with its own on the right.
fn rates(area: &Area<'_>, size: u64, samples: &[Sample], end: f64) -> Drawn<()> {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let most = samples
        .iter()
        .map(|sample| mib(sample.rate()))
        .fold(1.0, f64::max);
    let top = mib(size as f64);
    let mut chart = ChartBuilder::on(area)
        .margin_left(18)
        .margin_right(36)
        .margin_top(10)
        .margin_bottom(8)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .right_y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..most * 1.1)?
        .set_secondary_coord(0.0..end, 0.0..top * 1.1);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .axis_desc_style((FONT, 15).into_font().color(&TEXT))
        .x_label_formatter(&|x| format!("{x:.1}"))
        .x_desc("seconds")
        .y_labels(6)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .y_desc("written, MiB/s (red)")
        .draw()?;
    chart
        .configure_secondary_axes()
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .axis_desc_style((FONT, 15).into_font().color(&TEXT))
        .y_labels(6)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .y_desc("working set, MiB (blue)")
        .draw()?;
    let at = |sample: &Sample| sample.at.as_secs_f64();
    chart.draw_series(LineSeries::new(
        samples
            .iter()
            .map(|sample| (at(sample), mib(sample.rate()))),
        RATE.stroke_width(2),
    ))?;
    chart.draw_secondary_series(LineSeries::new(
        samples
            .iter()
            .map(|sample| (at(sample), mib(sample.working_set as f64))),
        SET.stroke_width(2),
    ))?;
    Ok(())
}

/// From pale to dark red.
fn colour(heat: u8) -> RGBColor {
    const STEPS: [(u8, u8, u8); 5] = [
        (255, 243, 219),
        (255, 204, 128),
        (245, 130, 60),
        (200, 45, 45),
        (105, 10, 40),
    ];
    if heat == 0 {
        return RGBColor(241, 243, 245);
    }
    // What is little should be seen.
    let place = (f64::from(heat) / 255.0).sqrt() * (STEPS.len() - 1) as f64;
    let step = (place as usize).min(STEPS.len() - 2);
    let between = place - step as f64;
    let mix = |low: u8, high: u8| {
        (f64::from(low) + (f64::from(high) - f64::from(low)) * between).round() as u8
    };
    let (low, high) = (STEPS[step], STEPS[step + 1]);
    RGBColor(mix(low.0, high.0), mix(low.1, high.1), mix(low.2, high.2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::time::Duration;

    fn samples(n: u64) -> Vec<Sample> {
        (1..=n)
            .map(|n| Sample {
                at: Duration::from_millis(100 * n),
                interval: Duration::from_millis(100),
                dirty_bytes: n << 16,
                working_set: n << 18,
                took: Duration::from_micros(77),
                heat: (0..256).map(|cell| (cell * n % 256) as u8).collect(),
            })
            .collect()
    }

    #[test]
    fn the_picture_names_what_it_shows() {
        let cli = Cli::parse_from(["watch", "--workload", "lru"]);
        let svg = draw(&cli, 64 << 20, &samples(20)).unwrap();
        for part in [
            "<svg",
            "Writes of the LRU cache in 64 MiB",
            "20 harvests in 2.0 s",
            "records",
            "working set, MiB",
            "</svg>",
        ] {
            assert!(svg.contains(part), "{part}");
        }
    }

    #[test]
    fn any_number_of_samples_can_be_drawn() {
        let cli = Cli::parse_from(["watch"]);
        for n in [0, 1, 2, 5000] {
            let svg = draw(&cli, 1 << 20, &samples(n)).unwrap();
            assert!(svg.len() < 4 << 20, "{n}: {} bytes", svg.len());
        }
        assert!(columns(&samples(5000)).len() <= COLUMNS);
    }
}
