//! One test for each rule of packed queues in the crate's documentation: what a driver writes, what the
//! device side answers; and the reverse.
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
    RingConfig, RingError, Segment,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// No power of two.
const SIZE: u16 = 7;
const RING: u64 = 0x1000;
const DRIVER_EVENT: u64 = 0x2000;
const DEVICE_EVENT: u64 = 0x3000;
const DATA: u64 = 0x4000;
/// Here one region ends and the next begins.
const BORDER: u64 = 0x8000;
/// Here memory ends.
const END: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

fn memory() -> GuestMemoryMmap {
    let len = |from: u64, to: u64| (to - from) as usize;
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(RING), len(RING, BORDER)),
        (GuestAddress(BORDER), len(BORDER, END)),
    ])
    .unwrap()
}

fn config() -> RingConfig {
    RingConfig {
        size: SIZE,
        desc_table: GuestAddress(RING),
        avail_ring: GuestAddress(DRIVER_EVENT),
        used_ring: GuestAddress(DEVICE_EVENT),
        packed: true,
        in_order: false,
        event_idx: false,
        indirect: true,
        next_avail: 0x8000,
        next_used: 0x8000,
    }
}

/// Id, readable and writable segments of a chain.
type Parts = (u16, Vec<Segment>, Vec<Segment>);

/// A driver that writes what it likes, at the place where it is.
struct Rogue {
    mem: GuestMemoryMmap,
    ring: DeviceRing,
    buf: ChainBuf,
    at: u16,
    wrap: bool,
}

