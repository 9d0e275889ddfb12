//! Neither side allocates after its `new`.
// Counting allocations takes an allocator, which is unsafe to implement. Helpers of tests may panic.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use ringside_rings::{
    ChainBuf, DeviceRing, DriverLayout, DriverRing, Inflight, PopError, Segment, read_segments,
    write_segments,
};
use vm_memory::{GuestAddress, GuestMemoryMmap, MmapRegion};

thread_local! {
    /// Allocations of this thread; other threads of the test harness have their own.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps to the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System` by way of this allocator, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

#[test]
fn requests_do_not_allocate() {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(0x1_0000), 0x1_0000),
    ])
    .unwrap();
    let split = DriverLayout::new(GuestAddress(0), 32, 8).unwrap();
    let packed = DriverLayout::packed(GuestAddress(0), 32, 8).unwrap();
    for (layout, event_idx, tracked) in [split, packed, split.in_order(), packed.in_order()]
        .into_iter()
        .flat_map(|layout| {
            [
                (layout, false, false),
                (layout, true, false),
                (layout, true, true),
            ]
        })
    {
        let mut driver = DriverRing::<u32>::new(layout, event_idx, &mem).unwrap();
        let config = layout.config(event_idx);
        let mut device = if tracked {
            let region = MmapRegion::new(Inflight::len(32, layout.is_packed())).unwrap();
            DeviceRing::resume(&config, &mem, Inflight::new(Arc::new(region), 0, 32)).unwrap()
        } else {
            DeviceRing::new(&config, &mem).unwrap()
        };
        let mut buf = ChainBuf::new(32);
        let before = allocations();
        let control = Box::new(0);
        assert_eq!(allocations() - before, 1, "the counter counts");
        drop(control);

        let before = allocations();
        let part = |at| Segment::new(GuestAddress(at), 16);
        // The last one lies outside memory: errors do not allocate either.
        let good = [part(0x8000), part(0xfff8), part(0x9000)];
        let bad = [part(0xff_0000)];
        let (mut returned, mut malformed) = (0, 0);
        for i in 0..5000_u32 {
            let mut session = driver.session(&mem).unwrap();
            session.add(&good[..2], &good[2..], i).unwrap();
            session.add_indirect(&good[..1], &good[1..], i).unwrap();
            session.add(&bad, &[], i).unwrap();
            session.publish().unwrap();
            let mut turn = device.session(&mem).unwrap();
            turn.disable_notifications().unwrap();
            loop {
                match turn.pop(&mut buf) {
                    Ok(None) => break,
                    Ok(Some(chain)) => {
                        let mut header = [0; 16];
                        read_segments(&mem, chain.readable(), 0, &mut header).unwrap();
                        write_segments(&mem, chain.writable(), 0, &header).unwrap();
                        turn.push_used(chain.head(), 16).unwrap();
                    }
                    Err(PopError::Chain { head, .. }) => {
                        malformed += 1;
                        turn.push_used(head, 0).unwrap();
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            turn.publish().unwrap();
            turn.enable_notifications().unwrap();
            while session.poll_used().unwrap().is_some() {
                returned += 1;
            }
            session.enable_interrupts().unwrap();
        }
        let after = allocations();
        assert_eq!((returned, malformed), (15_000, 5000));
        assert_eq!(after - before, 0);
    }
}
