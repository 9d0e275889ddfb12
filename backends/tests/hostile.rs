//! A front-end and a guest that do what they like: messages in any order with any content, guest memory filled with
//! noise, kicks at any time, connections that break. The back-ends refuse, drop and go on, and serve the next front-end.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use frontend::request::{
    ADD_MEM_REG, GET_CONFIG, GET_FEATURES, GET_VRING_BASE, NEED_REPLY, REM_MEM_REG, RESET_DEVICE,
    RESET_OWNER, SET_CONFIG, SET_FEATURES, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR,
    SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM,
};
use frontend::{Daemon, FrontEnd, PATIENCE, Setup, own_network};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Messages of one run.
const STEPS: usize = 600;
/// Runs, each with other numbers.
const SEEDS: u64 = 4;

/// MQ, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15;
/// VHOST_USER_F_PROTOCOL_FEATURES
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_RING_PACKED
const RING_PACKED: u64 = 1 << 34;
/// The base of a fresh packed queue.
const PACKED_BASE: u32 = 0x8000_8000;

/// Guest memory: two regions of this size in one file, as the front-end says at these addresses of its own.
const REGION: u64 = 1 << 20;
const USER: [u64; 2] = [0x7000_0000, 0x7100_0000];
const GUEST: [u64; 2] = [0, 1 << 32];

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

struct Hostile<'s> {
    socket: &'s Path,
    stream: UnixStream,
    rng: Rng,
    queues: u32,
    offered: u64,
    memory: File,
    events: Vec<EventFd>,
    broken: u32,
}

/// A message was answered, or the connection is gone.
type Answer = Result<Vec<u8>, ()>;

impl<'s> Hostile<'s> {
    fn new(socket: &'s Path, queues: u32, seed: u64) -> Self {
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(2 * REGION).unwrap();
        let mut this = Self {
            socket,
            stream: UnixStream::connect(socket).unwrap(),
            rng: Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            queues,
            offered: 0,
            memory,
            events: (0..4)
                .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
                .collect(),
            broken: 0,
        };
        this.connect();
        this
    }

    fn connect(&mut self) {
        loop {
            self.stream = UnixStream::connect(self.socket).unwrap();
            self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
            if self.negotiate().is_ok() {
                return;
            }
        }
    }

    fn negotiate(&mut self) -> Result<(), ()> {
        self.call(SET_OWNER, &[], &[])?;
        let features = self.call(GET_FEATURES, &[], &[])?;
        self.offered = u64::from_ne_bytes(features.try_into().map_err(|_| ())?);
        self.call(SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes(), &[])?;
        let refused = self.rng.of(&[0, RING_PACKED]);
        let features = self.offered & !refused;
        self.call(SET_FEATURES, &features.to_ne_bytes(), &[])?;
        for region in [0, 1] {
            self.region(ADD_MEM_REG, region)?;
        }
        Ok(())
    }

