//! The driver's half of a queue pair, and the worker's thread on the other side of it.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ringside_rings::{DeviceRing, DriverLayout, DriverRing, Segment};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::net::config::MacAddress;
use crate::net::counters::Counters;
use crate::net::features::has;
use crate::net::filter::Filter;
use crate::net::link::Link;
use crate::net::settings::{Settings, Shared};
use crate::net::worker::PairWorker;
use crate::shell::{Command, CommandSender, Memory, Vring, command_channel};

pub(in crate::net) const MAC: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 1]);
pub(in crate::net) const HEADER: usize = 12;
const MEMORY: usize = 16 << 20;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Guest memory for queues and buffers.
pub(in crate::net) struct Guest {
    pub(in crate::net) memory: Arc<Memory>,
    next: u64,
    /// What was negotiated about queues.
    features: u64,
}

impl Guest {
    /// With split queues, used in any order.
    pub(in crate::net) fn new() -> Self {
        Self::with(0)
    }

    /// With queues as these features have them.
    pub(in crate::net) fn with(features: u64) -> Self {
        let ranges = [(GuestAddress(0), MEMORY)];
        Self {
            memory: Arc::new(Memory::from_ranges(&ranges).unwrap()),
            next: 0x1000,
            features,
        }
    }

    /// What is allocated after this can be given up.
    pub(in crate::net) fn mark(&self) -> u64 {
        self.next
    }

    /// Gives up what was allocated since then: no ring holds it any more.
    pub(in crate::net) fn rewind(&mut self, mark: u64) {
        self.next = mark;
    }

    pub(in crate::net) fn buffer(&mut self, len: u32) -> Segment {
        let segment = Segment::new(GuestAddress(self.next), len);
        self.next += u64::from(len).next_multiple_of(64);
        assert!(self.next < MEMORY as u64);
        segment
    }

    pub(in crate::net) fn filled(&mut self, data: &[u8]) -> Segment {
        let segment = self.buffer(data.len().try_into().unwrap());
        self.memory.write_slice(data, segment.addr).unwrap();
        segment
    }

    pub(in crate::net) fn read(&self, segment: Segment, len: u32) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.memory.read_slice(&mut data, segment.addr).unwrap();
        data
    }

    pub(in crate::net) fn queue(&mut self, size: u16) -> Queue {
        self.next = self.next.next_multiple_of(64);
        let base = GuestAddress(self.next);
        let mut layout = if has(self.features, VIRTIO_F_RING_PACKED) {
            DriverLayout::packed(base, size, 0).unwrap()
        } else {
            DriverLayout::new(base, size, 0).unwrap()
        };
        if has(self.features, VIRTIO_F_IN_ORDER) {
            layout = layout.in_order();
        }
        self.next = layout.end().0;
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Queue {
            layout,
            ring: DriverRing::new(layout, true, self.memory.as_ref()).unwrap(),
            memory: Arc::clone(&self.memory),
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
        }
    }
}

/// One queue of the driver. The token of a chain is its segments.
pub(in crate::net) struct Queue {
    pub(in crate::net) layout: DriverLayout,
    ring: DriverRing<Vec<Segment>>,
    memory: Arc<Memory>,
    pub(in crate::net) kick: EventFd,
    call: EventFd,
    err: EventFd,
}

fn file(eventfd: &EventFd) -> Option<File> {
    Some(File::from(owned(eventfd)))
}

#[allow(
    unsafe_code,
    reason = "an eventfd of vmm-sys-util gives its descriptor as a number only"
)]
fn owned(eventfd: &EventFd) -> OwnedFd {
    let fd = eventfd.try_clone().unwrap().into_raw_fd();
    // SAFETY: the clone gave up its descriptor to us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Waits for an eventfd and makes it quiet.
fn wait(eventfd: &EventFd, patience: Duration) -> bool {
    let fd = owned(eventfd);
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).unwrap();
    poll(&mut fds, timeout).unwrap() == 1 && eventfd.read().is_ok()
}

impl Queue {
    pub(in crate::net) fn vring(&self, index: u16, features: u64, enabled: bool) -> Box<Vring> {
        let config = self.layout.config(true);
        Box::new(Vring {
            index,
            ring: DeviceRing::new(&config, self.memory.as_ref()).unwrap(),
            memory: Arc::clone(&self.memory),
            kick: file(&self.kick),
            call: file(&self.call),
            err: file(&self.err),
            features,
            enabled,
        })
    }

    /// Makes chains available, and kicks if the device wants it.
    pub(in crate::net) fn add(&mut self, chains: &[(&[Segment], &[Segment])]) {
        let mut session = self.ring.session(self.memory.as_ref()).unwrap();
        for (readable, writable) in chains {
            let token = [*readable, *writable].concat();
            session.add(readable, writable, token).unwrap();
        }
        if session.publish().unwrap() {
            self.kick.write(1).unwrap();
        }
    }

    pub(in crate::net) fn send(&mut self, packet: &[Segment]) {
        self.add(&[(packet, &[])]);
    }

    pub(in crate::net) fn post(&mut self, buffer: Segment) {
        self.add(&[(&[], &[buffer])]);
    }

    /// The next chain that the device has used, if one is there.
    pub(in crate::net) fn try_used(&mut self) -> Option<(Vec<Segment>, u32)> {
        let mut session = self.ring.session(self.memory.as_ref()).unwrap();
        session.poll_used().unwrap()
    }

