//! The logic of the adapter against a KVM of our own, which write-protects pages, as the real one
//! does: a write is seen only if it meets a protected page.

mod growth;
mod parts;

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

/// Guest and VMM write, harvests of parts are committed, aborted, refused by KVM, or fail to flush,
/// and the guest writes in the middle of each. In the end the copy is the memory.
#[test]
fn no_write_is_lost_in_any_mode() {
    for mode in MODES {
        for seed in 1..=60u64 {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let (space, log, fake) = machine(mode);
            // The first full copy, which follows the begin of tracking.
            let mut copy = fake.with(|state| state.memory.clone());
            let page = |random: &mut Random| {
                let (_, first, n) = SLOTS[random.below(2) as usize];
                first + random.below(n)
            };
            for _ in 0..60 {
                for _ in 0..random.below(6) {
                    let page = page(&mut random);
                    if random.below(3) > 0 {
                        fake.with(|state| state.write(page));
                    } else {
                        fake.with(|state| state.memory[page as usize] += 1);
                        space.mark(pages(page, 1)).unwrap();
                    }
                }
                if random.below(4) == 0 {
                    let before_clear = (0..random.below(4)).map(|_| page(&mut random)).collect();
                    fake.with(|state| state.before_clear = before_clear);
                }
                if random.below(3) == 0 {
                    let calls = random.below(4) as u32;
                    fake.with(|state| state.fail_in = Some(calls));
                }
                if random.below(20) == 0 {
                    let _ = log.drain_rings();
                }
                let (_, first, n) = SLOTS[random.below(2) as usize];
                let from = random.below(n);
                let range = pages(first + from, 1 + random.below(n - from));
                let mut words = [0u64; 8];
                let request = HarvestRequest::new(range, Granule::K4);
                let lease = space
                    .harvest(&request, UserBitmap::new(&mut words))
                    .unwrap()
                    .partial();
                let (late, outcome) = (page(&mut random), random.below(4));
                fake.with(|state| state.write(late));
                if let Ok(lease) = lease.sync()
                    && outcome > 0
                {
                    for run in lease.runs() {
                        for n in run.start().get() >> 12..=run.last().get() >> 12 {
                            copy[n as usize] = fake.with(|state| state.memory[n as usize]);
                        }
                    }
                    lease.commit();
                }
                fake.with(|state| state.fail_in = None);
            }
            // The machine stops.
            fake.with(|state| state.before_clear.clear());
            for n in SLOTS
                .iter()
                .flat_map(|(_, first, n)| harvest(&space, pages(*first, *n)))
            {
                copy[n as usize] = fake.with(|state| state.memory[n as usize]);
            }
            fake.with(|state| assert_eq!(copy, state.memory, "{mode:?}, seed {seed}"));
            let rest: Vec<_> = SLOTS
                .iter()
                .flat_map(|(_, first, n)| harvest(&space, pages(*first, *n)))
                .collect();
            assert!(rest.is_empty(), "{mode:?}, seed {seed}: {rest:?} twice");
        }
    }
}

/// stratovirt and Cloud Hypervisor read slot after slot, and KVM clears what it tells: when a later
/// slot failed, what the earlier ones had said was dropped, and what this one had said as well if
/// the bitmap beside it could not be read.
#[test]
fn an_error_in_one_slot_loses_nothing_of_the_others() {
    for mode in [MODES[0], MODES[1]] {
        let (space, _log, fake) = machine(mode);
        fake.with(|state| [5, 199, 300, 369].map(|page| state.write(page)));
        space.unmap_discarding(pages(200, 100)).unwrap_err();
        space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 370), Granule::K4);
        // The first slot is read (and cleared); the second one fails.
        fake.with(|state| state.fail_in = Some(if mode.is_manual() { 2 } else { 1 }));
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the second slot cannot be read"));
        assert_eq!(stopped.at, Iova::new(300 << 12));
        assert_eq!(lease.report().bits_set, 2);
        drop(lease);
        assert_eq!(harvest(&space, pages(0, 370)), [5, 199, 300, 369]);
    }
}

/// Firecracker's snapshots read KVM's log, and lost the pages when the file could not be written.
#[test]
fn a_lease_that_is_dropped_puts_back_what_kvm_has_forgotten() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| [1, 64, 199].map(|page| state.write(page)));
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 200), Granule::K4);
        for _ in 0..3 {
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            assert_eq!(lease.report().bits_set, 3, "{mode:?}");
            drop(lease);
            words = [0; 8];
        }
        assert_eq!(harvest(&space, pages(0, 200)), [1, 64, 199]);
        assert_eq!(harvest(&space, pages(0, 200)), [0u64; 0]);
    }
}

