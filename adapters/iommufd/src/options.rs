//! How an IOAS maps and reports.

use dirtymap::Granule;

/// What an unmap reports as dirty. The kernel has no call that unmaps and tells, so there is a
/// choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUnmap {
    /// What was dirty when the kernel was asked, just before the unmap. **A write that a device
    /// makes between the two is lost.** For memory that no device uses any more when it is
    /// unmapped, as drivers of guests have it: they end the DMA, and then unmap.
    #[default]
    Asked,
    /// Everything: nothing is lost, and all of the memory is to be copied. For memory that devices
    /// may still write to.
    Everything,
}

/// How an [`Ioas`](crate::Ioas) maps and reports.
#[derive(Clone, Copy, Debug)]
pub struct IoasOptions {
    pub(crate) piece: Granule,
    pub(crate) page: Option<Granule>,
    pub(crate) small_pages: bool,
    pub(crate) on_unmap: OnUnmap,
}

impl Default for IoasOptions {
    fn default() -> Self {
        IoasOptions {
            piece: Granule::G1,
            page: None,
            small_pages: false,
            on_unmap: OnUnmap::Asked,
        }
    }
}

impl IoasOptions {
    /// The size of a piece: see [the crate](crate#pieces).
    #[must_use]
    pub fn piece(self, piece: Granule) -> Self {
        IoasOptions { piece, ..self }
    }

    /// The bytes that one bit of the kernel's answers stands for: at first the page of the host, or
    /// that of the IOMMU if that is larger. Areas are made of such pages.
    #[must_use]
    pub fn page(self, page: Granule) -> Self {
        let page = Some(page);
        IoasOptions { page, ..self }
    }

    /// Leaves are as small as a page of the host, so no page is reported for the sake of another
    /// one. Walks and translations take longer. (`IOMMU_OPTION_HUGE_PAGES`, off.)
    #[must_use]
    pub fn small_pages(self) -> Self {
        IoasOptions {
            small_pages: true,
            ..self
        }
    }

    /// What an unmap reports as dirty.
    #[must_use]
    pub fn on_unmap(self, on_unmap: OnUnmap) -> Self {
        IoasOptions { on_unmap, ..self }
    }
}
