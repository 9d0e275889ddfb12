//! A switch served from drivers' rings, without privileges: guests are memory of this process, and uplinks measure only.

#![allow(
    clippy::cast_possible_truncation,
    reason = "all numbers of these tests are small"
)]

mod traffic;

use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use ringside_rings::Segment;
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::args::NetArgs;
use super::super::features::{GUEST_OFFLOADS, bit};
use super::super::tests::driver::{Guest, HEADER, Queue, give_back};
use super::hub::Switch;
use super::options::SwitchArgs;
use super::port::SwitchPort;
use super::shared::PortShared;
use crate::shell::{
    Command, CommandSender, Device, Hub, OpenPort, PortOptions, Vring, command_channel,
};

const BASE: u64 = bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_EVENT_IDX);
const MERGEABLE: u64 = BASE | bit(VIRTIO_NET_F_MRG_RXBUF);
const ALL: u64 = MERGEABLE | GUEST_OFFLOADS;
const PACKED: u64 = bit(VIRTIO_F_RING_PACKED) | bit(VIRTIO_F_IN_ORDER);

const BROADCAST: [u8; 6] = [0xff; 6];

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    switch: SwitchArgs,
    #[arg(long)]
    print_capabilities: bool,
}

/// A switch without ports.
fn switch(args: &[&str]) -> Switch {
    let fixed = ["x", "--tap", "unused", "--port", "/unused"];
    let cli = Cli::try_parse_from([&fixed, args].concat()).unwrap();
    let mut switch = Switch::new(&cli.net, &cli.switch, None).unwrap();
    switch.begin().unwrap();
    switch
}

/// A guest at a port, both halves.
struct Port {
    guest: Guest,
    rx: Queue,
    tx: Queue,
    /// Before the device: the last command comes before the end.
    sender: CommandSender,
    device: SwitchPort,
    name: String,
}

/// The address of the guest with this number.
fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

impl Port {
    /// A port with these options, whose card has the address of `number`.
    fn add(switch: &mut Switch, number: u8, options: &str, features: u64) -> Self {
        let text = format!("socket=/unused,mac=02:00:00:00:00:{number:02x}{options}");
        let pairs = ringside_control::options::keys_and_values(&text, None).unwrap();
        let options: PortOptions = pairs.into_iter().collect();
        let OpenPort {
            mut device, name, ..
        } = switch.open(&options).unwrap();
        let (sender, commands) = command_channel().unwrap();
        device.spawn_worker(0, commands).unwrap();
        device.set_features(features);
        let mut guest = Guest::with(features);
        let (rx, tx) = (guest.queue(256), guest.queue(256));
        let port = Self {
            guest,
            rx,
            tx,
            sender,
            device,
            name,
        };
        port.own(port.rx.vring(0, features, true));
        port.own(port.tx.vring(1, features, true));
        port
    }

    fn shared(&self) -> &Arc<PortShared> {
        self.device.shared()
    }

    fn own(&self, vring: Box<Vring>) {
        self.sender.send(Command::Start(vring)).unwrap();
    }

    /// Waits until all that was sent to this port's worker before was obeyed.
    fn settle(&self) {
        for index in [0, 1] {
            let vring = give_back(&self.sender, index);
            self.own(vring);
        }
    }

    /// Posts receive buffers of one size.
    fn post(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let buffer = self.guest.buffer(len);
            self.rx.post(buffer);
        }
    }

    /// Sends a packet with its header, and waits until the switch has dealt with it.
    fn send(&mut self, packet: &[u8]) {
        let whole = self.guest.filled(packet);
        self.send_pieces(&[whole]);
    }

    /// Sends packets at once.
    fn send_all(&mut self, packets: &[&Vec<u8>]) {
        let packets = packets.iter().map(|packet| self.guest.filled(packet));
        let packets: Vec<Segment> = packets.collect();
        let chains = packets.iter().map(std::slice::from_ref);
        let chains: Vec<(&[Segment], &[Segment])> = chains.map(|chain| (chain, &[][..])).collect();
        self.tx.add(&chains);
        for _ in chains {
            self.tx.used();
        }
    }

    fn send_pieces(&mut self, pieces: &[Segment]) {
        self.tx.send(pieces);
        self.tx.used();
    }

    /// The next packet that it gets, header included.
    fn receive(&mut self) -> Vec<u8> {
        let (segments, len) = self.rx.used();
        let mut packet = self.guest.read(segments[0], len);
        let buffers = u16::from_le_bytes([packet[10], packet[11]]);
        assert!(buffers >= 1, "the header says {buffers} buffers");
        for _ in 1..buffers {
            let (segments, len) = self.rx.try_used().expect("a part of the packet is missing");
            packet.extend(self.guest.read(segments[0], len));
        }
        packet
    }

    /// It got nothing, now that the senders' packets were dealt with.
    fn got_nothing(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(5));
        self.rx.try_used().is_none()
    }
}

/// A packet with an empty header.
fn packet(to: [u8; 6], from: [u8; 6], tag: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend(to);
    packet.extend(from);
    if let Some(tag) = tag {
        packet.extend([0x81, 0]);
        packet.extend(tag.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

/// One of a type that nobody knows.
fn plain(to: [u8; 6], from: [u8; 6], len: usize) -> Vec<u8> {
    let payload: Vec<u8> = [0x88, 0xb5]
        .into_iter()
        .chain((0..len).map(|i| (i % 251) as u8))
        .collect();
    packet(to, from, None, &payload)
}

/// What the driver must see: the packet, its header saying how many buffers it takes.
fn with_buffers(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}
