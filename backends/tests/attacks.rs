//! Attacks on whole back-ends, one test each: through the rings, split and packed, by descriptors that are written as they
//! are; and through the socket, by messages that are. What each is answered with is the rule that `ringside_rings` and
//! `ringside_backends::shell` state. Afterwards the other rings and the next front-end are served as if nothing had been.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use frontend::disk::{IN, OUT};
use frontend::request::{
    ADD_MEM_REG, GET_CONFIG, GET_FEATURES, GET_VRING_BASE, NEED_REPLY, SET_FEATURES, SET_MEM_TABLE,
    SET_OWNER, SET_VRING_ADDR, SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM,
};
use frontend::{
    Daemon, FrontEnd, Guest, PATIENCE, REGION, Raw, SECOND, Setup, negotiate, own_network,
    readable, skip, still_serves,
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
use ringside_rings::{DriverLayout, Segment};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NET: &str = env!("CARGO_BIN_EXE_ringside-net");

/// Flags of descriptors (VIRTIO 1.3, 2.7.5, 2.8.1).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A descriptor as an attacker writes it. Those of one chain are linked unless `flags` or `next` say otherwise.
#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    /// In place of the one behind; of no meaning in a packed queue.
    next: Option<u16>,
}

fn desc(addr: u64, len: u32, flags: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next: None,
    }
}

/// What became of a chain.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// It was returned, and so many bytes are said to be written.
    Returned(u32),
    /// Its queue was stopped.
    Broken,
}

/// What is attacked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Disk,
    /// A network card with a TAP.
    Card,
    /// A port of a switch that serves another guest, too.
    Port,
}

/// The guest at another port of the switch: its memory is in the same process.
struct Bystander(FrontEnd);

impl Bystander {
    /// What its memory is full of, where nothing has a place.
    const FILLED: u8 = 0xa5;
    /// Where that begins in the first region, behind its buffers; all of the second one is.
    const BEHIND: u64 = Self::BUFFERS + (Self::COUNT + 1) * Self::SIZE;
    /// Buffers for what the attacker sends to all, and one more.
    const BUFFERS: u64 = 4 << 20;
    const COUNT: u64 = 32;
    const SIZE: u64 = 2048;

    fn new(daemon: &Daemon) -> Self {
        let setup = Setup {
            queues: 2,
            ..Setup::default()
        };
        let front = FrontEnd::new(&daemon.dir.path().join("bystander"), setup);
        for (start, len) in Self::PLACES {
            let bytes = vec![Self::FILLED; len as usize];
            let memory = &front.guest.memory;
            memory.write_slice(&bytes, GuestAddress(start)).unwrap();
        }
        let mut this = Self(front);
        (0..Self::COUNT).for_each(|number| this.post(number));
        this
    }

    const PLACES: [(u64, u64); 2] = [(Self::BEHIND, REGION - Self::BEHIND), (SECOND, REGION)];

    fn post(&mut self, number: u64) {
        let buffer = GuestAddress(Self::BUFFERS + number * Self::SIZE);
        let segment = [Segment::new(buffer, Self::SIZE as u32)];
        let Self(front) = self;
        front.queues[0].submit(&front.guest, &[], &segment, number);
    }

    /// Whatever it was sent, it gets a frame in the next buffer, and nothing anywhere else.
    fn receives(mut self, send: impl FnOnce()) {
        let Self(front) = &mut self;
        let mut next = 0;
        let memory = &front.guest.memory;
        let mut session = front.queues[0].ring.session(memory).unwrap();
        while let Some((number, _)) = session.poll_used().unwrap() {
            assert_eq!(number, next);
            next += 1;
        }
        self.post(Self::COUNT);
        send();
        let Self(front) = &mut self;
        assert_eq!(front.complete(0), (next, 72));
        for (start, len) in Self::PLACES {
            let bytes = front.guest.read(GuestAddress(start), len as usize);
            let other = bytes.iter().position(|byte| *byte != Self::FILLED);
            assert_eq!(other, None, "behind {start:#x}");
        }
    }
}

/// A device that is attacked through one of its queues, and another queue that must not notice.
struct Attack {
    daemon: Daemon,
    front: FrontEnd,
    setup: Setup,
    /// The queue, and the other one.
    queue: usize,
    other: usize,
    network: bool,
    bystander: Option<Bystander>,
    /// Chains that were offered.
    offered: u16,
    /// Of a packed queue, where the next descriptor goes.
    at: u16,
    wrap: bool,
}

impl Attack {
    fn new(target: Target, packed: bool) -> Self {
        let network = target != Target::Disk;
        let daemon = match target {
            Target::Disk => Daemon::start(BLK, &["--null", "1G", "--queues", "2"]),
            Target::Card => Daemon::start(NET, &["--tap", "ring0", "--queue-pairs", "2"]),
            Target::Port => {
                let dir = tempfile::tempdir().unwrap();
                let socket = |name| format!("socket={}", dir.path().join(name).display());
                let mut switch = Command::new(NET);
                switch.arg("--port").arg(socket("s") + ",queue-pairs=2");
                switch.arg("--port").arg(socket("bystander"));
                let daemon = Daemon::spawn_command(&mut switch, dir);
                daemon.wait_for_line("ringside-net ready");
                daemon
            }
        };
        let bystander = (target == Target::Port).then(|| Bystander::new(&daemon));
        let queues = if network { 4 } else { 2 };
        let setup = Setup {
            queues,
            packed,
            ..Setup::default()
        };
        let front = FrontEnd::new(&daemon.socket(), setup);
        // Of a network card the transmit queues.
        let (queue, other) = if network { (1, 3) } else { (0, 1) };
        Self {
            daemon,
            front,
            setup,
            queue,
            other,
            network,
            bystander,
            offered: 0,
            at: 0,
            wrap: true,
        }
    }

