//! The glossary: addresses, ranges, granules and access rights.
//!
//! * **IOVA**: an address that a device puts on the bus, in bytes, 64 bits wide. Guest physical
//!   addresses and disk offsets are tracked in the same way.
//! * **start / last** name the two ends of an inclusive range, so that a range can end at 2^64 - 1.
//!   An exclusive **end** is not used.
//! * **granule**: a power of two in bytes, stored as its base-2 logarithm (`lg2`).

use std::fmt;
use std::ops::{Range, RangeInclusive};

/// Why a range or a granule cannot be made. Becomes an [`Error`](crate::Error) by `?`.
///
/// ```
/// use dirtymap::{Iova, IovaRange, RangeError};
///
/// let start = Iova::new(0x1000);
/// assert_eq!(IovaRange::from_len(start, 0), Err(RangeError::ZeroLength { start }));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// A range of no bytes.
    #[error("a range of zero bytes at {start}: a range needs at least one byte")]
    ZeroLength {
        /// Where the range would start.
        start: Iova,
    },
    /// The range would extend past 2^64 - 1.
    #[error("{len:#x} bytes from {start} go past the last address 0xffffffffffffffff")]
    Wraps {
        /// Where the range would start.
        start: Iova,
        /// Its length in bytes.
        len: u64,
    },
    /// The last address lies below the first.
    #[error("the range ends at {last}, below its start {start}")]
    ReversedRange {
        /// The first address.
        start: Iova,
        /// The last address.
        last: Iova,
    },
    /// The size of a granule is not a power of two.
    #[error("a granule of {bytes} bytes: it must be a power of two from 1 to 2^63")]
    BadGranule {
        /// The offending size.
        bytes: u64,
    },
}

impl RangeError {
    /// The errno with which Linux's iommufd refuses the same thing: see
    /// [`Error::errno`](crate::Error::errno).
    pub const fn errno(&self) -> i32 {
        match self {
            RangeError::Wraps { .. } => 75,
            RangeError::ZeroLength { .. }
            | RangeError::ReversedRange { .. }
            | RangeError::BadGranule { .. } => 22,
        }
    }
}

/// A device-visible address in bytes.
///
/// ```
/// use dirtymap::{Granule, Iova};
///
/// let iova = Iova::new(0x1234);
/// assert_eq!(iova.granule_start(Granule::K4), Iova::new(0x1000));
/// assert_eq!(iova.offset_from(Iova::new(0x1000)), Some(0x234));
/// assert_eq!(format!("{iova}"), "0x1234");
/// ```
#[doc(alias = "dma_addr_t")]
#[derive(Clone, Copy, Eq, Hash, Default)]
#[cfg_attr(not(test), derive(PartialEq, PartialOrd, Ord))]
#[cfg_attr(test, allow(clippy::derived_hash_with_manual_eq))]
#[repr(transparent)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Iova(u64);

#[cfg(test)]
counted_order!(Iova);

impl Iova {
    /// The lowest address.
    pub const MIN: Iova = Iova(0);
    /// The highest address, 2^64 - 1.
    pub const MAX: Iova = Iova(u64::MAX);

    /// The address `bytes`.
    #[inline]
    pub const fn new(bytes: u64) -> Self {
        Iova(bytes)
    }

    /// The address as a number of bytes.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// `self + bytes`, or `None` past the end of the address space.
    #[inline]
    pub const fn checked_add(self, bytes: u64) -> Option<Iova> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Iova(sum)),
            None => None,
        }
    }

    /// The number of bytes from `base` up to `self`, or `None` if `self` lies below `base`.
    #[inline]
    pub const fn offset_from(self, base: Iova) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// Whether the address is a multiple of `granule`.
    #[inline]
    pub const fn is_aligned(self, granule: Granule) -> bool {
        self.0 & granule.mask() == 0
    }

    /// The first byte of the granule that holds this address.
    #[inline]
    pub const fn granule_start(self, granule: Granule) -> Iova {
        Iova(self.0 & !granule.mask())
    }

    /// The last byte of the granule that holds this address.
    #[inline]
    pub const fn granule_last(self, granule: Granule) -> Iova {
        Iova(self.0 | granule.mask())
    }
}

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl fmt::UpperHex for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::UpperHex::fmt(&self.0, f)
    }
}

