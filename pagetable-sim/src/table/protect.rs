//! Changing what devices may do with leaves that they are using.

use std::ops::ControlFlow;

use dirtymap::sync::Ordering;
use dirtymap::{Access, Granule, IovaRange};

use super::tree::Table;
use crate::error::Error;
use crate::fmt::Format;

impl<F: Format> Table<F> {
    /// Lets devices do `access`, and nothing else, with all leaves in `range`; whether a leaf is dirty stays as it is. Calls
    /// `changed` for each leaf whose rights changed, with its addresses and its size: devices may use the old rights
    /// until these are invalidated. Addresses without a leaf are skipped.
    ///
    /// Lock-free; the caller owns the range for the time of the call.
    ///
    /// # Errors
    /// In this order: [`Error::TooWide`], [`Error::Unaligned`], [`Error::NoSuchAccess`], [`Error::PartOfLeaf`]. Nothing
    /// is changed then.
    pub fn protect(
        &self,
        range: IovaRange,
        access: Access,
        mut changed: impl FnMut(IovaRange, Granule),
    ) -> Result<(), Error> {
        Self::check_range(range)?;
        Self::check_access(access)?;
        self.check_whole_leaves(range)?;
        let guard = crossbeam_epoch::pin();
        let mut last = None;
        let done = self.visit(range, &guard, &mut |found| {
            let mut entry = found.entry;
            while F::is_present(entry)
                && F::is_leaf(entry, found.level)
                && F::access(entry) != access
            {
                // AcqRel on success: as hardware's own change of the entry, in `make_dirty`. Acquire on failure: the new
                // value follows from what is there, so a D that is set or cleared meanwhile is kept.
                match found.slot().replace(
                    entry,
                    F::with_access(entry, access),
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(()) => {
                        let leaf = found.range::<F>();
                        if last.replace(leaf) != Some(leaf) {
                            changed(leaf, found.size::<F>());
                        }
                        break;
                    }
                    Err(now) => entry = now,
                }
            }
            ControlFlow::<()>::Continue(())
        });
        debug_assert!(done.is_continue());
        Ok(())
    }
}