/// hyperlight met logs with bits above the end of the memory, and first reads that say everything.
#[test]
fn a_log_with_bits_behind_the_slot_names_pages_of_the_slot_only() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        fake.with(|state| state.tail = true);
        space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
        let first = harvest(&space, pages(0, 370));
        let everything: Vec<_> = (0..200).chain(300..370).collect();
        let expected = if mode == MODES[2] { everything } else { vec![] };
        assert_eq!(first, expected, "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0]);
    }
}

/// What is cleared is what was asked for: the neighbours in the same words stay. And each clear is
/// one that KVM accepts: the fake refuses others.
#[test]
fn parts_of_words_are_cleared_alone() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        harvest(&space, pages(300, 70));
        fake.with(|state| {
            (190..200)
                .chain(300..370)
                .step_by(3)
                .for_each(|n| state.write(n))
        });
        assert_eq!(harvest(&space, pages(191, 4)), [193], "{mode:?}");
        assert_eq!(harvest(&space, pages(365, 5)), [365, 368]);
        assert_eq!(harvest(&space, pages(0, 200)), [190, 196, 199]);
        let rest: Vec<_> = (302..365).step_by(3).collect();
        assert_eq!(harvest(&space, pages(300, 70)), rest);
        if mode == MODES[1] {
            // A whole word, and what is left behind the last one.
            fake.with(|state| assert!(state.clears.ends_with(&[(64, 6), (128, 72), (0, 64)])));
        }
    }
}

/// A large slot is cleared piece by piece, and a piece that is clean is not.
#[test]
fn clears_are_bounded_and_skip_what_is_clean() {
    let fake = Fake::default();
    fake.with(|state| {
        state.manual = true;
        state.memory = vec![0; 200_001];
    });
    let log = KvmLog::with_kernel(Box::new(fake.clone()), MODES[1], Granule::K4);
    let log = Arc::new(log);
    // SAFETY: the fake has no guest.
    unsafe { log.add_slot(0, pages(0, 200_001), 0) }.unwrap();
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
    space.map(pages(0, 200_001), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    fake.with(|state| [70, 130_000, 200_000].map(|page| state.write(page)));
    let mut words = vec![0u64; 3126];
    let request = HarvestRequest::new(pages(0, 200_001), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    assert_eq!(lease.sync().unwrap().commit().bits_set, 3);
    let clears = [(64, 64), (129_984, 64), (200_000, 1)];
    fake.with(|state| assert_eq!(state.clears, clears));
}

/// CubeSandbox and Cloud Hypervisor took a page for 4096 bytes, where the kernel takes its own: on
/// a host with 64 KiB a bit stood for the wrong memory.
#[test]
fn a_bit_is_a_page_of_the_host() {
    let page = Granule::from_bytes(65536).unwrap();
    let fake = Fake::default();
    let log = Arc::new(KvmLog::with_kernel(Box::new(fake.clone()), MODES[0], page));
    let range = |first: u64, n: u64| IovaRange::from_len(Iova::new(first << 16), n << 16).unwrap();
    // SAFETY: the fake has no guest.
    let add = |range, host| unsafe { log.add_slot(0, range, host) };
    assert!(matches!(
        add(pages(0, 8), 0),
        Err(KvmError::Unaligned { .. })
    ));
    assert!(matches!(
        add(range(0, 8), 4096),
        Err(KvmError::Unaligned { .. })
    ));
    let slot = Slot::new(0, range(0, 100), 0, page).unwrap();
    assert!(slot.keep(99) && !slot.keep(100));
    let mut told = Vec::new();
    let slot = Slot::new(0, range(2, 100), 0, page).unwrap();
    slot.keep(3);
    slot.drain(&fake, MODES[3], range(0, 200), &mut |run| told.push(run));
    assert_eq!(told, [range(5, 1)]);
}

/// The kernel's own ring once took an offset near 2^64 for granted, and its sum with a bit number
/// wrapped (CVE-2026-52969).
#[test]
fn an_entry_that_names_no_page_is_not_computed_with() {
    let (space, log, fake) = machine(MODES[3]);
    let ring = fake.with(|state| state.ring.clone().unwrap());
    for (n, (slot, page)) in [(9, 1), (7, u64::MAX), (u32::MAX, u64::MAX - 63), (3, 10)]
        .into_iter()
        .enumerate()
    {
        assert!(ring[n].push(slot, page));
    }
    // Nobody knows which page of slot 7 was meant: all of them.
    assert_eq!(harvest(&space, pages(300, 70)).len(), 70);
    assert_eq!(harvest(&space, pages(0, 200)), [10]);
    assert_eq!(log.foreign_entries(), 3);
}

/// A page that came out of a ring is written on unseen until the reset. Another harvest, which
/// takes it from what is pending, waits for that reset too.
#[test]
fn a_harvest_that_finds_a_page_of_a_ring_waits_for_its_reset() {
    let (space, _log, fake) = machine(MODES[3]);
    fake.with(|state| [5, 100].map(|page| state.write(page)));
    let mut words = [0u64; 8];
    let request = HarvestRequest::new(pages(0, 64), Granule::K4);
    // Takes page 5 and leaves page 100 pending; its sync fails.
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    fake.with(|state| state.fail_in = Some(0));
    drop(lease.sync().unwrap_err());
    assert_eq!(harvest(&space, pages(64, 136)), [100]);
    // Whether it is copied before or after its write, no write after that harvest is lost.
    fake.with(|state| state.write(100));
    assert_eq!(harvest(&space, pages(64, 136)), [100]);
    assert_eq!(harvest(&space, pages(0, 64)), [5]);
}

#[test]
fn what_is_dirty_when_tracking_ends_stays_and_what_was_before_it_begins_does_not() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| [1, 2].map(|page| state.write(page)));
        space.stop_tracking().unwrap();
        fake.with(|state| state.write(50));
        assert_eq!(harvest(&space, pages(0, 200)), [1, 2], "{mode:?}");
        fake.with(|state| state.write(60));
        space.start_tracking().unwrap();
        if mode == MODES[2] {
            harvest(&space, pages(0, 200));
        }
        fake.with(|state| state.write(70));
        assert_eq!(harvest(&space, pages(0, 200)), [70]);
    }
}

