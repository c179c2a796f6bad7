//! The epochs of a consumer: its committed harvests, and the pages of each of them.
//!
//! # Numbers
//! Each lease gets a number when its walk has ended. The numbers of the committed leases are the
//! epochs. If two leases A and B have the same page, the copy of the lease with the higher number
//! is the one to keep. Let B have the lower number:
//!
//! * B has taken all of its pages before A gets its number, and so before the sync and the copies
//!   of A. So the copies of A contain every write that B reports.
//! * So copies that are applied in the order of numbers end with the last report of each page. A
//!   write that this copy misses is still dirty, and a later lease reports it.
//!
//! A number from the begin of the walk would be wrong, because the walk may take a page that was
//! written after a lease with a higher number was copied.
//!
//! # Parents
//! The parent of an epoch is the epoch before it. It is certain only at the commit, because other
//! leases may be committed or aborted until then.
//!
//! * A lease that is committed after one with a higher number is *late*: its copies may be older
//!   than those of the newest epoch. It gets a new number, and no parent.
//! * Pages that were committed by parts are not reported again, even if the rest of their lease is
//!   aborted or the lease is forgotten. So the end of such a lease makes an epoch, also if the rest
//!   is aborted. An epoch that another lease makes before that end does not have these pages, and
//!   gets no parent.
//!
//! # Gaps
//! A switch of tracking to on makes an epoch: the full copy after the switch. Writes of the time
//! without tracking, and pages that the switch discards, are in no increment. So no older epoch is
//! the parent of a later one, and leases that were harvested before are late.
//!
//! # Deltas
//! A commit adds its pages to the delta of the newest epoch that a cursor holds. So there are as
//! many deltas as epochs with cursors, and none without cursors. When the last cursor of an epoch
//! is dropped, its delta is merged into that of the next older epoch with a cursor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::str::FromStr;

use crate::ranges::PageSet;
use crate::sync::{AtomicU64, Mutex, Ordering, Step, lock, performs};
use crate::units::{Granule, IovaRange};

/// The name of one state of a consumer's copy: the identity of the consumer, and the number of the
/// last increment that the copy contains.
///
/// The identity of a consumer is unique over all spaces and processes: 128 random bits. So a
/// program can store an epoch with its copy, and ask for it later by
/// [`Consumer::since`](crate::Consumer::since). A consumer recognizes an epoch that is not one of
/// its own.
///
/// Its text is 32 hexadecimal digits, a hyphen, and a decimal number. Epochs of one consumer are
/// ordered by number.
///
/// ```
/// use dirtymap::harvest::Epoch;
///
/// let text = "0000000000000000000000000000002a-7";
/// let epoch: Epoch = text.parse()?;
/// assert_eq!((epoch.consumer(), epoch.number()), (42, 7));
/// assert_eq!(epoch.to_string(), text);
/// # Ok::<(), dirtymap::harvest::BadEpoch>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch {
    consumer: u128,
    number: u64,
}

/// A text that is no [`Epoch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an epoch is 32 hexadecimal digits, a hyphen and a decimal number")]
pub struct BadEpoch;

impl Epoch {
    /// The identity of the consumer.
    pub fn consumer(self) -> u128 {
        self.consumer
    }

    /// The number of the increment. 0 is the moment at which the consumer joined. Numbers ascend
    /// with gaps, because a lease that is aborted has used up its number.
    pub fn number(self) -> u64 {
        self.number
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}-{}", self.consumer, self.number)
    }
}

impl FromStr for Epoch {
    type Err = BadEpoch;

    fn from_str(text: &str) -> Result<Self, BadEpoch> {
        let (consumer, number) = text.split_once('-').ok_or(BadEpoch)?;
        // `from_str_radix` and `parse` take a sign, too.
        let hexadecimal = consumer.bytes().all(|byte| byte.is_ascii_hexdigit());
        let decimal = number.bytes().all(|byte| byte.is_ascii_digit());
        if consumer.len() != 32 || !hexadecimal || !decimal {
            return Err(BadEpoch);
        }
        Ok(Epoch {
            consumer: u128::from_str_radix(consumer, 16).map_err(|_| BadEpoch)?,
            number: number.parse().map_err(|_| BadEpoch)?,
        })
    }
}

/// The place of a lease among the increments of its consumer: see
/// [`Lease::lineage`](crate::Lease::lineage).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// The epoch that the commit of the lease makes.
    pub epoch: Epoch,
    /// The state to which the pages of the lease are the increment.
    pub parent: Parent,
}

