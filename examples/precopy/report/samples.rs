//! Made-up records for tests.

use super::*;

const DIRTY: [u64; 8] = [199_005, 50_200, 21_940, 9_310, 4_020, 1_760, 812, 395];

fn round(at: usize, started_ms: u64) -> RoundRecord {
    let dirty_pages = DIRTY[at];
    let full = at == 0;
    RoundRecord {
        round: at as u32,
        kind: match at {
            0 => RoundKind::Full,
            7 => RoundKind::Final,
            _ => RoundKind::Precopy,
        },
        started_ms,
        dirty_pages,
        bytes_copied: dirty_pages * 4096,
        harvest_us: if full { 0 } else { 3_700 + dirty_pages / 256 },
        flush_us: if full { 0 } else { 160 + dirty_pages / 1000 },
        copy_us: dirty_pages * 1_000_000 / 39_642,
        invalidation_commands: if full { 0 } else { 3 },
        dropped_translations: if full { 0 } else { dirty_pages.min(192) },
        drained_writes: if full { 0 } else { at as u64 % 3 },
        dirty_rate_pages_per_s: [
            0.0, 9980.0, 17_300.0, 16_800.0, 17_100.0, 17_350.0, 17_900.0, 18_200.0,
        ][at],
    }
}

fn backup(comparison: Comparison) -> BackupRecord {
    let increments = [DIRTY[0], 20_000, 21_500, 900].into_iter().enumerate();
    let increments = increments.map(|(at, dirty_pages)| IncrementRecord {
        increment: at as u32,
        started_ms: 2_000 * at as u64,
        dirty_pages,
        bytes_copied: dirty_pages * 4096,
        took_us: 1_000 + 2 * dirty_pages,
    });
    BackupRecord {
        increments: increments.collect(),
        comparison,
    }
}

fn meter() -> MeterRecord {
    let looks = (0..30u64).map(|at| LookRecord {
        at_ms: 250 * (at + 1),
        dirty_pages: 2_500 + at % 7 * 100,
        rate_bytes_per_s: 4e7 + at as f64 * 1e5,
        took_us: 3_000,
    });
    let looks: Vec<LookRecord> = looks.collect();
    MeterRecord {
        hottest: vec![AreaRate {
            file: "base/5/16396".to_owned(),
            rate_bytes_per_s: 1.5e7,
        }],
        check: MeterCheck {
            pages: looks.iter().map(|look| look.dirty_pages).sum(),
            ..MeterCheck::default()
        },
        looks,
    }
}

/// A run of eight rounds in which all went well.
pub(crate) fn run() -> RunRecord {
    let mut started_ms = 0;
    let mut rounds: Vec<RoundRecord> = Vec::new();
    for at in 0..DIRTY.len() {
        let record = round(at, started_ms);
        started_ms += 10 + record.copy_us / 1000;
        rounds.push(record);
    }
    let mut comparison = Comparison::default();
    comparison.pages_compared = DIRTY[0];
    comparison.bytes_compared = DIRTY[0] * 4096;
    RunRecord {
        trace: "pgbench.iolog.gz".to_owned(),
        files: 67,
        writes_total: 98_787,
        writes_replayed: 61_204,
        pages: DIRTY[0],
        format: TableFormat::AmdV1,
        page_size: 4096,
        devices: 3,
        cpus: 2,
        seed: 1,
        speed: Some(3.6),
        bandwidth_bytes_per_s: Some(162_000_000.0),
        sabotage: None,
        migration_ms: started_ms,
        rounds,
        backup: backup(comparison.clone()),
        comparison,
        meter: meter(),
        prediction: Some(PredictionRecord {
            rounds: 6,
            downtime_us: 41_000,
            migration_ms: 7_900,
            converges: true,
        }),
        counters: BTreeMap::from([("dma_bytes", 1_000), ("iotlb_hits", 5)]),
    }
}
