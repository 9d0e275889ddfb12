//! The driver side against the device side: whatever the mix of chains, batches and suppression,
//! every request arrives once, in order, with its contents, and comes back to the one who made it.
// Helpers of tests: a panic is the way to fail, and values are small.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation
)]

use std::collections::VecDeque;

use proptest::prelude::*;
use ringside_rings::{
    ChainBuf, DeviceRing, DriverError, DriverLayout, DriverRing, RingConfig, Segment,
    read_segments, write_segments,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const BASE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
/// Two regions that adjoin: segments come to lie across their border.
const DATA_BORDER: u64 = DATA + 0x8_0000 - 37;
const DATA_LEN: u64 = 0x10_0000;

fn memory() -> GuestMemoryMmap {
    let border = usize::try_from(DATA_BORDER - BASE).unwrap();
    let rest = usize::try_from(DATA + DATA_LEN - DATA_BORDER).unwrap();
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(BASE), border),
        (GuestAddress(DATA_BORDER), rest),
    ])
    .unwrap()
}

#[derive(Debug, Clone)]
enum Op {
    Add {
        readable: Vec<u32>,
        writable: Vec<u32>,
        indirect: bool,
    },
    Publish,
    /// The device takes up to this many chains and gives back the last few of them.
    Take {
        max: u16,
        rewind: u16,
    },
    /// The device returns chains in an order of its own.
    Return {
        picks: Vec<usize>,
        publish: bool,
    },
    DeviceSleeps,
    Collect {
        max: usize,
    },
    DriverSleeps,
}

fn op() -> impl Strategy<Value = Op> {
    let lens = || prop::collection::vec(1_u32..200, 0..5);
    prop_oneof![
        5 => (lens(), lens(), any::<bool>())
            .prop_map(|(readable, writable, indirect)| Op::Add { readable, writable, indirect }),
        3 => Just(Op::Publish),
        3 => (1_u16..20, prop_oneof![3 => Just(0_u16), 1 => 0_u16..4])
            .prop_map(|(max, rewind)| Op::Take { max, rewind }),
        3 => (prop::collection::vec(any::<usize>(), 0..12), any::<bool>())
            .prop_map(|(picks, publish)| Op::Return { picks, publish }),
        2 => Just(Op::DeviceSleeps),
        2 => (1_usize..20).prop_map(|max| Op::Collect { max }),
        2 => Just(Op::DriverSleeps),
    ]
}

#[derive(Debug, Clone, PartialEq)]
struct Request {
    slot: usize,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    seed: u8,
}

impl Request {
    /// How many bytes the device answers: not always as many as there is room for.
    fn answer_len(&self) -> usize {
        let room = bytes(&self.writable);
        if self.seed.is_multiple_of(3) {
            room / 2
        } else {
            room
        }
    }
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| seed.wrapping_mul(31).wrapping_add((i % 251) as u8))
        .collect()
}

fn bytes(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.len as usize).sum()
}

/// A request the device holds: its head, and what the driver sent with it.
struct Held {
    head: u16,
    request: Request,
    content: Vec<u8>,
}

/// How a queue is laid out and used.
#[derive(Debug, Clone, Copy)]
struct Kind {
    size: u16,
    packed: bool,
    in_order: bool,
    indirect: bool,
    event_idx: bool,
    /// Where both indices begin, as far as the format has such an index.
    start: u16,
}

fn kind(packed: impl Strategy<Value = bool>) -> impl Strategy<Value = Kind> {
    let start = prop_oneof![Just(0_u16), 65400_u16..=65535, any::<u16>()];
    let flags = (packed, any::<bool>(), any::<bool>(), any::<bool>());
    (0_u32..8, 1_u16..128, flags, start).prop_map(
        |(log_size, odd, (packed, in_order, indirect, event_idx), start)| {
            let size = 1 << log_size;
            Kind {
                // Packed queues have any size.
                size: if packed && odd % 3 > 0 { odd } else { size },
                packed,
                in_order,
                indirect,
                event_idx,
                start,
            }
        },
    )
}

/// What the two sides see: the same, whatever the format.
#[derive(Debug, Clone, PartialEq)]
enum Seen {
    Refused(usize),
    Taken(Request),
    InFlight(u16),
    Collected(Request, u32),
    Free(u16),
    DeviceSleeps(bool),
    DriverSleeps(bool),
}

