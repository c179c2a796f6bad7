//! The growth of costs: the main operations of all families over three to five decades of size, and
//! the slope of each.
//!
//! A slope of 0 means that the size does not matter, a slope of 1 that the cost is in proportion to
//! it. The cost of a tree that is larger than the caches grows faster than its depth.

use super::{FAMILIES, Family, Report, Settings};

/// The growth of costs.
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
