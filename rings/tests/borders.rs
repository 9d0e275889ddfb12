//! Addresses at the edges of memory regions and across them, on split and packed queues: regions that adjoin, each mapped by
//! itself, and a hole between two. What each is answered with is the rule in the crate's documentation.
// Helpers of tests: a panic is the way to fail, and values are small.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation
)]

use ringside_rings::{
    Area, ChainBuf, ChainError, DeviceRing, DriverError, DriverLayout, DriverRing, PopError,
    RingConfig, RingError, Segment, in_one_region, read_segments, write_segments,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u16 = 8;
/// Here memory begins, with the queue.
const START: u64 = 0x1000;
const DATA: u64 = 0x4000;
/// Here the first region ends, in the middle of a page so that no mapping goes on behind it, and the next one begins.
const BORDER: u64 = 0x7f40;
/// It is that short, and a third one adjoins.
const SHORT: u64 = BORDER + 16;
/// There is a hole from here …
const HOLE: u64 = 0xbfc0;
/// … to here.
const BEHIND: u64 = 0xc000;
const END: u64 = 0xdf40;

/// Flags of descriptors (VIRTIO 1.3, 2.7.5 and 2.8.1).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Memory from each first address to the second.
fn regions(ranges: &[(u64, u64)]) -> GuestMemoryMmap {
    let range = |&(from, to): &(u64, u64)| (GuestAddress(from), (to - from) as usize);
    GuestMemoryMmap::from_ranges(&ranges.iter().map(range).collect::<Vec<_>>()).unwrap()
}

const RANGES: [(u64, u64); 4] = [
    (START, BORDER),
    (BORDER, SHORT),
    (SHORT, HOLE),
    (BEHIND, END),
];

/// Buffers at the edges of regions, and across those that adjoin.
const INSIDE: &[(u64, u32)] = &[
    (DATA, 8),
    (BORDER - 8, 8),
    (BORDER - 1, 1),
    (BORDER, 1),
    (BORDER, 16),
    (BORDER - 1, 2),
    (BORDER - 5, 9),
    (SHORT - 1, 1),
    (SHORT - 1, 2),
    (SHORT, 100),
    // Across all three.
    (BORDER - 1, 18),
    (BORDER - 300, 1000),
    // Up to the hole, to its last byte, and behind it.
    (BORDER - 300, (HOLE - BORDER + 300) as u32),
    (HOLE - 8, 8),
    (HOLE - 1, 1),
    (BEHIND, 1),
    (BEHIND, (END - BEHIND) as u32),
    (END - 1, 1),
];

/// Buffers of which at least one byte is nowhere.
const OUTSIDE: &[(u64, u32)] = &[
    (HOLE - 8, 9),
    (HOLE - 1, 2),
    (HOLE, 1),
    (BEHIND - 1, 1),
    (BEHIND - 1, 2),
    // Both ends are memory, and what is between them is not.
    (HOLE - 8, 16 + (BEHIND - HOLE) as u32),
    (HOLE - 1, 2 + (BEHIND - HOLE) as u32),
    (SHORT, (END - SHORT) as u32),
    // As before, and a border comes first.
    (BORDER - 5, (HOLE - BORDER + 6) as u32),
    (BORDER - 5, (END - BORDER) as u32),
    (SHORT - 1, u32::MAX - 64),
    (END - 8, 9),
    (END - 1, 2),
    (END, 1),
    (START - 1, 2),
];

fn segment((addr, len): (u64, u32)) -> Segment {
    Segment::new(GuestAddress(addr), len)
}

/// How a queue is laid out and used.
#[derive(Debug, Clone, Copy)]
struct Kind {
    packed: bool,
    in_order: bool,
}

const KINDS: [Kind; 4] = [
    Kind::of(false, false),
    Kind::of(true, false),
    Kind::of(false, true),
    Kind::of(true, true),
];

impl Kind {
    const fn of(packed: bool, in_order: bool) -> Self {
        Self { packed, in_order }
    }

    fn layout(self, tables: u16) -> DriverLayout {
        let base = GuestAddress(START);
        let layout = if self.packed {
            DriverLayout::packed(base, SIZE, tables).unwrap()
        } else {
            DriverLayout::new(base, SIZE, tables).unwrap()
        };
        if self.in_order {
            layout.in_order()
        } else {
            layout
        }
    }

    /// The last area of a queue, and where it ends.
    fn last(self) -> (Area, u64) {
        let start = self.layout(0).used_ring().0;
        if self.packed {
            (Area::DeviceEvent, start + 4)
        } else {
            (Area::Used, start + 6 + 8 * u64::from(SIZE))
        }
    }
}

/// What is to stand in buffers. It repeats itself at no length at which a region could.
fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ seed).collect()
}

