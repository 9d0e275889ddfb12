//! Upgrades in place: programs take each other's place under a driver that does not stop, and nothing is lost or done twice.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use frontend::disk::Disk;
use frontend::{Daemon, FrontEnd, PATIENCE, Setup, own_network, skip};
use ringside_control::client;
use ringside_rings::Segment;
use serde_json::{Value, json};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NET: &str = env!("CARGO_BIN_EXE_ringside-net");
const SIZE: usize = 4 << 20;
/// How often the program is replaced, in each way.
const UPGRADES: usize = 50;

/// What is on the disk is known all the time, each read is compared with it, and a request that came back twice would be
/// none that the driver has.
fn disk_goes_on(setup: Setup, more: &[&str]) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE as u64).unwrap();
    let path = image.path().to_str().unwrap();
    let args = [&["--path", path, "--queues", "4"], more].concat();
    let mut daemon = Daemon::start_controlled(BLK, &args);
    let front = FrontEnd::new(&daemon.socket(), setup);
    let mut disk = Disk::new(front, vec![0; SIZE]);
    for _ in 0..UPGRADES {
        disk.load(40, true);
        daemon.upgrade(BLK, &args);
    }
    disk.exercise(40, true);
    disk.verify();
    disk.flush();
    let mut found = vec![0; SIZE];
    let file = File::open(image.path()).unwrap();
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == disk.model, "the file is not what the driver wrote");
    // The connection is one with which more can be done.
    disk.front.messages.get_vring_base(0).unwrap();
    daemon.stop();
}

fn queues(packed: bool, tracked: bool) -> Setup {
    Setup {
        queues: 4,
        packed,
        tracked,
        ..Setup::default()
    }
}

#[test]
fn a_disk_with_split_queues_goes_on() {
    disk_goes_on(queues(false, false), &[]);
}

#[test]
fn a_disk_with_packed_queues_goes_on() {
    disk_goes_on(queues(true, true), &[]);
}

#[test]
fn a_disk_in_order_with_limits_goes_on() {
    let setup = Setup {
        in_order: true,
        slots: true,
        ..queues(false, true)
    };
    disk_goes_on(setup, &["--in-order", "on", "--limit", "iops=4000"]);
}

/// A disk whose options a test chooses.
struct Served {
    daemon: Daemon,
    front: FrontEnd,
    image: tempfile::NamedTempFile,
}

impl Served {
    fn new() -> Self {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(SIZE as u64).unwrap();
        let path = image.path().to_str().unwrap();
        let daemon = Daemon::start_controlled(BLK, &["--path", path, "--queues", "2"]);
        let front = FrontEnd::new(&daemon.socket(), two_queues(true));
        Self {
            daemon,
            front,
            image,
        }
    }

    fn works(&mut self) {
        self.front.works(0);
        self.front.works(1);
    }
}

fn two_queues(tracked: bool) -> Setup {
    Setup {
        queues: 2,
        tracked,
        ..Setup::default()
    }
}

/// The lock of the image is never free: it goes over with the file.
#[test]
fn the_image_stays_locked() {
    let mut served = Served::new();
    let path = served.image.path().to_str().unwrap().to_owned();
    let args = ["--path", path.as_str(), "--queues", "2"];
    for _ in 0..3 {
        let (status, log) = Daemon::spawn(BLK, &args).outcome();
        assert_eq!(status, Some(1));
        assert!(log.contains("is in use by another program"), "{log}");
        served.daemon.upgrade(BLK, &args);
        served.works();
    }
    served.daemon.stop();
    // And is free then.
    Daemon::start(BLK, &args).stop();
}

