//! Several consumers of one memory: our library with named consumers, and a bitmap for each of them
//! by hand.

use std::sync::Mutex;

use dirtymap::sync::{Arc, lock};
use dirtymap::{
    Access, AddressSpace, AreaHandle, Consumer, Granule, HarvestRequest, Iova, IovaRange, Start,
    UserBitmap,
};

use super::bits::{Masks, masks};
use super::dirtymap::{range, sure};
use crate::{PAGE, Tracker};

/// A memory at which several consumers look. Harvests of a [`Tracker`] are those of the first one.
pub trait Shared: Tracker {
    /// Tracks a memory of `pages` pages, all clean, for `consumers` consumers.
    fn for_consumers(pages: u64, consumers: u64) -> Self
    where
        Self: Sized;

    /// As [`harvest_alone`](Tracker::harvest_alone), for the consumer `nth`.
    fn harvest_for(&self, nth: u64, bitmap: &mut [u64]);
}

/// One space: its first consumer is the unnamed one, and all others are named.
pub struct Several {
    space: Arc<AddressSpace>,
    named: Vec<Consumer<'static>>,
    area: AreaHandle,
    all: IovaRange,
}

impl Shared for Several {
    fn for_consumers(pages: u64, consumers: u64) -> Self {
        let space = Arc::new(AddressSpace::tracked(Granule::K4));
        let all = range(0, pages * PAGE);
        sure(space.map(all, 0, Access::ReadWrite));
        let join = |nth: u64| Consumer::shared(space.clone(), &nth.to_string(), Start::Clean);
        let named = (1..consumers).map(|nth| sure(join(nth))).collect();
        let Some(area) = space.area(Iova::MIN) else {
            unreachable!("the space has one area, which starts at the lowest address");
        };
        Several {
            space,
            named,
            area,
            all,
        }
    }

    fn harvest_for(&self, nth: u64, bitmap: &mut [u64]) {
        let request = HarvestRequest::new(self.all, Granule::K4);
        let bitmap = UserBitmap::new(bitmap);
        let lease = match nth.checked_sub(1) {
            None => self.space.harvest(&request, bitmap),
            Some(nth) => self.named[nth as usize].harvest(&request, bitmap),
        };
        sure(sure(lease).sync()).commit();
    }
}

impl Tracker for Several {
    fn new(pages: u64) -> Self {
        Several::for_consumers(pages, 1)
    }

    fn name(&self) -> &'static str {
        "dirtymap"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        sure(self.area.mark(range(start, len)));
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest_for(0, bitmap);
    }
}

/// A flat bitmap for each consumer, all of them under one lock and set by each mark.
pub struct ByHand(Mutex<Vec<Vec<u64>>>);

impl Shared for ByHand {
    fn for_consumers(pages: u64, consumers: u64) -> Self {
        let bitmap = vec![0; pages.div_ceil(64) as usize];
        ByHand(Mutex::new(vec![bitmap; consumers as usize]))
    }

    fn harvest_for(&self, nth: u64, bitmap: &mut [u64]) {
        let mut bitmaps = lock(&self.0);
        for (word, out) in bitmaps[nth as usize].iter_mut().zip(bitmap) {
            if *word != 0 {
                *out |= std::mem::take(word);
            }
        }
    }
}

impl Tracker for ByHand {
    fn new(pages: u64) -> Self {
        ByHand::for_consumers(pages, 1)
    }

    fn name(&self) -> &'static str {
        "by-hand"
    }

    #[inline(always)]
    fn mark(&self, start: u64, len: u64) {
        let mut bitmaps = lock(&self.0);
        for bitmap in bitmaps.iter_mut() {
            match masks(start, len) {
                Masks::One(word, mask) => bitmap[word] |= mask,
                Masks::More { first, last } => {
                    (first..=last).for_each(|page| bitmap[page / 64] |= 1 << (page % 64));
                }
            }
        }
    }

    fn harvest_alone(&mut self, bitmap: &mut [u64]) {
        self.harvest_for(0, bitmap);
    }
}
