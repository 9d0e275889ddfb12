//! One test for each rule in the crate's documentation: what a driver writes, what the device side answers.
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

const SIZE: u16 = 8;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x4000;
/// Here one region ends and the next begins.
const BORDER: u64 = 0x8000;
/// Here memory ends.
const END: u64 = 0x1_0000;

/// Descriptors that a table may have though the queue has less.
const TABLE: u32 = 128;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn memory() -> GuestMemoryMmap {
    let len = |from: u64, to: u64| (to - from) as usize;
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(DESC), len(DESC, BORDER)),
        (GuestAddress(BORDER), len(BORDER, END)),
    ])
    .unwrap()
}

fn config() -> RingConfig {
    RingConfig {
        size: SIZE,
        desc_table: GuestAddress(DESC),
        avail_ring: GuestAddress(AVAIL),
        used_ring: GuestAddress(USED),
        packed: false,
        in_order: false,
        event_idx: false,
        indirect: true,
        next_avail: 0,
        next_used: 0,
    }
}

/// Readable and writable segments of a chain.
type Parts = (Vec<Segment>, Vec<Segment>);

/// A driver that writes what it likes.
struct Rogue {
    mem: GuestMemoryMmap,
    ring: DeviceRing,
    buf: ChainBuf,
    idx: u16,
}

impl Rogue {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: RingConfig) -> Self {
        let mem = memory();
        let ring = DeviceRing::new(&config, &mem).unwrap();
        Self {
            mem,
            ring,
            buf: ChainBuf::new(SIZE),
            idx: 0,
        }
    }

    /// A table whose descriptors make one chain.
    fn table(&mut self, at: u64, entries: u32) {
        for i in 0..entries as u16 {
            let last = u32::from(i) + 1 == entries;
            self.desc(at, i, DATA, 4, if last { 0 } else { NEXT }, i + 1);
        }
    }

    fn put(&self, at: u64, value: u16) {
        self.mem.write_obj(value.to_le(), GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        u16::from_le(self.mem.read_obj(GuestAddress(at)).unwrap())
    }

    /// Writes entry `index` of the table at `table`.
    fn desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.mem.write_obj(addr.to_le(), GuestAddress(at)).unwrap();
        self.mem
            .write_obj(len.to_le(), GuestAddress(at + 8))
            .unwrap();
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Makes a head available.
    fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.idx % SIZE), head);
        self.idx = self.idx.wrapping_add(1);
        self.put(AVAIL + 2, self.idx);
    }

    fn pop(&mut self) -> Result<Option<Parts>, PopError> {
        let chain = self.ring.session(&self.mem)?.pop(&mut self.buf)?;
        Ok(chain.map(|c| (c.readable().to_vec(), c.writable().to_vec())))
    }

    /// Offers the chain at head 0, and returns what is wrong with it. Checks that the queue survives
    /// it: the chain can be returned, and the next one is served.
    fn malformed(&mut self) -> ChainError {
        self.offer(0);
        let error = match self.pop() {
            Err(PopError::Chain { head: 0, error }) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(self.ring.in_flight(), 1);
        let mut session = self.ring.session(&self.mem).unwrap();
        session.push_used(0, 0).unwrap();
        assert!(session.publish().unwrap());
        assert_eq!(self.get(USED + 2), 1);
        self.desc(DESC, SIZE - 1, DATA, 4, 0, 0);
        self.offer(SIZE - 1);
        assert_eq!(
            self.pop().unwrap().unwrap().0,
            [Segment::new(GuestAddress(DATA), 4)]
        );
        error
    }

    /// Offers the chain at head 0, which has to be served.
    fn served(&mut self) -> Parts {
        self.offer(0);
        self.pop().unwrap().unwrap()
    }

    fn broken(&mut self) -> RingError {
        match self.pop() {
            Err(PopError::Ring(error)) => error,
            other => panic!("{other:?}"),
        }
    }
}

fn refused(config: RingConfig) -> RingError {
    DeviceRing::new(&config, &memory()).unwrap_err()
}

