//! The reader of write traces: for any bytes, the result is a trace within its limits, or an error
//! with the number of a line.
#![no_main]

use dirtymap_examples::iolog::{Limits, Trace};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let limits = Limits {
        ops: 1000,
        files: 20,
    };
    if let Ok(trace) = Trace::read_within(bytes, limits) {
        assert!(trace.ops.len() <= limits.ops);
        assert!(trace.ops.is_sorted_by_key(|op| op.at_us));
    }
});
