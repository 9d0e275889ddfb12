//! `ringside-net` as a switch: several front-ends at one process, which come, go and misbehave apart from each other.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use frontend::{Daemon, FrontEnd, PATIENCE, Setup, readable};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use ringside_control::client::call;
use ringside_rings::Segment;
use serde_json::{Value, json};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use virtio_bindings::virtio_net::VIRTIO_NET_F_SPEED_DUPLEX;
use vm_memory::{Bytes, GuestAddress};

const NET: &str = env!("CARGO_BIN_EXE_ringside-net");
const HEADER: usize = 12;
const RX: usize = 0;
const TX: usize = 1;

/// A switch with ports `a`, `b`, … of cards 02:00:00:00:00:01, 02.
struct Switch {
    daemon: Daemon,
}

fn port(dir: &std::path::Path, name: &str, number: u8) -> String {
    let socket = dir.join(name);
    format!(
        "socket={},name={name},mac=02:00:00:00:00:{number:02x}",
        socket.display()
    )
}

impl Switch {
    fn start(names: &[&str]) -> Self {
        Self::start_with(names, |_| "")
    }

    /// With more options for some of the ports.
    fn start_with(names: &[impl AsRef<str>], options: impl Fn(u8) -> &'static str) -> Self {
        Self::start_as(Command::new(NET), names, options)
    }

    /// With more arguments.
    fn start_as(
        mut command: Command,
        names: &[impl AsRef<str>],
        options: impl Fn(u8) -> &'static str,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (number, name) in (1..).zip(names) {
            let port = port(dir.path(), name.as_ref(), number);
            command.arg("--port").arg(port + options(number));
        }
        command.arg("--control-socket").arg(dir.path().join("ctl"));
        let daemon = Daemon::spawn_command(&mut command, dir);
        daemon.wait_for_line("ringside-net ready");
        Self { daemon }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.daemon.dir.path().join(name)
    }

    fn connect(&self, name: &str) -> FrontEnd {
        let setup = Setup {
            queues: 2,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&self.socket(name), setup);
        post(&mut front, 32);
        front
    }

    /// Waits until the port's front-end has gone.
    fn wait_until_free(&self, port: &str) {
        let free = |status: Value| status["front-end"] == "none";
        while !free(self.ask("port-status", json!({ "port": port })).unwrap()) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn ask(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let answer = call(&self.socket("ctl"), command, &arguments).unwrap();
        answer.map_err(|error| error.message)
    }
}

fn post(front: &mut FrontEnd, count: u64) {
    for _ in 0..count {
        let buffer = front.guest.alloc(2048, 64);
        let FrontEnd { queues, guest, .. } = front;
        queues[RX].submit(guest, &[], &[Segment::new(buffer, 2048)], buffer.0);
    }
}

fn frame(to: u8, from: u8, mark: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    frame.extend([mark; 50]);
    frame
}

fn send(front: &mut FrontEnd, frame: &[u8]) {
    let packet = [&[0; HEADER][..], frame].concat();
    let at = front.guest.alloc(packet.len() as u64, 64);
    front.guest.memory.write_slice(&packet, at).unwrap();
    let segment = Segment::new(at, packet.len() as u32);
    let FrontEnd { queues, guest, .. } = front;
    queues[TX].submit(guest, &[segment], &[], at.0);
    assert_eq!(front.complete(TX), (at.0, 0));
}

fn receive(front: &mut FrontEnd) -> Vec<u8> {
    let (buffer, len) = front.complete(RX);
    front.guest.read(GuestAddress(buffer), len as usize)[HEADER..].to_vec()
}

fn exchange(a: &mut FrontEnd, b: &mut FrontEnd, mark: u8) {
    send(a, &frame(2, 1, mark));
    assert_eq!(receive(b), frame(2, 1, mark));
    send(b, &frame(1, 2, mark));
    assert_eq!(receive(a), frame(1, 2, mark));
}