/// What a front-end has set up beside its rings goes over, too: the dirty log, its socket for our requests, and what users have
/// changed.
#[test]
fn all_of_the_connection_goes_over() {
    let mut served = Served::new();
    let path = served.image.path().to_str().unwrap().to_owned();
    let args = ["--path", path.as_str(), "--queues", "2"];
    let control = served.daemon.dir.path().join("ctl");
    let call = |command, arguments| {
        client::call(&control, command, &arguments)
            .unwrap()
            .unwrap()
    };
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    served
        .front
        .messages
        .set_backend_request_fd(&theirs)
        .unwrap();
    drop(theirs);
    call("limits", json!({ "iops": 5000 }));
    served.front.begin_log(true);
    served.daemon.upgrade(BLK, &args);
    let marked = |log: &File| {
        let mut bits = vec![0; log.metadata().unwrap().len() as usize];
        log.read_exact_at(&mut bits, 0).unwrap();
        bits.iter().map(|byte| byte.count_ones()).sum::<u32>()
    };
    let before = marked(&served.front.log.as_ref().unwrap().0);
    // The next status lies in a page that nobody has written.
    served.front.guest.alloc(4096, 4096);
    served.works();
    let log = served.front.end_log();
    let after = marked(&log);
    assert!(after > before, "{before} pages, then {after}");
    served.daemon.upgrade(BLK, &args);
    served.works();
    assert_eq!(marked(&log), after);
    assert_eq!(call("limits", Value::Null)["iops"], 5000);
    let status = call("status", Value::Null);
    assert_eq!(status["front-end"], "connected");
    assert_eq!(status["inflight-tracking"], true);
    call("resize", json!({ "size": 2 * SIZE }));
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload.
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    served.daemon.upgrade(BLK, &args);
    served.daemon.stop();
}

#[test]
fn another_device_is_refused_and_the_old_program_goes_on() {
    let mut served = Served::new();
    let path = served.image.path().to_str().unwrap().to_owned();
    let path = ["--path", path.as_str()];
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(SIZE as u64).unwrap();
    let other = ["--path", other.path().to_str().unwrap()];
    for (program, args, why) in [
        (
            BLK,
            [&path[..], &["--queues", "4"]].concat(),
            "number of queues",
        ),
        (
            BLK,
            [&path[..], &["--queues", "2", "--packed", "off"]].concat(),
            "features",
        ),
        (
            BLK,
            [&path[..], &["--queues", "2", "--queue-size", "128"]].concat(),
            "queue size",
        ),
        (
            BLK,
            [&path[..], &["--queues", "2", "--block-size", "4096"]].concat(),
            "configuration space",
        ),
        (
            BLK,
            [&path[..], &["--queues", "2", "--direct"]].concat(),
            "open in another way",
        ),
        (
            BLK,
            [&other[..], &["--queues", "2"]].concat(),
            "another file",
        ),
        (NET, vec!["--link", "null"], "kind"),
    ] {
        let mut child = served.daemon.successor(program, &args);
        assert_eq!(child.wait().unwrap().code(), Some(1), "{args:?}");
        let log = served.daemon.log();
        assert!(log.contains(why), "{why}: {log}");
        served.works();
    }
    served.daemon.stop();
}

/// A message of an upgrade: see `shell/handover/talk.rs`.
fn message(body: &str) -> Vec<u8> {
    let mut message = b"RINGHAND".to_vec();
    let len = body.len() as u32;
    for word in [2, len, 0, crc32fast::hash(body.as_bytes())] {
        message.extend(word.to_le_bytes());
    }
    message.extend(body.as_bytes());
    message
}

/// Takes the next one, without its descriptors.
fn take(stream: &mut UnixStream) -> String {
    try_take(stream).unwrap()
}

/// The same, or `None` if the program does not hand over now.
fn try_take(stream: &mut UnixStream) -> Option<String> {
    let mut header = [0; 24];
    stream.read_exact(&mut header).unwrap();
    if header[0] == b'{' {
        return None;
    }
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()) as usize;
    assert_eq!(
        &header[..8],
        b"RINGHAND",
        "{}",
        String::from_utf8_lossy(&header)
    );
    let mut body = vec![0; word(12)];
    stream.read_exact(&mut body).unwrap();
    stream.read_exact(&mut vec![0; word(16)]).unwrap();
    Some(String::from_utf8(body).unwrap())
}

