//! Pages in the put-back store of a domain that a harvest of a consumer hides: it has cleared the
//! summary, and stands still before it records the word. The rest of a leaf gets there, and so does
//! what an unmap finds dirty in a table.

use super::AddressSpace;
use crate::bitmap::UserBitmap;
use crate::harvest::{Consumer, Start};
use crate::source::SharedLog;
use crate::sync::{Arc, AtomicU64};
use crate::units::{Access, DomainId, Granule, Iova, IovaRange};

fn pages(first: u64, n: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(first << 12), n << 12).unwrap()
}

/// A space of a line of pages with a domain, in the store of which page 5 is dirty.
fn space() -> (AddressSpace, DomainId) {
    let space = AddressSpace::tracked(Granule::K4);
    space.map(pages(0, 512), 0, Access::ReadWrite).unwrap();
    let log: Arc<[AtomicU64]> = (0..8).map(|_| AtomicU64::new(0)).collect();
    let log = SharedLog::new(0..512 << 12, Granule::K4, log).unwrap();
    let domain = space.attach(log).unwrap();
    space.attachments()[0].put_back.mark(pages(5, 1));
    (space, domain)
}

/// Calls `meanwhile` while another harvest hides page 5.
fn beside_a_harvest(space: &AddressSpace, meanwhile: impl FnOnce()) {
    let _claim = space.hiding.publish(pages(0, 512));
    let mut meanwhile = Some(meanwhile);
    let domains = space.attachments();
    domains[0].put_back.take(pages(0, 512), |_, mask| {
        assert_eq!(mask, 1 << 5);
        meanwhile.take().unwrap()();
    });
    assert!(meanwhile.is_none());
}

fn dirty(consumer: &Consumer<'_>) -> u64 {
    consumer.rounds().next().unwrap().commit().bits_set
}

/// An unmap comes meanwhile. Its result lacked the page, of which the other consumers are told by
/// that result alone: the harvest leaves it pending at an address where no area is.
#[test]
fn an_unmap_returns_what_is_hidden_in_the_store_of_a_domain() {
    let (space, _) = space();
    let _other = space.consumer("other", Start::Clean).unwrap();
    beside_a_harvest(&space, || {
        let mut words = [0; 8];
        let bitmap = UserBitmap::new(&mut words);
        let (unmapped, view) = space.unmap(pages(0, 512), Granule::K4, bitmap).unwrap();
        assert_eq!(view.bits().collect::<Vec<u64>>(), [5]);
        assert_eq!(unmapped.dirty_bytes, 4096);
    });
    let (space, _) = self::space();
    let _other = space.consumer("other", Start::Clean).unwrap();
    beside_a_harvest(&space, || {
        let unmapped = space.unmap_discarding(pages(0, 512)).unwrap();
        assert_eq!(unmapped.discarded_bytes, 4096);
    });
}

/// The domain is detached meanwhile. Its pages move to the marks, but for this one, which a harvest
/// of another consumer then found nowhere. If that harvest is the last one, the write is lost.
#[test]
fn a_detach_moves_what_is_hidden_in_the_store() {
    let (space, domain) = space();
    let other = space.consumer("other", Start::Clean).unwrap();
    beside_a_harvest(&space, || {
        space.detach(domain).unwrap();
        assert_eq!(dirty(&other), 1);
    });
}