impl From<u64> for Iova {
    fn from(bytes: u64) -> Self {
        Iova(bytes)
    }
}

impl From<Iova> for u64 {
    fn from(iova: Iova) -> Self {
        iova.0
    }
}

/// A non-empty range of addresses, both ends included.
///
/// ```
/// use dirtymap::{Granule, Iova, IovaRange};
///
/// # fn main() -> Result<(), dirtymap::RangeError> {
/// let written = IovaRange::from_len(Iova::new(0x1ffe), 4)?;
/// assert_eq!(written.granules(Granule::K4), 2); // it touches two pages
/// let pages = written.round_out(Granule::K4);
/// assert_eq!((pages.start().get(), pages.last().get()), (0x1000, 0x2fff));
/// assert_eq!(IovaRange::try_from(0x1000..0x3000)?, pages);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct IovaRange {
    start: Iova,
    last: Iova,
}

impl IovaRange {
    /// All 2^64 addresses.
    pub const ALL: IovaRange = IovaRange {
        start: Iova::MIN,
        last: Iova::MAX,
    };

    /// The range from `start` to `last`, both included.
    ///
    /// # Errors
    /// [`RangeError::ReversedRange`] if `last` lies below `start`.
    #[inline]
    pub const fn new(start: Iova, last: Iova) -> Result<Self, RangeError> {
        if last.0 < start.0 {
            return Err(RangeError::ReversedRange { start, last });
        }
        Ok(IovaRange { start, last })
    }

    /// The range from `start` to `last`, which the caller knows not to lie below it.
    #[inline]
    pub(crate) const fn ascending(start: Iova, last: Iova) -> Self {
        debug_assert!(start.0 <= last.0, "a range that ends below its start");
        IovaRange { start, last }
    }

    /// The `len` bytes that begin at `start`. The range may end at 2^64 - 1.
    ///
    /// # Errors
    /// [`RangeError::ZeroLength`] if `len` is 0, [`RangeError::Wraps`] if the last byte would lie
    /// past 2^64 - 1.
    #[inline]
    pub const fn from_len(start: Iova, len: u64) -> Result<Self, RangeError> {
        if len == 0 {
            return Err(RangeError::ZeroLength { start });
        }
        match start.checked_add(len - 1) {
            Some(last) => Ok(IovaRange { start, last }),
            None => Err(RangeError::Wraps { start, len }),
        }
    }

    /// The one granule that holds `iova`.
    #[inline]
    pub const fn granule_at(iova: Iova, granule: Granule) -> Self {
        IovaRange {
            start: iova.granule_start(granule),
            last: iova.granule_last(granule),
        }
    }

    /// The one address `iova`.
    #[inline]
    pub(crate) const fn at(iova: Iova) -> Self {
        IovaRange {
            start: iova,
            last: iova,
        }
    }

    /// The smallest range that covers both ranges.
    #[inline]
    pub const fn hull(self, other: IovaRange) -> Self {
        IovaRange {
            start: if self.start.0 < other.start.0 {
                self.start
            } else {
                other.start
            },
            last: if self.last.0 > other.last.0 {
                self.last
            } else {
                other.last
            },
        }
    }

    /// Whether the ranges overlap, or follow each other without a gap.
    #[inline]
    pub(crate) const fn touches(self, other: IovaRange) -> bool {
        self.start.0 <= other.last.0.saturating_add(1)
            && other.start.0 <= self.last.0.saturating_add(1)
    }

