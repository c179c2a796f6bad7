//! Files that no store has written: whatever they hold, opening them ends, allocates no more than
//! the file is long, and never answers with less than there is.

use dirtymap::Granule;
use proptest::collection::vec;
use proptest::prelude::*;

use super::programs::COPIED;
use super::{Op, World, options};
use crate::delta::{LOOKED_AT, Run};
use crate::disk::SimFolder;
use crate::error::Why;
use crate::format::{BLOCK, Batch, Header, forge_checksums};
use crate::geometry::Geometry;
use crate::image::{Image, MAX_CONSUMERS, MAX_EPOCH};
use crate::record::Record;
use crate::store::{Opened, Store};

/// A store with a consumer, some of whose pages are dirty; the bytes of its log.
fn log() -> (World, Vec<u8>) {
    let mut world = World::new();
    let store = world.create().unwrap();
    world.run(&store, &COPIED).unwrap();
    let writes = [0, 2, 4, 1].map(|page| Op::Write { page });
    world.run(&store, &writes[..1]).unwrap();
    let bytes = world.sim.bytes("log").unwrap();
    (world, bytes)
}

impl World {
    fn geometry(&self) -> Geometry {
        let extent = Granule::from_bytes(2 * 4096).unwrap();
        Geometry::new(self.device().len, extent, Granule::K4).unwrap()
    }
}

/// What the file `bytes` is taken for.
fn open_log(world: &World, bytes: Vec<u8>) -> Result<Store, Why> {
    let folder = SimFolder::with("log", bytes);
    match Store::open(folder, &world.device(), &options()).unwrap() {
        Opened::Known(store) => Ok(store),
        Opened::Everything(lost) => Err(lost.why().clone()),
    }
}

#[test]
fn every_file_that_is_cut_short_means_everything() {
    let (world, bytes) = log();
    assert!(open_log(&world, bytes.clone()).is_ok());
    for len in (0..bytes.len()).step_by(509) {
        assert!(open_log(&world, bytes[..len].to_vec()).is_err(), "{len}");
    }
}

/// A bit of the header or of the checkpoint, or of a batch before the last one.
#[test]
fn every_byte_that_rots_is_noticed() {
    let (world, bytes) = log();
    let header = Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap();
    let header_and_checkpoint = (0..96).chain(BLOCK..BLOCK + header.checkpoint as usize);
    for at in header_and_checkpoint {
        let mut rotten = bytes.clone();
        rotten[at] ^= 1;
        assert!(open_log(&world, rotten).is_err(), "byte {at}");
    }
}

/// A batch that was flushed rots, and a later one is whole. To end the replay there would forget
/// the later one without a word.
#[test]
fn a_batch_that_rots_in_the_middle_means_everything() {
    let mut world = World::new();
    let roomy = options().log_bytes(8 * 4096);
    let store = Store::create(world.sim.clone(), &world.device(), &roomy).unwrap();
    let writes = [0, 2, 4].map(|page| Op::Write { page });
    world.run(&store, &writes).unwrap();
    let mut bytes = world.sim.bytes("log").unwrap();
    let header = Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap();
    let second = header.batches() as usize + BLOCK;
    bytes[second + 33] ^= 1;
    let why = open_log(&world, bytes).unwrap_err();
    let (lost, later) = (header.sequence + 1, header.sequence + 2);
    assert_eq!(why, Why::LostBatch { lost, later });
}

