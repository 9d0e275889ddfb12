//! Who gets which frame, and in which form.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;

/// Guests 1, 2, … at a switch, each with buffers.
fn guests<const N: usize>(options: [&str; N], features: u64) -> (Switch, [Port; N]) {
    guests_of(switch(&[]), options, features)
}

/// The same at this switch.
fn guests_of<const N: usize>(
    switch: Switch,
    options: [&str; N],
    features: u64,
) -> (Switch, [Port; N]) {
    let mut switch = switch;
    let mut number = 0;
    let ports = options.map(|options| {
        number += 1;
        let mut port = Port::add(&mut switch, number, options, features);
        port.post(64, 2048);
        port.settle();
        port
    });
    (switch, ports)
}

#[test]
fn a_card_is_known_and_other_addresses_are_learnt() {
    for features in [ALL, ALL | PACKED] {
        let (_switch, [mut a, mut b, mut c]) = guests(["", "", ""], features);
        let known = plain(mac(2), mac(1), 100);
        a.send(&known);
        assert_eq!(b.receive(), with_buffers(known, 1));
        assert!(c.got_nothing(), "a card's address was flooded");

        let elsewhere = [2, 9, 9, 9, 9, 9];
        let unknown = plain(elsewhere, mac(1), 60);
        a.send(&unknown);
        assert_eq!(b.receive(), with_buffers(unknown.clone(), 1));
        assert_eq!(c.receive(), with_buffers(unknown.clone(), 1));
        assert!(a.got_nothing(), "a frame came back");
        // Somebody behind c speaks.
        let hello = plain(BROADCAST, elsewhere, 46);
        c.send(&hello);
        assert_eq!(a.receive(), with_buffers(hello.clone(), 1));
        assert_eq!(b.receive(), with_buffers(hello, 1));
        a.send(&unknown);
        assert_eq!(c.receive(), with_buffers(unknown, 1));
        assert!(b.got_nothing(), "a learnt address was flooded");
        assert_eq!(a.shared().counters.tx_flooded.get(), 1);
    }
}

#[test]
fn an_address_that_nobody_hears_of_is_forgotten() {
    let switch = switch(&["--ageing", "1"]);
    let (switch, [mut a, mut b, mut c]) = guests_of(switch, ["", "", ""], ALL);
    let stranger = [2, 9, 9, 9, 9, 9];
    let to_stranger = plain(stranger, mac(1), 60);
    let knows = |switch: &Switch| {
        let table = switch.addresses().unwrap();
        let rows = table["addresses"].as_array().unwrap();
        rows.iter().any(|row| row["address"] == "02:09:09:09:09:09")
    };
    // Twice: what has been forgotten is learnt again.
    for round in 0..2 {
        let hello = plain(BROADCAST, stranger, 46);
        c.send(&hello);
        assert_eq!(a.receive(), with_buffers(hello.clone(), 1));
        assert_eq!(b.receive(), with_buffers(hello, 1));
        a.send(&to_stranger);
        assert_eq!(c.receive(), with_buffers(to_stranger.clone(), 1));
        assert!(b.got_nothing() && knows(&switch));
        // It is known in the second after that in which it was heard of.
        std::thread::sleep(Duration::from_millis(2100));
        assert!(!knows(&switch));
        a.send(&to_stranger);
        assert_eq!(b.receive(), with_buffers(to_stranger.clone(), 1));
        assert_eq!(c.receive(), with_buffers(to_stranger.clone(), 1));
        assert_eq!(a.shared().counters.tx_flooded.get(), round + 1);
    }
}

