//! What a harvest is asked for.

use crate::units::{DomainId, Granule, IovaRange};

/// A range of addresses, and the bytes that one bit of the answer stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HarvestRequest {
    range: IovaRange,
    granule: Granule,
    all_or_nothing: bool,
    scope: Scope,
}

/// Whose dirty state a harvest asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// All domains, and marks.
    #[default]
    All,
    /// One domain: what its devices wrote, and what earlier leases that covered it put back.
    Domain(DomainId),
}

impl HarvestRequest {
    /// Asks for `range` at `granule` bytes a bit. Bit 0 of the bitmap is the first granule of `range`, which must
    /// start and end at multiples of both `granule` and the smallest page of the space.
    ///
    /// A granule larger than the page makes a bit cover several pages; a smaller one makes a page set several bits.
    pub const fn new(range: IovaRange, granule: Granule) -> Self {
        HarvestRequest {
            range,
            granule,
            all_or_nothing: false,
            scope: Scope::All,
        }
    }

    /// Asks for the dirty state of `scope` alone; the default is all of it.
    #[must_use]
    pub const fn in_scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Whose dirty state is asked for.
    pub const fn scope(&self) -> Scope {
        self.scope
    }

    /// Refuses the request, before anything is touched, if no area holds some address of the range.
    #[must_use]
    pub const fn all_or_nothing(mut self) -> Self {
        self.all_or_nothing = true;
        self
    }

    /// The range asked for.
    pub const fn range(&self) -> IovaRange {
        self.range
    }

    /// The bytes of one bit.
    pub const fn granule(&self) -> Granule {
        self.granule
    }

    /// Whether a hole refuses the whole request.
    pub const fn is_all_or_nothing(&self) -> bool {
        self.all_or_nothing
    }
}
