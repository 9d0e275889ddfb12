//! On a real TAP, in a network namespace of the test's own. Where the system gives none, a test says so and ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::driver::{Guest, HEADER, MAC, Pair, Worker, shared};
use crate::net::args::{Cidr, NetArgs, Offload};
use crate::net::features::{GUEST_OFFLOADS, bit};
use crate::net::settings::Pairs;
use crate::net::tap::{Tap, TapError};
use crate::shell::{Device, Vring};

const FEATURES: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | GUEST_OFFLOADS;

/// Bytes of the header on a packet socket: without `num_buffers`.
const SOCKET_HEADER: usize = 10;
/// Length of the Ethernet, IPv4 and TCP headers in these tests.
const HEADERS: usize = 14 + 20 + 20;
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Gives this thread a network of its own. `false`, and a word on standard error, if that cannot be.
fn own_network(test: &str) -> bool {
    let why = match unshare(CloneFlags::CLONE_NEWNET) {
        Err(e) => format!("no network namespace: {e}"),
        Ok(()) => match File::options().read(true).write(true).open("/dev/net/tun") {
            Ok(_) => return true,
            Err(e) => format!("/dev/net/tun: {e}"),
        },
    };
    // Past the capture of the test harness: a test that did not run must not look like one that did.
    let _ = writeln!(io::stderr(), "test {test}: skipped: {why}");
    false
}

/// The host's end: a packet socket on the interface, with headers, so that segments pass whole.
#[allow(
    unsafe_code,
    reason = "packet sockets with headers have no safe wrapper"
)]
fn packet_socket(tap: &Tap) -> File {
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
        sll_ifindex: if_nametoindex(tap.name()).unwrap() as i32,
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

/// An Ethernet frame with a TCP packet from `port`, and the fields of the header that let it be cut into pieces
/// of 1448 bytes.
fn segment(to: [u8; 6], from: [u8; 6], port: u16, payload: usize) -> (Vec<u8>, Vec<u8>) {
    let mut ip = vec![0x45, 0];
    ip.extend(((40 + payload) as u16).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 9, 9, 1, 10, 9, 9, 2]);
    let sum = !checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut tcp = port.to_be_bytes().to_vec();
    tcp.extend(5001_u16.to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    // The checksum of the pseudo header; the rest is left to whoever cuts.
    let length = ((20 + payload) as u16).to_be_bytes();
    let pseudo = checksum(&[&ip[12..20], &[0, 6], &length]);
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
    let mut frame = [to, from].concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(tcp);
    assert_eq!(frame.len(), HEADERS);
    frame.extend((0..payload).map(|i| (i % 249) as u8));

    let gso = u8::from(payload > 1448);
    let mut header = vec![1, gso];
    header.extend((HEADERS as u16).to_le_bytes());
    header.extend((if gso == 1 { 1448_u16 } else { 0 }).to_le_bytes());
    header.extend(34_u16.to_le_bytes());
    header.extend(16_u16.to_le_bytes());
    assert_eq!(header.len(), SOCKET_HEADER);
    (header, frame)
}

/// Reads packets until one from or to our address comes: the host's own chatter is on the interface as well.
fn next_of_ours(host: &mut File) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        let len = host.read(&mut buffer).expect("no packet came");
        if buffer[SOCKET_HEADER + 6..SOCKET_HEADER + 12] == MAC.octets() {
            buffer.truncate(len);
            return buffer;
        }
    }
}

fn net_args(tap: &str, pairs: u16) -> NetArgs {
    NetArgs {
        tap: Some(tap.to_owned()),
        tap_fd: Vec::new(),
        tap_persist: false,
        tap_up: true,
        tap_ip: None,
        mac: Some(MAC),
        mtu: None,
        speed: None,
        queue_pairs: Some(pairs),
        offload: vec![Offload::All],
    }
}

/// One queue pair on a new TAP that is up, and the host's end of it.
fn pair(name: &str) -> (Tap, File, Pair) {
    let (tap, mut queues) = Tap::open(name, 1).unwrap();
    tap.set_header_len(HEADER as u8).unwrap();
    tap.set_offloads(0x1f).unwrap();
    tap.set_up().unwrap();
    let host = packet_socket(&tap);
    let pair = Pair::new(queues.remove(0), FEATURES);
    (tap, host, pair)
}

