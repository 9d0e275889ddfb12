//! A disk's driver with many requests in flight, and a model of what the disk holds.

use std::collections::BTreeMap;

use ringside_rings::Segment;
use vm_memory::{Bytes, GuestAddress};

use super::FrontEnd;

/// Request types and status values (VIRTIO 1.3, 5.2.6).
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;

/// Most bytes in one transfer.
pub const ROOM: u64 = 256 << 10;
/// Requests in flight.
const SLOTS: usize = 16;

/// What a request in flight has to bring about.
#[derive(Clone)]
enum Expected {
    Data(Vec<u8>),
    /// The range reads as zeroes afterwards, or (`any`) as before in part or in whole.
    Zeroes {
        any: bool,
    },
    /// What is read is kept, under this number.
    Unknown(u64),
    Nothing,
}

#[derive(Clone)]
struct Flight {
    queue: usize,
    offset: u64,
    len: u64,
    kind: u32,
    expected: Expected,
}

/// A disk as a driver sees it.
pub struct Disk {
    pub front: FrontEnd,
    buffers: Vec<GuestAddress>,
    flights: Vec<Option<Flight>>,
    /// What it holds; a discarded range is looked at again before it is known.
    pub model: Vec<u8>,
    /// What was read without an expectation.
    found: BTreeMap<u64, Vec<u8>>,
    random: u64,
}

