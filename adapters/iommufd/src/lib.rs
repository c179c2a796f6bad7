//! Linux's iommufd as a dirty source of [`dirtymap`]: the IO page table of a device tells which
//! memory the device wrote.
//!
//! ```no_run
//! use dirtymap::{Access, AddressSpace, Granule, ToIovaRange};
//! use dirtymap_iommufd::{Ioas, IoasOptions, Iommufd, VfioDevice};
//! use std::fs::File;
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let memory = vec![0u8; 64 << 20].leak();
//! let iommufd = Iommufd::open()?;
//! let device = File::options().read(true).write(true).open("/dev/vfio/devices/vfio0")?;
//! let device = VfioDevice::bind(device.into(), &iommufd)?;
//! // SAFETY: what the space maps is memory of the guest, which devices may write at any time.
//! let ioas = unsafe { Ioas::new(&iommufd, IoasOptions::default()) }?;
//! let table = ioas.hwpt(device.id())?; // an error if the IOMMU cannot track
//!
//! let space = AddressSpace::with_source(Granule::K4, Arc::clone(&table))?;
//! let backing = memory.as_ptr().addr() as u64; // where the range lies in this process
//! space.map((0x4000_0000..0x4400_0000).to_iova_range()?, backing, Access::ReadWrite)?;
//! table.attach(&device)?; // from here on the device reaches the memory
//! space.start_tracking()?; // now copy everything once, then harvest
//! # Ok(())
//! # }
//! ```
//!
//! # From the kernel's rules to those of a source
//!
//! | the kernel | this source |
//! |---|---|
//! | a read of a part of a leaf cleans the whole leaf | reads whole pieces, which no leaf crosses |
//! | writes bits past the end of the bitmap | a bitmap of its own, with nothing past its end |
//! | drops bits if a page of the bitmap cannot be written, and cleans | makes the pages present first |
//! | a second "on" cleans everything | it is not passed on |
//! | "off": some kernels answer nothing any more | reads all before, and keeps it |
//! | an unmap forgets what was dirty | asks before: see [`OnUnmap`] |
//! | an unmap ends the translations of all page tables of an IOAS | the last domain unmaps |
//! | an error, or an interrupted call | all that was asked for counts as dirty |
//!
//! # Pieces
//!
//! A leaf never crosses the border of two mappings of the kernel. So this source maps an area in
//! pieces of a power of two ([`IoasOptions::piece`], 1 GiB at first), and reads whole pieces. What
//! a harvest did not ask for waits in memory that was reserved when the piece was mapped, one bit
//! for each page. Areas can be [cut](dirtymap::AddressSpace::cut) between pieces, and not inside
//! them. Smaller pieces cost calls of the kernel, and larger leaves than a piece are not used.
//! Harvests that ask for little, one after the other, read a piece each time.
//!
//! # What it cannot do
//!
//! * **Close the window of an unmap**: see [`OnUnmap`].
//! * **Detect what a foreign hand does to the same objects**: whoever else has the file of iommufd
//!   can unmap, or switch tracking off, and the kernel then answers "nothing was written". Keep the
//!   file, and give each address space an IOAS of its own.
//! * **Wait for nothing**: harvests wait for locks of the kernel, and for each other if they read
//!   the same piece.
#![cfg(target_os = "linux")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod device;
mod error;
mod hwpt;
mod ioas;
mod kernel;
mod log;
mod scratch;
mod source;
mod uapi;

#[cfg(test)]
#[allow(clippy::unwrap_used)] // helpers of tests
mod tests;

pub use device::{Device, VfioDevice};
pub use error::IommufdError;
pub use hwpt::Hwpt;
pub use ioas::{Ioas, IoasOptions, Iommufd, OnUnmap};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
