//! A device side that ends behind any of its stores, and the next one: each request comes back once.

// Helpers of tests: values are small.
#![allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::collections::BTreeSet;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::area::stores;
use crate::{
    ChainBuf, DeviceRing, DriverError, DriverLayout, DriverRing, PopError, RingConfig, Segment,
    read_segments, write_segments,
};

const DATA: u64 = 0x1_0000;
/// What a request has of guest memory.
const SLOT: u64 = 64;

/// The same numbers each time (xorshift64).
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[derive(Debug, Clone, Copy)]
struct Kind {
    size: u16,
    packed: bool,
    in_order: bool,
    event_idx: bool,
    /// Room in the notes for a queue that is larger by so much.
    spare: u16,
}

fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for (packed, sizes) in [(false, [1, 2, 8]), (true, [1, 5, 8])] {
        for size in sizes {
            for (in_order, event_idx) in [(false, false), (false, true), (true, true)] {
                kinds.push(Kind {
                    size,
                    packed,
                    in_order,
                    event_idx,
                    spare: size % 3,
                });
            }
        }
    }
    kinds
}

struct World {
    kind: Kind,
    mem: GuestMemoryMmap,
    notes: Inflight,
    config: RingConfig,
    driver: DriverRing<u64>,
    device: Option<DeviceRing>,
    /// What the device has: head and request, and whether it can be answered.
    held: Vec<(u16, Option<u64>)>,
    random: Random,
    next: u64,
    outstanding: BTreeSet<u64>,
    /// How often the device side ended, and how many stores are left to it.
    ends: u32,
    left: u64,
}

