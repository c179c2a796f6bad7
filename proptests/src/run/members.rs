//! Named consumers that join and leave, and their counts.

use std::rc::Rc;

use dirtymap::harvest::ConsumerStats;
use dirtymap::sync::{Step, leave_out};
use dirtymap::{AddressSpace, Consumer, Error, IovaRange, Start};

use super::{Checked, Runner, Tally, same_answer};
use crate::op::{Begin, JoinFault, Reach, Sabotage};
use crate::oracle::Told;
use crate::pages::{PAGE, pages};
use crate::violation::{Rule, check, same};

/// The longest name.
const MOST: usize = 255;

/// A step of the library that this thread leaves out, until this is dropped.
pub(super) struct LeftOut(());

impl LeftOut {
    pub(super) fn of(sabotage: Sabotage) -> Self {
        leave_out(match sabotage {
            Sabotage::ForgetConsumer => Some(Step::LeaveToOthers),
            Sabotage::ForgetDebt => Some(Step::CarryDebt),
            Sabotage::DiscardWithoutFlush => Some(Step::FlushAtDiscard),
            Sabotage::ForgetDiscard => Some(Step::TellDiscard),
            Sabotage::ZeroOverData => Some(Step::TakenIsData),
            Sabotage::ForgetMerge => Some(Step::MergeDelta),
            Sabotage::ForgetWhole => Some(Step::TellWhole),
            _ => None,
        });
        LeftOut(())
    }
}

impl Drop for LeftOut {
    fn drop(&mut self) {
        leave_out(None);
    }
}

/// Performs the call.
fn join<'a>(
    space: &'a AddressSpace,
    name: &str,
    range: Option<IovaRange>,
    start: Start<'_>,
) -> Result<Consumer<'a>, Error> {
    match range {
        Some(range) => space.consumer_of(name, range, start),
        None => space.consumer(name, start),
    }
}

impl Runner<'_> {
    pub(super) fn join(
        &mut self,
        whose: usize,
        start: Begin,
        reach: Reach,
        fault: JoinFault,
    ) -> Checked {
        let model = match start {
            Begin::LikeOf(other) if self.consumers[usize::from(other)].is_some() => Some(other),
            _ => None,
        };
        let start = match start {
            Begin::LikeOf(_) if model.is_none() => Begin::Clean,
            start => start,
        };
        let name = match fault {
            JoinFault::NoName => String::new(),
            JoinFault::LongName => "n".repeat(MOST + 1),
            _ => name_of(whose),
        };
        let range = match (fault, reach.range()) {
            (JoinFault::Unaligned, range) => {
                let range = range.unwrap_or(pages(1, 2));
                IovaRange::new(range.start(), (range.last().get() - 1).into()).ok()
            }
            (_, range) => range,
        };
        let twin = self.consumers[whose].is_some();
        let right = match fault {
            JoinFault::NoName | JoinFault::LongName => {
                let len = name.len();
                Err(Error::BadName { len, most: MOST })
            }
            JoinFault::Unaligned => Err(Error::Unaligned {
                range: range.unwrap_or(IovaRange::ALL),
                granule: self.oracle.space_page(),
            }),
            JoinFault::None if twin => Err(Error::ConsumerTwice {
                name: name.clone().into(),
            }),
            JoinFault::None => {
                self.oracle.named = true;
                let leases = model.map(|other| self.oracle.leases_of(other.into()));
                match (model, leases) {
                    (Some(other), Some(leases)) if leases > 0 => Err(Error::ConsumerBusy {
                        name: name_of(other.into()).into(),
                        leases,
                    }),
                    _ => Ok(()),
                }
            }
        };
        let space = self.space;
        let other = model.and_then(|nth| self.consumers[usize::from(nth)].clone());
        let answer = self.stubbornly(|| {
            let start = match (start, &other) {
                (_, Some(other)) => Start::LikeOf(other),
                (Begin::Dirty, _) => Start::Dirty,
                _ => Start::Clean,
            };
            join(space, &name, range, start)
        })?;
        match answer {
            Err(error) => same_answer("a join", Err(error), right)?,
            Ok(consumer) => {
                same_answer("a join", Ok(()), right)?;
                self.consumers[whose] = Some(Rc::new(consumer));
                self.joined(whose, start, reach)?;
            }
        }
        let all = self.consumers.iter().flatten();
        let right = all.map(|consumer| consumer.name().to_owned()).collect();
        let mut listed = self.space.consumers();
        listed.sort_unstable();
        same(Rule::Answer, "the consumers", listed, right)
    }

    /// The consumer has joined: its copy is that of the memory, that of its model, or empty.
    fn joined(&mut self, whose: usize, start: Begin, reach: Reach) -> Checked {
        self.oracle.joined(whose, start, reach);
        self.tallies[whose] = Tally::default();
        self.copies[whose].clear();
        let model = match start {
            Begin::Dirty | Begin::Clean => None,
            Begin::LikeOf(other) => Some(usize::from(other)),
        };
        self.image_of(whose, model, start == Begin::Dirty)?;
        if start == Begin::Dirty {
            return Ok(());
        }
        let areas = self.told_about(0);
        self.copy_for(whose, &areas)?;
        let Some(other) = model else {
            return Ok(());
        };
        // What the model is not told about, the consumer has copied.
        let told: Option<&Told> = self.oracle.consumers[other].as_ref();
        let hears = |page: &u64| told.is_some_and(|told| told.hears(*page));
        let [mine, theirs] = [whose, other].map(|nth| self.copies[nth].clone());
        self.copies[whose] = mine
            .into_iter()
            .filter(|(page, _)| !hears(page))
            .chain(theirs.into_iter().filter(|(page, _)| hears(page)))
            .collect();
        Ok(())
    }

    /// Drops a consumer. Its leases live on.
    pub(super) fn leave(&mut self, whose: usize) {
        if self.consumers[whose].take().is_some() {
            self.oracle.left(whose);
            self.copies[whose].clear();
            self.images[whose] = None;
            self.ledgers[whose] = None;
        }
    }

    /// The counts of each consumer.
    pub(super) fn check_consumers(&self) -> Checked {
        for (whose, consumer) in self.consumers.iter().enumerate() {
            let (Some(consumer), Some(told)) = (consumer, &self.oracle.consumers[whose]) else {
                continue;
            };
            let (stats, tally) = (consumer.stats(), self.tallies[whose]);
            let right = ConsumerStats {
                leases: self.oracle.leases_of(whose),
                leased_bytes: tally.leased,
                committed_bytes: tally.committed,
                aborted_bytes: tally.aborted,
                ..stats
            };
            same(Rule::Accounting, "the counts of a consumer", stats, right)?;
            if told.is_loose {
                continue;
            }
            let may = self.oracle.rounded(told.pending.pages.iter().copied());
            let bounds = told.pending.must.len() as u64..=may.len() as u64;
            let pending = stats.pending_bytes / PAGE;
            check(bounds.contains(&pending), Rule::Accounting, || {
                format!("{pending} pages pending for consumer {whose}, not {bounds:?}")
            })?;
        }
        Ok(())
    }
}

fn name_of(whose: usize) -> String {
    format!("consumer {whose}")
}