struct World {
    mem: GuestMemoryMmap,
    kind: Kind,
    seen: Vec<Seen>,
    driver: DriverRing<Request>,
    device: DeviceRing,
    buf: ChainBuf,
    /// Added, not published; published, not taken; taken.
    added: VecDeque<Request>,
    available: VecDeque<Request>,
    held: Vec<Held>,
    /// Slots of the chains that the device has not shown as used, in the order in which they were taken, and
    /// those of them that were returned.
    unshown: VecDeque<usize>,
    returned: Vec<usize>,
    /// Shown, and not collected.
    used: usize,
    free_slots: Vec<usize>,
    device_asleep: bool,
    driver_asleep: bool,
    /// Notifications since the receiving side last asked for them.
    kicks: u32,
    calls: u32,
    seed: u8,
}

impl World {
    fn new(kind: Kind) -> Self {
        let Kind {
            size, event_idx, ..
        } = kind;
        let mem = memory();
        let entries = if kind.indirect { size } else { 0 };
        let (mut layout, start) = if kind.packed {
            let layout = DriverLayout::packed(GuestAddress(BASE), size, entries).unwrap();
            // A place, with the wrap counter in bit 15.
            (
                layout,
                ((kind.start & 0x7fff) % size) | (kind.start & 0x8000),
            )
        } else {
            let layout = DriverLayout::new(GuestAddress(BASE), size, entries).unwrap();
            (layout, kind.start)
        };
        if kind.in_order {
            layout = layout.in_order();
        }
        assert!(layout.end().0 <= DATA);
        let driver = DriverRing::starting_at(layout, event_idx, start, &mem).unwrap();
        let config = RingConfig {
            next_avail: start,
            next_used: start,
            ..layout.config(event_idx)
        };
        let device = DeviceRing::new(&config, &mem).unwrap();
        Self {
            mem,
            kind,
            seen: Vec::new(),
            driver,
            device,
            buf: ChainBuf::new(size),
            added: VecDeque::new(),
            available: VecDeque::new(),
            held: Vec::new(),
            unshown: VecDeque::new(),
            returned: Vec::new(),
            used: 0,
            free_slots: (0..128).collect(),
            // Neither side has told the other that it need not notify.
            device_asleep: true,
            driver_asleep: true,
            kicks: 0,
            calls: 0,
            seed: 0,
        }
    }

    fn request(&mut self, readable: &[u32], writable: &[u32]) -> Request {
        let slot = self.free_slots.pop().unwrap();
        self.seed = self.seed.wrapping_add(1);
        let mut addr = DATA + slot as u64 * (DATA_LEN / 128);
        let mut place = |len: &u32| {
            let segment = Segment::new(GuestAddress(addr), *len);
            addr += u64::from(*len) + 3;
            segment
        };
        let readable: Vec<_> = readable.iter().map(&mut place).collect();
        let writable: Vec<_> = writable.iter().map(&mut place).collect();
        write_segments(
            &self.mem,
            &readable,
            0,
            &pattern(self.seed, bytes(&readable)),
        )
        .unwrap();
        Request {
            slot,
            readable,
            writable,
            seed: self.seed,
        }
    }

