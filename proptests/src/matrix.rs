//! Every mode of harvest into every form of bitmap, against a set of dirty pages. Base and granule
//! are arbitrary, areas touch, leaves have three sizes, and there are marks among them. Or the
//! source is a log that clears by batches, whose pages are 1, 2 or 16 times that of the space.

use std::collections::BTreeSet;

use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::sync::Arc;
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, HarvestRequest, Holes, Iova, IovaRange,
    Mapping, SparseBitmap, Tracking, UserBitmap,
};
use pagetable_sim::{Domain, DomainConfig, LeafSizes, PhysMemory};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;

use crate::Config;
use crate::forms::{FORMS, Form, GUARD, Memory, bits_of, set};
use crate::log_node::LogNode;
use crate::rig::Node;

const PAGE: u64 = 4096;
/// The pages of the window, which has leaves and can be dirty.
const WINDOW: u64 = 1536;
/// All areas together are one block of 2^40 bytes.
const BLOCK: u8 = 40;
/// The last block of the address space: no device reaches it, and all writes there are marks.
const TOP: u64 = (1 << 24) - 1;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Peek,
    Harvest,
    Masked,
    Bounded,
    Parallel,
    CommitRange,
    Abort,
}

const MODES: [Mode; 7] = [
    Mode::Peek,
    Mode::Harvest,
    Mode::Masked,
    Mode::Bounded,
    Mode::Parallel,
    Mode::CommitRange,
    Mode::Abort,
];

#[derive(Clone, Debug)]
struct Case {
    block: u64,
    /// The first page of the window in its block.
    window: u64,
    /// Pages of the window at which one area ends and the next one begins.
    cuts: BTreeSet<u64>,
    /// The leaves of each area.
    leaves: Vec<u8>,
    /// The page of a log, as a logarithm; 0 for a table with those leaves.
    log: u8,
    /// The writes: by a device or by a CPU, the first byte in the window, and the length.
    writes: Vec<(bool, u64, u64)>,
    granule: u8,
    /// The whole block, or a first granule of the window and a number of granules.
    wide: bool,
    stretch: (u64, u64),
    /// The granule of the mask, and its runs in the window.
    mask: (u8, Vec<(u64, u64)>),
    limit: u64,
    /// The parts of the request that are committed, in 1/256 of it.
    commits: Vec<(u8, u8)>,
    /// Bits that are set before, bytes beyond the needed ones, and the offset of the first byte.
    preset: Vec<u64>,
    slack: usize,
    skip: usize,
}

fn case() -> impl Strategy<Value = Case> {
    let bytes = WINDOW * PAGE;
    let place = (
        select(vec![0, 255, TOP]),
        select(vec![0, (1 << 38) - (2 << 20), (1 << 40) - bytes]),
        btree_set(1..WINDOW, 0..4),
        vec(0u8..3, 4),
        select(vec![0u8, 0, 0, 12, 13, 16]),
        vec((any::<bool>(), 0..bytes, 1u64..20_000), 0..12),
    );
    let request = (
        9u8..=20,
        prop::bool::weighted(0.1),
        (any::<u64>(), any::<u64>()),
        (
            select(vec![9u8, 12, 16]),
            vec((0..bytes, 1u64..600_000), 0..5),
        ),
        1u64..300,
        vec((any::<u8>(), any::<u8>()), 0..3),
    );
    let bitmap = (vec(any::<u64>(), 0..4), 0usize..3, 0usize..8);
    (place, request, bitmap).prop_map(|(place, request, bitmap)| {
        let (block, window, cuts, leaves, log, writes) = place;
        let unit = 1 << log.saturating_sub(12);
        let cuts = cuts.into_iter().map(|cut| cut / unit * unit);
        let cuts = cuts.filter(|cut| *cut > 0).collect();
        let (granule, wide, stretch, mask, limit, commits) = request;
        let (preset, slack, skip) = bitmap;
        Case {
            block,
            window,
            cuts,
            leaves,
            log,
            writes,
            granule,
            wide,
            stretch,
            mask,
            limit,
            commits,
            preset,
            slack,
            skip,
        }
    })
}

