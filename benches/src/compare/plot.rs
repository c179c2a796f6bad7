//! Pictures of the results: the ratios of each family, and the curves of each series.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{IntoSegmentedCoord, SegmentValue};
use plotters::prelude::*;

use super::report::{Curve, Report};
use super::row::{Ratio, Row, Scale, Target, Unit};

/// One colour for each peer. They differ also for people who cannot tell red from green.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(110, 110, 110),
    RGBColor(150, 75, 0),
];
const WIDTH: u32 = 1000;
/// The width of the names, on the right.
const LEGEND: u32 = 230;

impl Report {
    /// Draws a family into files of `directory`, and returns their names.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn plot(&self, family: &str, directory: &Path) -> io::Result<Vec<String>> {
        fs::create_dir_all(directory)?;
        let mut names = Vec::new();
        let mut draw = |name: String, drawn: Result<(), String>| {
            names.push(name);
            drawn.map_err(io::Error::other)
        };
        for (curve, curves) in self.curves(family) {
            let words = curve.split(|c: char| !c.is_ascii_alphanumeric() && c != '.');
            let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
            let name = format!("{family}-{}.svg", words.join("-"));
            let drawn = plot_curves(&directory.join(&name), &curve, &curves);
            draw(name, drawn.map_err(|error| error.to_string()))?;
        }
        let rows = self.rows(family).filter(|row| row.workload.size.is_none());
        let rows: Vec<&Row> = rows.filter(|row| row.best_peer().is_some()).collect();
        if !rows.is_empty() {
            let name = format!("{family}.svg");
            let drawn = plot_ratios(&directory.join(&name), family, &self.peers(family), &rows);
            draw(name, drawn.map_err(|error| error.to_string()))?;
        }
        Ok(names)
    }
}