/// What the driver has for the device to read, and where it is to answer.
type Request = (Vec<Segment>, Vec<Segment>);

/// A driver that asks for what it likes, and a device that answers all of it.
struct Pair {
    mem: GuestMemoryMmap,
    driver: DriverRing<usize>,
    device: DeviceRing,
    buf: ChainBuf,
    seed: u8,
}

impl Pair {
    fn new(kind: Kind) -> Self {
        Self::inside(regions(&RANGES), kind.layout(SIZE))
    }

    fn inside(mem: GuestMemoryMmap, layout: DriverLayout) -> Self {
        let driver = DriverRing::new(layout, true, &mem).unwrap();
        let device = DeviceRing::new(&layout.config(true), &mem).unwrap();
        Self {
            mem,
            driver,
            device,
            buf: ChainBuf::new(SIZE),
            seed: 0,
        }
    }

    /// A byte, which lies in one region whatever is around it.
    fn get(&self, addr: u64) -> Option<u8> {
        self.mem.read_obj(GuestAddress(addr)).ok()
    }

    fn put(&self, addr: u64, byte: u8) {
        self.mem.write_obj(byte, GuestAddress(addr)).unwrap();
    }

    /// All places of buffers, in order.
    fn places(segments: &[Segment]) -> impl Iterator<Item = u64> + '_ {
        let each = |s: &Segment| (s.addr.0..).take(s.len as usize);
        segments.iter().flat_map(each)
    }

    /// The device's answer to one request: what it reads is what the driver wrote, byte by byte, and so is what it writes, and
    /// nothing around it.
    fn served(&mut self, request: &Request, indirect: bool) {
        let (readable, writable) = request;
        self.seed = self.seed.wrapping_add(37);
        let lens = |part: &[Segment]| part.iter().map(|s| u64::from(s.len)).sum();
        let asked = pattern(self.seed, lens(readable));
        for (addr, byte) in Self::places(readable).zip(&asked) {
            self.put(addr, *byte);
        }
        let edges = writable
            .iter()
            .flat_map(|s| [s.addr.0 - 1, s.addr.0 + u64::from(s.len)]);
        let around: Vec<_> = edges.map(|addr| (addr, self.get(addr))).collect();
        self.offer(std::slice::from_ref(request), indirect);
        let mut session = self.device.session(&self.mem).unwrap();
        let chain = session.pop(&mut self.buf).unwrap().unwrap();
        assert_eq!(
            (chain.readable(), chain.writable()),
            (&readable[..], &writable[..])
        );
        let mut read = vec![0; asked.len()];
        read_segments(&self.mem, chain.readable(), 0, &mut read).unwrap();
        assert!(read == asked, "{readable:x?}");
        let answer = pattern(!self.seed, chain.writable_len());
        write_segments(&self.mem, chain.writable(), 0, &answer).unwrap();
        let (head, len) = (chain.head(), answer.len() as u32);
        session.push_used(head, len).unwrap();
        session.publish().unwrap();
        let found = Self::places(writable).map(|addr| self.get(addr).unwrap());
        assert!(found.eq(answer), "{writable:x?}");
        for (addr, byte) in around {
            assert_eq!(self.get(addr), byte, "{writable:x?}: {addr:#x}");
        }
        assert_eq!(self.returned(), [(0, len)]);
    }

    fn offer(&mut self, requests: &[Request], indirect: bool) {
        let mut session = self.driver.session(&self.mem).unwrap();
        for (number, (readable, writable)) in requests.iter().enumerate() {
            if indirect {
                session.add_indirect(readable, writable, number).unwrap();
            } else {
                session.add(readable, writable, number).unwrap();
            }
        }
        session.publish().unwrap();
    }

    fn returned(&mut self) -> Vec<(usize, u32)> {
        let mut session = self.driver.session(&self.mem).unwrap();
        std::iter::from_fn(|| session.poll_used().unwrap()).collect()
    }

    /// All requests in one turn of the device, which returns each with nothing done. What was wrong with them.
    fn turn(&mut self, requests: &[Request], indirect: bool) -> Vec<Option<ChainError>> {
        self.offer(requests, indirect);
        let mut session = self.device.session(&self.mem).unwrap();
        let mut found = Vec::new();
        loop {
            let (head, error) = match session.pop(&mut self.buf) {
                Ok(None) => break,
                Ok(Some(chain)) => (chain.head(), None),
                Err(PopError::Chain { head, error }) => (head, Some(error)),
                Err(PopError::Ring(error)) => panic!("{error}"),
            };
            session.push_used(head, 0).unwrap();
            found.push(error);
        }
        session.publish().unwrap();
        let all: Vec<_> = (0..requests.len()).map(|number| (number, 0)).collect();
        assert_eq!(self.returned(), all);
        found
    }
}

