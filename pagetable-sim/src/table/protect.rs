//! Changing the rights of leaves that devices are using.

use std::ops::ControlFlow;

use dirtymap::sync::Ordering;
use dirtymap::{Access, Granule, IovaRange};

use super::tree::Table;
use crate::error::Error;
use crate::fmt::Format;

impl<F: Format> Table<F> {
    /// Gives all leaves in `range` the rights `access`; a dirty leaf stays dirty, a clean one
    /// clean. Calls `changed` for each leaf whose rights changed, with its addresses and its size:
    /// devices may use the old rights until these are invalidated. Addresses without a leaf are
    /// skipped.
    ///
    /// Lock-free; the caller owns the range until the call returns.
    ///
    /// # Errors
    /// In this order: [`Error::TooWide`], [`Error::Unaligned`], [`Error::NoSuchAccess`],
    /// [`Error::PartOfLeaf`]. Nothing is changed then.
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
                // Relaxed, both: publishes nothing. The flush that the caller owes makes devices
                // see the rights. The new value follows from the current one, so a D that was set
                // or cleared in between is kept.
                match found.slot().replace(
                    entry,
                    F::with_access(entry, access),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
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