impl Rogue {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: RingConfig) -> Self {
        Self::inside(memory(), config)
    }

    fn inside(mem: GuestMemoryMmap, config: RingConfig) -> Self {
        let ring = DeviceRing::new(&config, &mem).unwrap();
        Self {
            mem,
            ring,
            buf: ChainBuf::new(SIZE),
            at: config.next_avail & 0x7fff,
            wrap: config.next_avail & 0x8000 != 0,
        }
    }

    fn put(&self, at: u64, value: u16) {
        self.mem.write_obj(value.to_le(), GuestAddress(at)).unwrap();
    }

    /// Writes entry `index` of the ring or table at `table`.
    fn desc(&self, table: u64, index: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let at = table + 16 * u64::from(index);
        self.mem.write_obj(addr.to_le(), GuestAddress(at)).unwrap();
        self.mem
            .write_obj(len.to_le(), GuestAddress(at + 8))
            .unwrap();
        self.put(at + 12, id);
        self.put(at + 14, flags);
    }

    /// `len`, `id` and `flags` of a descriptor of the ring.
    fn read(&self, index: u16) -> (u32, u16, u16) {
        let at = RING + 16 * u64::from(index) + 8;
        let word: u64 = self.mem.read_obj(GuestAddress(at)).unwrap();
        let word = u64::from_le(word);
        (word as u32, (word >> 32) as u16, (word >> 48) as u16)
    }

    /// Makes the next descriptor available.
    fn offer(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let turn = if self.wrap { AVAIL } else { USED };
        self.desc(RING, self.at, addr, len, id, flags | turn);
        self.at += 1;
        if self.at == SIZE {
            self.at = 0;
            self.wrap = !self.wrap;
        }
    }

    fn pop(&mut self) -> Result<Option<Parts>, PopError> {
        let chain = self.ring.session(&self.mem)?.pop(&mut self.buf)?;
        Ok(chain.map(|c| (c.head(), c.readable().to_vec(), c.writable().to_vec())))
    }

    fn served(&mut self) -> Parts {
        self.pop().unwrap().unwrap()
    }

    /// What is wrong with the chain that was offered, of id 9. Checks that the queue survives it: the chain can
    /// be returned, the device goes on behind it, and so will the driver.
    fn malformed(&mut self) -> ChainError {
        let error = match self.pop() {
            Err(PopError::Chain { head: 9, error }) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(self.ring.in_flight(), 1);
        let mut session = self.ring.session(&self.mem).unwrap();
        session.push_used(9, 0).unwrap();
        assert!(session.publish().unwrap());
        assert_eq!(self.read(0), (0, 9, AVAIL | USED));
        let next = self.at | if self.wrap { 0x8000 } else { 0 };
        assert_eq!(
            (self.ring.next_avail(), self.ring.next_used()),
            (next, next)
        );
        self.offer(DATA, 4, 10, 0);
        let behind = [Segment::new(GuestAddress(DATA), 4)];
        assert_eq!(self.served(), (10, behind.to_vec(), vec![]));
        error
    }

    fn broken(&mut self) -> RingError {
        let before = (self.ring.next_avail(), self.ring.in_flight());
        let error = match self.pop() {
            Err(PopError::Ring(error)) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!((self.ring.next_avail(), self.ring.in_flight()), before);
        error
    }
}

fn refused(config: RingConfig) -> RingError {
    DeviceRing::new(&config, &memory()).unwrap_err()
}

#[test]
fn size() {
    for size in [0, 32769, u16::MAX] {
        let error = refused(RingConfig { size, ..config() });
        assert!(matches!(error, RingError::PackedSize { size: s } if s == size));
    }
    for size in [1, 3, 8, 256] {
        DeviceRing::new(&RingConfig { size, ..config() }, &memory()).unwrap();
    }
}

/// What `change` makes of the configuration is refused because of that area.
fn refused_area(change: impl Fn(&mut RingConfig, u64), addr: u64) -> (Area, RingError) {
    let mut config = config();
    change(&mut config, addr);
    let error = refused(config);
    let area = match &error {
        RingError::Misaligned { area, .. }
        | RingError::NotInMemory { area, .. }
        | RingError::Split { area, .. } => *area,
        other => panic!("{other:?}"),
    };
    (area, error)
}

#[test]
fn areas() {
    let ring = |config: &mut RingConfig, addr| config.desc_table = GuestAddress(addr);
    let driver = |config: &mut RingConfig, addr| config.avail_ring = GuestAddress(addr);
    let device = |config: &mut RingConfig, addr| config.used_ring = GuestAddress(addr);
    let is = |(found, error): (Area, RingError), area, kind: fn(&RingError) -> bool| {
        assert!(found == area && kind(&error), "{error:?}");
    };
    let misaligned = |e: &RingError| matches!(e, RingError::Misaligned { .. });
    is(refused_area(ring, RING + 8), Area::Descriptors, misaligned);
    is(
        refused_area(driver, DRIVER_EVENT + 2),
        Area::DriverEvent,
        misaligned,
    );
    is(
        refused_area(device, DEVICE_EVENT + 1),
        Area::DeviceEvent,
        misaligned,
    );
    let outside = |e: &RingError| matches!(e, RingError::NotInMemory { .. });
    for addr in [0, END - 96, END, u64::MAX - 15] {
        is(refused_area(ring, addr), Area::Descriptors, outside);
    }
    for addr in [0, END, u64::MAX - 3] {
        is(refused_area(driver, addr), Area::DriverEvent, outside);
        is(refused_area(device, addr), Area::DeviceEvent, outside);
    }
    let across = |e: &RingError| matches!(e, RingError::Split { .. });
    is(refused_area(ring, BORDER - 16), Area::Descriptors, across);
    for (change, addr) in [
        (ring as fn(&mut RingConfig, u64), END - 112),
        (driver, END - 4),
    ] {
        let mut config = config();
        change(&mut config, addr);
        DeviceRing::new(&config, &memory()).unwrap();
    }
}

#[test]
fn areas_overlap() {
    let last = RING + 16 * u64::from(SIZE) - 4;
    for (driver, device, overlap) in [
        (last, DEVICE_EVENT, true),
        (DRIVER_EVENT, last, true),
        (DRIVER_EVENT, DRIVER_EVENT, true),
        (last + 4, last + 8, false),
    ] {
        let config = RingConfig {
            avail_ring: GuestAddress(driver),
            used_ring: GuestAddress(device),
            ..config()
        };
        let ring = DeviceRing::new(&config, &memory());
        let refused = matches!(ring, Err(RingError::Overlap { .. }));
        assert_eq!(refused, overlap);
        assert!(refused || ring.is_ok());
    }
}

#[test]
fn index_outside_ring() {
    for index in [SIZE, SIZE | 0x8000, 0x7fff, u16::MAX] {
        for (next_avail, next_used) in [(index, 0x8000), (0x8000, index)] {
            let error = refused(RingConfig {
                next_avail,
                next_used,
                ..config()
            });
            assert!(matches!(error, RingError::Index { index: i, size: SIZE } if i == index));
        }
    }
}

/// A queue goes on where it was, in either round.
#[test]
fn queue_taken_over() {
    for index in [0x8000, 0x8003, 6, 0x8006, 2] {
        let mut rogue = Rogue::with(RingConfig {
            next_avail: index,
            next_used: index,
            ..config()
        });
        // In the second round the zeroes of a fresh ring mean nothing either.
        assert_eq!(rogue.pop().unwrap(), None);
        rogue.offer(DATA, 4, 0, NEXT);
        rogue.offer(DATA, 5, 3, WRITE);
        let (id, readable, writable) = rogue.served();
        assert_eq!((id, readable[0].len, writable[0].len), (3, 4, 5));
        let mut session = rogue.ring.session(&rogue.mem).unwrap();
        session.push_used(3, 5).unwrap();
        assert!(session.publish().unwrap());
        let turn = if index & 0x8000 == 0 { 0 } else { AVAIL | USED };
        assert_eq!(rogue.read(index & 0x7fff), (5, 3, turn | WRITE));
        assert_eq!(rogue.ring.next_avail(), rogue.ring.next_used());
    }
}

#[test]
fn turn_of_a_descriptor() {
    for (first, second) in [(0, AVAIL | USED), (AVAIL | USED, 0), (USED, AVAIL)] {
        let mut rogue = Rogue::new();
        rogue.desc(RING, 0, DATA, 4, 0, first);
        assert_eq!(rogue.pop().unwrap(), None, "{first:#x}");
        let mut rogue = Rogue::with(RingConfig {
            next_avail: 0,
            next_used: 0,
            ..config()
        });
        rogue.desc(RING, 0, DATA, 4, 0, second);
        assert_eq!(rogue.pop().unwrap(), None, "{second:#x}");
    }
}

/// Descriptors in flight, and those returned but not yet shown, are not the driver's to write.
#[test]
fn descriptors_in_flight_made_available() {
    let mut rogue = Rogue::new();
    for id in 0..SIZE {
        rogue.offer(DATA, 4, id, 0);
    }
    for _ in 0..SIZE {
        rogue.served();
    }
    assert_eq!(rogue.pop().unwrap(), None);
    rogue.offer(DATA, 4, 100, 0);
    assert!(matches!(
        rogue.broken(),
        RingError::AvailDescriptor { at: 0, room: 0 }
    ));
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    assert!(session.available().is_err());
    assert!(session.enable_notifications().is_err());
    session.push_used(3, 0).unwrap();
    assert!(matches!(
        rogue.broken(),
        RingError::AvailDescriptor { at: 0, room: 0 }
    ));
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    session.publish().unwrap();
    // Where the used descriptor went.
    rogue.desc(RING, 0, DATA, 4, 100, USED);
    assert_eq!(rogue.served().0, 100);
}

/// Such a chain has no last descriptor, and so no id to return it by.
#[test]
fn chain_without_end() {
    let mut rogue = Rogue::new();
    for _ in 0..SIZE {
        rogue.offer(DATA, 4, 1, NEXT);
    }
    assert!(matches!(
        rogue.broken(),
        RingError::AvailDescriptor { at: 0, room: SIZE }
    ));
    // The same into descriptors that are in flight.
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 4, 1, 0);
    rogue.served();
    for _ in 1..SIZE {
        rogue.offer(DATA, 4, 1, NEXT);
    }
    rogue.offer(DATA, 4, 1, 0);
    assert!(matches!(
        rogue.broken(),
        RingError::AvailDescriptor { at: 1, room } if room == SIZE - 1
    ));
    // The longest chain allowed.
    let mut rogue = Rogue::new();
    for i in 0..SIZE {
        rogue.offer(DATA, 4, 1, if i + 1 < SIZE { NEXT } else { 0 });
    }
    assert_eq!(rogue.served().1.len(), usize::from(SIZE));
}

