//! The links that are no TAP: on a socket where a passt would be, and on interfaces in a network namespace of the test's own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use super::driver::{HEADER, MAC, Pair, Worker};
use super::on_tap::{
    FEATURES, LONGEST, PEER, SOCKET_HEADER, next_of_ours, only_ours, own_network, packet_socket,
    segment, skipped, tso4,
};
use crate::net::features::{GUEST_OFFLOADS, Offloads};
use crate::net::link::{AnyLink, LinkOptions, LinkSpec, Opened};
use crate::net::settings::Pairs;

const PLAIN: u64 = FEATURES & !GUEST_OFFLOADS;

fn open(link: &str, queues: u16) -> Opened {
    let all = Offloads {
        csum: true,
        tso: true,
        ufo: true,
        uso: true,
    };
    let options = LinkOptions {
        queues,
        mac: Some(MAC),
        offloads: &all.candidates(),
        host: Default::default(),
        forwards: &[],
        passt_arguments: &[],
    };
    link.parse::<LinkSpec>().unwrap().open(options).unwrap()
}

fn pair_of(opened: Opened, features: u64) -> Pair {
    match opened.queues.into_iter().next().unwrap() {
        AnyLink::Tap(link) => Pair::new(link, features),
        AnyLink::Null(link) => Pair::new(link, features),
        AnyLink::Generate(link) => Pair::new(link, features),
        AnyLink::Other(link) => Pair::new(link, features),
    }
}

/// A frame for us, without its header.
fn frame(len: usize, mark: u8) -> Vec<u8> {
    let mut frame = [MAC.octets(), PEER].concat();
    frame.extend([0x88, 0xb5, mark]);
    frame.extend((frame.len()..len).map(|i| (i % 251) as u8));
    frame
}

fn with_empty_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER][..], frame].concat()
}

fn send(pair: &mut Pair, frame: &[u8]) {
    let whole = pair.guest.filled(&with_empty_header(frame));
    pair.tx.send(&[whole]);
}

/// What stands where a passt would.
struct FakePasst {
    listener: UnixListener,
    _directory: tempfile::TempDir,
}

impl FakePasst {
    fn new() -> (Self, Pair, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passt.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let opened = open(&format!("passt:{}", path.display()), 1);
        assert_eq!(opened.offloads, 0, "passt knows no header");
        let pair = pair_of(opened, PLAIN);
        let fake = Self {
            listener,
            _directory: directory,
        };
        let stream = fake.accept();
        (fake, pair, stream)
    }

    fn accept(&self) -> UnixStream {
        let (stream, _) = self.listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
    }
}

fn prefixed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn take(stream: &mut UnixStream) -> Vec<u8> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn frames_pass_to_and_from_a_passt() {
    let (_fake, mut pair, mut stream) = FakePasst::new();
    for len in [60, 1514, 65534] {
        pair.post(34, 2048);
        let sent = frame(len, 1);
        send(&mut pair, &sent);
        assert!(take(&mut stream) == sent, "another frame of {len}");
        stream.write_all(&prefixed(&sent)).unwrap();
        let received = pair.receive();
        assert_eq!(received[..10], [0; 10]);
        assert!(received[HEADER..] == sent, "another frame of {len}");
        // As many again as it took.
        let left = 34 - received.len().div_ceil(2048);
        for _ in 0..left {
            stream.write_all(&prefixed(&frame(60, 0))).unwrap();
            pair.receive();
        }
    }
    pair.post(40, 2048);
    // Many in one piece, and one in many.
    let many: Vec<u8> = (0..20).flat_map(|i| prefixed(&frame(100, i))).collect();
    stream.write_all(&many).unwrap();
    for i in 0..20 {
        assert_eq!(pair.receive()[HEADER..], frame(100, i));
    }
    for byte in prefixed(&frame(61, 7)) {
        stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_micros(300));
    }
    assert_eq!(pair.receive()[HEADER..], frame(61, 7));
    assert_eq!(pair.worker.counters.rx_dropped.get(), 0);
}

