//! Sources whose page is larger than the space's, and which clear by batches, in every mode.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

mod common_batch;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc};

use common_batch::{Batching, Pause};
use dirtymap::flush::FlushGather;
use dirtymap::source::LeafSink;
use dirtymap::{
    Access, AddressSpace, Error, Granule, HarvestRequest, Iova, IovaRange, Lease, Owed, Scope,
    UserBitmap,
};

const PAGE: u64 = 4096;
const K64: u64 = 64 << 10;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// One number for each page of 4 KiB, and the number that consumers have copied.
#[derive(Default)]
struct Memory {
    content: Vec<AtomicU64>,
    copy: Vec<AtomicU64>,
}

impl Memory {
    fn new(pages: u64) -> Self {
        let zeros = || (0..pages).map(|_| AtomicU64::new(0)).collect();
        Memory {
            content: zeros(),
            copy: zeros(),
        }
    }

    fn copy(&self, runs: impl Iterator<Item = IovaRange>) {
        for run in runs {
            for page in run.start().get() / PAGE..=run.last().get() / PAGE {
                let content = self.content[page as usize].load(SeqCst);
                self.copy[page as usize].store(content, SeqCst);
            }
        }
    }

    /// Pages of which the copy lacks the last write.
    fn lost(&self) -> Vec<usize> {
        let differs =
            |page: &usize| self.content[*page].load(SeqCst) != self.copy[*page].load(SeqCst);
        (0..self.content.len()).filter(differs).collect()
    }
}

/// Syncs, copies, commits.
fn finish(lease: Lease<'_, Owed>, memory: &Memory) {
    let lease = lease.sync().unwrap();
    memory.copy(lease.runs());
    lease.commit();
}

/// Harvests all of `range`.
fn harvest(space: &AddressSpace, range: IovaRange, memory: &Memory) {
    let mut words = vec![0u64; (range.len() as usize / PAGE as usize).div_ceil(64)];
    let request = HarvestRequest::new(range, Granule::K4);
    finish(
        space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap(),
        memory,
    );
}

/// Two harvests of a space of 4 KiB pages over a log of 64 KiB pages, such as KVM's on AArch64. The
/// second harvest finds page 6 clean, and is now between the tables and the put-back store. The
/// guest writes to page 6. A bounded harvest cuts that page at 400 KiB. It told the sink that the
/// page was clean, so the rest was put back, and cleared the log only afterwards. Before that
/// clear, the second harvest took the rest, copied it and committed, and the guest wrote again
/// while the bit of the log was still set. Then came the clear, and no lease had the second write.
#[test]
fn a_page_that_a_bounded_harvest_meets_is_cleared_whole() {
    let bytes = 8 * K64;
    let log = Arc::new(Batching::new(Granule::from_bytes(K64).unwrap(), bytes));
    let pause = Arc::new(Pause::default());
    let space = AddressSpace::with_source(Granule::K4, log.clone()).unwrap();
    space.attach(pause.clone()).unwrap();
    let all = range(0, bytes);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let memory = Arc::new(Memory::new(bytes / PAGE));
    let write = |log: &Batching, memory: &Memory, page: u64, value| {
        memory.content[page as usize].store(value, SeqCst);
        log.write(page * PAGE);
    };
    let (paused, is_paused) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    std::thread::scope(|scope| {
        pause.0.set(move || {
            paused.send(()).unwrap();
            may_go_on.recv().unwrap();
        });
        scope.spawn(|| {
            harvest(&space, all, &memory);
            done.send(()).unwrap();
        });
        is_paused.recv().unwrap();
        (0..6).for_each(|page| write(&log, &memory, page * 16, 1));
        write(&log, &memory, 105, 1);
        log.before_clear.set({
            let (log, memory) = (log.clone(), memory.clone());
            move || {
                go_on.send(()).unwrap();
                is_done.recv().unwrap();
                write(&log, &memory, 105, 2);
            }
        });
        let mut words = [0u64; 2];
        let request = HarvestRequest::new(all, Granule::K4);
        let part = space
            .harvest(
                &request.resume_at(Iova::MIN).max_bits(100),
                UserBitmap::new(&mut words),
            )
            .unwrap();
        let next = part.next();
        finish(part, &memory);
        harvest(&space, all, &memory);
        assert_eq!(memory.lost(), [0usize; 0]);
        assert_eq!(next, Some(Iova::new(7 * K64)), "whole pages of the log");
    });
}