/// Asks for all of a program, as soon as it does not take another one for its successor any more.
fn ask_for_all(control: &Path) -> (UnixStream, String) {
    let start = Instant::now();
    loop {
        let mut stream = UnixStream::connect(control).unwrap();
        let request = json!({"command": "hand-over", "arguments": {"version": 2}});
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        if let Some(offer) = try_take(&mut stream) {
            return (stream, offer);
        }
        assert!(start.elapsed() < PATIENCE);
    }
}

/// Ways in which a program can break off that is about to take the place of one with so many ports.
fn break_off(control: &Path, ports: usize, mut goes_on: impl FnMut()) {
    for words in [
        &[][..],
        &["\"ready\""],
        &["\"go\""],
        &["{}"],
        &["\"ready\"", "{\"refused\":\"no\"}"],
        &["\"ready\"", "\"ready\""],
    ] {
        let (mut stream, offer) = ask_for_all(control);
        assert!(offer.starts_with("{\"offer\""));
        for _ in 0..ports {
            assert!(take(&mut stream).starts_with("{\"port\""));
        }
        for (number, word) in words.iter().enumerate() {
            stream.write_all(&message(word)).unwrap();
            if number == 0 && *word == "\"ready\"" {
                assert!(take(&mut stream).starts_with("{\"state\""));
                for _ in 0..ports {
                    assert!(take(&mut stream).starts_with("{\"port-state\""));
                }
            }
        }
        drop(stream);
        goes_on();
    }
}

#[test]
fn a_program_that_dies_in_the_middle_changes_nothing() {
    let mut served = Served::new();
    let control = served.daemon.dir.path().join("ctl");
    let before = served.daemon.descriptors();
    break_off(&control, 1, || served.works());
    // Another version, and while one is about to take over.
    let ask = |version| client::call(&control, "hand-over", &json!({ "version": version }));
    let refused = ask(1).unwrap().unwrap_err();
    assert!(refused.message.contains("version 2"), "{}", refused.message);
    let (stream, _) = ask_for_all(&control);
    assert!(
        ask(1)
            .unwrap()
            .unwrap_err()
            .message
            .contains("another program")
    );
    drop(stream);
    served.works();
    client::call(&control, "status", &Value::Null)
        .unwrap()
        .unwrap();
    assert!(served.daemon.descriptors() <= before + 2);
    served.daemon.stop();
}

#[test]
fn what_cannot_go_over_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let capture = dir.path().join("capture");
    let capture = capture.to_str().unwrap();
    let daemon = Daemon::start_controlled(NET, &["--link", "null", "--pcap", capture]);
    let mut child = daemon.successor(NET, &["--link", "null"]);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(
        daemon.log().contains("has a capture file"),
        "{}",
        daemon.log()
    );
    daemon.stop();
}

/// A switch of two guests, `a` and `b`.
struct Switch {
    daemon: Daemon,
    options: Vec<String>,
}

/// A guest at a port: what it has sent, and what has come to it.
struct Station {
    front: FrontEnd,
    /// For the frames that are under way.
    place: u64,
    sent: u32,
    returned: u32,
    received: u32,
}

impl Switch {
    fn start(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = |number: u8, name: &str| {
            let socket = dir.path().join(name);
            let mac = format!("02:00:00:00:00:{number:02x}");
            format!("socket={},name={name},mac={mac}", socket.display())
        };
        let ports = [
            "--port".to_owned(),
            port(1, "a"),
            "--port".to_owned(),
            port(2, "b"),
        ];
        let options: Vec<String> = ports
            .into_iter()
            .chain(more.iter().map(ToString::to_string))
            .collect();
        let mut command = Command::new(NET);
        command.args(&options);
        command.arg("--control-socket").arg(dir.path().join("ctl"));
        let daemon = Daemon::spawn_command(&mut command, dir);
        daemon.wait_for_line("ringside-net ready");
        Self { daemon, options }
    }

