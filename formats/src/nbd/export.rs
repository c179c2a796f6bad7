//! What is served: a disk of some size, its bytes if there are any, and its metadata contexts.

use std::fmt;

use dirtymap::exchange::RunTable;
use dirtymap::harvest::Content;
use dirtymap::{Consumer, IovaRange, Lease, Synced};

use super::error::{NbdError, at_most};
use super::wire::MAX_NAME;
use crate::ReadAt;

/// The name of the context that says which parts of a disk are allocated.
pub(super) const ALLOCATION: &str = "base:allocation";
/// What the name of a context of dirty state begins with.
pub(super) const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// The flag of such a context: the extent is dirty.
pub(super) const DIRTY: u32 = 1;
/// In `base:allocation`: no storage stands behind the extent, and it reads as zero.
const HOLE_AND_ZERO: u32 = 3;

/// A disk with dirty state, as a server offers it to its clients. They read it; none of them can
/// write.
pub struct Export<'a> {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) size: u64,
    pub(super) data: Option<&'a (dyn ReadAt + Sync)>,
    pub(super) contexts: Vec<Context>,
}

/// Which bytes have which flags: those of the runs, and all others.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) name: String,
    runs: RunTable,
    inside: u32,
    outside: u32,
}

impl<'a> Export<'a> {
    /// A disk of `size` bytes without data, all of it allocated. The first export of a server is
    /// also its default one, which clients ask for with an empty name.
    ///
    /// # Errors
    /// [`NbdError::Name`] if the name has more than 4096 bytes, [`NbdError::Limit`] if `size`
    /// exceeds 2^63 - 1.
    pub fn new(name: impl Into<String>, size: u64) -> Result<Self, NbdError> {
        let name = named(name.into())?;
        let size = at_most("the size of an export", size, i64::MAX as u64)?;
        let mut export = Export {
            name,
            description: String::new(),
            size,
            data: None,
            contexts: Vec::new(),
        };
        export.add(ALLOCATION.into(), RunTable::default(), 0, 0)?;
        Ok(export)
    }

    /// Says in one line what the disk is.
    ///
    /// # Errors
    /// [`NbdError::Name`] if the text has more than 4096 bytes.
    pub fn with_description(mut self, text: impl Into<String>) -> Result<Self, NbdError> {
        self.description = named(text.into())?;
        Ok(self)
    }

    /// The bytes of the disk. Without them a read is an error at the client.
    pub fn with_data(mut self, data: &'a (dyn ReadAt + Sync)) -> Self {
        self.data = Some(data);
        self
    }

    /// The context `qemu:dirty-bitmap:NAME`, in which these bytes are dirty.
    ///
    /// # Errors
    /// [`NbdError::Outside`] if a run begins past the end of the disk; what reaches past it is cut
    /// off. [`NbdError::Name`] if the name is too long, or given twice.
    pub fn with_dirty(mut self, name: &str, runs: RunTable) -> Result<Self, NbdError> {
        self.add(format!("{DIRTY_BITMAP}{name}"), runs, DIRTY, 0)?;
        Ok(self)
    }

    /// The same for what a lease took. Commit the lease when the client says that its copy is safe;
    /// the end of a connection alone does not say so. A part of the lease's bitmap that cannot be
    /// read counts as dirty.
    ///
    /// # Errors
    /// As [`with_dirty`](Self::with_dirty).
    pub fn with_lease(self, name: &str, lease: &Lease<'_, Synced>) -> Result<Self, NbdError> {
        self.with_dirty(name, lease.runs().collect())
    }

