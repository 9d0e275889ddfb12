//! Garbage in ring memory, random and structured: the device side stays inside guest memory, takes
//! a bounded number of steps, and agrees with `virtio-queue` about every chain it accepts.
// Helpers of tests: a panic is the way to fail, and values are small.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation
)]

use proptest::prelude::*;
use ringside_rings::{
    ChainBuf, DeviceRing, DriverLayout, DriverRing, PopError, RingConfig, Segment, read_segments,
    write_segments,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLES: u64 = 0x4000;
const BORDER: u64 = 0x4f8c;
const END: u64 = 0x6000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(DESC), (BORDER - DESC) as usize),
        (GuestAddress(BORDER), (END - BORDER) as usize),
    ])
    .unwrap()
}

/// A descriptor that is plausible in most of its fields.
#[derive(Debug, Clone)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        6 => DESC..END,
        4 => TABLES..TABLES + 0x400,
        2 => (BORDER - 40)..BORDER + 8,
        2 => (END - 40)..END + 8,
        1 => (u64::MAX - 64)..=u64::MAX,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        5 => 1_u32..64,
        3 => (0_u32..20).prop_map(|n| n * 16),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        4 => Just(0_u16),
        4 => Just(1),
        3 => Just(2),
        3 => Just(3),
        3 => Just(4),
        1 => 0_u16..8,
        1 => any::<u16>(),
    ];
    let next = prop_oneof![8 => 0_u16..20, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    })
}

/// What the driver does between two turns of the device.
#[derive(Debug, Clone)]
enum Move {
    Desc {
        table: u64,
        index: u16,
        desc: Desc,
    },
    Bytes {
        at: u64,
        bytes: Vec<u8>,
    },
    Head {
        slot: u16,
        head: u16,
    },
    /// Makes a chain available as a driver may: a head that is free, if there is room.
    Offer(u16),
    /// Makes any head available.
    OfferAny(u16),
    Index(u16),
}

fn driver_move() -> impl Strategy<Value = Move> {
    let table = prop_oneof![3 => Just(DESC), 1 => TABLES..TABLES + 0x400];
    prop_oneof![
        80 => (table, 0_u16..16, desc())
            .prop_map(|(table, index, desc)| Move::Desc { table, index, desc }),
        10 => (DESC..END, prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(at, bytes)| Move::Bytes { at, bytes }),
        10 => (0_u16..16, 0_u16..20).prop_map(|(slot, head)| Move::Head { slot, head }),
        100 => (0_u16..16).prop_map(Move::Offer),
        2 => (0_u16..20).prop_map(Move::OfferAny),
        1 => any::<u16>().prop_map(Move::Index),
    ]
}

#[derive(Debug, Clone)]
enum Turn {
    Driver(Vec<Move>),
    Pop(u16),
    Return { count: usize, publish: bool },
    Rewind(u16),
    Notifications(bool),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => prop::collection::vec(driver_move(), 1..16).prop_map(Turn::Driver),
        4 => (1_u16..40).prop_map(Turn::Pop),
        3 => (0_usize..20, any::<bool>())
            .prop_map(|(count, publish)| Turn::Return { count, publish }),
        1 => (0_u16..20).prop_map(Turn::Rewind),
        1 => any::<bool>().prop_map(Turn::Notifications),
    ]
}

struct Attack {
    mem: GuestMemoryMmap,
    idx: u16,
    /// Heads made available, in order.
    offered: Vec<u16>,
}

impl Attack {
    fn store(&self, at: u64, bytes: &[u8]) {
        // What sticks out of memory is not written.
        let _ = self.mem.write(bytes, GuestAddress(at)).unwrap_or(0);
    }

    fn head(&self, slot: u16, head: u16) {
        self.store(AVAIL + 4 + 2 * u64::from(slot), &head.to_le_bytes());
    }

    fn offer(&mut self, ring: &DeviceRing, head: u16) {
        self.head(self.idx % ring.size(), head);
        self.offered.push(head);
        self.index(self.idx.wrapping_add(1));
    }

    fn index(&mut self, idx: u16) {
        self.idx = idx;
        self.store(AVAIL + 2, &idx.to_le_bytes());
    }

