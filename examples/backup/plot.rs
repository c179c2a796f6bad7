//! The picture of a run: bytes that each generation reads, beside a full backup, as SVG.

use std::error::Error;

use plotters::prelude::*;

use crate::report::{Generation, Report};
use crate::work::INCREMENTS;

const SIZE: (u32, u32) = (960, 420);
const FONT: &str = "sans-serif";
const TEXT: RGBColor = RGBColor(33, 37, 41);
const GRID: RGBColor = RGBColor(222, 226, 230);
const FULL: RGBColor = RGBColor(134, 142, 150);
const INCREMENT: RGBColor = RGBColor(34, 139, 230);
const AFTER_KILL: RGBColor = RGBColor(232, 89, 12);

fn colour(one: &Generation) -> RGBColor {
    match one {
        _ if one.everything.is_some() => FULL,
        _ if one.recovered_extents > 0 => AFTER_KILL,
        _ => INCREMENT,
    }
}

/// The picture as SVG text.
pub(crate) fn draw(report: &Report) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let bold = (FONT, 20).into_font().style(FontStyle::Bold).color(&TEXT);
        let title = format!("Incremental backup under {}, through kill -9", report.trace);
        root.draw_text(&title, &bold, (24, 18))?;
        let entries = [
            (24, FULL, "everything"),
            (140, INCREMENT, "increment"),
            (250, AFTER_KILL, "first increment after a kill"),
        ];
        for (x, colour, meaning) in entries {
            let style = (FONT, 14).into_font().color(&TEXT);
            root.draw(&Rectangle::new([(x, 53), (x + 12, 65)], colour.filled()))?;
            root.draw_text(meaning, &style, (x + 18, 52))?;
        }
        bars(&root.margin(76, 0, 0, 0), report)?;
        root.present()?;
    }
    Ok(svg)
}

fn bars(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    report: &Report,
) -> Result<(), Box<dyn Error>> {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let all = report.generations.iter();
    let ours: Vec<&Generation> = all.filter(|one| one.consumer == INCREMENTS).collect();
    let bottom = 0.01;
    let top = mib(report.disk_bytes).max(1.0) * 2.0;
    let mut chart = ChartBuilder::on(area)
        .margin_left(18)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(74)
        .build_cartesian_2d(0.4..ours.len() as f64 + 0.6, (bottom..top).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(TEXT)
        .label_style((FONT, 14).into_font().color(&TEXT))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_desc("generation")
        .y_desc("MiB read (log)")
        .draw()?;
    chart.draw_series(ours.iter().map(|one| {
        let x = one.number as f64;
        let height = mib(one.bytes).max(bottom);
        Rectangle::new(
            [(x - 0.36, bottom), (x + 0.36, height)],
            colour(one).filled(),
        )
    }))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(bytes: &[u64]) -> Report {
        let generation = |(number, bytes): (u64, &u64)| Generation {
            consumer: INCREMENTS.to_owned(),
            number,
            seconds: 1.0,
            everything: (number == 1).then(|| "the consumer is new".to_owned()),
            runs: 1,
            bytes: *bytes,
            recovered_extents: number / 2,
            pages_that_differ: 0,
        };
        Report {
            trace: "pgbench.iolog.gz".to_owned(),
            disk_bytes: 1 << 20,
            writes: 7,
            kills: 1,
            log_bytes: 4096,
            forms: "files",
            generations: (1..).zip(bytes).map(generation).collect(),
        }
    }

    #[test]
    fn any_number_of_generations_can_be_drawn() {
        for bytes in [&[][..], &[1 << 20], &[1 << 20, 0, 4096]] {
            let svg = draw(&report(bytes)).unwrap();
            for part in ["<svg", "MiB read (log)", "pgbench.iolog.gz", "</svg>"] {
                assert!(svg.contains(part), "{part}");
            }
        }
    }

    #[test]
    fn a_page_that_differs_is_not_verified() {
        let mut report = report(&[1 << 20, 4096]);
        assert!(report.to_string().contains("\nverified: 2 generations"));
        report.generations[1].pages_that_differ = 1;
        assert!(report.to_string().contains("\nNOT VERIFIED: 1 of 2"));
    }
}