    fn successor(&self) -> std::process::Child {
        self.daemon
            .successor_by(Command::new(NET).args(&self.options))
    }

    fn upgrade(&mut self, meanwhile: impl FnMut()) {
        let successor = self.successor();
        self.daemon.upgraded(successor, meanwhile);
    }

    fn ask(&self, command: &str, arguments: &Value) -> Value {
        let control = self.daemon.dir.path().join("ctl");
        let start = Instant::now();
        loop {
            match client::call(&control, command, arguments).unwrap() {
                // It sees a moment later that the other program has gone.
                Err(error)
                    if error.message.contains("another program is about to take")
                        && start.elapsed() < Duration::from_secs(5) =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                answer => return answer.unwrap(),
            }
        }
    }

    fn station(&self, name: &str, setup: Setup) -> Station {
        Station::new(&self.daemon.dir.path().join(name), setup)
    }
}

impl Station {
    fn new(socket: &Path, setup: Setup) -> Self {
        let setup = Setup {
            queues: 3,
            size: 256,
            ..setup
        };
        let mut front = FrontEnd::new(socket, setup);
        for _ in 0..250 {
            let buffer = front.guest.alloc(2048, 64);
            let FrontEnd { queues, guest, .. } = &mut front;
            queues[0].submit(guest, &[], &[Segment::new(buffer, 2048)], buffer.0);
        }
        Self {
            place: front.guest.alloc(256 * 128, 4096).0,
            front,
            sent: 0,
            returned: 0,
            received: 0,
        }
    }

    /// Sends frames with numbers to the other station.
    fn send(&mut self, to: u8, from: u8, count: u32) {
        let FrontEnd { queues, guest, .. } = &mut self.front;
        for _ in 0..count {
            let mut packet = vec![0; HEADER];
            packet.extend([2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5]);
            packet.extend(self.sent.to_be_bytes());
            packet.resize(HEADER + 60, 0);
            let at = GuestAddress(self.place + u64::from(self.sent % 256) * 128);
            guest.memory.write_slice(&packet, at).unwrap();
            let segment = Segment::new(at, packet.len() as u32);
            queues[1].submit(guest, &[segment], &[], self.sent.into());
            self.sent += 1;
        }
    }

    /// Takes what has come, which is to be what the other one has sent, in order.
    fn take(&mut self) {
        let FrontEnd { queues, guest, .. } = &mut self.front;
        loop {
            let mut session = queues[1].ring.session(&guest.memory).unwrap();
            let Some((number, _)) = session.poll_used().unwrap() else {
                break;
            };
            assert_eq!(number, u64::from(self.returned));
            self.returned += 1;
        }
        loop {
            let mut session = queues[0].ring.session(&guest.memory).unwrap();
            let Some((buffer, len)) = session.poll_used().unwrap() else {
                break;
            };
            let frame = guest.read(GuestAddress(buffer), len as usize);
            let found = frame[HEADER + 14..HEADER + 18].try_into().unwrap();
            assert_eq!(u32::from_be_bytes(found), self.received);
            self.received += 1;
            queues[0].submit(
                guest,
                &[],
                &[Segment::new(GuestAddress(buffer), 2048)],
                buffer,
            );
        }
    }
}

/// Frames go both ways all the time, also while one program takes the place of another. All come, once, and in order.
fn exchange(a: &mut Station, b: &mut Station) {
    let (of_a, of_b) = (a.received, b.received);
    for (station, other, to, from) in [(&mut *a, of_b, 2, 1), (&mut *b, of_a, 1, 2)] {
        // No more under way than the other one has buffers for.
        if station.sent - station.returned < 64 && station.sent - other < 64 {
            station.send(to, from, 8);
        }
    }
    a.take();
    b.take();
}

