//! The shell of the back-ends, seen from outside through `ringside-blk`: command line, sockets, signals, and front-ends
//! that do not behave.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use frontend::request::{
    GET_FEATURES, GET_PROTOCOL_FEATURES, NEED_REPLY, SET_FEATURES, SET_MEM_TABLE,
    SET_PROTOCOL_FEATURES, SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM,
};
use frontend::{
    Daemon, FrontEnd, Guest, PATIENCE, REGION, Raw, SECOND, Setup, negotiate, still_serves,
};
use nix::sys::signal::Signal;
use ringside_rings::Segment;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NULL: [&str; 2] = ["--null", "1G"];

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    for args in [
        &["--print-capabilities"][..],
        &["--print-capabilities", "--no-such-option", "--fd", "x"],
    ] {
        let output = Command::new(BLK).args(args).output().unwrap();
        assert!(output.status.success());
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["type"], "block");
        assert_eq!(
            json["features"],
            serde_json::json!(["read-only", "blk-file"])
        );
    }
}

#[test]
fn the_discovery_file_describes_the_program() {
    for (name, kind) in [("ringside-blk", "block"), ("ringside-net", "net")] {
        let share = concat!(env!("CARGO_MANIFEST_DIR"), "/share");
        let file = File::open(format!("{share}/50-{name}.json")).unwrap();
        let json: serde_json::Value = serde_json::from_reader(file).unwrap();
        assert_eq!(json["type"], kind);
        assert!(json["binary"].as_str().unwrap().ends_with(name));
        assert!(json["description"].is_string());
    }
}

#[test]
fn help_names_examples_and_exit_statuses() {
    for (program, hangup) in [
        (BLK, "SIGHUP           look at the disk's size again"),
        (
            env!("CARGO_BIN_EXE_ringside-net"),
            "SIGHUP           do nothing",
        ),
    ] {
        let output = Command::new(program).arg("--help").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        for word in [
            "qemu-system-x86_64",
            "cloud-hypervisor",
            "ringside-vmm",
            hangup,
            "Exit status:",
        ] {
            assert!(help.contains(word), "{word}");
        }
        // Commands that are wrapped cannot be copied.
        let (_, examples) = help.split_once("Examples:").unwrap();
        for line in examples.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}

#[test]
fn both_end_signals_end_it_at_once_and_with_success() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        for connected in [false, true] {
            let daemon = Daemon::start(BLK, &NULL);
            let front = connected.then(|| FrontEnd::new(&daemon.socket(), Setup::default()));
            let start = Instant::now();
            daemon.signal(signal);
            let socket = daemon.socket();
            let (code, log) = daemon.outcome();
            assert_eq!(code, Some(0), "{log}");
            assert!(start.elapsed() < Duration::from_secs(1));
            assert!(!socket.exists());
            drop(front);
        }
    }
}

#[test]
fn front_ends_come_and_go() {
    let daemon = Daemon::start(BLK, &NULL);
    for _ in 0..20 {
        still_serves(&daemon);
    }
    daemon.assert_idle();
    daemon.stop();
}

#[test]
fn it_can_end_with_its_front_end() {
    let daemon = Daemon::start(BLK, &[&NULL[..], &["--exit-on-disconnect"]].concat());
    still_serves(&daemon);
    let (code, log) = daemon.outcome();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn stale_sockets_are_replaced_and_others_are_not() {
    let spawn = |dir: tempfile::TempDir| {
        let mut command = Command::new(BLK);
        command
            .args(NULL)
            .arg("--socket-path")
            .arg(dir.path().join("s"));
        Daemon::spawn_command(&mut command, dir)
    };
    let dir = tempfile::tempdir().unwrap();
    drop(UnixListener::bind(dir.path().join("s")).unwrap());
    let daemon = spawn(dir);
    daemon.wait_for_socket();
    daemon.stop();

    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let (code, log) = spawn(dir).outcome();
    assert_eq!(code, Some(1));
    assert!(log.contains("another program listens"), "{log}");
    drop(listener);

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("s"), "text").unwrap();
    let (code, log) = spawn(dir).outcome();
    assert_eq!(code, Some(1));
    assert!(log.contains("is not a socket"), "{log}");
}

