//! A panic is an error: whatever a source does not come back from, no write is lost, no translation
//! outlives its area, no debt vanishes, no lock stays held, and the panic goes on to the caller.
#![cfg(not(dirtymap_loom))]
#![allow(clippy::unwrap_used, unreachable_pub)] // helpers of tests

mod every_point;
mod mock;
mod named;
mod owned;
