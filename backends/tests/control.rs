//! The control socket of the back-ends, asked while a front-end is connected or is not.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // helpers of tests: a panic is how they fail

mod frontend;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use frontend::{Daemon, FrontEnd, PATIENCE, Setup, own_network};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe;
use ringside_control::{ApiError, ErrorCode, client};
use ringside_rings::Segment;
use serde_json::{Value, json};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const BLK: &str = env!("CARGO_BIN_EXE_ringside-blk");
const NET: &str = env!("CARGO_BIN_EXE_ringside-net");
const MIB: u64 = 1 << 20;

/// Request types and status values (VIRTIO 1.3, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

fn start(program: &str, args: &[&str]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(dir.path().join("s"));
    command.arg("--control-socket").arg(dir.path().join("c"));
    let daemon = Daemon::spawn_command(command.args(args).stdin(Stdio::null()), dir);
    daemon.wait_for_socket();
    daemon
}

fn control(daemon: &Daemon) -> PathBuf {
    daemon.dir.path().join("c")
}

fn try_ask(daemon: &Daemon, command: &str, arguments: Value) -> Result<Value, ApiError> {
    client::call(&control(daemon), command, &arguments).unwrap()
}

fn ask(daemon: &Daemon, command: &str, arguments: Value) -> Value {
    try_ask(daemon, command, arguments).unwrap()
}

/// The code of an error that has to be, and whose message has this word.
fn refusal(daemon: &Daemon, command: &str, arguments: Value, word: &str) -> ErrorCode {
    let error = try_ask(daemon, command, arguments).unwrap_err();
    assert!(error.message.contains(word), "{error:?}");
    error.code
}