/// Starts the program with a descriptor inherited, as number 0.
fn inherit(fd: impl Into<OwnedFd>) -> Daemon {
    let mut command = Command::new(BLK);
    command.args(NULL).args(["--fd", "0"]).stdin(fd.into());
    Daemon::spawn_command(&mut command, tempfile::tempdir().unwrap())
}

#[test]
fn an_inherited_socket_may_listen_or_be_connected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("inherited");
    let listener = UnixListener::bind(&path).unwrap();
    let daemon = inherit(listener);
    daemon.wait_for_socket();
    for _ in 0..2 {
        FrontEnd::new(&path, Setup::default()).works(0);
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.outcome().0, Some(0));
    assert!(path.exists(), "who made the socket file removes it");

    let (ours, theirs) = UnixStream::pair().unwrap();
    let daemon = inherit(theirs);
    daemon.wait_for_socket();
    let mut raw = Raw(ours);
    raw.send(GET_FEATURES, 0, &[]);
    assert_eq!(raw.reply().0, GET_FEATURES);
    drop(raw);
    assert_eq!(daemon.outcome().0, Some(0));

    let file = tempfile::tempfile().unwrap();
    let (code, log) = inherit(file).outcome();
    assert_eq!(code, Some(1));
    assert!(log.contains("not a Unix stream socket"), "{log}");
}

#[test]
fn as_a_client_it_connects_as_soon_as_it_can_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("front");
    let mut command = Command::new(BLK);
    command
        .args(NULL)
        .arg("--client")
        .arg("--socket-path")
        .arg(&path);
    let daemon = Daemon::spawn_command(&mut command, tempfile::tempdir().unwrap());
    sleep(Duration::from_millis(50));
    let listener = UnixListener::bind(&path).unwrap();
    for _ in 0..2 {
        let mut raw = Raw(listener.accept().unwrap().0);
        raw.0.set_read_timeout(Some(PATIENCE)).unwrap();
        raw.send(GET_FEATURES, 0, &[]);
        assert_eq!(raw.reply().0, GET_FEATURES);
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.outcome().0, Some(0));
    assert!(path.exists());
}

#[test]
fn rings_may_be_enabled_before_features_are_accepted() {
    // The order of QEMU's network devices.
    let daemon = Daemon::start(BLK, &[&NULL[..], &["--queues", "2"]].concat());
    let mut raw = Raw::connect(&daemon.socket());
    raw.send(GET_FEATURES, 0, &[]);
    let features = raw.reply().1;
    raw.send(GET_PROTOCOL_FEATURES, 0, &[]);
    let protocol = raw.reply().1;
    raw.send_u64(SET_PROTOCOL_FEATURES, 0, protocol);
    let enable = |index: u64, on: u64| index | (on << 32);
    raw.send_u64(SET_VRING_ENABLE, NEED_REPLY, enable(0, 1));
    assert_eq!(raw.reply(), (SET_VRING_ENABLE, 0));
    raw.send_u64(SET_VRING_ENABLE, 0, enable(1, 1));
    raw.send_u64(SET_VRING_ENABLE, NEED_REPLY, enable(7, 1));
    assert_eq!(raw.reply(), (SET_VRING_ENABLE, 1), "there is no queue 7");
    raw.send_u64(SET_FEATURES, NEED_REPLY, features);
    assert_eq!(raw.reply(), (SET_FEATURES, 0));
    raw.send_u64(SET_VRING_ENABLE, NEED_REPLY, enable(1, 0));
    assert_eq!(raw.reply(), (SET_VRING_ENABLE, 0));
    raw.send_u64(SET_VRING_ENABLE, 0, enable(0, 2));
    assert!(raw.is_closed());
    still_serves(&daemon);
    daemon.stop();
}

#[test]
fn without_protocol_features_an_enable_is_an_error() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut raw = Raw::connect(&daemon.socket());
    raw.send_u64(SET_VRING_ENABLE, 0, 1 << 32);
    assert!(raw.is_closed());
    still_serves(&daemon);
    daemon.stop();
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        // xorshift64
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..300 {
        let mut raw = Raw::connect(&daemon.socket());
        let payload: Vec<u8> = (0..random() % 64).map(|_| random() as u8).collect();
        let request = if round % 3 == 0 {
            random() as u32
        } else {
            (random() % 46) as u32
        };
        let mut message = Vec::new();
        let (flags, size) = match round % 4 {
            0 => (random() as u32, random() as u32),
            1 => (1, payload.len() as u32),
            2 => (9, payload.len() as u32),
            _ => (1, (payload.len() as u32).wrapping_add(4)),
        };
        for word in [request, flags, size] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        // The back-end may hang up before all is sent.
        let _ = raw.0.write_all(&message);
        let _ = raw.0.shutdown(std::net::Shutdown::Write);
    }
    still_serves(&daemon);
    daemon.assert_idle();
    daemon.stop();
}