#[test]
fn another_call_descriptor_is_signalled_at_once() {
    let switch = Switch::start(&["a", "b"]);
    let (mut a, mut b) = (switch.connect("a"), switch.connect("b"));
    for mark in 0..3 {
        exchange(&mut a, &mut b, mark);
        a.call_again(TX);
        a.call_again(RX);
    }
    switch.daemon.stop();
}

#[test]
fn guests_speak_with_each_other_and_reconnect() {
    let switch = Switch::start(&["a", "b"]);
    let (mut a, mut b) = (switch.connect("a"), switch.connect("b"));
    exchange(&mut a, &mut b, 1);
    drop(b);
    switch.wait_until_free("b");
    send(&mut a, &frame(2, 1, 2));
    let mut b = switch.connect("b");
    exchange(&mut a, &mut b, 3);
    switch.daemon.assert_idle();
    let stats = switch.ask("stats", Value::Null).unwrap();
    assert_eq!(stats["ports"][0]["tx-packets"], 3);
    assert_eq!(stats["ports"][1]["rx-starved"], 1);
    let page = switch.ask("metrics", Value::Null).unwrap();
    let page = page.as_str().unwrap();
    assert!(
        page.contains("ringside_net_port_rx_packets_total{port=\"b\"} 2\n"),
        "{page}"
    );
    assert!(
        page.contains("ringside_front_end_connected{port=\"a\"} 1\n"),
        "{page}"
    );
    let sockets = [switch.socket("a"), switch.socket("b")];
    let Switch { daemon } = switch;
    daemon.stop();
    assert!(
        sockets.iter().all(|socket| !socket.exists()),
        "a socket file stays"
    );
}

#[test]
fn cards_are_as_fast_as_they_were_told() {
    let mut command = Command::new(NET);
    command.args(["--speed", "10000"]);
    let switch = Switch::start_as(command, &["a"], |_| "");
    let mut a = switch.connect("a");
    assert!(a.features >> VIRTIO_NET_F_SPEED_DUPLEX & 1 != 0);
    let flags = VhostUserConfigFlags::empty();
    let config = a.messages.get_config(12, 5, flags, &[0; 5]).unwrap().1;
    // 10000 Mbit/s, full duplex (VIRTIO 1.3, 5.1.4).
    assert_eq!(config, [0x10, 0x27, 0, 0, 1]);
    switch.daemon.stop();
}

#[test]
fn a_bad_peer_is_no_matter_of_the_others() {
    let switch = Switch::start(&["a", "b", "bad"]);
    let (mut a, mut b) = (switch.connect("a"), switch.connect("b"));
    exchange(&mut a, &mut b, 1);
    // Half a message, and garbage.
    let mut stalled = UnixStream::connect(switch.socket("bad")).unwrap();
    stalled.write_all(&[1, 0, 0]).unwrap();
    exchange(&mut a, &mut b, 2);
    drop(stalled);
    let mut garbage = UnixStream::connect(switch.socket("bad")).unwrap();
    garbage.write_all(&[0xff; 100]).unwrap();
    exchange(&mut a, &mut b, 3);
    drop(garbage);
    // Memory whose pages somebody else may keep to himself; and memory that is taken away while it is in use.
    let torn = switch.connect("bad");
    let elsewhere = File::open("/proc/self/maps").unwrap();
    let mut regions = torn.guest.regions();
    regions[0].mmap_handle = elsewhere.as_raw_fd();
    assert!(torn.messages.set_mem_table(&regions).is_err());
    switch.daemon.wait_for_line("must be of a memfd");
    torn.guest.file.set_len(0).unwrap();
    send(&mut a, &frame(3, 1, 4));
    exchange(&mut a, &mut b, 5);
    switch.daemon.wait_for_line("guest memory is gone");
    drop(torn);
    let mut good = switch.connect("bad");
    send(&mut a, &frame(3, 1, 6));
    assert_eq!(receive(&mut good), frame(3, 1, 6));
    exchange(&mut a, &mut b, 7);
}

