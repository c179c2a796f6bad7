//! Each rule of epochs, and each bad input.

use std::sync::Arc;

use dirtymap::harvest::{BadEpoch, Bounds, Epoch, Parent, Since, Why};
use dirtymap::{Consumer, Error, Start};

use super::common::leaked;
use super::{next, of, pages, since, space};

const NONE: [u64; 0] = [];

/// An increment names what it is an increment of; an abort and a drop make no epoch and no gap.
#[test]
fn each_commit_is_an_epoch_with_the_last_one_as_its_parent() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let joined = one.epoch();
    assert_eq!(joined.number(), 0);
    space.mark(pages(3, 1)).unwrap();
    let (told, first) = next(&one);
    assert_eq!((told, first.parent), (vec![3], Parent::Epoch(joined)));
    assert_eq!(one.epoch(), first.epoch);
    space.mark(pages(4, 1)).unwrap();
    let lease = one.rounds().next().unwrap();
    assert_eq!(lease.consumer(), Some("one"));
    assert_eq!(lease.lineage().unwrap().parent, of(first));
    lease.abort();
    drop(one.rounds().harvest().unwrap());
    leaked(one.rounds().next().unwrap()); // its page is lost, and nothing else
    space.mark(pages(5, 1)).unwrap();
    let (told, second) = next(&one);
    assert_eq!((told, second.parent), (vec![5], of(first)));
    assert!(second.epoch.number() > first.epoch.number());
    // The unnamed consumer has epochs of its own; a space without consumers has none.
    let lease = space.rounds().next().unwrap();
    assert_eq!((lease.consumer(), lease.lineage().is_some()), (None, true));
    lease.commit();
    let lease = super::space(1).rounds().next().unwrap().lineage();
    assert_eq!(lease, None);
}

/// The union of increments, with memory for each cursor and not for each epoch.
#[test]
fn since_is_the_union_of_the_increments_after_an_epoch() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let (mut cursors, mut epochs) = (vec![one.cursor()], vec![one.epoch()]);
    for page in 0..20 {
        space.mark(pages(page, 1)).unwrap();
        epochs.push(next(&one).1.epoch);
        if page == 4 || page == 9 {
            cursors.push(one.cursor());
        }
    }
    assert_eq!(one.stats().deltas, 3);
    let all: Vec<u64> = (0..20).collect();
    assert_eq!(since(&one, epochs[0]), Ok(all.clone()));
    assert_eq!(since(&one, epochs[5]), Ok(all[5..].to_vec()));
    assert_eq!(since(&one, epochs[10]), Ok(all[10..].to_vec()));
    assert_eq!(since(&one, epochs[20]), Ok(vec![]), "the newest one");
    assert_eq!(since(&one, epochs[7]), Err(Why::Merged));
    // The delta of a cursor that goes is merged into the one before it.
    assert_eq!(cursors[1].epoch(), epochs[5]);
    drop(cursors.remove(1));
    assert_eq!(one.stats().deltas, 2);
    assert_eq!(since(&one, epochs[0]), Ok(all.clone()));
    assert_eq!(since(&one, epochs[5]), Err(Why::Merged));
    let again = cursors[1].clone();
    cursors.clear();
    assert_eq!(since(&one, epochs[0]), Err(Why::Merged));
    assert_eq!(since(&one, epochs[10]), Ok(all[10..].to_vec()));
    drop(again);
    assert_eq!((one.stats().deltas, one.stats().delta_bytes), (0, 0));
    assert_eq!(since(&one, epochs[10]), Err(Why::Merged));
}

/// What is dirty and not committed is in no epoch; it is in the one after its commit.
#[test]
fn what_is_put_back_is_in_the_next_epoch() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let cursor = one.cursor();
    space.mark(pages(3, 1)).unwrap();
    one.rounds().next().unwrap().abort();
    assert_eq!(since(&one, cursor.epoch()), Ok(vec![]));
    space.mark(pages(4, 1)).unwrap();
    next(&one);
    assert_eq!(since(&one, cursor.epoch()), Ok(vec![3, 4]));
}

