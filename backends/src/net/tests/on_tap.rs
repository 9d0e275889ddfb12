//! On a real TAP, in a network namespace of the test's own. Where the system gives none, a test says so and ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_HASH_REPORT, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_RSS, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::driver::{Guest, HEADER, MAC, Pair, Queue, Worker, shared};
use crate::net::args::{Cidr, NetArgs, Offload};
use crate::net::control_worker::ControlWorker;
use crate::net::features::{GUEST_OFFLOADS, Offloads, bit};
use crate::net::hash::{Hashing, Report, Toeplitz, vectors};
use crate::net::link::{Interface, Tap, TapError};
use crate::net::settings::{Pairs, Shared};
use crate::shell::{Command, CommandSender, Device, OnOff, Vring, command_channel};

pub(super) const FEATURES: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | GUEST_OFFLOADS;

/// Bytes of the header on a packet socket: without `num_buffers`.
pub(super) const SOCKET_HEADER: usize = 10;
const ETHERNET: usize = 14;
pub(super) const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Payload of the pieces that a segment is to be cut into.
const PIECE: usize = 1448;
/// The longest frame that Linux does not cut before an interface (GSO_MAX_SIZE).
pub(super) const LONGEST: usize = 65535;

/// A kind of segment.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    ip: Ip,
    protocol: Protocol,
    /// How the header calls it (VIRTIO 1.3, 5.1.6).
    gso: u32,
    /// The offload of the TAP that lets it pass whole.
    offload: u32,
}

#[derive(Clone, Copy)]
enum Ip {
    V4,
    V6,
}

#[derive(Clone, Copy)]
enum Protocol {
    Tcp = libc::IPPROTO_TCP as isize,
    Udp = libc::IPPROTO_UDP as isize,
}

impl Kind {
    /// Length of the Ethernet and IP headers.
    const fn csum_start(self) -> usize {
        ETHERNET
            + match self.ip {
                Ip::V4 => 20,
                Ip::V6 => 40,
            }
    }

    /// Where the checksum lies behind them.
    const fn csum_offset(self) -> usize {
        match self.protocol {
            Protocol::Tcp => 16,
            Protocol::Udp => 6,
        }
    }

    /// Length of all headers.
    pub(super) const fn headers(self) -> usize {
        self.csum_start()
            + match self.protocol {
                Protocol::Tcp => 20,
                Protocol::Udp => 8,
            }
    }
}

/// The kinds of segment, and the tests that each of them has.
macro_rules! kinds {
    ($($name:ident: $ip:ident $protocol:ident $gso:ident $offload:ident,)*) => {$(
        pub(super) mod $name {
            use super::*;

            pub(in super::super) const KIND: Kind = Kind {
                ip: Ip::$ip,
                protocol: Protocol::$protocol,
                gso: $gso,
                offload: libc::$offload,
            };

            kinds!(@tests $name
                frames_pass_both_ways
                a_segment_of_64_kib_takes_one_call_each_way
                what_the_kernel_refuses_is_dropped_and_the_queue_goes_on
            );
        }
    )*};
    (@tests $name:ident $($test:ident)*) => {$(
        #[test]
        fn $test() {
            super::$test(concat!(stringify!($name), "::", stringify!($test)), KIND);
        }
    )*};
}

kinds! {
    tso4: V4 Tcp VIRTIO_NET_HDR_GSO_TCPV4 TUN_F_TSO4,
    tso6: V6 Tcp VIRTIO_NET_HDR_GSO_TCPV6 TUN_F_TSO6,
    uso4: V4 Udp VIRTIO_NET_HDR_GSO_UDP_L4 TUN_F_USO4,
    uso6: V6 Udp VIRTIO_NET_HDR_GSO_UDP_L4 TUN_F_USO6,
}

/// Says on standard error that a test does not run.
pub(super) fn skipped(test: &str, why: &str) {
    // Past the capture of the test harness: a test that did not run must not look like one that did.
    let _ = writeln!(io::stderr(), "test {test}: skipped: {why}");
}

