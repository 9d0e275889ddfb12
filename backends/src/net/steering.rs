//! Receive-side scaling on a TAP (VIRTIO 1.3, 5.1.6.5.7): an eBPF program of ours that the kernel asks for the queue of each
//! packet (TUNSETSTEERINGEBPF), and the map by which it is told what the driver wants.
//!
//! ```text
//!  RSS_CONFIG ──▶ Steering::set ──▶ map: hash types, mask, queues, Toeplitz tables
//!                                     │
//!  packet to the TAP ──▶ program: headers ─▶ hash ─▶ queue ──▶ TAP queue of that pair
//! ```
//!
//! The program reads the same headers as [`super::hash`] and uses the same tables, so a packet's queue and its hash report
//! belong together. It needs 5.2 of Linux (values of maps by address), and CAP_BPF where unprivileged programs are off.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_RSS_HASH_TYPE_IPv4, VIRTIO_NET_RSS_HASH_TYPE_IPv6, VIRTIO_NET_RSS_HASH_TYPE_TCPv4,
    VIRTIO_NET_RSS_HASH_TYPE_TCPv6, VIRTIO_NET_RSS_HASH_TYPE_UDPv4, VIRTIO_NET_RSS_HASH_TYPE_UDPv6,
};

use super::config::{ETHERTYPES_VLAN, MAX_TABLE};
use super::hash::{
    EXTENSIONS, Hashing, INPUT, MAX_EXTENSIONS, MAX_TAGS, PROTOCOL_TCP, PROTOCOL_UDP, Report,
};

/// What a driver wants: struct virtio_net_rss_config (VIRTIO 1.3, 5.1.6.5.7.1), made ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rss {
    /// What is hashed, and how.
    pub(super) hashing: Hashing,
    /// By the low bits of the hash: the receive queue's pair. The length is a power of two up to [`MAX_TABLE`].
    pub(super) table: Vec<u16>,
    /// The pair of packets that are not hashed.
    pub(super) unclassified: u16,
    /// Transmit queues in use.
    pub(super) max_tx: u16,
}

impl Rss {
    /// The pair of a packet, given the start of its frame.
    pub(super) fn pair(&self, frame: &[u8]) -> u16 {
        let report = self.hashing.report(frame);
        if report == Report::NONE {
            return self.unclassified;
        }
        let places = self.table.len().max(1);
        let place = usize::try_from(report.value).unwrap_or(0) % places;
        self.table.get(place).copied().unwrap_or(self.unclassified)
    }

    /// As many pairs as must be there for it, from the first on.
    pub(super) fn pairs(&self) -> u16 {
        let highest = self.table.iter().copied().max().unwrap_or(0);
        let receive = highest.max(self.unclassified).saturating_add(1);
        receive.max(self.max_tx)
    }
}

/// The program and its map.
#[derive(Debug)]
pub(super) struct Steering {
    map: OwnedFd,
    program: OwnedFd,
}

impl Steering {
    /// Gives both to the kernel.
    ///
    /// # Errors
    /// What the system said: `PermissionDenied` without CAP_BPF.
    pub(super) fn load() -> io::Result<Self> {
        let map = bpf::create_map(VALUE)?;
        let program = bpf::load_program(&program(map.as_fd()))?;
        Ok(Self { map, program })
    }

    /// What the interface is to ask.
    pub(super) fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Has packets go as a driver wants. `position` tells where the kernel has the queue of a pair.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn set(&self, rss: &Rss, position: impl Fn(u16) -> u16) -> io::Result<()> {
        bpf::set_value(self.map.as_fd(), &value(rss, position))
    }
}

// The value of the map: 32-bit words.
const TYPES: i32 = 0;
const MASK: i32 = 4;
const UNCLASSIFIED: i32 = 8;
const TABLE: i32 = 12;
const TABLE_WORDS: usize = 3 + MAX_TABLE;
/// Where the Toeplitz tables begin.
const TOEPLITZ: usize = TABLE_WORDS * 4;
const TOEPLITZ_STEP: usize = 256 * 4;
/// Length of the value.
const VALUE: usize = TOEPLITZ + INPUT * TOEPLITZ_STEP;

