//! How cost grows: the main operations of all families over three decades of size, and the slope of
//! each.
//!
//! What a slope says: 0, the size does not matter; 1, the cost is in proportion to it. A tree that
//! fits into no cache any more grows faster than its depth.

use super::{FAMILIES, Family, Report, Settings};

/// How cost grows.
pub const FAMILY: Family = Family {
    name: "growth",
    run,
    grow: None,
};

fn run(settings: &Settings, report: &mut Report) {
    for grow in FAMILIES.iter().filter_map(|family| family.grow) {
        grow(settings, report, FAMILY.name);
    }
}
