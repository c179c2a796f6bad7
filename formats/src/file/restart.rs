//! The dirty state of a space over a restart of its process.

use std::io;
use std::path::Path;

use super::place::{resolved, sync_folder_of};
use super::{BitmapFile, BitmapFileError};
use dirtymap::{AddressSpace, Error, HarvestRequest, IovaRange, SparseBitmap, UserBitmap};

/// The result of [`BitmapFile::restore_space`]: the state that became dirty.
#[derive(Debug)]
#[must_use = "it says whether the file could be trusted"]
#[non_exhaustive]
pub enum Restored {
    /// The pages of the file alone.
    Saved {
        /// The generation that the file was saved with.
        generation: u64,
        /// Its dirty bytes, inside areas or not.
        bytes: u128,
    },
    /// All areas: the file is missing, or cannot be trusted.
    Everything {
        /// The error of the file.
        reason: BitmapFileError,
    },
}

impl BitmapFile {
    /// Saves the dirty state of `space`, in one bit for each of its pages, and takes nothing: for
    /// the end of a process, after its writers have stopped. Returns the dirty bytes.
    ///
    /// In a space with several consumers, a page is saved if it is dirty for at least one of them.
    /// After the restore, each consumer is told all of these pages: a superset. The unnamed
    /// consumer is one of them. If the program does not use it, commit a round of it first:
    /// otherwise every page that was written since the first consumer joined is saved. End all
    /// leases before this, because the pages of a lease that lives are not saved.
    ///
    /// [`restore_space`](Self::restore_space) loads it into the space of the next process. The file
    /// spans from the lowest area to the highest, and takes an eighth of a byte for each page in
    /// between.
    ///
    /// ```
    /// use dirtymap::{Access, AddressSpace, Granule};
    /// use dirtymap_formats::{BitmapFile, Restored};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("dirtymap-restart-{}", std::process::id()));
    /// let space = || -> Result<AddressSpace, dirtymap::Error> {
    ///     let space = AddressSpace::tracked(Granule::K4);
    ///     space.map(0..1 << 30, 0, Access::ReadWrite)?;
    ///     Ok(space)
    /// };
    /// let before = space()?;
    /// before.mark(0x5000..0x5001)?;
    /// BitmapFile::save_space(&path, &before, 1)?;
    ///
    /// let after = space()?;
    /// let restored = BitmapFile::restore_space(&path, &after)?;
    /// assert!(matches!(restored, Restored::Saved { generation: 1, bytes: 4096 }));
    /// assert_eq!(after.rounds().next()?.commit().bits_set, 1);
    ///
    /// // The file is used up: after a crash from here on, nobody knows what was written.
    /// let restored = BitmapFile::restore_space(&path, &after)?;
    /// assert!(matches!(restored, Restored::Everything { .. }));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`save`](Self::save), and in [`BitmapFileError::Bitmap`]: [`Error::NothingMapped`], and
    /// the errors of [`peek_any`](AddressSpace::peek_any).
    pub fn save_space(
        path: impl AsRef<Path>,
        space: &AddressSpace,
        generation: u64,
    ) -> Result<u128, BitmapFileError> {
        let areas = space.mappings();
        let hull = areas.iter().map(|area| area.range).reduce(IovaRange::hull);
        let range = hull.ok_or(Error::NothingMapped {
            range: IovaRange::ALL,
        })?;
        let page = space.page();
        let bits = u64::try_from(range.granules(page)).unwrap_or(u64::MAX);
        let bitmap = SparseBitmap::new(bits);
        let request = HarvestRequest::new(range, page);
        let view = space.peek_any(&request, UserBitmap::sparse(&bitmap))?;
        Self::save(path, &view, generation)?;
        Ok(u128::from(view.count()) << page.lg2())
    }

    /// Makes the pages that [`save_space`](Self::save_space) saved dirty in `space`, and removes
    /// the file, so that it is used once. If the file is missing or cannot be trusted, all of
    /// `space` becomes dirty. So after a crash everything is dirty, because the file of the run
    /// before is gone.
    ///
    /// Map the areas before this, in a [`tracked`](AddressSpace::tracked) space or **after
    /// [`start_tracking`](AddressSpace::start_tracking)**, which makes everything clean. Let
    /// writers begin after it. Pages of the file that no area holds any more count in
    /// [`SpaceStats::outside_marks`](dirtymap::space::SpaceStats::outside_marks).
    ///
    /// The result is one of two cases for a program: `Saved` with the generation that it expects,
    /// or all areas have to be copied. A file of another generation was saved by another run, for
    /// example before a backup was restored: mark all areas then.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # use dirtymap_formats::{BitmapFile, Restored};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("dirtymap-match-{}", std::process::id()));
    /// # let space = AddressSpace::tracked(Granule::K4);
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// # let expected = 1;
    /// match BitmapFile::restore_space(&path, &space)? {
    ///     Restored::Saved { generation, .. } if generation == expected => {}
    ///     Restored::Everything { reason } => println!("all of it is copied: {reason}"),
    ///     _ => {
    ///         for area in space.mappings() {
    ///             space.mark(area.range)?;
    ///         }
    ///     }
    /// }
    /// assert_eq!(space.rounds().next()?.dirty(), 256);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NeverTracked`], in [`BitmapFileError::Bitmap`], if `space` does not track yet: the
    /// start would discard what was restored. The file stays. [`BitmapFileError::Io`] if the file
    /// cannot be removed: it would be taken for the state of a later moment. The pages are dirty
    /// nevertheless.
    pub fn restore_space(
        path: impl AsRef<Path>,
        space: &AddressSpace,
    ) -> Result<Restored, BitmapFileError> {
        let path = path.as_ref();
        check_tracked(space)?;
        let restored = match restore(path, space) {
            Ok(restored) => restored,
            Err(reason) => {
                for area in space.mappings() {
                    // An area that is unmapped meanwhile has nothing that could be dirty.
                    let _ = space.mark(area.range);
                }
                Restored::Everything { reason }
            }
        };
        let path = resolved(path)?;
        match std::fs::remove_file(&path) {
            Ok(()) => sync_folder_of(&path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        Ok(restored)
    }
}

/// Refuses a space that does not track yet: a peek at its first page says so.
fn check_tracked(space: &AddressSpace) -> Result<(), Error> {
    let Some(area) = space.mappings().first().copied() else {
        return Ok(());
    };
    let range = IovaRange::granule_at(area.range.start(), space.alignment());
    let request = HarvestRequest::new(range, space.alignment());
    space.peek(&request, UserBitmap::new(&mut [0])).map(drop)
}

/// Marks the pages of the file.
fn restore(path: &Path, space: &AddressSpace) -> Result<Restored, BitmapFileError> {
    let mut file = BitmapFile::open(path)?;
    // No more than `MAX_BITS`.
    let bits = file.range().granules(file.granule()) as u64;
    let bitmap = SparseBitmap::new(bits);
    let view = UserBitmap::sparse(&bitmap).view(file.range(), file.granule())?;
    file.or_into(&view)?;
    for run in view.runs() {
        // Pages outside of every area are counted.
        let _ = space.mark(run);
    }
    Ok(Restored::Saved {
        generation: file.generation(),
        bytes: u128::from(view.count()) << file.granule().lg2(),
    })
}
