//! Addresses, ranges, granules and requests at the edges of 64 bits, against arithmetic in 128.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(wrong) = proptests::check_ranges(bytes) {
        panic!("{wrong}");
    }
});