/// Where the frame before went tells nothing of one behind that changes it.
#[test]
fn frames_in_a_row_each_go_where_they_belong() {
    let (_switch, [mut a, mut b, mut c]) = guests(["", "", ""], ALL);
    let stranger = [2, 9, 9, 9, 9, 9];
    c.send(&plain(BROADCAST, stranger, 46));
    a.receive();
    b.receive();
    let to_stranger = plain(stranger, mac(1), 60);
    let to_b = plain(mac(2), mac(1), 60);
    let unknown = plain([2, 8, 8, 8, 8, 8], mac(1), 60);
    // In the last but one it says that the stranger is behind it.
    let moved = plain(mac(2), stranger, 60);
    let row = [
        &to_stranger,
        &to_stranger,
        &to_b,
        &to_stranger,
        &unknown,
        &unknown,
        &to_b,
        &to_b,
        &moved,
        &to_stranger,
    ];
    a.send_all(&row);
    for expected in [&to_b, &unknown, &unknown, &to_b, &to_b, &moved] {
        assert_eq!(b.receive(), with_buffers(expected.clone(), 1));
    }
    for expected in [&to_stranger, &to_stranger, &to_stranger, &unknown, &unknown] {
        assert_eq!(c.receive(), with_buffers(expected.clone(), 1));
    }
    assert!(a.got_nothing() && b.got_nothing() && c.got_nothing());
    let counters = &a.shared().counters;
    assert_eq!(counters.tx_packets.get(), 10);
    assert_eq!(counters.tx_flooded.get(), 2);
    assert_eq!(counters.tx_undelivered.get(), 1);
}

#[test]
fn the_table_can_be_looked_at() {
    let (switch, [mut a, mut b]) = guests(["", ",name=second"], ALL);
    a.send(&plain(mac(2), mac(1), 60));
    b.receive();
    b.send(&plain(mac(1), mac(2), 60));
    let table = switch.addresses().unwrap();
    let rows = table["addresses"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "{table}");
    let second = rows.iter().find(|row| row["port"] == "second").unwrap();
    assert_eq!(second["address"], "02:00:00:00:00:02");
    assert_eq!(second["vlan"], 1);
}

#[test]
fn vlans_keep_apart_and_trunks_carry_tags() {
    let options = [
        ",vlan=7",
        ",vlan=7",
        ",vlan=8",
        ",trunk=7-8",
        ",trunk=7,native=8",
    ];
    let (_switch, [mut a, mut b, mut c, mut trunk, mut mixed]) = guests(options, ALL);
    let hello = plain(BROADCAST, mac(1), 60);
    let tagged = |tag, bytes: &[u8]| packet(BROADCAST, mac(1), Some(tag), &bytes[HEADER + 12..]);
    a.send(&hello);
    assert_eq!(b.receive(), with_buffers(hello.clone(), 1));
    assert_eq!(trunk.receive(), with_buffers(tagged(7, &hello), 1));
    assert_eq!(mixed.receive(), with_buffers(tagged(7, &hello), 1));
    assert!(c.got_nothing());

    // The trunk's frames go to where their tags say, without them.
    let mut out = plain(BROADCAST, mac(4), 60);
    let payload = out.split_off(HEADER + 12);
    trunk.send(&packet(BROADCAST, mac(4), Some(8), &payload));
    let untagged = with_buffers(packet(BROADCAST, mac(4), None, &payload), 1);
    assert_eq!(c.receive(), untagged);
    assert_eq!(mixed.receive(), untagged);
    assert!(a.got_nothing() && b.got_nothing());

    // Nobody gets into a VLAN by a tag of his own, nor by two.
    for forged in [
        packet(BROADCAST, mac(1), Some(8), &payload),
        packet(BROADCAST, mac(1), Some(7), &payload),
    ] {
        a.send(&forged);
    }
    assert_eq!(a.shared().counters.tx_wrong_vlan.get(), 2);
    let inner = [&[0x81, 0, 0, 8][..], &payload].concat();
    a.send(&packet(BROADCAST, mac(1), Some(0), &inner));
    assert_eq!(
        trunk.receive(),
        with_buffers(packet(BROADCAST, mac(1), Some(7), &inner), 1)
    );
    mixed.receive();
    assert!(b.got_nothing() && c.got_nothing(), "an inner tag came out");
}

