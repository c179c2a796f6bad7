//! What calls cost with many pieces of memory, counted in pieces that are looked at: as a
//! search does, never as a scan.

use super::*;
use dirtymap::source::LeafSink;
use dirtymap_host::counted::{count, grows_gently};

/// The `nth` piece, of one page.
fn piece(fake: &Fake, nth: u64) -> Arc<Memory> {
    let host = HOST + (nth << 12);
    Memory::new(
        fake,
        pages(2 * nth, 1),
        host,
        Granule::K4,
        GivenBack::Marked,
    )
    .unwrap()
}

/// A harvest comes for each area, and all memory was looked at for each of them.
#[test]
fn taking_an_area_for_each_piece_grows_as_a_search_does() {
    grows_gently("a take and a peek for each piece", |n| {
        let fake = Fake::new();
        let memory = ProcessMemory::with_kernel(Box::new(fake.clone()), Granule::K4);
        // At once: each change of the list copies it.
        let list = PlacedList::new((0..n).map(|nth| piece(&fake, nth)).collect());
        *lock(&memory.memory) = Arc::new(list);
        let mut words = [0u64; 1];
        count(|| {
            for nth in 0..n {
                let area = pages(2 * nth, 1);
                let view = UserBitmap::new(&mut words).view(area, Granule::K4).unwrap();
                let (mut sink, mut gather) = (view.sink(), FlushGather::new());
                memory.peek(area, &mut sink).unwrap();
                let mut out = LeafSink::new(&mut sink, &mut gather);
                memory.read_and_clear(area, &mut out).unwrap();
                memory.unmap(area, &mut gather, &mut |_| panic!("it is clean"));
            }
        })
    });
}

/// The list of what each tracker of the process has was read as a whole for each piece that came
/// and went.
#[test]
fn giving_and_taking_back_each_piece_grows_as_a_search_does() {
    grows_gently("each piece comes and goes", |n| {
        let fake = Fake::new();
        count(|| {
            let memory: Vec<_> = (0..n).map(|nth| piece(&fake, nth * 1231 % n)).collect();
            memory.iter().for_each(|memory| memory.remove(&fake));
        })
    });
}
