//! The reader of bitmap files: for any bytes, the result is a file that would be written like this,
//! or a typed error.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(text) = proptests::check_bitmap_file(bytes) {
        panic!("{text}");
    }
});