#[test]
fn id_offered_twice() {
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 4, 5, 0);
    rogue.served();
    rogue.offer(DATA, 4, 5, 0);
    assert!(matches!(
        rogue.broken(),
        RingError::HeadInFlight { head: 5 }
    ));
}

#[test]
fn any_id() {
    let mut rogue = Rogue::new();
    for id in [0, SIZE, 0x8000, u16::MAX] {
        rogue.offer(DATA, 4, id, 0);
        assert_eq!(rogue.served().0, id);
    }
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    assert!(matches!(
        session.push_used(1, 0),
        Err(RingError::HeadNotInFlight { head: 1 })
    ));
    session.push_used(u16::MAX, 0).unwrap();
    assert!(session.push_used(u16::MAX, 0).is_err());
    session.publish().unwrap();
    assert_eq!(rogue.read(0), (0, u16::MAX, AVAIL | USED));
}

/// Only the last descriptor of a chain says its id.
#[test]
fn id_of_a_chain() {
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 4, 77, NEXT);
    rogue.offer(DATA, 4, 78, NEXT | WRITE);
    rogue.offer(DATA, 4, 5, WRITE);
    assert_eq!(rogue.served().0, 5);
}

/// The flags of the first descriptor alone make a chain available.
#[test]
fn turn_of_the_descriptors_behind_the_first() {
    for turn in [0, AVAIL, USED, AVAIL | USED] {
        let mut rogue = Rogue::new();
        rogue.desc(RING, 1, DATA, 4, 2, turn);
        rogue.offer(DATA, 4, 2, NEXT);
        assert_eq!(rogue.served().1.len(), 2);
    }
}

