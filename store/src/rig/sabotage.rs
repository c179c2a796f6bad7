//! Each step of the store is left out, and a write must be lost. A rig that does not notice proves
//! nothing.

use super::programs::COPIED;
use super::{Loss, Op, explore, explore_for};
use crate::step::{Step, leave_out};

/// The steps that loom leaves out: orderings and fences.
pub(super) const ORDERINGS: [Step; 8] = [
    Step::PublishWrite,
    Step::SeeWrite,
    Step::PublishOpen,
    Step::SeeOpen,
    Step::ClaimFence,
    Step::LookFence,
    Step::PublishEnd,
    Step::SeeEnd,
];

/// Leaves a step out, and restores the protocol, also when a test panics.
pub(super) struct LeftOut;

impl LeftOut {
    pub(super) fn new(step: Step) -> Self {
        leave_out(Some(step));
        LeftOut
    }
}

impl Drop for LeftOut {
    fn drop(&mut self) {
        leave_out(None);
    }
}

const W0: Op = Op::Write { page: 0 };
const W2: Op = Op::Write { page: 2 };
const BEGIN: Op = Op::Begin { page: 0, pages: 1 };
const HARVEST: Op = Op::Harvest(0);
const COPY: Op = Op::Copy(0);
const COMMIT: Op = Op::Commit(0);
/// Opens the extent of page 0.
const W1: Op = Op::Write { page: 1 };
const CLAIM: Op = Op::BeginBy { handle: 0, page: 0 };

/// A program that loses a write without `step`.
fn program(step: Step) -> &'static [Op] {
    match step {
        Step::FlushBatch => &[W0],
        // The extent is closed, so that the log has the page and nothing else has.
        Step::CopyBeforeCommit => &[W0, Op::CloseExtents, HARVEST, Op::Copy(0), Op::Commit(0)],
        Step::HoldUntilCommit => &[W0, Op::CloseExtents, HARVEST],
        // Each log has room for two batches.
        Step::FlushFolder => &[W0, W2, W0, W2],
        Step::RefuseTorn => &[W0, W2],
        Step::HoldInFlight => &[BEGIN, Op::CloseExtents, Op::Land],
        Step::RecordAtClose => &[W0, W2],
        Step::RecordForAll => &[W0, W2],
        // A page is written again, and its extent closed, between harvest and commit.
        Step::DropHarvestedOnly => &[W0, HARVEST, Op::Copy(0), W0, W2, Op::Commit(0)],
        Step::ReportOpen => &[W0],
        // The write lands after the commit, in an extent that is closed, or whose mark is gone.
        Step::HoldClaimed => &[W1, CLAIM, Op::CloseExtents, HARVEST, COPY, COMMIT, Op::Land],
        Step::PutBackClaimed => &[W1, CLAIM, HARVEST, COPY, COMMIT, Op::Land, Op::CloseExtents],
        _ => &[],
    }
}

/// How a program loses a write without `step`; as a check of the program, it loses none with it.
fn loses_without(step: Step) -> Option<String> {
    // Both consumers have a copy: one of them must not lose what the other one does not.
    let mut both = COPIED.to_vec();
    both.extend([Op::Join(1), Op::Harvest(1), Op::Copy(1), Op::Commit(1)]);
    explore(&both, program(step)).unwrap();
    let _left_out = LeftOut::new(step);
    let write = |loss: &Loss| matches!(loss, Loss::Write(_));
    explore_for(&both, program(step), write).err()
}

#[test]
fn each_step_that_is_left_out_loses_a_write() {
    for step in Step::ALL {
        if ORDERINGS.contains(step) {
            continue;
        }
        let loss = loses_without(*step);
        println!("{step:?}: {loss:?}");
        assert!(loss.is_some(), "nothing is lost without {step:?}");
    }
}

/// docs/sabotage.md has each step, what it does, and the check that notices; and no others.
#[test]
fn the_document_has_every_step_of_the_store() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/sabotage.md");
    // A package of the crate alone has no documents.
    let Ok(text) = std::fs::read_to_string(document) else {
        return;
    };
    let part = text.split_once("## Steps of the store").unwrap().1;
    let part = part.split("\n## ").next().unwrap();
    let listed: Vec<&str> = part
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .collect();
    let expected: Vec<String> = Step::ALL
        .iter()
        .map(|step| {
            let check = if ORDERINGS.contains(step) {
                "loom"
            } else {
                "rig"
            };
            format!("{step:?}` | {} | {check} |", step.what())
        })
        .collect();
    assert_eq!(listed, expected);
}