    fn apply(&mut self, what: &Move, ring: &DeviceRing, held: &[u16]) {
        match what {
            Move::Desc { table, index, desc } => {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
                bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
                bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
                bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
                self.store(table + 16 * u64::from(*index), &bytes);
            }
            Move::Bytes { at, bytes } => self.store(*at, bytes),
            Move::Head { slot, head } => self.head(*slot, *head),
            Move::Offer(first) => {
                let waiting = self.idx.wrapping_sub(ring.next_avail());
                let outstanding = self.idx.wrapping_sub(ring.next_used());
                let mut heads = (0..ring.size()).map(|i| first.wrapping_add(i) % ring.size());
                let offered = |head: &u16| {
                    (0..waiting).any(|i| self.offered.iter().rev().nth(i.into()) == Some(head))
                };
                let free = heads.find(|head| !held.contains(head) && !offered(head));
                if let Some(head) = free.filter(|_| outstanding < ring.size()) {
                    self.offer(ring, head);
                }
            }
            Move::OfferAny(head) => self.offer(ring, *head),
            Move::Index(idx) => self.index(*idx),
        }
    }
}

fn config(size: u16, event_idx: bool, indirect: bool, index: u16) -> RingConfig {
    RingConfig {
        size,
        desc_table: GuestAddress(DESC),
        avail_ring: GuestAddress(AVAIL),
        used_ring: GuestAddress(USED),
        packed: false,
        in_order: false,
        event_idx,
        indirect,
        next_avail: index,
        next_used: index,
    }
}

/// What `virtio-queue` finds at `head`: all descriptors' ranges, readable then writable.
fn oracle(
    mem: &GuestMemoryMmap,
    ring: &DeviceRing,
    head_place: u16,
) -> Option<(u16, [Vec<Segment>; 2])> {
    let mut queue = Queue::new(ring.size()).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(DESC))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(AVAIL))
        .unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_next_avail(head_place);
    queue.set_ready(true);
    let chain = queue.pop_descriptor_chain(mem)?;
    let head = chain.head_index();
    let part = |writable: bool| {
        chain
            .clone()
            .filter(|d| d.is_write_only() == writable)
            .map(|d| Segment::new(d.addr(), d.len()))
            .collect()
    };
    Some((head, [part(false), part(true)]))
}