fn value(rss: &Rss, position: impl Fn(u16) -> u16) -> Vec<u8> {
    let mask = u32::try_from(rss.table.len())
        .unwrap_or(1)
        .saturating_sub(1);
    let mut words = vec![rss.hashing.types, mask, position(rss.unclassified).into()];
    words.extend(rss.table.iter().map(|&pair| u32::from(position(pair))));
    words.resize(TABLE_WORDS, 0);
    let tables = rss.hashing.toeplitz.tables().iter().flatten();
    words.extend(tables);
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// Registers, with the meaning that the program gives to those that outlast calls.
#[derive(Debug, Clone, Copy)]
enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    /// The packet (struct __sk_buff).
    Packet,
    /// Where the IP header is; later the next header of IPv6.
    Ip,
    /// Where the ports are.
    Ports,
    /// The value of the map.
    Value,
    /// End of the stack.
    Frame,
}

impl Reg {
    const fn number(self) -> u8 {
        match self {
            Self::R0 => 0,
            Self::R1 => 1,
            Self::R2 => 2,
            Self::R3 => 3,
            Self::R4 => 4,
            Self::Packet => 6,
            Self::Ip => 7,
            Self::Ports => 8,
            Self::Value => 9,
            Self::Frame => 10,
        }
    }
}

/// Places to jump to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    Tag(usize),
    NoTag,
    V4,
    V4Tcp,
    V4Ports,
    V4Addresses,
    V6,
    V6Extension(usize),
    V6Transport,
    V6Tcp,
    V6Ports,
    V6Addresses,
    Hash,
    Unclassified,
}

/// Instructions that are added one behind the other.
#[derive(Debug, Default)]
struct Assembler {
    instructions: Vec<Instruction>,
    labels: Vec<(Label, usize)>,
    jumps: Vec<(Label, usize)>,
}

/// One instruction of eBPF (struct bpf_insn).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Codes of instructions (RFC 9669, 4 and 5): class, operation, and whether the operand is immediate or a register.
const ADD: u8 = 0x07;
const ADD_REG: u8 = 0x0f;
const AND: u8 = 0x57;
const AND_REG: u8 = 0x5f;
const SHIFT_LEFT: u8 = 0x67;
const SHIFT_RIGHT: u8 = 0x77;
const XOR_REG: u8 = 0xaf;
const MOVE: u8 = 0xb7;
const MOVE_REG: u8 = 0xbf;
const TO_BIG_ENDIAN: u8 = 0xdc;
const LOAD_64: u8 = 0x18;
const LOAD_BYTE: u8 = 0x71;
const LOAD_HALF: u8 = 0x69;
const LOAD_WORD: u8 = 0x61;
const LOAD_DOUBLE: u8 = 0x79;
const STORE_WORD: u8 = 0x63;
const STORE_DOUBLE: u8 = 0x7b;
const STORE_DOUBLE_NUMBER: u8 = 0x7a;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_LESS: u8 = 0xa5;
const JUMP_BITS: u8 = 0x45;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// The number of the function bpf_skb_load_bytes.
const SKB_LOAD_BYTES: i32 = 26;
/// LOAD_64 of the address of a map's value (BPF_PSEUDO_MAP_VALUE).
const MAP_VALUE: u8 = 2;

impl Assembler {
    fn add(&mut self, code: u8, to: Reg, from: Option<Reg>, offset: i16, immediate: i32) {
        let from = from.map_or(0, Reg::number);
        self.instructions.push(Instruction {
            code,
            registers: to.number() | from << 4,
            offset,
            immediate,
        });
    }

    /// `to = to OPERATION number`
    fn number(&mut self, operation: u8, to: Reg, number: i32) {
        self.add(operation, to, None, 0, number);
    }

    /// `to = to OPERATION from`
    fn register(&mut self, operation: u8, to: Reg, from: Reg) {
        self.add(operation, to, Some(from), 0, 0);
    }

    /// `to = *(base + offset)`
    fn load(&mut self, size: u8, to: Reg, base: Reg, offset: i16) {
        self.add(size, to, Some(base), offset, 0);
    }

    /// `*(base + offset) = from`
    fn store(&mut self, size: u8, base: Reg, offset: i16, from: Reg) {
        self.add(size, base, Some(from), offset, 0);
    }

    fn label(&mut self, label: Label) {
        self.labels.push((label, self.instructions.len()));
    }

    /// Goes on at a label if `register` is to `number` what the condition says.
    fn jump_if(&mut self, condition: u8, register: Reg, number: i32, label: Label) {
        self.jumps.push((label, self.instructions.len()));
        self.add(condition, register, None, 0, number);
    }

