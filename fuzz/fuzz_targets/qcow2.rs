//! The reader and the writer of bitmaps in images, of any bytes: what is taken adds up, and the
//! rest is a typed error.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(text) = proptests::check_qcow2(bytes) {
        panic!("{text}");
    }
});
