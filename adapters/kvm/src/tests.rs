//! The logic of the adapter against a KVM of our own, which write-protects pages, as the real one
//! does: a write is seen only if it meets a protected page.

mod foreign;
mod growth;
mod losses;
mod parts;
mod slots;
mod spaces;
mod switches;
mod words;

use std::collections::HashMap;
use std::io;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};

use super::ring::{Entry, Memory};
use super::*;
use dirtymap::source::FlushGather;
use dirtymap::{Access, AddressSpace, DirtySource, HarvestRequest, Iova, UserBitmap};

const RING: u32 = 64;
/// Two slots with a hole between them; neither is made of whole words.
const SLOTS: [(u32, u64, u64); 2] = [(3, 0, 200), (7, 300, 70)];

#[derive(Default)]
struct State {
    /// First page, pages, log, and which pages the guest cannot write to unseen.
    slots: HashMap<u32, FakeSlot>,
    manual: bool,
    initially_set: bool,
    /// Bits that the log has above the end of a slot.
    tail: bool,
    ring: Option<Arc<Vec<Entry>>>,
    pushed: u64,
    /// The calls that fail, counted from the next on.
    fail_in: Option<u32>,
    /// Guest writes, as page numbers of the guest, when a call fails.
    when_failed: Vec<u64>,
    /// Guest writes right before the next KVM_CLEAR_DIRTY_LOG takes effect.
    before_clear: Vec<u64>,
    memory: Vec<u64>,
    clears: Vec<(u64, u32)>,
    /// The process that made all this, when another one asks.
    maker: Option<u32>,
    /// Whether a reset leaves the entries of the ring, as one of another machine does.
    foreign_ring: bool,
}

#[derive(Default)]
struct FakeSlot {
    first: u64,
    pages: u64,
    logging: bool,
    log: Vec<u64>,
    protected: Vec<bool>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut lock(&self.0))
    }
}

impl State {
    /// The guest writes page `number` of its memory.
    fn write(&mut self, number: u64) {
        self.write_in(0, number);
    }

    /// The same, in one of the address spaces.
    fn write_in(&mut self, space: u32, number: u64) {
        self.memory[number as usize] += 1;
        let inside = |id: u32, slot: &FakeSlot| {
            id >> 16 == space && (slot.first..slot.first + slot.pages).contains(&number)
        };
        let slot = self.slots.iter_mut().find(|(id, slot)| inside(**id, slot));
        let Some((id, slot)) = slot else {
            return;
        };
        let page = number - slot.first;
        if slot.logging && std::mem::replace(&mut slot.protected[page as usize], false) {
            match &self.ring {
                Some(ring) => {
                    let at = (self.pushed % ring.len() as u64) as usize;
                    assert!(ring[at].push(*id, page), "the ring is full");
                    self.pushed += 1;
                }
                None => slot.log[(page / 64) as usize] |= 1 << (page % 64),
            }
        }
    }