impl World {
    fn new(kind: Kind, seed: u64) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
        let Kind { size, packed, .. } = kind;
        let mut layout = if packed {
            DriverLayout::packed(GuestAddress(0x100), size, size).unwrap()
        } else {
            DriverLayout::new(GuestAddress(0x100), size, size).unwrap()
        };
        if kind.in_order {
            layout = layout.in_order();
        }
        // Indices wrap soon.
        let start = if packed { 0x8000 } else { 65_530 };
        let driver = DriverRing::starting_at(layout, kind.event_idx, start, &mem).unwrap();
        let config = RingConfig {
            next_avail: start,
            next_used: start,
            ..layout.config(kind.event_idx)
        };
        if !packed {
            let index = GuestAddress(layout.used_ring().0 + 2);
            mem.write_obj(start, index).unwrap();
        }
        let entries = size + kind.spare;
        let region = MmapRegion::new(Inflight::len(entries, packed) + 64).unwrap();
        let notes = Inflight::new(Arc::new(region), 64, entries);
        Self {
            kind,
            config,
            notes,
            driver,
            device: None,
            held: Vec::new(),
            random: Random(seed),
            next: 0,
            outstanding: BTreeSet::new(),
            ends: 0,
            left: u64::MAX,
            mem,
        }
    }

    /// Does something as the device's process. It may end meanwhile.
    fn as_device(&mut self, what: impl FnOnce(&mut Self)) {
        stores::limit(self.left);
        what(self);
        self.left = stores::left();
        stores::limit(u64::MAX);
        if self.left == 0 {
            self.device = None;
            self.held.clear();
            self.ends += 1;
            // The next one may end early, too.
            self.left = match self.random.below(3) {
                0 if self.ends < 20 => self.random.below(30),
                _ => u64::MAX,
            };
        }
    }

    /// The driver makes requests, and takes answers.
    fn drive(&mut self, most: u64) {
        for _ in 0..self.random.below(4) {
            self.collect();
        }
        for _ in 0..self.random.below(1 + most) {
            let slot =
                (0..64).find(|&slot| self.outstanding.iter().all(|token| token % 64 != slot));
            let token = self.next * 64 + slot.unwrap();
            let at = |offset| GuestAddress(DATA + token % 64 * SLOT + offset);
            let mut segments = vec![Segment::new(at(8), 8)];
            for more in 0..self.random.below(3) {
                segments.push(Segment::new(at(16 + 8 * more), 8));
            }
            let question = [Segment::new(at(0), 8)];
            if self.driver.free() < 4 || self.random.below(4) == 0 {
                segments.truncate(1);
            }
            write_segments(&self.mem, &question, 0, &token.to_le_bytes()).unwrap();
            write_segments(&self.mem, &segments, 0, &[0; 8]).unwrap();
            let indirect = self.random.below(3) == 0 && self.kind.size > 3;
            let mut session = self.driver.session(&self.mem).unwrap();
            let (question, answer) = match self.kind.size {
                // No room for two descriptors.
                1 => (&[][..], &segments[..1]),
                _ => (&question[..], &segments[..]),
            };
            let added = if indirect {
                session.add_indirect(question, answer, token)
            } else {
                session.add(question, answer, token)
            };
            match added {
                Ok(_) => {
                    self.outstanding.insert(token);
                    self.next += 1;
                }
                Err(DriverError::Full { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            session.publish().unwrap();
        }
    }

    fn collect(&mut self) {
        let mut session = self.driver.session(&self.mem).unwrap();
        if let Some((token, _)) = session.poll_used().unwrap() {
            assert!(self.outstanding.remove(&token), "{token} comes twice");
            let answer = GuestAddress(DATA + token % 64 * SLOT + 8);
            let answer: u64 = self.mem.read_obj(answer).unwrap();
            let expected = if self.kind.size == 1 { 1 } else { token + 1 };
            assert_eq!(answer, expected, "{token} comes unanswered");
        }
    }

    /// One turn of the device.
    fn serve(&mut self, all: bool) {
        let Self {
            device,
            mem,
            held,
            random,
            kind,
            ..
        } = self;
        let Some(device) = device else { return };
        let mut buf = ChainBuf::new(kind.size);
        let mut session = device.session(mem).unwrap();
        let most = if all { 100 } else { random.below(5) };
        let mut taken = 0;
        for _ in 0..most {
            let popped = session.pop(&mut buf);
            if stores::ended() {
                return;
            }
            match popped {
                Ok(Some(chain)) => {
                    let mut token = [0; 8];
                    let readable = chain.readable_len() > 0;
                    if readable {
                        read_segments(mem, chain.readable(), 0, &mut token).unwrap();
                    }
                    let token = if readable {
                        u64::from_le_bytes(token)
                    } else {
                        0
                    };
                    // Answered at once: a device writes when it likes.
                    let answer = (token + 1).to_le_bytes();
                    write_segments(mem, chain.writable(), 0, &answer).unwrap();
                    held.push((chain.head(), Some(token)));
                    taken += 1;
                }
                Ok(None) => break,
                Err(PopError::Chain { error, .. }) => panic!("{error}"),
                Err(PopError::Ring(error)) => panic!("{error}"),
            }
        }
        if !all && random.below(4) == 0 {
            let back = random.below(1 + taken).min(2);
            for _ in 0..back {
                session.rewind(1);
                if stores::ended() {
                    return;
                }
                held.pop();
            }
        }
        let answers = if all { 100 } else { random.below(5) };
        for _ in 0..answers {
            if held.is_empty() {
                break;
            }
            let pick = random.below(held.len() as u64) as usize;
            let (head, _) = held.remove(pick);
            session.push_used(head, 8).unwrap();
            if stores::ended() {
                return;
            }
            if random.below(3) == 0 {
                session.publish().unwrap();
                if stores::ended() {
                    return;
                }
            }
        }
        if all || random.below(2) == 0 {
            session.publish().unwrap();
        }
        if !stores::ended() && random.below(2) == 0 {
            session.enable_notifications().unwrap();
        }
    }

    fn resume(&mut self) {
        let resumed = DeviceRing::resume(&self.config, &self.mem, self.notes.clone());
        if stores::ended() {
            // It reads what it did not store.
            return;
        }
        let device = resumed.unwrap();
        assert!(device.is_tracked());
        assert_eq!(device.unserved(), device.in_flight());
        self.device = Some(device);
    }

    fn run(&mut self) {
        for _ in 0..30 {
            self.drive(3);
            if self.device.is_none() {
                self.as_device(Self::resume);
            }
            self.as_device(|world| world.serve(false));
        }
        self.left = u64::MAX;
        for _ in 0..10 {
            if self.device.is_none() {
                self.as_device(Self::resume);
            }
            self.as_device(|world| world.serve(true));
            for _ in 0..self.kind.size {
                self.collect();
            }
        }
        assert_eq!(self.outstanding.len(), 0, "lost: {:?}", self.outstanding);
        let device = self.device.as_ref().unwrap();
        assert_eq!((device.in_flight(), device.unserved()), (0, 0));
    }
}

/// The process ends behind its first store, its second, and so on until it does not end any more.
#[test]
#[cfg_attr(
    miri,
    ignore = "takes hours there; the others go through the same code"
)]
fn a_device_side_that_ends_anywhere_loses_nothing_and_returns_nothing_twice() {
    for kind in kinds() {
        for seed in 1..5 {
            for stores in 0.. {
                let mut world = World::new(kind, seed * 0x9e37_79b9);
                world.left = stores;
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run())).is_err() {
                    panic!("{kind:?}, seed {seed}, {stores} stores");
                }
                if world.ends == 0 {
                    assert!(
                        stores > 20,
                        "{kind:?}: nothing is tried with {stores} stores"
                    );
                    break;
                }
            }
        }
    }
}

