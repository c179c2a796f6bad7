//! What the examples share: the reader of fio's write traces.
#![forbid(unsafe_code)]

pub mod iolog;