/// The names, on the right.
fn legend(area: &Area<'_>, labels: Vec<(&RGBColor, String)>) -> Drawn {
    for (at, (colour, label)) in labels.into_iter().enumerate() {
        let (x, y) = ((WIDTH - LEGEND + 15) as i32, 45 + 18 * at as i32);
        area.draw(&Circle::new((x, y), 4, colour.filled()))?;
        area.draw(&Text::new(label, (x + 12, y - 6), ("sans-serif", 12)))?;
    }
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// The limits of an axis: at most a decade beyond the values on both sides.
fn decades(numbers: impl Iterator<Item = f64>) -> Range<f64> {
    let finite = numbers.filter(|number| number.is_finite() && *number > 0.0);
    let (least, greatest) = finite.fold((f64::INFINITY, 0.0f64), |(least, greatest), number| {
        (least.min(number), greatest.max(number))
    });
    if least > greatest {
        return 0.1..10.0;
    }
    let end = 10f64.powf(greatest.log10().floor() + 1.0);
    10f64.powf(least.log10().floor())..end
}

/// A row for each workload: the ratio of each peer's time to ours, with the spread over all rounds,
/// and a bar at the target for the best peer.
fn plot_ratios(path: &Path, family: &str, peers: &[&'static str], rows: &[&Row]) -> Drawn {
    let shown = |row: &Row, name: &str| {
        let others = row
            .of(super::Role::Peer)
            .chain(row.of(super::Role::Ours).skip(1));
        let mut others = others.filter(|cell| cell.name == name);
        others.next().and_then(|cell| row.ratio(cell))
    };
    let wanted = |row: &Row| {
        row.workload.targets.iter().find_map(|target| match target {
            Target::Ratio(wanted) => Some(*wanted),
            _ => None,
        })
    };
    let medians = rows
        .iter()
        .flat_map(|row| peers.iter().filter_map(|name| shown(row, name)))
        .map(|ratio| ratio.median);
    let bounds = decades(medians.chain([0.9, 1.1]));
    let height = 110 + 20 * rows.len() as u32;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            format!("{family}: time of the peer / ours (right of 1: ours is ahead)"),
            ("sans-serif", 16),
        )
        .margin(10)
        .margin_right(LEGEND)
        .x_label_area_size(30)
        .y_label_area_size(280)
        .build_cartesian_2d(
            bounds.clone().log_scale(),
            (0..rows.len() as i32 - 1).into_segmented(),
        )?;
    let name = |at: &SegmentValue<i32>| match at {
        SegmentValue::CenterOf(at) | SegmentValue::Exact(at) => rows
            .len()
            .checked_sub(1 + *at as usize)
            .map_or_else(String::new, |row| rows[row].workload.name.clone()),
        SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .y_labels(rows.len())
        .y_label_formatter(&name)
        .x_label_formatter(&|x| x.to_string())
        .light_line_style(WHITE)
        .draw()?;
    // The first row on top.
    let place = |row: usize| SegmentValue::CenterOf((rows.len() - 1 - row) as i32);
    let bottom_and_top = [SegmentValue::Exact(0), SegmentValue::Last];
    chart.draw_series(LineSeries::new(
        bottom_and_top.map(|at| (1.0, at)),
        BLACK.stroke_width(2),
    ))?;
    for (row, wanted) in rows
        .iter()
        .enumerate()
        .filter_map(|(at, row)| Some((at, wanted(row)?)))
    {
        let bar = || {
            EmptyElement::at((wanted, place(row)))
                + PathElement::new([(0, -7), (0, 7)], BLACK.stroke_width(3))
        };
        chart.draw_series([bar()])?;
    }
    let others = peers
        .iter()
        .filter(|name| rows.iter().any(|row| shown(row, name).is_some()));
    let mut labels = Vec::new();
    for (colour, name) in COLOURS.iter().cycle().zip(others) {
        let ratios = rows
            .iter()
            .enumerate()
            .filter_map(|(at, row)| Some((at, shown(row, name)?)))
            .filter(|(_, ratio)| ratio.greatest.is_finite() && ratio.least > 0.0);
        let ratios: Vec<_> = ratios.collect();
        for (row, ratio) in &ratios {
            let ends = [ratio.least, ratio.greatest]
                .map(|x| (x.clamp(bounds.start, bounds.end), place(*row)));
            chart.draw_series(LineSeries::new(ends, colour.stroke_width(1)))?;
        }
        let circle = |(row, ratio): &(usize, Ratio)| {
            Circle::new((ratio.median, place(*row)), 4, colour.filled())
        };
        chart.draw_series(ratios.iter().map(circle))?;
        labels.push((colour, (*name).to_owned()));
    }
    legend(&area, labels)?;
    area.present()?;
    Ok(())
}

/// The time over the size, both as logarithms.
fn plot_curves(path: &Path, name: &str, curves: &[Curve<'_>]) -> Drawn {
    let points = || curves.iter().flat_map(|curve| curve.points.iter());
    let (least, greatest) = points().fold((f64::INFINITY, 0.0f64), |(least, greatest), (x, _)| {
        (least.min(*x), greatest.max(*x))
    });
    let scale = curves
        .iter()
        .flat_map(|curve| &curve.rows)
        .find_map(|row| row.workload.size.as_ref())
        .map_or(Scale::Items, |size| size.scale);
    let area = SVGBackend::new(path, (WIDTH, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let base = match scale {
        Scale::Items => 10.0,
        Scale::Bytes => 2.0,
    };
    let mut chart = ChartBuilder::on(&area)
        .caption(name, ("sans-serif", 16))
        .margin(10)
        .margin_right(LEGEND)
        .x_label_area_size(30)
        .y_label_area_size(70)
        .build_cartesian_2d(
            (least..greatest).log_scale().base(base),
            decades(points().map(|(_, y)| *y)).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_label_formatter(&|x| scale.show(*x))
        .y_label_formatter(&|y| Unit::Time.show(*y))
        .light_line_style(WHITE)
        .draw()?;
    let mut labels = Vec::new();
    for (colour, curve) in COLOURS.iter().cycle().zip(curves) {
        let label = match curve.slope() {
            Some(slope) => format!("{}: slope {slope:.2}", curve.peer),
            None => curve.peer.to_owned(),
        };
        labels.push((colour, label));
        chart.draw_series(LineSeries::new(
            curve.points.iter().copied(),
            colour.stroke_width(2),
        ))?;
        chart.draw_series(
            curve
                .points
                .iter()
                .map(|at| Circle::new(*at, 3, colour.filled())),
        )?;
    }
    legend(&area, labels)?;
    area.present()?;
    Ok(())
}
