//! Discards in any order with writes, harvests, aborts, cuts, unmaps and joins, against an oracle
//! that is the memory itself: a number for each page, 0 after a discard.
//!
//! * A page that a lease calls zero is 0 at that moment, or was written after the harvest.
//! * A last harvest leaves the copy of each consumer equal to the memory.
//! * Tight: a page that was discarded as a whole, and not written since, is never called data.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use dirtymap::harvest::Content;
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, Consumer, DirtySource, DomainId, Error, Granule, Iova, IovaRange, Lease,
    Owed, Rounds, Start, Tracking,
};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const PAGES: usize = 24;
/// Pages of a leaf of each domain.
const LEAVES: [usize; 2] = [1, 4];
/// Named consumers at most.
const NAMED: usize = 3;

fn pages(first: usize, n: usize) -> IovaRange {
    IovaRange::from_len(Iova::new(first as u64 * PAGE), n as u64 * PAGE).unwrap()
}

/// A table of leaves with dirty bits, and a device that caches "D is set".
struct Device {
    leaf: usize,
    dirty: Vec<AtomicBool>,
    cached: Vec<AtomicBool>,
    flush_fails: AtomicBool,
    /// Runs once, before the next look.
    at_look: Mutex<Option<AtLook>>,
}

type AtLook = Box<dyn FnOnce() + Send>;

struct Source(Arc<Device>);

impl Device {
    fn new(leaf: usize) -> Arc<Self> {
        let clear = || (0..PAGES / leaf).map(|_| AtomicBool::new(false)).collect();
        Arc::new(Device {
            leaf,
            dirty: clear(),
            cached: clear(),
            flush_fails: AtomicBool::new(false),
            at_look: Mutex::new(None),
        })
    }

    fn writes(&self, page: usize) {
        let leaf = page / self.leaf;
        if !self.cached[leaf].swap(true, SeqCst) {
            self.dirty[leaf].store(true, SeqCst);
        }
    }

    fn range(&self, leaf: usize) -> IovaRange {
        pages(leaf * self.leaf, self.leaf)
    }
}

impl DirtySource for Source {
    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        for leaf in 0..self.0.dirty.len() {
            let inside = self.0.range(leaf).intersection(range);
            if let Some(inside) = inside.filter(|_| self.0.dirty[leaf].swap(false, SeqCst)) {
                dirty(inside);
            }
        }
        gather.add(range, Granule::K4);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        if to == Tracking::On {
            let all = self.0.dirty.iter().chain(&self.0.cached);
            all.for_each(|bit| bit.store(false, SeqCst));
        }
        Ok(())
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        let happen = self.0.at_look.lock().unwrap().take();
        if let Some(happen) = happen {
            happen();
        }
        let size = Granule::from_bytes(self.0.leaf as u64 * PAGE).unwrap();
        for leaf in 0..self.0.dirty.len() {
            let (at, dirty) = (self.0.range(leaf), &self.0.dirty[leaf]);
            if at.intersects(range) && dirty.load(SeqCst) {
                let clear = || dirty.swap(false, SeqCst);
                let at = at.start();
                out.take(self.0.range(leaf), size, clear)
                    .map_err(|error| Stopped { at, error })?;
            }
        }
        Ok(())
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        if self.0.flush_fails.load(SeqCst) {
            return Err(Error::source_failed(io::Error::from(io::ErrorKind::Other)));
        }
        for leaf in 0..self.0.cached.len() {
            let owed = gather.ranges().iter();
            if owed
                .into_iter()
                .any(|owed| owed.intersects(self.0.range(leaf)))
            {
                self.0.cached[leaf].store(false, SeqCst);
            }
        }
        Ok(Invalidated::default())
    }
}

#[derive(Clone, Debug)]
enum Op {
    Mark(usize, usize),
    Write(usize, usize),
    Discard {
        first: usize,
        pages: usize,
        /// Bytes that are cut off at either end.
        cut: u64,
        end: End,
        /// While the storage is dropped, before and after.
        meanwhile: Vec<Op>,
    },
    Harvest {
        by: usize,
        commits: bool,
        domain: Option<usize>,
        /// Before the sync.
        meanwhile: Vec<Op>,
    },
    /// A harvest. When it looks, other memory comes to the addresses, page `zero` of it is
    /// discarded, and then a device writes page `written`.
    Late {
        by: usize,
        commits: bool,
        zero: usize,
        written: usize,
    },
    Cut(usize),
    Remap,
    Restart(usize),
    Join(usize),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Drops,
    CannotDrop,
    CannotFlush,
}

