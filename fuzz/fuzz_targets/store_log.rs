//! The recovery of a store: for any log, it says why nothing is known, or it gives a store that
//! works and that the next recovery finds again.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(text) = proptests::check_store_log(bytes) {
        panic!("{text}");
    }
});