/// Gives this thread a network of its own. `false`, and a word on standard error, if that cannot be.
pub(super) fn own_network(test: &str) -> bool {
    let why = match unshare(CloneFlags::CLONE_NEWNET) {
        Err(e) => format!("no network namespace: {e}"),
        Ok(()) => match File::options().read(true).write(true).open("/dev/net/tun") {
            Ok(_) => return true,
            Err(e) => format!("/dev/net/tun: {e}"),
        },
    };
    skipped(test, &why);
    false
}

/// The host's end: a packet socket on the interface, with headers, so that segments pass whole.
#[allow(
    unsafe_code,
    reason = "packet sockets with headers have no safe wrapper"
)]
pub(super) fn packet_socket(interface: &str) -> File {
    let fd: OwnedFd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None::<SockProtocol>,
    )
    .unwrap();
    let on: libc::c_int = 1;
    // SAFETY: the option is one int, which lives until after the call.
    let done = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: if_nametoindex(interface).unwrap() as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is one sockaddr_ll, which lives until after the call.
    let done = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(5)).unwrap();
    File::from(fd)
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| {
            u32::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]))
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An Ethernet frame with a packet from `port`, and the fields of the header that let it be cut into pieces.
pub(super) fn segment(
    kind: Kind,
    to: [u8; 6],
    from: [u8; 6],
    port: u16,
    payload: usize,
) -> (Vec<u8>, Vec<u8>) {
    let protocol = kind.protocol as u8;
    let length = ((kind.headers() - kind.csum_start() + payload) as u16).to_be_bytes();
    let (ip, addresses) = match kind.ip {
        Ip::V4 => {
            let mut ip = vec![8, 0, 0x45, 0];
            ip.extend(((kind.headers() - ETHERNET + payload) as u16).to_be_bytes());
            ip.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
            let addresses = vec![10, 9, 9, 1, 10, 9, 9, 2];
            let sum = !checksum(&[&ip[2..], &addresses]);
            ip[12..14].copy_from_slice(&sum.to_be_bytes());
            (ip, addresses)
        }
        Ip::V6 => {
            let mut ip = vec![0x86, 0xdd, 0x60, 0, 0, 0];
            ip.extend(length);
            ip.extend([protocol, 64]);
            let address = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
            (ip, [address(1), address(2)].concat())
        }
    };
    // The checksum of the pseudo header; the rest is left to whoever cuts.
    let pseudo = checksum(&[&addresses, &[0, protocol], &length]).to_be_bytes();
    let mut transport = port.to_be_bytes().to_vec();
    transport.extend(5001_u16.to_be_bytes());
    match kind.protocol {
        Protocol::Tcp => {
            transport.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        }
        Protocol::Udp => transport.extend([length, [0, 0]].concat()),
    }
    transport[kind.csum_offset()..][..2].copy_from_slice(&pseudo);
    let mut frame = [to, from].concat();
    frame.extend(ip);
    frame.extend(addresses);
    assert_eq!(frame.len(), kind.csum_start());
    frame.extend(transport);
    assert_eq!(frame.len(), kind.headers());
    frame.extend((0..payload).map(|i| (i % 249) as u8));

    let (gso, piece) = if payload > PIECE {
        (kind.gso, PIECE)
    } else {
        (VIRTIO_NET_HDR_GSO_NONE, 0)
    };
    let mut header = vec![VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, gso as u8];
    for field in [kind.headers(), piece, kind.csum_start(), kind.csum_offset()] {
        header.extend((field as u16).to_le_bytes());
    }
    assert_eq!(header.len(), SOCKET_HEADER);
    (header, frame)
}

/// Reads packets until one from our address to the peer's comes: the host's own chatter is on the interface as well.
pub(super) fn next_of_ours(host: &mut File) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        let len = host.read(&mut buffer).expect("no packet came");
        if buffer[SOCKET_HEADER..SOCKET_HEADER + 12] == [PEER, MAC.octets()].concat() {
            buffer.truncate(len);
            return buffer;
        }
    }
}

