//! No write of any writer is lost, and the pages that an abort puts back are found by the next
//! harvest of any scope.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::collections::BTreeSet;

use clap::Parser;
use dirtymap::{HarvestRequest, Scope, UserBitmap};
use pagetable_sim::Device;

use super::guest::Guest;
use super::machine::{GRANULE, Machine, PAGE, PAGES, SLOTS, pages};
use super::migrate::{Cli, Mode, Sabotage, migrate};
use super::writers::device_writes;
use common_skip::skip;

#[path = "../../../../tests/common_skip/mod.rs"]
mod common_skip;

const MODES: [Mode; 5] = [
    Mode::Clearing,
    Mode::Manual,
    Mode::InitiallySet,
    Mode::Ring,
    Mode::None,
];

fn cli(mode: Mode, sabotage: Option<Sabotage>) -> Cli {
    let cli = Cli::parse_from(["joint", "--rounds", "25"]);
    Cli {
        kvm: mode,
        sabotage,
        ..cli
    }
}

#[test]
fn every_page_is_identical_for_each_writer() {
    for mode in MODES {
        let report = migrate(&cli(mode, None)).unwrap();
        let no_guest = report.no_guest.iter().filter(|_| mode != Mode::None);
        for why in no_guest.chain(&report.no_pagemap) {
            skip(format_args!("{mode:?}: {why}"));
        }
        assert_eq!(report.differing, [0u64; 0], "{mode:?}");
        assert!(report.failed_rounds > 0 && report.aborted_bytes > 0);
    }
}

#[test]
fn a_failed_round_that_is_committed_loses_writes() {
    let report = migrate(&cli(Mode::Manual, Some(Sabotage::CommitFailed))).unwrap();
    assert!(!report.differing.is_empty());
}

/// A machine in which the test is the only writer.
struct Still {
    machine: Machine,
    guest: Option<Guest>,
    device: Device,
}

impl Still {
    fn new(mode: Mode) -> Still {
        let (machine, guest) = Machine::new(mode.kvm(), None).unwrap();
        let device = machine.device();
        let mut still = Still {
            machine,
            guest,
            device,
        };
        // The pages that are dirty at first: all of them in one of the modes.
        still.take(Scope::All, true);
        still
    }

    /// Each writer writes to pages of its own; the granules that this makes dirty.
    fn all_write(&mut self) -> Written {
        let mut written = Written::default();
        if let Some(guest) = &mut self.guest {
            // Both slots.
            guest.write(8, 2, 120).unwrap();
            written.kvm = granules(&[8, 128], 1);
        }
        self.machine.back_end_writes(40, 1);
        self.machine.back_end_writes(400, 1);
        written.vhost = granules(&[40, 400], 1);
        device_writes(&mut self.device, 60, 1).unwrap();
        device_writes(&mut self.device, 300, 1).unwrap();
        self.device.quiesce();
        // Leaves of 32 KiB.
        written.iommu = granules(&[60, 300], 8);
        if self.machine.ids.pagemap.is_some() {
            self.machine.program_writes_quietly(530, 1);
            self.machine.program_writes_quietly(575, 1);
            written.pagemap = granules(&[530, 575], 1);
        }
        self.machine.program_writes(100, 1).unwrap();
        self.machine.program_writes(500, 1).unwrap();
        written.marks = granules(&[100, 500], 1);
        written
    }

    /// Harvests, and commits or aborts.
    fn take(&mut self, scope: Scope, commit: bool) -> BTreeSet<u64> {
        let mut words = [0u64; 3];
        let request = HarvestRequest::new(pages(0, PAGES).unwrap(), GRANULE).in_scope(scope);
        let lease = self
            .machine
            .space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap()
            .sync()
            .unwrap();
        let bit = |at: u64| at >> GRANULE.lg2();
        let taken = lease
            .runs()
            .flat_map(|run| bit(run.start().get())..=bit(run.last().get()))
            .collect();
        match commit {
            true => drop(lease.commit()),
            false => drop(lease.abort()),
        }
        taken
    }

    fn scopes(&self) -> Vec<Scope> {
        let ids = self.machine.ids;
        let ids = [ids.kvm, Some(ids.vhost), Some(ids.iommu), ids.pagemap];
        ids.into_iter().flatten().map(Scope::Domain).collect()
    }
}

/// Pages by writer.
#[derive(Default)]
struct Written {
    kvm: BTreeSet<u64>,
    vhost: BTreeSet<u64>,
    iommu: BTreeSet<u64>,
    pagemap: BTreeSet<u64>,
    marks: BTreeSet<u64>,
}