/// Whatever a front-end writes into the notes: an error, or a queue that can be served.
#[test]
#[cfg_attr(
    miri,
    ignore = "takes hours there; the others go through the same code"
)]
fn notes_are_not_trusted() {
    let mut refused = [0_u32; 2];
    for kind in kinds().into_iter().filter(|kind| kind.size > 2) {
        let mut random = Random(0x1234_5678_9abc_def1);
        for seed in 1..400 {
            let mut world = World::new(kind, seed);
            world.resume();
            for _ in 0..8 {
                world.drive(2);
                world.serve(false);
            }
            world.device = None;
            let len = Inflight::len(world.notes.entries, kind.packed);
            let notes = world.notes.region.get_slice(64, len).unwrap();
            for _ in 0..1 + random.below(3) {
                let at = random.below(len as u64) as usize;
                let value = [0, 1, 2, 7, 0x80, 0xff][random.below(6) as usize];
                notes.write_obj(value as u8, at).unwrap();
            }
            let resumed = DeviceRing::resume(&world.config, &world.mem, world.notes.clone());
            let Ok(mut device) = resumed else {
                refused[usize::from(kind.packed)] += 1;
                continue;
            };
            let mut buf = ChainBuf::new(kind.size);
            let mut session = device.session(&world.mem).unwrap();
            let mut heads = Vec::new();
            for _ in 0..100 {
                match session.pop(&mut buf) {
                    Ok(Some(chain)) => heads.push(chain.head()),
                    Err(PopError::Chain { head, .. }) => heads.push(head),
                    Ok(None) | Err(PopError::Ring(_)) => break,
                }
            }
            assert!(heads.len() <= usize::from(kind.size));
            for head in heads {
                session.push_used(head, 0).unwrap();
            }
            session.publish().unwrap();
        }
    }
    assert!(refused.iter().all(|&count| count > 100), "{refused:?}");
}

#[test]
fn notes_of_another_size_are_refused() {
    for packed in [false, true] {
        let kind = Kind {
            size: 8,
            packed,
            in_order: false,
            event_idx: true,
            spare: 0,
        };
        let mut world = World::new(kind, 1);
        world.resume();
        let region = Arc::clone(&world.notes.region);
        for (offset, entries) in [(64, 7), (64, 9), (72, 8), (1 << 40, 8)] {
            let notes = Inflight::new(Arc::clone(&region), offset, entries);
            let resumed = DeviceRing::resume(&world.config, &world.mem, notes);
            // Behind the beginning is what looks like notes that nobody has begun, and their end lies outside.
            assert!(resumed.is_err(), "{packed} {offset} {entries}");
        }
    }
}

