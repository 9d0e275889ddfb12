//! Orders in which the accesses of both sides can come: all of them around the moment in which one goes to sleep, and many of
//! whole conversations. If a wake-up can be lost, there is one in which both sleep for ever, which the scheduler finds. That processors do not change the order is what the barriers are for;
//! `tests/wakeup.rs` looks after them.

// Helpers of tests: values are small.
#![allow(clippy::arithmetic_side_effects)]

use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::scheduler::{DfsScheduler, PctScheduler};
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::{Runner, thread};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::area::turns;
use crate::{ChainBuf, DeviceRing, DriverLayout, DriverRing, Segment};

const DATA: u64 = 0x8000;

/// What an eventfd is between processes.
#[derive(Default)]
struct Event {
    signalled: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    fn signal(&self) {
        *self.signalled.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut signalled = self.signalled.lock().unwrap();
        while !*signalled {
            signalled = self.changed.wait(signalled).unwrap();
        }
        *signalled = false;
    }
}

/// Serves requests until all are done, and sleeps when there is none.
fn device(
    mem: &GuestMemoryMmap,
    layout: DriverLayout,
    event_idx: bool,
    events: &[Event; 2],
    requests: u32,
) {
    let [kick, call] = events;
    let mut ring = DeviceRing::new(&layout.config(event_idx), mem).unwrap();
    let mut buf = ChainBuf::new(layout.size());
    let mut session = ring.session(mem).unwrap();
    let mut done = 0;
    while done < requests {
        kick.wait();
        loop {
            session.disable_notifications().unwrap();
            while let Some(chain) = session.pop(&mut buf).unwrap() {
                session.push_used(chain.head(), 0).unwrap();
                done += 1;
            }
            if session.publish().unwrap() {
                call.signal();
            }
            if !session.enable_notifications().unwrap() {
                break;
            }
        }
    }
}

/// Makes requests, at most two before it looks for answers, and sleeps when there is none.
fn driver(mem: &GuestMemoryMmap, mut ring: DriverRing<u32>, events: &[Event; 2], requests: u32) {
    let [kick, call] = events;
    let mut session = ring.session(mem).unwrap();
    let (mut next, mut collected) = (0, 0);
    while collected < requests {
        for _ in 0..2.min(requests - next) {
            let segment = Segment::new(GuestAddress(DATA), 8);
            if session.add(&[segment], &[], next).is_err() {
                break;
            }
            next += 1;
            if session.publish().unwrap() {
                kick.signal();
            }
        }
        session.disable_interrupts().unwrap();
        let before = collected;
        while let Some((token, _)) = session.poll_used().unwrap() {
            assert_eq!(token, collected);
            collected += 1;
        }
        let slept = collected == before && !session.enable_interrupts().unwrap();
        if slept && collected < requests {
            call.wait();
        }
    }
}

/// Runs both sides in so many orders, of which each changes sides at few places (probabilistic concurrency testing).
fn run(orders: usize, layout: DriverLayout, event_idx: bool, requests: u32) {
    let scheduler = PctScheduler::new_from_seed(7, 4, orders);
    Runner::new(scheduler, shuttle::Config::new()).run(move || {
        turns::scheduled(false);
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x9000)]).unwrap();
        let mem = Arc::new(mem);
        let ring = DriverRing::new(layout, event_idx, mem.as_ref()).unwrap();
        turns::scheduled(true);
        let events = Arc::new([Event::default(), Event::default()]);
        let (its_mem, its_events) = (Arc::clone(&mem), Arc::clone(&events));
        let other =
            thread::spawn(move || device(&its_mem, layout, event_idx, &its_events, requests));
        driver(&mem, ring, &events, requests);
        other.join().unwrap();
    });
    turns::scheduled(false);
}

fn layouts() -> [DriverLayout; 4] {
    let at = GuestAddress(0);
    let split = DriverLayout::new(at, 2, 0).unwrap();
    let packed = DriverLayout::packed(at, 3, 0).unwrap();
    [split, split.in_order(), packed, packed.in_order()]
}

/// One side publishes twice while the other one goes to sleep: the publisher is asked for a wake-up, or the sleeper sees what
/// was published. Runs all orders, and returns how many there are.
fn race(layout: DriverLayout, event_idx: bool, by_driver: bool) -> usize {
    let ends = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&ends);
    Runner::new(DfsScheduler::new(None, false), shuttle::Config::new()).run(move || {
        turns::scheduled(false);
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x9000)]).unwrap();
        let mem = Arc::new(mem);
        let mut driver = DriverRing::<u32>::new(layout, event_idx, mem.as_ref()).unwrap();
        let mut device = DeviceRing::new(&layout.config(event_idx), mem.as_ref()).unwrap();
        let mut session = device.session(mem.as_ref()).unwrap();
        session.disable_notifications().unwrap();
        let mut asking = driver.session(mem.as_ref()).unwrap();
        asking.disable_interrupts().unwrap();
        // The driver publishes.
        turns::scheduled(by_driver);
        let its_mem = Arc::clone(&mem);
        let publisher = thread::spawn(move || {
            let mut session = driver.session(its_mem.as_ref()).unwrap();
            let mut kicked = false;
            for token in 0..2 {
                session
                    .add(&[Segment::new(GuestAddress(DATA), 8)], &[], token)
                    .unwrap();
                kicked |= session.publish().unwrap();
            }
            (driver, kicked)
        });
        let mut session = device.session(mem.as_ref()).unwrap();
        let seen = session.enable_notifications().unwrap();
        let (mut driver, kicked) = publisher.join().unwrap();
        assert!(seen || kicked, "no kick, and the device sleeps");
        // The device publishes.
        turns::scheduled(!by_driver);
        let its_mem = Arc::clone(&mem);
        let publisher = thread::spawn(move || {
            let mut session = device.session(its_mem.as_ref()).unwrap();
            let mut buf = ChainBuf::new(layout.size());
            let mut called = false;
            for _ in 0..2 {
                let head = session.pop(&mut buf).unwrap().unwrap().head();
                session.push_used(head, 0).unwrap();
                called |= session.publish().unwrap();
            }
            called
        });
        let mut session = driver.session(mem.as_ref()).unwrap();
        let seen = session.enable_interrupts().unwrap();
        let called = publisher.join().unwrap();
        assert!(seen || called, "no interrupt, and the driver sleeps");
        counted.fetch_add(1, Ordering::Relaxed);
    });
    turns::scheduled(false);
    ends.load(Ordering::Relaxed)
}

#[test]
#[cfg_attr(miri, ignore = "schedules threads by itself")]
fn going_to_sleep_in_all_orders() {
    for layout in layouts() {
        for event_idx in [false, true] {
            for by_driver in [false, true] {
                let orders = race(layout, event_idx, by_driver);
                assert!(orders > 10, "{orders}");
                println!("{orders} orders");
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "schedules threads by itself")]
fn several_requests_in_many_orders() {
    for layout in layouts() {
        for event_idx in [false, true] {
            run(1000, layout, event_idx, 5);
        }
    }
}