    fn fails(&mut self) -> io::Result<()> {
        match &mut self.fail_in {
            Some(0) => {
                self.fail_in = None;
                for page in std::mem::take(&mut self.when_failed) {
                    self.write(page);
                }
                Err(io::Error::from_raw_os_error(libc::EINTR))
            }
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Kernel for Fake {
    fn of_another_process(&self) -> Option<u32> {
        self.with(|state| state.maker)
    }

    unsafe fn set_region(&self, region: &kvm_userspace_memory_region) -> io::Result<()> {
        self.with(|state| {
            state.fails()?;
            if region.memory_size == 0 {
                state.slots.remove(&region.slot);
                return Ok(());
            }
            let logging = region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0;
            let full = state.initially_set;
            let slot = state.slots.entry(region.slot).or_default();
            if logging && !slot.logging {
                slot.pages = region.memory_size >> 12;
                slot.first = region.guest_phys_addr >> 12;
                let words = slot.pages.div_ceil(64) as usize;
                slot.log = vec![if full { u64::MAX } else { 0 }; words];
                slot.protected = vec![!full; slot.pages as usize];
            }
            slot.logging = logging;
            Ok(())
        })
    }

    fn get_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        self.with(|state| {
            state.fails()?;
            let (manual, tail) = (state.manual, state.tail);
            let slot = state.slots.get_mut(&slot).unwrap();
            if !slot.logging {
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            }
            assert_eq!(slot.log.len(), words.len(), "written past the buffer");
            words.copy_from_slice(&slot.log);
            if tail {
                *words.last_mut().unwrap() |= !0 << (slot.pages % 64);
            }
            if !manual {
                slot.log.fill(0);
                slot.protected.fill(true);
            }
            Ok(())
        })
    }

    fn clear_log(&self, id: u32, first: u64, pages: u32, mask: &[u64]) -> io::Result<()> {
        self.with(|state| {
            state.fails()?;
            for page in std::mem::take(&mut state.before_clear) {
                state.write(page);
            }
            state.clears.push((first, pages));
            let slot = state.slots.get_mut(&id).unwrap();
            let end = first + u64::from(pages);
            assert!(state.manual && first.is_multiple_of(64) && end <= slot.pages);
            assert!(pages.is_multiple_of(64) || end == slot.pages, "EINVAL");
            for page in first..end {
                let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
                if mask[((page - first) / 64) as usize] & slot.log[word] & bit != 0 {
                    slot.log[word] &= !bit;
                    slot.protected[page as usize] = true;
                }
            }
            Ok(())
        })
    }

    fn reset_rings(&self) -> io::Result<()> {
        self.with(|state| {
            state.fails()?;
            if state.foreign_ring {
                return Ok(());
            }
            let ring = state.ring.clone().unwrap();
            for (slot, page) in ring.iter().filter_map(Entry::recycle) {
                if let Some(slot) = state.slots.get_mut(&slot)
                    && let Some(protected) = slot.protected.get_mut(page as usize)
                {
                    *protected = true;
                }
            }
            Ok(())
        })
    }
}

impl Memory for Arc<Vec<Entry>> {
    fn entries(&self) -> &[Entry] {
        self
    }
}

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
}

const MODES: [KvmMode; 4] = [
    KvmMode::Clearing,
    KvmMode::Manual {
        initially_set: false,
    },
    KvmMode::Manual {
        initially_set: true,
    },
    KvmMode::Ring { entries: RING },
];

/// A space over two slots, tracking.
fn machine(mode: KvmMode) -> (AddressSpace, Arc<KvmLog>, Fake) {
    let fake = Fake::default();
    let log = KvmLog::with_kernel(Box::new(fake.clone()), mode, Granule::K4);
    fake.with(|state| {
        state.memory = vec![0; 400];
        state.manual = mode.is_manual();
        state.initially_set = mode == MODES[2];
        if mode.is_ring() {
            let ring: Arc<Vec<_>> = Arc::new((0..RING).map(|_| Entry::default()).collect());
            log.rings().push(Ring::new(Box::new(Arc::clone(&ring))));
            state.ring = Some(ring);
        }
    });
    let log = Arc::new(log);
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
    for (slot, first, n) in SLOTS {
        // SAFETY: the fake has no guest.
        unsafe { log.add_slot(slot, pages(first, n), 0) }.unwrap();
        space.map(pages(first, n), 0, Access::ReadWrite).unwrap();
    }
    space.start_tracking().unwrap();
    (space, log, fake)
}

/// The dirty pages of `range`, committed.
fn harvest(space: &AddressSpace, range: IovaRange) -> Vec<u64> {
    let mut words = [0u64; 8];
    let request = HarvestRequest::new(range, Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    let runs: Vec<_> = lease.runs().collect();
    lease.commit();
    runs.iter()
        .flat_map(|run| run.start().get() >> 12..=run.last().get() >> 12)
        .collect()
}

/// xorshift64*, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}