    /// Both ranges as one, if they touch or overlap.
    #[inline]
    pub(crate) const fn joined(self, other: IovaRange) -> Option<IovaRange> {
        match self.touches(other) {
            true => Some(self.hull(other)),
            false => None,
        }
    }

    /// The first address.
    #[inline]
    pub const fn start(self) -> Iova {
        self.start
    }

    /// The last address, included in the range.
    #[inline]
    pub const fn last(self) -> Iova {
        self.last
    }

    /// The length in bytes, 1 to 2^64.
    #[inline]
    pub const fn len(self) -> u128 {
        (self.last.0 - self.start.0) as u128 + 1
    }

    /// Always false: a range holds at least one address.
    #[inline]
    pub const fn is_empty(self) -> bool {
        false
    }

    counted! {
    /// Whether `iova` lies inside.
    #[inline]
    pub const fn contains(self, iova: Iova) -> bool {
        self.start.0 <= iova.0 && iova.0 <= self.last.0
    }

    /// Whether all of `other` lies inside.
    #[inline]
    pub const fn covers(self, other: IovaRange) -> bool {
        self.start.0 <= other.start.0 && other.last.0 <= self.last.0
    }

    /// The addresses that are in both ranges.
    #[inline]
    pub const fn intersection(self, other: IovaRange) -> Option<IovaRange> {
        let start = if self.start.0 > other.start.0 {
            self.start
        } else {
            other.start
        };
        let last = if self.last.0 < other.last.0 {
            self.last
        } else {
            other.last
        };
        if start.0 <= last.0 {
            Some(IovaRange { start, last })
        } else {
            None
        }
    }

    /// Whether some address is in both ranges.
    #[inline]
    pub const fn intersects(self, other: IovaRange) -> bool {
        self.start.0 <= other.last.0 && other.start.0 <= self.last.0
    }
    }

    /// The part of the range below `at`; `None` if there is none.
    ///
    /// ```
    /// use dirtymap::{Iova, ToIovaRange};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let range = (0x1000..0x4000).to_iova_range()?;
    /// assert_eq!(range.below(Iova::new(0x2000)), Some((0x1000..0x2000).to_iova_range()?));
    /// assert_eq!(range.below(Iova::new(0x9000)), Some(range));
    /// assert_eq!(range.below(Iova::new(0x1000)), None);
    /// # Ok(())
    /// # }
    /// ```
    #[inline]
    pub const fn below(self, at: Iova) -> Option<IovaRange> {
        if at.0 <= self.start.0 {
            return None;
        }
        let last = if at.0 - 1 < self.last.0 {
            Iova(at.0 - 1)
        } else {
            self.last
        };
        Some(IovaRange { last, ..self })
    }

    /// Whether the range starts and ends at multiples of `granule`.
    #[inline]
    pub const fn is_aligned(self, granule: Granule) -> bool {
        self.start.is_aligned(granule) && self.last.0 & granule.mask() == granule.mask()
    }

    /// The smallest range of whole granules that covers this one.
    #[inline]
    pub const fn round_out(self, granule: Granule) -> IovaRange {
        IovaRange {
            start: self.start.granule_start(granule),
            last: self.last.granule_last(granule),
        }
    }

    /// The largest range of whole granules inside this one; `None` if it holds none.
    #[inline]
    pub const fn round_in(self, granule: Granule) -> Option<IovaRange> {
        let mask = granule.mask();
        // The start of the first whole granule; then the last byte of the last whole one.
        let start = match self.start.0.checked_add(mask) {
            Some(sum) => sum & !mask,
            None => return None,
        };
        let last = if self.last.0 & mask == mask {
            self.last.0
        } else {
            match (self.last.0 & !mask).checked_sub(1) {
                Some(last) => last,
                None => return None,
            }
        };
        if start <= last {
            Some(IovaRange {
                start: Iova(start),
                last: Iova(last),
            })
        } else {
            None
        }
    }