    /// As [`with_lease`](Self::with_lease), by the name of the lease's consumer:
    /// `qemu:dirty-bitmap:NAME`. Each consumer of a space is a context with its own dirty state.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule, Start};
    /// use dirtymap_formats::nbd::Export;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// let backup = space.consumer("backup", Start::Clean)?;
    /// let replica = space.consumer("replica", Start::Dirty)?;
    /// space.mark(0x5000..0x6000)?;
    /// let (one, two) = (backup.rounds().next()?, replica.rounds().next()?);
    /// let export = Export::new("disk", 1 << 20)?
    ///     .with_consumer(&backup, &one)? // 1 page
    ///     .with_consumer(&replica, &two)?; // 256 pages
    /// # drop(export);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// For an increment of the crate `dirtymap-store`, call
    /// `with_dirty(increment.consumer(), increment.runs().clone())`.
    ///
    /// # Errors
    /// As [`with_dirty`](Self::with_dirty).
    pub fn with_consumer(
        self,
        consumer: &Consumer<'_>,
        lease: &Lease<'_, Synced>,
    ) -> Result<Self, NbdError> {
        self.with_lease(consumer.name(), lease)
    }

    /// What `base:allocation` says: all but these bytes are holes that read as zero. Clients do not
    /// read holes.
    ///
    /// # Errors
    /// [`NbdError::Outside`], as [`with_dirty`](Self::with_dirty).
    pub fn with_allocation(mut self, allocated: RunTable) -> Result<Self, NbdError> {
        self.contexts.retain(|context| context.name != ALLOCATION);
        self.add(ALLOCATION.into(), allocated, 0, HOLE_AND_ZERO)?;
        Ok(self)
    }

    /// The context `base:allocation`. The zero runs of the lease ([`Lease::contents`]) are holes
    /// that read as zero, and all other bytes are allocated. Clients do not read holes. If a hole
    /// is written while a client copies the whole disk, the next lease reports the write. So such a
    /// client needs the next lease as well.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule};
    /// use dirtymap_formats::nbd::Export;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let space = AddressSpace::tracked(Granule::K4);
    /// space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// space.discard(0..1 << 19, || Ok(()))?; // the closure punches a hole
    /// let lease = space.rounds().next()?;
    /// let export = Export::new("disk", 1 << 20)?.with_lease("now", &lease)?;
    /// let export = export.with_holes_of(&lease)?;
    /// # drop(export);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`with_dirty`](Self::with_dirty).
    pub fn with_holes_of(mut self, lease: &Lease<'_, Synced>) -> Result<Self, NbdError> {
        let zero = lease
            .contents()
            .filter(|(_, content)| *content == Content::Zero);
        let holes = zero.map(|(run, _)| run).collect();
        self.contexts.retain(|context| context.name != ALLOCATION);
        self.add(ALLOCATION.into(), holes, HOLE_AND_ZERO, 0)?;
        Ok(self)
    }

    fn add(
        &mut self,
        name: String,
        runs: RunTable,
        inside: u32,
        outside: u32,
    ) -> Result<(), NbdError> {
        let name = named(name)?;
        if self.contexts.iter().any(|context| context.name == name) {
            return Err(NbdError::name(&name, "is given to two contexts"));
        }
        // The runs ascend, so the last one is the furthest.
        if let Some(&run) = runs.runs().last()
            && run.start().get() >= self.size
        {
            let size = self.size;
            return Err(NbdError::Outside { run, size });
        }
        self.contexts.push(Context {
            name,
            runs,
            inside,
            outside,
        });
        Ok(())
    }
}

fn named(name: String) -> Result<String, NbdError> {
    if name.len() as u64 > MAX_NAME {
        return Err(NbdError::name(&name, "has more than 4096 bytes"));
    }
    Ok(name)
}

impl fmt::Debug for Export<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("size", &self.size)
            .field("data", &self.data.is_some())
            .field("contexts", &self.contexts)
            .finish()
    }
}

