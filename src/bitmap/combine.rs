//! Two views combined: OR, and AND NOT.

use super::BitmapView;
use super::runs::Reader;
use super::window::Window;
use crate::error::BitmapError;
use crate::words::word_masks;

impl BitmapView<'_> {
    /// ORs the dirty bytes of this view into `target`, and returns how many bits that set there.
    /// Granules and bases may differ: a bit of `target` is set if any of its bytes is dirty here.
    /// Bits outside `target`'s range are not touched.
    ///
    /// So this merges (two equal requests), converts (another granule) and rebases (another range).
    ///
    /// ```
    /// use dirtymap::{Granule, ToIovaRange, UserBitmap};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let range = (0..64 << 12).to_iova_range()?;
    /// let (mut fine, mut coarse) = ([0b1_0001], [0]);
    /// let fine = UserBitmap::new(&mut fine).view(range, Granule::K4)?;
    /// let coarse_view = UserBitmap::new(&mut coarse).view(range, Granule::from_bytes(16 << 10)?)?;
    /// assert_eq!(fine.or_into(&coarse_view)?, 2); // pages 0 and 4 are in two pages of 16 KiB
    /// assert_eq!(coarse, [0b11]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`BitmapError::Shrank`] or [`BitmapError::Window`] if a window of a file cannot be had, on
    /// either side, [`BitmapError::NoSpace`] if there is no room for one of `target`; what was ORed
    /// in before stays.
    #[doc(alias = "bdrv_merge_dirty_bitmap")]
    pub fn or_into(&self, target: &BitmapView<'_>) -> Result<u64, BitmapError> {
        let mut sink = target.sink();
        let mut runs = self.runs();
        while let Some(run) = runs.next_readable()? {
            sink.put(run)?;
        }
        Ok(sink.bits_set())
    }

    /// Clears the bits whose bytes are dirty in `other`, and returns how many bits that cleared.
    /// Granules and bases may differ: a bit is cleared only if each of its bytes is dirty in
    /// `other`.
    ///
    /// Do not call this while a lease over this bitmap lives: the abort of that lease would lose
    /// the cleared pages.
    ///
    /// ```
    /// use dirtymap::{Granule, ToIovaRange, UserBitmap};
    ///
    /// # fn main() -> Result<(), dirtymap::Error> {
    /// let range = (0..64 << 12).to_iova_range()?;
    /// let (mut dirty, mut sent) = ([0b111], [0b010]);
    /// let sent = UserBitmap::new(&mut sent).view(range, Granule::K4)?;
    /// UserBitmap::new(&mut dirty).view(range, Granule::K4)?.and_not(&sent)?;
    /// assert_eq!(dirty, [0b101]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`or_into`](Self::or_into). Bits that were cleared before stay cleared.
    pub fn and_not(&self, other: &BitmapView<'_>) -> Result<u64, BitmapError> {
        let mut cleared = 0;
        let mut reader = Reader::new(self.backing, self.last_position());
        // The reader's window may be a copy, so bits are cleared in another window.
        let mut own = Window::none();
        let mut runs = other.runs();
        while let Some(run) = runs.next_readable()? {
            let Some((first, last)) = self.positions_within(run) else {
                continue;
            };
            let mut next = first / 64;
            while next <= last / 64
                && let Some((word, _)) = reader.seek(next).map_err(|(_, error)| error)?
                && word <= last / 64
            {
                if !own.holds(word) {
                    // The old window is closed before the new one is opened.
                    drop(std::mem::replace(&mut own, Window::none()));
                    own = self.backing.window(word, self.last_position())?;
                }
                let from = first.max(word * 64);
                for (word, mask) in word_masks(from, last.min(word * 64 + 63)) {
                    cleared += u64::from(own.and_not(word, mask).count_ones());
                }
                next = word + 1;
            }
        }
        Ok(cleared)
    }
}