fn op() -> impl Strategy<Value = Op> {
    let simple = prop_oneof![
        4 => (0..PAGES, 1..4usize).prop_map(|(first, n)| Op::Mark(first, n.min(PAGES - first))),
        6 => (0..2usize, 0..PAGES).prop_map(|(domain, page)| Op::Write(domain, page)),
        1 => (1..PAGES).prop_map(Op::Cut),
        1 => Just(Op::Remap),
        2 => (0..=NAMED, any::<bool>(), 0..PAGES, 0..PAGES, any::<bool>()).prop_map(
            |(by, commits, zero, written, same)| Op::Late {
                by,
                commits,
                zero,
                written: if same { zero } else { written },
            }
        ),
        1 => (0..PAGES).prop_map(Op::Restart),
        1 => (0..5usize).prop_map(Op::Join),
    ];
    simple.prop_recursive(3, 12, 3, |inner| {
        let meanwhile = prop::collection::vec(inner, 0..3);
        let end = prop_oneof![
            4 => Just(End::Drops),
            1 => Just(End::CannotDrop),
            1 => Just(End::CannotFlush),
        ];
        let cut = prop_oneof![3 => Just(0), 1 => Just(512u64)];
        let domain = prop_oneof![4 => Just(None), 1 => (0..2usize).prop_map(Some)];
        prop_oneof![
            (0..PAGES, 1..9usize, cut, end, meanwhile.clone()).prop_map(
                |(first, n, cut, end, meanwhile)| Op::Discard {
                    first,
                    pages: n.min(PAGES - first),
                    cut,
                    end,
                    meanwhile,
                }
            ),
            (0..=NAMED, any::<bool>(), domain, meanwhile).prop_map(
                |(by, commits, domain, meanwhile)| Op::Harvest {
                    by,
                    commits,
                    domain,
                    meanwhile,
                }
            ),
        ]
    })
}

struct Rig {
    space: Arc<AddressSpace>,
    domains: Vec<(DomainId, Arc<Device>)>,
    /// After the unnamed one, which has no handle.
    consumers: RefCell<Vec<Consumer<'static>>>,
    copies: RefCell<Vec<[u64; PAGES]>>,
    memory: RefCell<[u64; PAGES]>,
    /// Pages that must be called zero.
    surely: RefCell<[bool; PAGES]>,
    last_value: Cell<u64>,
    any_discard: Cell<bool>,
    /// How many calls are inside of each other.
    depth: Cell<usize>,
    /// How many of them are discards.
    at_work: Cell<usize>,
}

impl Rig {
    fn new() -> Self {
        let space = Arc::new(AddressSpace::tracked(Granule::K4));
        space.map(pages(0, PAGES), 0, Access::ReadWrite).unwrap();
        let domains = LEAVES.map(|leaf| {
            let device = Device::new(leaf);
            (space.attach(Source(Arc::clone(&device))).unwrap(), device)
        });
        Rig {
            space,
            domains: domains.into(),
            consumers: RefCell::new(Vec::new()),
            copies: RefCell::new(vec![[1; PAGES]]),
            memory: RefCell::new([1; PAGES]),
            surely: RefCell::new([false; PAGES]),
            last_value: Cell::new(1),
            any_discard: Cell::new(false),
            depth: Cell::new(0),
            at_work: Cell::new(0),
        }
    }

    fn write(&self, first: usize, n: usize) {
        self.last_value.set(self.last_value.get() + 1);
        self.memory.borrow_mut()[first..first + n].fill(self.last_value.get());
        self.unsure(first, n);
    }

    fn unsure(&self, first: usize, n: usize) {
        self.surely.borrow_mut()[first..first + n].fill(false);
    }

    fn run(&self, ops: &[Op]) -> Result<(), TestCaseError> {
        self.depth.set(self.depth.get() + 1);
        let done = ops.iter().try_for_each(|op| self.step(op));
        self.depth.set(self.depth.get() - 1);
        done
    }