impl Disk {
    pub fn new(mut front: FrontEnd, model: Vec<u8>) -> Self {
        let buffers = (0..SLOTS)
            .map(|_| front.guest.alloc(ROOM + 8192, 4096))
            .collect();
        Self {
            front,
            buffers,
            flights: vec![None; SLOTS],
            model,
            found: BTreeMap::new(),
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// The next number of a sequence that is the same each time (xorshift64).
    pub fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Status of one request that may fail.
    pub fn attempt(&mut self, kind: u32, offset: u64, len: u64) -> u8 {
        self.drain();
        let flight = Flight {
            queue: 0,
            offset,
            len,
            kind,
            expected: match kind {
                OUT => Expected::Data(vec![0x5a; len as usize]),
                _ => Expected::Nothing,
            },
        };
        self.submit(0, flight);
        self.front.complete(0);
        self.flights[0] = None;
        let status = GuestAddress(self.buffers[0].0 + ROOM + 4096);
        self.front.guest.memory.read_obj(status).unwrap()
    }

    fn submit(&mut self, slot: usize, flight: Flight) {
        let base = self.buffers[slot];
        let at = |offset: u64| GuestAddress(base.0 + offset);
        let (data, head, status) = (base, at(ROOM), at(ROOM + 4096));
        let memory = self.front.guest.memory.clone();
        let mut header = [0; 16];
        header[..4].copy_from_slice(&flight.kind.to_le_bytes());
        let sector = match flight.kind {
            IN | OUT => flight.offset / 512,
            _ => 0,
        };
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write_slice(&header, head).unwrap();
        memory.write_obj(0xee_u8, status).unwrap();
        let mut readable = vec![Segment::new(head, 16)];
        let mut writable = Vec::new();
        // In two pieces, not aligned to anything.
        let pieces = |len: u64| {
            let cut = (len / 3).max(1);
            [
                Segment::new(data, cut as u32),
                Segment::new(GuestAddress(data.0 + cut), (len - cut) as u32),
            ]
        };
        match flight.kind {
            IN => writable.extend(pieces(flight.len)),
            OUT => {
                if let Expected::Data(bytes) = &flight.expected {
                    memory.write_slice(bytes, data).unwrap();
                }
                readable.extend(pieces(flight.len));
            }
            DISCARD | WRITE_ZEROES => {
                let mut range = (flight.offset / 512).to_le_bytes().to_vec();
                range.extend(((flight.len / 512) as u32).to_le_bytes());
                let unmap = flight.kind == WRITE_ZEROES && flight.offset.is_multiple_of(1024);
                range.extend(u32::from(unmap).to_le_bytes());
                memory.write_slice(&range, data).unwrap();
                readable.push(Segment::new(data, 16));
            }
            _ => {}
        }
        writable.push(Segment::new(status, 1));
        let queue = flight.queue;
        self.flights[slot] = Some(flight);
        self.front.queues[queue].submit(&self.front.guest, &readable, &writable, slot as u64);
    }

    /// Waits for one request of a queue, and checks what it did.
    fn complete(&mut self, queue: usize) {
        let (slot, _) = self.front.complete(queue);
        let slot = slot as usize;
        let flight = self.flights[slot].take().unwrap();
        let base = self.buffers[slot];
        let status = GuestAddress(base.0 + ROOM + 4096);
        let status: u8 = self.front.guest.memory.read_obj(status).unwrap();
        let Flight {
            offset, len, kind, ..
        } = flight;
        assert_eq!(status, OK, "request {kind} at {offset}, {len} bytes");
        let range = offset as usize..(offset + len) as usize;
        match flight.expected {
            Expected::Nothing => {}
            Expected::Unknown(number) => {
                let found = self.front.guest.read(base, len as usize);
                self.found.insert(number, found);
            }
            Expected::Data(bytes) if kind == OUT => self.model[range].copy_from_slice(&bytes),
            Expected::Data(bytes) => {
                let found = self.front.guest.read(base, len as usize);
                let wrong = found.iter().zip(&bytes).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "read at {offset}, {len} bytes");
            }
            Expected::Zeroes { any: false } => self.model[range].fill(0),
            Expected::Zeroes { any: true } => {
                // Each sector may have been kept; the next read says.
                let now = self.read(offset, len);
                for (old, new) in self.model[range].chunks_mut(512).zip(now.chunks(512)) {
                    assert!(old == new || new.iter().all(|&b| b == 0), "discarded");
                    old.copy_from_slice(new);
                }
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.flights.iter().flatten().count()
    }

    /// Ends all requests.
    pub fn drain(&mut self) {
        while let Some(flight) = self.flights.iter().flatten().next() {
            let queue = flight.queue;
            self.complete(queue);
        }
    }

    fn alone(&mut self, flight: Flight) {
        let slot = self.flights.iter().position(Option::is_none).unwrap();
        let queue = flight.queue;
        self.submit(slot, flight);
        while self.flights[slot].is_some() {
            self.complete(queue);
        }
    }

    /// Reads without an expectation, in one request.
    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let mut all = Vec::new();
        for start in (0..len).step_by(ROOM as usize) {
            let piece = ROOM.min(len - start);
            // Others that complete meanwhile may read, too, and take the slot when it is free.
            let number = self.random();
            let slot = self.flights.iter().position(Option::is_none).unwrap();
            let flight = Flight {
                queue: self.front.queues.len() - 1,
                offset: offset + start,
                len: piece,
                kind: IN,
                expected: Expected::Unknown(number),
            };
            let queue = flight.queue;
            self.submit(slot, flight);
            all.extend(loop {
                match self.found.remove(&number) {
                    Some(found) => break found,
                    None => self.complete(queue),
                }
            });
        }
        all
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.alone(Flight {
            queue: 0,
            offset,
            len: data.len() as u64,
            kind: OUT,
            expected: Expected::Data(data.to_vec()),
        });
    }

    pub fn range(&mut self, kind: u32, offset: u64, len: u64) {
        self.alone(Flight {
            queue: 0,
            offset,
            len,
            kind,
            expected: Expected::Zeroes {
                any: kind == DISCARD,
            },
        });
    }

    pub fn flush(&mut self) {
        self.alone(Flight {
            queue: 0,
            offset: 0,
            len: 0,
            kind: FLUSH,
            expected: Expected::Nothing,
        });
    }

    /// Reads the whole disk against the model.
    pub fn verify(&mut self) {
        self.drain();
        let len = self.model.len() as u64;
        for start in (0..len).step_by(ROOM as usize) {
            let end = (start + ROOM).min(len);
            let queue = (start / ROOM) as usize % self.front.queues.len();
            self.alone(Flight {
                queue,
                offset: start,
                len: end - start,
                kind: IN,
                expected: Expected::Data(self.model[start as usize..end as usize].to_vec()),
            });
        }
    }

    /// Random requests on all queues, several at a time; no two that are in flight overlap unless both read.
    pub fn exercise(&mut self, requests: usize, ranges: bool) {
        self.load(requests, ranges);
        self.drain();
    }

    /// The same, with some left in flight.
    pub fn load(&mut self, requests: usize, ranges: bool) {
        let sectors = self.model.len() as u64 / 512;
        for _ in 0..requests {
            while self.in_flight() >= SLOTS - 2 {
                let at = self.random() as usize % SLOTS;
                if let Some(flight) = &self.flights[at] {
                    let queue = flight.queue;
                    self.complete(queue);
                }
            }
            let queue = self.random() as usize % self.front.queues.len();
            let kind = match self.random() % 100 {
                0..45 => OUT,
                45..50 if ranges => WRITE_ZEROES,
                50..55 if ranges => DISCARD,
                55..58 => FLUSH,
                _ => IN,
            };
            let most = match self.random() % 4 {
                0 => ROOM / 512,
                1 => 128,
                _ => 8,
            };
            let len = (1 + self.random() % most.min(sectors)) * 512;
            let offset = self.random() % (sectors - len / 512 + 1) * 512;
            let (offset, len) = if kind == FLUSH { (0, 0) } else { (offset, len) };
            let overlaps = self.flights.iter().flatten().any(|f| {
                f.offset < offset + len && offset < f.offset + f.len && (f.kind != IN || kind != IN)
            });
            if overlaps {
                continue;
            }
            let range = offset as usize..(offset + len) as usize;
            let expected = match kind {
                IN => Expected::Data(self.model[range].to_vec()),
                OUT => {
                    let seed = self.random();
                    Expected::Data(
                        (0..len)
                            .map(|i| (seed.rotate_left((i % 61) as u32) ^ (i / 512)) as u8)
                            .collect(),
                    )
                }
                FLUSH => Expected::Nothing,
                _ => Expected::Zeroes {
                    any: kind == DISCARD,
                },
            };
            let slot = self.flights.iter().position(Option::is_none).unwrap();
            self.submit(
                slot,
                Flight {
                    queue,
                    offset,
                    len,
                    kind,
                    expected,
                },
            );
        }
    }
}
