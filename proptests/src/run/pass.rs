//! A pass: a harvest by any call into a bitmap of any form, and the end of its lease, in one step.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dirtymap::harvest::{Aborted, Lineage};
use dirtymap::{Error, IovaRange, UserBitmap};

use super::discards::Contents;
use super::harvest::{Said, said};
use super::image::Fresh;
use super::modes::{call, share_of};
use super::panics::caught;
use super::request::Request;
use super::{Checked, Runner};
use crate::bits::{Buffer, runs_in};
use crate::faults::was_told;
use crate::forms::{Form, Memory};
use crate::op::{Ask, Fate};
use crate::rig::ToldToDie;
use crate::violation::{Rule, Violation, same};

/// The place in the oracle of the lease of the current pass.
const PASS: usize = 2;

/// The result of a harvest and of its lease.
enum End {
    Refused(Error),
    /// A domain panicked on request, half-way through the first area, or anywhere.
    Died {
        /// The first area.
        first: bool,
    },
    Ended(Box<Ended>),
}

struct Ended {
    said: Said,
    /// The runs of the lease, its contents, and its count of dirty granules. `None` if it could
    /// not be flushed.
    synced: Option<(Vec<IovaRange>, Contents, u64)>,
    /// Its lineage after the harvest.
    lineage: Option<Lineage>,
    /// What was copied.
    fresh: Fresh,
    /// Its lineage at its commit.
    end: Option<Lineage>,
    /// Granules that were committed as a part of it.
    committed: u64,
    aborted: Option<Aborted>,
}

