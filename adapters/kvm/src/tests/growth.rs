//! What calls cost with many slots, counted in slots that are looked at: as a search does, never as
//! a scan.

use super::*;
use dirtymap_host::counted::{count, grows_gently};

/// A log in ring mode with `n` slots of one page and holes between them, and its ring.
fn of_slots(n: u64) -> (KvmLog, Arc<Vec<Entry>>) {
    let fake = Fake::default();
    let mode = KvmMode::Ring { entries: RING };
    let log = KvmLog::with_kernel(Box::new(fake.clone()), mode, Granule::K4);
    let ring: Arc<Vec<_>> = Arc::new(
        (0..n.next_power_of_two())
            .map(|_| Entry::default())
            .collect(),
    );
    log.rings().push(Ring::new(Box::new(Arc::clone(&ring))));
    fake.with(|state| state.ring = Some(Arc::clone(&ring)));
    let slot = |nth: u64| Slot::new(nth as u32, pages(2 * nth, 1), 0, Granule::K4).unwrap();
    // At once: each change of the list copies it.
    *lock(&log.slots) = Arc::new(Slots::new((0..n).map(slot).map(Arc::new).collect()));
    (log, ring)
}

/// Each entry of a ring names a slot, and all slots were looked at for each entry.
#[test]
fn taking_entries_of_many_slots_grows_as_a_search_does() {
    grows_gently("an entry for each slot", |n| {
        let (log, ring) = of_slots(n);
        for (nth, entry) in (0..n).zip(ring.iter()) {
            assert!(entry.push((nth * 1231 % n) as u32, 0));
        }
        let cost = count(|| assert_eq!(log.drain_rings().unwrap() as u64, n));
        assert_eq!(log.foreign_entries(), 0);
        cost
    });
}

/// A harvest comes for each area, and all slots were looked at for each of them.
#[test]
fn looking_at_an_area_for_each_slot_grows_as_a_search_does() {
    grows_gently("a peek for each slot", |n| {
        let (log, ring) = of_slots(n);
        for (nth, entry) in (0..n).zip(ring.iter()) {
            assert!(entry.push(nth as u32, 0));
        }
        log.drain_rings().unwrap();
        let mut words = [0u64; 1];
        count(|| {
            for nth in 0..n {
                let area = pages(2 * nth, 1);
                let view = UserBitmap::new(&mut words).view(area, Granule::K4).unwrap();
                log.peek(area, &mut view.sink()).unwrap();
                assert_eq!(view.count(), 1);
                let (mut gather, mut told) = (FlushGather::new(), 0);
                log.unmap(area, &mut gather, &mut |_| told += 1);
                assert_eq!(told, 1);
            }
        })
    });
}

/// The same in a take, which also has to find the earlier slots of the area when one stops.
#[test]
fn taking_an_area_for_each_slot_grows_as_a_search_does() {
    use dirtymap::source::LeafSink;
    grows_gently("a take for each slot", |n| {
        let (log, _ring) = of_slots(n);
        let mut words = [0u64; 1];
        count(|| {
            for nth in 0..n {
                let area = pages(2 * nth, 1);
                let view = UserBitmap::new(&mut words).view(area, Granule::K4).unwrap();
                let (mut sink, mut gather) = (view.sink(), FlushGather::new());
                let mut out = LeafSink::new(&mut sink, &mut gather);
                log.read_and_clear(area, &mut out).unwrap();
            }
        })
    });
}