/// The state to which the pages of a lease are the increment.
///
/// Compare it with the epoch of the copy. That it is an [`Epoch`](Parent::Epoch) is not enough,
/// because it may be one that no copy has: after a start of tracking, or after another thread
/// committed a lease of this consumer. A copy of another epoch than the parent needs everything, or
/// the pages of [`since`](crate::Consumer::since).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Parent {
    /// A copy of this epoch becomes a copy of the lease's own epoch, if the pages of the lease are
    /// copied over it. A consumer that began as a [copy](crate::Start::LikeOf) of another consumer,
    /// which covers at least as much, has an epoch of that consumer as its first parent.
    Epoch(Epoch),
    /// No copy is needed: this lease reports all that is mapped in the consumer's range. If it
    /// covers a part of the range, or is committed in part, it and the later ones do. After
    /// [`Start::Dirty`](crate::Start::Dirty), that is what was mapped at the join.
    Everything(Why),
    /// No epoch is certain to be the right one. The pages of the lease are not enough: copy
    /// everything, or the pages that [`since`](crate::Consumer::since) returns for the epoch of a
    /// copy.
    Unknown(Why),
}

/// The reason for which everything has to be copied.
///
/// ```
/// use dirtymap::harvest::Why;
///
/// assert_eq!(Why::Foreign.to_string(), "the epoch is one of another consumer");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// The consumer has no epoch yet. It began with [`Start::Dirty`](crate::Start::Dirty), or as a
    /// [copy](crate::Start::LikeOf) of a consumer that covers less.
    Beginning,
    /// The pending pages of the consumer, or the delta of the cursor, were out of
    /// [`Bounds`](crate::harvest::Bounds), and were dropped.
    Bounds,
    /// A lease whose harvest ended later was committed earlier; or a
    /// [cursor](crate::Consumer::cursor) was taken after parts of this lease were committed; or
    /// tracking was started after the harvest.
    Late,
    /// Parts of another lease were committed, and that lease has not ended.
    Parts,
    /// The epoch belongs to another consumer, of this space or another one.
    Foreign,
    /// The number of the epoch is higher than that of the consumer's newest epoch.
    Future,
    /// Tracking was off for a while after the epoch, in the space or in a domain. Writes of that
    /// time are in no increment.
    Untracked,
    /// No cursor holds the epoch, so its increment was merged with others; or the lease with this
    /// number was aborted.
    Merged,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::Beginning => "the consumer begins",
            Why::Bounds => "more was held than the bounds of the consumer allow",
            Why::Late => "a later epoch was made before the commit",
            Why::Parts => "parts of another lease are committed, and it has not ended",
            Why::Foreign => "the epoch is one of another consumer",
            Why::Future => "the epoch is not committed yet",
            Why::Untracked => "tracking was off for a while after the epoch",
            Why::Merged => "no cursor holds the epoch",
        })
    }
}

/// The result of [`Consumer::since`](crate::Consumer::since).
#[derive(Clone, Debug)]
#[must_use]
pub enum Since {
    /// These pages have to be copied.
    Runs(Written),
    /// The pages are unknown, so everything has to be copied.
    Everything(Why),
}

/// The pages that a consumer has committed after one epoch, up to another one.
#[derive(Clone, Debug)]
pub struct Written {
    from: Epoch,
    to: Epoch,
    pages: PageSet,
}

impl Written {
    /// The epoch after which the pages were committed.
    pub fn from(&self) -> Epoch {
        self.from
    }

    /// The epoch up to which the pages were committed. A copy of [`from`](Self::from) becomes a
    /// copy of this epoch, if these pages are copied over it.
    pub fn to(&self) -> Epoch {
        self.to
    }

    /// The pages as maximal runs, in ascending order. Some of them may be unmapped since.
    pub fn runs(&self) -> impl Iterator<Item = IovaRange> + '_ {
        self.pages.runs()
    }

    /// Whether no page was committed between the two epochs.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// The most memory that the pending pages and the deltas of a consumer may take, and the most
/// harvests and epochs for which they are held. See
/// [`Consumer::set_bounds`](crate::Consumer::set_bounds).
///
/// ```
/// use dirtymap::harvest::Bounds;
///
/// let small = Bounds { bytes: 1 << 20, deltas: 4, ..Bounds::default() };
/// assert_eq!(small.age, u64::MAX); // any age
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Bounds {
    /// Bytes of memory for pending pages and deltas together. Deltas are dropped first, the oldest
    /// first.
    pub bytes: u64,
    /// The number of deltas: one for each epoch that has cursors. The oldest are dropped first.
    pub deltas: u64,
    /// The most harvests of other consumers since the consumer's own last harvest; beyond that, its
    /// pending pages are dropped. Also the most epochs since the epoch of a cursor; beyond that,
    /// the delta of the cursor is dropped. [`u64::MAX`] is no bound.
    pub age: u64,
}

impl Default for Bounds {
    /// 256 MiB, which are the pending pages of 8 TiB at 4 KiB a page; 64 deltas; any age.
    fn default() -> Self {
        Bounds {
            bytes: 256 << 20,
            deltas: 64,
            age: u64::MAX,
        }
    }
}

