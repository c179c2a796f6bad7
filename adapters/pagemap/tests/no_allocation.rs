//! Harvests do not allocate.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/common_allocations/mod.rs"]
mod common_allocations;
#[path = "../../../tests/common_skip/mod.rs"]
mod common_skip;

use common_allocations::allocations;
use dirtymap::{Access, AddressSpace, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_pagemap::ProcessMemory;

/// Pages that the kernel clears with its report go into memory that was reserved before.
#[test]
fn harvests_of_process_memory_allocate_nothing() {
    let memory = match ProcessMemory::new() {
        Ok(memory) => memory,
        Err(error) => return common_skip::skip(error),
    };
    let memory = std::sync::Arc::new(memory);
    let page = memory.page();
    let mut block = vec![0u8; 3000 << page.lg2()];
    let first = block
        .as_ptr()
        .addr()
        .next_multiple_of(page.bytes() as usize);
    let range = IovaRange::from_len(Iova::new(first as u64), 2998 << page.lg2()).unwrap();
    memory.add(range, first as u64).unwrap();
    let space = AddressSpace::with_source(page, memory.clone()).unwrap();
    space.map(range, 0, Access::ReadWrite).unwrap();
    space.start_tracking().unwrap();
    let mut words = vec![0u64; 2998usize.div_ceil(64)];
    let from = first - block.as_ptr().addr();
    let mut round = || {
        // More regions than one call reports.
        for page_of_two in (0..2998 << page.lg2()).step_by(2 << page.lg2()) {
            block[from + page_of_two] += 1;
        }
        let request = HarvestRequest::new(range, page);
        let lease = space
            .harvest(&request, UserBitmap::new(&mut words))
            .unwrap();
        let lease = lease.sync().unwrap();
        assert!(lease.dirty() >= 1499);
        lease.commit();
    };
    round();
    assert_eq!(allocations(&mut round), 0);
    memory.remove(range).unwrap();
}