#[test]
fn a_front_end_that_stops_in_the_middle_of_a_message_is_dropped() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut header = Raw::connect(&daemon.socket());
    header.0.write_all(&[1, 0, 0, 0, 1]).unwrap();
    assert!(header.is_closed());
    let mut payload = Raw::connect(&daemon.socket());
    payload
        .0
        .write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0])
        .unwrap();
    assert!(payload.is_closed());
    still_serves(&daemon);
    // Nor does it hold up the end for long.
    let mut raw = Raw::connect(&daemon.socket());
    raw.0.write_all(&[1]).unwrap();
    daemon.stop();
}

#[test]
fn what_a_queue_cannot_be_is_refused_by_an_answer() {
    let daemon = Daemon::start(BLK, &[&NULL[..], &["--queue-size", "64"]].concat());
    let (messages, _) = negotiate(&daemon.socket(), 0);
    for size in [0, 3, 128, 65535] {
        assert!(messages.set_vring_num(0, size).is_err(), "{size}");
    }
    messages.set_vring_num(0, 64).unwrap();
    assert!(
        messages.set_vring_num(1, 64).is_err(),
        "there is no queue 1"
    );
    assert!(messages.set_features(u64::MAX).is_err());
    // The connection is still there.
    messages.get_features().unwrap();
    drop(messages);
    still_serves(&daemon);
    daemon.stop();
}

/// Many queues need more descriptors than the usual soft limit allows; the hard limit is what counts.
#[test]
fn the_soft_limit_of_open_files_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut shell = Command::new("sh");
    let script = "ulimit -S -n 100; exec \"$0\" --null 1G --queues 200 --socket-path \"$1\"";
    shell.args(["-c", script, BLK]).arg(socket);
    let daemon = Daemon::spawn_command(&mut shell, dir);
    daemon.wait_for_socket();
    still_serves(&daemon);
    daemon.stop();
}

/// Neither messages that are refused nor connections that come and go can fill the log.
#[test]
fn a_front_end_cannot_fill_the_log() {
    let daemon = Daemon::start(BLK, &NULL);
    let (messages, _) = negotiate(&daemon.socket(), 0);
    for _ in 0..500 {
        assert!(messages.set_vring_num(0, 100).is_err());
    }
    drop(messages);
    for _ in 0..200 {
        drop(Raw::connect(&daemon.socket()));
    }
    still_serves(&daemon);
    let log = daemon.log();
    assert!(log.contains("is not a power of two"), "{log}");
    assert!(log.lines().count() < 80, "{log}");
    daemon.stop();
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let daemon = Daemon::start(BLK, &NULL);
    let (mut messages, _) = negotiate(&daemon.socket(), 0);
    let guest = Guest::new();
    let good = guest.regions();
    let mut beyond = good[1];
    beyond.memory_size += 4096;
    let mut unaligned = good[0];
    unaligned.mmap_offset = 12;
    unaligned.memory_size = 4096;
    let mut overlapping = good[1];
    overlapping.guest_phys_addr = 4096;
    for wrong in [
        vec![beyond],
        vec![unaligned],
        vec![good[0], overlapping],
        vec![good[0], good[0]],
    ] {
        assert!(messages.set_mem_table(&wrong).is_err());
    }
    assert!(messages.add_mem_region(&beyond).is_err());
    messages.set_mem_table(&good).unwrap();
    drop(messages);
    still_serves(&daemon);
    daemon.stop();
}

/// A front-end that truncates the file of its guest's memory loses its connection; the next one is served.
#[test]
fn memory_that_is_taken_away_costs_the_connection_only() {
    let daemon = Daemon::start(BLK, &NULL);
    // The requests' memory goes, or the ring's as well. This process must not touch either then.
    for left in [REGION, 0] {
        for _ in 0..2 {
            let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
            front.works(0);
            front.guest.file.set_len(left).unwrap();
            let queue = &mut front.queues[0];
            if left > 0 {
                let torn = |at, len| Segment::new(GuestAddress(SECOND + at), len);
                queue.submit(&front.guest, &[torn(0, 16)], &[torn(8192, 1)], 1);
            }
            queue.kick.write(1).unwrap();
            assert!(front.raw.is_closed(), "{}", daemon.log());
        }
    }
    still_serves(&daemon);
    let log = daemon.log();
    assert_eq!(log.matches("guest memory is gone").count(), 4, "{log}");
    daemon.assert_idle();
    daemon.stop();
}