/// Pages that were committed by parts are never reported again. So they are in a delta at once, and
/// the end of their lease makes an epoch.
#[test]
fn parts_of_a_lease_are_part_of_an_epoch() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let start = one.cursor();
    space.mark(pages(3, 2)).unwrap();
    let lease = one.rounds().next().unwrap();
    assert_eq!(lease.commit_range(pages(3, 1)), 1);
    assert_eq!(since(&one, start.epoch()), Ok(vec![3]));
    let own = lease.lineage().unwrap();
    assert_eq!(own.parent, Parent::Epoch(start.epoch()));
    lease.abort();
    assert_eq!(one.epoch(), own.epoch);
    let (told, after) = next(&one);
    assert_eq!((told, after.parent), (vec![4], of(own)));
    assert_eq!(since(&one, start.epoch()), Ok(vec![3, 4]));
    // A lease that is forgotten: the next increment lacks its parts, and says so.
    space.mark(pages(7, 2)).unwrap();
    let lease = one.rounds().next().unwrap();
    lease.commit_range(pages(7, 1));
    leaked(lease);
    space.mark(pages(9, 1)).unwrap();
    let (told, lacks) = next(&one);
    assert_eq!((told, lacks.parent), (vec![9], Parent::Unknown(Why::Parts)));
    assert_eq!(since(&one, after.epoch), Err(Why::Merged));
    assert_eq!(since(&one, start.epoch()), Ok(vec![3, 4, 7, 9]));
    assert_eq!(next(&one).1.parent, of(lacks));
}

/// A cursor that is taken while parts are committed has them, whatever comes later.
#[test]
fn a_cursor_has_what_was_committed_by_parts_before() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    space.mark(pages(3, 3)).unwrap();
    let lease = one.rounds().next().unwrap();
    lease.commit_range(pages(3, 1));
    // Without a cursor nothing was recorded, so the epoch before is known no more.
    assert_eq!(since(&one, one.epoch()), Err(Why::Merged));
    let before = one.epoch();
    let cursor = one.cursor();
    assert_ne!(cursor.epoch(), before);
    assert_eq!(since(&one, before), Err(Why::Merged));
    lease.commit_range(pages(4, 1));
    assert_eq!(since(&one, cursor.epoch()), Ok(vec![4]));
    lease.commit();
    assert_eq!(since(&one, cursor.epoch()), Ok(vec![4, 5]));
}

/// Two leases at a time. The one that was harvested later may be committed first. The copies of the
/// other one may be older then, so it is an increment of nothing that exists.
#[test]
fn a_lease_that_is_committed_late_has_no_parent() {
    let space = space(64);
    let one = space.consumer("one", Start::Clean).unwrap();
    let start = one.cursor();
    let mut rounds = one.rounds();
    space.mark(pages(1, 2)).unwrap();
    let early = rounds.next().unwrap();
    space.mark(pages(2, 2)).unwrap();
    let later = rounds.next().unwrap();
    // In order, the second one follows the first one.
    assert_eq!(
        later.lineage().unwrap().parent,
        Parent::Epoch(start.epoch())
    );
    let (_, second) = later.commit_epoch();
    let second = second.unwrap();
    assert_eq!(second.parent, Parent::Epoch(start.epoch()));
    let held = one.cursor();
    assert_eq!(early.lineage().unwrap().parent, Parent::Unknown(Why::Late));
    let (_, first) = early.commit_epoch();
    let first = first.unwrap();
    assert_eq!(first.parent, Parent::Unknown(Why::Late));
    assert!(first.epoch.number() > second.epoch.number());
    assert_eq!(since(&one, held.epoch()), Ok(vec![1, 2]));
    assert_eq!(since(&one, start.epoch()), Ok(vec![1, 2, 3]));
    // In the order of their harvests, each is an increment of the one before it.
    space.mark(pages(5, 1)).unwrap();
    let (early, later) = (rounds.next().unwrap(), rounds.next().unwrap());
    let (_, early) = early.commit_epoch();
    let (_, later) = later.commit_epoch();
    assert_eq!(early.unwrap().parent, of(first));
    assert_eq!(later.unwrap().parent, of(early.unwrap()));
}