/// A front-end may keep the notes when the driver resets its device, which has nothing in flight then. The driver may begin
/// again with a queue of another size.
#[test]
fn split_queue_that_began_anew_is_served_if_nothing_was_in_flight() {
    let kind = Kind {
        size: 8,
        packed: false,
        in_order: false,
        event_idx: true,
        spare: 2,
    };
    for in_flight in [false, true] {
        let mut world = World::new(kind, 1);
        world.resume();
        if in_flight {
            let at = |offset| GuestAddress(DATA + offset);
            let mut driver = world.driver.session(&world.mem).unwrap();
            driver.add(&[], &[Segment::new(at(0), 8)], 0).unwrap();
            driver.publish().unwrap();
            let device = world.device.as_mut().unwrap();
            let mut session = device.session(&world.mem).unwrap();
            assert!(session.pop(&mut ChainBuf::new(8)).unwrap().is_some());
        }
        let used_index = GuestAddress(world.config.used_ring.0 + 2);
        world.mem.write_obj(100_u16, used_index).unwrap();
        for entries in [10, 8] {
            let notes = world.notes.clone();
            let notes = Inflight::new(Arc::clone(&notes.region), notes.offset, entries);
            let resumed = DeviceRing::resume(&world.config, &world.mem, notes);
            assert_eq!(resumed.is_err(), in_flight);
            if let Ok(device) = resumed {
                assert_eq!((device.next_avail(), device.next_used()), (100, 100));
            }
        }
    }
}

/// The layout of the specification, byte by byte.
#[test]
fn notes_are_those_of_the_specification() {
    for packed in [false, true] {
        let kind = Kind {
            size: 8,
            packed,
            in_order: false,
            event_idx: true,
            spare: 0,
        };
        let mut world = World::new(kind, 1);
        world.resume();
        let at = |offset| GuestAddress(DATA + offset);
        let mut driver = world.driver.session(&world.mem).unwrap();
        for token in 0..2 {
            let (readable, writable) = ([Segment::new(at(0), 8)], [Segment::new(at(8), 8)]);
            driver.add(&readable, &writable, token).unwrap();
        }
        driver.publish().unwrap();
        let device = world.device.as_mut().unwrap();
        let mut buf = ChainBuf::new(8);
        let mut session = device.session(&world.mem).unwrap();
        let first = session.pop(&mut buf).unwrap().unwrap().head();
        let second = session.pop(&mut buf).unwrap().unwrap().head();
        session.push_used(first, 8).unwrap();
        session.publish().unwrap();
        let notes = world.notes.region.get_slice(64, Inflight::len(8, packed));
        let notes = notes.unwrap();
        let u8_at = |at| notes.read_obj::<u8>(at).unwrap();
        let u16_at = |at| notes.read_obj::<u16>(at).unwrap();
        let u64_at = |at| notes.read_obj::<u64>(at).unwrap();
        assert_eq!((u64_at(0), u16_at(8), u16_at(10)), (0, 1, 8));
        if packed {
            // free_head, old_free_head, used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter
            let head = [12, 14, 16, 18].map(u16_at);
            assert_eq!((head, u8_at(20), u8_at(21)), ([0, 0, 2, 2], 1, 1));
            // The second chain has the third and fourth entry.
            let entry = 32 + 2 * 32;
            assert_eq!([0, 32, 64, 96].map(|at| u8_at(32 + at)), [0, 0, 1, 0]);
            assert_eq!([2, 4, 6].map(|at| u16_at(entry + at)), [3, 3, 2]);
            assert_eq!(u64_at(entry + 8), 1);
            let last = entry + 32;
            assert_eq!(u16_at(last + 16), second);
            assert_eq!(u16_at(last + 18) & 7, 2, "writable, and no other follows");
            assert_eq!(notes.read_obj::<u32>(last + 20).unwrap(), 8);
            assert_eq!(u64_at(last + 24), DATA + 8);
            assert_eq!(u64_at(entry + 24), DATA);
        } else {
            // last_batch_head, used_idx
            assert_eq!((u16_at(12), u16_at(14)), (first, 65_531));
            let [first, second] = [first, second].map(|head| 16 + 16 * usize::from(head));
            assert_eq!((u8_at(first), u64_at(first + 8)), (0, 0));
            assert_eq!((u8_at(second), u64_at(second + 8)), (1, 1));
        }
    }
}
