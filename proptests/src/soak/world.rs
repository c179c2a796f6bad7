//! The state that all actors share.

use std::sync::Arc;

use dirtymap::bitmap::Runs;
use dirtymap::harvest::{Content, Synced};
use dirtymap::sync::{AtomicU64, Mutex, MutexGuard, Ordering, lock};
use dirtymap::{Access, AddressSpace, Consumer, DomainId, Granule, IovaRange, Lease, Start};
use pagetable_sim::{Breakage, PhysMemory};

use super::book::Book;
use super::control::Control;
use super::failure::{Events, Failure};
use super::layout::{self, LANE, PAGE, PAGES};
use super::machine::{self, Machine};
use super::options::Options;
use super::panics::Panics;
use super::tally::{Count, Tally};
use crate::Random;

/// The number of permanent domains.
pub(super) const DOMAINS: usize = 2;

/// The phase of a slot counts up, four steps for each round. Only the thread that holds the slot
/// changes it, **before** and after each call that changes the reach of devices. A device that
/// reads the same phase before and after an access knows the required result of that access.
pub(super) const MAPPED: u64 = 0;
pub(super) const UNMAPPED: u64 = 2;

/// A range of pages that is mapped and unmapped again and again.
pub(super) struct Slot {
    pub(super) first: u64,
    pub(super) pages: u64,
    phase: AtomicU64,
    state: Mutex<SlotState>,
}

/// The mappers' state of a slot.
pub(super) struct SlotState {
    pub(super) mapped: bool,
    /// While it is not mapped: the contents of the devices' lanes, page by page.
    pub(super) frozen: Vec<u8>,
}

impl Slot {
    fn new(nth: usize, device_lanes: u64) -> Self {
        let (first, pages) = layout::slot(nth);
        let state = SlotState {
            mapped: false,
            frozen: vec![0; (pages * device_lanes * LANE) as usize],
        };
        Slot {
            first,
            pages,
            phase: AtomicU64::new(UNMAPPED),
            state: Mutex::new(state),
        }
    }

    pub(super) fn range(&self) -> IovaRange {
        layout::range(self.first, self.pages)
    }

    pub(super) fn phase(&self) -> u64 {
        // Acquire: pairs with the Release in `step`; a thread that reads the phase "unmapped" runs
        // after the unmap.
        self.phase.load(Ordering::Acquire)
    }

    /// To the next phase.
    pub(super) fn step(&self) {
        // AcqRel: Release pairs with the Acquire in `phase`. Later effects of this thread are
        // visible only through the table, whose entries are published with Release.
        self.phase.fetch_add(1, Ordering::AcqRel);
    }

    /// The slot, unless another mapper has it.
    pub(super) fn take(&self) -> Option<MutexGuard<'_, SlotState>> {
        self.state.try_lock().ok()
    }
}

type Copied = Vec<Mutex<[u8; PAGE as usize]>>;

/// See the [module](self).
pub(super) struct World {
    pub(super) options: Options,
    pub(super) space: Arc<AddressSpace>,
    /// The named consumers. Their number is one less than that of a copy.
    pub(super) consumers: Vec<Mutex<Arc<Consumer<'static>>>>,
    pub(super) memory: Arc<PhysMemory>,
    pub(super) machines: Vec<Arc<dyn Machine>>,
    pub(super) ids: Vec<DomainId>,
    pub(super) slots: Vec<Slot>,
    /// The destination of each consumer; the first is that of harvests without a name. A page is
    /// read from memory and written here under its lock, so that an older copy never replaces a
    /// newer one.
    copies: Vec<Copied>,
    /// By consumer: held while pages that discarders write are copied. A lease says in one moment
    /// that a page is zero, and the copy becomes zero in the next.
    order: Vec<Mutex<()>>,
    /// The epochs of each named consumer.
    pub(super) books: Vec<Mutex<Book>>,
    /// By lane: what its writer wrote last to each page.
    pub(super) shadows: Vec<Vec<AtomicU64>>,
    pub(super) control: Control,
    pub(super) tally: Tally,
    pub(super) events: Events,
    pub(super) panics: Arc<Panics>,
}

