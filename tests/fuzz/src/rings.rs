//! The device side of a virtqueue whose driver writes what it likes, at any time between two steps of the device.

use std::sync::Arc;

use ringside_rings::{
    ChainBuf, DeviceRing, Inflight, PopError, RingConfig, read_segments, write_segments,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, MmapRegion, Permissions, VolatileMemory,
};

use crate::input::Input;

/// Guest memory: two regions that adjoin at an odd place.
const START: u64 = 0x1000;
const BORDER: u64 = 0x4f8c;
const END: u64 = 0x6000;
/// Where the queue lies, unless the input says otherwise.
const DESCRIPTORS: u64 = START;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
const TABLES: u64 = 0x4000;

/// Flags of packed descriptors (VIRTIO 1.3, 2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Most steps of one input.
const STEPS: usize = 512;

pub(crate) fn split(bytes: &[u8]) {
    run(bytes, false);
}

pub(crate) fn packed(bytes: &[u8]) {
    run(bytes, true);
}

struct Driver<'a> {
    mem: &'a GuestMemoryMmap,
    packed: bool,
    /// The available index of a split queue, as the driver counts.
    idx: u16,
}

impl Driver<'_> {
    /// Writes what lies in guest memory of it.
    fn store(&self, at: u64, bytes: &[u8]) {
        let _ = self.mem.write(bytes, GuestAddress(at)).unwrap_or(0);
    }

    /// A descriptor whose fields are likely to make sense: its 16 bytes as a split queue has them, of which the last two words
    /// are flags and `next`, or as a packed one has, id and flags.
    fn descriptor(&self, input: &mut Input<'_>) -> ([u8; 16], u16) {
        let addr = match input.below(8) {
            0..4 => START + u64::from(input.u16()) % (END - START),
            4 => TABLES + 16 * u64::from(input.below(32)),
            5 => BORDER - 20 + u64::from(input.below(40)),
            6 => END - 20 + u64::from(input.below(40)),
            _ => input.u64(),
        };
        let len = match input.below(4) {
            0 | 1 => u32::from(input.u8()),
            2 => 16 * u32::from(input.below(20)),
            _ => input.u32(),
        };
        let [flags, number] = [input.u8(), input.u8()].map(u16::from);
        // Mostly NEXT, WRITE and INDIRECT.
        let flags = if flags < 0xf0 {
            flags & 7
        } else {
            flags << 8 | number
        };
        let number = if number < 0xf0 {
            number % 20
        } else {
            number << 8
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        let words = if self.packed {
            [number, flags]
        } else {
            [flags, number]
        };
        bytes[12..14].copy_from_slice(&words[0].to_le_bytes());
        bytes[14..].copy_from_slice(&words[1].to_le_bytes());
        (bytes, flags)
    }

    fn index(&mut self, idx: u16) {
        self.idx = idx;
        self.store(DRIVER + 2, &idx.to_le_bytes());
    }

    /// Makes something available as drivers do.
    fn offer(&mut self, input: &mut Input<'_>, ring: &DeviceRing) {
        if !self.packed {
            let head = u16::from(input.u8());
            let at = DRIVER + 4 + 2 * u64::from(self.idx % ring.size());
            self.store(at, &head.to_le_bytes());
            self.index(self.idx.wrapping_add(1));
            return;
        }
        let (mut at, mut wrap) = (ring.next_avail() & 0x7fff, ring.next_avail() & 0x8000 != 0);
        for _ in 0..=input.below(8) {
            let (mut bytes, flags) = self.descriptor(input);
            let turn = if wrap { AVAIL } else { USED };
            let flags = flags & !(AVAIL | USED) | turn;
            bytes[14..].copy_from_slice(&flags.to_le_bytes());
            self.store(DESCRIPTORS + 16 * u64::from(at), &bytes);
            at += 1;
            if at == ring.size() {
                (at, wrap) = (0, !wrap);
            }
        }
    }

    fn write(&mut self, input: &mut Input<'_>, ring: &DeviceRing) {
        match input.below(8) {
            0 | 1 => {
                let (bytes, _) = self.descriptor(input);
                self.store(DESCRIPTORS + 16 * u64::from(input.below(20)), &bytes);
            }
            2 => {
                let (bytes, _) = self.descriptor(input);
                self.store(TABLES + 16 * u64::from(input.below(32)), &bytes);
            }
            3 => {
                let at = START + u64::from(input.u16()) % (END - START);
                let len = input.u8().into();
                self.store(at, input.take(len));
            }
            4 => {
                let idx = input.u16();
                self.index(idx);
            }
            5 => self.store(DRIVER, &input.u32().to_le_bytes()),
            _ => self.offer(input, ring),
        }
    }
}