proptest! {
    #[test]
    fn device_side_survives(
        log_size in prop_oneof![1 => 0_u32..3, 4 => 3_u32..5],
        start in prop::collection::vec(desc(), 16),
        event_idx in any::<bool>(),
        indirect in any::<bool>(),
        index in prop_oneof![Just(0_u16), any::<u16>()],
        turns in prop::collection::vec(turn(), 1..40),
    ) {
        let size = 1_u16 << log_size;
        let mut attack = Attack { mem: memory(), idx: index, offered: Vec::new() };
        attack.index(index);
        let config = config(size, event_idx, indirect, index);
        let mut ring = DeviceRing::new(&config, &attack.mem).unwrap();
        let mut buf = ChainBuf::new(size);
        let mut held = Vec::new();
        for (i, desc) in (0..).zip(&start) {
            let desc = desc.clone();
            attack.apply(&Move::Desc { table: DESC, index: i, desc }, &ring, &held);
        }
        for turn in &turns {
            match turn {
                Turn::Driver(moves) => moves.iter().for_each(|m| attack.apply(m, &ring, &held)),
                Turn::Pop(max) => for _ in 0..*max {
                    let place = ring.next_avail();
                    let expected = oracle(&attack.mem, &ring, place);
                    let mut session = ring.session(&attack.mem).unwrap();
                    match session.pop(&mut buf) {
                        Ok(None) | Err(PopError::Ring(_)) => {
                            prop_assert_eq!(ring.next_avail(), place);
                            // A queue that broke is broken for good; begin another.
                            attack.index(place);
                            break;
                        }
                        Err(PopError::Chain { head, .. }) => held.push(head),
                        Ok(Some(chain)) => {
                            prop_assert!(chain.head() < size && !held.contains(&chain.head()));
                            let segments = || chain.readable().iter().chain(chain.writable());
                            prop_assert!((1..=usize::from(size)).contains(&segments().count()));
                            for s in segments() {
                                prop_assert!(s.len > 0);
                                prop_assert!(GuestMemory::check_range(
                                    &attack.mem, s.addr, s.len as usize, Permissions::Read));
                            }
                            let sum = |part: &[Segment]| -> u64 {
                                part.iter().map(|s| u64::from(s.len)).sum()
                            };
                            prop_assert_eq!(chain.readable_len(), sum(chain.readable()));
                            prop_assert_eq!(chain.writable_len(), sum(chain.writable()));
                            if let Some((head, [readable, writable])) = expected {
                                prop_assert_eq!(chain.head(), head);
                                prop_assert_eq!(chain.readable(), readable);
                                prop_assert_eq!(chain.writable(), writable);
                            }
                            // The device uses the buffers, wherever they lie.
                            let mut header = [0; 8];
                            let read = read_segments(&attack.mem, chain.readable(), 0, &mut header);
                            prop_assert_eq!(read.is_ok(), chain.readable_len() >= 8);
                            let written = write_segments(&attack.mem, chain.writable(), 0, &header);
                            prop_assert_eq!(written.is_ok(), chain.writable_len() >= 8);
                            held.push(chain.head());
                        }
                    }
                },
                Turn::Return { count, publish } => {
                    let mut session = ring.session(&attack.mem).unwrap();
                    for _ in 0..*count {
                        let Some(head) = held.pop() else { break };
                        session.push_used(head, 1).unwrap();
                    }
                    if *publish {
                        session.publish().unwrap();
                    }
                }
                Turn::Rewind(chains) => {
                    let before = ring.in_flight();
                    ring.session(&attack.mem).unwrap().rewind(*chains);
                    // Chains were returned from the end, so the last ones held are the last ones taken.
                    let back = usize::from(before - ring.in_flight());
                    prop_assert!(back <= usize::from(*chains));
                    held.truncate(held.len() - back);
                }
                Turn::Notifications(on) => {
                    let mut session = ring.session(&attack.mem).unwrap();
                    if *on {
                        let _ = session.enable_notifications();
                    } else {
                        session.disable_notifications().unwrap();
                    }
                }
            }
            prop_assert_eq!(usize::from(ring.in_flight()), held.len());
            prop_assert!(held.len() <= usize::from(size));
        }
    }

    /// All of ring memory is noise.
    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0x400), idx in 0_u16..4, indirect in any::<bool>()) {
        let mem = memory();
        for (i, part) in [DESC, AVAIL, USED, TABLES].into_iter().zip(bytes.chunks(0x100)) {
            mem.write_slice(part, GuestAddress(i)).unwrap();
        }
        mem.write_obj(idx.to_le(), GuestAddress(AVAIL + 2)).unwrap();
        let mut ring = DeviceRing::new(&config(16, true, indirect, 0), &mem).unwrap();
        let mut buf = ChainBuf::new(16);
        let mut session = ring.session(&mem).unwrap();
        let mut taken = 0;
        while let Ok(Some(_)) | Err(PopError::Chain { .. }) = session.pop(&mut buf) {
            taken += 1;
        }
        prop_assert!(taken <= idx);
    }

    /// A ring placed anywhere is refused or usable, never a panic.
    #[test]
    fn placement(
        size in any::<u16>(),
        log in 0_u32..16,
        exact in any::<bool>(),
        desc in prop_oneof![DESC..END, any::<u64>()],
        avail in prop_oneof![DESC..END, any::<u64>()],
        used in prop_oneof![DESC..END, any::<u64>()],
    ) {
        let mem = memory();
        let size = if exact { size } else { 1 << log };
        let config = RingConfig {
            desc_table: GuestAddress(desc & !15),
            avail_ring: GuestAddress(avail & !1),
            used_ring: GuestAddress(used & !3),
            ..config(size, true, true, 0)
        };
        if let Ok(mut ring) = DeviceRing::new(&config, &mem) {
            let mut buf = ChainBuf::new(size);
            prop_assert!(ring.session(&mem).unwrap().pop(&mut buf).unwrap().is_none());
        }
    }

    /// The driver side meets a device that writes noise into the used ring.
    #[test]
    fn driver_side_survives(
        event_idx in any::<bool>(),
        writes in prop::collection::vec(
            (0_u64..70, prop_oneof![0_u16..8, any::<u16>()]), 1..64),
    ) {
        let mem = memory();
        let layout = DriverLayout::new(GuestAddress(DESC), 8, 2).unwrap();
        let mut ring = DriverRing::new(layout, event_idx, &mem).unwrap();
        let buffer = [Segment::new(GuestAddress(TABLES), 8)];
        let mut added = 0_u32;
        let mut returned = 0;
        for (offset, value) in writes {
            let mut session = ring.session(&mem).unwrap();
            if session.add(&buffer, &buffer, added).is_ok() {
                added += 1;
            }
            if session.add_indirect(&buffer, &buffer, added).is_ok() {
                added += 1;
            }
            session.publish().unwrap();
            mem.write_obj(value.to_le(), GuestAddress(layout.used_ring().0 + (offset & !1))).unwrap();
            while let Ok(Some((token, len))) = session.poll_used() {
                prop_assert!(token < added && len <= 8);
                returned += 1;
            }
            prop_assert_eq!(u32::from(ring.outstanding()) + returned, added);
        }
    }
}