fn finish(a: &mut Station, b: &mut Station) {
    let start = Instant::now();
    while (a.received, b.received, a.returned, b.returned) != (b.sent, a.sent, a.sent, b.sent) {
        assert!(start.elapsed() < PATIENCE, "{} of {}", b.received, a.sent);
        a.take();
        b.take();
    }
}

fn switch_goes_on(setup: Setup, upgrades: usize) {
    let mut switch = Switch::start(&["--uplink", "null,name=up"]);
    let (mut a, mut b) = (switch.station("a", setup), switch.station("b", setup));
    let limits = json!({ "port": "a", "limits": { "rx-packets": 1_000_000 } });
    switch.ask("port-limits", &limits);
    for _ in 0..upgrades {
        for _ in 0..20 {
            exchange(&mut a, &mut b);
        }
        switch.upgrade(|| exchange(&mut a, &mut b));
        exchange(&mut a, &mut b);
    }
    finish(&mut a, &mut b);
    assert!(a.sent > 1000 && b.sent > 1000, "{} {}", a.sent, b.sent);
    let stats = switch.ask("stats", &Value::Null);
    for (port, station) in stats["ports"].as_array().unwrap().iter().zip([&a, &b]) {
        assert_eq!(port["tx-packets"], station.sent);
        assert_eq!(port["rx-packets"], station.received);
        assert_eq!(port["rx-starved"], 0);
    }
    let status = switch.ask("port-status", &json!({ "port": "a" }));
    assert_eq!(status["limits"]["rx-packets"], 1_000_000);
    let addresses = switch.ask("addresses", &Value::Null);
    assert_eq!(addresses["addresses"].as_array().unwrap().len(), 2);
    let log = switch.daemon.log();
    assert!(!log.contains("ERROR"), "{log}");
    // A front-end that comes later is met as before.
    let Station {
        sent,
        returned,
        received,
        ..
    } = b;
    drop(b);
    let mut b = Station {
        sent,
        returned,
        received,
        ..switch.station("b", setup)
    };
    exchange(&mut a, &mut b);
    finish(&mut a, &mut b);
    switch.daemon.stop();
}

#[test]
fn a_switch_goes_on() {
    for setup in Setup::default().formats() {
        switch_goes_on(setup, UPGRADES / 4);
    }
}

/// What passes between guests while a program is about to take over, and does not, passes all the same.
#[test]
fn a_switch_that_is_not_taken_over_goes_on() {
    let mut switch = Switch::start(&["--uplink", "null,name=up"]);
    let setup = Setup::default();
    let (mut a, mut b) = (switch.station("a", setup), switch.station("b", setup));
    let control = switch.daemon.dir.path().join("ctl");
    break_off(&control, 2, || exchange(&mut a, &mut b));
    finish(&mut a, &mut b);
    let options = switch.options.clone();
    for (more, why) in [
        (["--ageing", "7"], "ageing"),
        (["--uplink", "null,name=more"], "uplinks"),
        (["--packed", "off"], "features"),
    ] {
        let mut command = Command::new(NET);
        command.args(&options).args(more);
        let log = loop {
            let mut child = switch.daemon.successor_by(&mut command);
            while child.try_wait().unwrap().is_none() {
                exchange(&mut a, &mut b);
            }
            let log = switch.daemon.log();
            // It sees a moment later that the one before has gone.
            if !log.contains("another program is about to take") {
                break log;
            }
        };
        assert!(log.contains(why), "{why}: {log}");
    }
    // One device is no switch.
    let mut child = switch.daemon.successor(NET, &["--link", "null"]);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(switch.daemon.log().contains("to serve Ports"));
    // Ports that came later go over as well, and those that went do not come back.
    let dir = switch.daemon.dir.path().to_owned();
    let port = |name: &str| json!({ "socket": dir.join(name), "name": name });
    switch.ask("port-add", &port("c"));
    switch.ask("port-add", &port("d"));
    switch.ask("port-remove", &json!({ "port": "c" }));
    switch.upgrade(|| exchange(&mut a, &mut b));
    let list = switch.ask("port-list", &Value::Null);
    let names: Vec<_> = list["ports"].as_array().unwrap().iter().collect();
    let names: Vec<_> = names.iter().map(|port| &port["name"]).collect();
    assert_eq!(names, ["a", "b", "d", "up"]);
    drop(switch.station("d", setup));
    exchange(&mut a, &mut b);
    finish(&mut a, &mut b);
    switch.daemon.stop();
}