/// Where the tests' regions adjoin, their mappings do not: who goes on behind the end of one is found out.
#[test]
fn regions_that_adjoin_are_mapped_apart() {
    let mem = regions(&RANGES);
    let host = |addr| mem.get_host_address(GuestAddress(addr)).unwrap().addr();
    for border in [BORDER, SHORT] {
        assert_ne!(host(border - 1) + 1, host(border));
    }
}

#[test]
fn buffers_at_borders_and_across_them_are_served_whole() {
    for kind in KINDS {
        let mut pair = Pair::new(kind);
        for &place in INSIDE {
            let (place, aside) = (segment(place), segment((DATA + 64, 40)));
            for indirect in [false, true] {
                pair.served(&(vec![place], vec![aside]), indirect);
                pair.served(&(vec![aside], vec![place]), indirect);
            }
        }
        // Several of them in one chain, from region to region and back.
        let several: Vec<_> = [(BORDER - 3, 5), (HOLE - 9, 9), (BEHIND, 3), (SHORT - 2, 2)]
            .map(segment)
            .to_vec();
        let others = [(SHORT - 10, 30), (END - 7, 7), (BORDER - 1, 1)].map(segment);
        for indirect in [false, true] {
            pair.served(&(several.clone(), others.to_vec()), indirect);
        }
    }
}

/// Each part of a buffer is found, wherever in it a border is.
#[test]
fn parts_of_a_buffer_across_borders() {
    let mem = regions(&RANGES);
    let all = [segment((BORDER - 3, 3 + 16 + 4))];
    let bytes: Vec<u8> = (1..=23).collect();
    write_segments(&mem, &all, 0, &bytes).unwrap();
    let region = |addr| {
        RANGES
            .iter()
            .position(|&(from, to)| (from..to).contains(&addr))
    };
    for start in 0..bytes.len() {
        for end in start + 1..=bytes.len() {
            let part = &bytes[start..end];
            let mut read = vec![0; part.len()];
            read_segments(&mem, &all, start as u64, &mut read).unwrap();
            assert_eq!(read, part);
            let first = all[0].addr.0 + start as u64;
            let last = all[0].addr.0 + end as u64 - 1;
            let one = in_one_region(&mem, GuestAddress(first), part.len());
            assert_eq!(
                one.is_some(),
                region(first) == region(last),
                "{first:#x} {last:#x}"
            );
        }
    }
    // It may not be longer than the segments, though memory is.
    assert!(read_segments(&mem, &all, 20, &mut [0; 4]).is_err());
}

#[test]
fn buffers_that_reach_into_a_hole_are_returned() {
    for kind in KINDS {
        let mut pair = Pair::new(kind);
        for &(addr, len) in OUTSIDE {
            let (bad, aside) = (segment((addr, len)), segment((DATA, 4)));
            let across = segment((BORDER - 5, 24));
            let before: Vec<_> = (DATA..END).map(|addr| pair.get(addr)).collect();
            for indirect in [false, true] {
                for request in [
                    (vec![bad], vec![]),
                    (vec![], vec![bad]),
                    (vec![aside, bad], vec![across]),
                    (vec![across, bad], vec![aside]),
                    (vec![bad, across], vec![aside]),
                    (vec![across], vec![bad, aside]),
                ] {
                    let found = pair.turn(std::slice::from_ref(&request), indirect);
                    assert!(
                        matches!(found[..], [Some(ChainError::NotInMemory { addr: a, len: l })] if (a, l) == (addr, len)),
                        "{kind:?} {addr:#x} {len}: {found:?}"
                    );
                }
            }
            let after = (DATA..END).map(|addr| pair.get(addr));
            assert!(after.eq(before), "something was written: {addr:#x} {len}");
            pair.served(&(vec![across], vec![across]), false);
        }
    }
}

/// One turn remembers where the last buffer was.
#[test]
fn good_and_bad_buffers_take_turns() {
    for kind in KINDS {
        let mut pair = Pair::new(kind);
        for &good in INSIDE {
            for &bad in OUTSIDE {
                let request = |place| (vec![segment(place)], vec![]);
                let requests = [good, bad, good, bad, bad, good].map(request);
                let found = pair.turn(&requests, true);
                let wrong: Vec<_> = found.iter().map(Option::is_some).collect();
                assert_eq!(
                    wrong,
                    [false, true, false, true, true, false],
                    "{good:x?} {bad:x?}"
                );
            }
        }
    }
}

