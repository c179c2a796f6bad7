//! The meter, in simulated time: no clock is read.
#![cfg(not(any(dirtymap_loom, dirtymap_shuttle)))]
#![allow(clippy::unwrap_used)] // helpers of tests

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use dirtymap::meter::{Meter, Plan};
use dirtymap::source::{FlushGather, Invalidated, LeafSink, Sink, Stopped};
use dirtymap::{
    Access, AddressSpace, DirtySource, Error, Granule, Iova, IovaRange, Start, Tracking,
};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn space(bytes: u64) -> AddressSpace {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..bytes, 0, Access::ReadWrite).unwrap();
    space
}

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

fn meter(space: &AddressSpace, half_life: u64) -> Meter<'_> {
    let consumer = space.consumer("rate", Start::Clean).unwrap();
    Meter::new(consumer, Duration::from_secs(half_life))
}

#[track_caller]
fn close(found: f64, right: f64) {
    let off = (found - right).abs();
    assert!(off <= right.abs() * 1e-9 + 1e-6, "{found}, not {right}");
}

#[test]
fn a_constant_rate_is_exact_from_the_first_look_on() {
    let space = space(64 * MIB);
    let mut meter = meter(&space, 5);
    assert_eq!((meter.rate(), meter.runs().count()), (0.0, 0));
    for tenths in [1, 7, 20, 3, 100] {
        space.mark(range(0, tenths * 8 * PAGE)).unwrap();
        let elapsed = Duration::from_millis(tenths * 100);
        assert_eq!(meter.look(elapsed).unwrap(), tenths * 8 * PAGE);
        assert!(meter.runs().eq([range(0, tenths * 8 * PAGE)]));
        close(meter.rate(), 80.0 * PAGE as f64);
    }
}

/// A range that was never written. Its rate was -0, which a program prints as "-0".
#[test]
fn the_rate_of_a_clean_range_is_no_negative_number() {
    let space = space(64 * MIB);
    let mut meter = meter(&space, 5);
    space.mark(range(0, PAGE)).unwrap();
    meter.look(SECOND).unwrap();
    assert_eq!(meter.rate_of(range(32 * MIB, MIB)).to_string(), "0");
}

#[test]
fn what_was_written_a_half_life_ago_counts_half() {
    let space = space(64 * MIB);
    let mut meter = meter(&space, 10);
    for _ in 0..1000 {
        space.mark(range(0, MIB)).unwrap();
        meter.look(SECOND).unwrap();
    }
    close(meter.rate(), MIB as f64);
    meter.look(10 * SECOND).unwrap();
    close(meter.rate(), MIB as f64 / 2.0);
    for _ in 0..10 {
        meter.look(SECOND).unwrap();
    }
    close(meter.rate(), MIB as f64 / 4.0);
    let whole = meter.rate_of(range(0, 2 * MIB));
    close(whole, meter.rate());
    close(meter.rate_of(range(0, MIB)), whole / 2.0);
    close(meter.rate_of(range(32 * MIB, MIB)), 0.0);
}

#[test]
fn rates_by_granule_add_up() {
    let space = space(64 * MIB);
    let mut meter = meter(&space, 3).by(Granule::M2);
    for second in 0..20u64 {
        space.mark(range(0, 8 * PAGE)).unwrap();
        if second % 2 == 0 {
            space.mark(range(2 * MIB - PAGE, 2 * PAGE)).unwrap();
        }
        meter.look(SECOND).unwrap();
    }
    let rates: Vec<_> = meter.rates().collect();
    assert_eq!(rates.len(), 2);
    assert_eq!(rates[1].0, range(2 * MIB, 2 * MIB));
    let sum: f64 = rates.iter().map(|(_, rate)| rate).sum();
    close(sum, meter.rate());
    close(meter.rate_of(range(0, 64 * MIB)), meter.rate());
    close(meter.rate_of(range(2 * MIB, 2 * MIB)), rates[1].1);
    // Every second second, lately not.
    assert!(rates[1].1 < PAGE as f64 / 2.0 && rates[1].1 > PAGE as f64 / 4.0);
}