/// Frames for a guest that takes none are dropped and counted; others go on meanwhile, and so does it when it takes some again.
#[test]
fn a_slow_peer_is_no_matter_of_the_others() {
    let switch = Switch::start(&["a", "b", "slow"]);
    let (mut a, mut b) = (switch.connect("a"), switch.connect("b"));
    let mut slow = switch.connect("slow");
    for round in 0..50 {
        for _ in 0..4 {
            send(&mut a, &frame(3, 1, round));
        }
        exchange(&mut a, &mut b, round);
        post(&mut a, 1);
        post(&mut b, 1);
    }
    let stats = switch.ask("stats", Value::Null).unwrap();
    let ports = stats["ports"].as_array().unwrap();
    let port = ports.iter().find(|port| port["name"] == "slow").unwrap();
    assert_eq!(port["rx-starved"], 200 - 32, "{stats}");
    // It finds the first ones, and what comes from now on.
    for at in 0..32 {
        assert_eq!(receive(&mut slow), frame(3, 1, at / 4));
    }
    post(&mut slow, 1);
    send(&mut a, &frame(3, 1, 99));
    assert_eq!(receive(&mut slow), frame(3, 1, 99));
}

#[test]
fn ports_are_added_and_removed_under_load() {
    let switch = Switch::start(&["a", "b"]);
    let (mut a, mut b) = (switch.connect("a"), switch.connect("b"));
    for round in 0..10 {
        let options: serde_json::Map<String, Value> = port(switch.daemon.dir.path(), "c", 3)
            .split(',')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.into()))
            .collect();
        let added = switch.ask("port-add", options.clone().into()).unwrap();
        assert_eq!(added, json!({"name": "c"}));
        let twice = switch.ask("port-add", options.into()).unwrap_err();
        assert!(twice.contains("`c` already"), "{twice}");
        let mut c = switch.connect("c");
        send(&mut a, &frame(3, 1, round));
        assert_eq!(receive(&mut c), frame(3, 1, round));
        let list = switch.ask("port-list", Value::Null).unwrap();
        assert_eq!(list["ports"][2]["front-end"], "connected");
        std::thread::scope(|scope| {
            let removed = scope.spawn(|| switch.ask("port-remove", json!({"port": "c"})));
            if round < 5 {
                exchange(&mut a, &mut b, round);
            }
            removed.join().unwrap().unwrap();
        });
        assert!(!switch.socket("c").exists(), "the socket file stays");
        assert!(switch.ask("port-remove", json!({"port": "c"})).is_err());
    }
    exchange(&mut a, &mut b, 99);
    // What came for c when it had gone was for nobody, and nothing of it is left.
    let list = switch.ask("port-list", Value::Null).unwrap();
    assert_eq!(list["ports"].as_array().unwrap().len(), 2);
    switch.ask("quit", Value::Null).unwrap();
    let Switch { mut daemon } = switch;
    assert_eq!(daemon.wait().code(), Some(0));
}

/// Numbers that follow from the one that it begins with, which is not 0 (xorshift64).
struct Drawn(u64);

impl Drawn {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }
}

/// A number that decides what happens: that of the environment, where it is to happen once more.
fn seed() -> u64 {
    const SEED: &str = "RINGSIDE_TEST_SEED";
    let given = std::env::var(SEED).ok().map(|text| text.parse().unwrap());
    let seed = given.unwrap_or_else(|| RandomState::new().hash_one(0)) | 1;
    println!("{SEED}={seed}");
    seed
}

