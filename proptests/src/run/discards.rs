//! Discards, and the contents of leases.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::harvest::{Content, Discarded};
use dirtymap::{Error, Iova, IovaRange};

use super::panics::{Panicked, caught};
use super::{Checked, Runner, broken, same_answer};
use crate::forms::Form;
use crate::op::{Ask, Fate, Meanwhile, Place, Storage};
use crate::pages::{PAGE, pages, pages_of, pieces};
use crate::violation::{Rule, check, same};

/// The runs of a lease, each with its contents.
pub(super) type Contents = Vec<(IovaRange, Content)>;

/// The error of storage that cannot be dropped.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("this storage cannot be dropped")]
struct CannotDrop;

impl Runner<'_> {
    pub(super) fn discard(
        &mut self,
        at: Place,
        count: u16,
        ragged: bool,
        (storage, meanwhile): (Storage, Meanwhile),
    ) -> Checked {
        let start = Iova::new(self.oracle.address_of(at));
        let len = u64::from(count) * PAGE - if ragged { 100 } else { 0 };
        let Ok(range) = IovaRange::from_len(start, len) else {
            return Ok(());
        };
        let space = self.space;
        if let Some(hole) = self.oracle.hole_in(range) {
            self.counts.outside_marks += 1;
            let at = hole.max(start);
            let answer = space.discard(range, || Ok(())).map(|_| ());
            return same_answer("a discard of a hole", answer, Err(Error::Outside { at }));
        }
        let whole = self.oracle.whole_in(range);
        self.oracle.named = true;
        let failures = self.world.failures_ahead();
        let stops = self.stops_in(&whole);
        let mut inner: Option<(Checked, u64)> = None;
        let answer = caught_or(storage, || {
            space.discard(range, || {
                // A harvest in the closure may fail as well.
                let ahead = self.world.failures_ahead();
                self.oracle.discard_takes(range, &whole);
                let done = self.drop_storage(range, &whole, storage, meanwhile);
                let failed = done.is_err();
                inner = Some((done, ahead));
                match storage {
                    Storage::Fails if !failed => Err(std::io::Error::other(CannotDrop)),
                    Storage::Panics if !failed => resume_unwind(Box::new(CannotDrop)),
                    _ => Ok(()),
                }
            })
        });
        let dropped = inner.is_some();
        let (done, ahead) = inner.unwrap_or_else(|| (Ok(()), self.world.failures_ahead()));
        done?;
        let told = ahead < failures && !self.hides_failures();
        let right = Discarded {
            zero_bytes: whole.iter().map(|part| part.len()).sum(),
            dirty_bytes: 0,
        };
        let right = Discarded {
            dirty_bytes: range.len() - right.zero_bytes,
            ..right
        };
        let is_zero = match answer {
            Ended::Answered(Ok(done)) => {
                same(Rule::Answer, "a discard", done, right)?;
                same(Rule::Answer, "whether a discard failed", false, told)?;
                check(dropped && storage == Storage::Drops, Rule::Answer, || {
                    format!("a discard of storage that {storage:?} did not fail")
                })?;
                true
            }
            Ended::Answered(Err(error)) if dropped => {
                let error = Err(error);
                let right = std::io::Error::other(CannotDrop);
                let right = Error::NotDropped {
                    range,
                    error: right,
                };
                same_answer("a discard", error, Err(right))?;
                check(storage == Storage::Fails, Rule::Answer, || {
                    format!("a discard of storage that {storage:?} failed")
                })?;
                false
            }
            Ended::Answered(Err(error)) => {
                check(told || stops, Rule::Answer, || {
                    format!("a discard failed for no reason: {error}")
                })?;
                false
            }
            Ended::StoragePanicked => {
                let right = dropped && storage == Storage::Panics;
                same(Rule::Answer, "whether the closure panics", true, right)?;
                false
            }
            Ended::SourcePanicked => {
                same(
                    Rule::Answer,
                    "whether the storage was dropped",
                    dropped,
                    false,
                )?;
                self.after_panic();
                false
            }
        };
        self.oracle.discarded(range, &whole, is_zero);
        self.peek_everything()
    }

    /// The closure of a discard: drops the storage, or half of it.
    fn drop_storage(
        &mut self,
        range: IovaRange,
        whole: &[IovaRange],
        storage: Storage,
        meanwhile: Meanwhile,
    ) -> Checked {
        self.meanwhile(range, meanwhile, true)?;
        let len = match storage {
            Storage::Drops => range.len() as usize,
            Storage::Fails | Storage::Panics => range.len() as usize / 2,
        };
        for (at, piece) in pieces(range.start().get(), len) {
            let is_whole = whole.iter().any(|part| part.contains(Iova::new(at)));
            if !is_whole {
                // The discard waits for writes in flight to whole pages only.
                self.world.settle(None, Iova::new(at), piece.len());
            }
            let Some(phys) = self.phys(at) else { continue };
            if self.oracle.memory.contains_key(&(phys / PAGE)) {
                let zeros = [0; PAGE as usize];
                let memory = &self.world.memory;
                memory.write(phys, &zeros[..piece.len()]).map_err(broken)?;
                self.oracle.drop_storage(at, piece.len());
            }
        }
        self.meanwhile(range, meanwhile, false)
    }

    /// What happens while the discard is at work, before or after the drop.
    fn meanwhile(&mut self, range: IovaRange, what: Meanwhile, before: bool) -> Checked {
        let at = |page: u8| (range.start().get() / PAGE + u64::from(page)) * PAGE + 8;
        match what {
            Meanwhile::Mark { page, early } if early == before => {
                let at = Iova::new(at(page).max(range.start().get()));
                let Ok(range) = IovaRange::from_len(at, 8) else {
                    return Ok(());
                };
                let bytes = self.fresh_bytes(8);
                if self.oracle.hole_in(range).is_some() {
                    return Ok(());
                }
                self.store(range, &bytes, self.marks())?;
                match self.marks() {
                    true => same_answer("a mark in a discard", self.space.mark(range), Ok(())),
                    false => Ok(()),
                }
            }
            Meanwhile::Write { device, page } if !before => self.dma_write_at(device, at(page), 8),
            Meanwhile::Pass { whose, fate, early } if early == before => {
                let ask = Ask {
                    holes: dirtymap::Holes::Skip,
                    ..Ask::EVERYTHING.by(whose)
                };
                self.pass_over(range.round_out(self.oracle.alignment()), &ask, fate)
            }
            _ => Ok(()),
        }
    }

    fn pass_over(&mut self, range: IovaRange, ask: &Ask, fate: Fate) -> Checked {
        let told = self.oracle.consumers[self.oracle.whose(ask)].as_ref();
        let within = told.and_then(|told| told.range).unwrap_or(IovaRange::ALL);
        match range.intersection(within) {
            Some(range) => self.pass_range(range, ask, Form::Words, fate),
            None => Ok(()),
        }
    }

    /// Whether a source was told to stop in one of `parts`.
    fn stops_in(&self, parts: &[IovaRange]) -> bool {
        let domains = self.oracle.attached.iter();
        let mut stops = domains.filter_map(|nth| self.world.nodes[*nth].stop());
        stops.any(|at| parts.iter().any(|part| part.contains(at)))
    }

    /// Checks the contents of the lease in the place `nth` of the oracle, which has these runs.
    pub(super) fn check_contents(
        &self,
        nth: usize,
        contents: &Contents,
        right: &[IovaRange],
    ) -> Checked {
        let mut runs: Vec<IovaRange> = Vec::new();
        let mut last: Option<Content> = None;
        for (part, content) in contents.iter().copied() {
            match runs.last_mut() {
                Some(run) if run.last().checked_add(1) == Some(part.start()) => {
                    check(last != Some(content), Rule::Answer, || {
                        format!("two parts with {content:?} touch at {part}")
                    })?;
                    *run = IovaRange::new(run.start(), part.last()).unwrap_or(part);
                }
                _ => runs.push(part),
            }
            last = Some(content);
            for page in pages_of(part) {
                let (may, must) = self.oracle.is_zero(nth, page);
                let at = pages(page, page).start();
                check(content == Content::Data || may, Rule::Lost, || {
                    format!("page {at}, which has data, was called zero")
                })?;
                check(content == Content::Zero || !must, Rule::Excess, || {
                    format!("page {at}, which is zero, was called data")
                })?;
            }
        }
        let runs = runs.as_slice();
        same(Rule::Answer, "the runs of the contents", runs, right)
    }
}

/// The end of a discard.
enum Ended {
    Answered(Result<Discarded, Error>),
    StoragePanicked,
    SourcePanicked,
}

fn caught_or(storage: Storage, call: impl FnOnce() -> Result<Discarded, Error>) -> Ended {
    let answer = catch_unwind(AssertUnwindSafe(|| caught(call)));
    match answer {
        Ok(Ok(answer)) => Ended::Answered(answer),
        Ok(Err(Panicked)) => Ended::SourcePanicked,
        Err(panic) if storage == Storage::Panics && panic.is::<CannotDrop>() => {
            Ended::StoragePanicked
        }
        Err(panic) => resume_unwind(panic),
    }
}
