//! The contract as a checker: real threads record when each write, harvest and abort began and
//! ended. From these records alone, the checker decides whether a write was lost.
//!
//! ```text
//!  write W    |--began--ended--|
//!  harvest H                     |--began--looked--|--sync--|--copied--|--committed or put back--|
//! ```
//!
//! # The rule
//! The rule holds for each consumer by its own harvests, whatever those of others took, copied or
//! put back. Take a write W to a page, and a harvest H that covers the page and began after W
//! ended. Then H reported the page, or another harvest of the same consumer was responsible for it
//! while H looked:
//! * one that *carries* W: it began before H had looked everywhere, reported the page, was not put
//!   back, its sync ended after W began, and its copy has W or something newer of the same writer;
//! * or one that was put back later: it reported the page, and its abort ended after H began.
//!
//! This is stricter than rule 1 of the contract, which a later harvest also satisfies, for example
//! after another write to the page. Here each harvest is judged at its own time.
//!
//! An unmap that returns what is dirty is a harvest of every consumer, and cannot be put back. A
//! lease that is aborted when its area is gone stays responsible, because its pages are counted as
//! outside and its consumer copies them.
//!
//! # Discards
//! A discard is a write, too: every consumer is told. A harvest that was told that a page is zero
//! carries each write that began before the last drop of the page's storage ended, because such a
//! write is part of what was dropped or is reported later. It carries no other write.

mod record;
mod tests;

use std::collections::{BTreeMap, BTreeSet};

/// Nanoseconds since the run began.
pub(crate) type Stamp = u64;

/// The number of writers of a run. Each owns a lane of every page, where it writes growing numbers.
/// The last one discards, and writes to its lane when the storage is dropped.
pub(crate) const WRITERS: usize = 4;

/// One write to one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Write {
    pub(crate) writer: usize,
    pub(crate) page: u64,
    /// The number that was written, which grows with each write of a writer.
    pub(crate) number: u64,
    pub(crate) began: Stamp,
    /// The time at which the call returned.
    pub(crate) ended: Stamp,
}

/// One harvest, or an unmap.
#[derive(Clone, Debug)]
pub(crate) struct Harvest {
    /// The number of its consumer; `None` for an unmap, which is one of every consumer.
    pub(crate) whose: Option<usize>,
    /// The first page, and one past the last.
    pub(crate) covers: (u64, u64),
    pub(crate) began: Stamp,
    /// The time at which it had looked everywhere.
    pub(crate) looked: Stamp,
    /// The pages that it reported.
    pub(crate) reported: BTreeMap<u64, Copied>,
    pub(crate) end: End,
}

/// The copy of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// The number of each writer. Zero stands for a page that was not copied.
    Data([u64; WRITERS]),
    /// The page is zero, and the last drop of its storage ended at this time.
    Zero(Stamp),
}

/// How its lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The sync ended at this time, and the copies came after it.
    Kept(Stamp),
    /// The whole lease was put back, and the abort ended at this time.
    PutBack(Stamp),
}

/// The records of a run.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) writes: Vec<Write>,
    pub(crate) harvests: Vec<Harvest>,
}

/// A write for which no harvest was responsible, while a harvest did not report its page.
#[derive(Debug)]
pub(crate) struct LostWrite {
    pub(crate) write: Write,
    /// The harvest, without its other pages.
    #[expect(dead_code, reason = "shown by a failure")]
    pub(crate) missed_by: Harvest,
}

impl Harvest {
    /// Whether its copy stands for `write`.
    fn carries(&self, write: &Write) -> bool {
        let End::Kept(synced) = self.end else {
            return false;
        };
        let copied = |copied: &Copied| match copied {
            Copied::Data(numbers) => numbers[write.writer] >= write.number,
            Copied::Zero(dropped) => write.began < *dropped,
        };
        // A device may write through a cached translation until the sync ends, so the write only
        // has to begin before that. The copy tells whether it came in time.
        synced > write.began && self.reported.get(&write.page).is_some_and(copied)
    }

    /// Whether it held `write`'s page when `other` looked, and put it back later.
    fn had(&self, write: &Write, other: &Harvest) -> bool {
        match self.end {
            End::PutBack(ended) => {
                self.reported.contains_key(&write.page)
                    && self.began < other.looked
                    && ended > other.began
            }
            End::Kept(_) => false,
        }
    }
}

/// Checks the rule of the [module](self) for each consumer. Returns the number of pairs of a write
/// and a later harvest.
pub(crate) fn check(history: &History) -> Result<u64, Box<LostWrite>> {
    let consumers = history.harvests.iter().filter_map(|harvest| harvest.whose);
    let consumers: BTreeSet<usize> = consumers.collect();
    let each = consumers.into_iter().map(|whose| check_for(history, whose));
    each.sum()
}

fn check_for(history: &History, whose: usize) -> Result<u64, Box<LostWrite>> {
    let mut by_page: BTreeMap<u64, Vec<&Harvest>> = BTreeMap::new();
    let own = |harvest: &&Harvest| harvest.whose.is_none_or(|of| of == whose);
    for harvest in history.harvests.iter().filter(own) {
        for page in harvest.covers.0..harvest.covers.1 {
            by_page.entry(page).or_default().push(harvest);
        }
    }
    for harvests in by_page.values_mut() {
        harvests.sort_by_key(|harvest| harvest.began);
    }
    let mut decided = 0;
    for write in &history.writes {
        let harvests = by_page.get(&write.page).map_or(&[][..], Vec::as_slice);
        // The first harvest that carries the write is responsible for it from its beginning on.
        let carrier = harvests.iter().find(|harvest| harvest.carries(write));
        let later = harvests.partition_point(|harvest| harvest.began <= write.ended);
        for harvest in &harvests[later..] {
            if carrier.is_some_and(|carrier| carrier.began < harvest.looked) {
                decided += 1;
                // The same holds for all harvests that began after the carrier.
                if carrier.is_some_and(|carrier| carrier.began <= harvest.began) {
                    break;
                }
                continue;
            }
            let reported = harvest.reported.contains_key(&write.page);
            if !reported && !harvests.iter().any(|other| other.had(write, harvest)) {
                return Err(Box::new(LostWrite {
                    write: *write,
                    missed_by: Harvest {
                        reported: BTreeMap::new(),
                        ..(*harvest).clone()
                    },
                }));
            }
            decided += 1;
        }
    }
    Ok(decided)
}