/// A switch that one slot refuses leaves all as they were; what was written to the others meanwhile
/// is not known, so it is dirty.
#[test]
fn a_switch_that_fails_loses_nothing() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| state.write(7));
        // Each slot is read, if it has a log, and then switched.
        let calls = if mode.is_ring() { 1 } else { 3 };
        fake.with(|state| state.fail_in = Some(calls));
        // The first slot has no log at that moment.
        fake.with(|state| state.when_failed = vec![9]);
        space.stop_tracking().unwrap_err();
        fake.with(|state| state.write(8));
        let found = harvest(&space, pages(0, 200));
        assert!(
            [7, 8, 9].iter().all(|page| found.contains(page)),
            "{mode:?}: {found:?}"
        );
    }
}

/// A switch to on that the second slot refuses: the first one has no log either.
#[test]
fn a_switch_to_on_that_fails_leaves_all_slots_off() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        space.stop_tracking().unwrap();
        fake.with(|state| state.fail_in = Some(1));
        space.start_tracking().unwrap_err();
        fake.with(|state| {
            assert_eq!(state.fail_in, None, "{mode:?}: no call failed");
            let logging = state.slots.values().filter(|slot| slot.logging).count();
            assert_eq!(logging, 0, "{mode:?}");
        });
    }
}

#[test]
fn a_slot_that_goes_leaves_what_was_dirty_to_the_unmap() {
    for mode in MODES {
        let (space, log, fake) = machine(mode);
        harvest(&space, pages(300, 70));
        fake.with(|state| [301, 369].map(|page| state.write(page)));
        space.mark(pages(310, 1)).unwrap();
        log.remove_slot(7).unwrap();
        assert!(matches!(
            log.remove_slot(7),
            Err(KvmError::NoSlot { slot: 7 })
        ));
        let mut words = [0u64; 2];
        let bitmap = UserBitmap::new(&mut words);
        let (unmapped, view) = space.unmap(pages(300, 70), Granule::K4, bitmap).unwrap();
        assert_eq!(unmapped.dirty_bytes, 3 << 12, "{mode:?}");
        let runs: Vec<_> = view.runs().collect();
        assert_eq!(runs, [pages(301, 1), pages(310, 1), pages(369, 1)]);
        // Number and addresses are free again.
        // SAFETY: the fake has no guest.
        unsafe { log.add_slot(7, pages(320, 10), 0) }.unwrap();
        assert_eq!(log.slots().placed.iter().len(), 2);
    }
}