    /// Sends a message that wants an answer, and waits for it.
    fn call(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> Answer {
        // Before REPLY_ACK is negotiated, only what is asked for is answered.
        let early = [SET_OWNER, SET_PROTOCOL_FEATURES].contains(&request);
        let flags = if early { 1 } else { 1 | NEED_REPLY };
        let mut message = Vec::new();
        for word in [request, flags, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        let parts = [IoSlice::new(&message)];
        let control: &[ControlMessage<'_>] = match fds {
            [] => &[],
            fds => &[ControlMessage::ScmRights(fds)],
        };
        let fd = self.stream.as_raw_fd();
        sendmsg::<()>(fd, &parts, control, MsgFlags::MSG_NOSIGNAL, None).map_err(|_| ())?;
        if early {
            return Ok(Vec::new());
        }
        let mut header = [0; 12];
        self.read(&mut header)?;
        let [.., a, b, c, d] = header;
        let mut payload = vec![0; u32::from_ne_bytes([a, b, c, d]) as usize];
        self.read(&mut payload)?;
        Ok(payload)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), ()> {
        self.stream.read_exact(bytes).map_err(|e| {
            // A connection may end; a back-end that says nothing at all hangs.
            assert_ne!(e.kind(), std::io::ErrorKind::WouldBlock, "no answer");
        })
    }

    fn region(&mut self, request: u32, region: usize) -> Answer {
        let size = self
            .rng
            .of(&[REGION, REGION, REGION, REGION / 2, 2 * REGION, 0]);
        let words = [0, GUEST[region], size, USER[region], REGION * region as u64];
        let payload: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let memory = self.memory.as_raw_fd();
        let fds: &[RawFd] = if request == ADD_MEM_REG {
            &[memory]
        } else {
            &[]
        };
        self.call(request, &payload, fds)
    }

    /// An address in the front-end's address space, mostly in guest memory and aligned.
    fn address(&mut self) -> u64 {
        let base = self.rng.of(&USER);
        match self.rng.below(12) {
            0 => self.rng.next(),
            1 => base + self.rng.below(2 * REGION),
            _ => base + 4096 * self.rng.below(8),
        }
    }

    fn vring(&mut self, request: u32, value: u32) -> Answer {
        let index = self.rng.below(u64::from(self.queues) + 1) as u32;
        let payload = [index.to_ne_bytes(), value.to_ne_bytes()].concat();
        self.call(request, &payload, &[])
    }

    fn descriptor(&mut self, request: u32) -> Answer {
        let index = self.rng.below(u64::from(self.queues) + 1);
        let event = self.rng.below(4) as usize;
        let fd = self.events[event].as_raw_fd();
        match self.rng.below(8) {
            0 => self.call(request, &(index | 0x100).to_ne_bytes(), &[]),
            1 => self.call(request, &index.to_ne_bytes(), &[self.memory.as_raw_fd()]),
            _ => self.call(request, &index.to_ne_bytes(), &[fd]),
        }
    }

    /// All that a ring needs, so that noise meets rings that run.
    fn start(&mut self) -> Answer {
        let index = self.rng.below(self.queues.into()) as u32;
        let pair = |value: u32| [index.to_ne_bytes(), value.to_ne_bytes()].concat();
        self.call(SET_VRING_NUM, &pair(64), &[])?;
        let fresh = self.rng.of(&[0, PACKED_BASE]);
        self.call(SET_VRING_BASE, &pair(fresh), &[])?;
        let base = USER[0] + 0x4000 * u64::from(index);
        let mut address = pair(0);
        for word in [base, base + 0x2000, base + 0x1000, 0] {
            address.extend(word.to_ne_bytes());
        }
        // The indices begin at 0 and a few chains are there.
        let at = 0x4000 * u64::from(index);
        let available = self.rng.below(20) as u16;
        let heads: Vec<u8> = (0..64_u16)
            .flat_map(|i| (i * 3 % 64).to_le_bytes())
            .collect();
        self.memory.write_all_at(&heads, at + 0x1004).unwrap();
        let published = available.to_le_bytes();
        self.memory.write_all_at(&published, at + 0x1002).unwrap();
        self.call(SET_VRING_ADDR, &address, &[])?;
        for request in [SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK] {
            let fd = self.events[1].as_raw_fd();
            self.call(request, &u64::from(index).to_ne_bytes(), &[fd])?;
        }
        self.call(SET_VRING_ENABLE, &pair(1), &[])
    }

    /// Plausible descriptors and requests, in descriptor tables and anywhere near them.
    fn scribble(&mut self) {
        for _ in 0..64 {
            let place = if self.rng.below(2) == 0 {
                16 * self.rng.below(0x2000)
            } else {
                0x4000 * self.rng.below(self.queues.into()) + 16 * self.rng.below(64)
            };
            let address = match self.rng.below(8) {
                0 => self.rng.next(),
                1 => GUEST[1] + self.rng.below(REGION),
                _ => self.rng.below(REGION),
            };
            let len = self.rng.of(&[1, 16, 17, 512, 513, 4096, u32::MAX]);
            let mut flags = self.rng.below(8) as u16;
            let mut next = self.rng.below(66) as u16;
            // The same words of a packed descriptor, mostly available: its id, and its flags.
            if self.rng.below(2) == 0 {
                (flags, next) = (next, flags | 1 << 7);
            }
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            // Also headers of requests: a type and a sector.
            if self.rng.below(3) == 0 {
                let kind = self.rng.below(15) as u32;
                bytes[..8].copy_from_slice(&u64::from(kind).to_le_bytes());
                bytes[8..].copy_from_slice(&self.rng.below(64).to_le_bytes());
            }
            self.memory.write_all_at(&bytes, place).unwrap();
        }
    }

    fn step(&mut self) -> Answer {
        match self.rng.below(24) {
            0..6 => self.start(),
            6 | 7 => {
                let value = self.rng.of(&[64, 128, 2, 0, 100, 32768, u32::MAX]);
                self.vring(SET_VRING_NUM, value)
            }
            8 => {
                let value = self
                    .rng
                    .of(&[0, 5, 0xffff, 0x1_0000, PACKED_BASE, 0x8005_8007]);
                self.vring(SET_VRING_BASE, value)
            }
            9 => self.vring(GET_VRING_BASE, 0),
            10 | 11 => {
                let value = self.rng.of(&[0, 1, 1, 1, 1, 1, 2]);
                self.vring(SET_VRING_ENABLE, value)
            }
            12 => {
                let index = self.rng.below(self.queues.into()) as u32;
                let mut payload = [index.to_ne_bytes(), [0; 4]].concat();
                for _ in 0..3 {
                    payload.extend(self.address().to_ne_bytes());
                }
                payload.extend([0; 8]);
                self.call(SET_VRING_ADDR, &payload, &[])
            }
            13 => self.descriptor(SET_VRING_KICK),
            14 => self.descriptor(SET_VRING_CALL),
            15 => self.descriptor(SET_VRING_ERR),
            16 => {
                let features = self.offered & (self.rng.next() | self.rng.next());
                let features = features | PROTOCOL_FEATURES;
                self.call(SET_FEATURES, &features.to_ne_bytes(), &[])
            }
            17 => {
                let request = self.rng.of(&[ADD_MEM_REG, REM_MEM_REG]);
                let region = self.rng.below(2) as usize;
                self.region(request, region)
            }
            18 => {
                let request = self.rng.of(&[RESET_OWNER, RESET_DEVICE]);
                self.call(request, &[], &[])
            }
            19 => {
                let request = self.rng.of(&[GET_CONFIG, SET_CONFIG]);
                let offset = self.rng.of(&[0, 32, 33, 255, 256]);
                let len = self.rng.of(&[1_u32, 2, 60, 256]);
                let mut payload = Vec::new();
                for word in [offset, len, 1] {
                    payload.extend(word.to_ne_bytes());
                }
                payload.extend(vec![self.rng.next() as u8; len as usize]);
                self.call(request, &payload, &[])
            }
            20 => {
                // No message at all, or half of one.
                let noise: Vec<u8> = (0..12).map(|_| self.rng.next() as u8).collect();
                let _ = self.stream.write_all(&noise);
                self.stream
                    .shutdown(std::net::Shutdown::Write)
                    .map_err(drop)?;
                Err(())
            }
            _ => {
                self.scribble();
                for event in &self.events {
                    let _ = event.write(1);
                }
                Ok(Vec::new())
            }
        }
    }

    fn run(&mut self) {
        for _ in 0..STEPS {
            if self.step().is_err() {
                self.broken += 1;
                self.connect();
            }
        }
    }
}

fn torture(program: &str, args: &[&str], queues: u32) {
    for seed in 1..=SEEDS {
        let daemon = Daemon::start(program, args);
        let socket = daemon.socket();
        let mut hostile = Hostile::new(&socket, queues, seed);
        hostile.run();
        assert!(
            hostile.broken < STEPS as u32 / 4,
            "hardly a message came through"
        );
        drop(hostile);
        drop(FrontEnd::new(&socket, Setup::default()));
        daemon.assert_idle();
        let lines = daemon.log().lines().count();
        assert!(lines < 400, "{lines} lines: {}", daemon.log());
        daemon.stop();
    }
}

#[test]
fn a_disk_outlives_any_front_end() {
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let path = image.path().to_str().unwrap();
    let args = ["--path", path, "--queues", "3"];
    torture(env!("CARGO_BIN_EXE_ringside-blk"), &args, 3);
}

#[test]
fn a_network_device_outlives_any_front_end() {
    if !own_network("a_network_device_outlives_any_front_end") {
        return;
    }
    let args = [
        "--tap",
        "ring0",
        "--tap-ip",
        "10.9.0.1/24",
        "--queue-pairs",
        "2",
    ];
    torture(env!("CARGO_BIN_EXE_ringside-net"), &args, 5);
}