#[test]
fn size() {
    for size in [0, 3, 7, 32769, u16::MAX] {
        let error = refused(RingConfig { size, ..config() });
        assert!(matches!(error, RingError::Size { size: s } if s == size));
    }
}

#[test]
fn alignment() {
    let desc = refused(RingConfig {
        desc_table: GuestAddress(DESC + 8),
        ..config()
    });
    assert!(matches!(
        desc,
        RingError::Misaligned {
            area: Area::Descriptors,
            ..
        }
    ));
    let avail = refused(RingConfig {
        avail_ring: GuestAddress(AVAIL + 1),
        ..config()
    });
    assert!(matches!(
        avail,
        RingError::Misaligned {
            area: Area::Available,
            ..
        }
    ));
    let used = refused(RingConfig {
        used_ring: GuestAddress(USED + 2),
        ..config()
    });
    assert!(matches!(
        used,
        RingError::Misaligned {
            area: Area::Used,
            ..
        }
    ));
}

#[test]
fn areas_outside_memory() {
    // A split ring of 8: 128 bytes of descriptors, 22 available, 70 used.
    for addr in [0, END - 112, END, u64::MAX - 15] {
        let error = refused(RingConfig {
            desc_table: GuestAddress(addr),
            ..config()
        });
        assert!(
            matches!(
                error,
                RingError::NotInMemory {
                    area: Area::Descriptors,
                    ..
                }
            ),
            "{addr:#x}"
        );
    }
    for addr in [0, END - 20, END, u64::MAX - 1] {
        let error = refused(RingConfig {
            avail_ring: GuestAddress(addr),
            ..config()
        });
        assert!(
            matches!(
                error,
                RingError::NotInMemory {
                    area: Area::Available,
                    ..
                }
            ),
            "{addr:#x}"
        );
    }
    for addr in [0, END - 68, END, u64::MAX - 3] {
        let error = refused(RingConfig {
            used_ring: GuestAddress(addr),
            ..config()
        });
        assert!(
            matches!(
                error,
                RingError::NotInMemory {
                    area: Area::Used,
                    ..
                }
            ),
            "{addr:#x}"
        );
    }
    for (desc, avail, used) in [
        (END - 128, AVAIL, USED),
        (DESC, END - 22, USED),
        (DESC, AVAIL, END - 72),
    ] {
        let (desc_table, avail_ring, used_ring) =
            (GuestAddress(desc), GuestAddress(avail), GuestAddress(used));
        let config = RingConfig {
            desc_table,
            avail_ring,
            used_ring,
            ..config()
        };
        DeviceRing::new(&config, &memory()).unwrap();
    }
}

#[test]
fn area_across_regions() {
    let error = refused(RingConfig {
        used_ring: GuestAddress(BORDER - 4),
        ..config()
    });
    assert!(matches!(
        error,
        RingError::Split {
            area: Area::Used,
            ..
        }
    ));
}

#[test]
fn used_ring_overlaps() {
    let error = refused(RingConfig {
        used_ring: GuestAddress(DESC + 124),
        ..config()
    });
    assert!(matches!(
        error,
        RingError::Overlap {
            with: Area::Descriptors,
            ..
        }
    ));
    let error = refused(RingConfig {
        used_ring: GuestAddress(AVAIL - 68),
        ..config()
    });
    assert!(matches!(
        error,
        RingError::Overlap {
            with: Area::Available,
            ..
        }
    ));
    let adjoining = RingConfig {
        used_ring: GuestAddress(DESC + 128),
        ..config()
    };
    DeviceRing::new(&adjoining, &memory()).unwrap();
}

#[test]
fn available_index_jumps() {
    for idx in [SIZE + 1, 0x8000, u16::MAX] {
        let mut rogue = Rogue::new();
        rogue.put(AVAIL + 2, idx);
        assert!(
            matches!(rogue.broken(), RingError::AvailIndex { avail_idx, .. } if avail_idx == idx)
        );
        assert!(rogue.ring.session(&rogue.mem).unwrap().available().is_err());
        assert!(
            rogue
                .ring
                .session(&rogue.mem)
                .unwrap()
                .enable_notifications()
                .is_err()
        );
        assert_eq!(rogue.ring.next_avail(), 0);
    }
}

