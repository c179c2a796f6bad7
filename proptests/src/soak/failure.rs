//! The report of a failure, with the last events at its page.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use dirtymap::IovaRange;
use dirtymap::sync::{Mutex, lock};

use super::layout;

/// Events that are kept for each actor.
const KEPT: usize = 4096;
/// Events of each actor that a report shows.
const SHOWN: usize = 4;

/// The first failure.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    what: String,
    page: Option<u64>,
    /// Threads may hang, so the run does not wait for them.
    hangs: bool,
}

impl Failure {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Failure {
            what: what.into(),
            page: None,
            hangs: false,
        }
    }

    /// An actor does not do `what` in time.
    pub(super) fn hang(what: &str) -> Self {
        Failure {
            hangs: true,
            ..Failure::new(format!("an actor hangs: it does not {what}"))
        }
    }

    /// A call that fails although it must not.
    pub(super) fn call(what: &str, range: IovaRange, error: impl std::fmt::Display) -> Self {
        Failure::new(format!("{what} of {range}: {error}")).at(*layout::pages_of(range).start())
    }

    /// Names the page.
    pub(super) fn at(mut self, page: u64) -> Self {
        self.page = Some(page);
        self
    }

    pub(super) fn hangs(&self) -> bool {
        self.hangs
    }
}

/// One step of an actor that is not a writer.
#[derive(Clone, Copy)]
struct Event {
    at: Duration,
    what: &'static str,
    range: IovaRange,
}

/// The newest events of all actors.
pub(super) struct Events {
    began: Instant,
    rings: Vec<(String, Mutex<VecDeque<Event>>)>,
}

impl Events {
    /// A log for actors of these names.
    pub(super) fn new(names: impl IntoIterator<Item = String>) -> Self {
        Events {
            began: Instant::now(),
            rings: names
                .into_iter()
                .map(|name| (name, Mutex::default()))
                .collect(),
        }
    }

    /// Notes what the actor did to `range`.
    pub(super) fn note(&self, actor: usize, what: &'static str, range: IovaRange) {
        let at = self.began.elapsed();
        let mut ring = lock(&self.rings[actor].1);
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(Event { at, what, range });
    }

    /// The report of `failure`.
    pub(super) fn report(&self, failure: &Failure) -> String {
        let mut lines = vec![format!("FAILED: {}", failure.what)];
        if let Some(page) = failure.page {
            let range = layout::range(page, 1);
            let whose = match layout::slot_of(page) {
                Some(slot) => format!("slot {slot}"),
                None => "an area that is always mapped".into(),
            };
            lines.push(format!(
                "page {page} at {range}, in {whose}; the last events there:"
            ));
            let mut touched = Vec::new();
            for (name, ring) in &self.rings {
                let ring = lock(ring);
                let events = ring
                    .iter()
                    .rev()
                    .filter(|event| event.range.intersects(range));
                touched.extend(events.take(SHOWN).map(|event| (event.at, name, *event)));
            }
            touched.sort_unstable_by_key(|(at, ..)| *at);
            for (at, name, event) in touched {
                let at = at.as_secs_f64();
                lines.push(format!(
                    "  {at:>12.6} s  {name:12} {} {}",
                    event.what, event.range
                ));
            }
        }
        lines.join("\n")
    }
}
