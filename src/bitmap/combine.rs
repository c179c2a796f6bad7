//! Two views combined: OR, and AND NOT.

use super::BitmapView;
use super::runs::Reader;
use super::window::Window;
use crate::error::BitmapError;
use crate::words::word_masks;

impl BitmapView<'_> {
    /// ORs what is dirty here into `target`, and returns how many bits that set there. Granules and
    /// bases may differ: a bit of `target` is set if any byte it stands for is dirty here, and none
    /// outside `target`'s range.
    ///
    /// So this merges (two equal requests), converts (another granule) and rebases (another range).
    ///
    /// # Errors
    /// [`BitmapError::Shrank`] or [`BitmapError::Window`] if a window of a file cannot be had, on
    /// either side, [`BitmapError::NoSpace`] if there is no room for one of `target`; what was ORed
    /// in before stays.
    pub fn or_into(&self, target: &BitmapView<'_>) -> Result<u64, BitmapError> {
        let mut sink = target.sink();
        let mut runs = self.runs();
        while let Some(run) = runs.next_readable()? {
            sink.put(run)?;
        }
        Ok(sink.bits_set())
    }

    /// Clears what is dirty in `other`, and returns how many bits that cleared. Granules and bases
    /// may differ: a bit is cleared only if every byte it stands for is dirty in `other`.
    ///
    /// Not while a lease over this bitmap lives: what is cleared here would be lost by its abort.
    ///
    /// # Errors
    /// As [`or_into`](Self::or_into); what was cleared before stays cleared.
    pub fn and_not(&self, other: &BitmapView<'_>) -> Result<u64, BitmapError> {
        let mut cleared = 0;
        let mut reader = Reader::new(self.backing, self.last_position());
        // The reader's window may be a copy: what is cleared is cleared in one of its own.
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
                    // The old one goes before the new one comes.
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