    /// How many granules the range touches, 1 to 2^64.
    #[inline]
    pub const fn granules(self, granule: Granule) -> u128 {
        ((self.last.0 >> granule.lg2()) - (self.start.0 >> granule.lg2())) as u128 + 1
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x}]", self.start.0, self.last.0)
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The range argument of a call: an [`IovaRange`], or a range of bytes as Rust writes it.
///
/// ```
/// use dirtymap::{Iova, IovaRange, ToIovaRange};
///
/// # fn main() -> Result<(), dirtymap::Error> {
/// let page = IovaRange::from_len(Iova::new(0x1000), 0x1000)?;
/// assert_eq!((0x1000..0x2000).to_iova_range()?, page);
/// assert_eq!((0x1000..=0x1fff).to_iova_range()?, page);
/// assert!((0x1000..0x1000).to_iova_range().is_err()); // no byte at all
/// # Ok(())
/// # }
/// ```
///
/// Only an inclusive range such as `0..=u64::MAX` reaches the last address, because a half-open
/// range cannot express its end.
pub trait ToIovaRange {
    /// The same addresses as an [`IovaRange`].
    ///
    /// # Errors
    /// [`RangeError::ZeroLength`] for a range without a byte, [`RangeError::ReversedRange`] if it
    /// ends below its start.
    fn to_iova_range(self) -> Result<IovaRange, RangeError>;
}

impl ToIovaRange for IovaRange {
    #[inline]
    fn to_iova_range(self) -> Result<IovaRange, RangeError> {
        Ok(self)
    }
}

impl ToIovaRange for Range<u64> {
    #[inline]
    fn to_iova_range(self) -> Result<IovaRange, RangeError> {
        let (start, end) = (Iova(self.start), Iova(self.end));
        match self.end.checked_sub(1) {
            Some(last) if start < end => IovaRange::new(start, Iova(last)),
            _ if start == end => Err(RangeError::ZeroLength { start }),
            _ => Err(RangeError::ReversedRange { start, last: end }),
        }
    }
}

impl ToIovaRange for RangeInclusive<u64> {
    #[inline]
    fn to_iova_range(self) -> Result<IovaRange, RangeError> {
        IovaRange::new(Iova(*self.start()), Iova(*self.end()))
    }
}

impl TryFrom<Range<u64>> for IovaRange {
    type Error = RangeError;

    fn try_from(range: Range<u64>) -> Result<Self, RangeError> {
        range.to_iova_range()
    }
}

impl TryFrom<RangeInclusive<u64>> for IovaRange {
    type Error = RangeError;

    fn try_from(range: RangeInclusive<u64>) -> Result<Self, RangeError> {
        range.to_iova_range()
    }
}

impl From<IovaRange> for RangeInclusive<u64> {
    fn from(range: IovaRange) -> Self {
        range.start.0..=range.last.0
    }
}

/// A power of two in bytes, 1 to 2^63, stored as its logarithm.
///
/// ```
/// use dirtymap::Granule;
///
/// # fn main() -> Result<(), dirtymap::RangeError> {
/// assert_eq!(Granule::from_bytes(4096)?, Granule::K4);
/// assert_eq!(Granule::M2.bytes() / Granule::K4.bytes(), 512);
/// assert!(Granule::try_from(5000).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granule(u8);

impl Granule {
    /// One byte.
    pub const BYTE: Granule = Granule(0);
    /// 4 KiB, the smallest page of most systems.
    pub const K4: Granule = Granule(12);
    /// 2 MiB.
    pub const M2: Granule = Granule(21);
    /// 1 GiB.
    pub const G1: Granule = Granule(30);
    /// 2^63 bytes, the largest.
    pub const MAX: Granule = Granule(63);

    /// The granule of `bytes` bytes.
    ///
    /// # Errors
    /// [`RangeError::BadGranule`] unless `bytes` is a power of two from 1 to 2^63.
    #[inline]
    pub const fn from_bytes(bytes: u64) -> Result<Self, RangeError> {
        if bytes.is_power_of_two() {
            Ok(Granule(bytes.trailing_zeros() as u8))
        } else {
            Err(RangeError::BadGranule { bytes })
        }
    }

