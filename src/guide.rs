#![doc = page!("README.md")]

#[doc = page!("exchange.md")]
pub mod exchange {}

#[doc = page!("consumers.md")]
pub mod many {}

#[doc = page!("discards.md")]
pub mod discards {}

#[doc = page!("monitors.md")]
pub mod monitors {}

#[doc = page!("bugs.md")]
pub mod bugs {}