/// The cursor of a bounded harvest is a border of the pages of all sources.
#[test]
fn a_cursor_inside_the_page_of_a_source_is_refused() {
    let bytes = 8 * K64;
    let log = Arc::new(Batching::new(Granule::from_bytes(K64).unwrap(), bytes));
    let space = AddressSpace::with_source(Granule::K4, log).unwrap();
    space.map(range(0, bytes), 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    for from in [PAGE, K64 - PAGE, 3 * K64 + 2 * PAGE] {
        let mut words = [0u64; 2];
        let refused = space.harvest(
            &HarvestRequest::new(range(0, bytes), Granule::K4).resume_at(Iova::new(from)),
            UserBitmap::new(&mut words),
        );
        let Err(Error::BadCursor { at, granule, .. }) = refused else {
            panic!("{from}: {refused:?}");
        };
        assert_eq!((at.get(), granule.bytes()), (from, K64));
    }
}

/// A sink that is made outside of a space has no place for the rest of a page that sticks out of
/// the request. The part inside is reported, and the page stays dirty.
#[test]
fn a_sink_of_its_own_leaves_a_page_that_sticks_out_dirty() {
    use dirtymap::DirtySource;
    let log = Batching::new(Granule::from_bytes(K64).unwrap(), 8 * K64);
    [1, 2, 3, 5].iter().for_each(|page| log.write(page * K64));
    let read = |asked: IovaRange| {
        let mut words = [0u64; 2];
        let view = UserBitmap::new(&mut words)
            .view(asked, Granule::K4)
            .unwrap();
        let (mut sink, mut gather) = (view.sink(), FlushGather::new());
        let mut out = LeafSink::new(&mut sink, &mut gather);
        log.read_and_clear(asked, &mut out).unwrap();
        view.runs().collect::<Vec<_>>()
    };
    let cut = range(K64 + PAGE, 4 * K64);
    assert_eq!(
        read(cut),
        [range(K64 + PAGE, 3 * K64 - PAGE), range(5 * K64, PAGE)]
    );
    // The pages that were requested in part are dirty as before, the others are clean.
    assert_eq!(
        read(range(0, 8 * K64)),
        [range(K64, K64), range(5 * K64, K64)]
    );
}

/// The pieces of a parallel harvest follow the words of the bitmap, and the bitmap may begin inside
/// a word. At 4 KiB a bit, each byte before the bitmap moves the borders by 32 KiB.
#[cfg(feature = "rayon")]
#[test]
fn the_pieces_of_a_parallel_harvest_begin_at_pages_of_the_source() {
    const GIB: u64 = 1 << 30;
    let page = Granule::from_bytes(K64).unwrap();
    let log = Arc::new(Batching::new(page, 3 * GIB));
    let space = AddressSpace::with_source(Granule::K4, log.clone()).unwrap();
    let all = range(0, 3 * GIB);
    space.map(all, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let request = HarvestRequest::new(all, Granule::K4);
    let mut bytes = vec![0u8; (3 * GIB / PAGE / 8 + 8) as usize];
    for skip in 0..8 {
        // Both sides of each border.
        let near = (1..3).flat_map(|n| [n * GIB - 2 * K64, n * GIB - K64, n * GIB]);
        near.for_each(|at| log.write(at));
        bytes.fill(0);
        let bitmap = UserBitmap::bytes(&mut bytes[skip..]);
        let lease = space.harvest(&request.parallel(), bitmap).unwrap();
        assert_eq!(lease.report().bits_set, 6 * 16);
        lease.sync().unwrap().commit();
        let asked = std::mem::take(&mut *log.asked.lock().unwrap());
        assert!(asked.len() >= 3);
        for asked in asked {
            assert!(
                asked.is_aligned(page),
                "{asked} cuts a page, {skip} bytes in"
            );
        }
    }
}

/// A mode of harvest.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Plain,
    Bounded,
    Masked,
    #[cfg(feature = "rayon")]
    Parallel,
    Peek,
    OneDomain,
    AbortAndAgain,
    Unmap,
}

const MODES: &[Mode] = &[
    Mode::Plain,
    Mode::Bounded,
    Mode::Masked,
    #[cfg(feature = "rayon")]
    Mode::Parallel,
    Mode::Peek,
    Mode::OneDomain,
    Mode::AbortAndAgain,
    Mode::Unmap,
];

/// Pseudorandom numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// A space over one log, its memory, and a device that writes.
struct World {
    space: Arc<AddressSpace>,
    log: Arc<Batching>,
    memory: Arc<Memory>,
    random: Random,
}

/// The mapped range, and the requested range: whole pages of 64 KiB, without those at the border.
const BYTES: u64 = 32 * K64;

fn asked() -> IovaRange {
    range(K64, BYTES - 2 * K64)
}

impl World {
    fn new(times: u64, seed: u64) -> Self {
        let page = Granule::from_bytes(times * PAGE).unwrap();
        let log = Arc::new(Batching::new(page, BYTES));
        let space = AddressSpace::with_source(Granule::K4, log.clone()).unwrap();
        space
            .map(range(0, BYTES / 2), 0, Access::ReadWrite)
            .unwrap();
        space
            .map(range(BYTES / 2, BYTES / 2), 0, Access::ReadWrite)
            .unwrap();
        space.start_tracking().unwrap();
        World {
            space: Arc::new(space),
            log,
            memory: Arc::new(Memory::new(BYTES / PAGE)),
            random: Random(seed),
        }
    }

    /// Writes to some pages now. After the next harvest has read the bits and before it clears
    /// them, another harvest takes everything that it finds, if `twice`. Then some of these pages,
    /// and others, are written again.
    fn write(&mut self, twice: bool) {
        let mut some = |n: u64| (0..n).map(|_| self.random.below(BYTES / PAGE)).collect();
        let (now, mut then): (Vec<u64>, Vec<u64>) = (some(40), some(12));
        then.extend(now.iter().step_by(2));
        let write = |log: &Batching, memory: &Memory, page: u64| {
            memory.content[page as usize].fetch_add(1, SeqCst);
            log.write(page * PAGE);
        };
        now.iter()
            .for_each(|page| write(&self.log, &self.memory, *page));
        let (log, memory) = (self.log.clone(), self.memory.clone());
        let space = self.space.clone();
        self.log.before_clear.set(move || {
            if twice {
                harvest(&space, range(0, BYTES), &memory);
            }
            then.iter().for_each(|page| write(&log, &memory, *page));
        });
    }

    /// One pass over the requested range.
    fn pass(&mut self, mode: Mode) {
        let (space, memory) = (&*self.space, &*self.memory);
        let asked = asked();
        // Each bit stands for one byte, because the parallel harvest needs many bits for a piece.
        // The bitmap begins inside a word, so pieces do not begin at pages.
        let granule = match mode {
            #[cfg(feature = "rayon")]
            Mode::Parallel => Granule::BYTE,
            _ => Granule::K4,
        };
        let bits = (asked.len() >> granule.lg2()) as usize;
        let mut bytes = vec![0u8; bits.div_ceil(8) + 2];
        let begin = 1 + usize::from(bytes.as_ptr().addr().is_multiple_of(2));
        bytes.resize(begin + bits.div_ceil(8) + 1, 0);
        let (before, rest) = bytes.split_at_mut(begin);
        let (bitmap, behind) = rest.split_at_mut(bits.div_ceil(8));
        before.fill(0xa5);
        behind.fill(0x5a);
        let request = HarvestRequest::new(asked, granule);
        match mode {
            Mode::Plain => finish(
                space.harvest(&request, UserBitmap::bytes(bitmap)).unwrap(),
                memory,
            ),
            Mode::Bounded => {
                let mut next = Some(asked.start());
                while let Some(from) = next {
                    bitmap.fill(0);
                    let part = space
                        .harvest(
                            &request.resume_at(from).max_bits(65 + self.random.below(70)),
                            UserBitmap::bytes(bitmap),
                        )
                        .unwrap();
                    assert!(part.next().is_none_or(|next| next > from));
                    next = part.next();
                    finish(part, memory);
                }
            }
            Mode::Masked => {
                // Runs that cut pages of 64 KiB, and some that contain one.
                let mut mask = [0x0fff_ff00_ffff_8001u64; 8];
                let mask = UserBitmap::new(&mut mask).view(asked, granule).unwrap();
                let lease = space
                    .harvest(&request.masked(mask), UserBitmap::bytes(bitmap))
                    .unwrap();
                finish(lease, memory);
            }
            #[cfg(feature = "rayon")]
            Mode::Parallel => finish(
                space
                    .harvest(&request.parallel(), UserBitmap::bytes(bitmap))
                    .unwrap(),
                memory,
            ),
            Mode::Peek => {
                let view = space.peek(&request, UserBitmap::bytes(bitmap)).unwrap();
                let runs: Vec<_> = view.runs().collect();
                for page in memory.lost() {
                    let page = range(page as u64 * PAGE, PAGE);
                    let told = runs.iter().any(|run| run.covers(page));
                    assert!(told || !asked.covers(page), "{page} is dirty");
                }
            }
            Mode::OneDomain => {
                let request = request.in_scope(Scope::Domain(space.domains()[0]));
                finish(
                    space.harvest(&request, UserBitmap::bytes(bitmap)).unwrap(),
                    memory,
                );
            }
            Mode::AbortAndAgain => {
                let lease = space.harvest(&request, UserBitmap::bytes(bitmap)).unwrap();
                let _ = lease.abort();
                bitmap.fill(0);
                finish(
                    space.harvest(&request, UserBitmap::bytes(bitmap)).unwrap(),
                    memory,
                );
            }
            Mode::Unmap => {
                let half = range(BYTES / 2, BYTES / 2);
                let mut words = [0u64; 4];
                let bitmap = UserBitmap::new(&mut words);
                let (_, dirty) = space.unmap(half, Granule::K4, bitmap).unwrap();
                memory.copy(dirty.runs());
                space.map(half, 0, Access::ReadWrite).unwrap();
            }
        }
        let untouched = before.iter().all(|byte| *byte == 0xa5);
        assert!(untouched && behind.iter().all(|byte| *byte == 0x5a));
    }
}

/// Every mode, over sources whose page is as large as that of the space, twice, and 16 times, with
/// writes between the look and the clear of a batch.
#[test]
fn no_mode_loses_a_write_of_a_source_that_clears_by_batches() {
    for times in [1, 2, 16] {
        for (nth, mode) in MODES.iter().enumerate() {
            for seed in 0..20 {
                let mut world = World::new(times, seed * 100 + nth as u64);
                for _ in 0..4 {
                    world.write(seed % 2 == 0);
                    world.pass(*mode);
                }
                // The writes after the last look, and those outside of the request.
                world.log.before_clear.set(|| ());
                harvest(&world.space, range(0, BYTES), &world.memory);
                let lost = world.memory.lost();
                assert!(lost.is_empty(), "{mode:?}, {times} times, {seed}: {lost:?}");
                // No mode cuts a page of the source.
                let page = world.space.alignment();
                for asked in world.log.asked.lock().unwrap().iter() {
                    assert!(asked.is_aligned(page), "{mode:?} asks for {asked}");
                }
                let stats = world.space.stats();
                assert_eq!(
                    stats.leased_bytes,
                    stats.committed_bytes + stats.aborted_bytes
                );
            }
        }
    }
}
