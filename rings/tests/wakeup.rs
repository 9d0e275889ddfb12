//! Two threads, each asleep whenever it can be, on two mappings of one file as two processes have
//! it: if either side ever loses a wake-up, both sleep for ever, and the test says so.
// Helpers of tests: a panic is the way to fail, and values are small.
#![allow(clippy::unwrap_used, clippy::panic, clippy::arithmetic_side_effects)]

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use ringside_rings::{
    ChainBuf, DeviceRing, DriverLayout, DriverRing, Segment, read_segments, write_segments,
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const LEN: usize = 0x4_0000;
const DATA: u64 = 0x3_0000;
const REQUESTS: u64 = 40_000;

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

    fn wait(&self, who: &str) {
        let guard = self.signalled.lock().unwrap();
        let wait = self
            .changed
            .wait_timeout_while(guard, Duration::from_secs(20), |s| !*s);
        let (mut guard, timeout) = wait.unwrap();
        assert!(
            !timeout.timed_out(),
            "the {who} waits for a wake-up that was lost"
        );
        *guard = false;
    }
}

fn map(file: &File) -> GuestMemoryMmap {
    let file = FileOffset::new(file.try_clone().unwrap(), 0);
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), LEN, Some(file))]).unwrap()
}

/// A cheap source of variety; the run need not be the same twice.
fn step(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn run(layout: DriverLayout, event_idx: bool) {
    let size = layout.size();
    let file = tempfile::tempfile().unwrap();
    file.set_len(u64::try_from(LEN).unwrap()).unwrap();
    let mem = map(&file);
    assert!(layout.end().0 <= DATA);
    let mut driver = DriverRing::<u64>::new(layout, event_idx, &mem).unwrap();
    let (kick, call) = (Event::default(), Event::default());

    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mem = map(&file);
            let mut device = DeviceRing::new(&layout.config(event_idx), &mem).unwrap();
            let mut buf = ChainBuf::new(size);
            let mut chance = 0x9e37_79b9_7f4a_7c15_u64;
            let mut done = 0;
            while done < REQUESTS {
                kick.wait("device");
                let mut session = device.session(&mem).unwrap();
                loop {
                    session.disable_notifications().unwrap();
                    while let Some(chain) = session.pop(&mut buf).unwrap() {
                        let mut token = [0; 8];
                        read_segments(&mem, chain.readable(), 0, &mut token).unwrap();
                        write_segments(&mem, chain.writable(), 0, &token).unwrap();
                        session.push_used(chain.head(), 8).unwrap();
                        done += 1;
                        if step(&mut chance).is_multiple_of(4) && session.publish().unwrap() {
                            call.signal();
                        }
                    }
                    if session.publish().unwrap() {
                        call.signal();
                    }
                    if !session.enable_notifications().unwrap() {
                        break;
                    }
                }
            }
        });

        let mut chance = 0x2545_f491_4f6c_dd1d_u64;
        let (mut next, mut collected) = (0_u64, 0_u64);
        while collected < REQUESTS {
            let mut session = driver.session(&mem).unwrap();
            loop {
                session.disable_interrupts().unwrap();
                while let Some((token, len)) = session.poll_used().unwrap() {
                    let mut answer = [0; 8];
                    let at = DATA + (token % 1024) * 16 + 8;
                    let answered = [Segment::new(GuestAddress(at), 8)];
                    read_segments(&mem, &answered, 0, &mut answer).unwrap();
                    assert_eq!((u64::from_le_bytes(answer), len), (token, 8));
                    collected += 1;
                }
                let batch = step(&mut chance) % u64::from(size) + 1;
                for _ in 0..batch.min(REQUESTS - next) {
                    let at = DATA + (next % 1024) * 16;
                    let request = [Segment::new(GuestAddress(at), 8)];
                    let answer = [Segment::new(GuestAddress(at + 8), 8)];
                    if session.free() < 2 {
                        break;
                    }
                    write_segments(&mem, &request, 0, &next.to_le_bytes()).unwrap();
                    if next.is_multiple_of(3) {
                        session.add_indirect(&request, &answer, next).unwrap();
                    } else {
                        session.add(&request, &answer, next).unwrap();
                    }
                    next += 1;
                }
                if session.publish().unwrap() {
                    kick.signal();
                }
                if collected == REQUESTS || !session.enable_interrupts().unwrap() {
                    break;
                }
            }
            if collected < REQUESTS {
                call.wait("driver");
            }
        }
    });
}

fn split(size: u16) -> DriverLayout {
    DriverLayout::new(GuestAddress(0), size, size).unwrap()
}

fn packed(size: u16) -> DriverLayout {
    DriverLayout::packed(GuestAddress(0), size, size).unwrap()
}

#[test]
fn no_wakeup_is_lost_with_flags() {
    run(split(4), false);
    run(split(64), false);
    run(packed(5), false);
    run(packed(64), false);
}

#[test]
fn no_wakeup_is_lost_with_event_idx() {
    run(split(4), true);
    run(split(64), true);
    run(packed(5), true);
    run(packed(64), true);
}