impl Written {
    fn all(&self) -> BTreeSet<u64> {
        [
            &self.kvm,
            &self.vhost,
            &self.iommu,
            &self.pagemap,
            &self.marks,
        ]
        .into_iter()
        .flatten()
        .copied()
        .collect()
    }

    fn of(&self, machine: &Machine, scope: Scope) -> &BTreeSet<u64> {
        match scope {
            Scope::Domain(id) if id == machine.ids.vhost => &self.vhost,
            Scope::Domain(id) if id == machine.ids.iommu => &self.iommu,
            Scope::Domain(id) if Some(id) == machine.ids.pagemap => &self.pagemap,
            _ => &self.kvm,
        }
    }
}

/// The granules that the leaves of `leaf` pages around some pages touch.
fn granules(written: &[u64], leaf: u64) -> BTreeSet<u64> {
    let first = |page: u64| (page / leaf * leaf * PAGE) >> GRANULE.lg2();
    let last = |page: u64| ((page / leaf + 1) * leaf * PAGE - 1) >> GRANULE.lg2();
    written
        .iter()
        .flat_map(|page| first(*page)..=last(*page))
        .collect()
}

#[test]
fn one_harvest_finds_what_each_wrote_at_granules_and_bases_of_all_kinds() {
    for mode in MODES {
        let mut still = Still::new(mode);
        let written = still.all_write();
        assert_eq!(still.take(Scope::All, true), written.all(), "{mode:?}");
        assert!(still.take(Scope::All, true).is_empty());
        // Each scope alone reports its own pages and no others.
        let written = still.all_write();
        for scope in still.scopes() {
            let found = still.take(scope, true);
            assert_eq!(&found, written.of(&still.machine, scope), "{mode:?}");
        }
        assert_eq!(still.take(Scope::All, true), written.marks);
    }
}

#[test]
fn an_abort_puts_back_into_each_and_into_all() {
    for mode in MODES {
        let mut still = Still::new(mode);
        let written = still.all_write();
        let all = written.all();
        // Twice, because pages that were put back are not where they were before.
        assert_eq!(still.take(Scope::All, false), all, "{mode:?}");
        assert_eq!(still.take(Scope::All, false), all);
        // The harvest covered every scope, so each scope finds all of the pages, once. A harvest of
        // all scopes does too.
        for scope in still.scopes() {
            assert_eq!(still.take(scope, true), all);
            assert!(still.take(scope, true).is_empty());
        }
        assert_eq!(still.take(Scope::All, true), all);
        assert!(still.take(Scope::All, true).is_empty());
    }
}

#[test]
fn an_abort_of_one_alone_is_found_by_it_and_by_all() {
    for mode in MODES {
        for nth in 0..Still::new(mode).scopes().len() {
            for by_all in [false, true] {
                let mut still = Still::new(mode);
                let scope = still.scopes()[nth];
                let written = still.all_write();
                let own = written.of(&still.machine, scope).clone();
                assert_eq!(still.take(scope, false), own);
                if by_all {
                    assert_eq!(still.take(Scope::All, true), written.all());
                    assert!(still.take(scope, true).is_empty());
                } else {
                    assert_eq!(still.take(scope, true), own);
                    let rest: BTreeSet<u64> = written.all().difference(&own).copied().collect();
                    assert_eq!(still.take(Scope::All, true), rest);
                }
            }
        }
    }
}

#[test]
fn a_source_that_goes_with_an_aborted_lease_leaves_its_pages_to_the_others() {
    for mode in MODES {
        let mut still = Still::new(mode);
        let all = still.all_write().all();
        assert_eq!(still.take(Scope::All, false), all);
        let more = {
            still.machine.back_end_writes(4, 2);
            granules(&[4], 1)
        };
        still.machine.space.detach(still.machine.ids.vhost).unwrap();
        let expect: BTreeSet<u64> = all.union(&more).copied().collect();
        assert_eq!(still.take(Scope::All, true), expect, "{mode:?}");
        assert!(still.take(Scope::All, true).is_empty());
    }
}

#[test]
fn the_slots_are_not_made_of_whole_words_and_the_areas_follow_each_other() {
    // The other tests rely on this.
    assert!(SLOTS.iter().any(|(_, _, n)| n % 64 != 0));
    let (machine, _guest) = Machine::new(None, None).unwrap();
    let mappings = machine.space.mappings();
    assert_eq!(mappings.len(), 4);
    assert!(
        mappings
            .windows(2)
            .all(|pair| pair[0].range.last().checked_add(1) == Some(pair[1].range.start()))
    );
}