#[test]
fn a_store_of_another_device_version_or_length_says_so() {
    let (mut world, bytes) = log();
    let with = |at: usize, byte: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        open_log(&world, bytes).unwrap_err()
    };
    assert_eq!(with(0, b'x'), Why::Foreign);
    assert_eq!(with(8, 2), Why::Version { found: 2, known: 1 });
    assert_eq!(with(90, 1), Why::Checksum { part: "header" });
    let folder = || SimFolder::with("log", bytes.clone());
    let mut other = world.device();
    other.id += 1;
    let Opened::Everything(lost) = Store::open(folder(), &other, &options()).unwrap() else {
        panic!("the store of another device is taken");
    };
    let (recorded, asked) = (world.device().id, other.id);
    assert_eq!(*lost.why(), Why::WrongDevice { recorded, asked });
    // A device that grew while the store was closed: the new part is not in any delta.
    let recorded = world.device().len;
    world.resize(8);
    let found = world.device().len;
    assert_eq!(
        open_log(&world, bytes.clone()).unwrap_err(),
        Why::Resized { recorded, found }
    );
    assert_eq!(open_log(&world, Vec::new()).unwrap_err(), Why::Foreign);
    let none = Store::open(SimFolder::new(), &world.device(), &options()).unwrap();
    assert!(matches!(none, Opened::Everything(lost) if *lost.why() == Why::Missing));
}

/// Each log has the next number, and goes on counting batches above a torn one: so no block of an
/// older log is taken for one of the new log, where a file system hands out old blocks.
#[test]
fn a_new_log_has_numbers_of_its_own() {
    let mut world = World::new();
    let store = Store::create(world.sim.clone(), &world.device(), &options()).unwrap();
    let header = |world: &World| {
        let bytes = world.sim.bytes("log").unwrap();
        Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap()
    };
    let first = header(&world);
    let (logs, batches) = (store.stats().switches, store.stats().batches);
    while store.stats().switches == logs {
        world
            .run(&store, &[0, 2, 4].map(|page| Op::Write { page }))
            .unwrap();
    }
    let (second, batches) = (header(&world), store.stats().batches - batches);
    assert_eq!(second.generation, first.generation + 1);
    assert!(second.sequence >= first.sequence + batches && batches > 0);
}

/// Each block of the log claims to begin a batch that has all of the rest. To look at each of them
/// would take time in proportion to the square of the log.
#[test]
fn a_log_in_which_every_block_claims_the_rest_is_refused() {
    let world = World::new();
    let roomy = options().log_bytes(32 * BLOCK as u64);
    drop(Store::create(world.sim.clone(), &world.device(), &roomy).unwrap());
    let mut bytes = world.sim.bytes("log").unwrap();
    let header = Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap();
    for at in (header.batches() as usize..bytes.len()).step_by(BLOCK) {
        let rest = (bytes.len() - at) as u32;
        bytes[at..at + 4].copy_from_slice(b"dmba");
        bytes[at + 8..at + 16].copy_from_slice(&header.generation.to_le_bytes());
        bytes[at + 24..at + 28].copy_from_slice(&rest.to_le_bytes());
    }
    let (part, what) = ("log", "too many batches begin in it");
    assert_eq!(
        open_log(&world, bytes).unwrap_err(),
        Why::Damaged { part, what }
    );
}

/// A consumer whose next increment would be the last one there is: the store would be taken, and
/// its first harvest refused with words about the store's own batch.
#[test]
fn a_log_whose_epochs_are_used_up_is_refused() {
    let (world, bytes) = log();
    let header = Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap();
    let checkpoint = &bytes[BLOCK..BLOCK + header.checkpoint as usize];
    let mut image = Image::read(checkpoint, &header.geometry).unwrap();
    for (next, taken) in [(MAX_EPOCH, true), (MAX_EPOCH + 1, false), (u64::MAX, false)] {
        image.consumers.values_mut().next().unwrap().next = next;
        let mut out = Vec::new();
        image.put(&mut out);
        let read = Image::read(&out, &header.geometry);
        assert_eq!(read.is_ok(), taken, "{next:#x}");
    }
}

