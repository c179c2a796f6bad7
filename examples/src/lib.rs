//! The shared code of the examples: the reader of fio's write traces.
#![forbid(unsafe_code)]

pub mod iolog;
