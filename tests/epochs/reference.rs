//! Random programs against a model of a handful of sets: marks, harvests of all or of a part,
//! commits in any order, parts, aborts, leases that are forgotten, cursors, copies, bounds, and
//! consumers that come and go.
//!
//! Each page has a number that grows with each write. A consumer has what its commits copied, as a
//! backup tool would: one image that it keeps by the lineage of its leases, and one for each
//! cursor, which it brings up to date by `since`.

use std::collections::{BTreeMap, BTreeSet};

use dirtymap::harvest::{Bounds, Cursor, Epoch, Parent, Since, Synced, Why};
use dirtymap::{Access, AddressSpace, Consumer, Granule, Iova, IovaRange, Lease, Start};

use super::common::leaked;
use super::{numbers, pages};

const PAGES: u64 = 200;
/// The content of some pages.
type Image = BTreeMap<u64, u64>;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A lease that lives, and the contents of its pages at the time of its sync.
struct Live<'s> {
    lease: Lease<'s, Synced>,
    copies: Image,
    parts: BTreeSet<u64>,
}

struct Tool<'s> {
    consumer: Consumer<'s>,
    leases: Vec<Live<'s>>,
    /// The copy that follows the lineage, and its epoch; `None` if it has to be made anew.
    image: Option<(Epoch, Image)>,
    /// Copies at cursors.
    held: Vec<(Cursor, Image)>,
    /// Exactly the pages that are dirty for it, if its bounds were never reached.
    dirty: BTreeSet<u64>,
    is_exact: bool,
    /// Pages of leases that were forgotten: they are lost.
    lost: BTreeSet<u64>,
    /// Pages of such leases that were committed by parts. The image does not have them, and the
    /// next epoch must say so.
    parts: BTreeSet<u64>,
}

/// What was written to the pages, and what a full copy has.
struct World {
    contents: Image,
    writes: u64,
}

impl World {
    fn copy(&self, pages: impl IntoIterator<Item = u64>) -> Image {
        let content = |page| (page, self.contents.get(&page).copied().unwrap_or(0));
        pages.into_iter().map(content).collect()
    }
}

impl<'s> Tool<'s> {
    fn join(space: &'s AddressSpace, name: &str, start: Start<'_>, world: &World) -> Tool<'s> {
        let dirty = matches!(start, Start::Dirty);
        let consumer = space.consumer(name, start).unwrap();
        let image = (consumer.epoch(), world.copy(0..PAGES));
        Tool {
            consumer,
            leases: Vec::new(),
            image: (!dirty).then_some(image),
            held: Vec::new(),
            dirty: if dirty {
                (0..PAGES).collect()
            } else {
                BTreeSet::new()
            },
            is_exact: true,
            lost: BTreeSet::new(),
            parts: BTreeSet::new(),
        }
    }

    fn harvest(&mut self, part: Option<IovaRange>, world: &World) {
        let lease = match part {
            None => self.consumer.rounds().next().unwrap(),
            Some(part) => {
                let rounds = self
                    .consumer
                    .rounds()
                    .within(part.start().get()..part.last().get());
                rounds.unwrap().next().unwrap()
            }
        };
        let told: BTreeSet<u64> = numbers(lease.runs()).into_iter().collect();
        let asked = |page: &u64| part.is_none_or(|part| part.contains(Iova::new(page * 4096)));
        let due: BTreeSet<u64> = self.dirty.iter().copied().filter(asked).collect();
        if self.is_exact {
            assert_eq!(told, due);
        }
        self.dirty.retain(|page| !told.contains(page));
        let copies = world.copy(told);
        self.leases.push(Live {
            lease,
            copies,
            parts: BTreeSet::new(),
        });
    }

    /// Commits a lease, and applies its copies as its lineage says.
    fn commit(&mut self, nth: usize, world: &World) {
        let live = self.leases.remove(nth);
        let (_, lineage) = live.lease.commit_epoch();
        let lineage = lineage.unwrap();
        assert_eq!(lineage.epoch, self.consumer.epoch());
        self.parts.clear();
        self.image = match (lineage.parent, self.image.take()) {
            (Parent::Epoch(parent), Some((epoch, mut image))) if parent == epoch => {
                image.extend(live.copies);
                Some((lineage.epoch, image))
            }
            // A chain that begins with this lease; what is still pending comes later.
            (Parent::Everything(_), _) => Some((lineage.epoch, live.copies)),
            // The copy is of another epoch: everything, now.
            _ => Some((lineage.epoch, world.copy(0..PAGES))),
        };
    }

    fn end(&mut self, random: &mut Random, world: &World) {
        if self.leases.is_empty() {
            return;
        }
        let nth = random.below(self.leases.len() as u64) as usize;
        match random.below(8) {
            0..4 => self.commit(nth, world),
            4 => {
                let live = &mut self.leases[nth];
                let first = random.below(PAGES);
                let part = pages(first, 1 + random.below(PAGES - first));
                live.lease.commit_range(part);
                let inside = |page: &u64| part.contains(Iova::new(page * 4096));
                live.parts
                    .extend(live.copies.keys().copied().filter(inside));
            }
            5 | 6 => {
                let live = self.leases.remove(nth);
                let rest = live.copies.keys().filter(|page| !live.parts.contains(page));
                self.dirty.extend(rest);
                live.lease.abort();
            }
            _ => {
                let live = self.leases.remove(nth);
                if live.copies.len() > 3 {
                    self.leases.push(live);
                    return;
                }
                let rest = live.copies.keys().filter(|page| !live.parts.contains(page));
                self.lost.extend(rest);
                self.parts.extend(&live.parts);
                leaked(live.lease);
            }
        }
    }

    /// Brings the copy at a cursor up to date.
    fn catch_up(&mut self, nth: usize, world: &World) {
        let (cursor, mut image) = self.held.remove(nth);
        let everything = match self.consumer.since(cursor.epoch()) {
            Since::Runs(written) => {
                image.extend(world.copy(numbers(written.runs())));
                false
            }
            Since::Everything(why) => {
                assert!(
                    why == Why::Bounds && !self.is_exact,
                    "a cursor holds its epoch: {why:?}"
                );
                true
            }
        };
        drop(cursor);
        if everything {
            image = world.copy(0..PAGES);
        }
        self.check("a cursor", &image, world);
    }

    /// A page in which `image` differs from the memory is dirty, in a lease that lives, or lost.
    fn check(&self, which: &str, image: &Image, world: &World) {
        for (page, now) in &world.contents {
            let copy = image.get(page);
            if copy != Some(now) {
                let is_due = self.dirty.contains(page)
                    || self.lost.contains(page)
                    || self.parts.contains(page)
                    || self
                        .leases
                        .iter()
                        .any(|live| live.copies.contains_key(page))
                    || self.consumer.stats().everything;
                assert!(
                    is_due,
                    "{which}: page {page} has {copy:?} instead of {now:?}"
                );
            }
        }
    }
}