impl Context {
    /// The flags of the bytes from `start` on, in extents of at most `longest` bytes, the last one
    /// of which reaches `end`. With `beyond`, it goes on as far as its flags do, up to there.
    pub(super) fn extents(
        &self,
        start: u64,
        end: u64,
        beyond: u64,
        longest: u64,
    ) -> impl Iterator<Item = (u64, u32)> {
        let runs = self.runs.runs();
        let mut next = runs.partition_point(|run| run.last().get() < start);
        let mut at = start;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            // The first run that does not end below `at`; beyond the last one all is outside.
            let run: Option<&IovaRange> = runs.get(next);
            let (flags, stop) = match run {
                Some(run) if run.start().get() <= at => {
                    (self.inside, run.last().get().saturating_add(1))
                }
                Some(run) => (self.outside, run.start().get()),
                None => (self.outside, u64::MAX),
            };
            // Runs may reach past the disk, which ends at `beyond` or above it.
            let stop = stop.min(beyond).min(at.saturating_add(longest));
            if run.is_some_and(|run| run.last().get() < stop) {
                next += 1;
            }
            let extent = (stop - at, flags);
            at = stop;
            Some(extent)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dirtymap::Iova;

    fn table(runs: &[(u64, u64)]) -> RunTable {
        let run = |&(start, len): &(u64, u64)| IovaRange::from_len(Iova::new(start), len).unwrap();
        runs.iter().map(run).collect()
    }

    fn context(runs: &[(u64, u64)]) -> Context {
        Context {
            name: "x".into(),
            runs: table(runs),
            inside: 1,
            outside: 0,
        }
    }

    #[test]
    fn extents_follow_each_other_and_end_at_the_request() {
        let context = context(&[(10, 10), (30, 5)]);
        let of = |start, end| context.extents(start, end, end, 100).collect::<Vec<_>>();
        assert_eq!(of(0, 40), [(10, 0), (10, 1), (10, 0), (5, 1), (5, 0)]);
        assert_eq!(of(15, 32), [(5, 1), (10, 0), (2, 1)]);
        assert_eq!(of(19, 20), [(1, 1)]);
        assert_eq!(of(20, 21), [(1, 0)]);
        assert_eq!(of(50, 60), [(10, 0)]);
    }

    /// The last extent goes on beyond the request, as far as its flags do, and no further than the
    /// disk, also where the run does.
    #[test]
    fn the_last_extent_goes_on_to_its_own_end() {
        let context = context(&[(10, 10), (30, 50)]);
        let of = |start, end| context.extents(start, end, 40, 100).collect::<Vec<_>>();
        assert_eq!(of(0, 12), [(10, 0), (10, 1)]);
        assert_eq!(of(22, 31), [(8, 0), (10, 1)]);
    }

    #[test]
    fn a_long_extent_comes_in_parts() {
        let context = context(&[(10, 25)]);
        let parts: Vec<_> = context.extents(0, 40, 40, 10).collect();
        assert_eq!(parts, [(10, 0), (10, 1), (10, 1), (5, 1), (5, 0)]);
    }

    /// A run that reaches to the last address has no byte above it.
    #[test]
    fn runs_outside_are_refused_and_runs_across_the_end_are_cut() {
        let all: RunTable = [IovaRange::ALL].into_iter().collect();
        let export = Export::new("", 100).unwrap().with_dirty("a", all).unwrap();
        let parts: Vec<_> = export.contexts[1].extents(50, 60, 100, 1 << 32).collect();
        assert_eq!(parts, [(50, 1)]);
        let beyond = Export::new("", 100).unwrap();
        assert!(matches!(
            beyond.with_dirty("a", table(&[(0, 1), (100, 1)])),
            Err(NbdError::Outside { size: 100, .. })
        ));
        let twice = Export::new("", 9).unwrap().with_dirty("a", table(&[]));
        assert!(matches!(
            twice.unwrap().with_dirty("a", table(&[])),
            Err(NbdError::Name { .. })
        ));
        assert!(Export::new("n".repeat(4097), 1).is_err());
        assert!(Export::new("", 1 << 63).is_err());
    }
}
