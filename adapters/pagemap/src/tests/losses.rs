//! No write is lost, whatever the kernel answers.

use super::*;

/// Parts are harvested, committed, dropped; calls fail half-way, and do not say what they did; the
/// kernel keeps few or many regions. In the end the copy is the memory.
#[test]
fn no_write_is_lost() {
    for seed in 1..=10u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (space, _memory, fake) = process();
        let mut copy = vec![0; PAGES as usize];
        fake.with(|state| state.buffer = 1 + random.below(512) as usize);
        for _ in 0..12 {
            let step = 1 + random.below(40);
            let (mut page, many) = (random.below(PAGES), random.below(3000));
            for _ in 0..many {
                fake.write(page);
                page = (page + step) % PAGES;
            }
            if random.below(3) == 0 {
                let calls = random.below(5) as u32;
                fake.with(|state| state.fail_in = Some(calls));
            }
            let from = random.below(PAGES);
            let range = pages(from, 1 + random.below(PAGES - from));
            let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
            let request = HarvestRequest::new(range, Granule::K4);
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap()
                .partial();
            fake.write(random.below(PAGES));
            let lease = lease.sync().unwrap();
            if random.below(4) > 0 {
                for page in numbers_of(lease.runs()) {
                    copy[page as usize] = fake.with(|state| state.content[page as usize]);
                }
                lease.commit();
            }
            fake.with(|state| state.fail_in = None);
        }
        for page in harvest(&space, pages(0, PAGES)) {
            copy[page as usize] = fake.with(|state| state.content[page as usize]);
        }
        let lost = fake.with(|state| {
            let differs = |n: &usize| copy[*n] != state.content[*n];
            (0..PAGES as usize).find(differs)
        });
        assert_eq!(lost, None, "seed {seed}");
        assert_eq!(harvest(&space, pages(0, PAGES)), [0u64; 0], "seed {seed}");
    }
}

/// With more than 512 regions the kernel says that it stopped where it last handed some out, though
/// it came further. A scan that goes on from there counts pages twice. One that goes on after the
/// last region, if the output is full, is right as well.
#[test]
fn more_regions_than_the_kernel_keeps_come_out_once() {
    for (buffer, every) in [(512, 3), (100, 3), (1, 2), (512, 16), (7, 200)] {
        let (space, _memory, fake) = process();
        fake.with(|state| state.buffer = buffer);
        let written: Vec<u64> = (0..PAGES).step_by(every).collect();
        written.iter().for_each(|page| fake.write(*page));
        let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
        let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
        let peeked = space.peek(&request, UserBitmap::new(&mut words)).unwrap();
        assert_eq!(numbers_of(peeked.runs()), written, "kept {buffer}");
        assert_eq!(harvest(&space, pages(0, PAGES)), written, "kept {buffer}");
        assert_eq!(harvest(&space, pages(0, PAGES)), [0u64; 0]);
    }
}

/// A call that fails has protected pages, and does not tell which: without care, their writes are
/// gone.
#[test]
fn a_call_that_fails_makes_its_piece_dirty() {
    let (space, _memory, fake) = process();
    fake.write(100);
    fake.write(20_000);
    fake.with(|state| state.fail_in = Some(1));
    let mut words = vec![0u64; PAGES.div_ceil(64) as usize];
    let request = HarvestRequest::new(pages(0, PAGES), Granule::K4);
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("the second piece fails"));
    // The second piece begins 16384 pages above the first address that is a multiple of 64 MiB.
    let second = 16_384 - 5;
    assert_eq!(stopped.at, pages(second, 1).start());
    assert_eq!(lease.report().bits_set, 1);
    assert_eq!(lease.partial().sync().unwrap().commit().bits_set, 1);
    let found = harvest(&space, pages(0, PAGES));
    assert_eq!(found, (second..second + 16_384).collect::<Vec<_>>());
}

/// The end of tracking goes on after a piece that the kernel refused, with the first page above it.
#[test]
fn the_page_above_a_refused_piece_is_found_when_tracking_ends() {
    let (space, _memory, fake) = process();
    let second = 16_384 - 5;
    fake.write(second);
    fake.with(|state| state.fail_in = Some(0));
    space.stop_tracking().unwrap();
    let found = harvest(&space, pages(0, PAGES));
    assert_eq!(found, (0..=second).collect::<Vec<_>>());
}

#[test]
fn a_kernel_that_stands_still_is_not_asked_for_ever() {
    let (space, _memory, fake) = process();
    fake.write(700);
    fake.with(|state| state.huge_at = Some(700));
    let request = HarvestRequest::new(pages(0, 1000), Granule::K4);
    let mut words = [0u64; 16];
    let lease = space
        .harvest(&request, UserBitmap::new(&mut words))
        .unwrap();
    let stopped = lease
        .stopped()
        .unwrap_or_else(|| panic!("it never comes to an end"));
    let at = HOST + (700 << 12);
    let Error::Source(error) = &stopped.error else {
        panic!("of the source");
    };
    assert!(error.to_string().contains(&format!("{at:#x}")), "{error}");
    drop(lease);
    fake.with(|state| state.huge_at = None);
    assert!(harvest(&space, pages(0, 1000)).contains(&700));
}

/// The place where a scan says that it stopped is a number from outside. Too far: what is above the
/// last region of a full output was not scanned. Too near: a caller that goes on from there stands
/// still, or sees pages again.
#[test]
fn a_kernel_that_lies_about_where_it_stopped_loses_no_write() {
    let too_far: [fn(u64, u64) -> u64; 2] = [|_, end| end, |_, _| u64::MAX];
    let too_near: [fn(u64, u64) -> u64; 2] = [|start, _| start, |_, _| 0];
    // More regions than one output holds, in each piece.
    let written: Vec<u64> = (0..PAGES).step_by(2).collect();
    for lie in too_far {
        let (space, _memory, fake) = process();
        fake.with(|state| state.walk_end = Some(lie));
        written.iter().for_each(|page| fake.write(*page));
        assert_eq!(harvest(&space, pages(0, PAGES)), written);
        assert_eq!(harvest(&space, pages(0, PAGES)), [0u64; 0]);
    }
    for lie in too_near {
        let (space, _memory, fake) = process();
        fake.with(|state| state.walk_end = Some(lie));
        [10, 11, 400].iter().for_each(|page| fake.write(*page));
        // It went as far as its last region, and says then that it stands still.
        let (at, error, below) = stops(&space, pages(0, 1000));
        assert_eq!((at, below), (pages(0, 1).start(), vec![]));
        let stands = HOST + (401 << 12);
        assert!(
            error.contains(&format!("stands still at {stands:#x}")),
            "{error}"
        );
        fake.with(|state| state.walk_end = None);
        let found = harvest(&space, pages(0, 1000));
        assert!([10, 11, 400].iter().all(|page| found.contains(page)));
    }
}