#[test]
fn chain_around_the_end() {
    let mut rogue = Rogue::with(RingConfig {
        next_avail: 0x8005,
        next_used: 0x8005,
        ..config()
    });
    for id in 0..3 {
        rogue.offer(DATA + u64::from(id), 4, id, if id < 2 { NEXT } else { 0 });
    }
    let (id, readable, _) = rogue.served();
    assert_eq!((id, readable.len()), (2, 3));
    assert_eq!(rogue.ring.next_avail(), 1);
    // Given back, and taken again.
    rogue.ring.session(&rogue.mem).unwrap().rewind(1);
    assert_eq!(rogue.ring.next_avail(), 0x8005);
    assert_eq!(rogue.served().0, 2);
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    session.push_used(2, 1).unwrap();
    session.publish().unwrap();
    assert_eq!(rogue.ring.next_used(), 1);
    assert_eq!(rogue.read(5), (1, 2, AVAIL | USED | WRITE));
}

#[test]
fn contents_are_checked_as_in_a_split_queue() {
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 0, 9, WRITE);
    assert!(matches!(
        rogue.malformed(),
        ChainError::Empty { addr: DATA }
    ));
    for (addr, len) in [
        (0, 4),
        (RING - 1, 4),
        (END - 3, 4),
        (DATA, u32::MAX),
        (u64::MAX - 3, 8),
    ] {
        let mut rogue = Rogue::new();
        rogue.offer(addr, len, 9, WRITE);
        assert!(
            matches!(rogue.malformed(), ChainError::NotInMemory { addr: a, len: l } if (a, l) == (addr, len))
        );
    }
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 4, 0, NEXT | WRITE);
    rogue.offer(DATA, 4, 9, 0);
    assert!(matches!(
        rogue.malformed(),
        ChainError::ReadableAfterWritable
    ));
    let mut rogue = Rogue::new();
    rogue.offer(BORDER - 2, 4, 9, WRITE | 0x7f78);
    let across = [Segment::new(GuestAddress(BORDER - 2), 4)];
    assert_eq!(rogue.served(), (9, vec![], across.to_vec()));
}

/// What is wrong at the beginning of a chain does not hide its end, where its id stands.
#[test]
fn malformed_chain_is_returned_whole() {
    let mut rogue = Rogue::new();
    rogue.offer(0, 4, 1, NEXT);
    rogue.offer(DATA, 0, 2, NEXT);
    rogue.offer(DATA, 4, 9, 0);
    assert!(matches!(
        rogue.malformed(),
        ChainError::NotInMemory { addr: 0, len: 4 }
    ));
}

