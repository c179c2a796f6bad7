//! Invalidation: the ranges are rounded out to those that commands can name, and reach every device
//! in two rounds.
//!
//! ```text
//!  ranges --Format::REACH--> commands
//!    first round   IOTLBs, and pointers to tables if asked for   until all have acknowledged
//!    second round  TLBs of devices                               until all have acknowledged
//! ```
//!
//! The order of the rounds matters. A device whose own TLB misses asks the IOTLB. If its TLB were
//! emptied first, it could take back an entry with D from the IOTLB, which is emptied only after
//! that, and no later flush would be owed. After the first round no IOTLB has such an entry, and
//! every walk from then on sees the table as the invalidator left it.
//!
//! Both rounds drain the writes in flight. The second one drains those that a device's TLB
//! translated between the two.

use dirtymap::flush::{FlushGather, Invalidated};
use dirtymap::sync::{Arc, Ordering, Step, fence, lock, performs};
use dirtymap::{Granule, IovaRange};

use super::Domain;
use crate::breakage::Breakage;
use crate::error::Error;
use crate::fmt::Format;
use crate::port::{Cache, Order, Port, Receipt};

/// The commands of one invalidation.
struct Job {
    /// The ranges that the commands name; ascending and disjoint.
    ranges: Vec<IovaRange>,
    /// The commands name pointers to tables as well.
    tables: bool,
    /// The bytes that the caller asked for.
    asked: u128,
}

impl Job {
    /// The bytes that one device invalidates.
    fn bytes(&self) -> u128 {
        self.ranges.iter().map(|range| range.len()).sum()
    }
}

impl<F: Format> Domain<F> {
    /// Makes every device drop its whole cache, pointers to tables included, and land its writes in
    /// flight. Waits for every device that is awake.
    pub fn invalidate_all(&self) -> Invalidated {
        let ports = self.hardware.ports();
        self.invalidate_at(&ports, &[IovaRange::ALL], F::PAGE, true)
    }

    /// The same for one device.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] if no device with that number is attached.
    pub fn invalidate_device(&self, number: u32) -> Result<Invalidated, Error> {
        let mut ports = self.hardware.ports();
        ports.retain(|port| port.number == number);
        if ports.is_empty() {
            return Err(Error::NoSuchDevice { number });
        }
        Ok(self.invalidate_at(&ports, &[IovaRange::ALL], F::PAGE, true))
    }

    /// Invalidates the ranges of `gather` at all devices.
    pub(super) fn invalidate_gather(&self, gather: &FlushGather) -> Invalidated {
        let stride = gather.leaves().map_or(F::PAGE, |leaves| leaves.smallest);
        if !gather.tables() {
            let ports = self.hardware.ports();
            return self.invalidate_at(&ports, gather.ranges(), stride, false);
        }
        // One at a time, because the end of a flush covers the tables that were cleared before it
        // began.
        let _tables = lock(&self.tables);
        let table = &self.hardware.table;
        table.flush_begins(gather.ranges());
        let ports = self.hardware.ports();
        let done = self.invalidate_at(&ports, gather.ranges(), stride, true);
        table.flush_ends(gather.ranges());
        done
    }

    /// Makes all devices forget their pointers to tables in `range`, where a leaf replaced a table,
    /// before any operation that begins after the return. Never waits, because no write is in
    /// flight through a table without leaves, and devices answer before they translate.
    pub(super) fn forget_tables(&self, range: IovaRange) {
        let job = self.job(&[range], F::PAGE, true);
        if job.tables && !job.ranges.is_empty() {
            let ports = self.hardware.ports();
            let commands = (job.ranges.len() * ports.len()) as u64;
            self.count(&job, commands);
            self.ask(&ports, Cache::Iotlb { tables: true }, job.ranges);
        }
    }

    /// Makes the devices at `ports` drop their entries for `asked` and land their writes in flight.
    /// Returns when all have done so.
    fn invalidate_at(
        &self,
        ports: &[Arc<Port>],
        asked: &[IovaRange],
        stride: Granule,
        tables: bool,
    ) -> Invalidated {
        let mut done = Invalidated::default();
        let job = self.job(asked, stride, tables);
        if job.ranges.is_empty() {
            return done;
        }
        let mut rounds = [Cache::Iotlb { tables: job.tables }, Cache::DeviceTlb];
        if self.hardware.breakage() == Breakage::DeviceTlbFirst {
            rounds.reverse();
        }
        for cache in rounds {
            let with_tlb: Vec<_>;
            let ports = if cache == Cache::DeviceTlb {
                with_tlb = ports.iter().filter(|p| p.has_tlb).cloned().collect();
                &with_tlb[..]
            } else {
                ports
            };
            let asked = self.ask(ports, cache, job.ranges.clone());
            if performs(Step::AskFence) {
                // SeqCst: F2 of the protocol in `port`, once for all devices; pairs with F1 in
                // `Port::wake`.
                // - If F1 is first, the wait below sees the device awake, and waits for it.
                // - If F2 is first, the device sees the request when it wakes.
                fence(Ordering::SeqCst);
            }
            for (port, receipt) in &asked {
                if let Some(receipt) = receipt {
                    done.add(port.wait(receipt));
                }
            }
            done.commands += (job.ranges.len() * ports.len()) as u64;
            done.bytes = done.bytes.saturating_add(job.bytes() * ports.len() as u128);
        }
        self.count(&job, done.commands);
        done
    }

    /// The commands for `asked`. None if nothing is asked for, or the hardware ignores them.
    fn job(&self, asked: &[IovaRange], stride: Granule, tables: bool) -> Job {
        let breakage = self.hardware.breakage();
        let mut ranges: Vec<IovaRange> = match breakage {
            Breakage::IgnoreInvalidations => Vec::new(),
            Breakage::FlushShortByOnePage => asked.iter().filter_map(but_last_page::<F>).collect(),
            _ => asked
                .iter()
                .map(|range| F::REACH.covering(*range, stride.max(F::PAGE)))
                .collect(),
        };
        ranges.sort_unstable_by_key(|range| range.start());
        // Ranges that were disjoint may overlap once they are rounded out.
        ranges.dedup_by(|next, kept| {
            let joins = next.intersects(*kept);
            if joins && let Ok(hull) = IovaRange::new(kept.start(), kept.last().max(next.last())) {
                *kept = hull;
            }
            joins
        });
        Job {
            ranges,
            tables: tables && breakage != Breakage::SkipNonLeaf,
            asked: asked.iter().map(|range| range.len()).sum(),
        }
    }

    /// Puts an order for `ranges` into the inbox at each of `ports`.
    fn ask<'a>(
        &self,
        ports: &'a [Arc<Port>],
        cache: Cache,
        ranges: Vec<IovaRange>,
    ) -> Vec<(&'a Arc<Port>, Option<Arc<Receipt>>)> {
        let order = Arc::new(Order { ranges, cache });
        ports.iter().map(|port| (port, port.ask(&order))).collect()
    }

    fn count(&self, job: &Job, commands: u64) {
        let mut counts = lock(&self.counts);
        counts.invalidations += 1;
        counts.commands = counts.commands.saturating_add(commands);
        counts.bytes_asked = counts.bytes_asked.saturating_add(job.asked);
        counts.bytes_invalidated = counts.bytes_invalidated.saturating_add(job.bytes());
    }
}

/// `range` without its last page; `None` if it has only one.
fn but_last_page<F: Format>(range: &IovaRange) -> Option<IovaRange> {
    let last = range.last().granule_start(F::PAGE).get().checked_sub(1)?;
    IovaRange::new(range.start(), dirtymap::Iova::new(last)).ok()
}
