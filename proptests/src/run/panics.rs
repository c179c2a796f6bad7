//! A caller's handling of a source's panic: it catches the panic, checks that nothing was lost, and
//! goes on.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::IovaRange;

use super::{Checked, Runner};
use crate::faults::was_told;
use crate::op::Op;
use crate::oracle::Area;
use crate::pages::pages_of;
use crate::violation::{Rule, check};

/// A source panicked on request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panicked;

/// Performs `call`. A requested panic is a result, any other one is raised again.
pub(super) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| match was_told(&*panic) {
        true => Panicked,
        false => resume_unwind(panic),
    })
}

impl Runner<'_> {
    /// A call panicked: areas with an unmap or a split that panicked may be reported as dirty, as a
    /// superset.
    pub(super) fn after_panic(&mut self) {
        for (nth, node) in self.world.nodes.iter().enumerate() {
            for range in node.take_blurred() {
                self.unsure.push(range);
                let areas = self.oracle.areas.values().map(Area::range);
                let touched: Vec<IovaRange> = areas.filter(|a| a.intersects(range)).collect();
                for page in touched.into_iter().flat_map(pages_of) {
                    self.oracle.may_be_dirty(nth, page);
                }
            }
        }
    }

    /// The library may or may not count a flush whose invalidation panicked as failed.
    pub(super) fn count_broken_flushes(&mut self, op: &Op) -> Checked {
        let nodes = self.world.nodes.iter();
        let broken: u64 = nodes.map(|node| node.take_broken_flushes()).sum();
        let (counted, least) = (self.space.stats().flush.failed, self.counts.flush.failed);
        if broken == 0 || self.hides_failures() {
            return Ok(());
        }
        self.counts.flush.failed = counted;
        check(
            (least..=least + broken).contains(&counted),
            Rule::Accounting,
            || format!("{counted} flushes failed, not {least} and {broken} that panicked: {op:?}"),
        )
    }

    /// The debts for `areas`, which are gone, are paid.
    pub(super) fn check_paid(&self, areas: &[Area]) -> Checked {
        let gone: Vec<IovaRange> = areas.iter().map(Area::range).collect();
        for (nth, node) in self.world.nodes.iter().enumerate() {
            let owed = node.owed();
            let left = owed
                .iter()
                .find(|owed| gone.iter().any(|gone| gone.intersects(**owed)));
            check(left.is_none(), Rule::Answer, || {
                format!("domain {nth} was not told to forget {left:?}, which is unmapped")
            })?;
        }
        Ok(())
    }

    /// Nothing is owed in the attached domains.
    pub(super) fn check_all_paid(&self) -> Checked {
        for nth in &self.oracle.attached {
            let owed = self.world.nodes[*nth].owed();
            check(owed.is_empty(), Rule::Accounting, || {
                format!("domain {nth} was never told to forget {owed:?}")
            })?;
        }
        Ok(())
    }
}
