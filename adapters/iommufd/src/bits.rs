//! Pages that the kernel has reported, and forgotten by that, until a lease records them.

use std::collections::TryReserveError;

use dirtymap::{Granule, Iova, IovaRange, LeafSink, Sink, Stopped};

/// One bit for each page of a range.
#[derive(Debug)]
pub(crate) struct Pending {
    range: IovaRange,
    page: Granule,
    words: Vec<u64>,
}

impl Pending {
    /// Clean pages of `range`, which is made of whole pages.
    pub(crate) fn new(range: IovaRange, page: Granule) -> Result<Self, TryReserveError> {
        // No memory holds `usize::MAX` words.
        let len = usize::try_from(range.granules(page).div_ceil(64)).unwrap_or(usize::MAX);
        let mut words = Vec::new();
        words.try_reserve_exact(len)?;
        words.resize(len, 0);
        Ok(Pending { range, page, words })
    }

    /// How many words the bits of all pages fill.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// Adds the pages of `log`, whose bit 0 is the first page. Bits after the last page are no
    /// pages.
    pub(crate) fn add(&mut self, log: &[u64]) {
        for (mine, new) in self.words.iter_mut().zip(log) {
            *mine |= new;
        }
        let pages = self.number(self.range.last()) + 1;
        if let (Some(last), used @ 1..) = (self.words.last_mut(), pages % 64) {
            *last &= (1 << used) - 1;
        }
    }

    /// Adds the pages that `range` touches, as far as it lies inside.
    pub(crate) fn add_range(&mut self, range: IovaRange) {
        self.change(range, |word, mask| *word |= mask);
    }

    /// Adds all pages.
    pub(crate) fn add_all(&mut self) {
        self.add_range(self.range);
    }

    /// Forgets all pages.
    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Hands the pages of `range` to `out`, and forgets each when it is recorded.
    pub(crate) fn take(
        &mut self,
        range: IovaRange,
        out: &mut LeafSink<'_, '_>,
    ) -> Result<(), Stopped> {
        let mut from = range.intersection(self.range).map(IovaRange::start);
        while let Some(run) = from.and_then(|from| self.next_run(from, range.last())) {
            let page = self.page;
            let to_clear = out.take_run(run, page, |page| {
                self.forget(page);
                true
            })?;
            if let Some(recorded) = to_clear.range() {
                self.forget(recorded);
            }
            from = run.last().checked_add(1);
        }
        Ok(())
    }

    /// Records the pages of `range`, and keeps them.
    pub(crate) fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        let mut from = range.intersection(self.range).map(IovaRange::start);
        while let Some(run) = from.and_then(|from| self.next_run(from, range.last())) {
            let at = run.start().max(range.start());
            sink.record(run).map_err(|error| Stopped { at, error })?;
            from = run.last().checked_add(1);
        }
        Ok(())
    }

    /// Tells `each` all pages, and forgets them.
    pub(crate) fn drain(&mut self, each: &mut dyn FnMut(IovaRange)) {
        let mut from = Some(self.range.start());
        while let Some(run) = from.and_then(|from| self.next_run(from, self.range.last())) {
            self.forget(run);
            each(run);
            from = run.last().checked_add(1);
        }
    }

    /// The first run of whole pages that touches `from` to `last`. It ends with the page of `last`.
    fn next_run(&self, from: Iova, last: Iova) -> Option<IovaRange> {
        if !self.range.contains(from) {
            return None;
        }
        let end = self.number(last.min(self.range.last()));
        let first = self.next_where(self.number(from), end, 0)?;
        let after = self.next_where(first, end, u64::MAX);
        let last = after.map_or(end, |clear| clear - 1);
        let start = self.range.start().get();
        let page_last = Iova::new(start + (last << self.page.lg2())).granule_last(self.page);
        IovaRange::new(Iova::new(start + (first << self.page.lg2())), page_last).ok()
    }

    /// The first bit from `first` to `last` that differs from those of `skip`.
    fn next_where(&self, first: u64, last: u64, skip: u64) -> Option<u64> {
        let mut word = first / 64;
        let mut differs = (self.words.get(word as usize)? ^ skip) & (u64::MAX << (first % 64));
        while differs == 0 {
            word += 1;
            if word > last / 64 {
                return None;
            }
            differs = self.words.get(word as usize)? ^ skip;
        }
        let found = word * 64 + u64::from(differs.trailing_zeros());
        (found <= last).then_some(found)
    }

    fn forget(&mut self, range: IovaRange) {
        self.change(range, |word, mask| *word &= !mask);
    }

    /// Changes the bits of the pages that `range` touches, word by word.
    fn change(&mut self, range: IovaRange, change: impl Fn(&mut u64, u64)) {
        let Some(inside) = range.intersection(self.range) else {
            return;
        };
        let (first, last) = (self.number(inside.start()), self.number(inside.last()));
        for nth in first / 64..=last / 64 {
            let low = first.saturating_sub(nth * 64).min(63);
            let high = (last - nth * 64).min(63);
            if let Some(word) = self.words.get_mut(nth as usize) {
                change(word, (u64::MAX << low) & (u64::MAX >> (63 - high)));
            }
        }
    }

    fn number(&self, iova: Iova) -> u64 {
        (iova.get() - self.range.start().get()) >> self.page.lg2()
    }
}