/// 64 front-ends, all connected at first. Then most of them go, come, stop in the middle of a message and take their memory away, as it
/// is drawn. Two others speak with each other all the time. Nothing of those that went is left.
#[test]
fn front_ends_come_and_go_as_they_like() {
    let names: Vec<String> = (1..=64).map(|number| format!("p{number}")).collect();
    let switch = Switch::start_with(&names, |number| if number > 2 { ",vlan=2" } else { "" });
    let (mut a, mut b) = (switch.connect("p1"), switch.connect("p2"));
    exchange(&mut a, &mut b, 0);
    let held = || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", switch.daemon.id()));
        (switch.daemon.descriptors(), threads.unwrap().count())
    };
    let before = held();
    let seed = seed();
    let connect = |name| (name, Some(switch.connect(name)));
    let others = names[2..].iter().map(String::as_str);
    let mut fronts: Vec<(&str, Option<FrontEnd>)> = others.map(connect).collect();
    let list = switch.ask("port-list", Value::Null).unwrap();
    let ports = list["ports"].as_array().unwrap();
    assert_eq!(ports.len(), 64);
    assert!(
        ports.iter().all(|port| port["front-end"] == "connected"),
        "{list}"
    );
    let come_and_go = |fronts: &mut [(&str, Option<FrontEnd>)], mut drawn: Drawn| {
        for step in 0..100 {
            let place = drawn.below(fronts.len() as u64) as usize;
            let (name, front) = &mut fronts[place];
            let Some(mut leaving) = front.take() else {
                if drawn.below(4) == 0 {
                    let mut stalled = UnixStream::connect(switch.socket(name)).unwrap();
                    stalled.write_all(&[1, 0, 0]).unwrap();
                } else {
                    *front = Some(switch.connect(name));
                }
                continue;
            };
            send(&mut leaving, &frame(0xff, 3, step));
            match drawn.below(5) {
                0 => leaving.guest.file.set_len(0).unwrap(),
                1 => drop(leaving.messages.get_vring_base(TX).unwrap()),
                2 => leaving.raw.0.write_all(&[1, 0, 0]).unwrap(),
                3 => {}
                _ => *front = Some(leaving),
            }
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..)
            .zip(fronts.chunks_mut(16))
            .map(|(number, fronts)| {
                let drawn = Drawn(seed.wrapping_mul(2 * number + 1));
                scope.spawn(move || come_and_go(fronts, drawn))
            })
            .collect();
        while others.iter().any(|other| !other.is_finished()) {
            exchange(&mut a, &mut b, 1);
            post(&mut a, 1);
            post(&mut b, 1);
        }
        others.into_iter().for_each(|other| other.join().unwrap());
    });
    drop(fronts);
    for name in &names[2..] {
        switch.wait_until_free(name);
    }
    // The thread that answered the last question ends in its own time.
    let end = Instant::now() + Duration::from_secs(10);
    while held() != before {
        let now = held();
        assert!(
            Instant::now() < end,
            "{now:?} in place of {before:?} descriptors and threads"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    exchange(&mut a, &mut b, 2);
}

#[test]
fn ports_are_made_where_the_first_ones_are() {
    let switch = Switch::start(&["a"]);
    let elsewhere = tempfile::tempdir().unwrap();
    let socket = elsewhere.path().join("b");
    match switch.ask("port-add", json!({ "socket": socket })) {
        Err(error) => assert!(error.contains("of its first ports only"), "{error}"),
        // Without Landlock there is nobody to refuse it.
        Ok(_) => assert!(switch.daemon.log().contains("files not restricted")),
    }
    let socket = switch.socket("b");
    switch.ask("port-add", json!({ "socket": socket })).unwrap();
}

#[test]
fn a_pulled_cable_is_seen_by_the_guest() {
    let switch = Switch::start(&["a", "b"]);
    let (mut a, mut b) = (switch.connect("a"), switch.connect("b"));
    let (ours, theirs) = UnixStream::pair().unwrap();
    b.messages.set_backend_request_fd(&theirs).unwrap();
    let link = |state| {
        let arguments = json!({"port": "b", "state": state});
        switch.ask("port-link", arguments).unwrap()
    };
    let status = |front: &mut FrontEnd| {
        let flags = VhostUserConfigFlags::empty();
        front.messages.get_config(6, 2, flags, &[0; 2]).unwrap().1[0]
    };
    assert_eq!(status(&mut b), 1);
    assert_eq!(link("down"), json!({"changed": true}));
    assert!(readable(ours.as_raw_fd(), Duration::from_secs(2)));
    assert_eq!(status(&mut b), 0);
    let shown = switch.ask("port-status", json!({"port": "b"})).unwrap();
    assert_eq!(shown["interface"]["link"], "down");
    assert_eq!(link("down"), json!({"changed": false}));
    link("up");
    exchange(&mut a, &mut b, 1);
    let limits = json!({"port": "b", "limits": {"rx-bytes": "10M"}});
    let limits = switch.ask("port-limits", limits).unwrap();
    assert_eq!(limits["rx-bytes"], 10 << 20);
    let wrong = json!({"port": "b", "limits": {"speed": 1}});
    assert!(
        switch
            .ask("port-limits", wrong)
            .unwrap_err()
            .contains("no limit `speed`")
    );
    let announced = switch.ask("port-announce", json!({"port": "b"})).unwrap();
    assert_eq!(announced, json!({"changed": true}));
    assert_eq!(status(&mut b), 3);
}

/// Length and kept bytes of each frame of a capture file.
fn captured(path: &std::path::Path) -> Vec<(usize, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let (header, mut records) = bytes.split_at(24);
    assert_eq!(header[..4], 0xa1b2_3c4d_u32.to_ne_bytes());
    let mut frames = Vec::new();
    while let Some((record, behind)) = records.split_at_checked(16) {
        let word = |at: usize| u32::from_ne_bytes(record[at..at + 4].try_into().unwrap()) as usize;
        let (kept, later) = behind.split_at(word(8));
        frames.push((word(12), kept.to_vec()));
        records = later;
    }
    frames
}

#[test]
fn what_passes_a_port_is_kept_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let [of_a, of_b, of_up] = ["a.pcap", "b.pcap", "up.pcap"].map(|name| dir.path().join(name));
    let options = [
        format!(",vlan=7,pcap={}", of_a.display()),
        format!(",trunk=7,pcap={},pcap-snap=20", of_b.display()),
    ];
    let options = options.map(|text| &*Box::leak(text.into_boxed_str()));
    let mut command = Command::new(NET);
    command
        .arg("--uplink")
        .arg(format!("null,vlan=7,pcap={}", of_up.display()));
    let switch = Switch::start_as(command, &["a", "b"], |number| {
        options[usize::from(number) - 1]
    });
    let mut a = switch.connect("a");
    let mut b = switch.connect("b");
    let sent = frame(2, 1, 7);
    send(&mut a, &sent);
    let tagged = receive(&mut b);
    assert_eq!(tagged[12..16], [0x81, 0, 0, 7]);
    let to_all = [&[0xff; 6][..], &sent[6..]].concat();
    send(&mut a, &to_all);
    receive(&mut b);
    drop((a, b));
    // Another program empties none of the files, whose one writer this one is.
    let other = format!("{},pcap={}", dir.path().join("s").display(), of_a.display());
    let mut command = Command::new(NET);
    command.arg("--port").arg(other);
    let (code, log) = Daemon::spawn_command(&mut command, tempfile::tempdir().unwrap()).outcome();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("which something writes already"), "{log}");
    let Switch { daemon } = switch;
    daemon.signal(Signal::SIGTERM);
    let (code, log) = daemon.outcome();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("too slow"), "{log}");
    assert_eq!(
        captured(&of_a),
        [(sent.len(), sent.clone()), (sent.len(), to_all.clone())]
    );
    let of_b = captured(&of_b);
    assert_eq!(of_b[0], (tagged.len(), tagged[..20].to_vec()));
    assert_eq!(of_b.len(), 2);
    assert_eq!(captured(&of_up), [(sent.len(), to_all)]);
}