#[test]
fn available_index_moves_back() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, 0, 0);
    rogue.served();
    rogue.put(AVAIL + 2, 0);
    assert!(matches!(
        rogue.broken(),
        RingError::AvailIndex {
            waiting: u16::MAX,
            ..
        }
    ));
}

/// Chains in flight, and those returned but not yet shown, take from what can be outstanding.
#[test]
fn available_index_runs_ahead_of_returned_chains() {
    let mut rogue = Rogue::new();
    for head in 0..SIZE {
        rogue.desc(DESC, head, DATA, 4, 0, 0);
        rogue.offer(head);
    }
    for _ in 0..SIZE {
        rogue.pop().unwrap().unwrap();
    }
    assert_eq!(rogue.ring.in_flight(), SIZE);
    assert!(rogue.pop().unwrap().is_none());
    rogue
        .ring
        .session(&rogue.mem)
        .unwrap()
        .push_used(0, 0)
        .unwrap();
    rogue.offer(0);
    assert!(matches!(
        rogue.broken(),
        RingError::AvailIndex {
            room: 0,
            waiting: 1,
            ..
        }
    ));
    rogue.ring.session(&rogue.mem).unwrap().publish().unwrap();
    rogue.pop().unwrap().unwrap();
}

#[test]
fn head_outside_table() {
    for head in [SIZE, SIZE + 1, u16::MAX] {
        let mut rogue = Rogue::new();
        rogue.offer(head);
        assert!(matches!(rogue.broken(), RingError::Head { head: h, size: SIZE } if h == head));
        assert_eq!(rogue.ring.in_flight(), 0);
    }
}

#[test]
fn head_offered_twice() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, 0, 0);
    rogue.served();
    rogue.offer(0);
    assert!(matches!(
        rogue.broken(),
        RingError::HeadInFlight { head: 0 }
    ));
}

#[test]
fn next_outside_table() {
    for next in [SIZE, u16::MAX] {
        let mut rogue = Rogue::new();
        rogue.desc(DESC, 0, DATA, 4, NEXT, next);
        let error = rogue.malformed();
        assert!(matches!(error, ChainError::Next { next: n, entries: SIZE } if n == next));
        // Below the queue size, but not in the indirect table.
        let mut rogue = Rogue::new();
        rogue.desc(DESC, 0, DATA, 32, INDIRECT, 0);
        rogue.desc(DATA, 0, DATA, 4, NEXT, 2);
        assert!(matches!(
            rogue.malformed(),
            ChainError::Next {
                next: 2,
                entries: 2
            }
        ));
    }
}

#[test]
fn loops() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, NEXT, 0);
    assert!(matches!(
        rogue.malformed(),
        ChainError::TooLong { limit: 8 }
    ));
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, NEXT, 1);
    rogue.desc(DESC, 1, DATA, 4, NEXT, 2);
    rogue.desc(DESC, 2, DATA, 4, NEXT, 1);
    assert!(matches!(rogue.malformed(), ChainError::TooLong { .. }));
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 32, INDIRECT, 0);
    rogue.desc(DATA, 0, DATA, 4, NEXT, 1);
    rogue.desc(DATA, 1, DATA, 4, NEXT, 0);
    assert!(matches!(rogue.malformed(), ChainError::TooLong { .. }));
}

/// Direct descriptors and those of a table count together.
#[test]
fn chain_longer_than_queue() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, NEXT, 1);
    rogue.desc(DESC, 1, DATA, 16 * TABLE, INDIRECT, 0);
    rogue.table(DATA, TABLE);
    assert!(matches!(
        rogue.malformed(),
        ChainError::TooLong { limit: 128 }
    ));
    let mut rogue = Rogue::new();
    for i in 0..SIZE {
        rogue.desc(DESC, i, DATA, 4, NEXT, (i + 1) % SIZE);
    }
    assert!(matches!(
        rogue.malformed(),
        ChainError::TooLong { limit: 8 }
    ));
    // A table may be longer than the queue: Linux makes such.
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 16 * TABLE, INDIRECT, 0);
    rogue.table(DATA, TABLE);
    assert_eq!(rogue.served().0.len(), TABLE as usize);
    // The longest chain allowed.
    let mut rogue = Rogue::new();
    for i in 0..SIZE {
        rogue.desc(DESC, i, DATA, 4, if i + 1 < SIZE { NEXT } else { 0 }, i + 1);
    }
    assert_eq!(rogue.served().0.len(), usize::from(SIZE));
}