fn bytes(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// The numbers of the granules that `range` touches.
fn numbers(range: IovaRange, granule: u8) -> impl Iterator<Item = u64> {
    range.start().get() >> granule..=range.last().get() >> granule
}

fn page_range(page: u64) -> IovaRange {
    bytes(page * PAGE, PAGE)
}

impl Case {
    fn block(&self) -> IovaRange {
        bytes(self.block << BLOCK, 1 << BLOCK)
    }

    /// `len` bytes from byte `at` of the window on, as far as the window goes.
    fn in_window(&self, at: u64, len: u64) -> IovaRange {
        let start = (self.block << BLOCK) + self.window;
        bytes(start + at, len.min(WINDOW * PAGE - at))
    }

    fn areas(&self) -> Vec<(IovaRange, LeafSizes)> {
        let k4 = LeafSizes::only(Granule::K4);
        let k64 = k4.or(LeafSizes::only(Granule::from_lg2(16).unwrap()));
        let m2 = k64.or(LeafSizes::only(Granule::M2));
        let ends = self.cuts.iter().copied().chain([WINDOW]);
        let starts = [0].into_iter().chain(self.cuts.iter().copied());
        let areas = starts.zip(ends).zip(&self.leaves);
        areas
            .map(|((start, end), leaf)| {
                let range = self.in_window(start * PAGE, (end - start) * PAGE);
                (range, [k4, k64, m2][usize::from(*leaf)])
            })
            .collect()
    }

    /// The page that suits the space and the log, as a logarithm.
    fn page(&self) -> u8 {
        self.log.max(12)
    }

    /// The granule and the range of the request.
    fn request(&self, mode: Mode) -> (u8, IovaRange) {
        if self.wide {
            // With a single bit for everything, an abort makes everything dirty.
            let huge =
                self.granule.is_multiple_of(2) && !matches!(mode, Mode::CommitRange | Mode::Abort);
            return (if huge { BLOCK } else { 20 }, self.block());
        }
        let unit = 1 << self.granule.max(self.page());
        let units = WINDOW * PAGE / unit;
        let start = self.stretch.0 % units;
        let len = self.stretch.1 % (units - start) + 1;
        (self.granule, self.in_window(start * unit, len * unit))
    }
}

/// A domain whose areas have leaves of chosen sizes, or none. Without leaves, only CPUs write
/// there.
struct Leaves {
    domain: Arc<Domain>,
    /// The log in its place.
    log: Option<Arc<LogNode>>,
    areas: Vec<(IovaRange, LeafSizes)>,
}

impl Leaves {
    fn source(&self) -> &dyn DirtySource {
        match &self.log {
            Some(log) => &**log,
            None => &*self.domain,
        }
    }
}

impl DirtySource for Leaves {
    fn page(&self) -> Granule {
        self.source().page()
    }

    fn map(&self, mapping: &Mapping) -> Result<(), Error> {
        let mut areas = self.areas.iter();
        match areas.find(|(range, _)| *range == mapping.range) {
            Some(_) if self.log.is_some() => self.source().map(mapping),
            Some((_, sizes)) => self
                .domain
                .map_leaves(mapping, *sizes)
                .map_err(Error::source_failed),
            None => Ok(()),
        }
    }

    fn unmap(&self, range: IovaRange, gather: &mut FlushGather, dirty: &mut dyn FnMut(IovaRange)) {
        self.source().unmap(range, gather, dirty);
    }

    fn set_tracking(&self, to: Tracking) -> Result<(), Error> {
        self.source().set_tracking(to)
    }

    fn read_and_clear(&self, range: IovaRange, out: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        self.source().read_and_clear(range, out)
    }

    fn peek(&self, range: IovaRange, sink: &mut Sink<'_>) -> Result<(), Stopped> {
        self.source().peek(range, sink)
    }

    fn invalidate(&self, gather: &FlushGather) -> Result<Invalidated, Error> {
        self.source().invalidate(gather)
    }
}

/// The space of a case after its writes, and the dirty pages.
fn world(case: &Case) -> (AddressSpace, BTreeSet<u64>) {
    let areas = case.areas();
    let memory = Arc::new(PhysMemory::new(WINDOW * PAGE).unwrap());
    let domain = Domain::new(Arc::clone(&memory), DomainConfig::default());
    let log = || Arc::new(LogNode::new(&Config::PLAIN, 0, case.log, &memory));
    let log = (case.log > 0).then(log);
    let source = Leaves {
        log: log.clone(),
        domain: Arc::clone(&domain),
        areas: match case.block {
            TOP => Vec::new(),
            _ => areas.clone(),
        },
    };
    let space = AddressSpace::with_source(Granule::K4, source).unwrap();
    let window = case.in_window(0, WINDOW * PAGE);
    for (range, _) in &areas {
        let backing = range.start().get() - window.start().get();
        space.map(*range, backing, Access::ReadWrite).unwrap();
    }
    // The areas around them, up to the ends of the block.
    let below = window.start().get() - case.block().start().get();
    let above = case.block().last().get() - window.last().get();
    for (start, len) in [
        (case.block().start().get(), below),
        (window.last().get().wrapping_add(1), above),
    ] {
        if len > 0 {
            space.map(bytes(start, len), 0, Access::ReadWrite).unwrap();
        }
    }
    space.start_tracking().unwrap();
    let mut dirty = BTreeSet::new();
    for &(device, at, len) in &case.writes {
        if !device || case.block == TOP {
            let range = case.in_window(at, len);
            space.mark(range).unwrap();
            dirty.extend(numbers(range, 12));
            continue;
        }
        let at = case.in_window(at, 1).start();
        if let Some(log) = &log {
            log.write(0, at, &[1]).unwrap();
            let page = Granule::from_lg2(case.log).unwrap();
            dirty.extend(numbers(IovaRange::granule_at(at, page), 12));
            continue;
        }
        let (area, sizes) = areas.iter().find(|(range, _)| range.contains(at)).unwrap();
        let spans = sizes.iter().map(|size| IovaRange::granule_at(at, size));
        let leaf = spans.filter(|span| area.covers(*span)).last().unwrap();
        assert_eq!(domain.table().set_dirty(at).unwrap().range, leaf);
        dirty.extend(numbers(leaf, 12));
    }
    (space, dirty)
}

/// The pages of the block that are dirty.
fn peek(space: &AddressSpace, block: IovaRange) -> BTreeSet<u64> {
    let sparse = SparseBitmap::new(1 << (BLOCK - 12));
    let all = HarvestRequest::new(block, Granule::K4);
    let view = space.peek(&all, UserBitmap::sparse(&sparse)).unwrap();
    view.runs().flat_map(|run| numbers(run, 12)).collect()
}

/// The part of the request between two fractions of it.
fn share(range: IovaRange, (a, b): (u8, u8)) -> IovaRange {
    let at = |n: u8| range.start().get() + ((range.len() - 1) * u128::from(n) / 255) as u64;
    IovaRange::new(Iova::new(at(a.min(b))), Iova::new(at(a.max(b)))).unwrap()
}

fn check(case: &Case, mode: Mode, form: Form) -> Result<(), TestCaseError> {
    let (space, mut dirty) = world(case);
    prop_assert_eq!(&peek(&space, case.block()), &dirty, "before");
    let (lg2, range) = case.request(mode);
    let granule = Granule::from_lg2(lg2).unwrap();
    let needed = range.granules(granule) as u64;

    let mut content = needed.div_ceil(8) as usize + case.slack;
    if matches!(form, Form::Words | Form::Shared) {
        content = content.next_multiple_of(8);
    }
    let mut image = vec![0; content + 2 * GUARD];
    image[..GUARD].fill(0xA5);
    image[GUARD + content..].fill(0xA5);
    for bit in &case.preset {
        set(&mut image, bit % (content as u64 * 8));
    }
    let before = image.clone();
    let mut memory = Memory::new(form, &image, case.skip).unwrap();

    // A page is in the mask if the mask has all granules that the surrounding page of a source
    // touches.
    let fine = case.mask.0;
    let in_window = |(at, len): &(u64, u64)| case.in_window(*at, *len);
    let masked: BTreeSet<u64> = case
        .mask
        .1
        .iter()
        .map(in_window)
        .flat_map(|r| numbers(r, fine))
        .collect();
    let around = |page: u64| {
        let unit = Granule::from_lg2(case.page()).unwrap();
        IovaRange::granule_at(page_range(page).start(), unit)
    };
    let in_mask = |page: u64| numbers(around(page), fine).all(|n| masked.contains(&n));
    let asked = |page: &u64| range.covers(page_range(*page));
    let taken: BTreeSet<u64> = (dirty.iter().copied().filter(asked))
        .filter(|page| mode != Mode::Masked || in_mask(*page))
        .collect();
    for page in &taken {
        let offset = page * PAGE - range.start().get();
        numbers(bytes(offset, PAGE), lg2).for_each(|bit| set(&mut image, bit));
    }

    let request = HarvestRequest::new(range, granule).holes(Holes::Refuse);
    let mut committed: BTreeSet<u64> = BTreeSet::new();
    let mut back = false;
    match mode {
        Mode::Peek => drop(space.peek(&request, memory.bitmap()).unwrap()),
        Mode::Harvest => {
            let lease = space.harvest(&request, memory.bitmap()).unwrap();
            lease.sync().unwrap().commit();
        }
        Mode::Parallel => {
            let lease = space.harvest(&request.parallel(), memory.bitmap()).unwrap();
            lease.sync().unwrap().commit();
        }
        Mode::Masked => {
            let fine = Granule::from_lg2(fine).unwrap();
            let window = case.in_window(0, WINDOW * PAGE);
            let sparse = SparseBitmap::new(window.granules(fine) as u64);
            let mask = UserBitmap::sparse(&sparse).view(window, fine).unwrap();
            let recorded = case.mask.1.iter().map(in_window);
            recorded.for_each(|range| mask.sink().record(range).unwrap());
            let lease = space
                .harvest(&request.masked(mask), memory.bitmap())
                .unwrap();
            lease.sync().unwrap().commit();
        }
        Mode::Bounded => {
            let mut next = Some(range.start());
            while let Some(from) = next {
                let part = space
                    .harvest(
                        &request.resume_at(from).max_bits(case.limit),
                        memory.bitmap(),
                    )
                    .unwrap();
                next = part.next();
                prop_assert!(next.is_none_or(|next| next > from));
                part.sync().unwrap().commit();
            }
        }
        Mode::CommitRange | Mode::Abort => {
            let lease = space.harvest(&request, memory.bitmap()).unwrap();
            let left: BTreeSet<u64> = dirty.difference(&taken).copied().collect();
            prop_assert_eq!(peek(&space, case.block()), left, "while leased");
            let lease = lease.sync().unwrap();
            if mode == Mode::CommitRange {
                for part in case.commits.iter().map(|shares| share(range, *shares)) {
                    lease.commit_range(part);
                    let whole = part.round_in(granule).into_iter();
                    committed.extend(whole.flat_map(|part| numbers(part, lg2)));
                }
            }
            lease.abort();
            back = true;
        }
    }
    prop_assert_eq!(memory.image(&before).unwrap(), &image[..], "the bitmap");

    if mode != Mode::Peek {
        dirty.retain(|page| !taken.contains(page));
    }
    if back {
        // The pages whose bits are set and not committed. A part of a page makes the whole page
        // dirty.
        let first = range.start().get() >> lg2;
        let bits = bits_of(&image[GUARD..GUARD + content]).filter(|bit| *bit < needed);
        let open = bits
            .map(|bit| first + bit)
            .filter(|n| !committed.contains(n));
        dirty.extend(open.flat_map(|n| numbers(bytes(n << lg2, 1 << lg2), 12)));
    }
    prop_assert_eq!(peek(&space, case.block()), dirty, "after");
    Ok(())
}

proptest! {
    // Each case makes a new space for each mode and each form.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.div_ceil(8)))]

    #[test]
    fn every_mode_and_form_agrees_with_a_set_of_pages(case in case()) {
        for mode in MODES {
            for form in FORMS {
                check(&case, mode, form)
                    .map_err(|error| TestCaseError::fail(format!("{mode:?}, {form:?}: {error}")))?;
            }
        }
    }
}