fn net_args(tap: &str, pairs: u16) -> NetArgs {
    NetArgs {
        tap: Some(tap.to_owned()),
        link: None,
        forward: Vec::new(),
        passt_arg: Vec::new(),
        pcap: None,
        pcap_snap: 65535,
        tap_fd: Vec::new(),
        tap_persist: false,
        tap_up: true,
        tap_ip: None,
        mac: Some(MAC),
        mtu: None,
        speed: None,
        standby: false,
        rss: OnOff::On,
        limit: None,
        hash_report: false,
        queue_pairs: Some(pairs),
        poll: 50,
        poll_budget: 20,
        offload: vec![Offload::All],
        packed: OnOff::On,
        in_order: OnOff::On,
    }
}

/// In a network of this thread's own, one queue pair on a new TAP that is up, and the host's end of it. `None`, and
/// a word on standard error, if that cannot be, or not with the offload that is needed.
fn pair(test: &str, needed: u32) -> Option<(Tap, File, Pair)> {
    if !own_network(test) {
        return None;
    }
    let (tap, mut queues) = Tap::open("ring%d", 1).unwrap();
    let all = Offloads {
        csum: true,
        tso: true,
        ufo: true,
        uso: true,
    };
    let offloads = tap.probe_offloads(&all.candidates());
    if offloads & needed == 0 {
        skipped(test, "the kernel has no such offload for a TAP");
        return None;
    }
    tap.set_header_len(HEADER as u8).unwrap();
    tap.set_offloads(offloads).unwrap();
    tap.set_up().unwrap();
    let host = packet_socket(tap.name());
    let pair = Pair::new(queues.remove(0), FEATURES);
    Some((tap, host, pair))
}

/// From now on the driver receives only what is for us, of all that the host sends by itself.
pub(super) fn only_ours(pair: &Pair) {
    let version = pair.shared.change(|s| {
        s.filter.promiscuous = false;
        s.filter.no_broadcast = true;
    });
    assert!(pair.shared.wait(version));
}

fn frames_pass_both_ways(test: &str, kind: Kind) {
    let Some((_tap, mut host, mut pair)) = pair(test, libc::TUN_F_CSUM) else {
        return;
    };
    let (header, frame) = segment(kind, PEER, MAC.octets(), 1000, 100);
    let whole = pair.guest.filled(&[&header[..], &[0, 0], &frame].concat());
    pair.tx.send(&[whole]);
    assert_eq!(next_of_ours(&mut host)[SOCKET_HEADER..], frame);
    pair.tx.used();

    only_ours(&pair);
    pair.post(60, 1536);
    let (header, frame) = segment(kind, MAC.octets(), PEER, 5001, 100);
    host.write_all(&[&header[..], &frame].concat()).unwrap();
    let received = pair.receive();
    assert!(received[HEADER..] == frame, "another frame");
    // The checksum was left to the driver, which accepted that.
    assert_eq!(received[..2], header[..2]);
    assert_eq!(received[6..10], header[6..]);
}