/// The first increment of a consumer that begins dirty is everything, and one of a copy goes on
/// where the other consumer stands.
#[test]
fn a_first_increment_says_what_it_builds_on() {
    let space = space(8);
    let full = space.consumer("full", Start::Dirty).unwrap();
    full.rounds().next().unwrap().abort();
    let copy = space.consumer("early copy", Start::LikeOf(&full)).unwrap();
    let (told, first) = next(&full);
    assert_eq!(
        (told.len(), first.parent),
        (8, Parent::Everything(Why::Beginning))
    );
    assert_eq!(next(&copy).1.parent, Parent::Everything(Why::Beginning));
    space.mark(pages(2, 1)).unwrap();
    let copy = space.consumer("copy", Start::LikeOf(&full)).unwrap();
    let (told, of_copy) = next(&copy);
    assert_eq!((told, of_copy.parent), (vec![2], of(first)));
    assert_ne!(of_copy.epoch.consumer(), first.epoch.consumer());
    assert_eq!(next(&full).0, [2]);
}

/// Epochs that a consumer cannot know: of another consumer, of another space, of the future, and of
/// no lease at all.
#[test]
fn an_epoch_that_is_unknown_means_everything() {
    let (here, there) = (space(8), space(8));
    let one = here.consumer("one", Start::Clean).unwrap();
    let other = here.consumer("other", Start::Clean).unwrap();
    let far = there.consumer("one", Start::Clean).unwrap();
    for consumer in [&other, &far] {
        assert_eq!(since(&one, consumer.epoch()), Err(Why::Foreign));
    }
    let named = |number: u64| -> Epoch {
        let text = format!("{:032x}-{number}", one.epoch().consumer());
        text.parse().unwrap()
    };
    assert_eq!(since(&one, named(0)), Ok(vec![]));
    let lease = one.rounds().next().unwrap();
    let outstanding = lease.lineage().unwrap().epoch;
    assert_eq!(since(&one, outstanding), Err(Why::Future));
    assert_eq!(since(&one, named(u64::MAX)), Err(Why::Future));
    lease.commit();
    assert_eq!(since(&one, outstanding), Ok(vec![]));
    assert_eq!(since(&one, named(0)), Err(Why::Merged));
    // A consumer that comes again by the same name is another one.
    let old = one.epoch();
    drop(one);
    let one = here.consumer("one", Start::Clean).unwrap();
    assert_eq!(since(&one, old), Err(Why::Foreign));
}

#[test]
fn a_text_that_is_no_epoch_is_refused() {
    let long = format!("{:032x}-18446744073709551616", 1);
    let signed = "0000000000000000000000000000002a-+7";
    for text in [
        "",
        "-",
        "1-1",
        "+000000000000000000000000000002a-7",
        &long,
        signed,
    ] {
        assert_eq!(text.parse::<Epoch>(), Err(BadEpoch), "{text}");
    }
    let epoch = space(1).consumer("one", Start::Clean).unwrap().epoch();
    assert_eq!(epoch.to_string().parse(), Ok(epoch));
}

/// A cursor and a lease outlive their consumer, and hold nothing that is told to anybody.
#[test]
fn cursors_and_leases_outlive_their_consumer() {
    let space = Arc::new(space(8));
    let one = Consumer::shared(Arc::clone(&space), "one", Start::Clean).unwrap();
    space.mark(pages(1, 1)).unwrap();
    let (cursor, lease) = (one.cursor(), one.rounds().next().unwrap());
    let name = lease.lineage().unwrap();
    drop(one);
    let (report, lineage) = lease.commit_epoch();
    assert_eq!((report.bits_set, lineage), (1, Some(name)));
    drop(cursor);
}

/// Deltas are addresses: a cut, an unmap and a map in the range of a consumer change none of them.
#[test]
fn deltas_outlive_the_areas_of_their_pages() {
    let space = space(64);
    let one = space
        .consumer_of("one", pages(8, 40), Start::Clean)
        .unwrap();
    let start = one.cursor();
    space.mark(pages(0, 64)).unwrap();
    let lease = one.rounds().next().unwrap();
    space.cut(pages(20, 1).start()).unwrap();
    space.unmap_discarding(pages(0, 20)).unwrap();
    lease.commit();
    assert_eq!(since(&one, start.epoch()), Ok((8..48).collect()));
    space
        .map(pages(0, 10), 0, dirtymap::Access::ReadWrite)
        .unwrap();
    assert_eq!(next(&one).0, NONE);
    space.mark(pages(9, 1)).unwrap();
    let cursor = one.cursor();
    assert_eq!(next(&one).0, [9]);
    assert_eq!(since(&one, cursor.epoch()), Ok(vec![9]));
    space.unmap_discarding(pages(0, 10)).unwrap();
    space.unmap_discarding(pages(20, 44)).unwrap();
    let nothing = one.rounds().next().unwrap_err();
    assert!(matches!(nothing, Error::NothingMapped { .. }), "{nothing}");
    assert_eq!(since(&one, start.epoch()), Ok((8..48).collect()));
}