    /// The granule of 2^`lg2` bytes, or `None` if `lg2` exceeds 63.
    #[inline]
    pub const fn from_lg2(lg2: u8) -> Option<Self> {
        if lg2 < 64 { Some(Granule(lg2)) } else { None }
    }

    /// The base-2 logarithm of the size, 0 to 63.
    #[inline]
    pub const fn lg2(self) -> u8 {
        self.0
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The size less one: the bits of an address inside the granule.
    #[inline]
    pub const fn mask(self) -> u64 {
        self.bytes() - 1
    }
}

impl TryFrom<u64> for Granule {
    type Error = RangeError;

    fn try_from(bytes: u64) -> Result<Self, RangeError> {
        Granule::from_bytes(bytes)
    }
}

impl From<Granule> for u64 {
    fn from(granule: Granule) -> Self {
        granule.bytes()
    }
}

/// As its bytes.
#[cfg(feature = "serde")]
impl serde::Serialize for Granule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.bytes())
    }
}

impl fmt::Debug for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (lg2, unit) = match self.0 {
            0..10 => (self.0, "B"),
            10..20 => (self.0 - 10, "KiB"),
            20..30 => (self.0 - 20, "MiB"),
            30..40 => (self.0 - 30, "GiB"),
            40..50 => (self.0 - 40, "TiB"),
            50..60 => (self.0 - 50, "PiB"),
            _ => (self.0 - 60, "EiB"),
        };
        write!(f, "{} {unit}", 1u64 << lg2)
    }
}

/// Identifies a domain while it is attached to an address space: see
/// [`AddressSpace::attach`](crate::AddressSpace::attach). One space never uses an id twice.
#[derive(Clone, Copy, Eq, Hash, Debug)]
#[cfg_attr(not(test), derive(PartialEq, PartialOrd, Ord))]
#[cfg_attr(test, allow(clippy::derived_hash_with_manual_eq))]
pub struct DomainId(pub(crate) u64);

#[cfg(test)]
counted_order!(DomainId);

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "domain {}", self.0)
    }
}

