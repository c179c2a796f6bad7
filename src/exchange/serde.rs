//! Deserialization has the same checks and the same errors as the constructors.

use serde::de::{Deserialize, Deserializer, Error as _};

use super::RunTable;
use crate::units::{Granule, Iova, IovaRange};

/// A `start` and a `last`.
impl<'de> Deserialize<'de> for IovaRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(rename = "IovaRange", deny_unknown_fields)]
        struct Fields {
            start: Iova,
            last: Iova,
        }
        let Fields { start, last } = Fields::deserialize(deserializer)?;
        IovaRange::new(start, last).map_err(D::Error::custom)
    }
}

/// A number of bytes.
impl<'de> Deserialize<'de> for Granule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = u64::deserialize(deserializer)?;
        Granule::from_bytes(bytes).map_err(D::Error::custom)
    }
}

/// A sequence of ranges in the order of a table. The announced length of a sequence is not trusted:
/// memory grows with the elements that are read.
impl<'de> Deserialize<'de> for RunTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let runs = Vec::<IovaRange>::deserialize(deserializer)?;
        RunTable::from_ordered(runs).map_err(D::Error::custom)
    }
}