#[test]
fn indirect_tables_at_borders_and_across_them() {
    let refused = [
        HOLE - 31,
        HOLE - 16,
        HOLE - 1,
        HOLE,
        BEHIND - 1,
        BEHIND - 16,
        END - 31,
    ];
    let served = [
        BORDER - 32,
        BORDER - 31,
        BORDER - 16,
        BORDER - 9,
        // Across three regions.
        BORDER - 8,
        BORDER - 1,
        SHORT - 16,
        SHORT - 7,
        SHORT,
        HOLE - 32,
        BEHIND,
        END - 32,
    ];
    let all = served.map(|at| (at, true)).into_iter();
    for (at, whole) in all.chain(refused.map(|at| (at, false))) {
        for kind in KINDS {
            let mut pair = Pair::new(kind);
            // A place that is no memory is left alone.
            let put = |at: u64, bytes: &[u8]| {
                for (addr, byte) in (at..).zip(bytes) {
                    let _ = pair.mem.write_obj(*byte, GuestAddress(addr));
                }
            };
            let entry = |at: u64, addr: u64, flags: u16, next: u16| {
                put(at, &addr.to_le_bytes());
                put(at + 8, &8_u32.to_le_bytes());
                let (first, second) = if kind.packed {
                    (0, flags & WRITE)
                } else {
                    (flags, next)
                };
                put(at + 12, &first.to_le_bytes());
                put(at + 14, &second.to_le_bytes());
            };
            entry(at, DATA, NEXT, 1);
            entry(at + 16, BORDER + 32, WRITE, 0);
            // A buffer, of which the driver then says that it is a table.
            pair.offer(&[(vec![], vec![segment((at, 32))])], false);
            let flags = START + if kind.packed { 14 } else { 12 };
            let said: u16 = pair.mem.read_obj(GuestAddress(flags)).unwrap();
            pair.mem
                .write_obj(said | INDIRECT, GuestAddress(flags))
                .unwrap();
            let mut session = pair.device.session(&pair.mem).unwrap();
            let head = match session.pop(&mut pair.buf) {
                Ok(Some(chain)) if whole => {
                    assert_eq!(chain.readable(), [segment((DATA, 8))], "{at:#x}");
                    assert_eq!(chain.writable(), [segment((BORDER + 32, 8))], "{at:#x}");
                    chain.head()
                }
                Err(PopError::Chain { head, error }) if !whole => {
                    assert!(matches!(error, ChainError::IndirectRead { addr, .. } if addr == at));
                    head
                }
                other => panic!("{kind:?} {at:#x}: {other:?}"),
            };
            session.push_used(head, 0).unwrap();
            session.publish().unwrap();
            assert_eq!(pair.returned(), [(0, 0)]);
            pair.served(
                &(vec![segment((BORDER - 5, 24))], vec![segment((DATA, 4))]),
                false,
            );
        }
    }
}

/// A queue of which one area is at an address.
type Put = fn(&mut RingConfig, GuestAddress);

/// The areas of a queue: how one is put somewhere, and what it is, its length and its alignment.
fn areas(packed: bool) -> [(Put, Area, u64, u64); 3] {
    let descriptors: Put = |config, at| config.desc_table = at;
    let driver: Put = |config, at| config.avail_ring = at;
    let device: Put = |config, at| config.used_ring = at;
    let size = u64::from(SIZE);
    if packed {
        [
            (descriptors, Area::Descriptors, 16 * size, 16),
            (driver, Area::DriverEvent, 4, 4),
            (device, Area::DeviceEvent, 4, 4),
        ]
    } else {
        [
            (descriptors, Area::Descriptors, 16 * size, 16),
            (driver, Area::Available, 6 + 2 * size, 2),
            (device, Area::Used, 6 + 8 * size, 4),
        ]
    }
}

/// What comes of a queue with an area at `at`.
fn placed(mem: &GuestMemoryMmap, kind: Kind, put: Put, at: u64) -> Result<(), RingError> {
    let mut config = kind.layout(0).config(true);
    put(&mut config, GuestAddress(at));
    DeviceRing::new(&config, mem).map(drop)
}

fn is_split(found: &Result<(), RingError>, wanted: Area, at: u64) -> bool {
    matches!(found, Err(RingError::Split { area, addr, .. }) if (*area, *addr) == (wanted, at))
}

fn is_outside(found: &Result<(), RingError>, wanted: Area, at: u64) -> bool {
    matches!(found, Err(RingError::NotInMemory { area, addr, .. }) if (*area, *addr) == (wanted, at))
}