/// 2^32 bytes are allowed, one more is not. Memory of that size is reserved, never touched.
#[test]
fn chain_of_too_many_bytes() {
    const BIG: u64 = 1 << 32;
    let small = (GuestAddress(DESC), (END - DESC) as usize);
    let mem = GuestMemoryMmap::<()>::from_ranges(&[small, (GuestAddress(BIG), 1 << 32)]).unwrap();
    let ring = DeviceRing::new(&config(), &mem).unwrap();
    let mut rogue = Rogue {
        mem,
        ring,
        buf: ChainBuf::new(SIZE),
        idx: 0,
    };
    rogue.desc(DESC, 0, BIG, u32::MAX, NEXT, 1);
    rogue.desc(DESC, 1, DATA, 2, 0, 0);
    assert!(matches!(rogue.malformed(), ChainError::TooManyBytes));
    rogue.desc(DESC, 1, DATA, 1, 0, 0);
    assert_eq!(rogue.served().0.len(), 2);
}

#[test]
fn empty_buffer() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 0, WRITE, 0);
    assert!(matches!(
        rogue.malformed(),
        ChainError::Empty { addr: DATA }
    ));
}

#[test]
fn buffer_outside_memory() {
    for (addr, len) in [
        (0, 4),
        (DESC - 1, 4),
        (END - 3, 4),
        (END, 1),
        (DATA, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 3, 8),
        (u64::MAX - 3, u32::MAX),
    ] {
        for flags in [0, WRITE] {
            let mut rogue = Rogue::new();
            rogue.desc(DESC, 0, addr, len, flags, 0);
            let error = rogue.malformed();
            assert!(
                matches!(error, ChainError::NotInMemory { addr: a, len: l } if (a, l) == (addr, len)),
                "{addr:#x} {len}: {error}"
            );
        }
    }
}

#[test]
fn buffer_at_the_edges_and_across_regions() {
    for (addr, len) in [
        (END - 4, 4),
        (DESC, 1),
        (BORDER - 4, 4),
        (BORDER - 2, 4),
        (BORDER, 4),
    ] {
        let mut rogue = Rogue::new();
        rogue.desc(DESC, 0, addr, len, WRITE, 0);
        assert_eq!(
            rogue.served(),
            (vec![], vec![Segment::new(GuestAddress(addr), len)])
        );
    }
}

#[test]
fn readable_after_writable() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, NEXT | WRITE, 1);
    rogue.desc(DESC, 1, DATA, 4, 0, 0);
    assert!(matches!(
        rogue.malformed(),
        ChainError::ReadableAfterWritable
    ));
}

#[test]
fn indirect_not_negotiated() {
    let mut rogue = Rogue::with(RingConfig {
        indirect: false,
        ..config()
    });
    rogue.desc(DESC, 0, DATA, 16, INDIRECT, 0);
    assert!(matches!(
        rogue.malformed(),
        ChainError::IndirectNotNegotiated
    ));
}

#[test]
fn indirect_nested() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 32, INDIRECT, 0);
    rogue.desc(DATA, 0, DATA, 4, NEXT, 1);
    rogue.desc(DATA, 1, DATA, 16, INDIRECT, 0);
    assert!(matches!(rogue.malformed(), ChainError::IndirectNested));
}

#[test]
fn indirect_with_next() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 16, INDIRECT | NEXT, 1);
    assert!(matches!(rogue.malformed(), ChainError::IndirectNext));
}

