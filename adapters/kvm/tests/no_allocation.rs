//! Harvests do not allocate.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/common_allocations/mod.rs"]
mod common_allocations;
#[path = "../../../tests/common_skip/mod.rs"]
mod common_skip;

use common_allocations::allocations;
use dirtymap::{Access, AddressSpace, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_kvm::{KvmLog, KvmMode};

#[test]
fn harvests_of_kvm_allocate_nothing() {
    let manual = |initially_set| KvmMode::Manual { initially_set };
    for mode in [KvmMode::Clearing, manual(false), manual(true)] {
        let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
        let Ok(Ok(log)) = vm.as_ref().map(|vm| KvmLog::new(vm, mode)) else {
            common_skip::skip(format_args!("{mode:?}: this machine has no such KVM"));
            continue;
        };
        let log = std::sync::Arc::new(log);
        let page = log.page();
        let block = vec![0u8; 101 << page.lg2()];
        let host = block.as_ptr().addr() as u64;
        let range = IovaRange::from_len(Iova::MIN, 100 << page.lg2()).unwrap();
        // SAFETY: the block lives until the slot is removed, and no guest runs.
        unsafe { log.add_slot(0, range, host.next_multiple_of(page.bytes())) }.unwrap();
        let space = AddressSpace::with_source(page, log.clone()).unwrap();
        space.map(range, 0, Access::ReadWrite).unwrap();
        space.start_tracking().unwrap();
        let mut words = [0u64; 2];
        let mut round = || {
            let request = HarvestRequest::new(range, page);
            let lease = space
                .harvest(&request, UserBitmap::new(&mut words))
                .unwrap();
            lease.sync().unwrap().commit();
        };
        let first = allocations(&mut round);
        assert_eq!((first, allocations(&mut round)), (0, 0), "{mode:?}");
        log.remove_slot(0).unwrap();
    }
}