/// A SIGBUS from elsewhere still ends the process.
#[test]
fn bus_errors_of_other_origin_are_not_hidden() {
    let mut daemon = Daemon::start(BLK, &NULL);
    daemon.signal(Signal::SIGBUS);
    assert_eq!(daemon.wait().signal(), Some(Signal::SIGBUS as i32));
}

#[test]
fn a_ring_outside_memory_does_not_start() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    front.works(0);
    let mut addresses = front.addresses(front.queues[0].ring.layout());
    addresses.desc_table_addr = 0x1000;
    assert!(front.messages.set_vring_addr(0, &addresses).is_err());
    let mut addresses = front.addresses(front.queues[0].ring.layout());
    addresses.used_ring_addr = addresses.desc_table_addr;
    assert!(front.messages.set_vring_addr(0, &addresses).is_err());
    let addresses = front.addresses(front.queues[0].ring.layout());
    front.messages.set_vring_addr(0, &addresses).unwrap();
    front.works(0);
    daemon.stop();
}

#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut raw = Raw::connect(&daemon.socket());
    raw.negotiate();
    let file = tempfile::tempfile().unwrap();
    // A file is always ready: a worker would spin on it.
    raw.send_with_fds(SET_VRING_KICK, &0_u64.to_ne_bytes(), &[file.as_raw_fd()]);
    assert_eq!(raw.reply(), (SET_VRING_KICK, 1));
    // Memory that is a directory.
    let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
    for word in [0_u64, 4096, 0, 0] {
        table.extend(word.to_ne_bytes());
    }
    let directory = File::open("/").unwrap();
    raw.send_with_fds(SET_MEM_TABLE, &table, &[directory.as_raw_fd()]);
    assert_eq!(raw.reply(), (SET_MEM_TABLE, 1));
    // Too many, where none or one belongs.
    let many = vec![file.as_raw_fd(); 20];
    raw.send_with_fds(SET_VRING_NUM, &[0; 8], &many);
    assert!(raw.is_closed());
    still_serves(&daemon);
    daemon.stop();
}

#[test]
fn a_call_descriptor_that_blocks_does_not_hold_the_ring_back() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    front.works(0);
    // The largest value an eventfd can have: one more blocks the writer.
    let call = &front.queues[0].call;
    front.queues[0].settle();
    call.write(u64::MAX - 1).unwrap();
    let head = front.guest.alloc(16, 16);
    front
        .guest
        .memory
        .write_slice(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], head)
        .unwrap();
    let status = front.guest.alloc(1, 1);
    let mut session = front.queues[0].ring.session(&front.guest.memory).unwrap();
    session.enable_interrupts().unwrap();
    let writable = [Segment::new(status, 1)];
    front.queues[0].submit(&front.guest, &[Segment::new(head, 16)], &writable, 1);
    sleep(Duration::from_millis(50));
    let start = Instant::now();
    let base = front.messages.get_vring_base(0).unwrap();
    assert_eq!(base, 2);
    assert!(start.elapsed() < Duration::from_secs(3));
    drop(front);
    still_serves(&daemon);
    daemon.stop();
}

#[test]
fn another_call_descriptor_is_signalled_at_once() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    for _ in 0..3 {
        front.works(0);
        front.call_again(0);
    }
    daemon.stop();
}

#[test]
fn kicks_through_a_pipe_work_and_its_end_is_no_storm() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let (read, write) = std::io::pipe().unwrap();
    // EventFd is only a name here: what is sent is the pipe.
    let read = OwnedFd::from(read).into_raw_fd();
    // SAFETY: the descriptor was just given up by its owner.
    let kick = unsafe { EventFd::from_raw_fd(read) };
    front.messages.set_vring_kick(0, &kick).unwrap();
    let mut write = write;
    let head = front.guest.alloc(16, 16);
    front
        .guest
        .memory
        .write_slice(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], head)
        .unwrap();
    let status = front.guest.alloc(1, 1);
    let writable = [Segment::new(status, 1)];
    front.queues[0].submit(&front.guest, &[Segment::new(head, 16)], &writable, 1);
    write.write_all(&[0; 8]).unwrap();
    assert_eq!(front.complete(0), (1, 1));
    drop(write);
    daemon.assert_idle();
    assert_eq!(front.messages.get_vring_base(0).unwrap(), 1);
    daemon.stop();
}