#[test]
fn isolated_ports_speak_with_others_only() {
    let isolated = ",isolated=on";
    let (_switch, [mut a, mut b, mut server]) = guests([isolated, isolated, ""], ALL);
    let hello = plain(BROADCAST, mac(1), 60);
    a.send(&hello);
    assert_eq!(server.receive(), with_buffers(hello, 1));
    a.send(&plain(mac(2), mac(1), 60));
    assert!(b.got_nothing());
    assert_eq!(a.shared().counters.tx_undelivered.get(), 1);
    let answer = plain(mac(1), mac(3), 60);
    server.send(&answer);
    assert_eq!(a.receive(), with_buffers(answer, 1));
}

#[test]
fn nobody_sends_from_the_address_of_another_card() {
    let (_switch, [mut a, mut b, mut c]) = guests(["", "", ""], ALL);
    a.send(&plain(mac(3), mac(2), 60));
    assert!(c.got_nothing());
    assert_eq!(a.shared().counters.tx_forged.get(), 1);
    let to_b = plain(mac(2), mac(3), 60);
    c.send(&to_b);
    assert_eq!(b.receive(), with_buffers(to_b, 1));
    // A group is nobody's address.
    a.send(&plain(mac(3), [3, 0, 0, 0, 0, 1], 60));
    assert!(c.got_nothing());
}

/// An ARP reply of `sender` with address `ip`.
fn arp(from: [u8; 6], sender: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let body = [
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2][..],
        &sender,
        &ip,
        &[0; 6],
        &[10, 0, 0, 99],
    ]
    .concat();
    packet(BROADCAST, from, None, &body)
}

fn ipv4(from: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut body = vec![8, 0, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0];
    body.extend(ip);
    body.extend([10, 0, 0, 99]);
    packet(BROADCAST, from, None, &body)
}

/// A neighbour advertisement, behind an options header.
fn advertisement(from: [u8; 6], source: [u8; 16], target: [u8; 16]) -> Vec<u8> {
    let mut body = vec![0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 60, 255];
    body.extend(source);
    body.extend([0xff; 16]);
    body.extend([58, 0, 1, 4, 0, 0, 0, 0]);
    body.extend([136, 0, 0, 0, 0x20, 0, 0, 0]);
    body.extend(target);
    packet(BROADCAST, from, None, &body)
}

#[test]
fn addresses_that_are_not_the_ports_do_not_pass() {
    let own = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let other = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    let filter = ",mac-filter=02:00:00:00:00:01,ip-filter=10.0.0.1+fd00::1";
    let (_switch, [mut a, mut b]) = guests([filter, ""], ALL);
    let me = mac(1);
    for good in [
        arp(me, me, [10, 0, 0, 1]),
        arp(me, me, [0; 4]),
        ipv4(me, [10, 0, 0, 1]),
        ipv4(me, [0; 4]),
        advertisement(me, own, own),
    ] {
        a.send(&good);
        assert_eq!(b.receive(), with_buffers(good, 1));
    }
    let forged = [
        arp(me, me, [10, 0, 0, 2]),
        arp(me, [2, 0, 0, 0, 0, 9], [10, 0, 0, 1]),
        arp([2, 0, 0, 0, 0, 9], me, [10, 0, 0, 1]),
        ipv4(me, [10, 0, 0, 2]),
        ipv4([2, 0, 0, 0, 0, 9], [10, 0, 0, 1]),
        advertisement(me, own, other),
        advertisement(me, other, own),
        plain(BROADCAST, me, 60),
        arp(me, me, [10, 0, 0, 1])[..40].to_vec(),
    ];
    for (number, forged) in forged.iter().enumerate() {
        a.send(forged);
        let counted = a.shared().counters.tx_forged.get();
        assert_eq!(counted, number as u64 + 1, "number {number} passed");
    }
    assert!(b.got_nothing());
}

#[test]
fn a_guest_without_buffers_holds_up_nobody() {
    let (mut switch, [mut a, mut b]) = guests(["", ""], ALL);
    let stuck = Port::add(&mut switch, 3, "", ALL);
    stuck.settle();
    for _ in 0..30 {
        let frame = plain(BROADCAST, mac(1), 60);
        a.send(&frame);
        assert_eq!(b.receive(), with_buffers(frame, 1));
        a.send(&plain(mac(3), mac(1), 60));
    }
    assert_eq!(stuck.shared().counters.rx_starved.get(), 60);
}

