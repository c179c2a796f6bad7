//! Random programs, on worlds without faults.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::watch::run_watched;
use crate::{Config, Op};

/// A program's steps; each is decoded from bytes of its own, so that a failing program shrinks step
/// by step.
pub(crate) fn ops(count: usize) -> impl Strategy<Value = Vec<Op>> {
    let op = any::<[u8; 12]>().prop_map(|bytes| Op::decode(&mut bytes.into_iter()).unwrap());
    vec(op, 0..count)
}

fn config() -> impl Strategy<Value = Config> {
    any::<[u8; 4]>().prop_map(|bytes| Config::decode(&mut bytes.into_iter()).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    /// All promises at once: no write is lost, harvests are tight, bitmaps stay whole, counts add
    /// up, refusals change nothing.
    #[test]
    fn programs_keep_every_promise(config in config(), ops in ops(60)) {
        run_watched(&ops, &config)?;
    }
}

proptest! {
    // Each program is as long as seven of the others.
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases.div_ceil(4),
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    })]

    /// Long programs, in which leases overlap and debts accumulate.
    #[test]
    fn long_programs_keep_every_promise(config in config(), ops in ops(400)) {
        run_watched(&ops, &config)?;
    }
}
