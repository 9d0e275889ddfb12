//! The data path and the control queue without privileges: a socket pair keeps packets apart like a TAP.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::SndBuf;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair};
use nix::unistd::write;
use ringside_rings::Segment;
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_NOTF_COAL, VIRTIO_NET_F_RSS,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_F_VQ_NOTF_COAL,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddress;

use super::driver::{Guest, HEADER, MAC, Pair, Queue, Worker, give_back, shared};
use crate::net::coalesce::Coalescing;
use crate::net::config::{MacAddress, NetConfig};
use crate::net::control_worker::ControlWorker;
use crate::net::device::Net;
use crate::net::features::{GUEST_OFFLOADS, bit};
use crate::net::link::{AnyLink, Interface, LinkError, TapQueue};
use crate::net::settings::{Pairs, Shared};

use crate::shell::{Command, CommandSender, Device, command_channel};

const BASE: u64 = bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_EVENT_IDX);
const MERGEABLE: u64 = BASE | bit(VIRTIO_NET_F_MRG_RXBUF);
const ALL: u64 = MERGEABLE | GUEST_OFFLOADS;

fn socket() -> (UnixDatagram, TapQueue) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (ours, TapQueue::from_packet_fd(theirs.into()))
}

fn pair(features: u64) -> (UnixDatagram, Pair) {
    let (socket, tap) = socket();
    (socket, Pair::new(tap, features))
}

/// A packet with its header: to `to`, and then bytes that differ from place to place.
fn packet_to(to: MacAddress, len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend(to.octets());
    packet.extend((packet.len()..HEADER + len).map(|i| (i % 251) as u8));
    packet
}

fn packet(len: usize) -> Vec<u8> {
    packet_to(MAC, len)
}

