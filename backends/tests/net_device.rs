//! `ringside-net` as a process, met over its socket by a front-end with a driver. The host behind its TAP answers
//! ARP requests, so that each test needs nothing but a network namespace of its own.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use frontend::{Daemon, FrontEnd, Setup, own_network, readable, without_rights};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::net::if_::if_nametoindex;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringside_backends::net::Tap;
use ringside_rings::Segment;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use virtio_bindings::virtio_net::VIRTIO_NET_F_SPEED_DUPLEX;
use vm_memory::Bytes;

const NET: &str = env!("CARGO_BIN_EXE_ringside-net");

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 5];
const MAC_TEXT: &str = "52:54:00:00:00:05";
const HOST_IP: [u8; 4] = [10, 9, 0, 1];
const GUEST_IP: [u8; 4] = [10, 9, 0, 2];
const HEADER: usize = 12;
const RX: usize = 0;
const TX: usize = 1;
/// Answers to control commands (VIRTIO 1.3, 5.1.6.5).
const OK: u8 = 0;
const ERR: u8 = 1;

fn serve(args: &[&str]) -> Daemon {
    let fixed = ["--mac", MAC_TEXT, "--tap-ip", "10.9.0.1/24"];
    Daemon::start(NET, &[&fixed, args].concat())
}

fn connect(daemon: &Daemon, queues: usize) -> FrontEnd {
    connect_as(daemon, queues, Setup::default())
}

fn connect_as(daemon: &Daemon, queues: usize, setup: Setup) -> FrontEnd {
    FrontEnd::new(&daemon.socket(), Setup { queues, ..setup })
}

/// Posts receive buffers.
fn post(front: &mut FrontEnd, count: u64) {
    for _ in 0..count {
        let buffer = front.guest.alloc(2048, 64);
        let FrontEnd { queues, guest, .. } = front;
        queues[RX].submit(guest, &[], &[Segment::new(buffer, 2048)], buffer.0);
    }
}

/// "Who has the host's address?"
fn arp_request() -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend([0xff; 6]);
    packet.extend(MAC);
    packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet.extend(MAC);
    packet.extend(GUEST_IP);
    packet.extend([0; 6]);
    packet.extend(HOST_IP);
    packet
}

fn send(front: &mut FrontEnd, queue: usize, packet: &[u8]) {
    let at = front.guest.alloc(packet.len() as u64, 64);
    front.guest.memory.write_slice(packet, at).unwrap();
    let segment = Segment::new(at, packet.len() as u32);
    let FrontEnd { queues, guest, .. } = front;
    queues[queue].submit(guest, &[segment], &[], at.0);
    assert_eq!(front.complete(queue), (at.0, 0));
}

/// Receives packets until the host's answer comes, and returns how many came. Each must fit one buffer.
fn receive_arp_reply(front: &mut FrontEnd) -> u16 {
    for count in 1..=60 {
        let (buffer, len) = front.complete(RX);
        let packet = front
            .guest
            .read(vm_memory::GuestAddress(buffer), len as usize);
        assert_eq!(packet[10..12], [1, 0], "number of buffers");
        let frame = &packet[HEADER..];
        if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
            assert_eq!(frame[..6], MAC);
            assert_eq!(frame[28..32], HOST_IP);
            return count;
        }
    }
    panic!("no ARP reply among 60 packets");
}

fn ask_host(front: &mut FrontEnd) -> u16 {
    send(front, TX, &arp_request());
    receive_arp_reply(front)
}

#[test]
fn the_host_answers_and_rings_come_back() {
    if !own_network("the_host_answers_and_rings_come_back") {
        return;
    }
    for setup in Setup::default().formats() {
        let daemon = serve(&["--tap", "ring0"]);
        let mut front = connect_as(&daemon, 2, setup);
        post(&mut front, 32);
        let mut received = ask_host(&mut front);
        // No buffer is lost when the ring is taken back in between.
        for _ in 0..3 {
            let base = front.messages.get_vring_base(RX).unwrap();
            assert!(base - front.fresh() >= received.into());
            front.start(RX, base);
            received += ask_host(&mut front);
        }
        daemon.assert_idle();
        daemon.stop();
        assert!(if_nametoindex("ring0").is_err(), "the TAP stays");
    }
}