#[test]
fn an_unmap_reports_the_log_of_a_slot_that_stays() {
    for mode in MODES {
        let (space, _log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| [3, 199].map(|page| state.write(page)));
        assert!(space.cut(Iova::new(64 << 12)).unwrap());
        let mut words = [0u64; 4];
        let bitmap = UserBitmap::new(&mut words);
        let (_, view) = space.unmap(pages(64, 136), Granule::K4, bitmap).unwrap();
        assert_eq!(view.runs().collect::<Vec<_>>(), [pages(199, 1)], "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 64)), [3]);
        // If KVM cannot tell, all of it was dirty.
        fake.with(|state| state.fail_in = Some(0));
        let unmapped = space.unmap_discarding(pages(0, 64));
        if mode.is_ring() {
            unmapped.unwrap_err(); // the reset; nothing is unmapped
        } else {
            assert_eq!(unmapped.unwrap().discarded_bytes, 64 << 12);
        }
    }
}

#[test]
fn every_refusal_of_a_slot_names_what_is_wrong() {
    let (_space, log, _fake) = machine(MODES[0]);
    // SAFETY: the fake has no guest.
    let add = |slot, range, host| unsafe { log.add_slot(slot, range, host) };
    let top = IovaRange::new(Iova::MIN, Iova::new((1 << 43) - 1)).unwrap();
    assert!(matches!(add(0, top, 0), Err(KvmError::TooLarge { pages, .. }) if pages == 1 << 31));
    let wraps = add(0, pages(512, 2), !0 << 12);
    assert!(matches!(wraps, Err(KvmError::HostWraps { .. })));
    assert!(matches!(
        add(3, pages(512, 1), 0),
        Err(KvmError::SlotTaken { slot: 3 })
    ));
    let overlaps = add(0, pages(299, 2), 0);
    assert!(matches!(overlaps, Err(KvmError::Overlap { other: 7, .. })));
    assert!(matches!(log.drain_rings(), Ok(0)));
}

/// A switch that fails is undone: the slots that were off are dirty as a whole, once. The second of
/// two harvests is clean.
#[test]
fn a_switch_that_fails_is_reported_once() {
    for mode in [MODES[1], MODES[2]] {
        let (space, _log, fake) = machine(mode);
        space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
        harvest(&space, pages(0, 370));
        // The second slot cannot be read.
        fake.with(|state| state.fail_in = Some(2));
        space.stop_tracking().unwrap_err();
        let first: Vec<u64> = (0..200).collect();
        let again: Vec<u64> = (300..370).collect();
        let found = harvest(&space, pages(0, 370));
        assert!(found.starts_with(&first), "{mode:?}: {found:?}");
        assert!(found.len() == 200 || found[200..] == again, "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0], "{mode:?}");
        fake.with(|state| [3, 310].iter().for_each(|page| state.write(*page)));
        assert_eq!(harvest(&space, pages(0, 370)), [3, 310], "{mode:?}");
    }
}

/// Number and addresses of the slot of system management mode are those of an ordinary one, but for
/// the address space in the upper half of the number.
const SMM: (u32, u64, u64) = (1 << 16 | 3, 100, 230);

/// A machine whose system management mode sees pages 100 to 329.
fn machine_with_smm(mode: KvmMode) -> (AddressSpace, Arc<KvmLog>, Fake) {
    let (space, log, fake) = machine(mode);
    let (slot, first, n) = SMM;
    // SAFETY: the fake has no guest.
    unsafe { log.add_slot(slot, pages(first, n), 0) }.unwrap();
    space.map(pages(200, 100), 0, Access::ReadWrite).unwrap();
    harvest(&space, pages(0, 370));
    (space, log, fake)
}

/// KVM has an address space of its own for system management mode, and QEMU gives it the same
/// memory at the same addresses. Slots of it were refused as an overlap.
#[test]
fn slots_of_two_address_spaces_may_share_addresses() {
    for mode in MODES {
        let (space, log, fake) = machine_with_smm(mode);
        // SAFETY: the fake has no guest.
        let add = |slot, range| unsafe { log.add_slot(slot, range, 0) };
        let taken = add(SMM.0, pages(380, 1));
        assert!(matches!(taken, Err(KvmError::SlotTaken { slot }) if slot == SMM.0));
        let overlaps = add(1 << 16, pages(329, 2));
        assert!(matches!(overlaps, Err(KvmError::Overlap { other, .. }) if other == SMM.0));
        let overlaps = add(0, pages(199, 2));
        assert!(matches!(overlaps, Err(KvmError::Overlap { other: 3, .. })));

        // A page is dirty when either of its slots says so, and once if both do.
        fake.with(|state| {
            [10, 120, 310].iter().for_each(|page| state.write(*page));
            [120, 150, 250, 329]
                .iter()
                .for_each(|page| state.write_in(1, *page));
        });
        let written = [10, 120, 150, 250, 310, 329];
        assert_eq!(harvest(&space, pages(0, 370)), written, "{mode:?}");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0], "{mode:?}");
        assert_eq!(log.foreign_entries(), 0, "{mode:?}");

        // Each goes by itself.
        fake.with(|state| {
            state.write(150);
            state.write_in(1, 151);
        });
        log.remove_slot(SMM.0).unwrap();
        fake.with(|state| state.write(152));
        assert_eq!(harvest(&space, pages(0, 370)), [150, 151, 152], "{mode:?}");
    }
}

