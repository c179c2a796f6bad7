//! A breadth-first search through all states, so that the path to a bad state is a shortest one.

use std::collections::HashMap;
use std::hash::Hash;

/// The result of an exploration.
#[derive(Debug)]
pub struct Outcome {
    /// The number of states that were reached, up to the first bad one.
    pub states: usize,
    /// The first bad state, if there is one.
    pub loss: Option<Loss>,
}

/// A way to lose a write.
#[derive(Debug)]
pub struct Loss {
    /// The steps from the beginning.
    pub steps: Vec<&'static str>,
    /// The bad state.
    pub state: String,
}

/// The states that follow a state, each with the name of the step.
pub(super) struct Steps<S>(Vec<(&'static str, S)>);

impl<S> Steps<S> {
    /// `state` follows by the step `name`.
    pub(super) fn push(&mut self, name: &'static str, state: S) {
        self.0.push((name, state));
    }
}

/// Explores all states that `next` reaches from `first`, until one is `lost`.
pub(super) fn explore<S: Copy + Eq + Hash + std::fmt::Debug>(
    first: S,
    next: impl Fn(&S, &mut Steps<S>),
    lost: impl Fn(&S) -> bool,
) -> Outcome {
    let mut states = vec![first];
    // For each state its first predecessor, by number, and the step from there.
    let mut reached = vec![(0, "")];
    let mut numbers = HashMap::from([(first, 0)]);
    let mut steps = Steps(Vec::new());
    let mut at = 0;
    while at < states.len() {
        let state = states[at];
        if lost(&state) {
            let mut way = Vec::new();
            let mut number = at;
            while number != 0 {
                way.push(reached[number].1);
                number = reached[number].0;
            }
            way.reverse();
            return Outcome {
                states: states.len(),
                loss: Some(Loss {
                    steps: way,
                    state: format!("{state:?}"),
                }),
            };
        }
        next(&state, &mut steps);
        for (name, following) in steps.0.drain(..) {
            numbers.entry(following).or_insert_with(|| {
                states.push(following);
                reached.push((at, name));
                states.len() - 1
            });
        }
        at += 1;
    }
    Outcome {
        states: states.len(),
        loss: None,
    }
}
