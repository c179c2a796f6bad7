//! From bits to ranges.

use dirtymap::exchange::DirtyLog;
use dirtymap::{AddressSpace, Granule, UserBitmap};

use crate::{PAGE, RW, pages, range};

/// A merge walked word by word and skipped each word that was zero. A run that reached the end of
/// the word before stayed open: from pages 63 and 128 the merge made one range of the pages 63 to
/// 65, and page 128 was never sent.
#[test]
fn a_zero_word_closes_an_open_run() {
    let words = [1u64 << 63, 0, 1];
    let expect = [pages(63, 1), pages(128, 1)];
    let all = pages(0, 192);
    let log = DirtyLog::words(&words, all, Granule::K4).unwrap();
    assert!(log.runs().eq(expect));
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let log = DirtyLog::bytes(&bytes, all, Granule::K4).unwrap();
    assert!(log.runs().eq(expect));
    let mut words = words;
    let view = UserBitmap::new(&mut words).view(all, Granule::K4).unwrap();
    assert!(view.runs().eq(expect));
}

/// Such a loop closes a run at the next clean bit. It forgot the run with which the log ends.
#[test]
fn a_run_that_ends_with_the_log_is_not_forgotten() {
    for bits in [1, 63, 64, 65, 127, 128] {
        let words = [u64::MAX; 2];
        let log = DirtyLog::words(&words, pages(8, bits), Granule::K4).unwrap();
        assert!(log.runs().eq([pages(8, bits)]), "{bits} pages");
    }
}

/// The harvest of a device's log read its shared memory in words, and left out the last bytes if
/// they made no whole word: up to seven bytes, or 56 pages at the top of memory, whose bits were
/// never read.
#[test]
fn a_log_of_bytes_is_read_to_its_last_byte() {
    for len in 1..=24u64 {
        let mut bytes = vec![0u8; len as usize];
        bytes[len as usize - 1] = 1 << 7;
        let log = DirtyLog::bytes(&bytes, pages(0, len * 8), Granule::K4).unwrap();
        assert!(log.runs().eq([pages(len * 8 - 1, 1)]), "{len} bytes");
        // The same as a user bitmap, at every alignment of the bytes.
        let mut shifted = vec![0u8; len as usize + 1];
        shifted[1..].copy_from_slice(&bytes);
        let view = UserBitmap::bytes(&mut shifted[1..]);
        let view = view.view(pages(0, len * 8), Granule::K4).unwrap();
        assert!(view.runs().eq([pages(len * 8 - 1, 1)]));
    }
}

/// A hypervisor set bits past the end of the requested memory. A loop over whole words took them
/// for pages, and read memory that did not exist.
#[test]
fn bits_behind_the_end_do_not_count() {
    let words = [0u64, u64::MAX];
    let log = DirtyLog::words(&words, pages(0, 70), Granule::K4).unwrap();
    assert!(log.runs().eq([pages(64, 6)]));
    assert_eq!(log.count(), 6);
    let mut target = [0u64; 2];
    let view = UserBitmap::new(&mut target).view(pages(0, 128), Granule::K4);
    log.or_into(&view.unwrap()).unwrap();
    assert_eq!(target, [0, 0x3F]);
}

/// Some kernels first report everything as dirty: all ones, in whole words. The bits past the last
/// page mean nothing.
#[test]
fn a_first_answer_of_all_ones_is_all_pages_and_no_more() {
    let words = vec![u64::MAX; 5];
    let memory = range(1 << 32, 257 * PAGE);
    let log = DirtyLog::words(&words, memory, Granule::K4).unwrap();
    assert!(log.runs().eq([memory]));
}

/// A dump walked the pages of each slot and advanced its file for each clean page, except for those
/// after the last dirty page of a slot. All later pages were written at the wrong place: the guest
/// found other bytes in 47,000 of its pages.
#[test]
fn clean_pages_at_the_end_of_a_slot_keep_their_place_in_the_file() {
    // Two slots with a hole between them; in the file one follows the other.
    let (low, high) = (pages(16, 8), pages(1000, 4));
    let space = AddressSpace::new(Granule::K4);
    space.map(low, 0, RW).unwrap();
    space.map(high, 8 * PAGE, RW).unwrap();
    space.start_tracking().unwrap();
    let mut memory = vec![0u8; 12 * PAGE as usize];
    let mut file = memory.clone();
    // The guest writes to page 2 of the first slot, after which all pages are clean, and to the
    // second slot.
    for (page, byte) in [(18, 0xAA), (1000, 0xBB), (1003, 0xCC)] {
        let at = space.lookup(pages(page, 1).start()).unwrap();
        let offset = at.backing + (page * PAGE - at.range.start().get());
        memory[offset as usize] = byte;
        space.mark(range(page * PAGE, 1)).unwrap();
    }
    for slot in [low, high] {
        for run in crate::take(&space, slot) {
            // The place in the file follows from the address alone.
            let slot = space.lookup(run.start()).unwrap();
            let offset = (slot.backing + (run.start().get() - slot.range.start().get())) as usize;
            let len = run.len() as usize;
            file[offset..offset + len].copy_from_slice(&memory[offset..offset + len]);
        }
    }
    assert!(file == memory, "the file is what the guest sees");
}