    fn step(&self, op: &Op) -> Result<(), TestCaseError> {
        match op {
            Op::Mark(first, n) => {
                self.write(*first, *n);
                self.space.mark(pages(*first, *n)).unwrap();
            }
            Op::Write(domain, page) => {
                let device = &self.domains[*domain].1;
                device.writes(*page);
                self.write(*page, 1);
                self.unsure(page / device.leaf * device.leaf, device.leaf);
            }
            Op::Discard {
                first,
                pages: n,
                cut,
                end,
                meanwhile,
            } => self.discard((*first, *n), *cut, *end, meanwhile)?,
            Op::Harvest {
                by,
                commits,
                domain,
                meanwhile,
            } => self.harvest(*by, *commits, *domain, meanwhile)?,
            Op::Cut(at) => {
                let at = Iova::new(*at as u64 * PAGE);
                // A leaf of a domain may lie across it.
                let _ = self.space.cut(at);
            }
            // What is under way would be of an area that has gone.
            Op::Remap if self.depth.get() == 1 => {
                self.space.unmap_discarding(pages(0, PAGES)).unwrap();
                self.write(0, PAGES);
                let all = pages(0, PAGES);
                self.space.map(all, 1 << 30, Access::ReadWrite).unwrap();
                self.copy_all();
            }
            // Writes that are not tracked.
            Op::Restart(page) if self.depth.get() == 1 => {
                self.space.stop_tracking().unwrap();
                self.write(*page, 1);
                self.space.start_tracking().unwrap();
                self.unsure(0, PAGES);
                self.copy_all();
            }
            // The first discard would wait for the harvest.
            Op::Late {
                by,
                commits,
                zero,
                written,
            } if self.depth.get() == 1 && self.any_discard.get() => {
                self.late(*by, *commits, *zero, *written)?;
            }
            Op::Join(start) => self.join(*start),
            Op::Late { .. } | Op::Remap | Op::Restart(_) => {}
        }
        Ok(())
    }

    /// Each consumer copies everything once.
    fn copy_all(&self) {
        let memory = *self.memory.borrow();
        self.copies
            .borrow_mut()
            .iter_mut()
            .for_each(|copy| *copy = memory);
    }

    fn join(&self, start: usize) {
        let mut consumers = self.consumers.borrow_mut();
        if consumers.len() == NAMED {
            return;
        }
        let name = consumers.len().to_string();
        let join = |start| Consumer::shared(Arc::clone(&self.space), &name, start);
        let like = consumers.get(start.wrapping_sub(2));
        let (joined, copy) = match (start, like) {
            (0, _) => (join(Start::Clean), *self.memory.borrow()),
            (_, Some(other)) => (join(Start::LikeOf(other)), self.copies.borrow()[start - 1]),
            // It has seen nothing yet.
            _ => (join(Start::Dirty), [u64::MAX; PAGES]),
        };
        // The other one may be busy.
        if let Ok(joined) = joined {
            consumers.push(joined);
            self.copies.borrow_mut().push(copy);
        }
    }

    fn discard(
        &self,
        (first, n): (usize, usize),
        cut: u64,
        end: End,
        meanwhile: &[Op],
    ) -> Result<(), TestCaseError> {
        let whole = pages(first, n);
        let range = IovaRange::new(
            Iova::new(whole.start().get() + cut),
            Iova::new(whole.last().get() - cut),
        );
        let touched = (first, n);
        let (first, n) = match cut {
            0 => (first, n),
            // The ends are parts of pages.
            _ => (first + 1, n.saturating_sub(2)),
        };
        let mut inside = Ok(());
        let flushes = |on: bool| {
            for (_, device) in &self.domains {
                device.flush_fails.store(!on, SeqCst);
            }
        };
        flushes(end != End::CannotFlush);
        self.any_discard.set(true);
        // Nothing is certain while the discard is at work.
        self.unsure(touched.0, touched.1);
        self.at_work.set(self.at_work.get() + 1);
        let done = self.space.discard(range.unwrap(), || {
            // Nothing was owed, because no whole page is discarded.
            flushes(true);
            inside = self.run(meanwhile);
            if end == End::CannotDrop {
                return Err(io::ErrorKind::Other.into());
            }
            self.memory.borrow_mut()[first..first + n].fill(0);
            Ok(())
        });
        self.at_work.set(self.at_work.get() - 1);
        flushes(true);
        inside?;
        self.unsure(touched.0, touched.1);
        match done {
            Ok(done) => {
                prop_assert_eq!(done.zero_bytes, n as u128 * u128::from(PAGE));
                // What was written while the storage was dropped is data, too.
                let quiet = meanwhile.is_empty() && self.at_work.get() == 0;
                self.surely.borrow_mut()[first..first + n].fill(quiet);
            }
            Err(error) => prop_assert!(end != End::Drops, "{}", error),
        }
        Ok(())
    }

