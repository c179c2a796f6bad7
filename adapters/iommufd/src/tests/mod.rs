//! The adapter over a kernel that is played.

mod domains;
mod fake;
mod kit;
mod refusals;
mod unknown;
mod whole_leaves;
