//! A panic is an error: in whatever call a source panics, no write is lost, no translation outlives
//! its area, no debt is dropped, no lock stays held, and the panic reaches the caller.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used, unreachable_pub)] // helpers of tests

mod every_point;
mod mock;
mod named;
mod owned;