#[test]
fn a_capture_that_nobody_takes_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let captured = format!(",pcap={}", fifo.display());
    let captured = &*Box::leak(captured.into_boxed_str());
    let ports = ["a", "b", "slow"];
    let options = |number| if number == 3 { captured } else { "" };
    let mut command = Command::new(NET);
    let without = dir.path().join("without");
    command
        .arg("--port")
        .arg(format!("{}{captured}", without.display()));
    let (code, log) = Daemon::spawn_command(&mut command, tempfile::tempdir().unwrap()).outcome();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("have somebody read this FIFO"), "{log}");
    // It is there, and reads nothing.
    let mut reader = File::options();
    reader.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let reader = reader.open(&fifo).unwrap();
    let switch = Switch::start_with(&ports, options);
    let mut slow = switch.connect("slow");
    // More than a pipe takes.
    for mark in 0..2000 {
        send(&mut slow, &frame(9, 3, mark as u8));
    }
    drop(slow);
    switch
        .ask("port-remove", json!({ "port": "slow" }))
        .unwrap();
    let (mut a, mut b) = (switch.connect("a"), switch.connect("b"));
    exchange(&mut a, &mut b, 1);
    drop((a, b));
    switch.daemon.stop();
    drop(reader);
}

/// A frame of the TCP connection whose hashes are published ("Verifying the RSS Hash Calculation" of Microsoft), from card 1 to 2.
fn hashed_frame() -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend([66, 9, 149, 187, 161, 142, 100, 80]);
    frame.extend([2794_u16, 1766].map(u16::to_be_bytes).concat());
    frame.resize(14 + 40, 0);
    frame
}