/// 2^32 bytes are allowed, one more is not. Memory of that size is reserved, never touched.
#[test]
fn chain_of_too_many_bytes() {
    const BIG: u64 = 1 << 32;
    let small = (GuestAddress(RING), (END - RING) as usize);
    let mem = GuestMemoryMmap::<()>::from_ranges(&[small, (GuestAddress(BIG), 1 << 32)]).unwrap();
    let mut rogue = Rogue::inside(mem, config());
    rogue.offer(BIG, u32::MAX, 0, NEXT);
    rogue.offer(DATA, 2, 9, 0);
    assert!(matches!(rogue.malformed(), ChainError::TooManyBytes));
    rogue.offer(BIG, u32::MAX, 0, NEXT);
    rogue.offer(DATA, 1, 9, 0);
    assert_eq!(rogue.served().1.len(), 2);
}

#[test]
fn indirect() {
    for (flags, table) in [(0, DATA), (WRITE, DATA + 1), (0, BORDER - 21)] {
        let mut rogue = Rogue::new();
        // Nothing but WRITE counts in there.
        rogue.desc(table, 0, DATA, 1, 77, 0);
        rogue.desc(table, 1, DATA + 1, 2, 78, NEXT | INDIRECT | AVAIL);
        rogue.desc(table, 2, DATA + 2, 3, 79, WRITE | USED);
        rogue.offer(table, 48, 9, INDIRECT | flags);
        let (id, readable, writable) = rogue.served();
        assert_eq!(id, 9);
        let lens = |part: &[Segment]| part.iter().map(|s| s.len).collect::<Vec<_>>();
        assert_eq!((lens(&readable), lens(&writable)), (vec![1, 2], vec![3]));
        assert_eq!(rogue.ring.next_avail(), 0x8001);
    }
}

#[test]
fn indirect_malformed() {
    let mut rogue = Rogue::with(RingConfig {
        indirect: false,
        ..config()
    });
    rogue.offer(DATA, 16, 9, INDIRECT);
    assert!(matches!(
        rogue.malformed(),
        ChainError::IndirectNotNegotiated
    ));
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 16, 8, INDIRECT | NEXT);
    rogue.offer(DATA, 16, 9, 0);
    assert!(matches!(rogue.malformed(), ChainError::IndirectNext));
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 16, 8, NEXT);
    rogue.offer(DATA, 16, 9, INDIRECT);
    assert!(matches!(rogue.malformed(), ChainError::IndirectMixed));
    for len in [0, 15, 17, 16 * 129, 16 * 65537, u32::MAX] {
        let mut rogue = Rogue::new();
        rogue.offer(DATA, len, 9, INDIRECT);
        assert!(
            matches!(rogue.malformed(), ChainError::IndirectLength { len: l, limit: 128 } if l == len)
        );
    }
    for addr in [0, END - 16, u64::MAX - 7] {
        let mut rogue = Rogue::new();
        rogue.offer(addr, 32, 9, INDIRECT);
        assert!(matches!(rogue.malformed(), ChainError::IndirectRead { addr: a, .. } if a == addr));
    }
    // A fresh table is all zeroes: buffers of length 0.
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 32, 9, INDIRECT);
    assert!(matches!(rogue.malformed(), ChainError::Empty { addr: 0 }));
}

#[test]
fn memory_changed_after_a_chain_was_taken() {
    let mut rogue = Rogue::new();
    rogue.offer(DATA, 4, 1, NEXT);
    rogue.offer(DATA, 4, 2, 0);
    rogue.offer(DATA, 4, 3, 0);
    assert_eq!(rogue.served().0, 2);
    for i in 0..SIZE {
        rogue.desc(RING, i, u64::MAX, u32::MAX, 1000 + i, 0x7fff & !AVAIL);
    }
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    session.push_used(2, 0).unwrap();
    session.publish().unwrap();
    assert_eq!(rogue.ring.next_used(), 0x8002);
    assert_eq!(rogue.read(0), (0, 2, AVAIL | USED));
}