/// A log lets its device grow past the one that is there, to 2^32 extents, in a few bytes. What is
/// dirty in them would take a gigabyte for each consumer, so the replay ends at the record.
#[test]
fn a_log_that_outgrows_its_device_is_refused_at_the_record() {
    let world = World::new();
    drop(Store::create(world.sim.clone(), &world.device(), &options()).unwrap());
    let mut bytes = world.sim.bytes("log").unwrap();
    let header = Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap();
    let (found, most) = (world.device().len, 1 << (32 + header.geometry.extent.lg2()));
    let mut batch = Batch::new();
    for len in [found + 1, most] {
        batch.push(&Record::Grow { len });
    }
    let batch = batch.seal(header.generation, header.sequence);
    bytes[header.batches() as usize..][..batch.len()].copy_from_slice(&batch);
    let recorded = found + 1;
    assert_eq!(
        open_log(&world, bytes.clone()).unwrap_err(),
        Why::Resized { recorded, found }
    );
    // The same in the header, whose checkpoint may name extents of the larger device.
    bytes[48..56].copy_from_slice(&most.to_le_bytes());
    forge_checksums(&mut bytes);
    assert_eq!(
        open_log(&world, bytes).unwrap_err(),
        Why::Resized {
            recorded: most,
            found
        }
    );
}

/// The log of an empty store with room for more, after its own batches, in which `records` are one
/// more batch.
fn with_batch(world: &World, records: &[Record]) -> Vec<u8> {
    let roomy = options().log_bytes(64 * BLOCK as u64);
    let sim = SimFolder::new();
    drop(Store::create(sim.clone(), &world.device(), &roomy).unwrap());
    let mut bytes = sim.bytes("log").unwrap();
    let header = Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap();
    let mut batch = Batch::new();
    records.iter().for_each(|record| batch.push(record));
    let batch = batch.seal(header.generation, header.sequence);
    bytes[header.batches() as usize..][..batch.len()].copy_from_slice(&batch);
    bytes
}

/// A consumer waits for many pages, and harvests and aborts again and again, with one new page
/// each time. Each abort took time in proportion to all pages, so a replay took time in proportion
/// to the square of the log.
#[test]
fn a_replay_takes_time_in_proportion_to_its_log() {
    let looked_at = |count: u64| {
        let mut world = World::new();
        world.resize(2 * 256 * (count + 1));
        let name = "one".to_owned();
        let mut records = vec![Record::Join { id: 0, name }];
        let open = |extent| Record::Open {
            first: extent,
            count: 1,
        };
        // Each in a chunk of its own.
        for extent in (1..=count).map(|number| number * 256) {
            records.push(open(extent));
            records.push(Record::Close { extent, mask: 1 });
        }
        records.push(open(0));
        for epoch in 1..=count {
            let whole = false;
            let id = 0;
            records.push(Record::Harvest { id, epoch, whole });
            records.push(Record::Dirty { extent: 0, mask: 1 });
            records.push(Record::Abort { id, epoch });
        }
        let bytes = with_batch(&world, &records);
        LOOKED_AT.set(0);
        let store = open_log(&world, bytes).unwrap();
        let looked_at = LOOKED_AT.get();
        let increment = store.harvest("one", None).unwrap();
        assert_eq!(increment.epoch().number(), count + 1);
        looked_at
    };
    let (few, many) = (looked_at(1000), looked_at(4000));
    assert!(
        many < 5 * few,
        "{few} entries for a log, {many} for one of four times the length"
    );
}

/// One record of a few bytes opens a million extents, and a recovery added each of them to each of
/// 64 consumers. They are added to all consumers as one delta.
#[test]
fn a_recovery_adds_open_extents_in_one_go() {
    const COUNT: u64 = 1 << 16;
    let [extent, page] = [16, 12].map(|lg2| Granule::from_lg2(lg2).unwrap());
    let mut geometry = Geometry::new(COUNT << 16, extent, page).unwrap();
    let mut image = Image::default();
    let mut apply = |record| image.apply(&mut geometry, &record).unwrap();
    for id in 0..MAX_CONSUMERS as u32 {
        let name = id.to_string();
        apply(Record::Join { id, name });
    }
    // Each consumer waits for a page.
    for (first, count) in [(0, 1), (1, COUNT - 1)] {
        apply(Record::Open { first, count });
        apply(Record::Dirty {
            extent: first,
            mask: 1,
        });
    }
    LOOKED_AT.set(0);
    image.recover();
    let looked_at = LOOKED_AT.get() as u64;
    assert!(looked_at < COUNT, "{looked_at} entries for {COUNT} extents");
    for consumer in image.consumers.values() {
        let runs: Vec<Run> = consumer.pending.runs().collect();
        let (first, count, mask) = (0, COUNT, u32::MAX);
        assert_eq!(runs, [Run { first, count, mask }]);
    }
}