    fn jump(&mut self, label: Label) {
        self.jump_if(JUMP, Reg::R0, 0, label);
    }

    fn exit(&mut self) {
        self.number(EXIT, Reg::R0, 0);
    }

    /// Copies `len` bytes of the packet to the stack; goes on at a label if it has not so many. Its place is the sum of a
    /// register and a number.
    fn read(&mut self, base: Option<Reg>, at: i32, to: i16, len: i32, otherwise: Label) {
        self.register(MOVE_REG, Reg::R1, Reg::Packet);
        match base {
            Some(base) => {
                self.register(MOVE_REG, Reg::R2, base);
                self.number(ADD, Reg::R2, at);
            }
            None => self.number(MOVE, Reg::R2, at),
        }
        self.register(MOVE_REG, Reg::R3, Reg::Frame);
        self.number(ADD, Reg::R3, to.into());
        self.number(MOVE, Reg::R4, len);
        self.number(CALL, Reg::R0, SKB_LOAD_BYTES);
        self.jump_if(JUMP_NOT_EQUAL, Reg::R0, 0, otherwise);
    }

    /// Reads the type in front of what [`Reg::Ip`] says into a register.
    fn ethertype(&mut self, otherwise: Label) {
        self.read(Some(Reg::Ip), -2, SCRATCH, 2, otherwise);
        self.load(LOAD_HALF, Reg::R1, Reg::Frame, SCRATCH);
        self.number(TO_BIG_ENDIAN, Reg::R1, 16);
    }

    /// Goes on at a label if one of these hash types is wanted.
    fn jump_if_wanted(&mut self, types: u32, label: Label) {
        self.load(LOAD_WORD, Reg::R1, Reg::Value, offset(TYPES));
        let types = i32::from_ne_bytes(types.to_ne_bytes());
        self.jump_if(JUMP_BITS, Reg::R1, types, label);
    }

    /// The instructions, with all jumps resolved.
    fn finish(mut self) -> Vec<Instruction> {
        for (label, at) in self.jumps {
            let target = self.labels.iter().find(|(other, _)| *other == label);
            let target = target.map_or(0, |(_, target)| *target);
            let distance = target.wrapping_sub(at).wrapping_sub(1);
            if let (Some(jump), Ok(distance)) =
                (self.instructions.get_mut(at), i16::try_from(distance))
            {
                jump.offset = distance;
            }
        }
        self.instructions
    }
}

/// Offsets of words in the value are small.
fn offset(at: i32) -> i16 {
    i16::try_from(at).unwrap_or(0)
}

const TCP: i32 = PROTOCOL_TCP as i32;
const UDP: i32 = PROTOCOL_UDP as i32;

// The stack, from its end: what is hashed, and headers in front of it.
const INPUT_AT: i16 = -40;
const SCRATCH: i16 = -80;