    fn harvest(
        &self,
        by: usize,
        commits: bool,
        domain: Option<usize>,
        meanwhile: &[Op],
    ) -> Result<(), TestCaseError> {
        let consumers = self.consumers.borrow();
        let by = by % (consumers.len() + 1);
        let mut rounds = match by {
            0 => Rounds::shared(Arc::clone(&self.space)),
            by => consumers[by - 1].rounds(),
        };
        drop(consumers);
        let domain = domain.filter(|_| by == 0);
        if let Some(domain) = domain {
            rounds = rounds.domain(self.domains[domain].0);
        }
        let knows = self.any_discard.get();
        let owed = rounds.harvest().unwrap();
        let newest = self.last_value.get();
        self.run(meanwhile)?;
        self.end((owed, newest), by, commits, domain.is_some(), knows)
    }

    fn late(
        &self,
        by: usize,
        commits: bool,
        zero: usize,
        written: usize,
    ) -> Result<(), TestCaseError> {
        let consumers = self.consumers.borrow();
        let by = by % (consumers.len() + 1);
        let mut rounds = match by {
            0 => Rounds::shared(Arc::clone(&self.space)),
            by => consumers[by - 1].rounds(),
        };
        let device = &self.domains[0].1;
        let happen = {
            let (space, device) = (Arc::clone(&self.space), Arc::clone(device));
            move || {
                let all = pages(0, PAGES);
                space.unmap_discarding(all).unwrap();
                space.map(all, 1 << 30, Access::ReadWrite).unwrap();
                space.discard(pages(zero, 1), || Ok(())).unwrap();
                device.writes(written);
            }
        };
        *device.at_look.lock().unwrap() = Some(Box::new(happen));
        let newest = self.last_value.get();
        let owed = rounds.harvest().unwrap();
        prop_assert!(device.at_look.lock().unwrap().is_none());
        self.write(0, PAGES);
        self.copy_all();
        self.memory.borrow_mut()[zero] = 0;
        self.write(written, 1);
        self.end((owed, newest), by, commits, false, true)
    }

    fn end(
        &self,
        (owed, newest): (Lease<'_, Owed>, u64),
        by: usize,
        commits: bool,
        one_domain: bool,
        knows: bool,
    ) -> Result<(), TestCaseError> {
        let lease = owed.sync().unwrap();
        let told: Vec<_> = lease.contents().collect();
        for (run, content) in told {
            let (first, last) = (run.start().get() / PAGE, run.last().get() / PAGE);
            for page in first as usize..=last as usize {
                let now = self.memory.borrow()[page];
                if content == Content::Zero {
                    let told = now == 0 || now > newest;
                    prop_assert!(told, "page {} is called zero", page);
                    prop_assert!(!one_domain);
                } else {
                    let surely = self.surely.borrow()[page] && !one_domain;
                    prop_assert!(!surely, "page {} is called data", page);
                }
                if commits {
                    self.copies.borrow_mut()[by][page] = match content {
                        Content::Data => now,
                        Content::Zero => 0,
                    };
                } else if !knows {
                    // It becomes dirty, as without discards.
                    self.unsure(page, 1);
                }
            }
        }
        match commits {
            true => drop(lease.commit()),
            false => drop(lease.abort()),
        }
        Ok(())
    }

    /// A last harvest of each consumer.
    fn finish(&self) -> Result<(), TestCaseError> {
        let consumers = self.consumers.borrow().len();
        for by in 0..=consumers {
            self.harvest(by, true, None, &[])?;
            let (copies, memory) = (self.copies.borrow(), self.memory.borrow());
            prop_assert_eq!(copies[by], *memory, "consumer {}", by);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_consumer_takes_a_written_page_for_zero(ops in prop::collection::vec(op(), 0..24)) {
        let rig = Rig::new();
        rig.run(&ops)?;
        rig.finish()?;
    }
}
