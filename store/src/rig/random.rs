//! The operation language of the store, with crashes: long programs, in which a crash is an
//! operation like others. What is recovered is compared, and goes on.
//!
//! It is a language of its own, beside that of `proptests`: no operation of an address space (maps,
//! domains, devices, leaves) has a counterpart here, but for marks and the life of consumers. It is
//! in this crate because the steps of the store can be left out here only.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};

use super::sabotage::{LeftOut, ORDERINGS};
use super::{CONSUMERS, Loss, Op, PAGES, Setup, World};
use crate::disk::Landed;
use crate::step::Step;

/// Lands at random (splitmix64).
struct AtRandom(u64);

impl Landed for AtRandom {
    fn pick(&mut self, ways: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % u64::from(ways)) as u32
    }
}

fn op() -> impl Strategy<Value = Op> {
    let number = 0..CONSUMERS;
    prop_oneof![
        6 => (0..PAGES).prop_map(|page| Op::Write { page }),
        2 => (0..PAGES, 1..4u64).prop_map(|(page, pages)| Op::Begin { page, pages }),
        4 => (0..2usize, 0..PAGES).prop_map(|(handle, page)| Op::BeginBy { handle, page }),
        3 => Just(Op::Land),
        1 => Just(Op::LandNewest),
        2 => (0..PAGES, 1..4u64).prop_map(|(page, pages)| Op::Announce { page, pages }),
        2 => Just(Op::Wait),
        1 => Just(Op::Withdraw),
        2 => number.clone().prop_map(Op::Join),
        1 => number.clone().prop_map(Op::Leave),
        1 => number.clone().prop_map(Op::Rename),
        4 => number.clone().prop_map(Op::Harvest),
        4 => number.clone().prop_map(Op::Copy),
        4 => number.clone().prop_map(Op::Commit),
        1 => number.clone().prop_map(Op::Abort),
        1 => number.prop_map(Op::Drop),
        1 => Just(Op::FlushDevice),
        1 => Just(Op::CloseExtents),
        1 => Just(Op::Grow),
        2 => (0..30u64, 1..30u64).prop_map(|(steps, again)| Op::Crash { steps, again }),
    ]
}

fn setup() -> impl Strategy<Value = Setup> {
    (0..3u32, 1..4u32, 0..5u64).prop_map(|(lg2, hot, room)| Setup {
        pages_of_extent: 1 << lg2,
        hot,
        room,
    })
}

/// Runs a program, with its crashes and one at the end. After each, the recovery crashes, what that
/// leaves is recovered again and compared, and the program goes on.
fn live(setup: Setup, mut ops: &[Op], seed: u64) -> Result<(), Loss> {
    let mut landed = AtRandom(seed);
    let mut world = World::with(setup);
    let mut store = world.create().unwrap();
    loop {
        let run = world.run(&store, ops)?;
        ops = &ops[run..];
        drop(store);
        let again = world.again.unwrap_or(1);
        let found = world.sim.crash(&mut landed);
        found.crash_at(again);
        match world.recover_in(found.clone()) {
            Ok(_) => found.crash_at(u64::MAX),
            Err(_) if found.has_crashed() => {}
            Err(loss) => return Err(loss),
        }
        let found = found.crash(&mut landed);
        (world, store) = world.recover_in(found)?;
        if ops.is_empty() {
            return Ok(());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 50_000, ..ProptestConfig::default() })]

    #[test]
    fn no_life_of_a_store_loses_a_write(
        setup in setup(),
        ops in vec(op(), 1..200),
        seed in any::<u64>(),
    ) {
        let lived = live(setup, &ops, seed);
        prop_assert!(lived.is_ok(), "{lived:?}");
    }
}

/// Without each step, a program at random loses a write: the language reaches each of them.
#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "long without optimisation: `.ci/run prop` runs it"
)]
fn programs_at_random_notice_each_step() {
    let with = (setup(), vec(op(), 1..200), any::<u64>());
    let with_program = Step::ALL.iter().filter(|step| !ORDERINGS.contains(step));
    // A thread that waits for an extent which is closed meanwhile waits for ever.
    for step in with_program.filter(|step| **step != Step::HoldInFlight) {
        let config = ProptestConfig {
            cases: 4000,
            max_shrink_iters: 0,
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(config, random);
        let lives = std::cell::Cell::new(0);
        let restore = LeftOut::new(*step);
        let found = runner.run(&with, |(setup, ops, seed)| {
            lives.set(lives.get() + 1);
            match live(setup, &ops, seed) {
                Err(Loss::Write(what)) => Err(TestCaseError::fail(what)),
                _ => Ok(()),
            }
        });
        drop(restore);
        println!("{step:?} is missed after {} lives", lives.get());
        let lost =
            matches!(&found, Err(TestError::Fail(why, _)) if why.message().starts_with("page"));
        assert!(lost, "{step:?}: {found:?}");
    }
}

/// Lives in which a recovery once lost a write, or the rig asked for too much.
#[test]
fn lives_that_failed_once() {
    use Op::*;
    let w = |page| Write { page };
    let crash = |steps, again| Crash { steps, again };
    let begin = |page, pages| Begin { page, pages };
    #[rustfmt::skip]
    let grows = [
        crash(46, 1), begin(4, 1), w(2), w(2), w(2), w(0), w(2), CloseExtents, w(4), w(0),
        begin(2, 1), CloseExtents, Land, w(0), CloseExtents, Join(1), Leave(1), Join(1),
        crash(49, 1), Harvest(1), Copy(1), w(4), w(0), Grow, Grow, Join(0), Commit(1), FlushDevice,
        Leave(1), w(2), Rename(1), Rename(0), CloseExtents, Grow,
    ];
    #[rustfmt::skip]
    let renamed = [
        crash(5, 8), Join(1), Join(0),
        crash(44, 1), Harvest(0), Rename(0), Harvest(1), Copy(0), w(0), Abort(1), Harvest(1),
        begin(3, 1), Land, begin(3, 1), w(3), begin(2, 3), Commit(0), begin(2, 1), w(0), Harvest(1),
        crash(1, 1), Land,
    ];
    for seed in [0, 12379392151248763213] {
        live(Setup::USUAL, &grows, seed).unwrap();
        live(Setup::USUAL, &renamed, seed).unwrap();
    }
}