fn image(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

/// Makes a request available, of 4096 bytes if it moves any. Returns where its status will be.
fn submit(front: &mut FrontEnd, kind: u32, sector: u64) -> GuestAddress {
    let memory = front.guest.memory.clone();
    let head = front.guest.alloc(16, 16);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    memory.write_slice(&header, head).unwrap();
    let data = Segment::new(front.guest.alloc(4096, 4096), 4096);
    let status = front.guest.alloc(1, 1);
    memory.write_obj(0xee_u8, status).unwrap();
    let (mut readable, mut writable) = (vec![Segment::new(head, 16)], vec![]);
    match kind {
        IN => writable.push(data),
        OUT => readable.push(data),
        _ => {}
    }
    writable.push(Segment::new(status, 1));
    front.queues[0].submit(&front.guest, &readable, &writable, sector);
    status
}

fn request(front: &mut FrontEnd, kind: u32, sector: u64) -> u8 {
    let status = submit(front, kind, sector);
    front.complete(0);
    front.guest.memory.read_obj(status).unwrap()
}

/// What is done is not done at once, but soon.
fn eventually(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "it does not come to pass");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Nothing is completed for a while.
fn nothing_completes(front: &mut FrontEnd) {
    std::thread::sleep(Duration::from_millis(100));
    let queue = &mut front.queues[0];
    let mut session = queue.ring.session(&front.guest.memory).unwrap();
    assert_eq!(session.poll_used().unwrap(), None);
}

#[test]
fn status_tells_of_the_front_end_its_queues_and_the_disk() {
    let image = image(4 * MIB);
    let path = image.path().to_str().unwrap();
    let daemon = start(BLK, &["--path", path, "--queues", "2"]);
    let status = ask(&daemon, "status", Value::Null);
    assert_eq!(status["device"], "block");
    assert_eq!(status["front-end"], "none");
    assert_eq!(status["features"], json!([]));
    assert_eq!(status["disk"]["path"], path);
    assert_eq!(status["disk"]["size"], 4 * MIB);
    let front = FrontEnd::new(
        &daemon.socket(),
        Setup {
            size: 32,
            ..Setup::default()
        },
    );
    let status = ask(&daemon, "status", Value::Null);
    assert_eq!(status["front-end"], "connected");
    let features = status["features"].as_array().unwrap();
    for name in ["FLUSH", "MQ", "EVENT_IDX", "VERSION_1", "PROTOCOL_FEATURES"] {
        assert!(features.contains(&name.into()), "{features:?}");
    }
    let queues = status["queues"].as_array().unwrap();
    assert_eq!(queues.len(), 2);
    assert_eq!(
        (&queues[0]["size"], &queues[0]["running"]),
        (&json!(32), &json!(true))
    );
    assert_eq!(queues[1]["running"], false);
    drop(front);
    eventually(|| ask(&daemon, "status", Value::Null)["front-end"] == "none");
    daemon.stop();
}

#[test]
fn an_image_grows_under_its_guest_and_shrinks_only_on_demand() {
    let image = image(4 * MIB);
    let daemon = start(BLK, &["--path", image.path().to_str().unwrap()]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    front.messages.set_backend_request_fd(&theirs).unwrap();
    assert_eq!(request(&mut front, IN, 4 * MIB / 512), 1);
    let changed = |changed: bool| json!({ "changed": changed });
    assert_eq!(ask(&daemon, "resize", json!({"size": "8M"})), changed(true));
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload.
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(request(&mut front, IN, 8 * MIB / 512 - 8), 0);
    assert_eq!(image.as_file().metadata().unwrap().len(), 8 * MIB);
    // Somebody else changes it.
    image.as_file().set_len(9 * MIB).unwrap();
    assert_eq!(ask(&daemon, "resize", Value::Null), changed(true));
    ours.read_exact(&mut message).unwrap();
    assert_eq!(ask(&daemon, "resize", json!({})), changed(false));
    let smaller = refusal(&daemon, "resize", json!({"size": MIB}), "shrink");
    assert_eq!(smaller, ErrorCode::Conflict);
    let crooked = refusal(&daemon, "resize", json!({"size": 10 * MIB + 1}), "blocks");
    assert_eq!(crooked, ErrorCode::BadRequest);
    assert_eq!(image.as_file().metadata().unwrap().len(), 9 * MIB);
    let arguments = json!({"size": MIB, "shrink": true});
    assert_eq!(ask(&daemon, "resize", arguments), changed(true));
    assert_eq!(request(&mut front, IN, MIB / 512), 1);
    assert_eq!(request(&mut front, IN, MIB / 512 - 8), 0);
    daemon.stop();

    let path = image.path().to_str().unwrap();
    let daemon = start(BLK, &["--path", path, "--read-only"]);
    refusal(&daemon, "resize", json!({"size": "8M"}), "--read-only");
    daemon.stop();
}

#[test]
fn what_was_done_is_counted() {
    let image = image(4 * MIB);
    let daemon = start(BLK, &["--path", image.path().to_str().unwrap()]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    for sector in 0..5 {
        assert_eq!(request(&mut front, IN, sector), 0);
    }
    for sector in 0..3 {
        assert_eq!(request(&mut front, OUT, sector), 0);
    }
    assert_eq!(request(&mut front, FLUSH, 0), 0);
    assert_eq!(request(&mut front, IN, 1 << 40), 1);
    assert_eq!(request(&mut front, 77, 0), 2);
    let stats = ask(&daemon, "stats", Value::Null);
    let queue = &stats["queues"][0];
    for (kind, count) in [("read", 5), ("write", 3), ("flush", 1), ("other", 2)] {
        assert_eq!(queue["requests"][kind], count, "{kind}");
    }
    let requests = queue["requests"].as_object().unwrap();
    let all = requests.values().filter_map(Value::as_u64);
    assert_eq!(all.sum::<u64>(), 11);
    assert_eq!(queue["bytes"]["read"], 5 * 4096);
    for (error, count) in [("io", 1), ("unsupported", 1), ("malformed", 0)] {
        assert_eq!(queue["errors"][error], count, "{error}");
    }
    assert_eq!(queue["latency"]["read"]["count"], 5);
    assert!(queue["kicks"].as_u64().unwrap() > 0);
    assert!(queue["notifications"].as_u64().unwrap() > 0);

    let mut stream = UnixStream::connect(control(&daemon)).unwrap();
    let head = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.write_all(head).unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    for line in [
        "ringside_front_end_connected 1",
        "ringside_block_capacity_bytes 4194304",
        "ringside_block_requests_total{queue=\"0\",operation=\"read\"} 5",
        "ringside_block_bytes_total{queue=\"0\",operation=\"write\"} 12288",
        "ringside_block_request_duration_seconds_count{queue=\"0\",operation=\"read\"} 5",
        "ringside_block_in_flight{queue=\"0\"} 0",
    ] {
        assert!(page.lines().any(|l| l == line), "{line}\n{page}");
    }
    let metrics = ask(&daemon, "metrics", Value::Null);
    assert!(page.ends_with(metrics.as_str().unwrap()));
    daemon.stop();
}

#[test]
fn limits_hold_and_who_waits_for_them_sleeps() {
    let args = ["--null", "1G", "--limit", "iops=100,iops-burst=10"];
    let daemon = start(BLK, &args);
    let size = 256;
    let setup = Setup {
        size,
        ..Setup::default()
    };
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    let begin = Instant::now();
    for sector in 0..60 {
        submit(&mut front, IN, sector);
    }
    for _ in 0..60 {
        front.complete(0);
    }
    // Ten at once, and one each hundredth of a second.
    assert!(begin.elapsed() >= Duration::from_millis(495));
    let limits = json!({"iops": 1});
    assert_eq!(
        ask(&daemon, "limits", limits),
        json!({"iops": 1, "iops-burst": 1})
    );
    for sector in 0..5 {
        submit(&mut front, IN, sector);
    }
    front.complete(0);
    daemon.assert_idle();
    let stats = ask(&daemon, "stats", Value::Null);
    assert!(stats["queues"][0]["throttled"].as_u64().unwrap() > 0);
    // The limit goes, and nobody waits for it any more.
    let begin = Instant::now();
    assert_eq!(ask(&daemon, "limits", json!({"iops": "0"})), json!({}));
    for _ in 0..4 {
        front.complete(0);
    }
    assert!(begin.elapsed() < Duration::from_secs(1));
    for (wrong, word) in [
        (json!({"speed": 1}), "no limit `speed`"),
        (json!({"iops-burst": 1}), "give both"),
        (json!({"iops": -1}), "-1"),
    ] {
        let code = refusal(&daemon, "limits", wrong, word);
        assert_eq!(code, ErrorCode::BadRequest);
    }
    assert_eq!(ask(&daemon, "limits", Value::Null), json!({}));
    daemon.stop();
}

#[test]
fn reads_and_writes_are_limited_apart() {
    let daemon = start(BLK, &["--null", "1G", "--limit", "read-bandwidth=4096"]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    // More than the bucket holds: it passes, and leaves a debt of a second.
    assert_eq!(request(&mut front, IN, 0), 0);
    for sector in 0..20 {
        assert_eq!(request(&mut front, OUT, sector), 0);
    }
    submit(&mut front, IN, 1);
    nothing_completes(&mut front);
    front.complete(0);
    daemon.stop();
}

#[test]
fn a_ring_that_waits_for_its_limit_can_be_stopped() {
    for setup in Setup::default().formats() {
        let args = ["--null", "1G", "--limit", "iops=1,iops-burst=2"];
        let daemon = start(BLK, &[&args[..], &["--in-order", "on"]].concat());
        let mut front = FrontEnd::new(&daemon.socket(), setup);
        for sector in 0..10 {
            submit(&mut front, IN, sector);
        }
        front.complete(0);
        front.complete(0);
        let begin = Instant::now();
        let base = front.messages.get_vring_base(0).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(1));
        let stats = ask(&daemon, "stats", Value::Null);
        let served = stats["queues"][0]["requests"]["read"].as_u64().unwrap();
        assert!((2..5).contains(&served), "{served}");
        // The others are not lost.
        ask(&daemon, "limits", json!({"iops": 0}));
        front.start(0, base);
        for _ in 2..10 {
            front.complete(0);
        }
        ask(&daemon, "limits", json!({"iops": 1}));
        submit(&mut front, IN, 0);
        submit(&mut front, IN, 0);
        let begin = Instant::now();
        daemon.stop();
        assert!(begin.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn a_drained_disk_serves_nobody_until_it_is_resumed() {
    let image = image(4 * MIB);
    let daemon = start(BLK, &["--path", image.path().to_str().unwrap()]);
    let drained = json!({"drained": true});
    // Without a front-end.
    assert_eq!(ask(&daemon, "drain", Value::Null), drained);
    ask(&daemon, "resume", Value::Null);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    for sector in 0..16 {
        submit(&mut front, OUT, sector);
    }
    assert_eq!(ask(&daemon, "drain", json!({"timeout": 10})), drained);
    assert_eq!(ask(&daemon, "status", Value::Null)["paused"], true);
    let stats = ask(&daemon, "stats", Value::Null);
    assert_eq!(stats["queues"][0]["in-flight"], 0);
    let served = stats["queues"][0]["requests"]["write"].as_u64().unwrap();
    for _ in 0..served {
        front.complete(0);
    }
    submit(&mut front, OUT, 1);
    nothing_completes(&mut front);
    // Again does no harm, not even if there is no time for it.
    assert_eq!(ask(&daemon, "drain", Value::Null), drained);
    let path = control(&daemon);
    for _ in 0..20 {
        let _ = client::call(&path, "drain", &json!({"timeout": 0})).unwrap();
    }
    assert_eq!(ask(&daemon, "status", Value::Null)["paused"], true);
    nothing_completes(&mut front);
    ask(&daemon, "resume", Value::Null);
    for _ in served..17 {
        front.complete(0);
    }
    // One that leaves while the disk is drained, and one that comes.
    assert_eq!(ask(&daemon, "drain", Value::Null), drained);
    submit(&mut front, OUT, 1);
    front.raw.0.shutdown(Shutdown::Both).unwrap();
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    submit(&mut front, OUT, 1);
    nothing_completes(&mut front);
    daemon.assert_idle();
    ask(&daemon, "resume", Value::Null);
    front.complete(0);
    daemon.stop();
}

#[test]
fn a_drain_that_takes_too_long_is_given_up_and_holds_up_nobody() {
    let daemon = start(BLK, &["--null", "1G"]);
    let mut front = FrontEnd::new(&daemon.socket(), Setup::default());
    // A pipe that is full: the worker waits in the write that is to interrupt the driver.
    let (_reader, writer) = pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&writer, &[0; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    // SAFETY: the descriptor is open, and given up by its owner.
    let writer = unsafe {
        <EventFd as std::os::fd::FromRawFd>::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(
            writer,
        ))
    };
    front.messages.set_vring_call(0, &writer).unwrap();
    submit(&mut front, FLUSH, 0);
    eventually(|| ask(&daemon, "stats", Value::Null)["queues"][0]["requests"]["flush"] == 1);
    let path = control(&daemon);
    let drain = std::thread::spawn(move || client::call(&path, "drain", &json!({"timeout": 1})));
    eventually(|| ask(&daemon, "status", Value::Null)["paused"] == true);
    let second = client::call(&control(&daemon), "drain", &json!({"timeout": 1}));
    let error = second.unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.message.contains("another client"), "{error:?}");
    // Nobody else waits meanwhile.
    assert_eq!(front.messages.get_queue_num().unwrap(), 1);
    let error = drain.join().unwrap().unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Busy);
    assert!(error.message.contains("still in flight"), "{error:?}");
    assert_eq!(ask(&daemon, "status", Value::Null)["paused"], false);

    // One that is overtaken by the front-end's end.
    let path = control(&daemon);
    let drain = std::thread::spawn(move || client::call(&path, "drain", &json!({"timeout": 8})));
    eventually(|| ask(&daemon, "status", Value::Null)["paused"] == true);
    front.raw.0.shutdown(Shutdown::Both).unwrap();
    assert_eq!(drain.join().unwrap().unwrap(), Ok(json!({"drained": true})));
    ask(&daemon, "resume", Value::Null);
    daemon.stop();
}

#[test]
fn it_ends_on_request() {
    for connected in [false, true] {
        let daemon = start(BLK, &["--null", "1G"]);
        let front = connected.then(|| FrontEnd::new(&daemon.socket(), Setup::default()));
        assert_eq!(ask(&daemon, "quit", Value::Null), json!({}));
        let (socket, path) = (daemon.socket(), control(&daemon));
        let (code, log) = daemon.outcome();
        assert_eq!(code, Some(0), "{log}");
        assert!(!socket.exists() && !path.exists());
        drop(front);
    }
}

#[test]
fn a_control_socket_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("c"), "precious").unwrap();
    let mut command = Command::new(BLK);
    command.args(["--null", "1G", "--socket-path"]);
    command.arg(dir.path().join("s"));
    command.arg("--control-socket").arg(dir.path().join("c"));
    let (code, log) = Daemon::spawn_command(&mut command, dir).outcome();
    assert_eq!(code, Some(1));
    assert!(log.contains("is not a socket"), "{log}");
}

#[test]
fn a_network_device_counts_and_announces() {
    if !own_network("a_network_device_counts_and_announces") {
        return;
    }
    let daemon = start(NET, &["--tap", "ctl0"]);
    let status = ask(&daemon, "status", Value::Null);
    assert_eq!(status["device"], "net");
    assert_eq!(status["interface"]["link"], "tap:ctl0");
    let stats = ask(&daemon, "stats", Value::Null);
    assert_eq!(stats["queue-pairs"][0]["tx-packets"], 0);
    let metrics = ask(&daemon, "metrics", Value::Null);
    let line = "ringside_net_rx_packets_total{queue_pair=\"0\"} 0\n";
    assert!(metrics.as_str().unwrap().contains(line), "{metrics}");
    let nobody = refusal(&daemon, "announce", Value::Null, "GUEST_ANNOUNCE");
    assert_eq!(nobody, ErrorCode::Conflict);
    for command in ["resize", "drain", "resume"] {
        let code = refusal(&daemon, command, Value::Null, "no command");
        assert_eq!(code, ErrorCode::NotFound);
    }
    let mut front = FrontEnd::new(
        &daemon.socket(),
        Setup {
            queues: 3,
            ..Setup::default()
        },
    );
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    front.messages.set_backend_request_fd(&theirs).unwrap();
    assert_eq!(
        ask(&daemon, "announce", Value::Null),
        json!({"changed": true})
    );
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message[0], 2);

    // The cable: told when it changes, and only then.
    for (state, changed, status) in [
        ("down", true, 2),
        ("down", false, 2),
        ("up", true, 3),
        ("down", true, 2),
    ] {
        let answer = ask(&daemon, "link", json!({ "state": state }));
        assert_eq!(answer, json!({ "changed": changed }));
        if changed {
            ours.read_exact(&mut message).unwrap();
            assert_eq!(message[0], 2);
        }
        let flags = VhostUserConfigFlags::empty();
        let config = front.messages.get_config(6, 2, flags, &[0; 2]).unwrap().1;
        // The guest has not announced itself, which is the other bit.
        assert_eq!(config, [status, 0]);
    }
    // It stays out for whoever comes next.
    drop(front);
    let status = ask(&daemon, "status", Value::Null);
    assert_eq!(status["interface"]["state"], "down");
    daemon.stop();
}

/// At least so many packets in a second, and a burst, are let pass; who gives and takes them has more.
#[test]
fn a_card_keeps_its_limits() {
    const RATE: u32 = 200;
    const BURST: u32 = 10;
    const PACKETS: u32 = 60;
    let least = Duration::from_secs(1) * (PACKETS - BURST - 1) / RATE;
    let limit = format!("rx-packets={RATE},rx-packets-burst={BURST}");
    let daemon = start(NET, &["--link", "generate:60", "--limit", &limit]);
    let stats = |counter: &str| {
        let stats = ask(&daemon, "stats", Value::Null);
        stats["queue-pairs"][0][counter].as_u64().unwrap()
    };
    let status = ask(&daemon, "status", Value::Null);
    assert_eq!(status["limits"]["rx-packets"], RATE);
    let begin = Instant::now();
    let setup = Setup {
        queues: 3,
        size: 256,
        ..Setup::default()
    };
    let mut front = FrontEnd::new(&daemon.socket(), setup);
    let post = |front: &mut FrontEnd| {
        for _ in 0..PACKETS {
            let buffer = front.guest.alloc(2048, 64);
            let segment = [Segment::new(buffer, 2048)];
            front.queues[0].submit(&front.guest, &[], &segment, buffer.0);
        }
    };
    let receive = |front: &mut FrontEnd| {
        for _ in 0..PACKETS {
            front.complete(0);
        }
    };
    post(&mut front);
    receive(&mut front);
    assert!(begin.elapsed() >= least, "{:?}", begin.elapsed());
    assert!(stats("rx-throttled") > 0);

    // Those for the driver go, and what it sends gets some.
    let code = refusal(&daemon, "limits", json!({ "iops": 1 }), "no limit `iops`");
    assert_eq!(code, ErrorCode::BadRequest);
    let changes = json!({ "rx-packets": 0, "tx-bytes": RATE * 72, "tx-bytes-burst": BURST * 72 });
    let limits = ask(&daemon, "limits", changes);
    assert!(limits["rx-packets"].is_null(), "{limits}");
    let before = stats("rx-throttled");
    post(&mut front);
    receive(&mut front);
    assert!(stats("rx-throttled") <= before + 1);
    let begin = Instant::now();
    let packet = Segment::new(front.guest.alloc(72, 64), 72);
    for number in 0..PACKETS {
        front.queues[1].submit(&front.guest, &[packet], &[], number.into());
    }
    for number in 0..PACKETS {
        assert_eq!(front.complete(1), (number.into(), 0));
    }
    assert!(begin.elapsed() >= least, "{:?}", begin.elapsed());
    assert!(stats("tx-throttled") > 0);
    assert_eq!(stats("tx-packets"), u64::from(PACKETS));
    drop(front);
    daemon.stop();
}