#[test]
fn the_coldest_runs_come_first() {
    let space = space(64 * MIB);
    let mut meter = meter(&space, 10);
    for second in 0..8u64 {
        space.mark(range(4 * MIB, PAGE)).unwrap();
        if second < 2 {
            space.mark(range(0, PAGE)).unwrap();
        }
        meter.look(SECOND).unwrap();
    }
    let runs = [range(MIB, 8 * MIB), range(32 * MIB, 4 * MIB)];
    let order = meter.coldest_first(runs);
    let right = [
        range(2 * MIB, 2 * MIB), // never written
        range(6 * MIB, 3 * MIB),
        range(32 * MIB, 4 * MIB), // two granules, one run
        range(MIB, MIB),          // no more
        range(4 * MIB, 2 * MIB),
    ];
    assert_eq!(order, right);
}

/// A run that is as long as all addresses: its cost is that of the granules that were written. It
/// was a step for each 2 MiB, 2^43 of them, which took for ever.
#[test]
fn the_coldest_runs_of_a_huge_run_take_a_step_for_each_granule_that_was_written() {
    let space = space(64 * MIB);
    let mut meter = meter(&space, 10);
    for at in [4 * MIB, 6 * MIB, 32 * MIB] {
        space.mark(range(at, PAGE)).unwrap();
    }
    meter.look(SECOND).unwrap();
    let order = meter.coldest_first([IovaRange::ALL]);
    let right = [
        range(0, 4 * MIB),
        range(8 * MIB, 24 * MIB),
        IovaRange::new(Iova::new(34 * MIB), Iova::MAX).unwrap(),
        range(4 * MIB, 4 * MIB), // two granules of the same heat
        range(32 * MIB, 2 * MIB),
    ];
    assert_eq!(order, right);
    // The same, granule by granule, over runs that begin and end anywhere.
    for start in (0..12 * MIB).step_by(509 * 1024) {
        for len in [1, 2 * MIB, 5 * MIB + 1, 40 * MIB] {
            let run = range(start, len);
            let mut parts: Vec<(f64, IovaRange)> = Vec::new();
            for n in start / (2 * MIB)..=(start + len - 1) / (2 * MIB) {
                let granule = range(n * 2 * MIB, 2 * MIB);
                let (heat, part) = (meter.rate_of(granule), run.intersection(granule).unwrap());
                match parts.last_mut() {
                    Some((other, whole)) if *other == heat => *whole = whole.hull(part),
                    _ => parts.push((heat, part)),
                }
            }
            parts.sort_by(|one, other| one.0.total_cmp(&other.0));
            assert!(
                parts
                    .iter()
                    .map(|part| part.1)
                    .eq(meter.coldest_first([run]))
            );
        }
    }
}

/// Pages 0 to 9 in turn, one each look: so many different ones are written in so many looks.
#[test]
fn what_is_written_within_a_time_is_counted_once() {
    let space = space(MIB);
    let mut meter = meter(&space, 1000);
    for look in 0..64u64 {
        space.mark(range(look % 10 * PAGE, 1)).unwrap();
        meter.look(SECOND).unwrap();
    }
    for (seconds, pages) in [
        (0, 0),
        (1, 1),
        (2, 2),
        (4, 4),
        (8, 8),
        (16, 10),
        (64, 10),
        (640, 10),
    ] {
        assert_eq!(
            meter.dirty_within(seconds * SECOND),
            pages * PAGE,
            "{seconds}"
        );
    }
    assert_eq!(meter.dirty_within(3 * SECOND), 3 * PAGE);
    assert_eq!(meter.dirty_within(12 * SECOND), 9 * PAGE);
}

/// A machine of 64 Ki pages: of its writes, most go to a part of them. One millisecond of it is one
/// step.
struct Machine<'s> {
    space: &'s AddressSpace,
    pages: u64,
    hot: u64,
    writes_per_ms: u64,
    state: u64,
}

impl Machine<'_> {
    fn random(&mut self, below: u64) -> u64 {
        self.state = self
            .state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (self.state >> 33) % below
    }

    fn run(&mut self, time: Duration) {
        for _ in 0..time.as_millis() as u64 * self.writes_per_ms {
            let below = if self.random(10) < 7 {
                self.hot
            } else {
                self.pages
            };
            let page = self.random(below);
            self.space.mark(range(page * PAGE, 8)).unwrap();
        }
    }
}

