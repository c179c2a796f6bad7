//! User bitmaps of any form, base and granule, against lists of intervals.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(wrong) = proptests::check_bitmaps(bytes) {
        panic!("{wrong}");
    }
});
