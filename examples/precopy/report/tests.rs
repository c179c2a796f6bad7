//! The table, the verdict and the JSON of made-up records.

use super::*;
use crate::compare::PageAt;

fn printed(run: &RunRecord) -> Vec<String> {
    let mut out = Vec::new();
    run.print(&mut out).unwrap();
    String::from_utf8(out)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// The run, with every second page of `pages` changed.
fn broken(pages: u64) -> RunRecord {
    let mut run = samples::run();
    run.pages = pages;
    run.comparison = Comparison::default();
    run.backup.comparison.pages_compared = pages;
    for page in 0..pages {
        let at = PageAt {
            iova: page * 4096,
            file: 0,
            name: "pg_wal/000000010000000000000010",
            offset: page * 4096,
        };
        run.comparison
            .page(at, &[(page % 2) as u8; 4096], &[0; 4096]);
    }
    run
}

#[test]
fn the_last_line_of_a_success_is_for_scripts() {
    let run = samples::run();
    let lines = printed(&run);
    assert_eq!(
        lines.last().unwrap(),
        "verified: 199005 pages identical (815124480 bytes)"
    );
    assert!(
        lines.iter().all(|line| line.trim_end().len() <= 110),
        "{lines:#?}"
    );
    let row = lines.iter().find(|line| line.contains("full")).unwrap();
    assert!(
        row.contains("199,005") && row.contains("777.4 MiB"),
        "{row}"
    );
}

#[test]
fn a_failure_tells_where_and_how_much() {
    let mut run = broken(24);
    run.sabotage = Some(Sabotage::SkipFlush);
    let lines = printed(&run);
    let at = lines
        .iter()
        .position(|line| line.starts_with("NOT VERIFIED"))
        .unwrap();
    assert_eq!(
        lines[at],
        "NOT VERIFIED: 12 of 24 pages differ in 49,152 bytes: their last writes were lost"
    );
    assert_eq!(
        lines[at + 1],
        "  IOVA [0x1000, 0x1fff]: 1 page from byte 4,096 of pg_wal/000000010000000000000010, \
         4,096 bytes lost"
    );
    assert_eq!(lines[at + 11], "  and 2 more ranges");
    assert!(lines[at + 12].starts_with("sabotage skip-flush: sync did not flush"));
    run.sabotage = None;
    let lines = printed(&run);
    assert_eq!(
        lines.last().unwrap(),
        "no step was broken on purpose: this is a defect"
    );
    assert!(!lines.iter().any(|line| line.starts_with("verified")));
}

#[test]
fn comparing_too_few_pages_is_no_success() {
    let mut run = samples::run();
    run.comparison = Comparison::default();
    assert!(!run.verified());
    assert_eq!(
        printed(&run).last().unwrap(),
        "NOT VERIFIED: only 0 of 199,005 pages were compared"
    );
}

#[test]
fn a_backup_or_a_meter_that_lost_something_is_no_success() {
    let mut run = samples::run();
    assert!(
        printed(&run)
            .iter()
            .any(|line| line.starts_with("backup: 4 increments, "))
    );
    run.backup.comparison = broken(24).comparison;
    assert!(!run.verified());
    let lines = printed(&run);
    let copy = "NOT VERIFIED: the backup: 12 of 24 pages differ in 49,152 bytes";
    assert!(
        lines.iter().any(|line| line.starts_with(copy)),
        "{lines:#?}"
    );
    let mut run = samples::run();
    run.meter.check.missed = 3;
    assert!(!run.verified());
    let missed = "NOT VERIFIED: the meter: 3 pages missed, 0 too many, 0 miscounted";
    assert!(printed(&run).contains(&missed.to_owned()));
}

#[test]
fn json_holds_the_verdict_and_every_round() {
    let path = std::env::temp_dir().join(format!("precopy-report-{}.json", std::process::id()));
    let mut run = broken(4);
    run.sabotage = Some(Sabotage::NoDrain);
    run.write_json(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["verified"], false);
    assert_eq!(json["sabotage"], "no-drain");
    assert_eq!(json["format"], "amdv1");
    assert_eq!(json["rounds"].as_array().unwrap().len(), 8);
    assert_eq!(json["rounds"][7]["kind"], "final");
    assert_eq!(json["rounds"][1]["dirty_pages"], 50_200);
    assert_eq!(json["comparison"]["differing_pages"], 2);
    assert_eq!(
        json["comparison"]["first_differing_ranges"][0]["iova_start"],
        4096
    );
    assert_eq!(json["backup"]["increments"][1]["dirty_pages"], 20_000);
    assert_eq!(json["meter"]["looks"].as_array().unwrap().len(), 30);
    assert_eq!(json["meter"]["check"]["missed"], 0);
    assert_eq!(json["prediction"]["rounds"], 6);
    assert_eq!(json["counters"]["iotlb_hits"], 5);
    assert_eq!(json["downtime_us"], run.downtime_us());
}