    fn add(&mut self, readable: &[u32], writable: &[u32], indirect: bool) {
        if self.free_slots.is_empty() {
            return;
        }
        let request = self.request(readable, writable);
        let free = self.driver.free();
        let needed = if indirect {
            1
        } else {
            readable.len() + writable.len()
        };
        let mut session = self.driver.session(&self.mem).unwrap();
        let (r, w, token) = (&request.readable, &request.writable, request.clone());
        let result = if indirect {
            session.add_indirect(r, w, token)
        } else {
            session.add(r, w, token)
        };
        match result {
            Ok(_) => {
                assert!(needed <= usize::from(free) && needed > 0);
                self.added.push_back(request);
            }
            Err(DriverError::Full { .. }) => {
                assert!(needed > usize::from(free));
                self.seen.push(Seen::Refused(request.slot));
                self.free_slots.push(request.slot);
            }
            Err(DriverError::Empty) => {
                assert!(readable.is_empty() && writable.is_empty());
                self.free_slots.push(request.slot);
            }
            Err(DriverError::TooLong { segments, limit }) => {
                assert!(segments > usize::from(limit));
                self.free_slots.push(request.slot);
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn publish(&mut self) {
        let notify = self.driver.session(&self.mem).unwrap().publish().unwrap();
        let some = !self.added.is_empty();
        self.available.append(&mut self.added);
        if self.device_asleep {
            assert_eq!(
                notify, some,
                "a device that sleeps is woken by every chain, and by nothing else"
            );
        } else if !self.kind.event_idx {
            assert!(!notify, "notifications are switched off");
        }
        if notify {
            self.kicks += 1;
            assert!(
                self.device_asleep || self.kicks == 1,
                "at most one late notification"
            );
            self.wake_device();
        }
    }

    fn wake_device(&mut self) {
        self.device_asleep = false;
        self.device
            .session(&self.mem)
            .unwrap()
            .disable_notifications()
            .unwrap();
    }

    fn take(&mut self, max: u16, rewind: u16) {
        if self.device_asleep {
            return;
        }
        let mut session = self.device.session(&self.mem).unwrap();
        let mut taken = Vec::new();
        for _ in 0..max {
            let Some(chain) = session.pop(&mut self.buf).unwrap() else {
                assert!(self.available.is_empty());
                break;
            };
            let request = self.available.pop_front().unwrap();
            assert_eq!(chain.readable(), request.readable);
            assert_eq!(chain.writable(), request.writable);
            assert_eq!(chain.readable_len() as usize, bytes(&request.readable));
            assert_eq!(chain.writable_len() as usize, bytes(&request.writable));
            let mut content = vec![0; bytes(&request.readable)];
            read_segments(&self.mem, chain.readable(), 0, &mut content).unwrap();
            self.seen.push(Seen::Taken(request.clone()));
            taken.push(Held {
                head: chain.head(),
                request,
                content,
            });
        }
        let rewind = rewind.min(taken.len() as u16);
        session.rewind(rewind);
        for _ in 0..rewind {
            self.available.push_front(taken.pop().unwrap().request);
        }
        self.unshown.extend(taken.iter().map(|h| h.request.slot));
        self.held.append(&mut taken);
        self.seen.push(Seen::InFlight(self.device.in_flight()));
        assert_eq!(usize::from(self.device.in_flight()), self.held.len());
    }

    fn give_back(&mut self, picks: &[usize], publish: bool) {
        let mut session = self.device.session(&self.mem).unwrap();
        for pick in picks {
            if self.held.is_empty() {
                break;
            }
            let Held {
                head,
                request,
                content,
            } = self.held.swap_remove(pick % self.held.len());
            assert_eq!(content, pattern(request.seed, content.len()));
            let answer = pattern(!request.seed, request.answer_len());
            write_segments(&self.mem, &request.writable, 0, &answer).unwrap();
            session.push_used(head, answer.len() as u32).unwrap();
            self.returned.push(request.slot);
        }
        if publish {
            let call = session.publish().unwrap();
            // In order, a chain is shown when all those before it are done.
            let (returned, in_order) = (&mut self.returned, self.kind.in_order);
            let before = self.unshown.len();
            let mut waits = false;
            self.unshown.retain(|slot| {
                let done = returned.iter().position(|r| r == slot);
                waits |= in_order && done.is_none();
                match done {
                    Some(place) if !waits => {
                        returned.remove(place);
                        false
                    }
                    _ => true,
                }
            });
            let shown = before - self.unshown.len();
            let some = shown > 0;
            self.used += shown;
            if self.driver_asleep {
                assert_eq!(
                    call, some,
                    "a driver that sleeps is interrupted by every chain"
                );
            } else if !self.kind.event_idx {
                assert!(!call, "interrupts are switched off");
            }
            if call {
                self.calls += 1;
                // The first publication of a device interrupts in any case.
                assert!(
                    self.driver_asleep || self.calls <= 2,
                    "at most one late interrupt"
                );
                self.driver_asleep = false;
                self.driver
                    .session(&self.mem)
                    .unwrap()
                    .disable_interrupts()
                    .unwrap();
            }
        }
    }

    fn device_sleeps(&mut self) {
        let more = self
            .device
            .session(&self.mem)
            .unwrap()
            .enable_notifications()
            .unwrap();
        assert_eq!(more, !self.available.is_empty());
        self.seen.push(Seen::DeviceSleeps(more));
        self.kicks = 0;
        if more {
            self.wake_device();
        } else {
            self.device_asleep = true;
        }
    }

    fn driver_sleeps(&mut self) {
        let mut session = self.driver.session(&self.mem).unwrap();
        let more = session.enable_interrupts().unwrap();
        assert_eq!(more, self.used > 0);
        self.seen.push(Seen::DriverSleeps(more));
        self.calls = 0;
        if more {
            session.disable_interrupts().unwrap();
        }
        self.driver_asleep = !more;
    }

    fn collect(&mut self, max: usize) {
        let mut session = self.driver.session(&self.mem).unwrap();
        for _ in 0..max {
            let Some((request, len)) = session.poll_used().unwrap() else {
                assert_eq!(self.used, 0);
                break;
            };
            self.used -= 1;
            let mut answer = vec![0; request.answer_len()];
            assert_eq!(len as usize, answer.len());
            read_segments(&self.mem, &request.writable, 0, &mut answer).unwrap();
            assert_eq!(answer, pattern(!request.seed, answer.len()));
            self.free_slots.push(request.slot);
            self.seen.push(Seen::Collected(request, len));
        }
        self.seen.push(Seen::Free(self.driver.free()));
    }

    fn run(&mut self, ops: &[Op]) {
        for op in ops {
            match op {
                Op::Add {
                    readable,
                    writable,
                    indirect,
                } => {
                    self.add(readable, writable, *indirect);
                }
                Op::Publish => self.publish(),
                Op::Take { max, rewind } => self.take(*max, *rewind),
                Op::Return { picks, publish } => self.give_back(picks, *publish),
                Op::DeviceSleeps => self.device_sleeps(),
                Op::Collect { max } => self.collect(*max),
                Op::DriverSleeps => self.driver_sleeps(),
            }
        }
    }

    fn finish(mut self) -> Vec<Seen> {
        self.publish();
        self.device_sleeps();
        self.take(u16::MAX, 0);
        assert!(self.available.is_empty());
        self.give_back(&vec![0; self.held.len()], true);
        self.driver_sleeps();
        self.collect(usize::MAX);
        assert_eq!(self.free_slots.len(), 128);
        assert_eq!(self.driver.free(), self.device.size());
        assert_eq!(self.driver.outstanding(), 0);
        assert_eq!(self.device.in_flight(), 0);
        assert_eq!(self.device.next_avail(), self.device.next_used());
        self.seen
    }
}

proptest! {
    #[test]
    fn every_request_comes_back_once(
        kind in kind(any::<bool>()),
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut world = World::new(kind);
        world.run(&ops);
        world.finish();
    }

    /// Nobody can tell from what arrives in which format the queue is.
    #[test]
    fn both_formats_show_the_same(
        split in kind(Just(false)),
        start in any::<u16>(),
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let seen = [split, Kind { packed: true, start, ..split }].map(|kind| {
            let mut world = World::new(kind);
            world.run(&ops);
            world.finish()
        });
        prop_assert_eq!(&seen[0], &seen[1]);
    }
}

/// Both indices go around several times, with a fixed mix of batches.
#[test]
fn indices_wrap() {
    for (packed, in_order, event_idx) in (0..8).map(|i| (i & 1 > 0, i & 2 > 0, i & 4 > 0)) {
        let mut world = World::new(Kind {
            size: 16,
            packed,
            in_order,
            indirect: true,
            event_idx,
            start: if packed { 0x8000 } else { 0 },
        });
        let mut total = 0_u32;
        while total < 150_000 {
            for i in 0..12 {
                world.add(&[16], &[], i % 3 == 0);
            }
            world.publish();
            world.device_sleeps();
            world.take(20, 0);
            world.give_back(&[3, 1, 7, 0, 0, 5, 0, 0, 0, 0, 0, 0], true);
            total += 12;
            world.driver_sleeps();
            world.collect(20);
            world.seen.clear();
        }
        world.finish();
    }
}

/// Bytes outside the segments written to stay as they were.
#[test]
fn copies_stay_inside_segments() {
    let mem = memory();
    let segments = [
        Segment::new(GuestAddress(DATA + 10), 5),
        Segment::new(GuestAddress(DATA_BORDER - 3), 7),
        Segment::new(GuestAddress(DATA + 100), 1),
    ];
    write_segments(&mem, &segments, 4, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    let mut around = [0; 8];
    mem.read_slice(&mut around, GuestAddress(DATA + 9)).unwrap();
    assert_eq!(around, [0, 0, 0, 0, 0, 1, 0, 0]);
    mem.read_slice(&mut around, GuestAddress(DATA_BORDER - 4))
        .unwrap();
    assert_eq!(around, [0, 2, 3, 4, 5, 6, 7, 8]);
    let mut all = [0; 13];
    read_segments(&mem, &segments, 0, &mut all).unwrap();
    assert_eq!(all, [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0]);
    assert!(read_segments(&mem, &segments, 1, &mut all).is_err());
    assert!(read_segments(&mem, &segments, u64::MAX, &mut all).is_err());
    assert!(read_segments(&mem, &segments, 13, &mut []).is_ok());
    assert!(write_segments(&mem, &segments[..1], 5, &[0]).is_err());
}