/// What a device may do with a mapping.
#[doc(alias = "IOMMU_IOAS_MAP_READABLE")]
#[doc(alias = "IOMMU_IOAS_MAP_WRITEABLE")]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// Device reads only.
    Read,
    /// Device writes only.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    /// Whether devices may read.
    #[inline]
    pub const fn reads(self) -> bool {
        !matches!(self, Access::Write)
    }

    /// Whether devices may write, and so dirty, the memory.
    #[inline]
    pub const fn writes(self) -> bool {
        !matches!(self, Access::Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_reaches_the_last_byte_and_never_wraps() {
        let top = IovaRange::from_len(Iova::new(u64::MAX - 4095), 4096).unwrap();
        assert_eq!(top.last(), Iova::MAX);
        assert_eq!(top.len(), 4096);
        assert_eq!(IovaRange::ALL.len(), 1 << 64);
        assert_eq!(IovaRange::ALL.granules(Granule::K4), 1 << 52);
        assert!(matches!(
            IovaRange::from_len(Iova::new(u64::MAX - 4095), 4097),
            Err(RangeError::Wraps { len: 4097, .. })
        ));
        assert!(matches!(
            IovaRange::from_len(Iova::new(7), 0),
            Err(RangeError::ZeroLength { .. })
        ));
        assert!(matches!(
            IovaRange::new(Iova::new(2), Iova::new(1)),
            Err(RangeError::ReversedRange { .. })
        ));
    }

    #[test]
    fn ranges_of_rust_become_ranges_of_addresses() {
        let range = |start: u64, last: u64| IovaRange::new(Iova::new(start), Iova::new(last));
        assert_eq!((3..9).to_iova_range().unwrap(), range(3, 8).unwrap());
        assert_eq!((3..=9).to_iova_range().unwrap(), range(3, 9).unwrap());
        assert_eq!((0..=u64::MAX).to_iova_range().unwrap(), IovaRange::ALL);
        assert_eq!((5..=5).to_iova_range().unwrap().len(), 1);
        for empty in [0, 7, u64::MAX] {
            let refused = (empty..empty).to_iova_range();
            assert!(
                matches!(refused, Err(RangeError::ZeroLength { start }) if start.get() == empty)
            );
        }
        let (high, low) = (9, 3);
        assert!(matches!(
            (high..low).to_iova_range(),
            Err(RangeError::ReversedRange { .. })
        ));
        assert!(matches!(
            (high..0).to_iova_range(),
            Err(RangeError::ReversedRange { .. })
        ));
        assert!(matches!(
            (high..=low).to_iova_range(),
            Err(RangeError::ReversedRange { .. })
        ));
        let back: RangeInclusive<u64> = range(3, 8).unwrap().into();
        assert_eq!(back, 3..=8);
        assert_eq!(IovaRange::try_from(3..9).unwrap(), range(3, 8).unwrap());
        assert_eq!(
            format!("{:x} {:#X}", Iova::new(0xab), Iova::new(0xab)),
            "ab 0xAB"
        );
    }

    #[test]
    fn granules_are_powers_of_two() {
        assert_eq!(Granule::from_bytes(4096).unwrap(), Granule::K4);
        assert_eq!(Granule::from_bytes(1 << 63).unwrap().lg2(), 63);
        assert_eq!(Granule::from_bytes(1).unwrap().bytes(), 1);
        for bad in [0, 3, 12288, u64::MAX] {
            let refused = Err(RangeError::BadGranule { bytes: bad });
            assert_eq!(Granule::from_bytes(bad), refused);
            assert_eq!(Granule::try_from(bad), refused);
        }
        assert_eq!(Granule::from_lg2(64), None);
        assert_eq!(Granule::M2.to_string(), "2 MiB");
        assert_eq!(Granule::from_lg2(63).unwrap().to_string(), "8 EiB");
    }

    #[test]
    fn ranges_intersect_as_sets_do() {
        let r = |a: u64, b: u64| IovaRange::new(Iova::new(a), Iova::new(b)).unwrap();
        for (a, b) in (0..6).flat_map(|a| (a..6).map(move |b| (a, b))) {
            for (c, d) in (0..6).flat_map(|c| (c..6).map(move |d| (c, d))) {
                let both: Vec<u64> = (a..=b).filter(|x| (c..=d).contains(x)).collect();
                let got = r(a, b).intersection(r(c, d));
                assert_eq!(got.is_some(), !both.is_empty());
                assert_eq!(r(a, b).intersects(r(c, d)), !both.is_empty());
                if let Some(i) = got {
                    assert_eq!(
                        (i.start().get(), i.last().get()),
                        (both[0], both[both.len() - 1])
                    );
                }
                assert_eq!(r(a, b).covers(r(c, d)), a <= c && d <= b);
            }
        }
        let four = Granule::from_bytes(4).unwrap();
        assert_eq!(r(5, 12).round_in(four), Some(r(8, 11)));
        assert_eq!(r(4, 11).round_in(four), Some(r(4, 11)));
        assert_eq!(r(5, 10).round_in(four), None);
        assert_eq!(r(0, 2).round_in(four), None);
        assert_eq!(r(u64::MAX - 2, u64::MAX).round_in(four), None);
        assert_eq!(
            r(u64::MAX - 4, u64::MAX).round_in(four),
            Some(r(u64::MAX - 3, u64::MAX))
        );
        assert_eq!(r(5, 9).round_out(Granule::from_bytes(4).unwrap()), r(4, 11));
        assert!(r(4, 11).is_aligned(Granule::from_bytes(4).unwrap()));
        assert!(!r(4, 10).is_aligned(Granule::from_bytes(4).unwrap()));
    }
}