#[test]
fn queues_that_no_driver_uses_do_no_harm() {
    if !own_network("queues_that_no_driver_uses_do_no_harm") {
        return;
    }
    const MQ: u64 = 1 << 22;
    const CTRL_VQ: u64 = 1 << 17;
    let daemon = serve(&["--tap", "ring0", "--queue-pairs", "2"]);
    for without in [MQ, CTRL_VQ, MQ | CTRL_VQ, 0] {
        let setup = Setup {
            queues: 5,
            without,
            ..Setup::default()
        };
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        for queue in 0..5 {
            front.messages.get_vring_base(queue).unwrap();
            front.start(queue, 0);
        }
    }
    let mut front = connect(&daemon, 2);
    post(&mut front, 32);
    ask_host(&mut front);
    assert!(!daemon.log().contains("ERROR"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn an_interface_that_is_down_is_named_as_the_reason() {
    if !own_network("an_interface_that_is_down_is_named_as_the_reason") {
        return;
    }
    let daemon = Daemon::start(NET, &["--tap", "ring0"]);
    let mut front = connect(&daemon, 2);
    send(&mut front, TX, &arp_request());
    assert!(daemon.log().contains("--tap-up"), "{}", daemon.log());
    daemon.stop();
}

/// A guest that takes nothing while more comes for it than its TAP holds gets what the TAP held, and all that comes afterwards.
#[test]
fn a_full_tap_holds_nothing_up() {
    if !own_network("a_full_tap_holds_nothing_up") {
        return;
    }
    let daemon = serve(&["--tap", "ring0"]);
    let mut front = connect(&daemon, 2);
    let guest = std::net::Ipv4Addr::from(GUEST_IP);
    let neighbour = format!("neigh add {guest} lladdr {MAC_TEXT} dev ring0");
    let status = Command::new("ip")
        .args(neighbour.split_whitespace())
        .status();
    assert!(status.unwrap().success());
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let dropped = || -> u64 {
        let path = "/proc/thread-self/net/dev";
        let table = std::fs::read_to_string(path).unwrap();
        let line = table.lines().find(|line| line.contains("ring0:")).unwrap();
        let counters = line.split_once(':').unwrap().1;
        counters
            .split_whitespace()
            .nth(11)
            .unwrap()
            .parse()
            .unwrap()
    };
    let start = Instant::now();
    while dropped() < 1000 {
        assert!(start.elapsed() < frontend::PATIENCE, "the TAP is not full");
        for _ in 0..100 {
            // It may be refused, once all of the socket's memory is in the TAP's queue.
            let _ = socket.send_to(&[0; 1000], (guest, 9));
        }
    }
    daemon.assert_idle();
    // The other direction works all the time.
    send(&mut front, TX, &arp_request());
    let mut received = 0;
    while received < 100 {
        post(&mut front, 32);
        for _ in 0..32 {
            front.complete(RX);
            received += 1;
        }
    }
    daemon.stop();
}

#[test]
fn one_front_end_after_the_other_is_served() {
    if !own_network("one_front_end_after_the_other_is_served") {
        return;
    }
    let daemon = serve(&["--tap", "ring0"]);
    for _ in 0..3 {
        let mut front = connect(&daemon, 2);
        post(&mut front, 32);
        ask_host(&mut front);
    }
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn the_configuration_is_as_asked_for() {
    if !own_network("the_configuration_is_as_asked_for") {
        return;
    }
    let daemon = serve(&["--tap", "ring0", "--queue-pairs", "3", "--mtu", "9000"]);
    let mut front = connect(&daemon, 0);
    assert_eq!(front.messages.get_queue_num().unwrap(), 7);
    let (_, config) = front
        .messages
        .get_config(0, 12, VhostUserConfigFlags::empty(), &[0; 12])
        .unwrap();
    let expected = [&MAC[..], &[1, 0], &[3, 0], &9000_u16.to_le_bytes()].concat();
    assert_eq!(config, expected);
    daemon.stop();
}

/// Speed and duplex of a card's configuration, and whether they are offered (VIRTIO 1.3, 5.1.4).
fn speed(front: &mut FrontEnd) -> (bool, Vec<u8>) {
    let flags = VhostUserConfigFlags::empty();
    let config = front.messages.get_config(12, 5, flags, &[0; 5]).unwrap().1;
    let offered = front.features >> VIRTIO_NET_F_SPEED_DUPLEX & 1 != 0;
    (offered, config)
}

#[test]
fn a_card_is_as_fast_as_it_was_told() {
    let daemon = Daemon::start(NET, &["--link", "null", "--speed", "25000"]);
    let of_card = speed(&mut connect(&daemon, 2));
    // 25000 Mbit/s, full duplex.
    assert_eq!(of_card, (true, vec![0xa8, 0x61, 0, 0, 1]));
    daemon.stop();
    let daemon = Daemon::start(NET, &["--link", "null"]);
    let of_card = speed(&mut connect(&daemon, 2));
    assert_eq!(of_card, (false, vec![0; 5]));
    daemon.stop();
}

#[test]
fn the_control_queue_is_obeyed() {
    if !own_network("the_control_queue_is_obeyed") {
        return;
    }
    let daemon = serve(&["--tap", "ring0", "--queue-pairs", "2"]);
    let mut front = connect(&daemon, 5);
    post(&mut front, 32);
    const CONTROL: usize = 4;
    // Not promiscuous: the host's answer is for our address.
    assert_eq!(front.command(CONTROL, &[0, 0, 0]), OK);
    ask_host(&mut front);
    assert_eq!(front.command(CONTROL, &[4, 0, 2, 0]), OK);
    assert_eq!(front.command(CONTROL, &[4, 0, 3, 0]), ERR);
    assert_eq!(front.command(CONTROL, &[77, 0, 3, 0]), ERR);
    assert_eq!(front.command(CONTROL, &[4, 0, 1, 0]), OK);
    ask_host(&mut front);
    let new = [0x52, 0x54, 0, 0, 0, 6];
    assert_eq!(front.command(CONTROL, &[&[1, 1][..], &new].concat()), OK);
    let mut mac = || {
        let flags = VhostUserConfigFlags::empty();
        front.messages.get_config(0, 6, flags, &[0; 6]).unwrap().1
    };
    assert_eq!(mac(), new);
    daemon.stop();
}

#[test]
fn a_guest_that_has_moved_is_made_known_to_the_network() {
    if !own_network("a_guest_that_has_moved_is_made_known_to_the_network") {
        return;
    }
    const SEND_RARP: u32 = 19;
    const NEED_REPLY: u32 = 1 << 3;
    let daemon = serve(&["--tap", "ring0"]);
    for setup in [
        Setup::default(),
        Setup {
            without: 1 << 15,
            ..Setup::default()
        },
    ] {
        let mut front = connect_as(&daemon, 2, setup);
        // Bytes and packets that the host got.
        let received = || -> [u64; 2] {
            let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = devices
                .lines()
                .find_map(|l| l.trim().strip_prefix("ring0:"));
            let mut numbers = line.unwrap().split_whitespace();
            [(); 2].map(|()| numbers.next().unwrap().parse().unwrap())
        };
        let before = received();
        front
            .raw
            .send(SEND_RARP, NEED_REPLY, &[&MAC[..], &[0; 2]].concat());
        assert_eq!(front.raw.reply(), (SEND_RARP, 0));
        let start = std::time::Instant::now();
        while received()[1] == before[1] {
            assert!(start.elapsed() < frontend::PATIENCE, "nothing comes");
            std::thread::sleep(Duration::from_millis(5));
        }
        let [bytes, packets] = received();
        // The Ethernet header may be counted or not.
        assert!((46..=60).contains(&(bytes - before[0])));
        assert_eq!(packets - before[1], 1);
    }
    daemon.stop();
}

/// The status field, and whether the back-end says that the configuration changed.
fn told(front: &mut FrontEnd, channel: &UnixStream) -> (bool, u8) {
    let told = readable(channel.as_raw_fd(), Duration::from_millis(200));
    let flags = VhostUserConfigFlags::empty();
    let status = front.messages.get_config(6, 2, flags, &[0; 2]).unwrap().1;
    (told, status[0])
}

#[test]
fn a_guest_that_goes_on_is_asked_to_announce_itself() {
    if !own_network("a_guest_that_goes_on_is_asked_to_announce_itself") {
        return;
    }
    const CONTROL: usize = 2;
    const LINK_UP: u8 = 1;
    const ANNOUNCE: u8 = 2;
    for setup in Setup::default().formats() {
        let daemon = serve(&["--tap", "ring0"]);
        let mut front = connect_as(&daemon, 3, setup);
        let connect_channel = |front: &mut FrontEnd| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            front.messages.set_backend_request_fd(&theirs).unwrap();
            ours
        };
        let channel = connect_channel(&mut front);
        post(&mut front, 32);
        ask_host(&mut front);
        // Nothing to announce while the connection lasts, whatever happens to the rings.
        let base = front.messages.get_vring_base(TX).unwrap();
        assert_ne!(base, front.fresh());
        front.start(TX, base);
        assert_eq!(told(&mut front, &channel), (false, LINK_UP));

        let bases = front.reconnect(&daemon.socket());
        let mut channel = connect_channel(&mut front);
        for (index, base) in bases.into_iter().enumerate() {
            front.start(index, base);
        }
        assert_eq!(told(&mut front, &channel), (true, LINK_UP | ANNOUNCE));
        let mut message = [0; 12];
        channel.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(front.command(CONTROL, &[3, 0]), OK);
        assert_eq!(told(&mut front, &channel), (false, LINK_UP));
        ask_host(&mut front);

        // A front-end without a channel cannot pass it on.
        let bases = front.reconnect(&daemon.socket());
        for (index, base) in bases.into_iter().enumerate() {
            front.start(index, base);
        }
        assert_eq!(told(&mut front, &channel).1, LINK_UP);
        ask_host(&mut front);
        daemon.stop();
    }
}

#[test]
fn inherited_queues_are_served() {
    if !own_network("inherited_queues_are_served") {
        return;
    }
    let (tap, queues) = Tap::open("ring0", 2).unwrap();
    let numbers: Vec<String> = queues
        .iter()
        .map(|queue| {
            fcntl(queue.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
            queue.as_fd().as_raw_fd().to_string()
        })
        .collect();
    let daemon = serve(&["--tap-fd", &numbers.join(",")]);
    drop((tap, queues));
    let mut front = connect(&daemon, 2);
    assert_eq!(front.messages.get_queue_num().unwrap(), 5);
    post(&mut front, 32);
    ask_host(&mut front);
    daemon.stop();
}

#[test]
fn command_lines_that_cannot_be_served_end_with_a_reason() {
    let outcome = |args: &[&str]| Daemon::spawn(NET, args).outcome();
    let (code, log) = outcome(&["--tap", "a-name-that-is-too-long"]);
    assert_eq!(code, Some(2));
    assert!(log.contains("1 to 15 bytes"), "{log}");
    let (code, log) = outcome(&["--tap", "ring0", "--offload", "tso"]);
    assert_eq!(code, Some(2));
    assert!(log.contains("need csum"), "{log}");
    let (code, log) = outcome(&["--tap-fd", "0"]);
    assert_eq!(code, Some(1));
    assert!(log.contains("no open TAP queue"), "{log}");
    assert_eq!(outcome(&[]).0, Some(2));
    let (code, log) = outcome(&["--link", "veth:x"]);
    assert_eq!(code, Some(2));
    assert!(log.contains("no link of kind \"veth\""), "{log}");
    let (code, log) = outcome(&["--link", "null", "--tap-up"]);
    assert_eq!(code, Some(2));
    assert!(log.contains("--tap-up is for a TAP"), "{log}");
    let (code, log) = outcome(&["--link", "passt:/x", "--forward", "tcp:80"]);
    assert_eq!(code, Some(2));
    assert!(
        log.contains("--forward is for a passt that this program starts"),
        "{log}"
    );
    let (code, log) = outcome(&["--link", "passt", "--queue-pairs", "2"]);
    assert_eq!(code, Some(2));
    assert!(log.contains("serves one queue pair"), "{log}");
    let (code, log) = outcome(&["--link", "passt:/nowhere/passt.sock"]);
    assert_eq!(code, Some(1));
    assert!(log.contains("passt --socket /nowhere/passt.sock"), "{log}");
    let (code, log) = outcome(&["--link", "null", "--pcap", "/nowhere/all.pcap"]);
    assert_eq!(code, Some(1));
    assert!(log.contains("capture file /nowhere/all.pcap"), "{log}");
}

#[test]
fn an_interface_is_served_by_af_xdp_and_the_log_says_in_which_mode() {
    let test = "an_interface_is_served_by_af_xdp_and_the_log_says_in_which_mode";
    if !own_network(test) {
        return;
    }
    for line in [
        "link add ring0 type veth peer name ring1",
        "link set ring0 up",
        "link set ring1 up",
    ] {
        let made = Command::new("ip").args(line.split(' ')).status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("test {test}: skipped: ip {line} failed");
            return;
        }
    }
    let daemon = Daemon::start(NET, &["--mac", MAC_TEXT, "--link", "xdp:ring0"]);
    let front = connect(&daemon, 2);
    // Copies: virtual Ethernet has no other mode.
    assert!(
        daemon.log().contains("AF_XDP in copy mode"),
        "{}",
        daemon.log()
    );
    drop(front);
    daemon.stop();
    let (code, log) =
        Daemon::spawn(NET, &["--link", "xdp:ring0", "--queue-pairs", "200"]).outcome();
    assert_eq!(code, Some(1));
    assert!(log.contains("has no queue"), "{log}");
}

/// Puts a program called passt, made of this script, alone into a directory.
fn fake_passt(script: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("passt");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

#[test]
fn a_passt_that_does_not_start_is_a_reason_to_end() {
    let outcome = |directory: &tempfile::TempDir| {
        let mut command = Command::new(NET);
        command
            .env("PATH", directory.path())
            .args(["--socket-path", "/nowhere/net.sock", "--link", "passt"])
            .args(["--passt-arg=--no-such-option", "--forward=tcp:8080:80"]);
        let output = command.output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), log)
    };
    let (code, log) = outcome(&tempfile::tempdir().unwrap());
    assert_eq!(code, Some(1));
    assert!(log.contains("cannot start passt: install it"), "{log}");
    // It has our arguments, and what it says is seen.
    let (code, log) = outcome(&fake_passt("echo \"not with $*\" >&2; exit 3"));
    assert_eq!(code, Some(1));
    assert!(
        log.contains("passt ended at once (exit status: 3)"),
        "{log}"
    );
    assert!(
        log.contains("not with --foreground --quiet --fd 0 --tcp-ports 8080:80 --no-such-option"),
        "{log}"
    );
}

/// The program is confined; it has its passt started by another.
#[test]
fn a_passt_that_was_killed_comes_back() {
    let passt = fake_passt("echo $$ >> \"${0%/*}/pids\"; exec /bin/sleep 100");
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(NET);
    command
        .env("PATH", passt.path())
        .arg("--socket-path")
        .arg(dir.path().join("s"))
        .args(["--link", "passt"]);
    let daemon = Daemon::spawn_command(&mut command, dir);
    daemon.wait_for_socket();
    // The number of its process, once so many were started.
    let started = |count: usize| {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let pids = std::fs::read_to_string(passt.path().join("pids")).unwrap_or_default();
            if let Some(pid) = pids.split_inclusive('\n').nth(count - 1) {
                break Pid::from_raw(pid.trim().parse().unwrap());
            }
            assert!(Instant::now() < end, "started: {pids}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    kill(started(1), Signal::SIGKILL).unwrap();
    daemon.wait_for_line("passt is back");
    let second = started(2);
    daemon.stop();
    // It ends soon after the program.
    let end = Instant::now() + Duration::from_secs(10);
    while kill(second, None).is_ok() {
        assert!(Instant::now() < end, "it is left");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[allow(unsafe_code, reason = "a child gives up a capability before it runs")]
fn without_the_capability_a_tap_cannot_be_made() {
    let test = "without_the_capability_a_tap_cannot_be_made";
    if !own_network(test) {
        return;
    }
    let mut command = Command::new(NET);
    command.args(["--tap", "ring0", "--queue-pairs", "2"]);
    let give_up = || {
        const CAP_NET_ADMIN: libc::c_ulong = 12;
        // SAFETY: a system call that takes numbers only.
        match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_NET_ADMIN, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes a system call, and allocates nothing.
    unsafe { command.pre_exec(give_up) };
    let Some((code, log)) = without_rights(test, &mut command) else {
        return;
    };
    assert_eq!(code, Some(1), "{log}");
    assert_eq!(
        log,
        "ringside-net: no permission for TAP \"ring0\": run with CAP_NET_ADMIN, or have it made for this user \
         (ip tuntap add dev ring0 mode tap user USER vnet_hdr multi_queue)\n"
    );
}

#[test]
fn another_call_descriptor_is_signalled_at_once() {
    let daemon = Daemon::start(NET, &["--link", "null"]);
    let mut front = connect(&daemon, 2);
    for _ in 0..3 {
        send(&mut front, TX, &arp_request());
        front.call_again(TX);
    }
    daemon.stop();
}

/// Not even for a front-end that says it accepted what was not offered.
#[test]
fn requests_in_flight_of_a_card_are_not_tracked() {
    let daemon = Daemon::start(NET, &["--link", "null"]);
    let mut front = connect(&daemon, 2);
    let accepted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    assert!(front.messages.set_protocol_features(accepted).is_err());
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let area = VhostUserInflight::new(1 << 20, 0, 2, 64);
    let refused = front.messages.set_inflight_fd(&area, file.as_raw_fd());
    assert!(refused.is_err());
    daemon.wait_for_line("INFLIGHT_SHMFD is not offered");
    daemon.stop();
}