impl World {
    /// A machine whose static areas are mapped, which tracks, and whose copy is equal to its
    /// memory.
    pub(super) fn new(options: Options) -> Result<Self, dirtymap::Error> {
        let memory = Arc::new(PhysMemory::new((PAGES + layout::SCRATCH) * PAGE)?);
        let space = AddressSpace::new(Granule::K4);
        let panics = Arc::new(Panics::new(options.seed));
        let leaves = [Granule::M2, Granule::K4];
        let machines: Vec<_> = (0..DOMAINS)
            .map(|nth| {
                let format = match nth {
                    1 if options.large_pages => machine::LARGE_PAGES,
                    _ => nth as u64,
                };
                machine::machine(format, leaves[nth], &memory)
            })
            .collect();
        let ids = machines
            .iter()
            .filter_map(|machine| Arc::clone(machine).join(&space, &panics))
            .collect::<Result<_, _>>()?;
        space.set_allowed(&[layout::scratch()])?;
        for (first, pages) in layout::STATIC {
            let pages = pages.next_multiple_of(options.unit());
            space.map(layout::range(first, pages), first * PAGE, Access::ReadWrite)?;
        }
        if options.discarders != 0 {
            let (first, pages) = layout::TRIMMED;
            space.map(layout::range(first, pages), first * PAGE, Access::ReadWrite)?;
        }
        space.start_tracking()?;
        panics.switch(options.panics);
        let breakage = options.breakage();
        for machine in &machines {
            machine.break_hardware(breakage);
        }
        let lanes = options.devices + options.attachers + options.cpus + options.discarders;
        let device_lanes = u64::from(options.devices + options.attachers);
        let names = actors(&options);
        let space = Arc::new(space);
        panics.switch(false);
        let consumers = (1..=options.consumers as usize)
            .map(|whose| Consumer::shared(Arc::clone(&space), &name(whose), Start::Clean))
            .map(|joined| joined.map(|consumer| Mutex::new(Arc::new(consumer))))
            .collect::<Result<_, _>>()?;
        panics.switch(options.panics);
        let copied = || (0..PAGES).map(|_| Mutex::new([0; PAGE as usize])).collect();
        Ok(World {
            space,
            consumers,
            memory,
            machines,
            ids,
            slots: (0..layout::SMALL + layout::LARGE)
                .map(|nth| Slot::new(nth, device_lanes))
                .collect(),
            copies: (0..=options.consumers).map(|_| copied()).collect(),
            order: (0..=options.consumers).map(|_| Mutex::new(())).collect(),
            books: (0..options.consumers).map(|_| Mutex::default()).collect(),
            shadows: (0..lanes)
                .map(|_| (0..PAGES).map(|_| AtomicU64::new(0)).collect())
                .collect(),
            control: Control::default(),
            tally: Tally::default(),
            events: Events::new(names),
            panics,
            options,
        })
    }

    /// The random numbers of actor number `nth` of a kind.
    pub(super) fn random(&self, kind: u64, nth: u64) -> Random {
        let mut seeds = Random::new(self.options.seed);
        let seed = seeds.bits() ^ (kind << 32 | nth);
        Random::new(Random::new(seed).bits())
    }

    /// Bytes of a page that devices write.
    pub(super) fn device_bytes(&self) -> usize {
        ((self.options.devices + self.options.attachers) as usize) * LANE as usize
    }

    /// The fault of the hardware.
    pub(super) fn breakage(&self) -> Breakage {
        self.options.breakage()
    }

    /// Copies all pages that `runs` touch, for every consumer.
    pub(super) fn copy_runs(&self, runs: Runs<'_>) {
        for run in runs {
            self.copy_range(run);
        }
    }

    /// Copies all pages that `range` touches, for every consumer.
    pub(super) fn copy_range(&self, range: IovaRange) {
        for whose in 0..self.copies.len() {
            self.copy_for(whose, range);
        }
    }

