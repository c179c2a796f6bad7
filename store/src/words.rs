//! One atomic word for each extent: whether it is open, how many writes are in flight, which of its
//! pages are dirty. The path of a write that finds its extents open is here, and takes no lock.
//!
//! ```text
//!  bit  0..31  dirty pages, the first page in bit 0
//!      32..59  writes in flight: pins
//!          60  closing: the leader closes the extent, unless it finds a claim
//!          61  used: written since the clock passed
//!          62  opening: the open record is in a batch that is not durable yet
//!          63  open: durably so
//! ```
//!
//! ```text
//!  closed -- request --> opening -- opened --> open -- close, if no pin --> closed
//! ```
//!
//! A write pins its extents (P1), waits until each is open (P2), lands, and leaves with its mark in
//! one operation (P3). The leader takes marks (T1), or closes a word without pins (T2). All are
//! read-modify-writes of one word, so one of two always comes first:
//!
//! * P1 and T2: if the pin comes first, the close fails. If the close comes first, the pin finds
//!   the word closed, and its write asks for the extent again, in a later batch.
//! * P3 and T1: if the mark comes first, the leader takes it, and sees the data (Release, Acquire).
//!   If the leader comes first, the mark stays in the word for the next one, and the extent is
//!   open.
//!
//! A thread with a handle does not pin. What it does instead is in [`claims`](crate::claims).

use dirtymap::sync::{AtomicU64, OnceLock, Ordering, TINY};

use crate::claims::Claims;
use crate::step::{Step, performs, weaken};

/// The most pages of an extent.
pub(crate) const MAX_PAGES: u64 = 32;
/// The most extents of a device.
pub(crate) const MAX_EXTENTS: u64 = 1 << 32;
/// The most writes in flight in one extent: far below what the word can count, so that threads that
/// are refused at the same time do not overflow it.
pub(crate) const MAX_PINS: u64 = 1 << 27;

const PAGES: u64 = (1 << 32) - 1;
const PIN: u64 = 1 << 32;
const PINS: u64 = ((1 << 28) - 1) * PIN;
const CLOSING: u64 = 1 << 60;
const USED: u64 = 1 << 61;
const OPENING: u64 = 1 << 62;
const OPEN: u64 = 1 << 63;

/// Words of a leaf: 4 KiB of memory.
const LEAF_LG2: u32 = if TINY { 1 } else { 9 };
/// Segment *k* has 2^*k* leaves.
const SEGMENTS: usize = (MAX_EXTENTS.ilog2() - LEAF_LG2) as usize + 1;

type Leaf = OnceLock<Box<[AtomicU64]>>;

/// The words of all extents. Memory is taken where writes are: 4 KiB for each 512 extents that lie
/// side by side.
pub(crate) struct Words {
    segments: [OnceLock<Box<[Leaf]>>; SEGMENTS],
    pub(crate) claims: Claims,
}

/// What became of an extent that was about to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    /// It is closed. These pages are dirty.
    Closed(u32),
    /// It has writes in flight, so it stays open.
    InUse,
}

impl Words {
    pub(crate) fn new() -> Self {
        Words {
            segments: std::array::from_fn(|_| OnceLock::new()),
            claims: Claims::new(),
        }
    }

    /// The word of an extent, below [`MAX_EXTENTS`]. Makes its leaf at the first use.
    #[inline]
    pub(crate) fn word(&self, extent: u64) -> &AtomicU64 {
        let leaf = (extent >> LEAF_LG2) + 1;
        let segment = leaf.ilog2();
        let leaves = self.segments[segment as usize]
            .get_or_init(|| (0..1u64 << segment).map(|_| OnceLock::new()).collect());
        let words = leaves[(leaf - (1 << segment)) as usize]
            .get_or_init(|| (0..1 << LEAF_LG2).map(|_| AtomicU64::new(0)).collect());
        &words[(extent & ((1 << LEAF_LG2) - 1)) as usize]
    }

