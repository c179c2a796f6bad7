//! Large programs with crashes at random, also in the middle of a recovery: what is recovered is
//! checked, and goes on.

use proptest::collection::vec;
use proptest::prelude::*;

use super::{Op, PAGES, World};
use crate::disk::Landed;

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
    let number = 0..2usize;
    prop_oneof![
        6 => (0..PAGES).prop_map(|page| Op::Write { page }),
        2 => (0..PAGES, 1..4u64).prop_map(|(page, pages)| Op::Begin { page, pages }),
        3 => Just(Op::Land),
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
    ]
}

/// A program, the step at which it crashes, and the step of the recovery at which that crashes,
/// too.
fn life() -> impl Strategy<Value = (Vec<Op>, u64, u64)> {
    (vec(op(), 1..60), 1..150u64, 1..30u64)
}

proptest! {
    #[test]
    fn no_life_of_a_store_loses_a_write(lives in vec(life(), 1..6), seed in any::<u64>()) {
        let mut landed = AtRandom(seed);
        let mut world = World::new();
        let mut store = world.create().unwrap();
        for (program, crash, again) in lives {
            let sim = world.sim.clone();
            sim.crash_at(sim.steps() + crash);
            world.run(&store, &program);
            drop(store);
            // The recovery crashes, and what it leaves is recovered again.
            let found = world.sim.crash(&mut landed);
            found.crash_at(again);
            let found = if world.recover_in(found.clone()).is_ok() {
                found.crash_at(u64::MAX);
                found
            } else {
                prop_assert!(found.has_crashed(), "{:?}", world.recover_in(found));
                found
            };
            let found = found.crash(&mut landed);
            let recovered = world.recover_in(found);
            prop_assert!(recovered.is_ok(), "{:?}", recovered);
            (world, store) = recovered.unwrap();
        }
    }
}