/// A key of receive-side scaling, from the same publication.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// RSS_CONFIG with this table of four (VIRTIO 1.3, 5.1.6.5.7.1), for addresses and TCP's ports of IPv4.
fn rss(table: [u16; 4], unclassified: u16) -> Vec<u8> {
    let mut command = vec![4, 1];
    command.extend(3_u32.to_le_bytes());
    command.extend(3_u16.to_le_bytes());
    command.extend(unclassified.to_le_bytes());
    command.extend(table.map(u16::to_le_bytes).concat());
    command.extend(2_u16.to_le_bytes());
    command.push(40);
    command.extend(KEY);
    command
}

#[test]
fn a_port_steers_and_hashes_as_its_driver_says_and_holds_interrupts_back() {
    const OTHER_RX: usize = 2;
    const CONTROL: usize = 4;
    /// With a hash (VIRTIO 1.3, 5.1.6).
    const LONG_HEADER: usize = 20;
    let switch = Switch::start_with(&["a", "b"], |number| match number {
        2 => ",queue-pairs=2,hash-report=on,standby=on",
        _ => "",
    });
    let mut a = switch.connect("a");
    let setup = Setup {
        queues: 5,
        ..Setup::default()
    };
    let mut b = FrontEnd::new(&switch.socket("b"), setup);
    let standby = 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_STANDBY;
    assert!(b.features & standby != 0 && a.features & standby == 0);
    for queue in [RX, OTHER_RX] {
        for _ in 0..32 {
            let buffer = b.guest.alloc(2048, 64);
            let FrontEnd { queues, guest, .. } = &mut b;
            queues[queue].submit(guest, &[], &[Segment::new(buffer, 2048)], buffer.0);
        }
    }
    let mut pass = |b: &mut FrontEnd, queue: usize, frame: &[u8]| -> Vec<u8> {
        send(&mut a, frame);
        let (buffer, len) = b.complete(queue);
        let packet = b.guest.read(GuestAddress(buffer), len as usize);
        assert_eq!(packet[LONG_HEADER..], *frame);
        packet[10..18].to_vec()
    };
    // One buffer, the hash, and what was hashed (VIRTIO 1.3, 5.1.6.4.4).
    let none = [1, 0, 0, 0, 0, 0, 0, 0];
    let with_ports = [1, 0, 0x78, 0xc1, 0xcc, 0x51, 2, 0];
    let plain = frame(2, 1, 7);
    // The last two bits of the hash are 0.
    for (table, unclassified, hashed, other) in [
        ([1, 0, 0, 0], 0, OTHER_RX, RX),
        ([0, 1, 1, 1], 1, RX, OTHER_RX),
    ] {
        assert_eq!(b.command(CONTROL, &rss(table, unclassified)), 0);
        assert_eq!(pass(&mut b, hashed, &hashed_frame()), with_ports);
        assert_eq!(pass(&mut b, other, &plain), none);
    }
    // A pair that is not there.
    assert_eq!(b.command(CONTROL, &rss([2, 0, 0, 0], 0)), 1);
    assert_eq!(pass(&mut b, RX, &hashed_frame()), with_ports);

    // What it sends has the long header, too.
    let packet = [&[0; LONG_HEADER][..], &frame(1, 2, 9)].concat();
    let at = b.guest.alloc(packet.len() as u64, 64);
    b.guest.memory.write_slice(&packet, at).unwrap();
    let FrontEnd { queues, guest, .. } = &mut b;
    queues[TX].submit(guest, &[Segment::new(at, packet.len() as u32)], &[], at.0);
    assert_eq!(b.complete(TX), (at.0, 0));
    assert_eq!(receive(&mut a), frame(1, 2, 9));

    // An interrupt for four packets, as the time is far (VIRTIO 1.3, 5.1.6.5.9); then for one, as it is near.
    let coalesce = |packets: u32, microseconds: u32| {
        let values = [packets, microseconds].map(u32::to_le_bytes).concat();
        [&[6, 1][..], &values].concat()
    };
    let arm = |b: &mut FrontEnd| {
        b.queues[RX].settle();
        let FrontEnd { queues, guest, .. } = b;
        let mut session = queues[RX].ring.session(&guest.memory).unwrap();
        while session.poll_used().unwrap().is_some() {}
        assert!(!session.enable_interrupts().unwrap());
    };
    let interrupted = |b: &FrontEnd, within| readable(b.queues[RX].call.as_raw_fd(), within);
    assert_eq!(b.command(CONTROL, &coalesce(4, 60_000_000)), 0);
    arm(&mut b);
    (0..3).for_each(|_| send(&mut a, &hashed_frame()));
    assert!(!interrupted(&b, Duration::from_millis(100)));
    send(&mut a, &hashed_frame());
    assert!(interrupted(&b, PATIENCE));
    arm(&mut b);
    send(&mut a, &hashed_frame());
    assert!(!interrupted(&b, Duration::from_millis(100)));
    // What is held back comes out with another setting.
    assert_eq!(b.command(CONTROL, &coalesce(100, 1000)), 0);
    assert!(interrupted(&b, PATIENCE));
    arm(&mut b);
    send(&mut a, &hashed_frame());
    assert!(interrupted(&b, PATIENCE));

    // A frame over two buffers has the hash in the first; and what is held back as a queue stops comes out.
    drop(b);
    switch.wait_until_free("b");
    let mut b = FrontEnd::new(&switch.socket("b"), setup);
    let short: Vec<_> = (0..2).map(|_| b.guest.alloc(40, 64)).collect();
    let FrontEnd { queues, guest, .. } = &mut b;
    for &buffer in &short {
        queues[RX].submit(guest, &[], &[Segment::new(buffer, 40)], buffer.0);
    }
    assert_eq!(b.command(CONTROL, &rss([0; 4], 0)), 0);
    assert_eq!(b.command(CONTROL, &coalesce(100, 60_000_000)), 0);
    assert!(
        !b.queues[RX]
            .ring
            .session(&b.guest.memory)
            .unwrap()
            .enable_interrupts()
            .unwrap()
    );
    send(&mut a, &hashed_frame());
    assert!(!interrupted(&b, Duration::from_millis(100)));
    b.messages.get_vring_base(RX).unwrap();
    assert!(interrupted(&b, PATIENCE));
    assert_eq!(b.complete(RX), (short[0].0, 40));
    assert_eq!(b.complete(RX), (short[1].0, 34));
    let parts = [(short[0], 40), (short[1], 34)].map(|(at, len)| b.guest.read(at, len));
    let packet = parts.concat();
    assert_eq!(packet[10..18], [2, 0, 0x78, 0xc1, 0xcc, 0x51, 2, 0]);
    assert_eq!(packet[LONG_HEADER..], hashed_frame());
    switch.daemon.stop();
}