    /// Pins an extent (P1), and says whether it is open. `None` if there are too many pins.
    #[inline]
    pub(crate) fn pin(&self, extent: u64) -> Option<bool> {
        Words::pin_word(self.word(extent))
    }

    /// The same, of the word of an extent.
    #[inline]
    pub(crate) fn pin_word(word: &AtomicU64) -> Option<bool> {
        // Acquire: pairs with the Release in `opened`; a write that finds its extent open comes
        // after the flush that opened it.
        let acquire = weaken(Step::SeeOpen, Ordering::Acquire);
        let before = word.fetch_add(PIN, acquire);
        if before & PINS >= MAX_PINS * PIN {
            // Relaxed: takes the own pin back, which nobody relied on.
            word.fetch_sub(PIN, Ordering::Relaxed);
            return None;
        }
        Some(before & OPEN != 0)
    }

    /// Whether a pinned extent is open (P2).
    #[inline]
    pub(crate) fn is_open(&self, extent: u64) -> bool {
        // Acquire: as in `pin`.
        let acquire = weaken(Step::SeeOpen, Ordering::Acquire);
        self.word(extent).load(acquire) & OPEN != 0
    }

    /// Asks for a pinned extent: true if the caller has to put its open record into a batch. Called
    /// under the lock of the batch, so that the order of requests is that of records.
    pub(crate) fn request(&self, extent: u64) -> bool {
        let word = self.word(extent);
        // Relaxed: the lock orders requests; whether the extent is open is looked at again, with
        // Acquire, before the write.
        if word.load(Ordering::Relaxed) & (OPEN | OPENING) != 0 {
            return false;
        }
        // Relaxed: only requests set the bit, and they come one after the other. The word cannot
        // become open meanwhile, because only a batch that has the record opens it.
        word.fetch_or(OPENING, Ordering::Relaxed);
        true
    }

    /// The open record of the extent is durable.
    pub(crate) fn opened(&self, extent: u64) {
        // Release: pairs with the Acquire in `pin` and `is_open`; publishes that the batch was
        // flushed.
        let release = weaken(Step::PublishOpen, Ordering::Release);
        self.word(extent).fetch_xor(OPEN | OPENING, release);
    }

    /// Ends a write: marks `pages` and takes the pin away, in one step (P3).
    #[inline]
    pub(crate) fn leave(&self, extent: u64, pages: u32) {
        Words::leave_word(self.word(extent), pages);
    }

    /// The same, of the word of an extent.
    #[inline]
    pub(crate) fn leave_word(word: &AtomicU64, pages: u32) {
        let bits = if pages == 0 {
            0
        } else {
            u64::from(pages) | USED
        };
        // Relaxed: a guess, which the exchange checks.
        let mut now = word.load(Ordering::Relaxed);
        // Release: pairs with the Acquire in `take` and `close`; publishes the data of the write.
        // Relaxed on failure: only another guess.
        let release = weaken(Step::PublishWrite, Ordering::Release);
        while let Err(other) =
            word.compare_exchange_weak(now, (now - PIN) | bits, release, Ordering::Relaxed)
        {
            now = other;
        }
    }

    /// Marks `pages` of an extent that is open, for a thread that claims it (C2). Returns false if
    /// it is not, or about to be closed.
    #[inline]
    pub(crate) fn mark_open(&self, extent: u64, pages: u32) -> bool {
        let word = self.word(extent);
        // Acquire: as in `pin`.
        let now = word.load(weaken(Step::SeeOpen, Ordering::Acquire));
        if now & (OPEN | CLOSING) != OPEN {
            return false;
        }
        let bits = u64::from(pages) | USED;
        if now & bits != bits {
            // Relaxed: the data of the write is published by the end of its claim, and the leader
            // that takes this mark sees the claim, by the fences of both.
            word.fetch_or(bits, Ordering::Relaxed);
        }
        true
    }

