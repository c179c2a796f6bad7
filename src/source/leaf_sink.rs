//! Record, owe, clear: the one place where a dirty leaf passes from a source into a lease.

use crate::bitmap::Sink;
use crate::error::Error;
use crate::flush::FlushGather;
use crate::sync::{Step, performs};
use crate::units::{Granule, IovaRange};

/// What a source hands its dirty leaves to during one harvest: see
/// [`DirtySource::read_and_clear`](super::DirtySource::read_and_clear).
///
/// It keeps the order that no write is lost by: the leaf is in the user bitmap, and its invalidation is owed, before its
/// dirty bit goes. A harvest that is stopped between any two of these steps loses nothing.
#[derive(Debug)]
pub struct LeafSink<'s, 'b> {
    sink: &'s mut Sink<'b>,
    gather: &'s mut FlushGather,
}

impl<'s, 'b> LeafSink<'s, 'b> {
    /// Records in `sink` and owes in `gather`.
    pub fn new(sink: &'s mut Sink<'b>, gather: &'s mut FlushGather) -> Self {
        LeafSink { sink, gather }
    }

    /// The addresses that are asked for.
    pub fn range(&self) -> IovaRange {
        self.sink.range()
    }

    /// Takes a leaf that was seen dirty: `leaf` are all its addresses, `size` is what an invalidation must know of it.
    ///
    /// `clear` makes the leaf clean by one atomic step and says whether it was dirty until then. It is called last, and
    /// not at all for a leaf that sticks out of [`range`](Self::range): such a leaf stays dirty, and owes the
    /// invalidation of the part that is reported, since a write to it may be translated and not have landed.
    ///
    /// # Errors
    /// Those of [`Sink::record`]; the leaf stays dirty.
    #[inline]
    pub fn take(
        &mut self,
        leaf: IovaRange,
        size: Granule,
        clear: impl FnOnce() -> bool,
    ) -> Result<(), Error> {
        let Some(part) = leaf.intersection(self.range()) else {
            return Ok(());
        };
        if performs(Step::RecordBeforeClear) {
            self.sink.record(part)?;
        }
        self.gather.add(part, size);
        if part == leaf {
            clear();
        }
        Ok(())
    }
}