fn a_segment_of_64_kib_takes_one_call_each_way(test: &str, kind: Kind) {
    let Some((_tap, mut host, mut pair)) = pair(test, kind.offload) else {
        return;
    };
    let headers = kind.headers();
    let (header, frame) = segment(kind, PEER, MAC.octets(), 1000, LONGEST - headers);
    let parts = [
        pair.guest.filled(&[&header[..], &[0, 0]].concat()),
        pair.guest.filled(&frame[..headers]),
        pair.guest.filled(&frame[headers..]),
    ];
    pair.tx.send(&parts);
    let seen = next_of_ours(&mut host);
    assert!(seen[SOCKET_HEADER..] == frame, "another frame");
    // It is still one segment to be cut. Of a frame that fills pages the kernel keeps the length of the headers too.
    assert_eq!(seen[..SOCKET_HEADER], header);
    assert_eq!(pair.worker.counters.tx_calls.get(), 1);

    only_ours(&pair);
    pair.post(60, 1536);
    let (header, frame) = segment(kind, MAC.octets(), PEER, 5001, LONGEST - headers);
    host.write_all(&[&header[..], &frame].concat()).unwrap();
    let received = pair.receive();
    assert!(received[HEADER..] == frame, "another frame");
    assert_eq!(received[..SOCKET_HEADER], header);
    assert_eq!(pair.worker.counters.rx_packets.get(), 1);
    // Each call gave a packet, or found that there was none.
    let counters = &pair.worker.counters;
    let packets = counters.rx_packets.get() + counters.rx_filtered.get();
    assert!(counters.rx_calls.get() <= packets + counters.wakeups.get());
}

fn what_the_kernel_refuses_is_dropped_and_the_queue_goes_on(test: &str, kind: Kind) {
    let Some((_tap, mut host, mut pair)) = pair(test, kind.offload) else {
        return;
    };
    let (mut header, frame) = segment(kind, PEER, MAC.octets(), 1000, 3000);
    header.extend([0, 0]);
    for (place, value) in [(1, 77), (6, 0xff)] {
        let mut bad = header.clone();
        bad[place] = value;
        bad[place + 1] = value;
        let whole = pair.guest.filled(&[&bad[..], &frame].concat());
        pair.tx.send(&[whole]);
        pair.tx.used();
    }
    assert_eq!(pair.worker.counters.tx_dropped.get(), 2);
    let whole = pair.guest.filled(&[&header[..], &frame].concat());
    pair.tx.send(&[whole]);
    let seen = next_of_ours(&mut host);
    assert_eq!(seen[SOCKET_HEADER..], frame);
    assert_eq!(seen[..2], header[..2]);
}

