//! Hardware, and the software that drives it, made to break its promises.

/// Ways in which invalidations can be made to go wrong, to show that users of them would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Breakage {
    /// All works.
    #[default]
    None = 0,
    /// Invalidations return at once and reach no device.
    IgnoreInvalidations,
    /// Devices drop what they cached and acknowledge, while their posted writes stay in flight.
    AcknowledgeWithoutDraining,
    /// Each range that is to be invalidated loses its last smallest page, and nothing around it is invalidated either.
    FlushShortByOnePage,
    /// Invalidations name leaves only: devices keep their pointers to tables.
    SkipNonLeaf,
    /// Invalidations reach the TLBs of devices before the IOTLBs that refill them.
    DeviceTlbFirst,
}

impl Breakage {
    /// The one with the number `number`.
    pub(super) fn from_number(number: u8) -> Self {
        [
            Breakage::None,
            Breakage::IgnoreInvalidations,
            Breakage::AcknowledgeWithoutDraining,
            Breakage::FlushShortByOnePage,
            Breakage::SkipNonLeaf,
            Breakage::DeviceTlbFirst,
        ]
        .into_iter()
        .find(|breakage| *breakage as u8 == number)
        .unwrap_or_default()
    }
}