impl Runner<'_> {
    pub(super) fn pass(&mut self, ask: &Ask, form: Form, fate: Fate) -> Checked {
        self.pass_range(self.oracle.range_of(ask), ask, form, fate)
    }

    pub(super) fn pass_range(
        &mut self,
        range: IovaRange,
        ask: &Ask,
        form: Form,
        fate: Fate,
    ) -> Checked {
        let buffer = Buffer::new();
        let mut request = self.request(range, ask, &buffer);
        request.before = buffer.cut(request.words);
        let words = request.before.iter();
        let before: Vec<u8> = words.flat_map(|w| w.to_le_bytes()).collect();
        let mut memory = Memory::new(form, &before, usize::from(ask.preset % 8))?;
        let end = self.use_up(&request, ask, memory.bitmap(), fate)?;
        let after = words_of(&memory.image(&before)?);
        match end {
            End::Refused(error) => Self::refused(request, &after, error),
            End::Died { first } => self.died(&request, ask, &after, first),
            End::Ended(ended) => self.check_pass(&mut request, ask, fate, *ended, &after),
        }
    }

    /// Harvests, syncs, copies, and ends the lease. The bitmap can be read after that.
    fn use_up(
        &mut self,
        request: &Request,
        ask: &Ask,
        bitmap: UserBitmap<'_>,
        fate: Fate,
    ) -> Result<End, Violation> {
        let space = self.space;
        let inner = &request.inner;
        let page = self.oracle.alignment();
        let whose = self.oracle.whose(ask);
        let consumer = self.consumers[whose].clone();
        let answer = catch_unwind(AssertUnwindSafe(|| {
            call((space, consumer.as_deref()), inner, ask.mode, page, bitmap)
        }));
        let lease = match answer {
            Ok(Ok(lease)) => lease.partial(),
            Ok(Err(error)) => return Ok(End::Refused(error)),
            Err(panic) if was_told(&*panic) => {
                let first = panic.is::<ToldToDie>();
                return Ok(End::Died { first });
            }
            Err(panic) => resume_unwind(panic),
        };
        let said = said(space, &lease)?;
        let (next, at) = (said.1, said.2.as_ref().map(|(at, _)| *at));
        let mut ended = Ended {
            said,
            lineage: lease.lineage(),
            fresh: Fresh::new(),
            end: None,
            synced: None,
            committed: 0,
            aborted: None,
        };
        let failures = self.world.failures_ahead();
        // A lease that cannot be flushed is dropped.
        let synced = caught(|| lease.sync());
        let panicked = synced.is_err();
        if let Ok(Ok(lease)) = synced {
            let runs: Vec<IovaRange> = lease.runs().collect();
            let contents: Contents = lease.contents().collect();
            self.copy_contents(whose, &contents)?;
            ended.fresh = self.fresh(&contents)?;
            ended.synced = Some((runs, contents, lease.dirty()));
            match fate {
                Fate::Commit => ended.end = lease.commit_epoch().1,
                Fate::Abort => ended.aborted = Some(lease.abort()),
                Fate::CommitRange(part) => {
                    let view = request.view_of(next, at).unwrap_or(request.view);
                    ended.committed = lease.commit_range(share_of(view, part));
                    ended.aborted = Some(lease.abort());
                }
            }
        }
        let failed = ended.synced.is_none();
        let told = self.world.failures_ahead() < failures && !self.hides_failures();
        let told = told || panicked;
        same(Rule::Answer, "whether a sync failed", failed, told)?;
        Ok(End::Ended(Box::new(ended)))
    }

    fn check_pass(
        &mut self,
        request: &mut Request,
        ask: &Ask,
        fate: Fate,
        ended: Ended,
        after: &[u64],
    ) -> Checked {
        let found = self.check_harvest(request, ask, ended.said, after)?;
        self.took(PASS, request, ask, &found);
        let whose = self.oracle.whose(ask);
        let number = self.numbered(whose, ended.lineage)?;
        let inner = request.inner;
        let failed = ended.synced.is_none();
        let granule = inner.granule();
        let view = request.view;
        let inside = |runs: Vec<IovaRange>| request.leased(&runs);
        let leased = inside(runs_in(after, inner.range(), granule));
        if let Some((synced, contents, dirty)) = ended.synced {
            let right: u128 = leased.iter().map(|run| run.granules(granule)).sum();
            same(Rule::Answer, "the granules of a lease", dirty.into(), right)?;
            same(Rule::Answer, "the runs of a lease", &synced, &leased)?;
            self.check_contents(PASS, &contents, &synced)?;
        }
        let set = found.set << granule.lg2();
        self.counts.harvests += 1;
        self.counts.leased_bytes += set;
        let tally = &mut self.tallies[self.oracle.whose(ask)];
        tally.leased += set;
        if !failed && fate == Fate::Commit {
            self.counts.commits += 1;
            self.counts.committed_bytes += set;
            tally.committed += set;
            self.oracle.leases[PASS] = None;
            return self.committed(whose, (number, ended.end), &leased, &ended.fresh);
        }
        let mut gone = BTreeSet::new();
        if let (Fate::CommitRange(part), false) = (fate, failed) {
            if !request.empty {
                gone = self.committed_by(after, inner, view, share_of(view, part));
            }
            let right = gone.len() as u64;
            same(Rule::Answer, "granules committed", ended.committed, right)?;
        }
        let done = set.min((gone.len() as u64) << granule.lg2());
        let open = super::consumer::without(after, inner.range(), granule, &gone);
        let back = request.reached().map(|reached| {
            let open = inside(runs_in(&open, inner.range(), granule));
            let reached = open.iter().filter_map(|run| run.intersection(reached));
            reached.collect()
        });
        let back: Vec<IovaRange> = back.unwrap_or_default();
        let right = self.right_abort(&back, u64::MAX);
        let tally = &mut self.tallies[self.oracle.whose(ask)];
        tally.committed += done;
        tally.aborted += set - done;
        if let Some(aborted) = ended.aborted {
            same(Rule::Answer, "an abort", aborted, right)?;
        }
        self.committed_part(whose, number, &gone, granule.bytes())?;
        self.end_of_parts(whose, number)?;
        self.counts.committed_bytes += done;
        self.counts.aborts += 1;
        self.counts.aborted_bytes += set - done;
        self.counts.put_back_outside_bytes += right.outside_bytes;
        if let Some(leased) = &mut self.oracle.leases[PASS] {
            leased.synced = !failed;
        }
        self.oracle.aborted(PASS, &back);
        Ok(())
    }
}

fn words_of(image: &[u8]) -> Vec<u64> {
    let words = image.as_chunks().0.iter();
    words.map(|word| u64::from_le_bytes(*word)).collect()
}
