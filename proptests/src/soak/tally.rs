//! The counts, and the table at the end.

use std::fmt::Write;
use std::time::Duration;

use dirtymap::space::SpaceStats;
use dirtymap::sync::{AtomicU64, Ordering};

macro_rules! counts {
    ($($name:ident $text:literal),* $(,)?) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Count { $($name),* }

        const TEXTS: &[(Count, &str)] = &[$((Count::$name, $text)),*];
    };
}

counts! {
    DeviceWrites "device writes",
    Faults "device writes that faulted",
    DomainFaults "of these in detached domains",
    CpuWrites "CPU writes marked",
    LateMarks "CPU writes marked too late",
    Maps "areas mapped",
    Unmaps "areas unmapped",
    Discards "unmaps that discard",
    Trims "ranges discarded",
    TrimsFailed "of these not dropped",
    Zeros "pages copied as zeros",
    Batches "batches",
    Cuts "cuts",
    CutsRefused "cuts refused",
    Anywhere "ranges mapped anywhere",
    Attaches "domains attached",
    DetachedBusy "detached while writing",
    Harvests "harvests",
    Holes "harvests up to a hole",
    Peeks "peeks",
    Commits "leases committed",
    Aborts "leases aborted",
    Drops "leases dropped",
    OutsideAborts "aborts past an unmap",
    Bounded "harvests in instalments",
    Joins "consumers that left and came back",
    Copied "of these as a copy of another",
    Cursors "cursors",
    Since "epochs asked for",
    Panicked "calls in which a source panicked",
    Forgotten "leases forgotten",
    ForgottenBytes "bytes of these",
    Pages "pages copied",
    Checkpoints "comparisons",
    Verified "verified writes",
    Lanes "lanes compared that had changed",
}

/// The counts of a run.
pub(super) struct Tally([AtomicU64; TEXTS.len()]);

impl Default for Tally {
    fn default() -> Self {
        Tally(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Tally {
    pub(super) fn add(&self, count: Count, n: u64) {
        // Relaxed: a statistic.
        self.0[count as usize].fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self, count: Count) -> u64 {
        // Relaxed: as in `add`.
        self.0[count as usize].load(Ordering::Relaxed)
    }

    /// Writes so far, of devices and CPUs.
    pub(super) fn writes(&self) -> u64 {
        self.get(Count::DeviceWrites) + self.get(Count::CpuWrites) + self.get(Count::LateMarks)
    }

    /// One line.
    pub(super) fn line(&self, elapsed: Duration) -> String {
        let seconds = elapsed.as_secs_f64();
        format!(
            "{seconds:7.1} s  {:.2} M writes/s  {} maps  {} attaches  {} harvests  \
             {} pages copied  {} comparisons  {} MiB",
            self.writes() as f64 / seconds / 1e6,
            self.get(Count::Maps),
            self.get(Count::Attaches),
            self.get(Count::Harvests),
            self.get(Count::Pages),
            self.get(Count::Checkpoints),
            resident("VmRSS") >> 10,
        )
    }

    /// The table at the end.
    pub(super) fn table(&self, elapsed: Duration, stats: &SpaceStats) -> String {
        let seconds = elapsed.as_secs_f64();
        let mut table = format!("{:34}{:>16}{:>14}\n", "", "all", "a second");
        for (count, text) in TEXTS {
            let n = self.get(*count);
            let _ = writeln!(table, "{text:34}{n:>16}{:>14.0}", n as f64 / seconds);
        }
        let flushes = stats.flush.flushes;
        let _ = writeln!(
            table,
            "{:34}{flushes:>16}{:>14.0}",
            "flushes",
            flushes as f64 / seconds
        );
        let each = flushes as f64 / stats.harvests.max(1) as f64;
        let _ = writeln!(table, "{:34}{each:>16.2}", "flushes per harvest");
        let drained = stats.flush.invalidated.drained;
        let _ = writeln!(table, "{:34}{drained:>16}", "writes drained by flushes");
        let peak = resident("VmHWM");
        let _ = writeln!(table, "{:34}{:>12} MiB", "peak memory", peak >> 10);
        table
    }
}

/// A field of /proc/self/status in KiB, or 0 on systems without that file.
pub(super) fn resident(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|rest| rest.split_whitespace().nth(1));
    number.and_then(|kib| kib.parse().ok()).unwrap_or(0)
}