    /// Takes the dirty pages of an open extent, which stays open (T1).
    pub(crate) fn take(&self, extent: u64) -> u32 {
        // Acquire: pairs with the Release in `leave`; a thread that copies a page that is found
        // here sees the data of its write. Read-modify-writes in between continue the release
        // sequence.
        let acquire = weaken(Step::SeeWrite, Ordering::Acquire);
        (self.word(extent).fetch_and(!PAGES, acquire) & PAGES) as u32
    }

    /// Marks pages that were taken, and that are claimed, again.
    pub(crate) fn put_back(&self, extent: u64, pages: u32) {
        // Relaxed: as in `mark_open`.
        self.word(extent)
            .fetch_or(u64::from(pages), Ordering::Relaxed);
    }

    /// Says that an extent is about to be closed, unless it is in use. With `patient`, one that was
    /// written since the last call is in use, too. After it, the leader looks at claims.
    pub(crate) fn begin_close(&self, extent: u64, patient: bool) -> bool {
        let word = self.word(extent);
        // Relaxed: a guess, which the exchange checks.
        let now = word.load(Ordering::Relaxed);
        let pinned = now & PINS != 0 && performs(Step::HoldInFlight);
        if now & OPEN == 0 || pinned {
            return false;
        }
        if patient && now & USED != 0 {
            // Relaxed: the bit is a hint.
            word.fetch_and(!USED, Ordering::Relaxed);
            return false;
        }
        // Relaxed: the fence before the look at claims orders it.
        word.fetch_or(CLOSING, Ordering::Relaxed);
        true
    }

    /// Closes an extent that is about to be closed (T2), unless it is `claimed`, or a write pinned
    /// it meanwhile.
    pub(crate) fn close(&self, extent: u64, claimed: bool) -> Close {
        let word = self.word(extent);
        // Relaxed: a guess, which the exchange checks. After the look at claims it has the marks of
        // those that ended.
        let now = word.load(Ordering::Relaxed);
        let pinned = now & PINS != 0 && performs(Step::HoldInFlight);
        // Acquire: as in `take`. Relaxed on failure: the extent is in use.
        let acquire = weaken(Step::SeeWrite, Ordering::Acquire);
        if !claimed
            && !pinned
            && let Ok(_) = word.compare_exchange(now, now & PINS, acquire, Ordering::Relaxed)
        {
            return Close::Closed((now & PAGES) as u32);
        }
        // Relaxed: a handle that still sees the bit asks without its slot.
        word.fetch_and(!CLOSING, Ordering::Relaxed);
        Close::InUse
    }
}

#[cfg(all(test, not(dirtymap_loom)))]
mod tests {
    use super::{Close, Words};

    /// What the leader does where nothing is claimed.
    fn close(words: &Words, extent: u64, patient: bool) -> Close {
        match words.begin_close(extent, patient) {
            true => words.close(extent, false),
            false => Close::InUse,
        }
    }

    #[test]
    fn an_extent_closes_when_no_write_is_in_flight_and_hands_over_its_pages() {
        let words = Words::new();
        for extent in [0, 1, 511, 512, 1 << 24] {
            assert_eq!(words.pin(extent), Some(false));
            assert!(words.request(extent) && !words.request(extent));
            assert!(!words.is_open(extent));
            assert_eq!(close(&words, extent, false), Close::InUse, "not open yet");
            words.opened(extent);
            assert!(words.is_open(extent));
            assert_eq!(close(&words, extent, false), Close::InUse, "in flight");
            words.leave(extent, 0b101);
            assert_eq!(close(&words, extent, true), Close::InUse, "just used");
            assert_eq!(words.pin(extent), Some(true));
            words.leave(extent, 0);
            assert_eq!(close(&words, extent, true), Close::Closed(0b101));
            assert_eq!(words.pin(extent), Some(false), "closed");
        }
    }

    #[test]
    fn what_was_taken_is_not_there_twice() {
        let words = Words::new();
        words.pin(7);
        words.request(7);
        words.opened(7);
        words.leave(7, 1 << 31);
        assert_eq!((words.take(7), words.take(7)), (1 << 31, 0));
        assert_eq!(close(&words, 7, false), Close::Closed(0));
    }
}
