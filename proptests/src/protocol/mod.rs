//! The protocols as models small enough to be explored whole: every interleaving of a device and the threads around it.
//!
//! ```text
//!  cases() --> for each protocol: as it is (must hold), and with each single weakness (must lose a write)
//! ```
//!
//! A model has one step for each step of the protocol that others can see, and nothing else: no code of the library runs
//! here. What it shows is that the *order of steps* is right, in full, where loom shows that the *code* is, as far as it
//! gets. It knows no weak memory: each step is one point in time.
//!
//! | model | threads | contract |
//! |---|---|---|
//! | `skip` | a device, a harvester that skips subtrees by their accessed bit | no lost write |
//! | `leases` | a device, two harvesters that share a flush queue, commit and abort | no lost write, abort puts back, copy after sync |
//! | `parts` | a device, two harvesters that ask for different pages of one leaf | no lost write, partial leaves |
//! | `unmap` | a device, a harvester, an unmap that returns what is dirty | no lost write, no reuse before flush |
//! | `ring` | a guest, two harvesters that take its pages out of KVM's ring | no lost write, copy after sync |
//! | `leaves` | a device, a harvester, a thread that splits and merges leaves | no lost write |
//! | `summary` | two CPUs that mark, two harvesters of which one may fail to record | no lost write, nothing is cleared that cannot be recorded |
//! | `store` | a writer, a log on disk, two consumers, crashes | durable means durable |
//!
//! A state is bad if the device has stopped, nobody is in the middle of anything, nothing is dirty any more, and what was
//! copied differs from what is in memory; in some models also if a harvest passed over what it had to report.
//!
//! `cargo run --release -p proptests --bin protocol` prints the table, and for each weakness the shortest way to lose.

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
    /// What is left out, swapped or weakened; `None` for the protocol as it is.
    pub weakness: Option<&'static str>,
    run: fn(Option<&'static str>) -> Outcome,
}

impl Case {
    /// Explores every state that can be reached.
    pub fn run(&self) -> Outcome {
        (self.run)(self.weakness)
    }

    /// Whether the outcome is the one that must be: the protocol holds, each weakness loses.
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
    let models: [Model; 8] = [
        ("skip", skip::WEAKNESSES, skip::explore_with),
        ("leases", leases::WEAKNESSES, leases::explore_with),
        ("parts", parts::WEAKNESSES, parts::explore_with),
        ("unmap", unmap::WEAKNESSES, unmap::explore_with),
        ("leaves", leaves::WEAKNESSES, leaves::explore_with),
        ("ring", ring::WEAKNESSES, ring::explore_with),
        ("summary", summary::WEAKNESSES, summary::explore_with),
        ("store", store::WEAKNESSES, store::explore_with),
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

/// Says of each name whether it is the weakness of this run. A name that is not in the list of its model would never be run.
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
            assert!(outcome.states > 50, "{case:?} explored next to nothing");
        }
    }
}
