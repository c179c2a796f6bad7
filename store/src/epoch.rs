//! The name of an increment: which store, which consumer, and which number.

use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::str::FromStr;

/// Which increment of which consumer of which store. A consumer stores it with its copy, and names
/// it as the parent of the next increment.
///
/// Each store that is made has an identity of its own, and each consumer that joins it has a
/// number of its own. So an epoch of a store that was lost and made again is never mistaken for one
/// of the new store, nor that of a consumer for one of another, or of one that had its name before.
///
/// ```
/// use dirtymap_store::Epoch;
///
/// let text = "0000000000000000000000000000002a-3-7";
/// let epoch: Epoch = text.parse()?;
/// assert_eq!((epoch.store(), epoch.consumer(), epoch.number()), (42, 3, 7));
/// assert_eq!(epoch.to_string(), text);
/// # Ok::<(), dirtymap_store::BadEpoch>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch {
    store: u128,
    consumer: u32,
    number: u64,
}

/// A text that is no epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an epoch is 32 hexadecimal digits and two decimal numbers, with hyphens between them")]
pub struct BadEpoch;

impl Epoch {
    pub(crate) fn new(store: u128, consumer: u32, number: u64) -> Self {
        Epoch {
            store,
            consumer,
            number,
        }
    }

    /// The identity of the store.
    pub fn store(self) -> u128 {
        self.store
    }

    /// The number that the consumer got when it joined.
    pub fn consumer(self) -> u32 {
        self.consumer
    }

    /// The number of the increment, from 1.
    pub fn number(self) -> u64 {
        self.number
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}-{}-{}", self.store, self.consumer, self.number)
    }
}

impl FromStr for Epoch {
    type Err = BadEpoch;

    fn from_str(text: &str) -> Result<Self, BadEpoch> {
        let (store, numbers) = text.split_once('-').ok_or(BadEpoch)?;
        let (consumer, number) = numbers.split_once('-').ok_or(BadEpoch)?;
        // `from_str_radix` and `parse` take a sign, too.
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
        if store.len() != 32 || ![store, consumer, number].into_iter().all(digits) {
            return Err(BadEpoch);
        }
        Ok(Epoch {
            store: u128::from_str_radix(store, 16).map_err(|_| BadEpoch)?,
            consumer: consumer.parse().map_err(|_| BadEpoch)?,
            number: number.parse().map_err(|_| BadEpoch)?,
        })
    }
}

/// An identity that no other store has: 128 bits of the system's randomness, by way of the keys
/// that each hash map of the standard library gets, of the time, and of the process.
pub(crate) fn new_identity() -> u128 {
    let half = || {
        let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        hasher.write_u128(now.map_or(0, |now| now.as_nanos()));
        hasher.write_u32(std::process::id());
        u128::from(hasher.finish())
    };
    half() << 64 | half()
}

#[cfg(test)]
mod tests {
    use super::{BadEpoch, Epoch, new_identity};

    #[test]
    fn an_epoch_survives_its_text() {
        for epoch in [
            Epoch::new(0, 0, 1),
            Epoch::new(u128::MAX, u32::MAX, u64::MAX),
        ] {
            assert_eq!(epoch.to_string().parse(), Ok(epoch));
        }
        assert_ne!(new_identity(), new_identity());
    }

    #[test]
    fn a_text_that_is_no_epoch_is_refused() {
        let long = format!("{:032x}-0-18446744073709551616", 1);
        let old = format!("{:032x}-1", 1);
        let signed = "+000000000000000000000000000002a-0-7";
        for text in [
            "",
            "-",
            "--",
            "1-1-1",
            signed,
            &format!("{old}-+1"),
            &old,
            &long,
        ] {
            assert_eq!(text.parse::<Epoch>(), Err(BadEpoch), "{text}");
        }
    }
}