#[test]
fn indirect_length() {
    for len in [
        0,
        1,
        15,
        17,
        16 * TABLE + 16,
        16 * 65536,
        16 * 65537,
        u32::MAX,
    ] {
        let mut rogue = Rogue::new();
        rogue.desc(DESC, 0, DATA, len, INDIRECT, 0);
        let error = rogue.malformed();
        assert!(
            matches!(error, ChainError::IndirectLength { len: l, limit: 128 } if l == len),
            "{len}"
        );
    }
}

#[test]
fn indirect_outside_memory() {
    for addr in [0, END - 16, END, u64::MAX - 7, u64::MAX - 31] {
        let mut rogue = Rogue::new();
        rogue.desc(DESC, 0, addr, 32, INDIRECT, 0);
        assert!(matches!(rogue.malformed(), ChainError::IndirectRead { addr: a, .. } if a == addr));
    }
}

#[test]
fn indirect_at_any_address() {
    for table in [DATA + 1, END - 32, BORDER - 16, BORDER - 7, BORDER - 21] {
        let mut rogue = Rogue::new();
        rogue.desc(DESC, 0, table, 32, INDIRECT | WRITE, 0);
        rogue.desc(table, 1, DATA, 4, WRITE, 0);
        rogue.desc(table, 0, DATA + 9, 2, NEXT, 1);
        let (readable, writable) = rogue.served();
        assert_eq!(readable, [Segment::new(GuestAddress(DATA + 9), 2)]);
        assert_eq!(writable, [Segment::new(GuestAddress(DATA), 4)]);
    }
}

#[test]
fn indirect_behind_direct() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 1, NEXT, 3);
    rogue.desc(DESC, 3, DATA + 64, 32, INDIRECT, 0);
    rogue.desc(DATA + 64, 0, DATA, 2, NEXT | WRITE, 1);
    rogue.desc(DATA + 64, 1, DATA, 3, WRITE, 0);
    let (readable, writable) = rogue.served();
    assert_eq!(readable, [Segment::new(GuestAddress(DATA), 1)]);
    assert_eq!(writable.iter().map(|s| s.len).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn unknown_flags() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, 0xfff8, 77);
    assert_eq!(rogue.served().0, [Segment::new(GuestAddress(DATA), 4)]);
}

#[test]
fn memory_changed_after_a_chain_was_taken() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, 0, 0);
    rogue.offer(0);
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    let chain = session.pop(&mut rogue.buf).unwrap().unwrap();
    rogue
        .mem
        .write_slice(&[0xff; 0x1000], GuestAddress(DESC))
        .unwrap();
    rogue
        .mem
        .write_slice(&[0xff; 18], GuestAddress(AVAIL + 4))
        .unwrap();
    assert_eq!(chain.readable(), [Segment::new(GuestAddress(DATA), 4)]);
    // Rewinding goes by the device's own notes: nothing stays in flight.
    session.rewind(1);
    assert_eq!((rogue.ring.in_flight(), rogue.ring.next_avail()), (0, 0));
}

#[test]
fn rewind_goes_no_further_than_what_is_held() {
    let mut rogue = Rogue::new();
    for head in 0..3 {
        rogue.desc(DESC, head, DATA + u64::from(head), 4, 0, 0);
        rogue.offer(head);
        rogue.pop().unwrap().unwrap();
    }
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    session.push_used(0, 0).unwrap();
    session.rewind(u16::MAX);
    assert_eq!(session.available().unwrap(), 2);
    assert_eq!((rogue.ring.in_flight(), rogue.ring.next_avail()), (0, 1));
    assert_eq!(
        rogue.pop().unwrap().unwrap().0,
        [Segment::new(GuestAddress(DATA + 1), 4)]
    );
}

#[test]
fn chain_returned_twice_or_never_taken() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, 0, 0);
    rogue.served();
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    for head in [1, SIZE, u16::MAX] {
        assert!(matches!(
            session.push_used(head, 0),
            Err(RingError::HeadNotInFlight { .. })
        ));
    }
    session.push_used(0, 7).unwrap();
    assert!(matches!(
        session.push_used(0, 7),
        Err(RingError::HeadNotInFlight { head: 0 })
    ));
    assert!(session.publish().unwrap());
    assert!(
        !session.publish().unwrap(),
        "nothing staged, nothing to interrupt for"
    );
    assert_eq!(
        (
            rogue.get(USED + 2),
            rogue.get(USED + 4),
            rogue.get(USED + 8)
        ),
        (1, 0, 7)
    );
}