/// A batch shows with its first descriptor, which is written last.
#[test]
fn batch_is_shown_at_once() {
    let mut rogue = Rogue::new();
    for id in 10..13 {
        rogue.offer(DATA, 4, 0, NEXT);
        rogue.offer(DATA, 4, id, WRITE);
        rogue.served();
    }
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    for id in [12, 10, 11] {
        session.push_used(id, 4).unwrap();
    }
    assert_eq!(rogue.read(0), (4, 0, NEXT | AVAIL), "as the driver left it");
    assert_eq!(rogue.read(2), (4, 10, AVAIL | USED | WRITE));
    assert_eq!(rogue.ring.next_used(), 0x8000);
    rogue.ring.session(&rogue.mem).unwrap().publish().unwrap();
    for (at, id) in [(0, 12), (2, 10), (4, 11)] {
        assert_eq!(rogue.read(at), (4, id, AVAIL | USED | WRITE));
    }
    assert_eq!(rogue.ring.next_used(), 0x8006);
}

/// Whatever the driver writes there costs it no more than its own interrupts.
#[test]
fn driver_event() {
    for (event_idx, off_wrap, flags, interrupt) in [
        (false, 0, 0, true),
        (false, 0, 1, false),
        (false, 0x8003, 2, true), // not negotiated
        (false, 0, 3, true),      // reserved
        (false, 0xffff, 0xfffd, false),
        (true, 0, 0, true),
        (true, 0, 1, false),
        (true, 0x8001, 2, true),
        (true, 0x8000, 2, false), // passed
        (true, 0x8002, 2, false), // not yet
        (true, 0x0001, 2, false), // of the next round
        (true, 0xffff, 2, false), // nowhere
        (true, 0x8001, 3, true),
    ] {
        let mut rogue = Rogue::with(RingConfig {
            event_idx,
            ..config()
        });
        let case = format!("{event_idx} {off_wrap:#x} {flags:#x}");
        for round in 0..2 {
            rogue.offer(DATA, 4, 0, 0);
            rogue.served();
            let mut session = rogue.ring.session(&rogue.mem).unwrap();
            assert!(!session.publish().unwrap(), "nothing to tell of");
            session.push_used(0, 0).unwrap();
            let notify = session.publish().unwrap();
            if round == 1 {
                assert_eq!(notify, interrupt, "{case}");
            }
            // The first publication tells once too often. The second is judged by what stands here.
            rogue.put(DRIVER_EVENT, off_wrap);
            rogue.put(DRIVER_EVENT + 2, flags);
        }
    }
}

/// What an earlier owner of the queue told the driver is not known.
#[test]
fn first_publication_interrupts() {
    let mut rogue = Rogue::with(RingConfig {
        event_idx: true,
        ..config()
    });
    rogue.put(DRIVER_EVENT, 0x8005);
    rogue.put(DRIVER_EVENT + 2, 2);
    for interrupt in [true, false] {
        rogue.offer(DATA, 4, 0, 0);
        rogue.served();
        let mut session = rogue.ring.session(&rogue.mem).unwrap();
        session.push_used(0, 0).unwrap();
        assert_eq!(session.publish().unwrap(), interrupt);
    }
}

#[test]
fn device_event() {
    let event = |rogue: &Rogue| {
        let bits: u32 = rogue.mem.read_obj(GuestAddress(DEVICE_EVENT)).unwrap();
        (u32::from_le(bits) as u16, (u32::from_le(bits) >> 16) as u16)
    };
    for event_idx in [false, true] {
        let mut rogue = Rogue::with(RingConfig {
            event_idx,
            ..config()
        });
        rogue.offer(DATA, 4, 0, 0);
        rogue.served();
        let mut session = rogue.ring.session(&rogue.mem).unwrap();
        session.disable_notifications().unwrap();
        assert_eq!(event(&rogue), (0, 1));
        let mut session = rogue.ring.session(&rogue.mem).unwrap();
        assert!(!session.enable_notifications().unwrap());
        let expected = if event_idx { (0x8001, 2) } else { (0, 0) };
        assert_eq!(event(&rogue), expected);
        rogue.offer(DATA, 4, 1, 0);
        let mut session = rogue.ring.session(&rogue.mem).unwrap();
        assert!(session.enable_notifications().unwrap());
    }
}