/// The slot that stops lies over one that has told its pages already. Below the stop all is told,
/// from there on nothing is lost.
#[test]
fn a_stop_in_one_address_space_loses_nothing_of_the_other() {
    for mode in [MODES[0], MODES[1]] {
        let (space, _log, fake) = machine_with_smm(mode);
        fake.with(|state| {
            [10, 120, 310].iter().for_each(|page| state.write(*page));
            [150, 250].iter().for_each(|page| state.write_in(1, *page));
        });
        // The slot of system management mode cannot be read.
        fake.with(|state| state.fail_in = Some(if mode.is_manual() { 2 } else { 1 }));
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 370), Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the second slot cannot be read"));
        assert_eq!(stopped.at, Iova::new(100 << 12), "{mode:?}");
        lease.partial().sync().unwrap().commit();
        let found = harvest(&space, pages(0, 370));
        let above = [120, 150, 250, 310];
        assert!(
            above.iter().all(|page| found.contains(page)),
            "{mode:?}: {found:?}"
        );
        assert!(!found.contains(&10), "{mode:?}: told below the stop");
        assert_eq!(harvest(&space, pages(0, 370)), [0u64; 0], "{mode:?}");
    }
}

/// The first of two slots stops in the middle: the second one tells what it has below, and no more.
#[test]
fn a_stop_in_the_middle_leaves_the_other_address_space_whole() {
    const PAGES: u64 = 200_000;
    let fake = Fake::default();
    fake.with(|state| {
        state.manual = true;
        state.memory = vec![0; PAGES as usize + 1];
    });
    let log = KvmLog::with_kernel(Box::new(fake.clone()), MODES[1], Granule::K4);
    let log = Arc::new(log);
    let space = AddressSpace::with_source(Granule::K4, Arc::clone(&log)).unwrap();
    for (slot, first) in [(0, 0), (1 << 16, 1)] {
        // SAFETY: the fake has no guest.
        unsafe { log.add_slot(slot, pages(first, PAGES), 0) }.unwrap();
    }
    let all = pages(0, PAGES + 1);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    fake.with(|state| {
        [70, 130_000].iter().for_each(|page| state.write(*page));
        [80, 140_000]
            .iter()
            .for_each(|page| state.write_in(1, *page));
        // One read, one clear; the next clear fails.
        state.fail_in = Some(2);
    });
    let mut words = vec![0u64; PAGES as usize / 64 + 1];
    let request = HarvestRequest::new(all, Granule::K4);
    let numbers = |runs: Vec<IovaRange>| -> Vec<u64> {
        let numbers = |run: &IovaRange| run.start().get() >> 12..=run.last().get() >> 12;
        runs.iter().flat_map(numbers).collect()
    };
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease.stopped().unwrap_or_else(|| panic!("a clear failed"));
    assert_eq!(stopped.at, Iova::new(129_984 << 12));
    let lease = lease.partial().sync().unwrap();
    let below: Vec<_> = numbers(lease.runs().collect());
    assert!(below.starts_with(&[70, 80]), "{below:?}");
    assert!(!below.contains(&140_000), "{below:?}");
    lease.commit();
    let mut words = vec![0u64; PAGES as usize / 64 + 1];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let lease = lease.sync().unwrap();
    assert_eq!(numbers(lease.runs().collect()), [130_000, 140_000]);
    lease.commit();
}

