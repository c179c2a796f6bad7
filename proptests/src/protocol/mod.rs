//! The protocols as models small enough to be explored whole: every interleaving of a device and
//! the threads around it.
//!
//! ```text
//!  cases() --> each protocol as it is (must hold), and with each weakness (must lose a write)
//! ```
//!
//! A model has one step for each step of the protocol that other threads can see, and nothing else:
//! no code of the library runs here. It proves completely that the *order of steps* is right. Loom
//! shows the same of the *code*, up to its bounds. The models have no weak memory: each step
//! happens at one point in time.
//!
//! Each model checks that no write is lost, and the promises that are named with it:
//!
//! * `skip`: a device, harvesters that skip subtrees by their accessed bit
//! * `leases`: a device, two harvesters that share a flush queue, commit and abort. An abort puts
//!   back; the copy comes after the sync
//! * `parts`: a device, two harvesters that request different pages of one leaf. Parts of leaves
//! * `unmap`: a device, a harvester, an unmap that returns dirty pages. No reuse before the flush
//! * `ring`: a guest, two harvesters that take its pages out of KVM's ring. The copy comes after
//!   the sync
//! * `consumers`: a device, two consumers that harvest, abort and join. Each consumer is told every
//!   write
//! * `discards`: a device, a discard that may fail, two consumers. A page that was written is never
//!   told as zero
//! * `leaves`: a device, a harvester, a thread that splits and merges leaves
//! * `summary`: two CPUs that mark, two harvesters of which one may fail to record. A page that
//!   cannot be recorded is not cleared
//! * `store`: a writer, a log on disk with its leader, two consumers, crashes. What is durable
//!   survives them
//! * `claims`: a writer with a handle of the store, the leader. A claim keeps its extent open and
//!   its page marked
//!
//! A state is bad if the device has stopped, no thread is in the middle of an operation, nothing is
//! dirty, and the copy differs from the memory. In some models, a state is also bad if a harvest
//! did not report a page that it had to.
//!
//! `cargo run --release -p proptests --bin protocol` prints the table, and for each weakness a
//! shortest path to a lost write.

mod claims;
mod consumers;
mod discards;
mod explore;
mod leases;
mod leaves;
mod machine;
mod parts;
mod ring;
mod skip;
mod store;
mod summary;
mod unmap;

pub use explore::{Loss, Outcome};

/// One model, whole or with one weakness.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The protocol.
    pub model: &'static str,
    /// The step that is left out, swapped or weakened. `None` for the protocol as it is.
    pub weakness: Option<&'static str>,
    run: fn(Option<&'static str>) -> Outcome,
}

impl Case {
    /// Explores every state that can be reached.
    pub fn run(&self) -> Outcome {
        (self.run)(self.weakness)
    }

    /// Whether the outcome is as required: the protocol holds, each weakness loses a write.
    pub fn is_as_expected(&self, outcome: &Outcome) -> bool {
        outcome.loss.is_none() == self.weakness.is_none()
    }
}

/// Every protocol as it is, and with each of its weaknesses.
pub fn cases() -> Vec<Case> {
    type Model = (
        &'static str,
        &'static [&'static str],
        fn(Option<&'static str>) -> Outcome,
    );
    let models: [Model; 11] = [
        ("skip", skip::WEAKNESSES, skip::explore_with),
        ("leases", leases::WEAKNESSES, leases::explore_with),
        ("consumers", consumers::WEAKNESSES, consumers::explore_with),
        ("discards", discards::WEAKNESSES, discards::explore_with),
        ("parts", parts::WEAKNESSES, parts::explore_with),
        ("unmap", unmap::WEAKNESSES, unmap::explore_with),
        ("leaves", leaves::WEAKNESSES, leaves::explore_with),
        ("ring", ring::WEAKNESSES, ring::explore_with),
        ("summary", summary::WEAKNESSES, summary::explore_with),
        ("store", store::WEAKNESSES, store::explore_with),
        ("claims", claims::WEAKNESSES, claims::explore_with),
    ];
    let mut cases = Vec::new();
    for (model, weaknesses, run) in models {
        let whole = std::iter::once(None);
        for weakness in whole.chain(weaknesses.iter().copied().map(Some)) {
            cases.push(Case {
                model,
                weakness,
                run,
            });
        }
    }
    cases
}

/// Tells for each name whether it is the weakness of this run. A name that is missing from the list
/// of its model would never be run.
fn chosen(weakness: Option<&str>, all: &[&str]) -> impl Fn(&str) -> bool {
    move |name| {
        assert!(all.contains(&name), "no weakness is called {name:?}");
        weakness == Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::cases;

    #[test]
    #[cfg_attr(
        debug_assertions,
        ignore = "minutes without optimisation: `.ci/run prop` runs it"
    )]
    fn every_protocol_holds_and_every_weakness_loses_a_write() {
        for case in cases() {
            let outcome = case.run();
            assert!(case.is_as_expected(&outcome), "{case:?}: {outcome:?}");
            // A write that is lost ends the search: 35 states are enough where it takes few steps.
            let least = if case.weakness.is_some() { 20 } else { 50 };
            assert!(outcome.states > least, "{case:?} explored next to nothing");
        }
    }
}