fn receive(socket: &UnixDatagram) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 17];
    let len = socket.recv(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

/// What the driver must see: the packet, its header saying how many buffers it takes.
fn with_buffers(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}

#[test]
fn a_packet_in_any_pieces_is_sent_whole_by_one_call() {
    let (socket, mut pair) = pair(ALL);
    let sent = packet(100);
    let pieces: Vec<Segment> = [&sent[..5], &sent[5..6], &sent[6..30], &sent[30..]]
        .map(|part| pair.guest.filled(part))
        .into();
    pair.tx.send(&pieces);
    assert_eq!(receive(&socket), sent);
    let (segments, len) = pair.tx.used();
    assert_eq!((segments, len), (pieces, 0));
    assert_eq!(pair.worker.counters.tx_calls.get(), 1);
}

#[test]
fn the_longest_packet_takes_one_call_each_way() {
    let (socket, mut pair) = pair(ALL);
    let long = packet(65550);
    let whole = pair.guest.filled(&long);
    pair.tx.send(&[whole]);
    assert!(receive(&socket) == long, "another packet");
    assert_eq!(pair.worker.counters.tx_calls.get(), 1);

    pair.post(48, 1536);
    // Whatever the worker tried before there was a packet does not count.
    std::thread::sleep(Duration::from_millis(50));
    let before = pair.worker.counters.rx_calls.get();
    socket.send(&long).unwrap();
    assert!(pair.receive() == with_buffers(long, 43), "another packet");
    std::thread::sleep(Duration::from_millis(50));
    let calls = pair.worker.counters.rx_calls.get() - before;
    assert_eq!(calls, 2, "one for the packet, one that finds no more");
    assert_eq!(pair.worker.counters.rx_packets.get(), 1);
}

#[test]
fn packets_are_received_one_behind_the_other() {
    let (socket, mut pair) = pair(ALL);
    pair.post(64, 256);
    for len in [60, 200, 244, 245, 500, 1514] {
        let sent = packet(len);
        socket.send(&sent).unwrap();
        let buffers = sent.len().div_ceil(256) as u16;
        assert_eq!(pair.receive(), with_buffers(sent, buffers), "{len}");
    }
}

/// Like [`socket`], with room for many packets.
fn roomy_socket() -> (OwnedFd, TapQueue) {
    let flags = SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    (ours, TapQueue::from_packet_fd(theirs))
}

/// A packet of `len` bytes that differs from all others.
fn numbered(to: MacAddress, number: u8, len: usize) -> Vec<u8> {
    let mut packet = packet_to(to, len);
    packet[HEADER + 20] = number;
    packet
}

/// Posts buffers, and kicks once.
fn post_at_once(pair: &mut Pair, count: usize, len: u32) {
    let buffers: Vec<Segment> = (0..count).map(|_| pair.guest.buffer(len)).collect();
    let chains = buffers.iter().map(std::slice::from_ref);
    let chains: Vec<(&[Segment], &[Segment])> = chains.map(|chain| (&[][..], chain)).collect();
    pair.rx.add(&chains);
}

#[test]
fn what_waits_is_received_in_order_by_few_calls() {
    let (socket, tap) = roomy_socket();
    let mut pair = Pair::new(tap, ALL);
    for number in 0..40 {
        write(&socket, &numbered(MAC, number, 100)).unwrap();
    }
    // Nothing is read before there is a buffer.
    post_at_once(&mut pair, 64, 1536);
    for number in 0..40 {
        let expected = with_buffers(numbered(MAC, number, 100), 1);
        assert_eq!(pair.receive(), expected, "{number}");
    }
    let counters = &pair.worker.counters;
    // 1, 1, 4, 8, 16, and then the last 10 of 32.
    assert_eq!(counters.rx_calls.get(), 6);
    assert_eq!(counters.rx_packets.get(), 40);
    let vring = pair.worker.give_back(0);
    assert_eq!((vring.ring.next_avail(), vring.ring.in_flight()), (40, 0));
}

/// Packets that are long, refused or malformed among those that one call reads.
#[test]
fn what_one_call_reads_keeps_its_order() {
    let queues = [0, bit(VIRTIO_F_RING_PACKED) | bit(VIRTIO_F_IN_ORDER)];
    for (offers, queues) in [(ALL, queues[0]), (ALL, queues[1]), (BASE, queues[0])] {
        let (socket, tap) = roomy_socket();
        let mut pair = Pair::new(tap, offers | queues);
        let version = pair.shared.change(|s| s.filter.promiscuous = false);
        assert!(pair.shared.wait(version));
        let long = if offers == BASE { 300 } else { 2000 };
        for odd in 0..40_u8 {
            let other = MacAddress::new([2, 9, 9, 9, 9, 9]);
            let mut expected = Vec::new();
            for number in 0..40 {
                let (to, len) = match number {
                    _ if number != odd && number != odd + 2 => (MAC, 100),
                    _ if odd % 3 == 0 => (MAC, long),
                    _ => (other, 100),
                };
                let packet = numbered(to, number, len);
                write(&socket, &packet).unwrap();
                if to == MAC && (len == 100 || offers != BASE) {
                    expected.push(packet);
                }
                if odd % 3 == 1 && number == odd {
                    write(&socket, &[0; HEADER - 1]).unwrap();
                }
            }
            let mark = pair.guest.mark();
            let buffers = expected.iter().map(|packet| packet.len().div_ceil(256));
            post_at_once(&mut pair, buffers.sum(), 256);
            for packet in expected {
                let number = packet[HEADER + 20];
                let buffers = packet.len().div_ceil(256) as u16;
                assert!(
                    pair.receive() == with_buffers(packet, buffers),
                    "{number} with {odd}"
                );
            }
            assert_eq!(pair.rx.outstanding(), 0);
            pair.guest.rewind(mark);
        }
        let dropped = pair.worker.counters.rx_dropped.get();
        assert!(dropped >= 13, "{dropped}");
    }
}

#[test]
fn a_packet_waits_for_buffers_and_is_not_lost() {
    let (socket, mut pair) = pair(ALL);
    pair.post(2, 512);
    let sent = packet(4000);
    socket.send(&sent).unwrap();
    assert!(pair.rx.stays_unused());
    pair.post(2, 512);
    assert!(pair.rx.stays_unused());
    pair.post(4, 512);
    assert_eq!(pair.receive(), with_buffers(sent, 8));
    let next = packet(60);
    socket.send(&next).unwrap();
    assert!(pair.rx.stays_unused());
    pair.post(1, 512);
    assert_eq!(pair.receive(), with_buffers(next, 1));
    assert_eq!(pair.worker.counters.rx_dropped.get(), 0);
}

#[test]
fn without_buffers_the_worker_sleeps() {
    let (socket, pair) = pair(ALL);
    socket.send(&packet(60)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let before = pair.worker.counters.wakeups.get();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(pair.worker.counters.wakeups.get(), before);
}

#[test]
fn without_mergeable_buffers_a_packet_has_one_or_is_dropped() {
    let (socket, mut pair) = pair(BASE);
    pair.post(2, 256);
    socket.send(&packet(400)).unwrap();
    let fits = packet(200);
    socket.send(&fits).unwrap();
    assert_eq!(pair.receive(), with_buffers(fits, 1));
    assert_eq!(pair.worker.counters.rx_dropped.get(), 1);
}

/// Waits for what the worker does, however busy the machine is.
fn eventually(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_full_tap_keeps_the_order() {
    let (socket, tap) = socket();
    setsockopt(&tap, SndBuf, &4096).unwrap();
    let mut pair = Pair::new(tap, ALL);
    for i in 0..60_u8 {
        let mut sent = packet(100);
        sent[HEADER + 20] = i;
        let whole = pair.guest.filled(&sent);
        pair.tx.send(&[whole]);
    }
    eventually(|| pair.worker.counters.tx_full.get() > 0);
    for i in 0..60_u8 {
        assert_eq!(receive(&socket)[HEADER + 20], i);
        // No room comes up in the middle of a call, as none does with a TAP.
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..60 {
        pair.tx.used();
    }
    assert_eq!(pair.worker.counters.tx_dropped.get(), 0);
}

#[test]
fn what_waits_is_sent_in_order_by_one_call() {
    let (socket, mut pair) = pair(ALL);
    let numbered = |i: u8| {
        let mut packet = packet(100);
        packet[HEADER + 20] = i;
        packet
    };
    let mut chains: Vec<Vec<Segment>> = (0..20)
        .map(|i| {
            let sent = numbered(i);
            let (front, back) = sent.split_at(HEADER + usize::from(i % 3) * 10);
            [front, back].map(|part| pair.guest.filled(part)).into()
        })
        .collect();
    // Too short: between the others, and no matter of theirs.
    chains.insert(7, vec![pair.guest.filled(&[0; HEADER + 13])]);
    let chains: Vec<(&[Segment], &[Segment])> =
        chains.iter().map(|chain| (&chain[..], &[][..])).collect();
    pair.tx.add(&chains);
    for i in 0..20 {
        assert_eq!(receive(&socket), numbered(i));
    }
    for (chain, _) in chains {
        assert_eq!(pair.tx.used().0, chain);
    }
    assert_eq!(pair.worker.counters.tx_calls.get(), 1);
    assert_eq!(pair.worker.counters.tx_packets.get(), 20);
    assert_eq!(pair.worker.counters.tx_dropped.get(), 1);
}

/// The kernel tells of those behind all others.
#[test]
fn packets_that_the_kernel_refuses_are_lost_and_no_others() {
    let (socket, tap) = socket();
    // Room for all short packets, and for no long one.
    setsockopt(&tap, SndBuf, &30_000).unwrap();
    let mut pair = Pair::new(tap, ALL);
    for refused in [
        &[0][..],
        &[3],
        &[9],
        &[0, 4, 5, 9],
        &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ] {
        let lens = (0..10).map(|i| if refused.contains(&i) { 65_000 } else { 100 });
        let sent: Vec<Vec<u8>> = lens.map(packet).collect();
        let chains: Vec<[Segment; 1]> = sent.iter().map(|sent| [pair.guest.filled(sent)]).collect();
        let rows: Vec<(&[Segment], &[Segment])> =
            chains.iter().map(|chain| (&chain[..], &[][..])).collect();
        let before = pair.worker.counters.tx_dropped.get();
        pair.tx.add(&rows);
        for sent in sent.iter().filter(|sent| sent.len() < 1000) {
            assert_eq!(receive(&socket), *sent);
        }
        for chain in &chains {
            assert_eq!(pair.tx.used().0, chain);
        }
        let lost = pair.worker.counters.tx_dropped.get() - before;
        assert_eq!(lost, refused.len() as u64, "{refused:?}");
    }
    assert_eq!(pair.worker.counters.tx_calls.get(), 5);
}

#[test]
fn packets_in_more_pieces_than_a_call_takes_need_another() {
    let (socket, tap) = socket();
    let mut guest = Guest::with(ALL);
    let mut queue = guest.queue(4096);
    let worker = Worker::start(0, tap, &shared(1));
    worker.own(queue.vring(1, ALL, true));
    let sent = packet(700);
    let pieces: Vec<Segment> = sent.chunks(2).map(|part| guest.filled(part)).collect();
    let chain = (&pieces[..], &[][..]);
    queue.add(&[chain; 9]);
    for _ in 0..9 {
        assert_eq!(receive(&socket), sent);
        assert_eq!(queue.used().0, pieces);
    }
    // 356 pieces each, of which a call takes 1022.
    assert_eq!(worker.counters.tx_calls.get(), 5);
    // More than any call takes.
    let pieces: Vec<Segment> = sent[..]
        .chunks(1)
        .cycle()
        .take(1023)
        .map(|part| guest.filled(part))
        .collect();
    queue.add(&[(&pieces[..], &[])]);
    assert_eq!(queue.used().0, pieces);
    assert_eq!(worker.counters.tx_dropped.get(), 1);
}

#[test]
fn packets_that_do_not_pass_the_filter_cost_no_buffer() {
    let (socket, mut pair) = pair(ALL);
    let version = pair.shared.change(|s| s.filter.promiscuous = false);
    assert!(pair.shared.wait(version));
    pair.post(1, 2048);
    socket
        .send(&packet_to(MacAddress::new([2, 9, 9, 9, 9, 9]), 300))
        .unwrap();
    let own = packet(60);
    socket.send(&own).unwrap();
    assert_eq!(pair.receive(), with_buffers(own, 1));
    assert_eq!(pair.worker.counters.rx_filtered.get(), 1);
}

#[test]
fn nothing_passes_a_link_that_is_down() {
    let (socket, mut pair) = pair(ALL);
    pair.post(1, 2048);
    let set_link = |pair: &Pair, up| {
        let version = pair.shared.change(|s| s.filter.link_up = up);
        assert!(pair.shared.wait(version));
    };
    set_link(&pair, false);
    socket.send(&packet(300)).unwrap();
    let lost = pair.guest.filled(&packet(70));
    pair.tx.send(&[lost]);
    assert_eq!(pair.tx.used(), (vec![lost], 0));
    assert!(pair.rx.stays_unused());
    set_link(&pair, true);
    let (sent, own) = (packet(80), packet(60));
    let whole = pair.guest.filled(&sent);
    pair.tx.send(&[whole]);
    assert_eq!(receive(&socket), sent);
    // What came meanwhile does not arrive late.
    socket.send(&own).unwrap();
    assert_eq!(pair.receive(), with_buffers(own, 1));
}

#[test]
fn interrupts_are_held_back_and_none_is_lost() {
    const COAL: u64 = ALL | bit(VIRTIO_NET_F_NOTF_COAL);
    /// Of 40 packets in each direction, one every two milliseconds, and how many interrupts they take.
    fn interrupts(coalescing: Coalescing) -> [u64; 2] {
        let (socket, mut pair) = pair(COAL);
        let version = pair.shared.change(|s| s.coalescing.fill(coalescing));
        assert!(pair.shared.wait(version));
        pair.post(40, 256);
        let mut each = [0; 2];
        for (direction, interrupts) in each.iter_mut().enumerate() {
            let before = pair.worker.counters.interrupts.get();
            let moved = |pair: &Pair| {
                let counters = &pair.worker.counters;
                [&counters.rx_packets, &counters.tx_packets][direction].get()
            };
            let moved_before = moved(&pair);
            for _ in 0..40 {
                let sent = packet(60);
                if direction == 0 {
                    socket.send(&sent).unwrap();
                } else {
                    let whole = pair.guest.filled(&sent);
                    pair.tx.send(&[whole]);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            // A driver that looks before all is there asks for another interrupt.
            eventually(|| moved(&pair) - moved_before == 40);
            // `used` fails if it sleeps and no interrupt comes.
            for _ in 0..40 {
                if direction == 0 {
                    pair.receive();
                } else {
                    pair.tx.used();
                }
            }
            *interrupts = pair.worker.counters.interrupts.get() - before;
        }
        each
    }
    let limits = |max_packets, max_usecs| Coalescing {
        max_packets,
        max_usecs,
    };
    // The driver asks once and then looks: without limits that is one interrupt at the first packet.
    assert_eq!(interrupts(limits(0, 0)), [1, 1]);
    // With a limit of packets it comes before the timer, which would take ten seconds.
    assert_eq!(interrupts(limits(40, 10_000_000)), [1, 1]);
    // With a timer, a driver that has looked for itself is interrupted for nothing, and no more.
    assert_eq!(interrupts(limits(1000, 20_000)), [1, 1]);
    // Of no packets it is as one of one, whatever the timer (VIRTIO 1.3, 5.1.6.5.9).
    assert_eq!(interrupts(limits(0, 10_000_000)), [1, 1]);
}

#[test]
fn a_held_interrupt_comes_when_the_ring_stops_or_the_limits_go() {
    let (socket, mut pair) = pair(ALL | bit(VIRTIO_NET_F_VQ_NOTF_COAL));
    let set = |pair: &Pair, max_usecs| {
        let version = pair.shared.change(|s| {
            s.coalescing[0] = Coalescing {
                max_packets: 1000,
                max_usecs,
            };
        });
        assert!(pair.shared.wait(version));
    };
    let interrupts = |pair: &Pair| pair.worker.counters.interrupts.get();
    let never = 4_000_000_000;
    set(&pair, never);
    pair.post(2, 256);
    socket.send(&packet(60)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(interrupts(&pair), 0);
    set(&pair, 0);
    pair.receive();
    assert_eq!(interrupts(&pair), 1);
    set(&pair, never);
    pair.rx.want();
    socket.send(&packet(60)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(interrupts(&pair), 1);
    pair.worker.give_back(0);
    assert_eq!(interrupts(&pair), 2);
    pair.receive();
}

#[test]
fn offloads_the_driver_did_not_accept_do_not_reach_it() {
    let (socket, mut pair) = pair(MERGEABLE);
    pair.post(1, 2048);
    let mut segment = packet(60);
    segment[1] = 1;
    socket.send(&segment).unwrap();
    let mut unfinished = packet(60);
    unfinished[0] = 1;
    socket.send(&unfinished).unwrap();
    let mut valid = packet(60);
    valid[0] = 2;
    socket.send(&valid).unwrap();
    valid[0] = 0;
    assert_eq!(pair.receive(), with_buffers(valid, 1));
    assert_eq!(pair.worker.counters.rx_dropped.get(), 2);
}

#[test]
fn a_driver_gets_nothing_that_is_longer_than_its_mtu() {
    for mergeable in [ALL, BASE | GUEST_OFFLOADS] {
        let (socket, mut pair) = pair(mergeable | bit(VIRTIO_NET_F_MTU));
        pair.post(4, 4096);
        let tagged = |len| {
            let mut packet = packet(len);
            packet[HEADER + 12..HEADER + 14].copy_from_slice(&[0x81, 0]);
            packet
        };
        let mut to_be_cut = packet(3000);
        to_be_cut[..2].copy_from_slice(&[1, 1]);
        socket.send(&packet(1515)).unwrap();
        socket.send(&tagged(1523)).unwrap();
        for longest in [packet(1514), tagged(1522), to_be_cut] {
            socket.send(&longest).unwrap();
            assert_eq!(pair.receive(), with_buffers(longest, 1));
        }
        assert_eq!(pair.worker.counters.rx_dropped.get(), 2);
    }
    // A driver that knows of none.
    let (socket, mut pair) = pair(ALL);
    pair.post(1, 4096);
    socket.send(&packet(1515)).unwrap();
    assert_eq!(pair.receive(), with_buffers(packet(1515), 1));
}

#[test]
fn disabled_queues_drop_what_is_sent_and_take_no_buffer() {
    let (socket, tap) = socket();
    let mut guest = Guest::new();
    let (mut rx, mut tx) = (guest.queue(16), guest.queue(16));
    let shared = shared(1);
    let worker = Worker::start(0, tap, &shared);
    worker.own(rx.vring(0, ALL, false));
    worker.own(tx.vring(1, ALL, false));
    rx.post(guest.buffer(2048));
    socket.send(&packet(60)).unwrap();
    let whole = guest.filled(&packet(60));
    tx.send(&[whole]);
    assert_eq!(tx.used(), (vec![whole], 0));
    assert!(rx.stays_unused());
    assert_eq!(worker.counters.tx_calls.get(), 0);
    assert_eq!(worker.counters.rx_calls.get(), 0);

    let mut vring = worker.give_back(0);
    assert_eq!(vring.ring.next_avail(), 0);
    vring.enabled = true;
    worker.own(vring);
    assert_eq!(rx.used().1, HEADER as u32 + 60);
}

#[test]
fn a_ring_is_given_back_with_its_buffers() {
    let (packed, in_order) = (bit(VIRTIO_F_RING_PACKED), bit(VIRTIO_F_IN_ORDER));
    for (queues, next) in [(0, 1), (packed, 0x8001), (packed | in_order, 0x8001)] {
        let (socket, mut pair) = pair(ALL | queues);
        pair.post(20, 2048);
        socket.send(&packet(60)).unwrap();
        pair.receive();
        let vring = pair.worker.give_back(0);
        assert_eq!(vring.ring.next_avail(), next);
        assert_eq!(vring.ring.next_used(), next);
        assert_eq!(vring.ring.in_flight(), 0);
        socket.send(&packet(61)).unwrap();
        pair.worker.own(vring);
        assert_eq!(pair.receive(), with_buffers(packet(61), 1));
        pair.worker.give_back(1);
    }
}

/// Buffers that are returned before their turn, because no packet can use them, wait for those before them.
#[test]
fn buffers_in_order_come_back_one_way_or_the_other() {
    for queues in [0, bit(VIRTIO_F_RING_PACKED)] {
        let (socket, mut pair) = pair(ALL | queues | bit(VIRTIO_F_IN_ORDER));
        let outside = Segment::new(GuestAddress(1 << 40), 64);
        pair.post(1, 100);
        pair.rx.post(outside);
        pair.post(1, 100);
        // The worker looks at buffers when there is a packet, be it one that is too short.
        socket.send(&[0; 4]).unwrap();
        assert!(pair.rx.stays_unused());
        // It fits no buffer alone, and shows where the others went.
        let sent = packet(180);
        socket.send(&sent).unwrap();
        let (first, len) = pair.rx.used();
        assert_eq!(len, 100);
        let mut received = pair.guest.read(first[0], len);
        assert_eq!(pair.rx.used(), (vec![outside], 0));
        let (last, len) = pair.rx.used();
        received.extend(pair.guest.read(last[0], len));
        assert_eq!(received, with_buffers(sent, 2));
        let vring = pair.worker.give_back(0);
        assert_eq!(vring.ring.in_flight(), 0);
    }
}

#[test]
fn hostile_chains_are_returned_and_the_queue_goes_on() {
    let (socket, mut pair) = pair(ALL);
    let outside = Segment::new(GuestAddress(1 << 40), 64);
    let writable = pair.guest.buffer(64);
    let short = pair.guest.filled(&[0; 20]);
    let huge = pair.guest.buffer(HEADER as u32 + 65598);
    for (readable, writable) in [
        (&[outside][..], &[][..]),
        (&[], &[writable]),
        (&[short], &[]),
        (&[huge], &[]),
    ] {
        pair.tx.add(&[(readable, writable)]);
        assert_eq!(pair.tx.used().1, 0);
    }
    assert_eq!(pair.worker.counters.tx_dropped.get(), 4);
    assert_eq!(pair.worker.counters.tx_calls.get(), 0);
    let good = pair.guest.filled(&packet(60));
    pair.tx.send(&[good]);
    assert_eq!(receive(&socket), packet(60));

    pair.rx.add(&[(&[short], &[])]);
    assert_eq!(pair.rx.used(), (vec![short], 0));
    pair.rx.post(outside);
    assert_eq!(pair.rx.used(), (vec![outside], 0));
    // Malformed between good ones, then stopped: all come back one way or the other.
    pair.post(1, 100);
    pair.rx.post(outside);
    pair.post(1, 100);
    // The worker looks at buffers when there is a packet, be it one that is too short.
    socket.send(&[0; 4]).unwrap();
    assert_eq!(pair.rx.used(), (vec![outside], 0));
    let vring = pair.worker.give_back(0);
    assert_eq!(vring.ring.in_flight(), 0);
    let waiting = pair.rx.outstanding() - u16::from(pair.rx.try_used().is_some());
    assert_eq!(vring.ring.next_avail() + waiting, 5);
}

#[test]
fn a_broken_ring_is_reported_and_the_other_goes_on() {
    let (socket, mut pair) = pair(ALL);
    pair.tx.corrupt_avail_index();
    assert!(pair.tx.wait_for_error());
    pair.post(1, 2048);
    socket.send(&packet(60)).unwrap();
    assert_eq!(pair.receive(), with_buffers(packet(60), 1));
    pair.worker.give_back(1);
}

#[test]
fn what_was_done_before_a_ring_broke_is_returned() {
    let (socket, mut pair) = pair(ALL);
    let segment = pair.guest.filled(&packet(60));
    pair.tx.send_and_break(&[segment]);
    assert!(pair.tx.wait_for_error());
    assert_eq!(receive(&socket), packet(60));
    assert_eq!(pair.tx.used(), (vec![segment], 0));
}

/// A thread that obeys the commands for a card of two pairs, and the way to it.
fn obeys(interface: Arc<dyn Interface>, shared: &Arc<Shared>) -> (CommandSender, JoinHandle<()>) {
    let (sender, commands) = command_channel().unwrap();
    let worker = ControlWorker::new(interface, Arc::clone(shared), 2, commands).unwrap();
    (sender, std::thread::spawn(move || worker.run()))
}

/// Steers nothing.
#[derive(Debug)]
struct Unsteered;

impl Interface for Unsteered {}

#[test]
fn a_table_of_queues_that_is_refused_changes_nothing() {
    let shared = shared(2);
    let (_a, tap0) = socket();
    let (_b, tap1) = socket();
    let _pairs = [
        Worker::start(0, tap0, &shared),
        Worker::start(1, tap1, &shared),
    ];
    let (sender, thread) = obeys(Arc::new(Unsteered), &shared);
    let mut guest = Guest::new();
    let mut queue = guest.queue(16);
    let features = CONTROL | bit(VIRTIO_NET_F_RSS);
    sender
        .send(Command::Start(queue.vring(4, features, true)))
        .unwrap();
    // Of all that is hashed nothing, a table with the second pair alone, and no key.
    let rss = [4, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0];
    assert_eq!(command(&mut guest, &mut queue, &rss), 1);
    assert_eq!(shared.get().pairs, Pairs::First(1));
    assert!(shared.get().rss.is_none());
    sender.send(Command::Exit).unwrap();
    thread.join().unwrap();
}

/// Remembers what it was asked for.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<(&'static str, u32)>>);

impl Interface for Recorder {
    fn set_header_len(&self, len: u8) -> Result<(), LinkError> {
        self.0.lock().unwrap().push(("header", len.into()));
        Ok(())
    }

    fn set_offloads(&self, offloads: u32) -> Result<(), LinkError> {
        self.0.lock().unwrap().push(("offloads", offloads));
        Ok(())
    }
}

const CONTROL: u64 = ALL
    | bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_CTRL_RX)
    | bit(VIRTIO_NET_F_CTRL_VLAN)
    | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
    | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    | bit(VIRTIO_NET_F_GUEST_ANNOUNCE)
    | bit(VIRTIO_NET_F_NOTF_COAL)
    | bit(VIRTIO_NET_F_VQ_NOTF_COAL)
    | bit(VIRTIO_NET_F_MQ);

fn command(guest: &mut Guest, queue: &mut Queue, bytes: &[u8]) -> u8 {
    let readable = guest.filled(bytes);
    let ack = guest.filled(&[0xaa]);
    queue.add(&[(&[readable], &[ack])]);
    assert_eq!(queue.used(), (vec![readable, ack], 1));
    guest.read(ack, 1)[0]
}

#[test]
fn the_control_queue_sets_what_workers_go_by() {
    let recorder = Arc::new(Recorder::default());
    let shared = shared(2);
    let (_a, tap0) = socket();
    let (_b, tap1) = socket();
    let _pairs = [
        Worker::start(0, tap0, &shared),
        Worker::start(1, tap1, &shared),
    ];
    let interface = Arc::clone(&recorder) as Arc<dyn Interface>;
    let (sender, thread) = obeys(interface, &shared);
    let mut guest = Guest::new();
    let mut queue = guest.queue(16);
    assert_eq!(shared.get().pairs, Pairs::Enabled);
    sender
        .send(Command::Start(queue.vring(4, CONTROL, true)))
        .unwrap();

    let mut run = |bytes: &[u8]| command(&mut guest, &mut queue, bytes);
    let state = |shared: &Shared| shared.get();
    assert_eq!(run(&[0, 0, 0]), 0);
    assert!(!state(&shared).filter.promiscuous);
    assert_eq!(state(&shared).pairs, Pairs::First(1));
    assert_eq!(run(&[4, 0, 2, 0]), 0);
    assert_eq!(state(&shared).pairs, Pairs::First(2));
    assert_eq!(run(&[4, 0, 3, 0]), 1);
    assert_eq!(run(&[1, 1, 2, 7, 7, 7, 7, 7]), 0);
    assert_eq!(
        state(&shared).filter.mac,
        MacAddress::new([2, 7, 7, 7, 7, 7])
    );
    assert_eq!(run(&[2, 0, 5, 0]), 0);
    assert_eq!(run(&[9, 9]), 1);
    assert_eq!(run(&[0]), 1);
    assert_eq!(run(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(
        *recorder.0.lock().unwrap(),
        [("offloads", libc::TUN_F_CSUM)]
    );
    shared.change(|settings| settings.announce = true);
    assert_eq!(run(&[3, 0]), 0);
    assert!(!state(&shared).announce);
    // All receive queues, one queue, and what a queue has then.
    assert_eq!(run(&[6, 1, 16, 0, 0, 0, 50, 0, 0, 0]), 0);
    assert_eq!(run(&[6, 2, 3, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0, 0]), 0);
    let of = |queue| {
        let Coalescing {
            max_packets,
            max_usecs,
        } = shared.get().coalescing_of(queue);
        (max_packets, max_usecs)
    };
    assert_eq!([0, 1, 2, 3].map(of), [(16, 50), (0, 0), (16, 50), (8, 256)]);
    let get = guest.filled(&[6, 3, 3, 0, 0, 0]);
    let answer = guest.filled(&[0xaa; 9]);
    queue.add(&[(&[get], &[answer])]);
    assert_eq!(queue.used(), (vec![get, answer], 9));
    assert_eq!(guest.read(answer, 9), [0, 8, 0, 0, 0, 0, 1, 0, 0]);
    // No room for the result, no such queue.
    let mut run = |bytes: &[u8]| command(&mut guest, &mut queue, bytes);
    assert_eq!(run(&[6, 3, 3, 0, 0, 0]), 1);
    assert_eq!(run(&[6, 3, 4, 0, 0, 0]), 1);
    // Queues that are disabled, and enabled again, have what was said of all (VIRTIO 1.3, 5.1.6.5.9).
    assert_eq!(run(&[6, 0, 4, 0, 0, 0, 9, 0, 0, 0]), 0);
    assert_eq!(run(&[6, 2, 3, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0, 0]), 0);
    assert_eq!(run(&[6, 2, 1, 0, 0, 0, 7, 0, 0, 0, 0, 1, 0, 0]), 0);
    assert_eq!(run(&[6, 2, 2, 0, 0, 0, 6, 0, 0, 0, 0, 1, 0, 0]), 0);
    assert_eq!(run(&[4, 0, 1, 0]), 0);
    assert_eq!([0, 1, 2, 3].map(of), [(16, 50), (7, 256), (16, 50), (4, 9)]);
    for disabled in [2, 3] {
        let set = [6, 2, disabled, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0, 0];
        assert_eq!(command(&mut guest, &mut queue, &set), 1);
        let get = guest.filled(&[6, 3, disabled, 0, 0, 0]);
        let answer = guest.filled(&[0xaa; 9]);
        queue.add(&[(&[get], &[answer])]);
        assert_eq!(queue.used(), (vec![get, answer], 1));
        assert_eq!(guest.read(answer, 1), [1]);
    }
    assert_eq!(command(&mut guest, &mut queue, &[4, 0, 2, 0]), 0);
    assert_eq!([2, 3].map(of), [(16, 50), (4, 9)]);
    // No room for the answer.
    let lonely = guest.filled(&[0, 0, 1]);
    queue.add(&[(&[lonely], &[])]);
    assert_eq!(queue.used(), (vec![lonely], 0));

    // A ring that is stopped for a moment keeps what was set.
    let vring = give_back(&sender, 4);
    sender.send(Command::Start(vring)).unwrap();
    assert_eq!(command(&mut guest, &mut queue, &[2, 1, 5, 0]), 0);
    assert_eq!(shared.get().pairs, Pairs::First(2));
    // A queue that was served elsewhere before tells nothing of what was said there.
    let vring = give_back(&sender, 4);
    shared.change(|settings| settings.pairs = Pairs::Enabled);
    sender.send(Command::Start(vring)).unwrap();
    assert_eq!(command(&mut guest, &mut queue, &[2, 1, 5, 0]), 0);
    assert_eq!(shared.get().pairs, Pairs::Fed);
    sender.send(Command::Exit).unwrap();
    thread.join().unwrap();
}

#[test]
fn the_device_maps_queues_and_follows_features() {
    let recorder = Arc::new(Recorder::default());
    let config = NetConfig {
        mac: MAC,
        pairs: 2,
        mtu: None,
        speed: None,
        hash_types: 0,
    };
    let interface = Arc::clone(&recorder) as Arc<dyn Interface>;
    let (_a, tap0) = socket();
    let (_b, tap1) = socket();
    let queues = [tap0, tap1].map(AnyLink::Tap).into();
    let mut net = Net::new(config, CONTROL, "recorder", interface, queues).unwrap();
    assert_eq!((net.queue_count(), net.worker_count()), (5, 3));
    assert_eq!([0, 1, 2, 3, 4].map(|q| net.worker_of(q)), [0, 0, 1, 1, 2]);
    net.set_features(CONTROL & !bit(VIRTIO_NET_F_MQ));
    assert_eq!([0, 1, 2, 3, 4].map(|q| net.worker_of(q)), [0, 0, 2, 1, 1]);
    // Announcements are asked of a driver that can answer, on its first transmit queue.
    assert!(!net.resumed(1));
    net.set_features(CONTROL | bit(VIRTIO_NET_F_STATUS));
    assert!(!net.resumed(0) && !net.resumed(3));
    assert_eq!(net.read_config(6, 2).unwrap(), [1, 0]);
    assert!(net.resumed(1));
    assert_eq!(net.read_config(6, 2).unwrap(), [3, 0]);
    recorder.0.lock().unwrap().truncate(2);
    net.set_features(0);
    assert_eq!(net.read_config(6, 2).unwrap(), [1, 0]);
    let asked = std::mem::take(&mut *recorder.0.lock().unwrap());
    assert_eq!(
        asked,
        [
            ("header", 12),
            ("offloads", 0x7f),
            ("header", 10),
            ("offloads", 0)
        ]
    );
    assert_eq!(net.read_config(0, 6).unwrap(), MAC.octets());
    assert!(net.write_config(0, &[0; 6]).is_err());
}