/// A lease, as its consumer's epochs see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) number: u64,
    /// The number of the store from which it took pages that were pending as a whole, if it did.
    pub(crate) whole: Option<u64>,
}

/// The epochs of one consumer.
#[derive(Debug)]
pub(crate) struct Epochs {
    identity: u128,
    /// The last number of a lease.
    last: AtomicU64,
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Log {
    /// The newest epoch.
    head: u64,
    /// The first epoch since writes were untracked for the last time.
    first: u64,
    /// The parent of the next lease that is neither late nor everything.
    top: Parent,
    /// Epochs that were made.
    made: u64,
    /// The epochs that cursors hold: how many cursors, and how many epochs there were before.
    cursors: BTreeMap<u64, (u64, u64)>,
    /// What was committed after each of them and before the next of them.
    deltas: BTreeMap<u64, PageSet>,
    /// The leases of which parts were committed since the newest epoch.
    parts: BTreeSet<u64>,
    /// The last store whose pages that were pending as a whole have been committed, and the number
    /// of the first lease that committed some or all of them.
    told: (u64, u64),
    page: Granule,
}

impl Epochs {
    /// The epochs of a consumer that begins clean.
    pub(super) fn new(page: Granule) -> Self {
        let identity = new_identity();
        Epochs {
            identity,
            last: AtomicU64::new(0),
            log: Mutex::new(Log {
                head: 0,
                first: 0,
                top: Parent::Epoch(Epoch {
                    consumer: identity,
                    number: 0,
                }),
                made: 0,
                cursors: BTreeMap::new(),
                deltas: BTreeMap::new(),
                parts: BTreeSet::new(),
                told: (0, 0),
                page,
            }),
        }
    }

    /// The parent of a consumer's first increment is `top`.
    pub(super) fn begin_with(&self, top: Parent) {
        lock(&self.log).top = top;
    }

    /// The parent that an increment would have that follows all epochs.
    pub(super) fn top(&self) -> Parent {
        lock(&self.log).top
    }

    /// The number of a lease, whose walk has ended.
    pub(crate) fn number(&self) -> u64 {
        // AcqRel: what a lease with a lower number has taken happens before this, and so before the
        // copies of this lease: see the module.
        self.last.fetch_add(1, Ordering::AcqRel) + 1
    }

    fn epoch(&self, number: u64) -> Epoch {
        Epoch {
            consumer: self.identity,
            number,
        }
    }

    /// Writes were not tracked for a while. The full copy that the program makes after that has an
    /// epoch of its own, to which no older one leads. It also has what is pending as a whole in the
    /// store with this number.
    pub(super) fn restart(&self, store: u64) {
        let mut log = lock(&self.log);
        log.first = self.make(&mut log, 0).number;
        log.told = (store, 0);
        log.deltas.clear();
    }

    /// The newest epoch.
    pub(crate) fn newest(&self) -> Epoch {
        self.epoch(lock(&self.log).head)
    }

    /// The lineage of a lease if it were committed now.
    pub(crate) fn lineage(&self, entry: Entry) -> Lineage {
        Lineage {
            epoch: self.epoch(entry.number),
            parent: lock(&self.log).parent(entry),
        }
    }

    /// A lease is committed; `runs` are its pages without those that were committed by parts.
    pub(crate) fn commit(
        &self,
        entry: Entry,
        runs: impl IntoIterator<Item = IovaRange>,
        room: &Bounds,
    ) -> Lineage {
        let mut log = lock(&self.log);
        let parent = log.parent(entry);
        log.add(runs);
        log.tell(entry);
        let epoch = self.make(&mut log, entry.number);
        log.keep_within(room);
        Lineage { epoch, parent }
    }

    /// A part of a lease is committed.
    pub(crate) fn commit_part(
        &self,
        entry: Entry,
        runs: impl IntoIterator<Item = IovaRange>,
        room: &Bounds,
    ) {
        let mut log = lock(&self.log);
        log.add(runs);
        log.tell(entry);
        log.parts.insert(entry.number);
        log.keep_within(room);
    }

    /// The rest of a lease is put back. If parts of it were committed, they are an epoch.
    pub(crate) fn abort(&self, entry: Entry) {
        let mut log = lock(&self.log);
        if log.parts.contains(&entry.number) {
            self.make(&mut log, entry.number);
        }
    }

    /// Makes an epoch with this number, or with a new one if it is late.
    fn make(&self, log: &mut Log, number: u64) -> Epoch {
        let number = match number > log.head {
            true => number,
            false => self.number(),
        };
        let epoch = self.epoch(number);
        log.head = number;
        log.top = Parent::Epoch(epoch);
        log.made += 1;
        log.parts.clear();
        epoch
    }

