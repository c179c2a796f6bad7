#![doc = page!("README.md")]

#[doc = page!("exchange.md")]
pub mod exchange {}

#[doc = page!("monitors.md")]
pub mod monitors {}

#[doc = page!("bugs.md")]
pub mod bugs {}