#[test]
fn rings_are_refused_across_borders_and_holes() {
    let mem = regions(&RANGES);
    for kind in KINDS {
        for (put, wanted, len, align) in areas(kind.packed) {
            let at = |at| placed(&mem, kind, put, at);
            for (edge, adjoins) in [(BORDER, true), (SHORT, true), (HOLE, false), (END, false)] {
                let last = (edge - len) / align * align;
                // The short region is no place for a long area.
                if edge != SHORT || len <= SHORT - BORDER {
                    at(last).unwrap();
                }
                // Nearer to the edge by as little as can be, and so on until it begins behind it.
                for next in (last + align..edge).step_by(align as usize) {
                    let found = at(next);
                    let refused = if adjoins {
                        is_split(&found, wanted, next)
                    } else {
                        is_outside(&found, wanted, next)
                    };
                    assert!(refused, "{kind:?} {wanted} {next:#x}: {found:?}");
                }
            }
            for start in [SHORT, BEHIND] {
                at(start).unwrap();
            }
            // From the hole on, and across it: both ends are memory.
            assert!(is_outside(&at(BEHIND - align), wanted, BEHIND - align));
            assert!(is_outside(&at(HOLE), wanted, HOLE));
            // An area may adjoin a border, and lie beside another one across it.
            let mut config = kind.layout(0).config(true);
            config.desc_table = GuestAddress(BORDER - 16 * u64::from(SIZE));
            config.avail_ring = GuestAddress(SHORT);
            config.used_ring = GuestAddress(BEHIND);
            DeviceRing::new(&config, &mem).unwrap();
        }
    }
}

/// A region may begin anywhere in guest memory: also between the two halves of an event suppression structure.
#[test]
fn event_suppression_structures_across_borders_and_holes() {
    let (border, behind) = (0x8002, 0x8006);
    let adjoining = regions(&[(START, border), (border, END)]);
    let hole = regions(&[(START, border), (behind, END)]);
    let kind = KINDS[1];
    for (put, wanted, ..) in areas(kind.packed).into_iter().skip(1) {
        let at = border - 2;
        assert!(is_split(&placed(&adjoining, kind, put, at), wanted, at));
        for at in [at, at + 4] {
            assert!(is_outside(&placed(&hole, kind, put, at), wanted, at));
        }
        for mem in [&adjoining, &hole] {
            placed(mem, kind, put, at - 4).unwrap();
        }
    }
}

/// It is used to its last byte, be there a hole behind it, or another region.
#[test]
fn rings_that_end_with_their_region_are_served() {
    for kind in KINDS {
        let (last, end) = kind.last();
        for next in [end, end + 64] {
            let mem = regions(&[(START, end), (next, END)]);
            let mut pair = Pair::inside(mem, kind.layout(0));
            for _ in 0..3 * SIZE {
                pair.served(
                    &(vec![segment((next, 16))], vec![segment((next + 64, 16))]),
                    false,
                );
            }
        }
        // One byte less. The driver side sees it as the device side does.
        for (next, adjoins) in [(end - 1, true), (end + 64, false)] {
            let mem = regions(&[(START, end - 1), (next, END)]);
            let layout = kind.layout(0);
            let device = DeviceRing::new(&layout.config(true), &mem).map(drop);
            let driver = match DriverRing::<()>::new(layout, true, &mem) {
                Err(DriverError::Ring(error)) => Err(error),
                other => panic!("{other:?}"),
            };
            let at = layout.used_ring().0;
            for found in [device, driver] {
                let refused = if adjoins {
                    is_split(&found, last, at)
                } else {
                    is_outside(&found, last, at)
                };
                assert!(refused, "{kind:?}: {found:?}");
            }
        }
    }
}

/// A front-end may describe memory anew while a queue is used.
#[test]
fn rings_in_memory_that_is_divided_later() {
    for kind in KINDS {
        let (last, end) = kind.last();
        let mut pair = Pair::inside(regions(&[(START, END)]), kind.layout(0));
        let (divided, holed) = (
            regions(&[(START, end - 2), (end - 2, END)]),
            regions(&[(START, end - 2), (end + 64, END)]),
        );
        let at = kind.layout(0).used_ring().0;
        for _ in 0..2 * SIZE {
            let found = pair.device.session(&divided).map(drop);
            assert!(is_split(&found, last, at), "{kind:?}: {found:?}");
            let found = pair.device.session(&holed).map(drop);
            assert!(is_outside(&found, last, at), "{kind:?}: {found:?}");
            // Nothing is lost by it.
            pair.served(
                &(vec![segment((DATA, 8))], vec![segment((DATA + 64, 8))]),
                false,
            );
        }
    }
}