/// A sparse file of any length costs nothing, and the memory for its checkpoint was taken before a
/// byte of it was looked at. A checkpoint has a bound, which the device gives.
#[test]
fn a_checkpoint_that_is_longer_than_the_device_needs_is_refused() {
    let (world, mut bytes) = log();
    let most = Image::most_bytes(3);
    for (len, taken) in [(most, true), (most + 1, false)] {
        bytes.resize((most + (1 << 20)) as usize, 0);
        bytes[64..72].copy_from_slice(&len.to_le_bytes());
        forge_checksums(&mut bytes);
        let what = match taken {
            true => "there are bytes after the end",
            false => "the checkpoint is longer than the device needs",
        };
        let part = if taken { "checkpoint" } else { "header" };
        let refused = open_log(&world, bytes.clone()).map(drop);
        assert_eq!(refused, Err(Why::Damaged { part, what }));
    }
    // The longest one there is: all consumers, with the longest names, and masks in two deltas.
    let mut image = Image::default();
    let mut geometry = world.geometry();
    for number in 0..MAX_CONSUMERS as u32 {
        let name = format!("{number:0255}");
        image
            .apply(&mut geometry, &Record::Join { id: number, name })
            .unwrap();
    }
    let mut out = Vec::new();
    image.put(&mut out);
    assert!(out.len() as u64 <= most, "{} of {most}", out.len());
}

/// A record of seven bytes that opens half a million extents, again and again.
#[test]
fn an_extent_that_is_opened_twice_is_refused() {
    let mut world = World::new();
    world.resize(64);
    let open = |first, count| Record::Open { first, count };
    let opened = |records: &[Record]| open_log(&world, with_batch(&world, records)).map(drop);
    assert_eq!(opened(&[open(0, 2), open(2, 3)]), Ok(()));
    let (part, what) = ("log", "an extent is opened that is open");
    for again in [open(0, 2), open(1, 1), open(1, 8), open(0, 1)] {
        let refused = opened(&[open(0, 2), again]);
        assert_eq!(refused, Err(Why::Damaged { part, what }));
    }
}

proptest! {
    /// Changes of any bytes, with right checksums: refused, or a store that works.
    #[test]
    fn a_forged_file_is_refused_or_opened(
        changes in vec((0..3u8, any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let (world, mut bytes) = log();
        let header = Header::read(&bytes[..BLOCK], bytes.len() as u64, &world.device()).unwrap();
        let batches = header.batches() as usize;
        for (part, at, byte) in changes {
            let at = match part {
                0 => 12 + at.index(80),
                1 => BLOCK + at.index(header.checkpoint as usize),
                _ => batches + at.index(2 * BLOCK),
            };
            // Most of a batch is padding.
            let at = if part == 2 { batches + at % 64 } else { at };
            bytes[at] = byte;
        }
        forge_checksums(&mut bytes);
        if let Ok(store) = open_log(&world, bytes) {
            for consumer in store.consumers().unwrap() {
                let increment = store.harvest(&consumer.name, consumer.committed).unwrap();
                prop_assert!(increment.runs().total_bytes() <= u128::from(world.device().len));
            }
        }
    }

    #[test]
    fn noise_is_no_store(mut bytes in vec(any::<u8>(), 0..20_000), magic in any::<bool>()) {
        let world = World::new();
        if magic && bytes.len() > BLOCK {
            bytes[..12].copy_from_slice(b"dmstore\0\x01\0\0\0");
            forge_checksums(&mut bytes);
        }
        prop_assert!(open_log(&world, bytes).is_err());
    }
}
