//! Benches of `dirtymap` beside its peers.
//!
//! ```text
//!  workloads (fixed seed) --marks--> Peer --harvest--> the caller's bitmap
//!                         --maps---> Areas --lookup--> Mapping
//!                                    compare: a family of workloads, all peers in turn, one table
//! ```
//!
//! A peer is a way to track dirty pages, which implements the traits [`Tracker`] and [`Peer`], or a
//! way to find the area of an address, which implements [`Areas`]. Each has a file of its own in
//! [`peers`]. The tests of this crate check that all peers give the same answers, so that the
//! benches compare the same work.

use std::borrow::Borrow;
use std::hint::black_box;

use compare::ticks;
use dirtymap::{Access, Iova, IovaRange, Mapping};

pub mod compare;
pub mod peers;
pub mod workloads;

#[cfg(test)]
mod tests;

/// The page of all workloads, as a logarithm: 4 KiB.
pub const PAGE_LG2: u32 = 12;
/// The page of all workloads, in bytes.
pub const PAGE: u64 = 1 << PAGE_LG2;

/// One way to track which pages of a memory were written.
///
/// The memory starts at address 0. Callers stay inside it. For other addresses a peer may do
/// anything.
pub trait Tracker: Send + Sync {
    /// Tracks a memory of `pages` pages, all clean.
    fn new(pages: u64) -> Self
    where
        Self: Sized;

    /// The name of the peer in reports.
    fn name(&self) -> &'static str;

    /// Marks the pages of the `len` bytes from `start` on. `len` is not 0.
    fn mark(&self, start: u64, len: u64);

    /// Marks one page.
    #[inline(always)]
    fn mark_page(&self, page: u64) {
        self.mark(page << PAGE_LG2, PAGE);
    }

    /// Marks each of `pages`, in a loop inside of the trait object.
    fn mark_pages(&self, pages: &[u64]) {
        pages.iter().for_each(|page| self.mark_page(*page));
    }

    /// Marks the `len` bytes from each of `starts` on.
    fn mark_ranges(&self, starts: &[u64], len: u64) {
        starts.iter().for_each(|start| self.mark(*start, len));
    }

    /// Marks the page of each bit that is set in `words`.
    fn mark_bits(&self, words: &[u64]) {
        for (base, word) in (0..).step_by(64).zip(words) {
            let mut left = *word;
            while left != 0 {
                self.mark_page(base + u64::from(left.trailing_zeros()));
                left &= left - 1;
            }
        }
    }

    /// Moves all marks into `bitmap`: ORs them in, page `n` at bit `n % 64` of word `n / 64`, and
    /// clears them. Each step that the peer needs before the pages may be copied is included.
    /// `bitmap` has a bit for each page.
    fn harvest_alone(&mut self, bitmap: &mut [u64]);
}

/// A [`Tracker`] that can be harvested while other threads mark.
pub trait Peer: Tracker {
    /// As [`harvest_alone`](Tracker::harvest_alone), beside marks.
    fn harvest(&self, bitmap: &mut [u64]);
}

/// One way to find the area that holds an address.
///
/// A scan and the search for a free place use a snapshot if the peer has one.
pub trait Areas: Send + Sync {
    /// An empty map.
    fn new() -> Self
    where
        Self: Sized;

    /// The name of the peer in reports.
    fn name(&self) -> &'static str;

    /// Adds an area. It overlaps no other one.
    fn map(&self, mapping: Mapping);

    /// Removes the area that is mapped at `range`.
    fn unmap(&self, range: IovaRange);

    /// The area that holds `iova`.
    fn lookup(&self, iova: u64) -> Option<Mapping>;

    /// The lowest free multiple of `len` that is not in the first page. `len` is a power of two of
    /// pages. `None` if the peer can only find and map a place in one step.
    fn first_fit(&self, len: u64) -> Option<IovaRange>;

    /// Maps the place that [`first_fit`](Self::first_fit) finds, as one step. `None` if the peer
    /// has no such step.
    fn map_anywhere(&self, _len: u64) -> Option<IovaRange> {
        None
    }

    /// Visits all areas in order, and returns their [`sum`].
    fn scan(&self) -> u64;

    /// Looks up each of `addresses`, in a loop inside of the trait object, and returns how many
    /// were mapped.
    fn look_up_all(&self, addresses: &[u64]) -> usize {
        let held = addresses
            .iter()
            .filter(|iova| self.lookup(**iova).is_some());
        held.count()
    }

    /// Looks up `addresses`, and returns the ticks of the processor's counter that each lookup
    /// took. Ends early after `limit` ticks.
    fn time_each(&self, addresses: &[u64], limit: u64) -> Vec<u64> {
        let start = ticks::now();
        let time = |iova: &u64| {
            let began = ticks::now();
            black_box(self.lookup(black_box(*iova)));
            let now = ticks::now();
            (now - start < limit).then_some(now - began)
        };
        addresses.iter().map_while(time).collect()
    }

    /// Unmaps each of `mappings` and maps it again.
    fn remap_all(&self, mappings: &[Mapping]) {
        for mapping in mappings {
            self.unmap(mapping.range);
            self.map(*mapping);
        }
    }

    /// The same as one step: no other thread sees only a part of it. Returns whether the peer has
    /// such a step; if not, nothing is done.
    fn remap_batch(&self, _mappings: &[Mapping]) -> bool {
        false
    }
}

/// A number that depends on each of the scanned areas and on their order.
pub fn sum<M: Borrow<Mapping>>(areas: impl IntoIterator<Item = M>) -> u64 {
    areas
        .into_iter()
        .fold(0, |sum, area| add_to_sum(sum, area.borrow()))
}

#[inline]
pub(crate) fn add_to_sum(sum: u64, area: &Mapping) -> u64 {
    let of_area = area.range.start().get() ^ area.range.last().get().rotate_left(17) ^ area.backing;
    sum.rotate_left(1).wrapping_add(of_area)
}

/// First fit by a look at every hole, for peers that only have the areas in order.
pub(crate) struct Fit {
    len: u64,
    start: u64,
}

impl Fit {
    pub(crate) fn of(len: u64) -> Self {
        Fit {
            len,
            start: PAGE.next_multiple_of(len),
        }
    }

    /// Looks at the hole before an area; `Some` ends the search.
    #[inline]
    pub(crate) fn before(&mut self, area: IovaRange) -> Option<()> {
        if self.start + self.len <= area.start().get() {
            return Some(());
        }
        // A power of two.
        let behind = (area.last().get() + self.len) & !(self.len - 1);
        self.start = self.start.max(behind);
        None
    }

    pub(crate) fn place(self) -> IovaRange {
        range_of(self.start, self.start + (self.len - 1))
    }
}

pub(crate) fn range_of(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(first), Iova::new(last))
        .unwrap_or_else(|error| panic!("a workload stays far below 2^64: {error}"))
}

/// An area of a peer that stores only the addresses.
pub(crate) fn unbacked(range: IovaRange) -> Mapping {
    Mapping {
        range,
        backing: 0,
        access: Access::ReadWrite,
    }
}