/// What this test is to a card, in the place of a passt, of which no frame may be lost, cut or sent twice.
struct Peer {
    stream: UnixStream,
    sent: u32,
    received: u32,
    unread: Vec<u8>,
}

impl Peer {
    fn exchange(&mut self, station: &mut Station) {
        if station.sent - self.received < 64 {
            station.send(2, 1, 8);
        }
        if self.sent - station.received < 64 {
            let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
            frame.extend(self.sent.to_be_bytes());
            frame.resize(60, 0);
            let len = frame.len() as u32;
            self.stream.write_all(&len.to_be_bytes()).unwrap();
            self.stream.write_all(&frame).unwrap();
            self.sent += 1;
        }
        self.take();
        station.take();
    }

    fn take(&mut self) {
        let mut piece = [0; 4096];
        self.stream.set_nonblocking(true).unwrap();
        while let Ok(count) = self.stream.read(&mut piece) {
            assert!(count > 0, "the connection is gone");
            self.unread.extend(&piece[..count]);
        }
        self.stream.set_nonblocking(false).unwrap();
        while self.unread.len() >= 64 {
            let frame: Vec<u8> = self.unread.drain(..64).collect();
            assert_eq!(frame[..4], [0, 0, 0, 60]);
            let found = frame[18..22].try_into().unwrap();
            assert_eq!(u32::from_be_bytes(found), self.received);
            self.received += 1;
        }
    }
}

#[test]
fn a_network_card_on_passt_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("passt");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let link = format!("passt:{}", path.display());
    let args = ["--link", &link, "--mac", "02:00:00:00:00:01"];
    let mut daemon = Daemon::start_controlled(NET, &args);
    let control = daemon.dir.path().join("ctl");
    let limits = |changes: Value| client::call(&control, "limits", &changes).unwrap();
    limits(json!({ "tx-packets": 1_000_000 })).unwrap();
    let mut peer = Peer {
        stream: listener.accept().unwrap().0,
        sent: 0,
        received: 0,
        unread: Vec::new(),
    };
    let mut station = Station::new(&daemon.socket(), Setup::default());
    for _ in 0..UPGRADES / 4 {
        let child = daemon.successor(NET, &args);
        daemon.upgraded(child, || peer.exchange(&mut station));
        peer.exchange(&mut station);
    }
    let start = Instant::now();
    while (station.received, peer.received) != (peer.sent, station.sent) {
        assert!(start.elapsed() < PATIENCE);
        peer.take();
        station.take();
    }
    assert!(station.received > 100 && peer.received > 100);
    // Limits go with the card.
    assert_eq!(limits(json!({})).unwrap()["tx-packets"], 1_000_000);
    // It is the same connection.
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    daemon.stop();
}

/// A program that has no front-end is replaced as well, and one that was drained is not.
#[test]
fn an_idle_program_is_replaced() {
    let args = ["--null", "1G", "--queues", "2"];
    // A program may offer more than the one before, and not less.
    let less = [&args[..], &["--packed", "off"]].concat();
    let mut daemon = Daemon::start_controlled(BLK, &less);
    daemon.upgrade(BLK, &args);
    let control = daemon.dir.path().join("ctl");
    let call = |command: &str| client::call(&control, command, &Value::Null).unwrap();
    for _ in 0..3 {
        daemon.upgrade(BLK, &args);
        FrontEnd::new(&daemon.socket(), two_queues(true)).works(1);
    }
    call("drain").unwrap();
    let mut child = daemon.successor(BLK, &args);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(daemon.log().contains("drained"), "{}", daemon.log());
    call("resume").unwrap();
    daemon.upgrade(BLK, &args);
    daemon.stop();
}

