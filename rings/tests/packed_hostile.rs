//! Garbage in a packed ring, random and structured: the device side stays inside guest memory, takes a
//! bounded number of steps, and agrees with a plain reading of VIRTIO 1.3, 2.8, about every chain it accepts.
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
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

const RING: u64 = 0x1000;
const DRIVER_EVENT: u64 = 0x2000;
const DEVICE_EVENT: u64 = 0x3000;
const TABLES: u64 = 0x4000;
const BORDER: u64 = 0x4f8c;
const END: u64 = 0x6000;
const MAX_SIZE: u16 = 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(RING), (BORDER - RING) as usize),
        (GuestAddress(BORDER), (END - BORDER) as usize),
    ])
    .unwrap()
}

/// A descriptor that is plausible in most of its fields.
#[derive(Debug, Clone)]
struct Desc {
    addr: u64,
    len: u32,
    id: u16,
    flags: u16,
}

impl Desc {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.id.to_le_bytes());
        bytes[14..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    fn read(mem: &GuestMemoryMmap, at: u64) -> Self {
        let mut bytes = [0; 16];
        mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        Self {
            addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            id: u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
            flags: u16::from_le_bytes(bytes[14..].try_into().unwrap()),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

fn desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        6 => RING..END,
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
        8 => Just(0_u16),
        4 => Just(NEXT),
        3 => Just(WRITE),
        2 => Just(NEXT | WRITE),
        3 => Just(INDIRECT),
        1 => 0_u16..8,
        1 => any::<u16>(),
    ];
    let id = prop_oneof![8 => 0_u16..20, 1 => any::<u16>()];
    (addr, len, id, flags).prop_map(|(addr, len, id, flags)| Desc {
        addr,
        len,
        id,
        flags,
    })
}

/// What the driver does between two turns of the device.
#[derive(Debug, Clone)]
enum Move {
    /// Writes any descriptor.
    Desc {
        at: u64,
        desc: Desc,
    },
    /// Writes chains behind what the device has taken, with the turn that makes them available.
    Offer {
        descs: Vec<Desc>,
    },
    Bytes {
        at: u64,
        bytes: Vec<u8>,
    },
}

fn driver_move() -> impl Strategy<Value = Move> {
    let place = (0_u64..20).prop_map(|i| RING + 16 * i);
    let table = TABLES..TABLES + 0x400;
    prop_oneof![
        6 => (table, desc()).prop_map(|(at, desc)| Move::Desc { at, desc }),
        1 => (place, desc()).prop_map(|(at, desc)| Move::Desc { at, desc }),
        8 => prop::collection::vec(desc(), 1..12).prop_map(|descs| Move::Offer { descs }),
        1 => (RING..END, prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(at, bytes)| Move::Bytes { at, bytes }),
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
        4 => prop::collection::vec(driver_move(), 1..8).prop_map(Turn::Driver),
        4 => (1_u16..40).prop_map(Turn::Pop),
        3 => (0_usize..20, any::<bool>())
            .prop_map(|(count, publish)| Turn::Return { count, publish }),
        1 => (0_u16..20).prop_map(Turn::Rewind),
        1 => any::<bool>().prop_map(Turn::Notifications),
    ]
}

fn apply(mem: &GuestMemoryMmap, what: &Move, ring: &DeviceRing) {
    // What sticks out of memory is not written.
    let store = |at: u64, bytes: &[u8]| {
        let _ = mem.write(bytes, GuestAddress(at)).unwrap_or(0);
    };
    match what {
        Move::Desc { at, desc } => store(*at, &desc.bytes()),
        Move::Bytes { at, bytes } => store(*at, bytes),
        Move::Offer { descs } => {
            let (mut at, mut wrap) = split(ring.next_avail());
            for desc in descs {
                let mut desc = desc.clone();
                desc.flags &= !(AVAIL | USED);
                desc.flags |= if wrap { AVAIL } else { USED };
                store(RING + 16 * u64::from(at), &desc.bytes());
                at += 1;
                if at == ring.size() {
                    (at, wrap) = (0, !wrap);
                }
            }
        }
    }
}

fn split(index: u16) -> (u16, bool) {
    (index & 0x7fff, index & 0x8000 != 0)
}

/// What stands in the ring where the device goes on, read plainly: its id, its descriptors, and the segments
/// if nothing is wrong with them. `None` if there is nothing, or no end to it.
fn oracle(
    mem: &GuestMemoryMmap,
    ring: &DeviceRing,
    indirect: bool,
) -> Option<(u16, Option<[Vec<Segment>; 2]>)> {
    let (mut at, wrap) = split(ring.next_avail());
    let first = Desc::read(mem, RING + 16 * u64::from(at));
    if first.has(AVAIL) != wrap || first.has(USED) == wrap {
        return None;
    }
    let mut direct = Vec::new();
    loop {
        let desc = Desc::read(mem, RING + 16 * u64::from(at));
        direct.push(desc.clone());
        if !desc.has(NEXT) {
            break;
        }
        if direct.len() == usize::from(ring.size()) {
            return None;
        }
        at = (at + 1) % ring.size();
    }
    let id = direct.last().unwrap().id;
    let inside = |addr: u64, len: u32| {
        len > 0
            && GuestMemory::check_range(mem, GuestAddress(addr), len as usize, Permissions::Read)
    };
    let all = match direct.as_slice() {
        [table] if table.has(INDIRECT) => {
            let entries = table.len / 16;
            let fits = table.len % 16 == 0 && (1..=u32::from(ring.size())).contains(&entries);
            if !indirect || !fits || !inside(table.addr, table.len) {
                return Some((id, None));
            }
            (0..u64::from(entries))
                .map(|i| Desc::read(mem, table.addr + 16 * i))
                .collect()
        }
        _ if direct.iter().any(|d| d.has(INDIRECT)) => return Some((id, None)),
        _ => direct,
    };
    let writable = all.iter().skip_while(|d| !d.has(WRITE));
    let sound = all.iter().all(|d| inside(d.addr, d.len)) && writable.clone().all(|d| d.has(WRITE));
    let part = |write: bool| {
        all.iter()
            .filter(|d| d.has(WRITE) == write)
            .map(|d| Segment::new(GuestAddress(d.addr), d.len))
            .collect()
    };
    Some((id, sound.then(|| [part(false), part(true)])))
}

proptest! {
    #[test]
    fn device_side_survives(
        size in 1..=MAX_SIZE,
        (event_idx, indirect, in_order, wrap) in any::<(bool, bool, bool, bool)>(),
        at in any::<u16>(),
        turns in prop::collection::vec(turn(), 1..40),
    ) {
        let mem = memory();
        let index = (at % size) | if wrap { 0x8000 } else { 0 };
        let config = RingConfig {
            size,
            desc_table: GuestAddress(RING),
            avail_ring: GuestAddress(DRIVER_EVENT),
            used_ring: GuestAddress(DEVICE_EVENT),
            packed: true,
            in_order,
            event_idx,
            indirect,
            next_avail: index,
            next_used: index,
        };
        let mut ring = DeviceRing::new(&config, &mem).unwrap();
        let mut buf = ChainBuf::new(size);
        let mut held = Vec::new();
        for turn in &turns {
            match turn {
                Turn::Driver(moves) => moves.iter().for_each(|m| apply(&mem, m, &ring)),
                Turn::Pop(max) => for _ in 0..*max {
                    let place = ring.next_avail();
                    let expected = oracle(&mem, &ring, indirect);
                    let mut session = ring.session(&mem).unwrap();
                    match session.pop(&mut buf) {
                        Ok(None) => {
                            prop_assert_eq!(ring.next_avail(), place);
                            prop_assert!(expected.is_none());
                            break;
                        }
                        Err(PopError::Ring(_)) => {
                            prop_assert_eq!(ring.next_avail(), place);
                            break;
                        }
                        Err(PopError::Chain { head, .. }) => {
                            prop_assert_eq!(expected.map(|(id, parts)| (id, parts.is_some())), Some((head, false)));
                            prop_assert!(!held.contains(&head));
                            held.push(head);
                        }
                        Ok(Some(chain)) => {
                            let (id, parts) = expected.unwrap();
                            let [readable, writable] = parts.unwrap();
                            prop_assert_eq!(chain.head(), id);
                            prop_assert_eq!(chain.readable(), readable);
                            prop_assert_eq!(chain.writable(), writable);
                            prop_assert!(!held.contains(&id));
                            // The device uses the buffers, wherever they lie.
                            let mut header = [0; 8];
                            let read = read_segments(&mem, chain.readable(), 0, &mut header);
                            prop_assert_eq!(read.is_ok(), chain.readable_len() >= 8);
                            let written = write_segments(&mem, chain.writable(), 0, &header);
                            prop_assert_eq!(written.is_ok(), chain.writable_len() >= 8);
                            held.push(id);
                        }
                    }
                },
                Turn::Return { count, publish } => {
                    let mut session = ring.session(&mem).unwrap();
                    for _ in 0..*count {
                        let Some(id) = held.pop() else { break };
                        session.push_used(id, 1).unwrap();
                    }
                    if *publish {
                        session.publish().unwrap();
                    }
                }
                Turn::Rewind(chains) => {
                    let before = ring.in_flight();
                    ring.session(&mem).unwrap().rewind(*chains);
                    // Chains were returned from the end, so the last ones held are the last ones taken.
                    let back = usize::from(before - ring.in_flight());
                    prop_assert!(back <= usize::from(*chains));
                    held.truncate(held.len() - back);
                }
                Turn::Notifications(on) => {
                    let mut session = ring.session(&mem).unwrap();
                    if *on {
                        let _ = session.enable_notifications();
                    } else {
                        session.disable_notifications().unwrap();
                    }
                }
            }
            prop_assert_eq!(usize::from(ring.in_flight()), held.len());
            prop_assert!(held.len() <= usize::from(size));
            for index in [ring.next_avail(), ring.next_used()] {
                prop_assert!(split(index).0 < size);
            }
        }
    }

    /// All of ring memory is noise.
    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0x200), size in 1_u16..16, indirect in any::<bool>()) {
        let mem = memory();
        for (i, part) in [RING, TABLES].into_iter().zip(bytes.chunks(0x100)) {
            mem.write_slice(part, GuestAddress(i)).unwrap();
        }
        let layout = RingConfig {
            size,
            desc_table: GuestAddress(RING),
            avail_ring: GuestAddress(DRIVER_EVENT),
            used_ring: GuestAddress(DEVICE_EVENT),
            packed: true,
            in_order: false,
            event_idx: true,
            indirect,
            next_avail: 0x8000,
            next_used: 0x8000,
        };
        let mut ring = DeviceRing::new(&layout, &mem).unwrap();
        let mut buf = ChainBuf::new(size);
        let mut session = ring.session(&mem).unwrap();
        let mut taken = 0;
        while let Ok(Some(_)) | Err(PopError::Chain { .. }) = session.pop(&mut buf) {
            taken += 1;
        }
        prop_assert!(taken <= size);
    }

    /// A ring placed anywhere is refused or usable, never a panic.
    #[test]
    fn placement(
        size in any::<u16>(),
        small in any::<bool>(),
        ring in prop_oneof![RING..END, any::<u64>()],
        driver in prop_oneof![RING..END, any::<u64>()],
        device in prop_oneof![RING..END, any::<u64>()],
        (next_avail, next_used) in any::<(u16, u16)>(),
    ) {
        let mem = memory();
        let config = RingConfig {
            size: if small { size % 64 } else { size },
            desc_table: GuestAddress(ring & !15),
            avail_ring: GuestAddress(driver & !3),
            used_ring: GuestAddress(device & !3),
            packed: true,
            in_order: true,
            event_idx: true,
            indirect: true,
            next_avail,
            next_used,
        };
        if let Ok(mut ring) = DeviceRing::new(&config, &mem) {
            let mut buf = ChainBuf::new(config.size);
            let popped = ring.session(&mem).unwrap().pop(&mut buf).unwrap().is_some();
            // Zeroes are neither available nor used in any round.
            prop_assert!(!popped);
        }
    }

    /// The driver side meets a device that writes noise into the ring.
    #[test]
    fn driver_side_survives(
        (event_idx, in_order) in any::<(bool, bool)>(),
        writes in prop::collection::vec(
            (0_u16..8, prop_oneof![0_u16..8, any::<u16>()], 0_u32..20, any::<u16>()), 1..64),
    ) {
        let mem = memory();
        let mut layout = DriverLayout::packed(GuestAddress(RING), 8, 2).unwrap();
        if in_order {
            layout = layout.in_order();
        }
        let mut ring = DriverRing::new(layout, event_idx, &mem).unwrap();
        let buffer = [Segment::new(GuestAddress(TABLES), 8)];
        let mut added = 0_u32;
        let mut returned = 0;
        for (at, id, len, flags) in writes {
            let mut session = ring.session(&mem).unwrap();
            if session.add(&buffer, &buffer, added).is_ok() {
                added += 1;
            }
            if session.add_indirect(&buffer, &buffer, added).is_ok() {
                added += 1;
            }
            session.publish().unwrap();
            let turn = [0, AVAIL | USED, AVAIL, USED][usize::from((flags >> 8) & 3)];
            let desc = Desc { addr: 0, len, id, flags: flags & !(AVAIL | USED) | turn };
            mem.write_slice(&desc.bytes(), GuestAddress(RING + 16 * u64::from(at))).unwrap();
            mem.write_obj(u32::from(flags) << 8, layout.used_ring()).unwrap();
            while let Ok(Some((token, len))) = session.poll_used() {
                prop_assert!(token < added && len <= 8);
                returned += 1;
            }
            prop_assert_eq!(u32::from(ring.outstanding()) + returned, added);
            prop_assert!(ring.free() <= 8);
        }
    }
}