#[test]
fn frames_pass_both_ways() {
    if !own_network("frames_pass_both_ways") {
        return;
    }
    let (_tap, mut host, mut pair) = pair("ring%d");
    let (header, frame) = segment(PEER, MAC.octets(), 1000, 100);
    let whole = pair.guest.filled(&[&header[..], &[0, 0], &frame].concat());
    pair.tx.send(&[whole]);
    assert_eq!(next_of_ours(&mut host)[SOCKET_HEADER..], frame);
    pair.tx.used();

    // Only what is for us, of all that the host sends by itself.
    pair.shared.change(|s| s.filter.promiscuous = false);
    pair.shared.change(|s| s.filter.no_broadcast = true);
    pair.post(60, 1536);
    let (header, frame) = segment(MAC.octets(), PEER, 5001, 100);
    host.write_all(&[header, frame.clone()].concat()).unwrap();
    let received = pair.receive();
    assert!(received[HEADER..] == frame, "another frame");
    // The checksum was left to the driver, which accepted that.
    assert_eq!(received[0], 1);
}

#[test]
fn a_segment_of_64_kib_takes_one_call_each_way() {
    if !own_network("a_segment_of_64_kib_takes_one_call_each_way") {
        return;
    }
    let (_tap, mut host, mut pair) = pair("ring%d");
    // The longest frame that Linux does not cut before an interface (GSO_MAX_SIZE).
    let payload = 65535 - HEADERS;
    let (header, frame) = segment(PEER, MAC.octets(), 1000, payload);
    let parts = [
        pair.guest.filled(&[&header[..], &[0, 0]].concat()),
        pair.guest.filled(&frame[..HEADERS]),
        pair.guest.filled(&frame[HEADERS..]),
    ];
    pair.tx.send(&parts);
    let seen = next_of_ours(&mut host);
    assert!(seen[SOCKET_HEADER..] == frame, "another frame");
    assert_eq!(seen[1], 1, "it is still one segment to be cut");
    assert_eq!(pair.worker.counters.tx_calls.get(), 1);

    let version = pair.shared.change(|s| {
        s.filter.promiscuous = false;
        s.filter.no_broadcast = true;
    });
    assert!(pair.shared.wait(version));
    pair.post(60, 1536);
    let (header, frame) = segment(MAC.octets(), PEER, 5001, payload);
    host.write_all(&[header, frame.clone()].concat()).unwrap();
    let received = pair.receive();
    assert!(received[HEADER..] == frame, "another frame");
    assert_eq!(received[1], 1);
    assert_eq!(pair.worker.counters.rx_packets.get(), 1);
    // Each call gave a packet, or found that there was none.
    let counters = &pair.worker.counters;
    let packets = counters.rx_packets.get() + counters.rx_filtered.get();
    assert!(counters.rx_calls.get() <= packets + counters.wakeups.get());
}

#[test]
fn what_the_kernel_refuses_is_dropped_and_the_queue_goes_on() {
    if !own_network("what_the_kernel_refuses_is_dropped_and_the_queue_goes_on") {
        return;
    }
    let (_tap, mut host, mut pair) = pair("ring%d");
    let (mut header, frame) = segment(PEER, MAC.octets(), 1000, 3000);
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
    assert_eq!(next_of_ours(&mut host)[SOCKET_HEADER..], frame);
}

#[test]
fn pairs_that_are_not_in_use_get_no_packets() {
    if !own_network("pairs_that_are_not_in_use_get_no_packets") {
        return;
    }
    let (tap, queues) = Tap::open("ringmq", 2).unwrap();
    tap.set_header_len(HEADER as u8).unwrap();
    tap.set_up().unwrap();
    let mut host = packet_socket(&tap);
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
            let (mut header, frame) = segment(MAC.octets(), PEER, 2000 + port, 100);
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
        let version = shared.change(|s| s.pairs = Pairs::Fed);
        assert!(shared.wait(version));
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