/// Two chains that are done, the first of them completely, are told of in one descriptor.
#[test]
fn in_order() {
    let mut rogue = Rogue::with(RingConfig {
        in_order: true,
        ..config()
    });
    for id in [4, 5, 6] {
        rogue.offer(DATA, 4, id, WRITE);
        rogue.served();
    }
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    session.push_used(5, 2).unwrap();
    assert!(!session.publish().unwrap(), "4 is to come first");
    session.push_used(4, 4).unwrap();
    assert!(session.publish().unwrap());
    assert_eq!(rogue.read(0), (2, 5, AVAIL | USED | WRITE));
    assert_eq!(rogue.read(1), (4, 5, AVAIL | WRITE), "skipped");
    assert_eq!(rogue.ring.next_used(), 0x8002);
    assert_eq!(rogue.ring.in_flight(), 1);
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    assert!(session.push_used(5, 0).is_err());
    session.push_used(6, 0).unwrap();
    session.publish().unwrap();
    assert_eq!(rogue.read(2), (0, 6, AVAIL | USED));
}

/// Guest memory may begin anywhere in a front-end's file: descriptors must not become unaligned here.
#[test]
fn memory_mapped_unaligned() {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(RING - 4), 0x8000)]).unwrap();
    assert!(matches!(
        DeviceRing::new(&config(), &mem),
        Err(RingError::Access { .. })
    ));
}

mod misbehaving_device {
    use super::*;

    const BUFFER: Segment = Segment::new(GuestAddress(DATA), 16);

    fn driver(in_order: bool) -> (GuestMemoryMmap, DriverRing<u32>) {
        let mem = memory();
        let mut layout = DriverLayout::packed(GuestAddress(RING), SIZE, 4).unwrap();
        if in_order {
            layout = layout.in_order();
        }
        let ring = DriverRing::new(layout, false, &mem).unwrap();
        (mem, ring)
    }

    /// Writes a used descriptor, as a device does in the first round.
    fn return_chain(mem: &GuestMemoryMmap, at: u16, id: u16, len: u32, flags: u16) {
        let word = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        let at = RING + 16 * u64::from(at) + 8;
        mem.write_obj(word.to_le(), GuestAddress(at)).unwrap();
    }

    #[test]
    fn used_id() {
        for id in [1, SIZE, u16::MAX] {
            let (mem, mut ring) = driver(false);
            let mut session = ring.session(&mem).unwrap();
            assert_eq!(session.add(&[BUFFER], &[], 1).unwrap(), 0);
            session.publish().unwrap();
            return_chain(&mem, 0, id, 0, AVAIL | USED);
            assert!(
                matches!(session.poll_used(), Err(DriverError::UsedId { id: i }) if i == u32::from(id))
            );
            assert!(session.enable_interrupts().is_err());
        }
    }

    #[test]
    fn chain_that_is_not_published() {
        let (mem, mut ring) = driver(false);
        let mut session = ring.session(&mem).unwrap();
        let first = session.add(&[BUFFER], &[], 1).unwrap();
        return_chain(&mem, 0, first, 0, AVAIL | USED);
        assert_eq!(session.poll_used().unwrap(), None, "it has nothing");
        session.publish().unwrap();
        let second = session.add(&[BUFFER], &[], 2).unwrap();
        return_chain(&mem, 0, second, 0, AVAIL | USED);
        assert!(matches!(
            session.poll_used(),
            Err(DriverError::UsedId { .. })
        ));
        return_chain(&mem, 0, first, 0, AVAIL | USED);
        assert_eq!(session.poll_used().unwrap(), Some((1, 0)));
    }

    #[test]
    fn used_len() {
        let (mem, mut ring) = driver(false);
        let mut session = ring.session(&mem).unwrap();
        session.add(&[BUFFER], &[BUFFER, BUFFER], 1).unwrap();
        session.add(&[BUFFER], &[BUFFER], 2).unwrap();
        session.publish().unwrap();
        return_chain(&mem, 0, 0, 33, AVAIL | USED | WRITE);
        assert!(matches!(
            session.poll_used(),
            Err(DriverError::UsedLen {
                len: 33,
                room: 32,
                ..
            })
        ));
        return_chain(&mem, 0, 0, 32, AVAIL | USED | WRITE);
        assert_eq!(session.poll_used().unwrap(), Some((1, 32)));
        // Without the flag the length is reserved. And the chain before had three descriptors.
        return_chain(&mem, 3, 1, 33, AVAIL | USED);
        assert_eq!(session.poll_used().unwrap(), Some((2, 0)));
    }