/// The program, with the map it uses.
fn program(map: BorrowedFd<'_>) -> Vec<Instruction> {
    use Label::*;
    use Reg::*;
    let mut asm = Assembler::default();
    asm.register(MOVE_REG, Packet, R1);
    // An instruction of two: the map, and a place in its value.
    asm.instructions.push(Instruction {
        code: LOAD_64,
        registers: Value.number() | MAP_VALUE << 4,
        offset: 0,
        immediate: map.as_raw_fd(),
    });
    asm.instructions.push(Instruction {
        code: 0,
        registers: 0,
        offset: 0,
        immediate: 0,
    });
    for at in (INPUT_AT..0).step_by(8) {
        asm.add(STORE_DOUBLE_NUMBER, Frame, None, at, 0);
    }

    // The Ethernet header, with VLAN tags that are not in the packet's descriptor.
    asm.number(MOVE, Ip, 14);
    asm.ethertype(Unclassified);
    for round in 0..MAX_TAGS {
        let tag = Tag(round);
        for ethertype in ETHERTYPES_VLAN {
            asm.jump_if(JUMP_EQUAL, R1, ethertype.into(), tag);
        }
        asm.jump(NoTag);
        asm.label(tag);
        asm.number(ADD, Ip, 4);
        asm.ethertype(Unclassified);
    }
    asm.label(NoTag);
    asm.jump_if(JUMP_EQUAL, R1, 0x0800, V4);
    asm.jump_if(JUMP_EQUAL, R1, 0x86dd, V6);
    asm.jump(Unclassified);

    // IPv4: version and header length at 0, fragment at 6, protocol at 9, addresses at 12 (RFC 791, 3.1).
    asm.label(V4);
    asm.read(Some(Ip), 0, SCRATCH, 20, Unclassified);
    asm.load(LOAD_BYTE, R1, Frame, SCRATCH);
    asm.register(MOVE_REG, Ports, R1);
    asm.number(SHIFT_RIGHT, R1, 4);
    asm.jump_if(JUMP_NOT_EQUAL, R1, 4, Unclassified);
    asm.number(AND, Ports, 0xf);
    asm.jump_if(JUMP_LESS, Ports, 5, Unclassified);
    asm.number(SHIFT_LEFT, Ports, 2);
    asm.register(ADD_REG, Ports, Ip);
    for at in [0, 4] {
        asm.load(LOAD_WORD, R1, Frame, SCRATCH + 12 + at);
        asm.store(STORE_WORD, Frame, INPUT_AT + at, R1);
    }
    asm.load(LOAD_HALF, R1, Frame, SCRATCH + 6);
    asm.number(TO_BIG_ENDIAN, R1, 16);
    asm.number(AND, R1, 0x3fff);
    asm.jump_if(JUMP_NOT_EQUAL, R1, 0, V4Addresses);
    asm.load(LOAD_BYTE, R1, Frame, SCRATCH + 9);
    asm.jump_if(JUMP_EQUAL, R1, TCP, V4Tcp);
    asm.jump_if(JUMP_NOT_EQUAL, R1, UDP, V4Addresses);
    asm.jump_if_wanted(VIRTIO_NET_RSS_HASH_TYPE_UDPv4, V4Ports);
    asm.jump(V4Addresses);
    asm.label(V4Tcp);
    asm.jump_if_wanted(VIRTIO_NET_RSS_HASH_TYPE_TCPv4, V4Ports);
    asm.jump(V4Addresses);
    asm.label(V4Ports);
    asm.read(Some(Ports), 0, INPUT_AT + 8, 4, V4Addresses);
    asm.jump(Hash);
    asm.label(V4Addresses);
    asm.jump_if_wanted(VIRTIO_NET_RSS_HASH_TYPE_IPv4, Hash);
    asm.jump(Unclassified);

    // IPv6: version at 0, next header at 6, addresses at 8 (RFC 8200, 3).
    asm.label(V6);
    asm.read(Some(Ip), 0, SCRATCH, 40, Unclassified);
    asm.load(LOAD_BYTE, R1, Frame, SCRATCH);
    asm.number(SHIFT_RIGHT, R1, 4);
    asm.jump_if(JUMP_NOT_EQUAL, R1, 6, Unclassified);
    for at in (0..32).step_by(8) {
        asm.load(LOAD_DOUBLE, R1, Frame, SCRATCH + 8 + at);
        asm.store(STORE_DOUBLE, Frame, INPUT_AT + at, R1);
    }
    asm.register(MOVE_REG, Ports, Ip);
    asm.number(ADD, Ports, 40);
    let next = Ip;
    asm.load(LOAD_BYTE, next, Frame, SCRATCH + 6);
    for round in 0..MAX_EXTENSIONS {
        let skip = V6Extension(round);
        for extension in EXTENSIONS {
            asm.jump_if(JUMP_EQUAL, next, extension.into(), skip);
        }
        asm.jump(V6Transport);
        asm.label(skip);
        asm.read(Some(Ports), 0, SCRATCH, 2, V6Addresses);
        asm.load(LOAD_BYTE, next, Frame, SCRATCH);
        asm.load(LOAD_BYTE, R1, Frame, SCRATCH + 1);
        asm.number(ADD, R1, 1);
        asm.number(SHIFT_LEFT, R1, 3);
        asm.register(ADD_REG, Ports, R1);
    }
    asm.label(V6Transport);
    asm.jump_if(JUMP_EQUAL, next, TCP, V6Tcp);
    asm.jump_if(JUMP_NOT_EQUAL, next, UDP, V6Addresses);
    asm.jump_if_wanted(VIRTIO_NET_RSS_HASH_TYPE_UDPv6, V6Ports);
    asm.jump(V6Addresses);
    asm.label(V6Tcp);
    asm.jump_if_wanted(VIRTIO_NET_RSS_HASH_TYPE_TCPv6, V6Ports);
    asm.jump(V6Addresses);
    asm.label(V6Ports);
    asm.read(Some(Ports), 0, INPUT_AT + 32, 4, V6Addresses);
    asm.jump(Hash);
    asm.label(V6Addresses);
    asm.jump_if_wanted(VIRTIO_NET_RSS_HASH_TYPE_IPv6, Hash);
    asm.jump(Unclassified);

    // All of the input: zeroes behind it add nothing.
    asm.label(Hash);
    asm.number(MOVE, R0, 0);
    let tables = (TOEPLITZ..).step_by(TOEPLITZ_STEP);
    for (at, table) in (INPUT_AT..0).zip(tables).take(INPUT) {
        asm.load(LOAD_BYTE, R1, Frame, at);
        asm.number(SHIFT_LEFT, R1, 2);
        asm.register(ADD_REG, R1, Value);
        asm.number(ADD, R1, i32::try_from(table).unwrap_or(0));
        asm.load(LOAD_WORD, R1, R1, 0);
        asm.register(XOR_REG, R0, R1);
    }
    asm.load(LOAD_WORD, R1, Value, offset(MASK));
    asm.register(AND_REG, R0, R1);
    // The verifier wants to see that the table is long enough.
    asm.number(AND, R0, i32::try_from(MAX_TABLE - 1).unwrap_or(0));
    asm.number(SHIFT_LEFT, R0, 2);
    asm.register(ADD_REG, R0, Value);
    asm.load(LOAD_WORD, R0, R0, offset(TABLE));
    asm.exit();
    asm.label(Unclassified);
    asm.load(LOAD_WORD, R0, Value, offset(UNCLASSIFIED));
    asm.exit();
    asm.finish()
}