const HEADER: usize = 12;
const GUEST: [u8; 4] = [10, 9, 0, 2];
const HOST: [u8; 4] = [10, 9, 0, 1];
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 5];
const PORT: u16 = 4000;
/// Frames of each direction at each upgrade: less than wait in a TAP interface.
const FRAMES: u32 = 100;

/// A datagram from the guest with a number in it.
fn datagram(number: u32) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend(GUEST);
    ip.extend(HOST);
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0; HEADER];
    packet.extend([0xff; 6]);
    packet.extend(MAC);
    packet.extend([8, 0]);
    packet.extend(ip);
    for half in [5000, PORT, 12, 0] {
        packet.extend(half.to_be_bytes());
    }
    packet.extend(number.to_be_bytes());
    packet
}

/// The number in a frame, if it is a datagram of the host's.
fn number(packet: &[u8]) -> Option<u32> {
    let frame = packet.get(HEADER..)?;
    let is_ours = frame.get(12..14)? == [8, 0] && frame.get(36..38)? == PORT.to_be_bytes();
    let number = frame.get(42..46)?.try_into().ok()?;
    is_ours.then(|| u32::from_be_bytes(number))
}

const TAP: [&str; 4] = ["--tap", "ring0", "--tap-ip", "10.9.0.1/24"];