/// The migration of `plan` itself: rounds, downtime and time.
fn migrate(machine: &mut Machine<'_>, plan: &Plan) -> (u32, Duration, Duration) {
    let time_of =
        |bytes: u64| Duration::from_secs_f64(bytes as f64 / plan.bytes_per_second.get() as f64);
    let mut rounds = machine.space.rounds();
    rounds.next().unwrap().commit();
    let mut round = time_of(plan.bytes);
    let (mut took, mut count) = (round, 0);
    loop {
        machine.run(round);
        let bytes = rounds.next().unwrap().commit().bits_set * PAGE;
        count += 1;
        let stopped = round <= plan.downtime || count > *plan.rounds.end();
        round = time_of(bytes);
        took += round;
        if stopped {
            return (count, round, took);
        }
    }
}

/// The prediction is within a factor of 1.25 of the time and of 1.5 of the downtime, and within two
/// rounds, of what the migration then takes, for links of different speed.
#[test]
fn a_migration_takes_what_was_predicted() {
    let pages = 64 << 10;
    for (nth, mib_per_second) in [40, 80, 160].into_iter().enumerate() {
        let space = space(pages * PAGE);
        let mut meter = meter(&space, 20);
        let mut machine = Machine {
            space: &space,
            pages,
            hot: pages / 64,
            writes_per_ms: 6,
            state: nth as u64,
        };
        for _ in 0..128 {
            machine.run(SECOND / 10);
            meter.look(SECOND / 10).unwrap();
        }
        let link = NonZeroU64::new(mib_per_second * MIB).unwrap();
        let plan = Plan::new(pages * PAGE, link, Duration::from_millis(60));
        let said = meter.predict(&plan);
        let (rounds, downtime, took) = migrate(&mut machine, &plan);
        println!("{mib_per_second} MiB/s: {rounds} rounds, {downtime:?}, {took:?}; said {said:?}");
        assert!(said.converges && rounds <= 30);
        assert!(said.rounds.abs_diff(rounds) <= 2);
        let factor = |one: Duration, other: Duration| {
            f64::max(
                one.as_secs_f64() / other.as_secs_f64(),
                other.as_secs_f64() / one.as_secs_f64(),
            )
        };
        assert!(factor(said.took, took) < 1.25);
        assert!(factor(said.downtime, downtime) < 1.5);
    }
}

#[test]
fn a_link_that_is_too_slow_does_not_converge() {
    let space = space(64 * MIB);
    let mut meter = meter(&space, 20);
    for _ in 0..8 {
        space.mark(range(0, 16 * MIB)).unwrap();
        meter.look(SECOND).unwrap();
    }
    let plan = |rate| Plan::new(64 * MIB, NonZeroU64::new(rate).unwrap(), SECOND);
    let slow = meter.predict(&plan(8 * MIB));
    assert_eq!((slow.converges, slow.downtime), (false, 2 * SECOND));
    assert_eq!((slow.rounds, slow.sent), (3, (64 + 3 * 16) * MIB));
    assert_eq!(slow.took, 14 * SECOND);
    assert!(meter.predict(&plan(64 * MIB)).converges);
    // The slowest link of all, and one without a round.
    let crawl = meter.predict(&plan(1));
    assert!(!crawl.converges && crawl.took > 64_000_000 * SECOND);
    let mut none = plan(64 * MIB);
    none.rounds = 0..=0;
    assert_eq!(meter.predict(&none).rounds, 1);
    none.rounds = std::ops::RangeInclusive::new(5, 2);
    assert_eq!(meter.predict(&none).rounds, 3);
}

/// A source that cannot flush.
#[derive(Default)]
struct Fails(AtomicBool);

impl DirtySource for Fails {
    fn set_tracking(&self, _: Tracking) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange, _: &mut FlushGather, _: &mut dyn FnMut(IovaRange)) {}

    fn read_and_clear(&self, range: IovaRange, _: &mut LeafSink<'_, '_>) -> Result<(), Stopped> {
        match self.0.load(SeqCst) {
            true => Err(Stopped {
                at: range.start(),
                error: Error::source_failed(std::io::Error::other("broken")),
            }),
            false => Ok(()),
        }
    }

    fn peek(&self, _: IovaRange, _: &mut Sink<'_>) -> Result<(), Stopped> {
        Ok(())
    }

    fn invalidate(&self, _: &FlushGather) -> Result<Invalidated, Error> {
        Ok(Invalidated::default())
    }
}