/// Used elements and index as the driver reads them, byte by byte.
#[test]
fn staged_elements_are_invisible_until_published() {
    let mut rogue = Rogue::new();
    for head in 0..3 {
        rogue.desc(DESC, head, DATA, 4, WRITE, 0);
        rogue.offer(head);
        rogue.pop().unwrap().unwrap();
    }
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    session.push_used(2, 0x0403_0201).unwrap();
    session.push_used(0, 1).unwrap();
    assert_eq!(rogue.get(USED + 2), 0);
    assert_eq!(rogue.ring.next_used(), 0);
    // What is staged outlives the session.
    rogue.ring.session(&rogue.mem).unwrap().publish().unwrap();
    assert_eq!(rogue.ring.next_used(), 2);
    let mut bytes = [0; 18];
    rogue
        .mem
        .read_slice(&mut bytes, GuestAddress(USED + 2))
        .unwrap();
    assert_eq!(
        bytes,
        [2, 0, 2, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 1, 0, 0, 0]
    );
}

#[test]
fn flags_suppress_notifications() {
    let mut rogue = Rogue::new();
    rogue.desc(DESC, 0, DATA, 4, 0, 0);
    for (flags, interrupt) in [(0_u16, true), (1, false), (0xfffe, true), (0xffff, false)] {
        rogue.served();
        rogue.put(AVAIL, flags);
        let mut session = rogue.ring.session(&rogue.mem).unwrap();
        session.push_used(0, 0).unwrap();
        assert_eq!(session.publish().unwrap(), interrupt);
    }
    rogue
        .ring
        .session(&rogue.mem)
        .unwrap()
        .disable_notifications()
        .unwrap();
    assert_eq!(rogue.get(USED), 1);
    assert!(
        !rogue
            .ring
            .session(&rogue.mem)
            .unwrap()
            .enable_notifications()
            .unwrap()
    );
    assert_eq!(rogue.get(USED), 0);
    rogue.offer(0);
    assert!(
        rogue
            .ring
            .session(&rogue.mem)
            .unwrap()
            .enable_notifications()
            .unwrap()
    );
}

#[test]
fn used_event_selects_interrupts() {
    // used_event lies behind the available ring's elements, avail_event behind the used ring's.
    let (used_event, avail_event) = (AVAIL + 4 + 16, USED + 4 + 64);
    let mut rogue = Rogue::with(RingConfig {
        event_idx: true,
        ..config()
    });
    rogue.desc(DESC, 0, DATA, 4, 0, 0);
    let mut turn = |event: u16| {
        rogue.served();
        rogue.put(used_event, event);
        // Ignored with EVENT_IDX (VIRTIO 1.3, 2.7.7.2).
        rogue.put(AVAIL, 1);
        let mut session = rogue.ring.session(&rogue.mem).unwrap();
        session.push_used(0, 0).unwrap();
        let interrupt = session.publish().unwrap();
        session.enable_notifications().unwrap();
        assert_eq!(rogue.get(avail_event), rogue.ring.next_avail());
        interrupt
    };
    assert!(
        turn(9),
        "the first publication interrupts whatever the driver wants"
    );
    assert!(
        !turn(0),
        "index moves from 1 to 2: event 0 was passed before"
    );
    assert!(turn(2), "index moves from 2 to 3");
    assert!(
        !turn(4),
        "index moves from 3 to 4: event 4 comes with element 4"
    );
    assert!(turn(4));
}

#[test]
fn ring_resolved_in_other_memory() {
    let mut rogue = Rogue::new();
    let smaller = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(DESC), 0x2000)]).unwrap();
    assert!(matches!(
        rogue.ring.session(&smaller).err(),
        Some(RingError::NotInMemory {
            area: Area::Used,
            ..
        })
    ));
}

