//! Programs on the whole library: see the crate `proptests`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some((config, ops)) = proptests::decode(bytes, 400)
        && let Err(violation) = proptests::run(&ops, &config)
    {
        panic!("{violation}\n{config:#?}\n{ops:#?}");
    }
});