#[test]
fn a_look_that_fails_loses_neither_pages_nor_time() {
    let space = space(MIB);
    let fails = Arc::new(Fails::default());
    space.attach(Arc::clone(&fails)).unwrap();
    let mut meter = meter(&space, 0);
    space.mark(range(0, 2 * PAGE)).unwrap();
    fails.0.store(true, SeqCst);
    assert!(meter.look(SECOND).is_err());
    fails.0.store(false, SeqCst);
    space.mark(range(4 * PAGE, PAGE)).unwrap();
    assert_eq!(meter.look(SECOND).unwrap(), 3 * PAGE);
    close(meter.rate(), 1.5 * PAGE as f64);
    assert_eq!(meter.consumer().stats().leased_bytes, 3 * PAGE);
}

#[test]
fn no_areas_no_time_and_single_bytes_are_no_trouble() {
    let space = AddressSpace::tracked(Granule::BYTE);
    let consumer = space.consumer("rate", Start::Clean).unwrap();
    let mut meter = Meter::new(consumer, SECOND);
    assert_eq!(meter.look(SECOND).unwrap(), 0);
    let top = range(u64::MAX - 0xffff, 0x10000);
    space.map(top, 0, Access::ReadWrite).unwrap();
    space.mark(range(u64::MAX - 3, 4)).unwrap();
    assert_eq!(meter.look(Duration::ZERO).unwrap(), 4);
    assert!(meter.rate().is_finite() && meter.rate() > 0.0);
    assert!(meter.runs().eq([range(u64::MAX - 3, 4)]));
    assert_eq!(meter.look(Duration::MAX).unwrap(), 0);
    assert_eq!(meter.rate(), 0.0);
    assert_eq!(meter.look(Duration::MAX).unwrap(), 0);
}

#[test]
fn a_meter_of_a_part_counts_that_part() {
    let space = space(64 * MIB);
    let part = range(8 * MIB, 8 * MIB);
    let consumer = space.consumer_of("rate", part, Start::Dirty).unwrap();
    let mut meter = Meter::new(consumer, SECOND);
    assert_eq!(meter.look(SECOND).unwrap(), 8 * MIB);
    space.mark(range(0, 64 * MIB)).unwrap();
    assert_eq!(meter.look(SECOND).unwrap(), 8 * MIB);
    assert_eq!(meter.look(SECOND).unwrap(), 0);
    // Other consumers are told as ever.
    assert_eq!(
        space.rounds().next().unwrap().commit().bits_set,
        64 * MIB / PAGE
    );
}

/// The half-life is a number of seconds that no duration holds once it is rounded, and the change
/// of the granule panicked. And the weight of a look was rounded to 0, so nothing was measured.
#[test]
fn a_meter_may_never_forget() {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(0..1 << 20, 0, Access::ReadWrite).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let mut meter = Meter::new(one, Duration::MAX).by(Granule::K4);
    for pages in [1, 3] {
        space.mark(0..pages << 12).unwrap();
        meter.look(Duration::from_secs(1)).unwrap();
    }
    assert!((meter.rate() - 2.0 * 4096.0).abs() < 1e-3, "the mean");
    assert_eq!(meter.dirty_within(Duration::from_secs(1)), 2 * 4096);
}

/// All addresses are 2^64 bytes, one more than a number holds. They were counted as 0.
#[test]
fn a_look_at_all_addresses_counts_as_many_as_there_are_numbers() {
    let space = AddressSpace::tracked(Granule::from_lg2(48).unwrap());
    space.map(IovaRange::ALL, 0, Access::ReadWrite).unwrap();
    let one = space.consumer("one", Start::Clean).unwrap();
    let mut meter = Meter::new(one, Duration::from_secs(10));
    space.mark(IovaRange::ALL).unwrap();
    assert_eq!(meter.look(Duration::from_secs(1)).unwrap(), u64::MAX);
    assert_eq!(meter.dirty_within(Duration::from_secs(1)), u64::MAX);
}