/// The system call, behind functions that cannot be called wrongly.
#[allow(
    unsafe_code,
    reason = "bpf has no wrapper that loads a program of so few instructions"
)]
mod bpf {
    use std::ffi::{c_int, c_long};
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

    use super::Instruction;

    const MAP_CREATE: c_int = 0;
    const MAP_UPDATE_ELEM: c_int = 2;
    const PROG_LOAD: c_int = 5;
    const MAP_TYPE_ARRAY: u32 = 2;
    const PROG_TYPE_SOCKET_FILTER: u32 = 1;

    /// The beginning of union bpf_attr for MAP_CREATE.
    #[repr(C)]
    struct MapCreate {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }

    /// The beginning of union bpf_attr for MAP_UPDATE_ELEM.
    #[repr(C)]
    struct MapUpdate {
        map_fd: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }

    /// The beginning of union bpf_attr for PROG_LOAD.
    #[repr(C)]
    struct ProgLoad {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
    }

    fn address<T>(of: *const T) -> u64 {
        u64::try_from(of.expose_provenance()).unwrap_or(0)
    }

    fn invalid<E>(_: E) -> io::Error {
        io::ErrorKind::InvalidInput.into()
    }

    /// # Safety
    /// `attr` must begin as union bpf_attr does for this command, and all addresses in it be valid for its duration.
    unsafe fn call<T>(command: c_int, attr: &T) -> io::Result<c_long> {
        // SAFETY: the kernel reads the attributes, which live until after the call; the caller vouches for the rest.
        let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(done)
    }