fn run(bytes: &[u8], packed: bool) {
    let mut input = Input::new(bytes);
    let mem = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(START), (BORDER - START) as usize),
        (GuestAddress(BORDER), (END - BORDER) as usize),
    ])
    .unwrap();
    let flags = input.u8();
    let has = |bit: u8| flags & bit != 0;
    let size = match input.u8() {
        0 => input.u16(),
        any if packed => any.into(),
        any => 1 << (any % 8),
    };
    let mut config = RingConfig {
        size,
        desc_table: GuestAddress(DESCRIPTORS),
        avail_ring: GuestAddress(DRIVER),
        used_ring: GuestAddress(DEVICE),
        packed,
        in_order: has(1),
        event_idx: has(2),
        indirect: has(4),
        next_avail: RingConfig::fresh_index(packed),
        next_used: RingConfig::fresh_index(packed),
    };
    if has(8) {
        (config.next_avail, config.next_used) = (input.u16(), input.u16());
    }
    if has(16) {
        config.desc_table.0 = input.u64();
        config.avail_ring.0 = input.u64();
        config.used_ring.0 = input.u64();
    }
    let ring = if has(32) {
        let entries = u16::from(input.u8());
        let len = Inflight::len(entries, packed);
        let region = Arc::new(MmapRegion::new(len.next_multiple_of(4096)).unwrap());
        for at in (0..len).step_by(64) {
            let given = usize::from(input.u8()).min(64).min(len - at);
            let noise = input.take(given);
            region.as_volatile_slice().write_slice(noise, at).unwrap();
        }
        DeviceRing::resume(&config, &mem, Inflight::new(region, 0, entries))
    } else {
        DeviceRing::new(&config, &mem)
    };
    let Ok(ring) = ring else { return };
    let mut driver = Driver {
        mem: &mem,
        packed,
        idx: config.next_avail,
    };
    let mut device = Device {
        ring,
        mem: &mem,
        buf: ChainBuf::new(size),
        taken: Vec::new(),
    };
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(8) {
            0..3 => driver.write(&mut input, &device.ring),
            3 | 4 => {
                for _ in 0..=input.below(32) {
                    if !device.take() {
                        break;
                    }
                }
            }
            5 => {
                for _ in 0..=input.below(16) {
                    device.give_back(&mut input);
                }
                if input.bool() {
                    device.ring.session(&mem).unwrap().publish().unwrap();
                }
            }
            6 => device.rewind(input.u8().into()),
            _ => {
                let mut session = device.ring.session(&mem).unwrap();
                if input.bool() {
                    // A broken queue is as far as this may go.
                    let _ = session.enable_notifications();
                } else {
                    session.disable_notifications().unwrap();
                }
            }
        }
        device.check(packed);
    }
}

/// The device side, with notes of this test's own beside those that the ring keeps.
struct Device<'a> {
    ring: DeviceRing,
    mem: &'a GuestMemoryMmap,
    buf: ChainBuf,
    /// Chains in the order in which they were taken; `None` for one that was returned.
    taken: Vec<Option<u16>>,
}

impl Device<'_> {
    /// Takes a chain and uses its buffers. `false` if there is none.
    fn take(&mut self) -> bool {
        let mut session = self.ring.session(self.mem).unwrap();
        let head = match session.pop(&mut self.buf) {
            Ok(None) | Err(PopError::Ring(_)) => return false,
            Err(PopError::Chain { head, .. }) => head,
            Ok(Some(chain)) => {
                for segment in chain.readable().iter().chain(chain.writable()) {
                    let len = segment.len as usize;
                    assert!(len > 0);
                    let inside =
                        GuestMemory::check_range(self.mem, segment.addr, len, Permissions::Read);
                    assert!(inside, "{segment:?} sticks out");
                }
                let mut bytes = [0; 8];
                let read = read_segments(self.mem, chain.readable(), 0, &mut bytes);
                assert_eq!(read.is_ok(), chain.readable_len() >= 8);
                let written = write_segments(self.mem, chain.writable(), 0, &bytes);
                assert_eq!(written.is_ok(), chain.writable_len() >= 8);
                chain.head()
            }
        };
        assert!(!self.taken.contains(&Some(head)), "{head} was taken twice");
        self.taken.push(Some(head));
        true
    }

    fn held(&self) -> usize {
        self.taken.iter().flatten().count()
    }

    /// Returns any of the chains that are held.
    fn give_back(&mut self, input: &mut Input<'_>) {
        let Some(which) = usize::from(input.u8()).checked_rem(self.held()) else {
            return;
        };
        let len = input.u32();
        let place = self
            .taken
            .iter_mut()
            .filter(|head| head.is_some())
            .nth(which);
        let head = place.and_then(Option::take).unwrap();
        let mut session = self.ring.session(self.mem).unwrap();
        session.push_used(head, len).unwrap();
        assert!(
            session.push_used(head, len).is_err(),
            "{head} was returned twice"
        );
    }

    fn rewind(&mut self, chains: u16) {
        self.ring.session(self.mem).unwrap().rewind(chains);
        for _ in 0..chains {
            match self.taken.last() {
                Some(Some(_)) => self.taken.pop(),
                _ => break,
            };
        }
    }

    fn check(&self, packed: bool) {
        let size = self.ring.size();
        assert_eq!(
            usize::from(self.ring.in_flight()),
            self.held() + usize::from(self.ring.unserved())
        );
        assert!(self.ring.in_flight() <= size);
        for index in [self.ring.next_avail(), self.ring.next_used()] {
            assert!(!packed || index & 0x7fff < size);
        }
    }
}