/// Guest memory may begin anywhere in a front-end's file: indices must not become unaligned here.
#[test]
fn memory_mapped_unaligned() {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(DESC - 1), 0x8000)]).unwrap();
    assert!(matches!(
        DeviceRing::new(&config(), &mem),
        Err(RingError::Access { .. })
    ));
}

/// Chains that are done, all but the last of them completely, are told of in one element.
#[test]
fn in_order() {
    let mut rogue = Rogue::with(RingConfig {
        in_order: true,
        ..config()
    });
    for head in 0..4 {
        rogue.desc(DESC, head, DATA, 4, WRITE, 0);
        rogue.offer(head);
        rogue.pop().unwrap().unwrap();
    }
    let element = |rogue: &Rogue, place: u64| {
        let element: u64 = rogue
            .mem
            .read_obj(GuestAddress(USED + 4 + 8 * place))
            .unwrap();
        let element = u64::from_le(element);
        (element as u32, (element >> 32) as u32)
    };
    let mut session = rogue.ring.session(&rogue.mem).unwrap();
    session.push_used(2, 4).unwrap();
    session.push_used(1, 3).unwrap();
    assert!(!session.publish().unwrap(), "0 is to come first");
    assert!(session.push_used(2, 4).is_err(), "it is done already");
    session.push_used(0, 4).unwrap();
    assert!(session.publish().unwrap());
    assert_eq!(rogue.get(USED + 2), 3);
    assert_eq!(element(&rogue, 0), (1, 3), "0 and 1, the last with 3 bytes");
    assert_eq!(element(&rogue, 1), (0, 0), "skipped");
    assert_eq!(element(&rogue, 2), (2, 4));
    assert_eq!(rogue.ring.in_flight(), 1);
    rogue.ring.session(&rogue.mem).unwrap().rewind(4);
    assert_eq!((rogue.ring.in_flight(), rogue.ring.next_avail()), (0, 3));
}

mod misbehaving_device {
    use super::*;

    fn driver() -> (GuestMemoryMmap, DriverRing<u32>, DriverLayout) {
        let mem = memory();
        let layout = DriverLayout::new(GuestAddress(DESC), SIZE, 4).unwrap();
        let ring = DriverRing::new(layout, false, &mem).unwrap();
        (mem, ring, layout)
    }

    /// Writes a used element and the index behind it, as a device does.
    fn return_chain(mem: &GuestMemoryMmap, layout: &DriverLayout, idx: u16, id: u32, len: u32) {
        let used = layout.used_ring().0;
        let element = used + 4 + 8 * u64::from(idx.wrapping_sub(1) % SIZE);
        mem.write_obj(id.to_le(), GuestAddress(element)).unwrap();
        mem.write_obj(len.to_le(), GuestAddress(element + 4))
            .unwrap();
        mem.write_obj(idx.to_le(), GuestAddress(used + 2)).unwrap();
    }

    const BUFFER: Segment = Segment::new(GuestAddress(DATA), 16);

    #[test]
    fn used_index_jumps() {
        let (mem, mut ring, layout) = driver();
        ring.session(&mem).unwrap().add(&[BUFFER], &[], 1).unwrap();
        // Not published yet: the device cannot have used it.
        return_chain(&mem, &layout, 1, 0, 0);
        let error = ring.session(&mem).unwrap().poll_used().unwrap_err();
        assert!(matches!(
            error,
            DriverError::UsedIndex {
                returned: 1,
                held: 0,
                ..
            }
        ));
        ring.session(&mem).unwrap().publish().unwrap();
        return_chain(&mem, &layout, 2, 0, 0);
        let error = ring.session(&mem).unwrap().poll_used().unwrap_err();
        assert!(matches!(
            error,
            DriverError::UsedIndex {
                returned: 2,
                held: 1,
                ..
            }
        ));
        assert!(ring.session(&mem).unwrap().enable_interrupts().is_err());
    }