    /// The next chain that the device uses. It must interrupt for it.
    pub(in crate::net) fn used(&mut self) -> (Vec<Segment>, u32) {
        loop {
            if let Some(used) = self.try_used() {
                return used;
            }
            let mut session = self.ring.session(self.memory.as_ref()).unwrap();
            if !session.enable_interrupts().unwrap() {
                assert!(wait(&self.call, PATIENCE), "no interrupt came");
            }
        }
    }

    /// Wants an interrupt for the next one.
    pub(in crate::net) fn want(&mut self) {
        let mut session = self.ring.session(self.memory.as_ref()).unwrap();
        assert!(!session.enable_interrupts().unwrap());
    }

    /// Nothing is used for a while.
    pub(in crate::net) fn stays_unused(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        self.try_used().is_none()
    }

    pub(in crate::net) fn wait_for_error(&self) -> bool {
        wait(&self.err, PATIENCE)
    }

    pub(in crate::net) fn outstanding(&self) -> u16 {
        self.ring.outstanding()
    }

    /// Sends a packet, and behind it one whose head is no descriptor.
    pub(in crate::net) fn send_and_break(&mut self, packet: &[Segment]) {
        let mut session = self.ring.session(self.memory.as_ref()).unwrap();
        for _ in 0..2 {
            session.add(packet, &[], packet.to_vec()).unwrap();
        }
        let second = GuestAddress(self.layout.avail_ring().0 + 6);
        self.memory.write_obj(u16::MAX, second).unwrap();
        if session.publish().unwrap() {
            self.kick.write(1).unwrap();
        }
    }

    /// All heads that it has made available are no descriptors.
    pub(in crate::net) fn corrupt_heads(&self) {
        for place in 0..u64::from(self.layout.config(true).size) {
            let head = GuestAddress(self.layout.avail_ring().0 + 4 + 2 * place);
            self.memory.write_obj(u16::MAX, head).unwrap();
        }
    }

    /// A driver out of its mind.
    pub(in crate::net) fn corrupt_avail_index(&self) {
        let idx = GuestAddress(self.layout.avail_ring().0 + 2);
        self.memory.write_obj(0x7fff_u16, idx).unwrap();
        self.kick.write(1).unwrap();
    }
}

/// The worker of a queue pair.
pub(in crate::net) struct Worker {
    pub(in crate::net) sender: CommandSender,
    thread: Option<JoinHandle<()>>,
    pub(in crate::net) counters: Arc<Counters>,
}

pub(in crate::net) fn shared(workers: u16) -> Arc<Shared> {
    let filter = Filter::new(MAC, true);
    Arc::new(Shared::new(Settings::new(filter, workers), workers).unwrap())
}

impl Worker {
    pub(in crate::net) fn start<L: Link + 'static>(
        pair: u16,
        link: L,
        shared: &Arc<Shared>,
    ) -> Self {
        let (sender, commands) = command_channel().unwrap();
        let counters = Arc::new(Counters::default());
        let (for_worker, shared) = (Arc::clone(&counters), Arc::clone(shared));
        let worker = PairWorker::new(pair, 1500, link, commands, shared, for_worker).unwrap();
        Self {
            sender,
            thread: Some(std::thread::spawn(move || worker.run())),
            counters,
        }
    }

    pub(in crate::net) fn own(&self, vring: Box<Vring>) {
        self.sender.send(Command::Start(vring)).unwrap();
    }

    pub(in crate::net) fn give_back(&self, index: u16) -> Box<Vring> {
        give_back(&self.sender, index)
    }
}

pub(in crate::net) fn give_back(sender: &CommandSender, index: u16) -> Box<Vring> {
    let (done, given_back) = mpsc::channel();
    sender
        .send(Command::Stop {
            index,
            suspend: false,
            done,
        })
        .unwrap();
    given_back.recv_timeout(PATIENCE).unwrap()
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.sender.send(Command::Exit).unwrap();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// A queue pair, both halves.
pub(in crate::net) struct Pair {
    pub(in crate::net) guest: Guest,
    pub(in crate::net) rx: Queue,
    pub(in crate::net) tx: Queue,
    pub(in crate::net) worker: Worker,
    pub(in crate::net) shared: Arc<Shared>,
}

impl Pair {
    pub(in crate::net) fn new<L: Link + 'static>(link: L, features: u64) -> Self {
        let mut guest = Guest::with(features);
        let (rx, tx) = (guest.queue(64), guest.queue(64));
        let shared = shared(1);
        let worker = Worker::start(0, link, &shared);
        worker.own(rx.vring(0, features, true));
        worker.own(tx.vring(1, features, true));
        Self {
            guest,
            rx,
            tx,
            worker,
            shared,
        }
    }

    /// Posts receive buffers of one size.
    pub(in crate::net) fn post(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let buffer = self.guest.buffer(len);
            self.rx.post(buffer);
        }
    }

    /// Receives one packet as a driver does, header included.
    pub(in crate::net) fn receive(&mut self) -> Vec<u8> {
        let (segments, len) = self.rx.used();
        let mut packet = self.guest.read(segments[0], len);
        let buffers = u16::from_le_bytes([packet[10], packet[11]]);
        assert!(buffers >= 1, "the header says {buffers} buffers");
        for _ in 1..buffers {
            // All buffers of a packet become visible at once (VIRTIO 1.3, 5.1.6.4.1).
            let (segments, len) = self.rx.try_used().expect("a part of the packet is missing");
            packet.extend(self.guest.read(segments[0], len));
        }
        packet
    }
}
