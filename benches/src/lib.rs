//! Benches of `dirtymap` beside its peers.
//!
//! ```text
//!  workloads (fixed seed) --marks--> Peer --harvest--> the caller's bitmap
//!                         --maps---> Areas --lookup--> Mapping
//! ```
//!
//! A peer is one way to track dirty pages, behind the trait [`Peer`], or one way to find the area of an address, behind
//! [`Areas`]; each has a file of its own in [`peers`]. The tests of this crate check that all peers give the same
//! answers, so that the benches compare the same work.

use dirtymap::{IovaRange, Mapping};

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
/// The memory starts at address 0. Callers stay inside it; what a peer does with other addresses is its own business.
pub trait Peer: Send + Sync {
    /// Tracks a memory of `pages` pages, all clean.
    fn new(pages: u64) -> Self
    where
        Self: Sized;

    /// The name of the peer in reports.
    fn name(&self) -> &'static str;

    /// Marks the pages that the `len` bytes from `start` on touch. `len` is not 0.
    fn mark(&self, start: u64, len: u64);

    /// Marks one page.
    #[inline]
    fn mark_page(&self, page: u64) {
        self.mark(page << PAGE_LG2, PAGE);
    }

    /// Moves all marks into `bitmap`: ORs them in, page `n` at bit `n % 64` of word `n / 64`, and clears them. Whatever
    /// the peer needs before the pages may be copied is part of it. `bitmap` has a bit for each page.
    fn harvest(&self, bitmap: &mut [u64]);
}

/// One way to find the area that holds an address.
pub trait Areas: Send + Sync {
    /// No areas.
    fn new() -> Self
    where
        Self: Sized;

    /// The name of the peer in reports.
    fn name(&self) -> &'static str;

    /// Adds an area. It overlaps no other one.
    fn map(&self, mapping: Mapping);

    /// The area that holds `iova`.
    fn lookup(&self, iova: u64) -> Option<Mapping>;
}

/// One way to find free addresses: [`Areas`] that choose them.
pub trait Allocator: Areas {
    /// Maps `len` bytes, a power of two of pages, at the lowest free multiple of `len` that is not in the first page.
    fn allocate(&self, len: u64) -> IovaRange;

    /// Unmaps what was allocated.
    fn free(&self, range: IovaRange);
}