#[test]
fn a_ring_without_a_kick_descriptor_is_polled() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    front.works(0);
    // Bit 8: no descriptor is sent.
    front.raw.send_u64(SET_VRING_KICK, NEED_REPLY, 0x100);
    assert_eq!(front.raw.reply(), (SET_VRING_KICK, 0));
    for _ in 0..3 {
        front.works(0);
    }
    assert_eq!(front.messages.get_vring_base(0).unwrap(), 4);
    daemon.assert_idle();
    daemon.stop();
}

/// A front-end that sets a running ring up anew has not stopped it, but its old place in memory is no ring any more.
#[test]
fn a_ring_that_is_set_up_anew_waits_for_its_kick_descriptor() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let restarts: [fn(&mut FrontEnd); 3] = [
        |front| front.messages.reset_owner().unwrap(),
        |front| front.messages.set_vring_num(0, 64).unwrap(),
        |front| front.messages.set_vring_base(0, 77).unwrap(),
    ];
    for restart in restarts {
        front.works(0);
        let base = front.messages.get_vring_base(0).unwrap();
        front.start(0, base);
        restart(&mut front);
        // Whatever happens to its old place: it is not looked at, and no message fails for it.
        let index = GuestAddress(front.queues[0].ring.layout().avail_ring().0 + 2);
        let avail: u16 = front.guest.memory.read_obj(index).unwrap();
        front.guest.memory.write_obj(avail ^ 0x4000, index).unwrap();
        front.queues[0].kick.write(1).unwrap();
        let regions = front.guest.regions();
        front.messages.set_mem_table(&regions).unwrap();
        front.messages.set_features(front.features).unwrap();
        front.messages.set_vring_enable(0, true).unwrap();
        front.guest.memory.write_obj(avail, index).unwrap();
        front.start(0, base);
    }
    front.works(0);
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn a_reset_stops_all_rings_and_they_can_start_again() {
    let daemon = Daemon::start(BLK, &NULL);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    front.works(0);
    front.queues[0].settle();
    front.messages.reset_device().unwrap();
    let head = front.guest.alloc(16, 16);
    let status = front.guest.alloc(1, 1);
    let writable = [Segment::new(status, 1)];
    front
        .guest
        .memory
        .write_slice(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], head)
        .unwrap();
    front.queues[0].submit(&front.guest, &[Segment::new(head, 16)], &writable, 5);
    let call = front.queues[0].call.as_raw_fd();
    assert!(!frontend::readable(call, Duration::from_millis(100)));
    front.start(0, 1);
    assert_eq!(front.complete(0), (5, 1));
    daemon.stop();
}

#[test]
fn logs_have_levels_and_can_be_json() {
    let args = [&NULL[..], &["--log-format", "json", "--log-level", "debug"]].concat();
    let daemon = Daemon::start(BLK, &args);
    still_serves(&daemon);
    daemon.signal(Signal::SIGTERM);
    let (code, log) = daemon.outcome();
    assert_eq!(code, Some(0));
    let events: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let with = |message: &str| events.iter().find(|e| e["message"] == message);
    assert_eq!(with("ring starts").unwrap()["level"], "DEBUG");
    assert_eq!(with("worker ends").unwrap()["requests"], 1);
    let quiet = Command::new(BLK)
        .args(NULL)
        .args(["--socket-path", "/no/such/dir/s", "--log-level", "error"])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(quiet.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&quiet.stderr).contains("cannot listen on"));
    let wrong = Command::new(BLK)
        .args(NULL)
        .args(["--socket-path", "/no/such/dir/s", "--log-level", "loud"])
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("\"loud\" is no level"));
    let wrong = Command::new(BLK)
        .args(NULL)
        .args(["--socket-path", "/no/such/dir/s"])
        .env("RINGSIDE_LOG", "loud")
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("RINGSIDE_LOG=\"loud\""));
}
