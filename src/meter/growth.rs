//! How many different pages are written within a time.
//!
//! ```text
//!  look       1   2   3   4   5   6   7   8
//!  windows    |1| |1| |1| |1| |1| |1| |1| |1|     pages of one look
//!             |--2--| |--2--| |--2--| |--2--|     of two, each page once
//!             |------4------| |------4------|
//!             |--------------8--------------|
//! ```
//!
//! A window that is full yields one point: its time and its bytes. Then it is ORed into the next
//! larger window. So a page is handled once for each window in which it is new. Only values between
//! two points, and above the last one, are estimated.

use std::time::Duration;

use super::heat::{left_after, lost_after};
use crate::bitmap::{BitmapView, SparseBitmap, UserBitmap};
use crate::error::Error;
use crate::units::{Granule, IovaRange};

/// The most windows: more looks than a program makes.
const MOST: usize = 40;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Growth {
    half_life: f64,
    granule: Granule,
    windows: Vec<Window>,
}

/// The windows of one size, one after the other.
#[derive(Debug)]
struct Window {
    bits: SparseBitmap,
    /// Of the window that is filling.
    bytes: u64,
    seconds: f64,
    halves: u8,
    /// Sums over the windows that were full, with decay: of seconds, of bytes, of weights.
    seen: [f64; 3],
}

impl Window {
    fn new(granule: Granule) -> Self {
        let bits = IovaRange::ALL.granules(granule);
        Window {
            bits: SparseBitmap::new(u64::try_from(bits).unwrap_or(u64::MAX)),
            bytes: 0,
            seconds: 0.0,
            halves: 0,
            seen: [0.0; 3],
        }
    }

    fn view(&self, granule: Granule) -> Result<BitmapView<'_>, Error> {
        Ok(UserBitmap::sparse(&self.bits).view(IovaRange::ALL, granule)?)
    }

    /// The mean time and bytes of the windows that were full.
    fn point(&self) -> Option<(f64, f64)> {
        let [seconds, bytes, weights] = self.seen;
        (weights > 0.0).then(|| (seconds / weights, bytes / weights))
    }

    fn empty(&mut self) {
        self.bits.clear();
        (self.bytes, self.seconds, self.halves) = (0, 0.0, 0);
    }
}

/// The bytes of so many granules. Saturates: all addresses are one more than there are numbers.
fn bytes_of(bits: u64, granule: Granule) -> u64 {
    u64::try_from(u128::from(bits) << granule.lg2()).unwrap_or(u64::MAX)
}

impl Growth {
    pub(super) fn new(half_life: Duration) -> Self {
        let granule = Granule::K4;
        Growth {
            half_life: half_life.max(Duration::from_nanos(1)).as_secs_f64(),
            granule,
            windows: vec![Window::new(granule)],
        }
    }

    /// A look found `runs`, `elapsed` after the one before. Returns their bytes.
    pub(super) fn look(
        &mut self,
        runs: impl Iterator<Item = IovaRange>,
        granule: Option<Granule>,
        elapsed: Duration,
    ) -> Result<u64, Error> {
        // A bitmap of all single bytes has too many bits.
        let pairs = Granule::from_lg2(1).unwrap_or(Granule::K4);
        let granule = granule.map(|granule| granule.max(pairs));
        if let Some(granule) = granule.filter(|granule| *granule != self.granule) {
            // The first look that finds areas has the granule, and all later looks have the same.
            self.granule = granule;
            self.windows = vec![Window::new(granule)];
        }
        self.windows[0].empty();
        self.windows[0].seconds = elapsed.as_secs_f64();
        let bits = {
            let mut sink = self.windows[0].view(self.granule)?.sink();
            for run in runs {
                sink.record(run)?;
            }
            sink.bits_set()
        };
        self.windows[0].bytes = bytes_of(bits, self.granule);
        let bytes = self.windows[0].bytes;
        self.full(0)?;
        Ok(bytes)
    }

    /// The window `nth` is full.
    fn full(&mut self, nth: usize) -> Result<(), Error> {
        let window = &mut self.windows[nth];
        let left = left_after(window.seconds, self.half_life);
        let lost = lost_after(window.seconds, self.half_life);
        // The point of a window whose looks took no time has no weight.
        for (sum, value) in window
            .seen
            .iter_mut()
            .zip([window.seconds, window.bytes as f64, 1.0])
        {
            *sum = *sum * left + value * lost;
        }
        if nth + 1 == MOST {
            window.empty();
            return Ok(());
        }
        if nth + 1 == self.windows.len() {
            self.windows.push(Window::new(self.granule));
        }
        let (below, above) = self.windows.split_at_mut(nth + 1);
        let (from, to) = (&mut below[nth], &mut above[0]);
        let fresh = from.view(self.granule)?.or_into(&to.view(self.granule)?)?;
        to.bytes = to.bytes.saturating_add(bytes_of(fresh, self.granule));
        to.seconds += from.seconds;
        to.halves += 1;
        if nth > 0 {
            from.empty();
        }
        match to.halves {
            2.. => self.full(nth + 1),
            _ => Ok(()),
        }
    }

    /// The runs of the last look.
    pub(super) fn runs(&self) -> impl Iterator<Item = IovaRange> {
        // Never an error: the bitmap has a bit for each granule.
        let view = self.windows[0].view(self.granule);
        view.into_iter().flat_map(|view| view.runs())
    }

    /// The bytes that are written within so many seconds, each page once.
    pub(super) fn within(&self, seconds: f64) -> f64 {
        let (mut low, mut slope) = ((0.0, 0.0), 0.0);
        for point in self.windows.iter().filter_map(Window::point) {
            // Means of different windows may cross.
            let point = (point.0, f64::max(point.1, low.1));
            if point.0 <= low.0 {
                continue;
            }
            slope = (point.1 - low.1) / (point.0 - low.0);
            if seconds <= point.0 {
                break;
            }
            low = point;
        }
        low.1 + (seconds - low.0) * slope
    }
}