#[test]
fn no_wakeup_is_lost_in_order() {
    run(split(8).in_order(), true);
    run(packed(7).in_order(), false);
    run(packed(7).in_order(), true);
}

/// Waits until both threads have come here `round` times.
fn meet(arrived: &AtomicU64, round: u64, delay: u64) {
    arrived.fetch_add(1, Ordering::AcqRel);
    let mut spins = 0_u32;
    while arrived.load(Ordering::Acquire) < 2 * round {
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(256) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
    for i in 0..delay {
        std::hint::black_box(i);
    }
}

/// One side publishes in the moment in which the other goes to sleep: the publisher is asked for a
/// wake-up, or the sleeper sees what was published. Without the barriers sometimes neither happens.
fn race(layout: DriverLayout, event_idx: bool) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(u64::try_from(LEN).unwrap()).unwrap();
    let mem = map(&file);
    let mut driver = DriverRing::<u64>::new(layout, event_idx, &mem).unwrap();
    let arrived = AtomicU64::new(0);
    let (kicked, called) = (AtomicBool::new(false), AtomicBool::new(false));
    // Counted, not asserted: a thread that panics leaves the other one waiting.
    let lost = AtomicU64::new(0);
    // On a busy machine a round can take a time slice, so time is the bound and not their number.
    let end = Instant::now() + Duration::from_millis(700);
    let stop = AtomicBool::new(false);

    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mem = map(&file);
            let mut device = DeviceRing::new(&layout.config(event_idx), &mem).unwrap();
            let mut buf = ChainBuf::new(layout.size());
            let mut chance = 0x9e37_79b9_7f4a_7c15_u64;
            let mut session = device.session(&mem).unwrap();
            for round in 0.. {
                session.disable_notifications().unwrap();
                meet(&arrived, 4 * round + 1, step(&mut chance) % 128);
                let seen = session.enable_notifications().unwrap();
                meet(&arrived, 4 * round + 2, 0);
                if !seen && !kicked.load(Ordering::Relaxed) {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
                let chain = session.pop(&mut buf).unwrap().unwrap();
                session.push_used(chain.head(), 0).unwrap();
                meet(&arrived, 4 * round + 3, step(&mut chance) % 128);
                called.store(session.publish().unwrap(), Ordering::Relaxed);
                meet(&arrived, 4 * round + 4, 0);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });

        let mut chance = 0x2545_f491_4f6c_dd1d_u64;
        let mut session = driver.session(&mem).unwrap();
        for round in 0.. {
            session
                .add(&[Segment::new(GuestAddress(DATA), 8)], &[], round)
                .unwrap();
            meet(&arrived, 4 * round + 1, step(&mut chance) % 128);
            kicked.store(session.publish().unwrap(), Ordering::Relaxed);
            meet(&arrived, 4 * round + 2, 0);
            session.disable_interrupts().unwrap();
            meet(&arrived, 4 * round + 3, step(&mut chance) % 128);
            let seen = session.enable_interrupts().unwrap();
            stop.store(Instant::now() > end, Ordering::Relaxed);
            meet(&arrived, 4 * round + 4, 0);
            if !seen && !called.load(Ordering::Relaxed) {
                lost.fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(session.poll_used().unwrap(), Some((round, 0)));
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
    });
    assert_eq!(lost.load(Ordering::Relaxed), 0, "wake-ups were lost");
}

#[test]
fn publishing_races_with_going_to_sleep() {
    for layout in [split(8), packed(8), packed(3).in_order()] {
        race(layout, false);
        race(layout, true);
    }
}

/// A device that asked to be notified and then goes on looking for itself says so, with and without EVENT_IDX.
#[test]
fn a_device_that_looks_for_itself_again_is_not_notified() {
    for (layout, event_idx) in [
        (split(8), false),
        (split(8), true),
        (packed(8), false),
        (packed(8), true),
    ] {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let mut driver = DriverRing::new(layout, event_idx, &memory).unwrap();
        let mut device = DeviceRing::new(&layout.config(event_idx), &memory).unwrap();
        let mut buf = ChainBuf::new(8);
        let notified = |driver: &mut DriverRing<u8>| {
            let mut session = driver.session(&memory).unwrap();
            while session.poll_used().unwrap().is_some() {}
            session
                .add(&[Segment::new(GuestAddress(0x8000), 1)], &[], 0)
                .unwrap();
            session.publish().unwrap()
        };
        for _ in 0..100_000_u32 {
            let mut session = device.session(&memory).unwrap();
            assert!(!session.enable_notifications().unwrap());
            session.disable_notifications().unwrap();
            assert!(!notified(&mut driver));
            assert_eq!(session.available().unwrap(), 1);
            let head = session.pop(&mut buf).unwrap().unwrap().head();
            session.push_used(head, 0).unwrap();
            session.publish().unwrap();
            assert!(!session.enable_notifications().unwrap());
            assert!(notified(&mut driver));
            session.disable_notifications().unwrap();
            let head = session.pop(&mut buf).unwrap().unwrap().head();
            session.push_used(head, 0).unwrap();
            session.publish().unwrap();
        }
    }
}