/// Thousands of consumers of one space, each with a cursor: a write is one operation, and each is
/// told. Fewer without optimisation, because each join copies the list.
#[test]
fn thousands_of_consumers_have_epochs() {
    let many = if cfg!(debug_assertions) {
        2_000
    } else {
        10_000
    };
    let space = space(64);
    let names: Vec<String> = (0..many).map(|n| format!("consumer {n}")).collect();
    let all: Vec<Consumer<'_>> = names
        .iter()
        .map(|name| space.consumer(name, Start::Clean).unwrap())
        .collect();
    let cursors: Vec<_> = all.iter().map(Consumer::cursor).collect();
    space.mark(pages(9, 1)).unwrap();
    for nth in [0, 1, many / 2, many - 1] {
        assert_eq!(next(&all[nth]).0, [9]);
        assert_eq!(since(&all[nth], cursors[nth].epoch()), Ok(vec![9]));
    }
    assert_eq!(all[77].stats().pending_bytes, super::PAGE);
    let twice = space.consumer("consumer 77", Start::Clean).unwrap_err();
    assert!(matches!(twice, Error::ConsumerTwice { .. }), "{twice}");
    drop(all);
    assert_eq!(space.consumers().len(), 0);
}

/// A bound on deltas, on their age and on memory: the oldest cursors are told everything, and the
/// younger ones go on.
#[test]
fn cursors_out_of_bounds_are_told_everything() {
    let space = space(1 << 16);
    let one = space.consumer("one", Start::Clean).unwrap();
    one.set_bounds(Bounds {
        deltas: 2,
        ..Bounds::default()
    });
    assert_eq!(one.bounds().deltas, 2);
    let cursors: Vec<_> = (0..4)
        .map(|page| {
            let cursor = one.cursor();
            space.mark(pages(page, 1)).unwrap();
            next(&one);
            cursor
        })
        .collect();
    let asked = |nth: usize| since(&one, cursors[nth].epoch());
    assert_eq!([asked(0), asked(1)], [Err(Why::Bounds), Err(Why::Bounds)]);
    assert_eq!([asked(2), asked(3)], [Ok(vec![2, 3]), Ok(vec![3])]);
    one.set_bounds(Bounds {
        age: 3,
        ..Bounds::default()
    });
    next(&one);
    assert_eq!(asked(2), Ok(vec![2, 3]), "three epochs old");
    assert_eq!(one.stats().deltas, 2);
    next(&one);
    next(&one);
    assert_eq!([asked(2), asked(3)], [Err(Why::Bounds), Err(Why::Bounds)]);
    // Memory: a delta of every second page takes more than 4 KiB.
    one.set_bounds(Bounds {
        bytes: 4096,
        ..Bounds::default()
    });
    let small = one.cursor();
    for page in (0..1 << 15).step_by(2) {
        space.mark(pages(page, 1)).unwrap();
    }
    next(&one);
    assert_eq!(since(&one, small.epoch()), Err(Why::Bounds));
    assert_eq!(one.stats().delta_bytes, 0);
    let newest = one.cursor();
    space.mark(pages(5, 1)).unwrap();
    next(&one);
    assert!(matches!(one.since(newest.epoch()), Since::Runs(_)));
}

/// A backup prints why it copies everything, and which epoch it holds. A cursor printed the whole
/// of its consumer, with locks, and a reason had no text.
#[test]
fn reasons_and_cursors_print_what_a_backup_logs() {
    let whys = [
        Why::Beginning,
        Why::Bounds,
        Why::Late,
        Why::Parts,
        Why::Foreign,
        Why::Future,
        Why::Untracked,
        Why::Merged,
    ];
    let texts: std::collections::BTreeSet<String> = whys.iter().map(Why::to_string).collect();
    assert_eq!(texts.len(), whys.len());
    let space = space(1);
    let one = space.consumer("one", Start::Clean).unwrap();
    let cursor = one.cursor();
    let right = format!("Cursor {{ consumer: \"one\", epoch: {:?} }}", one.epoch());
    assert_eq!(format!("{cursor:?}"), right);
}