#[test]
fn an_uplink_has_limits_too() {
    const RATE: u64 = 100;
    const BURST: u64 = 10;
    let mut command = Command::new(NET);
    command.arg("--uplink").arg(format!(
        "generate:60,name=up,tx-packets={RATE},tx-packets-burst={BURST}"
    ));
    let start = Instant::now();
    let switch = Switch::start_as(command, &["a"], |_| "");
    let counted = |counter: &str| {
        let stats = switch.ask("stats", Value::Null).unwrap();
        let ports = stats["ports"].as_array().unwrap().clone();
        let up = ports.into_iter().find(|port| port["name"] == "up");
        up.unwrap()[counter].as_u64().unwrap()
    };
    while counted("tx-packets") <= BURST {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    let passed = counted("tx-packets");
    let most = BURST + RATE * (start.elapsed().as_secs() + 1);
    assert!(passed <= most, "{passed} frames, at most {most} may pass");
    assert!(counted("tx-limited") > passed);
    // As those of a port, they change while it runs.
    let changes = json!({ "port": "up", "limits": { "tx-packets": 7 } });
    let limits = switch.ask("port-limits", changes).unwrap();
    assert_eq!(limits["tx-packets"], 7);
    let down = json!({ "port": "up", "state": "down" });
    assert_eq!(switch.ask("port-link", down).unwrap()["changed"], true);
    let list = switch.ask("port-list", Value::Null).unwrap();
    let listed = json!({ "name": "up", "uplink": "generate:60" });
    assert_eq!(list["ports"][1], listed);
    let status = switch.ask("port-status", json!({ "port": "up" })).unwrap();
    assert_eq!(status["interface"]["link"], "down");
    assert_eq!(status["limits"]["tx-packets"], 7);
    let refused = switch.ask("port-announce", json!({ "port": "up" }));
    assert!(refused.unwrap_err().contains("is an uplink"));
    // What was on its way when it was asked for may have passed.
    let start = Instant::now();
    let mut passed = 0;
    while counted("tx-packets") != passed {
        assert!(start.elapsed() < PATIENCE, "it goes on: {passed}");
        passed = counted("tx-packets");
        std::thread::sleep(Duration::from_millis(300));
    }
    switch.daemon.stop();
}

#[test]
fn command_lines_that_cannot_be_served_end_with_a_reason() {
    let outcome = |args: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        Daemon::spawn_command(Command::new(NET).args(args), dir).outcome()
    };
    for (args, why) in [
        (&["--port", "/x/a", "--tap", "t"][..], "cannot be used with"),
        (
            &["--port", "/x/a", "--socket-path", "/x/b"],
            "cannot be used with",
        ),
        (&["--port", "/x/a", "--pcap", "/x/p"], "cannot be used with"),
        (&["--port", "/x/a", "--rss", "off"], "cannot be used with"),
        (&["--port", "/x/a", "--fd", "3"], "cannot be used with"),
        (
            &["--port", "/x/a,pcap=/x/p", "--uplink", "null,pcap=/x/p"],
            "named twice",
        ),
        (
            &["--port", "/x/a", "--exit-on-disconnect"],
            "cannot be used with",
        ),
        (
            &["--port", "/x/a", "--uplink", "null", "--tap-up"],
            "--tap-up is for a TAP",
        ),
        (
            &["--port", "/x/a", "--forward", "tcp:80"],
            "--forward is for a passt",
        ),
        (
            &[
                "--port",
                "/x/a",
                "--uplink",
                "tap:a",
                "--uplink",
                "tap:b",
                "--tap-ip",
                "10.0.0.1/8",
            ],
            "--tap-ip is for one link",
        ),
        (&["--port", "vlan=3"], "socket= is missing"),
        (&["--uplink", "null"], "--port"),
        (&[], "--socket-path"),
    ] {
        let (code, log) = outcome(args);
        assert_eq!(code, Some(2), "{args:?}: {log}");
        assert!(log.contains(why), "{args:?}: {log}");
    }
    let (code, log) = outcome(&["--port", "/nowhere/a"]);
    assert_eq!(code, Some(1));
    assert!(log.contains("/nowhere/a"), "{log}");
}
