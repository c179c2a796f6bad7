//! The flush queue, against a naive one.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(wrong) = proptests::check_flush(bytes) {
        panic!("{wrong}");
    }
});