    /// The device writes what it likes into descriptors that it has.
    #[test]
    fn descriptors_overwritten() {
        let (mem, mut ring) = driver(false);
        let mut session = ring.session(&mem).unwrap();
        session.add(&[BUFFER; 2], &[], 1).unwrap();
        session.add_indirect(&[BUFFER; 2], &[], 2).unwrap();
        session.publish().unwrap();
        for at in 0..SIZE {
            return_chain(&mem, at, u16::MAX, u32::MAX, 0x7fff);
        }
        return_chain(&mem, 0, 1, 0, AVAIL | USED);
        return_chain(&mem, 1, 0, 0, AVAIL | USED);
        assert_eq!(session.poll_used().unwrap(), Some((2, 0)));
        assert_eq!(session.poll_used().unwrap(), Some((1, 0)));
        assert_eq!(session.poll_used().unwrap(), None);
        assert_eq!(session.free(), SIZE);
    }

    #[test]
    fn in_order() {
        let (mem, mut ring) = driver(true);
        let mut session = ring.session(&mem).unwrap();
        let ids: Vec<_> = (0..3)
            .map(|token| session.add(&[BUFFER], &[BUFFER], token).unwrap())
            .collect();
        assert_eq!(ids, [0, 2, 4], "ring order");
        session.publish().unwrap();
        // In the middle of a chain, or nowhere.
        for id in [1, 3, 6, 9] {
            return_chain(&mem, 0, id, 0, AVAIL | USED);
            assert!(matches!(
                session.poll_used(),
                Err(DriverError::UsedId { .. })
            ));
        }
        return_chain(&mem, 0, 2, 5, AVAIL | USED | WRITE);
        assert_eq!(session.poll_used().unwrap(), Some((0, 16)), "all of it");
        assert!(session.enable_interrupts().unwrap(), "more of the batch");
        assert_eq!(session.poll_used().unwrap(), Some((1, 5)));
        assert_eq!(session.poll_used().unwrap(), None);
        return_chain(&mem, 4, 4, 17, AVAIL | USED | WRITE);
        assert!(matches!(
            session.poll_used(),
            Err(DriverError::UsedLen { .. })
        ));
    }

    #[test]
    fn wrong_use() {
        let (mem, mut ring) = driver(false);
        let mut session = ring.session(&mem).unwrap();
        assert!(matches!(session.add(&[], &[], 0), Err(DriverError::Empty)));
        assert!(matches!(
            session.add(&[BUFFER; 8], &[], 0),
            Err(DriverError::TooLong { limit: SIZE, .. })
        ));
        assert!(matches!(
            session.add_indirect(&[BUFFER; 5], &[], 0),
            Err(DriverError::TooLong { limit: 4, .. })
        ));
        session.add(&[BUFFER; 4], &[BUFFER; 2], 0).unwrap();
        assert!(matches!(
            session.add(&[BUFFER; 2], &[], 0),
            Err(DriverError::Full { needed: 2, free: 1 })
        ));
        session.add_indirect(&[BUFFER; 4], &[], 0).unwrap();
        assert!(matches!(
            session.add_indirect(&[BUFFER], &[], 0),
            Err(DriverError::Full { needed: 1, free: 0 })
        ));
        let mem = memory();
        let layout = DriverLayout::packed(GuestAddress(RING), SIZE, 0).unwrap();
        for index in [SIZE, 0x8000 | SIZE, u16::MAX] {
            assert!(DriverRing::<u32>::starting_at(layout, false, index, &mem).is_err());
        }
        for (base, size, entries) in [
            (RING + 8, 8, 0),
            (RING, 0, 0),
            (RING, 32769, 0),
            (RING, 8, 9),
            (u64::MAX - 15, 8, 0),
        ] {
            assert!(DriverLayout::packed(GuestAddress(base), size, entries).is_err());
        }
    }
}