fn program(seed: u64, bounded: bool) {
    let mut random = Random(seed);
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..PAGES * 4096, 0, Access::ReadWrite).unwrap();
    let mut world = World {
        contents: Image::new(),
        writes: 0,
    };
    let mut tools = Vec::new();
    for (nth, start) in [Start::Clean, Start::Dirty, Start::Clean]
        .into_iter()
        .enumerate()
    {
        tools.push(Tool::join(&space, &format!("{nth}"), start, &world));
    }
    for step in 0..150 {
        let nth = random.below(3) as usize;
        match random.below(12) {
            0..4 => {
                let first = random.below(PAGES);
                let run = pages(first, (1 + random.below(4)).min(PAGES - first));
                world.writes += 1;
                for page in numbers([run].into_iter()) {
                    world.contents.insert(page, world.writes);
                    tools.iter_mut().for_each(|tool| {
                        tool.dirty.insert(page);
                    });
                }
                space.mark(run).unwrap();
            }
            4 | 5 => {
                let first = random.below(PAGES);
                let part = pages(first, 1 + random.below(PAGES - first));
                let part = (random.below(3) == 0).then_some(part);
                tools[nth].harvest(part, &world);
            }
            6..9 => tools[nth].end(&mut random, &world),
            9 => {
                let tool = &mut tools[nth];
                // A copy that is complete at the cursor: what is dirty now comes in later epochs.
                let cursor = tool.consumer.cursor();
                tool.held.push((cursor, world.copy(0..PAGES)));
            }
            10 if !tools[nth].held.is_empty() => {
                let held = tools[nth].held.len() as u64;
                let held = random.below(held) as usize;
                tools[nth].catch_up(held, &world);
            }
            10 | 11 if bounded && random.below(3) == 0 => {
                tools[nth].is_exact = false;
                tools[nth].consumer.set_bounds(Bounds {
                    bytes: [1, 200, 5000, u64::MAX][random.below(4) as usize],
                    deltas: 1 + random.below(3),
                    age: [1, 3, u64::MAX][random.below(3) as usize],
                });
            }
            _ if random.below(8) == 0 => {
                // It leaves, with leases that live, and comes again as another one.
                let name = format!("after step {step}");
                let start = [Start::Clean, Start::Dirty][random.below(2) as usize];
                let mut fresh = Tool::join(&space, &name, start, &world);
                // Pages that are marked for others are told to the new one, too, once.
                fresh.is_exact = false;
                fresh.harvest(None, &world);
                fresh.commit(0, &world);
                fresh.is_exact = true;
                drop(std::mem::replace(&mut tools[nth], fresh));
            }
            _ => {}
        }
        let distinct = |tool: &Tool<'_>| {
            let held: BTreeSet<Epoch> = tool.held.iter().map(|(held, _)| held.epoch()).collect();
            held.len() as u64
        };
        for tool in &tools {
            assert!(
                tool.consumer.stats().deltas <= distinct(tool),
                "memory for each cursor"
            );
            if let Some((epoch, image)) = &tool.image
                && *epoch == tool.consumer.epoch()
            {
                tool.check("an image", image, &world);
            }
        }
    }
    for tool in &mut tools {
        while !tool.leases.is_empty() {
            tool.commit(0, &world);
        }
        tool.harvest(None, &world);
        tool.commit(0, &world);
        tool.harvest(None, &world);
        tool.commit(0, &world);
        while !tool.held.is_empty() {
            tool.catch_up(0, &world);
        }
        let (_, image) = tool.image.as_ref().unwrap();
        tool.check("the last image", image, &world);
    }
}

#[test]
fn consumers_are_what_sets_say() {
    (0..12).for_each(|seed| program(seed, false));
}

#[test]
fn consumers_within_bounds_are_what_sets_say() {
    (1000..1012).for_each(|seed| program(seed, true));
}