    /// Copies all pages that `range` touches, for one consumer.
    pub(super) fn copy_for(&self, whose: usize, range: IovaRange) {
        let _order = layout::is_trimmed(range).then(|| lock(&self.order[whose]));
        self.copy_pages(whose, range);
    }

    /// Copies what a lease of one consumer has.
    pub(super) fn copy_lease(&self, whose: usize, lease: &Lease<'_, Synced>) {
        let _order = layout::is_trimmed(lease.range()).then(|| lock(&self.order[whose]));
        for (run, content) in lease.contents() {
            if content == Content::Data {
                self.copy_pages(whose, run);
                continue;
            }
            for page in layout::pages_of(run) {
                *lock(&self.copies[whose][page as usize]) = [0; PAGE as usize];
                self.tally.add(Count::Zeros, 1);
            }
        }
    }

    fn copy_pages(&self, whose: usize, range: IovaRange) {
        let mut pages = 0;
        for page in layout::pages_of(range) {
            let mut copy = lock(&self.copies[whose][page as usize]);
            self.memory.read(page * PAGE, &mut *copy).unwrap();
            pages += 1;
        }
        self.tally.add(Count::Pages, pages);
    }

    /// The named consumer number `whose`, counted from 1; `None` for 0.
    pub(super) fn consumer(&self, whose: usize) -> Option<Arc<Consumer<'static>>> {
        let at = whose.checked_sub(1)?;
        Some(Arc::clone(&lock(&self.consumers[at])))
    }

    /// The same, if its thread is not replacing it at the moment.
    pub(super) fn consumer_if_free(&self, whose: usize) -> Option<Arc<Consumer<'static>>> {
        let place = self.consumers.get(whose.checked_sub(1)?)?.try_lock().ok()?;
        Some(Arc::clone(&place))
    }

    /// Gives the consumer `whose` the copy of `other`, up to the page `end`. Below it, only
    /// consumers copy, each for itself; above it, mappers copy for all.
    pub(super) fn copy_of(&self, other: usize, whose: usize, end: u64) {
        for page in 0..end as usize {
            let theirs = *lock(&self.copies[other][page]);
            *lock(&self.copies[whose][page]) = theirs;
        }
    }

    /// Calls `compare` with the copy of a consumer and the memory of `page`.
    pub(super) fn compare(
        &self,
        whose: usize,
        page: u64,
        compare: impl FnOnce(&[u8; PAGE as usize], &[u8; PAGE as usize]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut now = [0; PAGE as usize];
        self.memory.read(page * PAGE, &mut now).unwrap();
        compare(&lock(&self.copies[whose][page as usize]), &now)
    }

    /// The name of the writer of `lane`.
    pub(super) fn writer(&self, lane: usize) -> String {
        let (devices, attachers) = (
            self.options.devices as usize,
            self.options.attachers as usize,
        );
        if lane < devices {
            format!("device {lane} in domain {}", lane % DOMAINS)
        } else if lane < devices + attachers {
            format!("the device of attacher {}", lane - devices)
        } else if lane < devices + attachers + self.options.cpus as usize {
            format!("CPU {}", lane - devices - attachers)
        } else {
            let cpus = self.options.cpus as usize;
            format!("discarder {}", lane - devices - attachers - cpus)
        }
    }
}

/// The name of the named consumer number `whose`.
pub(super) fn name(whose: usize) -> String {
    format!("consumer {whose}")
}

/// The actors with events: mappers, then attachers, then harvesters, then named consumers, then the
/// comparison, then discarders.
fn actors(options: &Options) -> Vec<String> {
    let kinds = [
        ("mapper", options.mappers),
        ("attacher", options.attachers),
        ("harvester", options.harvesters),
        ("consumer", options.consumers),
    ];
    let numbered = kinds
        .iter()
        .flat_map(|(kind, n)| (0..*n).map(move |nth| format!("{kind} {nth}")));
    let discarders = (0..options.discarders).map(|nth| format!("discarder {nth}"));
    numbered
        .chain(["comparison".into()])
        .chain(discarders)
        .collect()
}