/// Frames go both ways all the time. All come, once, and in order.
fn frames_go_on(link: &[&str], setup: Setup, upgrades: usize, pairs: u16) {
    let count = pairs.to_string();
    let card = ["--mac", "52:54:00:00:00:05", "--queue-pairs", &count];
    let args = [link, &card].concat();
    let mut daemon = Daemon::start_controlled(NET, &args);
    let setup = Setup {
        queues: usize::from(pairs) * 2 + 1,
        size: 256,
        ..setup
    };
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    let control = usize::from(pairs) * 2;
    if pairs > 1 {
        // VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (VIRTIO 1.3, 5.1.6.5.5).
        let [low, high] = pairs.to_le_bytes();
        let at = front.guest.alloc(5, 64);
        front
            .guest
            .memory
            .write_slice(&[4, 0, low, high], at)
            .unwrap();
        let ack = [Segment::new(GuestAddress(at.0 + 4), 1)];
        let FrontEnd { queues, guest, .. } = &mut front;
        queues[control].submit(guest, &[Segment::new(at, 4)], &ack, 0);
        front.complete(control);
        assert_eq!(front.guest.read(GuestAddress(at.0 + 4), 1), [0]);
    }
    let socket = UdpSocket::bind(("10.9.0.1", PORT)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let transmit: Vec<_> = (0..FRAMES).map(|_| front.guest.alloc(64, 64)).collect();
    // The kernel has a queue for each flow.
    let flows: Vec<_> = (0..16)
        .map(|_| {
            let flow = UdpSocket::bind(("10.9.0.1", 0)).unwrap();
            flow.set_broadcast(true).unwrap();
            flow
        })
        .collect();
    let used = if pairs > 1 { flows.len() } else { 1 };
    let (mut sent, mut expected) = (0, 0);
    let mut by_pair = vec![0; pairs.into()];
    for upgrade in 0..upgrades {
        let flows: Vec<_> = flows
            .iter()
            .take(used)
            .map(|flow| flow.try_clone().unwrap())
            .collect();
        let host = thread::spawn(move || {
            for (number, flow) in (expected..expected + FRAMES).zip(flows.iter().cycle()) {
                let to = ("10.9.0.255", PORT);
                flow.send_to(&number.to_be_bytes(), to).unwrap();
                thread::sleep(Duration::from_micros(100));
            }
        });
        for (number, at) in (sent..).zip(&transmit) {
            let packet = datagram(number);
            front.guest.memory.write_slice(&packet, *at).unwrap();
            let segment = Segment::new(*at, packet.len() as u32);
            let FrontEnd { queues, guest, .. } = &mut front;
            queues[1].submit(guest, &[segment], &[], number.into());
        }
        if upgrade > 0 {
            daemon.upgrade(NET, &args);
            host.join().unwrap();
        } else {
            // The guest has no buffers yet: all frames wait in the interface, whoever serves it.
            host.join().unwrap();
            daemon.upgrade(NET, &args);
            for pair in 0..usize::from(pairs) {
                for _ in 0..128 {
                    let buffer = front.guest.alloc(2048, 64);
                    let FrontEnd { queues, guest, .. } = &mut front;
                    queues[2 * pair].submit(guest, &[], &[Segment::new(buffer, 2048)], buffer.0);
                }
            }
        }
        for number in sent..sent + FRAMES {
            assert_eq!(front.complete(1), (number.into(), 0));
        }
        let mut payload = [0; 4];
        let mut wanted = sent..sent + FRAMES;
        while !wanted.is_empty() {
            let (len, from) = socket.recv_from(&mut payload).unwrap();
            // Its own broadcasts are not for it.
            if from.ip() == std::net::Ipv4Addr::from(GUEST) {
                assert_eq!((len, Some(u32::from_be_bytes(payload))), (4, wanted.next()));
            }
        }
        sent += FRAMES;
        let (start, mut found) = (Instant::now(), Vec::new());
        while found.len() < FRAMES as usize {
            let done = (0..usize::from(pairs)).find_map(|pair| {
                let FrontEnd { queues, guest, .. } = &mut front;
                let mut session = queues[2 * pair].ring.session(&guest.memory).unwrap();
                let (buffer, len) = session.poll_used().unwrap()?;
                Some((pair, buffer, len))
            });
            let Some((pair, buffer, len)) = done else {
                assert!(start.elapsed() < PATIENCE, "{} came", found.len());
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            let packet = front.guest.read(GuestAddress(buffer), len as usize);
            if let Some(number) = number(&packet) {
                found.push(number);
                by_pair[pair] += 1;
            }
            let segment = [Segment::new(GuestAddress(buffer), 2048)];
            let FrontEnd { queues, guest, .. } = &mut front;
            queues[2 * pair].submit(guest, &[], &segment, buffer);
        }
        if pairs > 1 {
            // Of two queues, none is before the other.
            found.sort_unstable();
        }
        assert!(found.into_iter().eq(expected..expected + FRAMES));
        expected += FRAMES;
    }
    assert!(by_pair.iter().all(|&frames| frames > 0), "{by_pair:?}");
    assert!(!daemon.log().contains("ERROR"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn a_network_card_goes_on() {
    if own_network("a_network_card_goes_on") {
        for setup in Setup::default().formats() {
            frames_go_on(&TAP, setup, UPGRADES / 4, 1);
        }
    }
}

#[test]
fn a_network_card_with_two_queue_pairs_goes_on() {
    if own_network("a_network_card_with_two_queue_pairs_goes_on") {
        frames_go_on(&TAP, Setup::default(), UPGRADES / 4, 2);
    }
}

#[test]
fn a_network_card_on_a_packet_socket_goes_on() {
    let test = "a_network_card_on_a_packet_socket_goes_on";
    if !own_network(test) {
        return;
    }
    for command in [
        "link add p0 type veth peer name p1",
        "address add 10.9.0.1/24 dev p1",
        "link set p0 up",
        "link set p1 up",
    ] {
        let done = Command::new("ip").args(command.split(' ')).status();
        if !done.is_ok_and(|status| status.success()) {
            return skip(test, format_args!("ip {command}"));
        }
    }
    frames_go_on(&["--link", "packet:p0"], Setup::default(), UPGRADES / 4, 1);
}