#[test]
fn pairs_that_are_not_in_use_get_no_packets() {
    if !own_network("pairs_that_are_not_in_use_get_no_packets") {
        return;
    }
    let (tap, queues) = Tap::open("ringmq", 2).unwrap();
    tap.set_header_len(HEADER as u8).unwrap();
    tap.set_up().unwrap();
    let mut host = packet_socket(tap.name());
    let shared = shared(2);
    let mut guest = Guest::new();
    let mut rings = [guest.queue(256), guest.queue(256)];
    let workers: Vec<_> = (0..)
        .zip(queues)
        .map(|(pair, queue)| Worker::start(pair, queue, &shared))
        .collect();
    let version = shared.change(|s| {
        s.filter.promiscuous = false;
        s.filter.no_broadcast = true;
        s.pairs = Pairs::First(1);
    });
    assert!(shared.wait(version));
    for (index, (ring, worker)) in rings.iter_mut().zip(&workers).enumerate() {
        for _ in 0..200 {
            ring.post(guest.buffer(2048));
        }
        let features = FEATURES & !GUEST_OFFLOADS | bit(VIRTIO_NET_F_MQ);
        worker.own(ring.vring(2 * index as u16, features, true));
    }
    let mut burst = |count: u64| {
        for port in 0..40 {
            let (mut header, frame) = segment(tso4::KIND, MAC.octets(), PEER, 2000 + port, 100);
            header[0] = 0;
            host.write_all(&[header, frame].concat()).unwrap();
        }
        let received = |i: usize| workers[i].counters.rx_packets.get();
        for _ in 0..500 {
            if received(0) + received(1) >= count {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        [received(0), received(1)]
    };
    assert_eq!(burst(40), [40, 0]);
    let version = shared.change(|s| s.pairs = Pairs::First(2));
    assert!(shared.wait(version));
    let [first, second] = burst(80);
    assert_eq!(first + second, 80);
    assert!(second > 0, "all went to the first pair");
    let version = shared.change(|s| s.pairs = Pairs::First(1));
    assert!(shared.wait(version));
    assert_eq!(burst(120), [first + 40, second]);
    // Both had buffers when they were started last: both are in use. Then one that has none is not.
    let restart = |workers: &[Worker], vring: Option<Box<Vring>>| {
        let own = workers[1].give_back(2);
        workers[1].own(vring.unwrap_or(own));
        // The worker may adopt a change before it obeys, but the second one only after it has.
        for _ in 0..2 {
            let version = shared.change(|s| s.pairs = Pairs::Fed);
            assert!(shared.wait(version));
        }
    };
    restart(&workers, None);
    let [third, fourth] = burst(160);
    assert_eq!(third + fourth, 160);
    assert!(fourth > second, "all went to the first pair");
    let empty = guest.queue(256);
    let features = FEATURES & !GUEST_OFFLOADS | bit(VIRTIO_NET_F_MQ);
    restart(&workers, Some(empty.vring(2, features, true)));
    assert_eq!(burst(200), [third + 40, fourth]);
}

/// A driver on four pairs of a TAP, with receive-side scaling and hash reports.
struct Scaled {
    host: File,
    guest: Guest,
    rings: Vec<Queue>,
    workers: Vec<Worker>,
    control: Queue,
    shared: Arc<Shared>,
    sender: CommandSender,
    thread: Option<JoinHandle<()>>,
}

const SCALED: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_MQ)
    | bit(VIRTIO_NET_F_RSS)
    | bit(VIRTIO_NET_F_HASH_REPORT);
/// Bytes of the header with hash reports.
const HASH_HEADER: usize = 20;
/// What [`Scaled`] receives of one frame: on which pair, and the header's hash and kind of hash.
type Arrival = (u16, u32, u16);

impl Scaled {
    const PAIRS: u16 = 4;

    /// `None`, and a word on standard error, if that cannot be.
    fn new(test: &str, inherited: bool) -> Option<Self> {
        if !own_network(test) {
            return None;
        }
        let (mut tap, mut queues) = Tap::open("ringrss", Self::PAIRS).unwrap();
        if inherited {
            // In another order than they were attached.
            let fds = [3, 1, 0, 2].map(|at: usize| {
                let fd = queues[at].as_fd().try_clone_to_owned();
                fd.unwrap().into_raw_fd()
            });
            (tap, queues) = Tap::inherit(&fds).unwrap();
        }
        if let Err(error) = Interface::prepare_steering(&tap) {
            skipped(test, &error.to_string());
            return None;
        }
        Tap::set_header_len(&tap, HASH_HEADER as u8).unwrap();
        tap.set_up().unwrap();
        let host = packet_socket(tap.name());
        let shared = shared(Self::PAIRS);
        let mut guest = Guest::new();
        let queues = (0..).zip(queues);
        let workers: Vec<_> = queues
            .map(|(pair, queue)| Worker::start(pair, queue, &shared))
            .collect();
        let version = shared.change(|s| {
            s.filter.promiscuous = false;
            s.filter.no_broadcast = true;
        });
        assert!(shared.wait(version));
        let mut rings = Vec::new();
        for (pair, worker) in (0..).zip(&workers) {
            let mut ring = guest.queue(256);
            for _ in 0..250 {
                ring.post(guest.buffer(512));
            }
            worker.own(ring.vring(2 * pair, SCALED, true));
            rings.push(ring);
        }
        let (sender, commands) = command_channel().unwrap();
        let interface: Arc<dyn Interface> = Arc::new(tap);
        let worker = ControlWorker::new(interface, Arc::clone(&shared), Self::PAIRS, commands);
        let worker = worker.unwrap();
        let thread = std::thread::spawn(move || worker.run());
        let control = guest.queue(16);
        sender
            .send(Command::Start(control.vring(2 * Self::PAIRS, SCALED, true)))
            .unwrap();
        Some(Self {
            host,
            guest,
            rings,
            workers,
            control,
            shared,
            sender,
            thread: Some(thread),
        })
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        let readable = self.guest.filled(bytes);
        let ack = self.guest.filled(&[0xaa]);
        self.control.add(&[(&[readable], &[ack])]);
        self.control.used();
        self.guest.read(ack, 1)[0]
    }

    fn rss(&mut self, types: u32, unclassified: u16, table: &[u16]) {
        let mut bytes = vec![4, 1];
        bytes.extend(types.to_le_bytes());
        bytes.extend((table.len() as u16 - 1).to_le_bytes());
        bytes.extend(unclassified.to_le_bytes());
        bytes.extend(table.iter().flat_map(|pair| pair.to_le_bytes()));
        bytes.extend([1, 0, 40]);
        bytes.extend(vectors::KEY);
        assert_eq!(self.command(&bytes), 0);
    }

    /// Has the host send a frame, and the driver receive it.
    fn pass(&mut self, frame: &[u8]) -> Arrival {
        let header = [0; SOCKET_HEADER];
        self.host.write_all(&[&header, frame].concat()).unwrap();
        for _ in 0..5000 {
            for (pair, ring) in (0..).zip(&mut self.rings) {
                let Some((segments, len)) = ring.try_used() else {
                    continue;
                };
                let packet = self.guest.read(segments[0], len);
                ring.post(segments[0]);
                // What the host sends by itself is not for us.
                assert_eq!(&packet[HASH_HEADER..], frame);
                let value = u32::from_le_bytes(packet[12..16].try_into().unwrap());
                assert_eq!(packet[18..20], [0, 0]);
                return (pair, value, u16::from_le_bytes([packet[16], packet[17]]));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no packet came");
    }
}

impl Drop for Scaled {
    fn drop(&mut self) {
        self.sender.send(Command::Exit).unwrap();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

#[test]
fn packets_go_where_the_driver_says() {
    go_where_the_driver_says("packets_go_where_the_driver_says", false);
}

#[test]
fn packets_go_to_inherited_queues_as_well() {
    go_where_the_driver_says("packets_go_to_inherited_queues_as_well", true);
}

fn go_where_the_driver_says(test: &str, inherited: bool) {
    let Some(mut scaled) = Scaled::new(test, inherited) else {
        return;
    };
    let hashing = |types| Hashing {
        types,
        toeplitz: Toeplitz::new(&vectors::KEY),
    };
    let options = [43, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0];
    let mut frames = Vec::new();
    for vector in &vectors::ALL {
        for port in 0..4 {
            let mut vector = *vector;
            vector.0.1 += port;
            frames.push(vectors::frame(&vector, 6, &[], None));
            frames.push(vectors::frame(&vector, 17, &[0x8100], None));
            frames.push(vectors::frame(&vector, 6, &[0x88a8, 0x8100], None));
            frames.push(vectors::frame(&vector, 17, &[], Some((0, &options))));
        }
        frames.push(vectors::frame(vector, 47, &[], None));
    }
    // One that is no IP, one that is cut short, a fragment, and one of IPv4 with a header too short.
    let mut arp = vectors::frame(&vectors::ALL[0], 6, &[], None);
    arp[13] = 6;
    frames.push(arp);
    frames.push(vectors::frame(&vectors::ALL[0], 6, &[], None)[..36].to_vec());
    frames.push(vectors::frame(&vectors::ALL[5], 6, &[], None)[..55].to_vec());
    let mut fragment = vectors::frame(&vectors::ALL[1], 17, &[], None);
    fragment[20] = 0x20;
    frames.push(fragment);
    let mut short = vectors::frame(&vectors::ALL[1], 17, &[], None);
    short[14] = 0x44;
    frames.push(short);

    let check = |scaled: &mut Scaled, types: u32, unclassified: u16, table: &[u16]| {
        scaled.rss(types, unclassified, table);
        let mut seen = [0; 4];
        for frame in &frames {
            let report = hashing(types).report(frame);
            let expected = if report == Report::NONE {
                unclassified
            } else {
                table[report.value as usize % table.len()]
            };
            let arrival = scaled.pass(frame);
            assert_eq!(
                arrival,
                (expected, report.value, report.kind),
                "{frame:02x?}"
            );
            seen[usize::from(expected)] += 1;
        }
        seen
    };
    let all = check(&mut scaled, 0x3f, 0, &[0, 1, 2, 3]);
    assert!(all.iter().all(|&count| count > 5), "{all:?}");
    check(&mut scaled, 0x3f, 3, &[3, 0]);
    check(&mut scaled, 0x09, 2, &[1; 128]);
    check(&mut scaled, 0x12, 1, &[0, 2]);
    check(&mut scaled, 0, 2, &[0]);
    // The kernel's positions of queues change when some come and go.
    assert_eq!(scaled.command(&[4, 0, 2, 0]), 0);
    assert_eq!(scaled.command(&[4, 0, 1, 0]), 0);
    check(&mut scaled, 0x3f, 1, &[0, 3, 2, 3]);
    for pair in [1, 2] {
        let vring = scaled.workers[usize::from(pair)].give_back(2 * pair);
        scaled.workers[usize::from(pair)].own(vring);
    }
    let version = scaled.shared.change(|_| {});
    assert!(scaled.shared.wait(version));
    check(&mut scaled, 0x3f, 1, &[0, 1, 2, 3]);
}

#[test]
fn the_command_line_sets_the_interface_up() {
    if !own_network("the_command_line_sets_the_interface_up") {
        return;
    }
    let args = NetArgs {
        mtu: Some(9000),
        tap_ip: Some("10.77.0.1/24".parse::<Cidr>().unwrap()),
        ..net_args("ringcli", 2)
    };
    let net = args.open().unwrap();
    assert_eq!(net.queue_count(), 5);
    assert_eq!(net.read_config(0, 6).unwrap(), MAC.octets());
    assert_eq!(net.read_config(8, 4).unwrap(), [2, 0, 0x28, 0x23]);
    let read =
        |file: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
    // The route of the address's network: 10.77.0.0/24, little-endian.
    assert!(
        read("route").lines().any(|line| {
            line.starts_with("ringcli\t00004D0A\t") && line.contains("\t00FFFFFF\t")
        })
    );
    let offered = net.features();
    assert_eq!(offered & bit(VIRTIO_NET_F_MQ), bit(VIRTIO_NET_F_MQ));
    assert_ne!(offered & GUEST_OFFLOADS, 0);
    drop(net);
    assert!(
        if_nametoindex("ringcli").is_err(),
        "it is gone with its last queue"
    );
}

#[test]
fn taps_that_cannot_be_had_are_refused_clearly() {
    if !own_network("taps_that_cannot_be_had_are_refused_clearly") {
        return;
    }
    assert!(matches!(Tap::open("lo", 1), Err(TapError::Kind { .. })));
    let (single, _queues) = Tap::open("ringone", 1).unwrap();
    assert!(matches!(
        Tap::open(single.name(), 1),
        Err(TapError::Busy { .. })
    ));
    assert!(matches!(
        Tap::open(single.name(), 2),
        Err(TapError::Kind { .. } | TapError::Busy { .. })
    ));

    let (many, queues) = Tap::open("ringmany", 3).unwrap();
    let fds: Vec<_> = queues
        .iter()
        .map(|q| q.as_fd().try_clone_to_owned().unwrap().into_raw_fd())
        .collect();
    let (again, inherited) = Tap::inherit(&fds).unwrap();
    assert_eq!((again.name(), inherited.len()), (many.name(), 3));
    // One queue of an interface that has several will do.
    drop((many, queues, again, inherited));
    let (persistent, _) = Tap::open("ringkeep", 2).unwrap();
    persistent.set_persistent().unwrap();
    drop(persistent);
    assert!(Tap::open("ringkeep", 1).is_ok());
}