    /// Holds the newest epoch, which has all that was committed so far.
    pub(crate) fn hold(&self, room: &Bounds) -> Epoch {
        let mut log = lock(&self.log);
        if !log.parts.is_empty() {
            self.make(&mut log, 0);
        }
        let (head, made, page) = (log.head, log.made, log.page);
        log.cursors.entry(head).or_insert((0, made)).0 += 1;
        log.deltas.entry(head).or_insert_with(|| PageSet::new(page));
        log.keep_within(room);
        self.epoch(head)
    }

    /// Holds an epoch that is held.
    pub(crate) fn hold_again(&self, epoch: Epoch) {
        if let Some((holds, _)) = lock(&self.log).cursors.get_mut(&epoch.number) {
            *holds += 1;
        }
    }

    /// Ends one hold of an epoch.
    pub(crate) fn release(&self, epoch: Epoch) {
        let mut log = lock(&self.log);
        let number = epoch.number;
        let Some((holds, _)) = log.cursors.get_mut(&number) else {
            return;
        };
        *holds -= 1;
        if *holds > 0 {
            return;
        }
        log.cursors.remove(&number);
        if let Some(delta) = log.deltas.remove(&number)
            && performs(Step::MergeDelta)
            && let Some((_, before)) = log.deltas.range_mut(..number).next_back()
        {
            before.merge_with(&delta);
        }
    }

    /// What was committed after `epoch`.
    pub(crate) fn since(&self, epoch: Epoch) -> Since {
        let log = lock(&self.log);
        let number = epoch.number;
        if epoch.consumer != self.identity {
            return Since::Everything(Why::Foreign);
        }
        if number > log.head {
            return Since::Everything(Why::Future);
        }
        if number < log.first {
            return Since::Everything(Why::Untracked);
        }
        let mut pages = PageSet::new(log.page);
        match log.deltas.contains_key(&number) {
            true => {
                let deltas = log.deltas.range(number..);
                deltas.for_each(|(_, delta)| pages.merge_with(delta));
            }
            false if log.cursors.contains_key(&number) => return Since::Everything(Why::Bounds),
            // Nothing was committed since the newest epoch.
            false if number == log.head && log.parts.is_empty() => {}
            false => return Since::Everything(Why::Merged),
        }
        Since::Runs(Written {
            from: epoch,
            to: self.epoch(log.head),
            pages,
        })
    }

    /// The number of deltas, and the bytes of memory that they take.
    pub(crate) fn deltas(&self) -> (u64, u64) {
        let log = lock(&self.log);
        (log.deltas.len() as u64, log.bytes())
    }
}

impl Log {
    fn parent(&self, entry: Entry) -> Parent {
        if entry.number <= self.head {
            return Parent::Unknown(Why::Late);
        }
        let (told, by) = self.told;
        if entry
            .whole
            .is_some_and(|whole| whole > told || by == entry.number)
        {
            return Parent::Everything(Why::Bounds);
        }
        if self.parts.iter().any(|part| *part != entry.number) {
            return Parent::Unknown(Why::Parts);
        }
        self.top
    }

    /// A lease that took pages which were pending as a whole is committed. The first such lease of
    /// a store is *everything*; what a later lease takes of the same store is an increment.
    fn tell(&mut self, entry: Entry) {
        if let Some(whole) = entry.whole.filter(|whole| *whole > self.told.0) {
            self.told = (whole, entry.number);
        }
    }

    /// Adds pages that are committed.
    fn add(&mut self, runs: impl IntoIterator<Item = IovaRange>) {
        if let Some((_, delta)) = self.deltas.iter_mut().next_back() {
            delta.extend(runs);
        }
    }

    fn bytes(&self) -> u64 {
        self.deltas.values().map(PageSet::held_bytes).sum()
    }

    /// Drops the oldest deltas until the others are within bounds.
    fn keep_within(&mut self, room: &Bounds) {
        let mut bytes = self.bytes();
        while let Some(oldest) = self.deltas.first_entry() {
            let born = self.cursors.get(oldest.key()).map(|(_, born)| *born);
            let age = born.map_or(0, |born| self.made - born);
            let held = oldest.get().held_bytes();
            if age <= room.age && self.deltas.len() as u64 <= room.deltas && bytes <= room.bytes {
                break;
            }
            self.deltas.pop_first();
            bytes -= held;
        }
    }
}

/// An identity that no other consumer has: 128 random bits of the system, by the keys of hash maps.
/// The number of the process is hashed as well, because a child of `fork` has the same keys as its
/// parent.
fn new_identity() -> u128 {
    let half = || {
        let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
        hasher.write_u32(std::process::id());
        u128::from(hasher.finish())
    };
    half() << 64 | half()
}
