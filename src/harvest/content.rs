//! The contents of a lease: which of its runs have data to copy, and which read as zero.

use std::collections::VecDeque;
use std::iter::FusedIterator;

use super::lease::{Lease, Synced};
use crate::bitmap::Runs;
use crate::error::BitmapError;
use crate::ranges::without;
use crate::space::AddressSpace;
use crate::units::{Iova, IovaRange};

/// Pages that are looked at together, as a logarithm.
const PIECE_LG2: u32 = 15;

/// The contents of a run of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Bytes to copy.
    Data,
    /// Zeros: the run was [discarded](AddressSpace::discard), and not written since.
    Zero,
}

impl<'a> Lease<'a, Synced> {
    /// The [`runs`](Self::runs), each with its contents, in ascending order. Neighbours differ in
    /// their contents or do not touch.
    ///
    /// A page is zero if its storage was dropped after every write that the lease reports. The
    /// iterator decides this when it comes to the page, and not at the harvest. So a page may be
    /// zero because of a discard that came after the harvest, and a page that was written after the
    /// harvest may still be zero. The next lease reports both.
    ///
    /// A consumer that ignores this and copies all [`runs`](Self::runs) copies zeros. A lease of
    /// one [domain](crate::Scope), of an area that has gone since the harvest began, and of a space
    /// that does not track everything at the moment, has data only.
    ///
    /// With a granule of several pages, a granule may have runs of both contents.
    /// [`commit_range`](Self::commit_range) counts whole granules, so commit such runs together.
    ///
    /// Never blocks, and allocates a little for each run. Looks at 32768 pages at a time.
    ///
    /// ```
    /// use dirtymap::harvest::Content;
    /// use dirtymap::{Access, AddressSpace, Granule};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.discard(0x3000..0x6000, || Ok(()))?; // the closure punches a hole
    /// let lease = space.rounds().next()?;
    /// for (run, content) in lease.contents() {
    ///     match content {
    ///         Content::Data => unreachable!("read the bytes of {run}, and send them"),
    ///         Content::Zero => assert_eq!(run.len(), 0x3000), // send its address and length
    ///     }
    /// }
    /// lease.commit();
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "block_status")]
    #[doc(alias = "fiemap")]
    pub fn contents(&self) -> Contents<'_> {
        let (space, begun) = self.for_contents();
        Contents {
            runs: self.runs(),
            space,
            begun,
            run: None,
            ready: VecDeque::new(),
        }
    }
}

/// The runs of a lease with their contents: see [`Lease::contents`].
#[derive(Debug)]
pub struct Contents<'l> {
    runs: Runs<'l>,
    /// `None` if all runs of the lease are data.
    space: Option<&'l AddressSpace>,
    /// The version of the tree at the beginning of the harvest.
    begun: u64,
    /// What is left of a run.
    run: Option<IovaRange>,
    /// Parts that were looked at.
    ready: VecDeque<(IovaRange, Content)>,
}

impl Contents<'_> {
    /// The error of the first window of the bitmap that could not be read: see [`Runs::error`].
    pub fn error(&self) -> Option<&BitmapError> {
        self.runs.error()
    }

    /// Looks at the next piece of the run; false if there is none.
    fn look(&mut self) -> bool {
        let Some(run) = self.run.take() else {
            return false;
        };
        let Some(space) = self.space else {
            self.ready.push_back((run, Content::Data));
            return true;
        };
        let bytes = 1u64.checked_shl(PIECE_LG2 + u32::from(space.page().lg2()));
        let last = bytes.and_then(|bytes| run.start().checked_add(bytes - 1));
        let last = last.map_or(run.last(), |last| last.min(run.last()));
        let piece = IovaRange::ascending(run.start(), last);
        self.run = last
            .checked_add(1)
            .filter(|above| *above <= run.last())
            .map(|above| IovaRange::ascending(above, run.last()));
        let zero = space.zero_parts(piece, self.begun);
        let mut data = without(piece, zero.iter().copied()).peekable();
        let mut zero = zero.iter().copied().peekable();
        let start = |run: Option<&IovaRange>| run.map_or(Iova::MAX, |run| run.start());
        loop {
            let zero_is_next = data.peek().is_none() || start(zero.peek()) < start(data.peek());
            let (next, content) = match zero_is_next {
                true => (zero.next(), Content::Zero),
                false => (data.next(), Content::Data),
            };
            match next {
                Some(part) => self.ready.push_back((part, content)),
                None => return true,
            }
        }
    }
}

impl Iterator for Contents<'_> {
    type Item = (IovaRange, Content);

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            if self.run.is_none() {
                self.run = Some(self.runs.next()?);
            }
            self.look();
        }
        let (mut part, content) = self.ready.pop_front()?;
        while !self.ready.is_empty() || self.look() {
            // Pieces of one run touch, and those of two runs do not.
            let Some((above, _)) = self.ready.front().filter(|(_, other)| *other == content) else {
                break;
            };
            let Some(both) = part.joined(*above) else {
                break;
            };
            part = both;
            self.ready.pop_front();
        }
        Some((part, content))
    }
}

impl FusedIterator for Contents<'_> {}