    fn owned(fd: c_long) -> io::Result<OwnedFd> {
        let fd = c_int::try_from(fd).map_err(invalid)?;
        // SAFETY: the kernel has just made it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// A map with one value of `len` bytes, all zero.
    pub(super) fn create_map(len: usize) -> io::Result<OwnedFd> {
        let attr = MapCreate {
            map_type: MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: u32::try_from(len).map_err(invalid)?,
            max_entries: 1,
        };
        // SAFETY: these are the attributes of this command, without addresses.
        owned(unsafe { call(MAP_CREATE, &attr) }?)
    }

    /// Replaces the value of a map that [`create_map`] made for this length.
    pub(super) fn set_value(map: BorrowedFd<'_>, value: &[u8]) -> io::Result<()> {
        let key = 0_u32;
        let attr = MapUpdate {
            map_fd: u32::try_from(map.as_raw_fd()).map_err(invalid)?,
            padding: 0,
            key: address(&raw const key),
            value: address(value.as_ptr()),
            flags: 0,
        };
        // SAFETY: these are the attributes of this command; the kernel reads a key of 4 bytes and a value of the map's length,
        // which both live until after the call.
        unsafe { call(MAP_UPDATE_ELEM, &attr) }.map(drop)
    }

    /// Has the kernel check a program.
    pub(super) fn load_program(program: &[Instruction]) -> io::Result<OwnedFd> {
        let license = c"Apache-2.0 OR BSD-3-Clause";
        let attr = ProgLoad {
            prog_type: PROG_TYPE_SOCKET_FILTER,
            insn_cnt: u32::try_from(program.len()).map_err(invalid)?,
            insns: address(program.as_ptr()),
            license: address(license.as_ptr()),
        };
        // SAFETY: these are the attributes of this command; the kernel reads so many instructions and a string, which live until
        // after the call.
        owned(unsafe { call(PROG_LOAD, &attr) }?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::hash::{HASH_TYPES, Toeplitz, vectors};
    use proptest::prelude::*;

    /// Where the program's stack ends, and where the value of its map begins.
    const STACK: u64 = 0x1000_0000;
    const MAP: u64 = 0x2000_0000;

    /// Memory of the program.
    struct Machine<'a> {
        stack: [u8; 512],
        map: &'a [u8],
    }

    impl Machine<'_> {
        fn load<const N: usize>(&self, at: u64) -> [u8; N] {
            let (bytes, at) = match at.checked_sub(MAP) {
                Some(at) => (self.map, at),
                None => (&self.stack[..], at + 512 - STACK),
            };
            let at = usize::try_from(at).unwrap();
            bytes[at..at + N].try_into().unwrap()
        }

        fn store(&mut self, at: u64, bytes: &[u8]) {
            let at = usize::try_from(at + 512 - STACK).unwrap();
            self.stack[at..at + bytes.len()].copy_from_slice(bytes);
        }

        /// What the program says of a packet.
        fn run(&mut self, program: &[Instruction], packet: &[u8]) -> u64 {
            let mut regs = [0_u64; 11];
            regs[10] = STACK;
            let mut at = 0;
            loop {
                let Instruction {
                    code,
                    registers,
                    offset,
                    immediate,
                } = program[at];
                at += 1;
                let to = usize::from(registers & 0xf);
                let from = regs[usize::from(registers >> 4)];
                let number = i64::from(immediate).cast_unsigned();
                let place = |base: u64| base.wrapping_add_signed(offset.into());
                let jumps = match code {
                    ADD => {
                        regs[to] = regs[to].wrapping_add(number);
                        false
                    }
                    ADD_REG => {
                        regs[to] = regs[to].wrapping_add(from);
                        false
                    }
                    AND => {
                        regs[to] &= number;
                        false
                    }
                    AND_REG => {
                        regs[to] &= from;
                        false
                    }
                    SHIFT_LEFT => {
                        regs[to] <<= number;
                        false
                    }
                    SHIFT_RIGHT => {
                        regs[to] >>= number;
                        false
                    }
                    XOR_REG => {
                        regs[to] ^= from;
                        false
                    }
                    MOVE => {
                        regs[to] = number;
                        false
                    }
                    MOVE_REG => {
                        regs[to] = from;
                        false
                    }
                    TO_BIG_ENDIAN => {
                        let low = u16::try_from(regs[to] & 0xffff).unwrap();
                        regs[to] = low.to_be().into();
                        false
                    }
                    LOAD_64 => {
                        regs[to] = MAP;
                        at += 1;
                        false
                    }
                    LOAD_BYTE => {
                        regs[to] = u8::from_ne_bytes(self.load(place(from))).into();
                        false
                    }
                    LOAD_HALF => {
                        regs[to] = u16::from_ne_bytes(self.load(place(from))).into();
                        false
                    }
                    LOAD_WORD => {
                        regs[to] = u32::from_ne_bytes(self.load(place(from))).into();
                        false
                    }
                    LOAD_DOUBLE => {
                        regs[to] = u64::from_ne_bytes(self.load(place(from)));
                        false
                    }
                    STORE_WORD => {
                        let [a, b, c, d, ..] = from.to_le_bytes();
                        self.store(place(regs[to]), &[a, b, c, d]);
                        false
                    }
                    STORE_DOUBLE => {
                        self.store(place(regs[to]), &from.to_le_bytes());
                        false
                    }
                    STORE_DOUBLE_NUMBER => {
                        self.store(place(regs[to]), &number.to_le_bytes());
                        false
                    }
                    CALL => {
                        assert_eq!(immediate, SKB_LOAD_BYTES);
                        let start = usize::try_from(regs[2]).unwrap();
                        let end = start + usize::try_from(regs[4]).unwrap();
                        let bytes = packet.get(start..end);
                        if let Some(bytes) = bytes {
                            self.store(regs[3], bytes);
                        }
                        regs[0] = if bytes.is_some() { 0 } else { u64::MAX };
                        // The kernel keeps none of these.
                        regs[1..=5].fill(0x5555_5555);
                        false
                    }
                    JUMP => true,
                    JUMP_EQUAL => regs[to] == number,
                    JUMP_NOT_EQUAL => regs[to] != number,
                    JUMP_LESS => regs[to] < number,
                    JUMP_BITS => regs[to] & number != 0,
                    EXIT => return regs[0],
                    other => panic!("instruction {other:#x}"),
                };
                if jumps {
                    at = at.checked_add_signed(offset.into()).unwrap();
                }
            }
        }
    }

    proptest! {
        /// A packet goes to the queue that its hash report tells of.
        #[test]
        fn the_program_hashes_as_reports_do(
            number in 0..vectors::ALL.len(),
            protocol in prop::sample::select(vec![6_u8, 17, 47]),
            tags in prop::collection::vec(prop::sample::select(vec![0x8100_u16, 0x88a8, 0x9100]), 0..4),
            options in prop::option::of((prop::sample::select(vec![0_u8, 43, 60, 44]), prop::sample::select(vec![6_u8, 17, 60]))),
            types in 0..=HASH_TYPES,
            len in 0..120_usize,
            change in prop::option::of((12..60_usize, any::<u8>())),
        ) {
            let options = options.map(|(first, next)| (first, [next, 0, 0, 0, 0, 0, 0, 0]));
            let options = options.as_ref().map(|(first, options)| (*first, &options[..]));
            let mut frame = vectors::frame(&vectors::ALL[number], protocol, &tags, options);
            if let Some((at, byte)) = change {
                frame[at] = byte;
            }
            frame.truncate(len + 20);
            let rss = Rss {
                hashing: Hashing {
                    types,
                    toeplitz: Toeplitz::new(&vectors::KEY),
                },
                table: (0..128).collect(),
                unclassified: 200,
                max_tx: 1,
            };
            let file = tempfile::tempfile().unwrap();
            let map = value(&rss, |pair| pair);
            let mut machine = Machine { stack: [0xaa; 512], map: &map };
            let queue = machine.run(&program(file.as_fd()), &frame);
            prop_assert_eq!(queue, u64::from(rss.pair(&frame)), "{:02x?}", frame);
        }
    }

    #[test]
    fn every_jump_leads_to_a_place_in_the_program() {
        let file = tempfile::tempfile().unwrap();
        let program = program(file.as_fd());
        let conditions = [JUMP, JUMP_EQUAL, JUMP_NOT_EQUAL, JUMP_LESS, JUMP_BITS];
        let mut jumps = 0;
        for (at, instruction) in program.iter().enumerate() {
            if conditions.contains(&instruction.code) {
                jumps += 1;
                let distance = usize::try_from(instruction.offset).expect("a jump back");
                assert!(at + 1 + distance < program.len(), "{at}");
            }
        }
        assert!(jumps > 30);
        assert_eq!(program.last().unwrap().code, EXIT);
    }

    #[test]
    fn the_value_lies_as_the_program_reads_it() {
        let rss = Rss {
            hashing: Hashing {
                types: 0,
                toeplitz: Toeplitz::new(&[]),
            },
            table: vec![2, 0, 1, 2],
            unclassified: 1,
            max_tx: 1,
        };
        assert_eq!(rss.pairs(), 3);
        let value = value(&rss, |pair| pair + 10);
        assert_eq!(value.len(), VALUE);
        let word = |at: i32| {
            let at = usize::try_from(at).unwrap();
            u32::from_ne_bytes(value[at..at + 4].try_into().unwrap())
        };
        assert_eq!([word(TYPES), word(MASK), word(UNCLASSIFIED)], [0, 3, 11]);
        assert_eq!(
            [0, 4, 8, 12, 16].map(|at| word(TABLE + at)),
            [12, 10, 11, 12, 0]
        );
    }
}
