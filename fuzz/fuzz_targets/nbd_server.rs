//! A client of NBD and a server that sends anything: what is taken adds up, and the rest is a
//! typed error.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(text) = proptests::check_nbd_server(bytes) {
        panic!("{text}");
    }
});