    #[test]
    fn used_id() {
        for id in [1, u32::from(SIZE), 65536, u32::MAX] {
            let (mem, mut ring, layout) = driver();
            let mut session = ring.session(&mem).unwrap();
            assert_eq!(session.add(&[BUFFER], &[], 1).unwrap(), 0);
            session.publish().unwrap();
            return_chain(&mem, &layout, 1, id, 0);
            assert!(matches!(session.poll_used(), Err(DriverError::UsedId { id: i }) if i == id));
        }
    }

    #[test]
    fn used_len() {
        let (mem, mut ring, layout) = driver();
        let mut session = ring.session(&mem).unwrap();
        session.add(&[BUFFER], &[BUFFER, BUFFER], 1).unwrap();
        session.publish().unwrap();
        return_chain(&mem, &layout, 1, 0, 33);
        assert!(matches!(
            session.poll_used(),
            Err(DriverError::UsedLen {
                len: 33,
                room: 32,
                ..
            })
        ));
        return_chain(&mem, &layout, 1, 0, 32);
        assert_eq!(session.poll_used().unwrap(), Some((1, 32)));
    }

    #[test]
    fn in_order() {
        let mem = memory();
        let layout = DriverLayout::new(GuestAddress(DESC), SIZE, 4)
            .unwrap()
            .in_order();
        let new = || {
            let mut ring = DriverRing::new(layout, false, &mem).unwrap();
            let mut session = ring.session(&mem).unwrap();
            let heads: Vec<_> = (0..3)
                .map(|token| session.add(&[BUFFER], &[BUFFER], token).unwrap())
                .collect();
            assert_eq!(heads, [0, 2, 4], "ring order");
            session.publish().unwrap();
            ring
        };
        let mut ring = new();
        let mut session = ring.session(&mem).unwrap();
        return_chain(&mem, &layout, 1, 2, 5);
        // The index says that there is one, the element that there are two.
        assert!(matches!(
            session.poll_used(),
            Err(DriverError::UsedId { id: 2 })
        ));
        let mut ring = new();
        let mut session = ring.session(&mem).unwrap();
        return_chain(&mem, &layout, 1, 2, 5);
        mem.write_obj(2_u16.to_le(), GuestAddress(layout.used_ring().0 + 2))
            .unwrap();
        assert_eq!(session.poll_used().unwrap(), Some((0, 16)), "all of it");
        assert!(session.enable_interrupts().unwrap(), "more of the batch");
        assert_eq!(session.poll_used().unwrap(), Some((1, 5)));
        assert_eq!(session.poll_used().unwrap(), None);
        for id in [1, 3, 9, 70_000] {
            let mut ring = new();
            return_chain(&mem, &layout, 1, id, 0);
            let mut session = ring.session(&mem).unwrap();
            assert!(session.poll_used().is_err());
        }
    }

    #[test]
    fn wrong_use() {
        let (mem, mut ring, _) = driver();
        let mut session = ring.session(&mem).unwrap();
        assert!(matches!(session.add(&[], &[], 0), Err(DriverError::Empty)));
        let none = Segment::new(GuestAddress(DATA), 0);
        assert!(matches!(
            session.add(&[none], &[], 0),
            Err(DriverError::Empty)
        ));
        assert!(matches!(
            session.add(&[BUFFER; 9], &[], 0),
            Err(DriverError::TooLong { limit: 8, .. })
        ));
        assert!(matches!(
            session.add_indirect(&[BUFFER; 3], &[BUFFER; 2], 0),
            Err(DriverError::TooLong { limit: 4, .. })
        ));
        session.add(&[BUFFER; 5], &[BUFFER; 3], 0).unwrap();
        assert!(matches!(
            session.add_indirect(&[BUFFER], &[], 0),
            Err(DriverError::Full { .. })
        ));
        assert!(matches!(
            session.add(&[BUFFER], &[], 0),
            Err(DriverError::Full { needed: 1, free: 0 })
        ));
        for (base, size, entries) in [
            (DESC + 8, 8, 0),
            (DESC, 6, 0),
            (DESC, 8, 9),
            (u64::MAX - 15, 8, 0),
        ] {
            assert!(DriverLayout::new(GuestAddress(base), size, entries).is_err());
        }
    }
}