    fn store(&self, at: u64, bytes: &[u8]) {
        let memory = &self.front.guest.memory;
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// A request that is in order: descriptors of what the device reads, and of what it writes.
    fn request(&mut self) -> [Desc; 2] {
        let guest = &mut self.front.guest;
        let (head, tail) = (guest.alloc(80, 16).0, guest.alloc(16, 16).0);
        // VIRTIO_BLK_T_FLUSH, or a header that asks for nothing.
        let kind = if self.network { 0 } else { 4 };
        self.store(head, &[kind]);
        if self.network {
            // Behind the header of 12 bytes: to all.
            self.store(head + 12, &[0xff; 6]);
        }
        let len = if self.network { 72 } else { 16 };
        [desc(head, len, 0), desc(tail, 1, WRITE)]
    }

    /// That request as its device takes it.
    fn valid(&mut self) -> Vec<Desc> {
        let [readable, writable] = self.request();
        if self.network {
            vec![readable]
        } else {
            vec![readable, writable]
        }
    }

    /// Bytes of descriptors, linked where they stand in a table.
    fn table(chain: &[Desc]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (index, desc) in chain.iter().enumerate() {
            let linked = index + 1 < chain.len() && desc.flags & INDIRECT == 0;
            let next = desc.next.unwrap_or(index as u16 + 1);
            let flags = desc.flags
                | if linked || desc.next.is_some() {
                    NEXT
                } else {
                    0
                };
            bytes.extend(desc.addr.to_le_bytes());
            bytes.extend(desc.len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
        }
        bytes
    }

    /// Puts descriptors into guest memory, and gives one that refers to them.
    fn indirect(&mut self, table: &[Desc]) -> Desc {
        let mut bytes = Self::table(table);
        if self.setup.packed {
            // Without links, and the words at the end the other way round (VIRTIO 1.3, 2.8.7).
            for (bytes, desc) in bytes.chunks_exact_mut(16).zip(table) {
                bytes[12..14].copy_from_slice(&[0; 2]);
                bytes[14..].copy_from_slice(&desc.flags.to_le_bytes());
            }
        }
        let at = self.front.guest.alloc(bytes.len() as u64, 16).0;
        self.store(at, &bytes);
        desc(at, bytes.len() as u32, INDIRECT)
    }

    /// Makes a chain available, and kicks.
    fn offer(&mut self, chain: &[Desc]) {
        let layout = *self.front.queues[self.queue].ring.layout();
        let descriptors = layout.desc_table().0;
        if self.setup.packed {
            let mut first = None;
            for (index, desc) in chain.iter().enumerate() {
                let linked = index + 1 < chain.len();
                let turn = if self.wrap { AVAIL } else { USED };
                let flags = desc.flags | turn | if linked { NEXT } else { 0 };
                let place = descriptors + 16 * u64::from(self.at);
                let mut bytes = desc.addr.to_le_bytes().to_vec();
                bytes.extend(desc.len.to_le_bytes());
                bytes.extend(self.offered.to_le_bytes());
                self.store(place, &bytes);
                // The first one speaks for all: last.
                let flags = (place + 14, flags.to_le_bytes());
                if index == 0 {
                    first = Some(flags);
                } else {
                    self.store(flags.0, &flags.1);
                }
                self.at += 1;
                if self.at == layout.size() {
                    (self.at, self.wrap) = (0, !self.wrap);
                }
            }
            let (place, flags) = first.unwrap();
            self.store(place, &flags);
        } else {
            self.store(descriptors, &Self::table(chain));
            let available = layout.avail_ring().0;
            let slot = u64::from(self.offered % layout.size());
            self.store(available + 4 + 2 * slot, &[0; 2]);
            let index = self.offered.wrapping_add(1);
            self.store(available + 2, &index.to_le_bytes());
        }
        self.offered = self.offered.wrapping_add(1);
        self.kick();
    }

    fn kick(&self) {
        self.front.queues[self.queue].kick.write(1).unwrap();
    }

    /// Waits until the device returns the chain offered last, which was at `place` if the queue is packed, or stops the queue.
    fn outcome(&self, place: (u16, bool)) -> Outcome {
        let queue = &self.front.queues[self.queue];
        let layout = *queue.ring.layout();
        let memory = &self.front.guest.memory;
        let start = Instant::now();
        loop {
            let (returned, len) = if self.setup.packed {
                let at = layout.desc_table().0 + 16 * u64::from(place.0);
                let flags: u16 = memory.read_obj(GuestAddress(at + 14)).unwrap();
                let turn = if place.1 { AVAIL | USED } else { 0 };
                (flags & (AVAIL | USED) == turn, at + 8)
            } else {
                let used = layout.used_ring().0;
                let index: u16 = memory.read_obj(GuestAddress(used + 2)).unwrap();
                let slot = u64::from((self.offered - 1) % layout.size());
                (index == self.offered, used + 4 + 8 * slot + 4)
            };
            if returned {
                return Outcome::Returned(memory.read_obj(GuestAddress(len)).unwrap());
            }
            if readable(queue.err.as_raw_fd(), Duration::ZERO) {
                return Outcome::Broken;
            }
            assert!(start.elapsed() < PATIENCE, "nothing: {}", self.daemon.log());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn answer(&mut self, chain: &[Desc]) -> Outcome {
        let place = (self.at, self.wrap);
        self.offer(chain);
        self.outcome(place)
    }

    /// The chain is returned with nothing done, and the next one on the same queue is served.
    fn is_malformed(&mut self, chain: &[Desc]) {
        assert_eq!(self.answer(chain), Outcome::Returned(0));
        self.still_served();
    }

    fn still_served(&mut self) {
        let chain = self.valid();
        let written = u32::from(!self.network);
        assert_eq!(self.answer(&chain), Outcome::Returned(written));
    }

    /// Another front-end takes the place of this one.
    fn connect(&mut self) {
        self.front.raw.0.shutdown(Shutdown::Both).unwrap();
        self.front = FrontEnd::new(&self.daemon.socket(), self.setup);
        (self.offered, self.at, self.wrap) = (0, 0, true);
    }

    /// The other queue, another front-end, and the process are as they were.
    fn end(mut self) {
        let [head, tail] = self.request();
        let segment = |desc: Desc| Segment::new(GuestAddress(desc.addr), desc.len);
        let writable = [segment(tail)];
        let writable: &[_] = if self.network { &[] } else { &writable };
        let other = &mut self.front.queues[self.other];
        other.submit(&self.front.guest, &[segment(head)], writable, 7);
        assert_eq!(self.front.complete(self.other).0, 7);
        self.daemon.assert_idle();
        self.connect();
        self.still_served();
        if let Some(bystander) = self.bystander.take() {
            bystander.receives(|| self.still_served());
        }
        let lines = self.daemon.log().lines().count();
        assert!(lines < 60, "{}", self.daemon.log());
        self.daemon.stop();
    }
}

/// Attacks a disk, a port of a switch and a network card, with both kinds of queues.
fn attack(test: &str, with: impl Fn(&mut Attack)) {
    for target in [Target::Disk, Target::Port, Target::Card] {
        if target == Target::Card && !own_network(test) {
            return;
        }
        for packed in [false, true] {
            let mut device = Attack::new(target, packed);
            with(&mut device);
            device.end();
        }
    }
}

#[test]
fn what_is_in_order_is_served() {
    attack("what_is_in_order_is_served", |attack| {
        for _ in 0..200 {
            attack.still_served();
        }
        let mut chain = attack.valid();
        let table = attack.indirect(&chain);
        chain = vec![table];
        let written = u32::from(!attack.network);
        assert_eq!(attack.answer(&chain), Outcome::Returned(written));
    });
}

#[test]
fn a_loop_of_descriptors() {
    attack("a_loop_of_descriptors", |attack| {
        let mut chain = attack.valid();
        if attack.setup.packed {
            // Each is followed by the next one, all around.
            let one = chain[0];
            let size = attack.front.queues[attack.queue].ring.layout().size();
            chain = vec![desc(one.addr, one.len, NEXT); size.into()];
            assert_eq!(attack.answer(&chain), Outcome::Broken);
            return;
        }
        chain.last_mut().unwrap().next = Some(0);
        attack.is_malformed(&chain);
        // Also inside an indirect table.
        let table = attack.indirect(&chain);
        attack.is_malformed(&[table]);
    });
}

#[test]
fn a_chain_longer_than_its_queue() {
    attack("a_chain_longer_than_its_queue", |attack| {
        let one = attack.valid()[0];
        let table = attack.indirect(&vec![desc(one.addr, 1, 0); 129]);
        attack.is_malformed(&[table]);
        if !attack.setup.packed {
            // Direct descriptors before a table that fills the queue alone.
            let table = attack.indirect(&[desc(one.addr, 1, 0); 64]);
            let mut table = table;
            table.flags |= WRITE;
            attack.is_malformed(&[one, table]);
        }
    });
}

#[test]
fn addresses_outside_guest_memory_and_at_its_edges() {
    attack(
        "addresses_outside_guest_memory_and_at_its_edges",
        |attack| {
            for (addr, len) in [
                (REGION, 16),
                (REGION - 8, 16),
                (SECOND - 1, 16),
                (SECOND + REGION - 15, 16),
                (SECOND + REGION, 1),
                (1 << 63, 16),
            ] {
                attack.is_malformed(&[desc(addr, len, 0)]);
                let head = attack.valid()[0];
                attack.is_malformed(&[head, desc(addr, len, WRITE)]);
            }
            // The very last bytes of a region are memory like any other.
            let mut chain = attack.valid();
            let last = chain.last_mut().unwrap();
            last.addr = SECOND + REGION - u64::from(last.len);
            let written = u32::from(!attack.network);
            assert_eq!(attack.answer(&chain), Outcome::Returned(written));
        },
    );
}

#[test]
fn lengths_that_overflow() {
    attack("lengths_that_overflow", |attack| {
        let head = attack.valid()[0];
        for (addr, len) in [
            (u64::MAX - 7, 16),
            (u64::MAX, 1),
            (head.addr, u32::MAX),
            (0, u32::MAX),
            (head.addr, 0),
        ] {
            attack.is_malformed(&[head, desc(addr, len, WRITE)]);
            attack.is_malformed(&[desc(addr, len, 0)]);
        }
    });
}

#[test]
fn indirect_tables_that_are_none() {
    attack("indirect_tables_that_are_none", |attack| {
        let chain = attack.valid();
        let table = attack.indirect(&chain);
        for len in [0, 1, 15, table.len + 1, !15] {
            attack.is_malformed(&[Desc { len, ..table }]);
        }
        for addr in [REGION - 8, REGION, u64::MAX - 15, SECOND + REGION - 15] {
            attack.is_malformed(&[Desc { addr, ..table }]);
        }
        // One that goes on behind it.
        let next = Desc {
            flags: INDIRECT | NEXT,
            ..table
        };
        attack.is_malformed(&[next, chain[0]]);
        // One in another: in a packed queue, whose tables know WRITE alone, its bytes are the request's.
        let nested = attack.indirect(&[table]);
        if attack.setup.packed {
            assert!(matches!(attack.answer(&[nested]), Outcome::Returned(_)));
            attack.still_served();
        } else {
            attack.is_malformed(&[nested]);
        }
    });
}

#[test]
fn writable_where_readable_is_due_and_the_other_way_round() {
    attack(
        "writable_where_readable_is_due_and_the_other_way_round",
        |attack| {
            let [head, tail] = attack.request();
            attack.is_malformed(&[tail, head]);
            // Nothing to read, nothing to write.
            let outcome = attack.answer(&[Desc {
                flags: WRITE,
                len: 16,
                ..head
            }]);
            // A disk has a byte for its answer then.
            assert!(matches!(outcome, Outcome::Returned(0..=16)));
            attack.still_served();
            if !attack.network {
                attack.is_malformed(&[head]);
            }
        },
    );
}

#[test]
fn an_available_index_that_jumps() {
    attack("an_available_index_that_jumps", |attack| {
        if attack.setup.packed {
            // There is none: what comes nearest is `a_loop_of_descriptors`.
            return;
        }
        attack.still_served();
        let available = attack.front.queues[attack.queue]
            .ring
            .layout()
            .avail_ring()
            .0;
        let index = attack.offered + 65;
        attack.store(available + 2, &index.to_le_bytes());
        attack.offered += 1;
        attack.kick();
        assert_eq!(attack.outcome((0, true)), Outcome::Broken);
    });
}

#[test]
fn a_head_that_does_not_exist() {
    attack("a_head_that_does_not_exist", |attack| {
        if attack.setup.packed {
            // Any id is one.
            return;
        }
        let available = attack.front.queues[attack.queue]
            .ring
            .layout()
            .avail_ring()
            .0;
        attack.store(available + 4, &64_u16.to_le_bytes());
        attack.store(available + 2, &1_u16.to_le_bytes());
        attack.offered = 2;
        attack.kick();
        assert_eq!(attack.outcome((0, true)), Outcome::Broken);
    });
}

/// Parts of a ring that overlap, or are not aligned, are refused when they are said; a used ring on the guest's own data is
/// its own trouble.
#[test]
fn rings_in_places_where_none_can_be() {
    attack("rings_in_places_where_none_can_be", |attack| {
        let layout = *attack.front.queues[attack.queue].ring.layout();
        let good = attack.front.addresses(&layout);
        let (mut overlap, mut beyond) = (good, good);
        overlap.used_ring_addr = good.avail_ring_addr;
        beyond.used_ring_addr = 0x1000;
        for addresses in [overlap, beyond] {
            let messages = &attack.front.messages;
            assert!(messages.set_vring_addr(attack.queue, &addresses).is_err());
        }
        let messages = &attack.front.messages;
        messages.set_vring_addr(attack.queue, &good).unwrap();
        attack.still_served();
        for off in [1, 2, 8] {
            let (mut table, mut used) = (good, good);
            table.desc_table_addr += off;
            used.used_ring_addr += off | 1;
            for addresses in [table, used] {
                // No front-end would say so: the connection ends.
                let messages = &attack.front.messages;
                assert!(messages.set_vring_addr(attack.queue, &addresses).is_err());
                attack.connect();
            }
        }
    });
}

#[test]
fn a_header_in_pieces_of_one_byte() {
    attack("a_header_in_pieces_of_one_byte", |attack| {
        let [head, tail] = attack.request();
        let mut chain: Vec<_> = (0..16).map(|i| desc(head.addr + i, 1, 0)).collect();
        if attack.network {
            chain.push(desc(head.addr + 16, head.len - 16, 0));
        } else {
            chain.push(tail);
        }
        let written = u32::from(!attack.network);
        assert_eq!(attack.answer(&chain), Outcome::Returned(written));
    });
}

#[test]
fn a_queue_that_is_enabled_before_it_has_addresses() {
    attack(
        "a_queue_that_is_enabled_before_it_has_addresses",
        |attack| {
            attack.front.messages.reset_device().unwrap();
            for (index, queue) in attack.front.queues.iter().enumerate() {
                let messages = &mut attack.front.messages;
                messages.set_vring_enable(index, true).unwrap();
                messages.set_vring_kick(index, &queue.kick).unwrap();
                queue.kick.write(1).unwrap();
            }
            for index in 0..attack.front.queues.len() {
                attack.front.start(index, attack.front.fresh());
            }
            attack.still_served();
        },
    );
}

#[test]
fn a_storm_of_kicks() {
    attack("a_storm_of_kicks", |attack| {
        for _ in 0..100_000 {
            attack.kick();
        }
        attack.still_served();
    });
}

/// Where in guest memory there is something to change.
struct Places {
    layout: DriverLayout,
    packed: bool,
    head: u64,
    table: u64,
}

/// What another thread changes all the time, while the device looks at it.
#[derive(Clone, Copy, Debug)]
enum Changing {
    /// Addresses and lengths of descriptors.
    Places,
    /// Flags of descriptors: of packed ones also whether they are available.
    Flags,
    /// Which descriptor comes next; of packed ones the buffer's id.
    Links,
    /// The available ring and its index; of a packed queue when the driver wants interrupts.
    Available,
    /// The request.
    Content,
    /// An indirect table.
    Table,
}

impl Changing {
    const ALL: [Self; 6] = [
        Self::Places,
        Self::Flags,
        Self::Links,
        Self::Available,
        Self::Content,
        Self::Table,
    ];

    /// One change, where the queue is, the request, or the table.
    fn once(self, turn: u64, memory: &GuestMemoryMmap, places: &Places) {
        let Places {
            layout,
            packed,
            head,
            table,
        } = *places;
        let store = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let descriptor = layout.desc_table().0 + 16 * (turn % 64);
        let pick = |of: &[u16]| of[turn as usize % of.len()].to_le_bytes();
        match self {
            Self::Places => {
                let addr = [0x1000, REGION - 1, u64::MAX][turn as usize % 3];
                store(descriptor, &addr.to_le_bytes());
                store(descriptor + 8, &((turn % 5 * 1000) as u32).to_le_bytes());
            }
            Self::Flags => {
                let flags = [0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 8];
                let turns = [AVAIL, USED, 0, AVAIL | USED, NEXT | AVAIL];
                if packed {
                    store(descriptor + 14, &pick(&turns));
                } else {
                    store(descriptor + 12, &pick(&flags));
                }
            }
            Self::Links => {
                let at = if packed { 12 } else { 14 };
                store(descriptor + at, &pick(&[0, 1, 2, 63, 64, u16::MAX]));
            }
            Self::Available => {
                let part = 2 * (turn % if packed { 2 } else { 67 });
                store(layout.avail_ring().0 + part, &pick(&[0, 1, 65, 7, 128]));
            }
            Self::Content => store(head + turn % 16, &[turn as u8]),
            Self::Table => store(table + turn % 32, &[turn as u8]),
        }
    }
}

/// Tells a thread to end.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whatever becomes of each chain: nobody else notices, and the next front-end is served.
#[test]
fn what_changes_while_it_is_looked_at() {
    attack("what_changes_while_it_is_looked_at", |attack| {
        for changing in Changing::ALL {
            let layout = *attack.front.queues[attack.queue].ring.layout();
            let memory = attack.front.guest.memory.clone();
            let chain = attack.valid();
            let table = attack.indirect(&chain);
            let places = Places {
                layout,
                packed: attack.setup.packed,
                head: chain[0].addr,
                table: table.addr,
            };
            let stop = AtomicBool::new(false);
            let mut broken = false;
            thread::scope(|scope| {
                // Also when something is not as it should be: the scope waits for its threads.
                let _stop = Stop(&stop);
                scope.spawn(|| {
                    for turn in (0_u64..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                        changing.once(turn, &memory, &places);
                    }
                });
                let err = attack.front.queues[attack.queue].err.as_raw_fd();
                let start = Instant::now();
                while !broken && start.elapsed() < Duration::from_millis(100) {
                    attack.offer(&chain);
                    attack.offer(&[table]);
                    // Whether they were returned cannot be told where their marks change.
                    broken = readable(err, Duration::from_micros(100));
                }
            });
            attack.connect();
        }
    });
}

/// The requests are what the device has made of them; a disk's answer lies where its ring does not.
#[test]
fn a_used_ring_on_the_guests_own_data() {
    attack("a_used_ring_on_the_guests_own_data", |attack| {
        attack.front.raw.0.shutdown(Shutdown::Both).unwrap();
        attack.front = FrontEnd::idle(&attack.daemon.socket(), attack.setup);
        let data = attack.front.guest.alloc(4096, 4096);
        for index in 0..attack.front.queues.len() {
            let front = &mut attack.front;
            front.prepare(index, front.fresh());
            if index == attack.queue {
                let mut addresses = front.addresses(front.queues[index].ring.layout());
                addresses.used_ring_addr = front.guest.user_address(data);
                front.messages.set_vring_addr(index, &addresses).unwrap();
            }
            let kick = &front.queues[index].kick;
            front.messages.set_vring_kick(index, kick).unwrap();
            front.messages.set_vring_enable(index, true).unwrap();
        }
        let mut chain = attack.valid();
        chain[0].addr = data.0;
        for round in 1..4 {
            if attack.setup.packed {
                assert!(matches!(attack.answer(&chain), Outcome::Returned(_)));
                continue;
            }
            attack.offer(&chain);
            let (start, index) = (Instant::now(), GuestAddress(data.0 + 2));
            let memory = &attack.front.guest.memory;
            while memory.read_obj::<u16>(index).unwrap() != round {
                assert!(start.elapsed() < PATIENCE, "{}", attack.daemon.log());
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

/// A disk has nowhere to say what became of a request, or takes the last byte for it; a card's driver wants no answer.
#[test]
fn a_status_byte_that_is_missing() {
    attack("a_status_byte_that_is_missing", |attack| {
        if attack.network {
            return;
        }
        let [head, _] = attack.request();
        attack.is_malformed(&[head]);
        // VIRTIO_BLK_T_IN
        attack.store(head.addr, &[0]);
        let buffer = attack.front.guest.alloc(512, 512).0;
        attack.store(buffer, &[0xee; 512]);
        let outcome = attack.answer(&[head, desc(buffer, 512, WRITE)]);
        assert!(matches!(outcome, Outcome::Returned(1..=512)));
        let read = attack.front.guest.read(GuestAddress(buffer), 512);
        // VIRTIO_BLK_S_IOERR: 511 bytes are no sector.
        assert_eq!(read[511], 1);
        assert_eq!(read[..511], [0xee; 511]);
        attack.still_served();
    });
}

/// A driver that errs all the time does not fill the log; that it does not is looked at behind each attack.
#[test]
fn errors_without_end() {
    attack("errors_without_end", |attack| {
        for _ in 0..300 {
            assert_eq!(attack.answer(&[desc(REGION, 16, 0)]), Outcome::Returned(0));
        }
    });
}

/// Memory is removed while a queue works with it, and then cut off by whoever has its file: what is asked for there fails.
#[test]
fn memory_that_goes_away() {
    attack("memory_that_goes_away", |attack| {
        let region = attack.front.guest.regions()[1];
        let mut chain = attack.valid();
        let last = chain.last_mut().unwrap();
        last.addr = SECOND;
        attack.store(SECOND + 12, &[0xff; 6]);
        let written = u32::from(!attack.network);
        for _ in 0..15 {
            assert_eq!(attack.answer(&chain), Outcome::Returned(written));
        }
        let place = (attack.at, attack.wrap);
        attack.offer(&chain);
        let messages = &mut attack.front.messages;
        messages.remove_mem_region(&region).unwrap();
        assert!(matches!(attack.outcome(place), Outcome::Returned(_)));
        attack.is_malformed(&chain);
        // From here on this process does not touch it, either.
        attack.front.guest.file.set_len(0).unwrap();
        for _ in 0..100 {
            attack.kick();
        }
        attack.connect();
    });
}

/// A disk whose guest has memory in regions that adjoin, each at a place of its own in the file, and another one behind a hole.
struct Borders {
    front: FrontEnd,
    /// What the disk is on, if it is there as it is.
    file: Option<File>,
    head: u64,
    status: u64,
}

impl Borders {
    /// Here the first region ends, and the second begins.
    const BORDER: u64 = REGION;
    /// Bytes of the second, and of the third, which begins at `SECOND`.
    const LEN: u64 = 64 << 10;
    /// Here the second ends, and there is nothing up to the third.
    const HOLE: u64 = Self::BORDER + Self::LEN;
    const END: u64 = SECOND + Self::LEN;

    /// Across the border, not aligned to anything, and far from it.
    const ACROSS: (u64, u32) = (Self::BORDER - 700, 1024);
    const ASIDE: (u64, u32) = (1 << 20, 512);
    /// What is written and read on the disk.
    const SECTOR: u64 = 8;

    fn new(daemon: &Daemon, setup: Setup, file: Option<File>) -> Self {
        let mut front = FrontEnd::idle(&daemon.socket(), setup);
        let [first, behind] = [0, 1].map(|index| front.guest.regions()[index]);
        let third = VhostUserMemoryRegionInfo {
            memory_size: Self::LEN,
            ..behind
        };
        let second = VhostUserMemoryRegionInfo {
            guest_phys_addr: Self::BORDER,
            userspace_addr: third.userspace_addr + Self::LEN,
            mmap_offset: third.mmap_offset + Self::LEN,
            ..third
        };
        let regions = [first, second, third];
        front.messages.set_mem_table(&regions).unwrap();
        front.start(0, front.fresh());
        let (head, status) = (front.guest.alloc(16, 16).0, front.guest.alloc(1, 1).0);
        Self {
            front,
            file,
            head,
            status,
        }
    }

    /// The same bytes in this process's own view of the memory.
    fn here(addr: u64, len: usize) -> [(GuestAddress, usize); 2] {
        let first = Self::BORDER.saturating_sub(addr).min(len as u64);
        let place = |addr: u64| {
            let second = (Self::BORDER..Self::HOLE).contains(&addr);
            GuestAddress(if second {
                addr - Self::BORDER + SECOND + Self::LEN
            } else {
                addr
            })
        };
        let second = len - first as usize;
        [(place(addr), first as usize), (place(addr + first), second)]
    }

    /// What is no memory is left alone.
    fn put(&self, addr: u64, mut bytes: &[u8]) {
        for (addr, len) in Self::here(addr, bytes.len()) {
            let (part, rest) = bytes.split_at(len);
            let _ = self.front.guest.memory.write(part, addr);
            bytes = rest;
        }
    }

    fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut left = &mut bytes[..];
        for (addr, len) in Self::here(addr, len) {
            let (part, rest) = left.split_at_mut(len);
            let _ = self.front.guest.memory.read(part, addr);
            left = rest;
        }
        bytes
    }

    /// What becomes of a request whose header and status lie here: its status, or nothing.
    fn ask(&mut self, kind: u32, data: (u64, u32), head: u64, status: u64) -> Option<u8> {
        self.put(head, &Self::header(kind));
        self.put(status, &[0xee]);
        let segment = |(addr, len)| Segment::new(GuestAddress(addr), len);
        let (mut readable, mut writable) = (vec![segment((head, 16))], vec![]);
        if kind == OUT {
            &mut readable
        } else {
            &mut writable
        }
        .push(segment(data));
        writable.push(segment((status, 1)));
        let front = &mut self.front;
        front.queues[0].submit(&front.guest, &readable, &writable, 7);
        let written = if kind == OUT { 1 } else { data.1 + 1 };
        let (token, len) = front.complete(0);
        assert_eq!(token, 7);
        let said = self.get(status, 1)[0];
        if len == 0 {
            // Where there is memory for it.
            assert!(matches!(said, 0xee | 0));
            return None;
        }
        assert_eq!(len, written);
        Some(said)
    }

    /// A buffer is written to the disk and read from it, all of its bytes and no other.
    fn serves(&mut self, data: (u64, u32), head: u64, status: u64) {
        let (addr, len) = (data.0, data.1 as usize);
        let bytes: Vec<u8> = (0..len as u64)
            .map(|i| ((i % 251) ^ (addr % 247)) as u8)
            .collect();
        self.put(addr, &bytes);
        assert_eq!(self.ask(OUT, data, head, status), Some(0), "{data:x?}");
        if let Some(file) = &self.file {
            let mut found = vec![0; len];
            file.read_exact_at(&mut found, Self::SECTOR * 512).unwrap();
            assert!(found == bytes, "{data:x?}");
        }
        self.put(addr, &vec![0x55; len]);
        let around = |this: &Self| [this.get(addr - 1, 1), this.get(addr + len as u64, 1)];
        let before = around(self);
        assert_eq!(self.ask(IN, data, head, status), Some(0), "{data:x?}");
        assert!(self.get(addr, len) == bytes, "{data:x?}");
        assert_eq!(around(self), before, "{data:x?}");
    }

    /// It is returned with nothing done, and the next one is served.
    fn returns(&mut self, data: (u64, u32), head: u64, status: u64) {
        let all = |this: &Self| {
            let mut disk = vec![0; 4 * Self::LEN as usize];
            if let Some(file) = &this.file {
                file.read_exact_at(&mut disk, 0).unwrap();
            }
            let near = this.get(Self::BORDER - 4096, 4096 + Self::LEN as usize);
            let behind = this.get(SECOND, Self::LEN as usize);
            [disk, near, behind]
        };
        for kind in [IN, OUT] {
            // Where the header and the status are, if that is here, they are written by this side.
            self.put(head, &Self::header(kind));
            self.put(status, &[0xee]);
            let before = all(self);
            assert_eq!(self.ask(kind, data, head, status), None, "{data:x?}");
            assert!(all(self) == before, "{data:x?}");
        }
        self.serves(Self::ACROSS, self.head, self.status);
    }

    fn header(kind: u32) -> [u8; 16] {
        (u128::from(kind) | u128::from(Self::SECTOR) << 64).to_le_bytes()
    }

    /// Areas of a ring are refused across the border and at the hole; where they were the queue goes on.
    fn rings(&mut self) {
        let front = &self.front;
        let layout = *front.queues[0].ring.layout();
        let good = front.addresses(&layout);
        for near in [Self::BORDER - 64, SECOND + 2 * Self::LEN - 64] {
            let near = front.guest.user_address(GuestAddress(near));
            let (mut table, mut available, mut used) = (good, good, good);
            table.desc_table_addr = near;
            available.avail_ring_addr = near;
            used.used_ring_addr = near;
            // Those of a packed queue that are so short lie in one region.
            let long = if layout.is_packed() { 1 } else { 3 };
            for addresses in [table, available, used].into_iter().take(long) {
                assert!(front.messages.set_vring_addr(0, &addresses).is_err());
            }
        }
        front.messages.set_vring_addr(0, &good).unwrap();
        self.serves(Self::ASIDE, self.head, self.status);
    }

    fn buffers(&mut self) {
        let (head, status, across) = (self.head, self.status, Self::ACROSS);
        let (border, hole, end) = (Self::BORDER, Self::HOLE, Self::END);
        for data in [
            across,
            // A page of each.
            (border - 4096, 8192),
            (border - 512, 512),
            (border, 512),
            (border - 1, 512),
            // Up to the hole, to the last byte, and behind it.
            (border - 512, 512 + Self::LEN as u32),
            (hole - 512, 512),
            (SECOND, 512),
            (SECOND, Self::LEN as u32),
            (end - 512, 512),
        ] {
            self.serves(data, head, status);
        }
        for data in [
            (hole - 511, 512),
            (hole - 512, 1024),
            (hole, 512),
            (SECOND - 1, 512),
            (border - 512, 1024 + Self::LEN as u32),
            // Both ends are memory, and what is between them is not.
            (hole - 512, (SECOND - hole + 1024) as u32),
            (border - 512, (SECOND - border + 1024) as u32),
            (end - 511, 512),
            (end, 512),
        ] {
            self.returns(data, head, status);
        }
        for place in [
            border - 16,
            border - 7,
            border - 1,
            hole - 16,
            SECOND,
            end - 16,
        ] {
            self.serves(Self::ASIDE, place, status);
        }
        for place in [hole - 15, hole - 1, hole, SECOND - 1, end - 15] {
            self.returns(Self::ASIDE, place, status);
        }
        for place in [border - 1, border, hole - 1, SECOND, end - 1] {
            self.serves(Self::ASIDE, head, place);
        }
        for place in [hole, SECOND - 1, end] {
            self.returns(Self::ASIDE, head, place);
        }
    }
}

/// What lies across regions that adjoin is served whole, and what ends with its region to its last byte; one byte further the
/// request fails.
#[test]
fn buffers_and_rings_at_the_borders_of_regions() {
    let test = "buffers_and_rings_at_the_borders_of_regions";
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let kinds: [(_, &[_]); 4] = [
        ("raw", &[]),
        ("raw", &["--direct"]),
        ("raw", &["--register-memory"]),
        ("qcow2", &[]),
    ];
    for (format, args) in kinds {
        let Some(image) = image(directory.path(), format, test) else {
            continue;
        };
        let path = image.to_str().unwrap();
        let disk = ["--path", path, "--format", format, "--in-order", "on"];
        let daemon = Daemon::start(BLK, &[&disk, args].concat());
        for setup in Setup::default().formats() {
            let file = (format == "raw").then(|| File::open(&image).unwrap());
            let mut borders = Borders::new(&daemon, setup, file);
            borders.rings();
            borders.buffers();
        }
        let log = daemon.log();
        assert!(
            log.contains("lies across the border of two memory regions"),
            "{log}"
        );
        assert!(log.lines().count() < 60, "{log}");
        still_serves(&daemon);
        daemon.assert_idle();
        daemon.stop();
    }
}

// Through the socket.

struct Raws {
    daemon: Daemon,
    raw: Raw,
}

impl Raws {
    /// A connection that has negotiated everything with replies to all messages.
    fn new() -> Self {
        let daemon = Daemon::start(BLK, &["--null", "1G"]);
        let raw = connect(&daemon);
        Self { daemon, raw }
    }

    /// Whether a message is obeyed, which is answered in any case.
    fn obeyed(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> bool {
        self.raw.send_with_fds(request, payload, fds);
        let (answered, failed) = self.raw.reply();
        assert_eq!(answered, request);
        failed == 0
    }

    /// A message that is refused: by an answer, or by the end of the connection. Then there is another one.
    fn refused(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) {
        self.raw.send_with_fds(request, payload, fds);
        self.is_refused();
    }

    fn is_refused(&mut self) {
        let mut answer = [0; 20];
        match self.raw.0.read_exact(&mut answer) {
            Ok(()) => assert_ne!(answer[12..], [0; 8], "it was obeyed"),
            Err(e) => assert_ne!(e.kind(), std::io::ErrorKind::WouldBlock, "no answer"),
        }
        // It may have ended already.
        let _ = self.raw.0.shutdown(Shutdown::Both);
        self.raw = connect(&self.daemon);
    }

    fn end(self) {
        drop(self.raw);
        still_serves(&self.daemon);
        self.daemon.assert_idle();
        let log = self.daemon.log();
        assert!(log.lines().count() < 60, "{log}");
        self.daemon.stop();
    }
}

fn connect(daemon: &Daemon) -> Raw {
    let mut raw = Raw::connect(&daemon.socket());
    raw.send(SET_OWNER, 0, &[]);
    raw.negotiate();
    raw
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn messages_of_a_wrong_length() {
    let mut raws = Raws::new();
    let file = tempfile::tempfile().unwrap();
    for (request, len) in [
        (GET_FEATURES, 8),
        (SET_FEATURES, 4),
        (SET_FEATURES, 16),
        (SET_VRING_NUM, 4),
        (SET_VRING_ADDR, 8),
        (SET_MEM_TABLE, 4),
        (GET_CONFIG, 4),
        (GET_CONFIG, 4096),
    ] {
        raws.refused(request, &vec![0; len], &[]);
    }
    raws.refused(ADD_MEM_REG, &[0; 8], &[file.as_raw_fd()]);
    // Longer than any message: the rest is not waited for.
    for len in [0x1001, 0x10_0000, u32::MAX] {
        let mut header = Vec::new();
        for word in [SET_FEATURES, 1, len] {
            header.extend(word.to_ne_bytes());
        }
        raws.raw.0.write_all(&header).unwrap();
        raws.is_refused();
    }
    raws.end();
}

#[test]
fn messages_out_of_order() {
    let mut raws = Raws::new();
    // A ring before its memory, its size, and anything else.
    let event = EventFd::new(0).unwrap();
    let pair = |index: u32, value: u32| [index.to_ne_bytes(), value.to_ne_bytes()].concat();
    let addresses = words(&[0, 0x1000, 0x3000, 0x2000, 0]);
    assert!(raws.obeyed(SET_VRING_ENABLE, &pair(0, 1), &[]));
    assert!(raws.obeyed(SET_VRING_KICK, &words(&[0]), &[event.as_raw_fd()]));
    event.write(1).unwrap();
    let _ = raws.obeyed(SET_VRING_ADDR, &addresses, &[]);
    let _ = raws.obeyed(SET_VRING_NUM, &pair(0, 64), &[]);
    assert!(!raws.obeyed(SET_VRING_NUM, &pair(9, 64), &[]));
    // The end of what has never begun.
    raws.raw.send_with_fds(GET_VRING_BASE, &pair(0, 0), &[]);
    assert_eq!(raws.raw.reply().0, GET_VRING_BASE);
    raws.end();
    // Nothing negotiated at all.
    let daemon = Daemon::start(BLK, &["--null", "1G"]);
    let mut raw = Raw::connect(&daemon.socket());
    raw.send(SET_VRING_NUM, 0, &pair(0, 64));
    raw.send(SET_VRING_ADDR, 0, &addresses);
    raw.send(GET_FEATURES, 0, &[]);
    // Refused without a word, or obeyed: never waited for.
    let _ = raw.is_closed();
    drop(raw);
    still_serves(&daemon);
    daemon.stop();
}

#[test]
fn messages_again_and_again() {
    let daemon = Daemon::start(BLK, &["--null", "1G"]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    for _ in 0..50 {
        front.messages.set_owner().unwrap();
        front.messages.set_features(front.features).unwrap();
        let regions = front.guest.regions();
        front.messages.set_mem_table(&regions).unwrap();
        let layout = *front.queues[0].ring.layout();
        let addresses = front.addresses(&layout);
        let queue = &front.queues[0];
        front.messages.set_vring_addr(0, &addresses).unwrap();
        front.messages.set_vring_call(0, &queue.call).unwrap();
        front.messages.set_vring_err(0, &queue.err).unwrap();
        front.messages.set_vring_kick(0, &queue.kick).unwrap();
        front.messages.set_vring_enable(0, true).unwrap();
    }
    let region = front.guest.regions()[1];
    assert!(front.messages.add_mem_region(&region).is_err(), "twice");
    let (head, status) = (front.guest.alloc(16, 16), front.guest.alloc(1, 1));
    front.guest.memory.write_obj(4_u64, head).unwrap();
    let writable = [Segment::new(status, 1)];
    front.queues[0].submit(&front.guest, &[Segment::new(head, 16)], &writable, 1);
    assert_eq!(front.complete(0), (1, 1));
    // No descriptor is kept more than once.
    drop(front);
    still_serves(&daemon);
    assert!(daemon.descriptors() < 40, "{}", daemon.descriptors());
    daemon.stop();
}

#[test]
fn messages_without_their_descriptors_or_with_too_many() {
    let mut raws = Raws::new();
    let guest = Guest::new();
    let (memory, event) = (guest.file.as_raw_fd(), EventFd::new(0).unwrap());
    let event = event.as_raw_fd();
    let region = words(&[0, 0, REGION, 0x7000_0000, 0]);
    let table = |count: u64| {
        let mut table = words(&[count]);
        for index in 0..count {
            table.extend(words(&[
                index << 32,
                REGION,
                0x7000_0000 + (index << 32),
                0,
            ]));
        }
        table
    };
    raws.refused(ADD_MEM_REG, &region, &[]);
    raws.refused(ADD_MEM_REG, &region, &[memory, memory]);
    raws.refused(SET_MEM_TABLE, &table(1), &[]);
    raws.refused(SET_MEM_TABLE, &table(2), &[memory]);
    raws.refused(SET_MEM_TABLE, &table(1), &[memory, memory]);
    raws.refused(SET_VRING_KICK, &words(&[0]), &[]);
    raws.refused(SET_VRING_KICK, &words(&[0]), &[event, event]);
    raws.refused(SET_VRING_KICK, &words(&[0x100]), &[event]);
    raws.refused(GET_FEATURES, &[], &[event]);
    raws.refused(SET_FEATURES, &words(&[0]), &[event]);
    raws.end();
}

/// What is always ready, or cannot be written, would keep a worker busy if it were waited on.
#[test]
fn descriptors_that_only_look_like_eventfds() {
    let daemon = Daemon::start(BLK, &["--null", "1G"]);
    let front = FrontEnd::new(&daemon.socket(), Setup::default());
    let ready = nix::sys::eventfd::EventFd::from_value(1).unwrap();
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    epoll
        .add(&ready, EpollEvent::new(EpollFlags::EPOLLIN, 0))
        .unwrap();
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let kinds = [
        epoll.0.as_raw_fd(),
        timer.as_fd().as_raw_fd(),
        socket.as_raw_fd(),
        null.as_raw_fd(),
    ];
    for fd in kinds {
        front.raw.send_with_fds(SET_VRING_KICK, &words(&[0]), &[fd]);
        let mut raw = Raw(front.raw.0.try_clone().unwrap());
        assert_eq!(raw.reply(), (SET_VRING_KICK, 1));
    }
    daemon.assert_idle();
    drop(front);
    still_serves(&daemon);
    daemon.stop();
}

#[test]
fn regions_that_overlap_or_overflow() {
    let mut raws = Raws::new();
    let guest = Guest::new();
    let memory = guest.file.as_raw_fd();
    let (page, user) = (4096, 0x7000_0000);
    assert!(raws.obeyed(ADD_MEM_REG, &words(&[0, 0, REGION, user, 0]), &[memory]));
    for region in [
        // Guest addresses that are taken, or that end beyond the last one.
        [0, REGION - page, REGION, user + REGION, 0],
        [0, u64::MAX - page + 1, 2 * page, user + REGION, 0],
        [0, u64::MAX, page, user + REGION, 0],
        // The front-end's own.
        [0, REGION, REGION, user + page, 0],
        [0, REGION, REGION, u64::MAX - page, 0],
        // In the file.
        [0, REGION, REGION, user + REGION, 2 * REGION],
        [0, REGION, REGION, user + REGION, u64::MAX - page + 1],
        [0, REGION, u64::MAX, user + REGION, 0],
        [0, REGION, u64::MAX - page + 1, user + REGION, page],
        [0, REGION, 0, user + REGION, 0],
        [0, REGION, 3 * REGION, user + REGION, 0],
    ] {
        raws.refused(ADD_MEM_REG, &words(&region), &[memory]);
        // For the next one, which may overlap it.
        let first = words(&[0, 0, REGION, user, 0]);
        assert!(raws.obeyed(ADD_MEM_REG, &first, &[memory]));
    }
    raws.end();
}

/// An empty image of 32 MiB; `None`, and a word on standard error, if there is no program to make it.
fn image(directory: &Path, format: &str, test: &str) -> Option<PathBuf> {
    let image = directory.join(format);
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", format]).arg(&image);
    if format == "raw" {
        File::create(&image).unwrap().set_len(32 << 20).unwrap();
    } else if !create.arg("32M").status().is_ok_and(|s| s.success()) {
        skip(test, "qemu-img is not installed (package qemu-utils)");
        return None;
    }
    Some(image)
}

/// Of a raw file, and of a qcow2 image, whose helpers copy.
#[test]
fn memory_that_goes_away_while_requests_are_in_flight() {
    let test = "memory_that_goes_away_while_requests_are_in_flight";
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for format in ["raw", "qcow2"] {
        let Some(image) = image(directory.path(), format, test) else {
            continue;
        };
        let image = image.to_str().unwrap();
        let daemon = Daemon::start(BLK, &["--path", image, "--format", format]);
        for round in 0..20 {
            let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
            let region = front.guest.regions()[1];
            let (head, status) = (front.guest.alloc(16, 16), front.guest.alloc(32, 16));
            front.guest.memory.write_obj(0_u64, head).unwrap();
            for token in 0..16 {
                let data = Segment::new(GuestAddress(SECOND), 8 << 20);
                let status = Segment::new(GuestAddress(status.0 + token), 1);
                let readable = [Segment::new(head, 16)];
                front.queues[0].submit(&front.guest, &readable, &[data, status], token);
            }
            if round % 2 == 1 {
                // That of the second region alone: the rings are in the first one.
                front.guest.file.set_len(REGION).unwrap();
                let (start, mut answered) = (Instant::now(), 0);
                while answered < 16 && !readable(front.raw.0.as_raw_fd(), Duration::ZERO) {
                    let memory = &front.guest.memory;
                    let mut session = front.queues[0].ring.session(memory).unwrap();
                    answered += usize::from(session.poll_used().unwrap().is_some());
                    assert!(start.elapsed() < PATIENCE, "{answered} are answered");
                }
                continue;
            }
            front.messages.remove_mem_region(&region).unwrap();
            let mut tokens: Vec<u64> = (0..16).map(|_| front.complete(0).0).collect();
            tokens.sort_unstable();
            assert_eq!(tokens, (0..16).collect::<Vec<_>>());
        }
        still_serves(&daemon);
        daemon.stop();
    }
}

/// Its answers fill the socket: it is left at once, or waited for for seconds and then left.
#[test]
fn a_front_end_that_stops_reading() {
    let daemon = Daemon::start(BLK, &["--null", "1G"]);
    let raw = connect(&daemon);
    raw.0.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut message = Vec::new();
    for word in [GET_FEATURES, 1 | NEED_REPLY, 0] {
        message.extend(word.to_ne_bytes());
    }
    let mut writer = &raw.0;
    while writer.write_all(&message).is_ok() {}
    still_serves(&daemon);
    daemon.assert_idle();
    daemon.stop();
}

#[test]
fn connections_that_are_half_open() {
    let daemon = Daemon::start(BLK, &["--null", "1G"]);
    // It hears nothing more, says nothing more, or never said anything.
    for how in [Shutdown::Read, Shutdown::Write] {
        let front = FrontEnd::new(&daemon.socket(), Setup::default());
        front.raw.0.shutdown(how).unwrap();
        if how == Shutdown::Read {
            front.raw.send_with_fds(GET_FEATURES, &[], &[]);
        }
        let mut raw = Raw(front.raw.0.try_clone().unwrap());
        assert!(how == Shutdown::Read || raw.is_closed());
        drop(front);
        still_serves(&daemon);
    }
    let silent: Vec<Raw> = (0..20).map(|_| Raw::connect(&daemon.socket())).collect();
    drop(silent);
    still_serves(&daemon);
    let _silent = Raw::connect(&daemon.socket());
    daemon.stop();
}

/// What of the configuration space can be written is one byte of a disk: wce (VIRTIO 1.3, 5.2.4).
#[test]
fn features_and_configuration_of_any_kind() {
    let devices: [(&str, &[&str], _); 2] = [
        (BLK, &["--null", "1G"], Some(32)),
        (NET, &["--link", "null"], None),
    ];
    for (program, args, writable) in devices {
        let daemon = Daemon::start(program, args);
        let (mut messages, _) = negotiate(&daemon.socket(), 0);
        for bit in 0..64 {
            let features = 1_u64 << bit;
            let offered = messages.get_features().unwrap();
            assert_eq!(
                messages.set_features(features).is_ok(),
                offered & features != 0
            );
        }
        let offered = messages.get_features().unwrap();
        messages.set_features(offered).unwrap();
        let flags = VhostUserConfigFlags::WRITABLE;
        for len in 1..=17_usize {
            for offset in [0, 1, 7, 31, 32, 33, 59, 200] {
                let before = messages.get_config(offset, len as u32, flags, &vec![0; len]);
                let before = before.unwrap().1;
                assert_eq!(before.len(), len);
                let written = messages.set_config(offset, flags, &vec![0xff; len]);
                let may = len == 1 && Some(offset) == writable;
                assert_eq!(written.is_ok(), may, "{len} bytes at {offset}");
                let after = messages.get_config(offset, len as u32, flags, &vec![0; len]);
                assert!(may || after.unwrap().1 == before);
            }
        }
        drop(messages);
        if program == BLK {
            still_serves(&daemon);
        } else {
            FrontEnd::new(&daemon.socket(), Setup::default());
        }
        daemon.stop();
    }
}