/// Other code that clears a slot's flags ends its log, and KVM says so as long as they are off.
/// What was written by then, and until they are on again, is not known.
#[test]
fn a_log_that_other_code_switched_off_is_dirty_as_a_whole() {
    for mode in [MODES[0], MODES[1]] {
        let (space, log, fake) = machine(mode);
        fake.with(|state| {
            state.write(5);
            state.slots.get_mut(&3).unwrap().logging = false;
            state.write(6);
        });
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 200), Granule::K4);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the slot has no log"));
        assert_eq!(stopped.at, Iova::new(0), "{mode:?}");
        drop(lease);
        // It can be removed all the same, or be set again.
        log.renew_slot(3).unwrap();
        assert_eq!(harvest(&space, pages(0, 200)).len(), 200, "{mode:?}");
        fake.with(|state| state.write(7));
        assert_eq!(harvest(&space, pages(0, 200)), [7], "{mode:?}");
        fake.with(|state| state.slots.get_mut(&3).unwrap().logging = false);
        log.remove_slot(3).unwrap();
        assert_eq!(harvest(&space, pages(0, 200)).len(), 200, "{mode:?}");
        let none = log.renew_slot(3);
        assert!(matches!(none, Err(KvmError::NoSlot { slot: 3 })));
    }
}

/// Botan's generator had its state twice after a `fork`; here the child has the rings, which it
/// shares with its parent: what it read, by a `peek` even, the parent never got.
#[test]
fn a_child_of_fork_is_refused_by_every_call() {
    for mode in MODES {
        let (space, log, fake) = machine(mode);
        harvest(&space, pages(0, 200));
        fake.with(|state| {
            state.write(5);
            state.maker = Some(4711);
        });
        let refused = |error: &dyn std::fmt::Display| {
            let error = error.to_string();
            assert!(error.contains("this log is of process 4711"), "{error}");
        };
        // The locks may be held by threads that the child has not got: no call takes them.
        let held = (lock(&log.tracking), lock(&log.slots), lock(&log.rings));
        // SAFETY: the fake has no guest.
        refused(&unsafe { log.add_slot(9, pages(380, 1), 0) }.unwrap_err());
        refused(&log.remove_slot(3).unwrap_err());
        refused(&log.renew_slot(3).unwrap_err());
        refused(&log.drain_rings().unwrap_err());
        refused(&space.stop_tracking().unwrap_err());
        let mut words = [0u64; 8];
        let request = HarvestRequest::new(pages(0, 200), Granule::K4);
        refused(
            &space
                .peek(&request, UserBitmap::new(&mut words))
                .unwrap_err(),
        );
        let refusal = space.harvest(&request, UserBitmap::new(&mut words));
        let lease = refusal.unwrap();
        let stopped = lease
            .stopped()
            .unwrap_or_else(|| panic!("the child harvests"));
        assert_eq!(stopped.at, Iova::new(0));
        refused(&stopped.error);
        refused(&log.invalidate(&FlushGather::new()).unwrap_err());
        refused(&space.map(pages(380, 1), 0, Access::ReadWrite).unwrap_err());
        space.unmap_discarding(pages(0, 200)).unwrap_err();
        drop(held);
        fake.with(|state| state.maker = None);
        // The unmap told that all is dirty, here of the space that the child has a copy of.
        assert!(harvest(&space, pages(0, 200)).contains(&5), "{mode:?}");
    }
}

/// KVM does not tell of which machine a processor is. A ring of another machine keeps the entries
/// that were handed back, so each flush says so, instead of pages that are missing in both logs.
#[test]
fn a_ring_of_another_machine_is_noticed_when_it_is_flushed() {
    let (space, log, fake) = machine(MODES[3]);
    fake.with(|state| {
        state.foreign_ring = true;
        state.write(5);
    });
    let mut words = [0u64; 8];
    let request = HarvestRequest::new(pages(0, 200), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let error = lease.sync().unwrap_err().to_string();
    assert!(error.contains("added as number 0 is not of"), "{error}");
    let refused = log.drain_rings();
    assert!(matches!(refused, Err(KvmError::ForeignRing { ring: 0 })));
    fake.with(|state| state.foreign_ring = false);
    assert_eq!(harvest(&space, pages(0, 200)), [5]);
}