#[test]
fn a_passt_that_reads_slowly_gets_every_frame_whole() {
    let (_fake, mut pair, mut stream) = FakePasst::new();
    let lengths = |i: u8| 60_000 + usize::from(i);
    for i in 0..60 {
        send(&mut pair, &frame(lengths(i), i));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(pair.worker.counters.tx_full.get() > 0, "it was never full");
    for i in 0..60 {
        assert!(
            take(&mut stream) == frame(lengths(i), i),
            "frame {i} is another"
        );
    }
    for _ in 0..60 {
        pair.tx.used();
    }
    assert_eq!(pair.worker.counters.tx_dropped.get(), 0);
}

#[test]
fn a_passt_that_goes_is_connected_to_again() {
    let (fake, mut pair, mut stream) = FakePasst::new();
    pair.post(8, 2048);
    for end in 0..3_u8 {
        match end {
            // In the middle of a frame.
            0 => stream.write_all(&prefixed(&frame(100, 1))[..50]).unwrap(),
            // Out of step: no frame is as long as this.
            1 => stream.write_all(&[0xff; 64]).unwrap(),
            // While it does not read.
            _ => {
                for i in 0..40 {
                    send(&mut pair, &frame(60_000, i));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        if end != 1 {
            stream.shutdown(Shutdown::Both).unwrap();
        }
        stream = fake.accept();
        stream.write_all(&prefixed(&frame(80, end))).unwrap();
        assert_eq!(pair.receive()[HEADER..], frame(80, end));
        send(&mut pair, &frame(90, end));
        // Frames that waited for room pass first.
        while take(&mut stream) != frame(90, end) {}
    }
    // What was sent while nobody was there is dropped.
    drop(fake);
    drop(stream);
    std::thread::sleep(Duration::from_millis(50));
    let before = pair.worker.counters.tx_dropped.get();
    send(&mut pair, &frame(90, 9));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(pair.worker.counters.tx_dropped.get(), before + 1);
}

#[test]
fn a_source_fills_whatever_is_posted_and_nothing_takes_all() {
    let mut pair = pair_of(open("generate:700", 1), FEATURES);
    for (count, len) in [(1, 2048), (8, 100)] {
        pair.post(count, len);
        let packet = pair.receive();
        assert_eq!(packet.len(), HEADER + 700);
        assert_eq!(packet[HEADER..][..6], MAC.octets());
        assert_eq!(packet[..10], [0; 10]);
    }
    let mut pair = pair_of(open("null", 1), FEATURES);
    send(&mut pair, &frame(60, 1));
    pair.tx.used();
    assert_eq!(pair.worker.counters.tx_packets.get(), 1);
}

/// The frames of a capture, and their lengths before they were cut.
fn captured(path: &std::path::Path) -> Vec<(Vec<u8>, u32)> {
    let bytes = std::fs::read(path).unwrap();
    let field = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((field(0), field(20)), (0xa1b2_3c4d, 1));
    let mut frames = Vec::new();
    let mut at = 24;
    while at < bytes.len() {
        let kept = field(at + 8) as usize;
        frames.push((bytes[at + 16..][..kept].to_vec(), field(at + 12)));
        at += 16 + kept;
    }
    frames
}

#[test]
fn all_that_passes_is_captured() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("all.pcap");
    let opened = open("generate:700", 1).captured(&path, 100).unwrap();
    let mut pair = pair_of(opened, FEATURES);
    send(&mut pair, &frame(60, 1));
    pair.tx.used();
    let sent = frame(60, 1);
    // It is there when the queue has nothing more to send.
    for _ in 0..500 {
        if captured(&path).len() == 1 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(captured(&path), [(sent, 60)]);
    pair.post(20, 64);
    let packet = pair.receive();
    // The rest is written when the last queue is gone.
    drop(pair);
    crate::net::finish_captures();
    let frames = captured(&path);
    assert_eq!(frames[1], (packet[HEADER..][..100].to_vec(), 700));
}

/// Makes a pair of joined interfaces in this thread's network; both are up. `false`, and a word on standard error, if that cannot
/// be.
fn veth(test: &str) -> bool {
    if !own_network(test) {
        return false;
    }
    for line in [
        "link add ring0 type veth peer name ring1",
        // No chatter of the kernel's own.
        "link set ring0 addrgenmode none up",
        "link set ring1 addrgenmode none up",
    ] {
        let made = Command::new("ip").args(line.split(' ')).status();
        if !made.is_ok_and(|status| status.success()) {
            skipped(test, &format!("ip {line} failed"));
            return false;
        }
    }
    // Until the kernel has looked at both ends, it drops what is sent.
    for _ in 0..500 {
        let shown = Command::new("ip")
            .args(["-brief", "link"])
            .output()
            .unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout);
        let up = |line: &&str| line.starts_with("ring") && line.contains(" UP ");
        if shown.lines().filter(up).count() == 2 {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the interfaces do not come up");
}

/// Segments of 64 KiB and small frames pass both ways between a pair on the link and a packet socket on the other end.
fn passes_both_ways(pair: &mut Pair, host: &mut File) {
    only_ours(pair);
    pair.post(60, 1536);
    for payload in [100, LONGEST - tso4::KIND.headers()] {
        let (header, sent) = segment(tso4::KIND, PEER, MAC.octets(), 1000, payload);
        let parts = [
            pair.guest.filled(&[&header[..], &[0, 0]].concat()),
            pair.guest.filled(&sent[..30]),
            pair.guest.filled(&sent[30..]),
        ];
        pair.tx.send(&parts);
        pair.tx.used();
        assert_eq!(pair.worker.counters.tx_dropped.get(), 0);
        let seen = next_of_ours(host);
        assert!(seen[SOCKET_HEADER..] == sent, "another frame");
        assert_eq!(seen[..2], header[..2]);

        let (header, sent) = segment(tso4::KIND, MAC.octets(), PEER, 5001, payload);
        host.write_all(&[&header[..], &sent].concat()).unwrap();
        let received = pair.receive();
        assert!(received[HEADER..] == sent, "another frame");
        // Of a frame that is not cut, the length of the headers may be missing.
        assert_eq!(received[..2], header[..2]);
        assert_eq!(received[4..SOCKET_HEADER], header[4..]);
    }
}

#[test]
fn segments_pass_a_packet_socket_whole() {
    if !veth("segments_pass_a_packet_socket_whole") {
        return;
    }
    let mut pair = pair_of(open("packet:ring0", 1), FEATURES);
    let mut host = packet_socket("ring1");
    passes_both_ways(&mut pair, &mut host);
    // What we sent ourselves does not come back.
    assert_eq!(pair.worker.counters.rx_packets.get(), 2);
}

#[test]
fn packet_sockets_share_flows_among_those_in_use() {
    if !veth("packet_sockets_share_flows_among_those_in_use") {
        return;
    }
    let mut host = packet_socket("ring1");
    let shared = super::driver::shared(2);
    let mut guest = super::driver::Guest::new();
    let mut rings = [guest.queue(256), guest.queue(256)];
    let workers: Vec<Worker> = (0..)
        .zip(open("packet:ring0", 2).queues)
        .map(|(pair, queue)| Worker::start(pair, queue.boxed(), &shared))
        .collect();
    let choose = |pairs| {
        let version = shared.change(|s| s.pairs = Pairs::First(pairs));
        assert!(shared.wait(version));
    };
    choose(1);
    for (index, (ring, worker)) in rings.iter_mut().zip(&workers).enumerate() {
        for _ in 0..200 {
            ring.post(guest.buffer(2048));
        }
        worker.own(ring.vring(2 * index as u16, PLAIN, true));
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
    choose(2);
    let [first, second] = burst(80);
    assert_eq!(first + second, 80);
    assert!(second > 0, "all went to the first pair");
    choose(1);
    assert_eq!(burst(120), [first + 40, second]);
}

#[test]
fn segments_pass_a_macvtap_interface_whole() {
    let test = "segments_pass_a_macvtap_interface_whole";
    if !veth(test) {
        return;
    }
    let address = MAC.to_string();
    let made = Command::new("ip")
        .args(["link", "add", "link", "ring0", "name", "ring2"])
        // No device file of another interface is to have its number.
        .args([
            "index", "40123", "address", &address, "type", "macvtap", "mode", "bridge",
        ])
        .status();
    if !made.is_ok_and(|status| status.success()) {
        return skipped(test, "ip made no macvtap interface");
    }
    Command::new("ip")
        .args(["link", "set", "ring2", "addrgenmode", "none", "up"])
        .status()
        .unwrap();
    if !std::path::Path::new("/dev/tap40123").exists() {
        return skipped(test, "the system made no device file");
    }
    let opened = open("macvtap:ring2", 1);
    assert_eq!(opened.name, "macvtap:ring2");
    opened.interface.set_header_len(HEADER as u8).unwrap();
    opened.interface.set_offloads(opened.offloads).unwrap();
    let mut pair = pair_of(opened, FEATURES);
    let mut host = packet_socket("ring1");
    passes_both_ways(&mut pair, &mut host);
}

#[test]
fn interfaces_that_are_not_there_are_named() {
    if !own_network("interfaces_that_are_not_there_are_named") {
        return;
    }
    let error = |link: &str| {
        let options = LinkOptions {
            queues: 1,
            mac: None,
            offloads: &[],
            host: Default::default(),
            forwards: &[],
            passt_arguments: &[],
        };
        let opened = link.parse::<LinkSpec>().unwrap().open(options);
        opened.err().unwrap().to_string()
    };
    assert!(error("packet:none").contains("no interface \"none\""));
    assert!(error("macvtap:none").contains("type macvtap mode bridge"));
    // The loopback interface is there, and no macvtap interface.
    assert!(error("macvtap:lo").contains("no macvtap interface \"lo\""));
}

#[test]
fn frames_pass_af_xdp_in_order_and_in_numbers() {
    let test = "frames_pass_af_xdp_in_order_and_in_numbers";
    if !veth(test) {
        return;
    }
    let opened = open("xdp:ring0", 1);
    assert_eq!(opened.offloads, 0, "AF_XDP knows no header");
    let mut pair = pair_of(opened, PLAIN);
    let mut host = packet_socket("ring1");
    only_ours(&pair);
    let mark = pair.guest.mark();
    // More than there are places, so that each is used several times.
    for round in 0..40_u8 {
        for i in 0..32 {
            let mut sent = frame(60 + 40 * i, round);
            sent[..12].copy_from_slice(&[PEER, MAC.octets()].concat());
            send(&mut pair, &sent);
        }
        for i in 0..32 {
            let seen = next_of_ours(&mut host);
            let expected = frame(60 + 40 * i, round);
            assert!(
                seen[SOCKET_HEADER + 12..] == expected[12..],
                "frame {i} of round {round}: another"
            );
            pair.tx.used();
        }
        pair.guest.rewind(mark);
    }
    assert_eq!(pair.worker.counters.tx_dropped.get(), 0);
    for round in 0..40_u8 {
        pair.post(32, 2048);
        for i in 0..32 {
            let sent = frame(60 + 40 * i, round);
            host.write_all(&[&[0; SOCKET_HEADER][..], &sent].concat())
                .unwrap();
        }
        for i in 0..32 {
            let received = pair.receive();
            assert!(
                received[HEADER..] == frame(60 + 40 * i, round),
                "frame {i} of round {round}: another"
            );
        }
        pair.guest.rewind(mark);
    }
    // Longer than a place.
    send(&mut pair, &frame(4000, 0));
    pair.tx.used();
    assert_eq!(pair.worker.counters.tx_dropped.get(), 1);
    // Somebody else cannot have it meanwhile, and has it afterwards.
    let options = LinkOptions {
        queues: 1,
        mac: None,
        offloads: &[],
        host: Default::default(),
        forwards: &[],
        passt_arguments: &[],
    };
    let again = || LinkSpec::Xdp("ring0".to_owned()).open(options);
    let error = again().err().unwrap().to_string();
    assert!(error.contains("has an XDP program"), "{error}");
    drop(pair);
    // The kernel may still free what the last one had.
    for _ in 0..8 {
        again().map(drop).unwrap();
    }
}