/// A packet of the longest kind: a segment of TCP.
fn segment(to: [u8; 6], from: [u8; 6], payload: usize) -> Vec<u8> {
    let total = (20 + 20 + payload) as u16;
    let mut body = vec![8, 0, 0x45, 0];
    body.extend(total.to_be_bytes());
    body.extend([0, 7, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    // Ports, sequence, acknowledgement; then ACK, PSH and CWR.
    body.extend([
        0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0x50, 0x98,
    ]);
    body.extend([1, 0, 0, 0, 0, 0]);
    // The sum of the pseudo header.
    let pseudo: u32 = 0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 6 + (20 + payload as u32);
    let pseudo = ((pseudo & 0xffff) + (pseudo >> 16)) as u16;
    let at = body.len() - 4;
    body[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
    body.extend((0..payload).map(|i| (i % 253) as u8));
    let mut packet = packet(to, from, None, &body);
    packet[..10].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    packet
}

#[test]
fn segments_pass_whole_in_any_pieces() {
    for features in [ALL, ALL | PACKED] {
        let (_switch, [mut a, mut b]) = guests(["", ""], features);
        let long = segment(mac(2), mac(1), 65_000);
        let mut pieces = vec![a.guest.filled(&long[..12]), a.guest.filled(&long[12..70])];
        pieces.extend(long[70..].chunks(4096).map(|part| a.guest.filled(part)));
        a.send_pieces(&pieces);
        assert!(b.receive() == with_buffers(long, 32), "another packet");
        assert_eq!(b.shared().counters.rx_softened.get(), 0);
    }
}

/// The ones' complement sum over a TCP segment and its pseudo header: all ones if the checksum is right.
fn tcp_sum(frame: &[u8]) -> u32 {
    let tcp = &frame[34..];
    let mut total = u32::from(frame[23]) + tcp.len() as u32;
    for part in [&frame[26..34], tcp] {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            total += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total
}

#[test]
fn what_a_receiver_does_not_take_is_finished_for_it() {
    let mut switch = switch(&[]);
    let mut a = Port::add(&mut switch, 1, "", ALL);
    let mut b = Port::add(&mut switch, 2, "", BASE);
    b.post(64, 2048);
    b.settle();
    let long = segment(mac(2), mac(1), 5000);
    a.send(&long);
    let mut payload = Vec::<u8>::new();
    let frames: Vec<Vec<u8>> = (0..4).map(|_| b.receive()).collect();
    for (number, packet) in frames.iter().enumerate() {
        assert_eq!(packet[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        let frame = &packet[HEADER..];
        assert!(frame.len() <= 14 + 20 + 20 + 1460);
        assert_eq!(tcp_sum(frame), 0xffff, "segment {number}");
        assert_eq!(frame[16..18], ((frame.len() - 14) as u16).to_be_bytes());
        assert_eq!(frame[18..20], (7 + number as u16).to_be_bytes());
        let sequence = 0xffff_ff00_u32.wrapping_add(1460 * number as u32);
        assert_eq!(frame[38..42], sequence.to_be_bytes());
        let flags = [0x90, 0x10, 0x10, 0x18][number];
        assert_eq!(frame[47], flags, "segment {number}");
        payload.extend(&frame[54..]);
    }
    assert!(payload == long[HEADER + 54..], "another payload");

    let mut short = segment(mac(2), mac(1), 100);
    short[1..6].fill(0);
    a.send(&short);
    let received = b.receive();
    assert_eq!(received[..10], [0; 10]);
    assert_eq!(tcp_sum(&received[HEADER..]), 0xffff);
    assert_eq!(received[HEADER + 54..], short[HEADER + 54..]);
    assert_eq!(b.shared().counters.rx_softened.get(), 2);
    // Fragments are not made, nor are segments of a byte each, nor such with long headers that are said to be theirs.
    for (gso, size, start) in [(3, 1000_u16, 34_u16), (1, 1, 34), (1, 1000, 1000)] {
        let mut other = segment(mac(2), mac(1), 5000);
        other[1] = gso;
        other[4..6].copy_from_slice(&size.to_le_bytes());
        other[6..8].copy_from_slice(&start.to_le_bytes());
        // Where TCP says how long its header is.
        other[HEADER + usize::from(start) + 12] = 0x50;
        a.send(&other);
    }
    assert!(b.got_nothing());
    assert_eq!(b.shared().counters.rx_dropped.get(), 3);
}

#[test]
fn many_short_segments_are_cut_for_a_receiver() {
    let mut switch = switch(&[]);
    let mut a = Port::add(&mut switch, 1, "", ALL);
    let mut b = Port::add(&mut switch, 2, "", BASE);
    b.post(217, 512);
    b.settle();
    let mut long = segment(mac(2), mac(1), 65_000);
    long[4..6].copy_from_slice(&300_u16.to_le_bytes());
    a.send(&long);
    let mut payload = Vec::new();
    for number in 0..217 {
        let received = b.receive();
        assert_eq!(tcp_sum(&received[HEADER..]), 0xffff, "segment {number}");
        payload.extend_from_slice(&received[HEADER + 54..]);
    }
    assert!(payload == long[HEADER + 54..], "another payload");
    assert_eq!(b.shared().counters.rx_dropped.get(), 0);
}

#[test]
fn a_driver_gets_nothing_that_is_longer_than_its_mtu() {
    let mut switch = switch(&[]);
    let features = ALL | bit(VIRTIO_NET_F_MTU);
    let mut a = Port::add(&mut switch, 1, ",mtu=9000,trunk=7,native=1", features);
    let mut b = Port::add(&mut switch, 2, ",mtu=1500,trunk=7,native=1", features);
    let mut unaware = Port::add(&mut switch, 3, ",mtu=1500", ALL);
    let finishes = BASE | bit(VIRTIO_NET_F_MTU);
    let mut plain_only = Port::add(&mut switch, 4, ",mtu=1500", finishes);
    for port in [&mut b, &mut unaware, &mut plain_only] {
        port.post(32, 2048);
        port.settle();
    }
    let tagged = |len: usize| packet(mac(2), mac(1), Some(7), &vec![0x88; len + 2]);
    for (longest, longer) in [
        (plain(mac(2), mac(1), 1500), plain(mac(2), mac(1), 1501)),
        // With room for another tag.
        (tagged(1504), tagged(1505)),
    ] {
        let before = b.shared().counters.rx_dropped.get();
        a.send(&longer);
        a.send(&longest);
        assert_eq!(b.receive(), with_buffers(longest, 1));
        assert_eq!(b.shared().counters.rx_dropped.get(), before + 1);
    }
    // What its driver cuts may be longer, and what is cut for another one is as long as its segments.
    let long = segment(mac(2), mac(1), 5000);
    a.send(&long);
    assert!(b.receive() == with_buffers(long, 3), "another packet");
    let mut jumbo = segment(mac(4), mac(1), 5000);
    a.send(&jumbo);
    (0..4).for_each(|_| drop(plain_only.receive()));
    jumbo[4..6].copy_from_slice(&2000_u16.to_le_bytes());
    a.send(&jumbo);
    // The last segment is short.
    assert_eq!(plain_only.receive().len(), HEADER + 54 + 1000);
    assert!(plain_only.got_nothing());
    assert_eq!(plain_only.shared().counters.rx_dropped.get(), 2);
    let whatever = plain(mac(3), mac(1), 1600);
    a.send(&whatever);
    assert_eq!(unaware.receive(), with_buffers(whatever, 1));
}

#[test]
fn hostile_chains_are_returned_and_the_port_goes_on() {
    let (_switch, [mut a, mut b]) = guests(["", ""], ALL);
    let outside = Segment::new(vm_memory::GuestAddress(1 << 40), 64);
    let writable = a.guest.buffer(64);
    let short = a.guest.filled(&[0; 20]);
    for (readable, writable) in [
        (&[outside][..], &[][..]),
        (&[], &[writable]),
        (&[short], &[]),
    ] {
        a.tx.add(&[(readable, writable)]);
        assert_eq!(a.tx.used().1, 0);
    }
    assert_eq!(a.shared().counters.tx_dropped.get(), 3);
    // A receiver whose buffers are none loses its own packets only.
    while b.rx.outstanding() > 0 {
        a.send(&plain(mac(2), mac(1), 60));
        b.receive();
    }
    let small = b.guest.buffer(100);
    b.rx.post(small);
    b.rx.post(outside);
    a.send(&plain(mac(2), mac(1), 300));
    assert_eq!(b.rx.used(), (vec![small], 0));
    assert_eq!(b.rx.used(), (vec![outside], 0));
    b.post(1, 2048);
    let good = plain(mac(2), mac(1), 300);
    a.send(&good);
    assert_eq!(b.receive(), with_buffers(good, 1));
    // A ring that breaks is one port's own.
    a.tx.corrupt_avail_index();
    assert!(a.tx.wait_for_error());
    b.send(&plain(mac(1), mac(2), 60));
    a.receive();
}

#[test]
fn storms_are_bounded_and_limits_make_a_port_wait() {
    let options = [
        ",flood-packets=10,flood-packets-burst=5",
        "",
        ",rx-packets=10,rx-packets-burst=2",
        ",tx-packets=100,tx-packets-burst=5",
    ];
    let (_switch, [mut a, mut b, mut c, mut d]) = guests(options, ALL);
    // To all, and to an address that nobody knows.
    for number in 0..50 {
        let unknown = [2, 9, 9, 9, 9, number];
        let to = if number % 2 == 0 { BROADCAST } else { unknown };
        a.send(&plain(to, mac(1), 60));
    }
    let counters = &a.shared().counters;
    assert!((5..10).contains(&counters.tx_flooded.get()));
    assert_eq!(counters.tx_storm.get() + counters.tx_flooded.get(), 50);
    let flooded = counters.tx_flooded.get();
    for _ in 0..flooded {
        b.receive();
    }
    // A guest's share of what comes in is kept to by dropping.
    assert!(c.shared().counters.rx_limited.get() > 0);
    c.receive();
    // Its share of what goes out by waiting: 15 frames take a tenth of a second.
    let start = std::time::Instant::now();
    for _ in 0..15 {
        d.send(&plain(mac(2), mac(4), 60));
        b.receive();
    }
    assert!(start.elapsed() >= Duration::from_millis(90));
    assert!(d.shared().counters.tx_throttled.get() > 0);
}

#[test]
fn storms_of_long_frames_are_bounded_as_well() {
    let options = [",flood-packets=10,flood-packets-burst=100", ""];
    let (_switch, [mut a, _b]) = guests(options, ALL);
    let long = plain(BROADCAST, mac(1), 65_000);
    a.send_all(&[&long; 50]);
    let counters = &a.shared().counters;
    // Each counts for 43 short ones, which come back within four seconds.
    let flooded = counters.tx_flooded.get();
    assert!((2..5).contains(&flooded), "{flooded}");
    assert_eq!(counters.tx_storm.get() + flooded, 50);
}

#[test]
fn a_port_that_waits_has_no_turn_by_kicking_and_goes_on_when_its_limits_go() {
    // Each frame takes a minute and more.
    let (_switch, [mut a, mut b]) = guests(["", ",tx-bytes=1"], ALL);
    b.send(&plain(mac(1), mac(2), 60));
    a.receive();
    let frame = plain(mac(1), mac(2), 61);
    let whole = b.guest.filled(&frame);
    b.tx.send(&[whole]);
    for _ in 0..100 {
        b.tx.kick.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    // Once when it came, then ten times a second; the machine may be slow.
    let turns = b.shared().counters.tx_throttled.get();
    assert!((1..50).contains(&turns), "{turns} turns");
    // A ring that comes back waits as well.
    b.own(give_back(&b.sender, 1));
    assert!(a.got_nothing());
    let none = [("tx-bytes".to_owned(), ringside_control::Size(0))].into();
    b.shared().limits.change(&none).unwrap();
    b.tx.used();
    assert_eq!(a.receive(), with_buffers(frame, 1));
}

#[test]
fn a_pulled_cable_carries_nothing() {
    let (_switch, [mut a, mut b]) = guests(["", ""], ALL);
    assert_eq!(b.device.read_config(6, 2).unwrap(), [1, 0]);
    assert_eq!(b.device.set_link(false), Ok(true));
    assert_eq!(b.device.set_link(false), Ok(false));
    assert_eq!(b.device.read_config(6, 2).unwrap(), [0, 0]);
    a.send(&plain(mac(2), mac(1), 60));
    b.send(&plain(mac(1), mac(2), 60));
    assert!(a.got_nothing() && b.got_nothing());
    assert_eq!(b.device.set_link(true), Ok(true));
    let again = plain(mac(2), mac(1), 60);
    a.send(&again);
    assert_eq!(b.receive(), with_buffers(again, 1));
}

#[test]
fn ports_come_and_go_and_leave_nothing_behind() {
    let (mut switch, [mut a, mut b]) = guests(["", ""], ALL);
    for round in 0..100_u8 {
        let mut c = Port::add(&mut switch, 3, ",name=c", ALL);
        c.post(4, 2048);
        c.settle();
        let frame = plain(mac(3), mac(1), 60 + usize::from(round));
        a.send(&frame);
        assert_eq!(c.receive(), with_buffers(frame, 1));
        c.send(&plain(mac(2), mac(3), 60));
        b.receive();
        b.post(1, 2048);
        for index in [0, 1] {
            give_back(&c.sender, index);
        }
        let name = c.name.clone();
        drop(c);
        switch.closed(&name);
        // It is not known any more.
        let table = switch.addresses().unwrap();
        let rows = table["addresses"].as_array().unwrap();
        assert!(rows.iter().all(|row| row["port"] != "c"), "{table}");
    }
}

#[test]
fn names_and_addresses_are_given_once() {
    let (mut switch, [_a]) = guests(
        [",name=a,mac-filter=02:00:00:00:00:01+02:00:00:00:00:07"],
        ALL,
    );
    let mut open = |text: &str| {
        let pairs = ringside_control::options::keys_and_values(text, None).unwrap();
        let opened = switch.open(&pairs.into_iter().collect());
        opened.map(|port| port.name).map_err(|e| e.to_string())
    };
    assert!(
        open("socket=/x,name=a")
            .unwrap_err()
            .contains("`a` already")
    );
    let taken = open("socket=/x,mac=02:00:00:00:00:07").unwrap_err();
    assert!(taken.contains("belongs to port `a`"), "{taken}");
    assert_eq!(open("socket=/x"), Ok("port0".to_owned()));
    for _ in 1..63 {
        open("socket=/x").unwrap();
    }
    assert!(open("socket=/x").unwrap_err().contains("64 ports"));
}

#[test]
fn idle_it_sleeps() {
    let (switch, [mut a, mut b]) = guests(["", ""], ALL);
    a.send(&plain(mac(2), mac(1), 60));
    b.receive();
    std::thread::sleep(Duration::from_millis(50));
    let wakeups = || switch.statistics().stats()["wakeups"].as_u64().unwrap();
    let before = wakeups();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(wakeups(), before);
}

#[test]
fn a_ring_without_kicks_is_looked_at_while_it_is_sound() {
    let (switch, [mut a, mut b]) = guests(["", ""], ALL);
    let mut vring = give_back(&a.sender, 1);
    vring.kick = None;
    a.own(vring);
    for len in 60..80 {
        let frame = plain(mac(2), mac(1), len);
        a.send(&frame);
        assert_eq!(b.receive(), with_buffers(frame, 1));
    }
    a.tx.corrupt_avail_index();
    assert!(a.tx.wait_for_error());
    std::thread::sleep(Duration::from_millis(50));
    let wakeups = || switch.statistics().stats()["wakeups"].as_u64().unwrap();
    let before = wakeups();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(wakeups(), before);
}

/// The VMM of a port shares the open files of its descriptors, and can make them block whenever it likes.
#[test]
fn descriptors_that_block_hold_up_nobody() {
    let blocking = || {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();
        event.write(u64::MAX - 1).unwrap();
        Some(File::from(OwnedFd::from(event)))
    };
    let (mut switch, [mut a, mut b]) = guests(["", ""], ALL);
    let mut hostile = Port::add(&mut switch, 3, "", ALL);
    // One for each frame that comes before the ring is broken.
    hostile.post(2, 2048);
    let (reader, writer) = std::io::pipe().unwrap();
    let pipe = File::from(OwnedFd::from(writer));
    for (call, break_it) in [(blocking(), false), (Some(pipe), false), (blocking(), true)] {
        let mut vring = give_back(&hostile.sender, 0);
        (vring.call, vring.err) = (call, blocking());
        hostile.own(vring);
        // It has the receive ring again once it gives the other one.
        hostile.own(give_back(&hostile.sender, 1));
        hostile.rx.want();
        if break_it {
            hostile.rx.corrupt_avail_index();
        }
        a.send(&plain(mac(3), mac(1), 60));
        let frame = plain(mac(2), mac(1), 60);
        a.send(&frame);
        assert_eq!(b.receive(), with_buffers(frame, 1));
        assert_eq!(hostile.rx.try_used().is_some(), !break_it);
    }
    // No kick comes from what is no eventfd, and its state is never asked.
    let mut vring = give_back(&hostile.sender, 1);
    vring.kick = Some(File::from(OwnedFd::from(reader)));
    hostile.own(vring);
    hostile.settle();
    let frame = plain(mac(1), mac(2), 60);
    b.send(&frame);
    assert_eq!(a.receive(), with_buffers(frame, 1));
}

/// A UDP packet from this port of guest 1 to guest 2.
fn flow(port: u16) -> Vec<u8> {
    let mut payload = vec![8, 0, 0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0];
    payload.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    payload.extend(port.to_be_bytes());
    payload.extend([0; 34]);
    packet(mac(2), mac(1), None, &payload)
}

#[test]
fn flows_are_spread_over_the_receive_rings_that_are_sound() {
    let (mut switch, [mut a]) = guests([""], ALL);
    let mut b = Port::add(&mut switch, 2, ",queue-pairs=3", ALL);
    let mut more = [2, 4].map(|index| {
        let queue = b.guest.queue(256);
        b.own(queue.vring(index, ALL, true));
        queue
    });
    b.post(128, 2048);
    for queue in &mut more {
        for _ in 0..128 {
            queue.post(b.guest.buffer(2048));
        }
    }
    b.settle();
    // How many of 64 flows come to each pair.
    let mut spread = |b: &mut Port, more: &mut [Queue; 2]| {
        (1..=64).for_each(|port| a.send(&flow(port)));
        // What was sent has arrived once the worker has obeyed. A receive ring that it got again would be sound again.
        b.own(give_back(&b.sender, 1));
        let queues = std::iter::once(&mut b.rx).chain(more);
        queues
            .map(|queue| std::iter::from_fn(|| queue.try_used()).count())
            .collect::<Vec<_>>()
    };
    let all = spread(&mut b, &mut more);
    assert_eq!(all.iter().sum::<usize>(), 64);
    assert!(all.iter().all(|&count| count > 5), "{all:?}");
    // The first one breaks in front of the first frame for it, which is lost.
    b.rx.corrupt_heads();
    let rest = spread(&mut b, &mut more);
    assert!(rest[1] + rest[2] > 60, "{rest:?}");
    assert!(rest[1] > 5 && rest[2] > 5, "{rest:?}");
    let rest = spread(&mut b, &mut more);
    assert_eq!(rest[1] + rest[2], 64, "{rest:?}");
    assert!(b.rx.wait_for_error());
}
